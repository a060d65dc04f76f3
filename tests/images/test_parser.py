"""The parser process: whatever happens in it, the caller gets an image or a typed error, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bridged.errors import BridgedError, CorruptImage, ImageAddressMissing, ImageTooLarge, OverlappingImage
from bridged.images import memfd, parser
from bridged.images.model import Image
from tests.firmware_npm import hubs
from tests.images.builders import END, elf, hex_text, record

BASE = 0x08000000
QUICK = parser.Limits(timeout_s=20.0, cpu_s=10)
# A hostile or broken program in the place of the parser. It gets the same arguments and descriptors.
ORDER = "import json, os, sys; order = json.loads(sys.argv[2])\n"
OURS = "sys.path[:] = json.loads(sys.argv[1])\nfrom bridged.images import parser, formats, memfd\n"


@contextmanager
def file_with(data: bytes) -> Iterator[int]:
    fd = memfd.create("test")
    try:
        memfd.write_all(fd, data)
        yield fd
    finally:
        os.close(fd)


def parsed(data: bytes, hint: str = "auto", base: int | None = None, limits: parser.Limits = QUICK) -> Image:
    with file_with(data) as fd:
        return parser.parse_file(fd, len(data), hint, base, limits=limits)


def check_refused(error: type[BridgedError], says: str, program: str, limits: parser.Limits = QUICK) -> None:
    """``program`` runs instead of the parser; afterwards no process and no descriptor is left."""
    before = sorted(os.listdir("/proc/self/fd"))
    with file_with(b"x" * 1000) as fd, pytest.raises(BridgedError) as caught:
        parser.parse_file(fd, 1000, "bin", BASE, limits=limits, boot=program)
    assert type(caught.value) is error, caught.value
    assert says in caught.value.message, caught.value.message
    assert sorted(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_each_format_through_the_process() -> None:
    data = os.urandom(5000)
    expected = Image.of([(BASE, data)])
    assert parsed(data, "bin", BASE) == expected
    assert parsed(hex_text([(BASE, data)]).encode()) == expected
    assert parsed(elf([(BASE, data)])) == expected


def test_errors_arrive_as_they_were_raised() -> None:
    with pytest.raises(ImageAddressMissing) as missing:
        parsed(b"1234567")
    assert missing.value.facts == {"size_bytes": 7}
    twice = "\n".join([record(0, 0, b"a"), record(0, 0, b"b"), END])
    with pytest.raises(OverlappingImage, match="line 2"):
        parsed(twice.encode())


def test_only_the_announced_bytes_are_read_and_the_offset_stays() -> None:
    with file_with(b"12345678") as fd:
        os.lseek(fd, 3, os.SEEK_SET)
        assert parser.parse_file(fd, 4, "bin", BASE, limits=QUICK).read(BASE, 8) == b"1234" + b"\xff" * 4
        assert os.lseek(fd, 0, os.SEEK_CUR) == 3
        with pytest.raises(CorruptImage, match="offset 0x8: the file ends here, 9 bytes were expected"):
            parser.parse_file(fd, 9, "bin", BASE, limits=QUICK)


def test_real_firmware_by_every_format() -> None:
    for hub in hubs():
        expected = Image.of([(hub.address, hub.data)])
        assert parsed(hub.data, "auto", hub.address).digest == expected.digest, hub.name
        assert parsed(elf([(hub.address, hub.data)])).digest == expected.digest, hub.name
    smallest = min(hubs(), key=lambda h: len(h.data))
    expected = Image.of([(smallest.address, smallest.data)])
    assert parsed(hex_text([(smallest.address, smallest.data)]).encode()).digest == expected.digest


def test_the_daemon_side_imports_no_format() -> None:
    """A fresh interpreter that parsed a file has none of the libraries that read foreign bytes."""
    program = (
        "import sys, os\nfrom bridged.images import parser, store, memfd, vectors\n"
        "fd = memfd.create('x'); memfd.write_all(fd, b':00000001FF')\n"
        "try: parser.parse_file(fd, 11)\nexcept Exception as error: print(type(error).__name__)\n"
        "print(sorted(m for m in ('bincopy', 'elftools', 'bridged.images.formats') if m in sys.modules))\n"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.split("\n")[:2] == ["EmptyImage", "[]"]


def test_works_from_any_directory_without_installation(tmp_path: Path) -> None:
    """The child finds the modules of its parent, and none that lie about in the current directory."""
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    root = Path(__file__).resolve().parents[2]
    program = (
        f"import sys, os; sys.path.insert(0, {str(root)!r})\nfrom bridged.images import parser, memfd\n"
        f"os.chdir({str(tmp_path)!r})\nfd = memfd.create('x'); memfd.write_all(fd, b'abc')\n"
        "print(parser.parse_file(fd, 3, 'bin', 0).size_bytes)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout == "3\n"


def test_crash() -> None:
    check_refused(CorruptImage, "crashed (SIGABRT)", "import os; os.abort()")
    check_refused(CorruptImage, "crashed (SIGSEGV)", "import os; os.kill(os.getpid(), 11)")


def test_killed() -> None:
    check_refused(ImageTooLarge, "was killed", "import os; os.kill(os.getpid(), 9)")


def test_ends_without_a_word() -> None:
    check_refused(CorruptImage, "status 0 and no result", "pass")
    check_refused(CorruptImage, "status 3 and no result", "raise SystemExit(3)")
    check_refused(CorruptImage, "no result", ORDER + "os.write(order['status'], b'{not json')")
    check_refused(CorruptImage, "no result", ORDER + "os.write(order['status'], b'[1]')")
    check_refused(CorruptImage, "no result", ORDER + "os.write(order['status'], b'{\"ok\": false}')")
    check_refused(CorruptImage, "no result", ORDER + "for _ in range(100): os.write(order['status'], b' ' * 65536)")


def test_a_lie_is_not_believed() -> None:
    ok = "os.write(order['status'], b'{\"ok\": true}')"
    check_refused(CorruptImage, "0 bytes", ORDER + ok)
    check_refused(CorruptImage, "wrong magic", ORDER + "os.write(order['out'], b'rubbish' * 9)\n" + ok)
    check_refused(ImageTooLarge, "at most", ORDER + "os.ftruncate(order['out'], 1 << 40)\n" + ok)
    wrong_error = '{"code": "TARGET_BROKEN", "message": "boo", "facts": {"x": [1]}}'
    check_refused(CorruptImage, "the parser failed: boo", ORDER + f"os.write(order['status'], b'{wrong_error}')")
    check_refused(CorruptImage, "the parser failed", ORDER + "os.write(order['status'], b'{\"code\": 7, \"facts\": 7}')")


def test_timeout() -> None:
    soon = parser.Limits(timeout_s=0.3)
    check_refused(ImageTooLarge, "longer than 0.3 s", "import signal\nwhile True: signal.pause()", soon)
    closes_first = ORDER + "import signal\nos.close(order['status'])\nwhile True: signal.pause()"
    check_refused(ImageTooLarge, "longer than 0.3 s", closes_first, soon)


def test_cpu_limit() -> None:
    loop = ORDER + OURS + "def forever(*_):\n  while True: pass\nformats.parse = forever\nsys.exit(parser.main())"
    check_refused(ImageTooLarge, "more than 1 s of CPU time", loop, parser.Limits(cpu_s=1, timeout_s=20))


def test_memory_bomb() -> None:
    bomb = ORDER + OURS + "formats.parse = lambda *_: bytearray(1 << 40)\nsys.exit(parser.main())"
    check_refused(ImageTooLarge, "needs more than 512 MiB of memory", bomb)
    slow = ORDER + OURS + "def grow(*_):\n  kept = []\n  while True: kept.append(bytes(1 << 20))\n"
    slow += "formats.parse = grow\nsys.exit(parser.main())"
    check_refused(ImageTooLarge, "of memory", slow, parser.Limits(memory_bytes=128 << 20, timeout_s=20))


def test_output_bomb() -> None:
    bomb = ORDER + OURS + "class Huge:\n  def encode(self): return bytes(8 << 20)\n"
    bomb += "formats.parse = lambda *_: Huge()\nsys.exit(parser.main())"
    check_refused(CorruptImage, "the parser failed: OSError: [Errno 27]", bomb)


def test_a_defect_of_a_parser_is_an_error_of_the_file() -> None:
    broken = ORDER + OURS + "def parse(*_): raise KeyError('p_type')\nformats.parse = parse\nsys.exit(parser.main())"
    check_refused(CorruptImage, "the parser failed: KeyError: 'p_type'", broken)
    # Without the argument list in the recursion: CPython 3.13.0 has no end of that.
    deep = ORDER + OURS + "def down(): return down()\nformats.parse = lambda *_: down()\nsys.exit(parser.main())"
    check_refused(ImageTooLarge, "of memory", deep)


def test_the_child_has_no_environment_and_no_other_descriptor() -> None:
    """It reports what it has: nothing of ours beyond the three descriptors that it needs."""
    program = ORDER + (
        "fds = set(os.listdir('/proc/self/fd')) - {'0', '1', '2'}\n"
        "fds = sorted(f for f in fds if os.path.exists('/proc/self/fd/' + f))\n"
        "needed = sorted(str(order[k]) for k in ('in', 'out', 'status'))\n"
        "names = sorted(set(os.environ) - {'LC_CTYPE'})\n"  # which Python sets itself
        "text = json.dumps({'code': 'IMAGE_CORRUPT', 'message': f'{fds == needed} {names}'})\n"
        "os.write(order['status'], text.encode())\n"
    )
    secret, other = os.pipe()
    os.set_inheritable(secret, True)
    try:
        check_refused(CorruptImage, "True []", program)
    finally:
        os.close(secret)
        os.close(other)
