"""``bridged demo``: the whole product in a minute, on a machine without any hardware.

Starts what a gateway has (the real daemon, as a process, with a configuration file) and what hangs on it (simulated STM32s on
pseudo-terminals, at the speed of a real wire), then does what a user does: sends an image by ``nc``, submits, polls, reads
the result, looks at the metrics, and asks a second time. Every answer is checked; a deviation ends the demo with exit 1 and
the reason, so that it is an end-to-end test as well.

Invariants:

- It talks to the daemon only from outside: line protocol by ``nc`` and metrics by HTTP. It imports the protocol's codec to read
  replies, and nothing that could make the daemon's work look better than it is.
- What it starts it ends: children die with it, also on Ctrl-C, and by their process ids only.
- Figures come from the job's result and the metrics, never from what the demo thinks it did.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from bridged import __version__
from bridged.errors import BridgedError
from bridged.protocol.reply import Reply, parse_reply
from bridged.sim.demo_images import DemoImage, demo_images

BAUD = 115200
BITS_PER_BYTE = 11  # 8E1 on the wire: start, eight data, parity, stop
START_LIMIT_S = 30.0
JOB_LIMIT_S = 240.0
POLL_S = 0.5
WIRE_PHASES = ("backup", "write", "verify")
NETCATS = ("nc", "netcat", "ncat")


class DemoFailed(Exception):
    """Something was not as it must be; the text says what."""


# --- what a user has: nc and curl ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Client:
    """One netcat call per conversation. Every conversation ends with QUIT, so that any netcat ends by itself."""

    port: int
    netcat: str = field(default_factory=lambda: next((path for name in NETCATS if (path := shutil.which(name))), ""))

    @property
    def name(self) -> str:
        return self.netcat or "a few lines of Python in place of nc, which is not installed"

    def say(self, data: bytes, timeout_s: float = 30.0) -> list[Reply]:
        """Send ``data`` and QUIT; all replies but greeting and good-bye."""
        data += b"QUIT\n"
        try:
            if self.netcat:
                command = [self.netcat, "127.0.0.1", str(self.port)]
                done = subprocess.run(
                    command, input=data, capture_output=True, timeout=timeout_s, check=False, start_new_session=True
                )
                answer, told = done.stdout, done.stderr.decode(errors="replace").strip()
            else:
                answer, told = self._without_netcat(data, timeout_s), ""
        except (subprocess.TimeoutExpired, OSError) as error:
            raise DemoFailed(f"no end of the conversation that began with {data[:60]!r}: {error}") from error
        replies = [parse_reply(line) for line in answer.splitlines(keepends=True)]
        if len(replies) < 3 or replies[0].code != 220 or replies[-1].code != 221:
            raise DemoFailed(f"to {data[:60]!r} the daemon answered {answer[:400]!r} {told}")
        return replies[1:-1]

    def ask(self, line: str, timeout_s: float = 30.0) -> Reply:
        """One request; its last reply line."""
        return self.say(line.encode() + b"\n", timeout_s)[-1]

    def _without_netcat(self, data: bytes, timeout_s: float) -> bytes:
        answer = bytearray()
        with socket.create_connection(("127.0.0.1", self.port), timeout_s) as connection:
            # The upload is read by the daemon as it comes, and its answers are short: no deadlock between the two.
            connection.sendall(data)
            while piece := connection.recv(65536):
                answer += piece
        return bytes(answer)


def fetch_metrics(port: int) -> dict[str, float]:
    """What ``curl 127.0.0.1:PORT/metrics`` shows, by ``name{labels}``."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    samples: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition(" # ")[0].rpartition(" ")
            samples[name] = float(value)
    return samples


# --- what a gateway has: processes --------------------------------------------------------------------------------


class Process:
    """One child with its output in a file. In a session of its own: Ctrl-C reaches only the demo, which ends it in order."""

    def __init__(self, name: str, arguments: Sequence[str], directory: Path) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "bridged", *arguments],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def check(self) -> None:
        """Raise when it has ended by itself."""
        status = self.child.poll()
        if status is not None:
            tail = self.log.read_text(errors="replace").strip()[-2000:]
            raise DemoFailed(f"{self.name} ended with status {status}:\n{tail}")

    def end(self) -> None:
        for sign, limit_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
            if self.child.poll() is None:
                self.child.send_signal(sign)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.child.wait(limit_s)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


