"""Six STM32s as far as the second-stage loader meets them, written from memory of the reference manuals.

This is the second writing of facts that ``chips.second_stage`` has, on purpose from the peripheral's side: which clock gate a
peripheral has, what its pins must look like, which request the DMA must serve and which memory it reaches; what RCC makes of
its registers, and how fast flash and buses are. Each begins in a state in which no row would leave it: on a PLL, with
divisions. A mistake that is in both is not found here; only silicon tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.stub.flash_models import F1, F4, G0, H7, L4, Area, Controller, Times

KIB = 1024
MS = 1_000_000
US = 1_000


@dataclass(frozen=True, slots=True)
class DmaKind:
    """Offsets of one channel's registers from the base of the controller, and what its control register must say."""

    control: int
    count: int
    peripheral: int
    memory: int
    extra: tuple[int, ...]
    relevant: int  # direction, circular, increments, sizes
    expected: int
    in_control: int | None = None  # where the request is chosen, if in the control register


def stream(number: int, *, channel_select: bool) -> DmaKind:
    at = 0x10 + 0x18 * number
    # DIR 0, CIRC, PINC 0, MINC, PSIZE 0, MSIZE 0, no double buffer, no interrupts.
    return DmaKind(at, at + 4, at + 8, at + 12, (at + 20,), 0x47FDE, 0x500, 25 if channel_select else None)


def channel(number: int, *extra: int) -> DmaKind:
    at = 0x08 + 0x14 * (number - 1)
    return DmaKind(at, at + 4, at + 8, at + 12, extra, 0x4FFE, 0x00A0)


@dataclass(frozen=True, slots=True)
class Clock:
    """What RCC makes of its oscillators: Hz of the core, of both buses, and within the PLL where that is what runs."""

    core: float
    apb1: float
    apb2: float  # and of USART1
    pll_in: float = 0.0
    vco: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """MHz at the lowest supply. ``flash``: of the core, by wait states. ``frozen``: RCC register and bits that may not change
    while the PLL is on."""

    flash: tuple[float, ...]
    apb1: float
    apb2: float
    frozen: tuple[int, int] = (0, 0)
    pll_in: tuple[float, float] = (0, 0)
    vco: tuple[float, float] = (0, 0)

    def broken(self, clock: Clock, wait_states: int) -> str:
        most = self.flash[min(wait_states, len(self.flash) - 1)]
        found = f"core at {clock.core / 1e6:.0f} MHz with {wait_states} wait states" if clock.core > most * 1e6 else ""
        for name, value, limit in (("first", clock.apb1, self.apb1), ("second", clock.apb2, self.apb2)):
            if value > limit * 1e6:
                found += f" {name} bus at {value / 1e6:.0f} MHz"
        for name, value, (low, high) in (("input", clock.pll_in, self.pll_in), ("VCO", clock.vco, self.vco)):
            if value and not low * 1e6 <= value <= high * 1e6:
                found += f" {name} of the PLL at {value / 1e6:.1f} MHz"
        return found


def _down(value: int, steps: tuple[int, ...]) -> int:
    """A prescaler of three or four bits: the upper half of its values divides."""
    return steps[value - len(steps)] if value >= len(steps) else 1


AHB, APB = (2, 4, 8, 16, 64, 128, 256, 512), (2, 4, 8, 16)


def f4_clock(registers: dict[int, int]) -> Clock:
    """RM0090 and RM0385: 6.3.3, 6.3.4. HSI 16 MHz; an HSE of 8 MHz."""
    config, pll = registers[0x08], registers[0x04]
    pll_in = (8e6 if pll >> 22 & 1 else 16e6) / max(1, pll & 0x3F)
    vco = pll_in * (pll >> 6 & 0x1FF)
    source = config >> 2 & 3
    core = (16e6, 8e6, vco / (2 * (pll >> 16 & 3) + 2), 0)[source] / _down(config >> 4 & 15, AHB)
    low, high = core / _down(config >> 10 & 7, APB), core / _down(config >> 13 & 7, APB)
    return Clock(core, low, high, pll_in, vco) if source == 2 else Clock(core, low, high)


