"""The gateway's answers in words for a person: tables, how a job ended, what a plan would do. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bridged.protocol.reply import Reply, flatten

# What a person has to know of how a job left its target (``boot=``).
_LEFT = {
    "go": "started by Go: a reset enters the loader again until the power of the target was cycled",
    "needs_power_cycle": "NOT STARTED: the part enters its loader until its power is cycled; switch it off and on",
    "needs_reset": "NOT STARTED: nothing is wired that could reset it; it stays in its loader until somebody does",
    "in_loader": "LEFT IN ITS LOADER: its application is erased and only that leads there; do not reset it, flash it again",
    "empty": "nothing is in flash that could be started",
}
_PLAN_WORDS = {"write": "erase, write", "keep": "erase, write, keep", "lose": "erase, write, LOSE", "stay": "stays as it is"}


def size_text(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024 or unit == "MiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def rate_text(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1000:.1f} kB/s"


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Columns that are empty everywhere are left out."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    lines = [[columns[i].upper() for i in kept], *([row[i] for i in kept] for row in cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    return text[:19] + "…" if text.startswith("sha256:") and len(text) > 20 else text


def facts(data: Mapping[str, Any]) -> str:
    """One fact a line, nested ones by dotted names, as the text protocol would say them."""
    # What a session did not do, or did not ask the chip, is 0 in its result; people need not read that.
    pairs = [(key, value) for key, value in flatten(data) if value and not (value == "0" and key.startswith("result."))]
    width = max((len(key) for key, _ in pairs), default=0)
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in pairs)


def outcome(reply: Reply) -> str:
    """How a job went well, in a sentence."""
    data = reply.data
    who = f"{data.get('target', '')}: "
    kind = str(data.get("kind", ""))
    seconds = f" in {float(data['seconds']):.1f} s" if data.get("seconds") else ""
    evidence = str(data.get("evidence") or "")
    if reply.code == 251:
        age = "" if evidence in ("full", "") else f", {float(data.get('age_s') or 0):.0f} s old"
        age += "; the target was not asked" if evidence == "record" and not data.get("protected") else ""
        return f"{who}nothing to do: the image is there already (evidence: {evidence or 'none given'}{age}){_left(data)}"
    written = size_text(int(data.get("bytes_written") or 0))
    if kind in ("flash", "ensure"):
        proven = _proven(data) if evidence == "full" else f"evidence: {evidence or 'none given'}"
        erased = int(data.get("sectors_erased") or 0)
        text = f"{who}done{seconds}: {written} written, {erased} sector{'' if erased == 1 else 's'} erased; {proven}"
        text += "; readout protection is on" if data.get("protected") else ""
    elif kind == "option-bytes":
        return options_text(data)
    elif kind in ("protect", "unprotect"):
        text = f"{who}{kind} done{seconds}" if data.get("changed") else f"{who}nothing to do: it is so already"
        text += "; the whole flash was erased" if kind == "unprotect" and data.get("bytes_compared") else ""
    elif kind == "xmodem":
        text = f"{who}sent{seconds}: {written}; its bootloader says that it is there (nothing was read back)"
    elif kind == "verify":
        text = f"{who}equal{seconds}: {size_text(int(data.get('bytes_compared') or 0))} compared"
        text += " by CRC on the target" if data.get("proof") == "crc-on-target" else ""
    elif kind == "doctor":
        bad, odd = int(data.get("problems") or 0), int(data.get("warnings") or 0)
        text = f"{who}{bad} problem{'' if bad == 1 else 's'}, {odd} warning{'' if odd == 1 else 's'}"
    elif kind == "identify":
        known = ("target", "names", "family", "pid", "uid", "flash_bytes", "layout", "loader", "loader_id", "baud")
        return facts({key: data.get(key) for key in known})
    else:
        text = f"{who}{kind} done{seconds}"
    banner = str(data.get("banner") or "").strip()
    why = str(data.get("second_stage") or "")
    text += f"\n  second-stage loader {why}" if why not in ("", "used") else ""
    return text + _left(data) + (f"\n  it says: {banner.splitlines()[0][:100]}" if banner else "")


def _proven(data: Mapping[str, Any]) -> str:
    """By what every byte was compared."""
    if data.get("proof") == "crc-on-target":
        return (
            f"every byte compared by a CRC computed on the target (second-stage loader, {data.get('second_stage_baud')} baud)"
        )
    return "every byte read back and compared"


def _left(data: Mapping[str, Any]) -> str:
    text = _LEFT.get(str(data.get("boot") or ""), "")
    return f"\n  {text}" if text else ""


def options_text(data: Mapping[str, Any]) -> str:
    """Option bytes, a field a line; what a job changed with both values."""
    shown = data.get("options") or {}
    before, after = shown.get("before") or {}, shown.get("after") or {}
    rows = dict(flatten({key: value for key, value in before.items() if key != "raw"}))
    now = dict(flatten({key: value for key, value in after.items() if key != "raw"})) if data.get("changed") else rows
    width = max((len(name) for name in rows), default=0)
    lines = []
    for name, value in rows.items():
        new = now.get(name, "")
        lines.append(
            f"  {name.removeprefix('fields.').ljust(width)}  {value or 'none'}" + (f" -> {new}" if new != value else "")
        )
    source = f" ({shown['source']}; {shown['confidence']})" if shown.get("source") else " (its layout cannot be cited)"
    done = "written and read again" if data.get("changed") else "nothing was written"
    return "\n".join([f"{data.get('target', '')}: option bytes{source}", *lines, done])


def update_text(data: Mapping[str, Any]) -> str:
    """What an update says beyond where it belongs."""
    text = f"{data.get('state', '')} {data.get('phase') or ''}".strip()
    if data.get("total"):
        text += f" {data.get('done', 0)}/{data['total']} B"
    hidden = {"job", "target", "seq", "at", "state", "phase", "done", "total", "rate"}
    more = " ".join(f"{key}={value}" for key, value in flatten({k: v for k, v in data.items() if k not in hidden}))
    return f"{text} {more}".rstrip()


def plan_text(sums: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], ranges: Sequence[Mapping[str, Any]]) -> str:
    """What PLAN answered, as people read it: what goes where, what happens to which sectors, the sums, the time."""

    def place(row: Mapping[str, Any], start: str) -> str:
        return f"{int(row[start]):#010x}..{int(row['end']) - 1:#010x}"

    title = f"{sums['target']}: {sums['chip']}, {exact_text(sums['flash_bytes'])} flash, layout {sums['layout']}"
    goes = [[str(row["name"]), place(row, "start"), exact_text(row["end"] - row["start"])] for row in parts]
    happens = []
    for row in _stays_joined(ranges):
        codes = f"{row['first']}" if row["sectors"] == 1 else f"{row['first']}..{row['last']}"
        does = [(row["write_bytes"], "written"), (row["keep_bytes"], "kept"), (row["lose_bytes"], "LOST")]
        what = ", ".join(f"{exact_text(count)} {word}" for count, word in does if count)
        size = exact_text(row["end"] - row["address"])
        happens.append(
            [_PLAN_WORDS[row["action"]], place(row, "address"), f"{_count(row['sectors'], 'sector')} ({codes})", size, what]
        )
    total = f"erases {_count(sums['erase_sectors'], 'sector')}, {exact_text(sums['erase_bytes'])}"
    total += f"; writes {exact_text(sums['write_bytes'])}"
    for key, text in (
        ("keep_bytes", "; reads {} outside the image and puts them back"),
        ("lose_bytes", "; LOSES {} outside the image"),
    ):
        total += text.format(exact_text(sums[key])) if sums[key] else ""
    total += f"; {exact_text(sums['stay_bytes'])} stay untouched" if sums["stay_bytes"] else ""
    seconds, most = float(sums["seconds"]), float(sums["seconds_most"])
    takes = f"takes about {duration(seconds)} at {sums['baud']} baud, {duration(float(sums['erase_seconds']))} of it erasing"
    takes += f"; up to {duration(most)} if none of the kept bytes is blank" if round(most) > round(seconds) else ""
    lines = [title, "", *_columns(goes), "", *_columns(happens), "", total, takes]
    if sums.get("assumed"):
        lines.append(f"assumed, not known: {'; '.join(sums['assumed'])}; `bridged id {sums['target']}` asks the chip")
    if sums.get("if_protected"):
        lines.append(f"if readout protection is on, {sums['if_protected']}")
    if sums.get("proven"):
        lines.append("this very content was proven in the target last: `bridged ensure` would only compare it")
    return "\n".join(lines)


def _stays_joined(ranges: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What stays as it is in one line, whatever the sizes of its sectors."""
    found: list[dict[str, Any]] = []
    for row in ranges:
        last = found[-1] if found else {}
        if row["action"] == last.get("action") == "stay" and row["address"] == last["end"]:
            last.update(end=row["end"], sectors=last["sectors"] + row["sectors"], last=row["last"])
        else:
            found.append(dict(row))
    return found


def exact_text(count: int) -> str:
    """Bytes without rounding: whole KiB and MiB as such, all else to the byte."""
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count and not count % size:
            return f"{count // size} {unit}"
    return f"{count} B"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Indented columns; a size stands to the right, so that sizes can be compared at a glance."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return [
        (
            "  " + "  ".join(t.rjust(w) if t.endswith((" B", "iB")) else t.ljust(w) for t, w in zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
