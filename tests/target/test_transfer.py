"""Jobs of kind xmodem in virtual time: against a target whose own bootloader takes it, on lines good and bad."""

from __future__ import annotations

import asyncio
import os
import random
import select
import struct
import subprocess
import threading
import tty
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridged import config
from bridged.errors import (
    BadRequest,
    Canceled,
    ImageTooLarge,
    LineUnavailable,
    TransferFailed,
    TransferUnconfirmed,
    Unhealthy,
)
from bridged.events import Phase, PhaseStarted
from bridged.images.model import Image
from bridged.protocol import trace
from bridged.protocol.flow import Barrier
from bridged.protocol.xmodem import How
from bridged.sim import virtual
from bridged.sim.virtual import Account, VirtualUart
from bridged.target import session
from bridged.target.expect import Conversation
from bridged.target.owner import Target
from bridged.target.request import Receiver, Request, Result, Wiring
from tests.support import require_tool
from tests.target.bench import WIRED
from tests.target.own_bootloader import OwnBootloader, S, good_image

RECEIVER = Receiver(
    enter=Conversation(b"x", "boot> ", 5.0),
    begin=Conversation(b"load\n", "send it now", 5.0),
    success=Conversation(b"", "image good", 5.0),
)
DATA = good_image(5000)


def run(
    target: OwnBootloader,
    data: bytes = DATA,
    *,
    checkpoint: Callable[[Any], None] | None = None,
    barrier: Callable[[Barrier], None] | None = None,
    progress: Callable[[int], None] | None = None,
    account: Account | None = None,
    image: Image | None = None,
    buffered: bool = False,
    **request: Any,
) -> Result:
    wanted = Request(**{"kind": "xmodem", "wiring": WIRED, "receiver": RECEIVER, **request})
    assert Request.from_dict(wanted.to_dict()) == wanted
    account = account or Account()
    flow = session.run(wanted, image or Image.of([(0, data)]))
    try:
        return virtual.run(
            flow,
            VirtualUart(target, account=account, buffered=buffered),  # type: ignore[arg-type]
            account=account,
            checkpoint=checkpoint,
            barrier=barrier,
            progress=progress,
        )
    finally:
        assert account.violations == []


@pytest.mark.parametrize("crc", [True, False])
def test_an_image_by_xmodem(crc: bool) -> None:
    target, account = OwnBootloader(crc=crc), Account()
    done: list[int] = []
    result = run(target, account=account, progress=done.append)
    assert target.flash[: len(DATA)] == DATA
    assert (result.evidence, result.changed, result.bytes_written, result.boot) == ("receiver", True, 5000, "reset")
    assert target.resets == 2
    assert "Own bootloader" in result.banner
    assert done[-1] == 5000
    assert [b.state for b in account.barriers] == ["erasing", "erased"]
    phases = [e.phase for _, e in account.events if isinstance(e, PhaseStarted)]
    assert phases == [Phase.ACTIVATE, Phase.SYNC, Phase.WRITE, Phase.VERIFY, Phase.BOOT]
    heard = b"".join(account.overheard)
    for words in (b"Own bootloader 1.0", b"boot> ", b"send it now", b"image good"):
        assert words in heard, "the console gets what the bootloader says"
    assert b"\x06" not in heard


class ErasesAtLoad(OwnBootloader):
    """It erases when it is told to load, says nothing meanwhile, and asks for the first block when that is done."""

    def _byte(self, value: int) -> None:
        before = self.runs
        super()._byte(value)
        if (before, self.runs) == ("prompt", "asking"):
            self.out.clear()
            self.flash = b""
            self.busy_until = self.timer = self.now_ns + round(self.erase_s * S)


@pytest.mark.parametrize("erase_s", [8.0, 20.0])
def test_a_bootloader_that_erases_when_it_is_told_to_load(erase_s: float) -> None:
    target, account = ErasesAtLoad(erase_s=erase_s), Account()
    only_said = replace(RECEIVER, begin=Conversation(b"load\n", within_s=3.0), how=How(start_s=25))
    assert run(target, receiver=only_said, account=account).evidence == "receiver"
    assert [(b.state, b.hazard_s) for b in account.barriers] == [("erasing", 28), ("erased", 0)]
    # Where an answer is waited for that comes later than that: it fails, the journal knows, and the erase ends in peace.
    target, account = ErasesAtLoad(erase_s=erase_s), Account()
    with pytest.raises(TransferFailed, match=r"xmodem\.begin"):
        run(target, receiver=replace(only_said, begin=Conversation(b"load\n", "send it now", 3.0)), account=account)
    assert [b.state for b in account.barriers] == ["erasing"]
    assert (target.flash, target.resets) == (b"", 2)