def l4_clock(registers: dict[int, int]) -> Clock:
    """RM0351: 6.4.3, 6.4.4. MSI 4 MHz."""
    config, pll = registers[0x08], registers[0x0C]
    pll_in = (0, 4e6, 16e6, 8e6)[pll & 3] / ((pll >> 4 & 7) + 1)
    vco = pll_in * (pll >> 8 & 0x7F)
    source = config >> 2 & 3
    through = vco / (2 * (pll >> 25 & 3) + 2) if pll >> 24 & 1 else 0
    core = (4e6, 16e6, 8e6, through)[source] / _down(config >> 4 & 15, AHB)
    low, high = core / _down(config >> 8 & 7, APB), core / _down(config >> 11 & 7, APB)
    return Clock(core, low, high, pll_in, vco) if source == 3 else Clock(core, low, high)


def g0_clock(registers: dict[int, int]) -> Clock:
    """RM0444: 5.4.3, 5.4.4. One bus for all peripherals."""
    config, pll = registers[0x08], registers[0x0C]
    pll_in = (0, 0, 16e6, 8e6)[pll & 3] / ((pll >> 4 & 7) + 1)
    vco = pll_in * (pll >> 8 & 0x7F)
    source = config >> 3 & 7
    through = vco / ((pll >> 29 & 7) + 1) if pll >> 28 & 1 else 0
    core = {0: 16e6 / (1 << (registers[0] >> 11 & 7)), 1: 8e6, 2: through}.get(source, 0) / _down(config >> 8 & 15, AHB)
    bus = core / _down(config >> 12 & 7, APB)
    return Clock(core, bus, bus, pll_in, vco) if source == 2 else Clock(core, bus, bus)


def f1_clock(registers: dict[int, int]) -> Clock:
    """RM0008: 7.3.2. HSI 8 MHz, halved before the PLL."""
    config = registers[0x04]
    pll_in = 8e6 if config >> 16 & 3 == 1 else 4e6
    vco = pll_in * min((config >> 18 & 15) + 2, 16)
    source = config >> 2 & 3
    core = (8e6, 8e6, vco, 0)[source] / _down(config >> 4 & 15, AHB)
    low, high = core / _down(config >> 8 & 7, APB), core / _down(config >> 11 & 7, APB)
    return Clock(core, low, high, pll_in, vco) if source == 2 else Clock(core, low, high)


def h7_clock(registers: dict[int, int]) -> Clock:
    """RM0433: 8.7.2, 8.7.6 to 8.7.8. HSI 64 MHz; its PLL is not modelled."""
    source, first, second = registers[0x10] >> 3 & 7, registers[0x18], registers[0x1C]
    core = (64e6 / (1 << (registers[0] >> 3 & 3)) if source == 0 else 8e6) / _down(first >> 8 & 15, AHB)
    buses = core / _down(first & 15, AHB)
    return Clock(core, buses / _down(second >> 4 & 7, APB), buses / _down(second >> 8 & 7, APB))


