"""``bridged fleet …``: the command line of whoever runs a fleet. There is no server of ours: all state is at the broker, so any
operator's machine can begin, watch, continue or end a roll-out. Words and tables here, decisions in ``rollout`` and ``select``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import re
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bridged.errors import BadRequest, BridgedError, FleetUnreachable
from bridged.fleet import control, rollout, select, setup, wire
from bridged.fleet.arguments import DONE, DRIFTED, FAILED, UNREACHABLE, USAGE, access, parser
from bridged.fleet.control import Drive, Rollout
from bridged.fleet.link import Link, connect
from bridged.fleet.rollout import OVER, Phase, Spec, Step

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
STEADY_S = 60.0  # After a link that held so long the next pause is short again.


def main(argv: Sequence[str]) -> int:
    logging.basicConfig(format="bridged fleet: %(message)s", level=logging.WARNING)
    options = parser().parse_args(argv)
    try:
        if options.command == "permissions":
            return _permissions(options)
        return asyncio.run(_connected(options))
    except FleetUnreachable as error:
        print(f"bridged fleet: {error.message}", file=sys.stderr)
        return UNREACHABLE
    except BridgedError as error:
        print(f"bridged fleet: {error.message}\n  {error.hint.remedy}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("bridged fleet: left; what was released goes on, `bridged fleet run` carries the rest on", file=sys.stderr)
        return 128 + signal.SIGINT


async def _connected(options: argparse.Namespace) -> int:
    """A link that breaks is made anew, for as long as a roll-out is carried on; everything else may be said again."""
    where, pause_s, told = access(options), FIRST_PAUSE_S, ""
    turn = secrets.randbelow(1 << 16)
    tries = len(where.servers)
    while True:
        link, started = None, time.monotonic()
        try:
            link = await connect(where, "bridged fleet", wire.inbox_of(options.user or "operator"), turn)
            return await COMMANDS[options.command](link, options)
        except FleetUnreachable as error:
            turn, tries = turn + 1, tries - 1
            if link is not None and (options.command == "run" or getattr(options, "follow", False)):
                tries = 100
            if tries <= 0:
                raise
            if time.monotonic() - started > STEADY_S:
                pause_s, told = FIRST_PAUSE_S, ""
            if error.message != told:  # Once, and not each time for as long as a cluster has no leader.
                told = error.message
                print(f"bridged fleet: {told}; trying again", file=sys.stderr)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        finally:
            if link is not None:
                await link.close()


def _permissions(options: argparse.Namespace) -> int:
    for name in (*options.gateway, *options.operator):
        if not wire.TOKEN.fullmatch(name):
            raise BadRequest(f"{name[:64]!r} is no name: 1 to 64 of A-Z a-z 0-9 _ -")
    print(setup.permissions(options.gateway, options.operator, certificates=options.certificates), end="")
    return DONE


async def _init(link: Link, options: argparse.Namespace) -> int:
    names = list(options.gateway)
    if options.gateways_from:
        try:
            names += options.gateways_from.read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadRequest(f"reading {options.gateways_from}: {reason}") from error
    for name in names:
        if not wire.TOKEN.fullmatch(name):
            raise BadRequest(f"{name[:64]!r} is no name of a gateway: 1 to 64 of A-Z a-z 0-9 _ -")
    for words in await setup.prepare(link, options.replicas):
        print(f"made {words}")
    gone = await control.retired(link)
    news = [name for name in names if await control.readmit(link, name, gone)]
    print(f"{len(news)} of {len(names)} gateways are new" if names else "ready; admit gateways with --gateway NAME")
    return DONE


async def _artifact(link: Link, options: argparse.Namespace) -> int:
    if options.action != "list" and options.file is None:
        raise BadRequest(f"which one? bridged fleet artifact {options.action} FILE")
    if options.action == "remove":
        made = await control.find(link, options.file)
        assert made is not None
        if users := await control.users_of(link, made.artifact.sha256, time.time()):
            raise BadRequest(
                f"{made.artifact.name} stays: a gateway may still be told to take it by {', '.join(users[:5])}; "
                f"first: bridged fleet cancel {users[0]}"
            )
        await control.remove_artifact(link, made.artifact.sha256)
        print("removed", file=sys.stderr)
        found = [made]
    elif options.action == "put":
        try:
            made, new = await control.put(link, Path(options.file), options.name, options.type, options.sig)
        except OSError as error:
            raise BadRequest(f"reading {error.filename}: {error.strerror}") from error
        found = [made]
        print("put" if new else "there already", file=sys.stderr)
    else:
        found = await control.artifacts(link)
    rows = [
        {"sha256": one.artifact.sha256, "size": one.artifact.size, "name": one.artifact.name, "signed": bool(one.sig)}
        for one in found
    ]
    _table(rows, options.json)
    return DONE


async def _chosen(link: Link, options: argparse.Namespace) -> tuple[control.Stored, list[rollout.Unit], list[select.Row]]:
    stored = await control.find(link, options.artifact)
    assert stored is not None
    wanted, first = select.terms(options.where), select.terms(options.canary)
    rows = select.chosen(await control.inventory(link), wanted)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", stored.artifact.name)[:40].strip("-")
    options.id = options.id or f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"

    def keys(found: Sequence[select.Row]) -> list[tuple[str, str]]:
        return [(str(row["gateway"]), str(row["target"])) for row in found]

    canary = keys(select.chosen(rows, first)) if first else []
    if first and not canary:
        raise BadRequest("no selected target is a canary: look at --canary")
    units = rollout.plan(options.id, keys(rows), [word for word in options.waves.split(",") if word], canary)
    return stored, units, rows


async def _plan(link: Link, options: argparse.Namespace) -> int:
    _, units, _ = await _chosen(link, options)
    for wave, count in sorted(Counter(unit.wave for unit in units).items()):
        print(f"wave {wave}: {count} targets")
        for unit in [unit for unit in units if unit.wave == wave][:20]:
            print(f"  {unit.gateway}.{unit.target}")
        if count > 20:
            print(f"  and {count - 20} more")
    print(f"{len(units)} targets; nothing was changed")
    return DONE


async def _start(link: Link, options: argparse.Namespace) -> int:
    stored, units, _ = await _chosen(link, options)
    words = [word.partition("=") for word in options.option]
    chosen: dict[str, Any] = {name: value for name, _, value in words}
    if stored.sig:
        chosen.setdefault("sig", stored.sig)
    spec = Spec(
        options.id,
        stored.artifact,
        options.kind,
        chosen,
        options.max_failures,
        options.max_share,
        options.share_after,
        options.wave_timeout,
        options.soak,
        options.expires,
    )
    await control.create(link, spec, units, time.time())
    print(f"roll-out {spec.id}: {len(units)} targets, {max(unit.wave for unit in units) + 1} waves", flush=True)
    options.command, options.once = "run", options.detach  # What is left to do, should the link break.
    return await _run(link, options)


async def _run(link: Link, options: argparse.Namespace) -> int:
    drive, said = Drive(link, options.id), ""

    def show(one: Rollout, made: Step) -> None:
        nonlocal said
        text = _line(one, made)
        if text != said:
            said = text
            print(text, flush=True)

    if options.once:
        await drive.begin()
        one, made = await drive.turn()
        show(one, made)
    else:
        one, made = await drive.run(show)
    _tell_of_silent(one, made.tally)
    return _verdict(one, made.tally)


def _verdict(one: Rollout, tally: rollout.Tally) -> int:
    """Success is a target that has said so: one that is silent, or whose job somebody canceled, runs what it ran before."""
    if one.state.phase is Phase.RUNNING:
        return FAILED if tally.failed else DONE
    return DONE if one.state.phase is Phase.DONE and tally.succeeded == tally.units else FAILED


def _tell_of_silent(one: Rollout, tally: rollout.Tally) -> None:
    """That a roll-out is done does not end what it has told."""
    count, until = tally.units - tally.ended, control.last_of(one)
    if one.state.phase is Phase.DONE and count and time.time() < until:
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(until))
        print(
            f"{count} targets have not ended. Until {date} they begin it when their gateways come back; "
            f"to take that back: bridged fleet cancel {one.spec.id}",
            file=sys.stderr,
        )


def _line(one: Rollout, made: Step) -> str:
    tally, state = made.tally, made.state
    words = [f"{tally.succeeded} succeeded", f"{tally.failed} failed"]
    words += [
        f"{count} {name}"
        for count, name in ((tally.running, "under way"), (tally.silent, "silent"), (tally.canceled, "canceled"))
        if count
    ]
    wave = f"wave {state.wave}" if state.wave >= 0 else "no wave yet"
    reason = f" ({state.reason})" if state.reason else ""
    return f"{one.spec.id}: {state.phase}{reason}, {wave}, {tally.released} of {tally.units} told: {', '.join(words)}"


async def _status(link: Link, options: argparse.Namespace) -> int:
    if options.follow:
        return await _follow(link, options)
    one = await control.load(link, options.id)
    units, found = await control.units_of(link, one), await control.reports(link, options.id)
    now = time.time()
    tally = rollout.count(one.spec, units, one.state, found, now)
    rows = []
    for unit in units:
        said = found.get(unit.key)
        state = said.state if said else "unheard" if unit.wave <= one.state.wave else "not told"
        if options.all or (state not in ("succeeded", "not told")):
            row: dict[str, Any] = {"gateway": unit.gateway, "target": unit.target, "wave": unit.wave, "state": state}
            if said:
                row |= {"job": said.job, "code": said.code, "message": said.message, "evidence": said.evidence}
            rows.append(row)
    line = _line(one, Step(one.state, tally))
    if options.json:
        print(json.dumps(_head(one, tally)))
    else:
        print(line)
    _table(rows, options.json)
    _tell_of_silent(one, tally)
    return _verdict(one, tally)


async def _follow(link: Link, options: argparse.Namespace) -> int:
    """A line for whatever changes. It drives nothing: that is for `run`."""
    drive = Drive(link, options.id)
    await drive.begin()
    shown: dict[tuple[str, str], dict[str, Any]] = {}
    said = ""
    looked = time.monotonic()
    while True:
        one = await control.load(link, options.id)
        tally = rollout.count(one.spec, drive.units, one.state, drive.reports, time.time())
        for unit in drive.units:
            report, progress = drive.reports.get(unit.key), drive.progress.get(unit.key)
            row: dict[str, Any] = {"gateway": unit.gateway, "target": unit.target, "state": report.state if report else ""}
            if report and report.ended:
                row |= {"code": report.code, "message": report.message, "evidence": report.evidence}
            elif progress:
                row |= {"phase": progress.phase, "done": progress.done, "total": progress.total, "rate": progress.rate}
            if row["state"] and row != shown.get(unit.key):
                shown[unit.key] = row
                print(json.dumps(row) if options.json else _step(row), flush=True)
        line = json.dumps(_head(one, tally)) if options.json else _line(one, Step(one.state, tally))
        if line != said:
            said = line
            print(line, flush=True)
        if getattr(sys.stdout, "lost", None):  # `cli.screen.lenient`: whoever read this has had enough.
            return _verdict(one, tally)
        if one.state.phase is not Phase.RUNNING:
            _tell_of_silent(one, tally)
            return _verdict(one, tally)
        if link.over.is_set():
            raise FleetUnreachable(f"the connection to {link.server} ended", server=link.server)
        if time.monotonic() - looked > control.LOOK_S:
            await drive.look()
            looked = time.monotonic()
        await asyncio.sleep(control.TURN_S)


def _step(row: Mapping[str, Any]) -> str:
    words = [f"{row['gateway']}.{row['target']}: {row['state']}", row.get("phase", "")]
    if row.get("total"):
        words.append(f"{100 * row['done'] // row['total']} %")
    if row.get("rate"):
        words.append(f"{row['rate'] / 1024:.1f} KiB/s")
    words += [row.get("code", ""), row.get("message", ""), row.get("evidence", "")]
    return _cell(" ".join(filter(None, words)))


def _head(one: Rollout, tally: rollout.Tally) -> dict[str, Any]:
    return {"rollout": one.spec.id, "phase": one.state.phase, "reason": one.state.reason, **_counts(tally)}


def _counts(tally: rollout.Tally) -> dict[str, Any]:
    names = ("units", "released", "succeeded", "failed", "canceled", "running", "silent")
    return {name: getattr(tally, name) for name in names}


async def _rollouts(link: Link, options: argparse.Namespace) -> int:
    rows = [
        {
            "rollout": one.spec.id,
            "phase": str(one.state.phase),
            "wave": one.state.wave,
            "targets": one.units,
            "artifact": one.spec.artifact.name if one.spec.artifact else "",
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(one.created)),
            "by": one.by,
            "reason": one.state.reason,
        }
        for one in await control.rollouts(link)
    ]
    _table(rows, options.json)
    return DONE


async def _pause(link: Link, options: argparse.Namespace) -> int:
    one = await control.change(link, options.id, lambda one: replace(one, state=rollout.pause(one.state)))
    print(f"{one.spec.id}: {one.state.phase}")
    return DONE


async def _resume(link: Link, options: argparse.Namespace) -> int:
    first = await control.load(link, options.id)
    units, found = await control.units_of(link, first), await control.reports(link, options.id)

    def how(one: Rollout) -> Rollout:
        more = {name: said for name in ("max_failures", "max_share") if (said := getattr(options, name)) is not None}
        spec = replace(one.spec, **more)
        tally = rollout.count(spec, units, one.state, found, time.time())
        return replace(one, spec=spec, state=rollout.resume(spec, one.state, tally))

    one = await control.change(link, options.id, how)
    print(f"{one.spec.id}: {one.state.phase}; carry it on with: bridged fleet run {one.spec.id}")
    return DONE


async def _cancel(link: Link, options: argparse.Namespace) -> int:
    drive = Drive(link, options.id)
    await drive.begin()

    def how(one: Rollout) -> Rollout:
        tally = rollout.count(one.spec, drive.units, one.state, drive.reports, time.time())
        return replace(one, state=rollout.cancel(one.state, tally))

    await control.change(link, options.id, how)
    # Again, if a machine was killed here before: to take back what was taken back does no harm.
    one, made = await drive.turn()
    print(_line(one, made))
    return DONE


async def _inventory(link: Link, options: argparse.Namespace) -> int:
    rows = select.chosen(await control.inventory(link), select.terms(options.where))
    if options.json:
        _table(rows, True)
        return DONE
    keys = ("gateway", "target", "state", "chip", "image_name", "version", "evidence")
    shown = []
    for row in rows:
        labels = row.get("labels")
        words = ",".join(f"{key}={value}" for key, value in labels.items()) if isinstance(labels, Mapping) else ""
        shown.append({**{key: select.value_of(row, key) for key in keys}, "labels": words, "told": _ago(float(row["told"]))})
    _table(shown, False)
    return DONE


def _ago(at: float) -> str:
    seconds = max(0, int(time.time() - at))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


async def _drift(link: Link, options: argparse.Namespace) -> int:
    rows = await control.inventory(link)
    wanted = select.terms(options.where)
    chosen = {(str(row["gateway"]), str(row["target"])) for row in select.chosen(rows, wanted)}
    found = select.drift(await control.desired(link), rows)
    if wanted:
        found = [one for one in found if (one.gateway, one.target) in chosen]
    counts = Counter(one.what for one in found)
    odd = [one for one in found if one.what != "as wanted"]
    fields = ("gateway", "target", "what", "wanted", "runs", "rollout")
    _table([{name: getattr(one, name) for name in fields} for one in odd], options.json)
    print(
        ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "no roll-out has told anybody anything",
        file=sys.stderr,
    )
    return DRIFTED if odd else DONE


async def _tidy(link: Link, options: argparse.Namespace) -> int:
    found = await control.rubbish(link, options.older_than, time.time())
    for one in found.rollouts:
        print(f"roll-out {_cell(one.spec.id)}: {one.state.phase}, {one.units} targets, with its reports")
        if options.yes:
            await control.remove_rollout(link, one)
    for name in found.broken_off:
        print(f"roll-out {_cell(name)}: what was left when its removal was broken off")
        if options.yes:
            await control.finish_removal(link, name)
    for stored in found.artifacts:
        print(f"artifact {_cell(stored.artifact.name)} {stored.artifact.sha256[:12]}: {stored.artifact.size} bytes")
        if options.yes:
            await control.remove_artifact(link, stored.artifact.sha256)
    count = len(found.rollouts) + len(found.broken_off) + len(found.artifacts)
    print(
        f"{count} {'removed' if options.yes else 'could go; nothing was changed, --yes removes them'}" if count else "nothing"
    )
    return DONE


async def _retire(link: Link, options: argparse.Namespace) -> int:
    name = options.gateway
    if not wire.TOKEN.fullmatch(name):
        raise BadRequest(f"{name[:64]!r} is no name of a gateway: 1 to 64 of A-Z a-z 0-9 _ -")
    waiting = await control.waiting_of(link, name)
    rows = [row for row in await control.inventory(link) if row["gateway"] == name]
    if waiting is None and not rows and name not in await control.retired(link):
        raise BadRequest(f"there is no gateway {name}: no consumer, and no inventory")
    under_way = [one for one in await control.rollouts(link) if one.state.phase not in OVER]
    units = [(one, [unit for unit in await control.units_of(link, one) if unit.gateway == name]) for one in under_way]
    print(f"{name}: {waiting or 0} commands that it has not taken, inventory of {len(rows)} targets")
    for one, own in units:
        if own:
            print(f"  roll-out {one.spec.id} goes on without its {len(own)} targets")
    if not options.yes:
        print("nothing was changed; --yes does it")
        return DONE
    await control.retire(link, name)
    print(f"{name} is retired. Take its user out of the broker's configuration, too: with its credential it can still connect.")
    return DONE


def _table(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    texts = [[name.upper() for name in names], *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[index]) for line in texts) for index in range(len(names))]
    for line in texts:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    """What gateways said is shown as one line of characters that can be printed."""
    text = str(value)
    text = text[:12] if re.fullmatch(r"[0-9a-f]{64}.*", text) else text
    return "".join(char if char.isprintable() else "?" for char in text)[:120]


COMMANDS: dict[str, Callable[[Link, argparse.Namespace], Awaitable[int]]] = {
    "init": _init,
    "artifact": _artifact,
    "plan": _plan,
    "start": _start,
    "run": _run,
    "status": _status,
    "rollouts": _rollouts,
    "pause": _pause,
    "resume": _resume,
    "cancel": _cancel,
    "inventory": _inventory,
    "drift": _drift,
    "tidy": _tidy,
    "retire": _retire,
}
