"""The parser process: bytes of strangers become an ``Image`` somewhere that can do no harm (design, section 2).

Both sides of it. The daemon calls ``parse_file`` (blocking, meant for ``asyncio.to_thread``); that starts this module as a
program, which limits itself, reads the file from an inherited descriptor, parses (``formats``), writes the encoded image
into an inherited memfd and one line of JSON into a pipe. The daemon seals the memfd, checks what is in it, and believes
nothing else.

Invariants:

- The process has no socket, no path to a file of ours and no environment; memory, CPU time, output, descriptors and further
  processes are limited before the first foreign byte is looked at.
- However it ends (error, limit, signal, silence), the caller gets an ``Image`` or a typed error, within ``timeout_s``.
- Nothing of the formats or their libraries is imported on the daemon's side.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bridged.errors import BadRequest, BridgedError, CorruptImage, ImageError, ImageTooLarge, from_dict
from bridged.images import memfd
from bridged.images.model import MAX_SEGMENTS, Image

TYPE_HINTS = (
    "auto",
    "bin",
    "hex",
    "elf",
    "srec",
    "dfuse",
)  # What formats.py reads, said here for those who must not import it.
STATUS_LIMIT_BYTES = 65536  # The line of the child: a message, some facts, and their JSON; far more than any has.
MAX_DESCRIPTORS = 32  # Of the child: its four, what the interpreter opens while it imports, and room to spare.
GZIP_MAGIC = b"\x1f\x8b"  # As in formats.py, likewise.

# The child must find the very modules that the daemon runs with, installed, editable or from a checkout, while -I keeps the
# environment and the current directory out. So it gets our module path as an argument instead of PYTHONPATH.
_BOOT = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from bridged.images.parser import main; sys.exit(main())"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one parser process may use. A HEX file of 1 MiB takes some 25 MiB and half a second; these stop bombs, not work.

    ``memory_bytes`` of address space plus ``memory_factor`` for each byte of the file. ``unpacked_bytes``: the most that a gzip
    may hold; in a store the limit for a file, so that packing gets nobody around it.
    """

    memory_bytes: int = 512 << 20  # Of address space, most of which the interpreter and its libraries only reserve.
    memory_factor: int = 16  # More for each byte of the file: text becomes lines, records and parts before it is an image.
    cpu_s: int = 60  # A HEX of 1 MiB takes half a second on a PC: the largest file some 16 s, and gateways are slower.
    timeout_s: float = 120.0  # By the clock, on a machine that does other things as well.
    unpacked_bytes: int = 32 << 20  # In a store: as much as a file may have.

    def address_space(self, size_bytes: int) -> int:
        return self.memory_bytes + self.memory_factor * size_bytes


DEFAULT_LIMITS = Limits()


def encoded_limit(size_bytes: int) -> int:
    """No format of ours yields more content than its text has bytes; then the table of segments and the head."""
    return size_bytes + 8 * MAX_SEGMENTS + 64


# --- the daemon's side --------------------------------------------------------------------------------------------


def parse_file(
    fd: int,
    size_bytes: int,
    type_hint: str = "auto",
    base_address: int | None = None,
    *,
    limits: Limits = DEFAULT_LIMITS,
    boot: str = _BOOT,
) -> Image:
    """The image in the first ``size_bytes`` of ``fd``, whose offset stays where it is. Blocks up to ``limits.timeout_s``.

    Raises what ``formats.parse`` raises; ``ImageTooLarge`` when a limit was hit; ``CorruptImage`` when the parser died.
    ``boot``: the program of the child, so that tests can put a hostile one in its place.
    """
    if type_hint not in TYPE_HINTS:
        raise BadRequest(f"unknown image type {type_hint!r}, expected one of {', '.join(TYPE_HINTS)}", type=type_hint)
    if base_address is not None and not 0 <= base_address < 1 << 32:
        raise BadRequest(f"address {base_address:#x} is outside the 32-bit address space", address=base_address)
    # One look at two bytes, because what a gzip holds is larger than the file that bounds everything else.
    most = max(size_bytes, limits.unpacked_bytes) if os.pread(fd, len(GZIP_MAGIC), 0) == GZIP_MAGIC else size_bytes
    out = memfd.create("bridged-parsed")
    order: dict[str, int | str | None] = {
        "in": fd,
        "out": out,
        "size_bytes": size_bytes,
        "type": type_hint,
        "base": base_address,
        "memory_bytes": limits.address_space(most),
        "cpu_s": limits.cpu_s,
        "output_bytes": encoded_limit(most),
        "unpacked_bytes": limits.unpacked_bytes,
    }
    try:
        status = _run(order, (fd, out), limits, boot)
        if "code" in status:
            raise _reported(status)
        memfd.seal_fd(out)
        return memfd.map_sealed(out, encoded_limit(most))
    finally:
        os.close(out)


