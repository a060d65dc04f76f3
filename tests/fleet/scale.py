"""A fleet of light gateways over a real cluster, a roll-out over all of them, and a node that dies in the middle::

    python -m tests.fleet.scale --gateways 1000

The connector, the ledger, the wire and the operator's side are the real ones; jobs and image store of each gateway are
stand-ins that take a second or two, so that a thousand of them fit on a laptop. Ledgers lie in memory (``/dev/shm``): in the
field each has a disk of its own. Prints the figures for docs/fleet.md, and fails where a target was told twice or not at all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridged.errors import FleetError, UnknownJob
from bridged.fleet import control, rollout, setup
from bridged.fleet.connector import Connector, Member
from bridged.fleet.control import Drive
from bridged.fleet.ledger import Ledger
from bridged.fleet.link import Access, Link, connect
from bridged.fleet.rollout import Phase, Spec
from bridged.jobs.model import Job, JobState, Submission, Update, advance
from tests.fleet.broker import Broker

IMAGE_BYTES = 200_000  # Four chunks.
JOB_S = (0.5, 2.0)
FAILING = 0.01
REST_S = 20.0


class LightJobs:
    """As the job functions, with the same idempotency, and nothing behind them."""

    def __init__(self, lot: random.Random) -> None:
        self._lot, self._jobs, self._ids = lot, dict[str, Job](), dict[str, str]()
        self.observe: Callable[[Job, Update], None] = lambda _job, _update: None
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, sub: Submission) -> Job:
        if sub.id in self._ids:
            return self._jobs[self._ids[sub.id]]
        job = Job(
            secrets.token_hex(6), sub.kind, sub.target, JobState.QUEUED, 1, sub.image, "", sub.params, "fleet", time.time()
        )
        self._jobs[job.id], self._ids[sub.id] = job, job.id
        task = asyncio.create_task(self._live(job.id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    async def _live(self, id: str) -> None:
        self._step(id, JobState.RUNNING)
        await asyncio.sleep(self._lot.uniform(*JOB_S))
        if self._lot.random() < FAILING:
            self._step(id, JobState.ROLLED_BACK, error={"code": "UNHEALTHY", "message": "it does not answer"})
        else:
            self._step(id, JobState.SUCCEEDED, result={"evidence": "full"})

    def _step(self, id: str, to: JobState, **changes: Any) -> None:
        job = self._jobs[id] = advance(self._jobs[id], to, **changes)
        self.observe(job, Update(job.id, job.target, job.seq, time.time(), job.state, "", 0, 0))

    async def cancel(self, job_id: str, force: bool = False) -> Job:  # noqa: ARG002
        return self.get(job_id)

    def get(self, job_id: str) -> Job:
        if job_id not in self._jobs:
            raise UnknownJob(job_id)
        return self._jobs[job_id]

    def find(self, id: str) -> Job:
        return self.get(self._ids.get(id, ""))

    def targets(self) -> list[dict[str, Any]]:
        image = next((job.image for job in reversed(self._jobs.values()) if job.state is JobState.SUCCEEDED), "")
        return [{"name": "m1", "state": "idle", "chip": "F756", "image": image, "evidence": "full" if image else ""}]

    @property
    def count(self) -> int:
        return len(self._jobs)


class LightStore:
    """Hashes what comes, and keeps nothing of it."""

    def __init__(self) -> None:
        self._whole: set[str] = set()

    def have(self, sha256: str, principal: str | None = None) -> tuple[int, int | None, bool]:  # noqa: ARG002
        return 0, None, sha256 in self._whole

    def open_upload(self, principal: str, size: int, sha256: str, offset: int, name: str, type_hint: str) -> LightStore:  # noqa: ARG002
        assert not offset
        self._hash, self._wanted = hashlib.sha256(), sha256
        return self

    def write(self, data: bytes) -> None:
        self._hash.update(data)

    def finish(self) -> None:
        assert self._hash.hexdigest() == self._wanted
        self._whole.add(self._wanted)

    def abandon(self) -> None: ...


async def gateways(servers: tuple[str, ...], first: int, count: int, folder: Path) -> None:
    """A part of the fleet, in a process of its own; ends with its standard input."""
    made, tasks = [], []
    for number in range(first, first + count):
        jobs = LightJobs(random.Random(number))
        member = Member(f"gw{number:05}", {"site": f"s{number % 20}"}, 600.0, 0.0)
        ledger = Ledger(folder / f"{number}.db", member.name)
        one = Connector(member, Access(servers), jobs, LightStore(), ledger)
        jobs.observe = one.observe
        made.append((one, jobs))
        tasks.append(asyncio.create_task(one.run()))
        if number % 20 == 0:
            await asyncio.sleep(0.05)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        figures = {
            "connected": sum(one.connected for one, _ in made),
            "jobs": sum(jobs.count for _, jobs in made),
            "twice": sum(jobs.count > 1 for _, jobs in made),
            "chunk_bytes": sum(one.chunk_bytes for one, _ in made),
            "rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
        print(json.dumps(figures), flush=True)
    os._exit(0)


class Part:
    def __init__(self, servers: tuple[str, ...], first: int, count: int, folder: Path) -> None:
        line = [sys.executable, "-m", "tests.fleet.scale", "--part", str(first), str(count), str(folder), *servers]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self) -> dict[str, int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        assert isinstance(found, dict)
        return found


async def asked(parts: list[Part]) -> Counter[str]:
    found: Counter[str] = Counter()
    for part in parts:
        found.update(await asyncio.to_thread(part.ask))
    return found


def traffic(broker: Broker) -> Counter[str]:
    """What clients sent and got, by the nodes' own counters; those of a node that died are lost."""
    found: Counter[str] = Counter()
    for node in broker.processes:
        with contextlib.suppress(OSError):
            data = broker.ask(node, "varz")
            found.update({key: data[key] for key in ("in_msgs", "out_msgs", "in_bytes", "out_bytes", "connections")})
    return found


