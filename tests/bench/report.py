"""docs/benchmarks.md, written from the results. The targets stand here, before the figures; a miss is printed as a miss."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.bench.figures import LATE_ONCE_S, LATE_SHARE, OTHERS_CORES, Run, Verdict, at_least, at_most, ratio, spread

# The targets, as they were stated before anything was measured.
WIRE_SHARE_115200 = 97.0  # %
RATE_115200 = 0.98  # of stm32flash
RATE_921600 = 1.0
LOADED_LOSS = 2.0  # %, beyond the spread of the idle runs
DAEMON_RSS_MIB = 45.0
SESSION_USS_MIB = 10.0
READY_S = 1.0
WAKEUPS_HZ = 5.0
ENOUGH_RUNS = 7

OURS = ("session", "daemon")
REFERENCE = "stm32flash"

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
- *idle*: the daemon runs and does nothing. *Loaded*: 50 clients poll it with 500 requests/s in total, and one uploads 1 MiB
  of Intel HEX after the other and has it parsed. The load is there for foreign hosts too; all of it runs on this machine.
- A run does not count, and is made again, when the device was late with the last bytes of its answers by more than
  {late:.0%} of the wire limit in all or by more than {once:.0f} ms once, when others than the benchmark kept more than
  {others:g} cores busy, or when a host failed.
- The session process of bridged asks for real-time priority, as the installed service allows it; the other hosts are started as
  their manuals say, stm32flash also with that same priority. The device has real-time priority for all.
- Intervals of ratios: 95 %, bootstrap over the runs.
"""


def page(results: Mapping[str, Any], hosts: Mapping[str, str]) -> str:
    runs = [Run(**r) for r in results.get("runs", ())]
    parts = [
        FRAME.format(size=results.get("size_bytes", 0) // 1024, late=LATE_SHARE, once=LATE_ONCE_S * 1000, others=OTHERS_CORES)
    ]
    parts += ["## Machine\n", _machine(results, runs)]
    parts += ["## Targets\n", _verdicts(verdicts(results, runs), is_a_look(runs))]
    if runs:
        parts += ["## Speed\n", *_speed(runs, hosts)]
        parts += ["## The device and the rejected runs\n", _device(runs)]
    if "virtual" in results:
        parts += ["## The exact account\n", _virtual(results["virtual"], runs)]
    if "cost" in results:
        parts += ["## Cost\n", _cost(results["cost"]), "## Growth\n", *_growth(results["cost"]["growth"])]
    return "\n".join(parts).rstrip() + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Numbers to the right, the first column to the left."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def chosen(runs: Iterable[Run], host: str, baud: int, loaded: bool) -> list[Run]:
    return [r for r in runs if (r.host, r.baud, r.loaded) == (host, baud, loaded) and not r.rejected]


def _machine(results: Mapping[str, Any], runs: Sequence[Run]) -> str:
    lines = [f"- {name}: {value}" for name, value in results.get("machine", {}).items()]
    if runs:
        count = min(len(chosen(runs, *cell)) for cell in {(r.host, r.baud, r.loaded) for r in runs})
        lines.append(f"- runs that count: at least {count} of each host in each condition")
        others = [r.others_cores for r in runs if not r.rejected]
        lines.append(
            f"- others on the machine meanwhile: {statistics.median(others):.2f} cores busy (median), {max(others):.2f} at most"
        )
        if max(others) > OTHERS_CORES:
            lines.append("- **measured on a machine that others kept busy: the conditions called idle were not**")
        if count < ENOUGH_RUNS:
            lines.append(f"- **fewer than {ENOUGH_RUNS} runs: a look, not a measurement**")
    return "\n".join(lines) + "\n"


# --- targets ------------------------------------------------------------------------------------------------------


def verdicts(results: Mapping[str, Any], runs: Sequence[Run]) -> list[Verdict]:
    found: list[Verdict] = []
    for host in OURS:
        shares = [100 * r.share for r in chosen(runs, host, 115200, False)]
        share = statistics.median(shares) if shares else None
        found.append(at_least(f"{host}, 115200, idle: share of the wire limit", WIRE_SHARE_115200, share, " %"))
        for baud, wanted in ((115200, RATE_115200), (921600, RATE_921600)):
            found.append(_rate(runs, host, baud, wanted))
        for baud in (115200, 921600):
            found.append(_loss(runs, host, baud))
    if runs:
        overruns = sum(r.overruns for r in runs if r.host in OURS)
        found.append(at_most("bytes that ours sent too early, all runs", 0, float(overruns)))
    cost = results.get("cost", {})
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


def _rate(runs: Sequence[Run], host: str, baud: int, wanted: float) -> Verdict:
    ours, theirs = chosen(runs, host, baud, False), chosen(runs, REFERENCE, baud, False)
    text = f"{host}, {baud}, idle: rate against {REFERENCE}"
    if not ours or not theirs:
        return at_least(text, wanted, None)
    found = ratio([r.dialogue_s for r in theirs], [r.dialogue_s for r in ours])
    return at_least(text, wanted, found.value, shown=f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})")


