"""Virtual time: exact costs, hooks, hazards and power cuts, with small flows written for the purpose."""

from __future__ import annotations

import pytest

from bridged.errors import Canceled, StorageFull
from bridged.events import Event, Phase, PhaseStarted
from bridged.protocol.flow import (
    Barrier,
    Checkpoint,
    Drain,
    Flow,
    Hazard,
    Now,
    Pause,
    Progress,
    Receive,
    Report,
    Send,
    SetFormat,
    SetLines,
    Step,
)
from bridged.sim.device import Device, Mode
from bridged.sim.loader import Timing
from bridged.sim.virtual import Account, PowerCut, VirtualUart, run
from bridged.sim.wire import Format
from tests.sim.dialogue import bootable, enter, frame, make, synced

BYTE_NS = 95486


def exchange(data: bytes, count: int, timeout_s: float = 1.0) -> Flow[bytes]:
    yield Send(data)
    found: bytes = yield Receive(count, timeout_s)
    return found


def write_block(at: int, data: bytes) -> Flow[bytes]:
    yield from exchange(b"\x31\xce", 1)
    yield from exchange(frame(at.to_bytes(4, "big").hex(" ") + " sum"), 1)
    found: bytes = yield from exchange(frame(bytes((len(data) - 1, *data)).hex(" ") + " sum"), 1)
    return found


def read_block(at: int, count: int) -> Flow[bytes]:
    yield from exchange(b"\x11\xee", 1)
    yield from exchange(frame(at.to_bytes(4, "big").hex(" ") + " sum"), 1)
    yield from exchange(bytes((count - 1, 256 - count)), 1)
    found: bytes = yield Receive(count, 1.0)
    return found


def test_cost_of_writing_and_reading_one_block() -> None:
    """268 bytes and 3 turnarounds each; nothing is added by the host."""
    uart = synced("F407", timing=Timing(program_s_per_256=0.001, reply_s=0))
    data = bytes(range(256))
    account = Account()
    assert run(write_block(0x08000000, data), uart, account=account) == b"\x79"
    assert (account.all.bytes_out, account.all.bytes_in, account.all.turnarounds) == (265, 3, 3)
    assert account.all.wire_ns == 268 * BYTE_NS
    assert account.all.total_ns == 268 * BYTE_NS + 1_000_000
    assert account.all.waited_ns == 1_000_000
    assert account.all.host_ns == 0
    account = Account()
    assert run(read_block(0x08000000, 256), uart, account=account) == data
    assert (account.all.bytes_out, account.all.bytes_in, account.all.turnarounds) == (9, 259, 3)
    assert account.all.total_ns == account.all.wire_ns == 268 * BYTE_NS


def test_latency_of_an_adapter_costs_once_a_frame() -> None:
    device = make("F407", timing=Timing(reply_s=0))
    uart = enter(device, turnaround_ns=1_000_000)
    uart.send(b"\x7f")
    assert uart.receive(1, 1) == b"\x79"
    account = uart.account = Account()
    run(read_block(0x08000000, 256), uart)
    assert account.all.host_ns == 3_000_000
    assert account.total_s == pytest.approx((268 * BYTE_NS + 3_000_000) / 1e9)


def test_a_long_erase_takes_its_virtual_time() -> None:
    uart = synced("F407", timing=Timing(mass_erase_s=20.0, reply_s=0))

    def flow() -> Flow[float]:
        yield from exchange(b"\x44\xbb", 1)
        start: float = yield Now()
        assert (yield from exchange(b"\xff\xff\x00", 1, timeout_s=65)) == b"\x79"
        end: float = yield Now()
        return end - start

    assert run(flow(), uart) == pytest.approx(20.0 + 4 * BYTE_NS / 1e9, abs=1e-9)


def test_a_timeout_runs_from_the_end_of_transmission() -> None:
    uart = synced("F407")

    def flow() -> Flow[tuple[float, bytes]]:
        start: float = yield Now()
        found = yield from exchange(b"\x11", 1, timeout_s=0.25)
        end: float = yield Now()
        return end - start, found

    account = Account()
    seconds, found = run(flow(), uart, account=account)
    assert found == b""
    assert seconds == pytest.approx(0.25 + BYTE_NS / 1e9)
    assert account.all.timeouts == 1


