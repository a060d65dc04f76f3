"""Job records and the one table of their states. Pure: no I/O, no clock.

A terminal state never changes. ``interrupted`` is not terminal: after a crash or a stop a job goes back to ``running``, or to
``failed``; a person may also cancel it while its target is absent. ``advance`` is the only way from one state to the next and
``note`` the only way to record something within a state; both raise ``seq``. ``TRANSITIONS`` is the only table, and the
diagram of the documentation is printed from it by ``diagram``.

Nothing here knows of queues, files, targets or clients.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from bridged.errors import JobError

ID_CHARS = 128  # Of an idempotency id: a UUID has 36, names of builds rarely more than 100. Kept as long as its job.


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

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    # A job that is not running has touched nothing: it can be refused, canceled, or fail because its target is broken.
    JobState.QUEUED: frozenset(
        {JobState.WAITING, JobState.RUNNING, JobState.CANCELED, JobState.REJECTED, JobState.FAILED},
    ),
    JobState.WAITING: frozenset({JobState.RUNNING, JobState.CANCELED, JobState.REJECTED, JobState.FAILED}),
    JobState.RUNNING: TERMINAL | {JobState.INTERRUPTED},
    # How often a job goes round between running and interrupted is bounded by ``jobs.resume_limit``.
    JobState.INTERRUPTED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELED}),
    **{state: frozenset[JobState]() for state in sorted(TERMINAL)},
}


class JobKind(StrEnum):
    FLASH = "flash"
    ENSURE = "ensure"
    VERIFY = "verify"
    READ = "read"
    ERASE = "erase"
    IDENTIFY = "identify"
    DOCTOR = "doctor"
    OPTION_BYTES = "option-bytes"
    PROTECT = "protect"
    UNPROTECT = "unprotect"
    RESET = "reset"
    XMODEM = "xmodem"


WITH_IMAGE = frozenset({JobKind.FLASH, JobKind.ENSURE, JobKind.VERIFY})
CHANGING = frozenset({JobKind.OPTION_BYTES, JobKind.PROTECT, JobKind.UNPROTECT})
DESTRUCTIVE = frozenset({JobKind.FLASH, JobKind.ENSURE, JobKind.ERASE, JobKind.XMODEM}) | CHANGING
PROVING = WITH_IMAGE | {JobKind.ERASE}
WRITING = frozenset({JobKind.FLASH, JobKind.ENSURE, JobKind.XMODEM})  # What a policy is asked about.
SENDING = WITH_IMAGE | {JobKind.XMODEM}

# Why a job waits or was interrupted (``Job.reason``), where that is no code of an error.
PARKED = "stopped"
ABSENT = "target_absent"
LOCKED = "lock"
WINDOW = "window"
RESTART = "restart"


@dataclass(frozen=True, slots=True)
class Submission:
    """What a client asks for. ``params``: validated options as JSON scalars (``addr``, ``address``, ``length``, ``force``,
    ``outside``, ``entry``, ``mode`` …). ``image``: one or more staged images as ``images.content`` reads them, by any name; in
    a ``Job`` by SHA-256 and with their addresses, in that module's canonical text. Empty where the kind needs none."""

    kind: JobKind
    target: str
    image: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    id: str = ""
    principal: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """One job as clients see it. Times are UTC seconds since the epoch, 0 where not yet.

    ``principal``, ``source``: who submitted it, and from where.

    ``touched``: an erase may have begun; from then on the job is not canceled without force, nor called rejected.
    ``reason``: why it waits, was interrupted or ended. ``attempts``: how often it was started, resumptions after an
    orderly stop not counted.
    """

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
    touched: bool = False
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    source: str = ""

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL


@dataclass(frozen=True, slots=True)
class Update:
    """One change of a job, as WATCH shows it. ``event``: an encoded event or empty.

    ``seq`` is monotonic within a job and never used twice for what ``log`` keeps; mere progress repeats the last one.

    ``rate``: bytes a second in the current phase, 0 where unknown. ``reason``: why it waits or was interrupted, where ``code``
    does not say it.
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
    reason: str = ""


def advance(job: Job, to: JobState, **changes: Any) -> Job:
    """``job`` in state ``to``, with other ``changes`` and the next ``seq``. Raises ``JobError`` for an illegal step."""
    if to not in TRANSITIONS[job.state]:
        allowed = ", ".join(sorted(TRANSITIONS[job.state])) or "nothing: it is terminal"
        raise JobError(
            f"job {job.id} cannot go from {job.state} to {to}; allowed from there: {allowed}",
            job=job.id,
            state=job.state.value,
            to=to.value,
        )
    return replace(job, state=to, seq=job.seq + 1, **changes)


def note(job: Job, **changes: Any) -> Job:
    """``job`` in its state, with ``changes`` and the next ``seq``. Raises ``JobError`` when the job has ended."""
    if job.terminal:
        raise JobError(f"job {job.id} has ended as {job.state}; nothing can be added to it", job=job.id, state=job.state.value)
    return replace(job, seq=job.seq + 1, **changes)


def update_of(job: Job, at: float, *, rate: float = 0.0, event: dict[str, Any] | None = None) -> Update:
    """The ``Update`` that shows ``job`` as it is."""
    code = str((job.error or {}).get("code", ""))
    reason = job.reason if job.reason != code else ""
    return Update(job.id, job.target, job.seq, at, job.state, job.phase, job.done, job.total, rate, code, event or {}, reason)


def diagram() -> str:
    """The table as a Mermaid state diagram, in a stable order."""
    lines = ["stateDiagram-v2", "    [*] --> queued"]
    for state, targets in TRANSITIONS.items():
        lines += [f"    {state} --> {to}" for to in sorted(targets)]
    lines += [f"    {state} --> [*]" for state in sorted(TERMINAL)]
    return "\n".join(lines) + "\n"
