// The target's serial port in a terminal. xterm.js is loaded when somebody opens it.

import { socketOf } from "./api.js";
import { h, tell } from "./dom.js";

/** What xterm.js does with style elements, without any: our policy allows none that a script made. */
globalThis.bridgedStyle = (owner) => {
  const sheet = new CSSStyleSheet();
  owner.adoptedStyleSheets = [...owner.adoptedStyleSheets, sheet];
  const element = owner.createElement("span");
  let text = "";
  element.hidden = true;
  Object.defineProperty(element, "textContent", { get: () => text, set: (value) => { text = value; sheet.replaceSync(value); } });
  element.remove = () => { owner.adoptedStyleSheets = owner.adoptedStyleSheets.filter((one) => one !== sheet); Element.prototype.remove.call(element); };
  return element;
};

let loading = null;
function load() {
  loading = loading || Promise.all([
    new Promise((done, failed) => document.head.append(h("link", { rel: "stylesheet", href: "/page/xterm.css", onload: done, onerror: failed }))),
    import("/page/xterm.js").then(() => import("/page/xterm-fit.js")), // They put themselves into globalThis.
  ]);
  return loading;
}

export function consoleView(target, may, signal) {
  const open = h("button", { type: "button", id: "open-console", onclick: () => start(may("console")) }, may("console") ? "Open the console" : "Watch the console");
  const status = h("p", { class: "hint", role: "status", id: "console-status" }, "Closed.");
  const take = h("button", { type: "button", hidden: true, id: "take", onclick: () => { socket.send('{"take": true}'); terminal.focus(); } }, "Take over writing");
  const close = h("button", { type: "button", hidden: true, id: "close-console", onclick: () => { why = ""; socket.close(); } }, "Close");
  const place = h("div", { class: "terminal", hidden: true });
  const keys = h("p", { class: "hint", hidden: true }, "All keys go to the target. To leave the terminal with the keyboard: Ctrl+Shift+Escape, or Shift+Tab twice.");
  let socket = null, terminal = null, why = "";
  signal.addEventListener("abort", () => socket && socket.close());

  async function start(writing) {
    open.disabled = true;
    status.textContent = "Loading the terminal…";
    await load();
    terminal = new globalThis.Terminal({ convertEol: false, screenReaderMode: true, cursorBlink: false, scrollback: 5000, fontSize: 14, disableStdin: !writing, theme: { background: "#101418" } });
    const fit = new globalThis.FitAddon.FitAddon();
    terminal.loadAddon(fit);
    place.hidden = keys.hidden = false;
    terminal.open(place);
    fit.fit();
    const resized = new ResizeObserver(() => fit.fit());
    resized.observe(place);
    let tabs = 0;
    terminal.attachCustomKeyEventHandler((event) => {
      if (event.key === "Escape" && event.ctrlKey && event.shiftKey) { close.focus(); return false; }
      if (event.type === "keydown") tabs = event.key === "Tab" && event.shiftKey ? tabs + 1 : event.key === "Shift" ? tabs : 0;
      return tabs < 2; // The browser then moves on by itself.
    });
    socket = socketOf(`/v1/targets/${target}/console?mode=${writing ? "rw" : "ro"}`);
    socket.binaryType = "arraybuffer";
    why = "the gateway did not open it; the network, too many clients, or a token that ended";
    socket.onopen = () => { why = "the connection ended"; say(writing ? "Open: type." : "Open: you may look, not type."); close.hidden = false; if (writing) terminal.focus(); };
    socket.onmessage = ({ data }) => { if (typeof data === "string") told(JSON.parse(data)); else terminal.write(new Uint8Array(data)); };
    socket.onclose = () => {
      say(why ? `Closed: ${why}.` : "Closed.");
      resized.disconnect();
      terminal.dispose();
      place.replaceChildren();
      place.hidden = keys.hidden = take.hidden = close.hidden = true;
      open.disabled = false;
    };
    const encoder = new TextEncoder();
    terminal.onData((text) => socket.readyState === 1 && socket.send(encoder.encode(text)));
    terminal.onBinary((text) => socket.readyState === 1 && socket.send(Uint8Array.from(text, (c) => c.charCodeAt(0))));
  }

  function say(text) { status.textContent = text; tell(text); }

  function told(data) {
    if ("notice" in data) { why = data.notice; setTimeout(() => { why = why && "the connection ended"; }, 2000); say(data.notice); take.hidden = !data.notice.startsWith("not sent") || !may("console"); }
    if ("writing" in data) { if (data.writing) { say("You write."); take.hidden = true; } else if (!may("console")) take.hidden = true; }
    if ("suspended" in data && !data.suspended) say("The port is back.");
  }

  return h("section", { class: "card", "aria-labelledby": "console-title" }, h("h2", { id: "console-title" }, "Console"),
    h("div", { class: "row" }, open, take, close), status, place, keys);
}
