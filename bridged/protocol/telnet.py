"""Telnet (RFC 854, options RFC 855 and 1143) as a server needs it for a serial port: bytes to meaning and back. No I/O.

``Parser`` takes bytes in any chunking and gives ``Data``, ``Option`` and ``Subnegotiation``; what it gives is the same for
every way of cutting the same bytes. ``Options`` is who agreed to what: it answers each request once, and never answers an
answer, so that two programs cannot talk about an option for ever (RFC 1143 says how that happens).

Without BINARY (RFC 856) a client's return key is CR NUL or CR LF: the NUL is taken away, and a CR of ours that no LF follows is
sent as CR NUL. With BINARY bytes are bytes, but for 0xFF, which is doubled in either case.

Invariants: memory is bounded whatever comes (a subnegotiation longer than ``SUB_BYTES`` is skipped whole); no input raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

IAC, DONT, DO, WONT, WILL, SB, SE = 0xFF, 0xFE, 0xFD, 0xFC, 0xFB, 0xFA, 0xF0
BREAK, AYT = 0xF3, 0xF6
BINARY, ECHO, SUPPRESS_GO_AHEAD, COM_PORT = 0, 1, 3, 44
SUB_BYTES = 512  # Of one subnegotiation. The longest that we understand is a signature, a line of text.

_IAC, _CR = b"\xff", b"\r"


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes for the other side of the gateway."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Option:
    """DO, DONT, WILL or WONT for one option."""

    verb: int
    option: int


@dataclass(frozen=True, slots=True)
class Subnegotiation:
    """``payload``: what stood after the option, with doubled 0xFF undone."""

    option: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Command:
    """Any other command of two bytes: BREAK, AYT, ..."""

    code: int


Item = Data | Option | Subnegotiation | Command


class Parser:
    """What a peer sends, in any chunking. ``binary``: whether it agreed to send BINARY; the caller says so."""

    def __init__(self) -> None:
        self.binary = False
        self._state = "data"
        self._verb = 0
        self._sub = bytearray()
        self._skip = False
        self._after_cr = False

    def feed(self, data: bytes) -> Iterator[Item]:
        """A generator, to be run to its end: ``binary`` may change between two items, and counts from there on."""
        if self._state == "data" and _IAC not in data and self.binary:  # Nearly always.
            if data:
                yield Data(data)
            return
        text = bytearray()
        at = 0
        while at < len(data):
            if self._state == "data":
                end = data.find(_IAC, at)
                piece = data[at:] if end < 0 else data[at:end]
                text += piece if self.binary else self._unpadded(piece)
                at += len(piece) + (end >= 0)
                if end >= 0:
                    self._state = "iac"
                continue
            byte = data[at]
            at += 1
            if self._state == "iac" and byte == IAC:
                text.append(IAC)
                self._after_cr = False
                self._state = "data"
                continue
            item = self._control(byte)
            if item is not None:
                if text:
                    yield Data(bytes(text))
                    text.clear()
                yield item
        if text:
            yield Data(bytes(text))

    def _unpadded(self, piece: bytes) -> bytes:
        """CR NUL becomes CR, also where the chunk ends between them."""
        if not piece:
            return piece
        first = piece[:1]
        if self._after_cr and first == b"\0":
            piece = piece[1:]
            self._after_cr = False
        if piece:
            self._after_cr = piece[-1:] == _CR
        return piece.replace(b"\r\0", _CR)

    def _control(self, byte: int) -> Item | None:
        """One byte that is no data."""
        match self._state:
            case "iac":
                if byte in (DO, DONT, WILL, WONT):
                    self._state, self._verb = "option", byte
                elif byte == SB:
                    self._state, self._skip = "sub", False
                    self._sub.clear()
                else:
                    self._state = "data"
                    return Command(byte) if byte != SE else None
            case "option":
                self._state = "data"
                return Option(self._verb, byte)
            case "sub":
                if byte == IAC:
                    self._state = "sub-iac"
                else:
                    self._keep(byte)
            case _:  # sub-iac
                if byte == IAC:
                    self._state = "sub"
                    self._keep(IAC)
                elif byte == SE:
                    self._state = "data"
                    if self._sub and not self._skip:
                        return Subnegotiation(self._sub[0], bytes(self._sub[1:]))
                else:  # RFC 855 knows nothing else here: the peer lost the end of it. Take the byte as a command.
                    self._state = "iac"
                    return self._control(byte)
        return None

    def _keep(self, byte: int) -> None:
        if len(self._sub) < SUB_BYTES:
            self._sub.append(byte)
        else:
            self._skip = True


def escape(data: bytes) -> bytes:
    """Data as it goes over the wire."""
    return data.replace(_IAC, b"\xff\xff") if _IAC in data else data


def padded(data: bytes) -> bytes:
    """Data for a peer without BINARY: a CR that no LF follows (in these bytes) becomes CR NUL."""
    return data.replace(_CR, b"\r\0").replace(b"\r\0\n", b"\r\n") if _CR in data else data


def option(verb: int, which: int) -> bytes:
    return bytes((IAC, verb, which))


def subnegotiation(which: int, payload: bytes) -> bytes:
    return bytes((IAC, SB, which)) + payload.replace(_IAC, b"\xff\xff") + bytes((IAC, SE))


class Options:
    """Who agreed to what. ``ours``: what we may do (WILL), ``theirs``: what the peer may do (DO). The rest is refused."""

    def __init__(self, ours: Iterable[int], theirs: Iterable[int]) -> None:
        self._allowed = {True: frozenset(ours), False: frozenset(theirs)}
        # In force, or asked for and not answered yet; the key says whose option it is (True: ours).
        self._on: set[tuple[bool, int]] = set()
        self._asked: set[tuple[bool, int]] = set()

    def ask(self, *, ours: Iterable[int] = (), theirs: Iterable[int] = ()) -> bytes:
        """What to send to begin with."""
        out = b""
        for mine, options, verb in ((True, ours, WILL), (False, theirs, DO)):
            for which in options:
                if (mine, which) not in self._on | self._asked:
                    self._asked.add((mine, which))
                    out += option(verb, which)
        return out

    def heard(self, item: Option) -> tuple[bytes, bool]:
        """What to answer, and whether something changed."""
        mine = item.verb in (DO, DONT)
        yes = item.verb in (DO, WILL)
        key = (mine, item.option)
        agree, refuse = (WILL, WONT) if mine else (DO, DONT)
        was = key in self._on
        asked = key in self._asked
        self._asked.discard(key)
        if yes:
            if item.option not in self._allowed[mine]:
                return option(refuse, item.option), False
            self._on.add(key)
            # An answer to our own request is not answered, nor is what is so already.
            return (b"" if was or asked else option(agree, item.option)), not was
        self._on.discard(key)
        return (option(refuse, item.option) if was else b""), was

    def we_do(self, which: int) -> bool:
        return (True, which) in self._on

    def they_do(self, which: int) -> bool:
        return (False, which) in self._on
