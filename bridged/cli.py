"""The command line: arguments, and what people see of the answers. What it asks, it asks ``bridged.client``.

It must answer in a fraction of a second on the smallest gateway, so nothing is imported that the command at hand does not need;
``serve``, ``sim``, ``demo``, ``doctor`` and ``check-config`` hand over to their modules by a late import.

- Ctrl-C ends this program and not the job.
- Results go to stdout, progress and errors to stderr; ``--json`` prints every reply of the gateway as one JSON object a line.
- ``exit_code`` is the one place that knows the exit codes.

It knows nothing of images, chips or wires: the gateway checks, plans and explains; nor of sockets: that is ``client``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from bridged import __version__
from bridged.client import (
    DEFAULT_GATEWAY,
    DEFAULT_SOCKET,
    RETRY_S,
    Client,
    Gateway,
    LinkLost,
    LocalFile,
    Refused,
    signature_text,
    split_address,
)
from bridged.errors import BadRequest, BridgedError, DaemonUnreachable, DigestMismatch
from bridged.protocol import line as codec
from bridged.protocol.line import Reply
from bridged.terminal import End, Talk, raw_keys


class Exit(IntEnum):
    """Exit codes; part of the public interface."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    MISMATCH = 3
    NO_TARGET = 4
    ROLLED_BACK = 5
    REJECTED = 6
    CANCELED = 7
    TIMED_OUT = 8
    UNREACHABLE = 69  # EX_UNAVAILABLE
    BUSY = 75  # EX_TEMPFAIL
    NOT_ALLOWED = 77  # EX_NOPERM
    INTERRUPTED = 130  # 128 + SIGINT


EXIT_TEXT = {
    Exit.DONE: "done (also: nothing was to be done)",
    Exit.FAILED: "the job failed",
    Exit.USAGE: "wrong arguments, or no such file, image or job",
    Exit.MISMATCH: "verify found a difference",
    Exit.NO_TARGET: "no such target, or it does not answer",
    Exit.ROLLED_BACK: "failed, and the previous image was restored",
    Exit.REJECTED: "refused: the image does not suit the target, or policy",
    Exit.CANCELED: "canceled",
    Exit.TIMED_OUT: "timed out",
    Exit.UNREACHABLE: "the gateway cannot be reached",
    Exit.BUSY: "busy; try again later",
    Exit.NOT_ALLOWED: "not allowed",
}
_BY_STATE = {
    "rolled_back": Exit.ROLLED_BACK,
    "rejected": Exit.REJECTED,
    "canceled": Exit.CANCELED,
    "timed_out": Exit.TIMED_OUT,
}
_BY_ERROR = {
    "VERIFY_MISMATCH": Exit.MISMATCH,
    "UNKNOWN_TARGET": Exit.NO_TARGET,
    "CANCELED": Exit.CANCELED,
    "DEADLINE_EXCEEDED": Exit.TIMED_OUT,
    "WAIT_TIMEOUT": Exit.TIMED_OUT,
    "DAEMON_UNREACHABLE": Exit.UNREACHABLE,
    "NOT_ALLOWED": Exit.NOT_ALLOWED,
    "LOGIN_FIRST": Exit.NOT_ALLOWED,
    "BAD_TOKEN": Exit.NOT_ALLOWED,
    "TARGET_BUSY": Exit.BUSY,
    "PORT_BUSY": Exit.BUSY,
    "NOT_CANCELLABLE": Exit.BUSY,
    "ID_CONFLICT": Exit.USAGE,
    "IMAGE_TOO_LARGE": Exit.USAGE,
    "CONFIG": Exit.USAGE,
}
_BY_REPLY = {
    404: Exit.USAGE,
    421: Exit.BUSY,
    423: Exit.BUSY,
    429: Exit.BUSY,
    450: Exit.NO_TARGET,
    452: Exit.BUSY,
    500: Exit.USAGE,
    501: Exit.USAGE,
    502: Exit.USAGE,
    550: Exit.REJECTED,
    553: Exit.REJECTED,
}


def exit_code(reply: Reply) -> Exit:
    """What a last reply line means for a script: by the state of the job, then by the error, then by the reply code."""
    if reply.code < 400:
        return Exit.DONE
    state = _BY_STATE.get(str(reply.data.get("state", "")))
    return state or _BY_ERROR.get(reply.text) or _BY_REPLY.get(reply.code) or Exit.FAILED


# --- what a person sees -------------------------------------------------------------------------------------------


