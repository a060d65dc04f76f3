"""What a disk may hold after a power cut, worked out from a recording of a daemon's system calls.

``recorded`` reads what ``strace`` wrote; ``Disk`` takes the calls one after the other and keeps for each file and directory
what is surely on the medium, what the page cache has, and the operations in between. ``Disk.crash`` gives one tree of files
that a power cut may leave at this moment:

- ``ALL``: everything that was done is there, as after a SIGKILL.
- ``SYNCED``: nothing is there but what a sync covers that had returned: bytes of a file by fsync or fdatasync of that file,
  names in a directory by fsync of that directory. This is less than any journaling file system leaves.
- ``SOME``: of what no sync covers, any blocks of the writes, any prefix of the changes of each directory; a file may have
  become longer without the bytes that made it so, which then read as zeros.

Rules: changes of one directory reach the medium in order; a rename between directories never loses the file (the old name goes
only when the new one is there), but may leave both names; a sync covers what had returned before it began. A call is one step
at the moment of its return. The mapped ``-shm`` file of SQLite is left out: it is made anew from the log at every first open.

The model is checked by its own end: ``ALL`` after the last call must be what is really in the directory.
"""

from __future__ import annotations

import enum
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

BLOCK_BYTES = 512  # what a medium writes whole
CALLS = (
    "openat,open,creat,write,writev,pwrite64,pwritev,pwritev2,truncate,ftruncate,fallocate,lseek,rename,renameat,renameat2,"
    "unlink,unlinkat,rmdir,link,linkat,symlink,symlinkat,mkdir,mkdirat,fsync,fdatasync,sync_file_range,close,dup,dup2,dup3,"
    "sendto,sendmsg,copy_file_range,sendfile,splice,mmap,clone,clone3,fork,vfork"
)
_CHANGING = frozenset({"write", "pwrite64", "writev", "ftruncate", "rename", "unlink", "mkdir", "rmdir"})
_NOT_STORAGE = "-shm"
_HEX = r"(?:\\x[0-9a-f]{2})*"
_FD = rf"(\d+|AT_FDCWD)<({_HEX})>"
_STRING = rf'"({_HEX})"'
_LINE = re.compile(r"(\d+) +(.*)")
_RESUMED = re.compile(r"<\.\.\. (\w+) resumed>(.*)")
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+|\?)(.*)", re.DOTALL)


def command(log: Path) -> list[str]:
    """What to put before the command of the daemon. The recorder is a grandchild, so that the daemon keeps its place."""
    return [
        "strace",
        "-D",
        "-f",
        "--seccomp-bpf",
        "-xx",
        "-y",
        "-s",
        "4000000",
        "-e",
        "signal=SIGKILL",
        "-e",
        f"trace={CALLS}",
        "-o",
        str(log),
    ]


def whole(log: Path) -> bool:
    """Whether the recorder has written its last line."""
    try:
        return log.read_bytes()[-200:].rstrip().endswith(b"+++") and _all_ended(log)
    except OSError:
        return False


def _all_ended(log: Path) -> bool:
    seen, ended = set(), set()
    for raw in log.read_text().splitlines():
        pid, _, text = raw.partition(" ")
        seen.add(pid)
        if text.lstrip().startswith("+++"):
            ended.add(pid)
    return seen == ended


@dataclass(frozen=True, slots=True)
class Call:
    """One system call: lines of the recording on which it began and returned. ``result`` None: the process died in it.

    ``daemon``: it is one of the first process, whose descriptors the numbers are, and not of a child.
    """

    pid: int
    name: str
    arguments: str
    result: int | None
    result_path: str
    began: int
    ended: int
    daemon: bool = True

    def fd(self) -> tuple[int, str]:
        """Its first argument: number and path of a descriptor."""
        found = re.match(_FD, self.arguments)
        if found is None or found[1] == "AT_FDCWD":
            return -1, ""
        return int(found[1]), _text(found[2])

    def data(self) -> bytes:
        found = re.search(rf", {_STRING}", self.arguments)
        return _bytes(found[1]) if found else b""

    def numbers(self) -> list[int]:
        """Numbers after the last string or descriptor."""
        tail = re.split(r'[">]', self.arguments)[-1]
        return [int(word, 0) for word in re.findall(r"-?\b(?:0x[0-9a-f]+|\d+)\b", tail)]

    def paths(self) -> list[str]:
        """Absolute paths among the arguments of a call on names."""
        found = []
        for base, name in re.findall(rf"(?:(?:\d+|AT_FDCWD)<({_HEX})>, )?{_STRING}", self.arguments):
            found.append(os.path.normpath(os.path.join(_text(base) or "/", _text(name))))
        return found


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _text(text: str) -> str:
    return os.fsdecode(_bytes(text))


