"""What a person sees while a command runs: progress rewritten in place, notes and errors on stderr, or lines of JSON."""

from __future__ import annotations

import os
import shutil
import sys
import time

from bridged.cli.texts import rate_text, size_text
from bridged.protocol.reply import Reply, format_reply


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
            sys.stdout.write(format_reply(reply, as_json=True).decode())
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
