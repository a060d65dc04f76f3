// From a file to a job: drop, upload, look at the plan, start.
//
// What is started is what the plan was shown for: as soon as something changes, the plan and its button are gone, and an answer that
// comes later than the next question is dropped.

import { ask, upload } from "./api.js";
import { bytes, h, neighbours, problemBox, tell } from "./dom.js";
import { planView } from "./plan.js";

const NEEDS_ADDRESS = "IMAGE_ADDRESS_MISSING";
const ODD_VECTORS = "IMAGE_NOT_BOOTABLE";

export function flashView(target, may, signal) {
  if (!may("flash")) return h("section", { class: "card" }, h("h2", null, "Flash"), h("p", null, "Your token may look, not flash."));
  // `choice` counts what was chosen to be flashed, `turn` the plans that were asked for.
  const state = { image: "", name: "", needs: new Set(), signature: "", signed: "", choice: 0, turn: 0 };
  const input = h("input", { type: "file", class: "unseen", id: "file", multiple: true, onchange: () => takeAll(input.files) });
  const drop = h("label", { class: "drop", for: "file", ondragover: (event) => { event.preventDefault(); drop.classList.add("over"); },
    ondragleave: () => drop.classList.remove("over"),
    ondrop: (event) => { event.preventDefault(); drop.classList.remove("over"); takeAll(event.dataTransfer.files); } },
    h("strong", null, "Drop a firmware file here"), h("br"), "or press to choose one: ELF, HEX, BIN, S-record, DfuSe; and its .minisig where it is signed", input);
  const staged = h("select", { id: "staged", onchange: () => { if (staged.value) use(staged.value, staged.selectedOptions[0].textContent); } });
  const sending = h("div", { hidden: true }, h("label", { for: "sent" }, "Upload"), h("progress", { id: "sent", max: 1, value: 0 }), h("p", { class: "hint" }));
  const options = h("div");
  const shown = h("div");
  const view = h("section", { class: "card", "aria-labelledby": "flash-title" }, h("h2", { id: "flash-title" }, "Flash"), drop,
    h("label", { for: "staged" }, "or an image that is on the gateway"), staged, sending, options, shown);
  ask("GET", "/v1/images?limit=50").then((page) => {
    staged.append(h("option", { value: "" }, page.images.length ? "choose…" : "none yet"),
      ...page.images.map((image) => h("option", { value: image.image }, `${image.name || image.image.slice(7, 19)} (${bytes(image.size)})`)));
  }).catch(() => {});

  /** A firmware file, its signature, or both; a signature may come later, too. */
  async function takeAll(files) {
    const signature = [...files].find((file) => file.name.endsWith(".minisig"));
    const firmware = [...files].find((file) => file !== signature);
    if (firmware || signature) {
      Object.assign(state, { signature: "", signed: "", turn: state.turn + 1 });
      shown.replaceChildren();
    }
    if (signature) {
      if (signature.size > 2048) return shown.replaceChildren(problemBox(new Error(`${signature.name} is no signature of minisign: it has ${bytes(signature.size)}`)));
      Object.assign(state, { signature: btoa(String.fromCharCode(...new Uint8Array(await signature.arrayBuffer()))), signed: signature.name });
      tell(`${signature.name} is the signature`);
    }
    if (firmware) await take(firmware);
    else if (signature) await show();
    input.value = "";
  }

  async function take(file) {
    sending.hidden = false;
    choose("", file.name);
    staged.value = "";
    const choice = state.choice;
    const [, bar, words] = sending.children;
    try {
      const digest = await upload(file, {
        signal,
        progress: (done, total) => { bar.max = total; bar.value = done; words.textContent = `${bytes(done)} of ${bytes(total)}`; },
        note: (text) => { words.textContent = text; tell(`${file.name}: ${text}`); },
      });
      words.textContent = `${file.name} is on the gateway, SHA-256 ${digest.slice(0, 12)}…`;
      tell(`${file.name} is on the gateway`);
      if (choice === state.choice) await use(`sha256:${digest}`, file.name);
    } catch (error) {
      if (choice === state.choice) shown.replaceChildren(problemBox(error));
      else words.textContent = `${file.name}: ${error.message}`;
    }
  }

  /** What was agreed to for one image holds for no other. */
  function choose(image, name) {
    Object.assign(state, { image, name, needs: new Set(), choice: state.choice + 1, turn: state.turn + 1 });
    discard.checked = vectors.checked = false;
    shown.replaceChildren();
    options.replaceChildren();
  }

  async function use(image, name) {
    choose(image, name);
    await show();
  }

  const address = h("input", { id: "addr", value: "0x08000000", class: "mono", inputmode: "text", spellcheck: "false", onchange: () => show() });
  const kind = h("select", { id: "kind" }, h("option", { value: "flash" }, "Flash"), h("option", { value: "ensure" }, "Flash unless it is there already (ensure)"), h("option", { value: "verify" }, "Only compare (verify)"));
  const discard = h("input", { type: "checkbox", id: "discard", onchange: () => show() });
  const vectors = h("input", { type: "checkbox", id: "vectors", onchange: () => show() });

  function asked() {
    return { image: state.image,
      ...(state.needs.has(NEEDS_ADDRESS) ? { addr: address.value.trim() } : {}),
      ...(discard.checked ? { outside: "discard" } : {}),
      ...(vectors.checked ? { force: ["vectors"] } : {}) };
  }

  async function show() {
    const turn = ++state.turn;
    shown.replaceChildren();
    if (!state.image) return;
    let problem = null, plan = null, request = null;
    for (let tries = 0; tries < 2; tries++) {
      try {
        problem = null;
        request = asked();
        plan = await ask("POST", `/v1/targets/${target}/plan`, request);
        if (turn !== state.turn) return;
        break;
      } catch (error) {
        if (turn !== state.turn) return;
        problem = error;
        const code = error.problem && error.problem.code;
        if (code !== NEEDS_ADDRESS || state.needs.has(code)) {
          if (code === ODD_VECTORS) state.needs.add(code);
          break;
        }
        state.needs.add(code);
      }
    }
    const signature = state.signature;
    options.replaceChildren(...[
      h("h3", null, state.name),
      state.signed && h("p", { id: "signed" }, `Signed: ${state.signed}; it is checked when the job is submitted.`),
      state.needs.has(NEEDS_ADDRESS) && h("div", null, h("label", { for: "addr" }, "Address of the raw binary"), address),
      plan && (plan.keep_bytes > 0 || discard.checked) && h("label", { class: "inline", for: "discard" }, discard, "Other bytes of the touched sectors may be lost (faster)"),
      state.needs.has(ODD_VECTORS) && h("label", { class: "inline", for: "vectors" }, vectors, "The vector table looks wrong; it is meant so"),
    ].filter(Boolean));
    if (problem) {
      shown.replaceChildren(problemBox(problem));
      return;
    }
    const start = h("button", { class: "primary", type: "button", id: "start", onclick: () => submit(start, request, signature) }, "Start");
    shown.replaceChildren(planView(plan), h("label", { for: "kind" }, "What to do"), kind, h("div", { class: "row" }, start));
    tell(`Plan: ${plan.erase_sectors} sectors are erased, ${bytes(plan.write_bytes)} written`);
  }

  async function submit(button, request, signature, resets = "") {
    if (button.disabled) return;
    button.disabled = true;
    // The same key for the same press: a lost answer starts nothing twice.
    const key = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
    const { outside, force, ...rest } = request;
    const writes = { ...(outside && { outside }), ...(force && { force }), ...(signature && { sig: signature }) };
    const body = { kind: kind.value, ...rest, ...(resets && { resets }), ...(kind.value === "verify" ? {} : writes) };
    for (let tries = 0; ; tries++) {
      try {
        const job = await ask("POST", `/v1/targets/${target}/jobs`, body, { "Idempotency-Key": key });
        location.hash = `#/j/${job.job}`;
        return;
      } catch (error) {
        if (error.problem === undefined && tries < 5) { await new Promise((done) => setTimeout(done, 1000 * (tries + 1))); continue; }
        shown.append(problemBox(error), neighbours(error, (more) => submit(button, request, signature, more)) || "");
        button.disabled = false;
        return;
      }
    }
  }
  return view;
}
