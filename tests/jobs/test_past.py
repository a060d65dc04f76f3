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
