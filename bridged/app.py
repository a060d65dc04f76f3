"""The daemon: builds every part from the configuration, runs them in one task group, and speaks to systemd.

This is the only module that knows everybody. It holds no rule of its own about jobs, targets or wires: it opens the journal
and the image store, creates a ``Target`` for each table of the configuration, gives them to ``Jobs``, puts the listeners in
front, and takes it all down in the opposite order (design, sections 2 and 4).

- Starting, stopping, reloading and upgrading reset no target (P4): only a target that the journal shows in a session is
  brought back to its application, by ``Jobs`` at the next start or by ``--release-only`` (``ExecStopPost=``), and only
  after its hazard time (P9).
- SIGTERM and SIGINT park the running jobs. They go on at the next start.
- SIGHUP reads the configuration again. A bad file leaves the old one in force. What can change in a running daemon does; the
  rest is named in the log.
- The watchdog is fed while each part makes progress (``Beat``); one target that hangs withholds nothing.
- An error is logged once, here, where it is handled.

``Daemon`` is one file because what is built, what runs and what is taken down must be seen side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bridged import __version__, config, logs
from bridged.config.difference import difference
from bridged.config.file import load, warnings_of
from bridged.config.sharing import groups
from bridged.config.values import listeners
from bridged.errors import BridgedError, ConfigError, NotAllowed, from_dict
from bridged.logs import Notice, log_error, note
from bridged.systemd import Beat, Notifier, passed_sockets, watch_over

if TYPE_CHECKING:
    from bridged.api.entrance import Entrance
    from bridged.api.guarded import Guarded
    from bridged.api.http import HttpServer
    from bridged.api.tls import Ending
    from bridged.console.room import Console
    from bridged.console.server import Listeners
    from bridged.fleet.connector import Connector
    from bridged.fleet.ddi import Ddi
    from bridged.images.store import Store
    from bridged.jobs.journal import Journal
    from bridged.jobs.model import Job, Update
    from bridged.target.owner import Target

log = logging.getLogger("bridged")

DEFAULT_CONFIG = config.DEFAULT_FILE
DEFAULT_STATE = config.DEFAULT_STATE

EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h; the unit does not start it again after this.
TIDY_S = 60.0
CERTIFICATE_S = 86400.0  # Between looks at when our own ones end.
OTHER_DESCRIPTORS = 768  # Journal, store, parsers, threads, handshakes, and some ten for each target and its session.


# --- the configuration, with what only this module may ask other rooms -------------------------------------------------


def read_config(path: Path) -> config.Config:
    """The configuration in ``path``, chips and layouts included. Raises ``ConfigError``."""
    return load(path, check_chip=_check_chip)


def _check_chip(name: str, layout: str, ranges: list[tuple[str, int, int]]) -> Iterator[tuple[str, str]]:
    from bridged import chips

    yield from chips.wrong_choice(name, layout, ranges)


def check_config(path: Path, *, as_json: bool = False) -> int:
    """Exit code 0 or 78."""
    from bridged.config.check import report

    return 0 if report(path, _check_chip, as_json=as_json) else EXIT_CONFIG


def allow_descriptors(connections: int, targets: int, clients: int = 0) -> int:
    """Raise the soft limit on open files as far as needed and allowed; how many connections that leaves. ``clients``: of all
    consoles together.

    Without room for a descriptor nothing can be accepted, so a client would not even be told that there are too many.
    """
    others = OTHER_DESCRIPTORS + 16 * targets + clients
    needed = connections + others
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    possible = max(16, soft - others)
    log.warning(
        "at most %d files may be open here (RLIMIT_NOFILE), so at most %d connections and not %d: set LimitNOFILE=%d",
        *(soft, possible, connections, needed),
    )
    return possible


# --- the daemon -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Places:
    """Where this daemon keeps and offers things; ``socket`` None: no Unix socket."""

    config: Path
    state: Path
    socket: Path | None


def places(path: Path, loaded: config.Config, state_dir: str = "", environment: Mapping[str, str] = os.environ) -> Places:
    """The command line beats the configuration, and that beats what systemd says (its lists are separated by colons)."""
    given = state_dir or loaded.gateway.state_dir or environment.get("STATE_DIRECTORY", "").split(":")[0]
    runtime = environment.get("RUNTIME_DIRECTORY", "").split(":")[0]
    sock = loaded.api.socket or (f"{runtime}/bridged.sock" if runtime else "")
    return Places(path, Path(given).absolute() if given else DEFAULT_STATE, Path(sock) if sock else None)


def host_and_port(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


class Daemon:
    """One running gateway. ``run`` returns after ``stop`` was called, or raises what made it impossible to go on."""

    def __init__(self, loaded: config.Config, where: Places, notifier: Notifier) -> None:
        self.config = loaded
        self.where = where
        self.notifier = notifier
        self.targets: dict[str, Target] = {}
        self.consoles: dict[str, Console] = {}
        self._listeners: list[Listeners] = []
        self.listening: list[str] = []
        self._stop = asyncio.Event()
        self._reload = asyncio.Event()
        self._drain = asyncio.Event()
        self._changed = asyncio.Event()

    def stop(self) -> None:
        """Park the running jobs and end. A second call changes nothing: the hazard of an erase does not end by asking twice."""
        if not self._stop.is_set():
            text = "stopping: running jobs are parked and go on at the next start"
            log.info(text, extra=note(Notice.STOPPING))
            self._stop.set()

    def reload(self) -> None:
        """Read the configuration again, as soon as there is time."""
        self._reload.set()

    async def drain(self) -> None:
        """Let the running jobs come to their end, start no other, then stop; what waits goes on at the next start."""
        log.info("draining: no further job is started; bridged ends after those that run")
        self.notifier.status("draining")
        await self.jobs.drain()
        self._stop.set()

    def drain_soon(self) -> None:
        self._drain.set()

    async def run(self) -> None:
        async with contextlib.AsyncExitStack() as parts:
            await self._build(parts)
            gc.collect()
            # What lives until the end is not looked at again: a full collection would stall the loop for tens of milliseconds.
            gc.freeze()
            count = len(self.targets)
            where = ", ".join(self.listening) or "nothing"
            text = "bridged %s: %d target%s; listening on %s"
            log.info(text, __version__, count, "" if count == 1 else "s", where, extra=note(Notice.STARTED))
            self.notifier.send("READY=1", f"STATUS={self.status()}")
            async with asyncio.TaskGroup() as group:
                watchdog = group.create_task(watch_over(self.notifier, self._beats()), name="watchdog")
                others = [
                    group.create_task(self._tell_status(), name="status"),
                    group.create_task(self._reload_when_asked(), name="reload"),
                    group.create_task(self._drain_when_asked(), name="drain"),
                    group.create_task(self._tidy(), name="tidy"),
                    group.create_task(self.metrics.measure_lag(), name="lag"),
                ]
                if self.fleet is not None:
                    others.append(group.create_task(self.fleet.run(), name="fleet"))
                if self.hawkbit is not None:
                    others.append(group.create_task(self.hawkbit.run(), name="hawkbit"))
                # A defect in one of them ends this wait too, and the daemon in order.
                await self._stop.wait()
                self.notifier.send("STOPPING=1", "STATUS=stopping: finishing what must not be interrupted")
                for task in others:
                    task.cancel()
                # Clients may look on while the jobs are parked, and the watchdog is fed meanwhile.
                await self.jobs.stop()
                watchdog.cancel()

    # --- building and taking down -----------------------------------------------------------------------------------

    async def _build(self, parts: contextlib.AsyncExitStack) -> None:
        """Everything in the order in which it depends on each other; ``parts`` takes it down backwards."""
        from bridged.api.auth import Authority
        from bridged.api.consoles import record
        from bridged.api.line import LineServer
        from bridged.api.line_link import Limits
        from bridged.api.metrics import Metrics
        from bridged.api.tls import Tls
        from bridged.jobs.service import Jobs

        settings = self.config
        self.journal = await asyncio.to_thread(_open_journal, self.where.state)
        parts.push_async_callback(asyncio.to_thread, self.journal.close)
        self.store = await asyncio.to_thread(_open_store, self.where.state, settings.store)
        self.targets |= {name: self._target(name, target) for name, target in settings.targets.items()}
        for group in groups(settings.targets):
            wires = asyncio.Lock()
            for name in group:
                self.targets[name].wires = wires
        self.consoles |= {name: self._console(target) for name, target in self.targets.items()}
        connectors = [name for name, said in (("nats", settings.fleet.servers), ("hawkbit", settings.hawkbit.url)) if said]
        self.metrics = Metrics(self.targets, connectors=connectors)
        self.metrics.reloaded(True, time.time())
        self.jobs = Jobs(settings, self.journal, self.store, self.targets)
        self.jobs.on_update.append(self._tell_job)
        self.jobs.on_event.append(lambda job, event: self.metrics.count(job.target, event))
        line_connections, self._http_connections = self._share_descriptors()
        limits = Limits(
            image_bytes=self.store.image_limit_bytes,
            connections=line_connections,
            idle_timeout_s=settings.api.idle_timeout_s,
        )
        self.authority = await asyncio.to_thread(Authority, settings.auth, self.journal)
        self.authority.on_failure = self.metrics.auth_failures.inc
        for console in self.consoles.values():
            console.record = partial(record, self.authority)
        self.tls = await asyncio.to_thread(Tls, settings.tls) if settings.tls.certificate else None
        await self._look_at_certificates()
        self.line = LineServer(
            self.jobs,
            self.store,
            settings.gateway.name,
            limits,
            self.metrics.uploaded,
            authority=self.authority,
            tls=self.tls,
            consoles=self.consoles,
            on_drain=self.drain,
        )
        self.http = self._http() if settings.api.http else None
        self.fleet = await self._fleet(parts) if settings.fleet.servers else None
        self.hawkbit = await self._hawkbit() if settings.hawkbit.url else None
        # Jobs first: they know which hazards a target must wait out before anybody touches its port or lines.
        await self.jobs.start()
        parts.push_async_callback(self._close_targets)
        parts.push_async_callback(self._close_consoles)
        for target in self.targets.values():
            await target.open()
        parts.push_async_callback(self.line.stop)
        if self.http is not None:
            parts.push_async_callback(self.http.stop)
        parts.push_async_callback(self.jobs.stop)
        await self._listen(parts)

    def _share_descriptors(self) -> tuple[int, int]:
        """Connections of the line protocol and over HTTP; fewer of both where there are not enough open files."""
        api = self.config.api
        line, http = api.connections, api.http_connections if api.http else 0
        from bridged.console.room import RESERVED_SEATS

        consoles = [t.console for t in self.config.targets.values() if t.console.listen or t.console.socket]
        clients = sum(console.clients + RESERVED_SEATS for console in consoles)
        possible = allow_descriptors(line + http, len(self.config.targets), clients)
        if possible >= line + http:
            return line, http
        return max(8, line * possible // (line + http)), max(8, http * possible // (line + http))

    def _http(self) -> HttpServer:
        """Loaded here and nowhere else: what is not configured costs no memory."""
        from bridged.api.auth import Proxies
        from bridged.api.http import HttpServer
        from bridged.api.http_call import Limits, Services

        settings = self.config
        limits = Limits(
            image_bytes=self.store.image_limit_bytes,
            connections=self._http_connections,
            idle_timeout_s=settings.api.idle_timeout_s,
        )
        gateway, transfers = self.line.shared.gateway, self.line.shared.transfers
        services = Services(
            self.jobs,
            self.store,
            self.authority,
            transfers,
            limits,
            gateway,
            self.consoles,
            self.metrics.uploaded,
            self._scrape,
        )
        server = HttpServer(services, settings.api.hosts, self.tls, Proxies(settings.api.trusted_proxies))
        self.jobs.on_update.append(server.events.recent.note)
        return server

    def _as(self, name: str, targets: Sequence[str]) -> Guarded:
        """The job functions as whoever submits from outside by our own connection may use them."""
        from bridged.api.auth import Principal
        from bridged.api.guarded import Guarded
        from bridged.protocol.verbs import Scope

        scopes = frozenset({Scope.READ, Scope.FLASH})
        return Guarded(self.jobs, self.authority, Principal(name, name, scopes, frozenset(targets) if targets else None))

    async def _hawkbit(self) -> Ddi:
        """Loaded here and nowhere else, as HTTP."""
        from bridged.api.tls import secret_file
        from bridged.fleet.ddi import PRINCIPAL, Ddi, Notes
        from bridged.fleet.ddi_http import Server, read_token

        settings, name = self.config.hawkbit, self.config.gateway.name
        token = await asyncio.to_thread(read_token, secret_file(settings.token)) if settings.token else ""
        server = Server(
            settings.url.removeprefix("plaintext:"),
            f"{settings.token_kind} {token}" if token else "",
            secret_file(settings.ca) if settings.ca else None,
        )
        notes = await asyncio.to_thread(Notes, self.where.state / "hawkbit")
        made = Ddi(
            name,
            server,
            self._as(PRINCIPAL, settings.targets),
            self.store,
            notes,
            self.store.image_limit_bytes,
            tuple(settings.targets or self.config.targets),
        )
        self.jobs.on_update.append(made.observe)
        return made

    async def _fleet(self, parts: contextlib.AsyncExitStack) -> Connector:
        """Loaded here and nowhere else, as HTTP."""
        from bridged.api.tls import secret_file
        from bridged.fleet.connector import Connector, Member
        from bridged.fleet.download import PRINCIPAL
        from bridged.fleet.ledger import Ledger
        from bridged.fleet.link import Access

        settings, name = self.config.fleet, self.config.gateway.name
        files = {
            key: secret_file(said)
            for key in ("password", "credentials", "ca", "certificate", "key")
            if (said := getattr(settings, key))
        }
        user = settings.user or (name if settings.password else "")
        access = Access(
            tuple(server.removeprefix("plaintext:") for server in settings.servers), user, ping_s=settings.ping_s, **files
        )
        labels = dict(label.split("=", 1) for label in settings.labels)
        ledger = await asyncio.to_thread(Ledger, self.where.state / f"fleet-{name}.db", name)
        parts.push_async_callback(asyncio.to_thread, ledger.close)
        member = Member(name, labels, settings.poll_s, settings.progress_s)
        connector = Connector(member, access, self._as(PRINCIPAL, settings.targets), self.store, ledger)
        self.jobs.on_update.append(connector.observe)
        return connector

    def _target(self, name: str, settings: config.Target) -> Target:
        from bridged.target.owner import Target

        return Target(name, settings, on_change=self._changed.set)

    def _console(self, target: Target) -> Console:
        from bridged.console.room import Console

        console = Console(target, target.config.console)
        target.listener = console
        return console

    async def _close_consoles(self) -> None:
        await asyncio.gather(*(console.close() for console in self.consoles.values()), return_exceptions=True)

    async def _listen_console(self, name: str, passed: Sequence[tuple[socket.socket, str]], entrance: Entrance) -> None:
        from bridged.api.consoles import admission
        from bridged.api.unix import bind_unix
        from bridged.console.server import Listeners

        settings = self.config.targets[name].console
        console = Listeners(self.consoles[name], partial(admission, self.authority), entrance)
        self._listeners.append(console)
        for sock, scheme in passed:
            where = _address(sock)  # Now: in TLS the listener takes the socket over.
            await console.listen_socket(sock, scheme)
            self.listening.append(f"{where} (console of {name}, passed)")
        families = {sock.family for sock, _ in passed}
        if not families & {socket.AF_INET, socket.AF_INET6}:
            for listen in listeners(settings.listen):
                bound = replace(listen, port=await console.listen_tcp(listen))
                self.listening.append(f"{'tls:' if entrance.secure(listen) else ''}{bound} (console of {name})")
        if settings.socket and socket.AF_UNIX not in families:
            await console.listen_unix(Path(settings.socket), bind_unix)
            self.listening.append(f"{settings.socket} (console of {name})")

    async def _close_listeners(self) -> None:
        for console in self._listeners:
            await console.close()

    async def _close_targets(self) -> None:
        await asyncio.gather(*(target.close() for target in self.targets.values()), return_exceptions=True)

    async def _listen(self, parts: contextlib.AsyncExitStack) -> None:
        """A socket that was passed in takes the place of the address in the configuration."""
        from bridged.api.entrance import Entrance
        from bridged.api.metrics import MetricsServer
        from bridged.api.tls import by_certificate

        parts.push_async_callback(self._close_listeners)
        api, passed = self.config.api, passed_sockets()
        # One for all of them, so that the handshakes of all are bounded together.
        entrance = Entrance("A console", self.tls, by_certificate)
        for name in self.config.targets:
            found = [(sock, "") for sock in passed.pop(f"console-{name}", ())]
            found += [(sock, "tls") for sock in passed.pop(f"console-{name}.tls", ())]
            await self._listen_console(name, found, entrance)
        schemes = {"line": "", "line-unix": "", "line-tls": "tls", "line-plaintext": "plaintext"}
        line = [(sock, scheme) for name, scheme in schemes.items() for sock in passed.pop(name, [])]
        over_http = {"http": "", "http-tls": "tls", "http-plaintext": "plaintext"} if self.http is not None else {}
        http = [(sock, scheme) for name, scheme in over_http.items() for sock in passed.pop(name, [])]
        for name in passed:
            known = ", ".join([*schemes, *over_http, "console-TARGET", "console-TARGET.tls"])
            log.warning("a socket called %r was passed in; known are %s, so it is not used", name, known)
        for sock, scheme in line:
            where = _address(sock)
            await self.line.listen_socket(sock, scheme)
            self.listening.append(f"{where} (passed)")
        families = {sock.family for sock, _ in line}
        if not families & {socket.AF_INET, socket.AF_INET6}:
            for listen in listeners(api.listen):
                self.listening.append(str(replace(listen, port=await self.line.listen_tcp(listen))))
        if self.where.socket is not None and socket.AF_UNIX not in families:
            await self.line.listen_unix(self.where.socket)
            self.listening.append(str(self.where.socket))
        if self.http is not None:
            for sock, scheme in http:
                where = _address(sock)
                await self.http.listen_socket(sock, scheme)
                self.listening.append(f"http {where} (passed)")
            for listen in listeners(api.http) if not http else ():
                bound = replace(listen, port=await self.http.listen_tcp(listen))
                self.listening.append(f"http{'s' if self.http.entrance.secure(listen) else ''}://{bound}")
        if api.metrics:
            host, port = host_and_port(api.metrics)
            server = MetricsServer(self.metrics, self._refresh)
            parts.push_async_callback(server.stop)
            self.listening.append(f"http://{host}:{await server.listen(host, port)}/metrics")

    # --- tasks ------------------------------------------------------------------------------------------------------

    def status(self) -> str:
        """One line for ``systemctl status``."""
        states = [target.state for target in self.targets.values()]
        count = len(states)
        text = f"{count} target{'' if count == 1 else 's'}"
        busy = [target.reason for target in self.targets.values() if target.state == "busy"]
        bad = [f"{states.count(state)} {state}" for state in ("absent", "broken") if state in states]
        return ", ".join([text, *(sorted(busy)), *bad])

    async def _tell_status(self) -> None:
        from bridged.target.owner import NOT_OPENED

        said = ""
        states: dict[str, tuple[str, str]] = {}
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self.http is not None:
                self.http.events.recent.targets_changed()
            if self.fleet is not None:
                self.fleet.changed()
            for name, target in self.targets.items():
                now = (target.state, target.reason)
                before = states.get(name, ("absent", NOT_OPENED))  # Nothing is said of a start that is under way.
                if now != before and now[0] in ("broken", "absent"):
                    notice = Notice.TARGET_BROKEN if now[0] == "broken" else Notice.TARGET_ABSENT
                    log.warning("target %s is %s: %s", name, *now, extra=note(notice, target=name))
                elif now[0] == "idle" and before[0] != "busy" and now[0] != before[0]:
                    log.info("target %s is there", name, extra=note(Notice.TARGET_THERE, target=name))
                states[name] = now
            if (status := self.status()) != said:
                said = status
                self.notifier.status(status)

    def _tell_job(self, job: Job, update: Update) -> None:
        """What every other watcher sees goes into the metrics; the end of a job, and why, into the log."""
        self.metrics.observe(update, job)
        if not job.terminal:
            return
        text = f"job {job.id}: {job.kind} of {job.target}: {job.state}"
        fields = {"job": job.id, "target": job.target, "kind": job.kind, "state": str(job.state)}
        if job.error is None:
            log.info("%s", text, extra=note(Notice.JOB_ENDED, **fields))
        else:
            log_error(from_dict(job.error), text, Notice.JOB_FAILED, **fields)

    async def _tidy(self) -> None:
        """Keep a part of the image store free, and never at the cost of an image that a job or a last known good one needs."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(TIDY_S)
            if time.monotonic() - looked >= CERTIFICATE_S:
                looked = time.monotonic()
                await self._look_at_certificates()
            try:
                await asyncio.to_thread(self.store.collect, self.jobs.pinned())
            except BridgedError as error:
                log_error(error, "tidying the image store")

    async def _look_at_certificates(self) -> None:
        """At the start, at a reload, and each day: who is far away learns of it before nobody gets in any more."""
        for one in await self._endings():
            if text := one.warning(time.time()):
                log.warning("%s", text)

    async def _endings(self) -> list[Ending]:
        """Of the certificates that we show: to clients, as it is in use, and to the broker, as the next connection reads it."""
        from bridged.api.tls import ending

        found = [self.tls.ending] if self.tls is not None else []
        if reference := self.config.fleet.certificate:
            # The connector says what is wrong with the file when it connects.
            with contextlib.suppress(ConfigError, OSError, ValueError):
                found.append(await asyncio.to_thread(ending, "fleet.certificate", reference))
        return found

    async def _drain_when_asked(self) -> None:
        await self._drain.wait()
        await self.drain()

    async def _scrape(self, accept: str) -> tuple[bytes, str]:
        await self._refresh()
        return self.metrics.render(accept)

    async def _refresh(self) -> None:
        self.metrics.refresh(self.jobs.targets())
        for name, console in self.consoles.items():
            self.metrics.refresh_console(name, console.figures())
        for one in await self._endings():
            self.metrics.certificate_ends.labels(one.setting).set(one.expires)
        self.metrics.connections.set(self.line.connections)
        self.metrics.staging.set(await asyncio.to_thread(lambda: self.store.usage_bytes))
        self.metrics.staging_limit.set(self.store.limit_bytes)
        if self.fleet is not None:
            self.metrics.refresh_fleet("nats", await self.fleet.figures())
            self.metrics.refresh_drift(await self.fleet.drifted())
        if self.hawkbit is not None:
            self.metrics.refresh_fleet("hawkbit", self.hawkbit.figures())

    def _beats(self) -> dict[str, Beat]:
        """What all targets share. The loop's own beat is the watchdog's turn; supervisors run on the loop and in threads."""

        async def journal() -> None:
            await asyncio.wrap_future(self.journal.ping())

        async def threads() -> None:
            await asyncio.to_thread(lambda: None)

        return {"journal": journal, "worker threads": threads}

    # --- reloading --------------------------------------------------------------------------------------------------

    async def _reload_when_asked(self) -> None:
        while True:
            await self._reload.wait()
            self._reload.clear()
            self.notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                new = await asyncio.to_thread(read_config, self.where.config)
            except ConfigError as error:
                log_error(error, "reload")
                log.error("reload: the configuration that was in force stays in force")
                self.metrics.reloaded(False, time.time())
            else:
                await self._apply(new)
                self.metrics.reloaded(True, time.time())
            self.notifier.send("READY=1", f"STATUS={self.status()}")

    async def _apply(self, new: config.Config) -> None:
        """What can change in a running daemon: a broken target gets another chance. The rest is named, and nothing is lost by
        a restart: it resets no target, parks what runs and resumes it."""
        changes = difference(self.config, new)
        for target in self.targets.values():
            if target.state == "broken":
                log.info("reload: target %s was broken (%s) and is tried again", target.name, target.reason)
                target.clear()
        words = {"added": changes.added, "removed": changes.removed, "changed": changes.changed}
        waiting = [f"targets.{name} ({word})" for word, names in words.items() for name in names] + list(changes.restart)
        for line in warnings_of(new):
            log.warning("%s: %s", self.where.config, line)
        if self.tls is not None:
            try:
                await asyncio.to_thread(self.tls.reload)
            except ConfigError as error:
                log_error(error, "reload")
        await self._look_at_certificates()
        if waiting:
            log.warning("reload: takes effect with `systemctl restart bridged`: %s", ", ".join(waiting))
        else:
            log.info("reload: the configuration is as it was")


