"""A roll-out to real gateways: daemons as processes, sessions of their own, simulated parts on ptys, a real broker, and the
operator's command line as a process that is killed in the middle.

Three gateways in each run; twenty by ``BRIDGED_SOAK=1`` (``make soak``).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bridged import chips
from tests.e2e.gateway import Gateway, wait_for
from tests.fleet.broker import Broker
from tests.support import free_port
from tests.target.bench import make_image

L476 = chips.find("L476")
GOOD = make_image(L476, 6_000, seed=1, banner=b"good application")
NEW = make_image(L476, 7_000, seed=2, banner=b"new application")
COUNT = 20 if os.environ.get("BRIDGED_SOAK") else 3
ALLOW_S = 600 if COUNT > 3 else 90
SICK = COUNT - 1  # The number of the gateway whose target takes the new application for a broken one.


def fleet(broker: Broker, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command, *rest = words
    line = [sys.executable, "-m", "bridged", "fleet", command, "--server", ",".join(broker.servers), *rest]
    return subprocess.run(line, capture_output=True, text=True, timeout=ALLOW_S, check=False, **more)


def rows(broker: Broker, *words: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in fleet(broker, *words, "--json").stdout.splitlines()]


def gateway(root: Path, number: int, broker: Broker) -> Gateway:
    root.mkdir()
    probe = '[targets.m1.application.health]\nexpect = "{}"\nwithin_s = 1.0'
    extra = f'[fleet]\nservers = ["{broker.servers[0]}"]\nlabels = ["site=hall{number % 2}"]\nprogress_s = 1.0\n'
    extra += probe.format("good application" if number == SICK else "application")
    metrics = f"127.0.0.1:{free_port()}" if number == SICK else ""
    return Gateway(root, {"m1": "L476"}, extra=extra, name=f"gw{number:02}", metrics=metrics)


def metrics_of(gateway: Gateway) -> dict[str, float]:
    """Each series as the page has it."""
    with urllib.request.urlopen(f"http://{gateway.metrics}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def test_two_waves_one_sick_target_and_two_operators(tmp_path: Path) -> None:
    for name, image in (("good.bin", GOOD), ("new.bin", NEW)):
        (tmp_path / name).write_bytes(image.segments[0].data)
    names = [f"gw{number:02}" for number in range(COUNT)]
    with Broker(tmp_path / "nats") as broker, ExitStack() as stack:
        done = fleet(broker, "init", *(word for name in names for word in ("--gateway", name)))
        assert done.returncode == 0, done.stderr
        made = [gateway(tmp_path / name, number, broker) for number, name in enumerate(names)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(stack.enter_context, made))
        wait_for("everybody's inventory", lambda: len(rows(broker, "inventory")) == COUNT, 60)
        for name in ("good.bin", "new.bin"):
            assert fleet(broker, "artifact", "put", str(tmp_path / name), "--type", "bin").returncode == 0
        common = ["--option", "addr=0x08000000"]
        first = fleet(broker, "start", "good.bin", "--id", "first", *common)
        assert first.returncode == 0, first.stdout + first.stderr

        # The canary, then the rest. Who drives it is killed once the canary has begun; another one goes on.
        line = [
            sys.executable,
            "-m",
            "bridged",
            "fleet",
            "start",
            "--server",
            broker.servers[0],
            "new.bin",
            "--id",
            "second",
            *common,
        ]
        line += ["--canary", "gateway=gw00", "--max-failures", "1", "--wave-timeout", "10m"]
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as operator:
            assert operator.stdout is not None
            for text in operator.stdout:
                if "wave 0, 1 of" in text:
                    break
            os.kill(operator.pid, signal.SIGKILL)
        assert operator.returncode == -signal.SIGKILL
        second = fleet(broker, "run", "second")
        assert second.returncode == 1, second.stdout + second.stderr
        assert f"second: done, wave 1, {COUNT} of {COUNT} told: {COUNT - 1} succeeded, 1 failed" in second.stdout, second.stdout

        head, *units = rows(broker, "status", "second", "--all")
        assert (head["succeeded"], head["failed"], head["phase"]) == (COUNT - 1, 1, "done")
        states = {row["gateway"]: (row["state"], row["code"]) for row in units}
        assert states.pop(names[SICK]) == ("rolled_back", "UNHEALTHY")
        assert set(states.values()) == {("succeeded", "")}
        for number, one in enumerate(made):
            assert one.holds("m1", GOOD if number == SICK else NEW), number
            client = one.connect()
            client.do("JOBS")
            assert len(client.lines) == 3, client.lines  # two jobs and the last line: none was run twice
            client.close()
        wait_for("the inventory after it", lambda: len(rows(broker, "drift")) == 1, 30)
        (odd,) = rows(broker, "drift")
        assert (odd["gateway"], odd["what"], odd["rollout"]) == (names[SICK], "drifted", "second")

        found = metrics_of(made[SICK])
        of = {name: found[f'bridged_fleet_{name}{{connector="nats"}}'] for name in ("connected", "waiting", "untold_reports")}
        assert of == {"connected": 1, "waiting": 0, "untold_reports": 0}
        assert found['bridged_fleet_commands_total{connector="nats",what="taken"}'] == 2
        assert found['bridged_fleet_ended_total{connector="nats",result="rolled_back"}'] == 1
        assert found['bridged_fleet_download_bytes_total{connector="nats"}'] == len(
            GOOD.segments[0].data + NEW.segments[0].data
        )
        assert found['bridged_target_drifted{target="m1"}'] == 1

        # One more failure than allowed: it stops at the canary, and nobody else is told.
        (tmp_path / "bad.bin").write_bytes(b"no vector table" * 100)
        assert fleet(broker, "artifact", "put", str(tmp_path / "bad.bin"), "--type", "bin").returncode == 0
        third = fleet(broker, "start", "bad.bin", "--id", "third", "--canary", "gateway=gw00", *common)
        assert third.returncode == 1
        assert f"third: paused (threshold: 1 failed, at most 0 may), wave 0, 1 of {COUNT} told" in third.stdout, third.stdout
        started = time.monotonic()
        for one in made:
            one.stop()
        assert time.monotonic() - started < 15 * COUNT, "an open connection to the broker does not hold the end of a daemon up"
