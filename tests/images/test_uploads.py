"""Uploads into the store: an offset that was told is on disk, and a file is staged whole and proven."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bridged.errors import (
    BadRequest,
    BridgedError,
    DigestMismatch,
    EmptyImage,
    ImageTooLarge,
    TooMany,
    UnknownImage,
)
from bridged.images.parts import SYNC_BYTES
from bridged.images.staged import plain_name
from tests.images.store_bench import DATA, MIB, files, opened, put, sha


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


# --- announced before their first byte -------------------------------------------------------------------------------


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
