"""The doctor's findings about a target: a row for each symptom that people report, in the simulator. Flash is never changed.

Every finding of the target half has a row, and is in the table of ``findings``. Symptoms of jobs that the doctor cannot see (a
NACK to data, silence after an erase) are told by the jobs themselves: test_faults.py, test_session.py.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from bridged.errors import ParityUnavailable
from bridged.findings import CATALOG, TARGET_GROUPS, Level, codes
from bridged.protocol.flow import Drain, Receive, SetFormat, Step
from bridged.sim.application import Behaviour
from bridged.sim.boot import LOADER
from bridged.sim.device import Device
from bridged.sim.loader import Timing
from bridged.sim.virtual import Account, VirtualUart, run
from bridged.sim.wire import Format
from bridged.target import doctor, session
from bridged.target.request import Request, Wiring
from tests.target.bench import WIRED, Bench, make_image


@dataclass(frozen=True)
class Row:
    """``symptom``: what is wrong. ``code``: the first problem or warning that must be found; ``also``: others."""

    symptom: str
    part: str
    code: str
    also: tuple[str, ...] = ()
    device: dict[str, Any] = field(default_factory=dict)
    port: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    blank: bool = False
    no_parity: bool = False
    before: Callable[[Device], None] = lambda _device: None


def crash_loop(device: Device) -> None:
    """An application that starts again and again, as under a watchdog that nobody feeds."""
    device.behaviour = Behaviour(startup_s=0.01)
    start = device._start_application

    def again(address: int) -> None:
        start(address)
        device._at(device.now_ns + 200_000_000, lambda: device._system_reset() if device.mode.name == "APPLICATION" else None)

    device._start_application = again  # type: ignore[method-assign]


SILENT = Behaviour(startup_s=600)  # Longer than anybody listens.


def nonsense(device: Device) -> None:
    device.memory.program(device.memory.base, b"\x12" * 64)


def flash_it(device: Device) -> None:
    """Without a power cycle: the part still believes that its flash is empty."""
    for seg in make_image(device.chip, 3000).segments:
        device.memory.program(seg.address, seg.data)


def in_bank_2(device: Device) -> None:
    at = next(s.address for s in device.memory.map.sectors if s.bank == 2)
    for seg in make_image(device.chip, 3000, offset=at - device.memory.base).segments:
        device.memory.program(seg.address, seg.data)


def stuck_boot0(device: Device) -> None:
    """Whatever level is driven, the pin of the chip is high."""
    latch = device._start
    device._start = lambda start=None: latch(start or LOADER)  # type: ignore[method-assign]


def without_nrst(device: Device) -> None:
    """The line is driven, and not connected."""
    move = device.set_lines

    def set_lines(at_ns: int, **levels: bool | None) -> None:
        move(at_ns, **{**levels, "nrst": None})

    device.set_lines = set_lines  # type: ignore[method-assign]


def unreset(device: Device) -> None:
    crash_loop(device)
    without_nrst(device)


def in_loader(device: Device, *bytes_sent: int) -> None:
    """As an earlier session left it: synchronised, and these bytes sent."""
    uart = VirtualUart(device, Format(115200, "E"))
    device.force_loader()
    uart.pause(1.0)
    uart.send(bytes((0x7F, *bytes_sent)))
    uart.pause(0.1)


def left_in_loader(device: Device) -> None:
    in_loader(device)
    without_nrst(device)


def half_a_command(device: Device) -> None:
    in_loader(device, 0x31, 0xCE, 0x08)


def junk_before_ack(device: Device, value: int) -> None:
    """A byte before the ACK of each 0x7F, as the target's transmitter is switched on."""
    send, seen = device._loader_send, [0]

    def noisy(data: bytes) -> None:
        first = device.stats.syncs > seen[0]
        seen[0] = device.stats.syncs
        send(bytes((value,)) + data if first else data)

    device._loader_send = noisy  # type: ignore[method-assign]


