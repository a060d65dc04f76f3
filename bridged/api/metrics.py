"""Prometheus metrics: what the daemon did and how the targets are, on a listener of its own (127.0.0.1:7102, ``/metrics``).

The only module that knows ``prometheus_client``. ``Metrics`` is told what happens (``observe`` for each update of a job,
``refresh`` for what is looked up when somebody scrapes) and keeps it in a registry of its own: no global state, so that two
daemons in one test process do not add up. ``MetricsServer`` serves it, in the text format or as OpenMetrics with job ids as
exemplars. Names and labels: the metrics chapter of the docs. Who scrapes from elsewhere asks the HTTP server, which has TLS and
rights, for the same page.

Invariants:

- No job id, digest or address of a client is ever a label; every label takes its values from a bounded set.
- What can be counted is there with 0 before it happens first, so that ``increase()`` sees the first failure.
- Listens on loopback only (P7).
"""

from __future__ import annotations

import asyncio
import inspect
import platform
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder

from bridged import __version__
from bridged.api.auth import check_loopback
from bridged.api.hosts import Hosts
from bridged.console.room import NOTHING_COUNTED, Figures
from bridged.errors import BridgedError, ConfigError, TargetError
from bridged.events import Event, SectorErased, StepDone
from bridged.jobs.model import TERMINAL, Job, JobKind, JobState, Update

disable_created_metrics()  # type: ignore[no-untyped-call]  # The ``_created`` series double the page, and no rule of ours uses them.

DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
# A UART of the machine answers in 50 us; at 921600 baud 0.1 ms more is a tenth of the job.
ACK_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40)
TARGET_STATES = ("idle", "busy", "absent", "broken")
UART_ERRORS = ("parity", "frame", "overrun", "brk")
SECOND_STAGE = ("used", "given up", "not used")  # How ``second_stage`` of a result begins.
DIRECTIONS = ("out", "in")
FLEET_COMMANDS = ("taken", "repeated", "refused", "cancellation")
# How a command of a fleet ends: as a job does, or because its time was over before it came to it.
FLEET_RESULTS = (*sorted(TERMINAL), "expired")
HEAD_BYTES = 8192  # Of a request: Prometheus sends 400 bytes.
TIMEOUT_S = 10.0  # For a request and its answer; that is how long Prometheus waits for one.
CONNECTIONS = 16  # At once; one scraper needs one.
HEADERS = ("Cache-Control: no-store", "X-Content-Type-Options: nosniff", "Server: bridged", "Connection: close")
TEXT = "text/plain; charset=utf-8"
LAG_INTERVAL_S = 1.0
LAG_WINDOW = 60  # Samples: a scraper that comes once a minute still sees the worst moment.


def _failure_codes() -> list[str]:
    """Codes that a job on a target can fail with."""

    def tree(cls: type[BridgedError]) -> Iterable[str]:
        yield cls.code
        for sub in cls.__subclasses__():
            yield from tree(sub)

    return [*tree(TargetError), BridgedError.code]


