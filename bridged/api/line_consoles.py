"""Verbs of people: a target's console over this connection, and the lock that keeps jobs of others from a target."""

from __future__ import annotations

from typing import Any

from bridged.api import consoles
from bridged.api.line_link import Bye, Command, Link
from bridged.console.room import Console
from bridged.protocol.reply import Reply
from bridged.protocol.verbs import Scope


async def _lock(link: Link, values: dict[str, Any]) -> None:
    console = _console_of(link, values["target"], Scope.CONSOLE, "LOCK")
    right = bool(values.get("force")) and _administers(link)
    reply = await consoles.lock(console, link.who.name, values, right=right)
    link.shared.authority.note(link.who, "lock", target=console.name, detail=values.get("note", ""))
    await link.send(reply)


async def _unlock(link: Link, values: dict[str, Any]) -> None:
    console = _console_of(link, values["target"], Scope.CONSOLE, "UNLOCK")
    right = bool(values.get("force")) and _administers(link)
    reply = await consoles.unlock(console, link.who.name, right=right)
    link.shared.authority.note(link.who, "unlock", target=console.name)
    await link.send(reply)


async def _console(link: Link, values: dict[str, Any]) -> None:
    """101, then raw bytes to the end of the connection: nothing after that is a command."""
    writing = values.get("mode", "rw") == "rw"
    doing = "CONSOLE rw" if writing else "CONSOLE ro"
    console = _console_of(link, values["target"], Scope.CONSOLE if writing else Scope.READ, doing)

    async def begin(reply: Reply) -> None:
        await link.send(reply)
        link.raw = True

    dialog = consoles.Dialog(console, link.writer, lambda: link.shared.authority.valid(link.who))
    link.shared.authority.note(link.who, "console", target=console.name, detail="rw" if writing else "ro")
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
    link.who.require(scope, target, doing)
    return consoles.find(link.shared.consoles, target)


def _administers(link: Link) -> bool:
    """Whether this client may take over what others hold."""
    return link.who.may(Scope.ADMIN)


COMMANDS: dict[str, Command] = {"LOCK": _lock, "UNLOCK": _unlock, "CONSOLE": _console}
