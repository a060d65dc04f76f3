"""What a target has taught, and for how long it is believed."""

from __future__ import annotations

from bridged.events import SectorProven
from bridged.jobs.past import BAD_FOR_S, RATES, learned, past_of
from bridged.jobs.records import TargetRecord

NOW = 1_800_000_000.0


def test_a_rate_that_carried_a_session_is_good_and_one_that_failed_is_not_tried_for_a_week() -> None:
    record = learned(TargetRecord("a"), {"baud": 256000, "bad_bauds": [921600, 460800]}, NOW)
    past = past_of(record, (), NOW + 1)
    assert (past.good_bauds, past.bad_bauds) == ((256000,), (460800, 921600))
    later = past_of(record, (), NOW + BAD_FOR_S + 1)
    assert (later.good_bauds, later.bad_bauds) == ((256000,), ())


def test_a_rate_that_works_again_is_good_and_one_that_fails_later_is_bad() -> None:
    record = learned(TargetRecord("a"), {"baud": 115200, "bad_bauds": [460800]}, NOW)
    record = learned(record, {"baud": 460800, "bad_bauds": []}, NOW + 100)
    assert past_of(record, (), NOW + 101).good_bauds == (115200, 460800)
    record = learned(record, {"baud": 115200, "bad_bauds": [460800]}, NOW + 200)
    past = past_of(record, (), NOW + 201)
    assert (past.good_bauds, past.bad_bauds) == ((115200,), (460800,))


def test_a_rate_that_failed_and_was_all_that_was_left_is_not_good() -> None:
    record = learned(TargetRecord("a"), {"baud": 115200, "bad_bauds": []}, NOW)
    record = learned(record, {"baud": 115200, "bad_bauds": [115200]}, NOW + 100)
    past = past_of(record, (), NOW + 101)
    assert (past.good_bauds, past.bad_bauds) == ((), (115200,))


def test_it_does_not_grow() -> None:
    record = TargetRecord("a")
    for number in range(100):
        record = learned(record, {"baud": 1200 + number, "bad_bauds": [500000 + number]}, NOW + number)
    past = past_of(record, (), NOW + 100)
    assert len(past.good_bauds) + len(past.bad_bauds) == RATES
    assert len(record.rates) < 2000


def test_of_a_flash_that_nobody_proved_no_sector_is_known() -> None:
    sectors = [SectorProven(0x08000000, 16384, "ab" * 32)]
    assert past_of(TargetRecord("a", uid="12"), sectors, NOW).sectors == ()
    known = past_of(TargetRecord("a", uid="12", content="cd" * 32), sectors, NOW)
    assert (known.uid, known.sectors) == ("12", tuple(sectors))


def test_blank_sectors_are_believed_only_while_no_erase_was_left_undone() -> None:
    proven = TargetRecord("a", uid="12", content="cd" * 32)
    assert past_of(proven, (), NOW).settled
    assert past_of(TargetRecord("a"), (), NOW).settled, "a part that we never touched"
    assert not past_of(TargetRecord("a", uid="12"), (), NOW).settled
    assert not past_of(proven, (), NOW, in_doubt=True).settled, "it was another job, of other sectors, that was proven since"


GIVEN_UP = {"baud": 115200, "second_stage": "given up: SECOND_STAGE_FAILED: it did not greet", "second_stage_key": "build/a/12"}


def test_a_second_stage_that_fails_twice_in_a_row_is_no_longer_tried_for_a_week() -> None:
    record = TargetRecord("a")
    for number, enough in ((1, False), (2, True), (3, True)):
        record = learned(record, GIVEN_UP, NOW + number)
        tried = past_of(record, (), NOW + 100).second_stage
        assert (tried.key, tried.failures, tried.enough) == ("build/a/12", number, enough)
    assert tried.why == "SECOND_STAGE_FAILED: it did not greet"
    assert tried.age_s == 97
    assert not past_of(record, (), NOW + 3 + BAD_FOR_S).second_stage.enough
    # A session that did not try it, and one that never asked for it, say nothing about it.
    for result in ({**GIVEN_UP, "second_stage": "not used: it failed here"}, {"baud": 115200}):
        assert learned(record, result, NOW + 50).second_stage == record.second_stage


def test_what_is_remembered_of_the_second_stage_is_forgotten_with_what_it_depends_on() -> None:
    record = learned(learned(TargetRecord("a"), GIVEN_UP, NOW), GIVEN_UP, NOW + 1)
    worked = learned(record, {"baud": 115200, "second_stage": "used", "second_stage_key": "build/a/12"}, NOW + 2)
    assert worked.second_stage == ""
    other = learned(record, {**GIVEN_UP, "second_stage_key": "build/b/12"}, NOW + 2)
    assert past_of(other, (), NOW + 3).second_stage.failures == 1
