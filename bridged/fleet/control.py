"""What an operator does at the broker: artifacts, roll-outs, inventory. Thin: ``rollout`` and ``select`` decide.

A roll-out is one key in the KV bucket with its spec and state, changed only by compare-and-set, and pages with its units that
never change. ``Drive`` carries one on: it reads, asks ``rollout.step``, stores the new state, and only then says what follows
from it. Two of them, or one after another on two machines, do no harm: a command is stored at most once (``only_first``), and
what is stored follows from the state.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import getpass
import hashlib
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bridged.errors import (
    BadRequest,
    FleetCommand,
    FleetError,
    FleetUnreachable,
    RolloutChanged,
    UnknownArtifact,
    UnknownRollout,
)
from bridged.fleet import rollout, wire
from bridged.fleet.link import Link, Message
from bridged.fleet.rollout import OVER, Phase, Spec, State, Step, Unit
from bridged.fleet.setup import COMMAND_S, NOT_FOUND, admit
from bridged.fleet.wire import Artifact, Progress, Report

log = logging.getLogger(__name__)

PAGE_UNITS = 2000  # Some 100 KB; a message of a broker has 1 MiB at most.
MAX_UNITS = 1_000_000  # 500 pages; whoever has more begins several.
LIMIT_BYTES = 32 << 20  # As ``store.image_limit_mib`` of a gateway.
TRIES = 5
LOOK_S = 60.0  # A report that got lost on its way to us is read from its stream so often.
TURN_S = 1.0  # Reports come in by the hundred; they are counted so often.
AT_ONCE = 64  # Publications under way: each waits for a quorum of disks.


# --- artifacts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stored:
    """``sig``: base64 of its ``.minisig``, which goes with every job that wants it. ``at``: when it was put, UTC seconds."""

    artifact: Artifact
    sig: str = ""
    at: float = field(default=0.0, compare=False)


async def put(link: Link, path: Path, name: str = "", type: str = "auto", sig: Path | None = None) -> tuple[Stored, bool]:
    """A file into the object store, named by its SHA-256; whether it is new. The same file again moves nothing."""
    data = path.read_bytes()
    if not 0 < len(data) <= LIMIT_BYTES:
        raise BadRequest(f"{path} has {len(data)} bytes; an artifact has 1 to {LIMIT_BYTES}")
    words = base64.b64encode(sig.read_bytes()).decode() if sig else ""
    made = Stored(Artifact(hashlib.sha256(data).hexdigest(), len(data), name or path.name, type), words)
    known = await find(link, made.artifact.sha256, missing=None)
    if known == made:
        return made, False
    description = json.dumps({"name": made.artifact.name, "type": type, "sig": words})
    for attempt in range(TRIES):
        try:
            with link.doing(f"putting {path}"):
                store = await link.js.object_store(wire.ARTIFACTS)
                meta = link.api.ObjectMeta(
                    description=description, options=link.api.ObjectMetaOptions(max_chunk_size=wire.CHUNK_BYTES)
                )
                await store.put(made.artifact.sha256, data, meta=meta)
            return made, True
        except FleetError as error:
            # nats-py has taken back what it put; while a leader is elected that is what happens.
            if attempt == TRIES - 1 or link.over.is_set() or not error.retryable:
                raise
            await asyncio.sleep(attempt + 1)
    raise AssertionError("unreachable")


async def artifacts(link: Link) -> list[Stored]:
    """All of them, by name."""
    found = [_stored(message) async for message in link.snapshot(wire.ARTIFACT_STREAM, f"$O.{wire.ARTIFACTS}.M.>")]
    return sorted((one for one in found if one), key=lambda one: one.artifact.name)


async def find(link: Link, word: str, *, missing: type[FleetError] | None = UnknownArtifact) -> Stored | None:
    """By SHA-256, by the first 8 digits or more of it, or by its name. Raises ``missing``."""
    if len(word) == 64:
        subject = f"$O.{wire.ARTIFACTS}.M.{base64.urlsafe_b64encode(word.encode()).decode()}"
        message = await link.newest(wire.ARTIFACT_STREAM, subject)
        found = [one] if message and (one := _stored(message)) else []
    else:
        known = await artifacts(link)
        found = [one for one in known if one.artifact.name == word]
        found = found or [one for one in known if len(word) >= 8 and one.artifact.sha256.startswith(word)]
    if len(found) == 1:
        return found[0]
    if found:
        raise BadRequest(f"{len(found)} artifacts are called {word}; say which by its SHA-256")
    if missing:
        raise missing(f"there is no artifact {word[:80]!r}")
    return None


def _stored(message: Message) -> Stored | None:
    try:
        data = json.loads(message.data)
        if data.get("deleted"):
            return None
        words = json.loads(data.get("description") or "{}")
        artifact = Artifact(str(data["name"]), int(data["size"]), str(words.get("name", "")), str(words.get("type", "auto")))
        return Stored(artifact, str(words.get("sig", "")), message.at)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # Somebody else's object.


# --- roll-outs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rollout:
    """As it is stored. ``revision``: for compare-and-set."""

    spec: Spec
    state: State
    units: int
    created: float
    by: str
    revision: int = 0


def whoami() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"


def _subject(key: str) -> str:
    return f"$KV.{wire.ROLLOUTS}.{key}"


def encode(one: Rollout) -> bytes:
    spec, state = one.spec, one.state
    artifact = spec.artifact
    data = {
        "v": wire.VERSION,
        "id": spec.id,
        "created": one.created,
        "by": one.by,
        "units": one.units,
        "artifact": artifact
        and {"sha256": artifact.sha256, "size": artifact.size, "name": artifact.name, "type": artifact.type},
        "kind": spec.kind,
        "options": dict(spec.options),
        **{name: getattr(spec, name) for name in _LIMITS},
        "state": {"phase": str(state.phase), **{name: getattr(state, name) for name in _STATE}},
    }
    return json.dumps(data, separators=(",", ":")).encode()


_LIMITS = ("max_failures", "max_share", "share_after", "wave_timeout_s", "soak_s", "expires_s")
_STATE = ("wave", "released", "settled", "round", "retract", "reason")


def decode(raw: bytes, revision: int) -> Rollout:
    """Raises ``FleetCommand``; ``UnknownRollout`` for one that was removed."""
    data = wire.decode(raw)
    if data.get("removed"):
        raise UnknownRollout(f"roll-out {str(data.get('id'))[:64]} was removed", rollout=str(data.get("id"))[:64])
    try:
        artifact = data["artifact"] and Artifact(**data["artifact"])
        spec = Spec(str(data["id"]), artifact, str(data["kind"]), data["options"], **{name: data[name] for name in _LIMITS})
        said = data["state"]
        state = State(Phase(said["phase"]), **{name: said[name] for name in _STATE})
        state = replace(state, released=tuple(state.released))
        return Rollout(spec, state, int(data["units"]), float(data["created"]), str(data["by"]), revision)
    except (KeyError, TypeError, ValueError) as error:
        raise FleetCommand(f"a roll-out that cannot be read: {error}") from error


async def create(link: Link, spec: Spec, units: Sequence[Unit], now: float) -> Rollout:
    """Store it; nothing is said to anybody yet. Raises ``BadRequest`` where the name is taken."""
    if not wire.TOKEN.fullmatch(spec.id):
        raise BadRequest(f"a roll-out is named by 1 to 64 of A-Z a-z 0-9 _ -, not {spec.id[:64]!r}")
    if not 0 < len(units) <= MAX_UNITS:
        raise BadRequest(f"{len(units)} targets are selected; a roll-out has 1 to {MAX_UNITS}")
    one = Rollout(spec, State(), len(units), now, whoami())
    raw = encode(one)
    if len(raw) > wire.MESSAGE_BYTES:
        raise BadRequest(f"the roll-out takes {len(raw)} bytes, at most {wire.MESSAGE_BYTES} are stored")
    if await link.newest(f"KV_{wire.ROLLOUTS}", _subject(spec.id)):
        raise BadRequest(f"there is a roll-out {spec.id} already")
    # The pages first: a roll-out that can be read is whole. Whoever creates the same name meanwhile loses at the first page.
    for number in range(0, len(units), PAGE_UNITS):
        page = [[unit.gateway, unit.target, unit.wave] for unit in units[number : number + PAGE_UNITS]]
        text = json.dumps(page, separators=(",", ":")).encode()
        subject = _subject(f"plan.{spec.id}.{number // PAGE_UNITS}")
        if not await link.publish(subject, text, only_first=True):
            there = await link.newest(f"KV_{wire.ROLLOUTS}", subject)
            if there is None or there.data != text:  # Ours from a try that was broken off would be the same.
                raise BadRequest(f"the name {spec.id} was used for other targets; choose another")
    if not await link.publish(_subject(spec.id), raw, only_first=True):
        raise BadRequest(f"there is a roll-out {spec.id} already")
    return await load(link, spec.id)


async def load(link: Link, id: str) -> Rollout:
    found = await link.newest(f"KV_{wire.ROLLOUTS}", _subject(id)) if wire.TOKEN.fullmatch(id) else None
    if found is None or not found.data:
        raise UnknownRollout(f"there is no roll-out {id[:64]!r}", rollout=id[:64])
    return decode(found.data, found.sequence)


async def units_of(link: Link, one: Rollout, gone: Collection[str] | None = None) -> list[Unit]:
    """Without those of retired gateways (``gone``, if the caller knows them), which nobody waits for any more."""
    gone = await retired(link) if gone is None else gone
    found: list[Unit] = []
    for page in range(-(-one.units // PAGE_UNITS)):
        message = await link.newest(f"KV_{wire.ROLLOUTS}", _subject(f"plan.{one.spec.id}.{page}"))
        if message is None:
            raise UnknownRollout(f"page {page} of the plan of {one.spec.id} is missing", rollout=one.spec.id)
        rows = json.loads(message.data)
        found += [Unit(str(gateway), str(target), int(wave)) for gateway, target, wave in rows if gateway not in gone]
    return found


async def rollouts(link: Link) -> list[Rollout]:
    """The oldest first."""
    found = []
    async for message in link.snapshot(f"KV_{wire.ROLLOUTS}", _subject("*")):
        if message.data:
            with contextlib.suppress(FleetCommand, UnknownRollout):
                found.append(decode(message.data, message.sequence))
    return sorted(found, key=lambda one: one.created)


async def store(link: Link, one: Rollout) -> Rollout:
    """Compare and set. Raises ``RolloutChanged``."""
    headers = {"Nats-Expected-Last-Subject-Sequence": str(one.revision)}
    try:
        with link.doing(f"changing roll-out {one.spec.id}"):
            answer = await link.js.publish(_subject(one.spec.id), encode(one), headers=headers)
    except FleetError as error:
        if error.facts.get("number") in (10071, 10164):
            raise RolloutChanged(f"roll-out {one.spec.id} was changed by somebody else meanwhile") from error
        raise
    return replace(one, revision=int(answer.seq))


async def change(link: Link, id: str, how: Callable[[Rollout], Rollout]) -> Rollout:
    """Change it as a person wants, whatever a machine that drives it does at the same time."""
    for attempt in range(TRIES):
        one = await load(link, id)
        try:
            return await store(link, how(one))
        except RolloutChanged:
            if attempt == TRIES - 1:
                raise
    raise AssertionError("unreachable")


async def reports(link: Link, id: str) -> dict[tuple[str, str], Report]:
    found: dict[tuple[str, str], Report] = {}
    async for message in link.snapshot(wire.REPORTS, wire.reports_of(id)):
        note(found, message)
    return found


def note(found: dict[tuple[str, str], Report], message: Message) -> None:
    """A newer report takes the place of an older one; an end is not undone by a message that was overtaken."""
    try:
        one = wire.report(message.data, message.subject)
    except FleetCommand as error:
        log.warning("%s", error.message)
        return
    old = found.get((one.gateway, one.target))
    if old is None or one.round > old.round or (one.round == old.round and not old.ended):
        found[(one.gateway, one.target)] = one


class Drive:
    """Carries one roll-out on until it is over or paused. ``turn`` is one look and its consequences."""

    def __init__(self, link: Link, id: str, now: Callable[[], float] = time.time) -> None:
        self._link, self._id, self._now = link, id, now
        self._units: list[Unit] = []
        self._reports: dict[tuple[str, str], Report] = {}
        self.progress: dict[tuple[str, str], Progress] = {}  # The last word of each, from where it is told.
        self._said: set[str] = set()
        self.said = 0  # stored by us, and not before by somebody else

    async def begin(self) -> Rollout:
        """Listen first, then read: nothing falls between the two."""
        one = await load(self._link, self._id)
        self._units = await units_of(self._link, one)
        await self._link.listen(wire.reports_of(self._id), lambda message: note(self._reports, message))
        await self._link.listen(wire.progress_of(self._id), self._hear)
        await self.look()
        return one

    def _hear(self, message: Message) -> None:
        with contextlib.suppress(FleetCommand):  # It is in nobody's way: the next one comes soon.
            found = wire.progress(message.data, message.subject)
            self.progress[(found.gateway, found.target)] = found

    async def look(self) -> None:
        for key, found in (await reports(self._link, self._id)).items():
            old = self._reports.get(key)
            if old is None or found.round > old.round or (found.round == old.round and not old.ended):
                self._reports[key] = found

    async def turn(self) -> tuple[Rollout, Step]:
        """The state that is stored, and what follows from it, which was said."""
        for attempt in range(TRIES):
            one = await load(self._link, self._id)
            made = rollout.step(one.spec, self._units, one.state, self._reports, self._now())
            if made.state != one.state:
                try:
                    one = await store(self._link, replace(one, state=made.state))
                except RolloutChanged:
                    # What was to be said follows from a state that was not stored.
                    if attempt == TRIES - 1:
                        raise
                    continue
            await self._say([*made.say, *made.take_back])
            return one, made
        raise AssertionError("unreachable")

    async def _say(self, messages: Sequence[wire.Command | wire.Cancel]) -> None:
        news = [one for one in messages if one.subject not in self._said]
        gate = asyncio.Semaphore(AT_ONCE)

        async def say(message: wire.Command | wire.Cancel) -> None:
            async with gate:
                for attempt in range(TRIES):
                    try:
                        self.said += await self._link.publish(message.subject, message.encode(), only_first=True)
                        break
                    except FleetUnreachable:
                        if attempt == TRIES - 1 or self._link.over.is_set():
                            raise
                        await asyncio.sleep(1.0)
            self._said.add(message.subject)

        try:
            async with asyncio.TaskGroup() as group:
                for message in news:
                    group.create_task(say(message))
        except ExceptionGroup as errors:  # What one of them says is what the caller understands, and may try again.
            raise errors.exceptions[0] from errors

    async def run(self, show: Callable[[Rollout, Step], None]) -> tuple[Rollout, Step]:
        """Until it is over, or paused. What has been released goes on without us."""
        await self.begin()
        looked = time.monotonic()
        while True:
            one, made = await self.turn()
            show(one, made)
            if made.state.phase is not Phase.RUNNING:
                return one, made
            if self._link.over.is_set():
                raise FleetUnreachable(f"the connection to {self._link.server} ended", server=self._link.server)
            if time.monotonic() - looked > LOOK_S:
                await self.look()
                looked = time.monotonic()
            await asyncio.sleep(TURN_S)

    @property
    def units(self) -> Sequence[Unit]:
        return self._units

    @property
    def reports(self) -> Mapping[tuple[str, str], Report]:
        return self._reports


# --- inventory --------------------------------------------------------------------------------------------------------


async def inventory(link: Link) -> list[dict[str, Any]]:
    """What gateways said of their targets, as ``select`` reads it."""
    found = [row async for row in _rows(link)]
    return sorted(found, key=lambda row: (str(row["gateway"]), str(row["target"])))


async def _rows(link: Link) -> AsyncIterator[dict[str, Any]]:
    async for message in link.snapshot(wire.STATES, f"{wire.ROOT}.*.state.target.*"):
        try:
            row = wire.decode(message.data)
        except FleetCommand as error:
            log.warning("%s: %s", message.subject, error.message)
            continue
        if message.subject == wire.target_subject(str(row.get("gateway")), str(row.get("target"))):
            yield {**row, "told": message.at}
        else:
            log.warning("%s: a message in the name of %s", message.subject, str(row.get("gateway"))[:64])


async def desired(link: Link) -> dict[tuple[str, str], tuple[str, str]]:
    """What the newest roll-out that reached a target wanted there. Units of waves that were never released do not count, nor
    what was taken back."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    gone = await retired(link)
    for one in await rollouts(link):
        if one.spec.artifact and one.spec.kind in wire.FLASHING and one.state.phase is not Phase.CANCELED:
            said = await reports(link, one.spec.id) if one.state.retract else None
            for unit in await units_of(link, one, gone):
                if unit.wave <= one.state.wave and (said is None or _kept(said.get(unit.key))):
                    found[unit.key] = (one.spec.artifact.sha256, one.spec.id)
    return found


