"""Properties: no stream of bytes breaks the device, cutting a stream into pieces changes nothing, a lost byte only stalls."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from bridged.sim.device import Mode
from bridged.sim.loader import Timing
from bridged.sim.virtual import VirtualUart
from bridged.sim.wire import Format
from tests.sim.dialogue import enter, frame, make, synced

CHIPS = ("0x410", "F407", "L476", "F756", "H743", "G071", "L072", "H563", "U575")
FAST = Timing(sector_erase_s=0.01, mass_erase_s=0.02, program_s_per_256=0.001)
AT = "08 00 00 00"

# Streams made of halves of commands reach deeper than random bytes do.
PIECES = st.one_of(
    st.binary(max_size=12),
    st.sampled_from(
        [
            frame(text)
            for text in (
                "7F", "00 FF", "01 FE", "02 FD", "11 EE", "21 DE", "31 CE", "43 BC", "44 BB", "50 AF", "51 AE", "63 9C",
                "73 8C", "82 7D", "92 6D", "A1 5E", f"{AT} sum", "08 00 01 00 sum", "1F FF 78 00 sum", "20 00 40 00 sum",
                "FF FF 00 00 sum", "03 01 02 03 04 sum", "07 01 02 03 04 05 06 07 08 sum", "FF FF 00", "FF 00", "00 inv",
                "FF inv", "00 00 00 00 sum", "00 01 00 00 00 01 sum", "00 00 00 04 sum", "04 C1 1D B7 sum", "00 82 sum",
                "00 04 00 00 00 01 sum",
            )
        ]
    ),
)  # fmt: skip
STREAMS = st.lists(PIECES, max_size=30)


def device_for(chip: str, **options: Any) -> Any:
    return make(chip, timing=FAST, checksum=True, options={"nBOOT_SEL": 0} if chip == "G071" else {}, **options)


@settings(max_examples=150)
@given(st.sampled_from(CHIPS), STREAMS, st.integers(0, 3), st.sampled_from("EN?"))
def test_any_stream_is_survived_and_a_reset_brings_the_loader_back(
    chip: str, stream: list[bytes], rdp: int, parity: str
) -> None:
    device = device_for(chip, rdp=rdp % 2)
    uart = enter(device, Format(115200, parity))
    for piece in (b"\x7f", *stream):
        uart.send(piece)
        uart.drain(0.002, 0.05)
    uart.pause(2.0)
    stats = device.stats
    assert stats.bytes_in == sum(map(len, stream)) + 1
    assert stats.bytes_out >= 0
    # Whatever was written into the option bytes, or left of them, may have closed the door; nothing else may.
    if not stats.self_resets and not device.hazard:
        uart = enter(device)
        if device.mode is Mode.DEAF:
            uart = enter(device)  # H743 loader V9.0 may want one more reset
        uart.send(b"\x7f")
        assert uart.drain(0.01, 0.1)[:1] == b"\x79"


@settings(max_examples=100)
@given(st.sampled_from(CHIPS), st.binary(max_size=60) | STREAMS.map(b"".join), st.lists(st.integers(1, 20), max_size=20))
def test_cutting_a_stream_into_pieces_changes_nothing(chip: str, stream: bytes, cuts: list[int]) -> None:
    def result(pieces: list[bytes]) -> tuple[bytes, int, bytes, Mode, int]:
        device = device_for(chip)
        uart = enter(device)
        for piece in (b"\x7f", *pieces):
            uart.send(piece)
        answers = uart.drain(1.0, 30.0)
        return answers, device.stats.overruns, bytes(device.memory.flash), device.mode, device.stats.nacks

    pieces, rest = [], stream
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    assert result([p for p in (*pieces, rest) if p]) == result([stream] if stream else [])


@given(st.integers(0, 11), st.binary(min_size=4, max_size=4))
def test_a_lost_byte_only_stalls_until_filler_or_reset(lost: int, data: bytes) -> None:
    """Whatever byte of a write is lost: no answer beyond the stage, and a reset leads out; flash has the data or it has not."""
    device = device_for("F407", faults=[f"lose:rx:{lost + 1}"])
    uart = synced(device)
    for piece in (b"\x31\xce", frame(f"{AT} sum"), frame(f"03 {data.hex(' ')} sum")):
        uart.send(piece)
        if uart.drain(0.05, 0.2) != b"\x79":
            break
    flash = bytes(device.memory.flash[:4])
    assert flash == b"\xff" * 4
    assert device.mode is Mode.LOADER
    talked = synced(device)
    talked.send(b"\x01\xfe")
    assert talked.receive(5, 1) == bytes.fromhex("7931000079")


@given(st.binary(min_size=1, max_size=64), st.floats(0, 0.2))
def test_time_never_goes_back_and_bytes_come_in_order(data: bytes, pause_s: float) -> None:
    uart = VirtualUart(make("F407"))
    times = []
    for value in data:
        uart.send(bytes((value,)))
        times.append(uart.now_ns)
        uart.pause(pause_s)
        uart.set_lines(reset=value & 1 == 0, boot0=bool(value & 2))
        times.append(uart.device.now_ns)
    assert times == sorted(times)
