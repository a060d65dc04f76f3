"""Job records and the one table of their states. Pure: no I/O, no clock.

A terminal state never changes. ``interrupted`` is not terminal: after a crash or a stop a job goes back to ``running`` or to
``failed``. ``advance`` is the only way from one state to the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class JobState(StrEnum):
    QUEUED = "queued"
    WAITING = "waiting"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    ROLLED_BACK = "rolled_back"
    CANCELED = "canceled"
    REJECTED = "rejected"
    TIMED_OUT = "timed_out"


TERMINAL = frozenset(
    {
        JobState.SUCCEEDED,
        JobState.FAILED,
        JobState.ROLLED_BACK,
        JobState.CANCELED,
        JobState.REJECTED,
        JobState.TIMED_OUT,
    }
)


class JobKind(StrEnum):
    FLASH = "flash"
    ENSURE = "ensure"
    VERIFY = "verify"
    READ = "read"
    ERASE = "erase"
    IDENTIFY = "identify"
    RESET = "reset"


@dataclass(frozen=True, slots=True)
class Submission:
    """What a client asks for. ``params``: validated options as JSON scalars (``addr``, ``address``, ``length``, ``force``,
    ``outside``, ``entry``, ``mode`` …). ``image``: SHA-256 (hex) of a staged file, empty where the kind needs none."""

    kind: JobKind
    target: str
    image: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    id: str = ""
    principal: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """One job as clients see it. Times are UTC seconds since the epoch, 0 where not yet."""

    id: str
    kind: JobKind
    target: str
    state: JobState
    seq: int
    image: str
    content: str
    params: dict[str, Any]
    principal: str
    created: float
    started: float = 0.0
    ended: float = 0.0
    phase: str = ""
    reason: str = ""
    done: int = 0
    total: int = 0
    attempts: int = 0
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL


@dataclass(frozen=True, slots=True)
class Update:
    """One change of a job, as WATCH shows it. ``seq`` is monotonic within a job. ``event``: an encoded event or empty.

    ``rate``: bytes a second in the current phase, 0 where unknown.
    """

    job: str
    target: str
    seq: int
    at: float
    state: JobState
    phase: str
    done: int
    total: int
    rate: float = 0.0
    code: str = ""
    event: dict[str, Any] = field(default_factory=dict)
