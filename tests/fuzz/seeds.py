"""Seeds of the corpus, made from golden files and from real dialogues: ``python -m tests.fuzz.seeds`` writes them.

A guided fuzzer starts from them instead of from nothing. They are small, and named ``seed-…``; what the fuzzer adds for its
coverage has the name of its hash, and what was a finding is ``found-…`` (see ``test_fuzz``).
"""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

from bridged import events
from bridged.config.reference import reference
from bridged.errors import NoSync
from bridged.images import parser
from bridged.images.model import Image
from bridged.protocol.an3155 import with_checksum
from bridged.protocol.reply import Reply, error_reply, format_reply
from tests.fuzz.targets import FLOWS, KINDS, PARTS
from tests.images.builders import dfuse, elf, hex_text, srec_text

CORPUS = Path(__file__).parent / "corpus"
ROOT = Path(__file__).parent.parent.parent
DEEP = b"[" * 3000  # More than any parser of JSON or TOML is willing to nest.
PIECES = [(0x08000000, bytes(range(64))), (0x08010000, b"abc")]


def images() -> dict[str, bytes]:
    hints = parser.TYPE_HINTS
    files = {
        "bin": bytes(range(64)),
        "hex": hex_text(PIECES).encode(),
        "srec": srec_text(PIECES).encode(),
        "elf": elf(PIECES),
        "dfuse": dfuse([(0, b"Internal Flash", PIECES)]),
    }
    files |= {f"{name}-gz": gzip.compress(data, mtime=0) for name, data in files.items()}
    found = {f"auto-{name}": bytes([hints.index("auto") | 0x80 * name.startswith("bin")]) + d for name, d in files.items()}
    return found | {f"said-{name}": bytes([hints.index(name)]) + data for name, data in files.items() if name in hints}


def lines() -> dict[str, bytes]:
    sha256 = "ab" * 32
    said = [f"PUT 4096 {sha256} offset=256 name='my app' type=hex", f"HAVE sha256:{sha256}", "HELLO proto=1 format=json"]
    said += ["FLASH m1 app.bin addr=0x08000000 outside=discard entry=one-shot force=vectors trace=1 id=a-1 wait=1"]
    said += ["ENSURE m1 0123abcd", "READ m1 0x08000000 4K", "ERASE m1 0x08000000+16KiB", "ERASE m1 all", "WATCH *"]
    said += ["WAIT job timeout=2.5", "JOBS target=m1 state=failed limit=5", "LOG job from=7", "RESET m1 mode=boot", "help put"]
    said += ["GET / HTTP/1.1", "Host: x", "SSH-2.0-x", '"a b" \\x x="y']
    return {str(number): text.encode() + b"\r\n" for number, text in enumerate(said)} | {"tls": b"\x16\x03\x01\x02\x00\x01"}


def replies() -> dict[str, bytes]:
    error = NoSync("no byte came \x00 ü\n", attempts=3, address=0x08000000, ratio=0.5, flag=True, nothing=None)
    found = [error_reply(error), Reply(150, "RUNNING", {"job": "a", "done": 5, "nested": {"x": [1, "b"]}}, True)]
    found += [Reply(214, "HELP key=value <x>", {}, True), Reply(354, "SEND", {"bytes": 7}), Reply(250)]
    both = [(number, as_json, reply) for number, reply in enumerate(found) for as_json in (False, True)]
    return {f"{number}{'-json' if as_json else ''}": format_reply(reply, as_json) for number, as_json, reply in both} | {
        "deep": b'{"code":200,"text":"","more":false,"data":{"x":' + DEEP
    }


def configs() -> dict[str, bytes]:
    found = {path.stem: path.read_bytes() for path in sorted((ROOT / "config" / "examples").glob("*.toml"))}
    switched_on = "\n".join(text.removeprefix("#") if "=" in text else text for text in reference().splitlines())
    found["reference"] = "\n".join(text for text in switched_on.splitlines() if not text.startswith("# ")).encode()
    found["deep"] = b"a = " + DEEP
    found["odd"] = (
        b'"a\\u0041" . b = [ { x = 1 }, """y""" ]\napi = { listen = "127.0.0.1:0", metrics = "" }\n[[t]]\nz=1979-05-27'
    )
    return found


def host_answers() -> dict[str, bytes]:
    """Good answers of each command, after the byte that chooses it."""
    ack = b"\x79"
    whole = b"\xff"  # the script's length byte: all of what was asked for
    answers = [ack, ack + b"\x0b" + whole + bytes.fromhex("31000102112131446373829279"), ack + whole + b"\x31\0\0" + ack]
    answers += [ack + b"\x01" + whole + b"\x04\x49" + ack, ack * 3 + whole + bytes(256), ack * 3, ack * 2]
    answers += [ack * 6 + whole + with_checksum(b"\x01\x02\x03\x04"), *[ack * 2] * 4]
    found = {f"{number:02}": bytes([number]) + answer for number, answer in enumerate(answers)}
    return found | {f"{number:02}-nack": bytes([number]) + b"\x79\x1f\x01\x1f" for number in range(len(FLOWS))}


def device_dialogues() -> dict[str, bytes]:
    """Bits 4: a checksum is added to each piece; then length - 1 and the piece."""
    commands = ["00ff", "01fe", "02fd", "11ee", "31ce", "44bb", "43bc", "21de", "63 9c", "738c", "827d", "926d", "a15e", "50af"]

    def said(*pieces: bytes) -> bytes:
        return b"".join(bytes([len(piece) - 1]) + piece for piece in pieces)

    found = {text[:2]: bytes([index % len(PARTS), 0]) + said(bytes.fromhex(text)) for index, text in enumerate(commands)}
    at = with_checksum(bytes.fromhex("08000000"))
    block = with_checksum(bytes([15]) + bytes(16))
    for number in range(len(PARTS)):
        read = (b"\x11\xee", at, b"\x0f\xf0")
        write = (b"\x31\xce", at, block)
        erase = (b"\x44\xbb", with_checksum(b"\0\0\0\0")) if number < len(PARTS) - 1 else (b"\x43\xbc", with_checksum(b"\0\0"))
        found[f"part-{number}"] = bytes([number, 0]) + said(*erase, *write, *read, b"\x21\xde", at)
    return found


