"""A line of the line protocol as words and back: split and quoted as a shell does it, whatever the words mean."""

from __future__ import annotations

import re
from collections.abc import Iterable

from bridged.errors import BadRequest

KEY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*\Z")  # What stands before ``=``.
BARE = re.compile(r"[A-Za-z0-9_.,:;/@%+^~=-]+\Z")  # What a shell, and we, take for one word as it is.
_C_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}


def tokens(text: str, escapes: bool) -> list[tuple[str, int]]:
    """Split like a shell does. Each token comes with the index of its first unquoted ``=``, 0 where it has none.

    ``escapes``: replies only; inside double quotes ``\\n``, ``\\xNN`` and their like stand for characters.
    """
    tokens: list[tuple[str, int]] = []
    out: list[str] = []
    started, equals, quote, at = False, 0, "", 0
    while at < len(text):
        c = text[at]
        at += 1
        if quote == "'" and c != "'":
            out.append(c)
        elif c == "\\":
            if at == len(text):
                raise BadRequest("the line ends in a backslash")
            c = text[at]
            at += 1
            if escapes and quote and c in _C_ESCAPES:
                out.append(_C_ESCAPES[c])
            elif escapes and quote and c in _HEX_ESCAPES:
                digits = text[at : at + _HEX_ESCAPES[c]]
                at += len(digits)
                try:
                    out.append(chr(int(digits, 16)))
                except (ValueError, OverflowError) as error:
                    raise BadRequest(f"bad escape \\{c}{digits}") from error
            else:
                # Inside double quotes a shell keeps the backslash unless the character is special there.
                out.append(c if not quote or c in '"\\$`' else "\\" + c)
            started = True
        elif c in "'\"" and quote in ("", c):
            quote = "" if quote else c
            started = True
        elif c in " \t" and not quote:
            if started:
                tokens.append(("".join(out), equals))
            out, started, equals = [], False, 0
        else:
            if c == "=" and not quote and not equals:
                equals = len("".join(out))
            out.append(c)
            started = True
    if quote:
        raise BadRequest(f"a quote ({quote}) is not closed")
    if started:
        tokens.append(("".join(out), equals))
    return tokens


def shell_quote(text: str, argument: bool = False) -> str:
    if BARE.match(text) and not (argument and "=" in text):
        return text
    return "'" + text.replace("'", "'\\''") + "'"


def suggest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)``, or nothing. Late import: difflib costs milliseconds and only mistakes need it."""
    from difflib import get_close_matches

    close = get_close_matches(word[:64], list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
