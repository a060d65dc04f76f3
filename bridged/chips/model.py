"""The shape of what we know about one STM32: plain frozen data, and the few computations over it.

The rows are in the ``table_*`` modules beside this file; a new chip or quirk is a row there and never a change of an
algorithm. Every field of a row has a provenance (document and confidence). A part whose flash layout is unsure
(``layout_confirmed`` False) can be identified and read, but it is erased or written only when the target's configuration
states the layout.

Words: a *sector* is whatever unit the erase command counts, also where ST calls it a page; its *code* is the number that
0x43/0x44 take for it. Addresses and sizes are in bytes, times in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from bridged.errors import LayoutUnknown, Unsupported

LEAST_FLASH_BYTES = 8 * 1024  # of the smallest part (L010x3, L011x3)


class Confidence(StrEnum):
    """How well a fact is known. Nothing here was tried on silicon by this project."""

    READ = "read"  # read in ST's document named as the source
    AGREED = "agreed"  # several public tables agree
    MEMORY = "memory"  # remembered, not read: be generous around it
    UNSURE = "unsure"  # sources disagree or are silent
    SILICON = "silicon"  # somebody ran it on a real part and reported it


@dataclass(frozen=True, slots=True)
class Provenance:
    source: str
    confidence: Confidence


@dataclass(frozen=True, slots=True)
class Range:
    """Addresses ``start`` up to, and not including, ``end``."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1 << 32:
            raise ValueError(f"not a range: {self.start:#x}..{self.end:#x}")

    @property
    def size(self) -> int:
        return self.end - self.start

    def __contains__(self, address: object) -> bool:
        return isinstance(address, int) and self.start <= address < self.end

    def covers(self, start: int, end: int) -> bool:
        return self.start <= start and end <= self.end


