"""Whether a job may be taken, and just before its session once more whether it may run: what it says, whom it concerns, room.

Each check is one function that raises; what is asked of signatures and versions is in ``policy``.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bridged.config import Config
from bridged.config import Policy as PolicyConfig
from bridged.config import Target as TargetConfig
from bridged.config.sharing import neighbours
from bridged.errors import BadRequest, ConsentMissing, StorageFailed, StorageFull, TooLarge
from bridged.images import content
from bridged.images.content import Source
from bridged.jobs import policy
from bridged.jobs.known import Known
from bridged.jobs.lane import Lane
from bridged.jobs.model import ID_CHARS, SENDING, JobKind, Submission
from bridged.jobs.results import JOB_LIMIT_BYTES
from bridged.target.wishes import wishes_of

FREE_BYTES = 8 << 20  # A session writes some 100 KiB of journal and up to a flash of kept bytes; below this none starts.
REQUEST_BYTES = 16384  # Canonical text of one request: it is stored with the job and with its idempotency id.


class Admission:
    """``state``: the directory whose file system must have room."""

    def __init__(
        self, config: Config, known: Known, store: Source, state: Path, free_bytes: Callable[[Path], int] | None = None
    ) -> None:
        self.config = config
        self._known = known
        self._store = store
        self._state = state
        self._policy = policy.Policy(config.signing)
        self._free_bytes = free_bytes or _free_bytes

    def check_neighbours(self, sub: Submission) -> None:
        """Who resets a neighbour names it. Raises ``ConsentMissing``; ``BadRequest`` where what is named is none."""
        found = neighbours(self.config.targets, sub.target) if sub.target in self.config.targets else ()
        named = [name for name in str(sub.params.get("resets") or "").split(",") if name]
        if strange := [name for name in named if name not in found]:
            known = f"it resets {', '.join(found)} as well" if found else "it resets no other target"
            raise BadRequest(
                f"resets={','.join(strange)}: a job on {sub.target} does not reset that; {known}", target=sub.target
            )
        if missing := [name for name in found if name not in named]:
            raise ConsentMissing(
                f"a job on {sub.target} resets {', '.join(missing)} as well, which shares its NRST or power: say resets="
                f"{','.join(found)}",
                target=sub.target,
                resets=",".join(found),
            )

    def check_policy(self, lane: Lane, image: str, params: Mapping[str, Any]) -> policy.Verdict:
        """Blocking. Raises ``BadSignature``, ``AgainstPolicy``, ``UnknownImage``."""
        rules, record = lane.settings.policy, self._known.of(lane.name)
        sig = str(params.get("sig") or "")
        if not sig and rules == PolicyConfig():
            return policy.Verdict()
        wanted = content.wanted(image, params)
        files = [(str(found.sha256), Path(found.path)) for found in (self._store.get(part.ref) for part in wanted.parts)]
        target = policy.Target(lane.name, record.pid, record.version)
        return self._policy.check(rules, target, wanted, files, sig)

    def check_space(self) -> None:
        """Raises ``StorageError``."""
        path = self._state
        try:
            free = self._free_bytes(path)
        except OSError as error:
            raise StorageFailed(f"the file system of {path}: {error.strerror or error}", errno=error.errno) from error
        if free < FREE_BYTES:
            text = f"{path} has {free >> 10} KiB left, a job that erases needs {FREE_BYTES >> 10} KiB"
            raise StorageFull(text, free_bytes=free, needed_bytes=FREE_BYTES)


def check_request(sub: Submission, settings: TargetConfig) -> None:
    """What no target and no disk need be asked about. Raises ``BadRequest``, ``TooLarge``, and what ``wishes_of`` raises."""
    if (sub.kind in SENDING) != bool(sub.image):
        raise BadRequest(f"a job of kind {sub.kind} {'needs an' if sub.kind in SENDING else 'takes no'} image")
    if sub.kind is JobKind.XMODEM and not settings.xmodem.success.expect:
        raise BadRequest(
            f"targets.{sub.target}.xmodem.success.expect is not configured: nothing would say whether a transfer went well",
            target=sub.target,
        )
    if len(sub.id) > ID_CHARS or not sub.id.isprintable():
        raise BadRequest(f"an id has at most {ID_CHARS} printable characters")
    if sub.kind is JobKind.READ:
        _check_range(sub.params)
    wishes_of(sub.kind.value, sub.params)  # What is never done, or not said clearly enough, waits in no queue.


def canonical(sub: Submission) -> str:
    """The same text for the same request. Raises ``BadRequest`` for what is no JSON or too much of it."""
    asked = {"kind": sub.kind.value, "target": sub.target, "image": sub.image, "params": sub.params}
    try:
        text = json.dumps(asked, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRequest(f"the options of the job are no plain values: {error}") from error
    if len(text) > REQUEST_BYTES:
        raise BadRequest(f"the options of the job take {len(text)} bytes, the limit is {REQUEST_BYTES}", limit=REQUEST_BYTES)
    return text


def _check_range(params: Mapping[str, Any]) -> None:
    """What a job may read. Raises ``BadRequest`` and ``TooLarge``."""
    address, length = params.get("address") or 0, params.get("length") or 0
    if not isinstance(address, int) or not isinstance(length, int) or address < 0 or length < 0 or address + length > 1 << 32:
        raise BadRequest("a job of kind read takes an address and a length within the 32-bit address space")
    if length > JOB_LIMIT_BYTES:
        text = f"{length} bytes are to be read, one job reads at most {JOB_LIMIT_BYTES}"
        raise TooLarge(text, length=length, limit=JOB_LIMIT_BYTES)


def _free_bytes(path: Path) -> int:
    found = os.statvfs(path)
    if found.f_flag & os.ST_RDONLY:
        # ext4 after an error of the disk, up to Linux 6.14; later ones go on saying that it can be written, and refuse.
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    return found.f_bavail * found.f_frsize
