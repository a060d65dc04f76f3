"""Shapes of what goes in and out over HTTP, as JSON Schema 2020-12: the components of the OpenAPI document.

What a job takes is made from the table of verbs, by kind of job; the rest is written down here and compared with real answers
by the tests. A field that is not named may be added in a later version: clients skip what they do not know.
"""

from __future__ import annotations

from typing import Any

from bridged.api.requests import LISTS, VERB_OF
from bridged.events import Phase
from bridged.jobs.model import JobKind, JobState
from bridged.protocol.line import PATTERNS
from bridged.protocol.verbs import TYPES, VERBS, Param

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
TIME: Schema = {"type": ["string", "null"], "format": "date-time"}
ADDRESS_TEXT = r"^(0[xX][0-9a-fA-F]{1,8}|[0-9]{1,9})$"
LENGTH_TEXT = (
    r"^(0[xX][1-9a-fA-F][0-9a-fA-F]{0,6}|[1-9][0-9]{0,5}|[1-9][0-9]{0,4}[Kk]([Ii][Bb])?|[1-9][0-9]{0,2}[Mm]([Ii][Bb])?)$"
)
RANGE_TEXT = r"^(all|(0[xX][0-9a-fA-F]{1,7}|[0-9]{1,8})\+(0[xX][1-9a-fA-F][0-9a-fA-F]{0,6}|[1-9][0-9]{0,5}))$"
NOT_OVER_HTTP = frozenset({"target", "id", "wait"})  # In the path, in its header, and replaced by events.


