"""docs/benchmarks.md and its pictures, from the results. The targets stand here, before the figures; a miss is a miss.

One page, so one file.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench import modelled, store
from tests.bench.figures import (
    LATE_ONCE_S,
    LATE_SHARE,
    OTHERS_CORES,
    PARTS,
    Cell,
    Run,
    Verdict,
    at_least,
    at_most,
    lost,
    lost_beyond_spread,
    parts,
    ratio,
    spread,
)
from tests.bench.plan import ENOUGH_RUNS
from tests.bench.plot import Panel, Point, Series, picture

# The targets, as they were stated before anything was measured.
WIRE_SHARE = {115200: 98.0, 921600: 96.0}  # %, idle
RATE = {115200: 0.98, 921600: 1.0}  # of stm32flash, idle
LOADED_LOSS = 2.0  # %, beyond the spread of the idle runs
HOGS_LOSS = 0.5  # of what stm32flash loses
PARALLEL_LOSS = 3.0  # %, of the slowest target, beyond the spread of single runs
PARALLEL = ((115200, 8), (921600, 2))
RECHECK_S = 2.0
FIRST_FLASH_MORE = 1.0  # %, beyond the frames of the image's own blocks
DAEMON_RSS_MIB = 45.0
SESSION_USS_MIB = 10.0
READY_S = 1.0
WAKEUPS_HZ = 5.0

OURS = ("session", "daemon")
REFERENCE = "stm32flash"
CONDITIONS = {"idle": "idle", "api": "API load", "hogs": "CPU load"}

SPEED_HEAD = (
    "host",
    "runs",
    "dialogue s: median (least to most; middle half)",
    "% of the wire limit",
    "rate / stm32flash",
    "whole s",
    "CPU s",
    "a turnaround µs: p50, p99",
)

FRAME = """\
# Benchmarks

<!-- Written by `make bench`; the words around the figures are in tests/bench/report.py. Do not edit. -->

What is measured: {size} KiB of pseudo-random firmware are written to an STM32F407, read back and compared. Every host talks to
the same device, a small AN3155 loader in C on a pty ([tests/bench/device.c](../tests/bench/device.c)) that paces each
byte at 11 bit times on absolute deadlines, takes 16 µs for 4 bytes of flash and no time for an erase, and loses
what a host sends too early. **It is no silicon**: it shows what a host adds to the wire, on the machine below. A pty has
no FIFO, no interrupt and no USB adapter, and wakes its reader through a kernel thread, which costs every host alike.

- *wire limit*: what the bytes of this host need on the wire, and the modelled programming. *Dialogue*: from the host's first
  byte to the device's last. *Whole*: from the start of the host to its end; ours resets the target into the loader
  before and into its application after, stm32loader sleeps 1.15 s for that, the others do neither.
- *idle*: the daemon runs and does nothing. *API load*: 50 clients poll it with 500 requests/s in total, and one uploads 1 MiB
  of Intel HEX after the other and has it parsed. *CPU load*: two processes that never sleep run beside it. The load is there
  for foreign hosts too; all of it runs on this machine.
- Runs are interleaved: in every round each host has its turn in each condition, in an order that turns.
- A run does not count, and is made again, when the device was late with the last bytes of its answers by more than
  {late:.0%} of the wire limit in all or by more than {once:.0f} ms once, when others than the benchmark kept more than
  {others:g} cores busy, or when a host failed.
- The session process of bridged asks for real-time priority, as the installed service allows it; the other hosts are started as
  their manuals say, stm32flash also with that same priority. The device has real-time priority for all.
- Intervals of ratios: 95 %, bootstrap over the runs.

