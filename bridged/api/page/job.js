// One job: phases and throughput as they happen, and its end with all that is known.

import { ask, follow } from "./api.js";
import { bytes, facts, h, hex, problemBox, seconds, tag, tell, when } from "./dom.js";

const ENDED = new Set(["succeeded", "failed", "rolled_back", "canceled", "rejected", "timed_out"]);
const ORDER = {
  flash: ["stage", "lock", "activate", "sync", "identify", "plan", "backup", "erase", "write", "verify", "boot", "health"],
  verify: ["stage", "lock", "activate", "sync", "identify", "verify"],
};
ORDER.ensure = ORDER.flash;

// What a person wants to know of a result; everything else is there, and folded away.
const plain = (text) => (value) => (value ? text(value) : "");
const RESULT = [
  ["Chip", "names", plain(String)], ["Unique id", "uid", plain(String)], ["Flash", "flash_bytes", plain(bytes)], ["Loader", "loader", plain(String)],
  ["Erased", "sectors_erased", plain((n) => `${n} sector${n === 1 ? "" : "s"}`)], ["Written", "bytes_written", plain(bytes)],
  ["Compared", "bytes_compared", plain(bytes)], ["Kept", "bytes_kept", plain(bytes)], ["Wire", "baud", plain((n) => `${n} baud`)],
  ["It says", "banner", plain(String)], ["Started by", "boot", plain((text) => text.replaceAll("_", " "))],
];

