// The page: who you are, which targets there are, and what is in front of you.

import { ask, follow, onLogin, token } from "./api.js";
import { consoleView } from "./console.js";
import { $, facts, h, neighbours, problemBox, tag, tell, when } from "./dom.js";
import { flashView } from "./flash.js";
import { jobView } from "./job.js";

const targets = new Map();
let scopes = new Set();
let shown = null; // { draw, job } of the view, and how to end it.
let leaving = new AbortController();
let living = new AbortController();
let own = "";
const may = (scope) => scopes.has(scope);

// --- who you are

async function whoAmI() {
  const me = await ask("GET", "/v1");
  scopes = new Set(me.scopes);
  own = me.principal;
  $("gateway").textContent = me.gateway;
  document.title = `bridged · ${me.gateway}`;
  $("who").textContent = token.get() ? `${me.principal} (sign out)` : scopes.size ? "Sign in with a token" : "Sign in";
  return me;
}

let asking = false;
function login(why = "") {
  if (asking) return;
  asking = true;
  $("login-why").textContent = why || "This gateway wants to know who you are.";
  $("login-problem").textContent = "";
  $("token").value = "";
  $("login").showModal();
}
onLogin.ask = (why) => { token.set(""); login(why); };
$("login").addEventListener("close", () => { asking = false; });
$("login-cancel").addEventListener("click", () => $("login").close());
$("login").querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("login-ok").disabled = true;
  token.set($("token").value.trim());
  try {
    const response = await fetch("/v1", { headers: { Authorization: `Bearer ${token.get()}` }, cache: "no-store" });
    if (!response.ok) throw new Error((await response.json()).detail);
    $("login").close();
    await begin();
  } catch (error) {
    token.set("");
    $("login-problem").textContent = error.message || "This token is not known here.";
  }
  $("login-ok").disabled = false;
});
$("who").addEventListener("click", () => {
  if (!token.get()) return login("Paste the token that you were given.");
  token.set("");
  location.reload();
});

// --- what is live

function live() {
  living.abort();
  living = new AbortController();
  follow("/v1/events", (name, data) => {
    if (name === "target") { targets.set(data.target, data); shown && shown.draw && shown.draw(); }
    else if (name === "job") shown && shown.job && shown.job(data);
    else if (name === "reset") route();
  }, { signal: living.signal, state: (on) => { $("link").dataset.state = on ? "live" : "lost"; $("link").textContent = on ? "live" : "connection lost, trying again"; } })
    .catch((error) => { $("link").dataset.state = "lost"; $("link").textContent = error.message; });
}

// --- views

function summary(target) {
  return facts([
    ["State", h("span", null, tag(target.state), target.reason && target.state !== "idle" ? ` ${target.reason}` : "")],
    ["Held by", target.held && target.held.kind !== "job" ? `${target.held.owner}${target.held.note ? `: ${target.held.note}` : ""}` : ""],
    ["Runs", target.image_name || (target.image ? target.image.slice(0, 12) : "not known")],
    ["Version", target.version],
    ["Proven", target.proven ? h("span", null, when(target.proven), ` (${target.evidence})`) : "never"],
    ["Chip", target.names || target.family || target.chip || "not asked yet"],
    ["Queue", target.queued ? `${target.queued} waiting` : ""],
  ]);
}

function allTargets() {
  const list = h("ul", { class: "cards" });
  const draw = () => {
    const names = [...targets.keys()].sort();
    list.replaceChildren(...names.map((name) => h("li", { class: "card" }, h("h2", null, h("a", { href: `#/t/${name}` }, name)), summary(targets.get(name)),
      targets.get(name).owner && h("p", null, h("a", { href: `#/j/${targets.get(name).owner}` }, "watch the running job")))));
    if (!names.length) list.replaceChildren(h("li", { class: "card" }, "No target is configured, or none is yours."));
  };
  draw();
  const jobs = history("");
  return { view: h("div", null, h("h1", { tabindex: "-1" }, "Targets"), list, jobs.view), draw, job: jobs.job };
}