def sessions() -> dict[str, bytes]:
    """Part, kind and options; then silence, noise, or nothing but ACK."""
    found = {}
    for part in range(len(PARTS)):
        for kind in range(len(KINDS)):
            if (part + kind) % 3 == 0:
                found[f"{PARTS[part]}-{KINDS[kind]}"] = bytes([part, kind, 8])
    found["acks"] = bytes([0, 0, 8]) + b"\x79" * 600
    found["nacks"] = bytes([1, 1, 8]) + b"\x79\x1f" * 100
    found["text"] = bytes([2, 2, 8]) + b"\xffHello, this is an application\r\n" * 8
    return found


def wires() -> dict[str, bytes]:
    found = {
        f"clean-{PARTS[p]}-{KINDS[k]}": bytes([p, k, 8])
        for p in range(len(PARTS))
        for k in range(len(KINDS))
        if (p + k) % 4 == 0
    }
    found |= {f"drop-{n}": bytes([n % len(PARTS), 0, 8, 3 * n, 0, 0, 40, 1, 1, 60, 4, 1]) for n in range(8)}
    return found


def messages() -> dict[str, bytes]:
    found: list[events.Event] = [
        events.PhaseStarted(events.Phase.ERASE, 5),
        events.Synced(115200, 1),
        events.Identified(0x449, "F7", "F74x", "3.1", None, 1 << 20, "00", "single"),
        events.Planned(1, 2, 3, 4, 1.5, 60.0),
        events.SectorErased(0x08000000, 16384, 0.2),
        events.SectorProven(0x08000000, 16384, "ab" * 32),
        events.StepDone("erase", 0.5),
        events.Retried("sync", "x"),
        events.Warned("A", "b"),
        events.Booted("hello"),
    ]
    return {type(event).__name__: json.dumps(events.encode(event)).encode() for event in found} | {"deep": DEEP}


def boards() -> dict[str, bytes]:
    result = json.dumps({"result": {"kind": "flash"}}).encode()
    record = struct.pack("<dBI", 1.0, 1, 2) + b"\x79\x1f" + struct.pack("<dBI", 2.0, 4, 3) + b"abc"
    return {
        "result": bytes([1, 0, len(result)]) + result + bytes([0, 56, 8]) + struct.pack("<Q", len(result)),
        "records": bytes([2, 0, len(record)]) + record + bytes([0, 72, 8]) + struct.pack("<Q", len(record)),
        "hazard": bytes([0, 48, 8]) + struct.pack("<d", 1e9),
    }


def stores() -> dict[str, bytes]:
    def file(number: int, content: bytes) -> bytes:
        padded = content + b" " * (-len(content) % 4)
        return bytes([number, len(padded) // 4]) + padded

    side = file(2, b'{"name": "a", "type": "hex", "contents": {"hex": "x"}}')
    part = file(3, bytes(100)) + file(4, b'{"size_bytes": 200, "synced": 50}')
    return {"image": file(1, b"1234") + side + file(0, json.dumps({"a": "ab" * 32}).encode()), "part": part}


def reports() -> dict[str, bytes]:
    good = {"ok": b'{"ok": true}', "error": b'{"code": "IMAGE_CORRUPT", "message": "line 1", "facts": {"line": 1}}'}
    return {name: b"\0" + text for name, text in good.items()} | {"died": b"\x04"}


def telnet_talks() -> dict[str, bytes]:
    """Four cuts, then what pyserial's client says at its open, what a person's telnet says, and every command once."""
    agree = bytes.fromhex("fffb2c fffd2c fffb00 fffd00 fffd01 fffb03 fffd03")
    refuse = bytes.fromhex("fffd01 fffd03 fffe00 fffc00 fffc2c")
    every = [bytes((command, *value)) for command in range(14) for value in (b"", b"\x01", b"\x05", bytes(3) + b"\x50")]
    every += [bytes((5, value)) for value in range(21)]
    subs = b"".join(b"\xff\xfa\x2c" + payload.replace(b"\xff", b"\xff\xff") + b"\xff\xf0" for payload in every)
    talks = {
        "rfc2217": agree + b"text\xff\xff" + subs,
        "plain": refuse + b"help\r\0\xff\xf3\xff\xf6\r\n",
        "endless": b"\xff\xfa\x2c" * 9,
    }
    return {name: b"\x01\x09\x14\x40" + talk for name, talk in talks.items()}


def all_seeds() -> dict[str, dict[str, bytes]]:
    return {
        "images": images(),
        "image-encoding": {"two": Image.of(PIECES).encode()},
        "parser-report": reports(),
        "line": lines(),
        "reply": replies(),
        "config": configs(),
        "an3155-host": host_answers(),
        "an3155-device": device_dialogues(),
        "session": sessions(),
        "session-bad-wire": wires(),
        "events": messages(),
        "board": boards(),
        "journal": {"nothing": b"", "middle": b"\x00\x20\x00\x03abcd"},
        "store": stores(),
        "telnet": telnet_talks(),
        "line-box": {"ok": b"ok\nok\nok\nok\n", "error": b"error: no such line\n", "cut": b"ok"},
    }


def main() -> None:
    for target, found in all_seeds().items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in found.items():
            (folder / f"seed-{name}").write_bytes(data)


if __name__ == "__main__":
    main()
