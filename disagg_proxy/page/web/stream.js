// The feed, read with fetch(): EventSource cannot send the key, which must not be in an address.

const KEY = "disagg-proxy-key";

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
    // Kept for as long as the page is open.
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

// Seconds without a word after which a connection is taken to be dead: the proxy says something each second.
const SILENCE = 15000;

const follow = async ({ news, link, keyWanted }) => {
  let wait = 500;
  for (;;) {
    const quit = new AbortController();
    let timer = 0;
    const alive = () => {
      clearTimeout(timer);
      timer = setTimeout(() => quit.abort(), SILENCE);
    };
    try {
      alive();
      const answer = await fetch("/dashboard/events", { headers: authorized(), cache: "no-store", signal: quit.signal });
      if (answer.status === 401) {
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
        news(event, JSON.parse(data));
      }
    } catch {
      // Gone, or not there yet: the loop is the remedy.
    }
    clearTimeout(timer);
    quit.abort();
    link("lost");
    await pause(wait);
    wait = Math.min(5000, wait * 1.7);
  }
};
