"""Golden transcripts: a dialogue as text, and a strict peer that plays the target's side of it.

``> 31 CE`` is what the host must send, in one piece; ``< 79`` what the target answers; ``#`` starts a comment. Where the host
waits for more than the target has to say before the next ``>``, its time runs out. An unexpected byte fails the test.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from bridged.protocol.flow import Checkpoint, Drain, Flow, Hazard, Receive, Send, Step

T = TypeVar("T")
NOISE = bytes.fromhex("A5 00 79 1F")


@dataclass
class Peer:
    """Plays one transcript. ``bytewise``: the target's bytes become available one by one. ``noise``: follows its last byte."""

    script: list[tuple[str, bytes]]
    bytewise: bool = False
    noise: bytes = b""
    said: bytearray = field(default_factory=bytearray)
    hazards: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, text: str, *, bytewise: bool = False, noise: bytes = b"") -> Peer:
        script: list[tuple[str, bytes]] = []
        for line in text.splitlines():
            content = line.split("#")[0].strip()
            if content:
                script.append((content[0], bytes.fromhex(content[1:])))
        peer = cls(script, bytewise, noise)
        peer._speak()
        return peer

    def _speak(self) -> None:
        while self.script and self.script[0][0] == "<":
            self.said += self.script.pop(0)[1]
        if not self.script:
            self.said += self.noise
            self.noise = b""

    def _take(self, count: int) -> bytes:
        taken, self.said = bytes(self.said[:count]), self.said[count:]
        return taken

    def answer(self, step: Step) -> Any:
        match step:
            case Send(data):
                assert not self.said, f"the host sends {data.hex(' ')} while {bytes(self.said).hex(' ')} is unread"
                assert self.script, f"the host sends {data.hex(' ')} after the end of the transcript"
                direction, expected = self.script.pop(0)
                assert (direction, data) == (">", expected), f"sent {data.hex(' ')}, expected {expected.hex(' ')}"
                self._speak()
                return None
            case Receive(count, timeout_s):
                assert timeout_s > 0
                if not self.bytewise:
                    return self._take(count)
                got = b""
                while len(got) < count and self.said:
                    got += self._take(1)
                return got
            case Drain():
                return self._take(4096)
            case Hazard(seconds):
                self.hazards.append(seconds)
                return None
            case Checkpoint():
                return None
        raise AssertionError(f"a protocol flow must not ask for {step}")


def play(flow: Flow[T], peer: Peer) -> T:
    """Run ``flow`` against ``peer``; its value, or its exception. The transcript must be used up."""
    try:
        step = next(flow)
        while True:
            step = flow.send(peer.answer(step))
    except StopIteration as end:
        assert not peer.script, f"the host never did: {peer.script}"
        value: T = end.value
        return value
