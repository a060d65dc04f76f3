"""The store: quotas that hold, a disk that fails, contents, and what is collected."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import threading
import time
from pathlib import Path

import pytest

from bridged.errors import (
    CorruptImage,
    DigestMismatch,
    StorageFailed,
    StorageFull,
    TooMany,
    UnknownImage,
)
from bridged.images import parts, store
from bridged.images.model import Image
from bridged.images.parts import SYNC_BYTES
from bridged.images.staged import READING, StagedImage
from bridged.images.store import Store
from tests.images.builders import elf, hex_text
from tests.images.store_bench import BASE, DATA, MIB, Clock, InProcess, failing, files, opened, put, sha

# --- limits ----------------------------------------------------------------------------------------------------------


def test_quota_counts_what_was_announced(tmp_path: Path) -> None:
    here = opened(tmp_path, limit=1000, image_limit=900)
    put(here, b"a" * 300)
    upload = here.open_upload("anna", 600, "0" * 64)
    with pytest.raises(StorageFull, match="101 more bytes do not fit: images and uploads have 900 of 1000") as caught:
        here.open_upload("bert", 101, "1" * 64)
    assert caught.value.facts == {"used_bytes": 900, "limit_bytes": 1000}
    assert caught.value.retryable
    upload.write(b"x")
    upload.abandon()
    with pytest.raises(StorageFull):
        here.open_upload("bert", 101, "1" * 64)
    here.open_upload("anna", 700, "0" * 64).abandon()  # the same upload, announced anew, counts once
    put(here, b"b" * 700)
    assert here.usage_bytes == 1000


def test_a_failed_upload_gives_its_room_back(tmp_path: Path) -> None:
    here = opened(tmp_path, limit=1000, image_limit=1000)
    upload = here.open_upload("anna", 1000, "0" * 64)
    upload.write(b"x" * 1000)
    with pytest.raises(DigestMismatch):
        upload.finish()
    put(here, b"b" * 1000)


def test_numbers_are_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_IMAGES", 3)
    monkeypatch.setattr(parts, "MAX_PARTS", 2)
    monkeypatch.setattr(store, "MAX_NAMES", 2)
    here = opened(tmp_path)
    first, second = (here.open_upload("anna", 1, str(i) * 64) for i in range(2))
    with pytest.raises(TooMany, match="2 unfinished uploads"):
        here.open_upload("bert", 1, "2" * 64)
    first.abandon()
    second.abandon()
    for i in range(3):
        put(here, bytes([i]), f"n{i}")
    with pytest.raises(StorageFull, match="3 staged images"):
        here.open_upload("anna", 1, "2" * 64)
    with pytest.raises(UnknownImage):
        here.get("n0")  # the oldest name gave way, its image is still there
    assert here.get(sha(b"\0")).name == "n0"


def pause(here: Store, number: int, size: int, principal: str = "anna") -> None:
    """A few first bytes of a file, and then nothing more."""
    upload = here.open_upload(principal, size, f"{number:064x}")
    upload.write(b"x")
    upload.abandon()


def test_one_principal_leaves_room_for_the_uploads_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MAX_PARTS_EACH", 2)
    here = opened(tmp_path)
    pause(here, 1, 10)
    pause(here, 2, 10)
    with pytest.raises(TooMany, match="2 unfinished uploads of anna"):
        pause(here, 3, 10)
    pause(here, 3, 10, "bert")
    pause(here, 2, 10)  # one of hers that goes on is no new one


def test_first_bytes_alone_cannot_take_the_whole_store(tmp_path: Path) -> None:
    """Half of the space is for files that are whole; and what was paused for long gives way to what is sent now."""
    clock = Clock()
    clock.at = time.time()  # parts get their times from the system
    here = opened(tmp_path, limit=1000, image_limit=200, now=clock)
    pause(here, 1, 200)
    os.utime(tmp_path / "uploads" / "anna" / f"{1:064x}.part", (clock.at - 60, clock.at - 60))
    pause(here, 2, 200)
    with pytest.raises(StorageFull, match="unfinished uploads have 400 of 500 bytes"):
        pause(here, 3, 200, "bert")
    clock.at += parts.GIVE_WAY_S - 30  # the first is old enough by now, the second is not
    pause(here, 3, 200, "bert")
    assert [here.have(f"{n:064x}")[0] for n in (1, 2, 3)] == [0, 1, 1]
    assert put(here, b"b" * 100).size_bytes == 100


def test_the_ways_in_which_a_file_was_read_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_CONTENTS", 3)
    here = opened(tmp_path)
    staged = put(here, b"raw bytes")
    for n in range(5):
        here.load(here.get(staged.sha256), BASE + n * 256)
    assert list(here.get(staged.sha256).contents) == [f"auto@{BASE + n * 256:#010x}/{READING}" for n in (2, 3, 4)]
    assert opened(tmp_path).get(staged.sha256).contents == here.get(staged.sha256).contents


def test_what_an_older_parser_made_of_a_file_is_not_its_content_any_more(tmp_path: Path) -> None:
    here = opened(tmp_path)
    staged, older = put(here, b"raw bytes"), Image.of([(BASE, b"not what the file says now")])
    side = tmp_path / "images" / f"{staged.sha256}.json"
    way = f"auto@{BASE:#010x}"
    side.write_text(json.dumps({**json.loads(side.read_text()), "contents": {way: older.digest, f"{way}/1": older.digest}}))
    (tmp_path / "images" / f"{staged.sha256}.{older.digest}.img").write_bytes(older.encode())
    here = opened(tmp_path)
    assert here.get(staged.sha256).content(BASE) is None
    assert not here.at_hand(staged, BASE)
    assert here.load(staged, BASE) == Image.of([(BASE, b"raw bytes")])
    # A proof that names the older content still keeps the file.
    assert here.collect({older.digest}, 8 * MIB) == ()


def test_disk_full_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = opened(tmp_path)
    upload = here.open_upload("anna", len(DATA), sha(DATA))
    upload.write(DATA[:300_000])
    with monkeypatch.context() as broken:
        failing(broken, "write", errno.ENOSPC)
        with pytest.raises(StorageFull, match="the disk is full"):
            upload.write(DATA[300_000:])
        with pytest.raises(StorageFailed, match="failed before"):
            upload.write(DATA[300_000:])
        upload.abandon()
    offset, size, complete = here.have(sha(DATA))
    assert (offset, size, complete) == (SYNC_BYTES, len(DATA), False)
    assert put(here, DATA, offset=offset).path.read_bytes() == DATA


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_sync_is_never_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """After a failed fdatasync the next one may succeed although the data is lost: the offset stays where it was."""
    here = opened(tmp_path)
    upload = here.open_upload("anna", len(DATA), sha(DATA))
    with monkeypatch.context() as broken:
        failing(broken, "fdatasync", code, after=1)
        with pytest.raises(StorageFull if code == errno.ENOSPC else StorageFailed):
            upload.write(DATA)
    upload.abandon()
    assert here.have(sha(DATA))[0] == SYNC_BYTES
    assert put(here, DATA, offset=SYNC_BYTES).path.read_bytes() == DATA


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "ftruncate", "open"])
def test_disk_errors_are_ours_and_leave_a_store_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    for after in range(12):
        root = tmp_path / str(after)
        here = opened(root)
        with monkeypatch.context() as broken, contextlib.suppress(StorageFailed):
            failing(broken, call, errno.EROFS, after)
            put(here, DATA, "app")
        offset, _, complete = here.have(sha(DATA))
        put(here, DATA, "app", offset=offset if not complete else 0)
        assert opened(root).get("app").path.read_bytes() == DATA


def test_the_file_system_has_less_than_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = opened(tmp_path)
    real = os.statvfs(tmp_path)
    nearly_full = os.statvfs_result((*real[:4], 1, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: nearly_full)
    with pytest.raises(StorageFull, match=f"the disk has {here.free_bytes} left"):
        here.open_upload("anna", 2 * MIB, "0" * 64)
    assert files(tmp_path) == set()


# --- content ---------------------------------------------------------------------------------------------------------


def test_load_through_the_real_parser_process(tmp_path: Path) -> None:
    here = Store(tmp_path, 8 * MIB, 4 * MIB)
    expected = Image.of([(BASE, DATA[:5000])])
    assert here.load(put(here, hex_text([(BASE, DATA[:5000])]).encode())) == expected
    assert here.load(put(here, DATA[:5000]), BASE) == expected
    with pytest.raises(CorruptImage, match="line 1"):
        here.load(put(here, b":10000000"))


def test_content_is_parsed_once_for_each_address(tmp_path: Path) -> None:
    parse = InProcess()
    here = opened(tmp_path, parse=parse)
    staged = put(here, DATA)
    assert not here.at_hand(staged, BASE)
    first = here.load(staged, BASE)
    assert (here.at_hand(staged, BASE), here.at_hand(staged, BASE + 0x1000)) == (True, False)
    assert here.load(staged, BASE) == first
    assert parse.calls == 1
    assert here.load(staged, BASE + 0x1000).start == BASE + 0x1000
    assert parse.calls == 2
    assert here.load(staged, BASE, "bin") == first
    again = opened(tmp_path, parse=parse)
    assert again.load(again.get(staged.sha256), BASE) == first
    assert parse.calls == 3
    known = again.get(staged.sha256)
    assert known.content(BASE) == known.content(BASE, "bin") == first.digest
    assert known.content(None) is None
    assert again.load(known, BASE, "bin").digest == first.digest


def test_the_type_that_was_said_at_the_upload_holds(tmp_path: Path) -> None:
    here = opened(tmp_path)
    data = elf([(BASE, b"code")])
    as_said = put(here, data, hint="bin")
    assert here.load(as_said, 0x20000000).read(0x20000000, 4) == b"\x7fELF"
    assert here.load(as_said, type_hint="elf") == Image.of([(BASE, b"code")])


def test_a_damaged_cache_is_no_cache(tmp_path: Path) -> None:
    parse = InProcess()
    here = opened(tmp_path, parse=parse)
    staged = put(here, DATA)
    image = here.load(staged, BASE)
    (cached,) = (tmp_path / "images").glob("*.img")
    cached.rename(aside := tmp_path / "aside")
    assert not here.at_hand(staged, BASE), "it was parsed once, and would be again"
    aside.rename(cached)
    for damage in (b"", image.encode()[:-1], image.encode()[:-1] + b"!"):
        cached.write_bytes(damage)
        assert here.load(staged, BASE) == image
    assert parse.calls == 4
    cached.unlink()
    assert here.load(staged, BASE) == image
    assert here.load(staged, BASE) == image
    assert parse.calls == 5


def test_a_file_that_the_disk_changed_is_not_flashed_and_can_be_sent_again(tmp_path: Path) -> None:
    here = opened(tmp_path)
    staged = put(here, DATA, "app")
    staged.path.write_bytes(DATA[:-1] + b"!")
    with pytest.raises(DigestMismatch, match="the disk changed it"):
        here.load(staged, BASE)
    assert here.have(sha(DATA)) == (0, None, False)
    with pytest.raises(UnknownImage):
        here.load(staged, BASE)
    assert here.load(put(here, DATA, "app"), BASE).read(BASE, len(DATA)) == DATA


def test_cached_content_gives_way(tmp_path: Path) -> None:
    here = opened(tmp_path, limit=1000, image_limit=1000)
    staged = put(here, b"a" * 400)
    here.load(staged, BASE)
    assert here.usage_bytes > 800
    put(here, b"b" * 600)
    assert here.usage_bytes == 1000
    assert here.load(staged, BASE).read(BASE, 2) == b"aa"
    assert here.usage_bytes == 1000, "no room, no cache"


def test_load_works_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = opened(tmp_path)
    staged = put(here, DATA)
    failing(monkeypatch, "fsync", errno.ENOSPC)
    assert here.load(staged, BASE).read(BASE, len(DATA)) == DATA


# --- collecting ------------------------------------------------------------------------------------------------------


def test_collect_removes_the_longest_unused_but_nothing_that_is_needed(tmp_path: Path) -> None:
    clock = Clock()
    here = opened(tmp_path, limit=1000, image_limit=1000, now=clock)
    staged: list[StagedImage] = []
    for i in range(5):
        staged.append(put(here, bytes([i]) * 180, f"n{i}"))
        clock.at += 10
    content = here.load(staged[1], BASE).digest  # also the last used one now
    clock.at += 10
    assert here.collect(set(), room_bytes=500) == (), "all of them are new"
    clock.at += store.GRACE_S
    upload = here.open_upload("bert", 180, staged[2].sha256)  # in use
    assert here.collect({staged[0].sha256}, room_bytes=280) == (staged[3].sha256,)
    assert here.collect({staged[0].sha256}, room_bytes=280) == ()
    assert here.collect({staged[0].sha256, content}, room_bytes=1000) == (staged[4].sha256,)
    upload.abandon()
    assert here.collect({staged[0].sha256, content}, room_bytes=1000) == (staged[2].sha256,)
    left = {staged[0].sha256, staged[1].sha256}
    assert {s.sha256 for s in here.images()} == left == {s.sha256 for s in opened(tmp_path).images()}
    with pytest.raises(UnknownImage):
        here.get("n3")
    assert set(json.loads((tmp_path / "names.json").read_text())) == {"n0", "n1", ""}
    assert here.collect({staged[0].sha256}, room_bytes=1000) == (staged[1].sha256,)
    assert not list((tmp_path / "images").glob("*.img"))


def test_an_old_image_that_a_job_is_about_to_need_stays(tmp_path: Path) -> None:
    """Also where what is pinned was asked for a moment before there was such a job."""
    clock = Clock()
    here = opened(tmp_path, limit=1000, image_limit=1000, now=clock)
    old, other = (put(here, bytes([i]) * 180, f"n{i}") for i in range(2))
    clock.at += store.GRACE_S
    assert here.use("n0") == old
    assert here.collect(set(), room_bytes=1000) == (other.sha256,)
    clock.at += store.GRACE_S
    assert here.collect(set(), room_bytes=1000) == (old.sha256,)
    with pytest.raises(UnknownImage):
        here.use("n0")


def test_collect_makes_a_quarter_free_by_default(tmp_path: Path) -> None:
    clock = Clock()
    here = opened(tmp_path, limit=1000, image_limit=1000, now=clock)
    for i in range(10):
        put(here, bytes([i]) * 100)
        clock.at += 1
    clock.at += store.GRACE_S
    assert here.collect(set()) == tuple(sha(bytes([i]) * 100) for i in range(3))


def test_stale_uploads_are_given_up(tmp_path: Path) -> None:
    clock = Clock()
    here = opened(tmp_path, now=clock)
    old, active = here.open_upload("anna", 100, "0" * 64), here.open_upload("anna", 100, "1" * 64)
    old.write(b"abc")
    old.abandon()
    active.write(b"abc")
    age = (tmp_path / "uploads" / "anna" / f"{'0' * 64}.part").stat().st_mtime
    clock.at = age + parts.STALE_S - 10
    here.collect(set())
    assert here.have("0" * 64) == (3, 100, False)
    clock.at = age + parts.STALE_S + 3600
    here.collect(set())
    assert here.have("0" * 64) == (0, None, False)
    active.abandon()
    assert here.have("1" * 64) == (3, 100, False)
    assert opened(tmp_path, now=clock).have("1" * 64) == (0, None, False)
    assert files(tmp_path) == set()


def test_many_threads(tmp_path: Path) -> None:
    """Uploads, loads and collections at once: nothing breaks, the quota holds, every image is whole."""
    here = opened(tmp_path, limit=3 * MIB, image_limit=MIB)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        rng = random.Random(number)
        for _ in range(15):
            data = bytes([rng.randrange(8)]) * 200_000
            try:
                here.load(put(here, data, f"n{number}", principal=str(number % 3)), BASE)
                here.collect(set(), room_bytes=MIB)
                assert here.usage_bytes <= 3 * MIB
            except (TooMany, UnknownImage):
                pass  # two threads with the same bytes
            except BaseException as error:
                failures.append(error)
                raise

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert here.images()
    for staged in here.images():
        assert sha(staged.path.read_bytes()) == staged.sha256
