// Elements without a template language: text is always text, never markup.

/** An element; attributes that are functions are listeners, `null`, `undefined` and `false` are left out. */
export function h(name, attributes, ...children) {
  const svg = ["svg", "rect", "defs", "pattern", "line", "title", "desc"].includes(name);
  const found = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") found.addEventListener(key.slice(2), value);
    else found.setAttribute(key, value === true ? "" : value);
  }
  found.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return found;
}

export const $ = (id) => document.getElementById(id);

/** What a screen reader says when it has time. */
export function tell(text) {
  if ($("told").textContent !== text) $("told").textContent = text;
}

export function facts(rows) {
  return h("dl", null, rows.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => [h("dt", null, name), h("dd", null, value)]));
}

export const hex = (address) => "0x" + address.toString(16).padStart(8, "0");

export function bytes(count) {
  if (count >= 1 << 20 && count % (1 << 18) === 0) return `${count / (1 << 20)} MiB`;
  if (count >= 1024) return `${+(count / 1024).toFixed(count % 1024 ? 1 : 0)} KiB`;
  return `${count} bytes`;
}

export function seconds(count) {
  return count >= 90 ? `${Math.floor(count / 60)} min ${Math.round(count % 60)} s` : `${count >= 10 ? Math.round(count) : count.toFixed(1)} s`;
}

export function when(text) {
  if (!text) return "";
  const at = new Date(text);
  return h("time", { datetime: text, title: text }, at.toLocaleString(undefined, { dateStyle: "short", timeStyle: "medium" }));
}

const KINDS = { succeeded: "good", idle: "good", failed: "bad", broken: "bad", absent: "bad", rejected: "bad", timed_out: "bad", rolled_back: "warn", interrupted: "warn", canceled: "warn" };
export const tag = (state) => h("span", { class: `tag ${KINDS[state] || ""}` }, state.replace("_", " "));

/** Where a job would reset other targets, too: a button that says so for the person. `go(resets)`. */
export function neighbours(error, go) {
  const resets = error.problem && error.problem.code === "CONSENT_MISSING" && (error.problem.facts || {}).resets;
  return resets && h("div", { class: "row" }, h("button", { type: "button", class: "danger", id: "resets", onclick: () => go(resets) }, `Go on: ${resets.replaceAll(",", ", ")} may be reset as well`));
}

/** A problem of the gateway, or of the way to it. */
export function problemBox(error) {
  const found = error.problem || { detail: error.message };
  return h("div", { class: "box bad", role: "alert" },
    h("strong", null, found.code ? `${found.code}: ` : ""), found.detail || found.message || "something went wrong",
    found.cause && h("p", null, h("strong", null, "Likely cause: "), found.cause),
    found.remedy && h("p", null, h("strong", null, "Remedy: "), found.remedy));
}