def _kept(found: Report | None) -> bool:
    return found is not None and found.ended and found.state != "canceled"


# --- tidying ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rubbish:
    """What nothing needs any more. ``broken_off``: names of roll-outs whose removal was."""

    rollouts: tuple[Rollout, ...] = ()
    artifacts: tuple[Stored, ...] = ()
    broken_off: tuple[str, ...] = ()


async def rubbish(link: Link, older_s: float, now: float) -> Rubbish:
    """A roll-out may go once it is over, nobody can begin a command of it any more, nothing happened in it for ``older_s``, and
    no target is left for which it says what is wanted. An artifact may go with the last roll-out that names it."""
    everybody, needed = await rollouts(link), {rollout for _, rollout in (await desired(link)).values()}
    old = tuple(one for one in everybody if one.spec.id not in needed and now > last_of(one) + older_s)
    named = {one.spec.artifact.sha256 for one in everybody if one not in old and one.spec.artifact}
    left = [one for one in await artifacts(link) if one.artifact.sha256 not in named and now > one.at + older_s]
    broken = []
    async for message in link.snapshot(f"KV_{wire.ROLLOUTS}", _subject("*")):
        with contextlib.suppress(FleetCommand):
            if message.data and (data := wire.decode(message.data)).get("removed") and not data.get("whole"):
                broken.append(str(data["id"]))
    return Rubbish(old, tuple(left), tuple(broken))


