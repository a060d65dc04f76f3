"""Our session by itself: the process of the product, started by its owner, without daemon, queue and journal.

What is measured with it is the session (``bridged.target.session`` in ``worker.py``) and what it takes to start one; the
barriers, which wait for the journal in the daemon, are answered at once. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from bridged import config
from bridged.events import Event, Phase, PhaseStarted
from bridged.images.model import Image
from bridged.target.owner import Target

BASE = 0x08000000
PRESENT_LIMIT_S = 10.0


def target_settings(port: str, lines: str, baud: int, chip: str = "F407") -> config.Target:
    """As in the configuration file of the daemon, see ``run.py``: nothing is listened to, the part starts in 10 ms."""
    return config.Target(
        port=port,
        chip=chip,
        baud=baud,
        startup_s=0.02,
        lines=config.Lines(kind="socket", socket=lines, nrst="nrst", boot0="boot0", reset_s=0.001, boot0_setup_s=0.001),
        application=config.Application(listen_s=0),
    )


async def flash(settings: config.Target, data: bytes) -> dict[str, Any]:
    """Flash ``data`` and prove it; what it cost."""
    target = Target("bench", settings)
    await target.open()
    async with asyncio.timeout(PRESENT_LIMIT_S):
        await target.wait_present()
    started = time.monotonic()
    dialogue_began = 0.0

    def on_event(event: Event) -> None:
        nonlocal dialogue_began
        if isinstance(event, PhaseStarted) and event.phase is Phase.ACTIVATE and not dialogue_began:
            dialogue_began = time.monotonic()

    async def on_barrier(_state: str, _hazard_s: float, _kept: bytes) -> None:
        return None

    own = resource.getrusage(resource.RUSAGE_SELF)
    image = Image.of([(BASE, data)])
    result = await target.run("flash", {}, image, job_id="bench", on_event=on_event, on_barrier=on_barrier)
    seconds = time.monotonic() - started
    own_after, session = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    await target.close()
    return {
        "seconds": seconds,
        "start_s": dialogue_began - started,
        "cpu_s": session.ru_utime + session.ru_stime,
        "owner_cpu_s": own_after.ru_utime + own_after.ru_stime - own.ru_utime - own.ru_stime,
        "evidence": result["evidence"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", required=True)
    parser.add_argument("--lines", required=True)
    parser.add_argument("--baud", type=int, required=True)
    parser.add_argument("--chip", default="F407")
    parser.add_argument("image", type=Path)
    args = parser.parse_args(argv)
    settings = target_settings(args.port, args.lines, args.baud, args.chip)
    print(json.dumps(asyncio.run(flash(settings, args.image.read_bytes()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