@dataclass(frozen=True, slots=True)
class Sector:
    """One erasable unit. ``erase_max_s`` is the worst case of one erase as far as known, without any safety factor."""

    code: int
    address: int
    size_bytes: int
    bank: int
    erase_typ_s: float
    erase_max_s: float

    @property
    def end(self) -> int:
        return self.address + self.size_bytes

    @property
    def range(self) -> Range:
        return Range(self.address, self.end)


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` sectors of ``size_bytes`` each; ``count`` 0 repeats to the end of the bank."""

    count: int
    size_bytes: int
    erase_typ_s: float
    erase_max_s: float


@dataclass(frozen=True, slots=True)
class BankSpec:
    """One bank of a layout.

    ``offset`` from the flash base in bytes, or None: right after the bank before. ``size_bytes`` None: an equal share of the
    flash. ``first_code`` None: numbering goes on after the bank before.
    """

    runs: tuple[Run, ...]
    offset: int | None = None
    size_bytes: int | None = None
    first_code: int | None = None


@dataclass(frozen=True, slots=True)
class OptionField:
    """A bit field of the option bytes (or of a register that the loader maps): ``(word >> shift) & mask``."""

    name: str
    address: int
    shift: int
    mask: int
    confidence: Confidence

    def value(self, word: int) -> int:
        return (word >> self.shift) & self.mask


@dataclass(frozen=True, slots=True)
class Layout:
    """How a flash of a given size is cut into sectors.

    ``sizes``: flash sizes in bytes to which it applies, empty for all. ``when``: the option field and value that select it;
    None where it is the only one for that size, or an alternative that only a configuration can name. ``confirmed`` False:
    where the second bank lies, or which numbers the loader's erase command takes in it, is not known well enough; like
    ``Chip.layout_confirmed`` False, but for this layout alone.
    """

    name: str
    banks: tuple[BankSpec, ...]
    sizes: tuple[int, ...] = ()
    when: tuple[OptionField, int] | None = None
    confirmed: bool = True


@dataclass(frozen=True, slots=True)
class FlashMap:
    """The sectors of one real part: contiguous within a bank, sorted by address; a hole between banks is possible."""

    layout: str
    base: int
    size_bytes: int
    sectors: tuple[Sector, ...]

    def sectors_in(self, start: int, end: int) -> tuple[Sector, ...]:
        """Sectors that share at least one byte with ``start`` up to, not including, ``end``."""
        return tuple(s for s in self.sectors if s.address < end and start < s.end)

    def sector_at(self, address: int) -> Sector | None:
        return next((s for s in self.sectors if s.address <= address < s.end), None)

    def neighbours(self, sector: Sector) -> tuple[Sector | None, Sector | None]:
        """The sectors directly before and after by address, in the same contiguous run."""
        before = next((s for s in self.sectors if s.end == sector.address), None)
        after = next((s for s in self.sectors if s.address == sector.end), None)
        return before, after

    def covers(self, start: int, end: int) -> bool:
        """Whether every byte of ``start`` up to ``end`` is flash (no hole)."""
        at = start
        for sector in self.sectors:
            if sector.address <= at < sector.end:
                at = sector.end
        return at >= end


@dataclass(frozen=True, slots=True)
class EntryCheck:
    """What must hold, besides the BOOT0 pin, for the loader to be entered again by BOOT0 high and reset (P10).

    ``values``: the values of ``option`` with which the pin works. ``otherwise``: what is the case with any other value, for
    the message to a person.
    """

    option: OptionField
    values: frozenset[int]
    otherwise: str

    def holds(self, word: int) -> bool:
        """Whether the loader stays reachable, given the 32-bit word read at ``option.address``."""
        return self.option.value(word) in self.values


@dataclass(frozen=True, slots=True)
class AppCheck:
    """When the application can never start, although BOOT0 is low.

    The mirror of ``EntryCheck``: here the few values that do harm are known (``bad_values``: both pin levels lead to the
    loader or to RAM), and any other value may be a boot address that somebody chose. Not a reason to refuse an update, but to
    warn before one: afterwards everything is proven, and yet the application does not run.
    """

    option: OptionField
    bad_values: frozenset[int]
    otherwise: str

    def holds(self, word: int) -> bool:
        """Whether BOOT0 low can lead to the application, given the 32-bit word read at ``option.address``."""
        return self.option.value(word) not in self.bad_values


class Quirk(StrEnum):
    """Deviations of loader versions that change what a host must do. Rows in ``Chip.quirks`` say which versions."""

    GET_COUNT_WRONG = "get-count-wrong"  # H743 V9.0: announces 13 commands, supports 11
    ONE_SECTOR_PER_ERASE = "one-sector-per-erase"
    ERASE_NOT_AWAITED = "erase-not-awaited"  # ACK before the erase is finished: wait the worst case
    BANK_ERASE_BROKEN = "bank-erase-broken"
    NO_NACK_ON_BAD_ADDRESS = "no-nack-on-bad-address"
    TWO_NACKS = "two-nacks"
    RATE_JITTER = "rate-jitter"  # 115200 may fail at sync: reset and retry, or 57600
    RAM_WRITE_BROKEN = "ram-write-broken"
    GO_BROKEN = "go-broken"
    GO_FIRST_ACK_MISSING = "go-first-ack-missing"
    EXTRA_RESET_AFTER_POWER_UP = "extra-reset-after-power-up"
    EMPTY_FLAG_STICKS = "empty-flag-sticks"  # after the first flash a plain reset enters the loader again
    EMPTY_FLAG_CLEARED_BY_LOADER = "empty-flag-cleared-by-loader"  # a reset before programming boots blank flash
    OPTION_LAUNCH_MISSING = "option-launch-missing"
    TWO_SYNC_BYTES = "two-sync-bytes"
    POWER_CYCLE_AFTER_GO = "power-cycle-after-go"
    NO_RAM_ACCESS = "no-ram-access"


@dataclass(frozen=True, slots=True)
class QuirkRow:
    """``loader_ids``: values of the byte at ``loader_id_address`` for which it holds; empty: every version."""

    quirk: Quirk
    loader_ids: frozenset[int]
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Chip:
    """One product id. See the module docstring for units.

    ``provenance`` has an entry for each other field, and one for ``layouts.erase_s``, the times inside ``layouts``.
    ``ram`` is for judging an initial stack pointer (which may equal the ``end`` of a range) and errs on the large side;
    ``flash_size_register`` holds KiB within ``flash_size_mask``, or a code that ``flash_size_codes`` turns into KiB.
    ``stub_ram`` is what the loader lets a host write and run. ``startup_s``: delays after reset to try, the usual one first,
    without any safety added. ``boot0_pin_obeyed``: with the option bytes as they leave the factory.
    """

    pid: int
    family: str
    names: tuple[str, ...]
    # --- flash
    flash_base: int
    flash_max_bytes: int
    flash_size_register: int | None
    uid_address: int | None
    layouts: tuple[Layout, ...]
    layout_confirmed: bool
    erased_value: int
    write_align_bytes: int
    flash_word_bytes: int
    ecc: bool
    # --- loader
    loader_id_address: int | None
    loader_ids: frozenset[int]
    usart_protocol: str
    parity: str
    erase_command: int
    mass_erase: bool
    mass_erase_max_s: float
    sectors_per_erase: int
    write_max_bytes: int
    read_max_bytes: int
    write_ack_max_s: float
    startup_s: tuple[float, ...]
    first_baud: int
    max_baud: int
    hardware_autobaud: bool
    # --- how to get in
    activation_pattern: str
    boot0_pin_obeyed: bool
    entry_checks: tuple[EntryCheck, ...]
    empty_check: bool
    usart_pins: tuple[tuple[int, str], ...]
    # --- memory
    system_memory: Range | None
    option_bytes: tuple[Range, ...]
    otp: Range | None
    ram: tuple[Range, ...]
    stub_ram: tuple[Range, ...]
    # --- deviations and where all this comes from
    quirks: tuple[QuirkRow, ...]
    provenance: Mapping[str, Provenance] = field(repr=False)
    foreign: str = ""  # why it can be identified and read only; empty for an STM32 that speaks AN3155
    app_checks: tuple[AppCheck, ...] = ()
    flash_size_mask: int = 0xFFFF
    flash_size_codes: tuple[tuple[int, int], ...] = ()
    bank_choice: OptionField | None = None  # 1: the loader runs first at each reset and starts bank 2 where a stack pointer is

    @property
    def title(self) -> str:
        """For people: ``STM32F7 F745, F746, F750, F756 (product id 0x449)``."""
        prefix = "" if self.foreign else "STM32"
        return f"{prefix}{self.family} {', '.join(self.names)} (product id {self.pid:#05x})"

    def has(self, quirk: Quirk, loader_id: int | None) -> bool:
        """Whether this loader version deviates so. An unknown version (None) is taken to have every quirk of the row."""
        return any(
            q.quirk is quirk and (not q.loader_ids or loader_id is None or loader_id in q.loader_ids) for q in self.quirks
        )

    def refuse_foreign(self) -> None:
        """Raises ``Unsupported`` where another protocol is spoken: nobody knows what a command of ours would do to it."""
        if self.foreign:
            raise Unsupported(f"{self.title} is identified and read, and nothing else is done: {self.foreign}", pid=self.pid)

    def layouts_for(self, flash_bytes: int) -> tuple[Layout, ...]:
        """The layouts that a part of this size can have, default first."""
        return tuple(lay for lay in self.layouts if not lay.sizes or flash_bytes in lay.sizes)

    def flash_bytes_of(self, register: int) -> int:
        """The flash that a reading of ``flash_size_register`` states; 0 where no part of this chip can have so much.

        A size that is too small is the dangerous one: an erase of everything would leave the rest, and prove what it erased.
        """
        value = register & self.flash_size_mask
        flash_bytes = dict(self.flash_size_codes).get(value, value) * 1024
        layouts = self.layouts_for(flash_bytes)
        fits = not layouts or any(
            sum(count * run.size_bytes for _, _, count, _, run in _runs(0, flash_bytes, layout)) == flash_bytes
            for layout in layouts
        )
        return flash_bytes if fits and LEAST_FLASH_BYTES <= flash_bytes <= self.flash_max_bytes else 0

    def flash_map(self, flash_bytes: int, layout: str | None = None) -> FlashMap:
        """The sectors of a part with ``flash_bytes`` of flash. ``layout``: a name, None for the default of that size.

        Raises ``LayoutUnknown`` when there is no such layout, the flash size is 0 or beyond ``flash_max_bytes``, or the
        sectors of the layout do not add up to it (a size that no part of this chip has).
        """
        found = [lay for lay in self.layouts_for(flash_bytes) if layout is None or lay.name == layout]
        if not found or not 0 < flash_bytes <= self.flash_max_bytes:
            known = ", ".join(lay.name for lay in self.layouts) or "none"
            raise LayoutUnknown(
                f"{self.title}: no layout {layout or 'for this size'} with {flash_bytes} bytes of flash; known: {known}",
                pid=self.pid,
                flash_bytes=flash_bytes,
                layout=layout,
            )
        made = build_map(self.flash_base, flash_bytes, found[0])
        if sum(sector.size_bytes for sector in made.sectors) != flash_bytes:
            raise LayoutUnknown(
                f"{self.title}: the sectors of layout {found[0].name} do not add up to {flash_bytes} bytes of flash; "
                "is that size right?",
                pid=self.pid,
                flash_bytes=flash_bytes,
                layout=found[0].name,
            )
        return made


def _runs(base: int, flash_bytes: int, layout: Layout) -> Iterator[tuple[int, int, int, int, Run]]:
    """Number and address of the first sector of each run, how many there are, and in which bank."""
    share = flash_bytes // len(layout.banks)
    at, code = base, 0
    for number, bank in enumerate(layout.banks, start=1):
        at = base + bank.offset if bank.offset is not None else at
        code = bank.first_code if bank.first_code is not None else code
        end = at + (bank.size_bytes if bank.size_bytes is not None else share)
        for run in bank.runs:
            room = max(0, end - at) // run.size_bytes
            count = min(run.count or room, room)
            yield code, at, count, number, run
            at, code = at + count * run.size_bytes, code + count
        at = end


def build_map(base: int, flash_bytes: int, layout: Layout) -> FlashMap:
    """Cut ``flash_bytes`` from ``base`` into sectors as ``layout`` says; a remainder smaller than a sector is left out."""
    sectors = (
        Sector(code + n, at + n * run.size_bytes, run.size_bytes, bank, run.erase_typ_s, run.erase_max_s)
        for code, at, count, bank, run in _runs(base, flash_bytes, layout)
        for n in range(count)
    )
    return FlashMap(layout.name, base, flash_bytes, tuple(sectors))


def joined(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """By address, with those that touch or overlap as one."""
    found: list[Range] = []
    for one in sorted(ranges, key=lambda r: r.start):
        if found and one.start <= found[-1].end:
            found[-1] = Range(found[-1].start, max(found[-1].end, one.end))
        else:
            found.append(one)
    return tuple(found)
