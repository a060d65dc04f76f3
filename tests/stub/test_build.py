"""The shipped binary: rebuilt bit for bit, within its limits, and each gate of its build shown to close."""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
from pathlib import Path

import pytest

from bridged import stub
from tests import build_stub
from tests.build_firmware import COMPILER_VERSION, BuildError

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None, reason=f"no compiler: pip install ziglang=={COMPILER_VERSION}"
)


@needs_compiler
def test_committed_binary_map_and_manifest_are_what_the_source_gives() -> None:
    assert build_stub.check() == []


@needs_compiler
@pytest.mark.parametrize(
    ("spoilt", "complaint"),
    [
        ("static u32 counter = 1; u32 count(void) { return counter++; }", "no writable data"),
        ("static const u32 words[16] = { 1 }; const u32 *const table[2] = { words, words };", "depends on the load address"),
        ("u32 deep(u32 n) { volatile u8 a[200]; a[n] = 1; return a[n + 1]; }", "stack frame size"),
        ("u32 share(u32 a, u32 b) { return a / b; }", "undefined symbol"),
        ('const u8 ballast[1024] = "x";', "must not be larger than 3,072 bytes"),
    ],
)
def test_every_gate_of_the_build_closes(spoilt: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in build_stub.SOURCES:
        shutil.copyfile(build_stub.STUB / name, tmp_path / name)
    source = tmp_path / "stub.c"
    source.write_text(source.read_text() + f'\n__attribute__((used, visibility("default"))) {spoilt}\n')
    monkeypatch.setattr(build_stub, "STUB", tmp_path)
    with pytest.raises(BuildError, match=complaint):
        build_stub.build()


def test_the_code_is_within_its_limit_and_matches_its_manifest() -> None:
    code = stub.load()
    assert 0 < len(code.code) <= stub.CODE_LIMIT_BYTES == 3072
    assert code.build.hex() == code.sha256[:16]


def test_a_damaged_binary_is_not_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(stub.__file__).parent
    (tmp_path / "manifest.json").write_text((here / "manifest.json").read_text())
    (tmp_path / "stub.bin").write_bytes((here / "stub.bin").read_bytes()[:-1] + b"\0\0")
    monkeypatch.setattr(stub, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ValueError, match="differs from the manifest"):
        stub.load()


def c_fields() -> list[str]:
    """The words of ``struct context``, as stub.h has them, without the pokes."""
    text = re.sub(r"/\*.*?\*/", "", (build_stub.STUB / "stub.h").read_text(), flags=re.DOTALL)
    body = text.split("struct context {", 1)[1].split("};", 1)[0]
    names: list[str] = []
    for name, count in re.findall(r"uint32_t (\w+)(?:\[(\d+)\])?;", body):
        names += [f"{name}_{n}" for n in range(int(count))] if count else [name]
    assert body.split()[-3:] == ["struct", "poke", "pokes[POKES];"]
    return names


def test_python_and_c_agree_on_the_context() -> None:
    assert c_fields() == list(stub.FIELDS)
    header = (build_stub.STUB / "stub.h").read_text()
    constants = {name: int(value, 0) for name, value in re.findall(r"#define (\w+) (\w+)\n", header)}
    assert constants == {"CODE_OFFSET": stub.CODE_OFFSET, "PROTOCOL": stub.PROTOCOL, "POKES": stub.POKES_MAX}
    assert 4 * len(stub.FIELDS) + 12 * stub.POKES_MAX <= stub.CODE_OFFSET
    assert f". = {stub.CODE_OFFSET:#x};" in (build_stub.STUB / "stub.ld").read_text()


def fields() -> dict[str, int]:
    own = {*stub.STATE_FIELDS, "train", "cpuid", "ccr", "entry", "protocol", "build_0", "build_1", "poke_count"}
    return {name: 1000 + n for n, name in enumerate(stub.FIELDS) if name not in own}


def test_the_image_is_context_and_code() -> None:
    code = stub.load()
    image = stub.image(
        code, 0x20003000, fields(), (stub.Poke(0x40021000, 0xFFFFFFFE, 1), stub.Poke(0x40021000, 2, 2, wait=True))
    )
    words = dict(zip(stub.FIELDS, struct.unpack_from(f"<{len(stub.FIELDS)}I", image), strict=True))
    assert {name: words[name] for name in fields()} == fields()
    assert words["entry"] == 0x20003000 + stub.CODE_OFFSET + 1
    assert struct.pack("<II", words["build_0"], words["build_1"]) == code.build
    assert all(words[name] == 0 for name in stub.STATE_FIELDS)
    pokes = struct.unpack_from("<6I", image, 4 * len(stub.FIELDS))
    assert pokes == (0x40021000, 0xFFFFFFFE, 1, 0x40021001, 2, 2)
    assert words["poke_count"] == 2
    assert image[stub.CODE_OFFSET :] == code.code


@pytest.mark.parametrize(
    ("change", "address", "pokes", "complaint"),
    [
        ({"stack": None}, 0x20000000, 0, "missing or unknown: stack"),
        ({"surplus": 1}, 0x20000000, 0, "missing or unknown: surplus"),
        ({"stack": -1}, 0x20000000, 0, "32 bits"),
        ({}, 0x20000002, 0, "multiple of 4"),
        ({}, 0x20000000, 33, "at most 32"),
    ],
)
def test_a_wrong_context_is_refused(change: dict[str, int | None], address: int, pokes: int, complaint: str) -> None:
    given = {name: value for name, value in {**fields(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=complaint):
        stub.image(stub.load(), address, given, (stub.Poke(0, 0, 0),) * pokes)