def size_text(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024 or unit == "MiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def rate_text(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1000:.1f} kB/s"


class Screen:
    """Progress on stderr: one line that is rewritten on a terminal, else a line for each phase and now and then."""

    QUIET_S = 5.0

    def __init__(self, json_lines: bool = False) -> None:
        self.json = json_lines
        self.raw = False  # A terminal whose lines do not begin at the left by themselves, as the console makes it.
        self._tty = sys.stderr.isatty() and not json_lines and os.environ.get("TERM") != "dumb"
        self._shown = ""
        self._phase = ""
        self._said_at = 0.0
        self._complete = False

    def progress(self, what: str, phase: str, done: int, total: int, rate: float) -> None:
        if self.json:
            return
        parts = [phase or "waiting"]
        if total:
            parts.append(f"{100 * min(done, total) // total:3d} %")
            parts.append(f"{size_text(done)} of {size_text(total)}")
            if rate > 0:
                parts.append(rate_text(rate))
                if 0 < done < total:
                    parts.append(f"{(total - done) / rate:.0f} s left")
        if self._tty:
            self._rewrite(f"{what}  {_bar(done, total)}  {'  '.join(parts)}")
            return
        now, complete = time.monotonic(), bool(total) and done >= total
        if phase != self._phase or now - self._said_at >= self.QUIET_S or (complete and not self._complete):
            self._phase, self._said_at, self._complete = phase, now, complete
            print(f"{what}: {', '.join(part.strip() for part in parts)}", file=sys.stderr, flush=True)

    def _rewrite(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]
        print("\r" + text.ljust(len(self._shown)), end="", file=sys.stderr, flush=True)
        self._shown = text

    def end(self) -> None:
        """Leaves the terminal with a clean line."""
        if self._shown:
            print("\r" + " " * len(self._shown) + "\r", end="", file=sys.stderr, flush=True)
            self._shown = ""
        self._phase = ""

    def note(self, text: str) -> None:
        self.end()
        if not self.json:
            start, end = ("\r", "\r\n") if self.raw else ("", "\n")
            print(f"{start}bridged: {text}", end=end, file=sys.stderr, flush=True)

    def reply(self, reply: Reply) -> None:
        """``--json``: the gateway's own line."""
        if self.json:
            sys.stdout.write(codec.format_reply(reply, as_json=True).decode())
            sys.stdout.flush()

    def error(self, reply: Reply) -> None:
        """Message, cause, remedy, code: on stderr for people, as the reply itself for programs."""
        self.end()
        if self.json:
            self.reply(reply)
            return
        data = reply.data
        where = f"{data['target']}: " if data.get("target") else ""
        out = [f"bridged: {where}{data.get('message') or reply.text} [{reply.text}]"]
        out += [f"  {word}: {data[word]}" for word in ("cause", "remedy") if data.get(word)]
        if data.get("job"):
            out.append(f"  job {data['job']} {data.get('state', '')}; its history: bridged log {data['job']}")
        if data.get("trace"):
            out.append(f"  what was sent and answered: bridged trace {data['trace']}")
        print("\n".join(out), file=sys.stderr, flush=True)


def _bar(done: int, total: int, width: int = 24) -> str:
    filled = width * min(done, total) // total if total else 0
    return "[" + "#" * filled + "." * (width - filled) + "]"


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
    pairs = [(key, value) for key, value in codec.flatten(data) if value and not (value == "0" and key.startswith("result."))]
    width = max((len(key) for key, _ in pairs), default=0)
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in pairs)


# What a person has to know of how a job left its target (``boot=``).
_LEFT = {
    "go": "started by Go: a reset enters the loader again until the power of the target was cycled",
    "needs_power_cycle": "NOT STARTED: the part enters its loader until its power is cycled; switch it off and on",
    "needs_reset": "NOT STARTED: nothing is wired that could reset it; it stays in its loader until somebody does",
    "in_loader": "LEFT IN ITS LOADER: its application is erased and only that leads there; do not reset it, flash it again",
    "empty": "nothing is in flash that could be started",
}


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


def outcome(reply: Reply) -> str:
    """How a job went well, in a sentence."""
    data = reply.data
    who = f"{data.get('target', '')}: "
    kind = str(data.get("kind", ""))
    seconds = f" in {float(data['seconds']):.1f} s" if data.get("seconds") else ""
    evidence = str(data.get("evidence") or "")
    if reply.code == 251:
        age = f", {float(data['age_s']):.0f} s old" if data.get("age_s") else ""
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


def options_text(data: Mapping[str, Any]) -> str:
    """Option bytes, a field a line; what a job changed with both values."""
    shown = data.get("options") or {}
    before, after = shown.get("before") or {}, shown.get("after") or {}
    rows = dict(codec.flatten({key: value for key, value in before.items() if key != "raw"}))
    now = dict(codec.flatten({key: value for key, value in after.items() if key != "raw"})) if data.get("changed") else rows
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


_PLAN_WORDS = {"write": "erase, write", "keep": "erase, write, keep", "lose": "erase, write, LOSE", "stay": "stays as it is"}


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
    takes = f"takes about {_duration(seconds)} at {sums['baud']} baud, {_duration(float(sums['erase_seconds']))} of it erasing"
    takes += f"; up to {_duration(most)} if none of the kept bytes is blank" if round(most) > round(seconds) else ""
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


def _duration(seconds: float) -> str:
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


EXTRA = {"FLASH": "mode", "ENSURE": "evidence"}  # Options that only one of them has.
PAUSE_S = 0.5  # Before a console that ended is asked for again.


# --- commands -----------------------------------------------------------------------------------------------------


