"""Recordings and what the decoder makes of them: golden ones as text, any text at all, and sessions recorded here and now."""

from __future__ import annotations

import json
import random
import re
import struct
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridged.events import Phase, PhaseStarted, Retried, Synced, Warned
from bridged.protocol import stub as wire
from bridged.protocol.an3155 import Command
from bridged.protocol.flow import Barrier, Hazard, SetFormat, SetLines
from bridged.protocol.recording import Sign, counters_note, note_of, one_line, parse
from bridged.protocol.stub import Verb
from bridged.protocol.trace import Recording, decode
from bridged.protocol.trace_event import Answer, Event, Kind
from bridged.protocol.trace_text import json_lines, table
from tests.protocol.recorder import FOLDER, SESSIONS

GOLDEN = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.txt"))}


def check(text: str) -> Recording:
    """Decodes, and holds the decoder to what it promises for every text."""
    found = decode(text)
    told = [entry.line for event in found.events for entry in event.entries]
    assert sorted(told) == [entry.line for entry in found.entries], "each entry belongs to exactly one event"
    assert [n for n, line in enumerate(text.split("\n"), 1) if line.strip()] == [entry.line for entry in found.entries]
    assert sum(event.sent_bytes for event in found.events) == sum(entry.sent_bytes for entry in found.entries)
    assert sum(event.received_bytes for event in found.events) == sum(entry.received_bytes for entry in found.entries)
    for fold in (True, False):
        shown = table(found, fold=fold)
        assert shown.endswith("\n")
        assert shown.replace("\n", "").isprintable(), "nothing in it may talk to a terminal"
    objects = [json.loads(line) for line in json_lines(found)]
    assert len(objects) == len(found.events) + 1
    assert sum(shown.get("sent_bytes", 0) for shown in objects) == sum(entry.sent_bytes for entry in found.entries)
    return found


def one(text: str) -> Event:
    """The only event of a recording, which leaves out the times."""
    (event,) = check(text).events
    return event


def commands(found: Recording, command: Command | None = None) -> list[Event]:
    return [e for e in found.events if e.kind is Kind.COMMAND and command in (None, e.opcode)]


# --- golden recordings --------------------------------------------------------------------------------------------


def test_there_is_a_golden_recording_for_each_session() -> None:
    assert set(GOLDEN) == set(SESSIONS)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_recordings_are_told_as_before(name: str) -> None:
    assert table(check(GOLDEN[name])) == (FOLDER / f"{name}.table").read_text(), "see tests/protocol/recorder.py"


def test_a_good_flash_has_nothing_unusual() -> None:
    found = check(GOLDEN["good-flash"])
    assert found.whole
    assert found.flagged == []
    written = {e.address: e.length for e in commands(found, Command.WRITE_MEMORY)}
    assert list(written)[-1] == 0x08000000, "the vectors come last"
    assert 0x08000800 not in written, "a blank block is not written"
    shown = table(found)
    assert "0x08000100..0x080023ff, 31 blocks, 1 gap" in shown
    assert shown.count("Write Memory") == 2
    assert table(found, fold=False).count("Write Memory") == len(written) == 32
    sums = found.sums
    assert sums.total_s == pytest.approx(sums.wire_s + sums.target_s + sums.silent_s + sums.host_s + sums.rest_s)
    assert 0.3 < sums.target_s < 0.5, "one sector was erased, for a third of a second"
    assert 0.02 < sums.host_s < 0.05, "80 us for each frame"


def test_a_nack_and_its_retry_are_marked() -> None:
    found = check(GOLDEN["nack"])
    refused, retry = found.flagged
    assert (refused.opcode, refused.address, refused.flags) == (Command.WRITE_MEMORY, 0x08000400, ("NACK (data)",))
    assert [stage.answer for stage in refused.stages] == [Answer.ACK, Answer.ACK, Answer.NACK]
    assert retry.kind is Kind.RETRY


def test_a_lost_byte_is_silence_and_then_a_reset() -> None:
    found = check(GOLDEN["lost-byte"])
    silent = found.flagged[0]
    assert silent.answer is Answer.SILENCE
    assert silent.stages[-1].silent_s == pytest.approx(2.0, abs=0.01)
    after = [e for e in found.events if e.at > silent.at]
    assert [e.title for e in after if e.kind is Kind.LINES][:3] == [
        "BOOT0 high: loader",
        "NRST low: in reset",
        "NRST released",
    ]
    assert next(e for e in after if e.kind is Kind.SYNC).flags == ()
    assert found.events[-1].title == "the session ended well"