def configuration(directory: Path, images: Sequence[DemoImage], line_port: int, http_port: int, metrics_port: int) -> str:
    """The daemon's configuration file: what a user would write for these targets."""
    text = f"""\
[gateway]
name = "demo"
state_dir = "{directory / "state"}"

[api]
listen = "127.0.0.1:{line_port}"
socket = "{directory / "bridged.sock"}"
http = "127.0.0.1:{http_port}"
metrics = "127.0.0.1:{metrics_port}"
"""
    for image in images:
        name = image.chip.lower()
        text += f"""
[targets.{name}]
port = "{directory / name}.tty"
chip = "{image.chip}"
baud = {BAUD}

[targets.{name}.lines]
kind = "socket"
socket = "{directory / name}.lines"
nrst = "nrst"
boot0 = "boot0"
"""
    return text


def wait_for_simulators(simulators: Process) -> None:
    """Until the last line of their output says that all of them run."""
    deadline = time.monotonic() + START_LIMIT_S
    while simulators.log.read_text().split("\n")[-2:] != ["ready", ""]:
        simulators.check()
        if time.monotonic() > deadline:
            raise DemoFailed(f"the simulators were not ready within {START_LIMIT_S:.0f} s:\n{simulators.log.read_text()}")
        time.sleep(0.05)


def wait_until_ready(line_port: int, daemon: Process) -> str:
    """The greeting of the daemon, as soon as there is one."""
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        daemon.check()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", line_port), 5) as connection:
            greeting = connection.makefile("rb").readline()
            if greeting.startswith(b"220"):
                return greeting.decode().strip()
        time.sleep(0.05)
    raise DemoFailed(f"the daemon did not answer on port {line_port} within {START_LIMIT_S:.0f} s")


# --- what is shown ------------------------------------------------------------------------------------------------


class Screen:
    """Lines for people, and below them one line of progress that is rewritten on a terminal, else said now and then."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.terminal = sys.stdout.isatty()
        self._lock = threading.Lock()
        self._progress: dict[str, str] = {}
        self._said_at = time.monotonic()

    def say(self, text: str = "") -> None:
        if self.quiet:
            return
        with self._lock:
            self._clear()
            print(text, flush=True)
            self._draw()

    def progress(self, target: str, text: str) -> None:
        """What ``target`` does now; empty: it has ended."""
        with self._lock:
            self._progress.pop(target, None)
            if text:
                self._progress[target] = text
            self._clear()
            if self.terminal:
                self._draw()
            elif not self.quiet and self._progress and time.monotonic() - self._said_at >= 10:
                self._said_at = time.monotonic()
                print(f"  ... {self._line()}", flush=True)

    def _line(self) -> str:
        return "   ".join(f"{target} {text}" for target, text in sorted(self._progress.items()))

    def _clear(self) -> None:
        if self.terminal and not self.quiet:
            print("\r\033[K", end="", flush=True)

    def _draw(self) -> None:
        if self.terminal and not self.quiet and self._progress:
            width = shutil.get_terminal_size().columns - 1
            print(f"  {self._line()}"[:width], end="", flush=True)


# --- one target ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Phase:
    seconds: float
    payload_bytes: int
    wire_bytes: int

    @property
    def rate(self) -> str:
        """Payload in kB/s, for people."""
        return f"{self.payload_bytes / self.seconds / 1000:.1f} kB/s" if self.seconds > 0 else "-"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one flash was, as the daemon's result tells."""

    image: DemoImage
    target: str
    job: str
    seconds: float
    baud: int
    sectors_erased: int
    bytes_written: int
    bytes_kept: int
    bytes_compared: int
    banner: str
    phases: Mapping[str, Phase]

    @property
    def wire_limit_s(self) -> float:
        """How long the bytes of backup, write and verify keep the wire busy, one direction at a time as AN3155 is."""
        return sum(self._phase(name).wire_bytes for name in WIRE_PHASES) * BITS_PER_BYTE / self.baud

    @property
    def wire_phases_s(self) -> float:
        return sum(self._phase(name).seconds for name in WIRE_PHASES)

    def _phase(self, name: str) -> Phase:
        return self.phases.get(name, Phase(0.0, 0, 0))


def need(reply: Reply, key: str) -> str:
    """The value of ``key``; in STATUS the result of a job is nested."""
    for name in (key, f"result.{key}"):
        if name in reply.data:
            return str(reply.data[name])
    raise DemoFailed(f"the answer has no {key}=: {reply.code} {reply.text} {dict(reply.data)}")


