"""A power cut at every single step of a store's life: whole, proven files or nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridged.errors import (
    UnknownImage,
)
from bridged.images.model import Image
from bridged.images.parts import SYNC_BYTES
from bridged.images.store import Store
from bridged.jobs.traces import Traces
from tests.images.store_bench import BASE, DATA, failing, files, opened, put, sha

# --- at every step ---------------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    """The machine is gone. A BaseException, so that no handler of ours mistakes it for a failing disk."""


class Machine:
    """Cuts the power at call number ``at`` of everything that changes the disk; from then on nothing changes it any more.

    ``lose_unsynced`` then does what file systems do: data that was not synced becomes zeros, while the length stays.
    """

    CALLS = ("write", "fsync", "fdatasync", "rename", "replace", "unlink", "rmdir", "ftruncate", "mkdir", "utime")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.left = at
        self.synced: dict[int, int] = {}
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._cutting(name, getattr(os, name)))

    def _cutting(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if self.left <= 0:
                raise PowerCut
            self.left -= 1
            result = real(*args, **more)
            if name in {"fsync", "fdatasync"}:
                found = os.fstat(args[0])
                self.synced[found.st_ino] = found.st_size
            return result

        return call

    def lose_unsynced(self, root: Path) -> None:
        for path in root.rglob("*"):
            found = path.stat()
            safe = self.synced.get(found.st_ino, 0)
            if path.is_file() and found.st_size > safe:
                path.write_bytes(path.read_bytes()[:safe] + bytes(found.st_size - safe))


def life(root: Path, reported: list[int]) -> None:
    """One day of a store: a paused and resumed upload, a name, a parsed content, a second image, a trace."""
    here = opened(root)
    upload = here.open_upload("anna", len(DATA), sha(DATA), 0, "app")
    for at in range(0, 450_000, 150_000):
        upload.write(DATA[at : at + 150_000])
        reported.append(here.have(sha(DATA))[0])
    upload.abandon()
    reported.append(here.have(sha(DATA))[0])
    put(here, DATA, "app", offset=450_000)
    here.load(here.get("app"), BASE)
    put(here, DATA[:1000], "app")
    Traces(root / "traces", 20).save("job-1", "> 7F\n")


def steps_of_a_life(tmp_path: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch, 1 << 30)
        life(tmp_path / "whole", [])
        return (1 << 30) - machine.left


def test_power_cut_at_every_step(tmp_path: Path) -> None:
    steps = steps_of_a_life(tmp_path)
    assert steps > 60
    for at in range(steps):
        for lossy in (False, True):
            root = tmp_path / f"{at}-{lossy}"
            reported = [0]
            with pytest.MonkeyPatch.context() as patch:
                machine = Machine(patch, at)
                with pytest.raises(PowerCut):
                    life(root, reported)
            if lossy:
                machine.lose_unsynced(root)
            check_after_the_cut(root, reported[-1])


def check_after_the_cut(root: Path, reported: int) -> None:
    here = opened(root)
    found = files(root)
    assert not [f for f in found if f.endswith(".tmp")]
    for staged in here.images():
        assert sha(staged.path.read_bytes()) == staged.sha256, "a file that has its final name is whole"
    offset, size, complete = here.have(sha(DATA))
    if not complete:
        assert size in {None, len(DATA)}
        assert offset >= reported, "what was reported was on disk"
        if offset:
            part = root / "uploads" / "anna" / f"{sha(DATA)}.part"
            assert part.read_bytes()[:offset] == DATA[:offset], "what is reported is on disk, and right"
    # And life goes on: the upload resumes, the content is right, the trace is whole or was never promised.
    staged = put(here, DATA, "app", offset=offset if not complete else 0)
    assert here.load(staged, BASE) == Image.of([(BASE, DATA)])
    assert opened(root).get("app").path.read_bytes() == DATA
    trace = Traces(root / "traces", 20).file("job-1")
    assert trace is None or trace.read_text() == "> 7F\n"


def test_leftovers_of_a_crash_are_cleaned(tmp_path: Path) -> None:
    here = opened(tmp_path)
    staged = put(here, DATA, "app")
    before = files(tmp_path)
    orphan = "f" * 64
    leftovers = [
        "names.json.tmp",
        f"images/{orphan}.json",
        f"images/{orphan}.json.tmp",
        f"images/{orphan}.{'e' * 64}.img",
        f"images/{staged.sha256}.{'e' * 64}.img.tmp",
        f"uploads/anna/{orphan}.json",
        "uploads/bert/rubbish.part",
        f"uploads/bert/{orphan}.part",
    ]
    for name in leftovers:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    again = opened(tmp_path)
    assert files(tmp_path) == before
    assert again.get("app") == staged


@pytest.mark.parametrize("rubbish", [b"", b"{", b"[]", b'{"contents": 7, "type": 7, "name": 7}', b"\xff\xfe", b"null"])
def test_damaged_sidecars_cost_the_name_and_not_the_image(tmp_path: Path, rubbish: bytes) -> None:
    here = opened(tmp_path)
    staged = put(here, DATA, "app")
    upload = here.open_upload("anna", 100, "0" * 64)
    upload.write(b"abc")
    upload.abandon()
    for path in tmp_path.rglob("*.json"):
        path.write_bytes(rubbish)
    again = opened(tmp_path)
    assert again.load(again.get(staged.sha256), BASE).read(BASE, len(DATA)) == DATA
    assert again.have("0" * 64) == (0, None, False)


# --- what tests/e2e/test_power_loss.py found -------------------------------------------------------------------------


def test_an_offset_that_was_told_at_a_multiple_is_told_again_after_a_power_cut(tmp_path: Path) -> None:
    """The length alone proves one step less, so the client was told 262144 and then nothing."""
    here = opened(tmp_path)
    upload = here.open_upload("anna", len(DATA), sha(DATA))
    upload.write(DATA[:SYNC_BYTES])
    assert here.have(sha(DATA))[0] == SYNC_BYTES
    again = opened(tmp_path)  # as if the first had died
    assert again.have(sha(DATA)) == (SYNC_BYTES, len(DATA), False)
    assert put(again, DATA, offset=SYNC_BYTES).path.read_bytes() == DATA


def test_an_offset_that_cannot_be_noted_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = opened(tmp_path)
    upload = here.open_upload("anna", len(DATA), sha(DATA))
    upload.write(DATA[:SYNC_BYTES])
    with monkeypatch.context() as broken:
        failing(broken, "fsync", errno.ENOSPC)
        assert here.have(sha(DATA)) == (0, len(DATA), False)
    assert here.have(sha(DATA)) == (SYNC_BYTES, len(DATA), False)


def test_directories_are_synced_before_anything_is_told_of_what_is_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New ones at the first start, and at every start those in which a killed process may have renamed without a sync."""
    synced: set[str] = set()
    real = os.fsync

    def watch(fd: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", watch)
    here = opened(tmp_path)
    assert {str(here.root), str(here.root / "images"), str(here.root / "uploads")} <= synced
    upload = here.open_upload("anna", len(DATA), sha(DATA))
    upload.write(DATA[:1000])
    upload.abandon()
    synced.clear()
    opened(tmp_path)
    assert {str(here.root), str(here.root / "images"), str(here.root / "uploads" / "anna")} <= synced


@pytest.mark.parametrize("known", [False, True])
def test_a_name_is_not_lost_between_the_image_and_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """After a kill between the two ``have`` said complete, and a job by that name got the image that had it before."""
    here = opened(tmp_path)
    if known:
        put(here, DATA, name="app.bin")
    put(here, b"older", name="app.bin")
    with monkeypatch.context() as broken:
        broken.setattr(Store, "_write_names", lambda *_: None)  # what a kill before it leaves
        put(here, DATA, name="app.bin")
    for _ in range(2):
        again = opened(tmp_path)
        assert again.have(sha(DATA))[2]
        assert again.get("app.bin").sha256 == sha(DATA)
        assert again.get(sha(b"older")).name == "app.bin"
    put(again, b"older", name="app.bin")
    assert opened(tmp_path).get("app.bin").sha256 == sha(b"older")
    put(again, b"older", name="other.bin")  # It keeps its first name too.
    assert opened(tmp_path).get("app.bin").sha256 == sha(b"older")


def test_a_name_does_not_go_back_to_an_older_image(tmp_path: Path) -> None:
    """Not when the image that had it last was cleaned away, not even after a restart."""
    here = opened(tmp_path)
    put(here, b"older", name="app.bin")
    newer = put(here, DATA, name="app.bin")
    put(here, b"third", name="third.bin")
    here._remove(newer)
    for one in (here, opened(tmp_path)):
        with pytest.raises(UnknownImage):
            one.get("app.bin")
