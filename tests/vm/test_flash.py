"""The first flash on real ground: nc, systemd, gpiochip, 8E1."""

from __future__ import annotations

from tests.vm.bench import Bench, hold_ms, image_for


def test_a_flash_by_nc_over_real_8e1(bench: Bench) -> None:
    image = image_for("pair", 6 * 1024, seed=1)
    bench.put(image, "first")
    answer = bench.say("FLASH pair first addr=0x08000000 wait=1")
    assert "state=succeeded" in answer, answer + bench.journal()
    assert bench.pair_holds(image)
    # Even parity on every byte of the loader's dialogue, in both directions: neither end saw an error.
    assert bench.pair_state()["parity_errors"] == 0
    moves = bench.moves("pair")
    print(moves, hold_ms(moves, "nrst", 0))


def test_a_flash_of_the_target_outside(bench: Bench) -> None:
    image = image_for("out", 6 * 1024, seed=2)
    bench.put(image, "outside")
    answer = bench.say("FLASH out outside addr=0x08000000 wait=1")
    assert "state=succeeded" in answer, answer + bench.journal()
    assert bench.out_holds(image)
