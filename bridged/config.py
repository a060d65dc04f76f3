"""What was configured: one TOML file, read into frozen dataclasses.

The dataclasses below are the reference: each field has its default, its limits and one sentence of help in its metadata, from
which the validator and the reference documentation work. All mistakes of a file are reported at once, each with line,
column, what is allowed and the nearest known name.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


def _f(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] = (),
    kind: str = "",
) -> Any:
    """One configuration field. ``kind``: how a string is checked (``listen``, ``path``, ``line``, ``chip`` …)."""
    meta = {"help": help, "low": low, "high": high, "choices": choices, "kind": kind}
    if (isinstance(default, type) and dataclasses.is_dataclass(default)) or default in (dict, list):
        return field(default_factory=default, metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True, slots=True)
class Gateway:
    name: str = _f("", "Name of this gateway in greetings and metrics; empty: the host name.", high=64)
    state_dir: str = _f("", "Journal, images and traces; empty: $STATE_DIRECTORY, else /var/lib/bridged.", kind="path")


@dataclass(frozen=True, slots=True)
class Api:
    listen: str = _f("127.0.0.1:7100", "Line protocol, HOST:PORT; loopback only; empty: off.", kind="listen")
    socket: str = _f("", "Unix socket of the line protocol; empty: $RUNTIME_DIRECTORY/bridged.sock.", kind="path")
    metrics: str = _f("127.0.0.1:7102", "Prometheus metrics, HOST:PORT; loopback only; empty: off.", kind="listen")
    connections: int = _f(1000, "Most connections at once, all listeners together.", low=1, high=65536)
    idle_timeout_s: float = _f(300.0, "A client that says nothing for so long is closed.", low=1, high=86400)


@dataclass(frozen=True, slots=True)
class Store:
    limit_mib: int = _f(512, "Most space that staged images and uploads may take.", low=1, high=1048576)
    image_limit_mib: int = _f(32, "Largest file that is accepted.", low=1, high=4096)
    traces: int = _f(20, "How many flight recordings are kept.", low=0, high=10000)


@dataclass(frozen=True, slots=True)
class Jobs:
    queue_limit: int = _f(100, "Most jobs that may wait for one target.", low=1, high=10000)
    keep: int = _f(1000, "How many ended jobs are remembered.", low=10, high=1000000)
    resume_limit: int = _f(3, "How often an interrupted job is resumed before it fails.", low=0, high=100)


@dataclass(frozen=True, slots=True)
class Lines:
    """Control lines of one target. Names of lines: gpio: ``GPIO17``, ``pin:11``, ``LABEL:OFFSET``; modem: ``dtr``, ``rts``,
    ``!dtr``, ``!rts`` (! = the signal is inverted on its way to the pin). ``by-hand``: a person or a jumper sets it."""

    kind: str = _f("none", "How the lines are driven.", choices=("gpio", "modem", "socket", "none"))
    nrst: str = _f("", "The line that drives NRST; empty: not wired.", kind="line")
    boot0: str = _f("", "The line that drives BOOT0; empty: not wired; by-hand: held high by a person.", kind="line")
    power: str = _f("", "The line that switches the supply; empty: not wired.", kind="line")
    socket: str = _f("", "kind = socket: path of the Unix stream socket of the line box.", kind="path")
    nrst_active_low: bool = _f(True, "Electrically low holds the target in reset.")
    nrst_open_drain: bool = _f(True, "gpio: drive NRST low or let it float, never push it high.")
    boot0_active_low: bool = _f(False, "Electrically low selects the loader (a transistor in between).")
    power_active_low: bool = _f(False, "Electrically low switches the supply on.")
    reset_s: float = _f(0.02, "How long NRST is held low.", low=0.0001, high=10)
    boot0_setup_s: float = _f(0.005, "From BOOT0 to the release of NRST, at least.", low=0, high=10)
    enter: list[str] = _f(list, "Own sequence into the loader: boot0=0|1, nrst=0|1, power=0|1 (levels), wait=SECONDS.")
    leave: list[str] = _f(list, "Own sequence into the application, as `enter`.")


@dataclass(frozen=True, slots=True)
class Application:
    """What the application does on the same UART after it was started."""

    baud: int = _f(115200, "Baud rate of the application.", low=300, high=4000000)
    parity: str = _f("N", "Parity of the application.", choices=("N", "E", "O"))
    listen_s: float = _f(1.0, "How long the start of the application is listened to after a job.", low=0, high=60)


@dataclass(frozen=True, slots=True)
class Target:
    port: str = _f("", "Serial device; use a stable name (/dev/serial/by-id/..., /dev/ttyAMA0).", kind="path")
    chip: str = _f("", "Expected chip: a name (F756), or a product id (0x449); empty: any known.", kind="chip")
    baud: int = _f(115200, "First baud rate tried with the loader.", low=1200, high=1000000)
    flash_kib: int = _f(0, "Flash size where the chip does not tell; 0: ask the chip.", low=0, high=16384)
    layout: str = _f("", "Sector layout where option bits decide or the table is unsure; empty: ask the chip.")
    startup_s: float = _f(0.0, "From reset to the listening loader; 0: the table's value.", low=0, high=60)
    shares: list[str] = _f(list, "Names of targets that share UART, NRST, BOOT0 or power; they run one at a time.")
    lines: Lines = _f(Lines, "Control lines.")
    application: Application = _f(Application, "The application's side of the UART.")


@dataclass(frozen=True, slots=True)
class Config:
    gateway: Gateway = _f(Gateway, "This gateway.")
    api: Api = _f(Api, "Listeners.")
    store: Store = _f(Store, "Staged images.")
    jobs: Jobs = _f(Jobs, "Queue and journal.")
    targets: dict[str, Target] = _f(dict, "One table for each target: [targets.NAME].")