F4_LIMITS = Limits(
    flash=tuple(20.0 * n for n in range(1, 9)), apb1=42, apb2=84, frozen=(0x04, 0xFFFFFFFF), pll_in=(1, 2), vco=(192, 432)
)
L4_LIMITS = Limits(flash=(16, 32, 48, 64, 80), apb1=80, apb2=80, frozen=(0x0C, 0xFFFFFFFF), pll_in=(4, 16), vco=(64, 344))
G0_LIMITS = Limits(flash=(24, 48, 64), apb1=64, apb2=64, frozen=(0x0C, 0xFFFFFFFF), pll_in=(2.66, 16), vco=(64, 344))
F1_LIMITS = Limits(flash=(24, 36), apb1=24, apb2=36, frozen=(0x04, 0x3F0000), pll_in=(1, 25), vco=(16, 36))  # of an F101, F102
H7_LIMITS = Limits(flash=(45, 90, 135, 180), apb1=100, apb2=100)


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    pid: int
    core: str
    cpuid: int
    clock: Callable[[dict[int, int]], Clock]
    limits: Limits
    ram: tuple[tuple[int, int], ...]
    dma_reach: tuple[tuple[int, int], ...]
    areas: tuple[Area, ...]
    controller: Callable[..., Controller]
    times: Times
    flash_base: int
    usart_base: int
    usart_v2: bool
    dma_base: int
    dma: DmaKind
    request: int
    rcc_base: int
    rcc: Mapping[int, int]
    follow: Callable[[dict[int, int]], None]
    gates: Mapping[str, tuple[int, int]]
    gpio_base: int
    gpio: Mapping[int, int]
    input_register: int
    pins: Callable[[dict[int, int]], str]
    clocked: tuple[tuple[int, int, int], ...]  # registers of RCC, bits and what they must be for the USART
    watchdog: int = 0x40003000
    mux_base: int = 0
    csel: int | None = None
    rx_pin: int = 10


def cut(base: int, sizes: list[int], bank: int = 1, first: int = 0) -> tuple[Area, ...]:
    found, at = [], base
    for number, size in enumerate(sizes, start=first):
        found.append(Area(at, size, bank, number))
        at += size
    return tuple(found)


def alternate(function: int) -> Callable[[dict[int, int]], str]:
    """PA9 and PA10 of the newer GPIO: MODER, AFRH."""

    def wrong(registers: dict[int, int]) -> str:
        mode, high = registers[0x00] >> 18 & 0xF, registers[0x24] >> 4 & 0xFF
        return "" if (mode, high) == (0xA, function * 0x11) else f"MODER {mode:#x}, AFRH {high:#x}"

    return wrong


def f1_pins(registers: dict[int, int]) -> str:
    crh = registers[0x04] >> 4 & 0xFF
    # PA9: alternate function push-pull, any speed; PA10: input, floating or pulled, and then up.
    good = crh & 0xC == 0x8 and crh & 0x3 and crh >> 4 in (0x4, 0x8) and (crh >> 4 == 4 or registers[0x0C] >> 10 & 1)
    return "" if good else f"CRH {crh:#x}"


def oscillators(
    switch: int, shift: int, width: int, sources: dict[int, int], ready: dict[int, int], config: int
) -> Callable[[dict[int, int]], None]:
    """RCC: ready bits follow enable bits, the status of the switch follows the switch if its source is ready.

    ``ready``: enable bit to ready bit in the control register; ``sources``: value of the switch to enable bit.
    """
    mask = (1 << width) - 1

    def follow(registers: dict[int, int]) -> None:
        for enable, bit in ready.items():
            on = registers[0] >> enable & 1
            registers[0] = registers[0] & ~(1 << bit) | on << bit
        wanted = registers[config] >> switch & mask
        if wanted in sources and registers[0] >> ready[sources[wanted]] & 1:
            registers[config] = registers[config] & ~(mask << shift) | wanted << shift

    return follow


NEW_GPIO: Mapping[int, int] = {0x00: 0xABFFFFFF, 0x0C: 0x64000000, 0x24: 0}

F4_FLASH = [16 * KIB] * 4 + [64 * KIB] + [128 * KIB] * 7
F7_FLASH = [32 * KIB] * 4 + [128 * KIB] + [256 * KIB] * 3
F4_TIMES = Times(16 * US, {16 * KIB: 400 * MS, 64 * KIB: 1200 * MS, 128 * KIB: 2000 * MS})
F7_TIMES = Times(16 * US, {32 * KIB: 400 * MS, 128 * KIB: 1200 * MS, 256 * KIB: 2000 * MS})