def _run(order: dict[str, int | str | None], inherited: tuple[int, ...], limits: Limits, boot: str) -> dict[str, object]:
    """Start the child, wait for its end, return what it reported. The child is reaped whatever happens."""
    package_root = str(Path(__file__).resolve().parents[2])
    path = [package_root, *(os.path.abspath(p) for p in sys.path if p and p != package_root)]
    size_bytes = order["size_bytes"]
    reader, writer = os.pipe()
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", boot, json.dumps(path), json.dumps({**order, "status": writer})],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(*inherited, writer),
            cwd="/",
            env={},
        )
    except OSError as error:
        os.close(reader)
        raise ImageError(f"the parser process could not be started: {error.strerror}") from error
    finally:
        os.close(writer)
    deadline = time.monotonic() + limits.timeout_s
    try:
        line = _read_until_end(reader, deadline)
        code = child.wait(max(0.01, deadline - time.monotonic()))
    except (TimeoutError, subprocess.TimeoutExpired) as error:
        raise ImageTooLarge(
            f"parsing {size_bytes} bytes took longer than {limits.timeout_s:g} s and was stopped", timeout_s=limits.timeout_s
        ) from error
    finally:
        os.close(reader)
        child.kill()  # does nothing when it has been reaped
        child.wait()
    return _understood(code, line, f"{size_bytes} bytes", limits)


def _read_until_end(reader: int, deadline: float) -> bytes:
    """Everything the child says until it closes the pipe (its end at the latest)."""
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    said = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            raise TimeoutError
        chunk = os.read(reader, STATUS_LIMIT_BYTES)
        if not chunk:
            return said
        said = (said + chunk)[: STATUS_LIMIT_BYTES + 1]


def _understood(code: int, line: bytes, what: str, limits: Limits) -> dict[str, object]:
    """The child's report, or a typed error that tells how it ended without one."""
    with contextlib.suppress(ValueError, RecursionError):
        status = json.loads(line) if code == 0 and len(line) <= STATUS_LIMIT_BYTES else None
        if isinstance(status, dict) and ("code" in status or status.get("ok") is True):
            return status
    if code == -signal.SIGXCPU:
        raise ImageTooLarge(f"parsing {what} took more than {limits.cpu_s} s of CPU time and was stopped")
    if code == -signal.SIGKILL:
        raise ImageTooLarge(f"the parser process was killed while parsing {what}; usually memory had run out")
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        raise CorruptImage(f"the parser process crashed ({name}) on these {what}", signal=-code)
    raise CorruptImage(f"the parser process ended with status {code} and no result for these {what}", status=code)


def _reported(status: dict[str, object]) -> BridgedError:
    """The child's error. The child read hostile bytes, so only image and request errors with short texts are believed."""
    facts = status.get("facts")
    scalars = {str(k)[:64]: v for k, v in facts.items() if isinstance(v, str | int | float)} if isinstance(facts, dict) else {}
    error = from_dict({"code": status.get("code"), "message": str(status.get("message"))[:1000], "facts": scalars})
    return error if isinstance(error, ImageError | BadRequest) else CorruptImage(f"the parser failed: {error.message}")


# --- the child's side ---------------------------------------------------------------------------------------------


def main() -> int:
    """The parser process. Its arguments are the module path and the order; see ``_run``."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # It is our daemon that is to stop, and which decides what becomes of us.
    order = json.loads(sys.argv[2])
    _limit(order)
    status = json.dumps(_report(order)).encode()
    memfd.write_all(order["status"], status + b"\n")
    return 0


def _limit(order: dict[str, int]) -> None:
    def at_most(what: int, amount: int) -> None:
        hard = resource.getrlimit(what)[1]
        amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(what, (amount, amount))

    at_most(resource.RLIMIT_CORE, 0)
    at_most(resource.RLIMIT_NOFILE, MAX_DESCRIPTORS)
    at_most(resource.RLIMIT_NPROC, 0)  # no further process or thread; root is exempt, but the daemon does not run as root
    at_most(resource.RLIMIT_FSIZE, order["output_bytes"])
    hard_cpu = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft_cpu = order["cpu_s"] if hard_cpu == resource.RLIM_INFINITY else min(order["cpu_s"], hard_cpu)
    resource.setrlimit(resource.RLIMIT_CPU, (soft_cpu, hard_cpu))  # the soft limit tells by SIGXCPU, the hard one kills
    at_most(resource.RLIMIT_AS, order["memory_bytes"])


def _report(order: dict[str, int]) -> dict[str, object]:
    """Parse as ordered and write the result; what the daemon is told."""
    size_bytes = order["size_bytes"]
    try:
        from bridged.images import formats  # late: after the limits, and never in the daemon

        data = _read_at(order["in"], size_bytes)
        image = formats.parse(data, str(order["type"]), order["base"], order["unpacked_bytes"])
        memfd.write_all(order["out"], image.encode())
        return {"ok": True}
    except BridgedError as error:
        return {"code": error.code, "message": error.message, "facts": error.facts}
    except (MemoryError, RecursionError):
        pass  # Answered below: here the traceback still holds the memory.
    except Exception as error:  # a defect of a parser on hostile bytes: the file is refused, with what is known
        return {"code": CorruptImage.code, "message": f"the parser failed: {type(error).__name__}: {str(error)[:300]}"}
    message = f"parsing {size_bytes} bytes needs more than {order['memory_bytes'] >> 20} MiB of memory"
    return {"code": ImageTooLarge.code, "message": message, "facts": {"size_bytes": size_bytes}}


def _read_at(fd: int, size_bytes: int) -> bytes:
    """``size_bytes`` from the start, by position: the offset of an inherited descriptor is shared with the daemon."""
    chunks: list[bytes] = []
    at = 0
    while at < size_bytes:
        chunk = os.pread(fd, min(1 << 20, size_bytes - at), at)
        if not chunk:
            raise CorruptImage(f"offset {at:#x}: the file ends here, {size_bytes} bytes were expected", offset=at)
        chunks.append(chunk)
        at += len(chunk)
    return b"".join(chunks)
