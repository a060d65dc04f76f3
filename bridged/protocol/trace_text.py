"""How a decoded recording is shown: a table for people, one JSON object a line for programs.

The table folds what went well: a run of the same command over ascending addresses is one row, with the median and the worst
time of its answers. What a person should look at is marked with ``!`` and never folded away. The last lines say where the time
went and who was slowest. ``trace.py`` decides what happened; here it is only put into words. No I/O.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from bridged.protocol.an3155 import Command
from bridged.protocol.stub import Verb
from bridged.protocol.trace import Recording
from bridged.protocol.trace_event import Event, Kind, Stage

EXCHANGES = (Kind.COMMAND, Kind.FRAME, Kind.BLOCK, Kind.SYNC, Kind.BYTES)
_STREAMED = {Verb.ERASE, Verb.WRITE, Verb.FILL}
HEAD = ("time", "what", "detail", "answer", "took")


@dataclass(frozen=True, slots=True)
class _Row:
    at: float
    what: str
    detail: str
    answer: str = ""
    took: str = ""
    marked: bool = False
    flags: tuple[str, ...] = ()


def table(recording: Recording, *, fold: bool = True) -> str:
    """The recording as people read it; ``fold`` False: every command has its row, and every silence that was expected."""
    rows = [_row(group) for group in _groups(recording.events, fold)]
    cells = [(f"{row.at:.3f}", row.what, row.detail, row.answer, row.took) for row in rows]
    # What the session noted can be a long sentence; it may reach beyond the columns but does not widen them.
    in_columns = [HEAD, *(cell for cell, row in zip(cells, rows, strict=True) if row.answer)]
    widths = [max(len(line[i]) for line in (in_columns if i == 2 else (HEAD, *cells))) for i in range(5)]
    out = [] if recording.whole else ["This recording does not begin with the start of a session: what came before is missing."]
    out.append(_line(HEAD, widths))
    for cell, row in zip(cells, rows, strict=True):
        out.append(_line(cell, widths, "!" if row.marked else " "))
        out += [f"{'':{widths[0]}} ! {'':{widths[1]}}  {_printable(flag)}" for flag in row.flags]
    return "\n".join([*out, "", *summary(recording)]) + "\n"


def _line(cells: tuple[str, ...], widths: list[int], mark: str = " ") -> str:
    at, what, detail, answer, took = (_printable(cell) for cell in cells)
    line = f"{at:>{widths[0]}} {mark} {what:{widths[1]}}  {detail:{widths[2]}}  {answer:{widths[3]}}  {took:>{widths[4]}}"
    return line.rstrip()


def _printable(text: str) -> str:
    """What comes from a target or from a stranger must not talk to the terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


# --- folding ------------------------------------------------------------------------------------------------------


def _groups(events: Iterable[Event], fold: bool) -> Iterator[list[Event]]:
    """Runs of one command without a flag, each beginning at or after the end of the one before; all else alone.

    Erases and data of the second-stage loader are sent in turn: two runs, side by side.
    """
    runs: list[list[Event]] = []
    for event in events:
        if fold and event.kind is Kind.BYTES and not event.sent_bytes and not event.received_bytes:
            continue  # It was listened whether anybody speaks, and nobody did.
        if fold and event.kind is Kind.HAZARD and runs and all(run[-1].kind is Kind.FRAME for run in runs):
            continue  # Of erases that are under way together; the first one was told before them.
        run = next((run for run in runs if fold and _follows(run[-1], event)), None)
        if run is not None:
            run.append(event)
            continue
        if not (fold and _beside(runs, event)):
            yield from runs
            runs = []
        runs.append([event])
    yield from runs


def _beside(runs: list[list[Event]], event: Event) -> bool:
    """Whether ``event`` begins a run that goes on together with those that are open."""
    last = [run[-1] for run in runs]
    verbs = {e.opcode for e in (*last, event) if e.kind is Kind.FRAME and not e.flags}
    return verbs <= _STREAMED and len(verbs) == len(last) + 1


def _follows(before: Event, event: Event) -> bool:
    if event.flags or before.flags or (event.kind, event.opcode) != (before.kind, before.opcode):
        return False
    if event.kind not in (Kind.COMMAND, Kind.FRAME, Kind.BLOCK) or event.answer is not before.answer:
        return False
    if before.end is None or event.end is None or event.address is None:
        return False
    # Blocks that are blank after an erase are not written; what is read at another place is another matter.
    skips = (Kind.COMMAND, Command.WRITE_MEMORY), (Kind.FRAME, Verb.WRITE), (Kind.FRAME, Verb.ERASE), (Kind.FRAME, Verb.FILL)
    return before.end == event.address or ((event.kind, event.opcode) in skips and before.end < event.address)


def _row(group: list[Event]) -> _Row:
    first, last = group[0], group[-1]
    if first.kind not in EXCHANGES:
        took = f", after {span(first.seconds)}" if first.seconds else ""
        return _Row(first.at, first.kind.value, first.title + took, marked=bool(first.flags))
    took = span(last.at + last.seconds - first.at)
    if len(group) == 1:
        return _Row(first.at, first.title, first.detail, _answer(first), took, bool(first.flags), first.flags)
    assert first.address is not None
    assert last.end is not None
    gaps = sum(a.end != b.address for a, b in pairwise(group))
    detail = f"{first.address:#010x}..{last.end - 1:#010x}, {len(group)} blocks"
    detail += f", {gaps} gap{'' if gaps == 1 else 's'}" if gaps else ""
    times = [seconds for event in group for stage in event.stages[-1:] if (seconds := _took_s(event, stage)) is not None]
    said = str(first.answer or "ACK")
    answer = f"{said} in {span(median(times))} median, {span(max(times))} worst" if times else said
    return _Row(first.at, first.title, detail, answer, took)