F407 = Part(
    name="F407",
    pid=0x413,
    core="CORTEX_M4",
    cpuid=0x410FC241,
    clock=f4_clock,
    limits=F4_LIMITS,
    ram=((0x10000000, 0x10010000), (0x20000000, 0x20020000)),
    dma_reach=((0x20000000, 0x20020000),),
    areas=cut(0x08000000, F4_FLASH),
    controller=F4,
    times=F4_TIMES,
    flash_base=0x40023C00,
    usart_base=0x40011000,
    usart_v2=False,
    dma_base=0x40026400,
    dma=stream(2, channel_select=True),
    request=4,
    rcc_base=0x40023800,
    rcc={0x00: 0x01000081, 0x04: 0x24033010, 0x08: 0x940A, 0x30: 0x100000, 0x44: 0},
    follow=oscillators(0, 2, 2, {0: 0, 1: 16, 2: 24}, {0: 1, 16: 17, 24: 25}, 0x08),
    gates={"dma": (0x30, 22), "gpio": (0x30, 0), "usart": (0x44, 4)},
    gpio_base=0x40020000,
    gpio=NEW_GPIO,
    input_register=0x10,
    pins=alternate(7),
    clocked=(),
)

F756 = Part(
    name="F756",
    pid=0x449,
    core="CORTEX_M7",
    cpuid=0x411FC270,
    clock=f4_clock,
    limits=F4_LIMITS,
    ram=((0x00000000, 0x00004000), (0x20000000, 0x20050000)),
    dma_reach=((0x20000000, 0x20050000),),
    areas=cut(0x08000000, F7_FLASH),
    controller=F4,
    times=F7_TIMES,
    flash_base=0x40023C00,
    usart_base=0x40011000,
    usart_v2=True,
    dma_base=0x40026400,
    dma=stream(2, channel_select=True),
    request=4,
    rcc_base=0x40023800,
    rcc={0x00: 0x01000081, 0x04: 0x24033010, 0x08: 0x940A, 0x30: 0x100000, 0x44: 0, 0x90: 3},
    follow=oscillators(0, 2, 2, {0: 0, 1: 16, 2: 24}, {0: 1, 16: 17, 24: 25}, 0x08),
    gates={"dma": (0x30, 22), "gpio": (0x30, 0), "usart": (0x44, 4)},
    gpio_base=0x40020000,
    gpio=NEW_GPIO,
    input_register=0x10,
    pins=alternate(7),
    clocked=((0x90, 3, 0),),
)

L476 = Part(
    name="L476",
    pid=0x415,
    core="CORTEX_M4",
    cpuid=0x410FC241,
    clock=l4_clock,
    limits=L4_LIMITS,
    ram=((0x10000000, 0x10008000), (0x20000000, 0x20018000)),
    dma_reach=((0x20000000, 0x20018000), (0x10000000, 0x10008000)),
    areas=cut(0x08000000, [2 * KIB] * 256) + cut(0x08080000, [2 * KIB] * 256, bank=2),
    controller=L4,
    times=Times(90 * US, {2 * KIB: 22 * MS}),
    flash_base=0x40022000,
    usart_base=0x40013800,
    usart_v2=True,
    dma_base=0x40020000,
    dma=channel(5, 0xA8),
    request=2,
    csel=0xA8,
    rcc_base=0x40021000,
    rcc={0x00: 0x01000063, 0x08: 0x240F, 0x0C: 0x03001801, 0x48: 0x100, 0x4C: 0, 0x60: 0, 0x88: 2},
    follow=oscillators(0, 2, 2, {0: 0, 1: 8, 3: 24}, {0: 1, 8: 10, 24: 25}, 0x08),
    gates={"dma": (0x48, 0), "gpio": (0x4C, 0), "usart": (0x60, 14)},
    gpio_base=0x48000000,
    gpio=NEW_GPIO,
    input_register=0x10,
    pins=alternate(7),
    clocked=((0x88, 3, 0),),
)

