"""What gateways and operators say to each other over NATS: subjects, names of streams, and messages as JSON. No I/O.

Subjects, where GW, ROLLOUT and TARGET are single tokens (``TOKEN``)::

    bridged.v1.GW.cmd.job.ROLLOUT.TARGET.ROUND      a job for one target           stream BRIDGED_V1_CMD, kept by age
    bridged.v1.GW.cmd.cancel.ROLLOUT.TARGET.ROUND   take it back if it has not begun
    bridged.v1.GW.state.job.ROLLOUT.TARGET          how it is, and how it ended    stream BRIDGED_V1_REPORT, last one of each
    bridged.v1.GW.state.target.TARGET               inventory of one target        stream BRIDGED_V1_STATE, last one of each
    bridged.v1.GW.state.gateway                     who the gateway is
    bridged.v1.GW.evt.progress.ROLLOUT.TARGET       live only, in no stream

The gateway's name stands in the subject and in the message. A credential may publish below its own name only, but who asks
chooses where the *answer* goes, and brokers look at no right before they send it there: what a gateway may read can be stored
at another one's subject. What does not name its receiver, and its subject, is refused (tests/fleet/test_permissions.py).

Versions: ``v1`` in the subjects is the format of the whole space and changes when an old reader would misunderstand a new
message. A reader ignores fields that it does not know. Readers understand ``UNDERSTOOD``, the version that they write and the
one before it; so far there is one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bridged.errors import FleetCommand

VERSION = 1
UNDERSTOOD = (1,)
TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")
ROOT = f"bridged.v{VERSION}"

COMMANDS = f"BRIDGED_V{VERSION}_CMD"
REPORTS = f"BRIDGED_V{VERSION}_REPORT"
STATES = f"BRIDGED_V{VERSION}_STATE"
ARTIFACTS = "bridged-artifacts"  # Object store: an artifact is named by the SHA-256 of its file.
ARTIFACT_STREAM = f"OBJ_{ARTIFACTS}"
ROLLOUTS = "bridged-rollouts"  # KV bucket.

MESSAGE_BYTES = 32768  # Of one message; the options of a job take 16 KiB at most.
CHUNK_BYTES = 65536  # Of an artifact: what a link that breaks sends again at most.

# How a job ends at a gateway: the terminal states of ``jobs.model``, and that its time was over before it came to it.
ENDED = frozenset({"succeeded", "failed", "rolled_back", "canceled", "rejected", "timed_out", "expired"})

FLASHING = ("ensure", "flash")  # Kinds of jobs after which a target shall hold the artifact.


@dataclass(frozen=True, slots=True)
class Artifact:
    """A staged file. ``name`` and ``type``: as the image store takes them."""

    sha256: str
    size: int
    name: str = ""
    type: str = "auto"


@dataclass(frozen=True, slots=True)
class Command:
    """One job for one target. ``expires``: UTC seconds after which it is not begun any more, 0: never. ``round``: how often the
    roll-out has said it; a later one counts only where the earlier was taken back."""

    gateway: str
    rollout: str
    target: str
    round: int = 0
    kind: str = "ensure"
    artifact: Artifact | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    expires: float = 0.0

    @property
    def id(self) -> str:
        """The idempotency id of the job, and of the message."""
        return f"fleet/{self.rollout}/{self.target}/{self.round}"

    @property
    def subject(self) -> str:
        return f"{ROOT}.{self.gateway}.cmd.job.{self.rollout}.{self.target}.{self.round}"

    def encode(self) -> bytes:
        data: dict[str, Any] = {"v": VERSION, "gateway": self.gateway, "rollout": self.rollout, "target": self.target}
        data |= {"round": self.round, "kind": self.kind, "options": dict(self.options), "expires": self.expires}
        if self.artifact:
            one = self.artifact
            data["artifact"] = {"sha256": one.sha256, "size": one.size, "name": one.name, "type": one.type}
        return _dump(data)


@dataclass(frozen=True, slots=True)
class Cancel:
    gateway: str
    rollout: str
    target: str
    round: int = 0

    @property
    def subject(self) -> str:
        return f"{ROOT}.{self.gateway}.cmd.cancel.{self.rollout}.{self.target}.{self.round}"

    def encode(self) -> bytes:
        words = {"gateway": self.gateway, "rollout": self.rollout, "target": self.target, "round": self.round}
        return _dump({"v": VERSION, **words})


@dataclass(frozen=True, slots=True)
class Report:
    """How one job of a roll-out is. ``state``: ``accepted``, ``staging``, a state of ``jobs.model``, or ``expired``. ``code``,
    ``message``: of the error, where there is one. ``evidence``: what the success stands on. ``at``: by the gateway's clock."""

    gateway: str
    rollout: str
    target: str
    round: int
    state: str
    job: str = ""
    phase: str = ""
    code: str = ""
    message: str = ""
    evidence: str = ""
    at: float = 0.0

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def subject(self) -> str:
        return f"{ROOT}.{self.gateway}.state.job.{self.rollout}.{self.target}"

    def encode(self) -> bytes:
        data: dict[str, Any] = {"v": VERSION, "gateway": self.gateway, "rollout": self.rollout, "target": self.target}
        data |= {"round": self.round, "state": self.state, "job": self.job, "phase": self.phase, "code": self.code}
        return _dump(data | {"message": self.message, "evidence": self.evidence, "at": round(self.at, 3)})


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is, told live. ``total`` 0: nobody knows; ``rate``: bytes a second in this phase, 0 likewise."""

    gateway: str
    rollout: str
    target: str
    phase: str = ""
    done: int = 0
    total: int = 0
    rate: int = 0

    @property
    def subject(self) -> str:
        return f"{ROOT}.{self.gateway}.evt.progress.{self.rollout}.{self.target}"

    def encode(self) -> bytes:
        data: dict[str, Any] = {"v": VERSION, "gateway": self.gateway, "rollout": self.rollout, "target": self.target}
        return _dump(data | {"phase": self.phase, "done": self.done, "total": self.total, "rate": self.rate})


def inbox_of(name: str) -> str:
    """Where answers come: below the own name, so that nobody else's permission covers it."""
    return f"_INBOX_{name}"


