"""What is remembered and what is written: the ring, lines with times, rotation, a full disk, the lease as plain data."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridged.console import history
from bridged.console.history import History, Log, Stamper
from bridged.errors import TargetBusy
from bridged.target.lease import LOCK_LIMIT_S, Leases

AT = 1_700_000_000.25  # 2023-11-14T22:13:20.250Z


@given(st.integers(0, 50), st.lists(st.binary(max_size=30), max_size=20), st.integers(0, 60))
def test_the_ring_is_the_end_of_all_that_was_said(limit: int, pieces: list[bytes], count: int) -> None:
    ring = History(limit)
    for piece in pieces:
        ring.add(piece)
        assert len(ring._data) <= 2 * limit + 30
    everything = b"".join(pieces)
    wanted = min(limit, count)
    assert ring.tail(count) == (everything[-wanted:] if wanted else b"")


def test_lines_have_the_time_of_their_first_byte_and_no_control_character() -> None:
    stamper = Stamper()
    assert stamper.feed(b"boot", AT) == ""
    assert stamper.feed(b"ing\r\nok \x1b[2J\\ \xff\t\n", AT + 1) == (
        "2023-11-14T22:13:20.250Z booting\n2023-11-14T22:13:21.250Z ok \\x1b[2J\\\\ \\xff\t\n"
    )
    assert stamper.feed(b"50 %\r60 %\rlast", AT) == ""
    assert stamper.rest() == "2023-11-14T22:13:20.250Z 50 %\\x0d60 %\\x0dlast\n"
    assert stamper.rest() == ""


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=6))
def test_a_line_of_the_log_is_a_line_whatever_the_target_says(data: bytes, cuts: list[int]) -> None:
    stamper, text, at = Stamper(), "", 0
    for cut in [*sorted(cuts), len(data)]:
        text += stamper.feed(data[at:cut], AT)
        at = max(at, cut)
    text += stamper.rest()
    assert text.count("\n") == data.count(b"\n") + bool(data.rpartition(b"\n")[2])
    for line in text.splitlines():
        assert line.startswith("2023-11-14T22:13:20.250Z ")
        assert all(32 <= ord(c) < 127 or c == "\t" for c in line)


def test_an_endless_line_is_cut() -> None:
    stamper = Stamper()
    text = "".join(stamper.feed(b"x" * 1000, AT) for _ in range(10))
    assert len(stamper._line) < history.LINE_BYTES
    assert max(map(len, text.splitlines())) <= history.LINE_BYTES + 1025


def test_files_are_rotated_and_their_number_is_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        log = Log(tmp_path / "m.log", 1000, 2, utc=lambda: AT)
        for number in range(12):
            log.feed(b"%02d " % number + b"x" * 270 + b"\n")
            await log._flush()
        log.note("a word of ours")
        log.feed(b"unfinished")
        await log.close()

    asyncio.run(main())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.log", "m.log.1", "m.log.2"]
    text = "".join((tmp_path / name).read_text() for name in ("m.log.2", "m.log.1", "m.log"))
    numbers = [int(line[25:27]) for line in text.splitlines() if line[25:27].isdigit()]
    assert numbers == list(range(numbers[0], 12)), "the end of it, without a gap"
    assert text.splitlines()[-2:] == ["2023-11-14T22:13:20.250Z --- a word of ours", "2023-11-14T22:13:20.250Z unfinished"]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    assert (tmp_path / "m.log").stat().st_mode & 0o777 == 0o640


def test_a_disk_that_takes_nothing_is_no_trouble_for_anybody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(history, "PENDING_BYTES", 1000)

    async def main() -> Log:
        log = Log(tmp_path / "missing" / "m.log", 1000, 2, name="m", utc=lambda: AT)
        for _ in range(3):
            log.feed(b"x" * 100 + b"\n")
            await log._flush()
        assert log.dropped == 3 * 126
        for _ in range(40):
            log.feed(b"y" * 100 + b"\n")
        assert log._size <= 1000 + 126, "one piece is written whole"
        (tmp_path / "missing").mkdir()
        await log.close()
        return log

    asyncio.run(main())
    assert caplog.text.count("cannot be written") == 1, "said once"
    text = (tmp_path / "missing" / "m.log").read_text()
    assert "bytes were lost here" in text
    assert "is written again" in caplog.text


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine\n")
    (tmp_path / "m.log").symlink_to(tmp_path / "victim")

    async def main() -> None:
        log = Log(tmp_path / "m.log", 1000, 2)
        log.feed(b"x\n")
        await log.close()

    asyncio.run(main())
    assert (tmp_path / "victim").read_text() == "mine\n"


# --- the lease ----------------------------------------------------------------------------------------------------


class Clock:
    now = 100.0


def leases() -> tuple[Leases, Clock]:
    clock = Clock()
    return Leases(lambda: clock.now, lambda: clock.now, writer_idle_s=10.0), clock


def held(found: Leases) -> str:
    return f"{found.holder.kind} {found.holder.holder}" if found.holder else ""


def test_a_job_comes_first_and_what_it_interrupted_comes_back() -> None:
    found, clock = leases()
    found.write("c1", "ann")
    assert held(found) == "console c1"
    found.take_lock("ann", 60.0, "")
    assert held(found) == "lock ann"
    found.begin_job("j1")
    assert held(found) == "job j1"
    clock.now += 50
    found.end_job()
    assert held(found) == "lock ann"
    assert found.writer is not None, "a job of 50 s is not the writer's silence"
    clock.now += 11
    assert held(found) == "", "the lock ran out, and the writer was silent for longer than 10 s"


def test_who_may_take_over() -> None:
    found, _ = leases()
    found.write("c1", "ann")
    with pytest.raises(TargetBusy, match="c1 writes on its console"):
        found.write("c2", "bob")
    with pytest.raises(TargetBusy):
        found.write("c2", "bob", take=True)
    with pytest.raises(TargetBusy):
        found.write("c3", "ann")
    found.write("c3", "ann", take=True)
    assert held(found) == "console c3"
    found.write("c2", "bob", take=True, right=True)
    assert held(found) == "console c2"
    found.take_lock("ann", 60.0, "soldering")
    assert found.writer is None, "the writing of others ends with a lock"
    with pytest.raises(TargetBusy, match="ann has locked it \\(soldering\\), for 60 s more") as refused:
        found.write("c2", "bob", take=True, right=True)
    assert refused.value.facts["kind"] == "lock"
    with pytest.raises(TargetBusy):
        found.take_lock("bob", 60.0, "")
    assert (found.keeps_from("bob"), found.keeps_from("ann")) == (True, False)
    found.take_lock("bob", 60.0, "", right=True)
    assert (found.keeps_from("bob"), found.keeps_from("ann")) == (False, True)
    with pytest.raises(TargetBusy):
        found.drop_lock("ann")
    assert found.drop_lock("bob")
    assert not found.drop_lock("bob")


def test_no_lock_is_for_ever() -> None:
    found, clock = leases()
    found.take_lock("ann", 1e9, "")
    clock.now += LOCK_LIMIT_S
    assert found.lock is None
