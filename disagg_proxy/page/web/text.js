// Texts and numbers in the reader's language. Elements with a key of STRINGS in data-text are translated.

const remembered = (name) => {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
};

const remember = (name, value) => {
  try {
    localStorage.setItem(name, value);
  } catch {
    // Without storage the choice lasts while the page is open.
  }
};

let language = remembered("language") || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
if (!Object.hasOwn(STRINGS, language)) language = "en";

const has = (key) => Object.hasOwn(STRINGS[language], key);

const t = (key, values = {}) =>
  STRINGS[language][key].replace(/\{(\w+)\}/g, (whole, name) => (Object.hasOwn(values, name) ? values[name] : whole));

// A value without a translation is shown as it is.
const word = (prefix, value) => (has(`${prefix}_${value}`) ? t(`${prefix}_${value}`) : String(value).replaceAll("_", " "));

const plural = (stem, count, values = {}) => t(`${stem}_${count === 1 ? "one" : "many"}`, { count: number(count), ...values });

const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

const number = (value, digits = 0) =>
  known(value)
    ? value.toLocaleString(language === "zh" ? "zh-CN" : "en", { maximumFractionDigits: digits })
    : t("unknown");

// At most one decimal.
const rate = (value) => number(value, value < 100 ? 1 : 0);

// A duration in milliseconds.
const duration = (ms) => {
  if (!known(ms)) return t("unknown");
  if (ms < 1000) return `${number(ms, ms < 1 ? 2 : ms < 10 ? 1 : 0)} ms`;
  return `${number(ms / 1000, ms < 10000 ? 2 : ms < 100000 ? 1 : 0)} s`;
};

const age = (seconds) => {
  const s = Math.max(0, Math.floor(seconds));
  if (s < 60) return t("age_s", { count: s });
  const minutes = Math.floor(s / 60);
  if (minutes < 60) return t("age_min", { count: minutes });
  const hours = Math.floor(minutes / 60);
  if (hours < 24) return t("age_h", { hours, minutes: minutes % 60 });
  return t("age_d", { days: Math.floor(hours / 24), hours: hours % 24 });
};

const bytes = (value) => {
  if (!known(value)) return t("unknown");
  const units = ["B", "KB", "MB", "GB", "TB"];
  let unit = 0;
  for (; value >= 1000 && unit < units.length - 1; unit++) value /= 1000;
  return `${number(value, unit && value < 100 ? 1 : 0)} ${units[unit]}`;
};

const clock = (unix) => new Date(unix * 1000).toLocaleTimeString(language === "zh" ? "zh-CN" : "en-GB");

const translate = () => {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.title = t("title");
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = t(node.dataset.text);
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", t(node.dataset.label));
};

const speak = (wanted) => {
  language = wanted;
  remember("language", wanted);
  translate();
};
