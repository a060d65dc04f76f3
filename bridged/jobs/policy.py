"""What one target accepts: signatures, versions, boards, and when. Rules of the configuration, one function for each.

``Policy.check`` is asked at submission and again just before the session: keys, configuration and what is in the target may
have changed in between; for which chip an image is signed is asked a third time, when the chip has said who it is and before
anything is erased. A refusal names its rule in the message and as the fact ``rule``. ``is_open`` says whether the target may be
stopped now; outside its windows a job waits (``reason=window``) and is not refused.

What has begun to erase is not asked again: half of an image is worse than one whose key was withdrawn a minute ago, and it was
checked before the first byte. The restore of a last known good image is not asked either; it was when it came.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bridged.config import Policy as Rules
from bridged.config import Signing
from bridged.config.values import parse_range, parse_window
from bridged.errors import AgainstPolicy, BadSignature, ConfigError
from bridged.images import minisign
from bridged.images.content import Wanted

_ADDRESS = re.compile(r"0x[0-9a-fA-F]{1,8}")
VERSION_CHARS = 64  # Of a version in a trusted comment.


@dataclass(frozen=True, slots=True)
class Target:
    """What a rule may need to know of a target. ``pid``: product id of its chip, 0 where unknown. ``version``: highest yet."""

    name: str
    pid: int = 0
    version: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is allowed: the version that is signed, empty where none is, and the names of the chips that it is signed for."""

    version: str = ""
    chips: tuple[str, ...] = ()


class Policy:
    """Raises ``ConfigError`` where a key cannot be read, or nothing is there to check signatures with."""

    def __init__(self, signing: Signing) -> None:
        self._keys = tuple(minisign.read_key(reference) for reference in signing.keys)
        if self._keys and not minisign.available():
            raise ConfigError(
                "signing.keys: the extra `sign` is not installed (pip install 'bridged[sign]'; Debian: python3-cryptography)"
            )

    def check(self, rules: Rules, target: Target, wanted: Wanted, files: Sequence[tuple[str, Path]], sig: str) -> Verdict:
        """Blocking. ``files``: SHA-256 and path of each part. ``sig``: base64 of a ``.minisig`` for each of them, by comma.

        Raises ``BadSignature`` and ``AgainstPolicy``.
        """
        signed = self._signed(rules, target, files, sig)
        if rules.signature:
            _patches(rules, target, wanted)
        verdict = Verdict(_version(rules, target, signed), tuple(one.facts["chip"] for one in signed if "chip" in one.facts))
        check_chip(target, verdict)
        _board(rules, target, signed)
        _address(target, wanted, signed)
        return verdict

    def _signed(self, rules: Rules, target: Target, files: Sequence[tuple[str, Path]], sig: str) -> list[minisign.Signed]:
        if not sig:
            if rules.signature:
                text = f"target {target.name} takes signed images only, and none of {len(files)} is signed"
                raise BadSignature(text, rule="signature", target=target.name)
            return []
        if not self._keys:
            raise BadSignature(
                "a signature was given, and no key is trusted here (signing.keys)", rule="key", target=target.name
            )
        words = sig.split(",")
        if len(words) != len(files):
            text = f"{len(words)} signatures were given for {len(files)} images"
            raise BadSignature(text, rule="signature", target=target.name)
        return [
            minisign.verify(path, sha256, _text(word), self._keys) for (sha256, path), word in zip(files, words, strict=True)
        ]


def _text(word: str) -> str:
    try:
        return base64.b64decode(word, validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise BadSignature("sig= is base64 of the .minisig file (`base64 -w0`)", rule="signature") from error


def _refuse(rule: str, target: Target, text: str) -> AgainstPolicy:
    return AgainstPolicy(f"target {target.name}, rule {rule}: {text}", rule=rule, target=target.name)


def _patches(rules: Rules, target: Target, wanted: Wanted) -> None:
    """Nobody has signed the bytes of one unit, so they go only where the configuration has a place for them."""
    places = [parse_range(text) for text in rules.patch]
    for patch in wanted.patches:
        if not any(start <= patch.address and patch.end <= end for start, end in places):
            raise _refuse(
                "patch", target, f"bytes at {patch.address:#010x} are signed by nobody and lie in no range of policy.patch"
            )


def check_chip(target: Target, verdict: Verdict) -> None:
    """Raises ``AgainstPolicy`` where the chip is known and another than was signed for."""
    for said in verdict.chips if target.pid else ():
        if minisign.product_id(said) != target.pid:
            raise _refuse("chip", target, f"the image is signed for chip {said}, this one has product id {target.pid:#05x}")


def _board(rules: Rules, target: Target, signed: Sequence[minisign.Signed]) -> None:
    if not rules.board:
        return
    if not signed:
        raise _refuse("board", target, f"this is a {rules.board}, and an unsigned image does not say what it is for")
    for one in signed:
        if one.facts.get("board", "") != rules.board:
            what = f"is signed for board {one.facts['board']}" if "board" in one.facts else "does not say for which board it is"
            raise _refuse("board", target, f"this is a {rules.board}, and the image {what}")


def _address(target: Target, wanted: Wanted, signed: Sequence[minisign.Signed]) -> None:
    """A raw binary is signed without its place; the trusted comment may say it."""
    for one, part in zip(signed, wanted.parts, strict=False):
        said = one.facts.get("addr", "")
        if said and part.address is not None and (not _ADDRESS.fullmatch(said) or int(said, 16) != part.address):
            raise _refuse("addr", target, f"the image is signed for address {said}, not for {part.address:#010x}")


def _version(rules: Rules, target: Target, signed: Sequence[minisign.Signed]) -> str:
    versions = {one.facts.get("version", "") for one in signed}
    if not rules.no_downgrade:
        return versions.pop() if len(versions) == 1 else ""
    if not signed or "" in versions:
        raise _refuse(
            "version", target, "no version is signed (trusted comment `version:1.2.3`), and going back is not allowed"
        )
    if len(versions) > 1:
        raise _refuse("version", target, f"the images have different versions: {', '.join(sorted(versions))}")
    version = versions.pop()
    if (found := version_key(version)) is None:
        raise _refuse("version", target, f"{version} is no version of numbers and dots")
    if (floor := version_key(target.version)) is not None and found < floor:
        raise _refuse("version", target, f"version {version} is older than {target.version}, which was proven there")
    return version


def version_key(text: str) -> tuple[int, ...] | None:
    """``1.10`` is newer than ``1.9`` and the same as ``1.10.0``; ``None`` for what is no version."""
    parts = text.removeprefix("v").split(".")
    if not text or len(text) > VERSION_CHARS or not all(part.isascii() and part.isdigit() for part in parts):
        return None
    found = [int(part) for part in parts]
    while found and not found[-1]:
        found.pop()
    return tuple(found)


def newest(first: str, second: str) -> str:
    """The newer of two versions, as it was written; what is none is older than all."""

    def rank(text: str) -> tuple[bool, tuple[int, ...]]:
        key = version_key(text)
        return key is not None, key or ()

    return second if rank(second) > rank(first) else first


def is_open(rules: Rules, utc_s: float, local: Callable[[float], time.struct_time] = time.localtime) -> bool:
    """Whether the target may be stopped at this time of the gateway's own clock. No window: always."""
    if not rules.window:
        return True
    now = local(utc_s)
    minute = now.tm_wday * 1440 + now.tm_hour * 60 + now.tm_min
    return any(
        start <= at < end for text in rules.window for start, end in parse_window(text) for at in (minute, minute + 10080)
    )
