"""The table of states: terminal ones never change, every path can end, ``seq`` only grows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridged.errors import JobError
from bridged.jobs.model import TERMINAL, TRANSITIONS, Job, JobKind, JobState, advance, diagram, note

QUEUED = Job("j", JobKind.FLASH, "m1", JobState.QUEUED, 1, "", "", {}, "", 0.0)


def test_every_state_is_in_the_table() -> None:
    assert set(TRANSITIONS) == set(JobState)
    assert {state for state, targets in TRANSITIONS.items() if not targets} == TERMINAL


@given(st.lists(st.sampled_from(JobState), max_size=20))
def test_any_walk_keeps_terminal_states_and_seq(walk: list[JobState]) -> None:
    job = QUEUED
    for to in walk:
        before = job
        try:
            job = advance(job, to, reason=to.value)
        except JobError:
            assert to not in TRANSITIONS[before.state]
            assert job is before
        else:
            assert not before.terminal
            assert (job.state, job.seq, job.reason) == (to, before.seq + 1, to.value)


def test_every_state_can_end() -> None:
    can_end = set(TERMINAL)
    for _ in JobState:
        can_end |= {state for state, targets in TRANSITIONS.items() if targets & can_end}
    assert can_end == set(JobState)


def test_only_an_interruption_goes_back() -> None:
    """Without ``interrupted`` the states are in order, so the resume limit alone bounds every job."""
    seen: set[JobState] = set()

    def visit(state: JobState, path: tuple[JobState, ...]) -> None:
        assert state not in path, f"{path} goes in a circle"
        seen.add(state)
        for to in TRANSITIONS[state] - {JobState.INTERRUPTED}:
            visit(to, (*path, state))

    visit(JobState.QUEUED, ())
    assert seen == set(JobState) - {JobState.INTERRUPTED}


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_an_ended_job_takes_no_note(state: JobState) -> None:
    ended = advance(advance(QUEUED, JobState.RUNNING), state)
    with pytest.raises(JobError, match="has ended"):
        note(ended, phase="erase")


def test_the_diagram_is_the_table() -> None:
    lines = [line.strip() for line in diagram().splitlines()]
    drawn = {tuple(line.split(" --> ")) for line in lines if " --> " in line and "[*]" not in line}
    assert drawn == {(state.value, to.value) for state, targets in TRANSITIONS.items() for to in targets}
    assert [line for line in lines if line.endswith("[*]")] == [f"{state} --> [*]" for state in sorted(TERMINAL)]