G071 = Part(
    name="G071",
    pid=0x460,
    core="CORTEX_M0",
    cpuid=0x410CC601,
    clock=g0_clock,
    limits=G0_LIMITS,
    ram=((0x20000000, 0x20009000),),
    dma_reach=((0x20000000, 0x20009000),),
    areas=cut(0x08000000, [2 * KIB] * 64),
    controller=G0,
    times=Times(85 * US, {2 * KIB: 22 * MS}),
    flash_base=0x40022000,
    usart_base=0x40013800,
    usart_v2=True,
    dma_base=0x40020000,
    dma=channel(1),
    request=50,
    mux_base=0x40020800,
    rcc_base=0x40021000,
    rcc={0x00: 0x01000900, 0x08: 0x4812, 0x0C: 0xF0000802, 0x34: 0, 0x38: 0x100, 0x40: 0, 0x54: 1},
    follow=oscillators(0, 3, 3, {0: 8, 2: 24}, {8: 10, 24: 25}, 0x08),
    gates={"dma": (0x38, 0), "mux": (0x38, 0), "gpio": (0x34, 0), "usart": (0x40, 14)},
    gpio_base=0x50000000,
    gpio=NEW_GPIO,
    input_register=0x10,
    pins=alternate(1),
    clocked=((0x54, 3, 0),),
)

F103 = Part(
    name="F103",
    pid=0x410,
    core="CORTEX_M3",
    cpuid=0x411FC231,
    clock=f1_clock,
    limits=F1_LIMITS,
    ram=((0x20000000, 0x20005000),),
    dma_reach=((0x20000000, 0x20005000),),
    areas=cut(0x08000000, [1 * KIB] * 128),
    controller=F1,
    times=Times(52 * US, {1 * KIB: 20 * MS}),
    flash_base=0x40022000,
    usart_base=0x40013800,
    usart_v2=False,
    dma_base=0x40020000,
    dma=channel(5),
    request=0,
    rcc_base=0x40021000,
    rcc={0x00: 0x01000081, 0x04: 0x0B040A, 0x14: 0x14, 0x18: 0},
    follow=oscillators(0, 2, 2, {0: 0, 1: 16, 2: 24}, {0: 1, 16: 17, 24: 25}, 0x04),
    gates={"dma": (0x14, 0), "gpio": (0x18, 2), "usart": (0x18, 14)},
    gpio_base=0x40010800,
    gpio={0x00: 0x44444444, 0x04: 0x44444444, 0x0C: 0},
    input_register=0x08,
    pins=f1_pins,
    clocked=(),
)

H743 = Part(
    name="H743",
    pid=0x450,
    core="CORTEX_M7",
    cpuid=0x411FC271,
    clock=h7_clock,
    limits=H7_LIMITS,
    ram=((0x20000000, 0x20020000), (0x24000000, 0x24080000), (0x30000000, 0x30048000)),
    dma_reach=((0x24000000, 0x24080000), (0x30000000, 0x30048000)),  # not the DTCM
    areas=cut(0x08000000, [128 * KIB] * 8) + cut(0x08100000, [128 * KIB] * 8, bank=2),
    controller=H7,
    times=Times(110 * US, {128 * KIB: 1000 * MS}),
    flash_base=0x52002000,
    usart_base=0x40011000,
    usart_v2=True,
    dma_base=0x40020000,
    dma=stream(0, channel_select=False),
    request=41,
    mux_base=0x40020800,
    rcc_base=0x58024400,
    rcc={0x00: 0x0100002D, 0x10: 0x1B, 0x18: 0x48, 0x1C: 0x440, 0x54: 0x8, 0xD8: 0, 0xE0: 0, 0xF0: 0},
    follow=oscillators(0, 3, 3, {0: 0, 3: 24}, {0: 2, 24: 25}, 0x10),
    gates={"dma": (0xD8, 0), "mux": (0xD8, 0), "gpio": (0xE0, 0), "usart": (0xF0, 4)},
    gpio_base=0x58020000,
    gpio=NEW_GPIO,
    input_register=0x10,
    pins=alternate(7),
    watchdog=0x58004800,
    clocked=((0x54, 0x38, 0),),
)

PARTS: Mapping[str, Part] = {part.name: part for part in (F407, F756, L476, G071, F103, H743)}
