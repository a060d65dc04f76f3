"""Load on a daemon, as the benchmark states it: clients that poll, and one that uploads and has parsed a 1 MiB HEX.

``python -m tests.bench.load --socket PATH`` runs until SIGTERM, and prints one JSON object then and for each line on its input:
how many requests were answered since its start, how long those took that were answered since the last time, how many images
were parsed. The rate is kept by the clock: a client that falls behind catches up, so what is reported as reached was reached.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import signal
import sys
import time
from dataclasses import dataclass, field

REQUESTS = (b"PING\n", b"TARGETS\n", b"JOBS limit=5\n", b"INFO bench\n")
HEX_BYTES = 1 << 20
RECORD_BYTES = 16


@dataclass
class Tally:
    requests: int = 0
    failed: int = 0
    uploads: int = 0
    took_s: list[float] = field(default_factory=list)


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> bytes:
    """The last line of the reply."""
    writer.write(request)
    while True:
        line = await reader.readline()
        if not line:
            raise ConnectionError("the daemon closed the connection")
        if line[3:4] == b" ":
            return line


async def poll(path: str, number: int, rate_hz: float, tally: Tally) -> None:
    reader, writer = await asyncio.open_unix_connection(path)
    await reader.readline()
    due = time.monotonic() + random.Random(number).random() / rate_hz
    turn = number
    while True:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        due += 1 / rate_hz
        turn += 1
        began = time.monotonic()
        reply = await ask(reader, writer, REQUESTS[turn % len(REQUESTS)])
        tally.took_s.append(time.monotonic() - began)
        tally.requests += 1
        tally.failed += reply[:1] not in b"2"
        if writer.is_closing():
            return


def intel_hex(seed: int, size_bytes: int = HEX_BYTES) -> bytes:
    """A HEX file of ``size_bytes`` of text with pseudo-random content, from 0x08000000."""
    source = random.Random(seed)
    lines = [":020000040800F2"]
    payload_bytes = (size_bytes - 40) * RECORD_BYTES // (2 * RECORD_BYTES + 12)
    for at in range(0, payload_bytes - payload_bytes % RECORD_BYTES, RECORD_BYTES):
        if at and at % 0x10000 == 0:
            lines.append(_record(bytes([2, 0, 0, 4, 8, at >> 16])))
        lines.append(_record(bytes([RECORD_BYTES, at >> 8 & 0xFF, at & 0xFF, 0]) + source.randbytes(RECORD_BYTES)))
    lines.append(":00000001FF")
    return ("\n".join(lines) + "\n").encode()


def _record(data: bytes) -> str:
    return f":{data.hex().upper()}{-sum(data) & 0xFF:02X}"


async def upload(path: str, tally: Tally) -> None:
    """Each file differs, so that each is stored and parsed."""
    reader, writer = await asyncio.open_unix_connection(path)
    await reader.readline()
    text = await asyncio.to_thread(intel_hex, 1)
    head, tail = text.split(b"\n", 1)
    for number in range(1 << 30):
        # A start address record (type 5) makes each file another one without making it anew.
        mark = _record(bytes([4, 0, 0, 5, 8, *number.to_bytes(3, "big")])).encode()
        data = head + b"\n" + mark + b"\n" + tail
        digest = hashlib.sha256(data).hexdigest()
        staged = await ask(reader, writer, f"PUT {len(data)} {digest} name=load.hex\n".encode() + data)
        if staged[:3] == b"354":
            staged = await ask(reader, writer, b"")
        # PLAN has the image parsed; that the file does not suit the target is of no interest.
        planned = await ask(reader, writer, f"PLAN bench {digest}\n".encode())
        tally.uploads += 1
        tally.failed += staged[:1] != b"2" or planned[:3] not in (b"250", b"550")


async def run(path: str, clients: int, total_hz: float) -> None:
    tally, began = Tally(), time.monotonic()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def asked() -> None:
        if sys.stdin.readline():
            tell(tally, began)
        else:
            loop.remove_reader(sys.stdin)

    tasks = [asyncio.create_task(poll(path, n, total_hz / clients, tally)) for n in range(clients)]
    tasks.append(asyncio.create_task(upload(path, tally)))
    loop.add_reader(sys.stdin, asked)
    print("ready", flush=True)
    ending = asyncio.create_task(stop.wait())
    await asyncio.wait({*tasks, ending}, return_when=asyncio.FIRST_COMPLETED)
    loop.remove_reader(sys.stdin)
    for task in tasks:
        if task.done() and task.exception() is not None:
            tally.failed += 1
            print(f"load: {task.exception()!r}", file=sys.stderr)
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
    tell(tally, began)


def tell(tally: Tally, began: float) -> None:
    took = sorted(tally.took_s) or [0.0]
    tally.took_s.clear()
    told = {
        "seconds": time.monotonic() - began,
        "requests": tally.requests,
        "failed": tally.failed,
        "uploads": tally.uploads,
        "p50_ms": took[len(took) // 2] * 1000,
        "p99_ms": took[len(took) * 99 // 100] * 1000,
    }
    print(json.dumps(told), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--socket", required=True)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rate", type=float, default=500.0)
    args = parser.parse_args()
    asyncio.run(run(args.socket, args.clients, args.rate))
    return 0


if __name__ == "__main__":
    sys.exit(main())
