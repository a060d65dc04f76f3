"""What can happen during a session: phases and facts, as frozen values that know nothing of who listens.

Events travel up from the session process to the daemon as JSON (``encode``/``decode``); the daemon turns them into
journal entries, progress lines and metrics. Adding an event means adding a dataclass here and naming it in ``Event``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Phase(StrEnum):
    """Phases of a job in their usual order; a kind of job passes through those that it needs."""

    STAGE = "stage"
    LOCK = "lock"
    ACTIVATE = "activate"
    SYNC = "sync"
    IDENTIFY = "identify"
    PLAN = "plan"
    LOADER = "loader"  # The second-stage loader goes into the target's RAM.
    BACKUP = "backup"
    UNPROTECT = "unprotect"
    ERASE = "erase"
    WRITE = "write"
    VERIFY = "verify"
    READ = "read"
    BOOT = "boot"
    HEALTH = "health"
    PROTECT = "protect"
    RESTORE = "restore"
    RELEASE = "release"


@dataclass(frozen=True, slots=True)
class PhaseStarted:
    """``total``: bytes that this phase will handle, 0 where bytes are no measure."""

    phase: Phase
    total: int = 0


@dataclass(frozen=True, slots=True)
class Synced:
    """The loader answered. ``baud`` in bit/s; ``attempt`` counts from 1."""

    baud: int
    attempt: int
    junk: str = ""


@dataclass(frozen=True, slots=True)
class Identified:
    """``flash_bytes``: as the chip says; ``uid``: hex or empty; ``loader``: protocol version such as ``3.1``.

    ``protected``: readout protection kept it from saying more.
    """

    pid: int
    family: str
    names: str
    loader: str
    loader_id: int | None
    flash_bytes: int
    uid: str
    layout: str
    protected: bool = False


@dataclass(frozen=True, slots=True)
class Planned:
    """What will be done, in numbers. ``seconds``: estimate at this baud rate; ``limit_s``: when something must be wrong."""

    sectors: int
    erase_bytes: int
    write_bytes: int
    keep_bytes: int
    seconds: float
    limit_s: float


@dataclass(frozen=True, slots=True)
class SectorErased:
    address: int
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SectorProven:
    """Every planned byte of this sector was read back and equals the plan; ``digest`` is its SHA-256 (hex)."""

    address: int
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class StepDone:
    """One command of the dialogue ended; ``seconds`` from its last byte sent to its ACK."""

    step: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Retried:
    step: str
    reason: str


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that a person should know though the job goes on. ``code`` is stable."""

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Booted:
    """What the application printed after the final release of NRST (first bytes, printable form)."""

    banner: str


@dataclass(frozen=True, slots=True)
class Restoring:
    """A phase of the session that brings the last known good image back; the phase of its job is ``restore`` all the while."""

    step: str


@dataclass(frozen=True, slots=True)
class RolledBack:
    """The last known good image is proven in flash again. ``health``: ``passed``, empty where no probe is configured."""

    image: str
    content: str
    health: str


Event = (
    PhaseStarted
    | Synced
    | Identified
    | Planned
    | SectorErased
    | SectorProven
    | StepDone
    | Retried
    | Warned
    | Booted
    | Restoring
    | RolledBack
)

_KINDS: dict[str, type[Any]] = {cls.__name__: cls for cls in Event.__args__}
_TYPES: dict[str, tuple[type[Any], ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (float, int),
    "str": (str,),
    "bool": (bool,),
    "Phase": (Phase,),
}


def encode(event: Event) -> dict[str, Any]:
    """JSON-ready: ``{"event": NAME, field: value, …}``."""
    return {"event": type(event).__name__, **dataclasses.asdict(event)}


def decode(data: dict[str, Any]) -> Event:
    """Inverse of ``encode``. Raises ``ValueError`` on anything else: it comes from another process."""
    fields = dict(data)
    cls = _KINDS.get(str(fields.pop("event", "")))
    if cls is None:
        raise ValueError(f"unknown event: {str(data)[:200]}")
    try:
        if cls is PhaseStarted:
            fields["phase"] = Phase(fields["phase"])
        event: Event = cls(**fields)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{cls.__name__} with wrong fields: {error}") from error
    for field in dataclasses.fields(cls):
        value = getattr(event, field.name)
        if not isinstance(value, _TYPES[str(field.type)]) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{cls.__name__}: {field.name} cannot be {str(value)[:80]!r}")
    return event
