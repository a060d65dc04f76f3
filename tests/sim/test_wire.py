"""Bits on the wire: what a receiver hears that is set like the sender, and one that is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridged.sim.wire import Burst, Format, hear

RATES = st.sampled_from([1200, 9600, 57600, 115200, 921600])
PARITIES = st.sampled_from("ENO")


def burst(data: bytes, form: Format, start_ns: int = 0) -> Burst:
    return Burst(start_ns, form.byte_ns, data, form)


@given(st.binary(max_size=40), RATES, PARITIES, st.sampled_from([1, 2]))
def test_a_receiver_set_alike_hears_every_byte_when_it_ends(data: bytes, baud: int, parity: str, stop: int) -> None:
    form = Format(baud, parity, stop)
    heard = hear(burst(data, form, start_ns=1000), form)
    assert bytes(h.value for h in heard) == data
    assert all(h.good for h in heard)
    for number, h in enumerate(heard, start=1):
        end = 1000 + number * form.byte_ns
        assert abs(h.at_ns - end) <= (stop - 1) * 1e9 / baud + number + 1  # a receiver is content with one stop bit


@given(st.binary(min_size=1, max_size=40), st.floats(-0.04, 0.04))
def test_a_small_error_of_the_rate_does_no_harm(data: bytes, error: float) -> None:
    sender, receiver = Format(115200, "E"), Format(115200 * (1 + error), "E")
    assert sender.agrees(receiver)
    heard = hear(burst(data, sender), receiver)
    assert bytes(h.value for h in heard) == data
    assert all(h.good for h in heard)


@pytest.mark.parametrize("error", [-0.07, 0.07])
def test_a_large_error_of_the_rate_is_heard(error: float) -> None:
    sender, receiver = Format(115200, "E"), Format(115200 * (1 + error), "E")
    assert not sender.agrees(receiver)
    heard = hear(burst(bytes(range(256)), sender), receiver)
    assert [h for h in heard if not h.good] or bytes(h.value for h in heard) != bytes(range(256))


@pytest.mark.parametrize(
    ("value", "good"), [(0x7F, True), (0x79, True), (0x1F, True), (0x00, False), (0x03, False), (0x02, True)]
)
def test_single_bytes_of_8n1_at_an_8e1_receiver(value: int, good: bool) -> None:
    """The stop bit is taken for the parity bit: bytes with an odd number of ones look perfect, the others do not."""
    heard = hear(burst(bytes((value,)), Format(115200, "N")), Format(115200, "E"))
    assert [(h.value, h.good) for h in heard] == [(value, good)]


def test_back_to_back_the_next_start_bit_of_8n1_is_no_stop_bit() -> None:
    heard = hear(burst(b"\x02\xfd", Format(115200, "N")), Format(115200, "E"))
    assert heard[0].value == 0x02
    assert not heard[0].good


@given(st.binary(min_size=1, max_size=20), st.integers(0, 5_000_000))
def test_splitting_keeps_bytes_and_times(data: bytes, at_ns: int) -> None:
    whole = burst(data, Format(115200, "E"), start_ns=1_000_000)
    done, rest = whole.split(at_ns)
    assert (done.data if done else b"") + (rest.data if rest else b"") == data
    if done is not None:
        assert done.start_ns == whole.start_ns
        assert done.end_ns <= at_ns
    if rest is not None:
        assert rest.start_ns + rest.byte_ns > at_ns
        assert rest.end_ns == whole.end_ns


def test_time_of_one_byte_at_115200_baud() -> None:
    assert Format(115200, "E").byte_ns == 95486  # 11 bits of 8.68 us
    assert Format(115200, "N").byte_ns == 86806
    assert Format(115200, "?").byte_ns == 95486
