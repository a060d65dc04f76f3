"""Verbs of people: a target's console over this connection, and the lock that keeps jobs of others from a target."""

from __future__ import annotations

from typing import Any

from bridged.api import consoles
from bridged.api.line_link import Bye, Command, Link
from bridged.console.room import Console
from bridged.errors import NotAllowed
from bridged.protocol.reply import Reply
from bridged.protocol.verbs import Scope


async def _lock(link: Link, values: dict[str, Any]) -> None:
    console = _console_of(link, values["target"], Scope.CONSOLE, "LOCK")
    right = bool(values.get("force")) and _administers(link)
    await link.send(await consoles.lock(console, link.jobs, values, right=right))


async def _unlock(link: Link, values: dict[str, Any]) -> None:
    console = _console_of(link, values["target"], Scope.CONSOLE, "UNLOCK")
    right = bool(values.get("force")) and _administers(link)
    await link.send(await consoles.unlock(console, link.jobs, right=right))


async def _console(link: Link, values: dict[str, Any]) -> None:
    """101, then raw bytes to the end of the connection: nothing after that is a command."""
    writing = values.get("mode", "rw") == "rw"
    console = _console_of(link, values["target"], Scope.CONSOLE if writing else Scope.READ, "CONSOLE")

    async def begin(reply: Reply) -> None:
        await link.send(reply)
        link.raw = True

    dialog = consoles.Dialog(console, link.writer, lambda: link.shared.authority.valid(link.who))
    link.interruptible = True
    try:
        await dialog.run(
            link.who.source, link.who.name, values, link.incoming.raw, begin, writing=writing, right=_administers(link)
        )
    finally:
        link.interruptible = False
    raise Bye


def _console_of(link: Link, target: str, scope: Scope, doing: str) -> Console:
    """Raises ``NotAllowed``, ``LoginFirst`` or ``UnknownTarget``."""
    try:
        link.jobs.require(scope, target, doing)
    except NotAllowed as error:
        link.jobs.note(doing.lower(), target=target, result=error.code)
        raise
    return consoles.find(link.shared.consoles, target)


def _administers(link: Link) -> bool:
    """Whether this client may take over what others hold."""
    return link.who.may(Scope.ADMIN)


COMMANDS: dict[str, Command] = {"LOCK": _lock, "UNLOCK": _unlock, "CONSOLE": _console}