To measure again: `make bench`, or `make bench ARGS="--budget 45"` for the most important part that fits into 45 minutes; either
goes on where the last one of the same code on the same machine ended. What was measured before, a line for each revision:
[benchmarks-history.jsonl](benchmarks-history.jsonl).
"""


def write(results: store.Results, hosts: Mapping[str, str], docs: Path, identity: str) -> list[Path]:
    """The page, its pictures, and a line of the history; the paths."""
    pictures = docs / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    written = [docs / "benchmarks.md", docs / "benchmarks-history.jsonl"]
    drawn = {"bench-speed.svg": speed_picture(results.runs, hosts), "bench-growth.svg": growth_picture(results)}
    for name, text in drawn.items():
        if text:
            (pictures / name).write_text(text)
            written.append(pictures / name)
    written[0].write_text(page(results, hosts, [name for name, text in drawn.items() if text]))
    look = is_a_look(results.runs)
    store.write_history(written[1], store.history_line(results, verdicts(results), identity, look=look))
    return written


def page(results: store.Results, hosts: Mapping[str, str], pictures: Sequence[str] = ()) -> str:
    runs, facts = results.runs, results.facts
    size = max((run.kib for run in runs), default=0)
    told = [FRAME.format(size=size, late=LATE_SHARE, once=LATE_ONCE_S * 1000, others=OTHERS_CORES)]
    told += ["## Machine\n", _machine(results)]
    told += ["## Targets\n", _verdicts(verdicts(results))]
    if runs:
        told += ["## Speed\n"]
        if "bench-speed.svg" in pictures:
            told.append(
                "![Share of the wire limit, by host, condition, rate and number of targets](pictures/bench-speed.svg)\n"
            )
        told += [*_speed(runs, hosts), *_losses(runs, hosts), *_parallel(runs), *_rates(runs)]
        told += ["## Where the time goes\n", *_parts(runs, hosts), *_differences(runs)]
        told += ["## The device and the rejected runs\n", _device(runs)]
    if "virtual" in facts:
        told += ["## The exact account\n", _virtual(facts["virtual"], runs)]
    if "modelled" in facts:
        told += ["## The second-stage loader, modelled\n", modelled.section(facts["modelled"])]
    if "cost" in facts:
        told += ["## Cost\n", _cost(facts["cost"])]
    if "virtual" in facts or "cost" in facts:
        told.append("## Growth\n")
        if "bench-growth.svg" in pictures:
            told.append(
                "![Seconds against image size, memory against connections, targets and history](pictures/bench-growth.svg)\n"
            )
        told += _growth(facts)
    return "\n".join(told).rstrip() + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Numbers to the right, the first column to the left."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def chosen(
    runs: Iterable[Run], host: str, baud: int, condition: str = "idle", *, kib: int | None = None, targets: int = 1
) -> list[Run]:
    """Runs that count. ``kib`` None: of the largest image with which this host was measured so."""
    found = [r for r in runs if (r.host, r.baud, r.condition, r.targets) == (host, baud, condition, targets) and not r.rejected]
    most = max((r.kib for r in found), default=0) if kib is None else kib
    return [r for r in found if r.kib == most]


def seconds(runs: Iterable[Run]) -> list[float]:
    return [run.dialogue_s for run in runs]


def _machine(results: store.Results) -> str:
    runs, facts = results.runs, results.facts
    lines = [f"- {name}: {value}" for name, value in facts.get("machine", {}).items()]
    if facts.get("commit"):
        lines.append(f"- commit: {facts['commit']}")
    for number, one in enumerate(facts.get("slices", ()), start=1):
        lines.append(f"- slice {number}: {one['date']}, load average at its start {one['load']}")
    counted = [r for r in runs if not r.rejected]
    if counted:
        counts = Counter(r.cell for r in counted)
        lines.append(f"- runs that count: {len(counted)}, {min(counts.values())} to {max(counts.values())} of a kind")
        others = [max(0.0, r.others_cores) for r in counted]  # A difference of clocks, which may be below nothing.
        lines.append(
            f"- others on the machine meanwhile: {statistics.median(others):.2f} cores busy (median), {max(others):.2f} at most"
        )
        if max(others) > OTHERS_CORES:
            lines.append("- **measured on a machine that others kept busy: the conditions called idle were not**")
        if max(counts.values()) < ENOUGH_RUNS:
            lines.append(f"- **fewer than {ENOUGH_RUNS} runs: a look, not a measurement**")
    return "\n".join(lines) + "\n"


def is_a_look(runs: Sequence[Run]) -> bool:
    """Too few runs of anything, or too much else on the machine, for a verdict to be one."""
    counts = Counter(r.cell for r in runs if not r.rejected)
    return max(counts.values(), default=0) < ENOUGH_RUNS or any(r.others_cores > OTHERS_CORES for r in runs if not r.rejected)


# --- targets ------------------------------------------------------------------------------------------------------


def verdicts(results: store.Results) -> list[Verdict]:
    runs, facts = results.runs, results.facts
    found: list[Verdict] = []
    for host in OURS:
        for baud, wanted in WIRE_SHARE.items():
            found.append(_share(runs, host, baud, wanted))
        for baud, wanted in RATE.items():
            found.append(_rate(runs, host, baud, wanted))
        for baud in WIRE_SHARE:
            found.append(_loss(runs, host, baud))
        found.append(_hogs(runs, host))
    found += [_many(runs, baud, targets) for baud, targets in PARALLEL]
    if runs:
        overruns = sum(r.overruns for r in runs if r.host in OURS)
        found.append(at_most("bytes that ours sent too early, all runs", 0, float(overruns)))
    exact = facts.get("virtual", {})
    again = exact.get("recheck")
    found += [
        at_most("sampled re-check of an unchanged image, 115200 (exact)", RECHECK_S, again["total_s"] if again else None, " s"),
    ]
    for row in exact.get("first_flash", ()):
        more = 100 * (row["bytes"] / (row["image_bytes"] + row["kept_bytes"]) - 1)
        what = f"first flash, 200 KiB into 1 MiB, {row['chip']}, outside={row['outside']}"
        found.append(
            at_most(f"{what}: bytes beyond those of its blocks and of what is kept (exact)", FIRST_FLASH_MORE, more, " %")
        )
    cost = facts.get("cost", {})
    small = cost.get("session_memory", {}).get("4", {}).get("uss_kib")
    ready = cost.get("ready_s")
    rss = cost.get("idle_rss_kib")
    found += [
        at_most("daemon, idle: RSS", DAEMON_RSS_MIB, rss / 1024 if rss else None, " MiB"),
        at_most("session with a 4 KiB image: USS", SESSION_USS_MIB, small / 1024 if small else None, " MiB"),
        at_most("daemon: start to READY", READY_S, statistics.median(ready) if ready else None, " s"),
        at_most("daemon, idle, one target: wake-ups a second", WAKEUPS_HZ, cost.get("wakeups_per_s")),
    ]
    return found


def _note(*groups: Sequence[Run]) -> str:
    """What keeps a verdict from being one."""
    fewest = min(len(group) for group in groups)
    if any(r.others_cores > OTHERS_CORES for group in groups for r in group):
        return "a look: the machine was busy"
    return "" if fewest >= ENOUGH_RUNS else "1 run" if fewest == 1 else f"{fewest} runs"


def _share(runs: Sequence[Run], host: str, baud: int, wanted: float) -> Verdict:
    these = chosen(runs, host, baud)
    text = f"{host}, {baud}, idle: share of the wire limit"
    if not these:
        return at_least(text, wanted, None, " %")
    return at_least(text, wanted, 100 * statistics.median(r.share for r in these), " %", note=_note(these))


def _rate(runs: Sequence[Run], host: str, baud: int, wanted: float) -> Verdict:
    ours, theirs = chosen(runs, host, baud), chosen(runs, REFERENCE, baud)
    text = f"{host}, {baud}, idle: rate against {REFERENCE}"
    if not ours or not theirs:
        return at_least(text, wanted, None)
    found = ratio(seconds(theirs), seconds(ours))
    return at_least(
        text, wanted, found.value, shown=f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})", note=_note(ours, theirs)
    )


def _loss(runs: Sequence[Run], host: str, baud: int) -> Verdict:
    idle, loaded = chosen(runs, host, baud), chosen(runs, host, baud, "api")
    text = f"{host}, {baud}: lost under API load, beyond the spread of the idle runs"
    if not idle or not loaded:
        return at_most(text, LOADED_LOSS, None, " %")
    return at_most(text, LOADED_LOSS, lost_beyond_spread(seconds(idle), seconds(loaded)), " %", note=_note(idle, loaded))


def _hogs(runs: Sequence[Run], host: str) -> Verdict:
    """Compared where both were measured; how much each has lost is shown, for half of nothing is nothing."""
    text = f"{host}, 921600: lost under CPU load, against what {REFERENCE} loses"
    ours, theirs = ([chosen(runs, h, 921600, c) for c in ("idle", "hogs")] for h in (host, REFERENCE))
    if not all((*ours, *theirs)):
        return at_most(text, HOGS_LOSS, None)
    mine, other = (lost(seconds(calm), seconds(busy)) for calm, busy in (ours, theirs))
    share = max(0.0, mine) / other if other > 0 else 0.0 if mine <= 0 else float("inf")
    return at_most(text, HOGS_LOSS, share, shown=f"{share:.2f} ({mine:.1f} % of {other:.1f} %)", note=_note(*ours, *theirs))


def _many(runs: Sequence[Run], baud: int, targets: int) -> Verdict:
    text = f"{targets} targets at once, {baud}: lost by the slowest, beyond the spread of single runs"
    many = chosen(runs, "daemon", baud, targets=targets)
    alone = chosen(runs, "daemon", baud, kib=many[0].kib) if many else []
    if not many or not alone:
        return at_most(text, PARALLEL_LOSS, None, " %")
    found = lost_beyond_spread(seconds(alone), [r.slowest_s for r in many])
    return at_most(text, PARALLEL_LOSS, found, " %", note=_note(many, alone))


def _verdicts(found: Sequence[Verdict]) -> str:
    names = {True: "met", False: "**missed**", None: "-"}
    rows = [(v.text, v.wanted, v.found, names[v.met] + (f" ({v.note})" if v.note else "")) for v in found]
    return table(("target", "stated", "measured", ""), rows)


# --- speed --------------------------------------------------------------------------------------------------------


def _main_kib(runs: Sequence[Run]) -> int:
    return max((r.kib for r in runs), default=0)


def _speed(runs: Sequence[Run], hosts: Mapping[str, str]) -> Iterable[str]:
    kib = _main_kib(runs)
    for baud in sorted({r.baud for r in runs}):
        for condition, name in CONDITIONS.items():
            rows: list[tuple[str, ...]] = []
            reference = seconds(chosen(runs, REFERENCE, baud, condition, kib=kib))
            for host, title in hosts.items():
                these = chosen(runs, host, baud, condition, kib=kib)
                if these:
                    rows.append(_speed_row(title, these, reference))
            if rows:
                yield f"### {baud} baud, {name}\n"
                yield table(SPEED_HEAD, rows)
                yield from _load_note([r for r in runs if (r.baud, r.condition, r.kib) == (baud, condition, kib)])


def _speed_row(title: str, these: Sequence[Run], reference: Sequence[float]) -> tuple[str, ...]:
    times = spread(seconds(these))
    against = ratio(reference, seconds(these)) if reference else None
    return (
        title,
        str(times.count),
        f"{times.median:.2f} ({times.least:.2f} to {times.most:.2f}; {times.middle:.2f})",
        f"{100 * statistics.median(r.share for r in these):.1f}",
        f"{against.value:.3f} ({against.low:.3f} to {against.high:.3f})" if against else "-",
        f"{statistics.median(r.wall_s for r in these):.2f}",
        f"{statistics.median(r.cpu_s for r in these):.2f}",
        f"{statistics.median(r.gap_p50_us for r in these):.0f}, {statistics.median(r.gap_p99_us for r in these):.0f}",
    )


def _load_note(these: Sequence[Run]) -> Iterable[str]:
    with_load = [r for r in these if r.condition == "api" and not r.rejected]
    if with_load:
        rate = statistics.median(r.request_hz for r in with_load)
        late = statistics.median(r.request_p99_ms for r in with_load)
        files = statistics.median(r.uploads / r.took_s for r in with_load)
        yield f"Load, medians: {rate:.0f} requests/s answered, 99 % of them within {late:.0f} ms; {files:.2f} HEX files/s.\n"


def _losses(runs: Sequence[Run], hosts: Mapping[str, str]) -> Iterable[str]:
    """Of every host, so that what the machine loses is not taken for what a host loses."""
    rows = []
    for baud in sorted({r.baud for r in runs}):
        for host in hosts:
            calm = chosen(runs, host, baud)
            found = [chosen(runs, host, baud, c, kib=calm[0].kib) if calm else [] for c in ("api", "hogs")]
            if any(found):
                rows.append((f"{host}, {baud}", *(f"{lost(seconds(calm), seconds(f)):+.1f}" if f else "-" for f in found)))
    if rows:
        yield "### What load costs each host\n"
        yield "Median of the dialogue against that of the idle runs, in %.\n"
        yield table(("", "API load", "CPU load"), rows)


def _in_parallel(runs: Sequence[Run]) -> list[Cell]:
    """Cells that were run with several numbers of targets."""
    many = {(r.host, r.baud, r.condition, r.kib) for r in runs if r.targets > 1 and not r.rejected}
    cells = {r.cell for r in runs if not r.rejected and (r.host, r.baud, r.condition, r.kib) in many}
    return sorted(cells, key=lambda c: (c.host, c.baud, c.condition, c.kib, c.targets))


def _parallel(runs: Sequence[Run]) -> Iterable[str]:
    cells = _in_parallel(runs)
    if not cells:
        return
    rows = []
    for cell in cells:
        these = [r for r in runs if r.cell == cell and not r.rejected]
        alone = chosen(runs, cell.host, cell.baud, cell.condition, kib=cell.kib)
        mean, slowest = spread(seconds(these)), spread([r.slowest_s for r in these])
        slower = f"{lost(seconds(alone), [r.slowest_s for r in these]):+.1f}" if alone else "-"
        rows.append(
            (
                f"{cell.host}, {cell.baud} baud, {cell.kib} KiB",
                str(cell.targets),
                str(mean.count),
                f"{mean.median:.2f} ({mean.least:.2f} to {mean.most:.2f})",
                f"{slowest.median:.2f} ({slowest.least:.2f} to {slowest.most:.2f})",
                slower,
                f"{statistics.median(r.cpu_s for r in these) / cell.targets:.2f}",
            )
        )
    yield "### Several targets at once\n"
    yield (
        "One daemon with a session process for each target, all jobs submitted together; stm32flash as so many processes. "
        "Seconds are those of the dialogue: the mean over the targets, and the slowest of them.\n"
    )
    head = ("", "targets", "runs", "mean s (least to most)", "slowest s (least to most)", "slowest against one alone, %")
    yield table((*head, "CPU s a target"), rows)


def _swept(runs: Sequence[Run]) -> dict[str, list[Cell]]:
    """Hosts that were measured at three rates and more with the same image, idle."""
    found: dict[tuple[str, int], set[Cell]] = {}
    for r in runs:
        if not r.rejected and r.targets == 1 and r.condition == "idle":
            found.setdefault((r.host, r.kib), set()).add(r.cell)
    return {host: sorted(cells, key=lambda c: c.baud) for (host, _), cells in sorted(found.items()) if len(cells) >= 3}


def _rates(runs: Sequence[Run]) -> Iterable[str]:
    swept = _swept(runs)
    if not swept:
        return
    rows = []
    for host, cells in swept.items():
        for cell in cells:
            these = [r for r in runs if r.cell == cell and not r.rejected]
            times = spread(seconds(these))
            share = 100 * statistics.median(r.share for r in these)
            rows.append(
                (
                    f"{host}, {cell.kib} KiB",
                    str(cell.baud),
                    str(times.count),
                    f"{times.median:.2f} ({times.least:.2f} to {times.most:.2f})",
                    f"{share:.1f}",
                )
            )
    yield "### Rate by rate, idle\n"
    yield table(("", "baud", "runs", "dialogue s (least to most)", "% of the wire limit"), rows)


def _parts(runs: Sequence[Run], hosts: Mapping[str, str]) -> Iterable[str]:
    yield (
        "Every part is measured by the device, in % of the dialogue, medians of the runs that count; only the remainder is "
        "not. *Framing*: what is no payload of Write or Read Memory: opcodes, addresses, lengths, checksums, ACKs, and "
        "entering. *Device late*: last bytes that the device handed over after their time. *Host*: from there to the host's "
        "next frame, as far as each wait is not above 1 ms: waking up, thinking, writing, and the pty both ways. *Stalls*: "
        "what lies above 1 ms: scheduling, and in the daemon the journal, on disk before the first erase. *Inside frames*: "
        "the wire idle because a host writes a frame in pieces. *Resets*: by a host in the middle of its dialogue.\n"
    )
    kib = _main_kib(runs)
    for baud in sorted({r.baud for r in runs}):
        rows = []
        for condition, name in CONDITIONS.items():
            for host in hosts:
                these = chosen(runs, host, baud, condition, kib=kib)
                if these:
                    shares = [{part: 100 * s / r.dialogue_s for part, s in parts(r).items()} for r in these]
                    # A median of zero that is printed as minus zero is of no use to anybody.
                    medians = [statistics.median(one[part] for one in shares) + 0.0 for part in PARTS]
                    rows.append((f"{host}, {name}", *(f"{round(m, 2) + 0.0:.2f}" for m in medians)))
        if rows:
            yield f"{baud} baud:\n"
            yield table(("", *PARTS), rows)


def _differences(runs: Sequence[Run]) -> Iterable[str]:
    """The same in seconds, against the reference: what a ratio below 1 is made of."""
    rows = []
    for baud in sorted({r.baud for r in runs}):
        for host in OURS:
            ours = chosen(runs, host, baud)
            theirs = chosen(runs, REFERENCE, baud, kib=ours[0].kib) if ours else []
            if theirs:
                mine, other = (
                    {part: statistics.median(parts(r)[part] for r in these) for part in PARTS} for these in (ours, theirs)
                )
                whole = statistics.median(seconds(ours)) - statistics.median(seconds(theirs))
                cells = (f"{round(1000 * (mine[part] - other[part])):+d}" for part in PARTS)
                rows.append((f"{host}, {baud}", f"{round(1000 * whole):+d}", *cells))
    if rows:
        yield (
            f"What ours takes more than {REFERENCE}, idle, in milliseconds of a dialogue (differences of medians). Framing: "
            "ours asks who the part is, how it is protected and how large, and erases sector by sector. Stalls: among them "
            "5 ms of quiet before each list of sectors, so that no stray byte is taken for the acknowledgement of an erase, "
            "and the plan, which is made while the loader waits.\n"
        )
        yield table(("", "dialogue", *PARTS), rows)


def _device(runs: Sequence[Run]) -> str:
    lines = ["How late the device was with the last byte of an answer, medians over the runs that count:\n"]
    rows = []
    for baud in sorted({r.baud for r in runs}):
        for condition, name in CONDITIONS.items():
            these = [r for r in runs if (r.baud, r.condition) == (baud, condition) and not r.rejected]
            if these:
                p50, p99 = (statistics.median(x) for x in ([r.late_p50_us for r in these], [r.late_p99_us for r in these]))
                most = max(r.late_max_s for r in these) * 1e6
                share = statistics.median(100 * r.late_s / r.limit_s for r in these)
                rows.append((f"{baud}, {name}", f"{p50:.0f}", f"{p99:.0f}", f"{most:.0f}", f"{share:.2f}"))
    lines.append(table(("", "p50 µs", "p99 µs", "most µs (any run)", "all together, % of the wire limit"), rows))
    rejected = [r for r in runs if r.rejected]
    lines.append(f"Rejected: {len(rejected)} of {len(runs)} runs." if rejected else f"None of {len(runs)} runs was rejected.")
    for r in rejected:
        lines.append(f"- {r.cell}, {r.dialogue_s:.2f} s: {r.rejected}")
    return "\n".join(lines) + "\n"


def _virtual(exact: Mapping[str, Any], runs: Sequence[Run]) -> str:
    text = (
        "The same session against the simulator in virtual time, where the host costs nothing. These counts are exact, "
        "and they alone are what CI holds; beside them the wall clock of the session process, idle.\n\n"
    )
    rows = []
    for baud, a in exact["flash"].items():
        these = [r for r in chosen(runs, "session", int(baud)) if r.kib == EXACT_KIB]
        wall = f"{statistics.median(r.dialogue_s for r in these):.3f}" if these else "-"
        rows.append(
            (
                f"{baud} baud",
                *(str(a[key]) for key in ("bytes_out", "bytes_in", "turnarounds", "overruns", "timeouts")),
                f"{a['host_s']:g}",
                f"{a['wire_s']:.3f}",
                f"{a['waited_s']:.3f}",
                f"{a['paused_s']:.3f}" if "paused_s" in a else "-",
                f"{a['total_s']:.3f}",
                wall,
            )
        )
    head = (
        "",
        "bytes out",
        "bytes in",
        "turnarounds",
        "overruns",
        "time-outs",
        "host s",
        "wire s",
        "target works s",
        "quiet that is wanted s",
        "whole s",
    )
    again = exact["recheck"]
    firsts = [
        (
            f"{r['chip']}, outside={r['outside']}",
            *(str(r[key]) for key in ("bytes", "image_bytes", "kept_bytes")),
            str(r["bytes"] - r["image_bytes"] - r["kept_bytes"]),
            f"{r['total_s']:.2f}",
        )
        for r in exact["first_flash"]
    ]
    words = (
        "\nA first flash of 200 KiB into an empty part of 1 MiB, 115200 baud, in bytes on the wire. The last of an F407's "
        "sectors that it touches has 56 KiB more: they are kept unless the job says otherwise, and reading is the only way to "
        "know that they are blank.\n\n"
        + table(("", "all", "its blocks, written and read back", "kept, read", "all the rest", "s"), firsts)
        + f"\nA re-check by sample of 256 KiB that are unchanged takes {again['total_s']:.2f} s at 115200 baud: "
        f"{again['bytes']} bytes on the wire, of which {again['compared_bytes']} are content that was compared.\n"
    )
    return text + table((*head, "wall clock: dialogue s"), rows) + words


EXACT_KIB = 256


# --- pictures -----------------------------------------------------------------------------------------------------


def _range(x: float, values: Sequence[float]) -> Point:
    return Point(x, statistics.median(values), min(values), max(values))


def speed_picture(runs: Sequence[Run], hosts: Mapping[str, str]) -> str:
    panels = []
    kib = _main_kib(runs)
    colours = {host: number for number, host in enumerate(hosts)}
    for baud in (921600, 115200):
        series = []
        shown = [c for c in CONDITIONS if any(chosen(runs, h, baud, c, kib=kib) for h in hosts)]
        for host in hosts:
            points = []
            for x, condition in enumerate(shown):
                if these := chosen(runs, host, baud, condition, kib=kib):
                    points.append(_range(x, [100 * r.share for r in these]))
            if points:
                series.append(Series(host, points, line=False, colour=colours[host]))
        names = [CONDITIONS[c] for c in shown]
        panels.append(Panel(f"{kib} KiB at {baud} baud", "", "% of the wire limit", series, names, from_zero=False, most=100.0))
    swept = [
        Series(
            host,
            [_range(cell.baud, [100 * r.share for r in runs if r.cell == cell and not r.rejected]) for cell in cells],
            colour=colours[host],
        )
        for host, cells in _swept(runs).items()
    ]
    panels.append(
        Panel("Rate by rate, idle", "baud", "% of the wire limit", swept, logarithmic=True, from_zero=False, most=100.0)
    )
    many: dict[str, list[Point]] = {}
    for cell in _in_parallel(runs):
        these = [r for r in runs if r.cell == cell and not r.rejected]
        name = f"{cell.host}, {cell.baud} baud, {cell.kib} KiB: the slowest"
        many.setdefault(name, []).append(_range(cell.targets, [r.slowest_s for r in these]))
    panels.append(Panel("Several targets at once", "targets", "s", [Series(n, p) for n, p in many.items()], logarithmic=True))
    return picture(panels) if any(one.points for panel in panels for one in panel.series) else ""


def growth_picture(results: store.Results) -> str:
    exact, growth = results.facts.get("virtual", {}), results.facts.get("cost", {}).get("growth", {})

    def rss(rows: Iterable[Mapping[str, float]], x: str) -> list[Point]:
        return [Point(row[x], row["rss_kib"] / 1024) for row in rows]

    sizes = [Point(row["kib"], row["total_s"]) for row in exact.get("by_size", ())]
    sessions = [Point(row["targets"], row["session_uss_kib"] / 1024) for row in growth.get("by_targets", ())]
    panels = [
        Panel("A flash, 921600 baud (virtual time)", "KiB of image", "s", [Series("session", sizes)]),
        Panel(
            "Memory against connections",
            "connections",
            "MiB",
            [Series("daemon, RSS", rss(growth.get("memory_by_connections", ()), "connections"))],
        ),
        Panel(
            "Memory against targets",
            "targets",
            "MiB",
            [Series("daemon, RSS, idle", rss(growth.get("by_targets", ()), "targets")), Series("each session, USS", sessions)],
        ),
        Panel(
            "Memory against history", "ended jobs", "MiB", [Series("daemon, RSS", rss(growth.get("by_history", ()), "jobs"))]
        ),
        Panel(
            "Memory after an image was parsed",
            "MiB of HEX",
            "MiB",
            [Series("daemon, RSS", rss(growth.get("memory_by_image", ()), "mib"))],
        ),
    ]
    return picture(panels) if any(one.points for panel in panels for one in panel.series) else ""


# --- cost ---------------------------------------------------------------------------------------------------------


def _cost(cost: Mapping[str, Any]) -> str:
    ready, starts = spread(cost["ready_s"]), spread(cost["session_start_s"])
    rows = [
        ("daemon: start to READY=1", f"{ready.median:.2f} s ({ready.least:.2f} to {ready.most:.2f}, {ready.count} starts)"),
        ("daemon, idle: RSS / USS", f"{cost['idle_rss_kib'] / 1024:.1f} / {cost['idle_uss_kib'] / 1024:.1f} MiB"),
        ("daemon, idle, one target: wake-ups", f"{cost['wakeups_per_s']:.1f} a second, {cost['idle_threads']} threads"),
        ("daemon, idle: CPU", f"{100 * cost['idle_cpu_share']:.2f} % of one core"),
        (
            "session: from the request to its first step",
            f"{starts.median:.3f} s ({starts.least:.3f} to {starts.most:.3f}, {starts.count} starts)",
        ),
    ]
    for kib, m in cost["session_memory"].items():
        rows.append((f"session, image of {kib} KiB: RSS / USS", f"{m['rss_kib'] / 1024:.1f} / {m['uss_kib'] / 1024:.1f} MiB"))
    rows += [
        (
            "one flash (921600 baud): CPU of the daemon / of the session",
            f"{cost['job_cpu_daemon_s']:.2f} / {cost['job_cpu_session_s']:.2f} s",
        ),
        (
            "one flash: written by the daemon to disk / to files and sockets",
            f"{cost['job_written_bytes'] / 1024:.0f} / {cost['job_wchar_bytes'] / 1024:.0f} KiB",
        ),
        (
            "staging its image: to disk / to files and sockets",
            f"{cost['stage_written_bytes'] / 1024:.0f} / {cost['stage_wchar_bytes'] / 1024:.0f} KiB",
        ),
    ]
    return table(("", ""), rows)


def _growth(facts: Mapping[str, Any]) -> Iterable[str]:
    if "virtual" in facts:
        rows = [
            (f"{r['kib']} KiB", f"{r['total_s']:.2f}", f"{1000 * r['total_s'] / r['kib']:.1f}")
            for r in facts["virtual"]["by_size"]
        ]
        yield "Seconds against the size of the image (virtual time, 921600 baud, erase not counted): linear.\n"
        yield table(("image", "s", "ms a KiB"), rows)
    if "cost" not in facts:
        return
    growth = facts["cost"]["growth"]
    yield "The daemon with so many targets, idle; and a session while all of them are flashed at once, median:\n"
    yield table(
        ("targets", "RSS MiB", "USS MiB", "start to READY s", "idle CPU, %", "session USS MiB", "session PSS MiB"),
        [
            (
                str(r["targets"]),
                f"{r['rss_kib'] / 1024:.1f}",
                f"{r['uss_kib'] / 1024:.1f}",
                f"{r['ready_s']:.2f}",
                f"{100 * r['idle_cpu_share']:.2f}",
                *(f"{r[key] / 1024:.1f}" if r[key] else "-" for key in ("session_uss_kib", "session_pss_kib")),
            )
            for r in growth["by_targets"]
        ],
    )
    first = growth["memory_by_connections"][0]["rss_kib"]
    rows = []
    for r in growth["memory_by_connections"]:
        each = f"{(r['rss_kib'] - first) / r['connections']:.1f}" if r["connections"] else "-"
        rows.append((str(r["connections"]), f"{r['rss_kib'] / 1024:.1f}", each))
    yield "Memory of the daemon against connections:\n"
    yield table(("connections", "RSS MiB", "KiB each"), rows)
    yield "Memory of the daemon after an Intel HEX file was staged and parsed (the parser is a process of its own):\n"
    yield table(
        ("HEX file", "RSS MiB", "more than before, MiB", "upload s", "upload and parse s"),
        [
            (
                f"{r['mib']} MiB",
                f"{r['rss_kib'] / 1024:.1f}",
                f"{r['more_kib'] / 1024:.1f}",
                f"{r['put_s']:.2f}",
                f"{r['put_and_parse_s']:.2f}",
            )
            for r in growth["memory_by_image"]
        ],
    )
    yield "Ended jobs in the journal:\n"
    yield table(
        ("jobs", "RSS MiB", "start to READY s", "JOBS limit=50, ms", "journal KiB"),
        [
            (
                str(r["jobs"]),
                f"{r['rss_kib'] / 1024:.1f}",
                f"{r['ready_s']:.2f}",
                f"{r['list_ms']:.1f}",
                f"{r['journal_kib']:.0f}",
            )
            for r in growth["by_history"]
        ],
    )
