"""The doctor's findings about a target: a row for each symptom that people report, in the simulator. Flash is never changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from bridged.sim.application import Behaviour
from bridged.sim.device import Device
from bridged.sim.loader import Timing
from bridged.sim.virtual import Account, VirtualUart, run
from bridged.target import session
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
    before: Callable[[Device], None] = lambda _device: None


def crash_loop(device: Device) -> None:
    """An application that starts again and again, as under a watchdog that nobody feeds."""
    device.behaviour = Behaviour(startup_s=0.01)
    start = device._start_application

    def again(address: int) -> None:
        start(address)
        device._at(device.now_ns + 200_000_000, lambda: device._system_reset() if device.mode.name == "APPLICATION" else None)

    device._start_application = again  # type: ignore[method-assign]


ROWS = (
    Row("all is well", "L476", "", ("RESET_WORKS", "LOADER_ANSWERS", "IDENTIFIED", "LOADER_PINS")),
    Row("no power", "L476", "NOTHING_HEARD", ("APPLICATION_SILENT",), {"powered": False}, blank=True),
    Row(
        "the pin is ignored, the application starts",
        "G071",
        "BOOT0_NOT_SEEN",
        ("RESET_WORKS",),
        {"options": {"nBOOT_SEL": 1}},
    ),
    Row("TX and RX shorted", "L476", "LOOPBACK", port={"loopback": True}),
    Row("8N1 on the wire, as a mini UART sends", "L476", "WRONG_PARITY", port={"wire_parity": "N"}),
    Row("the measured rate is off at every reset", "F407", "RATE_OR_NOISE", device={"rate_error": 0.2}),
    Row("readout protection", "F407", "READ_PROTECTED", ("LOADER_ANSWERS",), {"rdp": 1}),
    Row("another chip than configured", "F407", "WRONG_CHIP", request={"chip": "L476"}),
    Row("both boot addresses lead to the loader", "F756", "APPLICATION_UNREACHABLE", device={"options": {"BOOT_ADD0": 0x0040}}),
    Row("the same on an H7", "H743", "APPLICATION_UNREACHABLE", device={"options": {"BOOT_ADD0": 0x1FF0}}),
    Row(
        "a virgin G0 whose pin is ignored", "G071", "ENTRY_WOULD_BE_LOST", ("EMPTY",), {"options": {"nBOOT_SEL": 1}}, blank=True
    ),
    Row("loader V9.0 of the H743", "H743", "", ("GET_COUNT_ODD",), {"loader_id": 0x90}),
    Row("needs 2.6 s to start", "L476", "", ("LOADER_ANSWERS",), {"timing": Timing(startup_s=2.56)}),
    Row("H7A3 whose layout is unsure", "H7A3", "LAYOUT_UNKNOWN", ("IDENTIFIED",)),
    Row("a watchdog bites", "L476", "RESETS_ITSELF", before=crash_loop),
    Row(
        "nothing is wired",
        "L476",
        "NRST_NOT_WIRED",
        ("BOOT0_NOT_WIRED",),
        request={"wiring": Wiring()},
        before=Device.force_loader,
    ),
)


def examine(row: Row) -> tuple[list[dict[str, str]], Device]:
    bench = Bench(row.part, {"rate_error": 0.0, **row.device})
    if not row.blank:
        bench.put(make_image(bench.chip, 3000))
    row.before(bench.device)
    uart = VirtualUart(bench.device, **row.port)
    request = Request(**{"kind": "doctor", "wiring": WIRED, "chip": row.part, **row.request})
    account = Account()
    result = run(session.run(request), uart, account=account)
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
    assert not device.stats.erases
    assert not device.stats.programs
    assert not device.lines["boot0"]


def test_slow_get_id_supports_the_parity_finding() -> None:
    (row,) = [r for r in ROWS if r.code == "WRONG_PARITY"]
    found, _ = examine(row)
    assert "Get ID sent slowly is answered" in found[0]["text"]


def test_an_unknown_chip_is_told_with_its_id() -> None:
    found, _ = examine(Row("", "F407", "", request={"chip": ""}))
    assert not [f for f in found if f["level"] == "problem"]
    assert any(f["code"] == "IDENTIFIED" for f in found)
