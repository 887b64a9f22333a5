// Connects the feed, the parts of the page, the buttons and the API key.

let connected = false;

const paint = () => {
  showHeadline(connected);
  const { view } = model;
  if (!view) return;
  const how = t(view.compiled ? "compiled" : "interpreted");
  put($("version"), t("version", { version: view.version, how, uptime: age(view.uptime_s) }));
  placeAsk(view);
  showTiles(view);
  showMachine(view);
  showCharts(view);
  showEnergy(view);
  showRequests(view);
  showEvents(view);
  showModels(view);
  showRoute(view);
};

const showLink = (state) => {
  connected = state === "live";
  const link = $("link");
  attribute(link, "data-link", state);
  put($("link-text"), t({ live: "live", lost: "reconnecting", wait: "connecting" }[state]));
};

const link = (state) => {
  if ($("link").dataset.link === state) return;
  showLink(state);
  paint();
};

const keyWanted = (wrong) => {
  giveKey("");
  shown($("forget"), false);
  shown($("content"), false);
  shown($("key-form"), true);
  shown($("key-wrong"), wrong);
  $("key").value = "";
  $("key").focus();
  return new Promise((resolve) => {
    $("key-form").addEventListener("submit", (e) => {
      e.preventDefault();
      giveKey($("key").value.trim());
      $("key").value = "";
      shown($("key-form"), false);
      shown($("content"), true);
      shown($("forget"), true);
      resolve();
    }, { once: true });
  });
};

const dark = () => {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

const showTheme = () => put($("theme"), t(dark() ? "theme_light" : "theme_dark"));

const setTheme = (theme) => {
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  showTheme();
};

const start = () => {
  translate();
  setTheme(remembered("theme"));
  showLink("wait");
  listenToAsk();
  listenToRequests(paint);
  shown($("forget"), Boolean(keyGiven()));
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
  $("theme").addEventListener("click", () => {
    const theme = dark() ? "light" : "dark";
    remember("theme", theme);
    setTheme(theme);
  });
  $("language").addEventListener("click", () => {
    const untouched = $("ask-prompt").value === t("ask_example");
    const empty = $("ask-answer").textContent === t("ask_empty");
    speak(language === "zh" ? "en" : "zh");
    if (untouched) $("ask-prompt").value = t("ask_example");
    if (empty) put($("ask-answer"), t("ask_empty"));
    showTheme();
    showLink($("link").dataset.link);
    paint();
  });
  $("forget").addEventListener("click", () => {
    giveKey("");
    location.reload();
  });
  new ResizeObserver(() => { if (model.view) drawLane(model.view); }).observe($("stage"));
  follow({
    link,
    keyWanted,
    onEvent: (event, data) => {
      take(event, data);
      if (!document.hidden) paint();
    },
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) paint(); });
};

start();
