"""The tree of errors: every code has advice, and survives the way through a process border."""

from __future__ import annotations

import json

import pytest

from bridged import errors
from bridged.errors import BY_CODE, HINTS, BridgedError


def classes() -> list[type[BridgedError]]:
    """Every class of bridged/errors.py itself; a subclass elsewhere may share its parent's code, but adds none."""
    return [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, BridgedError)]


def test_every_code_has_advice_and_no_advice_is_stale() -> None:
    codes = [cls.code for cls in classes()]
    assert len(set(codes)) == len(codes), "a code is used twice"
    assert set(HINTS) == set(codes)
    assert set(BY_CODE) == set(codes)


@pytest.mark.parametrize("code", sorted(HINTS))
def test_advice_is_made_of_sentences(code: str) -> None:
    assert code == code.upper()
    for text in (HINTS[code].cause, HINTS[code].remedy):
        assert text[0].isupper() or text[0] in "`'", text
        assert text[-1] in ".?", text


def test_what_fails_at_a_target_can_be_found_by_what_is_seen() -> None:
    """docs/troubleshooting.md is made from the signs. Groups of the tree have none: a message of theirs is all there is."""
    at_targets = {cls.code for cls in classes() if issubclass(cls, errors.TargetError)}
    assert {code for code in at_targets if not HINTS[code].sign} == {"TARGET", "LINK", "LOADER", "CHIP"}
    signs = [hint.sign for hint in HINTS.values() if hint.sign]
    assert len(set(signs)) == len(signs), "two rows that nobody can tell apart"
    assert all((sign[0].isupper() or sign[0] == "`") and sign[-1] == "." for sign in signs)


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.code)
def test_an_error_survives_the_border(cls: type[BridgedError]) -> None:
    first = cls("Write Memory at 0x08004000: NACK", address=0x08004000, expected="79", came=None)
    second = errors.from_dict(json.loads(json.dumps(first.as_dict())))
    assert type(second) is cls
    assert second.as_dict() == first.as_dict()


def test_a_code_of_a_newer_peer_is_still_an_error() -> None:
    error = errors.from_dict({"code": "FROM_THE_FUTURE", "message": "x"})
    assert type(error) is BridgedError
    assert error.message == "x"