def test_receive_leaves_what_is_beyond_count() -> None:
    uart = synced("F407")

    def flow() -> Flow[list[bytes]]:
        yield Send(b"\x01\xfe")
        first: bytes = yield Receive(1, 0.1)
        second: bytes = yield Receive(3, 0.1)
        rest: bytes = yield Drain(0.02, 1.0)
        return [first, second, rest]

    assert run(flow(), uart) == [b"\x79", b"\x31\x00\x00", b"\x79"]


def test_drain_ends_after_quiet_and_after_its_limit() -> None:
    device = make("F407")
    device.memory.load_flash(bootable(device.chip))

    def flow() -> Flow[tuple[bytes, float, bytes]]:
        yield SetFormat(115200, "N")
        yield SetLines(reset=True, boot0=False)
        yield Pause(0.02)
        yield SetLines(reset=False)
        banner: bytes = yield Drain(0.1, 5.0)
        start: float = yield Now()
        nothing: bytes = yield Drain(9.0, 0.5)
        end: float = yield Now()
        return banner, end - start, nothing

    banner, seconds, nothing = run(flow(), device)
    assert (banner, nothing) == (b"hello\r\n", b"")
    assert seconds == pytest.approx(0.5)
    assert device.mode is Mode.APPLICATION


def test_costs_are_kept_by_phase() -> None:
    uart = synced("F407")

    def flow() -> Flow[None]:
        yield Report(PhaseStarted(Phase.WRITE, 256))
        yield from write_block(0x08000000, bytes(256))
        yield Progress(256)
        yield Report(PhaseStarted(Phase.VERIFY, 256))
        yield from read_block(0x08000000, 256)
        yield Pause(1.0)

    account = Account()
    events: list[Event] = []
    done: list[int] = []
    run(flow(), uart, account=account, report=events.append, progress=done.append)
    assert account.phases[Phase.WRITE].bytes_out == 265
    assert account.phases[Phase.VERIFY].bytes_in == 259
    assert account.phases[Phase.VERIFY].paused_ns == 1_000_000_000
    assert account.all.total_ns == sum(c.total_ns for c in account.phases.values())
    assert [event for _, event in account.events] == events
    assert done == [256]


def test_hooks_may_end_a_flow_at_a_checkpoint_and_at_a_barrier() -> None:
    def flow() -> Flow[str]:
        seen = []
        try:
            yield Checkpoint()
        except Canceled as error:
            seen.append(error.code)
        try:
            yield Barrier("erasing", 8.0, b"kept")
        except StorageFull as error:
            seen.append(error.code)
        return " ".join(seen)

    def cancel(_: Checkpoint) -> None:
        raise Canceled("enough")

    def full(step: Barrier) -> None:
        assert step.kept == b"kept"
        raise StorageFull("no room")

    account = Account()
    assert run(flow(), make("F407"), account=account, checkpoint=cancel, barrier=full) == "CANCELED STORAGE_FULL"
    assert account.checkpoints == 1
    assert account.barriers == [Barrier("erasing", 8.0, b"kept")]


def erase_sector(uart_hazard_s: float, patience_s: float) -> Flow[bytes]:
    yield from exchange(b"\x44\xbb", 1)
    yield Hazard(uart_hazard_s)
    try:
        found = yield from exchange(b"\x00\x00\x00\x01\x01", 1, patience_s)
        if found:
            yield Hazard(0)
    finally:
        yield SetLines(reset=True)
    return found


def test_lines_wait_for_the_end_of_a_hazard() -> None:
    uart = synced("F407", timing=Timing(sector_erase_s=1.5))
    account = Account()
    assert run(erase_sector(2.0, 0.5), uart, account=account) == b""
    assert account.hazard_waits == [pytest.approx(1.5, abs=0.01)]
    assert account.violations == []
    assert uart.device.stats.hazard_resets == []


