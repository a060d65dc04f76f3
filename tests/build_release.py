"""``make release``: the sdist and the wheel, built twice and compared bit for bit; ``python -m tests.build_release``.

The second build has nothing of the first but the bytes of its sdist: another directory, another umask, another time zone and
locale, no history of git. What differs in spite of that would differ on every machine. All times in both files are
SOURCE_DATE_EPOCH, by default that of the last commit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {"TZ": "Pacific/Kiritimati", "LC_ALL": "C", "PYTHONHASHSEED": "7"}


def epoch() -> str:
    """When the last commit was made; without a history the day on which hatchling's own default stands."""
    said = os.environ.get("SOURCE_DATE_EPOCH", "")
    if said or not (ROOT / ".git").exists():
        return said or "1580601600"
    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def build(source: Path, out: Path, when: str, environment: dict[str, str] | None = None, umask: int = 0o022) -> dict[str, str]:
    """The sdist, and the wheel of that; file name to SHA-256."""
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **(environment or {}), "SOURCE_DATE_EPOCH": when},
        umask=umask,
    )
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def twice(work: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Both builds; the files of the first are in ``work/first``."""
    when = epoch()
    first = build(ROOT, work / "first", when)
    (sdist,) = (work / "first").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "source", filter="data")
    (source,) = (work / "source").iterdir()
    return first, build(source, work / "second", when, ELSEWHERE, 0o077)


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.build_release", description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--out", type=Path, default=ROOT / "dist")
    out: Path = arguments.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        first, second = twice(Path(folder))
        if first != second:
            print("the second build differs from the first one:", file=sys.stderr)
            print(
                "\n".join(f"  {name}" for name in sorted(first | second) if first.get(name) != second.get(name)),
                file=sys.stderr,
            )
            return 1
        out.mkdir(parents=True, exist_ok=True)
        for name in first:
            shutil.copy(Path(folder) / "first" / name, out / name)
    print("\n".join(f"{digest}  {name}" for name, digest in first.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
