"""From a request that was checked against the table of verbs to a ``Submission``, for every listener.

``protocol.verbs.VERBS`` says what each kind of job takes; here is what it means. No I/O, no wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridged.errors import BadRequest
from bridged.jobs.model import JobKind, Submission
from bridged.protocol import line as codec
from bridged.protocol.verbs import VERBS, Param

KINDS: dict[str, JobKind] = {
    "FLASH": JobKind.FLASH,
    "ENSURE": JobKind.ENSURE,
    "VERIFY": JobKind.VERIFY,
    "READ": JobKind.READ,
    "ERASE": JobKind.ERASE,
    "RESET": JobKind.RESET,
    "ID": JobKind.IDENTIFY,
    "DOCTOR": JobKind.DOCTOR,
    "OPTION-BYTES": JobKind.OPTION_BYTES,
    "PROTECT": JobKind.PROTECT,
    "UNPROTECT": JobKind.UNPROTECT,
    "XMODEM": JobKind.XMODEM,
}
VERB_OF: dict[JobKind, str] = {kind: verb for verb, kind in KINDS.items()}


def submission(verb: str, values: dict[str, Any], principal: str) -> Submission:
    """``values``: as ``protocol.line.bind`` gives them."""
    rest = dict(values)
    kind, target, image, own_id = KINDS[verb], rest.pop("target"), rest.pop("image", ""), rest.pop("id", "")
    rest.pop("verify", None)  # "full" is the only value, and the only behaviour.
    if kind is JobKind.READ:
        rest["address"], rest["length"] = rest.pop("addr"), rest.pop("len")
    if kind is JobKind.ERASE:
        # Length 0 is the session's word for everything; the grammar has no other way to say it than "all".
        rest["address"], rest["length"] = rest.pop("range") or (0, 0)
    if kind is JobKind.XMODEM and rest.setdefault("type", "bin") == "bin" and "addr" not in rest and "@" not in image:
        rest["addr"] = 0  # The bytes as they are: where they belong is the affair of the target's bootloader.
    return Submission(kind, target, image, rest, own_id, principal)


def values_of(verb: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """``data``: arguments and options as JSON values; the same checks as ``protocol.line.bind``. Raises ``BadRequest``.

    Flags are true or false, numbers and addresses numbers or their text, lists of words lists; everything else is text.
    """
    row = VERBS[verb]
    params = {param.name: param for param in (*row.args, *row.options)}
    for name in data:
        if name not in params:
            raise BadRequest(f"{verb}: unknown field {name[:40]!r}; it takes {', '.join(params)}", field=name[:40])
    for param in row.args[: row.needed]:
        if param.name not in data:
            raise BadRequest(f"{verb}: {param.name} is missing", field=param.name)
    return {name: codec.convert(verb, params[name], _text(verb, params[name], value)) for name, value in data.items()}


NUMBERS = frozenset({"address", "length", "number", "size"})
LISTS = frozenset({"list", "images", "patches", "signatures", "targets"})


def _text(verb: str, param: Param, value: Any) -> str:
    """As the line protocol would say it."""
    match value:
        case bool() if param.kind == "flag":
            return "1" if value else "0"
        case int() if param.kind in NUMBERS and not isinstance(value, bool) and 0 <= value < 1 << 53:
            return str(value)
        case float() if param.kind in NUMBERS and value.is_integer() and 0 <= value < 1 << 53:
            return str(int(value))  # JSON knows no other numbers: 4096.0 is 4096.
        case list() if param.kind in LISTS and value and all(isinstance(item, str) and "," not in item for item in value):
            return ",".join(value)
        case str() if param.kind != "flag" and value:
            return value
    raise BadRequest(
        f"{verb}: {param.name} cannot be {str(value)[:40]!r}; expected {param.values or param.text}", field=param.name
    )
