"""A conversation with one loader that outlives its accidents: each command is repeated by the cheapest step that suffices.

What can go wrong on a wire, and what is done, from cheap to dear, each bounded:

1. NACK: the loader is at a command boundary again, so the command is sent once more. Refused twice, it may be the rate:
   a reset. Refused again, it is meant.
2. Silence or garbage: nobody knows what the loader waits for. Reset into the loader and synchronise (with NRST), or fill the
   command up until it is refused (without; the loader has no time-out between bytes).
3. Nothing helps at any rate: power cycle, where there is a power line.

Writing is never repeated blindly: after any accident in a Write Memory the block is read. Equal: it had worked. Blank: it had
not, and is written again. Anything else is ``Dirty``: the caller erases the sector and writes its blocks anew. A word of ECC
flash is thus never programmed twice, and a loader that falls silent while reading such a block (an ECC fault in its own read)
is not asked twice.

After an erase the loader must answer once more before the hazard ends: a byte of noise can look like an ACK or a NACK while the
flash is still at work, and a reset then would be the one thing that P9 forbids. Flows without I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from bridged import chips
from bridged.chips.model import Chip, Sector
from bridged.errors import (
    EraseTimeout,
    Garbled,
    LoaderError,
    Nack,
    NoReply,
    NotErased,
    SecondStageFailed,
    UnstableLink,
    VerifyError,
    WrongChip,
    WrongSector,
)
from bridged.events import Retried, Warned
from bridged.protocol import an3155
from bridged.protocol.an3155 import Loader, Timing
from bridged.protocol.flow import Checkpoint, Drain, Flow, Hazard, Now, Pause, Receive, Report
from bridged.target.entry import Connected, enter, not_configured
from bridged.target.request import Request, Result
from bridged.target.speed import VOLTAGE_ADDRESS, lower_baud, too_many, voltage_code

T = TypeVar("T")

TRIES = 4  # Of one command. A single accident needs two; a third and fourth are for a link that is bad altogether.
TORN_TRIES = 2  # Of reading what may be torn: each costs a silence and a reset, and once more would change nothing.
NACKS = 3  # The same refusal three times, once after a reset, is the loader's word.
RECOVERIES = 40  # Of one session: a link that needs more is reported instead of nursed for hours.
PROOFS = 6
CHECKSUM_S = 0.5  # No document says how long a target may compute; its CRC unit takes a word in a few cycles.
CHECKSUM_S_PER_BYTE = 2e-6
STALE_QUIET_S = 0.005
# Twice the worst case that is known, and never less than this: worn flash goes beyond its data sheet (users report 6 to 10 s
# for one sector of an H743), and many times in the table are from memory. Giving up early is the one wrong thing to do here.
ERASE_LEAST_S = 5.0
SLOW_ERASE_LEAST_S = 25.0
SLOW_SECTOR_S = 0.5


def erase_wait_s(sectors: Iterable[Sector]) -> float:
    """How long an erase of ``sectors`` is waited for, and how long nobody may reset the target meanwhile (P9)."""
    worst = [s.erase_max_s for s in sectors]
    least = SLOW_ERASE_LEAST_S if max(worst, default=0) >= SLOW_SECTOR_S else ERASE_LEAST_S
    return max(least, 2 * sum(worst))


def different(address: int, expected: bytes, found: bytes) -> VerifyError:
    """The error for two readings of the same length that are not equal, from ``address`` on."""
    at = next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
    wrong = sum(a != b for a, b in zip(expected, found, strict=True))
    return VerifyError(
        f"flash differs at {address + at:#010x}: expected {expected[at]:02x}, found {found[at]:02x} "
        f"({wrong} of the {len(found)} bytes from {address:#010x} differ)",
        address=address + at,
        expected=expected[at],
        found=found[at],
        wrong_bytes=wrong,
    )


def not_erased(sector: Sector, address: int, count: int) -> NotErased:
    """The error for a sector that is not blank after its erase was acknowledged."""
    return NotErased(
        f"sector {sector.code}: its erase was acknowledged, and the {count} bytes at {address:#010x} are not blank",
        sector=sector.code,
        address=address,
    )


def wrong_sector(sector: Sector, address: int) -> WrongSector:
    """The error for an erase of ``sector`` that changed something beside it."""
    return WrongSector(
        f"sector {sector.code} ({sector.address:#010x}..{sector.end - 1:#010x}) was erased and {address:#010x} "
        "outside of it changed",
        sector=sector.code,
        address=address,
    )


class Dirty(Exception):
    """A block that holds neither what was written nor blank bytes; only an erase of its sector helps."""

    def __init__(self, address: int, why: str) -> None:
        super().__init__(why)
        self.address = address
        self.why = why


class Dialogue:
    """See the module docstring. ``may_reset``: cleared where a reset would lose the way back (P10, ``entry=one-shot``).
    ``erasing``: the job has begun to erase. ``pid`` is what was heard once until ``confirm`` settles it."""

    def __init__(self, request: Request, result: Result, connected: Connected) -> None:
        self.request = request
        self.result = result
        self.pid = connected.pid
        self.loader: Loader = connected.loader
        self.timing: Timing = connected.timing
        self.baud = connected.baud
        self.may_reset = request.wiring.has_reset or request.wiring.has_power
        self.erasing = False
        self._settled = False
        self.recoveries = 0  # Accidents so far; a refusal that is meant begins as one.
        self.mended = 0  # Commands that did in the end what they should.
        self._reconnections: list[float] = []  # At this rate: when.
        self._wide = 0

    @property
    def chip(self) -> Chip | None:
        """The row of ``pid``; None where it is in no table."""
        return chips.CHIPS.get(self.pid)

    # --- commands -------------------------------------------------------------------------------------------------

    def read(
        self, address: int, count: int, *, nacks: int = NACKS, first: LoaderError | None = None, tries: int = TRIES
    ) -> Flow[bytes]:
        """Read Memory, repeated where needed. ``nacks``: how many refusals of address or length are believed.

        ``first``: how the first attempt ended, if it was made already.
        """
        make = partial(an3155.read_memory, address, count)
        return (yield from self._again("read", lambda: make(self.timing), nacks, first, tries))

    def read_twice(self, address: int, count: int, *, nacks: int = NACKS, tries: int = TRIES) -> Flow[bytes]:
        """The same until two readings in a row agree: for facts on which the rest hangs, since an answer has no checksum."""
        before: bytes | None = None
        for _ in range(TRIES):
            data = yield from self.read(address, count, nacks=nacks, tries=tries)
            if data == before:
                return data
            before = data
        raise UnstableLink(f"{TRIES} readings of {count} bytes at {address:#010x} all differ", address=address)

    def read_torn(self, address: int, count: int) -> Flow[bytes | None]:
        """The same of flash that may be half written or half erased, and that the job can do without: None where it cannot be
        read. A word of ECC flash that was torn faults the loader's own read, and it is silent until a reset, each time anew."""
        if self.chip is None or not self.chip.ecc:
            return (yield from self.read_twice(address, count))
        try:
            return (yield from self.read_twice(address, count, tries=TORN_TRIES))
        except (NoReply, Garbled) as error:
            yield from self.revive(error)
            return None
        except Nack:  # No torn word: a stray byte on the line shifts every command, which takes more tries to mend.
            return (yield from self.read_twice(address, count))

    def revive(self, error: LoaderError) -> Flow[None]:
        """After reading was given up by ``error``: was it a matter of the link? Raises ``UnstableLink`` where it was."""
        yield from self._accident("read", error)
        yield from self.reconnect()
        yield from self.prove(error)

    def get_version(self) -> Flow[None]:
        """The shortest command that answers with data, repeated where needed."""
        yield from self._again("get version", lambda: an3155.get_version(self.timing))

    def prove(self, refusal: LoaderError) -> Flow[None]:
        """A refusal or silence is only believed on a link that carries commands. Raises ``UnstableLink`` where it does not."""
        for _ in range(PROOFS):
            try:
                yield from an3155.get_id(self.timing)
            except LoaderError as error:
                raise UnstableLink(f"{refusal.message}; and so is Get ID: {error.message}", **refusal.facts) from error

    def checksum(self, address: int, count: int) -> Flow[int]:
        """Get Checksum of whole words, computed on the target; repeated where needed."""
        make = partial(an3155.get_checksum, address, count, compute_s=CHECKSUM_S + count * CHECKSUM_S_PER_BYTE)
        return (yield from self._again("checksum", lambda: make(self.timing)))

    def confirm(self) -> Flow[None]:
        """Get and Get ID until they answer twice the same: they decide what is erased, and their answers have no checksum.

        Raises ``WrongChip`` where that is not the part that is configured, or that was confirmed before.
        """
        seen = self.pid, self.loader
        for _ in range(TRIES):
            pid = yield from self._again("get id", lambda: an3155.get_id(self.timing))
            loader = yield from self._again("get", lambda: an3155.get(self.timing))
            if (pid, loader) == seen:
                self._settle(pid, loader)
                return
            yield from self._told("identify", f"product id {seen[0]:#05x} and then {pid:#05x}, or the commands differ")
            seen = pid, loader
        raise UnstableLink(f"Get and Get ID answer differently each time, last {seen[0]:#05x}", pid=seen[0])

    def _settle(self, pid: int, loader: Loader) -> None:
        if self._settled and pid != self.pid:
            raise self._another(pid)
        configured = chips.find(self.request.chip) if self.request.chip else None
        if configured and configured.pid != pid:
            raise not_configured(configured, pid)
        self.pid, self.loader, self._settled = pid, loader, True
        self.result.pid = pid

    def _another(self, pid: int) -> WrongChip:
        return WrongChip(
            f"product id {self.pid:#05x} was being worked on, and then {pid:#05x} answered twice", expected=self.pid, found=pid
        )

    def read_all(self, queue: deque[tuple[int, int]], take: Callable[[int, bytes], Flow[bool]]) -> Flow[None]:
        """``an3155.read_blocks`` to the end of ``queue``, or until ``take`` ends it."""
        wanted = True

        def taken(address: int, data: bytes) -> Flow[bool]:
            nonlocal wanted
            wanted = yield from take(address, data)
            return wanted

        while queue and wanted:
            try:
                yield from an3155.read_blocks(queue, self.timing, taken)
            except (Nack, NoReply, Garbled) as error:
                address, count = queue[0]
                data = yield from self.read(address, count, first=error)
                if wanted:
                    queue.popleft()
                    yield from taken(address, data)

    def write_all(
        self, queue: deque[tuple[int, bytes]], written: Callable[[int], Flow[None]], *, ack_max_s: float, blank: int
    ) -> Flow[None]:
        """``an3155.write_blocks`` to the end of ``queue``, of blocks whose flash is erased.

        Raises ``Dirty`` when a block holds something else afterwards.
        """
        failed = 0
        while queue:
            address, data = queue[0]
            try:
                yield from an3155.write_blocks(queue, self.timing, written, ack_max_s=ack_max_s)
                return
            except (Nack, NoReply, Garbled) as error:
                failed = failed + 1 if queue[0][0] == address else 1
                address, data = queue[0]
                if failed == TRIES:
                    raise
                yield from self._accident("write", error)
                if not isinstance(error, Nack) or failed > 1:
                    yield from self.reconnect(keep_out=data)
            found = yield from self._look(address, len(data))
            if found == data:
                queue.popleft()
                yield from written(len(data))
            elif found.count(blank) != len(found):
                raise Dirty(address, f"the block at {address:#010x} is neither written nor blank")

    def to_ram(self, address: int, data: bytes) -> Flow[None]:
        """Write ``data`` to RAM until all of it reads back: a wrong byte in it would be executed. RAM takes a block twice, and
        what a reset in between did to it shows in the reading. Raises ``SecondStageFailed`` when it does not hold."""
        data += bytes(-len(data) % 4)
        todo = [(at, data[at : at + an3155.MAX_BLOCK]) for at in range(0, len(data), an3155.MAX_BLOCK)]
        blocks = tuple(todo)
        for _ in range(TRIES):
            for at, block in todo:
                make = partial(an3155.write_memory, address + at, block)
                yield from self._again("upload", lambda make=make: make(self.timing))  # type: ignore[misc]
            before, todo = self.recoveries, []
            for at, block in blocks:
                if (yield from self.read(address + at, len(block))) != block:
                    todo.append((at, block))
            if not todo and self.recoveries == before:
                return
        raise SecondStageFailed(f"{len(data)} bytes written to RAM at {address:#010x} do not read back, {TRIES} times in a row")

    def _enter_again(self, baud: int) -> Flow[Connected]:
        """Into the loader once more, and the supply told anew, which every reset forgets."""
        for attempt in range(TRIES):
            connected = yield from enter(self.request, self.result, baud)
            if not self._wide:
                break
            self.timing = connected.timing
            try:
                yield from self._tell_supply(self._wide)
                break
            except (NoReply, Garbled) as error:
                if attempt == TRIES - 1:
                    raise
                yield from self._accident("supply", error)
        return connected

    def _enter_the_same(self, baud: int, other: int) -> Flow[Connected]:
        """``other`` answered, which was another part before, or one flipped bit: believed when it answers again."""
        for _ in range(TRIES):
            yield from self._told("identify", f"product id {self.pid:#05x}, and after a reset {other:#05x}")
            connected = yield from self._enter_again(baud)
            if connected.pid == self.pid:
                return connected
            if connected.pid == other:
                raise self._another(other)
            other = connected.pid
        raise UnstableLink(f"Get ID answers differently after each reset, last {other:#05x}", pid=other)

    def use_supply(self) -> Flow[None]:
        """Have the loader program and erase as wide as the stated supply allows (F2, F4, F7; AN2606); a refusal is noted."""
        code = voltage_code(self.request, self.chip) if self.chip else 0
        if code:
            self._wide = code
            yield from self._again("supply", lambda: self._tell_supply(code))
            self.result.supply_range = self._wide

    def _tell_supply(self, code: int) -> Flow[None]:
        for last in (False, True):  # One refusal may be an accident, and would cost all the rest of the session.
            try:
                # Four bytes, the reserved ones 0xFF: 1 to 4 are allowed, and all else is written by whole words.
                yield from an3155.write_memory(VOLTAGE_ADDRESS, bytes((code, 0xFF, 0xFF, 0xFF)), self.timing)
                return
            except Nack as error:
                if last:
                    self._wide = self.result.supply_range = 0
                    yield Report(Warned("SUPPLY_REFUSED", f"the loader programs 8 bits at a time: {error.message}"))

    def _look(self, address: int, count: int) -> Flow[bytes]:
        """Read a block after an accident while it was written: once, for the loader may stumble over it (ECC)."""
        try:
            return (yield from an3155.read_memory(address, count, self.timing))
        except (Nack, NoReply, Garbled) as error:
            yield from self._accident("look", error)
            yield from self.reconnect()
            raise Dirty(
                address, f"the block at {address:#010x} cannot be read after it was written: {error.message}"
            ) from error

    def erase(self, command: Callable[[Timing], Flow[None]], wait_s: float, early_s: float = 0.0) -> Flow[None]:
        """An erase command, which may be repeated at will, and the proof that it has ended (P9).

        ``early_s``: how long the flash may still work when the loader has answered. Then no answer proves anything, also to
        other commands, and this time passes whatever came.
        """
        for attempt in range(TRIES):
            try:
                return (yield from self._erase_once(command, wait_s, early_s))
            except (Nack, NoReply, Garbled, EraseTimeout) as error:
                # A second erase that never answers is no accident of the wire.
                if attempt == TRIES - 1 or (isinstance(error, EraseTimeout) and attempt):
                    raise
                if isinstance(error, Nack) and attempt >= NACKS - 1:
                    raise
                if not self.may_reset and not isinstance(error, Nack):
                    raise  # What is sent next could fill up a list of sectors, and name others.
                yield from self._accident("erase", error)
                if not isinstance(error, Nack) or attempt:
                    yield from self.reconnect()
        raise AssertionError("the last attempt returns or raises")

    def _erase_once(self, command: Callable[[Timing], Flow[None]], wait_s: float, early_s: float) -> Flow[None]:
        begun: float = yield Now()
        trouble: LoaderError | None = None
        try:
            yield from command(self.timing)
        except EraseTimeout:
            raise  # The hazard ended by its time.
        except NoReply:
            yield Hazard(0)  # It never got as far as the list: the opcode was not answered.
            raise
        except (Nack, Garbled) as error:
            if error.facts.get("stage") in ("opcode", "stale"):
                raise  # Nothing was started, and no hazard declared.
            trouble = error
        if early_s:
            yield Pause(early_s)
        try:
            yield from an3155.get_version(self.timing)
        except LoaderError as silent:
            # It works, so what came was noise. Its own answer comes within the hazard; the bytes just sent were lost on it.
            now: float = yield Now()
            late: bytes = yield Receive(1, max(0.001, begun + wait_s - now))
            if late and late[0] == an3155.ACK:
                yield Drain(STALE_QUIET_S, 0.1)
                yield Hazard(0)
            raise (trouble or silent) from silent
        yield Hazard(0)
        if trouble is not None:
            raise trouble

    # --- recovery -------------------------------------------------------------------------------------------------

    def _again(
        self,
        step: str,
        make: Callable[[], Flow[T]],
        nacks: int = NACKS,
        first: LoaderError | None = None,
        tries: int = TRIES,
    ) -> Flow[T]:
        """``make()`` until it succeeds or has failed too often. ``first``: as in ``read``."""
        refused = 0
        for attempt in range(tries):
            try:
                if attempt == 0 and first is not None:
                    raise first
                answer = yield from make()
                self.mended += attempt > 0
                return answer
            except (Nack, NoReply, Garbled) as error:
                refused += isinstance(error, Nack)
                # At the opcode a stray byte may be the reason, which shifts every command by one until a reset.
                enough = NACKS if error.facts.get("stage") == "opcode" else nacks
                if attempt == tries - 1 or (isinstance(error, Nack) and refused >= enough):
                    raise
                yield from self._accident(step, error)
                if not isinstance(error, Nack) or refused > 1:
                    yield from self.reconnect()
        raise AssertionError("the last attempt returns or raises")

    def _accident(self, step: str, error: LoaderError) -> Flow[None]:
        self.recoveries += 1
        if self.recoveries > RECOVERIES:
            raise UnstableLink(
                f"{self.recoveries} accidents in one session, the last: {error.message}", accidents=self.recoveries
            ) from error
        yield from self._told(step, f"{error.code}: {error.message}")
        yield Checkpoint()

    def _told(self, step: str, reason: str) -> Flow[None]:
        yield Report(Retried(step, reason))

    def reconnect(self, *, keep_out: bytes = b"") -> Flow[None]:
        """Bring the loader back to a command boundary. ``keep_out``: content of a Write Memory that may be half received."""
        if self.may_reset:
            again_at = yield from self._rate()
            connected = yield from self._enter_again(again_at)
            if self._settled and connected.pid != self.pid:
                connected = yield from self._enter_the_same(again_at, connected.pid)
            self.pid = connected.pid
            if connected.baud != self.baud:
                self._reconnections.clear()
            self.loader, self.timing, self.baud = connected.loader, connected.timing, connected.baud
            self.result.baud = connected.baud
            return
        yield from an3155.resynchronise(self.timing, keep_out)

    def _rate(self) -> Flow[int]:
        """At which rate to reconnect: a lower one where this one makes too many errors."""
        now: float = yield Now()
        self._reconnections.append(now)
        lower = lower_baud(self.baud, self.request, self.chip)
        if lower == self.baud or not too_many(self._reconnections):
            return self.baud
        yield from self._told("rate", f"{len(self._reconnections)} reconnections at {self.baud} baud: on at {lower}")
        self.result.fails_at(self.baud)
        return lower


def pieces(start: int, end: int, most: int) -> Iterable[tuple[int, int]]:
    """Address and length of the commands that read a range, when one reads at most ``most`` bytes."""
    return ((at, min(most, end - at)) for at in range(start, end, most))