def test_a_wrong_parity_shows_at_get_at_every_rate() -> None:
    found = check(GOLDEN["wrong-parity"])
    assert {e.flags for e in commands(found, Command.GET)} == {("NACK (opcode)",)}
    rates = [e.title for e in found.events if e.kind is Kind.FORMAT]
    assert "57600 baud, 8E1" in rates
    assert "9600 baud, 8E1" in rates
    assert found.events[-1].title.startswith("WRONG_PARITY")


def test_an_erase_without_an_end_is_told_with_its_hazard() -> None:
    found = check(GOLDEN["erase-timeout"])
    first, again = commands(found, Command.EXTENDED_ERASE)
    for erase in (first, again):
        assert erase.detail == "sector 0"
        assert erase.stages[-1].silent_s == pytest.approx(25.0, abs=0.01)
    assert [e.title for e in found.events if e.kind is Kind.HAZARD] == ["nobody may reset the target for 25.000 s"] * 2
    assert found.sums.silent_s == pytest.approx(50.0, abs=0.1)


def sent(data: bytes) -> str:
    return f"> {data.hex(' ').upper()}\n"


def heard(data: bytes) -> str:
    """As the session reads it: the header first."""
    return "".join(f"< {part.hex(' ').upper()}\n" for part in (data[:7], data[7:]))


def refusal(reason: int) -> bytes:
    return wire.frame(Verb.NAK | 0x80, 3, struct.pack("<IIII", 0, reason, 0, 0))


@pytest.mark.parametrize("name", SESSIONS)
def test_sessions_of_today_are_understood(name: str) -> None:
    """The golden ones stay as they were; what the session does now must be told without a byte that nothing explains."""
    found = check(SESSIONS[name]())
    assert found.whole
    assert found.events[-1].kind is Kind.END
    assert not [e for e in found.events if e.kind in (Kind.UNREADABLE, Kind.NOTE)]
    talk = 2 if name == "xmodem" else 0  # With a bootloader of the target's own, before it takes a block.
    assert len([e for e in found.events if e.kind is Kind.BYTES and e.sent_bytes]) == talk
    assert commands(found) or talk


def test_a_stream_of_the_second_stage_is_told_frame_by_frame() -> None:
    """Two frames to it were hit and one of its answers; what was sent behind them is sent again."""
    found = check(GOLDEN["second-stage"])
    frames = [e for e in found.events if e.kind is Kind.FRAME]
    assert [e.title for e in frames[:4]] == [f"2nd stage {what}" for what in ("train", "greeting", "hello", "baud")]
    assert "divisor" in frames[2].detail
    writes = [e for e in frames if e.opcode == Verb.WRITE]
    done = {e.address: e.length for e in writes if e.answer is Answer.ACK}
    assert sum(length or 0 for length in done.values()) == 30_208 - 1024, (
        "each block was acknowledged in the end, and a blank stretch is none"
    )
    assert list(done)[-1] == 0x08000000, "the vectors come last"
    assert {e.answer for e in writes} == {Answer.ACK, Answer.NACK}
    assert [e.flags for e in found.flagged] == [("no frame of the second-stage loader",), ("BAD_CRC",), ("BAD_CRC",)]
    erased = [e.address for e in frames if e.opcode == Verb.ERASE and e.answer is Answer.ACK]
    assert erased == [0x08000000 + 2048 * n for n in range(8)], "none twice; behind them it is blank"
    assert found.sums.target_s < found.sums.total_s
    shown = table(found)
    assert "2nd stage NAK       to number 15, number 15 is expected" in shown
    assert len(shown.splitlines()) < 120 < len(table(found, fold=False).splitlines())


def test_a_transfer_by_xmodem_is_told_block_by_block() -> None:
    found = check(GOLDEN["xmodem"])
    blocks = [e for e in found.events if e.kind is Kind.BLOCK]
    assert [e.title for e in blocks] == ["XMODEM block"] * 6 + ["XMODEM end"]
    assert [e.address for e in blocks] == [0, 1024, 2048, 2048, 3072, 4096, None]
    assert [e.answer for e in blocks].count(Answer.NACK) == 1
    assert [e.flags for e in found.flagged if e.kind is Kind.BLOCK] == [("NACK (block)",)]


CRC_OF_A_PAGE = wire.frame(Verb.CRC, 7, bytes.fromhex("00000008 00080000 01000000"))


