// The engines: prefills left, decodes right, arrows between them; and the figures above them.

const figure = (label, cls) => el("div", { class: cls || null }, el("dt", { "data-text": label }), el("dd"));

const makeCard = (instance) =>
  el("li", { class: "card" },
    el("p", { class: "state" }, icon("dot"), el("span", { class: "state-word" }), el("span", { class: "simulated" }), el("span", { class: "badge" })),
    el("h4", { class: "address" }),
    el("p", { class: "models quiet" }),
    el("p", { class: "meter-name" }, el("span"), el("span")),
    el("div", { class: "meter", "aria-hidden": "true" }, el("span")),
    el("div", { class: "kv" }, el("p", { class: "meter-name" }, el("span"), el("span")), el("div", { class: "meter", "aria-hidden": "true" }, el("span"))),
    el("dl", { class: "figures" },
      figure("tokens_in_flight"), figure("kv_waiting"), figure("served"), figure("failed", "failures"),
      figure("batch"), figure("kv_dropped", "failures")),
    el("ul", { class: "notes" }));

// Bytes are known only where KV_BYTES_PER_TOKEN is set.
const kvText = (size, prompts) => (size ? bytes(size) : plural("prompts", prompts));

const notesOf = (view, instance) => {
  const notes = [];
  const served = view.flows.filter((flow) => flow.decode === instance.key);
  const alone = served.filter((flow) => !flow.prefill).reduce((sum, flow) => sum + flow.total, 0);
  if (alone) notes.push(t("served_alone", { count: number(alone), total: number(served.reduce((sum, flow) => sum + flow.total, 0)) }));
  const state = stateOf(instance);
  if (KEPT_FROM.includes(state)) notes.push(t(`why_${state}`));
  else if (state !== "ready" && instance.reason) notes.push(instance.reason);
  if (instance.breaker === "half-open") notes.push(t("breaker_half"));
  if (instance.rejections_total) notes.push(plural("rejections", instance.rejections_total));
  const dropped = instance.engine_load?.kv_dropped;
  if (dropped) notes.push(instance.role === "prefill" ? plural("unfetched", dropped) : plural("recomputed", dropped));
  if (instance.freezes) notes.push(plural("froze", instance.freezes, { replays: instance.replays }));
  if (instance.cannot_exchange_with?.length) notes.push(t("apart", { names: instance.cannot_exchange_with.join(", ") }));
  return notes;
};

const showKvCache = (node, { kv_usage: usage, kv_capacity_tokens: capacity }) => {
  const [caption, meter] = node.children;
  put(caption.firstChild, t("kv_cache", { share: number(100 * usage) }));
  put(caption.lastChild, known(capacity) ? t("kv_cache_capacity", { tokens: number(capacity) }) : "");
  meter.firstChild.style.setProperty("width", `${Math.min(100, 100 * usage)}%`);
};

const showCard = (view, most) => (node, instance) => {
  const state = stateOf(instance);
  attribute(node, "data-state", state);
  attribute(node, "data-key", instance.key);
  const [line, address, models, caption, meter, kvCache, figures, notes] = node.children;
  const load = instance.engine_load;
  drawn(line.children[0], state);
  put(line.children[1], word("state", state));
  put(line.children[2], instance.simulated ? t("simulated") : "");
  put(line.children[3], instance.restart_wanted ? t("restart_wanted") : "");
  put(address, instance.http_address);
  put(models, instance.models.join(", "));
  put(caption.firstChild, plural("meter", instance.in_flight));
  put(caption.lastChild, t("meter_scale", { most: number(most) }));
  meter.firstChild.style.setProperty("width", `${Math.min(100, (100 * instance.in_flight) / most)}%`);
  const kv = kvText(instance.kv_waiting_bytes, instance.kv_waiting);
  shown(kvCache, known(load?.kv_usage));
  if (known(load?.kv_usage)) showKvCache(kvCache, load);
  const batch = `${number(load?.running)} / ${number(load?.waiting)}`;
  const values = [instance.tokens_in_flight, kv, instance.requests_total, instance.failures_total, batch, load?.kv_dropped ?? null];
  values.forEach((value, place) => {
    const [term, data] = figures.children[place].children;
    put(term, t(term.dataset.text));
    put(data, typeof value === "string" ? value : number(value));
  });
  attribute(figures.children[3], "data-some", instance.failures_total > 0);
  shown(figures.children[4], known(load?.running));
  shown(figures.children[5], known(load?.kv_dropped));
  attribute(figures.children[5], "data-some", load?.kv_dropped > 0);
  keyed(notes, notesOf(view, instance), (text) => text, () => el("li"), put);
};