def maybe(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def shape(properties: dict[str, Schema], *optional: str, closed: bool = False, **more: Any) -> Schema:
    found: Schema = {"type": "object", "properties": properties}
    if required := [name for name in properties if name not in optional]:
        found["required"] = required
    if closed:
        found["additionalProperties"] = False
    return found | more


def page(name: str, of: str) -> Schema:
    """``next`` goes into ``cursor``; null at the end."""
    return shape({name: {"type": "array", "items": ref(of)}, "next": {"type": ["string", "null"]}})


def of_param(param: Param) -> Schema:
    """What ``requests.values_of`` takes for one argument or option."""
    text = {"description": param.text}
    if param.kind == "flag":
        return {**FLAG, **text}
    if param.kind in LISTS:
        one: Schema = {"type": "string", "enum": list(param.choices)} if param.choices else _item(param.kind)
        items = {"type": "array", "items": one, "minItems": 1, "maxItems": 8}
        return {"oneOf": [one, items], **text}
    if param.choices:
        return {"type": "string", "enum": list(param.choices), **text}
    match param.kind:
        case "address":
            numbers: Schema = {"type": "integer", "minimum": 0, "maximum": 0xFFFFFFFF}
            return {"oneOf": [numbers, {"type": "string", "pattern": ADDRESS_TEXT}], **text}
        case "length":
            numbers = {"type": "integer", "minimum": 1, "maximum": 1 << 32}
            return {"oneOf": [numbers, {"type": "string", "pattern": LENGTH_TEXT}], **text}
        case "range":
            return {"type": "string", "pattern": RANGE_TEXT, **text}
        case "number":
            return {"type": "integer", "minimum": 0, "maximum": 1 << 53, **text}
    return {"type": "string", "pattern": f"^{PATTERNS[param.kind][0]}$", **text}


def _item(kind: str) -> Schema:
    """One of a list: without the comma that separates them."""
    patterns = {"images": r"^[ -+\--~]{1,100}$", "patches": r"^0[xX][0-9A-Fa-f]{1,8}:([0-9A-Fa-f]{2}){1,16}$"}
    patterns["signatures"] = r"^[A-Za-z0-9+/]{100,900}={0,2}$"
    patterns["targets"] = r"^[A-Za-z0-9_.-]{1,64}$"
    return {"type": "string", "pattern": patterns[kind]}


def request_of(verb: str, kind: str = "") -> Schema:
    row = VERBS[verb]
    params = [param for param in (*row.args, *row.options) if param.name not in NOT_OVER_HTTP]
    needed = {param.name for param in row.args[: row.needed]}
    properties = {"kind": {"type": "string", "const": kind}} if kind else {}
    properties |= {param.name: of_param(param) for param in params}
    optional = [param.name for param in params if param.name not in needed]
    return shape(properties, *optional, closed=True, description=row.text)


def _problem() -> Schema:
    return shape(
        {
            "code": {"type": "string", "description": "stable; docs/errors.md has them all"},
            "cause": {"type": "string", "description": "the likely cause"},
            "remedy": {"type": "string", "description": "what to do"},
            "retryable": {"type": "boolean", "description": "the same request may work later"},
            "facts": {"type": "object", "description": "the evidence as data"},
        }
    )


def _title(kind: JobKind) -> str:
    return "".join(word.capitalize() for word in kind.split("-")) + "Request"


def components() -> dict[str, Schema]:
    kinds = {_title(kind): request_of(VERB_OF[kind], str(kind)) for kind in JobKind}
    progress = {"phase": {"type": ["string", "null"], "enum": [*Phase, None]}, "done": COUNT, "total": COUNT}
    error = _problem()
    failure: Schema = {**error, "properties": {**error["properties"], "message": TEXT}, "type": ["object", "null"]}
    failure["required"] = [*error["required"], "message"]
    return {
        **kinds,
        "JobRequest": {
            "oneOf": [ref(name) for name in kinds],
            "discriminator": {
                "propertyName": "kind",
                "mapping": {str(kind): f"#/components/schemas/{_title(kind)}" for kind in JobKind},
            },
        },
        "PlanRequest": request_of("PLAN"),
        "CancelRequest": shape({"force": FLAG}, "force", closed=True),
        "Problem": {
            **error,
            "properties": {
                "type": TEXT,
                "title": TEXT,
                "status": {"type": "integer"},
                "detail": {"type": "string", "description": "what was attempted, where, what was expected, what came"},
                **error["properties"],
            },
            "required": ["type", "title", "status", "detail", *error["required"]],
        },
        "Target": shape(
            {
                "target": TEXT,
                "state": {"type": "string", "enum": ["idle", "busy", "absent", "broken"]},
                "reason": maybe(TEXT),
                "chip": TEXT,
                "pid": {"type": ["integer", "null"]},
                "family": TEXT,
                "names": TEXT,
                "uid": TEXT,
                "flash_bytes": COUNT,
                "layout": TEXT,
                "loader": TEXT,
                "identified": TIME,
                "content": TEXT,
                "image": TEXT,
                "image_name": TEXT,
                "evidence": TEXT,
                "proven": TIME,
                "version": TEXT,
                "owner": {"type": "string", "description": "the job that runs"},
                "queued": COUNT,
                "held": {
                    "type": ["object", "null"],
                    "description": "who holds it: a job, a lock, or who writes on its console",
                    "properties": {"owner": TEXT, "kind": {"type": "string", "enum": ["job", "lock", "console"]}, "note": TEXT},
                },
            }
        ),
        "LockRequest": shape(
            {
                "ttl": {"type": "integer", "minimum": 1, "maximum": 86400},
                "note": {"type": "string", "pattern": "^[ -~]{0,80}$"},
            },
            *("ttl", "note"),
            closed=True,
        ),
        "Lock": shape({"target": TEXT, "owner": TEXT, "ttl": {"type": "number"}}),
        "Targets": shape({"targets": {"type": "array", "items": ref("Target")}}),
        "Job": shape(
            {
                "job": TEXT,
                "kind": {"type": "string", "enum": list(JobKind)},
                "target": TEXT,
                "state": {"type": "string", "enum": list(JobState)},
                **progress,
                "reason": maybe(TEXT),
                "error": {"type": ["string", "null"], "description": "the code of `problem`"},
                "image": maybe(TEXT),
                "created": TIME,
                "started": TIME,
                "ended": TIME,
                "seq": COUNT,
                "attempts": COUNT,
                "content": maybe(TEXT),
                "principal": maybe(TEXT),
                "source": maybe(TEXT),
                "params": {"type": ["object", "null"]},
                "result": {"type": ["object", "null"]},
                "problem": failure,
                "trace": {"type": "boolean", "description": "a recording is kept"},
            }
        ),
        "Jobs": page("jobs", "Job"),
        "Update": shape(
            {
                "job": TEXT,
                "target": TEXT,
                "seq": COUNT,
                "at": TIME,
                "state": {"type": "string", "enum": list(JobState)},
                **progress,
                "rate": {"type": "integer", "minimum": 0, "description": "bytes a second"},
                "code": maybe(TEXT),
                "reason": maybe(TEXT),
                "event": {"type": "string", "description": "what happened; its facts are further fields"},
            },
            "event",
        ),
        "Log": shape({"entries": {"type": "array", "items": ref("Update")}, "next": {"type": ["integer", "null"]}}),
        "Image": shape(
            {
                "image": {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"},
                "name": maybe(TEXT),
                "size": COUNT,
                "type": {"type": "string", "enum": list(TYPES)},
                "used": TIME,
                "contents": {
                    "type": "object",
                    "additionalProperties": TEXT,
                    "description": "digests of its content, by the way in which it was read",
                },
            }
        ),
        "Images": page("images", "Image"),
        "Plan": shape(
            {
                "target": TEXT,
                "part": {"type": "array", "items": shape({"name": TEXT, "start": COUNT, "end": COUNT})},
                "chip": TEXT,
                "pid": COUNT,
                "layout": TEXT,
                "flash_bytes": COUNT,
                "range": {
                    "type": "array",
                    "items": shape(
                        {
                            "action": {"type": "string", "enum": ["stay", "write", "keep", "lose"]},
                            **dict.fromkeys(
                                ("address", "end", "sectors", "first", "last", "sector_bytes"),
                                COUNT,
                            ),
                            **dict.fromkeys(("write_bytes", "keep_bytes", "lose_bytes"), COUNT),
                        }
                    ),
                },
                **dict.fromkeys(
                    ("erase_sectors", "erase_bytes", "write_bytes", "keep_bytes", "lose_bytes", "stay_bytes", "baud"), COUNT
                ),
                **{key: {"type": "number"} for key in ("seconds", "seconds_most", "erase_seconds")},
                "assumed": {"type": "array", "items": TEXT},
                "content": TEXT,
                "proven": FLAG,
            }
        ),
        "Ready": shape({"ready": FLAG, "reason": TEXT}),
        "Service": shape({"version": TEXT, "gateway": TEXT, "principal": TEXT, "scopes": {"type": "array", "items": TEXT}}),
    }