def _answer(event: Event) -> str:
    if not event.stages:
        return ""
    stage = event.stages[-1]
    seconds = _took_s(event, stage)
    return str(stage.answer) if seconds is None else f"{stage.answer} in {span(seconds)}"


def _took_s(event: Event, stage: Stage) -> float | None:
    return stage.answer_s if event.kind is Kind.FRAME else stage.target_s


def span(seconds: float) -> str:
    """A duration, short."""
    if seconds < 0.00005:
        return "< 0.1 ms"
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s"


# --- who was slow -------------------------------------------------------------------------------------------------


def summary(recording: Recording) -> list[str]:
    """Lines: how much there was, where the time went, who was slowest."""
    sums, events = recording.sums, recording.events
    commands = sum(event.kind in (Kind.COMMAND, Kind.FRAME, Kind.BLOCK) for event in events)
    marked = len(recording.flagged)
    lines = [
        f"{commands} command{'' if commands == 1 else 's'} in {sums.total_s:.3f} s; "
        + (f"{marked} marked with !" if marked else "nothing unusual")
    ]
    shares = (
        ("bytes on the wire", sums.wire_s),
        ("target and adapter", sums.target_s),
        ("waited in vain", sums.silent_s),
        ("host", sums.host_s),
        ("pauses, lines, journal", sums.rest_s),
    )
    if sums.total_s > 0:
        parts = (f"{name} {span(value)} ({100 * value / sums.total_s:.0f} %)" for name, value in shares if value)
        lines.append("time: " + ", ".join(parts))
    for text, pick in (("slowest answer", _target_s), ("longest pause of the host", _gap_s)):
        found = max(
            ((pick(stage), event, stage) for event in events for stage in event.stages), key=lambda f: f[0], default=None
        )
        if found is not None and found[0] > 0:
            seconds, event, stage = found
            place = f" at {event.address:#010x}" if event.address is not None else ""
            before = "before " if pick is _gap_s else ""
            lines.append(f"{text}: {span(seconds)}, {before}{event.title}{place} ({stage.name}), time {stage.at:.3f}")
    lines += [_printable(event.title) for event in events if event.kind is Kind.COUNTERS]
    if not recording.whole:
        lines.append("the beginning is missing, so the sums are those of a part")
    if not recording.ended:
        lines.append("the end of the session is missing: its process was killed, or this is a part")
    return lines


def _target_s(stage: Stage) -> float:
    return stage.target_s or 0.0


def _gap_s(stage: Stage) -> float:
    return stage.gap_s or 0.0


# --- JSON ---------------------------------------------------------------------------------------------------------


def json_lines(recording: Recording) -> Iterator[str]:
    """One object an event, in order, and one with the sums at the end. Names and units are part of the public interface."""
    for event in recording.events:
        yield _dumped(_object(event))
    sums = recording.sums
    commands = sum(event.kind in (Kind.COMMAND, Kind.FRAME, Kind.BLOCK) for event in recording.events)
    yield _dumped(
        {
            "event": "summary",
            "whole": recording.whole,
            "ended": recording.ended,
            "commands": commands,
            "flagged": len(recording.flagged),
            "total_s": _rounded(sums.total_s),
            "wire_s": _rounded(sums.wire_s),
            "target_s": _rounded(sums.target_s),
            "silent_s": _rounded(sums.silent_s),
            "host_s": _rounded(sums.host_s),
        }
    )


def _object(event: Event) -> dict[str, Any]:
    shown: dict[str, Any] = {"event": event.kind.value, "at": _rounded(event.at), "seconds": _rounded(event.seconds)}
    if event.kind in (Kind.COMMAND, Kind.FRAME, Kind.BLOCK):
        shown |= {"command": event.title, "opcode": None if event.opcode is None else f"0x{event.opcode:02x}"}
        shown |= {"address": None if event.address is None else f"{event.address:#010x}", "length": event.length}
        shown["detail"] = event.detail
    else:
        shown["text"] = f"{event.title}: {event.detail}" if event.detail else event.title
    if event.stages:
        shown |= {"answer": event.answer, "stages": [_stage(stage) for stage in event.stages]}
    shown |= {"flags": list(event.flags), "sent_bytes": event.sent_bytes, "received_bytes": event.received_bytes}
    shown["lines"] = [event.entries[0].line, event.entries[-1].line]
    return {key: value for key, value in shown.items() if value is not None}


def _stage(stage: Stage) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": stage.name, "at": _rounded(stage.at), "sent_bytes": stage.sent_bytes}
    shown |= {"answer": stage.answer, "came": stage.came.hex() or None}
    for name in ("answer_s", "target_s", "gap_s", "silent_s"):
        value = getattr(stage, name)
        shown[name] = None if value is None else _rounded(value)
    return {key: value for key, value in shown.items() if value is not None}


def _rounded(seconds: float) -> float:
    return round(seconds, 6)


def _dumped(shown: dict[str, Any]) -> str:
    return json.dumps(shown, separators=(",", ":"), allow_nan=False)
