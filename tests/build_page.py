"""The terminal of the web page: xterm.js, fetched through npm, fitted to a strict Content-Security-Policy, and written into the
package: ``python -m tests.build_page [--check]``.

What is committed is what is served: installing needs neither npm nor a network. The versions and the digests of the packages
are pinned. Three places of xterm.js make styles in a way that a policy without ``unsafe-inline`` forbids; each is replaced by
the same through the CSS object model, and the build fails when one of them is not where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "bridged" / "api" / "page"


@dataclass(frozen=True, slots=True)
class Package:
    """``sha256`` of the archive; ``files``: path inside it to the name here."""

    name: str
    version: str
    sha256: str
    files: tuple[tuple[str, str], ...]


PACKAGES = (
    Package(
        "@xterm/xterm",
        "5.5.0",
        "bd954fa721872170188cc5d7e83e88db3c83c9a18a4e8d24c2783d26491f59d2",
        (("lib/xterm.js", "xterm.js"), ("css/xterm.css", "xterm.css"), ("LICENSE", "xterm.LICENSE.txt")),
    ),
    Package(
        "@xterm/addon-fit",
        "0.11.0",
        "26003b4517a132b64e4ff228fd88a5fda3fff5e606c76093f6dcff772e9ecec0",
        (("lib/addon-fit.js", "xterm-fit.js"),),
    ),
)
# What is there, how often, and what takes its place. ``bridgedStyle`` is in console.js.
FITTED = (
    ('this._document.createElement("style")', 2, "globalThis.bridgedStyle(this._document)"),
    (
        '_addStyle(e,t){e.setAttribute("style",`${e.getAttribute("style")||""}${t};`)}',
        1,
        "_addStyle(e,t){e.style.cssText+=`${t};`}",
    ),
)


def built() -> dict[str, bytes]:
    """Name to content. Raises ``RuntimeError`` where a package is not what is pinned, or cannot be fitted."""
    found: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        for package in PACKAGES:
            spec = f"{package.name}@{package.version}"
            done = subprocess.run(
                ["npm", "pack", "--silent", spec], cwd=folder, capture_output=True, text=True, timeout=100, check=False
            )
            if done.returncode:
                raise RuntimeError(f"npm pack {spec}: {done.stderr.strip()[-300:]}")
            archive = Path(folder, done.stdout.split()[-1])
            digest = hashlib.sha256(archive.read_bytes()).hexdigest()
            if digest != package.sha256:
                raise RuntimeError(f"{spec} has SHA-256 {digest}, pinned is {package.sha256}")
            with tarfile.open(archive) as tar:
                for inside, name in package.files:
                    member = tar.extractfile(f"package/{inside}")
                    if member is None:
                        raise RuntimeError(f"{spec} has no {inside}")
                    found[name] = member.read()
    found["xterm.js"] = fitted(found["xterm.js"].decode()).encode()
    found["xterm-fit.js"] = without_map(found["xterm-fit.js"].decode()).encode()
    return found


def fitted(text: str) -> str:
    for old, count, new in FITTED:
        if text.count(old) != count:
            raise RuntimeError(f"xterm.js has {old[:60]!r} {text.count(old)} times, {count} were expected")
        text = text.replace(old, new)
    return without_map(text)


def without_map(text: str) -> str:
    """The source map is not served."""
    head, mark, _ = text.rpartition("\n//# sourceMappingURL=")
    return (head if mark else text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.build_page", description="Write the terminal of the web page.")
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    check = parser.parse_args().check
    if shutil.which("npm") is None:
        print("npm is missing: apt install npm", file=sys.stderr)
        return 1
    files = built()
    stale = [name for name, data in files.items() if not (PAGE / name).exists() or (PAGE / name).read_bytes() != data]
    if check:
        print("\n".join(f"bridged/api/page/{name} is not what is built" for name in stale) or "page: as it is built")
        return 1 if stale else 0
    for name, data in files.items():
        (PAGE / name).write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
