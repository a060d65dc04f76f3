"""AN3155 against golden transcripts, written from ST's document: every command, every stage, every kind of answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridged.errors import (
    ApplicationRunning,
    BridgedError,
    EraseTimeout,
    Garbled,
    LoaderError,
    Loopback,
    Nack,
    NoReply,
    NoSync,
    SyncNoise,
)
from bridged.protocol import an3155
from bridged.protocol.an3155 import Loader, MassErase, SyncAnswer, Timing
from bridged.protocol.flow import Drain, Flow, Receive
from tests.protocol.transcript import NOISE, Peer, play

TIMING = Timing.at(115200)
Make = Callable[[], Flow[Any]]

L476_COMMANDS = frozenset({0x00, 0x01, 0x02, 0x11, 0x21, 0x31, 0x44, 0x63, 0x73, 0x82, 0x92})
BLOCK = bytes(range(256))

GOOD: dict[str, tuple[Make, str, Any]] = {
    "sync": (lambda: an3155.synchronise(TIMING), "> 7F\n< 79", SyncAnswer(already=False)),
    "sync after a lost byte": (lambda: an3155.synchronise(TIMING), "> 7F\n> 7F\n< 79", SyncAnswer(already=False)),
    "sync after a lost ACK": (lambda: an3155.synchronise(TIMING), "> 7F\n> 7F\n< 1F", SyncAnswer(already=True)),
    "sync when half a command was pending": (lambda: an3155.synchronise(TIMING), "> 7F\n< 1F", SyncAnswer(already=True)),
    "get": (
        lambda: an3155.get(TIMING),
        "> 00 FF\n< 79 0B 31 00 01 02 11 21 31 44 63 73 82 92 79",
        Loader(0x31, L476_COMMANDS, 11),
    ),
    "get, ten codes of an H5": (
        lambda: an3155.get(TIMING),
        "> 00 FF\n< 79 0A 40 00 01 02 11 21 31 44 50 51 A1 79",
        Loader(0x40, frozenset({0x00, 0x01, 0x02, 0x11, 0x21, 0x31, 0x44, 0x50, 0x51, 0xA1}), 10),
    ),
    "get version": (lambda: an3155.get_version(TIMING), "> 01 FE\n< 79 31 00 00 79", (0x31, b"\0\0")),
    "get id": (lambda: an3155.get_id(TIMING), "> 02 FD\n< 79 01 04 15 79", 0x415),
    "get id of a BlueNRG": (lambda: an3155.get_id(TIMING), "> 02 FD\n< 79 02 00 00 2F 79", 0x2F),
    "read memory": (
        lambda: an3155.read_memory(0x08000000, 4, TIMING),
        "> 11 EE\n< 79\n> 08 00 00 00 08\n< 79\n> 03 FC\n< 79 DE AD BE EF",
        bytes.fromhex("DEADBEEF"),
    ),
    "read memory, whole block with the ACK byte inside": (
        lambda: an3155.read_memory(0x20001000, 256, TIMING),
        f"> 11 EE\n< 79\n> 20 00 10 00 30\n< 79\n> FF 00\n< 79 {BLOCK.hex()}",
        BLOCK,
    ),
    "write memory": (
        lambda: an3155.write_memory(0x08004000, bytes.fromhex("01020304"), TIMING),
        "> 31 CE\n< 79\n> 08 00 40 00 48\n< 79\n> 03 01 02 03 04 07\n< 79",
        None,
    ),
    "write memory, one byte to the virtual address of the supply range": (
        lambda: an3155.write_memory(0xFFFF0000, b"\x03", TIMING),
        "> 31 CE\n< 79\n> FF FF 00 00 00\n< 79\n> 00 03 03\n< 79",
        None,
    ),
    "go": (lambda: an3155.go(0x08000000, TIMING), "> 21 DE\n< 79\n> 08 00 00 00 08\n< 79", None),
    "erase": (lambda: an3155.erase([0, 2], TIMING, wait_s=1), "> 43 BC\n< 79\n> 01 00 02 03\n< 79", None),
    "erase all": (lambda: an3155.erase_all(TIMING, wait_s=1), "> 43 BC\n< 79\n> FF 00\n< 79", None),
    "extended erase": (
        lambda: an3155.extended_erase([0, 0x123], TIMING, wait_s=1),
        "> 44 BB\n< 79\n> 00 01 00 00 01 23 23\n< 79",
        None,
    ),
    "extended erase, everything": (
        lambda: an3155.extended_erase_special(MassErase.ALL, TIMING, wait_s=1),
        "> 44 BB\n< 79\n> FF FF 00\n< 79",
        None,
    ),
    "extended erase, bank 1": (
        lambda: an3155.extended_erase_special(MassErase.BANK_1, TIMING, wait_s=1),
        "> 44 BB\n< 79\n> FF FE 01\n< 79",
        None,
    ),
    "extended erase, bank 2": (
        lambda: an3155.extended_erase_special(MassErase.BANK_2, TIMING, wait_s=1),
        "> 44 BB\n< 79\n> FF FD 02\n< 79",
        None,
    ),
    "special": (
        lambda: an3155.special(0x01, bytes.fromhex("0000 0001"), TIMING, wait_s=1),
        "> 50 AF\n< 79\n> 00 01 01\n< 79\n> 00 04 00 00 00 01 05\n< 79 00 00 00 01 00 79",
        (b"", b"\0"),
    ),
    "special with an answer": (
        lambda: an3155.special(0x10, b"", TIMING, wait_s=1),
        "> 50 AF\n< 79\n> 00 10 10\n< 79\n> 00 00 00\n< 79 00 02 AB CD 00 01 00 79",
        (b"\xab\xcd", b"\0"),
    ),
    "extended special": (
        lambda: an3155.extended_special(0x0102, b"\x01", b"\x02\x03", TIMING, wait_s=1),
        "> 51 AE\n< 79\n> 01 02 03\n< 79\n> 00 01 01 00\n< 79\n> 00 02 02 03 03\n< 79 00 01 00 79",
        b"\0",
    ),
    "write protect": (
        lambda: an3155.write_protect([1, 3], TIMING, wait_s=1),
        "> 63 9C\n< 79\n> 01 01 03 03\n< 79",
        None,
    ),
    "write unprotect": (lambda: an3155.write_unprotect(TIMING, wait_s=1), "> 73 8C\n< 79 79", None),
    "readout protect": (lambda: an3155.readout_protect(TIMING, wait_s=1), "> 82 7D\n< 79 79", None),
    "readout unprotect": (lambda: an3155.readout_unprotect(TIMING, wait_s=1), "> 92 6D\n< 79 79", None),
    "get checksum": (
        lambda: an3155.get_checksum(0x08000000, 1024, TIMING, compute_s=1),
        "> A1 5E\n< 79\n> 08 00 00 00 08\n< 79\n> 00 00 01 00 01\n< 79\n> 04 C1 1D B7 6F\n< 79\n> FF FF FF FF 00\n"
        "< 79 79 12 34 56 78 08",
        0x12345678,
    ),
}

# Answers whose end only silence shows: whatever follows them within the silence is part of them, so no noise is added.
ODD: dict[str, tuple[Make, str, Any]] = {
    "sync with a zero byte from switching TX on": (
        lambda: an3155.synchronise(TIMING),
        "> 7F\n< 00 79",
        SyncAnswer(already=False, junk=b"\0"),
    ),
    "get of the H743 V9.0, 13 announced, 11 sent": (
        lambda: an3155.get(TIMING),
        "> 00 FF\n< 79 0D 31 00 01 02 11 21 31 44 63 73 82 92 79",
        Loader(0x31, L476_COMMANDS, 13, odd=True),
    ),
    "get with more codes than announced": (
        lambda: an3155.get(TIMING),
        "> 00 FF\n< 79 0A 31 00 01 02 11 21 31 44 63 73 82 92 79",
        Loader(0x31, L476_COMMANDS, 10, odd=True),
    ),
}

BAD: dict[str, tuple[Make, str, type[BridgedError], dict[str, Any]]] = {
    "no sync": (lambda: an3155.synchronise(TIMING), "> 7F\n> 7F", NoSync, {}),
    "echo": (lambda: an3155.synchronise(TIMING), "> 7F\n< 7F", Loopback, {}),
    "an application": (
        lambda: an3155.synchronise(TIMING),
        "> 7F\n< 68 65 6C 6C 6F 0D 0A",
        ApplicationRunning,
        {"received": "hello"},
    ),
    "a wrong rate": (lambda: an3155.synchronise(TIMING), "> 7F\n< F9 C3", SyncNoise, {"received": "f9 c3"}),
    "get refused": (lambda: an3155.get(TIMING), "> 00 FF\n< 1F", Nack, {"stage": "opcode", "opcode": 0, "nacks": 1}),
    "get cut short": (lambda: an3155.get(TIMING), "> 00 FF\n< 79 0B 31 00 01", Garbled, {"announced": 11}),
    "get without a count": (lambda: an3155.get(TIMING), "> 00 FF\n< 79", NoReply, {"stage": "count"}),
    "get id with a count of 200": (lambda: an3155.get_id(TIMING), "> 02 FD\n< 79 C8 04 15 79", Garbled, {"announced": 200}),
    "get id without its last ACK": (lambda: an3155.get_id(TIMING), "> 02 FD\n< 79 01 04 15", NoReply, {"stage": "end"}),
    "read refused twice, as an F40x V3.1 under RDP does": (
        lambda: an3155.read_memory(0x08000000, 4, TIMING),
        "> 11 EE\n< 1F 1F",
        Nack,
        {"stage": "opcode", "nacks": 2},
    ),
    "read of a bad address": (
        lambda: an3155.read_memory(0x1, 4, TIMING),
        "> 11 EE\n< 79\n> 00 00 00 01 01\n< 1F",
        Nack,
        {"stage": "address", "address": 1},
    ),
    "read cut short": (
        lambda: an3155.read_memory(0x08000000, 4, TIMING),
        "> 11 EE\n< 79\n> 08 00 00 00 08\n< 79\n> 03 FC\n< 79 DE AD",
        NoReply,
        {"stage": "data", "received_bytes": 2, "expected_bytes": 4},
    ),
    "corrupt ACK": (
        lambda: an3155.read_memory(0x08000000, 4, TIMING),
        "> 11 EE\n< F9",
        Garbled,
        {"stage": "opcode", "received": "f9"},
    ),
    "write refused at its data": (
        lambda: an3155.write_memory(0x08000000, b"\1\2\3\4", TIMING),
        "> 31 CE\n< 79\n> 08 00 00 00 08\n< 79\n> 03 01 02 03 04 07\n< 1F",
        Nack,
        {"stage": "data", "address": 0x08000000},
    ),
    "erase that never answers": (
        lambda: an3155.extended_erase([5], TIMING, wait_s=8),
        "> 44 BB\n< 79\n> 00 00 00 05 05",
        EraseTimeout,
        {"timeout_s": 8},
    ),
    "a stale byte before a list of sectors": (
        lambda: an3155.extended_erase([5], TIMING, wait_s=8),
        "> 44 BB\n< 79 79",
        Garbled,
        {"stage": "stale"},
    ),
    "erase refused": (
        lambda: an3155.extended_erase([5], TIMING, wait_s=8),
        "> 44 BB\n< 79\n> 00 00 00 05 05\n< 1F",
        Nack,
        {"stage": "page list"},
    ),
    "get checksum with a wrong checksum": (
        lambda: an3155.get_checksum(0x08000000, 4, TIMING, compute_s=1),
        "> A1 5E\n< 79\n> 08 00 00 00 08\n< 79\n> 00 00 00 01 01\n< 79\n> 04 C1 1D B7 6F\n< 79\n> FF FF FF FF 00\n"
        "< 79 79 12 34 56 78 09",
        Garbled,
        {},
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_whole(name: str) -> None:
    make, text, expected = GOOD[name]
    peer = Peer.of(text)
    assert play(make(), peer) == expected
    assert not peer.said


@pytest.mark.parametrize("name", GOOD)
def test_bytewise(name: str) -> None:
    make, text, expected = GOOD[name]
    assert play(make(), Peer.of(text, bytewise=True)) == expected


@pytest.mark.parametrize("name", GOOD)
def test_trailing_noise_stays_unread(name: str) -> None:
    make, text, expected = GOOD[name]
    peer = Peer.of(text, noise=NOISE)
    assert play(make(), peer) == expected
    assert bytes(peer.said) == NOISE


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("bytewise", [False, True])
def test_odd_but_understood(name: str, bytewise: bool) -> None:
    make, text, expected = ODD[name]
    assert play(make(), Peer.of(text, bytewise=bytewise)) == expected


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("bytewise", [False, True])
def test_failure_says_what_and_where(name: str, bytewise: bool) -> None:
    make, text, error, facts = BAD[name]
    with pytest.raises(error) as caught:
        play(make(), Peer.of(text, bytewise=bytewise))
    assert {k: caught.value.facts.get(k) for k in facts} == facts
    assert caught.value.message
    assert caught.value.hint.remedy


def test_hazard_spans_the_erase_and_survives_silence() -> None:
    done = Peer.of("> 44 BB\n< 79\n> 00 00 00 05 05\n< 79")
    play(an3155.extended_erase([5], TIMING, wait_s=8), done)
    assert done.hazards == [8], "who called it ends the hazard, when the loader has answered once more"
    silent = Peer.of("> 44 BB\n< 79\n> 00 00 00 05 05")
    with pytest.raises(EraseTimeout):
        play(an3155.extended_erase([5], TIMING, wait_s=8), silent)
    assert silent.hazards == [8], "without an answer the hazard ends by its time only"


@pytest.mark.parametrize(
    ("make", "opcode"),
    [
        (lambda: an3155.write_unprotect(TIMING, wait_s=3), "73 8C"),
        (lambda: an3155.readout_protect(TIMING, wait_s=3), "82 7D"),
        (lambda: an3155.readout_unprotect(TIMING, wait_s=3), "92 6D"),
    ],
)
def test_protection_leaves_its_hazard_to_the_clock(make: Make, opcode: str) -> None:
    """The second ACK may come before the work is done (ST's public code sends both first)."""
    peer = Peer.of(f"> {opcode}\n< 79 79")
    play(make(), peer)
    assert peer.hazards == [3]


@pytest.mark.parametrize(
    "make",
    [
        lambda: an3155.read_memory(0, 0, TIMING),
        lambda: an3155.read_memory(0, 257, TIMING),
        lambda: an3155.write_memory(0, b"", TIMING),
        lambda: an3155.write_memory(0, bytes(257), TIMING),
        lambda: an3155.erase([], TIMING, wait_s=1),
        lambda: an3155.erase(range(256), TIMING, wait_s=1),
        lambda: an3155.extended_erase(range(129), TIMING, wait_s=1),
        lambda: an3155.extended_erase([], TIMING, wait_s=1),
        lambda: an3155.get_checksum(0, 6, TIMING, compute_s=1),
        lambda: an3155.special(1, bytes(129), TIMING, wait_s=1),
        lambda: an3155.extended_special(1, b"", bytes(1025), TIMING, wait_s=1),
        lambda: an3155.write_protect([], TIMING, wait_s=1),
    ],
)
def test_out_of_range_is_refused_before_a_byte_is_sent(make: Make) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        next(make())


@given(st.binary(max_size=1100), st.integers(0, 0xFFFFFFFF))
def test_frames_xor_to_zero(data: bytes, address: int) -> None:
    one_by_one = 0
    for byte in data:
        one_by_one ^= byte
    assert an3155.checksum(data) == one_by_one
    assert an3155.checksum(an3155.with_checksum(data)) == 0
    frame = an3155.address_frame(address)
    assert len(frame) == 5
    assert int.from_bytes(frame[:4], "big") == address


@given(st.sampled_from(sorted(GOOD)), st.lists(st.binary(max_size=24), max_size=12))
def test_any_answer_ends_in_a_value_or_a_loader_error(name: str, answers: list[bytes]) -> None:
    """Whatever a target says, a flow ends, within the bytes it was given, and never with another kind of exception."""
    flow = GOOD[name][0]()
    queue = bytearray(b"".join(answers))
    steps = 0
    with contextlib.suppress(StopIteration, LoaderError):
        step = next(flow)
        while True:
            steps += 1
            assert steps < 200
            if isinstance(step, Receive | Drain):
                count = step.count if isinstance(step, Receive) else 4096
                got, queue = bytes(queue[:count]), queue[count:]
                step = flow.send(got)
            else:
                step = flow.send(None)
    assert steps
