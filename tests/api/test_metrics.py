"""The metrics page: what is counted, what is there before anything happens, and who may read it."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import aiohttp
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from bridged.api.metrics import CONNECTIONS, FleetFigures, Metrics, MetricsServer
from bridged.errors import ConfigError, NoSync, NotAllowed, Unhealthy
from bridged.events import Restoring, Retried, RolledBack, SectorErased, StepDone, encode
from bridged.jobs.model import Job, JobKind, JobState, Update

Key = tuple[str, frozenset[tuple[str, str]]]


def samples(metrics: Metrics) -> dict[Key, float]:
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    return {
        (s.name, frozenset(s.labels.items())): s.value
        for family in text_string_to_metric_families(body.decode())
        for s in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[(name, frozenset(labels.items()))]


class Story:
    """One job told update by update."""

    def __init__(self, metrics: Metrics, kind: JobKind = JobKind.FLASH, name: str = "j1") -> None:
        self.metrics = metrics
        self.job = Job(name, kind, "motor1", JobState.QUEUED, 0, "", "", {}, "local", 1000.0)

    def tell(self, at: float, state: JobState, phase: str = "", event: Any = None, **job: Any) -> None:
        self.job = dataclasses.replace(self.job, state=state, seq=self.job.seq + 1, phase=phase, **job)
        done, total = self.job.done, self.job.total
        data = encode(event) if event is not None else {}
        update = Update(self.job.id, "motor1", self.job.seq, at, state, phase, done, total, event=data)
        self.metrics.observe(update, self.job)


def test_everything_that_can_be_counted_is_there_with_zero() -> None:
    found = samples(Metrics(["motor1"]))
    for name, labels in [
        ("bridged_jobs_total", {"target": "motor1", "kind": "flash", "result": "succeeded"}),
        ("bridged_jobs_total", {"target": "motor1", "kind": "ensure", "result": "timed_out"}),
        ("bridged_job_failures_total", {"target": "motor1", "code": "NO_SYNC"}),
        ("bridged_job_failures_total", {"target": "motor1", "code": "VERIFY_MISMATCH"}),
        ("bridged_jobs_queued", {"target": "motor1"}),
        ("bridged_job_running", {"target": "motor1"}),
        ("bridged_job_progress_ratio", {"target": "motor1"}),
        ("bridged_job_duration_seconds_count", {"kind": "flash"}),
        ("bridged_flash_bytes_total", {"target": "motor1", "op": "write"}),
        ("bridged_sectors_total", {"target": "motor1", "op": "erased"}),
        ("bridged_uart_errors_total", {"target": "motor1", "type": "overrun"}),
        ("bridged_session_cpu_seconds_total", {"target": "motor1"}),
        ("bridged_session_memory_bytes", {"target": "motor1"}),
        ("bridged_target_turnaround_seconds", {"target": "motor1"}),
        ("bridged_target_state", {"target": "motor1", "state": "broken"}),
        ("bridged_last_success_timestamp_seconds", {"target": "motor1"}),
        ("bridged_upload_bytes_total", {}),
        ("bridged_uploads_resumed_total", {}),
        ("bridged_staging_bytes", {}),
        ("bridged_staging_limit_bytes", {}),
        ("bridged_event_loop_lag_seconds", {}),
    ]:
        assert found[(name, frozenset(labels.items()))] == 0, name
    assert any(name == "bridged_build_info" for name, _ in found)
    assert any(name == "process_resident_memory_bytes" for name, _ in found)
    assert len(Metrics(["motor1"]).render()[0]) < 40_000


def test_a_fleet_is_on_the_page_of_those_who_have_one() -> None:
    alone = Metrics(["motor1"]).render()[0].decode()
    assert "fleet" not in alone
    assert "drifted" not in alone
    metrics = Metrics(["motor1"], connectors=["nats"])
    found = samples(metrics)
    for name, labels in [
        ("bridged_fleet_connected", {}),
        ("bridged_fleet_commands_total", {"what": "refused"}),
        ("bridged_fleet_ended_total", {"result": "rolled_back"}),
        ("bridged_fleet_ended_total", {"result": "expired"}),
    ]:
        assert found[(name, frozenset({"connector": "nats", **labels}.items()))] == 0
    assert not [name for name, _ in found if name == "bridged_target_drifted"], "nobody has said what is wanted"
    metrics.refresh_fleet("nats", FleetFigures(True, 2, 1, 3, 500, {"taken": 4}, {"succeeded": 2}))
    metrics.refresh_fleet("nats", FleetFigures(False, 3, 0, 0, 700, {"taken": 5, "refused": 1}, {"succeeded": 2, "expired": 1}))
    metrics.refresh_drift({"motor1": True, "motor2": False})
    metrics.refresh_drift({"motor1": True})
    expected = {
        "bridged_fleet_connected": 0,
        "bridged_fleet_connections_total": 3,
        "bridged_fleet_untold_reports": 0,
        "bridged_fleet_waiting": 0,
        "bridged_fleet_download_bytes_total": 700,
    }
    assert {name: value(metrics, name, connector="nats") for name in expected} == expected
    assert value(metrics, "bridged_fleet_commands_total", connector="nats", what="taken") == 5
    assert value(metrics, "bridged_fleet_ended_total", connector="nats", result="expired") == 1
    drifted = [(labels, number) for (name, labels), number in samples(metrics).items() if name == "bridged_target_drifted"]
    assert drifted == [(frozenset({("target", "motor1")}), 1.0)]


def test_a_flash_that_succeeds() -> None:
    metrics = Metrics(["motor1"])
    story = Story(metrics)
    story.tell(1000.0, JobState.QUEUED)
    story.tell(1001.0, JobState.RUNNING, "sync")
    story.tell(1001.5, JobState.RUNNING, "erase")
    metrics.count("motor1", SectorErased(0x08000000, 32768, 0.4))
    story.tell(1002.0, JobState.RUNNING, "write", done=0, total=4096)
    metrics.count("motor1", StepDone("write_memory", 0.004))
    story.tell(1003.0, JobState.RUNNING, "write", Retried("write_memory", "NACK"), done=1024)
    assert value(metrics, "bridged_job_running", target="motor1") == 1
    assert value(metrics, "bridged_job_progress_ratio", target="motor1") == 0.25
    result = {"bytes_written": 4096, "bytes_compared": 4096, "uart_errors": {"parity": 2, "odd": 1}}
    result |= {"cost": {"cpu_s": 1.25, "memory_kib": 16000}, "turnaround_us": 65}
    story.tell(1006.0, JobState.SUCCEEDED, "release", result=result, ended=1006.0)
    assert value(metrics, "bridged_jobs_total", target="motor1", kind="flash", result="succeeded") == 1
    assert value(metrics, "bridged_job_phase_duration_seconds_sum", kind="flash", phase="write") == 4.0
    assert value(metrics, "bridged_job_phase_duration_seconds_sum", kind="flash", phase="sync") == 0.5
    assert value(metrics, "bridged_job_duration_seconds_sum", kind="flash") == 5.0
    assert value(metrics, "bridged_flash_bytes_total", target="motor1", op="write") == 4096
    assert value(metrics, "bridged_sectors_total", target="motor1", op="erased") == 1
    assert value(metrics, "bridged_rom_retries_total", target="motor1", step="write_memory") == 1
    assert value(metrics, "bridged_rom_ack_seconds_count", step="write_memory") == 1
    assert value(metrics, "bridged_target_turnaround_seconds", target="motor1") == 65e-6
    assert value(metrics, "bridged_uart_errors_total", target="motor1", type="parity") == 2
    assert value(metrics, "bridged_session_cpu_seconds_total", target="motor1") == 1.25
    assert value(metrics, "bridged_session_memory_bytes", target="motor1") == 16000 * 1024
    assert value(metrics, "bridged_last_success_timestamp_seconds", target="motor1") == 1006.0
    assert value(metrics, "bridged_job_running", target="motor1") == 0
    assert value(metrics, "bridged_job_progress_ratio", target="motor1") == 0
    # The last update said again counts nothing twice, and nothing is kept of a job that has ended.
    story.tell(1006.0, JobState.SUCCEEDED, "release", result=result, ended=1006.0)
    assert value(metrics, "bridged_jobs_total", target="motor1", kind="flash", result="succeeded") == 1
    assert not metrics._jobs


def test_failures_and_cancels() -> None:
    metrics = Metrics(["motor1"])
    story = Story(metrics, JobKind.VERIFY)
    story.tell(1.0, JobState.RUNNING, "sync")
    story.tell(2.0, JobState.FAILED, "sync", error=NoSync("silence").as_dict(), ended=2.0)
    assert value(metrics, "bridged_job_failures_total", target="motor1", code="NO_SYNC") == 1
    story = Story(metrics, JobKind.VERIFY, "j2")
    story.tell(3.0, JobState.QUEUED)
    story.tell(4.0, JobState.CANCELED, ended=4.0)
    assert value(metrics, "bridged_jobs_total", target="motor1", kind="verify", result="canceled") == 1
    assert sum(v for (name, _), v in samples(metrics).items() if name == "bridged_job_failures_total") == 1
    assert value(metrics, "bridged_job_duration_seconds_count", kind="verify") == 1


def test_an_interrupted_job_does_not_count_the_time_between_two_daemons() -> None:
    metrics = Metrics(["motor1"])
    story = Story(metrics)
    story.tell(10.0, JobState.RUNNING, "write")
    story.tell(12.0, JobState.INTERRUPTED, "write")
    story.tell(5000.0, JobState.RUNNING, "write")
    story.tell(5003.0, JobState.SUCCEEDED, "write", ended=5003.0)
    assert value(metrics, "bridged_job_duration_seconds_sum", kind="flash") == 3.0


def test_targets_and_openmetrics_exemplars() -> None:
    metrics = Metrics(["motor1"])
    entry: dict[str, Any] = {"name": "motor1", "state": "busy", "queued": 3, "pid": 0x449, "family": "F74x/F75x"}
    metrics.refresh([entry | {"image_name": "app-1"}])
    metrics.refresh([entry | {"image_name": "app-2"}])
    assert value(metrics, "bridged_target_state", target="motor1", state="busy") == 1
    assert value(metrics, "bridged_target_state", target="motor1", state="idle") == 0
    assert value(metrics, "bridged_jobs_queued", target="motor1") == 3
    infos = [dict(labels) for name, labels in samples(metrics) if name == "bridged_target_info"]
    assert infos == [{"target": "motor1", "chip_id": "0x449", "family": "F74x/F75x", "firmware": "app-2"}]
    story = Story(metrics)
    story.tell(1.0, JobState.RUNNING, "sync")
    story.tell(2.0, JobState.SUCCEEDED, "release", ended=2.0)
    body, content_type = metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    exemplars = [
        s.exemplar.labels
        for family in parse_openmetrics(body.decode())  # type: ignore[no-untyped-call]
        for s in family.samples
        if s.name == "bridged_jobs_total" and s.exemplar
    ]
    assert exemplars == [{"job": "j1"}]


def test_uploads_and_lag() -> None:
    metrics = Metrics()
    metrics.uploaded(1000, False)
    metrics.uploaded(24, True)
    metrics.note_lag(0.25)
    metrics.note_lag(0.01)
    assert value(metrics, "bridged_upload_bytes_total") == 1024
    assert value(metrics, "bridged_uploads_resumed_total") == 1
    assert value(metrics, "bridged_event_loop_lag_seconds") == 0.25


def test_served_on_loopback_only() -> None:
    async def main() -> None:
        metrics = Metrics(["motor1"])
        scrapes = 0

        async def before() -> None:
            nonlocal scrapes
            scrapes += 1
            metrics.staging.set(scrapes)

        server = MetricsServer(metrics, before)
        with pytest.raises(NotAllowed):
            await server.listen("0.0.0.0", 0)
        port = await server.listen("127.0.0.1", 0)
        other = MetricsServer(metrics)
        with pytest.raises(ConfigError, match="in use"):
            await other.listen("127.0.0.1", port)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            async with session.get("/metrics") as page:
                assert page.status == 200
                assert page.headers["Content-Type"].startswith("text/plain; version=")
                families = {f.name: f for f in text_string_to_metric_families(await page.text())}
                assert families["bridged_staging_bytes"].samples[0].value == 1
            async with session.get("/") as page:
                assert "/metrics" in await page.text()
            async with session.get("/metrics", headers={"Accept": "application/openmetrics-text"}) as page:
                assert (await page.text()).endswith("# EOF\n")
            async with session.post("/metrics") as page:
                assert page.status == 405
            async with session.get("/else") as page:
                assert page.status == 404
        await server.stop()

    asyncio.run(main())


def test_a_rollback_is_a_result_and_a_failure() -> None:
    metrics = Metrics(["motor1"])
    story = Story(metrics)
    story.tell(1000, JobState.RUNNING, "stage")
    story.tell(1001, JobState.RUNNING, "health")
    story.tell(1003, JobState.RUNNING, "restore", Restoring("erase"))
    story.tell(1008, JobState.RUNNING, "restore", RolledBack("app.elf", "ab" * 32, "passed"))
    error = Unhealthy("it said nothing").as_dict()
    story.tell(1008, JobState.ROLLED_BACK, "restore", error=error, result={"bytes_written": 4096})
    assert value(metrics, "bridged_jobs_total", target="motor1", kind="flash", result="rolled_back") == 1
    assert value(metrics, "bridged_job_failures_total", target="motor1", code="UNHEALTHY") == 1
    assert value(metrics, "bridged_last_success_timestamp_seconds", target="motor1") == 0
    assert value(metrics, "bridged_job_phase_duration_seconds_sum", kind="flash", phase="restore") == 5


def test_what_is_no_scraper_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridged.api.metrics.TIMEOUT_S", 0.3)

    async def main() -> None:
        server = MetricsServer(Metrics(["motor1"]))
        port = await server.listen("127.0.0.1", 0)

        async def say(data: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data)
            try:
                return await asyncio.wait_for(reader.read(), 5)
            except ConnectionError:
                return b""
            finally:
                writer.close()

        ask = b"GET /metrics HTTP/1.1\r\nHost: %s\r\n\r\n"
        assert (await say(ask % b"127.0.0.1")).startswith(b"HTTP/1.1 200 ")
        for data in (ask % b"evil.example.com", b"FLASH motor1 x\r\n\r\n", b"\x16\x03\x01\r\n\r\n"):
            assert (await say(data)).startswith(b"HTTP/1.1 400 ")
        assert await say(b"GET /" + b"a" * 20_000) == b""
        assert await say(b"GET /metrics") == b"", "nobody is listened to for ever"
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS)]
        await asyncio.sleep(0.05)
        assert await say(ask % b"localhost") == b""
        for _, writer in idle:
            writer.close()
        await asyncio.sleep(0.05)
        assert (await say(ask % b"localhost")).startswith(b"HTTP/1.1 200 ")
        await server.stop()

    asyncio.run(main())
