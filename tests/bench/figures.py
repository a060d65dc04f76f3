"""Figures of the benchmark: medians, spread, ratios with their interval, where time went, which runs do not count. Pure.

A run is one host on one device. It counts when the device was on time and the host was right; the limits below are the
criterion, stated here and printed with the results. What does not count is reported and repeated, never silently dropped.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# All that the device was late with the last bytes of its answers, against what the wire needs. It is added to the time of
# the host, so it bounds the error of a run.
LATE_SHARE = 0.03
LATE_ONCE_S = 0.1  # A single stall of the machine, as long as a process start, is no figure about a host.
# What others did on the machine meanwhile, in cores: all that was busy, less our own processes. Kernel threads that move the
# bytes of the ptys are in it (0.06 to 0.08 cores at 921600 baud when this was written), so it is never nothing.
OTHERS_CORES = 0.3
RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """What is compared with what: the same host, rate, condition, size of the image, and number of targets at once."""

    host: str
    baud: int
    condition: str
    kib: int
    targets: int = 1

    def __str__(self) -> str:
        many = f", {self.targets} targets at once" if self.targets > 1 else ""
        return f"{self.host}, {self.baud}, {self.condition}, {self.kib} KiB{many}"


@dataclass(frozen=True, slots=True)
class Run:
    """One run. ``wall_s``: from the start of the host to its end; ``dialogue_s``: from its first byte to the device's last.

    With several targets at once, seconds and counts are means over them, ``slowest_s`` is the longest dialogue, and
    ``cpu_s`` is for all. ``took_s``: what the run kept the benchmark busy, with all that belongs to it.
    """

    host: str
    baud: int
    condition: str
    kib: int
    wall_s: float
    dialogue_s: float
    limit_s: float  # What is below, added up
    program_s: float
    wire_bytes: int
    answers: int
    overruns: int
    late_s: float
    late_max_s: float
    late_p50_us: float
    late_p99_us: float
    gap_p50_us: float
    gap_p99_us: float
    gap_s: float
    gap_over_s: float
    in_frames_s: float
    resets_s: float
    cpu_s: float
    targets: int = 1
    slowest_s: float = 0.0
    took_s: float = 0.0
    at: float = 0.0
    requests: int = 0  # What the load got answered meanwhile, and how long a request took
    request_p99_ms: float = 0.0
    request_hz: float = 0.0
    uploads: int = 0
    others_cores: float = 0.0
    rejected: str = ""

    @property
    def share(self) -> float:
        """Of the wire limit, for the dialogue."""
        return self.limit_s / self.dialogue_s if self.dialogue_s else 0.0

    @property
    def cell(self) -> Cell:
        return Cell(self.host, self.baud, self.condition, self.kib, self.targets)


BITS_PER_BYTE = 11  # 8E1
PARTS = (
    "payload",
    "framing",
    "programming",
    "device late",
    "host",
    "stalls",
    "inside frames",
    "resets",
    "unexplained",
)


def parts(run: Run) -> dict[str, float]:
    """Where the seconds of a dialogue went; they add up to ``dialogue_s``. Only the last one was not measured.

    ``payload`` is the image twice on the wire, written and read back; ``framing`` all other bytes. ``host``: from the last
    byte of an answer to the next frame, each wait up to the device's ``--gap-us``; ``stalls``: what lies beyond.
    """
    byte_s = BITS_PER_BYTE / run.baud
    payload_s = 2 * run.kib * 1024 * byte_s
    known = {
        "payload": payload_s,
        "framing": run.wire_bytes * byte_s - payload_s,
        "programming": run.program_s,
        "device late": run.late_s,
        "host": run.gap_s - run.gap_over_s,
        "stalls": run.gap_over_s,
        "inside frames": run.in_frames_s,
        "resets": run.resets_s,
    }
    return {**known, "unexplained": run.dialogue_s - sum(known.values())}


def why_rejected(
    report: dict[str, Any], *, exit_status: int, content_right: bool, others_cores: float = 0.0, load_failed: int = 0
) -> str:
    """Empty when the run counts. ``report``: what the device wrote at its end."""
    if exit_status:
        return f"the host ended with status {exit_status}"
    if not content_right:
        return "the flash does not hold the image"
    if load_failed:
        return f"the load was another one than stated: {load_failed} of its requests were refused"
    if others_cores > OTHERS_CORES:
        return f"others kept {others_cores:.2f} cores of the machine busy, more than {OTHERS_CORES:g}"
    late, limit_s = report["late_last"], report["wire_s"] + report["program_s"] + report["erase_s"]
    if not report["paced"]:
        return ""
    if late["sum_s"] > LATE_SHARE * limit_s:
        return f"the device was late by {late['sum_s']:.3f} s in all, more than {LATE_SHARE:.0%} of {limit_s:.2f} s"
    if late["max_us"] > LATE_ONCE_S * 1e6:
        return f"the device was late by {late['max_us'] / 1000:.1f} ms once, more than {LATE_ONCE_S * 1000:.0f} ms"
    return ""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one set of values: median, extremes, and the range of the middle half."""

    count: int
    median: float
    least: float
    most: float
    low: float
    high: float

    @property
    def middle(self) -> float:
        return self.high - self.low