async def at_rest(broker: Broker) -> dict[str, list[float]]:
    """What nodes cost that are asked nothing."""
    before = broker.cpu_s()
    await asyncio.sleep(REST_S)
    used = [100 * (after - was) / REST_S for was, after in zip(before, broker.cpu_s(), strict=True)]
    return {"rss_mib": broker.memory_mib(), "percent_of_a_core": used}


async def link_to(broker: Broker) -> Link:
    for turn in range(60):
        with contextlib.suppress(FleetError):
            return await connect(Access(broker.servers), "operator", "_INBOX_operator", turn)
        await asyncio.sleep(0.5)
    raise AssertionError("no node answers")


async def measure(broker: Broker, count: int, parts: list[Part], kill: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {"gateways": count, "broker": broker.which}
    link = await link_to(broker)
    figures["empty"] = await at_rest(broker)
    await setup.prepare(link, 3)
    names = [f"gw{number:05}" for number in range(count)]
    started = time.monotonic()
    for at in range(0, count, 32):
        await asyncio.gather(*(setup.admit(link, name) for name in names[at : at + 32]))
    figures["admitted_s"] = time.monotonic() - started
    figures["rss_mib_admitted"] = broker.memory_mib()
    figures["admitted"] = await at_rest(broker)
    started = time.monotonic()
    size, folder = -(-count // 2), Path(tempfile.mkdtemp(dir="/dev/shm"))
    for first in range(0, count, size):
        parts.append(Part(broker.servers, first, min(size, count - first), folder))
    while (await asked(parts))["connected"] < count:
        assert time.monotonic() - started < 300
        await asyncio.sleep(0.5)
    while len(await control.inventory(link)) < count:
        await asyncio.sleep(0.5)
    figures["connected_s"] = time.monotonic() - started
    figures["rss_mib_connected"] = broker.memory_mib()
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(random.Random(1).randbytes(IMAGE_BYTES))
        file.flush()
        stored, _ = await control.put(link, Path(file.name), type="bin")
    units = rollout.plan("r1", [(name, "m1") for name in names], ["1%", "20%"])
    spec = Spec("r1", stored.artifact, options={"addr": "0x08000000"}, max_failures=None, max_share=0.1)
    await control.create(link, spec, units, time.time())
    before, started = traffic(broker), time.monotonic()
    dead, drive = -1, Drive(link, "r1")
    await drive.begin()
    looked, peak = time.monotonic(), broker.memory_mib()
    while True:
        try:
            _, made = await drive.turn()
            if time.monotonic() - looked > 5:
                await drive.look()
                looked = time.monotonic()
        except FleetError as error:
            print("operator:", error.message, file=sys.stderr)
            await link.close()
            link = await link_to(broker)
            drive = Drive(link, "r1")
            with contextlib.suppress(FleetError):
                await drive.begin()
            continue
        peak = max(peak, broker.memory_mib(), key=sum)
        if made.state.phase is not Phase.RUNNING:
            break
        if kill and dead < 0 and made.tally.succeeded > count * 0.4:
            dead = broker.leader_of("OBJ_bridged-artifacts")
            broker.kill(dead)
            killed = time.monotonic()
            figures["succeeded_when_killed"] = made.tally.succeeded
            print(f"node {dead} is dead after {killed - started:.1f} s", file=sys.stderr)
        assert time.monotonic() - started < 900, made.tally
        await asyncio.sleep(0.5)
    figures["rollout_s"] = time.monotonic() - started
    after = traffic(broker)
    figures["rss_mib_peak"] = peak
    figures["phase"], figures["tally"] = str(made.state.phase), {k: v for k, v in made.tally.states.items()}
    if dead < 0:
        figures["client_messages"] = after["in_msgs"] + after["out_msgs"] - before["in_msgs"] - before["out_msgs"]
        figures["client_bytes"] = after["in_bytes"] + after["out_bytes"] - before["in_bytes"] - before["out_bytes"]
    there = await asked(parts)
    figures["jobs"], figures["twice"] = there["jobs"], there["twice"]
    figures["chunk_bytes_extra"] = there["chunk_bytes"] - count * IMAGE_BYTES
    figures["gateway_process_mib_each"] = there["rss_kib"] / 1024 / count
    await link.close()
    assert (there["jobs"], there["twice"]) == (count, 0), there
    assert made.tally.silent == 0
    return figures


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gateways", type=int, default=1000)
    parser.add_argument("--which", default="pypi")
    parser.add_argument("--no-kill", action="store_true", help="nobody dies, and messages are counted")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard < 65536 else 65536, hard))
    if options.part:
        first, count, folder, *servers = options.part
        asyncio.run(gateways(tuple(servers), int(first), int(count), Path(folder)))
        return 0
    parts: list[Part] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, Broker(Path(folder), options.which, nodes=3) as broker:
        try:
            figures = asyncio.run(measure(broker, options.gateways, parts, not options.no_kill))
        finally:
            for part in parts:
                part.process.send_signal(signal.SIGKILL)
                part.process.wait()
    print(json.dumps(rounded(figures), indent=1))
    return 0


def rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [rounded(one) for one in value]
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return round(value, 2) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