def test_nothing_is_noted_before_the_receiver_asks_where_nobody_tells_it_to() -> None:
    target, account = OwnBootloader(), Account()
    receiver = replace(RECEIVER, begin=Conversation(), how=How(start_s=5))
    with pytest.raises(TransferFailed, match=r"did not ask for the first block \(C or NAK\) within 5 s; nothing came"):
        run(target, receiver=receiver, account=account)
    assert account.barriers == []
    assert target.flash == b"old application"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enter": Conversation(b"y", "boot> ", 3.0)}, "xmodem.enter: 'boot> ' did not come within 3 s; it said '.*press x"),
        ({"begin": Conversation(b"lode\n", "send it now", 2.0)}, "xmodem.begin: 'send it now' did not come within 2 s"),
        ({"how": How(check="checksum", start_s=8)}, r"did not ask for the first block \(NAK\) within 8 s; \d+ other bytes"),
    ],
)
def test_what_goes_wrong_before_the_first_block(change: dict[str, Any], message: str) -> None:
    target = OwnBootloader()
    with pytest.raises(TransferFailed, match=message):
        run(target, receiver=replace(RECEIVER, **change))
    assert target.flash == b"old application"
    assert target.resets == 2, "released"


def test_an_image_that_the_bootloader_does_not_like() -> None:
    """Every block was acknowledged. That is no success."""
    with pytest.raises(TransferUnconfirmed, match=r"all 5 blocks were acknowledged, and then 'image good' did not come .*BAD"):
        run(OwnBootloader(), DATA[:-1] + b"?")


def test_without_words_of_success_nothing_is_begun() -> None:
    target = OwnBootloader()
    with pytest.raises(BadRequest, match=r"success\.expect"):
        run(target, receiver=replace(RECEIVER, success=Conversation()))
    assert target.resets == 1, "by the release"


def test_a_cancel_cancels_the_receiver() -> None:
    target, account = OwnBootloader(), Account()

    def cancel(_step: Any) -> None:
        if len(target.got) > 2000:
            raise Canceled("enough")

    with pytest.raises(Canceled):
        run(target, checkpoint=cancel, account=account)
    assert target.canceled
    assert [b.state for b in account.barriers] == ["erasing"]
    assert target.resets == 2


def test_a_receiver_that_dies_is_not_reset_while_it_may_be_erasing() -> None:
    target = OwnBootloader(erase_s=3.0)
    target.spoil = lambda there, _n, value: b"" if there and target.runs == "asking" else bytes([value])
    account = Account()
    with pytest.raises(TransferFailed, match="block 1 of 5 was not acknowledged, sent 2 times"):
        run(target, receiver=replace(RECEIVER, how=How(tries=2, answer_s=4)), account=account)
    block_s = 1029 * 10 / 115200
    assert [seconds for _, seconds in account.hazards] == pytest.approx([65, 0, 4 + block_s, 4 + block_s, 0])


def test_a_slow_erase_at_the_first_block() -> None:
    """Longer than a receiver asks again and than one answer is waited for: the block comes twice and counts once."""
    target = OwnBootloader(erase_s=6.0)
    result = run(target, receiver=replace(RECEIVER, how=How(answer_s=4)))
    assert target.flash[: len(DATA)] == DATA
    assert result.evidence == "receiver"


def test_other_words_of_the_configuration() -> None:
    target = OwnBootloader(baud=57600)
    receiver = replace(RECEIVER, baud=57600, reset_after=False, how=How(block=128, pad=0x1A))
    result = run(target, receiver=receiver, application_baud=9600)
    assert target.flash == DATA + b"\x1a" * (-len(DATA) % 128)
    assert (result.boot, target.resets) == (None, 1)


def test_a_target_without_reset() -> None:
    target = OwnBootloader()
    with pytest.raises(LineUnavailable, match=r"xmodem\.reset"):
        run(target, wiring=Wiring())
    target.set_lines(0, nrst=False)
    target.set_lines(1000, nrst=True)
    result = run(target, wiring=Wiring(), receiver=replace(RECEIVER, reset=False))
    assert result.evidence == "receiver"
    assert target.runs == "prompt"