def recorded(log: Path) -> list[Call]:
    """The calls of a recording in the order of their return."""
    begun: dict[int, tuple[int, str]] = {}
    calls: list[Call] = []
    for number, raw in enumerate(log.read_text().splitlines()):
        matched = _LINE.match(raw)
        assert matched is not None, raw[:200]
        pid, text = int(matched[1]), matched[2]
        if text.endswith("<unfinished ...>"):
            begun[pid] = (number, text.removesuffix("<unfinished ...>"))
            continue
        began = number
        if resumed := _RESUMED.match(text):
            began, head = begun.pop(pid)
            text = head + resumed[2]
        if text.startswith("+++") and pid in begun:
            began, text = begun.pop(pid)
            text += ") = ?"
        found = _CALL.match(text)
        if found is None:
            assert text.startswith(("+++", "---")), text[:200]
            continue
        result = None if found[3] == "?" else int(found[3])
        path = re.match(rf"<({_HEX})>", found[4])
        calls.append(Call(pid, found[1], found[2], result, _text(path[1]) if path else "", began, number))
    children = _children(calls)
    return [replace(call, daemon=call.pid not in children) for call in calls]


def _children(calls: list[Call]) -> set[int]:
    """Processes and their threads, but for the first process and its threads."""
    made = [(c.pid, c.result, "CLONE_THREAD" in c.arguments) for c in calls if "clone" in c.name or "fork" in c.name]
    found = {child for _, child, thread in made if child and not thread}
    for _ in made:
        found |= {child for parent, child, _ in made if child and parent in found}
    return found


class Loss(enum.Enum):
    ALL = "all"
    SYNCED = "synced"
    SOME = "some"


@dataclass(slots=True)
class _Write:
    ended: int
    offset: int
    data: bytes | None  # None: a truncation to ``offset``


@dataclass(eq=False, slots=True)
class _File:
    cached: bytearray = field(default_factory=bytearray)
    synced: bytearray = field(default_factory=bytearray)
    pending: list[_Write] = field(default_factory=list)

    def do(self, write: _Write) -> None:
        _apply(self.cached, write)
        self.pending.append(write)

    def sync(self, before: int) -> None:
        while self.pending and self.pending[0].ended < before:
            _apply(self.synced, self.pending.pop(0))

    def crash(self, loss: Loss, rng: random.Random) -> bytes:
        if loss is Loss.ALL:
            return bytes(self.cached)
        content = bytearray(self.synced)
        if loss is Loss.SOME:
            share = rng.choice((0.1, 0.5, 0.9))
            for write in self.pending:
                if write.data is None:
                    if rng.random() < share:
                        _apply(content, write)
                    continue
                for start, end in _blocks(write.offset, write.offset + len(write.data)):
                    if rng.random() < share:
                        _put(content, start, write.data[start - write.offset : end - write.offset])
                    elif end > len(content) and rng.random() < share / 2:
                        content.extend(bytes(end - len(content)))
        return bytes(content)


