"""Into the ROM loader, and out of it into the application: the stages before and after the work of a session.

``enter`` gives a ``Connected``, which the next stages take, so that nothing can be called out of order. A failure here is what
most users meet first, so each error carries what a person at the board needs: attempts, pins, activation pattern. Flows without
I/O.

Documents: AN2606 (activation, start-up times, autobaud), AN3155 (Get, Get ID).
"""

from __future__ import annotations

from dataclasses import dataclass

from bridged import chips
from bridged.chips.model import Chip, Quirk
from bridged.errors import (
    ApplicationRunning,
    BaudUnavailable,
    BridgedError,
    ChipError,
    Garbled,
    LinkError,
    LoaderError,
    Loopback,
    Nack,
    NoReply,
    NoSync,
    NotSafeToStop,
    SyncNoise,
    Unhealthy,
    Unsupported,
    WrongChip,
    WrongParity,
)
from bridged.events import (
    Booted,
    Phase,
    PhaseStarted,
    Retried,
    StepDone,
    Synced,
    Warned,
)
from bridged.protocol import an3155
from bridged.protocol.an3155 import Loader, Timing
from bridged.protocol.flow import (
    DRAIN_BYTES,
    Checkpoint,
    Drain,
    Flow,
    Now,
    Overheard,
    Pause,
    Receive,
    Report,
    Send,
    SetFormat,
    SetLines,
)
from bridged.target.expect import Heard, printable, talk
from bridged.target.request import Boot, Request, Result
from bridged.target.speed import CHECK_BYTES, attempts, first_baud, must_prove

BANNER_BYTES = 256
NOISE_BYTES = 4  # As ``an3155.looks_like_text``.
POWER_OFF_S = 0.5
JUMP_S = 0.1
START_S, START_MOST_S = 1.0, 5.0  # Until an application that says nothing is taken to be up; twelve times in ENTER_LIMIT_S.
FIRST_WORDS_S = 0.2
STALE_QUIET_S = 0.001
STALE_DRAINS = 20  # The kernel holds up to 68 KiB of what a talkative application said while the session was being started.


@dataclass(frozen=True, slots=True)
class Connected:
    """A loader that answered Get and Get ID, each once so far.

    ``attempt`` counts from 1, ``wait_s`` is the time it had after its reset; ``already``: it had been synchronised before.
    """

    loader: Loader
    pid: int
    timing: Timing
    baud: int
    attempt: int = 1
    wait_s: float = 0.0
    already: bool = False
    junk: bytes = b""

    @property
    def chip(self) -> Chip | None:
        return chips.CHIPS.get(self.pid)


def phase_started(phase: Phase, total: int = 0) -> Flow[None]:
    yield Report(PhaseStarted(phase, total))


# --- into the loader and out of it --------------------------------------------------------------------------------


def _expected(request: Request) -> Chip | None:
    return chips.find(request.chip) if request.chip else None


def not_configured(chip: Chip, pid: int) -> WrongChip:
    """The error for another part than ``chip``, which is configured."""
    answered = chips.CHIPS.get(pid)
    return WrongChip(
        f"{chip.title} is configured, and product id {pid:#05x} answered" + (f" ({answered.title})" if answered else ""),
        expected=chip.pid,
        found=pid,
    )


def enter(request: Request, result: Result, again_at: int | None = None, *, erased: bool = False) -> Flow[Connected]:
    """Bring the target into its loader and confirm it with Get and Get ID, whose bytes have different parity bits.

    Each attempt starts from a fresh reset. A wrong rate shows as noise at the sync or as garbage at Get, and is answered with
    the next attempt, in the end at lower rates; application output ends it at once, an echo at the second time, because no
    retry mends wiring. Where there is a power line, all of it is tried once more after a power cycle. ``again_at``: see
    ``speed.attempts``; the phase of the job stays what it is then.

    Where only the application leads into the loader, it is asked to jump, the first time without a reset. ``erased``: it is not
    there any more; the target was left in its loader, and a reset would lose it.
    """
    chip = _expected(request)
    erased = erased and request.by_application
    planned = attempts(request, chip, again_at, erased=erased)
    try:
        return (yield from _try_all(request, result, chip, planned, again=again_at is not None))
    except (NoSync, SyncNoise, Garbled, NoReply, WrongParity) as error:
        if not request.wiring.has_power or request.one_shot or erased:
            raise
        yield Report(Retried("power", f"{error.code}: {error.message}"))
    yield SetLines(boot0=False, power=False)
    yield Pause(POWER_OFF_S)
    yield SetLines(power=True)
    return (yield from _try_all(request, result, chip, planned, again=True))


