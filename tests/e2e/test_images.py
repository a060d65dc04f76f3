"""Images as build systems put them out, through a real daemon, its parser process and a session: several in one flash, packed,
with bytes of the unit, planned, flashed, proven, and found to be there already. All by what ``nc`` can say.
"""

from __future__ import annotations

import gzip
from pathlib import Path

from bridged import chips
from bridged.images.model import Image
from tests.e2e.gateway import Client, Gateway, pairs
from tests.images.builders import dfuse, srec_text
from tests.target.bench import make_image

CHIP = chips.find("L476")
BASE, APP_AT, SERIAL_AT = 0x08000000, 0x08002000, 0x08001800
BOOT = make_image(CHIP, 3000).segments[0].data
APP = make_image(CHIP, 5000, offset=APP_AT - BASE, seed=2).segments[0].data
IMAGES = "boot@0x08000000,app"
PATCH = f"patch={SERIAL_AT:#x}:0011223344556677,{APP_AT + 0x100:#x}:02AABBCCDDEE"


def whole(serial: str) -> Image:
    app = APP[:0x100] + bytes.fromhex("02aabbccddee") + APP[0x106:]
    return Image.of([(BASE, BOOT), (SERIAL_AT, bytes.fromhex(serial)), (APP_AT, app)])


def stage(client: Client) -> None:
    client.put(gzip.compress(BOOT), "boot")  # a raw binary in gzip
    client.put(gzip.compress(srec_text([(APP_AT, APP)]).encode()), "app")
    client.put(dfuse([(0, b"@Internal Flash", [(APP_AT, APP)])]), "app.dfu")


def test_a_bootloader_an_application_and_a_serial_number_by_nc(tmp_path: Path) -> None:
    with Gateway(tmp_path, {"m1": "L476"}) as gateway:
        client = gateway.connect()
        stage(client)
        wanted = whole("0011223344556677")
        code, text = client.do(f"PLAN m1 {IMAGES} {PATCH}")
        assert code == 250, text
        assert [line.split()[0] for line in client.lines] == [*["part"] * 4, *["range"] * 7, "target=m1"]
        told = pairs(text)
        assert (told["content"], told["proven"], told["erase_sectors"], told["keep_bytes"]) == (
            wanted.digest,
            "0",
            "6",
            str(6 * 2048 - wanted.size_bytes),
        )
        code, text = client.do(f"FLASH m1 {IMAGES} {PATCH} id=unit-1 wait=1")
        assert code == 250, text
        told = pairs(text)
        assert (told["evidence"], told["content"], told["sectors_erased"]) == ("full", wanted.digest, "6")
        assert gateway.holds("m1", wanted)
        # The same unit in other words and from another format: one content, so nothing is to be done.
        code, text = client.do(f"ENSURE m1 app.dfu,boot@0x08000000 {PATCH} wait=1")
        assert (code, pairs(text)["evidence"]) == (251, "full"), text
        code, text = client.do(f"FLASH m1 {IMAGES} {PATCH.lower()} id=unit-1 wait=1")
        assert (code, pairs(text)["job"]) == (250, told["job"]), "the same id: the same job, not another flash"
        code, text = client.do(f"VERIFY m1 {IMAGES} {PATCH.replace('0011', '0012')} wait=1")
        assert (code, text.split()[0], pairs(text)["fact.address"]) == (554, "VERIFY_MISMATCH", f"{SERIAL_AT + 1:#010x}")
        assert client.do(f"PLAN m1 {IMAGES} {PATCH}")[0] == 250
        client.close()


def test_what_cannot_be_combined_is_said_by_name_and_touches_nothing(tmp_path: Path) -> None:
    with Gateway(tmp_path, {"m1": "L476"}) as gateway:
        client = gateway.connect()
        stage(client)
        code, text = client.do("FLASH m1 app,app.dfu wait=1")
        assert (code, text.split()[0]) == (550, "IMAGE_OVERLAP")
        assert "app (0x08002000..0x08003387) and app.dfu (0x08002000..0x08003387)" in text
        code, text = client.do("PLAN m1 boot,app")
        assert (code, text.split()[0]) == (501, "IMAGE_ADDRESS_MISSING")
        assert "boot: the image is a raw binary" in text
        code, text = client.do(f"FLASH m1 boot@{APP_AT + 0x2000:#x},app wait=1")
        assert (code, text.split()[0]) == (550, "IMAGE_NOT_BOOTABLE")
        assert "vector table of boot at 0x08004000" in text
        code, text = client.do("FLASH m1 boot,nobody")
        assert (code, text.split()[0]) == (404, "UNKNOWN_IMAGE")
        code, text = client.do("FLASH m1 app patch=0x1:zz")
        assert (code, text.split()[0]) == (501, "BAD_REQUEST")
        assert not gateway.device("m1").stats.erases
        client.close()