def expect(reply: Reply, code: int, what: str) -> Reply:
    if reply.code != code:
        details = " ".join(f"{key}={value}" for key, value in reply.data.items())
        raise DemoFailed(f"{what}: expected {code}, the daemon said {reply.code} {reply.text} {details}")
    return reply


def flash(client: Client, image: DemoImage, screen: Screen, stop: threading.Event) -> Outcome:
    """Stage, submit, poll, read the result: one target, start to end. ``stop``: somebody else has failed, give up."""
    target = image.chip.lower()
    content = image.read()
    have = client.ask(f"HAVE {image.sha256}")
    if have.code != 404 and need(have, "complete") != "0":
        raise DemoFailed(f"{target}: a fresh gateway says that it has {image.sha256} already")
    submission = f"FLASH {target} {image.path.name} id=demo-{target}\n"
    pipe = f"PUT {len(content)} {image.sha256} name={image.path.name}\n".encode() + content + submission.encode()
    replies = [reply for reply in client.say(pipe, 60.0) if not reply.more]
    if [reply.code for reply in replies] != [354, 250, 250] or need(replies[1], "image") != f"sha256:{image.sha256}":
        raise DemoFailed(f"{target}: PUT and FLASH in one pipe were answered with {replies}")
    job = need(replies[2], "job")
    screen.say(f"  {target:6}sent     {len(content)} bytes of ELF and the job in one pipe; staged, digest right: job {job}")
    poll(client, target, job, screen, stop)
    final = expect(client.ask(f"WAIT {job}", JOB_LIMIT_S), 250, f"{target}: job {job}")
    if need(final, "state") != "succeeded" or need(final, "evidence") != "full":
        raise DemoFailed(f"{target}: job {job} ended without full proof: {dict(final.data)}")
    outcome = read_outcome(image, target, job, final)
    if outcome.bytes_compared < image.load_bytes:
        raise DemoFailed(f"{target}: {outcome.bytes_compared} bytes compared, the image has {image.load_bytes}")
    if image.banner not in outcome.banner:
        raise DemoFailed(f"{target}: the application said {outcome.banner!r}, expected {image.banner!r}")
    tell(outcome, screen)
    return outcome


def flash_all(client: Client, images: Sequence[DemoImage], screen: Screen) -> dict[str, Outcome]:
    """All targets at the same time, one thread each; the first failure, or Ctrl-C, ends the others."""
    stop = threading.Event()
    outcomes: dict[str, Outcome] = {}
    with ThreadPoolExecutor(len(images)) as pool:
        try:
            for job in as_completed([pool.submit(flash, client, image, screen, stop) for image in images]):
                outcome = job.result()
                outcomes[outcome.target] = outcome
        finally:
            stop.set()
    return outcomes


def poll(client: Client, target: str, job: str, screen: Screen, stop: threading.Event) -> None:
    """Ask STATUS until the job has ended, as a script would."""
    deadline = time.monotonic() + JOB_LIMIT_S
    try:
        while time.monotonic() < deadline and not stop.wait(POLL_S):
            status = expect(client.ask(f"STATUS {job}"), 250, f"{target}: STATUS {job}")
            state = need(status, "state")
            if state not in ("queued", "waiting", "running", "interrupted"):
                return
            done, total = int(status.data.get("done", 0)), int(status.data.get("total", 0))
            share = f" {100 * done // total:3d} %" if total else ""
            screen.progress(target, f"{status.data.get('phase') or state}{share}")
    finally:
        screen.progress(target, "")
    raise DemoFailed(f"{target}: job {job} did not end within {JOB_LIMIT_S:.0f} s")


def read_outcome(image: DemoImage, target: str, job: str, final: Reply) -> Outcome:
    phases: dict[str, dict[str, float]] = {}
    for name, value in final.data.items():
        parts = name.split(".")
        if len(parts) >= 3 and parts[-3] == "phases":
            phases.setdefault(parts[-2], {})[parts[-1]] = float(value)
    return Outcome(
        image=image,
        target=target,
        job=job,
        seconds=float(need(final, "seconds")),
        baud=int(need(final, "baud")),
        sectors_erased=int(need(final, "sectors_erased")),
        bytes_written=int(need(final, "bytes_written")),
        bytes_kept=int(need(final, "bytes_kept")),
        bytes_compared=int(need(final, "bytes_compared")),
        banner=need(final, "banner"),
        phases={
            name: Phase(cost["seconds"], int(cost["payload_bytes"]), int(cost["wire_bytes"])) for name, cost in phases.items()
        },
    )