def mute_after_sync(device: Device) -> None:
    """A TX that is loaded, or a supply that breaks down under it."""
    send, seen = device._loader_send, [0]

    def once(data: bytes) -> None:
        if device.stats.syncs > seen[0]:
            seen[0] = device.stats.syncs
            send(data)

    device._loader_send = once  # type: ignore[method-assign]


def hide_options(device: Device) -> None:
    readable, hidden = device.memory.readable, device.chip.option_bytes
    device.memory.readable = lambda address: readable(address) and not any(address in r for r in hidden)  # type: ignore[method-assign]


def write_protected(device: Device) -> None:
    device.memory.protect({1, 2})
    device.memory.load_options()


def pcrop(device: Device) -> None:
    device.memory._options[0][1][8:10] = (0x8002).to_bytes(2, "little")
    device.memory._complete()
    device.memory.load_options()


def broken_options(device: Device) -> None:
    device.memory._options[0][1][2] ^= 0x20


def refuse_flash(device: Device) -> None:
    readable, base = device.memory.readable, device.memory.base
    device.memory.readable = lambda address: readable(address) and address != base  # type: ignore[method-assign]


def unknown(device: Device) -> None:
    device.chip = replace(device.chip, pid=0x7FE)


def no_parity(_number: int, step: Step) -> None:
    if isinstance(step, SetFormat) and step.parity == "E":
        raise ParityUnavailable("even parity was asked for, and read back as none")


