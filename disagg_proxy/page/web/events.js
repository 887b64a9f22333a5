// The events, newest first: icon and name of the kind, then the text from the proxy.

const EVENT_SHAPE = {
  admitted: "ready", freed: "ready", undrained: "ready", breaker_closed: "ready", frozen: "frozen",
  lost: "lost", restart_wanted: "warning", restarted: "lost", worker_replaced: "lost", drain_failed: "warning", replayed: "arrow", kv_drained: "arrow", role: "arrow", drained: "draining",
  probing: "probing", breaker_opened: "warning", pair_refused: "warning",
  clocks_set: "ready", clocks_default: "warning",
};

const SHOWN_EVENTS = 100;

const showEvents = (view) => {
  shown($("events-none"), !view.events.length);
  keyed(
    $("events"),
    view.events.slice(-SHOWN_EVENTS).reverse(),
    (e) => e.seq,
    () => el("li", {}, icon("dot"), el("time"), el("span", { class: "kind" }), el("span", { class: "who" }), el("span", { class: "why" })),
    (node, e) => {
      const [shape, time, kind, who, why] = node.children;
      attribute(node, "data-kind", e.kind);
      drawn(shape, EVENT_SHAPE[e.kind] || "dot");
      put(time, clock(e.time));
      put(kind, word("event", e.kind));
      put(who, e.instance ? nameOf(view, e.instance) : "");
      put(why, e.text || "");
    },
  );
};