@pytest.mark.parametrize(
    ("text", "title", "detail", "flags"),
    [
        (sent(CRC_OF_A_PAGE), "crc", "0x08000000, 1 times 2048 bytes", ["no answer was recorded"]),
        (sent(CRC_OF_A_PAGE) + heard(wire.frame(Verb.CRC | 0x80, 7, bytes(4))), "crc", "0x08000000, 1 times 2048 bytes", []),
        (
            sent(CRC_OF_A_PAGE[:-1] + b"!"),
            "crc",
            "0x08000000, 1 times 2048 bytes",
            ["wrong checksum sent", "no answer was recorded"],
        ),
        (sent(CRC_OF_A_PAGE[:12]), "crc", "12 bytes", ["broken off", "no answer was recorded"]),
        (sent(wire.frame(Verb.GO, 1, bytes(4))) + heard(wire.frame(Verb.GO | 0x80, 1)), "go", "reset", []),
        (sent(wire.frame(0x20, 3)) + heard(refusal(6)), "verb 0x20", "", ["refused"]),
        (heard(wire.frame(Verb.WRITE | 0x80, 9)), "answer", "write 9, once more", []),
        (heard(refusal(2)), "NAK", "to number 3, number 0 is expected", ["BAD_HEADER"]),
        (sent(b"\x55" * 64), "train", "64 bytes of 55, for its clock to be measured", []),
        (
            sent(wire.frame(Verb.STATUS, 2)) + heard(wire.frame(Verb.STATUS | 0x80, 2, struct.pack("<10I", *range(10)))),
            "status",
            "5 frames, 6 spoilt, 7 bad headers, 8 gaps, 9 pauses",
            [],
        ),
    ],
)  # fmt: skip
def test_frames_of_the_second_stage(text: str, title: str, detail: str, flags: list[str]) -> None:
    event = check(text).events[0]
    assert (event.kind, event.title, event.detail, list(event.flags)) == (Kind.FRAME, f"2nd stage {title}", detail, flags)


def test_one_answer_stands_for_all_commands_before_it() -> None:
    frames = [wire.frame(Verb.WRITE, n, struct.pack("<I", 0x08000000 + 64 * n) + bytes(64)) for n in range(3)]
    found = check("".join(map(sent, frames)) + heard(wire.frame(Verb.WRITE | 0x80, 2)))
    assert [e.answer for e in found.events] == [Answer.ACK] * 3
    assert found.flagged == []
    assert "0x08000000..0x080000bf, 3 blocks" in table(found)


# --- single commands ----------------------------------------------------------------------------------------------

ADDRESSED = "> 08 00 01 00 09\n< 79\n"
CRC_WORDS = "> 00 00 00 10 10\n< 79\n> 04 C1 1D B7 6F\n< 79\n> FF FF FF FF 00\n< 79\n"


