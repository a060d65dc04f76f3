"""What a job says about protection and option bytes, as values: parsed, checked, and refused where its consent is missing.

The same function reads them when a job is submitted, so that nothing waits in a queue that could never run, and again before
its session starts. What is refused here is refused for every chip: a name that is never written, and anything that erases the
whole flash without the job saying so in these words. Pure; what a part can do is the business of ``chips.options`` and
``protection``.

Parameters (of the line protocol, as plain values): ``set=NAME:VALUE,...``; ``raw=ADDR:HEX,...`` with ``fields=NAME,...``, the
fields that those bytes may change; ``what=readout|write``; ``sectors=0,2-5``; ``unprotect`` and ``protect`` of a flash or an
ensure, the second one carried out last; ``force=erase-everything``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bridged.chips.options import refuse_names
from bridged.errors import BadRequest, ConsentMissing

ERASE_EVERYTHING = "erase-everything"
MOST_SECTORS = 512  # Named one by one or as ranges; the largest parts have as many.


@dataclass(frozen=True, slots=True)
class Wishes:
    """``fields``: option fields to set. ``patches``: raw bytes by address, which may change the fields in ``named``.

    ``what``: ``readout`` or ``write``, for protect and unprotect. ``unprotect``, ``protect``: of a flash or an ensure.
    """

    fields: tuple[tuple[str, int], ...] = ()
    patches: tuple[tuple[int, bytes], ...] = ()
    named: tuple[str, ...] = ()
    what: str = ""
    sectors: tuple[int, ...] = ()
    unprotect: bool = False
    protect: bool = False

    @property
    def writes_options(self) -> bool:
        return bool(self.fields or self.patches)

    def to_list(self) -> list[Any]:
        fields = [list(pair) for pair in self.fields]
        patches = [[address, data.hex()] for address, data in self.patches]
        return [fields, patches, list(self.named), self.what, list(self.sectors), self.unprotect, self.protect]

    @classmethod
    def from_list(cls, data: list[Any]) -> Wishes:
        fields, patches, named, what, sectors, unprotect, protect = data
        return cls(
            tuple((str(name), int(value)) for name, value in fields),
            tuple((int(address), bytes.fromhex(text)) for address, text in patches),
            tuple(named),
            what,
            tuple(sectors),
            unprotect,
            protect,
        )


def wishes_of(kind: str, params: Mapping[str, Any]) -> Wishes:
    """Raises ``BadRequest``, ``NotAllowed`` (never written), ``ConsentMissing``."""
    consents = {word.strip() for word in str(params.get("force") or "").split(",")}
    if kind == "option-bytes":
        return _options(params)
    if kind in ("protect", "unprotect"):
        what = str(params.get("what") or "readout")
        if what not in ("readout", "write"):
            raise BadRequest(f"what={what[:20]!r}: expected readout or write", option="what")
        sectors = _sectors(str(params.get("sectors") or ""))
        if bool(sectors) != (kind == "protect" and what == "write"):
            raise BadRequest("sectors= goes with PROTECT what=write, and has to name them", option="sectors")
        if kind == "unprotect" and what == "readout":
            _needs_consent(consents, "removing readout protection")
        return Wishes(what=what, sectors=sectors)
    if kind in ("flash", "ensure"):
        unprotect, protect = bool(params.get("unprotect")), bool(params.get("protect"))
        if unprotect:
            _needs_consent(consents, "unprotect=1: removing readout protection")
            if params.get("entry") == "one-shot":
                raise BadRequest("unprotect=1 resets the target into its loader afterwards: it cannot be entry=one-shot")
        return Wishes(unprotect=unprotect, protect=protect)
    return Wishes()


def _needs_consent(consents: set[str], what: str) -> None:
    if ERASE_EVERYTHING not in consents:
        raise ConsentMissing(
            f"{what} erases the whole flash, nothing of it is kept; a job that wants that says force={ERASE_EVERYTHING}",
            say=f"force={ERASE_EVERYTHING}",
        )


def _options(params: Mapping[str, Any]) -> Wishes:
    fields: dict[str, int] = {}
    for part in filter(None, str(params.get("set") or "").split(",")):
        match = re.fullmatch(r"([A-Za-z][A-Za-z0-9_]{0,39})[:=](0[xX][0-9A-Fa-f]{1,8}|[0-9]{1,10})", part)
        if match is None:
            raise BadRequest(f"set={part[:60]!r}: expected NAME:VALUE such as IWDG_SW:1", option="set")
        if match[1].lower() in (name.lower() for name in fields):
            raise BadRequest(f"set= names {match[1]} twice", option="set")
        fields[match[1]] = int(match[2], 0) if match[2][:2].lower() == "0x" else int(match[2])
    patches = []
    for part in filter(None, str(params.get("raw") or "").split(",")):
        address, _, text = part.partition(":")
        if not re.fullmatch(r"0[xX][0-9A-Fa-f]{1,8}", address) or not re.fullmatch(r"([0-9A-Fa-f]{2}){1,128}", text):
            raise BadRequest(f"raw={part[:60]!r}: expected ADDR:HEX such as 0x1FFFC000:EFAA", option="raw")
        patches.append((int(address, 16), bytes.fromhex(text)))
    named = tuple(filter(None, str(params.get("fields") or "").split(",")))
    if fields and patches:
        raise BadRequest("set= and raw= are two ways to say the same; use one of them", option="raw")
    if bool(patches) != bool(named):
        raise BadRequest("raw= goes with fields=, the names of the fields that those bytes may change", option="fields")
    refuse_names(fields)
    return Wishes(fields=tuple(fields.items()), patches=tuple(patches), named=named)


def _sectors(text: str) -> tuple[int, ...]:
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part)
        if match is None:
            raise BadRequest(f"sectors={part[:20]!r}: expected numbers such as 0,2-5", option="sectors")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or len(found) + last - first >= MOST_SECTORS:
            raise BadRequest(f"sectors={part}: expected at most {MOST_SECTORS} numbers, the lower one first", option="sectors")
        found |= set(range(first, last + 1))
    return tuple(sorted(found))