class Command:
    """One run of a command: its arguments, the gateway and the screen."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.screen = Screen(args.json)
        gateway = Gateway.find(
            args.gateway,
            token_file=args.token_file,
            ca=args.ca,
            certificate=args.client_cert,
            key=args.client_key,
            name=args.server_name,
        )
        self.client = Client(gateway, retry_s=args.retry_for, note=self.screen.note)
        self.job = ""
        self.problems = 0

    # images and jobs

    def put(self) -> Exit:
        self._print(self._stage(Path(self.args.file), self.args.name or ""))
        return Exit.DONE

    def flash(self) -> Exit:
        return self._with_image("FLASH")

    def ensure(self) -> Exit:
        return self._with_image("ENSURE")

    def verify(self) -> Exit:
        return self._with_image("VERIFY")

    def xmodem(self) -> Exit:
        return self._run_job(
            "XMODEM", self.args.target, self._image(), **self._options("addr", "type", "patch", "sig", "force")
        )

    def plan(self) -> Exit:
        args = self.args
        options = self._options("addr", "type", "patch", "outside", "unprotect", "protect", "force")
        rows: list[Reply] = []
        last = self._ask("PLAN", args.target, self._image(), each=rows.append, **options)
        self._print(
            plan_text(last.data, [row.data for row in rows if row.text == "part"], [r.data for r in rows if r.text == "range"])
        )
        return Exit.DONE

    def read(self) -> Exit:
        path = Path(self.args.output)
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise BadRequest(f"{path} cannot be written: give the name of a file in a directory that exists", path=str(path))
        done = self._run_job("READ", self.args.target, self.args.address, self.args.length)
        if done is not Exit.DONE or self.args.no_wait:
            return done
        size = self.client.get(self.job, path)
        self._print(f"{path}: {size_text(size)}")
        return Exit.DONE

    def erase(self) -> Exit:
        return self._run_job("ERASE", self.args.target, self.args.range, **self._options("entry"))

    def reset(self) -> Exit:
        return self._run_job("RESET", self.args.target, mode="boot" if self.args.boot else None)

    def id(self) -> Exit:
        return self._run_job("ID", self.args.target)

    def examine(self) -> Exit:
        done = self._run_job("DOCTOR", self.args.target)
        return Exit.FAILED if self.problems else done

    def option_bytes(self) -> Exit:
        args = self.args
        values = {"set": args.set, "raw": args.raw, "fields": args.field}
        wanted = {name: ",".join(value) if value else None for name, value in values.items()}
        if wanted["set"]:
            wanted["set"] = wanted["set"].replace("=", ":")
        return self._run_job("OPTION-BYTES", args.target, **wanted, **self._options("force"))

    def protect(self) -> Exit:
        sectors = self.args.sectors
        what = "write" if sectors else None
        return self._run_job("PROTECT", self.args.target, what=what, sectors=sectors, **self._options("force"))

    def unprotect(self) -> Exit:
        what = "write" if self.args.write else None
        return self._run_job("UNPROTECT", self.args.target, what=what, **self._options("force"))

    def _with_image(self, verb: str) -> Exit:
        names: tuple[str, ...] = ("addr", "type", "patch")
        if verb != "VERIFY":
            names += ("outside", "entry", "unprotect", "protect", "force", "sig")
        if verb in EXTRA:
            names += (EXTRA[verb],)
        return self._run_job(verb, self.args.target, self._image(), **self._options(*names))

    def _image(self) -> str:
        """Uploads the files; what is no file may be an image that is staged already. Images as the protocol names them."""
        named: list[str] = []
        for text in self.args.files:
            path, address = split_address(text)
            if path.startswith("sha256:") and not os.path.exists(path):
                named.append(path + address)
                continue
            named.append(self._stage(Path(path), "") + address)
        return ",".join(named)

    def _stage(self, path: Path, name: str) -> str:
        """Sends a file, as far as the gateway has not got it; as the protocol names it."""

        def progress(done: int, total: int, rate: float) -> None:
            self.screen.progress(path.name, "upload", done, total, rate)

        ref, reply = self.client.stage(LocalFile.of(path), name, self.args.type, progress)
        self.screen.end()
        self.screen.reply(reply)
        return ref

    def _options(self, *names: str) -> dict[str, Any]:
        args = self.args
        values = {
            "addr": getattr(args, "addr", None),
            "type": getattr(args, "type", None),
            "patch": ",".join(getattr(args, "patch", None) or []) or None,
            "outside": "discard" if getattr(args, "discard_outside", False) else None,
            "entry": "one-shot" if getattr(args, "one_shot", False) else None,
            "unprotect": 1 if getattr(args, "unprotect", False) else None,
            "protect": 1 if getattr(args, "protect", False) else None,
            "force": ",".join(getattr(args, "force", None) or []) or None,
            "sig": ",".join(signature_text(Path(name)) for name in getattr(args, "sig", None) or []) or None,
            "mode": "full" if getattr(args, "full", False) else None,
            "evidence": getattr(args, "evidence", None),
            "trace": 1 if getattr(args, "trace", False) else None,
            "resets": ",".join(getattr(args, "resets", None) or []) or None,
        }
        return {name: values[name] for name in names}

    def _run_job(self, verb: str, target: str, *words: str, **options: Any) -> Exit:
        reply = self.client.submitted(
            verb, target, *words, id=self.args.id or "", **self._options("trace", "resets"), **options
        )
        self.screen.reply(reply)
        self.job = str(reply.data.get("job", ""))
        if reply.code == 251:  # An ensure that was true already; there was nothing to wait for.
            self._print(outcome(reply))
            return Exit.DONE
        if self.args.no_wait:
            self._print(self.job)
            return Exit.DONE
        return self._follow()

    def _follow(self) -> Exit:
        """Waits for ``self.job``."""
        last = self.client.wait(self.job, self._show_progress)
        self.screen.end()
        self.screen.reply(last)
        self._print(outcome(last))
        return Exit.DONE

    def _show_progress(self, reply: Reply) -> None:
        self.screen.reply(reply)
        data = reply.data
        if reply.code == 250 and "level" in data:  # A finding of DOCTOR.
            self.screen.end()
            self.problems += data["level"] == "problem"
            self._print(f"{data['level']:8} {data['code']}: {data['text']}")
            if data.get("remedy"):
                self._print(f"         {data['remedy']}")
            return
        if data.get("event") == "Warned":
            self.screen.note(f"{data.get('target', '')}: warning: {data.get('text', '')}")
        state = str(data.get("state", ""))
        phase = str(data.get("phase") or "") if state == "running" else state
        if state in ("running", "queued", "waiting", "interrupted"):
            if state != "running" and data.get("reason"):
                phase += f" ({data['reason']})"
            total, rate = int(data.get("total") or 0), float(data.get("rate") or 0)
            self.screen.progress(str(data.get("target", "")), phase, int(data.get("done") or 0), total, rate)

    # looking

    def status(self) -> Exit:
        if not self.args.what:
            return self.targets()
        try:
            return self._show_facts(self.client.ask("STATUS", self.args.what), [])
        except Refused as refused:
            if refused.reply.text != "UNKNOWN_JOB":
                raise
            rows: list[Reply] = []
            try:
                info = self.client.ask("INFO", self.args.what, each=rows.append)
            except Refused as other:
                raise refused if other.reply.text == "UNKNOWN_TARGET" else other from None
            return self._show_facts(info, rows)

    def _show_facts(self, last: Reply, rows: list[Reply]) -> Exit:
        for reply in (*rows, last):
            self.screen.reply(reply)
        data = dict(last.data)
        for row in rows:
            data |= row.data
        self._print(facts(data))
        return Exit.DONE

    def targets(self) -> Exit:
        rows: list[Reply] = []
        self._ask("TARGETS", each=rows.append)
        found = [dict(codec.flatten(row.data)) for row in rows]
        first = ["target", "state", "chip", "family", "image_name", "proven", "owner", "queued", "reason"]
        rest = sorted({key for row in found for key in row} - set(first))
        self._print(table(found, [*first, *(rest if self.args.long else ())]) if found else "no targets are configured")
        return Exit.DONE

    def jobs(self) -> Exit:
        args = self.args
        rows: list[Reply] = []
        self._ask("JOBS", each=rows.append, target=args.target, state=args.state, limit=args.limit, before=args.before)
        columns = ("job", "kind", "target", "state", "phase", "reason", "error", "image", "created", "ended")
        found = [dict(row.data) for row in rows]
        for row in found:
            if row.get("reason") == row.get("error"):
                row["reason"] = None
        self._print(table(found, columns) if rows else "no jobs")
        return Exit.DONE

    def watch(self) -> Exit:
        what = self.args.what
        if what != "*":
            try:
                self.job = str(self.client.status(what)["job"])
                return self._follow()
            except Refused as refused:
                if refused.reply.text != "UNKNOWN_JOB" or self.job:
                    raise
        if sys.stderr.isatty():  # Nothing may happen for hours, and a person should not wonder.
            print(f"watching {'everything' if what == '*' else what}; Ctrl-C ends", file=sys.stderr)
        self.client.watch(what, self._show_update)
        return Exit.FAILED

    def _show_update(self, reply: Reply) -> None:
        self.screen.reply(reply)
        data = reply.data
        if "job" in data:
            at = str(data.get("at") or "")[11:19]
            self._print(f"{at} {data.get('target', '')} {data['job']} {_update_text(data)}")

    def log(self) -> Exit:
        since = self.args.since

        def show(reply: Reply) -> None:
            self.screen.reply(reply)
            data = reply.data
            self._print(f"{data.get('seq', ''):>5} {data.get('at') or '':24} {_update_text(data)}")

        self.screen.reply(self.client.ask("LOG", self.args.job, each=show, **{"from": since}))
        return Exit.DONE

    def trace(self) -> Exit:
        """Late import: nothing else needs the decoder."""
        text = self._recording(self.args.job)
        if self.args.raw:
            sys.stdout.write(text)
            return Exit.DONE
        from bridged.protocol import trace_text
        from bridged.protocol.trace import decode

        found = decode(text)
        if self.args.json:
            for line in trace_text.json_lines(found):
                print(line)
        else:
            sys.stdout.write(trace_text.table(found, fold=not self.args.all))
        return Exit.DONE

    def _recording(self, what: str) -> str:
        """Of a job, or from a file that somebody sent us."""
        path = Path(what)
        if path.is_file():
            return path.read_text("utf-8", "replace")
        return self.client.trace(what).decode("utf-8", "replace")

    def cancel(self) -> Exit:
        reply = self._ask("CANCEL", self.args.job, force=1 if self.args.force else None)
        self._print(f"job {reply.data.get('job')}: {reply.data.get('state')}")
        return Exit.DONE

    def drain(self) -> Exit:
        self._ask("DRAIN", each=lambda _reply: self.screen.note("waiting for the jobs that run"))
        self._print("drained: no job runs, and the daemon ends")
        return Exit.DONE

    # the console

    def console(self) -> Exit:
        args = self.args
        until = re.compile(args.until.encode()) if args.until is not None else None
        with raw_keys() as keys:
            self.screen.raw = keys
            talk = Talk(keys, args.read_only, until, args.within)
            if keys:
                self.screen.note(f"console of {args.target}; Ctrl-] leaves")
            end = self._talk(talk)
        self.screen.raw = False
        if end is End.TIME and until is not None:
            self.screen.note(f"{args.target} did not say {args.until!r} within {args.within:g} s")
            return Exit.TIMED_OUT
        return Exit.DONE

    def _talk(self, talk: Talk) -> End:
        """Across as many connections as it takes; what is said between them is in the target's history."""
        replay = self.args.replay
        while True:
            args = self.args
            with self.client.console(args.target, write=not args.read_only, replay=replay, force=args.force) as wire:
                try:
                    return talk.over(wire)
                except LinkLost as lost:
                    self.screen.note(f"connection lost ({lost}); trying again")
            replay = 0  # Nothing twice.
            time.sleep(PAUSE_S)

    def lock(self) -> Exit:
        args = self.args
        reply = self._ask("LOCK", args.target, ttl=args.ttl, note=args.note, force=1 if args.force else None)
        self._print(f"{args.target} is locked for {reply.data.get('owner')}, for {_duration(float(reply.data['ttl']))}")
        return Exit.DONE

    def unlock(self) -> Exit:
        reply = self._ask("UNLOCK", self.args.target, force=1 if self.args.force else None)
        self._print(f"{self.args.target} {'was not locked' if reply.code == 251 else 'is free again'}")
        return Exit.DONE

    # rights

    def token(self) -> Exit:
        args = self.args
        options: dict[str, Any] = {}
        if args.action == "add":
            options = {
                "scope": ",".join(args.scope),
                "targets": ",".join(args.target) or None,
                "expires": args.expires,
                "certificate": args.certificate,
            }
        words = [args.action, args.name] if args.action != "list" else [args.action]
        rows: list[Reply] = []
        last = self._ask("TOKEN", *words, each=rows.append, **options)
        if args.action == "list":
            columns = ("name", "kind", "scopes", "targets", "created", "expires", "certificate", "by")
            self._print(table([row.data for row in rows], columns) if rows else "no tokens")
        elif args.action == "add" and "token" in last.data:
            # The token alone on stdout, so that it can go into a file; nobody will see it again.
            self.screen.note(f"token {args.name} is in force; this is the only time that it is shown")
            self._print(str(last.data["token"]))
        else:
            self._print(f"{args.name}: {'in force' if args.action == 'add' else 'revoked'}")
        return Exit.DONE

    def audit(self) -> Exit:
        rows: list[Reply] = []
        self._ask("AUDIT", each=rows.append, limit=self.args.limit)
        columns = ("at", "who", "from", "what", "target", "job", "result", "detail")
        self._print(table([row.data for row in rows], columns) if rows else "nothing is noted yet")
        return Exit.DONE

    # saying

    def _ask(self, verb: str, *words: str, each: Callable[[Reply], None] = lambda _reply: None, **options: Any) -> Reply:
        def show(reply: Reply) -> None:
            self.screen.reply(reply)
            each(reply)

        reply = self.client.ask(verb, *words, each=show, **options)
        self.screen.reply(reply)
        return reply

    def _print(self, text: str) -> None:
        if not self.args.json:
            self.screen.end()
            print(text, flush=True)

    def run(self) -> Exit:
        """Carries the command out; every way to end has its exit code."""
        try:
            result: Exit = getattr(self, self.args.command.replace("-", "_"))()
        except Refused as refused:
            self.screen.error(refused.reply)
            return exit_code(refused.reply)
        except BridgedError as error:
            reply = codec.error_reply(error)
            self.screen.error(reply)
            if self.job and isinstance(error, DaemonUnreachable):
                self.screen.note(f"job {self.job} goes on at the gateway; follow it with: bridged watch {self.job}")
            return exit_code(reply) if isinstance(error, DaemonUnreachable | DigestMismatch) else Exit.USAGE
        except KeyboardInterrupt:
            if self.job:
                text = f"job {self.job} goes on; follow it: bridged watch {self.job}, stop it: bridged cancel {self.job}"
            else:
                text = "interrupted before a job was started; an upload goes on where it stopped when you repeat the command"
            self.screen.note(text)
            return Exit.INTERRUPTED
        else:
            return result
        finally:
            self.screen.end()
            self.client.close()