def last_of(one: Rollout) -> float:
    """When a roll-out was last of any use: until then a gateway that was away may begin what it was told."""
    if one.state.phase not in OVER:
        return float("inf")
    said = max(one.state.released, default=one.created)
    if one.state.retract:
        return said
    return said + (min(one.spec.expires_s, COMMAND_S) if one.spec.expires_s else COMMAND_S)


async def remove_rollout(link: Link, one: Rollout) -> None:
    """Its name stays taken: gateways remember what it told them, and would take another one for it."""
    data = {"v": wire.VERSION, "id": one.spec.id, "removed": True, "artifact": None}
    headers = {"Nats-Expected-Last-Subject-Sequence": str(one.revision)}
    try:
        with link.doing(f"removing roll-out {one.spec.id}"):
            await link.js.publish(_subject(one.spec.id), json.dumps(data).encode(), headers=headers)
    except FleetError as error:
        if error.facts.get("number") in (10071, 10164):
            raise RolloutChanged(f"roll-out {one.spec.id} was changed by somebody else meanwhile") from error
        raise
    await finish_removal(link, one.spec.id)


async def finish_removal(link: Link, id: str) -> None:
    await link.purge(f"KV_{wire.ROLLOUTS}", _subject(f"plan.{id}.*"))
    await link.purge(wire.REPORTS, wire.reports_of(id))
    await link.publish(_subject(id), json.dumps({"v": wire.VERSION, "id": id, "removed": True, "whole": True}).encode())


