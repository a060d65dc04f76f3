"""The ledger: at most one job from one message, for as long as anybody can repeat it; and bounded."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridged.errors import FleetCommand, FleetStale, JournalError, StorageFull
from bridged.fleet import wire
from bridged.fleet.ledger import Ledger
from bridged.fleet.wire import Artifact, Cancel, Command

ONE = Command("gw1", "r1", "m1", artifact=Artifact("ab" * 32, 5, "x.bin", "bin"), options={"addr": "0x08000000"}, expires=9.5)


def end(ledger: Ledger, state: str = "succeeded") -> None:
    (entry,) = ledger.waiting()
    ledger.note(ledger.submitted(entry, "job"), replace(entry.report, state=state))


def told(ledger: Ledger) -> None:
    for number, dirty, _ in ledger.untold():
        ledger.told(number, dirty)


def test_what_was_taken_survives_and_is_not_taken_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "fleet.db", "gw1")
    assert ledger.take(ONE, 100.0)
    ledger.close()
    ledger = Ledger(tmp_path / "fleet.db", "gw1")
    assert not ledger.take(ONE, 100.0)
    (entry,) = ledger.waiting()
    assert (entry.command, entry.report.state) == (ONE, "accepted")
    end(ledger)
    assert ledger.waiting() == ledger.running() == []
    assert not ledger.take(replace(ONE, round=3), 101.0), "it was not taken back"
    assert [found.state for _, _, found in ledger.untold()] == ["succeeded"], "the last state, not all of them"
    ledger.close()


def test_a_report_that_changed_while_it_was_told_is_told_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "fleet.db", "gw1")
    ledger.take(ONE, 100.0)
    ((number, dirty, _),) = ledger.untold()
    end(ledger)
    ledger.told(number, dirty)
    assert [found.state for _, _, found in ledger.untold()] == ["succeeded"]
    told(ledger)
    assert ledger.untold() == []
    ledger.close()


def test_a_late_word_about_an_earlier_report_is_not_taken_for_the_last(tmp_path: Path) -> None:
    """A link that ended, and the next one, may both say of one version that it was told."""
    ledger = Ledger(tmp_path / "fleet.db", "gw1")
    ledger.take(ONE, 100.0)
    ((number, dirty, _),) = ledger.untold()
    ledger.told(number, dirty)
    assert ledger.untold() == []
    end(ledger)
    ledger.told(number, dirty)
    assert [found.state for _, _, found in ledger.untold()] == ["succeeded"]
    told(ledger)
    assert ledger.untold() == []
    ledger.close()


def test_a_job_that_has_ended_is_not_submitted_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "fleet.db", "gw1")
    ledger.take(ONE, 100.0)
    (entry,) = ledger.waiting()
    end(ledger)
    ledger.submitted(entry, "other")
    assert ledger.running() == ledger.waiting() == []
    ledger.close()


def test_what_was_forgotten_is_refused_and_never_carried_out_twice(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "fleet.db", "gw1", limit=2)
    for number in range(4):
        assert ledger.take(replace(ONE, rollout=f"r{number}"), 100.0 + number)
        end(ledger)
        told(ledger)
    for number in range(4):
        again = replace(ONE, rollout=f"r{number}")
        if number < 2:
            with pytest.raises(FleetStale):
                ledger.take(again, 100.0 + number)
        else:
            assert not ledger.take(again, 100.0 + number)
    ledger.take(replace(ONE, rollout="r8"), 110.0)
    ledger.take(replace(ONE, rollout="r9"), 111.0)
    with pytest.raises(StorageFull, match="have not ended"):
        ledger.take(replace(ONE, rollout="r10"), 112.0)
    ledger.close()


def test_a_cancellation_that_comes_before_its_command_takes_it_back_in_each_round(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "fleet.db", "gw1")
    for turn in (0, 1):
        assert ledger.take_back(Cancel("gw1", "r1", "m1", turn), 100.0 + turn) is None
        assert not ledger.take(replace(ONE, round=turn), 100.0 + turn)
        ((_, _, found),) = ledger.untold()
        assert (found.state, found.round) == ("canceled", turn)
        told(ledger)
    assert ledger.take(replace(ONE, round=2), 102.0), "told again after that"
    ledger.close()


def test_the_time_is_never_before_what_the_broker_has_shown(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "fleet.db", "gw1")
    ledger.take(ONE, 1.8e9)
    assert ledger.now(0.0) == 1.8e9
    assert ledger.now(1.9e9) == 1.9e9
    ledger.close()


def test_a_newer_file_is_left_as_it_is(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "fleet.db") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(JournalError, match="version 99"):
        Ledger(tmp_path / "fleet.db", "gw1")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["take", "again", "back", "end", "tell"]), st.integers(0, 7)), min_size=20, max_size=60)
)
def test_no_message_is_carried_out_twice(tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, int]]) -> None:
    """With room for three commands of eight, every message is repeated at will, by streams that are restored whole."""
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "fleet.db", "gw1", limit=3)
    stream: list[tuple[Command, float]] = []
    carried: list[str] = []
    clock = 100.0
    for what, number in actions:
        clock += 1
        if what == "take":
            stream.append((replace(ONE, rollout=f"r{number}", round=len(stream)), clock))
        if what == "end":
            for entry in ledger.waiting()[:1]:
                if entry.canceled:
                    ledger.note(entry, replace(entry.report, state="canceled"))
                else:
                    carried.append(entry.command.id)
                    ledger.note(ledger.submitted(entry, "job"), replace(entry.report, state="failed"))
        if what == "tell" or (what == "end" and number):
            told(ledger)
        if what == "back":
            with contextlib.suppress(StorageFull):
                ledger.take_back(Cancel("gw1", f"r{number}", "m1", len(stream)), clock)
        for command, at in stream if what == "again" else stream[-1:]:
            with contextlib.suppress(FleetStale, StorageFull):
                ledger.take(command, at)
    assert len(set(carried)) == len(carried)
    ledger.close()


@pytest.mark.parametrize(
    ("raw", "subject"),
    [
        (b"", ONE.subject),
        (b"[]", ONE.subject),
        (b'{"v":1}', ONE.subject),
        (b'{"v":2,"gateway":"gw1"}', ONE.subject),
        (b'{"v":true,"gateway":"gw1"}', ONE.subject),
        (ONE.encode(), "bridged.v1.gw1.cmd.job.r2.m1.0"),
        (ONE.encode().replace(b"gw1", b"gw2"), ONE.subject),
        (ONE.encode().replace(b'"size":5', b'"size":-5'), ONE.subject),
        (ONE.encode().replace(b'"round":0', b'"round":0.5'), ONE.subject),
        (ONE.encode().replace(b'"options":{', b'"options":[{').replace(b'},"expires"', b'}],"expires"'), ONE.subject),
        (ONE.encode().replace(b'"m1"', b'"m.1"'), ONE.subject),
        (b"[" * 30000, ONE.subject),
        (b" " * 40000, ONE.subject),
    ],
)
def test_what_is_no_command(raw: bytes, subject: str) -> None:
    with pytest.raises(FleetCommand):
        wire.received(raw, subject, "gw1")


def test_a_later_version_of_the_format_may_say_more() -> None:
    raw = ONE.encode().replace(b'{"v":1', b'{"new":{"x":1},"v":1')
    assert wire.received(raw, ONE.subject, "gw1") == ONE