def _update_text(data: Mapping[str, Any]) -> str:
    """What an update says beyond where it belongs."""
    text = f"{data.get('state', '')} {data.get('phase') or ''}".strip()
    if data.get("total"):
        text += f" {data.get('done', 0)}/{data['total']} B"
    hidden = {"job", "target", "seq", "at", "state", "phase", "done", "total", "rate"}
    more = " ".join(f"{key}={value}" for key, value in codec.flatten({k: v for k, v in data.items() if k not in hidden}))
    return f"{text} {more}".rstrip()


# --- arguments ----------------------------------------------------------------------------------------------------

DESCRIPTION = """\
Updates STM32 microcontrollers behind a Linux gateway through their ROM loader, and proves what is in their flash.

The gateway runs `bridged serve`; every other command talks to it. An image is sent whole before the target is touched,
so a bad link, a closed lid or Ctrl-C cannot disturb an update that has begun.
"""

EXAMPLES = """\
examples:
  bridged demo                                  try everything, without hardware
  bridged doctor                                what on this machine would keep a job from working
  bridged examine motor1                        what is wrong between this gateway and that chip
  bridged targets                               what is connected
  bridged flash motor1 app.elf                  write and prove
  bridged flash motor1 app.bin --addr 0x08000000
  bridged flash motor1 boot.bin@0x08000000 app.hex --patch 0x0801fff0:00112233
  bridged ensure motor1 app.elf                 write only if it is not there already
  bridged plan motor1 app.elf                   what would be erased, kept and written
  bridged read motor1 0x08000000 64K -o dump.bin
  bridged -g unix:/run/bridged/bridged.sock jobs --state failed
"""