def spread(values: Sequence[float]) -> Spread:
    """Raises ``ValueError`` for no values. Quartiles are those of the inclusive method, good for few values."""
    if not values:
        raise ValueError("no run counts")
    ordered = sorted(values)
    low, _, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else [ordered[0]] * 3
    return Spread(len(ordered), statistics.median(ordered), ordered[0], ordered[-1], low, high)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median of one host over that of another, with the interval in which it lies with 95 % confidence."""

    value: float
    low: float
    high: float


def ratio(above: Sequence[float], below: Sequence[float], seed: int = 1) -> Ratio:
    """Of medians, with a bootstrap interval (percentiles of resampled ratios; the same seed gives the same interval)."""
    if not above or not below:
        raise ValueError("no run counts")
    source = random.Random(seed)
    drawn = sorted(
        statistics.median(source.choices(above, k=len(above))) / statistics.median(source.choices(below, k=len(below)))
        for _ in range(RESAMPLES)
    )
    edge = round(RESAMPLES * (1 - CONFIDENCE) / 2)
    return Ratio(statistics.median(above) / statistics.median(below), drawn[edge], drawn[-1 - edge])


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target that was stated before, and what came. ``met`` None: not measured. ``note``: what limits its weight."""

    text: str
    wanted: str
    found: str
    met: bool | None
    note: str = ""


def at_least(text: str, wanted: float, found: float | None, unit: str = "", shown: str = "", note: str = "") -> Verdict:
    return _verdict(text, "≥", wanted, found, unit, shown, note, found is not None and found >= wanted)


def at_most(text: str, wanted: float, found: float | None, unit: str = "", shown: str = "", note: str = "") -> Verdict:
    return _verdict(text, "≤", wanted, found, unit, shown, note, found is not None and found <= wanted)


def _verdict(text: str, sign: str, wanted: float, found: float | None, unit: str, shown: str, note: str, met: bool) -> Verdict:
    if found is None:
        return Verdict(text, f"{sign} {wanted:g}{unit}", "not measured", None)
    return Verdict(text, f"{sign} {wanted:g}{unit}", shown or f"{found:.4g}{unit}", met, note)


def lost(calm: Sequence[float], loaded: Sequence[float]) -> float:
    """What a condition costs, in % of the calm median. Negative: it was faster."""
    before = statistics.median(calm)
    return 100 * (statistics.median(loaded) - before) / before


def lost_beyond_spread(calm: Sequence[float], loaded: Sequence[float]) -> float:
    """As ``lost``, less the middle half of the calm runs; never below 0."""
    found = spread(calm)
    return max(0.0, lost(calm, loaded) - 100 * found.middle / found.median)