def command_filter(gateway: str) -> str:
    return f"{ROOT}.{gateway}.cmd.>"


def reports_of(rollout: str) -> str:
    return f"{ROOT}.*.state.job.{rollout}.>"


def target_subject(gateway: str, target: str) -> str:
    return f"{ROOT}.{gateway}.state.target.{target}"


def gateway_subject(gateway: str) -> str:
    return f"{ROOT}.{gateway}.state.gateway"


def progress_of(rollout: str) -> str:
    return f"{ROOT}.*.evt.progress.{rollout}.>"


def encode_state(data: Mapping[str, Any]) -> bytes:
    return _dump({"v": VERSION, **data})


def decode(raw: bytes) -> dict[str, Any]:
    """Any message as its fields. Raises ``FleetCommand`` for what is none, or of a version that is not understood."""
    if len(raw) > MESSAGE_BYTES:
        raise FleetCommand(f"a message of {len(raw)} bytes; at most {MESSAGE_BYTES} are read")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FleetCommand(f"a message that is no JSON: {raw[:40]!r}") from error
    if not isinstance(data, dict):
        raise FleetCommand(f"a message that is no object: {raw[:40]!r}")
    if not _whole(data.get("v")) or data["v"] not in UNDERSTOOD:
        known = ", ".join(map(str, UNDERSTOOD))
        raise FleetCommand(f"a message of version {str(data.get('v'))[:20]}; understood here: {known}")
    return data


def received(raw: bytes, subject: str, gateway: str) -> Command | Cancel:
    """What a gateway was sent. Raises ``FleetCommand`` where it is malformed, or meant for another."""
    data = decode(raw)
    words = [data.get(name) for name in ("gateway", "rollout", "target")]
    if not all(isinstance(word, str) and TOKEN.fullmatch(word) for word in words) or not _whole(data.get("round")):
        raise FleetCommand(f"a message at {subject[:200]} without gateway, rollout, target and round")
    to, rollout, target = map(str, words)
    if to != gateway:
        raise FleetCommand(f"a message at {subject[:200]} is for gateway {to}, this is {gateway}", gateway=to)
    number = int(data["round"])
    found = Cancel(to, rollout, target, number)
    if subject == found.subject:
        return found
    expires, options, kind = data.get("expires", 0), data.get("options", {}), data.get("kind")
    if not isinstance(options, dict) or not isinstance(kind, str) or not _number(expires):
        raise FleetCommand(f"a command at {subject[:200]} whose kind, options or expiry cannot be read")
    command = Command(to, rollout, target, number, kind, _artifact(data.get("artifact")), options, float(expires))
    if subject != command.subject:
        raise FleetCommand(f"a command for {command.subject} came at {subject[:200]}")
    return command


def _artifact(data: Any) -> Artifact | None:
    if data is None:
        return None
    if isinstance(data, dict):
        sha256, size, name, kind = (data.get(key) for key in ("sha256", "size", "name", "type"))
        right = isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256) and _whole(size) and isinstance(name, str)
        if right and isinstance(kind, str):
            return Artifact(str(sha256), int(size or 0), str(name), kind)
    raise FleetCommand(f"a command whose artifact cannot be read: {str(data)[:80]}")


def report(raw: bytes, subject: str) -> Report:
    """What an operator reads. Raises ``FleetCommand``."""
    data = decode(raw)
    texts = {
        name: str(data.get(name, ""))
        for name in ("gateway", "rollout", "target", "state", "job", "phase", "code", "message", "evidence")
    }
    at = data.get("at", 0)
    found = Report(round=int(data["round"]) if _whole(data.get("round")) else 0, at=float(at) if _number(at) else 0.0, **texts)
    if found.subject != subject:
        raise FleetCommand(f"a report for {found.subject[:200]} came at {subject[:200]}")
    return found


def progress(raw: bytes, subject: str) -> Progress:
    """What an operator hears. Raises ``FleetCommand``."""
    data = decode(raw)
    gateway, rollout, target, phase = (str(data.get(name, "")) for name in ("gateway", "rollout", "target", "phase"))
    done, total, rate = (int(data[name]) if _number(data.get(name)) else 0 for name in ("done", "total", "rate"))
    found = Progress(gateway, rollout, target, phase, done, total, rate)
    if found.subject != subject:
        raise FleetCommand(f"progress of {found.subject[:200]} came at {subject[:200]}")
    return found


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _dump(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
