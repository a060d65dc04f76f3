"""Verbs about the client and the gateway: greeting and login, tokens and the audit log, what targets there are, the end."""

from __future__ import annotations

import asyncio
from typing import Any

from bridged import __version__
from bridged.api import consoles
from bridged.api.line_link import Bye, Command, Gone, Link
from bridged.api.replies import audit_data, credential_data, target_data
from bridged.errors import BadRequest, NotAllowed, UnknownTarget, WrongToken
from bridged.protocol.reply import Reply, error_reply
from bridged.protocol.verbs import PROTOCOL_VERSION, VERBS, Scope, help_lines

WRONG_TOKENS = 3  # On one connection; then it is closed.
AUDIT_PAGE = 1000  # Entries of one AUDIT; some 200 bytes each.


async def _help(link: Link, values: dict[str, Any]) -> None:
    lines = help_lines(values.get("verb", ""))
    await link.send(*(Reply(214, text, more=i < len(lines)) for i, text in enumerate(lines, 1)))


async def _ping(link: Link, _values: dict[str, Any]) -> None:
    await link.send(Reply(250, "PONG"))


async def _quit(_link: Link, _values: dict[str, Any]) -> None:
    raise Bye(Reply(221, "good-bye"))


async def _hello(link: Link, values: dict[str, Any]) -> None:
    if "proto" not in values:
        raise BadRequest(f"HELLO: proto= is missing; expected: {VERBS['HELLO'].synopsis}", verb="HELLO")
    link.json = values.get("format", "json" if link.json else "text") == "json"
    data = {"proto": PROTOCOL_VERSION, "format": "json" if link.json else "text", "version": __version__}
    await link.send(Reply(250, "", data))


async def _auth(link: Link, values: dict[str, Any]) -> None:
    try:
        who = await link.shared.authority.login(link.peer, values["token"])
    except WrongToken as error:
        link.wrong_tokens += 1
        if link.wrong_tokens >= WRONG_TOKENS:
            raise Bye(error_reply(error)) from error
        raise
    if too_many := link.shared.one_too_many(who):
        raise Bye(error_reply(too_many))
    link.become(who)
    await link.send(Reply(235, "", {"name": who.name, "scopes": sorted(who.scopes), "targets": _sorted(who.targets)}))


async def _token(link: Link, values: dict[str, Any]) -> None:
    authority, action, name = link.shared.authority, values["action"], values.get("name", "")
    if action == "list":
        found = authority.credentials()
        await link.send_many([Reply(250, "", credential_data(one), more=True) for one in found])
        await link.send(Reply(250, "", {"tokens": len(found)}))
        return
    if not name:
        raise BadRequest(f"TOKEN {action}: <name> is missing", verb="TOKEN")
    if action == "revoke":
        gone = await authority.revoke(name)
        link.jobs.note("token revoke", detail=name)
        await link.send(Reply(250, "", {"revoked": gone.name}))
        return
    scopes = [Scope(word) for word in values.get("scope", "").split(",") if word]
    targets = [word for word in values.get("targets", "").split(",") if word]
    known = [str(entry["name"]) for entry in link.jobs.targets()]
    if strange := [word for word in targets if word not in known]:
        raise UnknownTarget(f"there is no target {strange[0]}; there are: {', '.join(known) or 'none'}")
    made, token = await authority.grant(
        name,
        scopes,
        targets,
        lifetime_s=values.get("expires", 0.0),
        certificate=values.get("certificate", ""),
        by=link.who.name,
    )
    link.jobs.note("token add", detail=f"{name}: {made.scopes} on {made.targets or 'all targets'}")
    await link.send(Reply(250, "", credential_data(made) | ({"token": token} if token else {})))


async def _audit(link: Link, values: dict[str, Any]) -> None:
    found = await link.shared.authority.audit(min(values.get("limit", 50), AUDIT_PAGE))
    await link.send_many([Reply(250, "", audit_data(entry), more=True) for entry in found])
    await link.send(Reply(250, "", {"entries": len(found)}))


async def _targets(link: Link, _values: dict[str, Any]) -> None:
    found = link.jobs.targets()
    await link.send_many([Reply(250, "", target_data(entry), more=True) for entry in found])
    await link.send(Reply(250, "", {"targets": len(found)}))


async def _info(link: Link, values: dict[str, Any]) -> None:
    info = link.jobs.info(values["target"])
    rows = [(key, value) for key, value in target_data(info).items() if key != "target" and value not in (None, "")]
    if values["target"] in link.shared.consoles:
        held = consoles.holder(link.shared.consoles[values["target"]])
        rows += [(key, value) for key, value in held.items() if value not in (None, "")]
    await link.send_many([Reply(250, "", {key: value}, more=True) for key, value in rows])
    await link.send(Reply(250, "", {"target": values["target"]}))


async def _drain(link: Link, values: dict[str, Any]) -> None:  # noqa: ARG001
    if link.shared.on_drain is None:
        raise NotAllowed("this listener cannot end its daemon")
    # The daemon's affair from here on, whether or not this client stays to see it.
    drained = asyncio.ensure_future(link.shared.on_drain())
    while not drained.done():
        await asyncio.wait({drained, link.gone}, timeout=link.limits.heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
        if link.gone.done():
            raise Gone
        if not drained.done():
            await link.send(Reply(150, "DRAINING", more=True))
    await drained
    await link.send(Reply(250, "", {"drained": 1}))


def _sorted(targets: frozenset[str] | None) -> list[str] | None:
    return None if targets is None else sorted(targets)


COMMANDS: dict[str, Command] = {
    "HELP": _help,
    "PING": _ping,
    "QUIT": _quit,
    "HELLO": _hello,
    "AUTH": _auth,
    "TOKEN": _token,
    "AUDIT": _audit,
    "TARGETS": _targets,
    "INFO": _info,
    "DRAIN": _drain,
}