def test_holes_are_filled_and_have_a_limit() -> None:
    body = good_image(600)
    whole = Image.of([(0x08000000, body[:100]), (0x08000000 + 110, body[110:])])
    target = OwnBootloader()
    with pytest.raises(TransferUnconfirmed):
        run(target, image=whole)
    assert target.flash[:600] == body[:100] + b"\xff" * 10 + body[110:]
    with pytest.raises(ImageTooLarge):
        run(OwnBootloader(), image=Image.of([(0, b"1"), (0x08000000, b"2")]))


def test_the_application_must_live_afterwards() -> None:
    target = OwnBootloader()
    health = Conversation(b"", "hello", 4.0)
    with pytest.raises(Unhealthy, match="'hello' did not come"):
        run(target, health=health)
    assert run(OwnBootloader(), health=Conversation(b"", "running", 4.0)).health == "passed"


@settings(max_examples=150, deadline=None)
@given(
    hits=st.lists(
        st.tuples(
            st.booleans(), st.integers(0, 7000), st.sampled_from(["lose", "flip", "double", "random"]), st.integers(0, 255)
        ),
        max_size=12,
    ),
    crc=st.booleans(),
    block=st.sampled_from([128, 1024]),
    hasty=st.booleans(),
    buffered=st.booleans(),
)
def test_any_hit_byte_ends_in_the_right_image_or_a_typed_error(
    hits: list[tuple[bool, int, str, int]], crc: bool, block: int, hasty: bool, buffered: bool
) -> None:
    """Each byte of the whole dialogue may be lost, changed, doubled or accompanied, several of them in one transfer."""
    by_place = {(there, n if there else n % 400): (how, value) for there, n, how, value in hits}

    def spoil(there: bool, n: int, value: int) -> bytes:
        how, other = by_place.get((there, n), ("", 0))
        return {
            "lose": b"",
            "flip": bytes([value ^ (1 << other % 8)]),
            "double": bytes([value, value]),
            "random": bytes([value, other]),
        }.get(how, bytes([value]))

    target = OwnBootloader(crc=crc, spoil=spoil, hasty=hasty)
    receiver = replace(RECEIVER, how=How(block=block, answer_s=3.0, start_s=20.0))
    try:
        result = run(target, receiver=receiver, buffered=buffered)
    except (TransferFailed, TransferUnconfirmed):
        return
    assert result.evidence == "receiver"
    assert target.flash[: len(DATA)] == DATA


BLOCK_BYTES = 1029
BEFORE_BLOCKS = len(b"xload\n")


def spoiler(noise_before: dict[int, bytes], hit_blocks: tuple[int, ...]) -> Callable[[bool, int, int], bytes]:
    """Noise in front of frames, and frames that are hit, both counted from 0 as they go over the wire."""

    def spoil(there: bool, n: int, value: int) -> bytes:
        frame, at = divmod(n - BEFORE_BLOCKS, BLOCK_BYTES)
        if not there or n < BEFORE_BLOCKS:
            return bytes([value])
        return (noise_before.get(frame, b"") if at == 0 else b"") + bytes([value ^ (at == 500 and frame in hit_blocks)])

    return spoil


def text_image(count: int) -> bytes:
    """What a receiver that starts in the middle of it takes for no block, no end and no cancel."""
    body = bytes(random.Random(3).randrange(0x20, 0x7F) for _ in range(count - 8))
    return struct.pack("<II", zlib.crc32(body), len(body)) + body


@pytest.mark.parametrize("baud", [1200, 9600, 115200])
@pytest.mark.parametrize(
    ("noise_before", "hit_blocks"),
    [({1: b"\0"}, ()), ({1: b"\0"}, (5,)), ({1: b"\0" * 12}, (3, 4)), ({1: b"\0", 5: b"\0\0\0"}, (1, 6)), ({}, (2, 6))],
)
def test_an_answer_while_a_block_is_still_going_out_is_not_its_own(
    baud: int, noise_before: dict[int, bytes], hit_blocks: tuple[int, ...]
) -> None:
    """A receiver that refuses noise at once. Its NAK once was taken for the block's, which went twice, and each answer counted
    for the block after it from then on: with the last block hit, that one was missing, and all of them acknowledged."""
    data = good_image(6 * 1024)
    target = OwnBootloader(baud=baud, hasty=True, spoil=spoiler(noise_before, hit_blocks))
    account = Account()
    result = run(target, data, buffered=True, account=account, application_baud=baud)
    assert (result.evidence, target.flash) == ("receiver", data)
    sent = account.all.bytes_out - BEFORE_BLOCKS - 1
    assert sent == BLOCK_BYTES * (6 + len(hit_blocks)), "what was hit goes again, and nothing else"