def _try_all(
    request: Request, result: Result, chip: Chip | None, planned: list[tuple[int, float]], *, again: bool
) -> Flow[Connected]:
    last: LoaderError | None = None
    told: LoaderError | None = None  # The most telling error: silence says less than noise.
    impossible: dict[int, BaudUnavailable] = {}
    failed: dict[int, bool] = {}  # Rate: whether more than silence was heard.
    safe, listened = first_baud(request, chip), False
    if not again:
        yield from phase_started(Phase.ACTIVATE)
    for number, (baud, wait_s) in enumerate(planned, start=1):
        if isinstance(last, SyncNoise | Garbled) and wait_s != planned[0][1]:
            continue  # It answered, so it was up: a longer wait changes nothing.
        if baud in impossible:
            continue
        yield Checkpoint()
        timing = Timing.at(baud)
        faster = baud > safe and not again
        try:
            if request.by_application:
                restart = request.wiring.can_restart and (again or number > 1)
                said = yield from _ask_to_jump(request, chip, baud, wait_s, restart=restart)
            else:
                form = SetFormat(baud, chip.parity if chip else "E")
                said = yield from _into_loader(request, form, wait_s, application=number == 1 and not again)
        except BaudUnavailable as error:
            impossible[baud], failed[baud] = error, True
            yield from _too_fast(baud, error)
            continue
        if not again:
            yield from phase_started(Phase.SYNC)
        try:
            connected = yield from _synchronise(timing, baud, number, wait_s, said, request)
            if not again and number < len(planned) and must_prove(baud, safe, connected.chip):
                yield from _believe(connected)
        except ApplicationRunning as error:
            if not request.by_application or number == len(planned):
                raise _explained(error, chip, request, number) from error
            last = told = error
            yield Report(Retried("sync", f"it was asked to jump into its loader and did not: {error.message}"))
        except LoaderError as error:
            failed[baud] = failed.get(baud, False) or not isinstance(error, NoSync)
            if not (listened or request.by_application) and _talks(said, error):
                listened = True
                yield from _hear_application(request, chip, wait_s + 2 * timing.sync_s, number)
            if faster:
                yield from _too_fast(baud, error)
                yield Drain(0.02, 0.2)
                continue
            if isinstance(error, Loopback) and isinstance(last, Loopback):
                raise _explained(error, chip, request, number) from error  # Twice is no noise.
            last = error
            told = error if told is None or not isinstance(error, NoSync) else told
            yield Report(Retried("sync", f"{error.code} at {baud} baud after {wait_s:.3g} s: {error.message}"))
            yield Drain(0.02, 0.2)
            continue
        if chip is not None and connected.pid != chip.pid:
            # An answer has no checksum: believe it when it comes again.
            try:
                again_pid = yield from an3155.get_id(timing)
            except LoaderError as error:
                last = told = error
                continue
            if again_pid == connected.pid:
                raise not_configured(chip, connected.pid)
            last = told = Garbled(f"Get ID answered {connected.pid:#05x} and then {again_pid:#05x}")
            continue
        result.pid = connected.pid
        # Silence says nothing against a rate where only a longer wait brought an answer.
        waited = wait_s > planned[0][1]
        result.fails_at(*(rate for rate, heard in failed.items() if rate > baud and (heard or not waited)))
        if baud < safe and not again:
            why = "failed here not long ago" if safe in request.past.bad_bauds else "did not work"
            text = f"{safe} baud, which is {'configured' if request.baud else 'usual'}, {why}: it goes at {baud} baud"
            yield Report(Warned("RATE_LOWERED", text))
        return connected
    if told is None and impossible:
        raise impossible[max(impossible)]
    assert told is not None
    raise _explained(told, chip, request, len(planned)) from told


