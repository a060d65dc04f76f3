"""One simulated STM32 behind a UART and three lines: pins and bytes with times in, bytes with times out.

No I/O, no clock, no thread: whoever drives it (``virtual`` in virtual time, ``pty`` in real time) says what happens on the
wire and when, in integer nanoseconds that never go back, and asks what the device sends. The same inputs and seed give the
same outputs.

What the silicon does and a kind model would not:

- The receiver holds one byte. While the loader erases, programs or sends, the first byte waits in the data register and
  every further one is lost (``stats.overruns``).
- The rate is measured on the first byte after a reset and never again. By software (F0-F4, F7, L0-L4) it is off by a
  different amount after every reset; any byte but 0x7F, any glitch, leaves the loader deaf until the next one.
- No time-out: a loader that waits for a byte waits for ever.
- A reset cuts what goes on. Cut erases and option-byte writes leave damage behind, and are recorded as hazards.

One part with one state, so one file; what runs in it is in ``loader`` and ``firmware``.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from enum import Enum

from bridged.chips.model import Chip, Quirk
from bridged.sim.application import Application, Behaviour, has_stack_pointer, load
from bridged.sim.boot import Pins, Start, choose_bank, decide
from bridged.sim.faults import ByteFault, Fault, Faults
from bridged.sim.loader import ACK, Kind, Leave, Loader, Request, Stats, Timing, Work, protocol_version
from bridged.sim.memory import Memory, pattern_number
from bridged.sim.wire import Burst, Format, hear

# Worst error of the measured rate at 115200 (AN2606), smaller in proportion at lower rates.
_SOFTWARE_ERROR = {"F0": 0.01, "F1": 0.03, "F2": 0.05, "F3": 0.02, "F4": 0.06, "F7": 0.06, "L0": 0.02, "L1": 0.03, "L4": 0.05}
_SOFTWARE_ERROR_ELSE = 0.03
_LOWEST_BAUD = 1200
_HARDWARE_BAUD = 1_000_000
_SHORTEST_RESET_NS = 20_000  # data sheets: a shorter pulse need not reset anything


class Mode(Enum):
    OFF = "off"
    RESET = "reset"
    STARTING = "starting"
    MEASURING = "measuring"  # the loader waits for the first byte
    LOADER = "loader"
    DEAF = "deaf"  # the loader measured a wrong rate
    APPLICATION = "application"
    DEAD = "dead"  # HardFault, nothing to start, or a hung loader


class Device:
    """See the module docstring. ``flash_bytes`` None: the largest part; ``layout`` and ``loader_id`` likewise the table's."""

    def __init__(
        self,
        chip: Chip,
        *,
        flash_bytes: int | None = None,
        layout: str | None = None,
        loader_id: int | None = None,
        seed: int = 0,
        timing: Timing | None = None,
        faults: Iterable[Fault | str] = (),
        application: Behaviour | None = None,
        options: Mapping[str, int] | None = None,
        protocol: int | None = None,
        checksum: bool = False,
        extended_special: bool = False,
        rate_error: float | None = None,
        max_baud: int | None = None,
        rdp: int = 0,
        powered: bool = True,
        on_go: Callable[[Device, int], None] | None = None,
        ecc_faults: bool = False,
    ) -> None:
        """``rate_error``: fixed error of the measured rate (0.05 = 5 %) instead of one drawn at each reset.

        ``options``: option bits by name, over the factory values. ``on_go``: called when Go jumps into RAM, where nothing is
        executed otherwise. ``checksum``: the loader has command 0xA1. ``ecc_faults``: as in ``Memory``.
        """
        self.chip = chip
        self.rng = random.Random(seed)
        self.timing = timing or Timing()
        self.faults = Faults(faults)
        self.behaviour = application or Behaviour()
        self.stats = Stats()
        if loader_id is None and chip.loader_ids:
            loader_id = max(chip.loader_ids)
        self.loader_id = loader_id
        self.protocol = protocol_version(chip.usart_protocol) if protocol is None else protocol
        flash = chip.flash_map(flash_bytes or chip.flash_max_bytes, layout)
        self.memory = Memory(chip, flash, loader_id, self.rng, ecc_faults=ecc_faults)
        for name, value in (options or {}).items():
            self.memory.set_option(name, value)
        self.memory.set_rdp(rdp)
        self.now_ns = 0
        self.mode = Mode.OFF
        self.why = ""  # why it is deaf or dead, for people
        self.baud = 0.0  # the measured rate
        self._checksum = checksum
        self._extended_special = extended_special
        self._rate_error = rate_error
        self._max_baud = max_baud
        self._on_go = on_go
        self._nrst, self._boot0, self._boot1, self._power = True, False, False, False
        self._reset_ns = 0
        self._power_boots = 0
        self._empty = False
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._sequence = 0
        self._output: deque[Burst] = deque()
        # --- the loader
        self._loader: Loader | None = None
        self._run: Generator[Request, bytes, None] | None = None
        self._need = 0
        self._buffer = bytearray()
        self._held: tuple[int, bool] | None = None
        self._free_ns = 0  # when the loader has sent all and reads again
        self._work: tuple[Work, int] | None = None
        self._background: deque[tuple[Work, int]] = deque()
        # --- the application
        self._application: Application | None = None
        self._app_free_ns = 0
        self._app_since_ns = 0
        if powered:
            self.set_lines(0, power=True)

    # --- inputs ---------------------------------------------------------------------------------------------------

    def set_lines(
        self,
        at_ns: int,
        *,
        nrst: bool | None = None,
        boot0: bool | None = None,
        boot1: bool | None = None,
        power: bool | None = None,
    ) -> None:
        """Electrical levels from ``at_ns`` on; None leaves a line as it is. BOOT pins count when the reset ends."""
        self.advance(at_ns)
        self._boot0 = self._boot0 if boot0 is None else boot0
        self._boot1 = self._boot1 if boot1 is None else boot1
        old_power, old_nrst = self._power, self._nrst
        self._power = old_power if power is None else power
        self._nrst = old_nrst if nrst is None else nrst
        if not self._power:
            if old_power:
                self._stop("power loss")
                self.mode = Mode.OFF
                self.memory.wipe_ram()
            return
        if not old_power:
            self.stats.power_cycles += 1
            self._power_boots = 0
            self.mode = Mode.RESET
            self.memory.load_options()
            self._latch_empty()
            if self._nrst:
                self._start()
            return
        if old_nrst and not self._nrst:
            self._stop("reset")
            self.mode = Mode.RESET
            self._reset_ns = at_ns
            self.stats.resets += 1
        elif self._nrst and not old_nrst:
            if at_ns - self._reset_ns < _SHORTEST_RESET_NS:
                self.stats.faults.append(f"NRST low for {at_ns - self._reset_ns} ns only")
            self._start()

    def feed(self, data: bytes, start_ns: int, form: Format) -> None:
        """``data`` comes from the host, back to back from ``start_ns`` on, in the host's format."""
        hits = self.faults.next_bytes("rx", len(data))
        if not hits:
            self._feed(data, start_ns, form)
            return
        byte_ns = form.byte_ns
        at = 0
        for offset, fault in hits:
            self._feed(data[at:offset], start_ns + at * byte_ns, form)
            when = start_ns + offset * byte_ns
            at = offset + self._fault_in(fault, data[offset], when, form)
        self._feed(data[at:], start_ns + at * byte_ns, form)

    def _fault_in(self, fault: ByteFault, value: int, when: int, form: Format) -> int:
        """Carry out a fault at this byte; how many bytes of the host that used up."""
        end = when + form.byte_ns
        if fault.action == "insert":
            self._feed(bytes((fault.value,)), max(self.now_ns, when - form.byte_ns), form)
            return 0
        if fault.action == "flip":
            self._feed(bytes((value ^ fault.value,)), when, form)
            return 1
        if fault.action == "lose":
            self.stats.bytes_in += 1
            return 1
        self._feed(bytes((value,)), when, form)
        self.advance(end)
        if fault.action == "reset":
            self._system_reset()
        elif fault.action == "power":
            self.set_lines(max(end, self.now_ns), power=False)
        else:
            self._die("fault: hang")
        return 1

    def glitch(self, at_ns: int) -> None:
        """A short low pulse on the receive line, as some adapters make when their port is opened."""
        self.advance(at_ns)
        if self.mode is Mode.MEASURING:
            self._deafen("a glitch, or a byte half over when it began to listen, was measured")
        elif self.mode is Mode.LOADER:
            self._loader_byte(0x00, False, at_ns)

    def force_loader(self) -> None:
        """Start in the loader now, whatever the pins say: for hosts that control no lines."""
        self._stop("reset")
        self._start(Start(loader=True))

    # --- outputs --------------------------------------------------------------------------------------------------

    def collect(self, until_ns: int, receiver: Format | None = None) -> list[Burst]:
        """Let time pass until ``until_ns`` and take the bytes whose transmission is complete by then.

        What a ``receiver`` set otherwise cannot hear as it was sent comes as whole bursts only: where one byte ends and the
        next begins is for that receiver to find out (``wire.hear``).
        """
        self.advance(until_ns)
        taken: list[Burst] = []
        while self._output:
            burst = self._output[0]
            if receiver is not None and burst.end_ns > until_ns and not burst.format.agrees(receiver):
                break
            done, rest = burst.split(until_ns)
            if done is not None:
                taken.append(done)
            if rest is not None:
                self._output[0] = rest
                break
            self._output.popleft()
        return taken

    def next_ns(self) -> int | None:
        """When something happens next by itself (a byte is complete, an event), None if nothing ever will."""
        times = []
        if self._output:
            times.append(self._output[0].start_ns + self._output[0].byte_ns)
        if self._events:
            times.append(self._events[0][0])
        return min(times) if times else None

    def arrival_ns(self, count: int, receiver: Format | None = None) -> int | None:
        """When the host will have ``count`` more bytes, as far as is known now; else the next time to look again."""
        event = self._events[0][0] if self._events else None
        at = None
        for burst in self._output:
            at = burst.end_ns
            whole = receiver is not None and not burst.format.agrees(receiver)
            if whole or count <= len(burst.data):
                at = at if whole else burst.start_ns + count * burst.byte_ns
                break
            count -= len(burst.data)
        times = [when for when in (at, event) if when is not None]
        return min(times, default=None)

    def output_end_ns(self) -> int | None:
        """When the last byte that is being sent will be complete; None when nothing is."""
        return self._output[-1].end_ns if self._output else None

    @property
    def hazard(self) -> str:
        """``erase`` or ``option bytes`` while a reset would do damage, else empty."""
        works = [w for w, _ in self._background] + ([self._work[0]] if self._work else [])
        return next((w.kind.value for w in works if w.kind in (Kind.ERASE, Kind.OPTION)), "")

    @property
    def lines(self) -> dict[str, bool]:
        """Electrical levels of the pins."""
        return {"nrst": self._nrst, "boot0": self._boot0, "boot1": self._boot1, "power": self._power}

    def level(self, name: str) -> bool:
        """``safe`` or ``alive``: a pin of the application. While that does not run the pin floats, and is pulled low."""
        after_s = self.behaviour.safe_after_s if name == "safe" else self.behaviour.alive_after_s
        return self.mode is Mode.APPLICATION and (self.now_ns - self._app_since_ns) / 1e9 >= after_s

    # --- time -----------------------------------------------------------------------------------------------------

    def advance(self, to_ns: int) -> None:
        """Let time pass: everything that happens by itself until ``to_ns`` has happened."""
        events = self._events
        while events and events[0][0] <= to_ns:
            when, _, action = heapq.heappop(events)
            self.now_ns = max(self.now_ns, when)
            action()
        self.now_ns = max(self.now_ns, to_ns)

    def _at(self, when_ns: int, action: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (when_ns, self._sequence, action))

    def _emit(self, data: bytes, start_ns: int, form: Format) -> int:
        """Send ``data`` from ``start_ns`` on; when its transmission ends."""
        hits = self.faults.next_bytes("tx", len(data))
        if hits:
            changed = bytearray()
            for offset, value in enumerate(data):
                here = [fault for at, fault in hits if at == offset]
                changed += bytes(fault.value for fault in here if fault.action == "insert")
                if any(fault.action == "lose" for fault in here):
                    continue
                for fault in here:
                    value ^= fault.value if fault.action == "flip" else 0  # noqa: PLW2901
                changed.append(value)
            data = bytes(changed)
        if not data:
            return start_ns
        self.stats.bytes_out += len(data)
        burst = Burst(start_ns, form.byte_ns, data, form)
        self._output.append(burst)
        return burst.end_ns

    # --- reset and start ------------------------------------------------------------------------------------------

    def _stop(self, why: str) -> None:
        """Whatever goes on ends here and now."""
        for work, start in (*((self._work,) if self._work else ()), *self._background):
            span = work.duration_ns
            fraction = 0.5 if span is None else (self.now_ns - start) / span if span else 1.0
            if fraction < 0:
                continue  # queued behind another one in the background: not begun
            work.cut(min(fraction, 1.0))
            if work.kind in (Kind.ERASE, Kind.OPTION):
                self.stats.hazard_resets.append((self.now_ns, f"{why} during {work.kind.value}"))
        sent = self.collect(self.now_ns) if self._output and self._output[0].start_ns < self.now_ns else []
        self._output.clear()
        self._output.extend(sent)
        self._events.clear()
        self._background.clear()
        self._work = self._loader = self._run = self._application = self._held = None
        self._buffer.clear()
        self.memory.program_error = False

    def _latch_empty(self) -> None:
        self._empty = self.chip.empty_check and self.memory.blank(self.memory.base, self.memory.base + 4)

    def _start(self, start: Start | None = None) -> None:
        """The reset ends: the boot pins and option bits are latched."""
        self._power_boots += 1
        self.why = ""
        if start is None:
            pins = Pins(self._boot0, self._boot1)
            start = decide(pattern_number(self.chip), pins, self.memory.option, self._empty, self.memory.base)
            if self.chip.bank_choice and self.memory.option("BFB2") and start.address == self.memory.base:
                second = min((s.address for s in self.memory.map.sectors if s.bank == 2), default=None)
                start = choose_bank(self.memory.base, second, lambda bank: has_stack_pointer(self.memory, bank))
        if start.loader and self.memory.rdp == 2:
            start = Start(loader=False, address=self.memory.base)
        self.mode = Mode.STARTING
        if start.loader:
            delay = self.timing.startup_s
            delay = (self.chip.startup_s[0] if self.chip.startup_s else 0.005) if delay is None else delay
            self._at(self.now_ns + round(delay * 1e9), self._listen)
        elif start.address is None:
            self._die("nothing to start: the boot pins or option bits point at no memory")
        else:
            address = start.address
            self._at(self.now_ns + round(self.behaviour.startup_s * 1e9), lambda: self._start_application(address))

    def _listen(self) -> None:
        if self._has(Quirk.EMPTY_FLAG_CLEARED_BY_LOADER):
            self._empty = False
        if self._has(Quirk.EXTRA_RESET_AFTER_POWER_UP) and self._power_boots == 1:
            self._deafen("this loader version needs one more reset after power-up")
            return
        self.mode = Mode.MEASURING

    def _has(self, quirk: Quirk) -> bool:
        return any(q.quirk is quirk and (not q.loader_ids or self.loader_id in q.loader_ids) for q in self.chip.quirks)

    def _system_reset(self) -> None:
        self.stats.self_resets += 1
        self._stop("reset")
        self._start()

    def _option_reset(self) -> None:
        """The reset after an option-byte write: the option bytes are loaded again, and the empty flag with them."""
        self.memory.load_options()
        self._latch_empty()
        self._system_reset()

    def _die(self, why: str) -> None:
        self._work = self._loader = self._run = self._application = None
        self.mode, self.why = Mode.DEAD, why

    def _deafen(self, why: str) -> None:
        self.mode, self.why = Mode.DEAF, why

    def _start_application(self, address: int) -> None:
        loaded = load(self.memory, address, self.behaviour)
        if loaded is None:
            self._die(f"HardFault: no application at {address:#010x}")
            return
        self.mode, self._application = Mode.APPLICATION, loaded
        self._app_since_ns = self.now_ns
        self._app_free_ns = self._emit(loaded.start(), self.now_ns, self.behaviour.format)

    # --- bytes from the host --------------------------------------------------------------------------------------

    def _feed(self, data: bytes, start_ns: int, form: Format) -> None:
        self.stats.bytes_in += len(data)
        byte_ns = form.byte_ns
        count, at = len(data), 0
        while at < count:
            first_end = start_ns + (at + 1) * byte_ns
            if self.mode is Mode.STARTING and self._events and start_ns + at * byte_ns < self._events[0][0] < first_end:
                # The loader begins to listen in the middle of this byte: it measures nonsense.
                self.glitch(first_end)
                self.stats.ignored += 1
                at += 1
                continue
            self.advance(first_end)
            mode = self.mode
            if mode is Mode.LOADER:
                if not form.agrees(Format(self.baud, self.chip.parity)):
                    self._loader_garbled(Burst(start_ns + at * byte_ns, byte_ns, data[at:], form))
                    return
                at += self._loader_bytes(data, at, start_ns, byte_ns)
            elif mode is Mode.MEASURING:
                self._measure(data[at], form)
                at += 1
            elif mode is Mode.APPLICATION:
                self._application_bytes(Burst(start_ns + at * byte_ns, byte_ns, data[at:], form))
                at = count
            else:
                self.stats.ignored += 1
                at += 1

    def _measure(self, value: int, form: Format) -> None:
        if value != 0x7F:
            self._deafen(f"byte {value:#04x} was measured instead of 0x7f")
            return
        error = 0.0
        if self._rate_error is not None:
            error = self._rate_error
        elif not self.chip.hardware_autobaud:
            worst = _SOFTWARE_ERROR.get(self.chip.family, _SOFTWARE_ERROR_ELSE) * form.baud / 115200
            error = self.rng.triangular(-worst, worst, 0.0)
        top = self._max_baud or max(self.chip.max_baud, _HARDWARE_BAUD if self.chip.hardware_autobaud else 2 * 115200)
        if self._max_baud is None and self.chip.max_baud < 115200:
            top = self.chip.max_baud
        if not _LOWEST_BAUD <= form.baud <= top:
            self._deafen(f"{form.baud:.0f} baud cannot be measured")
            return
        self.baud = form.baud * (1 + error)
        self.stats.syncs += 1
        self.mode = Mode.LOADER
        self._loader = Loader(
            self.chip,
            self.memory,
            loader_id=self.loader_id,
            protocol=self.protocol,
            checksum=self._checksum,
            extended_special=self._extended_special,
            timing=self.timing,
            faults=self.faults,
            stats=self.stats,
            rng=self.rng,
            send=self._loader_send,
            background_busy=lambda: bool(self._background),
        )
        self._run = self._loader.run()
        self._free_ns = self.now_ns + round((self.timing.sync_reply_s - self.timing.reply_s) * 1e9)
        self._loader_send(bytes((ACK,)))
        self._resume(None)

    # --- the loader's side ----------------------------------------------------------------------------------------

    def _loader_send(self, data: bytes) -> None:
        if data:
            start = max(self.now_ns, self._free_ns) + round(self.timing.reply_s * 1e9)
            self._free_ns = self._emit(data, start, Format(self.baud, self.chip.parity))

    def _loader_bytes(self, data: bytes, at: int, start_ns: int, byte_ns: int) -> int:
        """Hand over bytes from ``at`` on, of which the first is complete now; how many are dealt with."""
        if self._work is not None or self.now_ns < self._free_ns:
            self._loader_byte(data[at], True, self.now_ns)
            return 1
        count = min(self._need - len(self._buffer), len(data) - at)
        self._buffer += data[at : at + count]
        self.advance(start_ns + (at + count) * byte_ns)
        if len(self._buffer) == self._need:
            self._complete()
        return count

    def _loader_garbled(self, burst: Burst) -> None:
        for heard in hear(burst, Format(self.baud, self.chip.parity)):
            self.advance(heard.at_ns)
            if self.mode is Mode.LOADER:
                self._loader_byte(heard.value, heard.good, heard.at_ns)

    def _loader_byte(self, value: int, good: bool, at_ns: int) -> None:
        """One byte in the receiver, at a time when the loader may be busy."""
        self.advance(at_ns)
        if not good:
            self.stats.parity_errors += 1
        working = self._work is not None
        if working or self.now_ns < self._free_ns:
            if self._held is None:
                self._held = (value, good)
                self.stats.overruns += working
                if not working:
                    self._at(self._free_ns, self._take_held)
            else:
                self.stats.overruns += 1
            return
        if self._loader is not None:
            self._loader.bad = self._loader.bad or not good
        self._buffer.append(value)
        if len(self._buffer) == self._need:
            self._complete()

    def _take_held(self) -> None:
        if self._held is not None and self._work is None and self.now_ns >= self._free_ns and self.mode is Mode.LOADER:
            (value, good), self._held = self._held, None
            self._loader_byte(value, good, self.now_ns)

    def _complete(self) -> None:
        block = bytes(self._buffer)
        self._buffer.clear()
        self._resume(block)

    def _resume(self, block: bytes | None) -> None:
        """Let the loader go on until it asks for something that is not there yet."""
        if self._run is None:
            return
        while True:
            request = next(self._run) if block is None else self._run.send(block)
            if isinstance(request, int):
                self._need = request
                break
            block = b""
            if isinstance(request, Leave):
                self._leave(request)
                return
            start = max(self.now_ns, self._free_ns)
            if not request.awaited:
                self._in_background(request, start)
                continue
            self._work = (request, start)
            self._free_ns = start
            if request.duration_ns is not None:
                self._at(start + request.duration_ns, self._work_done)
            return
        if self._held is not None:
            self._at(max(self.now_ns, self._free_ns), self._take_held)

    def _work_done(self) -> None:
        if self._work is None:
            return
        work, _ = self._work
        self._work = None
        self._free_ns = self.now_ns
        work.done()
        self._resume(b"")

    def _in_background(self, work: Work, start: int) -> None:
        if self._background:
            last, begun = self._background[-1]
            start = begun + (last.duration_ns or 0)
        self._background.append((work, start))
        if work.duration_ns is not None:
            self._at(start + work.duration_ns, self._background_done)

    def _background_done(self) -> None:
        work, _ = self._background.popleft()
        work.done()

    def _leave(self, request: Leave) -> None:
        # The last ACK still goes out; what follows comes after it.
        after = max(self.now_ns, self._free_ns)
        self._run = self._loader = None
        self._need = 0
        if request.how == "hang":
            self._die(request.why)
        elif request.how == "reset":
            self.mode = Mode.DEAD
            self._at(after, self._option_reset)
        else:
            self.mode = Mode.DEAD
            self._at(after, lambda: self._go(request.address))

    def _go(self, address: int) -> None:
        if self.memory.in_flash(address):
            self.mode = Mode.STARTING
            self._at(self.now_ns + round(self.behaviour.startup_s * 1e9), lambda: self._start_application(address))
        elif self._on_go is not None:
            self._on_go(self, address)
        else:
            self._die(f"jumped to RAM at {address:#010x}")

    # --- the application's side -----------------------------------------------------------------------------------

    def _application_bytes(self, burst: Burst) -> None:
        """Bytes for the application; it takes each when it is complete. A reset among them ends it, and them."""
        form = self.behaviour.format
        if burst.format.agrees(form):
            times = [(burst.start_ns + (at + 1) * burst.byte_ns, value) for at, value in enumerate(burst.data)]
        else:
            times = [(h.at_ns, h.value) for h in hear(burst, form) if h.good]
        for when, value in times:
            self.advance(when)
            app = self._application
            if app is None or app.triggered:
                self.stats.ignored += 1
                continue
            answer = app.receive(bytes((value,)))
            self._app_free_ns = self._emit(answer, max(self._app_free_ns, self.now_ns), form)
            if app.triggered:
                self._at(max(self._app_free_ns, self.now_ns), self._jump)

    def _jump(self) -> None:
        self._stop("reset")
        self._start(Start(loader=True))
