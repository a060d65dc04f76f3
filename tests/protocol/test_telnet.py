"""Telnet and RFC 2217 as bytes: golden conversations in every chunking, negotiations that end, values and their limits."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridged.protocol import rfc2217, telnet
from bridged.protocol.rfc2217 import Command, ModemState, Request
from bridged.protocol.telnet import BINARY, COM_PORT, DO, DONT, ECHO, WILL, WONT, Data, Item, Option, Options, Subnegotiation


def parsed(data: bytes, cuts: list[int], *, binary: bool = False) -> list[Item]:
    """Everything, with neighbouring data joined; WILL BINARY takes effect where it stands, as a server does it."""
    parser = telnet.Parser()
    parser.binary = binary
    found: list[Item] = []
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(bounds):
        for item in parser.feed(data[start:end]):
            if item == Option(WILL, BINARY):
                parser.binary = True
            if isinstance(item, Data) and found and isinstance(last := found[-1], Data):
                found[-1] = Data(last.data + item.data)
            else:
                found.append(item)
    return found


GOLDEN: list[tuple[str, list[Item]]] = [
    ("61 62 63", [Data(b"abc")]),
    ("61 FF FF 62", [Data(b"a\xffb")]),
    ("FF FD 2C", [Option(DO, COM_PORT)]),
    ("0D 00 61 0D 0A 0D", [Data(b"\ra\r\n\r")]),
    ("0D 00 FF FB 00 0D 00", [Data(b"\r"), Option(WILL, BINARY), Data(b"\r\0")]),
    ("61 FF FA 2C 01 00 00 25 80 FF F0 62", [Data(b"a"), Subnegotiation(COM_PORT, b"\x01\0\0\x25\x80"), Data(b"b")]),
    ("FF FA 2C 05 FF FF FF F0", [Subnegotiation(COM_PORT, b"\x05\xff")]),
    ("FF F6 FF F3 FF F1", [telnet.Command(0xF6), telnet.Command(0xF3), telnet.Command(0xF1)]),
    ("FF FA FF F0 61", [Data(b"a")]),
    ("FF FA 2C 01 FF FD 01 61", [Option(DO, ECHO), Data(b"a")]),
    ("FF F0 61", [Data(b"a")]),
]


@pytest.mark.parametrize(("text", "items"), GOLDEN)
def test_golden_bytes_whole_and_one_at_a_time(text: str, items: list[Item]) -> None:
    data = bytes.fromhex(text)
    assert parsed(data, []) == items
    assert parsed(data, list(range(len(data)))) == items


telnet_bytes = st.lists(
    st.one_of(
        st.binary(max_size=6),
        st.sampled_from([b"\xff", b"\xff\xff", b"\xff\xfa\x2c", b"\xff\xf0", b"\r", b"\0", b"\r\0", b"\xff\xfb\0", b"\n"]),
    ),
    max_size=12,
).map(b"".join)


@given(telnet_bytes, st.lists(st.integers(0, 80), max_size=8), st.booleans())
def test_any_chunking_means_the_same(data: bytes, cuts: list[int], binary: bool) -> None:
    assert parsed(data, cuts, binary=binary) == parsed(data, [], binary=binary)


@given(st.binary(max_size=200), st.lists(st.integers(0, 400), max_size=8))
def test_what_is_escaped_comes_back(data: bytes, cuts: list[int]) -> None:
    assert parsed(telnet.escape(data), cuts, binary=True) == ([Data(data)] if data else [])
    padded = telnet.padded(telnet.escape(data))
    assert b"".join(item.data for item in parsed(padded, cuts) if isinstance(item, Data)) == data


def test_a_subnegotiation_without_end_takes_no_memory_and_is_skipped() -> None:
    parser = telnet.Parser()
    assert list(parser.feed(b"\xff\xfa\x2c")) == []
    for _ in range(100):
        assert list(parser.feed(b"x" * 1000)) == []
    assert len(parser._sub) <= telnet.SUB_BYTES
    assert list(parser.feed(b"\xff\xf0after")) == [Data(b"after")]


# --- options ------------------------------------------------------------------------------------------------------


def server() -> Options:
    return Options(ours=(BINARY, COM_PORT, ECHO), theirs=(BINARY, COM_PORT))


def test_what_is_offered_is_agreed_to_once_and_the_rest_refused() -> None:
    options = server()
    assert options.heard(Option(WILL, COM_PORT)) == (bytes((255, DO, COM_PORT)), True)
    assert options.heard(Option(WILL, COM_PORT)) == (b"", False)
    assert options.heard(Option(DO, 31)) == (bytes((255, WONT, 31)), False)
    assert options.heard(Option(WILL, ECHO)) == (bytes((255, DONT, ECHO)), False)
    assert options.heard(Option(WONT, COM_PORT)) == (bytes((255, DONT, COM_PORT)), True)
    assert options.heard(Option(WONT, COM_PORT)) == (b"", False)


def test_an_answer_to_our_question_is_not_answered() -> None:
    options = server()
    assert options.ask(ours=(ECHO,), theirs=(BINARY,)) == bytes((255, WILL, ECHO, 255, DO, BINARY))
    assert options.ask(ours=(ECHO,)) == b"", "asked once"
    assert options.heard(Option(DO, ECHO)) == (b"", True)
    assert options.heard(Option(WONT, BINARY)) == (b"", False)
    assert (options.we_do(ECHO), options.they_do(BINARY)) == (True, False)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=6), st.data())
def test_two_sides_never_talk_for_ever(asked: list[tuple[bool, int]], data: st.DataObject) -> None:
    """Two of us, each asking for what it likes in any order: it ends, and both believe the same."""
    a, b = Options(ours=(0, 1), theirs=(0, 2)), Options(ours=(0, 2), theirs=(0, 3))
    wires = {True: b"", False: b""}
    for to_b, which in asked:
        wires[to_b] += (a if to_b else b).ask(ours=(which,)) if which in ((0, 1) if to_b else (0, 2)) else b""
    for _ in range(200):
        ready = [side for side in (True, False) if wires[side]]
        if not ready:
            break
        to_b = data.draw(st.sampled_from(ready))
        raw, wires[to_b] = wires[to_b][:3], wires[to_b][3:]
        out, _ = (b if to_b else a).heard(Option(raw[1], raw[2]))
        wires[not to_b] += out
    else:
        raise AssertionError("they talk for ever")
    for which in range(4):
        assert a.we_do(which) == b.they_do(which)
        assert b.we_do(which) == a.they_do(which)


# --- RFC 2217 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "request_"),
    [
        ("01 00 00 25 80", Request(Command.SET_BAUDRATE, 9600)),
        ("01 00 00 00 00", Request(Command.SET_BAUDRATE, 0)),
        ("05 08", Request(Command.SET_CONTROL, 8)),
        ("0C 03", Request(Command.PURGE_DATA, 3)),
        ("08", Request(Command.FLOWCONTROL_SUSPEND)),
        ("00", Request(Command.SIGNATURE)),
        ("00 41 1B 42", Request(Command.SIGNATURE, text="A?B")),
        ("07", Request(Command.NOTIFY_MODEMSTATE)),
        ("", None),
        ("01 25 80", None),
        ("01 00 00 25 80 00", None),
        ("05", None),
        ("0D 01", None),
        ("65 00 00 25 80", None),
    ],
)
def test_commands_of_a_client(payload: str, request_: Request | None) -> None:
    assert rfc2217.parse(bytes.fromhex(payload)) == request_


def test_answers() -> None:
    assert rfc2217.answer(Command.SET_BAUDRATE, 115200).hex(" ") == "ff fa 2c 65 00 01 c2 00 ff f0"
    assert rfc2217.answer(Command.SET_BAUDRATE, 255).hex(" ") == "ff fa 2c 65 00 00 00 ff ff ff f0", "0xFF is doubled"
    assert rfc2217.answer(Command.NOTIFY_MODEMSTATE, 0xB0).hex(" ") == "ff fa 2c 6b b0 ff f0"
    assert rfc2217.answer(Command.FLOWCONTROL_SUSPEND).hex(" ") == "ff fa 2c 6c ff f0"
    assert rfc2217.signature("ü" * 500).count(b"?") == rfc2217.SIGNATURE_CHARS


def test_modem_state_tells_levels_and_what_changed() -> None:
    nothing, cts, ring = frozenset[str](), frozenset({"cts"}), frozenset({"ri"})
    assert rfc2217.modem_state(cts, None) == ModemState.CTS
    assert rfc2217.modem_state(cts, nothing) == ModemState.CTS | ModemState.CTS_CHANGED
    assert rfc2217.modem_state(nothing, cts) == ModemState.CTS_CHANGED
    assert rfc2217.modem_state(ring, nothing) == ModemState.RI, "only the end of a ring is a change"
    assert rfc2217.modem_state(nothing, ring) == ModemState.RI_ENDED