@pytest.mark.parametrize(
    ("text", "title", "detail", "flags"),
    [
        ("> 00 FF\n< 79\n< 02\n< 31 00 11 79", "Get", "protocol 3.1, commands 00 11", []),
        ("> 00 FF\n< 79\n< 05\n< 31 00 11 79", "Get", "protocol 3.1, commands 00 11", ["5 bytes came, its count announced 8"]),
        ("> 01 FE\n< 79\n< 31 00 00\n< 79", "Get Version", "protocol 3.1", []),
        ("> 01 FE\n< 79\n< 31 00\n", "Get Version", "protocol 3.1", ["2 of 4 bytes came"]),
        ("> 02 FD\n< 79\n< 01\n< 04 49\n< 79", "Get Id", "product id 0x0449", []),
        ("> 02 FD\n< 1F\n< 1F", "Get Id", "", ["NACK (opcode) 2 times"]),
        ("> 11 EE\n< 79\n" + ADDRESSED + "> 01 FE\n< 79\n< AA BB", "Read Memory", "0x08000100, 2 bytes", []),
        ("> 11 EE\n< 79\n" + ADDRESSED + "> 01 FE\n< 79\n< AA", "Read Memory", "0x08000100, 2 bytes", ["1 of 2 bytes came"]),
        ("> 11 EE\n< 79\n" + ADDRESSED + "> 01 FE\n< ", "Read Memory", "0x08000100, 2 bytes", ["silence of 0.000 s (length)"]),
        ("> 11 EE\n< 79\n" + ADDRESSED, "Read Memory", "0x08000100", ["broken off after address"]),
        (
            "> 11 EE\n< 79\n> 08 00 01 00 0A\n< 1F",
            "Read Memory",
            "0x08000100",
            ["wrong checksum sent (address)", "NACK (address)"],
        ),
        ("> 21 DE\n< 79\n" + ADDRESSED, "Go", "0x08000100", []),
        ("> 31 CE\n< 79\n" + ADDRESSED + "= 0x08000100 256\n< 79", "Write Memory", "0x08000100, 256 bytes", []),
        ("> 31 CE\n< 79\n" + ADDRESSED + "> 01 AA BB 10\n< 79", "Write Memory", "0x08000100, 2 bytes", []),
        (
            "> 31 CE\n< 79\n" + ADDRESSED + "= 0x08000200 256\n< 79",
            "Write Memory",
            "0x08000100, 256 bytes",
            ["content for 0x08000200 was sent"],
        ),
        ("> 31 CE\n< 79 00", "Write Memory", "", ["broken off after opcode", "00 came after the ACK (opcode)"]),
        ("> 31 CE", "Write Memory", "", ["no answer was recorded (opcode)"]),
        ("> 43 BC\n< 79\n> FF 00\n< 79", "Erase", "all", []),
        ("> 43 BC\n< 79\n> 02 01 02 07 06\n< 79", "Erase", "sectors 1..2, 7", []),
        ("> 44 BB\n< 79\n> FF FF 00\n< 79", "Extended Erase", "all", []),
        ("> 44 BB\n< 79\n> FF FE 01\n< 79", "Extended Erase", "bank 1", []),
        ("> 44 BB\n< 79\n# hazard 8.000 s\n> 00 00 00 05 05\n< 79", "Extended Erase", "sector 5", []),
        ("> 92 6D\n< 79\n< 79", "Readout Unprotect", "", []),
        ("> 92 6D\n< 79\n< ", "Readout Unprotect", "", ["nothing came instead of a second ACK"]),
        (
            "> A1 5E\n< 79\n" + ADDRESSED + CRC_WORDS + "< 79\n< 01 02 03 04 04",
            "Get Checksum",
            "0x08000100, 64 bytes: CRC 0x01020304",
            [],
        ),
        ("= 0x08000100 256\n< 79", "Write Memory", "0x08000100, 256 bytes", ["its beginning was not recorded"]),
    ],
)  # fmt: skip
def test_commands(text: str, title: str, detail: str, flags: list[str]) -> None:
    event = next(e for e in check(text).events if e.kind is Kind.COMMAND)
    assert (event.title, event.detail, list(event.flags)) == (title, detail, flags)


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("> 7F\n< 79", []),
        ("> 7F\n< 1F", ["NACK: it had been synchronised before, so it was not reset"]),
        ("> 7F\n< 00\n< 79", ["00 came before the ACK"]),
        ("> 7F\n< 7F\n< ", ["7F came back: what is sent is received"]),
        ("> 7F\n< 68\n< 65 6C 6C 6F 0D 0A", ["'hello' came instead of an ACK"]),
        ("> 7F\n< A3 80", ["A3 80 came instead of an ACK"]),
        ("1.0 > 7F\n1.155 < ", ["silence of 0.155 s"]),
    ],
)
def test_synchronisations(text: str, flags: list[str]) -> None:
    event = one(text)
    assert (event.kind, list(event.flags)) == (Kind.SYNC, flags)


def test_filler_of_a_resynchronisation_is_one_event() -> None:
    filler, probe, get = check("> 5A\n< \n" * 200 + "> 5A\n< 1F\n> FF 00\n< 1F\n> 00 FF\n< 79").events
    assert filler.detail == "5A, 201 times"
    assert probe.detail == "FF 00"
    assert get.title == "Get"


def test_the_text_of_an_application_is_shown_as_text() -> None:
    event = one("< 68 65 6C 6C 6F 20 31\n< 0D 0A")
    assert (event.title, event.detail) == ("Heard", "'hello 1' (9 bytes)")