def _blocks(start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end:
        stop = min(end, (start // BLOCK_BYTES + 1) * BLOCK_BYTES)
        yield start, stop
        start = stop


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _apply(content: bytearray, write: _Write) -> None:
    if write.data is not None:
        _put(content, write.offset, write.data)
    elif write.offset <= len(content):
        del content[write.offset :]
    else:
        content.extend(bytes(write.offset - len(content)))


@dataclass(eq=False, slots=True)
class _Naming:
    """One change of a directory. ``first``: the change of another directory that is on the medium before this one."""

    ended: int
    names: dict[str, _File | _Directory | None]
    first: tuple[_Directory, _Naming] | None = None


@dataclass(eq=False, slots=True)
class _Directory:
    cached: dict[str, _File | _Directory] = field(default_factory=dict)
    synced: dict[str, _File | _Directory] = field(default_factory=dict)
    pending: list[_Naming] = field(default_factory=list)

    def do(self, naming: _Naming) -> None:
        _name(self.cached, naming)
        self.pending.append(naming)

    def sync(self, before: int) -> None:
        while self.pending and self.pending[0].ended < before:
            self.settle(self.pending[0])

    def settle(self, last: _Naming) -> None:
        """Put all changes up to ``last`` on the medium."""
        while last in self.pending:
            naming = self.pending.pop(0)
            if naming.first is not None:
                naming.first[0].settle(naming.first[1])
            _name(self.synced, naming)


def _name(names: dict[str, _File | _Directory], naming: _Naming) -> None:
    for name, node in naming.names.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


@dataclass(slots=True)
class _Open:
    file: _File
    path: str
    position: int
    append: bool


@dataclass(frozen=True, slots=True)
class Tree:
    """Files by path relative to the root, and the directories."""

    files: dict[str, bytes]
    directories: frozenset[str]

    def write(self, root: Path) -> None:
        root.mkdir(parents=True)
        for name in sorted(self.directories):
            (root / name).mkdir()
        for name, data in self.files.items():
            (root / name).write_bytes(data)


def tree_of(root: Path) -> Tree:
    """What is really there."""
    found = [path for path in root.rglob("*") if not path.name.endswith(_NOT_STORAGE)]
    files = {str(path.relative_to(root)): path.read_bytes() for path in found if path.is_file()}
    return Tree(files, frozenset(str(path.relative_to(root)) for path in found if path.is_dir()))


class Disk:
    """The directory ``root``, which is there and empty at first, through the calls of one or more recordings."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._top = _Directory()
        self._open: dict[int, _Open] = {}
        self._base = 0  # Lines of the recordings before this one, so that numbers only grow.

    def next_recording(self, lines: int) -> None:
        """Another process goes on: nothing is open in it."""
        self._base += lines
        self._open.clear()

    def do(self, call: Call) -> bool:
        """Whether the call did something to this directory."""
        if not call.daemon:
            assert call.name not in _CHANGING or not self._concerns(call), f"a child changed a file: {call.name}"
            return False
        act = getattr(self, f"_do_{call.name}", None)
        if call.result is None or call.result < 0 or act is None:
            assert call.result is not None or act is None or not self._concerns(call), f"the daemon died within {call.name}"
            return False
        return bool(act(call))

    def crash(self, loss: Loss, rng: random.Random) -> Tree:
        files: dict[str, bytes] = {}
        directories: list[str] = []
        kept = self._kept(rng) if loss is Loss.SOME else {}

        def walk(directory: _Directory, prefix: str) -> None:
            names = dict(directory.cached if loss is Loss.ALL else directory.synced)
            for naming in kept.get(directory, ()):
                _name(names, naming)
            for name, node in names.items():
                if isinstance(node, _Directory):
                    directories.append(prefix + name)
                    walk(node, f"{prefix}{name}/")
                else:
                    files[prefix + name] = node.crash(loss, rng)

        walk(self._top, "")
        return Tree(files, frozenset(directories))

    def _kept(self, rng: random.Random) -> dict[_Directory, list[_Naming]]:
        """Of each directory the changes that made it to the medium without a sync."""
        every = [self._top, *self._directories(self._top)]
        count = {directory: rng.randint(0, len(directory.pending)) for directory in every}
        for _ in every:  # As often as a chain of renames could be long.
            for directory in every:
                for naming in directory.pending[: count[directory]]:
                    if naming.first is not None and naming.first[1] in naming.first[0].pending:
                        other, needed = naming.first
                        count[other] = max(count.get(other, 0), other.pending.index(needed) + 1)
        return {directory: directory.pending[:number] for directory, number in count.items()}

    def _directories(self, top: _Directory) -> Iterator[_Directory]:
        """Below ``top``: those that are there, were there or may be there."""
        nodes = [*top.cached.values(), *top.synced.values(), *(n for change in top.pending for n in change.names.values())]
        for node in dict.fromkeys(node for node in nodes if isinstance(node, _Directory)):
            yield node
            yield from self._directories(node)

    # --- finding things -------------------------------------------------------------------------------------------

    def _parts(self, path: str) -> tuple[str, ...] | None:
        """``path`` below the root; None where it is elsewhere, or not storage."""
        if path.endswith((_NOT_STORAGE, "(deleted)")) or not path:
            return None
        pure = PurePosixPath(path)
        return pure.relative_to(self._root).parts if pure.is_relative_to(self._root) else None

    def _concerns(self, call: Call) -> bool:
        return any(self._parts(path) is not None for path in [*call.paths(), call.fd()[1]])

    def _directory(self, parts: tuple[str, ...]) -> _Directory:
        at = self._top
        for name in parts:
            node = at.cached[name]
            assert isinstance(node, _Directory)
            at = node
        return at

    def _opened(self, call: Call) -> _Open | None:
        number, path = call.fd()
        inside = path.removesuffix("(deleted)").startswith(f"{self._root}/") and not path.endswith(_NOT_STORAGE)
        return self._open.get(number) if inside else None

    # --- calls: those that the store and SQLite make; any other that could change a file is refused ---------------------

    def _do_openat(self, call: Call) -> bool:
        assert call.result is not None
        parts = self._parts(call.result_path)
        if parts is None:
            return False
        self._open.pop(call.result, None)
        if not parts or "O_DIRECTORY" in call.arguments:
            return False
        assert not re.search(r"O_D?SYNC|O_DIRECT\b|O_TMPFILE", call.arguments), "not in the model"
        parent = self._directory(parts[:-1])
        file = parent.cached.get(parts[-1])
        changed = False
        if file is None:
            if "O_CREAT" not in call.arguments:
                return False
            file = _File()
            parent.do(_Naming(self._base + call.ended, {parts[-1]: file}))
            changed = True
        if not isinstance(file, _File):
            return False  # a directory, opened to be synced
        if "O_TRUNC" in call.arguments and file.cached:
            file.do(_Write(self._base + call.ended, 0, None))
            changed = True
        self._open[call.result] = _Open(file, call.result_path, 0, "O_APPEND" in call.arguments)
        return changed

    _do_open = _do_creat = _do_openat

    def _do_write(self, call: Call) -> bool:
        opened = self._opened(call)
        if opened is None or not call.result:
            return False
        at = len(opened.file.cached) if opened.append else opened.position
        opened.file.do(_Write(self._base + call.ended, at, call.data()[: call.result]))
        opened.position = at + call.result
        return True

    def _do_pwrite64(self, call: Call) -> bool:
        opened = self._opened(call)
        if opened is None or not call.result:
            return False
        opened.file.do(_Write(self._base + call.ended, call.numbers()[-1], call.data()[: call.result]))
        return True

    def _do_ftruncate(self, call: Call) -> bool:
        opened = self._opened(call)
        if opened is None:
            return False
        opened.file.do(_Write(self._base + call.ended, call.numbers()[-1], None))
        return True

    def _do_lseek(self, call: Call) -> bool:
        opened = self._opened(call)
        if opened is not None and call.result is not None:
            opened.position = call.result
        return False

    def _do_close(self, call: Call) -> bool:
        """Another thread may have got the same number before this return was seen: then it is another file."""
        number, path = call.fd()
        if number in self._open and self._open[number].path == path:
            del self._open[number]
        return False

    def _do_fsync(self, call: Call) -> bool:
        opened = self._opened(call)
        if opened is not None:
            opened.file.sync(self._base + call.began)
            return True
        parts = self._parts(call.fd()[1])
        if parts is None:
            return False
        self._directory(parts).sync(self._base + call.began)
        return True

    _do_fdatasync = _do_fsync

    def _do_mkdir(self, call: Call) -> bool:
        parts = self._parts(call.paths()[-1])
        if not parts:
            return False
        self._directory(parts[:-1]).do(_Naming(self._base + call.ended, {parts[-1]: _Directory()}))
        return True

    _do_mkdirat = _do_mkdir

    def _do_unlink(self, call: Call) -> bool:
        parts = self._parts(call.paths()[-1])
        if not parts:
            return False
        self._directory(parts[:-1]).do(_Naming(self._base + call.ended, {parts[-1]: None}))
        return True

    _do_unlinkat = _do_rmdir = _do_unlink

    def _do_rename(self, call: Call) -> bool:
        old, new = (self._parts(path) for path in call.paths())
        if not old or not new:
            assert old == new, "a rename across the border of the directory is not in the model"
            return False
        source, target = self._directory(old[:-1]), self._directory(new[:-1])
        node, ended = source.cached[old[-1]], self._base + call.ended
        if source is target:
            source.do(_Naming(ended, {old[-1]: None, new[-1]: node}))
        else:
            arrival = _Naming(ended, {new[-1]: node})
            target.do(arrival)
            source.do(_Naming(ended, {old[-1]: None}, (target, arrival)))
        return True

    _do_renameat = _do_renameat2 = _do_rename

    def _refuse(self, call: Call) -> bool:
        assert not self._concerns(call), f"{call.name} is not in the model: {call.arguments[:200]}"
        return False

    _do_writev = _do_pwritev = _do_pwritev2 = _do_truncate = _do_fallocate = _do_link = _do_linkat = _do_symlink = _refuse
    _do_symlinkat = _do_dup = _do_dup2 = _do_dup3 = _do_copy_file_range = _do_sendfile = _do_splice = _refuse

    def _do_mmap(self, call: Call) -> bool:
        """Only what is written through a mapping would escape."""
        found = re.search(rf", \d+<({_HEX})>", call.arguments)
        inside = found is not None and self._parts(_text(found[1])) is not None
        assert not (inside and "MAP_SHARED" in call.arguments and "PROT_WRITE" in call.arguments), "written through a mapping"
        return False


__all__ = ["CALLS", "Call", "Disk", "Loss", "Tree", "command", "recorded", "tree_of", "whole"]
