// The feed, read with fetch(): EventSource cannot send the API key, which must not be in a URL.

// Addresses are relative, so that the page works under a path prefix too: from "/llm/" and "/llm/dashboard" alike.
// Proxies under two prefixes of one origin do not share their key.
const KEY = `disagg-proxy-key ${location.pathname.replace(/[^/]*$/, "")}`;

const keyGiven = () => {
  try {
    return sessionStorage.getItem(KEY) || "";
  } catch {
    return heldKey;
  }
};

let heldKey = "";

const giveKey = (key) => {
  heldKey = key;
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // Without storage the key is kept while the page is open.
  }
};

const authorized = () => (keyGiven() ? { Authorization: `Bearer ${keyGiven()}` } : {});

// Events of a text/event-stream body, one [event, data] at a time.
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      let event = "message";
      const data = [];
      for (const line of block.split("\n")) {
        if (line.startsWith("event:")) event = line.slice(6).trim();
        else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      }
      if (data.length) yield [event, data.join("\n")];
    }
  }
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// Milliseconds without data after which the connection counts as dead: the proxy sends an event each second.
const IDLE_TIMEOUT = 15000;

const follow = async ({ onEvent, link, keyWanted }) => {
  let wait = 500;
  for (;;) {
    const quit = new AbortController();
    let timer = 0;
    const alive = () => {
      clearTimeout(timer);
      timer = setTimeout(() => quit.abort(), IDLE_TIMEOUT);
    };
    try {
      alive();
      const answer = await fetch("dashboard/events", { headers: authorized(), cache: "no-store", signal: quit.signal });
      if (answer.status === 401 || answer.status === 403) {
        clearTimeout(timer);
        await keyWanted(Boolean(keyGiven()));
        continue;
      }
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      for await (const [event, data] of eventsOf(answer.body)) {
        alive();
        if (event === "end") break;
        link("live");
        wait = 500;
        onEvent(event, JSON.parse(data));
      }
    } catch {
      // Not reachable: retry below.
    }
    clearTimeout(timer);
    quit.abort();
    link("lost");
    await pause(wait);
    wait = Math.min(5000, wait * 1.7);
  }
};
