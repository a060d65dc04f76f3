"""The fuzz targets in the normal test run: the whole corpus again, then some inputs that hypothesis makes.

A finding is kept as ``corpus/<target>/found-<what it was>`` and named in ``FINDINGS``: the test of that name fails if the
defect comes back. How to run the guided fuzzer: docs/fuzzing.md.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import seeds
from tests.fuzz.targets import TARGETS, Bytes

CORPUS = Path(__file__).parent / "corpus"
FINDINGS: dict[str, str] = {
    "board/found-hazard-without-end": "an infinite time in the board, and the target was never released",
    "board/found-odd-reference": "a reference of the recorder that is not 8 bytes long was an exception of struct",
    "config/found-huge-number": "a number of 400 digits was an OverflowError",
    "config/found-long-hexadecimal": "a number that Python refuses to write in decimal was a ValueError",
    "config/found-too-many-digits": "a number of more than 4300 digits was a ValueError of int()",
    "events/found-another-type": "a text where a number belongs went up to who computes with it",
    "events/found-missing-field": "an event without its fields was a KeyError where the daemon reads what its session says",
    "events/found-unknown-field": "the same, with a field that there is not",
    "journal/found-no-utf8": "a schema that is not UTF-8 was no typed error, and the lock was not told of",
    "parser-report/found-deep-json": "a parser process could nest JSON so deeply that the daemon had a RecursionError",
    "store/found-deep-json": "the same in a sidecar on the disk: the daemon did not start",
}
"""File of the corpus to what went wrong with it once."""


def corpus(target: str) -> list[Path]:
    return sorted((CORPUS / target).iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_is_digested(target: str) -> None:
    found = corpus(target)
    assert found, "no seeds: python -m tests.fuzz.seeds"
    for path in found:
        data = path.read_bytes()
        try:
            TARGETS[target].run(data)
        except BaseException as error:
            error.add_note(f"input: {path}")
            raise


@st.composite
def mutated(draw: st.DrawFn, target: str) -> bytes:
    """An input of the corpus with some bytes changed, cut, doubled or put in: most random bytes end at the first check."""
    data = bytearray(draw(st.sampled_from(corpus(target))).read_bytes())
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    for _ in range(draw(st.integers(0, 6))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + rng.randrange(1, 9)]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 5))
            case _:
                data[at:at] = data[at : at + rng.randrange(1, 33)]
    return bytes(data[: TARGETS[target].max_bytes])


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_that_nobody_thought_of(target: str) -> None:
    wanted = TARGETS[target]

    @settings(max_examples=wanted.examples, database=None)
    @given(st.one_of(mutated(target), st.binary(max_size=wanted.max_bytes)))
    def check(data: bytes) -> None:
        wanted.run(data)

    check()


@pytest.mark.parametrize("name", FINDINGS)
def test_findings_stay_mended(name: str) -> None:
    target, _, _ = name.partition("/")
    TARGETS[target].run((CORPUS / name).read_bytes())


def test_every_finding_has_its_input_and_every_input_its_name() -> None:
    kept = {f"{path.parent.name}/{path.name}" for path in CORPUS.glob("*/found-*")}
    assert kept == set(FINDINGS)


def test_every_target_has_seeds_of_what_is_right() -> None:
    """They need not be the newest: a format or verb that was added can be added by python -m tests.fuzz.seeds."""
    made = seeds.all_seeds()
    assert set(made) == set(TARGETS)
    for target, names in made.items():
        there = {path.name for path in corpus(target)}
        assert {f"seed-{name}" for name in names} <= there, f"{target}: run python -m tests.fuzz.seeds"


def test_an_input_that_is_too_short_goes_on_with_zeros() -> None:
    source = Bytes(b"\x01\x02")
    assert (source.take(3), source.number(2), source.byte(), source.rest()) == (b"\x01\x02\0", 0, 0, b"")