@pytest.mark.parametrize("hasty", [False, True])
@pytest.mark.parametrize("erase_s", [10.05, 10.3, 10.9, 11.5])
def test_an_answer_that_comes_while_the_second_copy_is_going_out(erase_s: float, hasty: bool) -> None:
    """Whatever is said to the copy belongs to it, and not to the next block: here the rest of it, which comes as noise."""
    data = text_image(4 * 1024)
    target = OwnBootloader(baud=9600, erase_s=erase_s, hasty=hasty, spoil=spoiler({}, (4,)))
    account = Account()
    result = run(target, data, buffered=True, account=account, application_baud=9600)
    assert (result.evidence, target.flash) == ("receiver", data)
    assert account.all.bytes_out - BEFORE_BLOCKS - 1 == BLOCK_BYTES * 6, "the first and the last block twice"


def test_a_line_that_hits_one_block_in_ten_carries_it() -> None:
    good = 0
    for seed in range(20):
        rng = random.Random(seed)

        def spoil(_there: bool, n: int, value: int, rng: random.Random = rng) -> bytes:
            return bytes([value ^ 4 if n > 200 and rng.randrange(10_000) == 0 else value])

        target = OwnBootloader(spoil=spoil)
        result = run(target, good_image(30_000))
        good += result.evidence == "receiver"
    assert good == 20


# --- a real session process and lrzsz


def own_bootloader_on(master: int, directory: Path) -> None:
    """At its prompt it starts ``rx`` on the very line, and looks afterwards at what came."""
    heard = bytearray()
    os.write(master, b"\r\npress x\r\n")
    while not heard.endswith(b"load\n"):
        heard += os.read(master, 1)
        if heard.endswith(b"x"):
            os.write(master, b"boot> ")
    os.write(master, b"send it now\r\n")
    # Through pipes: on the line itself rx would change the settings of the session's port, which is the other end of a pty.
    rx = [require_tool("rx", "lrzsz"), "-c", "got"]
    with subprocess.Popen(rx, stdin=PIPE, stdout=PIPE, stderr=subprocess.DEVNULL, cwd=directory, bufsize=0) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        way = {master: program.stdin.fileno(), program.stdout.fileno(): master}
        while program.poll() is None:
            for source in select.select(list(way), [], [], 0.1)[0]:
                os.write(way[source], os.read(source, 4096))
    crc, size = struct.unpack_from("<II", (directory / "got").read_bytes())
    good = zlib.crc32((directory / "got").read_bytes()[8 : 8 + size]) == crc
    os.write(master, b"\r\nimage good\r\n" if good else b"\r\nimage BAD\r\n")


def test_a_session_process_and_rx_on_a_pty(tmp_path: Path) -> None:
    require_tool("rx", "lrzsz")
    master, slave = os.openpty()
    tty.setraw(slave)
    data = good_image(40_000)

    def words(talk: Conversation) -> config.Talk:
        return config.Talk(talk.send.decode(), talk.expect, 10.0)

    own = config.Xmodem(reset=False, enter=words(RECEIVER.enter), begin=words(RECEIVER.begin), success=words(RECEIVER.success))
    port = config.Target(port=os.ttyname(slave), xmodem=own, application=config.Application(listen_s=0))
    thread = threading.Thread(target=own_bootloader_on, args=(master, tmp_path))
    barriers: list[str] = []

    async def main() -> tuple[dict[str, Any], str]:
        async def barrier(state: str, _hazard_s: float, _kept: bytes) -> None:
            barriers.append(state)

        target = Target("bench", port)
        await target.open()
        assert await target.wait_idle_hardware(5), target.reason
        thread.start()
        try:
            async with asyncio.timeout(60):
                image = Image.of([(0, data)])
                return await target.run("xmodem", {}, image, job_id="job-1", on_barrier=barrier), target.last_trace
        finally:
            await target.close()

    try:
        result, recording = asyncio.run(main())
        thread.join(10)
        assert (tmp_path / "got").read_bytes()[: len(data)] == data
    finally:
        os.close(master)
        os.close(slave)
    assert (result["evidence"], result["bytes_written"], result["boot"]) == ("receiver", 40_000, None)
    assert barriers == ["erasing", "erased"]
    assert "session xmodem" in recording
    assert "send it now" in "".join(chr(b) for b in bytes_received(recording)), "the dialogue is on the recorder"
    assert trace.decode(recording) is not None


def bytes_received(recording: str) -> bytes:
    lines = [line.partition("< ")[2] for line in recording.splitlines() if "< " in line]
    return b"".join(bytes.fromhex(line) for line in lines)
