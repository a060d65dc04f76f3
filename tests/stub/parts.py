"""Six STM32s as far as the second-stage loader meets them, written from memory of the reference manuals.

This is the second writing of facts that ``chips.second_stage`` has, on purpose from the peripheral's side: which clock gate a
peripheral has, what its pins must look like, which request the DMA must serve and which memory it reaches. A mistake that is in
both is not found here; only silicon tells.
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
class Part:
    name: str
    pid: int
    core: str
    cpuid: int
    clock_hz: int
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
    clocked: tuple[tuple[int, int, int], ...]  # registers of RCC, bits and what they must be for ``clock_hz``
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
    clock_hz=16_000_000,
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
    rcc={0x00: 0x01000081, 0x08: 0x940A, 0x30: 0x100000, 0x44: 0},
    follow=oscillators(0, 2, 2, {0: 0, 1: 16, 2: 24}, {0: 1, 16: 17, 24: 25}, 0x08),
    gates={"dma": (0x30, 22), "gpio": (0x30, 0), "usart": (0x44, 4)},
    gpio_base=0x40020000,
    gpio=NEW_GPIO,
    input_register=0x10,
    pins=alternate(7),
    clocked=((0x08, 0xFCFC, 0),),
)

F756 = Part(
    name="F756",
    pid=0x449,
    core="CORTEX_M7",
    cpuid=0x411FC270,
    clock_hz=16_000_000,
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
    rcc={0x00: 0x01000081, 0x08: 0x940A, 0x30: 0x100000, 0x44: 0, 0x90: 3},
    follow=oscillators(0, 2, 2, {0: 0, 1: 16, 2: 24}, {0: 1, 16: 17, 24: 25}, 0x08),
    gates={"dma": (0x30, 22), "gpio": (0x30, 0), "usart": (0x44, 4)},
    gpio_base=0x40020000,
    gpio=NEW_GPIO,
    input_register=0x10,
    pins=alternate(7),
    clocked=((0x08, 0xFCFC, 0), (0x90, 3, 0)),
)

L476 = Part(
    name="L476",
    pid=0x415,
    core="CORTEX_M4",
    cpuid=0x410FC241,
    clock_hz=16_000_000,
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
    rcc={0x00: 0x63, 0x08: 0x2400, 0x48: 0x100, 0x4C: 0, 0x60: 0, 0x88: 2},
    follow=oscillators(0, 2, 2, {0: 0, 1: 8, 3: 24}, {0: 1, 8: 10, 24: 25}, 0x08),
    gates={"dma": (0x48, 0), "gpio": (0x4C, 0), "usart": (0x60, 14)},
    gpio_base=0x48000000,
    gpio=NEW_GPIO,
    input_register=0x10,
    pins=alternate(7),
    clocked=((0x08, 0x3FFC, 0x4), (0x88, 3, 0)),
)

G071 = Part(
    name="G071",
    pid=0x460,
    core="CORTEX_M0",
    cpuid=0x410CC601,
    clock_hz=16_000_000,
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
    rcc={0x00: 0x01000900, 0x08: 0x2402, 0x34: 0, 0x38: 0x100, 0x40: 0, 0x54: 1},
    follow=oscillators(0, 3, 3, {0: 8, 2: 24}, {8: 10, 24: 25}, 0x08),
    gates={"dma": (0x38, 0), "mux": (0x38, 0), "gpio": (0x34, 0), "usart": (0x40, 14)},
    gpio_base=0x50000000,
    gpio=NEW_GPIO,
    input_register=0x10,
    pins=alternate(1),
    clocked=((0x08, 0x7F38, 0), (0x00, 0x3800, 0), (0x54, 3, 0)),
)

F103 = Part(
    name="F103",
    pid=0x410,
    core="CORTEX_M3",
    cpuid=0x411FC231,
    clock_hz=24_000_000,
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
    rcc={0x00: 0x01000081, 0x04: 0x1D0402, 0x14: 0x14, 0x18: 0},
    follow=oscillators(0, 2, 2, {0: 0, 1: 16, 2: 24}, {0: 1, 16: 17, 24: 25}, 0x04),
    gates={"dma": (0x14, 0), "gpio": (0x18, 2), "usart": (0x18, 14)},
    gpio_base=0x40010800,
    gpio={0x00: 0x44444444, 0x04: 0x44444444, 0x0C: 0},
    input_register=0x08,
    pins=f1_pins,
    clocked=((0x04, 0x3FFFFC, 4 << 18 | 0x8),),  # PLL from HSI / 2, times 6
)

H743 = Part(
    name="H743",
    pid=0x450,
    core="CORTEX_M7",
    cpuid=0x411FC271,
    clock_hz=64_000_000,
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
    clocked=((0x10, 0x38, 0), (0x00, 0x18, 0), (0x18, 0xF7F, 0), (0x1C, 0x770, 0), (0x54, 0x38, 0)),
)

PARTS: Mapping[str, Part] = {part.name: part for part in (F407, F756, L476, G071, F103, H743)}
