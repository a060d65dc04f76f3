"""Signed images and the other rules of a target, with the real `minisign` on the other side."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bridged.config import Config, Policy, Signing, Talk, Xmodem
from bridged.config.file import load
from bridged.config.values import parse_window
from bridged.errors import AgainstPolicy, BadRequest, BadSignature, BridgedError, ConfigError, PortGone
from bridged.images import minisign
from bridged.jobs import policy
from bridged.jobs.model import JobKind, JobState
from tests.jobs.bench import FIRMWARE_FILE, Bench, Script, Time, run
from tests.support import require_tool

FILES = ("firmware.elf", "other.elf")


@dataclass(frozen=True, slots=True)
class Signer:
    """A key pair of the `minisign` tool, and signatures that it makes."""

    root: Path
    name: str = "release"

    @classmethod
    def make(cls, root: Path, name: str = "release") -> Signer:
        require_tool("minisign", "minisign")
        signer = cls(root, name)
        signer._run("-G", "-W", "-p", str(signer.public), "-s", str(signer.secret))
        return signer

    @property
    def public(self) -> Path:
        return self.root / f"{self.name}.pub"

    @property
    def secret(self) -> Path:
        return self.root / f"{self.name}.key"

    @property
    def key(self) -> str:
        """The key in words, as a configuration may hold it."""
        return self.public.read_text().splitlines()[1]

    def text(self, file: str | Path = "firmware.elf", comment: str = "version:1.2.0", legacy: bool = False) -> str:
        path = self.root / file
        if not path.exists():
            path.write_text(str(file))  # As the store of the bench has it.
        signature = self.root / "made.minisig"
        self._run("-S", "-W", "-s", str(self.secret), "-m", str(path), "-x", str(signature), "-t", comment, *["-l"] * legacy)
        return signature.read_text()

    def sig(self, file: str | Path = "firmware.elf", comment: str = "version:1.2.0", legacy: bool = False) -> str:
        return encoded(self.text(file, comment, legacy))

    def _run(self, *arguments: str) -> None:
        subprocess.run(["minisign", *arguments], check=True, capture_output=True, input=b"", timeout=20)


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


# --- the format ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("size", [1, 13, 100_000])
def test_what_minisign_signs_is_right(tmp_path: Path, legacy: bool, size: int) -> None:
    signer = Signer.make(tmp_path)
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    path = tmp_path / "image.bin"
    path.write_bytes(data)
    text = signer.text(path, "version:1.2.3 chip:F756\tboard:motor-v2", legacy)
    assert minisign.parse(text).prehashed is not legacy
    for reference in (signer.key, str(signer.public)):
        signed = minisign.verify(path, hashlib.sha256(data).hexdigest(), text, [minisign.read_key(reference)])
        assert signed.facts == {"version": "1.2.3", "chip": "F756", "board": "motor-v2"}
    assert signed.key.number in signer.public.read_text(), "the number is the one that minisign prints"


@pytest.mark.parametrize("legacy", [False, True])
def test_whatever_is_changed_is_noticed(tmp_path: Path, legacy: bool) -> None:
    """Every character of a signature but those of the untrusted comment, and every byte of the file."""
    signer = Signer.make(tmp_path)
    path = tmp_path / "image.bin"
    path.write_bytes(b"0123456789")
    sha256 = hashlib.sha256(b"0123456789").hexdigest()
    text = signer.text(path, "version:1.2.3", legacy)
    keys = [minisign.read_key(signer.key)]
    assert minisign.verify(path, sha256, text, keys)
    begin = text.index("\n") + 1
    tried = 0
    for at in range(begin, len(text.rstrip("\n"))):
        changed = text[:at] + ("B" if text[at] != "B" else "C") + text[at + 1 :]
        if changed.splitlines()[1::2] != text.splitlines()[1::2] and _same_bytes(changed, text):
            continue  # The last character of base64 has bits that mean nothing.
        with pytest.raises(BadSignature):
            minisign.verify(path, sha256, changed, keys)
        tried += 1
    assert tried > 200
    for at in range(10):
        data = bytearray(b"0123456789")
        data[at] ^= 1
        path.write_bytes(data)
        for announced in (sha256, hashlib.sha256(data).hexdigest()):
            with pytest.raises(BadSignature):
                minisign.verify(path, announced, text, keys)


def _same_bytes(first: str, second: str) -> bool:
    try:
        decoded = [[base64.b64decode(line, validate=True) for line in text.splitlines()[1::2]] for text in (first, second)]
    except ValueError:
        return False
    return decoded[0] == decoded[1] and first.splitlines()[2] == second.splitlines()[2]


def test_a_key_that_is_not_trusted(tmp_path: Path) -> None:
    ours, theirs = Signer.make(tmp_path), Signer.make(tmp_path, "theirs")
    path = tmp_path / "firmware.elf"
    text = theirs.text()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(BadSignature, match="not trusted here") as found:
        minisign.verify(path, sha256, text, [minisign.read_key(ours.key)])
    assert found.value.facts["rule"] == "key"
    # The number of a key is no proof: a key of theirs that claims to be ours.
    claimed = replace(minisign.read_key(theirs.key), number=minisign.read_key(ours.key).number)
    with pytest.raises(BadSignature, match="is not one of"):
        minisign.verify(path, sha256, ours.text(), [claimed])


@pytest.mark.parametrize("text", ["", "RW", "RWQ" + "A" * 53 + "!", "RWQ" + "A" * 54, "x" * 56, "/does/not/exist"])
def test_what_is_no_key(text: str) -> None:
    with pytest.raises(ConfigError):
        minisign.read_key(text)


@pytest.mark.parametrize(
    "text", ["", "\n" * 5000, "a\nb\nc\nd", "untrusted comment: x\nAAAA\ntrusted comment: y\nAAAA", "\x00" * 300, "x\n" * 4]
)
def test_what_is_no_signature(text: str) -> None:
    with pytest.raises(BadSignature):
        minisign.parse(text)


def test_a_comment_that_says_two_things_says_nothing(tmp_path: Path) -> None:
    signer = Signer.make(tmp_path)
    text = signer.text(comment="version:1.0 version:2.0")
    path = tmp_path / "firmware.elf"
    with pytest.raises(BadSignature, match="differently"):
        minisign.verify(path, hashlib.sha256(path.read_bytes()).hexdigest(), text, [minisign.read_key(signer.key)])


# --- the rules ----------------------------------------------------------------------------------------------------

SIGNED = Policy(signature=True)
Make = Callable[[Signer], dict[str, Any]]


@pytest.mark.parametrize(
    ("rules", "make", "rule"),
    [
        (SIGNED, lambda _s: {}, "signature"),
        (SIGNED, lambda s: {"sig": s.sig()}, ""),
        (SIGNED, lambda s: {"sig": s.sig(legacy=True)}, ""),
        (SIGNED, lambda s: {"sig": s.sig("other.elf")}, "signature"),
        (SIGNED, lambda s: {"sig": Signer.make(s.root, "theirs").sig()}, "key"),
        (SIGNED, lambda _s: {"sig": "not base64 at all"}, "signature"),
        (SIGNED, lambda s: {"sig": f"{s.sig()},{s.sig()}"}, "signature"),
        (Policy(), lambda s: {"sig": s.sig("other.elf")}, "signature"),  # A wrong one is wrong where none is needed, too.
        (Policy(), lambda _s: {}, ""),
        (SIGNED, lambda s: {"sig": s.sig(), "patch": "0x08000010:0011"}, "patch"),
        (replace(SIGNED, patch=["0x08000010+0x10"]), lambda s: {"sig": s.sig(), "patch": "0x08000010:0011"}, ""),
        (replace(SIGNED, patch=["0x08000010+0x10"]), lambda s: {"sig": s.sig(), "patch": "0x0800001F:0011"}, "patch"),
        (Policy(board="m2"), lambda s: {"sig": s.sig(comment="board:m2")}, ""),
        (Policy(board="m2"), lambda s: {"sig": s.sig(comment="board:m1")}, "board"),
        (Policy(board="m2"), lambda s: {"sig": s.sig()}, "board"),
        (Policy(board="m2"), lambda _s: {}, "board"),
        (Policy(no_downgrade=True), lambda _s: {}, "version"),
        (Policy(no_downgrade=True), lambda s: {"sig": s.sig(comment="hello")}, "version"),
        (Policy(no_downgrade=True), lambda s: {"sig": s.sig(comment="version:new")}, "version"),
        (Policy(no_downgrade=True), lambda s: {"sig": s.sig()}, ""),
        (SIGNED, lambda s: {"sig": s.sig(comment="addr:0x08000000"), "addr": 0x08000000}, ""),
        (SIGNED, lambda s: {"sig": s.sig(comment="addr:0x08004000"), "addr": 0x08000000}, "addr"),
        (SIGNED, lambda s: {"sig": s.sig(comment="addr:0x0800_000G"), "addr": 0x08000000}, "addr"),
    ],
)
def test_a_rule_is_asked_at_submission(tmp_path: Path, rules: Policy, make: Make, rule: str) -> None:
    signer = Signer.make(tmp_path)

    async def work() -> None:
        async with Bench(tmp_path, rules=rules, keys=[signer.key]) as bench:
            if rule:
                with pytest.raises((BadSignature, AgainstPolicy)) as found:
                    await bench.submit(**make(signer))
                assert found.value.facts["rule"] == rule
                assert not bench.jobs.list()
                assert not bench["m1"].runs
            else:
                assert (await bench.flash(**make(signer))).state is JobState.SUCCEEDED

    run(work)


def test_ensure_is_asked_like_flash_and_the_others_are_not(tmp_path: Path) -> None:
    signer = Signer.make(tmp_path)

    async def work() -> None:
        async with Bench(tmp_path, rules=SIGNED, keys=[signer.key]) as bench:
            with pytest.raises(BadSignature):
                await bench.submit(kind=JobKind.ENSURE)
            assert (await bench.end(await bench.submit(kind=JobKind.VERIFY))).state is JobState.SUCCEEDED

    run(work)


def test_an_image_by_xmodem_is_asked_as_well_and_needs_words_of_success(tmp_path: Path) -> None:
    signer = Signer.make(tmp_path)
    words = Xmodem(success=Talk(expect="good"))

    async def work() -> None:
        async with Bench(tmp_path, rules=SIGNED, keys=[signer.key], xmodem=words) as bench:
            with pytest.raises(BadSignature):
                await bench.submit(kind=JobKind.XMODEM)
            assert (await bench.submit(kind=JobKind.XMODEM, sig=signer.sig())).kind is JobKind.XMODEM

    async def without() -> None:
        async with Bench(tmp_path / "other") as bench:
            with pytest.raises(BadRequest, match=r"m1\.xmodem\.success\.expect is not configured"):
                await bench.submit(kind=JobKind.XMODEM)
            assert not bench.jobs.list()

    run(work)
    (tmp_path / "other").mkdir()
    run(without)


def test_an_older_version_is_refused_once_a_newer_one_was_proven(tmp_path: Path) -> None:
    signer = Signer.make(tmp_path)
    rules = Policy(no_downgrade=True)

    async def work() -> None:
        async with Bench(tmp_path, rules=rules, keys=[signer.key]) as bench:
            assert (await bench.flash(sig=signer.sig(comment="version:1.10"))).state is JobState.SUCCEEDED
            with pytest.raises(AgainstPolicy, match=r"1\.9 is older than 1\.10"):
                await bench.submit(sig=signer.sig(comment="version:1.9"))
            assert (await bench.flash(sig=signer.sig(comment="version:1.10.0"))).state is JobState.SUCCEEDED
            # What was not proven does not count.
            bench["m1"].scripts = [Script(fail_at="erased", error=BridgedError("broken"))]
            assert (await bench.flash(sig=signer.sig(comment="version:9.0"))).state is JobState.FAILED
            assert (await bench.flash(sig=signer.sig(comment="version:2.0"))).state is JobState.SUCCEEDED
        async with Bench(tmp_path, rules=rules, keys=[signer.key]) as bench:  # After a restart.
            with pytest.raises(AgainstPolicy, match=r"older than 2\.0"):
                await bench.submit(sig=signer.sig(comment="version:1.99"))

    run(work)


def test_a_version_counts_also_when_its_proof_was_interrupted_by_a_restart(tmp_path: Path) -> None:
    signer = Signer.make(tmp_path)
    rules = Policy(no_downgrade=True)

    async def work() -> None:
        async with Bench(tmp_path, rules=rules, keys=[signer.key]) as bench:
            assert (await bench.flash(sig=signer.sig(comment="version:1.0"))).state is JobState.SUCCEEDED
            bench["m1"].scripts = [Script(hold_at="erased")]
            job = await bench.submit(sig=signer.sig(comment="version:2.0"))
            await bench["m1"].at("erased").wait()
        async with Bench(tmp_path, rules=rules, keys=[signer.key]) as bench:
            assert (await bench.end(job)).state is JobState.SUCCEEDED
            with pytest.raises(AgainstPolicy, match=r"1\.5 is older than 2\.0"):
                await bench.submit(sig=signer.sig(comment="version:1.5"))

    run(work)


def test_it_is_asked_again_just_before_the_session(tmp_path: Path) -> None:
    """What was right when it came and is not when its turn comes: a newer version was proven in between."""
    signer = Signer.make(tmp_path)

    async def work() -> None:
        async with Bench(tmp_path, rules=Policy(no_downgrade=True), keys=[signer.key]) as bench:
            newer = await bench.submit(sig=signer.sig(comment="version:2.0"))
            older = await bench.submit(sig=signer.sig(comment="version:1.0"))
            assert (await bench.end(newer)).state is JobState.SUCCEEDED
            done = await bench.end(older)
            assert done.state is JobState.REJECTED
            assert done.error is not None
            assert done.error["code"] == "POLICY"
            assert done.error["facts"]["rule"] == "version"
            assert len(bench["m1"].runs) == 1
            # The file on the disk is not any more what was signed.
            waiting = await bench.submit(sig=signer.sig(comment="version:3.0"), id="again")
            (tmp_path / "firmware.elf").write_text("something else")
            done = await bench.end(waiting)
            assert done.state is JobState.REJECTED
            assert done.error is not None
            assert done.error["code"] == "SIGNATURE"

    run(work)


def test_the_chip_is_compared_when_it_has_said_who_it_is(tmp_path: Path) -> None:
    signer = Signer.make(tmp_path)

    async def work() -> None:
        async with Bench(tmp_path, keys=[signer.key]) as bench:  # It answers with 0x449, an F74x or F75x.
            done = await bench.flash(sig=signer.sig(comment="chip:STM32F407VG"))
            assert done.state is JobState.REJECTED, done
            assert not done.touched
            assert done.error is not None
            assert done.error["facts"]["rule"] == "chip"
            assert (await bench.flash(sig=signer.sig(comment="chip:F756"))).state is JobState.SUCCEEDED
            with pytest.raises(AgainstPolicy, match="rule chip"):  # Known from now on, so at submission already.
                await bench.submit(sig=signer.sig(comment="chip:F407"))

    run(work)


def test_a_job_waits_for_its_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()

    async def work() -> None:
        now = Time(utc_s=1_700_000_000.0)  # Tuesday 2023-11-14, 22:13:20
        async with Bench(tmp_path, time=now, rules=Policy(window=["23:00-01:00"])) as bench:
            seen: list[tuple[JobState, str]] = []
            bench.jobs.on_update.append(lambda job, _update: seen.append((job.state, job.reason)))
            done = await bench.flash()
            assert done.state is JobState.SUCCEEDED
            assert (JobState.WAITING, "window") in seen
            assert done.started >= 1_700_000_000 + 46 * 60 + 40
            assert done.started < 1_700_000_000 + 46 * 60 + 80

    run(work)


@pytest.mark.parametrize("erased", [False, True])
def test_a_job_that_was_interrupted_waits_for_its_window_unless_its_target_is_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, erased: bool
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()

    async def work() -> None:
        now = Time(utc_s=1_700_000_000.0)  # Tuesday 2023-11-14, 22:13:20
        async with Bench(tmp_path, time=now, rules=Policy(window=["22:00-22:30"])) as bench:
            point = "erased" if erased else "identify"
            bench["m1"].scripts = [Script(hold_at=point, fail_at=point, error=PortGone("unplugged"))]
            job = await bench.submit()
            await bench["m1"].at(point).wait()
            now.pass_(3600)
            bench["m1"].go.set()
            done = await bench.end(job)
            assert done.state is JobState.SUCCEEDED
            waited = done.ended - 1_700_000_000
            assert waited < 4000 if erased else waited > 23 * 3600

    run(work)


def test_a_job_that_waits_for_its_window_can_be_canceled(tmp_path: Path) -> None:
    closed = time.strftime("%a", time.localtime(1_700_000_000 + 3 * 86400))

    class Still(Time):
        async def sleep(self, seconds: float) -> None:
            if seconds > 1:  # Time stands still until somebody is woken.
                await asyncio.Event().wait()
            await Time.sleep(self, seconds)

    async def work() -> None:
        async with Bench(tmp_path, time=Still(), rules=Policy(window=[f"{closed} 12:00-12:01"])) as bench:
            job = await bench.submit()
            while bench.jobs.get(job.id).state is not JobState.WAITING:
                await bench.jobs.wait(job.id, 0.001)
            assert (await bench.jobs.cancel(job.id)).state is JobState.CANCELED
            assert not bench["m1"].runs

    run(work)


@pytest.mark.parametrize(
    ("window", "when", "expected"),
    [
        ("22:00-05:00", "Tue 22:00", True),
        ("22:00-05:00", "Wed 04:59", True),
        ("22:00-05:00", "Wed 05:00", False),
        ("Sun 22:00-05:00", "Mon 04:59", True),
        ("Sun 22:00-05:00", "Mon 22:30", False),
        ("Fri-Mon 00:00-24:00", "Sun 12:00", True),
        ("Fri-Mon 00:00-24:00", "Tue 00:00", False),
        ("Sat,Sun 08:00-09:00", "Sun 08:30", True),
        ("Sat,Sun 08:00-09:00", "Fri 08:30", False),
    ],
)
def test_when_a_window_is_open(window: str, when: str, expected: bool) -> None:
    moment = time.strptime(f"2023 46 {when}", "%Y %W %a %H:%M")
    assert policy.is_open(Policy(window=[window]), 0.0, lambda _utc: moment) is expected


@pytest.mark.parametrize(
    "text", ["", "22-05", "24:30-25:00", "08:00-08:00", "Mo 08:00-09:00", "Mon- 08:00-09:00", "08:00-24:01"]
)
def test_what_is_no_window(text: str) -> None:
    with pytest.raises(ValueError, match="window"):
        parse_window(text)


def test_versions_are_numbers() -> None:
    order = ["0.9", "1.0", "1.9", "1.10", "1.10.1", "2", "10.0"]
    assert sorted(order, key=lambda text: policy.version_key(text) or ()) == order
    assert policy.version_key("1.0") == policy.version_key("v1") == (1,)
    assert policy.version_key("0") == ()
    for wrong in ("", "1.", ".1", "1.a", "1-2", "\u0661", "1" * 65):
        assert policy.version_key(wrong) is None
    assert policy.newest("", "0.0") == "0.0"
    assert policy.newest("1.2", "") == policy.newest("1.2", "nonsense") == "1.2"


def test_a_policy_without_keys_is_a_mistake_of_the_configuration() -> None:
    for line in ("signature = true", "no_downgrade = true", 'board = "m2"'):
        with pytest.raises(ConfigError, match=r"needs signing\.keys"):
            load(f'[targets.m1]\nport = "/dev/x"\n[targets.m1.policy]\n{line}\n')
    assert load('[targets.m1]\nport = "/dev/x"\n[targets.m1.policy]\nwindow = ["22:00-05:00"]\n').targets["m1"].policy.window


def test_keys_without_the_package_are_a_mistake_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Config().signing == Signing()
    monkeypatch.setattr(minisign, "available", lambda: False)
    policy.Policy(Signing())
    key = base64.b64encode(b"Ed" + bytes(40)).decode()
    with pytest.raises(ConfigError, match="the extra `sign` is not installed"):
        policy.Policy(Signing([key]))


def test_the_bench_knows_its_files() -> None:
    assert hashlib.sha256(FILES[0].encode()).hexdigest() == FIRMWARE_FILE