def test_a_hazard_that_is_over_is_not_waited_for() -> None:
    uart = synced("F407", timing=Timing(sector_erase_s=0.2))
    account = Account()
    assert run(erase_sector(60.0, 5.0), uart, account=account) == b"\x79"
    assert account.hazard_waits == []
    assert account.total_s < 1


def test_a_hazard_that_was_declared_too_short_is_a_violation() -> None:
    uart = synced("F407", timing=Timing(sector_erase_s=3.0))
    account = Account()
    run(erase_sector(1.0, 0.5), uart, account=account)
    assert len(account.violations) == 1
    assert "during erase" in account.violations[0]
    assert len(uart.device.stats.hazard_resets) == 1


@pytest.mark.parametrize("exchanges", [0, 1, 2, 3])
def test_a_power_cut_ends_the_run_and_no_later_step_is_carried_out(exchanges: int) -> None:
    device = make("F407", timing=Timing(reply_s=0))
    uart = synced(device)
    tidied: list[str] = []

    def flow() -> Flow[None]:
        try:
            yield from write_block(0x08000000, b"\x11" * 4)
            yield Send(b"\x7f")
        finally:
            tidied.append("begun")
            yield SetLines(reset=True)
            tidied.append("done")

    account = Account()
    before = device.stats.bytes_in
    with pytest.raises(PowerCut):
        run(flow(), uart, account=account, cut_after_exchange=exchanges)
    assert account.all.sends == exchanges
    assert device.stats.bytes_in - before == [0, 2, 7, 13][exchanges]
    assert device.lines["nrst"]
    assert device.mode is Mode.LOADER
    assert tidied == ["begun"]


def test_a_power_cut_before_any_step() -> None:
    device = make("F407")
    uart = synced(device)
    steps: list[str] = []

    def cut(number: int, step: Step) -> None:
        if number == 2:
            raise PowerCut
        steps.append(type(step).__name__)

    with pytest.raises(PowerCut):
        run(write_block(0x08000000, b"\x11" * 4), uart, before=cut)
    assert steps == ["Send", "Receive"]


def test_an_error_of_the_flow_comes_out() -> None:
    def flow() -> Flow[None]:
        yield Pause(1.0)
        raise Canceled("by itself")

    with pytest.raises(Canceled, match="by itself"):
        run(flow(), make("F407"))


def test_a_loopback_gives_back_what_was_sent() -> None:
    uart = VirtualUart(make("F407"), loopback=True)
    uart.send(b"\x7f")
    assert uart.receive(1, 0.1) == b"\x7f"


def test_a_port_that_drops_parity_does_so_whatever_is_asked_for() -> None:
    uart = VirtualUart(make("F407"), wire_parity="N")

    def flow() -> Flow[None]:
        yield SetFormat(57600, "E")

    run(flow(), uart)
    assert uart.format == Format(57600, "N")


def test_a_device_can_be_driven_by_several_runs_one_after_the_other() -> None:
    device: Device = make("F407")
    uart = synced(device)
    run(write_block(0x08000000, b"\x22" * 4), uart)
    now = uart.now_ns
    assert run(read_block(0x08000000, 4), device) == b"\x22" * 4
    assert device.now_ns > now


def test_a_buffered_port_returns_at_once_and_counts_from_the_end_of_what_it_sent() -> None:
    """As behind a kernel: what is sent goes out as time passes, one after the other, and time-outs count from its end."""
    plain, device = VirtualUart(make("F407"), loopback=True), make("F407")
    plain.send(bytes(100))
    uart = VirtualUart(device, buffered=True)
    begun = uart.now_ns
    uart.send(bytes(60))
    uart.send(bytes(40))
    assert uart.now_ns == begun
    assert uart.receive(1, 0.0) == b""
    assert uart.now_ns - begun == 100 * uart.format.byte_ns == plain.now_ns
    assert device.stats.bytes_in == 100
    assert uart.account.all.total_ns == plain.account.all.total_ns
