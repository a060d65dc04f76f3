"""What a broker must have before a fleet can use it: streams, object store, KV bucket, a consumer for each gateway, rights.

All of it is made by an operator (``bridged fleet init``), so that a gateway needs no right to make anything. Every step may be
repeated: what is there already stays as it is, but for the replicas where they are asked for. Names carry the version, so that
the next one lives beside this.

The rights of a gateway are subjects with its own name in them, and reading artifacts. They are printed in the form of
nats-server's configuration; who uses accounts with JWTs gives the same lists to ``nsc``. Two things are not obvious:

- Answers come to an inbox below the own name. With the usual ``_INBOX.>`` every gateway could read everybody's answers.
- Who asks chooses where the answer goes, and the broker looks at no right before it sends it there. That is why commands name
  their gateway, and why a gateway may read nothing but artifacts (see ``wire``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from bridged.errors import FleetError
from bridged.fleet import wire
from bridged.fleet.link import Link

DAY_S = 86400.0
COMMAND_S = 60 * DAY_S  # A gateway may be away for a month; then it finds what was said, or that its time is over.
REPORT_S = 180 * DAY_S
ACK_S = 60.0  # A gateway acknowledges as soon as a message is on its disk.
PENDING = 1000
NOT_FOUND = (10014, 10059)  # consumer, stream


async def prepare(link: Link, replicas: int | None = None) -> list[str]:
    """Streams and buckets. What was made or changed, in words.

    Without ``replicas`` what is there keeps its own number, and what is made beside it (``init`` was broken off, or a version
    has one more) gets as many; 1 where there is nothing.
    """
    api = link.api
    made = []
    common: dict[str, Any] = {"storage": api.StorageType.FILE, "allow_direct": True}
    token = f"{wire.ROOT}.*"
    wanted = (
        # Limits, and not a work queue: a message that stays after it was acknowledged is what keeps a second publication of
        # the same command from being stored (``only_first``), for as long as the stream keeps it.
        api.StreamConfig(
            name=wire.COMMANDS, subjects=[f"{token}.cmd.>"], max_age=COMMAND_S, max_msg_size=wire.MESSAGE_BYTES, **common
        ),
        api.StreamConfig(
            name=wire.REPORTS,
            subjects=[f"{token}.state.job.>"],
            max_age=REPORT_S,
            max_msgs_per_subject=1,
            max_msg_size=wire.MESSAGE_BYTES,
            **common,
        ),
        api.StreamConfig(
            name=wire.STATES,
            subjects=[f"{token}.state.target.*", f"{token}.state.gateway"],
            max_msgs_per_subject=1,
            max_msg_size=wire.MESSAGE_BYTES,
            **common,
        ),
        api.StreamConfig(
            name=wire.ARTIFACT_STREAM,
            subjects=[f"$O.{wire.ARTIFACTS}.C.>", f"$O.{wire.ARTIFACTS}.M.>"],
            discard=api.DiscardPolicy.NEW,
            allow_rollup_hdrs=True,
            **common,
        ),
        api.StreamConfig(
            name=f"KV_{wire.ROLLOUTS}",
            subjects=[f"$KV.{wire.ROLLOUTS}.>"],
            max_msgs_per_subject=5,
            discard=api.DiscardPolicy.NEW,
            allow_rollup_hdrs=True,
            deny_delete=True,
            **common,
        ),
    )
    there = {one.name: await _replicas(link, one.name) for one in wanted}
    for settings in wanted:
        found = there[settings.name]
        settings.num_replicas = replicas or found or max(there.values()) or 1
        if not found:
            with link.doing(f"making stream {settings.name}"):
                await link.js.add_stream(settings)
            made.append(f"stream {settings.name}")
        elif found != settings.num_replicas:
            with link.doing(f"changing stream {settings.name}"):
                await link.js.update_stream(settings)
            made.append(f"stream {settings.name}: {replicas} replicas")
    return made


async def _replicas(link: Link, stream: str) -> int:
    """Of a stream that is there; 0: it is not."""
    try:
        with link.doing(f"looking at stream {stream}"):
            found = (await link.js.stream_info(stream)).config
    except FleetError as error:
        if error.facts.get("number") not in NOT_FOUND:
            raise
        return 0
    return int(found.num_replicas or 1)


async def admit(link: Link, gateway: str) -> bool:
    """The durable consumer of one gateway; whether it is new. Its name and the filter are all that it will ever get."""
    api = link.api
    try:
        with link.doing(f"looking at the consumer of {gateway}"):
            await link.js.consumer_info(wire.COMMANDS, gateway)
        return False
    except FleetError as error:
        if error.facts.get("number") not in NOT_FOUND:
            raise
    settings = api.ConsumerConfig(
        durable_name=gateway,
        filter_subject=wire.command_filter(gateway),
        deliver_policy=api.DeliverPolicy.ALL,
        ack_policy=api.AckPolicy.EXPLICIT,
        ack_wait=ACK_S,
        max_ack_pending=PENDING,
    )
    with link.doing(f"making the consumer of {gateway}"):
        await link.js.add_consumer(wire.COMMANDS, settings)
    return True


def gateway_rights(name: str) -> dict[str, list[str]]:
    publish = [
        f"{wire.ROOT}.{name}.evt.>",
        f"{wire.ROOT}.{name}.state.>",
        f"$JS.API.CONSUMER.MSG.NEXT.{wire.COMMANDS}.{name}",
        f"$JS.ACK.{wire.COMMANDS}.{name}.>",
        f"$JS.API.DIRECT.GET.{wire.ARTIFACT_STREAM}",
    ]
    return {"publish": publish, "subscribe": [f"{wire.inbox_of(name)}.>"]}


def operator_rights(name: str) -> dict[str, list[str]]:
    streams = (wire.COMMANDS, wire.REPORTS, wire.STATES, wire.ARTIFACT_STREAM, f"KV_{wire.ROLLOUTS}")
    publish = [f"{wire.ROOT}.*.cmd.>", f"$O.{wire.ARTIFACTS}.>", f"$KV.{wire.ROLLOUTS}.>"]
    publish += ["$JS.API.INFO"]
    for stream in streams:
        publish += [f"$JS.API.STREAM.*.{stream}", f"$JS.API.STREAM.MSG.*.{stream}", f"$JS.API.DIRECT.GET.{stream}"]
        publish += [f"$JS.API.CONSUMER.*.{stream}", f"$JS.API.CONSUMER.*.{stream}.>", f"$JS.API.CONSUMER.*.*.{stream}.>"]
    return {"publish": publish, "subscribe": [f"{wire.inbox_of(name)}.>", f"{wire.ROOT}.>"]}


def permissions(gateways: Iterable[str], operators: Iterable[str], *, certificates: bool = False) -> str:
    """Users for the configuration of nats-server; whoever runs it fills the passwords in, or uses ``certificates``."""
    users = [(name, gateway_rights(name)) for name in gateways] + [(name, operator_rights(name)) for name in operators]
    out = ["# Users of bridged, for an account of nats-server that has JetStream."]
    if certificates:
        out += ["# `tls { verify_and_map: true }` finds them by a DNS name in the certificate (or by its whole subject)."]
    else:
        out += ["# Replace each password, best by the hash that `nats server passwd` prints."]
    out += ["users = ["]
    for name, rights in users:
        publish, subscribe = json.dumps(rights["publish"]), json.dumps(rights["subscribe"])
        password = "" if certificates else ' password: "CHANGE-ME",'
        out.append(f"  {{ user: {json.dumps(name)},{password} permissions: {{")
        out.append(f"    publish: {{ allow: {publish} }}")
        out.append(f"    subscribe: {{ allow: {subscribe} }}")
        out.append("  } }")
    return "\n".join([*out, "]", ""])
