"""The queue of one target: who waits, who runs, and what a crash left there. Data; what is done with it is in ``turns``.

Targets that share wires (``shares`` in the configuration) are one group, with one lock between their lanes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from bridged.config import Config
from bridged.config import Target as TargetConfig
from bridged.config.sharing import groups
from bridged.events import SectorProven
from bridged.images.content import Content
from bridged.jobs import policy, rollback
from bridged.jobs.model import Job, JobState, Update
from bridged.jobs.ports import TargetPort
from bridged.jobs.records import Backup


@dataclass(slots=True)
class Live:
    """A job that has not ended, and what is only in memory about it. ``lock`` is held while its state changes.

    ``cancel``: somebody asked for its end. ``in_session``: its session process may live. ``verdict``: what the policy of its
    target found about the image. ``uid``: of the chip that answers; ``backup``: what an earlier run kept, and of which chip.
    ``resumed``: it was interrupted before this run. ``restore``: it brings the last known good image back by now. ``unsaved``,
    ``unsaved_proven``: what the journal does not have yet, and ``saving`` while somebody writes it. ``logged``: notable events
    so far. ``phase_since``, ``shown``: monotonic seconds at which the phase began and progress was last told.
    """

    job: Job
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    cancel: bool = False
    in_session: bool = False
    image_name: str = ""
    verdict: policy.Verdict = policy.Verdict()
    uid: str = ""
    backup: Backup = Backup()
    resumed: bool = False
    restore: rollback.Restore | None = None
    unsaved: list[Update] = field(default_factory=list)
    unsaved_proven: list[SectorProven] = field(default_factory=list)
    saving: bool = False
    logged: int = 0
    phase_since: float = 0.0
    shown: float = 0.0
    staging: asyncio.Task[Content] | None = None

    def leave_staging(self) -> None:
        """Who ends it waits for no parser."""
        if self.staging is not None:
            self.staging.cancel()

    @property
    def half_done(self) -> bool:
        """Interrupted after an erase may have begun: it goes on whatever holds back others, for its target has no firmware."""
        return self.job.touched and self.job.state is JobState.INTERRUPTED

    def pending(self) -> tuple[tuple[Update, ...], tuple[SectorProven, ...]]:
        return tuple(self.unsaved), tuple(self.unsaved_proven)

    def saved(self, pending: tuple[tuple[Update, ...], tuple[SectorProven, ...]]) -> None:
        updates, proven = set(u.seq for u in pending[0]), set(pending[1])
        self.unsaved = [u for u in self.unsaved if u.seq not in updates]
        self.unsaved_proven = [p for p in self.unsaved_proven if p not in proven]


@dataclass(slots=True)
class Debt:
    """A target that a crash left in a session of ``job``. ``until``: monotonic end of its hazard; ``tried``: releasing it
    failed once."""

    until: float
    job: str
    tried: bool = False


@dataclass(slots=True)
class Group:
    """Targets that share wires, and so run one at a time."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    lanes: list[Lane] = field(default_factory=list)


@dataclass(slots=True)
class Lane:
    """``wake``: something happened that its turn must look at. ``free``: no job runs or is half done.
    ``admitting``: jobs on their way to the disk."""

    name: str
    settings: TargetConfig
    port: TargetPort
    group: Group
    queue: deque[Live] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    free: asyncio.Event = field(default_factory=asyncio.Event)
    running: Live | None = None
    debt: Debt | None = None
    admitting: int = 0

    def head(self) -> Live | None:
        while self.queue and self.queue[0].job.terminal:
            self.queue.popleft()
        return self.queue[0] if self.queue else None

    def mark_free(self) -> None:
        """At the beginning of each turn, whatever ended the job before it and however."""
        head = self.head()
        if head is not None and head.half_done:
            self.free.clear()
        else:
            self.free.set()

    @property
    def waiting(self) -> int:
        return sum(not live.job.terminal and live is not self.running for live in self.queue)


def lanes_of(config: Config, targets: Mapping[str, TargetPort]) -> dict[str, Lane]:
    """A lane for each target; targets that share wires, directly or through others, are one group."""
    settings = {name: config.targets.get(name, TargetConfig()) for name in targets}
    group_of = {name: group for names in groups(settings) for group in [Group()] for name in names}
    lanes = {name: Lane(name, settings[name], port, group_of[name]) for name, port in targets.items()}
    for lane in lanes.values():
        lane.group.lanes.append(lane)
    return lanes