const showMachine = (view) => {
  const most = Math.max(8, ...view.instances.map((i) => i.in_flight));
  for (const role of ["prefill", "decode"]) {
    const all = byRole(view, role);
    shown($(`none-${role}`), !all.length);
    keyed($(`${role}-cards`), all, (i) => i.key, makeCard, showCard(view, most));
  }
  showPlacement(view);
  showFlowList(view);
  drawLane(view);
};

// Where elastic placement has requests prefilled; nothing where every request is split.
const showPlacement = ({ placement }) => {
  const elastic = placement?.mode === "elastic";
  const ways = elastic ? Object.entries(placement.requests) : [];
  const total = ways.reduce((sum, [, count]) => sum + count, 0);
  const parts = ways.filter(([, count]) => count).map(([way, count]) => t("placement_share", { share: number((100 * count) / total), way: word("way", way) }));
  shown($("placement"), elastic);
  const chose = elastic ? t(total ? "placement" : "placement_none", { parts: parts.join(t("comma")), count: number(total) }) : "";
  put($("placement"), elastic && placement.state !== "elastic" ? `${chose} ${word("placement", placement.state)}` : chose);
};

const showFlowList = (view) => {
  shown($("flow-none"), !view.flows.length);
  keyed($("flow-list"), view.flows, flowKey, () => el("li"), (node, flow) =>
    put(node, t("flow_line", {
      prefill: flow.prefill ? nameOf(view, flow.prefill) : aloneOf(view, flow.decode), decode: nameOf(view, flow.decode), count: number(flow.in_flight), total: number(flow.total),
    })));
};

const middleOf = (card, lane) => {
  const box = card.getBoundingClientRect();
  return box.top - lane.top + Math.min(box.height / 2, 90);
};

// A suspect or busy one still gets what no other can serve.
const takesRequests = (instance) => ["ready", "suspect", "busy"].includes(stateOf(instance));

// Pairs that can exchange KV are dotted until they have traffic.
const pathsOf = (view) => {
  const paths = new Map();
  for (const p of byRole(view, "prefill"))
    for (const d of byRole(view, "decode"))
      if (p.key !== d.key && takesRequests(p) && takesRequests(d) && !(p.cannot_exchange_with || []).includes(d.http_address)) {
        const flow = { prefill: p.key, decode: d.key, in_flight: 0, total: 0 };
        paths.set(flowKey(flow), flow);
      }
  for (const flow of view.flows) paths.set(flowKey(flow), flow);
  return [...paths.values()];
};

