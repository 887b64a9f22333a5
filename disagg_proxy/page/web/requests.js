// Recent requests as bars: where the time of each one was spent.

const SEGMENTS = ["queue", "prefill", "transfer", "decode"];
const FEW = 12;
const MANY = 60;

const filter = { kind: null, more: false };

const FILTERS = [
  ["requests-all", null, "requests_none"], ["requests-failed", "failed", "requests_none_failed"],
  ["requests-client", "client", "requests_none_client"],
];

const OUTCOME_SHAPE = { ok: "ready", client_error: "warning", client_left: "draining", turned_away: "draining" };

const routeName = (route) => String(route || "").split("/")[2] || t("unknown");

const pathOf = (view, r) => {
  if (!r.decode) return t("unknown");
  return `${r.prefill ? shortName(view, r.prefill) : aloneOf(view, r.decode)} → ${shortName(view, r.decode)}`;
};

const makeRequest = () =>
  el("li", { class: "request" },
    el("time"), el("span", { class: "route" }), el("span", { class: "path" }),
    el("span", { class: "bar", "aria-hidden": "true" }, ...SEGMENTS.map((name) => el("span", { class: `seg ${name}` }))),
    el("span", { class: "total" }),
    el("span", { class: "outcome" }, icon("dot"), el("span")),
    el("span", { class: "cause" }));

const showRequest = (view, most) => (node, r) => {
  const [time, route, path, bar, total, outcome, cause] = node.children;
  const how = word("outcome", r.outcome);
  const durations = SEGMENTS.filter((name) => r.bars[name])
    .map((name) => `${t(`seg_${name}`)} ${duration(r.bars[name][1] - r.bars[name][0])}`)
    .join(", ");
  // The time of its end: requests are sorted by it.
  put(time, clock(r.time + r.total_ms / 1000));
  put(route, routeName(r.route));
  put(path, pathOf(view, r));
  put(total, duration(r.total_ms));
  attribute(node, "data-outcome", r.outcome);
  put(cause, [...(r.outcome === GOOD ? [] : [r.status, r.cause, r.model]), durations].filter(Boolean).join(" · "));
  SEGMENTS.forEach((name, place) => {
    const part = bar.children[place];
    const [from, to] = r.bars[name] || [0, 0];
    part.style.setProperty("left", `${(100 * from) / most}%`);
    part.style.setProperty("width", `${(100 * (to - from)) / most}%`);
    shown(part, Boolean(r.bars[name]));
  });
  drawn(outcome.children[0], OUTCOME_SHAPE[r.outcome] || "lost");
  put(outcome.children[1], how);
};

const showRequests = (view) => {
  const wanted = filter.kind ? view.recent.filter((r) => kindOf(r.outcome) === filter.kind) : view.recent;
  const rows = wanted.slice(filter.more ? -MANY : -FEW).reverse();
  const most = Math.max(1, ...rows.map((r) => r.total_ms || 0));
  keyed($("requests"), rows, (r) => r.seq, makeRequest, showRequest(view, most));
  shown($("requests-none"), !rows.length);
  shown($("requests-head"), rows.length > 0);
  put($("requests-scale"), duration(most));
  put($("requests-none"), t(view.recent.length ? FILTERS.find(([, kind]) => kind === filter.kind)[2] : "requests_none"));
  shown($("requests-more"), wanted.length > FEW);
  put($("requests-more"), t(filter.more ? "requests_less" : "requests_more"));
  attribute($("requests-more"), "aria-expanded", String(filter.more));
  for (const [id, kind] of FILTERS) attribute($(id), "aria-pressed", String(filter.kind === kind));
  keyed($("legend"), SEGMENTS, (name) => name,
    (name) => el("li", {}, el("span", { class: `seg ${name}`, "aria-hidden": "true" }), el("span")),
    (node, name) => put(node.children[1], t(`seg_${name}`)));
};

const listenToRequests = (again) => {
  const when = (id, change) => $(id).addEventListener("click", () => { change(); again(); });
  for (const [id, kind] of FILTERS) when(id, () => { filter.kind = kind; });
  when("requests-more", () => { filter.more = !filter.more; });
};
