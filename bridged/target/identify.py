"""Finding out what answered: the real flash, the loader's version, the layout of the sectors, as far as the chip tells.

``identify`` gives a ``Known``, which everything that touches flash takes. What decides about the erase (product id, flash size,
option bits) is read until two readings agree, since an answer of the loader has no checksum: a flipped bit must not choose the
layout of another part. Flows without I/O.

Documents: AN2606 (loader versions, flash size registers), the rows of ``chips`` for addresses.
"""

from __future__ import annotations

from dataclasses import dataclass

from bridged.chips.model import Chip, FlashMap, Layout, OptionField, Quirk
from bridged.errors import LayoutUnknown, Nack, ReadProtected
from bridged.events import Identified, Warned
from bridged.protocol.flow import Flow, Report
from bridged.target.dialogue import Dialogue
from bridged.target.request import Request, Result

REFUSED = 2  # NACKs to its address until a register counts as forbidden: one may be an accident.


@dataclass(frozen=True, slots=True)
class Known:
    """A chip whose real flash is known, as far as it tells. ``flash`` is None where its layout is unsure.

    ``protected``: readout protection keeps the loader from reading anything.
    """

    chip: Chip
    line: Dialogue
    loader_id: int | None
    flash: FlashMap | None
    why_no_flash: str
    protected: bool = False

    def flash_map(self) -> FlashMap:
        """Raises ``LayoutUnknown``."""
        if self.flash is None:
            raise LayoutUnknown(self.why_no_flash or f"{self.chip.title}: layout unknown", pid=self.chip.pid)
        return self.flash


def _register(chip: Chip, address: int, count: int, line: Dialogue) -> Flow[bytes]:
    """``count`` bytes of a register or option word.

    Some loaders refuse short reads there and give the surrounding block (a report about F4 and L0). A NACK at the opcode
    means that reading is forbidden altogether.
    """
    before = line.recoveries
    try:
        return (yield from line.read_twice(address, count, nacks=REFUSED))
    except Nack as error:
        if before:
            yield from line.prove(error)  # There were accidents before: this may be one more, and decide what is erased.
        if error.facts.get("stage") == "opcode":
            raise ReadProtected(
                f"{chip.title}: Read Memory is refused, while Get and Get ID were answered", pid=chip.pid
            ) from error
        if chip.has(Quirk.NO_NACK_ON_BAD_ADDRESS, None):
            raise
        block = address // chip.read_max_bytes * chip.read_max_bytes
        data = yield from line.read_twice(block, chip.read_max_bytes, nacks=REFUSED)
        return data[address - block : address - block + count]


def try_register(chip: Chip, address: int | None, count: int, line: Dialogue) -> Flow[bytes]:
    """The same, or nothing where the loader does not allow it; protection is still an error."""
    if address is None:
        return b""
    try:
        return (yield from _register(chip, address, count, line))
    except Nack:
        return b""


def identify(request: Request, line: Dialogue, chip: Chip, result: Result) -> Flow[Known]:
    """Raises ``ReadProtected`` unless that is all that the job wants to know, ``UnstableLink`` when no two readings agree."""
    yield from line.confirm()
    result.family, result.names, result.loader = chip.family, "/".join(chip.names), line.loader.version_text
    try:
        size = yield from try_register(chip, chip.flash_size_register, 2, line)
        uid = yield from try_register(chip, chip.uid_address, 12, line)
        version = yield from try_register(chip, chip.loader_id_address, 1, line)
    except ReadProtected:
        if request.kind not in ("identify", "doctor", "protect", "unprotect"):
            raise
        result.protected = True
        yield Report(Warned("READ_PROTECTED", "readout protection is on: Read Memory is refused"))
        size = uid = version = b""
    result.uid = uid.hex()
    result.loader_id = version[0] if version else None
    stated, no_size = request.flash_bytes, "its flash size could not be read"
    result.flash_bytes = chip.flash_bytes_of(int.from_bytes(size, "little")) if len(size) == 2 else 0
    if not result.flash_bytes:
        result.flash_bytes = stated
        if len(size) == 2:
            no_size = f"its flash size register holds {size[1]:02x}{size[0]:02x}, which is no size of this chip"
        if len(size) == 2 and stated:
            yield Report(Warned("FLASH_SIZE", f"{no_size}; the {stated // 1024} KiB of the configuration are believed"))
    elif stated and stated != result.flash_bytes:
        text = (
            f"the chip says {result.flash_bytes // 1024} KiB of flash, the configuration {stated // 1024}; the chip is believed"
        )
        yield Report(Warned("FLASH_SIZE", text))
    flash: FlashMap | None = None
    why = ""
    try:
        if not result.flash_bytes and not chip.foreign:
            raise LayoutUnknown(f"{chip.title}: {no_size}; state `flash_kib`", pid=chip.pid)
        layout = yield from _choose_layout(request, chip, result.flash_bytes, line)
        flash = chip.flash_map(result.flash_bytes, layout.name)
        result.layout = layout.name
    except (LayoutUnknown, ReadProtected) as error:
        why = error.message
    yield Report(
        Identified(
            pid=chip.pid,
            family=chip.family,
            names=result.names,
            loader=result.loader,
            loader_id=result.loader_id,
            flash_bytes=result.flash_bytes,
            uid=result.uid,
            layout=result.layout,
            protected=result.protected,
        )
    )
    return Known(chip, line, result.loader_id, flash, why, result.protected)


def _choose_layout(request: Request, chip: Chip, flash_bytes: int, line: Dialogue) -> Flow[Layout]:
    """The layout that the configuration states, else the one that option bits select, else the only one there is."""
    if chip.foreign:
        raise LayoutUnknown(f"{chip.title} is identified and read only: {chip.foreign}", pid=chip.pid)
    found = chip.layouts_for(flash_bytes)
    names = ", ".join(lay.name for lay in found) or "none"
    if request.layout:
        for lay in found:
            if lay.name == request.layout:
                return lay
        raise LayoutUnknown(
            f"{chip.title}: no layout {request.layout!r} with {flash_bytes // 1024} KiB; there are: {names}", pid=chip.pid
        )
    if not chip.layout_confirmed or not found:
        raise LayoutUnknown(
            f"{chip.title}: the sources for its sector layout are unsure; it is identified and read only until `layout` "
            f"states one of: {names}",
            pid=chip.pid,
        )
    default: Layout | None = None
    for lay in found:
        if lay.when is None:
            default = default or lay
            continue
        option, value = lay.when
        word = yield from read_option(chip, option, line)
        if word is None:
            raise LayoutUnknown(
                f"{chip.title}: {option.name} at {option.address:#010x} decides the layout and cannot be read; state "
                f"`layout` as one of: {names}",
                pid=chip.pid,
                option=option.name,
            )
        if option.value(word) == value:
            default = lay
            break
    if default is None or not default.confirmed:
        raise LayoutUnknown(
            f"{chip.title}: the numbering of its sectors at {flash_bytes // 1024} KiB is not sure; state `layout` as one "
            f"of: {names}",
            pid=chip.pid,
        )
    return default


def read_option(chip: Chip, option: OptionField, line: Dialogue) -> Flow[int | None]:
    data = yield from try_register(chip, option.address, 4, line)
    return int.from_bytes(data, "little") if len(data) == 4 else None
