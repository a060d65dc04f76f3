"""A sample of what ``make soak`` does with every instruction: most of those taken out are noticed."""

from __future__ import annotations

import random

from bridged import stub
from tests.stub import mutations


def test_the_scenario_passes_with_the_shipped_loader() -> None:
    mutations.scenario(stub.load())
    mutations.families(stub.load())
    mutations.starts(stub.load())


def test_an_instruction_that_is_missing_is_noticed() -> None:
    found = list(mutations.mutants(stub.load().code, set()))
    assert len(found) > 1200
    sample = random.Random(1).sample(found, 10)
    left = [f"{name}+{at:#x}" for name, at, code in sample if mutations.survives(code)]
    assert len(left) <= 3, left
