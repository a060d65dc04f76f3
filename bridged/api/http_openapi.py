"""The OpenAPI 3.1 document, made from the rows that the router works with. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from bridged import __version__
from bridged.api.http_call import Answer, Body, Operation
from bridged.api.http_problem import MEDIA
from bridged.api.http_schemas import components, ref

ABOUT = """\
The gateway's job functions over HTTP; what the line protocol calls by a verb has the same words here. Times are RFC 3339 in
UTC. Errors are problem documents with a stable `code`. Without a token only this machine may ask, and only for what
`auth.loopback` allows; with one: `Authorization: Bearer TOKEN`.
"""


def document(operations: Iterable[Operation]) -> dict[str, Any]:
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "bridged", "version": __version__, "description": ABOUT, "license": {"name": "Apache-2.0"}},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": components(),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "responses": {"Problem": {"description": "refused or failed", "content": {MEDIA: {"schema": ref("Problem")}}}},
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "tags": [operation.tag or "uploads"],
        "responses": {str(status): _answer(answer) for status, answer in operation.answers.items()}
        | {"default": {"$ref": "#/components/responses/Problem"}},
    }
    if operation.text:
        found["description"] = operation.text
    if operation.params:
        found["parameters"] = [
            {
                "name": param.name,
                "in": param.where,
                "required": param.required,
                "description": param.text,
                "schema": _whole(dict(param.schema)),
            }
            for param in operation.params
        ]
    if operation.body is not None:
        found["requestBody"] = _body(operation.body)
    if operation.scope is not None:
        found["security"] = [{"token": []}, {}]
        found["x-scope"] = str(operation.scope)
    return found


def _whole(schema: dict[str, Any]) -> dict[str, Any]:
    """A pattern of ours is matched against the whole text, one of JSON Schema anywhere in it."""
    if "pattern" in schema and not re.match(r"\^.*\$$", schema["pattern"]):
        schema["pattern"] = f"^({schema['pattern']})$"
    return schema


def _answer(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = {"description": answer.text}
    if answer.headers:
        found["headers"] = {name: {"description": text, "schema": {"type": "string"}} for name, text in answer.headers.items()}
    if answer.schema:
        found["content"] = {answer.media: {"schema": ref(answer.schema)}}
    elif answer.media != "application/json":
        found["content"] = {answer.media: {"schema": {"type": "string"}}}
    return found


def _body(body: Body) -> dict[str, Any]:
    schema = ref(body.schema) if body.schema else {"type": "string", "format": "binary"}
    return {"required": body.required, "description": body.text, "content": {body.media: {"schema": schema}}}
