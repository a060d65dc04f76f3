"""Runs the targets under atheris, guided by coverage: ``python -m tests.fuzz.run [--seconds N] [--target NAME ...]``.

Each target runs in a process of its own, as many at once as ``--jobs`` says, for its share of the time. What the fuzzer learns
stays in ``.cache/fuzz/<target>`` and is where the next run goes on; an input that breaks something is saved in
``.cache/fuzz/crashes/<target>-…`` and printed with the command that repeats it. Exit code 1 when there was one.

``--keep`` puts the few inputs that add coverage to the committed corpus into it (small ones only).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
CACHE = Path(__file__).parent.parent.parent / ".cache" / "fuzz"
CRASHES = CACHE / "crashes"
RSS_LIMIT_MIB = 1024
INPUT_LIMIT_S = 20  # One input; most take microseconds, a session on a bad wire up to a second under instrumentation.
KEEP_BYTES = 1024  # Of one input that is taken into the repository, and at most so many new ones of a target.
KEEP_COUNT = 12
REMEDY = "atheris has wheels for Python 3.11 to 3.13 on x86-64 Linux only: there, make distclean && make PYTHON=python3.11 fuzz"


def one(target: str, arguments: list[str]) -> int:
    """In the process of one target: hand over to libFuzzer, which ends the process."""
    import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

    with atheris.instrument_imports(include=["bridged"]):
        from tests.fuzz.targets import TARGETS

    wanted = TARGETS[target]
    atheris.Setup([sys.argv[0], f"-max_len={wanted.max_bytes}", *arguments], wanted.run)
    atheris.Fuzz()
    return 0


def fuzz(target: str, seconds: float) -> bool:
    """Run one target; True when nothing was found."""
    learnt = CACHE / target
    learnt.mkdir(parents=True, exist_ok=True)
    CRASHES.mkdir(parents=True, exist_ok=True)
    before = _findings(target)
    done = _start(
        target,
        f"-max_total_time={max(1, round(seconds))}",
        f"-timeout={INPUT_LIMIT_S}",
        f"-rss_limit_mb={RSS_LIMIT_MIB}",
        f"-artifact_prefix={CRASHES}/{target}-",
        f"-report_slow_units={INPUT_LIMIT_S}",
        "-print_final_stats=1",
        "-verbosity=0",
        str(learnt),
        str(CORPUS / target),
    )
    found = sorted(_findings(target) - before)
    runs = next((text.split()[-1] for text in done.stderr.splitlines() if "number_of_executed_units" in text), "?")
    print(f"{target:18} {runs:>9} inputs, {len(list(learnt.iterdir()))} kept", flush=True)
    if done.returncode or found:
        print(done.stdout[-8000:], *[text for text in done.stderr.splitlines() if "INFO" not in text][-20:], sep="\n")
        for path in found:
            print(f"  repeat: python -m tests.fuzz.run --repeat {path.relative_to(Path.cwd())} --target {target}", flush=True)
        return False
    return True


def _findings(target: str) -> set[Path]:
    return {path for kind in ("crash", "timeout", "oom", "leak") for path in CRASHES.glob(f"{target}-{kind}-*")}


def keep(target: str) -> None:
    """Take a few of what was learnt into the corpus. Each of them added coverage when it was found."""
    there = {path.read_bytes() for path in (CORPUS / target).iterdir()}
    learnt = sorted((CACHE / target).iterdir(), key=lambda path: (path.stat().st_size, path.name))
    new = [path for path in learnt if 0 < path.stat().st_size <= KEEP_BYTES and path.read_bytes() not in there]
    # Spread over their sizes: the smallest alone would all be of the first check of a parser.
    for path in new[:: max(1, len(new) // KEEP_COUNT)][:KEEP_COUNT]:
        shutil.copy(path, CORPUS / target / path.name[:16])


def _start(target: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz.run", "--inside", target, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def main() -> int:
    if sys.argv[1:2] == ["--inside"]:
        return one(sys.argv[2], sys.argv[3:])
    from tests.fuzz.targets import TARGETS

    options = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description="Coverage-guided fuzzing, bounded in time.")
    options.add_argument("--seconds", type=float, default=60.0, help="for all targets together, by the clock (default 60)")
    options.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this one; may be repeated")
    options.add_argument("--jobs", type=int, default=2, help="processes at once (default 2)")
    options.add_argument("--keep", action="store_true", help="afterwards take what adds coverage into the corpus")
    options.add_argument("--repeat", type=Path, help="run one input, without the fuzzer")
    asked = options.parse_args()
    names: list[str] = asked.target or list(TARGETS)
    if asked.repeat:
        TARGETS[names[0]].run(asked.repeat.read_bytes())
        print("no finding (any more)")
        return 0
    try:
        import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: F401
    except ImportError:
        print(f"skipped: {REMEDY}", file=sys.stderr)
        return 0
    each_s = asked.seconds * min(asked.jobs, len(names)) / sum(TARGETS[name].weight for name in names)
    begun = time.monotonic()
    with ThreadPoolExecutor(asked.jobs) as pool:
        good = list(pool.map(lambda name: fuzz(name, each_s * TARGETS[name].weight), names))
        if asked.keep:
            list(pool.map(keep, names))
    print(f"{len(names)} targets, {good.count(False)} with findings, {time.monotonic() - begun:.0f} s")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
