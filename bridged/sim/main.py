"""``bridged sim``: simulated devices on ptys until somebody ends them, for demos, tests and other people's hosts.

One line on stdout for each device as soon as all of them run, words of ``key=value``:

    device=0 chip=F756 pty=/dev/pts/5 link=/run/f756 lines=/run/f756.lines

then ``ready``. Options that are given once hold for every device; ``--link``, ``--lines`` and ``--flash-file`` go with the
``--chip`` of the same position. Ends with 0 on SIGTERM or SIGINT, with 2 on a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from bridged.chips import find
from bridged.errors import BridgedError
from bridged.sim import faults
from bridged.sim.application import Behaviour
from bridged.sim.device import Device
from bridged.sim.loader import Seconds, Timing
from bridged.sim.pty import PtyDevice


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="bridged sim",
        description="Simulated STM32s with their ROM loaders, each on a pty.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="faults (--fault), each once, positions from 0:\n" + _fault_help(),
    )
    add = made.add_argument
    add("--chip", action="append", required=True, metavar="NAME", help="part or product id: F756, 0x449 (repeat for more)")
    add("--link", action="append", default=[], type=Path, metavar="PATH", help="symbolic link to the pty")
    add("--lines", action="append", default=[], type=Path, metavar="PATH", help="line box: Unix socket for NRST, BOOT0, power")
    add("--flash-file", action="append", default=[], type=Path, metavar="PATH", help="keep the flash in this file")
    add("--image", type=Path, metavar="PATH", help="raw binary that is in flash at the start")
    add("--flash-kib", type=int, metavar="N", help="size of the flash (default: the largest part)")
    add("--layout", metavar="NAME", help="sector layout (default: the table's first)")
    add("--boot", choices=("pins", "loader"), default="pins", help="loader: start in the loader whatever the pins say")
    add("--erase-s", type=_seconds, default="typical", metavar="S", help="time of one sector erase: seconds, never, typical")
    add("--mass-erase-s", type=_seconds, default="typical", metavar="S", help="time of a mass erase: seconds, never, typical")
    add("--program-s", type=float, metavar="S", help="time to program 256 bytes (default: as the family does)")
    add("--startup-s", type=float, metavar="S", help="from reset to listening (default: the chip table)")
    add("--loader-id", type=_number, metavar="N", help="version byte of the loader, for its quirks")
    add("--protocol", type=_version, metavar="X.Y", help="protocol version that Get tells")
    add("--checksum", action="store_true", help="the loader has command 0xA1")
    add("--option", action="append", default=[], type=_option, metavar="NAME=VALUE", help="an option bit or word")
    add("--rdp", type=int, choices=(0, 1, 2), default=0, help="level of readout protection")
    add("--fault", action="append", default=[], metavar="SPEC", help="see below")
    add("--seed", type=int, default=0, metavar="N", help="erase times, rate errors and unique id follow from it")
    add("--rate-error", type=float, metavar="X", help="fixed error of the measured rate, 0.03 = 3 %% (default: drawn)")
    add("--max-baud", type=int, metavar="N", help="highest rate that the loader can measure")
    add("--baud-unpaced", action="store_true", help="bytes take no time")
    add("--app-baud", type=int, default=115200, metavar="N", help="rate of the application")
    add("--app-parity", choices=("N", "E", "O"), default="N", help="parity of the application")
    add("--app-echo", action="store_true", help="the application echoes every byte")
    add("--app-trigger", default="", metavar="TEXT", help="a line on which the application jumps into the loader")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT. Must be called in the main thread."""
    args = parser().parse_args(argv)
    stop = threading.Event()
    try:
        runners = [_device(args, number) for number in range(len(args.chip))]
    except (BridgedError, OSError, ValueError) as error:
        print(f"bridged sim: {error}", file=sys.stderr)
        return 2
    for wanted in (signal.SIGTERM, signal.SIGINT):
        signal.signal(wanted, lambda *_: stop.set())
    with contextlib.ExitStack() as stack:
        try:
            for runner in runners:
                stack.enter_context(runner)
        except BridgedError as error:
            print(f"bridged sim: {error}", file=sys.stderr)
            return 1
        for number, (name, runner) in enumerate(zip(args.chip, runners, strict=True)):
            words = {"device": number, "chip": name, "pty": runner.path, "link": runner.link, "lines": runner.lines_path}
            print(" ".join(f"{key}={value}" for key, value in words.items() if value is not None))
        print("ready", flush=True)
        stop.wait()
    return 0


def _device(args: argparse.Namespace, number: int) -> PtyDevice:
    device = Device(
        find(args.chip[number]),
        flash_bytes=args.flash_kib * 1024 if args.flash_kib else None,
        layout=args.layout,
        loader_id=args.loader_id,
        seed=args.seed + number,
        timing=Timing(args.startup_s, args.erase_s, args.mass_erase_s, program_s_per_256=args.program_s),
        faults=args.fault,
        application=Behaviour(
            baud=args.app_baud, parity=args.app_parity, echo=args.app_echo, trigger=args.app_trigger.encode()
        ),
        protocol=args.protocol,
        checksum=args.checksum,
        rate_error=args.rate_error,
        max_baud=args.max_baud,
        rdp=args.rdp,
        powered=False,
    )
    for name, value in args.option:
        if name not in device.memory:
            raise ValueError(f"--option {name}: this chip knows {', '.join(device.memory.option_names())}")
        device.memory.set_option(name, value)
    if args.image is not None:
        device.memory.load_flash(args.image.read_bytes())
    runner = PtyDevice(
        device,
        link=_nth(args.link, number),
        lines_path=_nth(args.lines, number),
        flash_file=_nth(args.flash_file, number),
        paced=not args.baud_unpaced,
        boot_loader=args.boot == "loader",
    )
    return runner


def _nth(paths: list[Path], number: int) -> Path | None:
    return paths[number] if number < len(paths) else None


def _seconds(text: str) -> Seconds:
    if text == "typical":
        return "typical"
    if text == "never":
        return None
    return float(text)


def _number(text: str) -> int:
    return int(text, 0)


def _version(text: str) -> int:
    major, _, minor = text.partition(".")
    return int(major) << 4 | int(minor)


def _option(text: str) -> tuple[str, int]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: NAME=VALUE was expected")
    return name, int(value, 0)


def _fault_help() -> str:
    lines = (faults.__doc__ or "").splitlines()
    return "\n".join(line for line in lines if line.startswith("    ") or line.startswith("STAGE"))


if __name__ == "__main__":
    sys.exit(main())
