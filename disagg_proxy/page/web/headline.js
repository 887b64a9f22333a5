// Is it working? One sentence, what was done about what is not, and the story of the last incident.

const roleName = (role) => t(`role_${role}`);

const pairsText = (count) => plural("pair", count);

const because = (instance) => String(instance.reason || "").replace(/\.$/, "");

const since = (view, instance) => {
  const last = view.events.findLast((e) => e.kind === instance.state && e.instance === instance.key);
  return last ? view.now - last.time : null;
};

const whyNoPair = (view) => {
  for (const role of ["prefill", "decode"]) {
    const all = byRole(view, role);
    if (!all.length) return t(`why_none_${role}`);
    if (!all.some((i) => stateOf(i) === "ready")) return t("why_none_ready", { role: roleName(role) });
  }
  return t("why_apart");
};

const whatWasDone = (view, instance) => {
  const steps = [];
  // Replays are counted for good; the events since it froze are those of this time.
  const frozen = view.events.findLastIndex((e) => e.kind === "frozen" && e.instance === instance.key);
  const replays = view.events
    .slice(frozen + 1)
    .filter((e) => e.kind === "replayed" && e.instance === instance.key)
    .reduce((sum, e) => sum + e.count, 0);
  if (replays) steps.push(plural("detail_replayed", replays));
  else steps.push(t("detail_replayed_none"));
  steps.push(t(instance.restart_wanted ? "detail_restart" : "detail_waiting"));
  return steps;
};

const others = (pairs) => (pairs ? plural("detail_others", pairs) : t("detail_others_none"));

const judged = (view) => {
  const frozen = view.instances.filter((i) => i.state === "frozen");
  const pairs = view.health.pairs;
  if (view.health.status === "stopping") return { level: "warn", sign: "warning", text: t("head_stopping"), details: [] };
  if (frozen.length) {
    const details = frozen.flatMap((i) => [
      t("detail_frozen", { role: roleName(i.role), name: i.http_address, reason: because(i) }),
      ...whatWasDone(view, i),
    ]);
    const [first] = frozen;
    const one = t("head_frozen", { role: roleName(first.role), name: first.http_address });
    return {
      level: pairs ? "warn" : "bad",
      sign: "frozen",
      age: Math.max(...frozen.map((i) => since(view, i)).filter(known)),
      text: frozen.length === 1 ? one : t("head_frozen_many", { count: frozen.length }),
      details: [...details, others(pairs)],
    };
  }
  const off = view.instances.filter((i) => stateOf(i) !== "ready" || i.restart_wanted);
  const details = off.map((i) =>
    t("detail_state", { role: roleName(i.role), name: i.http_address, state: t(`state_${stateOf(i)}`), reason: i.reason || "" }),
  );
  if (pairs) {
    const key = off.length ? "head_serving_but" : "head_serving";
    return { level: off.length ? "warn" : "ok", sign: off.length ? "warning" : "ready", text: t(key, { pairs: pairsText(pairs) }), details };
  }
  if (view.health.status === "ok") return { level: "warn", sign: "warning", text: t("head_alone"), details };
  return { level: "bad", sign: "lost", text: t("head_no_pair", { why: whyNoPair(view) }), details };
};

const TROUBLE = new Set(["frozen", "lost", "restart_wanted", "breaker_opened"]);
const OVER = new Set(["admitted", "breaker_closed"]);
const STORY = new Set([...TROUBLE, ...OVER, "freed", "replayed", "restarted", "probing"]);

// The events of one instance from its last trouble on, to its end if it has ended.
const lastIncident = (view) => {
  const last = view.events.findLastIndex((e) => TROUBLE.has(e.kind));
  if (last < 0) return null;
  const { instance } = view.events[last];
  const own = view.events.filter((e) => e.instance === instance && STORY.has(e.kind));
  // Troubles that follow each other without an end between them are one.
  let start = own.lastIndexOf(view.events[last]);
  while (start > 0 && !OVER.has(own[start - 1].kind)) start--;
  while (start < own.length && !TROUBLE.has(own[start].kind)) start++;
  const story = own.slice(start);
  const end = story.findIndex((e) => OVER.has(e.kind));
  return { instance, steps: end < 0 ? story : story.slice(0, end + 1), over: end >= 0 };
};

const showIncident = (view) => {
  const incident = view && lastIncident(view);
  shown($("incident"), Boolean(incident));
  if (!incident) return;
  const instance = view.instances.find((i) => i.key === incident.instance);
  const { steps } = incident;
  put($("incident-title"), t("incident_title", { role: instance ? roleName(instance.role) : "", name: nameOf(view, incident.instance) }));
  put($("incident-end"), incident.over ? t("incident_over", { age: duration(1000 * (steps[steps.length - 1].time - steps[0].time)) }) : t("incident_open"));
  keyed(
    $("incident-steps"),
    steps.slice(-6),
    (e) => e.seq,
    () => el("li", {}, el("time"), el("span", { class: "kind" }), el("span", { class: "why" })),
    (node, e) => {
      const [time, kind, why] = node.children;
      put(time, clock(e.time));
      put(kind, word("event", e.kind));
      put(why, e.text);
    },
  );
};

const showHeadline = (connected) => {
  const { view } = model;
  let verdict = { level: "wait", sign: "probing", text: t("head_connecting"), details: [] };
  if (view) verdict = judged(view);
  if (!connected && view)
    verdict = { level: "bad", sign: "lost", text: t("head_gone"), details: [t("head_gone_detail", { time: clock(view.now) })] };
  const now = $("now");
  attribute(now, "data-level", verdict.level);
  const sign = $("now-sign");
  if (!sign.firstChild) sign.append(icon(verdict.sign));
  drawn(sign.firstChild, verdict.sign);
  put($("now-text"), verdict.text);
  document.title = `${verdict.text} · ${t("title")}`;
  // Apart, so that a screen reader is not told every second.
  put($("now-age"), known(verdict.age) ? t("for_age", { age: age(verdict.age) }) : "");
  keyed($("now-details"), verdict.details, (text) => text, () => el("li"), put);
  showIncident(view);
};
