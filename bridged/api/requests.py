"""From a request that was checked against the table of verbs to a ``Submission``, for every listener.

``protocol.line.VERBS`` says what each kind of job takes; here is what it means. No I/O, no wire.
"""

from __future__ import annotations

from typing import Any

from bridged.jobs.model import JobKind, Submission

KINDS: dict[str, JobKind] = {
    "FLASH": JobKind.FLASH,
    "ENSURE": JobKind.ENSURE,
    "VERIFY": JobKind.VERIFY,
    "READ": JobKind.READ,
    "ERASE": JobKind.ERASE,
    "RESET": JobKind.RESET,
    "ID": JobKind.IDENTIFY,
    "DOCTOR": JobKind.DOCTOR,
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
    return Submission(kind, target, image, rest, own_id, principal)
