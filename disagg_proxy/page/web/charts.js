// Line charts of the last ten minutes. Each line has a dash pattern of its own, so that colours are not needed.

const LONGEST = 600;
const SHORTEST = 120;
const SIZE = { width: 320, height: 132, left: 8, right: 8, top: 14, bottom: 20 };

// Null where the proxy has recorded nothing: before its start, or while it was stalled.
const perSecond = (kind) => (s, per) => (s.requests ? countOf(s.requests, kind) / per : null);

const CHARTS = [
  { id: "ttft", show: duration, lines: [["series_p50", (s) => s.ttft.p50], ["series_p99", (s) => s.ttft.p99]] },
  { id: "gap", show: duration, lines: [["series_p50", (s) => s.gap.p50], ["series_p99", (s) => s.gap.p99]] },
  { id: "requests", show: (v) => t("per_second", { rate: rate(v) }), lines: [["series_ok", perSecond("ok")], ["series_failed", perSecond("failed")], ["series_client", perSecond("client")]] },
  { id: "load", show: (v) => number(v), top: (v) => plural("requests_count", v), lines: [["series_flight", (s) => s.in_flight], ["series_queued", (s) => s.queued]] },
];

// Rounds up to 1, 2, 5, 10, …, so that the scale changes rarely.
const niceMaximum = (value) => {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((part) => part * power >= value * 0.999);
};

const makeChart = (chart) => {
  const { width, height, left, right, bottom } = SIZE;
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "plot", tabindex: "0", role: "group" },
    svg("path", { class: "grid", d: [0, 0.5, 1].map((part) => `M${left} ${gridAt(part)}H${width - right}`).join("") }),
    svg("path", { class: "area" }), ...chart.lines.map((_, place) => svg("path", { class: `line ${SERIES[place]}` })).reverse(),
    svg("path", { class: "hair" }),
    svg("text", { class: "axis", x: left, y: SIZE.top - 4 }),
    svg("text", { class: "axis", x: left, y: height - 5 }),
    svg("text", { class: "axis middle", x: (width - left - right) / 2 + left, y: height - 5 }),
    svg("text", { class: "axis end", x: width - right, y: height - 5 }),
    svg("text", { class: "axis empty", x: width / 2, y: (height - bottom) / 2 + 8 }),
    svg("text", { class: "axis", x: left, y: gridAt(0) - 3 }, "0"));
  const node = el("figure", { class: `chart ${chart.id}` },
    el("figcaption", {}, el("span", { class: "chart-title" }), el("span", { class: "readout" })),
    el("ul", { class: "series" }, ...chart.lines.map(([key], place) => el("li", { class: SERIES[place] },
      svg("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" }, svg("path", { class: `line ${SERIES[place]}`, d: "M1 4H21" })), el("span", { "data-text": key })))),
    plot);
  const state = { node, plot, picked: null, steps: [], readable: [], chart };
  charts.set(chart.id, state);
  plot.addEventListener("pointermove", (e) => pick(state, nearest(state, e)));
  plot.addEventListener("pointerleave", () => pick(state, null));
  plot.addEventListener("blur", () => pick(state, null));
  plot.addEventListener("keydown", (e) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (!move || !state.readable.length) return;
    e.preventDefault();
    const last = state.readable.length - 1;
    const from = state.picked === null ? last + (move < 0 ? 1 : 0) : state.readable.findIndex((b) => b.time === state.picked);
    pick(state, state.readable[Math.min(last, Math.max(0, from + move))].time, true);
  });
  return node;
};

const SERIES = ["one", "two", "three"];

const charts = new Map();

const gridAt = (part) => SIZE.height - SIZE.bottom - part * (SIZE.height - SIZE.top - SIZE.bottom);

const acrossAt = (time, { now, span }) => SIZE.left + (SIZE.width - SIZE.left - SIZE.right) * Math.min(1, Math.max(0, 1 - (now - time) / span));