def _stale(*, application: bool) -> Flow[None]:
    """Take what came before a reset, so that it does not pass for what comes after. ``application``: it said so."""
    for _ in range(STALE_DRAINS):
        before: bytes = yield Drain(STALE_QUIET_S, 0.05)
        if application and before:
            yield Overheard(before)
        if len(before) < DRAIN_BYTES:
            break


def _talks(said: bytes, error: LoaderError) -> bool:
    """Whether more was heard than a loader says: none speaks before 0x7F, and afterwards it is a byte or two."""
    noise = len(str(error.facts.get("received", ""))) // 3 if isinstance(error, SyncNoise) else 0
    return max(len(said), noise) >= NOISE_BYTES


def _hear_application(request: Request, chip: Chip | None, wait_s: float, number: int) -> Flow[None]:
    """One reset more, to listen in the application's own format: in another one nobody can read it. Raises
    ``ApplicationRunning`` where it is an application that speaks, for which no rate is the right one."""
    form = SetFormat(request.application_baud, request.application_parity)
    said = yield from _into_loader(request, form, wait_s, application=True)
    if an3155.looks_like_text(said):
        yield Overheard(said)
        text = said[:200].decode("ascii", "replace").strip()
        error = ApplicationRunning(f"after the reset the application spoke: {text!r}", received=text)
        raise _explained(error, chip, request, number)


def _into_loader(request: Request, form: SetFormat, wait_s: float, *, application: bool) -> Flow[bytes]:
    """The configured sequence, and what is heard in ``form`` until the loader should listen.

    Up to the reset the application speaks, in its own format: what it says is for the console, and tells nothing about the
    loader. The format changes while it is silent, before the release. ``application``: it may be running still.
    """
    if not (request.wiring.has_reset or request.wiring.has_boot0 or request.wiring.has_power):
        yield form
        heard: bytes = yield Drain(0.02, 0.2)
        if application and an3155.looks_like_text(heard):
            yield Overheard(heard)
        return heard
    formed = False
    for step in request.wiring.enter:
        if isinstance(step, SetLines) and (step.reset is False or step.power):
            yield from _stale(application=application)
            yield form
            formed, application = True, False
        yield step
    if not formed:
        yield form
    said: bytes = yield Receive(4096, wait_s)
    return said


def _ask_to_jump(request: Request, chip: Chip | None, baud: int, wait_s: float, *, restart: bool) -> Flow[bytes]:
    """Have the application jump into the loader: it is asked in its own format, and needs a moment. ``restart``: from a fresh
    start, which it may announce before it listens."""
    if restart:
        yield from leave(request)
        first: bytes = yield Receive(1, min(max(request.listen_s, START_S), START_MOST_S))
        first += yield Receive(BANNER_BYTES, FIRST_WORDS_S)
        if first:
            yield Overheard(first)
    else:
        yield SetFormat(request.application_baud, request.application_parity)
    yield Send(request.enter_by)
    answer: bytes = yield Receive(BANNER_BYTES, JUMP_S)
    if answer:
        yield Overheard(answer)
    yield SetFormat(baud, chip.parity if chip else "E")
    said: bytes = yield Receive(4096, wait_s)
    return said


def _synchronise(timing: Timing, baud: int, number: int, wait_s: float, said: bytes, request: Request) -> Flow[Connected]:
    begun: float = yield Now()
    try:
        sync = yield from an3155.synchronise(timing)
    except NoSync as error:
        if an3155.looks_like_text(said):
            yield Overheard(said)
            text = said[:200].decode("ascii", "replace").strip()
            raise ApplicationRunning(f"after the reset the application spoke: {text!r}", received=text) from error
        raise
    ended: float = yield Now()
    yield Report(StepDone("sync", ended - begun))
    if sync.already and request.wiring.has_reset and not request.by_application:
        yield Report(Warned("NOT_RESET", "the loader was synchronised already: does NRST reach the chip?"))
    try:
        loader = yield from an3155.get(timing)
    except Nack as error:
        # 0x7F and ACK have odd parity's bit equal to the stop bit, so a wrong parity shows first at the 0x00 of Get.
        raise WrongParity(f"0x7F was acknowledged at {baud} baud, then Get was refused ({error.message})", baud=baud) from error
    pid = yield from an3155.get_id(timing)
    if loader.odd:
        text = f"Get announced {loader.announced} commands and listed {len(loader.commands)}"
        yield Report(Warned("GET_COUNT_ODD", text))
    junk = (said + sync.junk)[:64].hex(" ")
    yield Report(Synced(baud, number, junk))
    return Connected(loader, pid, timing, baud, number, wait_s, sync.already, said + sync.junk)


