"""In the guest: carries out what the tests outside ask for, over a virtio-serial port or (in a container) a Unix socket.

One request a line, JSON, answered by one line with the same ``id``; several may run at once. Binary data is base64.

    {"id": 1, "run": "systemctl stop bridged", "timeout_s": 60}   -> {"id": 1, "status": 0, "out": "...", "err": "..."}
    {"id": 2, "write": "/etc/bridged/bridged.toml", "data": "..."} -> {"id": 2, "status": 0}
    {"id": 3, "read": "/var/lib/bridged/state.db"}                 -> {"id": 3, "status": 0, "data": "..."}
    {"id": 4, "say": "...", "port": 7100, "timeout_s": 60}         -> {"id": 4, "status": 0, "out": "..."}

The last one is what `nc -N 127.0.0.1 PORT` does, without starting any program: in an emulated machine that costs a tenth of a
second, and tests ask often.

Standard library only: it runs under the Python of the guest's Debian. It knows nothing of bridged.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

PORT = "/dev/virtio-ports/agent"
SOCKET = "/agent/agent.sock"


def carry_out(request: dict[str, Any]) -> dict[str, Any]:
    if "write" in request:
        path = Path(request["write"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(request["data"]))
        path.chmod(request.get("mode", 0o644))
        return {"status": 0}
    if "read" in request:
        return {"status": 0, "data": base64.b64encode(Path(request["read"]).read_bytes()).decode()}
    if "say" in request:
        with socket.create_connection(("127.0.0.1", request["port"]), timeout=request["timeout_s"]) as sock:
            sock.sendall(base64.b64decode(request["say"]))
            sock.shutdown(socket.SHUT_WR)
            return {"status": 0, "out": text(sock.makefile("rb").read()), "err": ""}
    process = subprocess.Popen(
        ["/bin/bash", "-c", request["run"]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""},
    )
    try:
        out, err = process.communicate(base64.b64decode(request.get("stdin", "")), timeout=request["timeout_s"])
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        return {"status": -1, "out": text(out), "err": text(err) + f"\nno end within {request['timeout_s']} s"}
    return {"status": process.returncode, "out": text(out), "err": text(err)}


def text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def serve(incoming: BinaryIO, outgoing: BinaryIO) -> None:
    lock = threading.Lock()

    def say(answer: dict[str, Any]) -> None:
        with lock:
            outgoing.write(json.dumps(answer).encode() + b"\n")
            outgoing.flush()

    def one(request: dict[str, Any]) -> None:
        try:
            answer = carry_out(request)
        except OSError as error:
            answer = {"status": -1, "out": "", "err": str(error)}
        say({"id": request["id"], **answer})

    say({"id": 0, "status": 0, "out": "here"})
    for line in incoming:
        threading.Thread(target=one, args=(json.loads(line),), daemon=True).start()


def main() -> None:
    if os.path.exists(SOCKET):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(SOCKET)
        serve(sock.makefile("rb"), sock.makefile("wb"))
        return
    while not os.path.exists(PORT):
        time.sleep(0.05)
    with open(PORT, "r+b", buffering=0) as port:
        serve(os.fdopen(os.dup(port.fileno()), "rb"), os.fdopen(os.dup(port.fileno()), "wb"))


if __name__ == "__main__":
    main()
