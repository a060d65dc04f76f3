"""The loader's source compiled for a PC with ASan and UBSan, fed whole and spoilt conversations.

What this finds and the emulator cannot: one byte beyond ring, block or flash, a shift or an overflow that C does not define, a
word read from an odd address.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridged.protocol import stub as wire
from bridged.protocol.stub import Verb
from tests.stub.bench import pattern
from tests.support import require_tool

FLASH, FLASH_BYTES, PAGE = 0x08000000, 16384, 1024
HERE = Path(__file__).parent
Run = Callable[[bytes], tuple[list[wire.Answer], bytes]]


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Run:
    gcc = require_tool("gcc", "gcc libc6-dev")
    work = tmp_path_factory.mktemp("host")
    flags = ("-std=gnu2x", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-int-to-pointer-cast")
    sanitize = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    subprocess.run([gcc, *flags, *sanitize, "-o", str(work / "host"), f"-I{HERE}", str(HERE / "host.c")], check=True)

    def run(data: bytes) -> tuple[list[wire.Answer], bytes]:
        flash = work / "flash.bin"
        done = subprocess.run([work / "host", flash], input=data, capture_output=True, check=False, timeout=20)
        assert done.stderr.decode(errors="replace") == ""
        assert done.returncode == 0
        return answers(done.stdout), flash.read_bytes()

    return run


def answers(data: bytes) -> list[wire.Answer]:
    """Everything that it said, which is always whole frames."""
    found = []
    while data:
        head = wire.head_of(data[:7])
        assert head is not None
        verb, number, count = head
        assert wire.frame(verb, number, data[7 : 7 + count]) == data[: 11 + count]
        found.append(wire.Answer(verb, number, data[7 : 7 + count]))
        data = data[11 + count :]
    return found


def erase(number: int, page: int) -> bytes:
    return wire.frame(Verb.ERASE, number, struct.pack("<III", FLASH + PAGE * page, 0, PAGE))


def write(number: int, address: int, data: bytes) -> bytes:
    return wire.frame(Verb.WRITE, number, struct.pack("<I", address) + data)


def test_a_whole_job(loader: Run) -> None:
    data = pattern(1, FLASH_BYTES)
    stream = wire.frame(Verb.HELLO, 9) + b"".join(erase(n, n) for n in range(16))
    stream += b"".join(write(16 + n, FLASH + PAGE * n, data[PAGE * n : PAGE * (n + 1)]) for n in range(16))
    stream += wire.frame(Verb.CRC, 3, struct.pack("<III", FLASH, PAGE, 16)) + wire.frame(
        Verb.READ, 4, struct.pack("<II", FLASH, 999)
    )
    said, flash = loader(stream)
    assert flash == data
    assert [a.verb & 0x7F for a in said] == [0, 0, *[1] * 16, *[2] * 16, Verb.CRC, Verb.READ], "a greeting first"
    assert [a.number for a in said[2:34]] == list(range(32))
    assert said[-1].payload == data[:999]


def test_the_largest_frames_at_every_place_in_the_ring(loader: Run) -> None:
    data = pattern(2, PAGE)
    stream = wire.frame(Verb.HELLO, 0) + erase(0, 0)
    for number in range(1, 250):
        stream += write(number, FLASH, data) + b"\xa5" * (number % 7)
    said, flash = loader(stream + wire.frame(Verb.READ, 1, struct.pack("<II", FLASH, 1028)))
    assert flash[:PAGE] == data
    assert [a.number for a in said if a.verb == Verb.WRITE | 0x80] == list(range(1, 250))
    assert len(said[-1].payload) == 1028


@pytest.mark.parametrize("count", [1028, 1029, 4095, 65535])
def test_lengths_at_the_limit(loader: Run, count: int) -> None:
    said, _ = loader(wire.frame(Verb.HELLO, 0) + wire.frame(Verb.WRITE, 0, bytes(count)))
    refusal = wire.refusal_of(said[2])
    assert refusal is not None
    assert refusal.reason.name == ("BAD_ARGUMENT" if count == 1028 else "TOO_LONG")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_spoilt_conversations(loader: Run, data: st.DataObject) -> None:
    """What is in flash afterwards is a beginning of what was to be written, in whole frames, and the rest is untouched."""
    random = Random(data.draw(st.integers(0, 1 << 32)))
    content = [pattern(n, 64) for n in range(24)]
    frames = [
        wire.frame(Verb.HELLO, 0),
        erase(0, 0),
        *(write(1 + n, FLASH + 64 * n, part) for n, part in enumerate(content[:16])),
    ]
    stream = bytearray(b"".join(frames))
    for _ in range(data.draw(st.integers(0, 6))):
        at = random.randrange(len(stream))
        how = random.randrange(3)
        if how == 0:
            stream[at] ^= 1 << random.randrange(8)
        elif how == 1:
            del stream[at]
        else:
            stream[at:at] = random.randbytes(random.randrange(1, 20))
    _, flash = loader(bytes(stream))
    expected = [b"\0" * PAGE] + [b"".join(content[:n]).ljust(PAGE, b"\xff") for n in range(17)]
    assert flash[:PAGE] in expected
    assert flash[PAGE:] == bytes(FLASH_BYTES - PAGE)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=40)), max_size=12))
def test_any_verb_with_any_payload(loader: Run, frames: list[tuple[int, bytes]]) -> None:
    """With a good CRC, so that arguments are what is tried. A read of an address that is not there ends the run."""
    said, _ = loader(wire.frame(Verb.HELLO, 0) + b"".join(wire.frame(verb, 0, payload) for verb, payload in frames))
    assert said[0].verb == Verb.HELLO | 0x80