@pytest.mark.parametrize(
    ("step", "kind", "title"),
    [
        (SetLines(reset=True, boot0=False), Kind.LINES, "NRST low: in reset, BOOT0 low: application"),
        (SetLines(power=False), Kind.LINES, "power off"),
        (SetFormat(57600, "E"), Kind.FORMAT, "57600 baud, 8E1"),
        (Hazard(8), Kind.HAZARD, "nobody may reset the target for 8.000 s"),
        (Hazard(0), Kind.HAZARD, "the hazard is over"),
        (Barrier("erasing"), Kind.BARRIER, "waiting until the journal has erasing on disk"),
        (PhaseStarted(Phase.WRITE), Kind.PHASE, "write"),
        (Retried("write", "NACK:\n< 79"), Kind.RETRY, "write: NACK: < 79"),
        (Warned("NOT_RESET", "x"), Kind.WARNING, "NOT_RESET: x"),
    ],
)  # fmt: skip
def test_what_is_noted_is_understood(
    step: SetLines | SetFormat | Hazard | Barrier | PhaseStarted, kind: Kind, title: str
) -> None:
    event = one(f"   0.000000 # {note_of(step)}")
    assert (event.kind, event.title) == (kind, title)


def test_an_event_that_is_no_news_for_a_recording_leaves_no_note() -> None:
    assert note_of(Synced(115200, 1)) == ""
    assert "\n" not in one_line("a\nb\r\nc")


def test_driver_counters_are_marked_where_they_are_not_zero() -> None:
    assert one(f"# {counters_note(frame=0, parity=0, overrun=0, breaks=0)}").flags == ()
    found = check(f"# {counters_note(frame=0, parity=12, overrun=1, breaks=0)}")
    assert found.events[0].flags == ("12 parity errors", "1 overrun errors")
    assert "the driver counted frame 0 parity 12 overrun 1 break 0" in table(found)


# --- who was slow -------------------------------------------------------------------------------------------------


def writes(times: list[float], gaps: list[float]) -> str:
    """Write Memory of consecutive blocks at 115200 baud; the last ACK takes so long, the address is so late."""
    frame, at, out = 11 / 115200, 0.0, ["0.000000 # session flash", "0.000000 # format 115200 8E1"]
    for n, (seconds, gap) in enumerate(zip(times, gaps, strict=True)):
        address = 0x08000000 + 256 * n
        word = address.to_bytes(4, "big")
        xor = word[0] ^ word[1] ^ word[2] ^ word[3]
        for text, count, waits, late in (
            ("> 31 CE", 2, 0.0001, 0.0001),
            (f"> {word.hex(' ').upper()} {xor:02X}", 5, 0.0001, gap),
            (f"= {address:#010x} 256", 258, seconds, 0.0001),
        ):
            at += late
            out.append(f"{at:.6f} {text}")
            at += (count + 1) * frame + waits
            out.append(f"{at:.6f} < 79")
    return "\n".join(out)


def test_a_slow_target_and_a_slow_host_are_told_apart() -> None:
    times, gaps = [0.004] * 40, [0.0002] * 40
    times[20], gaps[30] = 0.090, 0.050
    found = check(writes(times, gaps))
    slow, late = found.flagged
    assert slow.flags == ("slow answer (data): 0.0900 s, usually 0.0040 s",)
    assert slow.address == 0x08000000 + 256 * 20
    assert late.flags == ("the host took 0.0500 s before address",)
    assert late.address == 0x08000000 + 256 * 30
    assert found.sums.target_s == pytest.approx(39 * 0.004 + 0.090 + 80 * 0.0001, rel=0.01)
    shown = table(found)
    assert "0x08000000..0x080013ff, 20 blocks  ACK in 4.0 ms median, 4.0 ms worst" in shown
    assert "slowest answer: 90.0 ms, Write Memory at 0x08001400 (data)" in shown
    assert "longest pause of the host: 50.0 ms, before Write Memory at 0x08001e00 (address)" in shown


def test_the_worst_of_a_folded_run_is_shown() -> None:
    times = [0.0012] * 60 + [0.0040]
    assert "61 blocks  ACK in 1.2 ms median, 4.0 ms worst" in table(check(writes(times, [0.0001] * 61)))


def test_bytes_need_their_time_at_the_rate_of_their_moment() -> None:
    text = "0.0 # format 9600 8E1\n0.0 > 31 CE\n0.005 < 79\n0.0051 # format 115200 8N1\n1.0 > 31 CE\n1.005 < 79"
    slow, fast = commands(check(text))
    assert slow.stages[0].target_s == pytest.approx(0.005 - 3 * 11 / 9600)
    assert fast.stages[0].target_s == pytest.approx(0.005 - 3 * 10 / 115200)
    assert fast.stages[0].gap_s is None, "after a note of the session nobody was late"


