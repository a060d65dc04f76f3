"""HTTP against the real daemon: from the file to the proof, across a restart, and what an idle daemon takes."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import requests
from tusclient import client as tus

from bridged import chips
from bridged.sim.demo_images import demo_image
from tests.e2e.gateway import Gateway, wait_for
from tests.support import free_port
from tests.target.bench import make_image

RSS_LIMIT_BYTES = 45 << 20


def events(url: str, last: str = "") -> list[tuple[str, dict[str, Any], str]]:
    """Of a stream that ends by itself."""
    headers = {"Last-Event-ID": last} if last else {}
    found, name, number = [], "", ""
    with requests.get(url, stream=True, timeout=60, headers=headers) as response:
        assert response.status_code == 200
        for raw in response.iter_lines():
            line = raw.decode()
            key, _, value = line.partition(": ")
            if key == "event":
                name = value
            elif key == "id":
                number = value
            elif key == "data":
                found.append((name, json.loads(value), number))
    return found


def test_from_the_file_to_the_proof_and_across_a_restart(tmp_path: Path) -> None:
    data = demo_image("F756").read()
    sha256 = hashlib.sha256(data).hexdigest()
    port = free_port()
    with Gateway(tmp_path, {"m1": "F756"}, http=f"127.0.0.1:{port}") as gateway:
        url = f"http://127.0.0.1:{port}"
        assert gateway.rss_bytes() <= RSS_LIMIT_BYTES
        ready = wait_for("the target", lambda: requests.get(f"{url}/v1/targets/m1", timeout=10).json()["state"] == "idle")
        assert ready
        sender = tus.TusClient(f"{url}/v1/uploads").uploader(
            file_stream=io.BytesIO(data), chunk_size=20_000, metadata={"sha256": sha256, "filename": "app.elf"}
        )
        sender.upload()
        plan = requests.post(f"{url}/v1/targets/m1/plan", json={"image": "app.elf"}, timeout=30).json()
        assert plan["write_bytes"] > 0
        asked = {"kind": "flash", "image": "app.elf"}
        for _ in range(2):
            done = requests.post(f"{url}/v1/targets/m1/jobs", json=asked, headers={"Idempotency-Key": "one"}, timeout=30)
            assert done.status_code == 202
        job = done.json()["job"]
        told = events(f"{url}/v1/jobs/{job}/events")
        assert told[-1][0] == "end"
        assert told[-1][1]["state"] == "succeeded"
        assert told[-1][1]["result"]["evidence"] == "full"
        phases = list(dict.fromkeys(data["phase"] for name, data, _ in told if name == "job" and data["phase"]))
        assert {"erase", "write", "verify"} <= set(phases)
        assert len(requests.get(f"{url}/v1/jobs", timeout=10).json()["jobs"]) == 1, "the same key found the same job"
        target = requests.get(f"{url}/v1/targets/m1", timeout=10).json()
        assert target["image_name"] == "app.elf"
        # The first plan loads the tables of all chips, and the uploads have been through buffers: some 5 MiB that stay.
        assert gateway.rss_bytes() <= RSS_LIMIT_BYTES + (8 << 20)

        middle = told[len(told) // 2][2]
        gateway.stop()
        gateway.start()
        again = events(f"{url}/v1/jobs/{job}/events", last=middle)
        missed = [data["seq"] for name, data, _ in told if name == "job" and data["seq"] > int(middle)]
        assert [data["seq"] for name, data, _ in again if name == "job"][: len(set(missed))] == sorted(set(missed))
        over = requests.get(f"{url}/v1/jobs/{job}/events", headers={"Last-Event-ID": again[-1][2]}, timeout=10)
        assert over.status_code == 204


def test_a_failure_shows_cause_evidence_remedy_and_its_recording(tmp_path: Path) -> None:
    port = free_port()
    data = make_image(chips.find("F756"), 3000).segments[0].data
    sha256 = hashlib.sha256(data).hexdigest()
    faults = {"faults": ["nack:0x31:0:address:*"]}
    with Gateway(tmp_path, {"m1": "F756"}, settings=faults, http=f"127.0.0.1:{port}"):
        url = f"http://127.0.0.1:{port}"
        requests.put(f"{url}/v1/images/sha256:{sha256}?name=app.bin", data=data, timeout=30).raise_for_status()
        asked: dict[str, Any] = {"kind": "flash", "image": "app.bin", "addr": 0x08000000, "outside": "discard"}
        done = requests.post(f"{url}/v1/targets/m1/jobs", json=asked, timeout=30)
        job = requests.get(f"{url}{done.headers['Location']}?wait=60", timeout=70).json()
        assert job["state"] == "failed"
        problem = job["problem"]
        assert problem["code"] == job["error"] == "NACK"
        assert problem["cause"]
        assert problem["remedy"]
        assert problem["facts"]
        assert job["trace"] is True
        told = requests.get(f"{url}{done.headers['Location']}/trace?decoded=1", timeout=30).text
        assert re.search(r"! Write Memory +0x[0-9a-f]{8} +NACK in ", told)
