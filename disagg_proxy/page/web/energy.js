// Energy of the GPUs, where engines report it: figures per role, one line per GPU, and its charts.

const watt = (value) => (known(value) ? `${number(value)} W` : t("unknown"));

// Three digits, in mJ below 1 J.
const joule = (value) => {
  if (!known(value)) return t("unknown");
  const [scaled, unit] = value < 1 ? [1000 * value, "mJ"] : [value, "J"];
  return `${number(scaled, scaled < 10 ? 2 : scaled < 100 ? 1 : 0)} ${unit}`;
};

const ENERGY_TILES = ["prefill", "decode", "request", "wh"];

const ENERGY_CHARTS = [
  { id: "power", show: watt, lines: [["role_prefill", (s) => s.watts?.prefill ?? null], ["role_decode", (s) => s.watts?.decode ?? null]] },
  { id: "token", show: joule, lines: [["role_prefill", (s) => s.joules_per_token?.prefill ?? null], ["role_decode", (s) => s.joules_per_token?.decode ?? null]] },
];

const energyValues = ({ roles, joules_per_request: request, requests_per_wh: wh, requests, window_s: seconds }) => {
  const role = (name) => [t(`energy_${name}`), joule(roles[name].joules_per_token), t("energy_role_more", { watts: watt(roles[name].watts), idle: watt(roles[name].idle_watts) })];
  const over = t("energy_over", { count: number(requests), age: age(seconds) });
  return {
    prefill: role("prefill"), decode: role("decode"),
    request: [t("energy_request"), joule(request), over],
    wh: [t("energy_wh"), number(wh, 1), t("energy_wh_more")],
  };
};

const gpuLine = (view, gpu) => {
  const name = known(gpu.index) ? t("energy_gpu", { index: gpu.index, name: gpu.name }) : gpu.name || gpu.uuid;
  const role = gpu.role === "host" ? t("energy_host") : `${t(`role_${gpu.role}`)} ${shortName(view, gpu.instance)}`;
  const parts = [`${name}: ${role}`];
  if (gpu.simulated) parts.push(t("simulated"));
  if (gpu.shared_with.length) parts.push(t("energy_shared", { names: gpu.shared_with.join(", ") }));
  if (gpu.state !== "ok") parts.push(word("energy_state", gpu.state));
  if (known(gpu.watts)) parts.push(watt(gpu.watts));
  if (known(gpu.sm_clock_mhz)) parts.push(`SM ${number(gpu.sm_clock_mhz)} MHz`);
  if (known(gpu.utilization)) parts.push(t("energy_busy", { share: number(100 * gpu.utilization) }));
  if (known(gpu.temperature_c)) parts.push(`${number(gpu.temperature_c)} °C`);
  const limits = gpu.throttle.filter((reason) => reason !== "gpu_idle");
  if (limits.length) parts.push(t("energy_throttle", { reasons: limits.join(", ") }));
  if (gpu.source === "integral") parts.push(t("energy_integral"));
  return parts.join(" · ");
};

const showEnergy = (view) => {
  shown($("energy"), Boolean(view.energy));
  if (!view.energy) return;
  const values = energyValues(view.energy);
  keyed($("energy-tiles"), ENERGY_TILES, (name) => name,
    () => el("div", {}, el("dt"), el("dd", { class: "big" }), el("dd", { class: "quiet" })),
    (node, name) => values[name].forEach((text, place) => put(node.children[place], text)));
  keyed($("energy-gpus"), view.energy.gpus, (gpu) => gpu.uuid, () => el("li"), (node, gpu) => put(node, gpuLine(view, gpu)));
  keyed($("energy-charts"), ENERGY_CHARTS, (chart) => chart.id, makeChart, (node, chart) => drawChart(charts.get(chart.id), view));
};