# --- parts, and rubbish -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_any_part_of_a_recording_is_understood(name: str) -> None:
    """From any entry on, as after the recorder gave up its older half: at most the first command is odd."""
    lines = GOLDEN[name].splitlines()
    for start in random.Random(7).sample(range(1, len(lines)), 25):
        found = check("\n".join(lines[start:]))
        assert not found.whole
        assert table(found).startswith("This recording does not begin with the start of a session")
        odd = [e for e in found.events if e.kind is Kind.BYTES and e.sent_bytes]
        assert len(odd) <= 2
        # Without their times: where the note of the format is missing, the rate is a guess.
        words = [re.sub(r"[0-9.]+", "N", " ".join(e.flags)) for e in found.flagged]
        expected = [e for e in decode("\n".join(lines)).flagged if e.at > float(lines[start].split()[0])]
        whole = Counter(re.sub(r"[0-9.]+", "N", " ".join(e.flags)) for e in expected)
        # Of what is slow only the whole knows what is usual; all else that was marked in the whole is so in the part.
        assert not [text for text in whole - Counter(words) if "slow" not in text]


LINE = st.one_of(
    st.builds(
        lambda at, sign, data: f"{at:12.6f} {sign} {data.hex(' ').upper()}",
        st.floats(0, 1e6),
        st.sampled_from("><"),
        st.binary(max_size=8)
        | st.sampled_from(
            [CRC_OF_A_PAGE, CRC_OF_A_PAGE[:7], wire.frame(Verb.WRITE | 0x80, 3), refusal(4), b"\x55" * 64, b"\xa5"]
        )
        | st.sampled_from([bytes([1, 1, 254]) + bytes(129), b"\x04", b"\x06", b"\x15"])
        | st.sampled_from([bytes([c, c ^ 255]) for c in Command])
        | st.sampled_from([b"\x79", b"\x1f", b"\x7f", b"\x79\x79", bytes.fromhex("0800010009"), b"\x00" * 5]),
    ),
    st.builds(lambda a, n: f"= {a:#010x} {n}", st.integers(0, 1 << 32), st.integers(0, 1 << 20)),
    st.builds(lambda n: f"= 0x08000000 {n} 0", st.integers(0, 20)),
    st.sampled_from(
        ["# hazard 1.000 s", "# hazard over", "# phase write", "# journaled erasing", "# lines reset=True", "#", "# "]
    ),
    st.builds(lambda text: f"# format {text}", st.from_regex(r"[0-9]{1,9} 8[NEO][12]", fullmatch=True)),
    st.text(max_size=30),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(LINE, max_size=40).map("\n".join))
def test_whatever_a_recording_looks_like_each_of_its_bytes_is_told_once(text: str) -> None:
    check(text)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=400))
def test_any_text_is_decoded(text: str) -> None:
    check(text)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(GOLDEN)), st.data())
def test_a_recording_that_was_damaged_is_decoded(name: str, data: st.DataObject) -> None:
    text = GOLDEN[name][:6000]
    at = data.draw(st.integers(0, len(text)))
    count = data.draw(st.integers(0, 40))
    check(text[:at] + data.draw(st.text(max_size=10)) + text[at + count :])


def test_a_session_that_was_killed_has_no_end() -> None:
    lines = GOLDEN["good-flash"].splitlines()
    assert check("\n".join(lines)).ended
    killed = check("\n".join(lines[:200]))
    assert (killed.whole, killed.ended) == (True, False)
    assert "the end of the session is missing" in table(killed)


def test_what_cannot_be_read_is_kept_and_said() -> None:
    found = check("From: somebody\nTo: us\n\n   0.000001 > 7F\n   0.000300 < 79\n> 7\n")
    assert [e.kind for e in found.events] == [Kind.UNREADABLE, Kind.SYNC, Kind.UNREADABLE]
    assert found.events[0].title == "2 lines that cannot be read"


def test_the_grammar_takes_what_the_recorder_writes() -> None:
    entries = parse(
        "    0.000000 > 31 CE\n    0.000100 < 79\n    0.000200 = 0x08000100 256\n    0.1 < \n    0.2 # phase write\n"
    )
    assert [e.sign for e in entries] == [Sign.SENT, Sign.RECEIVED, Sign.CONTENT, Sign.RECEIVED, Sign.NOTE]
    assert [e.sent_bytes for e in entries] == [2, 0, 258, 0, 0]
    assert parse("> 31 CE\r\n< 79\r\n") == parse("> 31 CE\n< 79")
