"""The store: whole, proven files or nothing; quotas that hold; and a power cut at every single step."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridged.errors import (
    BadRequest,
    BridgedError,
    CorruptImage,
    DigestMismatch,
    EmptyImage,
    ImageTooLarge,
    StorageFailed,
    StorageFull,
    TooMany,
    UnknownImage,
)
from bridged.images import formats, parts, store
from bridged.images.model import Image
from bridged.images.parts import SYNC_BYTES
from bridged.images.staged import StagedImage, plain_name
from bridged.images.store import Store
from tests.images.builders import elf, hex_text

MIB = 1 << 20
BASE = 0x08000000
DATA = random.Random(1).randbytes(600 * 1024)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Clock:
    """Time as a value. It starts at the real time, because files get their times from the system."""

    def __init__(self) -> None:
        self.at = 1_800_000_000.0

    def __call__(self) -> float:
        return self.at


class InProcess:
    """The parser without its process; counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, fd: int, size_bytes: int, type_hint: str = "auto", base_address: int | None = None, /) -> Image:
        self.calls += 1
        return formats.parse(os.pread(fd, size_bytes, 0), type_hint, base_address)


def opened(root: Path, limit: int = 8 * MIB, image_limit: int = 4 * MIB, **more: Any) -> Store:
    return Store(root, limit, image_limit, **({"parse": InProcess()} | more))


def put(
    into: Store, data: bytes, name: str = "", principal: str = "anna", offset: int = 0, step: int = 70_000, hint: str = "auto"
) -> StagedImage:
    upload = into.open_upload(principal, len(data), sha(data), offset, name, hint)
    for at in range(offset, len(data), step):
        upload.write(data[at : at + step])
    return upload.finish()