const drawLane = (view) => {
  const lane = $("lane");
  const box = lane.parentElement.getBoundingClientRect();
  if (!box.width || getComputedStyle(lane).display === "none") return;
  attribute(lane, "viewBox", `0 0 ${box.width} ${box.height}`);
  const cards = new Map([...document.querySelectorAll("#stage .card")].map((card) => [card.dataset.key, card]));
  const paths = pathsOf(view).filter((flow) => cards.has(flow.decode) && (flow.prefill ? cards.has(flow.prefill) : !isPrefill(view, flow.decode)));
  const many = paths.length > 6;
  const plates = [];
  const wayOf = (flow) => {
    const to = middleOf(cards.get(flow.decode), box);
    const from = flow.prefill ? middleOf(cards.get(flow.prefill), box) : to;
    const pace = flowRate(flow);
    const thick = Math.min(12, 1.5 + 1.6 * Math.sqrt(flow.in_flight + pace));
    return { to, from, pace, thick, begin: flow.prefill ? 4 : box.width * 0.55, end: box.width - 11 - thick };
  };
  keyed($("wires"), paths, flowKey, () => svg("g", {}, svg("path", { class: "wire" }), svg("path", { class: "head" })),
    (node, flow) => {
      const { to, from, pace, thick, begin, end } = wayOf(flow);
      const [wire, head] = node.children;
      const bend = (end - begin) / 2;
      const tip = 6 + thick;
      attribute(node, "class", flow.in_flight || pace > 0 ? "flow busy" : flow.total ? "flow" : "flow unused");
      attribute(wire, "d", `M${begin} ${from}C${begin + bend} ${from} ${end - bend} ${to} ${end} ${to}`);
      wire.style.setProperty("stroke-width", thick);
      attribute(head, "d", `M${end - 1} ${to - tip * 0.8}L${end + tip} ${to}L${end - 1} ${to + tip * 0.8}Z`);
    });
  const labelled = paths.filter((flow) => flow.total && (!many || flow.in_flight || flowRate(flow)));
  // The busiest flows are labelled first: labels that would overlap are moved.
  labelled.sort((a, b) => b.in_flight + flowRate(b) - a.in_flight - flowRate(a));
  keyed($("labels"), labelled, flowKey,
    () => svg("g", { class: "label" }, svg("rect", { rx: 9 }), svg("text"), svg("text", { class: "more" })),
    (node, flow) => {
      const { to, from, pace, begin, end } = wayOf(flow);
      const [plate, count, more] = node.children;
      put(count, t("flow_label", { count: number(flow.in_flight) }));
      put(more, pace >= 0.05 ? t("flow_rate", { rate: rate(pace) }) : t("flow_total", { total: number(flow.total) }));
      const width = Math.max(count.getComputedTextLength(), more.getComputedTextLength()) + 18;
      const at = (part) => [begin + (end - begin) * part, from + (to - from) * (part * part * (3 - 2 * part))];
      const free = ([x, y]) => plates.every(([otherX, otherY]) => Math.abs(x - otherX) > width || Math.abs(y - otherY) > 38);
      const [x, y] = [0.45, 0.25, 0.66, 0.14, 0.8].map(at).find(free) || at(0.45);
      plates.push([x, y]);
      for (const [text, down] of [[count, -2], [more, 13]]) {
        attribute(text, "x", x);
        attribute(text, "y", y + down);
      }
      for (const [name, value] of Object.entries({ x: x - width / 2, y: y - 17, width, height: 36 })) attribute(plate, name, value);
    });
};

// The newest step is incomplete; use the one before it.
const lastOf = (view) => view.rates.steps.findLast((step) => step.requests && step.time + view.rates.step_s <= view.now) || null;

const TILES = ["requests", "tokens", "ttft", "gap", "flight", "kv"];

const tileValues = (view) => {
  const step = lastOf(view);
  const { latency, totals } = view;
  const perSecond = (count) => (step ? rate(count(step) / view.rates.step_s) : t("unknown"));
  const finished = finishedOf(totals.requests);
  const decodes = byRole(view, "decode");
  const sum = (name) => decodes.reduce((all, i) => all + i[name], 0);
  const p50 = ({ p50 }) => duration(p50);
  const p99 = ({ p99 }) => t("tile_p99", { p99: duration(p99) });
  return {
    requests: [t("tile_requests"), perSecond((s) => finishedOf(s.requests)), t("tile_requests_more", { count: number(finished), failed: number(countOf(totals.requests, "failed")), client: number(countOf(totals.requests, "client")) })],
    tokens: [t("tile_tokens"), perSecond((s) => s.pieces), t("tile_tokens_more")],
    ttft: [t("tile_ttft"), p50(latency.ttft), p99(latency.ttft)],
    gap: [t("tile_gap"), p50(latency.gap), p99(latency.gap)],
    flight: [t("tile_flight"), number(totals.in_flight), t("tile_flight_more", { queued: number(totals.queued) })],
    kv: [t("tile_kv"), kvText(sum("kv_waiting_bytes"), sum("kv_waiting")), t("tile_kv_more")],
  };
};

const showTiles = (view) => {
  const values = tileValues(view);
  keyed($("tiles"), TILES, (name) => name,
    () => el("div", {}, el("dt"), el("dd", { class: "big" }), el("dd", { class: "quiet" })),
    (node, name) => values[name].forEach((text, place) => put(node.children[place], text)));
};
