"""The OpenAPI document against the running server: everything that it allows is answered as it says.

schemathesis makes requests from the document, well-formed ones and wrong ones, over a real socket, and holds each answer
against the document: status, media type, headers, shape. A valid request must not be called wrong, a wrong one not be taken.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from schemathesis import GenerationMode, checks
from schemathesis.core.result import Ok

from bridged.api.auth import Authority
from bridged.api.http import HttpServer
from bridged.api.http_call import Services
from bridged.api.http_openapi import document
from bridged.api.transfers import Transfers
from bridged.images.store import Store
from bridged.jobs.model import Job, JobKind, Submission
from tests.api.fakes import FakeJobs, Script
from tests.api.http_bench import Bench, bench

DATA = bytes(range(256)) * 8
SHA = hashlib.sha256(DATA).hexdigest()
# Streams without an end, and what can only be said byte by byte, have tests of their own.
ENDLESS = ("jobEvents", "targetEvents", "allEvents", "console")
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
# What a schema cannot say: that bytes have the digest in the path, that a header is the base64 of something, or that it comes
# together with another one. These have tests of their own in test_http_uploads.py.
PICKY = frozenset({"PUT /v1/images/{image}", "POST /v1/uploads", "PATCH /v1/uploads/{upload}", "POST /v1/uploads/{upload}"})


@schemathesis.serializer("application/octet-stream", "application/offset+octet-stream")
def as_bytes(_context: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


class AnyJobs(FakeJobs):
    """Takes every submission: what it becomes is not the matter here."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.gone: list[str] = []

    async def submit(self, sub: Submission) -> Job:
        image = self._resolved(sub) if sub.image else sub
        self.scripts = [Script(image.kind, image.target, image.image, image.params, at_once=True)]
        if sub.target in ("motor1", "motor2"):
            self.submissions.clear()
        try:
            return await super().submit(sub)
        finally:
            self.scripts = []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A server on a loop of its own, because schemathesis asks from this thread."""
    root = tmp_path_factory.mktemp("openapi")
    started, done = threading.Event(), asyncio.Event()
    found: list[Bench] = []
    loop = asyncio.new_event_loop()

    async def live() -> None:
        async with bench(root) as made:
            jobs = AnyJobs(made.store)
            made.server.services.jobs = jobs
            made.store.add(DATA, "app.bin")
            await jobs.submit(Submission(JobKind.FLASH, "motor1", "app.bin"))
            jobs.traces.save("j1", "0.0 # format 115200 8E1\n0.0 > 7F\n0.001 < 79\n")
            found.append(made)
            started.set()
            await done.wait()
            await jobs.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(live()), daemon=True)
    thread.start()
    assert started.wait(20)
    yield found[0]
    loop.call_soon_threadsafe(done.set)
    thread.join(20)
    assert not thread.is_alive()
    loop.close()


async def _operations() -> list[str]:
    nothing: Any = None
    server = HttpServer(Services(nothing, nothing, Authority(), Transfers(0.0)))
    return [f"{op.method} {op.path}" for op in server.operations if not op.endless and op.name != "openapi"]


@pytest.fixture(scope="module")
def operations(server: Bench) -> dict[str, Any]:
    schema = schemathesis.openapi.from_url(f"{server.url}/v1/openapi.json")
    made = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    return {operation.label: operation for operation in made}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("label", asyncio.run(_operations()))
def test_the_server_answers_as_its_document_says(operations: dict[str, Any], label: str, mode: GenerationMode) -> None:
    operation = operations[label]
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query or operation.path_parameters):
        return  # There is nothing that could be said wrongly.
    asked = 0

    @settings(max_examples=25, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate), database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        nonlocal asked
        asked += 1
        # What schemathesis cannot put into a path, braces above all, it replaces by a character that is not allowed there; and
        # a percent sign before two digits it takes for an encoding: what comes out of that may be a control character.
        path = [unquote(str(value)) for value in (case.path_parameters or {}).values()]
        assume(mode is GenerationMode.NEGATIVE or all(re.fullmatch("[ -.0-~]*", value) for value in path))
        answer = case.call(timeout=20)
        # tus refuses with numbers of its own (412, 409), which the check does not know.
        rejected = [checks.negative_data_rejection] if "uploads" not in label else []
        case.validate_response(answer, checks=[*CHECKS, *rejected])
        if mode is GenerationMode.POSITIVE:
            assert answer.status_code not in (400, 415) or label in PICKY, answer.text

    ask()
    assert asked


def test_the_document_is_openapi_3_1(server: Bench) -> None:
    import jsonschema_rs

    found = document(server.server.operations)
    assert found["openapi"].startswith("3.1.")
    names = [op["operationId"] for path in found["paths"].values() for op in path.values()]
    assert len(names) == len(set(names)) == len(server.server.operations)
    for name, shape in found["components"]["schemas"].items():
        jsonschema_rs.meta.validate(shape | {"$schema": "https://json-schema.org/draft/2020-12/schema"})
        assert shape, name
    for ending in ENDLESS:
        assert ending in names


def test_real_answers_have_their_shapes(server: Bench) -> None:
    """Said by hand where a generator would have to be lucky."""
    import jsonschema_rs
    import requests

    found = document(server.server.operations)
    for path, name in (
        ("/v1/targets", "Targets"),
        ("/v1/targets/motor1", "Target"),
        ("/v1/jobs", "Jobs"),
        ("/v1/jobs/j1", "Job"),
        ("/v1/jobs/j1/log", "Log"),
        ("/v1/images", "Images"),
        (f"/v1/images/{SHA}", "Image"),
        ("/v1", "Service"),
        ("/readyz", "Ready"),
        ("/v1/jobs/nope", "Problem"),
    ):
        answer = requests.get(server.url + path, timeout=10).json()
        root = {"$ref": f"#/components/schemas/{name}", "components": found["components"]}
        jsonschema_rs.validator_for(root).validate(answer)
        # And a shape that takes anything would be no test.
        with pytest.raises(jsonschema_rs.ValidationError):
            jsonschema_rs.validator_for(root).validate({})
