"""The firmware images that come with bridged: one small real application for each of three chips.

They are for the demo, for tests and for anybody who wants to try a flash without firmware of his own. The ELFs beside
their C sources in ``firmware/`` are built from them bit for bit (``make firmware-check``); ``manifest.json`` says what each
one is. This module only finds and checks them; it does not know ELF.

They were run in an emulated Cortex-M with a model of the USART, never on silicon.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

FIRMWARE = Path(__file__).parent / "firmware"


@dataclass(frozen=True, slots=True)
class DemoImage:
    """One image. ``load_bytes``: from the first to behind the last byte in flash; ``banner``: what it prints first."""

    chip: str
    path: Path
    sha256: str
    size_bytes: int
    load_address: int
    load_bytes: int
    entry: int
    banner: str

    def read(self) -> bytes:
        """The ELF. Raises ``ValueError`` when the file is not the one that the manifest describes."""
        content = self.path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ValueError(f"{self.path}: SHA-256 differs from the manifest; the installation is damaged")
        return content


def demo_images() -> tuple[DemoImage, ...]:
    """All images of the manifest, in its order."""
    manifest = json.loads((FIRMWARE / "manifest.json").read_text())
    return tuple(DemoImage(path=FIRMWARE / str(entry.pop("file")), **entry) for entry in manifest["images"])


def demo_image(chip: str) -> DemoImage:
    """The image for ``chip`` (``F756``). Raises ``KeyError`` where there is none."""
    return {image.chip: image for image in demo_images()}[chip]