ROWS = (
    Row("all is well", "L476", "", ("DOCTOR_RESET_WORKS", "DOCTOR_LOADER_ANSWERS", "DOCTOR_IDENTIFIED", "DOCTOR_LOADER_PINS")),
    Row("no power", "L476", "DOCTOR_NOTHING_HEARD", ("DOCTOR_APPLICATION_SILENT",), {"powered": False}, blank=True),
    Row(
        "the pin is ignored, the application starts",
        "G071",
        "DOCTOR_BOOT0_NOT_SEEN",
        ("DOCTOR_RESET_WORKS",),
        {"options": {"nBOOT_SEL": 1}},
    ),
    Row("TX and RX shorted", "L476", "DOCTOR_LOOPBACK", port={"loopback": True}),
    Row("8N1 on the wire, as a mini UART sends", "L476", "DOCTOR_WRONG_PARITY", port={"wire_parity": "N"}),
    Row("the measured rate is off at every reset", "F407", "DOCTOR_RATE_OR_NOISE", device={"rate_error": 0.2}),
    Row("readout protection", "F407", "DOCTOR_READ_PROTECTED", ("DOCTOR_LOADER_ANSWERS",), {"rdp": 1}),
    Row("write protection", "F407", "DOCTOR_WRITE_PROTECTED", ("DOCTOR_OPTION_BYTES",), before=write_protected),
    Row("PCROP", "F446", "DOCTOR_PCROP", ("DOCTOR_OPTION_BYTES",), before=pcrop),
    Row("option bytes that were cut off", "F407", "DOCTOR_OPTION_BYTES_BROKEN", before=broken_options),
    Row("another chip than configured", "F407", "DOCTOR_WRONG_CHIP", request={"chip": "L476"}),
    Row(
        "both boot addresses lead to the loader",
        "F756",
        "DOCTOR_APPLICATION_UNREACHABLE",
        device={"options": {"BOOT_ADD0": 0x0040}},
    ),
    Row("the same on an H7", "H743", "DOCTOR_APPLICATION_UNREACHABLE", device={"options": {"BOOT_ADD0": 0x1FF0}}),
    Row(
        "a virgin G0 whose pin is ignored",
        "G071",
        "DOCTOR_ENTRY_WOULD_BE_LOST",
        ("DOCTOR_EMPTY",),
        {"options": {"nBOOT_SEL": 1}},
        blank=True,
    ),
    Row(
        "its loader starts bank 2, where another application is",
        "F429",
        "DOCTOR_OTHER_BANK",
        ("DOCTOR_RESET_WORKS", "DOCTOR_IDENTIFIED"),
        {"options": {"BFB2": 1}},
        before=in_bank_2,
    ),
    Row("loader V9.0 of the H743", "H743", "", ("DOCTOR_GET_COUNT_ODD",), {"loader_id": 0x90}),
    Row("needs 2.6 s to start", "L476", "", ("DOCTOR_LOADER_LATE",), {"timing": Timing(startup_s=2.56)}),
    Row("H7A3 whose layout is unsure", "H7A3", "DOCTOR_LAYOUT_UNKNOWN", ("DOCTOR_IDENTIFIED",)),
    Row("a watchdog bites", "L476", "DOCTOR_RESETS_ITSELF", before=crash_loop),
    Row("an application that says nothing", "L476", "", ("DOCTOR_APPLICATION_SILENT",), {"application": SILENT}),
    Row("flash without an application", "F407", "", ("DOCTOR_NO_APPLICATION", "DOCTOR_APPLICATION_SILENT"), blank=True),
    Row("first words that are no vectors", "F407", "", ("DOCTOR_NO_APPLICATION",), blank=True, before=nonsense),
    Row("BOOT0 stuck high", "F407", "DOCTOR_LOADER_WITHOUT_BOOT0", before=stuck_boot0),
    Row("empty when its power came on, and flashed since", "L431", "DOCTOR_LOADER_WITHOUT_BOOT0", blank=True, before=flash_it),
    Row("a port without parity whose driver says so", "L476", "DOCTOR_PORT_SETTINGS", no_parity=True),
    Row("something speaks while NRST is low", "L476", "DOCTOR_TALKS_IN_RESET", before=unreset),
    Row("NRST is not connected, the loader runs", "L476", "DOCTOR_NOT_RESET", before=left_in_loader),
    Row("a glitch before the ACK", "L476", "", ("DOCTOR_LOADER_ANSWERS",), before=lambda d: junk_before_ack(d, 0x00)),
    Row("noise before the ACK", "L476", "", ("DOCTOR_JUNK_BEFORE_ACK",), before=lambda d: junk_before_ack(d, 0xE5)),
    Row("half a command in the loader from an earlier session", "L476", "", ("DOCTOR_LOADER_ANSWERS",), before=half_a_command),
    Row("the ACK of 0x7F comes, and then nothing", "L476", "DOCTOR_RATE_OR_NOISE", before=mute_after_sync),
    Row("reading flash is refused, reading is not", "F407", "DOCTOR_FLASH_REFUSED", before=refuse_flash),
    Row(
        "it falls silent at the first command that reads",
        "F407",
        "DOCTOR_RATE_OR_NOISE",
        ("DOCTOR_LOADER_ANSWERS",),
        {"faults": ["lose:0x11:0:opcode:*"]},
    ),
    Row("a byte is lost now and then", "F407", "DOCTOR_REPEATED", device={"faults": ["lose:0x11:0:opcode"]}),
    Row("it refuses Get ID", "F407", "DOCTOR_RATE_OR_NOISE", device={"faults": ["nack:0x02:0:opcode:*"]}),
    Row("a part that is in no table", "F407", "DOCTOR_UNKNOWN_CHIP", request={"chip": ""}, before=unknown),
    Row(
        "nobody said which chip, and nothing answers",
        "L476",
        "DOCTOR_NOTHING_HEARD",
        ("DOCTOR_CHIP_UNSET",),
        {"powered": False},
        request={"chip": ""},
        blank=True,
    ),
    Row("option bits that the loader does not show", "L476", "", ("DOCTOR_OPTION_UNREADABLE",), before=hide_options),
    Row(
        "documented limitations of the loader",
        "G071",
        "",
        ("DOCTOR_QUIRK", "DOCTOR_BOOT_OPTION"),
        {"options": {"nBOOT_SEL": 0}},
    ),
    Row("an adapter with a timer of 16 ms", "L476", "DOCTOR_ADAPTER_SLOW", port={"turnaround_ns": 16_000_000}),
    # Three a block of 268 bytes, which take 25.6 ms: 8 % and 13 %.
    Row("an adapter that costs less than a tenth", "L476", "", ("DOCTOR_TURNAROUND",), port={"turnaround_ns": 700_000}),
    Row("an adapter that costs more than a tenth", "L476", "DOCTOR_ADAPTER_SLOW", port={"turnaround_ns": 1_100_000}),
    Row("an answer as fast as its bytes", "L476", "", ("DOCTOR_TURNAROUND",)),
    Row(
        "nothing is wired",
        "L476",
        "DOCTOR_NRST_NOT_WIRED",
        ("DOCTOR_BOOT0_NOT_WIRED",),
        request={"wiring": Wiring()},
        before=Device.force_loader,
    ),
)


