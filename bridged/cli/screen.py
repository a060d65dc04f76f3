"""What a person sees while a command runs: progress rewritten in place, notes and errors on stderr, or lines of JSON.

Everything that is printed goes through ``say``: that nobody reads it (``| head -1``, ``| grep -q``) ends no command, for how a
job ends is told by the exit code. Commands of other rooms print by themselves, and ``lenient`` does the same for them.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from bridged.cli.texts import rate_text, size_text
from bridged.protocol.reply import Reply, format_reply


def say(text: str, stream: TextIO, end: str = "\n") -> OSError | None:
    """Prints; why it could not be printed, where it could not. From then on the stream leads nowhere."""
    out = Lenient(stream)
    print(text, end=end, file=out, flush=True)
    return out.lost


class Lenient:
    """A stream that takes everything; ``lost``: why some of it could not be printed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.lost = error
        # What is still buffered must not fail again, at exit at the latest.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def lenient() -> Iterator[Lenient]:
    """Stdout (which is yielded) and stderr fail nobody who prints. What they were, they are again afterwards."""
    before = sys.stdout, sys.stderr
    out, err = Lenient(sys.stdout), Lenient(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


def missing(lost: OSError | None) -> str:
    """Why results are not where they were to go, in words; empty where they are, or whoever closed the pipe had enough."""
    if lost is None or isinstance(lost, BrokenPipeError):
        return ""
    return f"printing the result failed: {lost.strerror or lost}"


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
        self.lost: OSError | None = None  # Why results cannot be printed any more.

    def out(self, text: str, end: str = "\n") -> None:
        """A result, on stdout."""
        self.lost = say(text, sys.stdout, end) or self.lost

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
            say(f"{what}: {', '.join(part.strip() for part in parts)}", sys.stderr)

    def _rewrite(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]
        say("\r" + text.ljust(len(self._shown)), sys.stderr, end="")
        self._shown = text

    def end(self) -> None:
        """Leaves the terminal with a clean line."""
        if self._shown:
            say("\r" + " " * len(self._shown) + "\r", sys.stderr, end="")
            self._shown = ""
        self._phase = ""

    def note(self, text: str) -> None:
        self.end()
        if not self.json:
            start, end = ("\r", "\r\n") if self.raw else ("", "\n")
            say(f"{start}bridged: {text}", sys.stderr, end)

    def reply(self, reply: Reply) -> None:
        """``--json``: the gateway's own line."""
        if self.json:
            self.out(format_reply(reply, as_json=True).decode(), end="")

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
        say("\n".join(out), sys.stderr)


def _bar(done: int, total: int, width: int = 24) -> str:
    filled = width * min(done, total) // total if total else 0
    return "[" + "#" * filled + "." * (width - filled) + "]"