def _open_journal(state: Path) -> Journal:
    from bridged.jobs.journal import FILE_NAME, Journal

    return Journal.open(state / FILE_NAME)


def _open_store(state: Path, settings: config.Store) -> Store:
    from bridged.images.store import Store

    return Store(state, settings.limit_mib << 20, settings.image_limit_mib << 20)


def _address(sock: socket.socket) -> str:
    name = sock.getsockname()
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name)


# --- the command --------------------------------------------------------------------------------------------------------


def serve(argv: Sequence[str]) -> int:
    """``bridged serve``. Exit code: 0 stopped, 78 the configuration cannot be used, 1 anything else."""
    parser = argparse.ArgumentParser(prog="bridged serve", description="The daemon: owns the targets and answers clients.")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE", help=f"default: {DEFAULT_CONFIG}")
    parser.add_argument("--state-dir", default="", metavar="DIR", help="journal and images; default: as configured")
    parser.add_argument(
        "--release-only",
        action="store_true",
        help="no daemon: bring the targets that a killed one left in a session back to their application, and end",
    )
    text = "text: lines on stderr; json: an object a line on stdout; auto (default): the journal of systemd, else text"
    parser.add_argument("--log-format", choices=logs.FORMATS, default="auto", help=text)
    options = parser.parse_args(argv)
    logs.set_up(style=options.log_format)
    try:
        loaded = read_config(options.config)
        where = places(options.config, loaded, options.state_dir)
        if options.release_only:
            from bridged.release import release_left  # A daemon never needs it.

            return 1 if asyncio.run(release_left(loaded, where.state)) else 0
        for line in warnings_of(loaded):
            log.warning("%s: %s", options.config, line)
        asyncio.run(_run(loaded, where))
    except BridgedError as error:
        log_error(error)
        # What may not be opened (P7) is a matter of the configuration, too: a second try would change nothing.
        return EXIT_CONFIG if isinstance(error, ConfigError | NotAllowed) else 1
    except Exception:  # A defect of ours; parts were taken down in order.
        log.critical("ended by a defect", exc_info=True, extra=note(Notice.DEFECT))
        return 1
    return 0


async def _run(loaded: config.Config, where: Places) -> None:
    daemon = Daemon(loaded, where, Notifier())
    loop = asyncio.get_running_loop()
    for number, action in (
        (signal.SIGTERM, daemon.stop),
        (signal.SIGINT, daemon.stop),
        (signal.SIGHUP, daemon.reload),
        (signal.SIGUSR1, daemon.drain_soon),
    ):
        loop.add_signal_handler(number, action)
    await daemon.run()
    log.info("stopped")