function oneTarget(name, signal) {
  const about = h("section", { class: "card", "aria-label": "Target" });
  const draw = () => {
    const target = targets.get(name);
    if (!target) return;
    const more = facts([["Unique id", target.uid], ["Flash", target.flash_bytes ? `${target.flash_bytes / 1024} KiB` : ""], ["Loader", target.loader]]);
    const held = target.held && target.held.kind === "lock";
    const buttons = h("div", { class: "row" }, may("flash") && [action("identify", "Identify"), action("reset", "Reset"), action("doctor", "Examine")],
      may("console") && (!held || target.held.owner === own) && h("button", { type: "button", id: "reserve", onclick: (event) => reserve(event, held) }, held ? "Give it back" : "Reserve it for an hour"));
    about.replaceChildren(...[summary(target), more, target.owner && h("p", null, h("a", { href: `#/j/${target.owner}` }, "watch the running job")), buttons.firstChild && buttons].filter(Boolean));
  };
  const action = (kind, text) => h("button", { type: "button", onclick: (event) => start(event.target, { kind }) }, text);
  const start = async (button, body) => {
    button.disabled = true;
    try { location.hash = `#/j/${(await ask("POST", `/v1/targets/${name}/jobs`, body)).job}`; } catch (error) {
      about.append(problemBox(error), neighbours(error, (resets) => start(button, { ...body, resets })) || "");
      button.disabled = false;
    }
  };
  const reserve = async (event, held) => {
    event.target.disabled = true;
    try { await (held ? ask("DELETE", `/v1/targets/${name}/lock`) : ask("PUT", `/v1/targets/${name}/lock`, { note: "on the web page" })); } catch (error) { about.append(problemBox(error)); event.target.disabled = false; }
  };
  draw();
  const jobs = history(name);
  return { view: h("div", null, h("h1", { tabindex: "-1" }, name), about, flashView(name, may, signal), consoleView(name, may, signal), jobs.view), draw, job: jobs.job };
}

/** The last jobs, newest first, and more on request. */
function history(target) {
  const rows = new Map();
  const body = h("tbody");
  const more = h("button", { type: "button", hidden: true, onclick: () => page() }, "Older jobs");
  let next = "";
  const row = (job) => h("tr", null, h("td", null, h("a", { href: `#/j/${job.job}` }, job.kind)), h("td", null, job.target), h("td", null, tag(job.state), job.error ? ` ${job.error}` : ""), h("td", null, when(job.created)));
  const page = async () => {
    try {
      const found = await ask("GET", `/v1/jobs?limit=20${target ? `&target=${target}` : ""}${next ? `&cursor=${next}` : ""}`);
      for (const job of found.jobs) { if (rows.has(job.job)) continue; const made = row(job); rows.set(job.job, { job, made }); body.append(made); }
      if (!rows.size) body.replaceChildren(h("tr", null, h("td", { colspan: "4" }, "No job yet.")));
      next = found.next || "";
      more.hidden = !next;
    } catch (error) { body.after(problemBox(error)); }
  };
  page();
  const job = async (update) => {
    if (target && update.target !== target) return;
    const known = rows.get(update.job);
    if (known && known.job.state === update.state) return;
    const found = await ask("GET", `/v1/jobs/${update.job}`).catch(() => null);
    if (!found) return;
    const made = row(found), old = rows.get(found.job);
    if (!rows.size) body.replaceChildren();
    if (old) old.made.replaceWith(made); else body.prepend(made);
    rows.set(found.job, { job: found, made });
  };
  return { job, view: h("section", { class: "card", "aria-labelledby": "history-title", id: "history" }, h("h2", { id: "history-title" }, "History"),
    h("div", { class: "scroll" }, h("table", null, h("thead", null, h("tr", null, ["Job", "Target", "State", "Created"].map((text) => h("th", { scope: "col" }, text)))), body)), h("div", { class: "row" }, more)) };
}

function route(first) {
  leaving.abort();
  leaving = new AbortController();
  let [, kind, name] = (location.hash || "#/").split("/");
  try { name = decodeURIComponent(name || ""); } catch { kind = ""; }
  if (kind === "t" && /^[\w-]{1,32}$/.test(name || "")) shown = oneTarget(name, leaving.signal);
  else if (kind === "j" && /^\w{1,32}$/.test(name || "")) shown = { view: jobView(name, may, leaving.signal) };
  else shown = allTargets();
  $("main").replaceChildren(shown.view);
  const title = shown.view.querySelector("h1");
  if (title && first !== true) title.focus(); // Who came by keyboard or listens is where the new view begins.
  scrollTo(0, 0);
}

async function begin() {
  try {
    await whoAmI();
    if (!may("read")) return login();
    for (const target of (await ask("GET", "/v1/targets")).targets) targets.set(target.target, target);
    route(true);
    live();
    tell(`${targets.size} targets`);
  } catch (error) {
    if (error.status !== 401) $("main").replaceChildren(problemBox(error), h("div", { class: "row" }, h("button", { type: "button", onclick: begin }, "Try again")));
  }
}

// "Skip to content" is no place to go to: the hash says what is shown.
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); $("main").focus(); });
addEventListener("hashchange", () => route());
begin();