export function jobView(id, may, signal) {
  const title = h("h1", { tabindex: "-1" }, `Job ${id}`);
  const head = h("div");
  const list = h("ol", { class: "phases", "aria-label": "Phases" });
  const bar = h("progress", { id: "done", "aria-label": "Progress of this phase", max: 1, value: 0 });
  const words = h("p", { class: "hint", id: "throughput" });
  const events = h("ul");
  const end = h("div", { id: "end" });
  const cancel = h("button", { type: "button", class: "danger", id: "cancel", hidden: true, onclick: () => stop(false) }, "Cancel");
  const running = h("section", { class: "card", "aria-label": "Progress" }, head, list, bar, words, h("div", { class: "row" }, cancel), h("details", null, h("summary", null, "What happened"), events));
  const view = h("div", null, title, running, end);
  const seen = [];
  const noted = new Set();
  let now = null, phase = "", since = 0;

  async function stop(force) {
    cancel.disabled = true;
    try {
      await ask("POST", `/v1/jobs/${id}/cancel`, force ? { force: true } : {});
    } catch (error) {
      if (error.status === 409 && !force && !ENDED.has(now.state)) {
        const sure = h("button", { type: "button", class: "danger", onclick: () => { box.remove(); stop(true); } }, "Cancel all the same: the target is left without firmware");
        const box = h("div", null, problemBox(error), h("div", { class: "row" }, sure));
        running.append(box);
        sure.focus();
      } else running.append(problemBox(error));
    }
    cancel.disabled = false;
  }

  function show(update) {
    head.replaceChildren(h("div", { class: "row" }, tag(update.state), ` on `, h("a", { href: `#/t/${update.target}` }, update.target),
      update.phase && !ENDED.has(update.state) ? ` · ${update.phase}` : ""));
    cancel.hidden = ENDED.has(update.state) || !may("flash");
    if (update.phase && !seen.includes(update.phase)) seen.push(update.phase);
    if (update.phase !== phase) {
      phase = update.phase;
      since = performance.now();
      if (phase) tell(`${phase}`);
    }
    const kind = now && now.kind;
    const all = [...new Set([...(ORDER[kind] || []).filter((name) => seen.includes(name) || !ENDED.has(update.state) && ORDER[kind].indexOf(name) > ORDER[kind].indexOf(phase)), ...seen])]
      .sort((a, b) => rank(kind, a) - rank(kind, b));
    list.replaceChildren(...all.map((name) => h("li", { class: seen.includes(name) && name !== phase ? "done" : "", "aria-current": name === phase && !ENDED.has(update.state) ? "step" : null }, name)));
    if (update.total > 0) {
      bar.max = update.total;
      bar.value = update.done;
      const left = update.rate > 0 ? `, ${seconds((update.total - update.done) / update.rate)} left` : "";
      words.textContent = `${bytes(update.done)} of ${bytes(update.total)}${update.rate ? ` at ${bytes(update.rate)}/s${left}` : ""}`;
    } else if (!ENDED.has(update.state)) {
      bar.removeAttribute("value");
      words.textContent = update.reason && !update.event ? `waiting: ${update.reason}` : update.phase || update.state;
    }
    if (update.event && !noted.has(update.seq)) {
      noted.add(update.seq);
      const { job, target, seq, at, state, phase: _, done, total, rate, code, event, ...rest } = update;
      events.append(h("li", null, when(at), ` ${event}: `, Object.entries(rest).filter(([, value]) => value !== null).map(([key, value]) => `${key} ${value}`).join(", ")));
    }
  }

  const rank = (kind, name) => { const at = (ORDER[kind] || []).indexOf(name); return at < 0 ? 100 + seen.indexOf(name) : at; };

  function finish(job) {
    now = job;
    show({ ...job, event: null });
    bar.hidden = words.hidden = true;
    const broke = job.problem && job.state !== "canceled" ? seen.filter((name) => name !== "release").at(-1) : "";
    for (const item of list.children) if (broke && item.textContent === broke) { item.className = "broke"; item.append(h("span", { class: "unseen" }, ", it failed here")); }
    tell(`The job has ${job.state.replace("_", " ")}`);
    const result = job.result || {};
    const took = job.ended && job.started ? seconds((new Date(job.ended) - new Date(job.started)) / 1000) : "";
    const parts = [];
    if (job.state === "succeeded") {
      parts.push(h("div", { class: "box good" }, h("strong", null, result.changed === false ? "Nothing was to be done: it is there already." : "Done."),
        result.evidence ? ` Evidence: ${result.evidence === "full" ? (result.proof === "crc-on-target" ? "every byte was compared by a CRC computed on the target" : "every byte was read back and compared") : result.evidence}.` : "", took ? ` It took ${took}.` : ""));
    } else if (job.problem) {
      const problem = job.problem;
      parts.push(h("div", { class: "box bad", role: "alert" }, h("strong", null, `${problem.code}: `), problem.message,
        h("p", null, h("strong", null, "Likely cause: "), problem.cause), h("p", { id: "remedy" }, h("strong", null, "Remedy: "), problem.remedy)));
      if (Object.keys(problem.facts || {}).length) parts.push(h("h3", null, "Evidence"), facts(Object.entries(problem.facts).map(([key, value]) => [key, shown(key, value)])));
    }
    parts.push(h("h3", null, "Job"), facts([["Kind", job.kind], ["Image", job.image && job.image.split(",").map((one) => one.slice(0, 19) + "…" + one.slice(71)).join(", ")], ["By", job.principal], ["Created", when(job.created)], ["Ended", when(job.ended)],
      ...RESULT.filter(([, key]) => key in result).map(([name, key, text]) => [name, text(result[key])])]));
    const figures = Object.entries(result).filter(([key, value]) => typeof value !== "object" && key !== "kind").map(([key, value]) => [key.replaceAll("_", " "), shown(key, value)]);
    if (figures.length) parts.push(h("details", { id: "figures" }, h("summary", null, "All figures"), facts(figures)));
    for (const finding of result.findings || []) parts.push(h("div", { class: `box ${finding.level === "problem" ? "bad" : "warn"}` }, h("strong", null, `${finding.code || finding.level}: `), finding.text || finding.message || "", finding.remedy && h("p", null, finding.remedy)));
    if (job.trace) {
      const text = h("pre", { id: "trace", tabindex: "0", "aria-label": "Decoded recording", hidden: true });
      const open = h("button", { type: "button", id: "show-trace", onclick: async () => {
        open.disabled = true;
        try { text.textContent = await ask("GET", `/v1/jobs/${id}/trace?decoded=1`); text.hidden = false; text.scrollTop = text.scrollHeight; text.focus(); } catch (error) { text.after(problemBox(error)); }
      } }, "Show the recording of the dialogue");
      parts.push(h("div", { class: "row" }, open), text);
    }
    end.replaceChildren(h("section", { class: "card", "aria-label": "Result" }, parts));
  }

  const shown = (key, value) => {
    if (typeof value !== "number") return String(value);
    if (/(^|_)(address|addr|start|end)$/.test(key)) return hex(value);
    if (key === "opcode" || key === "pid") return `0x${value.toString(16)}`;
    return String(Math.round(value * 1000) / 1000);
  };

  (async () => {
    try {
      now = await ask("GET", `/v1/jobs/${id}`);
      title.textContent = `${now.kind} of ${now.target}`;
      if (now.state && ENDED.has(now.state)) {
        for (const update of (await ask("GET", `/v1/jobs/${id}/log`)).entries) show(update);
        finish(now);
        return;
      }
      show(now);
      await follow(`/v1/jobs/${id}/events`, (name, data) => { if (name === "job") show(data); else if (name === "end") finish(data); }, { signal });
      if (!signal.aborted && !end.firstChild) finish(await ask("GET", `/v1/jobs/${id}`));
    } catch (error) {
      if (!signal.aborted) end.replaceChildren(problemBox(error));
    }
  })();
  return view;
}