def files(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


# --- upload -------------------------------------------------------------------------------------------------------


def test_upload_and_get(tmp_path: Path) -> None:
    here = opened(tmp_path)
    staged = put(here, DATA, "app.bin")
    assert staged.path.read_bytes() == DATA
    assert (staged.sha256, staged.name, staged.size_bytes, staged.type_hint) == (sha(DATA), "app.bin", len(DATA), "auto")
    for ref in (sha(DATA), sha(DATA).upper(), "sha256:" + sha(DATA), sha(DATA)[:8], "sha256:" + sha(DATA)[:20], "app.bin"):
        assert here.get(ref) == staged
    assert here.have(sha(DATA)) == (len(DATA), len(DATA), True)
    assert here.usage_bytes == len(DATA)
    assert files(tmp_path) == {f"images/{sha(DATA)}", f"images/{sha(DATA)}.json", "names.json"}
    assert opened(tmp_path).get("app.bin") == staged


@pytest.mark.parametrize("ref", ["", "app", "deadbeef", sha(DATA)[:7], "sha256:", "../images", "0" * 64])
def test_unknown_references(tmp_path: Path, ref: str) -> None:
    here = opened(tmp_path)
    put(here, DATA, "app.bin")
    with pytest.raises(UnknownImage):
        here.get(ref)


def test_ambiguous_prefix(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir(parents=True)
    for last in "12":
        (tmp_path / "images" / ("ab" * 31 + "c" + last)).write_bytes(b"x")
    with pytest.raises(UnknownImage, match="2 staged images start with"):
        opened(tmp_path).get("abababab")


@pytest.mark.parametrize("digits", [64, 12])
def test_no_name_passes_for_the_digits_of_another_image(tmp_path: Path, digits: int) -> None:
    """Who names a digest means that very file, whatever somebody has called his own."""
    here = opened(tmp_path)
    name = sha(DATA)[:digits]
    put(here, b"evil", name)
    put(here, b"evil too", f"sha256:{name}")
    if digits == 64:  # It is not here yet, or not any more.
        for ref in (name, name.upper(), f"sha256:{name}", f"SHA256:{name}"):
            with pytest.raises(UnknownImage):
                here.get(ref)
    put(here, DATA, "app.bin")
    assert {here.get(ref).sha256 for ref in (name, f"sha256:{name}")} == {sha(DATA)}


def test_the_last_name_wins_and_survives(tmp_path: Path) -> None:
    here = opened(tmp_path)
    first, second = put(here, b"first", "app"), put(here, b"second", "app")
    assert here.get("app") == second
    assert put(here, b"first", "app").sha256 == first.sha256  # sent again: the name moves back
    assert opened(tmp_path).get("app").sha256 == first.sha256
    assert opened(tmp_path).get(second.sha256).name == "app"


@pytest.mark.parametrize(
    ("size", "digest", "name", "hint", "error"),
    [
        (0, "0" * 64, "", "auto", EmptyImage),
        (-1, "0" * 64, "", "auto", EmptyImage),
        (4 * MIB + 1, "0" * 64, "", "auto", ImageTooLarge),
        (10, "0" * 63, "", "auto", BadRequest),
        (10, "../" + "0" * 61, "", "auto", BadRequest),
        (10, "0" * 64, "a\nb", "auto", BadRequest),
        (10, "0" * 64, "a" * 129, "auto", BadRequest),
        (10, "0" * 64, "", "exe", BadRequest),
    ],
)
def test_announcements_that_are_refused(
    tmp_path: Path, size: int, digest: str, name: str, hint: str, error: type[BridgedError]
) -> None:
    here = opened(tmp_path)
    with pytest.raises(error):
        here.open_upload("anna", size, digest, 0, name, hint)
    assert files(tmp_path) == set()


def test_wrong_digest_leaves_nothing(tmp_path: Path) -> None:
    here = opened(tmp_path)
    upload = here.open_upload("anna", 4, sha(b"good"))
    upload.write(b"evil")
    with pytest.raises(DigestMismatch):
        upload.finish()
    assert files(tmp_path) == set()
    assert here.have(sha(b"good")) == (0, None, False)
    assert put(here, b"good").path.read_bytes() == b"good"


def test_what_counts_is_what_is_on_disk(tmp_path: Path) -> None:
    here = opened(tmp_path)
    upload = here.open_upload("anna", len(DATA), sha(DATA))
    upload.write(DATA)
    part = tmp_path / "uploads" / "anna" / f"{sha(DATA)}.part"
    with part.open("r+b") as file:
        file.seek(300_000)
        file.write(b"flip")
    with pytest.raises(DigestMismatch):
        upload.finish()


def test_too_many_and_too_few_bytes(tmp_path: Path) -> None:
    here = opened(tmp_path)
    upload = here.open_upload("anna", 4, sha(b"good"))
    upload.write(b"go")
    with pytest.raises(BadRequest, match="more came"):
        upload.write(b"od!")
    with pytest.raises(BadRequest, match="ends at 2 of 4"):
        upload.finish()
    with pytest.raises(BadRequest, match="ended before"):
        upload.write(b"od")
    assert here.have(sha(b"good")) == (2, 4, False)
    assert put(here, b"good", offset=2).sha256 == sha(b"good")


def test_resume_from_the_reported_offset_only(tmp_path: Path) -> None:
    here = opened(tmp_path)
    upload = here.open_upload("anna", len(DATA), sha(DATA))
    upload.write(DATA[:400_000])
    assert upload.offset == 400_000
    assert here.have(sha(DATA)) == (SYNC_BYTES, len(DATA), False), "not synced bytes are not reported"
    upload.abandon()
    upload.abandon()
    assert here.have(sha(DATA)) == (400_000, len(DATA), False)
    for offset in (1, 399_999, 400_001, len(DATA), len(DATA) + 1, -1):
        with pytest.raises(BadRequest, match="goes on at offset 400000") as caught:
            here.open_upload("anna", len(DATA), sha(DATA), offset)
        assert caught.value.facts["offset"] == 400_000
    with pytest.raises(BadRequest, match="offset 400000 of 614400"):
        here.open_upload("anna", len(DATA) + 1, sha(DATA), 400_000)
    assert put(here, DATA, offset=400_000).path.read_bytes() == DATA


def test_offset_without_an_upload(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="goes on at offset 0"):
        opened(tmp_path).open_upload("anna", 10, "0" * 64, 5)


def test_offset_0_starts_afresh(tmp_path: Path) -> None:
    here = opened(tmp_path)
    upload = here.open_upload("anna", len(DATA), sha(DATA))
    upload.write(b"\0" * 500_000)
    upload.abandon()
    assert put(here, DATA).path.read_bytes() == DATA


def test_an_orderly_pause_survives_a_restart_to_the_byte(tmp_path: Path) -> None:
    upload = opened(tmp_path).open_upload("anna", len(DATA), sha(DATA))
    upload.write(DATA[:400_001])
    upload.abandon()
    again = opened(tmp_path)
    assert again.have(sha(DATA)) == (400_001, len(DATA), False)
    assert put(again, DATA, offset=400_001).path.read_bytes() == DATA


def test_two_connections_send_the_same_image(tmp_path: Path) -> None:
    here = opened(tmp_path)
    first = here.open_upload("anna", len(DATA), sha(DATA))
    first.write(DATA[:10])
    with pytest.raises(TooMany, match="by another connection"):
        here.open_upload("anna", len(DATA), sha(DATA))
    # Somebody else has an upload of his own, and who is second finds the image in place.
    assert put(here, DATA, "his", principal="bert").name == "his"
    first.write(DATA[10:])
    staged = first.finish()
    assert staged == here.get(sha(DATA))
    assert not list((tmp_path / "uploads").rglob("*.part"))
    assert here.usage_bytes == len(DATA)


def test_an_image_that_is_here_is_compared_and_not_stored(tmp_path: Path) -> None:
    here = opened(tmp_path)
    staged = put(here, DATA, "one", hint="bin")
    again = here.open_upload("bert", len(DATA), sha(DATA), 0, "two")
    assert again.known
    again.write(DATA[:1000])
    again.write(DATA[1000:])
    found = again.finish()
    assert (found.path, found.name, found.type_hint) == (staged.path, "two", "bin")
    assert here.get("one").sha256 == here.get("two").sha256
    for offset in (len(DATA), 1234):
        assert put(here, DATA, offset=offset).sha256 == staged.sha256
    wrong = here.open_upload("bert", len(DATA), sha(DATA), 5)
    wrong.write(b"\0" * (len(DATA) - 5))
    with pytest.raises(DigestMismatch):
        wrong.finish()
    with pytest.raises(BadRequest, match="is complete with"):
        here.open_upload("bert", len(DATA) + 1, sha(DATA))
    assert here.get("one").path.read_bytes() == DATA
    assert here.usage_bytes == len(DATA)


@pytest.mark.parametrize("principal", ["../../etc", "", ".", "..", "a/b", "x" * 300, "uid=0 \n", "Ünïcode", "hash-1", "a.json"])
def test_strange_principals_stay_inside(tmp_path: Path, principal: str) -> None:
    here = opened(tmp_path / "state")
    upload = here.open_upload(principal, 100, "0" * 64)
    upload.write(b"abc")
    upload.abandon()
    inside = files(tmp_path)
    assert inside == {f"state/uploads/{plain_name(principal)}/{'0' * 64}.{end}" for end in ("part", "json")}
    assert here.have("0" * 64, principal) == (3, 100, False)
    assert here.have("0" * 64, principal + "x") == (0, None, False)
    assert opened(tmp_path / "state").have("0" * 64, principal) == (3, 100, False)


def test_plain_names_stay_readable_and_apart() -> None:
    assert plain_name("job-17.A_b") == "job-17.A_b"
    names = ["a", "A", "a/b", "a_b", "", ".", "..", plain_name("a/b"), "a" * 65, "a" * 66]
    assert len({plain_name(n) for n in names}) == len(names)


def test_sync_is_never_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single huge write still syncs at every multiple, and the reported offset follows the syncs."""
    here = opened(tmp_path)
    seen: list[tuple[int, int]] = []
    real = os.fdatasync

    def watch(fd: int) -> None:
        seen.append((here.have(sha(DATA))[0], os.fstat(fd).st_size))
        real(fd)

    monkeypatch.setattr(os, "fdatasync", watch)
    upload = here.open_upload("anna", len(DATA), sha(DATA))
    upload.write(DATA)
    assert seen == [(0, SYNC_BYTES), (SYNC_BYTES, 2 * SYNC_BYTES)]
    assert here.have(sha(DATA))[0] == 2 * SYNC_BYTES
    upload.finish()


# --- limits -------------------------------------------------------------------------------------------------------


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
    assert list(here.get(staged.sha256).contents) == [f"auto@{BASE + n * 256:#010x}" for n in (2, 3, 4)]
    assert opened(tmp_path).get(staged.sha256).contents == here.get(staged.sha256).contents


def failing(monkeypatch: pytest.MonkeyPatch, name: str, code: int, after: int = 0) -> None:
    """``os.<name>`` fails with ``code`` from the call number ``after`` on."""
    real: Callable[..., Any] = getattr(os, name)
    calls = 0

    def fail(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(code, os.strerror(code))
        return real(*args, **more)

    monkeypatch.setattr(os, name, fail)


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


# --- content ------------------------------------------------------------------------------------------------------


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
    first = here.load(staged, BASE)
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


# --- collecting ---------------------------------------------------------------------------------------------------


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


# --- power cuts ---------------------------------------------------------------------------------------------------


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
    here.save_trace("job-1", "> 7F\n")


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
    assert here.load_trace("job-1") in {None, "> 7F\n"}


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
        "traces/job-1.txt.tmp",
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


# --- traces -------------------------------------------------------------------------------------------------------


def test_a_trace_that_cannot_be_kept_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = opened(tmp_path)
    failing(monkeypatch, "fsync", errno.ENOSPC)
    with pytest.raises(StorageFull):
        here.save_trace("job-1", "> 7F\n")
    assert files(tmp_path) == set()


def test_only_the_last_traces_are_kept(tmp_path: Path) -> None:
    here = opened(tmp_path, traces=3)
    for i in range(6):
        path = here.save_trace(f"job-{i}", f"> {i:02X}\n")
        assert path is not None
        os.utime(path, ns=(i, i))
    assert [here.load_trace(f"job-{i}") for i in range(6)] == [None, None, None, "> 03\n", "> 04\n", "> 05\n"]
    here.save_trace("job-3", "again")
    assert here.load_trace("job-3") == "again"
    assert len(files(tmp_path)) == 3
    assert opened(tmp_path / "none", traces=0).save_trace("job-1", "x") is None


# --- power cuts: what tests/e2e/test_power_loss.py found ----------------------------------------------------------


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


# --- uploads that are announced before their first byte


def test_an_announced_upload_is_kept_before_its_first_byte_also_across_a_restart(tmp_path: Path) -> None:
    data = DATA
    sha256 = sha(data)
    store = opened(tmp_path)
    assert store.announce("a", len(data), sha256, "app.bin", "bin")
    for _ in range(2):
        found = store.pending("a", sha256)
        assert found is not None
        assert (found.offset, found.size_bytes, found.name, found.type_hint) == (0, len(data), "app.bin", "bin")
        assert store.pending("b", sha256) is None
        store = opened(tmp_path)
    # What was said when it was announced holds for the pieces, which say nothing.
    upload = store.open_upload("a", len(data), sha256, 0)
    upload.write(data)
    staged = upload.finish()
    assert (staged.name, staged.type_hint) == ("app.bin", "bin")
    assert store.pending("a", sha256) is None
    assert store.announce("a", len(data), sha256) is False


def test_an_announced_upload_takes_its_room_and_gives_it_back(tmp_path: Path) -> None:
    store = opened(tmp_path)
    data = DATA[:1000]
    assert store.announce("a", len(data), sha(data))
    assert store._promised_bytes() == 1000
    assert store.discard("a", sha(data))
    assert store._promised_bytes() == 0
    assert not list((tmp_path / "uploads").rglob("*.part"))
    assert store.discard("a", sha(data)) is False


def test_what_was_taken_back_is_gone_and_the_upload_goes_on_where_it_was(tmp_path: Path) -> None:
    data = DATA
    sha256 = sha(data)
    store = opened(tmp_path)
    store.announce("a", len(data), sha256)
    first = store.open_upload("a", len(data), sha256, 0)
    first.write(data[:1000])
    first.abandon()
    wrong = store.open_upload("a", len(data), sha256, 1000)
    wrong.write(bytes(SYNC_BYTES + 77))
    wrong.take_back()
    for _ in range(2):
        assert store.have(sha256, "a") == (1000, len(data), False)
        store = opened(tmp_path)
    rest = store.open_upload("a", len(data), sha256, 1000)
    rest.write(data[1000:])
    assert rest.finish().sha256 == sha256


def test_nobody_discards_what_is_coming_in(tmp_path: Path) -> None:
    data = DATA[:1000]
    store = opened(tmp_path)
    upload = store.open_upload("a", len(data), sha(data), 0)
    with pytest.raises(TooMany):
        store.discard("a", sha(data))
    upload.write(data)
    assert upload.finish().sha256 == sha(data)
