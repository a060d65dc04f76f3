"""A host for the ROM loader as one would write it in an afternoon: asyncio streams, one await for each stage, whole blocks.

It stands in the benchmark for the obvious way in Python. It is honest work: a frame is one write, answers are read with their
exact length, and every wait has a time-out, because without one a lost byte hangs for ever. It has an event loop to itself,
which flatters it: in a daemon it would share the loop with every client.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import operator
from pathlib import Path

import serial  # type: ignore[import-untyped]
import serial_asyncio  # type: ignore[import-untyped]

ACK = b"\x79"
BASE = 0x08000000
BLOCK = 256
TIMEOUT_S = 2.0


class Loader:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def receive(self, count: int) -> bytes:
        return await asyncio.wait_for(self.reader.readexactly(count), TIMEOUT_S)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()
        answer = await self.receive(1)
        if answer != ACK:
            raise RuntimeError(f"expected ACK, got {answer.hex()} after {data[:8].hex()}")

    async def command(self, code: int) -> None:
        await self.send(bytes([code, code ^ 0xFF]))

    async def address(self, address: int) -> None:
        data = address.to_bytes(4, "big")
        await self.send(data + bytes([checksum(data)]))

    async def erase_all(self) -> None:
        await self.command(0x44)
        await self.send(b"\xff\xff\x00")

    async def write(self, address: int, block: bytes) -> None:
        await self.command(0x31)
        await self.address(address)
        data = bytes([len(block) - 1]) + block
        await self.send(data + bytes([checksum(data)]))

    async def read(self, address: int, count: int) -> bytes:
        await self.command(0x11)
        await self.address(address)
        await self.send(bytes([count - 1, (count - 1) ^ 0xFF]))
        return await self.receive(count)


def checksum(data: bytes) -> int:
    return functools.reduce(operator.xor, data)


async def flash(port: str, baud: int, image: bytes) -> None:
    # The loader speaks 8E1. A pty has no parity, and refuses the second time that pyserial asks for it.
    parity = serial.PARITY_NONE if port.startswith("/dev/pts/") else serial.PARITY_EVEN
    reader, writer = await serial_asyncio.open_serial_connection(url=port, baudrate=baud, parity=parity)
    loader = Loader(reader, writer)
    await loader.send(b"\x7f")
    await loader.erase_all()
    for at in range(0, len(image), BLOCK):
        await loader.write(BASE + at, image[at : at + BLOCK])
    for at in range(0, len(image), BLOCK):
        want = image[at : at + BLOCK]
        if await loader.read(BASE + at, len(want)) != want:
            raise RuntimeError(f"flash differs in the block at {BASE + at:#010x}")
    await loader.command(0x21)
    await loader.address(BASE)
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--baud", type=int, default=115200)
    parser.add_argument("port")
    parser.add_argument("image", type=Path)
    args = parser.parse_args()
    asyncio.run(flash(args.port, args.baud, args.image.read_bytes()))


if __name__ == "__main__":
    main()
