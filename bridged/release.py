"""``bridged serve --release-only``: targets that a killed daemon left in a session go back to their applications (P4)."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bridged import config
from bridged.config.sharing import groups
from bridged.errors import BridgedError, StorageError
from bridged.jobs.journal import FILE_NAME, Journal
from bridged.jobs.records import OpenSession
from bridged.logs import Notice, log_error, note

log = logging.getLogger("bridged")

_Together = tuple[asyncio.Lock, float]  # What targets on the same wires have in common: who has them, and the longest hazard.
RELEASE_WAIT_S = 30.0  # How long it waits for a device that somebody else still holds, or that is absent.


async def release_left(loaded: config.Config, state: Path) -> int:
    """Bring every target that the journal shows in a session back to its application, after its hazard; touch no other (P4).

    For ``ExecStopPost=``: no daemon and no session process lives any more. Returns how many could not be released; for those
    the entry stays in the journal, and the next start tries again.
    """
    if not (state / FILE_NAME).exists():
        return 0
    try:
        journal = await asyncio.to_thread(_open_journal, state)
    except StorageError as error:
        log_error(error, "releasing what was left, by a copy of the journal")
        return await _release_by_copy(loaded, state)
    try:
        return (await _release_all(loaded, journal, await asyncio.to_thread(journal.sessions))).count(False)
    finally:
        await asyncio.to_thread(journal.close)


def _open_journal(state: Path) -> Journal:
    return Journal.open(state / FILE_NAME)


async def _release_by_copy(loaded: config.Config, state: Path) -> int:
    """The disk takes nothing any more, so no daemon will come up: all the more must no target stay in its loader.

    What was released cannot be written down there, and systemd tries a few starts; it is remembered until the next boot.
    """
    folder = Path(os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0] or tempfile.gettempdir())
    memory = folder / f"{FILE_NAME}.released"
    known = memory.read_text().split() if memory.exists() else []
    with Journal.copied(state / FILE_NAME, folder) as journal:
        left = {f"{session.job}@{session.at}": session for session in journal.sessions()}
        left = {key: session for key, session in left.items() if key not in known}
        done = await _release_all(loaded, journal, list(left.values()))
        memory.write_text("\n".join([*known, *(key for key, good in zip(left, done, strict=True) if good)]))
    return done.count(False)


async def _release_all(loaded: config.Config, journal: Journal, sessions: Sequence[OpenSession]) -> list[bool]:
    """Of each, whether its target is back."""
    if not sessions:
        return []
    # Only now: this runs at every stop, and on a small gateway half of its seconds would be spent on what it never uses.
    from bridged.jobs.ports import Clock
    from bridged.jobs.recovery import hazard_left_s

    left_s = {left.target: hazard_left_s(left, Clock()) for left in sessions}
    together: dict[str, _Together] = {}
    for group in groups(loaded.targets):  # None moves wires that it shares within the hazard of another, nor while it has them.
        shared = asyncio.Lock(), max(left_s.get(name, 0.0) for name in group)
        together.update(dict.fromkeys(group, shared))
    alone = asyncio.Lock(), 0.0
    return await asyncio.gather(*(_release(loaded, journal, left, together.get(left.target, alone)) for left in sessions))


async def _release(loaded: config.Config, journal: Journal, left: OpenSession, together: _Together) -> bool:
    from bridged.jobs.records import Change
    from bridged.jobs.recovery import empty_chip
    from bridged.target.owner import Target

    settings = loaded.targets.get(left.target)
    if settings is None:
        log.warning("target %s was left in a session and is not configured any more: not released", left.target)
        return False
    target = Target(left.target, settings)
    target.wires, hazard_s = together
    target.hold_off(hazard_s)
    log.info("target %s was left in a session of job %s; it is released in %.0f s", left.target, left.job, hazard_s)
    try:
        await target.open()
        await target.wait_idle_hardware(hazard_s + RELEASE_WAIT_S)
        record = next((one for one in await asyncio.to_thread(journal.targets) if one.name == left.target), None)
        empty = await asyncio.to_thread(empty_chip, journal, left.job, record, settings)
        erased = (await asyncio.to_thread(journal.job, left.job)).touched
        await target.release_after(0.0, empty, erased=erased)
        await asyncio.wrap_future(journal.apply(Change(close=left.target)))
    except BridgedError as error:
        log_error(error, f"releasing target {left.target}", target=left.target, job=left.job)
        return False
    finally:
        await target.close()
    text = "target %s is back in its application"
    log.info(text, left.target, extra=note(Notice.TARGET_RELEASED, target=left.target, job=left.job))
    return True
