"""The whole product, a few hundred flashes; ten thousand of them: ``make soak``, and docs/reliability.md."""

from __future__ import annotations

import os

import pytest

from tests import product

FLASHES = int(os.environ.get("BRIDGED_FLASHES", "240"))


@pytest.mark.timeout(120 + FLASHES)
def test_every_flash_with_a_transient_fault_succeeds_and_every_fault_that_stays_is_named() -> None:
    figures = product.run(FLASHES, seed=7, every=4)
    assert figures.wrong == []
    assert figures.succeeded == figures.flashes == FLASHES
    assert figures.happened > 0.7 * FLASHES, "most of the faults fall into their job"
    assert figures.killed
    assert figures.repeated >= figures.killed // 2, "what was killed went on"
    assert figures.rolled_back >= len(product.NAMES)
    assert len(figures.codes) >= 8, figures.codes
