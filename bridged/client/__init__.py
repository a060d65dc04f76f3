"""A client of the line protocol for Python programs, and for our own command line: standard library only, no event loop.

    from bridged.client import Client
    with Client("gw.example:7100", token_file="~/gw.token") as gateway:
        image = gateway.put("app.elf")
        job = gateway.submit("FLASH", "motor1", image)
        print(gateway.wait(job, lambda update: print(update)))

What it adds to the protocol is that nothing is lost when the link is. An upload goes on where the gateway has synced it; a job
is submitted under an id of our own, so that saying it again finds the same job; waiting and watching are simply begun anew.
After ``retry_s`` without a word it gives up. Document: docs/client.md.

Which gateway is meant is in ``gateway``, links that break in ``link``. It knows nothing of images, chips or wires: the gateway
checks, plans and explains.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from bridged.client.files import LocalFile, Progress, fetch, upload
from bridged.client.gateway import Gateway
from bridged.client.link import RETRY_S, Console, Link, LinkLost, Refused, Session
from bridged.protocol.line import format_request
from bridged.protocol.reply import Reply

__all__ = ["Client", "Console", "Gateway", "LinkLost", "LocalFile", "Refused"]  # What programs need.

Each = Callable[[Reply], None]


def _nothing(_reply: Reply) -> None:
    pass


class Client:
    """One gateway. Every method may raise ``Refused`` (it said no, and why), ``DaemonUnreachable`` and ``BadRequest``.

    ``note`` gets sentences about the link; ``each`` of a method the lines of an answer as they come.
    """

    def __init__(
        self,
        where: str | Gateway = "",
        *,
        retry_s: float = RETRY_S,
        note: Callable[[str], None] = lambda _text: None,
        **options: str,
    ) -> None:
        gateway = where if isinstance(where, Gateway) else Gateway.find(where, os.environ, **options)
        self.session = Session(gateway, retry_s, note)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.session.close()

    def ask(self, verb: str, *words: str, each: Each = _nothing, **options: str | int | None) -> Reply:
        """One request that may be said twice; its last line. Options that are ``None`` are left out."""
        reply = self.session.ask(format_request(verb, *words, **options), each)
        if reply.code >= 400:
            raise Refused(reply)
        return reply

    def rows(self, verb: str, *words: str, **options: Any) -> list[dict[str, Any]]:
        """What the lines of a list say, without the last one, which counts them."""
        found: list[dict[str, Any]] = []
        options["each"] = lambda reply: found.append(dict(reply.data))
        self.ask(verb, *words, **options)
        return found

    # images

    def put(self, path: str | Path, name: str = "", type: str | None = None, progress: Progress = lambda *_: None) -> str:
        """Stages a file, resuming wherever it can; as ``submit`` names it (``sha256:HEX``)."""
        return self.stage(LocalFile.of(Path(path)), name, type, progress)[0]

    def stage(self, local: LocalFile, name: str, type: str | None, progress: Progress) -> tuple[str, Reply]:
        """As ``put``, with the reply."""
        return f"sha256:{local.sha256}", upload(self.session, local, name, type, progress)

    def get(self, ref: str, path: str | Path) -> int:
        """An image, or what a READ job has read, into a file that appears whole or not at all; the number of bytes."""
        return fetch(self.session, ref, Path(path))

    # jobs

    def submit(self, verb: str, target: str, *words: str, id: str = "", **options: Any) -> str:
        """FLASH, ENSURE, VERIFY, READ, ERASE, RESET, ID, DOCTOR; the id of the job, which runs on without us."""
        return str(self.submitted(verb, target, *words, id=id, **options).data["job"])

    def submitted(self, verb: str, target: str, *words: str, id: str = "", **options: Any) -> Reply:
        """As ``submit``, with the whole reply: 251 for an ensure that was true already."""
        # Our own id makes it a request that may be said twice: after a lost link we cannot know whether it was heard.
        return self.ask(verb, target, *words, id=id or f"cli-{os.urandom(8).hex()}", **options)

    def wait(self, job: str, each: Each = _nothing) -> Reply:
        """Until the job has ended, however often the link breaks; its final line. ``Refused`` when it did not end well."""
        return self.ask("WAIT", job, each=each)

    def watch(self, what: str, each: Each) -> Reply:
        """Updates of a target or of everything (``*``), however often the link breaks; comes back only with an error."""
        return self.ask("WATCH", what, each=each)

    def status(self, job: str) -> dict[str, Any]:
        return dict(self.ask("STATUS", job).data)

    def jobs(self, target: str | None = None, state: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        return self.rows("JOBS", target=target, state=state, limit=limit)

    def cancel(self, job: str, force: bool = False) -> dict[str, Any]:
        return dict(self.ask("CANCEL", job, force=1 if force else None).data)

    def log(self, job: str, since: int | None = None) -> list[dict[str, Any]]:
        options: dict[str, Any] = {"from": since}
        return self.rows("LOG", job, **options)

    def trace(self, job: str) -> bytes:
        """The flight recording of a job; ``protocol.trace`` reads it."""

        def action(link: Link) -> bytes:
            link.send(format_request("TRACE", job))
            if (head := link.reply()).code != 250:
                raise Refused(head)
            return b"".join(link.raw(int(head.data["size"])))

        return self.session.call(action)

    # targets

    def targets(self) -> list[dict[str, Any]]:
        return self.rows("TARGETS")

    def console(self, target: str, *, write: bool = True, replay: int | None = None, force: bool = False) -> Console:
        """The target's serial port on a connection of its own. ``replay``: so many bytes of what was said before come first.

        A connection that breaks later is ``LinkLost``; what the target says until the next one is in its history (``replay``).
        """
        request = format_request("CONSOLE", target, "rw" if write else "ro", replay=replay, force=1 if force else None)

        def action(link: Link) -> Console:
            link.send(request)
            if (reply := link.reply()).code != 101:
                raise Refused(reply)
            return Console(link)

        return self.session.take(action)

    def lock(self, target: str, ttl_s: int | None = None, note: str | None = None, force: bool = False) -> dict[str, Any]:
        """Reserves a target: the jobs and the typing of others wait until it runs out, or ``unlock``."""
        return dict(self.ask("LOCK", target, ttl=ttl_s, note=note, force=1 if force else None).data)

    def unlock(self, target: str, force: bool = False) -> None:
        self.ask("UNLOCK", target, force=1 if force else None)

    def info(self, target: str) -> dict[str, Any]:
        return {key: value for row in self.rows("INFO", target) for key, value in row.items()}
