// The current view, assembled from the feed (the counterpart of joined() in page/feed.py).

const model = { view: null, at: 0, rates: new Map() };

const joined = (before, update) => {
  const { gone, ...view } = update;
  for (const ring of ["recent", "events"]) {
    const away = new Set(gone[ring]);
    view[ring] = [...before[ring].filter((e) => !away.has(e.seq)), ...update[ring]].sort((a, b) => a.seq - b.seq);
  }
  const old = before.rates.steps;
  const steps = new Map([...old, ...update.rates.steps].map((step) => [step.time, step]));
  view.rates = { ...update.rates, steps: [...steps.values()].sort((a, b) => a.time - b.time).slice(-old.length) };
  return view;
};

const take = (kind, data) => {
  model.view = kind === "update" && model.view ? joined(model.view, data) : data;
  model.at = Date.now() / 1000;
  countFlows(model.view);
};

const flowKey = (flow) => `${flow.prefill || ""} ${flow.decode || ""}`;

// Requests per second of each flow over the last ten seconds.
const countFlows = (view) => {
  const there = new Set();
  for (const flow of view.flows) {
    const key = flowKey(flow);
    there.add(key);
    const seen = model.rates.get(key) || [];
    seen.push([view.now, flow.total]);
    while (seen.length > 2 && seen[0][0] < view.now - 10) seen.shift();
    model.rates.set(key, seen);
  }
  for (const key of model.rates.keys()) if (!there.has(key)) model.rates.delete(key);
};

const flowRate = (flow) => {
  const seen = model.rates.get(flowKey(flow)) || [];
  if (seen.length < 2) return 0;
  const [first, last] = [seen[0], seen[seen.length - 1]];
  return last[0] > first[0] ? Math.max(0, last[1] - first[1]) / (last[0] - first[0]) : 0;
};

const byRole = (view, role) =>
  view.instances.filter((i) => (i.roles || [i.role]).includes(role)).sort((a, b) => a.http_address.localeCompare(b.http_address, "en", { numeric: true }));

// The state to show for an instance: if it is ready, what keeps requests from it (state_of in page/verdict.py).
const stateOf = (instance) => {
  if (instance.state !== "ready") return instance.state;
  if (instance.draining) return "draining";
  if (instance.breaker === "open") return "ejected";
  return instance.suspect ? "suspect" : instance.busy ? "busy" : "ready";
};

// Those that have their cause in the texts.
const KEPT_FROM = ["ejected", "suspect", "busy"];

// Only the port, if all engines share a host.
const hostOf = (address) => address.slice(0, address.lastIndexOf(":"));

const shortName = (view, key) => {
  const name = nameOf(view, key);
  const hosts = new Set(view.instances.map((i) => hostOf(i.http_address)));
  return hosts.size === 1 && hosts.has(hostOf(name)) ? name.slice(name.lastIndexOf(":")) : name;
};

const nameOf = (view, key) => view.instances.find((i) => i.key === key)?.http_address || key;

const isPrefill = (view, key) => view.instances.find((i) => i.key === key)?.role === "prefill";

// What takes the place of the prefill where the engine `key` serves alone.
const aloneOf = (view, key) => t(isPrefill(view, key) ? "way_prefill_alone" : "alone");

const GOOD = "ok";

// What the client is the cause of; every other outcome but "ok" is a failure of the service.
const CLIENT = ["client_error", "client_left"];

const kindOf = (outcome) => (outcome === GOOD ? "ok" : CLIENT.includes(outcome) ? "client" : "failed");

const countOf = (outcomes, kind) =>
  Object.entries(outcomes).reduce((sum, [name, count]) => sum + (kindOf(name) === kind ? count : 0), 0);

const finishedOf = (outcomes) => Object.values(outcomes).reduce((sum, count) => sum + count, 0);