@dataclass(frozen=True, slots=True)
class Described:
    """A metric as the page has it: ``name`` as it is queried (a histogram without its endings)."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class FleetFigures:
    """Of one connector of a fleet. Totals are since it was made; keys as in ``FLEET_COMMANDS`` and ``FLEET_RESULTS``."""

    connected: bool
    connections: int = 0
    untold: int = 0
    waiting: int = 0
    download_bytes: int = 0
    commands: Mapping[str, int] = field(default_factory=dict)
    ended: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Running:
    """What is remembered of a job between its updates."""

    kind: str
    started: float = 0.0
    phase: str = ""
    phase_at: float = 0.0


class Metrics:
    """Everything that is counted. ``targets``: the configured names, for which all label sets are created at once;
    ``connectors``: ``nats``, ``hawkbit``. Where there is none, nothing of a fleet is on the page."""

    def __init__(
        self,
        targets: Iterable[str] = (),
        version: str = __version__,
        revision: str = "",
        connectors: Iterable[str] = (),
    ) -> None:
        self.registry = CollectorRegistry()
        self._jobs: dict[str, _Running] = {}
        self._ended: deque[str] = deque(maxlen=256)
        self._consoles: dict[str, Figures] = {}
        self._lags: deque[float] = deque(maxlen=LAG_WINDOW)
        self._described: list[Described] = []
        self._fleets = {name: FleetFigures(False) for name in connectors}
        self._define()
        for name in self._fleets:
            self._create_fleet(name)
        self.build_info.labels(version, revision, platform.python_version()).set(1)
        for name in targets:
            self._create(name)
        for kind in JobKind:
            self.job_seconds.labels(kind)  # Not every phase: 112 histograms of 16 lines would be most of the page.

    def _define(self) -> None:
        page: CollectorRegistry | None = self.registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            self._described.append(Described(f"bridged_{name}", "counter", labels, text))
            return Counter(f"bridged_{name}", text, labels, registry=page)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            self._described.append(Described(f"bridged_{name}", "gauge", labels, text))
            return Gauge(f"bridged_{name}", text, labels, registry=page)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            self._described.append(Described(f"bridged_{name}", "histogram", labels, text))
            return Histogram(f"bridged_{name}", text, labels, buckets=buckets, registry=self.registry)

        self.build_info = gauge("build_info", "Version of this daemon.", "version", "revision", "python")
        self.target_info = gauge("target_info", "What is known of a target.", "target", "chip_id", "family", "firmware")
        self.target_state = gauge("target_state", "1 for the state that a target is in.", "target", "state")
        self.jobs = counter("jobs_total", "Jobs that have ended.", "target", "kind", "result")
        self.failures = counter("job_failures_total", "Jobs that have failed, by error code.", "target", "code")
        self.queued = gauge("jobs_queued", "Jobs that wait for a target.", "target")
        self.running = gauge("job_running", "1 while a job works on the target.", "target")
        self.progress = gauge("job_progress_ratio", "Progress of the current phase, 0 to 1.", "target")
        self.phase_seconds = histogram(
            "job_phase_duration_seconds", "Time that a phase took.", DURATION_BUCKETS, "kind", "phase"
        )
        self.job_seconds = histogram("job_duration_seconds", "From start to end of a job.", DURATION_BUCKETS, "kind")
        self.flash_bytes = counter("flash_bytes_total", "Bytes of flash handled by jobs that ended.", "target", "op")
        self.sectors = counter("sectors_total", "Sectors erased, or left alone because they were right.", "target", "op")
        self.second_stage = counter(
            "second_stage_sessions_total",
            "Jobs for which the second-stage loader was asked for: used, given up for the ROM loader, or not used there.",
            "target",
            "result",
        )
        self.retries = counter("rom_retries_total", "Commands of the ROM loader that were repeated.", "target", "step")
        self.ack_seconds = histogram(
            "rom_ack_seconds", "From the last byte of a command to its acknowledgement.", ACK_BUCKETS, "step"
        )
        self.turnaround = gauge(
            "target_turnaround_seconds",
            "What adapter, driver and loader add to every answer: median of the target's last session.",
            "target",
        )
        self.uart_errors = counter("uart_errors_total", "Errors that the kernel counted on the UART.", "target", "type")
        self.uart_bytes = counter(
            "uart_bytes_total", "Bytes on the UART: those of ended jobs, and of the console.", "target", "direction"
        )
        self.session_cpu = counter(
            "session_cpu_seconds_total", "Processor time of the target's session processes, those of jobs that ended.", "target"
        )
        self.session_memory = gauge(
            "session_memory_bytes",
            "The most that the target's last session process had in memory, shared pages included.",
            "target",
        )
        self.console_clients = gauge("console_clients", "Clients at the console.", "target", "role")
        self.console_dropped = counter(
            "console_dropped_bytes_total",
            "Bytes that a console did not pass on: slow readers, and writers without the lease.",
            "target",
        )
        self.last_success = gauge("last_success_timestamp_seconds", "When a job last succeeded; 0: never.", "target")
        self.upload_bytes = counter("upload_bytes_total", "Bytes of images that clients sent.")
        self.uploads_resumed = counter(
            "uploads_resumed_total", "Uploads that went on where an earlier connection, or piece, had ended."
        )
        self.staging = gauge("staging_bytes", "Space that staged images and uploads take.")
        self.staging_limit = gauge("staging_limit_bytes", "Space that they may take.")
        self.auth_failures = counter("auth_failures_total", "Tokens that were wrong, revoked or expired, on any listener.")
        self.certificate_ends = gauge(
            "tls_certificate_expiry_timestamp_seconds",
            "When the certificate ends that this setting names: tls.certificate, or the one that is shown to a broker.",
            "setting",
        )
        self.reload_ok = gauge("config_last_reload_successful", "1 unless the last reload met a configuration with mistakes.")
        self.reload_at = gauge(
            "config_last_reload_success_timestamp_seconds", "When the configuration file was last read without a mistake."
        )
        self.connections = gauge("line_connections", "Open connections of the line protocol.")
        self.lag = gauge("event_loop_lag_seconds", f"Worst delay of the event loop in the last {LAG_WINDOW} samples.")
        ProcessCollector(registry=self.registry)

        page = self.registry if self._fleets else None
        self.fleet_connected = gauge("fleet_connected", "1 while the broker, or the update server, is reached.", "connector")
        self.fleet_connections = counter(
            "fleet_connections_total", "How often it was reached after it had not been, the first time included.", "connector"
        )
        self.fleet_commands = counter(
            "fleet_commands_total",
            "What was received: commands that are news, that came again, or that were refused; and cancellations.",
            "connector",
            "what",
        )
        self.fleet_ended = counter("fleet_ended_total", "Commands that have ended.", "connector", "result")
        self.fleet_waiting = gauge("fleet_waiting", "Commands that were taken and have no job yet.", "connector")
        self.fleet_untold = gauge("fleet_untold_reports", "Reports that the broker does not have yet.", "connector")
        self.fleet_download = counter("fleet_download_bytes_total", "Bytes of artifacts that came over the link.", "connector")
        self.drifted = gauge(
            "target_drifted",
            "0 while what was last proven in the target is what the last roll-out wanted there, else 1. Only targets that"
            " a roll-out has reached.",
            "target",
        )

    def _create(self, target: str) -> None:
        """Every label set of one target, at 0."""
        for state in TARGET_STATES:
            self.target_state.labels(target, state)
        for kind in JobKind:
            for result in sorted(TERMINAL):
                self.jobs.labels(target, kind, result)
        for code in _failure_codes():
            self.failures.labels(target, code)
        for gauge in (self.queued, self.running, self.progress, self.last_success, self.session_memory, self.turnaround):
            gauge.labels(target)
        self.session_cpu.labels(target)
        for op in ("write", "read", "skip"):
            self.flash_bytes.labels(target, op)
        for op in ("erased", "skipped"):
            self.sectors.labels(target, op)
        for said in SECOND_STAGE:
            self.second_stage.labels(target, said)
        for type_ in UART_ERRORS:
            self.uart_errors.labels(target, type_)
        for direction in DIRECTIONS:
            self.uart_bytes.labels(target, direction)
        for role in ("reader", "writer"):
            self.console_clients.labels(target, role)
        self.console_dropped.labels(target)

    def _create_fleet(self, name: str) -> None:
        for one in (self.fleet_connected, self.fleet_connections, self.fleet_waiting, self.fleet_untold, self.fleet_download):
            one.labels(name)
        for what in FLEET_COMMANDS:
            self.fleet_commands.labels(name, what)
        for result in FLEET_RESULTS:
            self.fleet_ended.labels(name, result)

    # --- what happens ---------------------------------------------------------------------------------------------

    def observe(self, update: Update, job: Job) -> None:
        """One update of ``job``, in the order of their ``seq``. ``job``: the record, of which kind and result are used."""
        if update.job in self._ended:
            return  # Said again, to a watcher that came late.
        known = self._jobs.get(update.job)
        if known is None:
            known = self._jobs[update.job] = _Running(str(job.kind))
        if update.state is JobState.RUNNING and not known.started:
            known.started = update.at
        if update.phase != known.phase:
            self._end_phase(known, update.at)
            known.phase, known.phase_at = update.phase, update.at
        self.running.labels(update.target).set(update.state is JobState.RUNNING)
        self.progress.labels(update.target).set(update.done / update.total if update.total else 0)
        if update.event.get("event") == "Retried":
            self.retries.labels(update.target, str(update.event["step"])).inc()
        if update.state is JobState.INTERRUPTED:
            known.started, known.phase = 0.0, ""  # The pause between two lives of the daemon is no duration.
        elif update.state in TERMINAL:
            self._end(update, job, known)

    def count(self, target: str, event: Event) -> None:
        """Events of a session that are too many for the log of a job, and so come beside its updates."""
        match event:
            case StepDone():
                self.ack_seconds.labels(event.step).observe(event.seconds)
            case SectorErased():
                self.sectors.labels(target, "erased").inc()

    def _end_phase(self, known: _Running, at: float) -> None:
        if known.phase and known.started:
            # The clock of records is UTC and may be set back by NTP.
            self.phase_seconds.labels(known.kind, known.phase).observe(max(0.0, at - known.phase_at))

    def _end(self, update: Update, job: Job, known: _Running) -> None:
        del self._jobs[update.job]
        self._ended.append(update.job)
        target, exemplar = update.target, {"job": update.job}
        self._end_phase(known, update.at)
        self.running.labels(target).set(0)
        self.progress.labels(target).set(0)
        self.jobs.labels(target, known.kind, update.state).inc(exemplar=exemplar)
        if known.started:
            self.job_seconds.labels(known.kind).observe(max(0.0, update.at - known.started), exemplar=exemplar)
        if update.state is JobState.SUCCEEDED:
            self.last_success.labels(target).set(update.at)
        elif update.state is not JobState.CANCELED:
            code = update.code or str((job.error or {}).get("code") or BridgedError.code)
            self.failures.labels(target, code).inc(exemplar=exemplar)
        result = job.result or {}
        for op, key in (("write", "bytes_written"), ("read", "bytes_compared"), ("skip", "bytes_skipped")):
            self.flash_bytes.labels(target, op).inc(max(0, int(result.get(key) or 0)))
        self.sectors.labels(target, "skipped").inc(max(0, int(result.get("sectors_skipped") or 0)))
        said = str(result.get("second_stage") or "").partition(":")[0]
        if said in SECOND_STAGE:
            self.second_stage.labels(target, said).inc()
        for type_, count in dict(result.get("uart_errors") or {}).items():
            if type_ in UART_ERRORS:
                self.uart_errors.labels(target, type_).inc(max(0, int(count)))
        for direction, count in dict(result.get("uart_bytes") or {}).items():
            if direction in DIRECTIONS:
                self.uart_bytes.labels(target, direction).inc(max(0, int(count)))

        if turnaround_us := result.get("turnaround_us"):
            self.turnaround.labels(target).set(int(turnaround_us) / 1e6)
        if cost := result.get("cost"):
            self.session_cpu.labels(target).inc(max(0.0, float(cost.get("cpu_s", 0))))
            self.session_memory.labels(target).set(int(cost.get("memory_kib", 0)) * 1024)

    def reloaded(self, ok: bool, at: float) -> None:
        """The configuration was read, at the start or by a reload, at UTC second ``at``."""
        self.reload_ok.set(ok)
        if ok:
            self.reload_at.set(at)

    def uploaded(self, count: int, resumed: bool) -> None:
        """An upload has ended, well or not, after ``count`` bytes. (``LineServer``'s ``on_upload``.)"""
        self.upload_bytes.inc(count)
        if resumed:
            self.uploads_resumed.inc()

    # --- what is looked up ----------------------------------------------------------------------------------------

    def refresh(self, targets: Iterable[dict[str, Any]]) -> None:
        """``Jobs.targets()``: states, queue lengths and what runs where."""
        self.target_info.clear()
        for entry in targets:
            name = str(entry.get("name") or entry.get("target"))
            state = str(entry.get("state", ""))
            for known in TARGET_STATES:
                self.target_state.labels(name, known).set(known == state)
            self.queued.labels(name).set(int(entry.get("queued") or 0))
            pid = entry.get("pid") or entry.get("chip_id") or ""
            chip_id = f"0x{pid:03x}" if isinstance(pid, int) else str(pid)
            firmware = str(entry.get("image_name") or entry.get("firmware") or "")
            self.target_info.labels(name, chip_id, str(entry.get("family") or entry.get("chip") or ""), firmware).set(1)

    def refresh_console(self, target: str, now: Figures) -> None:
        """What a console has counted since it was made; added to the counters is what is new."""
        before = self._consoles.get(target, NOTHING_COUNTED)
        self._consoles[target] = now
        self.console_clients.labels(target, "reader").set(now.readers)
        self.console_clients.labels(target, "writer").set(now.writers)
        self.console_dropped.labels(target).inc(now.dropped_bytes - before.dropped_bytes)
        self.uart_bytes.labels(target, "in").inc(now.bytes_in - before.bytes_in)
        self.uart_bytes.labels(target, "out").inc(now.bytes_out - before.bytes_out)
        new = now.errors - before.errors
        for type_, count in (
            ("parity", new.parity),
            ("frame", new.frame),
            ("overrun", new.overrun + new.buf_overrun),
            ("brk", new.brk),
        ):
            self.uart_errors.labels(target, type_).inc(count)

    def refresh_fleet(self, name: str, now: FleetFigures) -> None:
        """What one connector is at; added to the counters is what is new."""
        before, self._fleets[name] = self._fleets[name], now
        self.fleet_connected.labels(name).set(now.connected)
        self.fleet_waiting.labels(name).set(now.waiting)
        self.fleet_untold.labels(name).set(now.untold)
        self.fleet_connections.labels(name).inc(now.connections - before.connections)
        self.fleet_download.labels(name).inc(now.download_bytes - before.download_bytes)
        for what in FLEET_COMMANDS:
            self.fleet_commands.labels(name, what).inc(now.commands.get(what, 0) - before.commands.get(what, 0))
        for result in FLEET_RESULTS:
            self.fleet_ended.labels(name, result).inc(now.ended.get(result, 0) - before.ended.get(result, 0))

    def refresh_drift(self, drifted: Mapping[str, bool]) -> None:
        """By target, those that a roll-out has reached."""
        self.drifted.clear()
        for target, odd in drifted.items():
            self.drifted.labels(target).set(odd)

    async def measure_lag(self) -> None:
        """Runs as a task for as long as the daemon lives."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_INTERVAL_S
            await asyncio.sleep(LAG_INTERVAL_S)
            self.note_lag(loop.time() - due)

    def note_lag(self, seconds: float) -> None:
        self._lags.append(max(0.0, seconds))
        self.lag.set(max(self._lags))

    def described(self) -> list[Described]:
        """Every metric of ours, for the docs and for who writes queries."""
        return sorted(self._described, key=lambda one: one.name)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The page and its content type, in the format that ``accept`` (an HTTP header) prefers."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type


class MetricsServer:
    """``/metrics`` and a pointer to it. ``before``: brings gauges up to date before each scrape; may be asynchronous.

    A few lines of HTTP of our own: one request on a connection, of which only the path and two fields matter. A gateway that is
    only scraped does not load a web server for it.
    """

    def __init__(self, metrics: Metrics, before: Callable[[], Awaitable[None] | None] = lambda: None) -> None:
        self._metrics, self._before = metrics, before
        self._hosts = Hosts()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def listen(self, host: str, port: int) -> int:
        """Returns the port. Raises ``NotAllowed`` (P7) or ``ConfigError``."""
        check_loopback(host, "The metrics page")
        try:
            self._server = await asyncio.start_server(self._accept, host.strip("[]"), port, limit=HEAD_BYTES)
        except OSError as error:
            raise ConfigError(f"listening on {host}:{port} failed: {error.strerror or error}", host=host, port=port) from error
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            if len(self._open) >= CONNECTIONS:
                return
            self._open.add(task)
            async with asyncio.timeout(TIMEOUT_S):
                status, body, media = await self._answer(await reader.readuntil(b"\r\n\r\n"))
                head = [f"HTTP/1.1 {status}", f"Content-Type: {media}", f"Content-Length: {len(body)}", *HEADERS, "", ""]
                writer.write("\r\n".join(head).encode() + body)
                await writer.drain()
        except (TimeoutError, asyncio.LimitOverrunError, asyncio.IncompleteReadError, ConnectionError):
            pass  # No scraper: it is slow, says too much, or has gone.
        finally:
            self._open.discard(task)
            writer.close()

    async def _answer(self, head: bytes) -> tuple[str, bytes, str]:
        """Status, body and its type."""
        first, *fields = head.decode("latin-1").split("\r\n")
        method, _, rest = first.partition(" ")
        values = {name.strip().lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
        path = rest.partition(" ")[0].partition("?")[0]
        if not rest.endswith(("HTTP/1.1", "HTTP/1.0")) or not self._hosts.ours(values.get("host", "localhost")):
            return "400 Bad Request", b"this is no request for this page\n", TEXT
        if method != "GET":
            return "405 Method Not Allowed", b"GET, please\n", TEXT
        if path == "/":
            return "200 OK", b"bridged: metrics for Prometheus are at /metrics\n", TEXT
        if path != "/metrics":
            return "404 Not Found", b"metrics for Prometheus are at /metrics\n", TEXT
        done = self._before()
        if inspect.isawaitable(done):
            await done
        body, media = self._metrics.render(values.get("accept", ""))
        return "200 OK", body, media