def _too_fast(baud: int, error: BridgedError) -> Flow[None]:
    yield Report(Retried("rate", f"{error.code} at {baud} baud, a lower rate is next: {error.message}"))


def _believe(connected: Connected) -> Flow[None]:
    """A high rate is used when it carried bytes of either parity (Get, Get ID) and the same flash twice.

    A protected part refuses to be read: an orderly NACK says that it understood; and so does one to the address, twice.
    """
    if connected.chip is None:
        return
    address, timing = connected.chip.flash_base, connected.timing
    found: list[bytes] = []
    for _ in range(2):
        try:
            found.append((yield from an3155.read_memory(address, CHECK_BYTES, timing)))
        except Nack as error:
            if error.facts.get("stage") == "opcode":
                return
            found.append(b"")
    if found[0] != found[1]:
        raise Garbled(f"two readings of {CHECK_BYTES} bytes at {address:#010x} differ", address=address)


def _explained(error: LoaderError, chip: Chip | None, request: Request, attempts: int) -> LoaderError:
    """The last error of many attempts, with what a person at the board needs to know."""
    extra = [f"{attempts} attempts"]
    if not request.wiring.has_reset:
        extra.append("NRST is not wired, so no second try was possible")
    if not request.wiring.has_boot0:
        extra.append("BOOT0 is not driven")
    if chip is not None:
        pins = ", ".join(f"USART{n} {pins}".strip() for n, pins in chip.usart_pins)
        extra.append(f"{chip.title} listens on {pins or 'pins that are not in the table'}")
        extra.append(f"it enters its loader by AN2606 pattern {chip.activation_pattern or 'unknown'}")
    return type(error)(f"{error.message}; {'; '.join(extra)}", **{**error.facts, "attempts": attempts})


def leave(request: Request, *, running: bool = False) -> Flow[None]:
    """Back to the application: its own format first, so that nothing it says at its start is lost, then BOOT0, then NRST.

    ``running``: it is the application that is reset, and not the loader.
    """
    trouble: LinkError | None = None
    try:
        yield SetFormat(request.application_baud, request.application_parity)
    except LinkError as error:  # A port that is gone must not keep the lines from going idle.
        trouble = error
    for step in request.wiring.leave:
        if isinstance(step, SetLines) and (step.reset is False or step.power):
            try:
                yield from _stale(application=running)
            except LinkError as error:  # Nor what nobody can read the release: the lines may live where the port does not.
                trouble = trouble or error
        try:
            yield step
        except LinkError as error:  # Nor one line another.
            trouble = trouble or error
    if trouble is not None:
        raise trouble


def start_by_go(request: Request, chip: Chip, timing: Timing, result: Result) -> Flow[None]:
    """Jump into the application where a reset would not start it. ``result.boot`` says what came of it."""
    # With a blank flash the loader is where the part belongs: Go would jump to nowhere.
    try:
        word: bytes = yield from an3155.read_memory(chip.flash_base, 4, timing)
    except LoaderError:
        word = b""  # Readout protection forbids looking, not starting.
    if word == bytes([chip.erased_value]) * 4:
        yield Report(Warned("NOT_STARTED", "the flash is empty where an application would start"))
        result.boot = Boot.EMPTY
        yield from leave(request)
        return
    stuck = request.wiring.can_restart  # Then it is not for want of a line that it is not reset.
    try:
        if chip.has(Quirk.GO_BROKEN, result.loader_id) or chip.has(Quirk.GO_FIRST_ACK_MISSING, result.loader_id):
            raise Unsupported(f"Go does not work in loader {result.loader_id:#04x}" if result.loader_id else "Go does not work")
        yield SetLines(boot0=False)
        yield from an3155.go(chip.flash_base, timing)
    except (LoaderError, ChipError) as error:
        yield from leave(request)
        if stuck:
            yield from _needs_power_cycle(result, error.message)
        else:
            result.boot = Boot.NEEDS_RESET
            yield Report(Warned("NOT_STARTED", f"the application was not started: {error.message}"))
        return
    result.boot = Boot.GO
    if stuck:
        text = "the part was empty at power-on: until its power is cycled a reset enters the loader, so Go starts it now"
        yield Report(Warned("EMPTY_FLAG", text))
    if chip.has(Quirk.POWER_CYCLE_AFTER_GO, result.loader_id):
        text = (
            "the application was started by Go, since no wired line could reset it, and this ROM loader leaves the supply mode "
            "locked until the power is cycled: an application that selects another one may hang; switch it off and on"
        )
        yield Report(Warned("NEEDS_POWER_CYCLE", text))
    yield SetFormat(request.application_baud, request.application_parity)


