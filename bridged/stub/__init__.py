"""The second-stage loader as it is shipped, and how its context block is written.

``stub.c`` is its source, ``stub.bin`` the built code (``make stub``; ``make stub-check`` compares), ``stub.map`` and
``manifest.json`` say what is in it. One position-independent binary for every Cortex-M; what is particular to a part is in the
context block before it, which ``Context`` packs field by field in the order of ``stub.h``.

This room knows no chip: registers, bits and addresses come from ``chips.second_stage``, by way of ``target``. It knows no frame
either; the wire is ``protocol.stub``. It imports nothing of ours, so that a session process stays small.

Never tried on silicon. Its proof is emulation (tests/stub).
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

CODE_OFFSET = 0x2A0  # stub.h
CODE_LIMIT_BYTES = 3072
STACK_BYTES = 512
POKES_MAX = 32
PROTOCOL = 1

# Words that the loader itself writes; the host sends zeros. "train" is first in the greeting's measured values.
STATE_FIELDS = (
    *("expected", "reason", "where", "detail", "stopped", "frames", "bad_frames", "bad_headers", "gaps", "pauses"),
    *("rejected", "taken", "written", "read", "crc", "time", "tick", "waiting", "since", "old_brr"),
)
# All words before the pokes, in the order of ``struct context``; a test compares them with stub.h.
FIELDS = (
    *("stack", "entry", "protocol", "build_0", "build_1", "ring_mask", "block_max", "train", "brr", "cpuid", "ccr"),
    *STATE_FIELDS,
    *("usart_status", "usart_data", "usart_cr1", "usart_brr", "cr1_off", "cr1_on", "watchdog", "rx_input", "rx_mask"),
    *("inlet", "inlet_mask", "ring", "remaining", "block", "table", "byte_limit", "greet_every", "confirm_within"),
    *("flash_start", "flash_end", "flash_base", "bank2_start", "bank2_step"),
    *("key_at", "status_at", "control_at", "clear_at", "address_at"),
    *("busy", "errors", "clear", "lock", "program", "erase", "start", "sector_shift", "unit", "width", "poke_count"),
)


@dataclass(frozen=True, slots=True)
class Code:
    """The code and its manifest. ``build``: the first 8 bytes of its SHA-256, which the running loader repeats."""

    code: bytes
    sha256: str

    @property
    def build(self) -> bytes:
        return bytes.fromhex(self.sha256)[:8]


@dataclass(frozen=True, slots=True)
class Poke:
    """``register = (register & keep) | value``; with ``wait`` instead: until ``register & keep == value``."""

    address: int
    keep: int
    value: int
    wait: bool = False

    def words(self) -> tuple[int, int, int]:
        return self.address | self.wait, self.keep, self.value


def load() -> Code:
    """The shipped code. Raises ``ValueError`` when it is not the one that the manifest describes."""
    here = Path(__file__).parent
    manifest = json.loads((here / "manifest.json").read_text())
    content = (here / manifest["file"]).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != manifest["sha256"]:
        raise ValueError(f"{here / manifest['file']}: SHA-256 differs from the manifest; the installation is damaged")
    return Code(content, digest)


def image(code: Code, address: int, fields: dict[str, int], pokes: tuple[Poke, ...]) -> bytes:
    """What is written to ``address`` and started there: the context block and the code.

    ``fields``: every field that is neither the loader's own nor computed here. Raises ``ValueError`` for one too many, one too
    few, or a value that does not fit.
    """
    if len(pokes) > POKES_MAX:
        raise ValueError(f"{len(pokes)} pokes, at most {POKES_MAX}")
    if address % 4:
        raise ValueError(f"{address:#x} is not a multiple of 4")
    first, second = struct.unpack("<II", code.build)
    words = dict.fromkeys((*STATE_FIELDS, "train", "cpuid", "ccr"), 0) | {
        "entry": address + CODE_OFFSET | 1,
        "protocol": PROTOCOL,
        "build_0": first,
        "build_1": second,
        "poke_count": len(pokes),
    }
    wanted = set(FIELDS) - set(words)
    if set(fields) != wanted:
        raise ValueError(f"fields missing or unknown: {', '.join(sorted(wanted ^ set(fields)))}")
    words |= fields
    try:
        block = struct.pack(f"<{len(FIELDS)}I", *(words[name] for name in FIELDS))
        block += b"".join(struct.pack("<III", *poke.words()) for poke in pokes)
    except struct.error as error:
        raise ValueError(f"a field does not fit into 32 bits: {error}") from error
    return block.ljust(CODE_OFFSET, b"\0") + code.code