def examine(row: Row) -> tuple[list[dict[str, Any]], Device]:
    bench = Bench(row.part, {"rate_error": 0.0, **row.device})
    if not row.blank:
        bench.put(make_image(bench.chip, 3000))
    row.before(bench.device)
    uart = VirtualUart(bench.device, **row.port)
    request = Request(**{"kind": "doctor", "wiring": WIRED, "chip": row.part, **row.request})
    account = Account()
    result = run(session.run(request), uart, account=account, before=no_parity if row.no_parity else None)
    assert account.total_s < 90
    return result.findings, bench.device


@pytest.mark.parametrize("row", ROWS, ids=[row.symptom for row in ROWS])
def test_each_symptom_has_its_finding(row: Row) -> None:
    found, device = examine(row)
    codes = [f["code"] for f in found]
    bad = [f for f in found if f["level"] in ("problem", "warning")]
    if row.code:
        assert bad, codes
        assert bad[0]["code"] == row.code, bad
        assert bad[0]["remedy"]
    else:
        assert bad == []
    assert set(row.also) <= set(codes), codes
    assert all(f["text"] for f in found)
    assert all(f["level"] == CATALOG[f["code"]].level for f in found)
    assert not device.stats.erases
    assert not device.stats.programs
    assert not device.lines["boot0"]


def test_each_finding_has_its_row() -> None:
    source = ast.parse(Path(doctor.__file__).read_text())
    used = {str(n.value) for n in ast.walk(source) if isinstance(n, ast.Constant) and str(n.value).startswith("DOCTOR_")}
    machine_says_too = {"DOCTOR_LOADER_PINS", "DOCTOR_CHIP_UNSET"}
    assert used == codes(TARGET_GROUPS) | machine_says_too
    assert {row.code for row in ROWS if row.code} | {code for row in ROWS for code in row.also} == used
    assert all(CATALOG[code].remedy for code in used if CATALOG[code].level is not Level.OK)


def test_one_byte_of_noise_while_nrst_is_low_is_no_speech() -> None:
    bench = Bench("L476", {"rate_error": 0.0})
    bench.put(make_image(bench.chip, 3000))
    uart = VirtualUart(bench.device)
    held = False

    def before(_number: int, step: Step) -> None:
        nonlocal held
        if held and isinstance(step, Receive):
            uart.inbox += b"\xff"
        held = isinstance(step, Drain) and not bench.device.lines["nrst"]

    result = run(session.run(Request("doctor", WIRED, "L476")), uart, before=before)
    assert [f["code"] for f in result.findings if f["level"] in ("problem", "warning")] == []


def test_slow_get_id_supports_the_parity_finding() -> None:
    (row,) = [r for r in ROWS if r.code == "DOCTOR_WRONG_PARITY"]
    found, _ = examine(row)
    assert "Get ID sent slowly is answered" in found[0]["text"]


def test_an_unknown_chip_is_told_with_its_id() -> None:
    found, _ = examine(Row("", "F407", "", request={"chip": ""}))
    assert not [f for f in found if f["level"] == "problem"]
    assert any(f["code"] == "DOCTOR_IDENTIFIED" for f in found)