const nearest = (state, event) => {
  const box = state.plot.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * SIZE.width;
  let best = null;
  for (const b of state.readable)
    if (!best || Math.abs(acrossAt(b.time, state) - x) < Math.abs(acrossAt(best.time, state) - x)) best = b;
  return best && best.time;
};

const pick = (state, time, aloud = false) => {
  state.picked = time;
  attribute(state.node.querySelector(".readout"), "aria-live", aloud ? "polite" : null);
  readOut(state);
};

const describe = ({ chart, per }, step) =>
  chart.lines.map(([key, value]) => `${t(key)} ${known(value(step, per)) ? chart.show(value(step, per)) : t("unknown")}`).join(" · ");

const readOut = (state) => {
  const { chart, readable, node, plot } = state;
  const step = readable.find((b) => b.time === state.picked) || null;
  const latest = readable[readable.length - 1] || null;
  const text = step ? `${clock(step.time)} · ${describe(state, step)}` : latest ? describe(state, latest) : "";
  put(node.querySelector(".readout"), text);
  const x = step && acrossAt(step.time, state);
  attribute(plot.querySelector(".hair"), "d", step ? `M${x} ${SIZE.top}V${SIZE.height - SIZE.bottom}` : "M0 0");
  attribute(plot, "aria-label", t("chart_keys", { title: t(`chart_${chart.id}`), latest: latest ? describe(state, latest) : t("chart_empty") }));
};

// Runs of points without a missing value in between.
const runsOf = (points) => {
  const runs = [];
  let run = null;
  for (const point of points) {
    if (point[1] === null) run = null;
    else if (run) run.push(point);
    else runs.push((run = [point]));
  }
  return runs;
};

const at = ([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`;

// A single point is drawn as a dot.
const strokeOf = (points) => runsOf(points).map((run) => `M${run.map(at).join("L")}h.01`).join("");

const areaOf = (points, floor) =>
  runsOf(points).filter((run) => run.length > 1)
    .map((run) => `M${at([run[0][0], floor])}L${run.map(at).join("L")}L${at([run[run.length - 1][0], floor])}Z`).join("");

const drawChart = (state, view) => {
  const { chart, plot, node } = state;
  state.now = view.now;
  // Shortly after the start the charts cover only the uptime.
  state.span = Math.min(LONGEST, Math.max(SHORTEST, 60 * Math.ceil(view.uptime_s / 60)));
  state.per = view.rates.step_s;
  state.steps = view.rates.steps.filter((s) => s.time > view.now - state.span && s.time + state.per <= view.now);
  state.readable = state.steps.filter((s) => chart.lines.some(([, value]) => known(value(s, state.per))));
  const values = chart.lines.map(([, value]) => state.steps.map((s) => value(s, state.per)));
  const top = niceMaximum(Math.max(0, ...values.flat().filter(known)));
  const points = values.map((line) =>
    line.map((value, place) => [acrossAt(state.steps[place].time, state), known(value) ? gridAt(value / top) : null]));
  const some = values.flat().some(known);
  points.forEach((line, place) => attribute(plot.querySelector(`.line.${SERIES[place]}`), "d", strokeOf(line)));
  attribute(plot.querySelector(".area"), "d", areaOf(points[0], gridAt(0)));
  const [high, old, middle, now, empty] = plot.querySelectorAll("text");
  put(high, some ? (chart.top || chart.show)(top) : "");
  put(old, t("chart_ago", { minutes: number(state.span / 60) }));
  put(middle, t("chart_ago", { minutes: number(state.span / 120, 1) }));
  put(now, t("chart_now"));
  put(empty, some ? "" : t("chart_empty"));
  put(node.querySelector(".chart-title"), t(`chart_${chart.id}`));
  for (const name of node.querySelectorAll(".series span")) put(name, t(name.dataset.text));
  readOut(state);
};

const showCharts = (view) => {
  keyed($("charts"), CHARTS, (chart) => chart.id, makeChart, (node, chart) => drawChart(charts.get(chart.id), view));
};
