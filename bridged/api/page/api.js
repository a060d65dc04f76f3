// The gateway: requests, resumable uploads, and streams of events that come back by themselves.

import { sha256 } from "./sha256.js";

const PIECE_BYTES = 256 * 1024;
const PATIENCE_MS = [500, 1000, 2000, 5000, 10000];

export const token = {
  get: () => sessionStorage.getItem("bridged-token") || "",
  set: (text) => (text ? sessionStorage.setItem("bridged-token", text) : sessionStorage.removeItem("bridged-token")),
};

export class Problem extends Error {
  constructor(status, problem) {
    super(problem.detail || `the gateway answered ${status}`);
    this.status = status;
    this.problem = problem;
  }
}

export const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/** Set by main.js: asks for a token. */
export const onLogin = { ask: () => {} };

function headers(more) {
  return { ...more, ...(token.get() ? { Authorization: `Bearer ${token.get()}` } : {}) };
}

async function fail(response) {
  let problem = {};
  if ((response.headers.get("Content-Type") || "").includes("json")) problem = await response.json().catch(() => ({}));
  if (response.status === 401) onLogin.ask(problem.detail || "");
  throw new Problem(response.status, problem);
}

export async function ask(method, path, body, more = {}) {
  const settings = { method, headers: headers(more), cache: "no-store" };
  if (body !== undefined) {
    settings.body = JSON.stringify(body);
    settings.headers["Content-Type"] = "application/json";
  }
  const response = await fetch(path, settings);
  if (!response.ok) await fail(response);
  if (response.status === 204) return null;
  return (response.headers.get("Content-Type") || "").includes("json") ? response.json() : response.text();
}

/** Follows a stream until it ends (204, or an `end` event) or `signal` says so. `on(event, data)`; `state(live)`. */
export async function follow(path, on, { signal, state = () => {} }) {
  let last = "", tries = 0;
  while (!signal.aborted) {
    try {
      const response = await fetch(path, { headers: headers(last ? { "Last-Event-ID": last } : {}), signal, cache: "no-store" });
      if (response.status === 204) return;
      if (!response.ok) await fail(response);
      state(true);
      tries = 0;
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "", ended = false;
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const blocks = (rest + value).split("\n\n");
        rest = blocks.pop();
        for (const block of blocks) {
          let name = "", data = null;
          for (const line of block.split("\n")) {
            if (line.startsWith("event: ")) name = line.slice(7);
            else if (line.startsWith("data: ")) data = JSON.parse(line.slice(6));
            else if (line.startsWith("id: ")) last = line.slice(4);
          }
          if (name) on(name, data);
          ended = ended || name === "end";
        }
      }
      if (ended) return;
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Problem && error.status < 500 && error.status !== 429) throw error;
    }
    state(false);
    await pause(PATIENCE_MS[Math.min(tries++, PATIENCE_MS.length - 1)]);
  }
}

const b64 = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text)));

/** Stages a file: what is there already is not sent again. Returns its SHA-256. `progress(done, total)`; `note(text)`. */
export async function upload(file, { progress, note, signal }) {
  const most = Number((await fetch("/v1/uploads", { method: "OPTIONS", signal }).catch(() => null))?.headers.get("Tus-Max-Size"));
  if (most && file.size > most) throw new Error(`${file.name} has ${file.size} bytes, and this gateway takes at most ${most}`);
  note("reading");
  const data = new Uint8Array(await file.arrayBuffer());
  const digest = await sha256(data);
  const where = `/v1/uploads/${digest}`;
  const tus = { "Tus-Resumable": "1.0.0" };
  const name = file.name.replace(/[^ -+\--~]/g, "_").slice(-100);
  let offset = -1, tries = 0;
  note("sending");
  while (offset < data.length && !signal.aborted) {
    try {
      if (offset < 0) {
        const found = await fetch(where, { method: "HEAD", headers: headers(tus), signal, cache: "no-store" });
        if (found.ok) offset = Number(found.headers.get("Upload-Offset"));
        else if (found.status === 404) {
          const words = `sha256 ${b64(digest)},name ${b64(name)}`;
          const made = await fetch("/v1/uploads", { method: "POST", headers: headers({ ...tus, "Upload-Length": String(data.length), "Upload-Metadata": words }), signal });
          if (!made.ok) await fail(made);
          offset = 0;
        } else await fail(found);
        progress(offset, data.length);
        continue;
      }
      const piece = data.subarray(offset, offset + PIECE_BYTES);
      const sent = await fetch(where, {
        method: "PATCH", body: piece, signal,
        headers: headers({ ...tus, "Content-Type": "application/offset+octet-stream", "Upload-Offset": String(offset) }),
      });
      if (sent.status === 409 || sent.status === 423 || sent.status === 408) throw new TypeError("somewhere else by now");
      if (!sent.ok) await fail(sent);
      offset = Number(sent.headers.get("Upload-Offset"));
      tries = 0;
      progress(offset, data.length);
    } catch (error) {
      if (signal.aborted || (error instanceof Problem && error.status < 500)) throw error;
      if (tries >= 30) throw error;
      note("the connection broke; going on where it was");
      await pause(PATIENCE_MS[Math.min(tries++, PATIENCE_MS.length - 1)]);
      offset = -1;
    }
  }
  return digest;
}

export function socketOf(path) {
  const url = new URL(path, location.href);
  url.protocol = url.protocol.replace("http", "ws");
  return new WebSocket(url, ["bridged.console.v1", ...(token.get() ? [`token.${token.get()}`] : [])]);
}
