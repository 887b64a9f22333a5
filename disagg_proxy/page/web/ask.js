// The form that sends a test prompt through the proxy, and the engines that served it.

const asking = { quit: null, id: null, found: true, placed: false };

const showModels = (view) => {
  const names = [...new Set(view.instances.flatMap((i) => i.models))].sort();
  const select = $("ask-model");
  keyed(select, ["", ...names], (name) => name, () => el("option"), (node, name) => {
    attribute(node, "value", name);
    put(node, name || t("ask_model_default"));
  });
};

const bodyOf = () => {
  const prompt = $("ask-prompt").value;
  const chat = $("ask-api").value.includes("chat");
  const model = $("ask-model").value;
  return {
    ...(model ? { model } : {}),
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    max_tokens: Number($("ask-tokens").value),
    stream: true,
  };
};

const textOf = (event) => {
  const choice = event.choices?.[0];
  return choice?.text ?? choice?.delta?.content ?? choice?.delta?.reasoning_content ?? "";
};

const readable = async (answer) => {
  const text = await answer.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text.slice(0, 300);
  }
};

const ask = async () => {
  const [answerBox, status] = [$("ask-answer"), $("ask-status")];
  asking.quit = new AbortController();
  asking.id = `page-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;
  asking.found = false;
  shown($("ask-stop"), true);
  $("ask-send").disabled = true;
  answerBox.replaceChildren();
  const written = answerBox.appendChild(document.createTextNode(""));
  put($("ask-route"), "");
  put(status, t("ask_waiting"));
  const start = performance.now();
  let first = null;
  let pieces = 0;
  let complete = false;
  try {
    const answer = await fetch($("ask-api").value, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Request-Id": asking.id, ...authorized() },
      body: JSON.stringify(bodyOf()),
      signal: asking.quit.signal,
    });
    if (!answer.ok) {
      put(status, t("ask_failed", { status: answer.status, message: await readable(answer) }));
      asking.found = true;
      return;
    }
    for await (const [, data] of eventsOf(answer.body)) {
      if (data === "[DONE]") {
        complete = true;
        break;
      }
      const text = textOf(JSON.parse(data));
      if (!text) continue;
      if (first === null) {
        first = performance.now() - start;
        put(status, t("ask_streaming", { ttft: duration(first) }));
      }
      pieces += 1;
      written.appendData(text);
      answerBox.scrollTop = answerBox.scrollHeight;
    }
    if (!complete) throw new Error("cut");
    const total = performance.now() - start;
    put(status, t("ask_done", { ttft: duration(first), total: duration(total), pieces: number(pieces) }));
  } catch (error) {
    const key = error.name === "AbortError" ? "ask_stopped" : first === null && !complete ? "ask_unreachable" : "ask_cut";
    put(status, t(key));
  } finally {
    asking.quit = null;
    shown($("ask-stop"), false);
    $("ask-send").disabled = false;
    if (model.view) showRoute(model.view);
  }
};

// A response does not name its engines. The record of the request in the feed does; it is found by the request id.
const showRoute = (view) => {
  if (asking.found || !asking.id) return;
  const record = view.recent.findLast((r) => r.client_id === asking.id);
  if (!record) return;
  asking.found = true;
  if (record.decode)
    put($("ask-route"), t(record.prefill ? "ask_route" : "ask_route_alone", {
      prefill: record.prefill && nameOf(view, record.prefill), decode: nameOf(view, record.decode),
    }));
};

// Decided once: the form does not move while somebody types, or reads the response.
const placeAsk = (view) => {
  if (asking.placed) return;
  asking.placed = true;
  if (!view.recent.length) $("tiles").before($("ask-panel"));
};

const listenToAsk = () => {
  $("ask-prompt").value = t("ask_example");
  put($("ask-answer"), t("ask_empty"));
  $("ask").addEventListener("submit", (e) => {
    e.preventDefault();
    if (!asking.quit) ask();
  });
  $("ask-stop").addEventListener("click", () => asking.quit?.abort());
};