def _loss(runs: Sequence[Run], host: str, baud: int) -> Verdict:
    idle, loaded = chosen(runs, host, baud, False), chosen(runs, host, baud, True)
    text = f"{host}, {baud}: lost under load, beyond the spread of the idle runs"
    if not idle or not loaded:
        return at_most(text, LOADED_LOSS, None, " %")
    calm = spread([r.dialogue_s for r in idle])
    lost = 100 * (spread([r.dialogue_s for r in loaded]).median - calm.median - calm.middle) / calm.median
    return at_most(text, LOADED_LOSS, max(0.0, lost), " %")


def _verdicts(found: Sequence[Verdict], looks: bool) -> str:
    names = {True: "met" + " (a look)" * looks, False: "**missed**" + " (a look)" * looks, None: "-"}
    return table(("target", "stated", "measured", ""), [(v.text, v.wanted, v.found, names[v.met]) for v in found])


def is_a_look(runs: Sequence[Run]) -> bool:
    """Too few runs, or too much else on the machine, for a verdict to be one."""
    counted = [r for r in runs if not r.rejected]
    fewest = min((len(chosen(runs, *cell)) for cell in {(r.host, r.baud, r.loaded) for r in runs}), default=ENOUGH_RUNS)
    return fewest < ENOUGH_RUNS or any(r.others_cores > OTHERS_CORES for r in counted)


# --- speed --------------------------------------------------------------------------------------------------------


def _speed(runs: Sequence[Run], hosts: Mapping[str, str]) -> Iterable[str]:
    for baud in sorted({r.baud for r in runs}):
        for loaded in (False, True):
            rows: list[tuple[str, ...]] = []
            reference = [r.dialogue_s for r in chosen(runs, REFERENCE, baud, loaded)]
            for host, title in hosts.items():
                these = chosen(runs, host, baud, loaded)
                if these:
                    rows.append(_speed_row(title, these, reference))
            if rows:
                yield f"### {baud} baud, {'loaded' if loaded else 'idle'}\n"
                yield table(SPEED_HEAD, rows)
                yield from _load_note(runs, baud, loaded)


def _speed_row(title: str, these: Sequence[Run], reference: Sequence[float]) -> tuple[str, ...]:
    times = spread([r.dialogue_s for r in these])
    against = ratio(reference, [r.dialogue_s for r in these]) if reference else None
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


def _load_note(runs: Sequence[Run], baud: int, loaded: bool) -> Iterable[str]:
    with_load = [r for r in runs if r.loaded and r.baud == baud and not r.rejected]
    if loaded and with_load:
        rate = statistics.median(r.request_hz for r in with_load)
        late = statistics.median(r.request_p99_ms for r in with_load)
        files = statistics.median(r.uploads / r.wall_s for r in with_load)
        yield f"Load, medians: {rate:.0f} requests/s answered, 99 % of them within {late:.0f} ms; {files:.2f} HEX files/s.\n"


def _device(runs: Sequence[Run]) -> str:
    lines = ["How late the device was with the last byte of an answer, medians over the runs that count:\n"]
    rows = []
    for baud in sorted({r.baud for r in runs}):
        for loaded in (False, True):
            these = [r for r in runs if (r.baud, r.loaded) == (baud, loaded) and not r.rejected]
            if these:
                p50, p99 = (statistics.median(x) for x in ([r.late_p50_us for r in these], [r.late_p99_us for r in these]))
                most = max(r.late_max_s for r in these) * 1e6
                share = statistics.median(100 * r.late_s / r.limit_s for r in these)
                rows.append(
                    (f"{baud}, {'loaded' if loaded else 'idle'}", f"{p50:.0f}", f"{p99:.0f}", f"{most:.0f}", f"{share:.2f}")
                )
    lines.append(table(("", "p50 µs", "p99 µs", "most µs (any run)", "all together, % of the wire limit"), rows))
    rejected = [r for r in runs if r.rejected]
    lines.append(f"Rejected: {len(rejected)} of {len(runs)} runs." if rejected else f"None of {len(runs)} runs was rejected.")
    for r in rejected:
        lines.append(f"- {r.host}, {r.baud}, {'loaded' if r.loaded else 'idle'}, {r.dialogue_s:.2f} s: {r.rejected}")
    return "\n".join(lines) + "\n"


def _virtual(account: Mapping[str, Any], runs: Sequence[Run]) -> str:
    text = (
        "The same session against the simulator in virtual time, where the host costs nothing. These counts are exact, "
        "and they alone are what CI holds; beside them the wall clock of the session process, idle.\n\n"
    )
    rows = []
    for baud, a in account.items():
        these = chosen(runs, "session", int(baud), False)
        wall = f"{statistics.median(r.dialogue_s for r in these):.3f}" if these else "-"
        rows.append(
            (
                f"{baud} baud",
                *(str(a[key]) for key in ("bytes_out", "bytes_in", "turnarounds", "overruns", "timeouts")),
                f"{a['host_s']:g}",
                f"{a['wire_s']:.3f}",
                f"{a['waited_s']:.3f}",
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
        "whole s",
    )
    return text + table((*head, "wall clock: dialogue s"), rows)


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


def _growth(growth: Mapping[str, Any]) -> Iterable[str]:
    rows = [
        (f"{r['kib']} KiB", f"{r['total_s']:.2f}", f"{1000 * r['total_s'] / r['kib']:.1f}") for r in growth["seconds_by_size"]
    ]
    yield "Seconds against the size of the image (virtual time, 921600 baud, erase not counted): linear.\n"
    yield table(("image", "s", "ms a KiB"), rows)
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