async def users_of(link: Link, sha256: str, now: float) -> list[str]:
    """Roll-outs by which a gateway may still want this artifact."""
    found = []
    for one in await rollouts(link):
        if one.spec.artifact and one.spec.artifact.sha256 == sha256 and now < last_of(one):
            tally = rollout.count(one.spec, await units_of(link, one), one.state, await reports(link, one.spec.id), now)
            if one.state.phase is not Phase.DONE or tally.ended < tally.units:
                found.append(one.spec.id)
    return found


async def remove_artifact(link: Link, sha256: str) -> None:
    with link.doing(f"removing artifact {sha256[:12]}"):
        store = await link.js.object_store(wire.ARTIFACTS)
        await store.delete(sha256)


# --- retired gateways -------------------------------------------------------------------------------------------------


def _retired(gateway: str) -> str:
    return _subject(f"retired.{gateway}")


async def retired(link: Link) -> set[str]:
    found = link.snapshot(f"KV_{wire.ROLLOUTS}", _retired("*"))
    return {message.subject.rpartition(".")[2] async for message in found if message.data}


async def retire(link: Link, gateway: str) -> None:
    """It gets nothing any more, its inventory and what waited for it go, and no roll-out waits for it. What it has reported
    stays with its roll-outs. May be repeated."""
    await link.publish(_retired(gateway), wire.encode_state({"gateway": gateway, "by": whoami()}))
    try:
        with link.doing(f"removing the consumer of {gateway}"):
            await link.js.delete_consumer(wire.COMMANDS, gateway)
    except FleetError as error:
        if error.facts.get("number") not in NOT_FOUND:
            raise
    await link.purge(wire.COMMANDS, wire.command_filter(gateway))
    await link.purge(wire.STATES, f"{wire.ROOT}.{gateway}.state.>")


async def readmit(link: Link, gateway: str, gone: Collection[str]) -> bool:
    """The durable consumer of a gateway, which is retired no longer; whether the consumer is new. ``gone``: who is retired."""
    if gateway in gone:
        await link.purge(f"KV_{wire.ROLLOUTS}", _retired(gateway))
    return await admit(link, gateway)


async def waiting_of(link: Link, gateway: str) -> int | None:
    """How many commands its consumer has not given out; None where it has none."""
    try:
        with link.doing(f"looking at the consumer of {gateway}"):
            info = await link.js.consumer_info(wire.COMMANDS, gateway)
    except FleetError as error:
        if error.facts.get("number") in NOT_FOUND:
            return None
        raise
    return int(info.num_pending or 0) + int(info.num_ack_pending or 0)