def tell(outcome: Outcome, screen: Screen) -> None:
    phases = outcome.phases
    lines = []
    if "backup" in phases:
        lines.append(
            f"read     {phases['backup'].payload_bytes} bytes beside the image, to keep them ({phases['backup'].rate})"
        )
    lines += [
        f"erased   {outcome.sectors_erased} sectors in {phases['erase'].seconds:.1f} s",
        f"written  {outcome.bytes_written} bytes at {phases['write'].rate}; what is blank is not sent",
        f"proven   {outcome.bytes_compared} bytes read back and compared at {phases['verify'].rate}",
        f"booted   {outcome.banner.strip()!r}",
    ]
    screen.say("\n".join(f"  {outcome.target:6}{line}" for line in lines))


# --- the story ----------------------------------------------------------------------------------------------------


def figures(outcomes: Sequence[Outcome], paced: bool = True) -> str:
    head = ("target", "image", "total", "erase", "write", "verify", "wire limit", "reached")
    rows = [head]
    for outcome in outcomes:
        rows.append(
            (
                outcome.target,
                f"{outcome.image.load_bytes} B",
                f"{outcome.seconds:.1f} s",
                f"{outcome.phases['erase'].seconds:.1f} s",
                outcome.phases["write"].rate,
                outcome.phases["verify"].rate,
                f"{outcome.wire_limit_s:.1f} s",
                # A wire without a pace has no limit that could be reached.
                f"{100 * outcome.wire_limit_s / outcome.wire_phases_s:.0f} %" if paced else "unpaced",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  "
        + "  ".join(f"{cell:<{w}}" if not i else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def excerpt(samples: Mapping[str, float], targets: Sequence[str]) -> str:
    """The lines of /metrics that tell the story of these targets."""
    wanted = ("bridged_jobs_total", "bridged_flash_bytes_total", "bridged_uart_errors_total", "bridged_uart_bytes_total")
    lines = []
    for name, value in samples.items():
        if name.startswith(wanted) and f'target="{targets[0]}"' in name and value:
            lines.append(f"  {name} {value:.0f}")
    return "\n".join(lines)


def touched(samples: Mapping[str, float]) -> dict[str, float]:
    """Everything in the metrics that moves when a flash is changed."""
    return {
        name: value
        for name, value in samples.items()
        if (name.startswith("bridged_flash_bytes_total") and 'op="write"' in name)
        or (name.startswith("bridged_sectors_total") and 'op="erased"' in name)
    }


def ensure(client: Client, image: DemoImage, screen: Screen) -> None:
    target = image.chip.lower()
    reply = expect(client.ask(f"ENSURE {target} {image.path.name} wait=1", JOB_LIMIT_S), 251, f"{target}: a second ENSURE")
    evidence = need(reply, "evidence")
    text = " ".join(f"{key}={value}" for key, value in reply.data.items() if key.rsplit(".", 1)[-1] in ("evidence", "age_s"))
    screen.say(f"  {target:6}251 already so ({text})" if text else f"  {target:6}251 already so (evidence={evidence})")


def count(images: Sequence[DemoImage]) -> str:
    return f"{len(images)} simulated STM32{'s' if len(images) > 1 else ''}"


@contextlib.contextmanager
def workplace(keep: bool) -> Iterator[Path]:
    # A short path: a Unix socket's address holds 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="bridged-demo-"))
    try:
        yield directory
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)


def simulators(images: Sequence[DemoImage], directory: Path, fast: bool) -> Process:
    """One process that plays all chips."""
    arguments = ["sim"]
    for image in images:
        path = directory / image.chip.lower()
        arguments += ["--chip", image.chip, "--link", f"{path}.tty", "--lines", f"{path}.lines"]
    return Process("simulators", [*arguments, *(["--baud-unpaced"] if fast else [])], directory)


def run(images: Sequence[DemoImage], directory: Path, fast: bool, screen: Screen) -> None:
    """The demo itself. Raises ``DemoFailed`` with the first deviation."""
    started = time.monotonic()
    names = [image.chip.lower() for image in images]
    line_port, http_port, metrics_port = free_port(), free_port(), free_port()
    config = directory / "bridged.toml"
    config.write_text(configuration(directory, images, line_port, http_port, metrics_port))
    client = Client(line_port)
    processes: list[Process] = []
    try:
        processes.append(simulators(images, directory, fast))
        wait_for_simulators(processes[0])
        processes.append(Process("gateway", ["serve", "--config", str(config)], directory))
        wait_until_ready(line_port, processes[-1])
        pace = "as fast as it goes" if fast else f"at {BAUD} 8E1 in real time"
        screen.say(f"bridged {__version__}: {count(images)} behind one gateway, flashed by nc.\n")
        screen.say(f"  targets  {', '.join(f'{n} (STM32{i.chip})' for n, i in zip(names, images, strict=True))}, UART {pace}")
        screen.say(f"  gateway  127.0.0.1:{line_port} for you, 127.0.0.1:{metrics_port} for Prometheus")
        screen.say(f"  client   {client.name}\n")
        first = images[0]
        screen.say("The whole job of a user is one pipe:\n")
        screen.say(
            f"  {{ printf 'PUT {first.size_bytes} {first.sha256[:8]}... name={first.path.name}\\n'; cat {first.path.name}"
        )
        screen.say(f"    printf 'FLASH {names[0]} {first.path.name}\\nQUIT\\n'; }} | nc 127.0.0.1 {line_port}\n")

        outcomes = flash_all(client, images, screen)
        for process in processes:
            process.check()

        screen.say("\nThe figures, from the jobs' own results:\n")
        screen.say(figures([outcomes[name] for name in names], paced=not fast))
        screen.say("\n  wire limit: bytes that AN3155 needs to read, write and read back, both directions, 11 bits each;")
        screen.say("  reached: that limit against the time spent, with programming and this machine's latency in it.\n")
        samples = fetch_metrics(metrics_port)
        screen.say(f"$ curl -s 127.0.0.1:{metrics_port}/metrics | grep {names[0]}\n")
        screen.say(excerpt(samples, names))
        for name in names:
            if not any(
                f'target="{name}"' in key and 'result="succeeded"' in key and value == 1 for key, value in samples.items()
            ):
                raise DemoFailed(f"the metrics do not show one succeeded job of {name}")
        before = touched(samples)
        if not before:
            raise DemoFailed("the metrics do not count what was written")

        screen.say("\nThe same wish again (ENSURE): is it there already?\n")
        with ThreadPoolExecutor(len(images)) as pool:
            list(pool.map(lambda image: ensure(client, image, screen), images))
        changed = {key: value for key, value in touched(fetch_metrics(metrics_port)).items() if value != before.get(key)}
        if changed:
            raise DemoFailed(f"the second ENSURE changed something: {changed}")
        screen.say("\n  Nothing was erased or written for these answers (the counters stand still).")
        screen.say(
            f"\n{len(images)} of {len(images)} targets flashed, proven and running, in {time.monotonic() - started:.0f} s."
        )
        screen.say("This was a simulator. Your board: docs/getting-started.md")
    finally:
        for process in reversed(processes):
            process.end()


def main(argv: Sequence[str] | None = None) -> int:
    """``bridged demo``: 0 when everything was as it must be, 1 with the reason when not, 130 after Ctrl-C."""
    chips = [image.chip for image in demo_images()]
    parser = argparse.ArgumentParser(prog="bridged demo", description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--chip", action="append", choices=chips, help="only this simulated chip; may be given several times")
    parser.add_argument("--fast", action="store_true", help="do not pace the simulated wires at the baud rate")
    parser.add_argument("--keep", action="store_true", help="keep the working directory with logs and journal")
    parser.add_argument("--quiet", action="store_true", help="say nothing unless something is wrong")
    arguments = parser.parse_args(argv)
    images = [image for image in demo_images() if not arguments.chip or image.chip in arguments.chip]
    screen = Screen(arguments.quiet)
    # A supervisor ends us by SIGTERM; the children must not outlive us then either.
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with workplace(arguments.keep) as directory:
            try:
                run(images, directory, arguments.fast, screen)
            finally:
                if arguments.keep:
                    print(f"kept: {directory}", flush=True)
    except (DemoFailed, BridgedError, OSError, ValueError) as error:
        print(f"\nbridged demo: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\nbridged demo: interrupted; simulators and gateway were ended", file=sys.stderr, flush=True)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or None))