def _needs_power_cycle(result: Result, why: str) -> Flow[None]:
    """Whatever it is, it is no fault of the image: the job ends well, and says what a person has to do."""
    result.boot = Boot.NEEDS_POWER_CYCLE
    text = f"the part was empty at power-on and enters its loader until its power is cycled, which no line does here; {why}"
    yield Report(Warned("NEEDS_POWER_CYCLE", text))


def _cycle_power(request: Request, result: Result) -> Flow[None]:
    yield SetFormat(request.application_baud, request.application_parity)
    yield SetLines(boot0=False, power=False)
    yield Pause(POWER_OFF_S)
    yield SetLines(power=True)
    result.boot = Boot.POWER_CYCLE


def boot(
    request: Request, result: Result, chip: Chip | None = None, timing: Timing | None = None, *, running: bool = False
) -> Flow[None]:
    """Start the application and listen to the first thing that it says. ``chip`` and ``timing``: of the loader, if entered.
    ``running``: see ``leave``."""
    yield from phase_started(Phase.BOOT)
    wiring = request.wiring
    # Parts that check for an empty flash remember the answer from power-on: after the first flash a plain reset enters the
    # loader once more (AN2606). A power cycle forgets it; else Go, which leaves clocks and peripherals as the loader set them.
    stuck = chip is not None and chip.empty_check and result.was_empty and result.changed
    # Who was asked to jump into the loader is put back as well; who was put there by hand may be meant to stay.
    wanted = result.changed or bool(request.enter_by)
    if stuck and wiring.has_power:
        yield from _cycle_power(request, result)
    elif chip and timing and (stuck or (wanted and not wiring.can_restart)):
        yield from start_by_go(request, chip, timing, result)
    else:
        yield from leave(request, running=running)
        result.boot = Boot.RESET
        if timing and not wiring.can_restart:
            yield from say_not_started(result)
    first = yield from _first_words(request, request.listen_s)
    # Silent: perhaps such a part, empty when its power came on before an earlier job, that is in its loader again.
    suspect = not first and chip is not None and chip.empty_check and wiring.can_restart and not stuck
    if suspect and chip and timing and (yield from _loader_runs(request, chip, timing)):
        stuck = True
        if wiring.has_power:
            yield from _cycle_power(request, result)
        else:
            yield from start_by_go(request, chip, timing, result)
        first = yield from _first_words(request, request.listen_s)
    yield from _judge(request, result, first, stuck=stuck)


def listen(request: Request, result: Result) -> Flow[None]:
    """The same where the application was started by somebody else."""
    first = yield from _first_words(request, request.listen_s)
    yield from _judge(request, result, first, stuck=False)


def _judge(request: Request, result: Result, first: bytes, *, stuck: bool) -> Flow[None]:
    proven = request.kind in ("flash", "ensure", "verify") and result.evidence == "full"
    started = result.boot is not None and result.boot.started
    if request.health and ((proven and started) or (request.kind == "xmodem" and result.evidence)):
        yield from _ask_health(request, result, first, stuck=stuck)
    elif request.listen_s:
        result.banner = printable(first)
        yield Report(Booted(result.banner))


