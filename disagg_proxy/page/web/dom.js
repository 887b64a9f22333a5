// Helpers for elements. Text is only ever set as text: names of models, reasons and responses are untrusted.

const $ = (id) => document.getElementById(id);

const put = (node, text) => {
  if (node.textContent !== text) node.textContent = text;
  return node;
};

const attribute = (node, name, value) => {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value === true ? "" : value);
  return node;
};

const filled = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) attribute(node, name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
};

const el = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);

const svg = (tag, attributes = {}, ...children) =>
  filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const shown = (node, visible) => {
  if (node.hidden === visible) node.hidden = !visible;
  return node;
};

// Reconciles the children of `parent` with `items` by key, so that focus and animations are kept.
const nodesOf = new WeakMap();
const keyed = (parent, items, keyOf, make, update) => {
  const old = nodesOf.get(parent) || new Map();
  const now = new Map();
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = String(keyOf(item));
    const node = old.get(key) || make(item);
    old.delete(key);
    now.set(key, node);
    update(node, item);
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
  }
  for (const node of old.values()) node.remove();
  nodesOf.set(parent, now);
};

// A shape for each state, so that colours are not needed.
const SHAPES = {
  ready: ["M8 1.2a6.8 6.8 0 1 1 0 13.6A6.8 6.8 0 0 1 8 1.2Z", "M4.8 8.2l2.2 2.2 4.2-4.6"],
  probing: ["M8 2.2a5.8 5.8 0 0 1 0 11.6Z", "M8 2.2a5.8 5.8 0 1 0 0 11.6"],
  frozen: ["", "M8 1v14M1.9 4.5l12.2 7M14.1 4.5l-12.2 7M6 2.2l2 1.8 2-1.8M6 13.8L8 12l2 1.8"],
  lost: ["M2 2h12v12H2Z", "M5.2 5.2l5.6 5.6M10.8 5.2l-5.6 5.6"],
  ejected: ["M8 1.2a6.8 6.8 0 1 1 0 13.6A6.8 6.8 0 0 1 8 1.2Z", "M3.6 3.6l8.8 8.8"],
  suspect: ["M8 .8L15.2 8 8 15.2.8 8Z", "M6.4 6.5a1.7 1.7 0 1 1 2.3 1.6c-.5.2-.7.5-.7 1M8 11.2v.2"],
  busy: ["M3 1.2h10L9 8l4 6.8H3L7 8Z", "M6 4h4"],
  draining: ["M8 .8L15.2 8 8 15.2.8 8Z", "M6.4 5.4v5.2M9.6 5.4v5.2"],
  warning: ["M8 1.4l7 12.8H1Z", "M8 6v3.6M8 11.9v.3"],
  arrow: ["", "M2 8h11M9 4l4 4-4 4"],
  dot: ["M8 5a3 3 0 1 1 0 6 3 3 0 0 1 0-6Z", ""],
};

const icon = (shape) => {
  const node = svg("svg", { viewBox: "0 0 16 16", class: "icon", "aria-hidden": "true", focusable: "false" });
  return drawn(node, shape);
};

const drawn = (node, shape) => {
  if (node.dataset.shape === shape) return node;
  node.dataset.shape = shape;
  const [solid, lines] = SHAPES[shape] || SHAPES.dot;
  node.replaceChildren(svg("path", { d: solid, class: "solid" }), svg("path", { d: lines, class: solid ? "cut" : "lines" }));
  return node;
};
