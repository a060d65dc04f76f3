"""Whoever runs a goosebit server, as far as a test needs: its own HTTP interface, with nothing but the standard library."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any


class Admin:
    def __init__(self, api: str) -> None:
        self._api = api
        form = urllib.parse.urlencode({"username": "admin@goosebit.test", "password": "admin"}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{api}/setup", data=form)) as answer:
            self._token = json.load(answer)["access_token"]

    def _ask(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": kind}
        with urllib.request.urlopen(
            urllib.request.Request(f"{self._api}/api/v1{path}", body, headers, method=method)
        ) as answer:
            return json.load(answer)

    def devices(self) -> dict[str, Any]:
        return {one["id"]: one for one in self._ask("GET", "/devices")["devices"]}

    def roll_out(self, software: Path) -> None:
        """The software to everybody who polls."""
        head = f'--x\r\nContent-Disposition: form-data; name="file"; filename="{software.name}"\r\n\r\n'.encode()
        body = head + software.read_bytes() + b"\r\n--x--\r\n"
        made = self._ask("PUT", "/software", body, "multipart/form-data; boundary=x")
        self._ask("PUT", "/rollouts", json.dumps({"name": "r1", "feed": "default", "software_id": made["id"]}).encode())

    def succeeded(self) -> int:
        return sum(int(one["success_count"]) for one in self._ask("GET", "/rollouts")["rollouts"])
