// The verdict (page/verdict.py) in the reader's language, or that the proxy does not respond.

const sentence = ({ key, values }) => {
  const translated = { ...values };
  if (translated.role) translated.role = t(`role_${translated.role}`);
  if (translated.state) translated.state = word("state", translated.state);
  if (translated.why) translated.why = word("why", translated.why);
  return t(key, translated);
};

const showIncident = (incident) => {
  shown($("incident"), Boolean(incident));
  if (!incident) return;
  const { role, name, steps, over_after: after } = incident;
  put($("incident-title"), t("incident_title", { role: role ? t(`role_${role}`) : "", name }));
  put($("incident-end"), known(after) ? t("incident_over", { age: duration(1000 * after) }) : t("incident_open"));
  keyed($("incident-steps"), steps, (e) => e.seq,
    () => el("li", {}, el("time"), el("span", { class: "kind" }), el("span", { class: "why" })),
    (node, e) => {
      const [time, kind, why] = node.children;
      put(time, clock(e.time));
      put(kind, word("event", e.kind));
      put(why, e.text);
    });
};

const verdictOf = (view, connected) => {
  if (!view) return { level: "wait", sign: "probing", head: { key: "head_connecting" }, details: [] };
  if (connected) return view.verdict;
  const details = [{ key: "head_gone_detail", values: { time: clock(view.now) } }];
  return { level: "bad", sign: "lost", head: { key: "head_gone" }, details };
};

const showSimulated = (instances) => {
  // What an engine is becomes known with its models.
  const known = instances.filter((i) => i.models.length);
  const count = known.filter((i) => i.simulated).length;
  shown($("simulated"), count > 0);
  put($("simulated"), count === known.length ? t("simulated_all") : t("simulated_some", { count: number(count), all: number(known.length) }));
};

const showHeadline = (connected) => {
  const { view } = model;
  const { level, sign, head, since, details } = verdictOf(view, connected);
  attribute($("now"), "data-level", level);
  const shape = $("now-sign");
  if (!shape.firstChild) shape.append(icon(sign));
  drawn(shape.firstChild, sign);
  const text = sentence(head);
  put($("now-text"), text);
  document.title = `${text} · ${t("title")}`;
  // A separate element, so that screen readers do not announce it every second.
  put($("now-age"), known(since) ? t("for_age", { age: age(view.now - since) }) : "");
  keyed($("now-details"), details.map(sentence), (text) => text, () => el("li"), put);
  showIncident(view && view.incident);
  showSimulated(view ? view.instances : []);
};
