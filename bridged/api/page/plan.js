// The flash as a picture: what is written, kept, lost, left blank and not touched. The same in words, for who does not see it.

import { bytes, facts, h, hex, seconds } from "./dom.js";

const WORDS = {
  write: "erased and written",
  keep: "erased, its other bytes kept",
  lose: "erased, its other bytes LOST",
  stay: "not touched",
  blank: "erased, left blank",
};

/** Pieces of one run of sectors from left to right: where the image lies is written, the rest is what the run says. */
export function pieces(row, parts) {
  if (row.action === "stay") return [{ kind: "stay", start: row.address, end: row.end }];
  const rest = row.action === "write" ? "blank" : row.action;
  const found = [];
  let at = row.address;
  for (const part of [...parts].sort((a, b) => a.start - b.start)) {
    const start = Math.max(part.start, at), end = Math.min(part.end, row.end);
    if (start >= end) continue;
    if (start > at) found.push({ kind: rest, start: at, end: start });
    found.push({ kind: "write", start, end });
    at = end;
  }
  if (at < row.end) found.push({ kind: rest, start: at, end: row.end });
  return found;
}

function hatch(id) {
  return h("pattern", { id, width: 8, height: 8, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    h("rect", { width: 8, height: 8, class: "ground" }), h("line", { x1: 0, y1: 0, x2: 0, y2: 8, class: `hatch-${id}` }));
}

/** Not to scale: widths grow with the square root of a sector, and what is not touched takes half of the room at most. */
function picture(plan) {
  const rows = plan.range.map((row) => ({ ...row, weight: row.sectors * Math.sqrt(row.sector_bytes) }));
  const sum = (touched) => rows.filter((row) => (row.action !== "stay") === touched).reduce((total, row) => total + row.weight, 0);
  const [touched, other] = [sum(true), sum(false)];
  if (touched && other > touched) for (const row of rows) if (row.action === "stay") row.weight *= touched / other;
  const whole = rows.reduce((total, row) => total + row.weight, 0);
  const drawing = h("svg", { viewBox: "0 0 1000 60", preserveAspectRatio: "none", role: "img", "aria-labelledby": "plan-words" },
    h("defs", null, hatch("keep"), hatch("lose")));
  let x = 0;
  for (const row of rows) {
    const width = (row.weight / whole) * 1000;
    const scale = width / (row.end - row.address);
    for (const piece of pieces(row, plan.part)) {
      const size = piece.end - piece.start;
      drawing.append(h("rect", { class: piece.kind, x: x + (piece.start - row.address) * scale, y: 4, width: Math.max(size * scale, 1), height: 52 },
        h("title", null, `${hex(piece.start)}: ${bytes(size)} ${WORDS[piece.kind]}`)));
    }
    const seen = width / row.sectors >= 6 ? 1 : row.sectors; // Edges that would run together say nothing.
    for (let n = 0; n <= row.sectors; n += seen) {
      const at = x + (width * n) / row.sectors;
      drawing.append(h("line", { class: "edge", x1: at, x2: at, y1: 0, y2: 60 }));
    }
    x += width;
  }
  return drawing;
}

export function planView(plan) {
  const sums = { write: plan.write_bytes, keep: plan.keep_bytes, lose: plan.lose_bytes, stay: plan.stay_bytes };
  sums.blank = Math.max(plan.erase_bytes - sums.write - sums.keep - sums.lose, 0);
  const kinds = Object.keys(WORDS).filter((kind) => sums[kind] > 0);
  return h("section", { class: "flash", "aria-label": "Plan" },
    h("h3", null, "What will happen to the flash ", h("span", { class: "hint" }, "(not to scale)")),
    picture(plan),
    h("ul", { class: "legend", id: "plan-words" }, kinds.map((kind) => h("li", null,
      h("svg", { viewBox: "0 0 8 8", "aria-hidden": "true" }, h("rect", { width: 8, height: 8, class: kind })), `${bytes(sums[kind])} ${WORDS[kind]}`))),
    plan.lose_bytes > 0 && h("p", { class: "box bad" }, `${bytes(plan.lose_bytes)} that are in the flash now will be lost.`),
    facts([
      ["Chip", `${plan.chip}, ${bytes(plan.flash_bytes)}${plan.layout ? `, ${plan.layout}` : ""}`],
      ["Erases", `${plan.erase_sectors} sector${plan.erase_sectors === 1 ? "" : "s"}, ${bytes(plan.erase_bytes)}`],
      ["Takes", plan.seconds_most - plan.seconds > 0.5 ? `${seconds(plan.seconds)} to ${seconds(plan.seconds_most)}` : `about ${seconds(plan.seconds)}`],
      ["Assumed", plan.assumed.join("; ")],
    ]),
    plan.proven && h("p", { class: "box good" }, "This very content was proven in the flash before."),
    h("details", null, h("summary", null, "Every run of sectors"), h("div", { class: "scroll" }, h("table", null,
      h("thead", null, h("tr", null, ["From", "To", "Sectors", "What", "Written", "Kept", "Lost"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", null, plan.range.map((row) => h("tr", null, [hex(row.address), hex(row.end - 1), row.sectors === 1 ? `${row.first}` : `${row.first} to ${row.last}`,
        WORDS[row.action], bytes(row.write_bytes), bytes(row.keep_bytes), bytes(row.lose_bytes)].map((text) => h("td", null, text)))))))));
}