def stay_in_loader(request: Request, result: Result) -> Flow[None]:
    """P10: its application is erased, and only that leads into the loader: nothing may reset it; the next job reaches it."""
    result.boot = Boot.IN_LOADER
    text = "its application is erased and only that leads into the loader: it is left there for the next job; do not reset it"
    yield Report(Warned("NOT_STARTED", text))
    yield SetFormat(request.application_baud, request.application_parity)


def say_not_started(result: Result) -> Flow[None]:
    result.boot = Boot.NEEDS_RESET
    text = "neither NRST nor power is wired: the target stays in its loader until somebody resets it"
    yield Report(Warned("NOT_STARTED", text))


def _ask_health(request: Request, result: Result, first: bytes, *, stuck: bool) -> Flow[None]:
    """Ask the probe, and judge the image only where it is the image that is asked.

    One that was found in flash is not made undone: that it does not live is told. One that was started by Go, with clocks and
    peripherals as the loader left them, may live after the power cycle that its part needs anyway.
    """
    try:
        yield from _probe(request, result, first)
    except Unhealthy as error:
        if stuck and result.boot is Boot.GO:
            yield from _needs_power_cycle(result, f"started by Go it did not pass its health probe: {error.message}")
        elif result.changed:
            raise
        else:
            result.health = "failed"
            yield Report(Warned("UNHEALTHY", error.message))


def _first_words(request: Request, wait_s: float) -> Flow[bytes]:
    """The beginning of what the application says within ``wait_s``. With a health probe only its first byte is waited for."""
    first: bytes = yield Receive(1, wait_s)
    if first and not request.health:
        first += yield Receive(BANNER_BYTES - 1, FIRST_WORDS_S)
    if first:
        yield Overheard(first)
    return first


def _loader_runs(request: Request, chip: Chip, timing: Timing) -> Flow[bool]:
    """Whether it is the loader that was started, and not a silent application."""
    yield SetFormat(round(11 / timing.byte_s), chip.parity)
    try:
        yield from an3155.synchronise(timing)
    except LoaderError:
        yield SetFormat(request.application_baud, request.application_parity)
        return False
    return True


def _probe(request: Request, result: Result, first: bytes) -> Flow[None]:
    """The health probe: only what the application says after the release of NRST counts. Raises ``Unhealthy``.

    A banner comes once and has no checksum: one byte that the wire damaged must not undo a good image. So where it is not found
    it is listened to at one more start; what is asked for is asked again and again, and needs none.
    """
    yield from phase_started(Phase.HEALTH)
    health = request.health
    heard = yield from talk(health, first)
    said = _told(heard)
    damaged = bool(health.expect and heard.text) and not (health.send or heard.matches)
    if damaged and request.wiring.can_restart and result.boot is not Boot.GO:
        yield Report(Retried("health", f"{heard.lacks(health)} within {health.within_s:g} s; {said}; started once more"))
        yield from leave(request, running=True)
        heard = yield from talk(health)
        said = _told(heard)
    result.banner = heard.text[-BANNER_BYTES:]
    yield Report(Booted(result.banner))
    if not heard.good:
        raise Unhealthy(f"{heard.lacks(health)} within {health.within_s:g} s after the start; {said}", within_s=health.within_s)
    if not heard.active:
        raise Unhealthy(f"{heard.lacks(health)} within {health.quiet_s:g} s; {said}")
    if heard.matches > 1:
        raise Unhealthy(f"{health.expect!r} came {heard.matches} times: the application starts again and again; {said}")
    result.health = "passed"


def _told(heard: Heard) -> str:
    return f"it said {heard.text[-BANNER_BYTES:]!r}" if heard.text else "it said nothing"


def ask_interlock(request: Request) -> Flow[None]:
    """Before the first reset: may the target be stopped? Nothing moved yet, and nothing is moved when it says no."""
    if not request.interlock or "interlock" in request.force:
        return
    yield SetFormat(request.application_baud, request.application_parity)
    heard = yield from talk(request.interlock)
    if not heard.good:
        raise NotSafeToStop(
            f"{heard.lacks(request.interlock)} within {request.interlock.within_s:g} s; {_told(heard)}",
            within_s=request.interlock.within_s,
        )