def _exit_text() -> str:
    return "exit codes:\n" + "\n".join(f"  {code.value:3}  {text}" for code, text in EXIT_TEXT.items())


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A command that another module carries out; it parses its own arguments."""

    module: str
    function: str
    text: str


HANDED_OVER = {
    "serve": HandedOver("bridged.app", "serve", "run the gateway (the daemon)"),
    "sim": HandedOver("bridged.sim.main", "main", "run simulated targets on pseudo terminals"),
    "init": HandedOver(
        "bridged.init", "main", "make a configuration by looking at this machine, asking little; ends with doctor"
    ),
    "doctor": HandedOver("bridged.doctor", "main", "why would a job fail on this machine? looks only, opens no port"),
    "fleet": HandedOver("bridged.fleet.operator", "main", "roll-outs over many gateways, inventory, drift (docs/fleet.md)"),
    "demo": HandedOver("bridged.demo", "main", "gateway and simulated targets: stage, flash, prove; without hardware"),
}


def _parser() -> argparse.ArgumentParser:
    def shared(top: bool) -> argparse.ArgumentParser:
        """Options that may stand before or after the command."""
        parent = argparse.ArgumentParser(add_help=False)
        group = parent.add_argument_group("gateway")

        def add(*names: str, default: Any, help: str, **more: Any) -> None:
            group.add_argument(*names, default=default if top else argparse.SUPPRESS, help=help, **more)

        add(
            "-g",
            "--gateway",
            default="",
            metavar="WHERE",
            help="HOST[:PORT], unix:PATH, or a name in the configuration file (default: $BRIDGED_GATEWAY, what the file says, "
            f"{DEFAULT_SOCKET} where it may be opened, or {DEFAULT_GATEWAY})",
        )
        add("--token-file", default="", metavar="FILE", help="the token, where the gateway wants one ($BRIDGED_TOKEN_FILE)")
        add("--ca", default="", metavar="FILE", help="certificates by which the gateway's is believed ($BRIDGED_CA)")
        add("--server-name", default="", metavar="NAME", help="name in the gateway's certificate, if not the host")
        add("--client-cert", default="", metavar="FILE", help="our own certificate ($BRIDGED_CERTIFICATE)")
        add("--client-key", default="", metavar="FILE", help="and its key ($BRIDGED_KEY)")
        add("--json", default=False, action="store_true", help="print the gateway's replies, one JSON object a line")
        text = "how long to try to reconnect after the link broke (default: 60)"
        add("--retry-for", default=RETRY_S, type=_seconds, metavar="SECONDS", help=text)
        return parent

    parser = argparse.ArgumentParser(
        prog="bridged",
        description=DESCRIPTION,
        epilog=f"{EXAMPLES}\n{_exit_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[shared(True)],
    )
    parser.add_argument("--version", action="version", version=f"bridged {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    below = shared(False)

    def command(name: str, text: str, example: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {example}" if example else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[below],
        )

    def target(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("target", metavar="TARGET", help="name of the target, as in `bridged targets`")

    def image(sub: argparse.ArgumentParser) -> None:
        text = (
            "ELF, Intel HEX, S-record, DfuSe or BIN, also in gzip, or sha256:HEX of a staged image; @ADDR: where a BIN belongs"
        )
        sub.add_argument("files", metavar="FILE[@ADDR]", nargs="+", help=text)
        sub.add_argument("--addr", "--address", metavar="ADDR", dest="addr", help="where a single BIN belongs, e.g. 0x08000000")
        sub.add_argument("--type", choices=codec.TYPES, help="format of the files (default: look at them)")
        text = "bytes of this one unit (serial number, MAC), laid over the images or beside them; may be repeated"
        sub.add_argument("--patch", metavar="ADDR:HEX", action="append", help=text)

    def job(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--id", metavar="TEXT", help="your own id: the same command with the same id starts nothing twice")
        text = "another target that this resets as well, because they share NRST or power; has to be said for each"
        sub.add_argument("--resets", metavar="TARGET", action="append", help=text)
        sub.add_argument("--trace", action="store_true", help="keep the flight recording also when all goes well")
        sub.add_argument("--no-wait", action="store_true", help="print the job's id and return at once")

    def unasked(sub: argparse.ArgumentParser) -> None:
        text = "interlock: reset without asking the application"
        sub.add_argument("--force", action="append", choices=("interlock",), help=text)

    def writing(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--discard-outside",
            action="store_true",
            help="bytes of touched sectors outside the image may be lost (default: kept)",
        )
        sub.add_argument(
            "--one-shot", action="store_true", help="go on although the loader cannot be entered again by itself afterwards"
        )
        sub.add_argument(
            "--unprotect",
            action="store_true",
            help="remove readout protection first if it is on; erases the whole flash, and needs --force erase-everything",
        )
        sub.add_argument("--protect", action="store_true", help="set readout protection (level 1) last, when all is proven")
        sub.add_argument(
            "--force",
            action="append",
            choices=("vectors", "interlock", "erase-everything"),
            help="vectors: skip the check of the image; interlock: reset without asking the application; erase-everything: the "
            "consent that --unprotect needs",
        )
        text = "the image's signature by minisign; of several images one each, in their order"
        sub.add_argument("--sig", metavar="FILE.minisig", action="append", help=text)

    for name, handed in HANDED_OVER.items():
        commands.add_parser(name, help=handed.text, add_help=False)
    sub = command("check-config", "check a configuration file and name every mistake", "bridged check-config bridged.toml")
    sub.add_argument("file", metavar="FILE")

    sub = command("put", "send an image to the gateway without using it yet", "bridged put app.elf --name release-42")
    sub.add_argument("file", metavar="FILE")
    sub.add_argument("--name", help="a name for it (default: the file's)")
    sub.add_argument("--type", choices=codec.TYPES, help="format of the file (default: look at it)")
    for name, text in (
        ("flash", "write an image to a target and prove it"),
        ("ensure", "write an image unless it is proven to be there already"),
    ):
        sub = command(name, text, f"bridged {name} motor1 app.elf")
        target(sub)
        image(sub)
        if name == "flash":
            sub.add_argument("--full", action="store_true", help="erase and write also the sectors that hold it already")
        else:
            enough = "what is enough where it was proven before: the record (touches nothing), samples, or all (default)"
            sub.add_argument("--evidence", choices=("record", "sample", "full"), help=enough)
        writing(sub)
        job(sub)
    sub = command("verify", "compare the flash with an image; changes nothing", "bridged verify motor1 app.elf")
    target(sub)
    image(sub)
    job(sub)
    text = "send an image by XMODEM to the bootloader in the target's own flash"
    sub = command("xmodem", text, "bridged xmodem motor1 update.bin")
    target(sub)
    image(sub)
    sub.add_argument("--sig", metavar="FILE.minisig", action="append", help="the image's signature by minisign")
    unasked(sub)
    job(sub)
    sub = command("plan", "show what flash would erase, keep and write; touches nothing", "bridged plan motor1 app.elf")
    target(sub)
    image(sub)
    writing(sub)
    sub = command("read", "read memory into a file", "bridged read motor1 0x08000000 64K -o dump.bin")
    target(sub)
    sub.add_argument("address", metavar="ADDR")
    sub.add_argument("length", metavar="LEN", help="bytes: 4096, 0x1000, 4K, 1M")
    sub.add_argument("-o", "--output", required=True, metavar="FILE", help="appears whole or not at all")
    job(sub)
    sub = command("erase", "erase sectors; a range is never widened", "bridged erase motor1 0x08020000+128K")
    target(sub)
    sub.add_argument("range", metavar="RANGE", help="ADDR+LEN on sector bounds, or all")
    sub.add_argument("--one-shot", action="store_true", help="go on although the loader cannot be entered again by itself")
    job(sub)
    sub = command("reset", "reset a target into its application", "bridged reset motor1")
    target(sub)
    sub.add_argument("--boot", action="store_true", help="into the ROM loader instead")
    job(sub)
    sub = command("id", "ask a chip who it is", "bridged id motor1")
    target(sub)
    job(sub)

    sub = command("examine", "examine the wiring and the chip; resets it, changes no flash", "bridged examine motor1")
    target(sub)
    job(sub)

    text = "show the option bytes, decoded; write fields that are named"
    sub = command("option-bytes", text, "bridged option-bytes motor1 --set IWDG_SW=1")
    target(sub)
    sub.add_argument("--set", metavar="NAME=VALUE", action="append", help="write this field; may be repeated")
    sub.add_argument("--raw", metavar="ADDR:HEX", action="append", help="lay bytes over the block; needs --field")
    sub.add_argument("--field", metavar="NAME", action="append", help="a field that the bytes of --raw may change")
    unasked(sub)
    job(sub)
    sub = command(
        "protect", "set readout protection (level 1), or protect sectors from being written", "bridged protect motor1"
    )
    target(sub)
    sub.add_argument("--sectors", metavar="N,N-N", help="write protection of these, besides those that have it")
    unasked(sub)
    job(sub)
    sub = command(
        "unprotect",
        "remove readout protection: ERASES THE WHOLE FLASH",
        "bridged unprotect motor1 --force erase-everything",
    )
    target(sub)
    sub.add_argument("--write", action="store_true", help="remove write protection instead, which erases nothing")
    sub.add_argument(
        "--force",
        action="append",
        choices=("erase-everything", "interlock"),
        help="erase-everything: yes, the whole flash; interlock: reset without asking the application",
    )
    job(sub)

    sub = command("targets", "list the targets", "bridged targets --long")
    sub.add_argument("--long", action="store_true", help="everything that is known")
    sub = command("status", "show a job, a target, or all targets", "bridged status motor1")
    sub.add_argument("what", metavar="JOB|TARGET", nargs="?", default="")
    sub.set_defaults(long=False)
    sub = command("watch", "follow a job to its end, or a target or everything until Ctrl-C", "bridged watch motor1")
    sub.add_argument("what", metavar="JOB|TARGET", nargs="?", default="*", help="default: everything")
    sub = command("jobs", "list jobs, the newest first", "bridged jobs --target motor1 --state failed")
    sub.add_argument("--target")
    sub.add_argument("--state")
    sub.add_argument("--limit", type=int, default=20)
    sub.add_argument("--before", metavar="JOB", help="only older ones than this")
    sub = command("log", "the history of a job", "bridged log JOB")
    sub.add_argument("job", metavar="JOB")
    sub.add_argument("--from", dest="since", type=int, metavar="SEQ", help="only from this entry on")
    sub = command("trace", "explain the recording of a job: what was sent and answered, and who was slow", "bridged trace JOB")
    sub.add_argument("job", metavar="JOB|FILE", help="a job that failed or ran with --trace, or a recording from --raw")
    shown = sub.add_mutually_exclusive_group()
    shown.add_argument("--all", action="store_true", help="a row for every command (default: what went well is folded)")
    shown.add_argument("--raw", action="store_true", help="the recording itself")
    sub = command("cancel", "cancel a job", "bridged cancel JOB")
    sub.add_argument("job", metavar="JOB")
    sub.add_argument("--force", action="store_true", help="also between erase and proof: the target is left without firmware")
    command("drain", "let the jobs that run finish, start no other, then end the daemon", "bridged drain")
    sub = command("console", "the target's serial port on this terminal; Ctrl-] leaves", "bridged console motor1")
    target(sub)
    sub.add_argument("--read-only", action="store_true", help="only look on")
    sub.add_argument("--replay", type=int, metavar="BYTES", help="so much of what was said before (default: as configured)")
    sub.add_argument("--force", action="store_true", help="take over from who writes, if you may")
    sub.add_argument("--until", type=_pattern, metavar="REGEX", help="end when the target has said this")
    sub.add_argument("--within", type=_seconds, metavar="SECONDS", help="end after this time; with --until: exit code 8 then")
    sub = command("lock", "reserve a target: the jobs and the typing of others wait", "bridged lock motor1 --ttl 900")
    target(sub)
    sub.add_argument("--ttl", type=int, metavar="SECONDS", help="it ends by itself after this (default 3600)")
    sub.add_argument("--note", metavar="TEXT", help="why, for those who meet the lock")
    sub.add_argument("--force", action="store_true", help="take it over from another one, if you may")
    sub = command("unlock", "give a reserved target back", "bridged unlock motor1")
    target(sub)
    sub.add_argument("--force", action="store_true", help="also the lock of another one, if you may")
    sub = command("token", "give and take rights: tokens and client certificates", "bridged token add ci --scope flash")
    actions = sub.add_subparsers(dest="action", metavar="ACTION", required=True)
    one = actions.add_parser("add", help="make a token, and print it this one time", parents=[below])
    one.add_argument("name", metavar="NAME")
    text = "what it may do; may be repeated. flash and console include read, admin includes all"
    one.add_argument("--scope", action="append", required=True, choices=tuple(codec.Scope), help=text)
    one.add_argument("--target", action="append", default=[], metavar="TARGET", help="only this target; may be repeated")
    one.add_argument("--expires", type=_lifetime, metavar="TIME", help="it ends by itself: 90d, 12h, 30m, 45s")
    one.add_argument("--certificate", metavar="NAME", help="no token: whoever shows a client certificate with this name")
    actions.add_parser("list", help="which there are; never the secrets", parents=[below])
    one = actions.add_parser("revoke", help="take the rights back, at once", parents=[below])
    one.add_argument("name", metavar="NAME")
    sub = command("audit", "who did what, from where, and what came of it", "bridged audit --limit 200")
    sub.add_argument("--limit", type=int, default=50)
    return parser


def _lifetime(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,6})([dhms])", text)
    if match is None:
        raise argparse.ArgumentTypeError("expected a time such as 90d, 12h, 30m or 45s")
    return int(match[1]) * {"d": 86400, "h": 3600, "m": 60, "s": 1}[match[2]]


def _pattern(text: str) -> str:
    try:
        re.compile(text.encode())
    except re.error as error:
        raise argparse.ArgumentTypeError(f"no regular expression: {error}") from error
    return text


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 86400:
        raise argparse.ArgumentTypeError("expected 0 to 86400 seconds")
    return value


def _hand_over(handed: HandedOver, argv: Sequence[str]) -> int:
    from importlib import import_module

    result = getattr(import_module(handed.module), handed.function)(list(argv))
    return int(result or 0)


def _check_config(path: Path, *, as_json: bool) -> int:
    from bridged import app

    return app.check_config(path, as_json=as_json)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:2] == ["--json", "doctor"]:
        argv = [*argv[1:], "--json"]  # It knows the word, though no other option of the client.
    if argv and argv[0] in HANDED_OVER:
        return _hand_over(HANDED_OVER[argv[0]], argv[1:])
    args = _parser().parse_args(argv)
    try:
        if args.command in HANDED_OVER:
            # Options of the client stood before it; they mean nothing to a daemon.
            print(f"bridged: say `bridged {args.command} ...` without options before it", file=sys.stderr)
            return Exit.USAGE
        if args.command == "check-config":
            return _check_config(Path(args.file), as_json=args.json)
        return Command(args).run()
    except BridgedError as error:
        if args.json:
            sys.stdout.write(codec.format_reply(codec.error_reply(error), as_json=True).decode())
        else:
            print(f"bridged: {error.message}", file=sys.stderr)
        return Exit.USAGE
    except BrokenPipeError:
        # `bridged jobs | head` is no mistake; what is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.DONE


if __name__ == "__main__":
    sys.exit(main())
