"""Where each key of a TOML text stands: ``tomllib`` tells positions of syntax errors only, so the text is scanned again.

It runs on text that ``tomllib`` has accepted, and is therefore allowed to be lenient.
"""

from __future__ import annotations

import bisect
import re
import tomllib
from collections.abc import Iterator

KeyPath = tuple[str, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r"""\"{3}(?:\\.|"{1,2}(?!")|[^"\\])*"{3,5}|'{3}(?:'{1,2}(?!')|[^'])*'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'""", re.DOTALL
)
_SCALAR = re.compile(r"[^,\]}\n#]*")


def places_of(text: str) -> dict[KeyPath, tuple[int, int]]:
    """Line and column of every key, table header and array item (its index as text) of valid TOML."""
    scanner = _Scanner(text)
    scanner.document()
    newlines = [at for at, char in enumerate(text) if char == "\n"]

    def place(offset: int) -> tuple[int, int]:
        line = bisect.bisect_left(newlines, offset)
        return line + 1, offset - (newlines[line - 1] if line else -1)

    return {path: place(offset) for path, offset in scanner.offsets.items()}


class _Scanner:
    """Walks over TOML that is known to be valid and notes the offset of the first mention of each key."""

    def __init__(self, text: str) -> None:
        self.text = text.replace("\r\n", " \n")  # as tomllib does, with the offsets kept
        self.at = 0
        self.offsets: dict[KeyPath, int] = {}

    def document(self) -> None:
        table: KeyPath = ()
        while self._skip(_BLANK) < len(self.text):
            if self.text[self.at] == "[":
                brackets = 2 if self.text.startswith("[[", self.at) else 1
                self.at += brackets
                table = self._key(())
                self.at += brackets
            else:
                self._pair(table)

    def _pair(self, table: KeyPath) -> None:
        path = self._key(table)
        self.at += 1  # =
        self._skip(_SPACE)
        self._value(path)

    def _key(self, table: KeyPath) -> KeyPath:
        path = table
        while True:
            start = self._skip(_SPACE)
            if quoted := _STRING.match(self.text, start):
                # Only tomllib knows all escapes.
                part = str(tomllib.loads(f"key = {quoted[0]}")["key"])
                self.at = quoted.end()
            else:
                self._skip(BARE_KEY)
                part = self.text[start : self.at]
            path = (*path, part)
            self.offsets.setdefault(path, start)
            self._skip(_SPACE)
            if self.text[self.at : self.at + 1] != ".":
                return path
            self.at += 1

    def _value(self, path: KeyPath) -> None:
        match self.text[self.at : self.at + 1]:
            case "[":
                for index in self._items("]"):
                    item = (*path, str(index))
                    self.offsets.setdefault(item, self.at)
                    self._value(item)
            case "{":
                for _ in self._items("}"):
                    self._pair(path)
            case '"' | "'":
                self._skip(_STRING)
            case _:
                self._skip(_SCALAR)

    def _items(self, closing: str) -> Iterator[int]:
        """Stops before each item; the caller walks over it."""
        self.at += 1
        index = 0
        while self._skip(_BLANK) < len(self.text) and self.text[self.at] != closing:
            yield index
            index += 1
            if self._skip(_BLANK) < len(self.text) and self.text[self.at] == ",":
                self.at += 1
        self.at += 1

    def _skip(self, what: re.Pattern[str]) -> int:
        if found := what.match(self.text, self.at):
            self.at = found.end()
        return self.at
