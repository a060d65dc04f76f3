"""The codec of the line protocol: golden lines both ways, and that no bytes whatever can break it."""

from __future__ import annotations

import json
import shlex
import subprocess
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bridged.errors import BY_CODE, BadRequest, FleetError, ForeignProtocol, NoSync, RequestError, UnknownVerb
from bridged.protocol import line
from bridged.protocol.line import MAX_LINE_BYTES, Request, bind, format_request, parse, put_extent
from bridged.protocol.reply import CODE_TEXT, REPLY_CODES, Reply, error_reply, flatten, format_reply, parse_reply, reply_code
from bridged.protocol.verbs import VERBS, help_lines
from tests.build_docs import verbs_and_codes

# --- requests -----------------------------------------------------------------------------------------------------

SHA = "ab" * 32

REQUESTS: list[tuple[bytes, Request, dict[str, Any]]] = [
    (b"PING\n", Request("PING"), {}),
    (b"ping\r\n", Request("PING"), {}),
    (b"  Ping \t \n", Request("PING"), {}),
    (b"HELP", Request("HELP"), {}),
    (b"HELP put\n", Request("HELP", ("put",)), {"verb": "put"}),
    (
        b"HELLO proto=1 format=JSON\n",
        Request("HELLO", (), {"proto": "1", "format": "JSON"}),
        {"proto": 1, "format": "json"},
    ),
    (
        f"PUT 142768 {SHA} offset=4096 name='my app.bin' type=bin\n".encode(),
        Request("PUT", ("142768", SHA), {"offset": "4096", "name": "my app.bin", "type": "bin"}),
        {"size": 142768, "sha256": SHA, "offset": 4096, "name": "my app.bin", "type": "bin"},
    ),
    (
        b'FLASH motor1 "a \\"b\\" \\$c" WAIT=1 addr=0x08000000 force=vectors\n',
        Request("FLASH", ("motor1", 'a "b" $c'), {"wait": "1", "addr": "0x08000000", "force": "vectors"}),
        {"target": "motor1", "image": 'a "b" $c', "wait": True, "addr": 0x08000000, "force": "vectors"},
    ),
    # A quoted word with "=" is an argument; unquoted it is an option, and only a word that starts like a name is one.
    (b"FLASH m 'x=y'\n", Request("FLASH", ("m", "x=y")), {"target": "m", "image": "x=y"}),
    (b"FLASH m a\\ b id=r\\=1\n", Request("FLASH", ("m", "a b"), {"id": "r=1"}), {}),
    (b"FLASH m =x\n", Request("FLASH", ("m", "=x")), {"target": "m", "image": "=x"}),
    (b"FLASH m ''\n", Request("FLASH", ("m", "")), {}),
    (b"READ m 0x08000000 64K\n", Request("READ", ("m", "0x08000000", "64K")), {"target": "m", "addr": 1 << 27, "len": 65536}),
    (b"ERASE m 134217728+0x4000\n", Request("ERASE", ("m", "134217728+0x4000")), {"target": "m", "range": (1 << 27, 0x4000)}),
    (b"ERASE m ALL\n", Request("ERASE", ("m", "ALL")), {"target": "m", "range": None}),
    (b"WAIT j1 timeout=2.5\n", Request("WAIT", ("j1",), {"timeout": "2.5"}), {"job": "j1", "timeout": 2.5}),
    (b"WATCH *\n", Request("WATCH", ("*",)), {"job|target|*": "*"}),
]


@pytest.mark.parametrize(("raw", "request_", "values"), REQUESTS, ids=[raw.decode().strip() for raw, _, _ in REQUESTS])
def test_golden_requests(raw: bytes, request_: Request, values: dict[str, Any]) -> None:
    assert parse(raw) == request_
    if values or not (request_.args or request_.options):
        assert bind(request_) == values


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\n", "no verb"),
        (b"PING \xc3\xbc\n", "byte 0xC3 in column 6"),
        (b"PING\x00\n", "byte 0x00"),
        (b"PING\rPING\n", "byte 0x0D"),
        (b"FLASH m 'a\n", "not closed"),
        (b'FLASH m "a\n', "not closed"),
        (b"FLASH m a\\\n", "backslash"),
        (b"FLASH m a id=1 ID=2\n", "given twice"),
        (b"PING " + b"x" * MAX_LINE_BYTES, "at most 1024"),
    ],
)
def test_bad_lines(raw: bytes, text: str) -> None:
    with pytest.raises(BadRequest, match=text):
        parse(raw)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("PING x", "x is one too many"),
        ("FLASH", "<target> is missing; expected: FLASH <target> <image>"),
        ("FLASH m a addr=0x1G", "expected an address"),
        ("FLASH m a addr=0x100000000", "expected an address"),
        ("FLASH m a type=tar", "expected auto or bin or hex or elf"),
        ("FLASH m a typ=bin", r"unknown option typ= \(did you mean type=?\?\)"),
        ("PING wait=1", "it takes no options"),
        ("FLASH ../m a", "name of a target"),
        ("FLASH m a id='a b'", "letters, digits"),
        ("FLASH m a wait=yes", "expected 0 or 1"),
        ("FLASH m ''", "printable characters"),
        ("READ m 0x08000000 0", "number of bytes"),
        ("READ m 0x08000000 -4", "number of bytes"),
        ("READ m 0x08000000 5G", "number of bytes"),
        ("ERASE m 0xFFFFFFFF+2", "beyond the 32-bit"),
        ("ERASE m 0x08000000", "ADDR\\+LEN"),
        ("WAIT j timeout=-1", "expected seconds"),
        ("WAIT j timeout=1e9", "expected seconds"),
        ("HAVE 12", "64 hexadecimal"),
        ("LOG j from=1_0", "decimal"),
        ("LOG j from=99999999999999999999", "decimal"),
    ],
)
def test_bad_arguments(raw: str, text: str) -> None:
    with pytest.raises(BadRequest, match=text):
        bind(parse(raw.encode()))


def test_unknown_verbs_suggest_the_nearest() -> None:
    with pytest.raises(UnknownVerb, match=r"did you mean ENSURE\?"):
        parse(b"ENSUER motor1 x")
    with pytest.raises(UnknownVerb) as caught:
        parse(b"XYZZY")
    assert "did you mean" not in caught.value.message


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\n",
        b"get /index.html\r\n",
        b"GET http://gw:7100/ HTTP/1.0\n",
        b"HEAD / HTTP/2\r\n",
        b"POST\r\n",
        b"POST /x HTTP/1.1\r\n",
        b"PUT /x HTTP/1.1\r\n",
        b"OPTIONS * HTTP/1.1\r\n",
        b"CONNECT gw:7100 HTTP/1.1\r\n",
        b"PRI * HTTP/2.0\r\n",
        b"Host: gw\r\n",
        b"host:gw\r\n",
        b"Content-Length: 5\r\n",
        b"PING HTTP/1.1\r\n",
        b"OPTIONS rtsp://gw/x RTSP/1.0\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ],
)
def test_foreign_protocols(raw: bytes) -> None:
    with pytest.raises(ForeignProtocol):
        parse(raw)


@pytest.mark.parametrize("raw", [f"PUT 5 {SHA}", f"GET {SHA}", "GET j1", "FLASH host: post", f"PUT 5 {SHA} name='HTTP/1.1'"])
def test_ours_is_not_taken_for_foreign(raw: str) -> None:
    assert parse(raw.encode()).verb in VERBS


def test_put_extent_is_known_where_the_rest_is_wrong() -> None:
    assert put_extent(parse(f"PUT 100 {SHA} offset=40 nmae=x".encode())) == (100, 40)
    assert put_extent(parse(b"PUT 100 nonsense")) == (100, 0)
    for raw in ("PUT", "PUT x y", "PUT 0 y", "PUT 5 y offset=6", "PUT 5 y offset=x"):
        with pytest.raises(BadRequest):
            put_extent(parse(raw.encode()))


@given(st.binary(max_size=1200))
@example(b"PING \\")
@example(b"FLASH 'a' \"b\" c=\\")
def test_any_bytes_are_a_request_or_a_typed_refusal_that_is_one_line(raw: bytes) -> None:
    try:
        request = parse(raw)
        bind(request)
    except RequestError as error:
        wire = format_reply(error_reply(error))
        assert well_formed(wire)
        assert parse_reply(wire).code in (500, 501)
    else:
        assert request.verb in VERBS


@given(st.sampled_from(sorted(VERBS)), st.lists(st.text(st.characters(codec="ascii"), max_size=30), max_size=4))
def test_any_arguments_are_bound_or_refused(verb: str, words: list[str]) -> None:
    try:
        raw = format_request(verb, *words)
    except BadRequest:
        assert any(not word.isprintable() for word in words)
        return
    request = parse(raw)
    assert request.args == tuple(words)
    refused = Reply(250)
    try:
        bind(request)
    except BadRequest as error:
        refused = error_reply(error)
    assert well_formed(format_reply(refused))


printable = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=60)


@given(printable, printable)
def test_requests_round_trip_and_mean_the_same_to_a_shell(word: str, value: str) -> None:
    raw = format_request("FLASH", "m", word, name=value)
    assert parse(raw) == Request("FLASH", ("m", word), {"name": value})
    assert shlex.split(raw.decode()) == ["FLASH", "m", word, f"name={value}"]


# --- replies ------------------------------------------------------------------------------------------------------

REPLIES: list[tuple[Reply, bytes]] = [
    (Reply(250, "PONG"), b"250 PONG\n"),
    (Reply(250), b"250 OK\n"),
    (Reply(250, "", {"job": "j1", "state": "queued"}), b"250 job=j1 state=queued\n"),
    (
        Reply(150, "", {"job": "j1", "phase": "write", "done": 4096, "rate": 10512}, more=True),
        b"150-job=j1 phase=write done=4096 rate=10512\n",
    ),
    (Reply(250, "", {"complete": True, "size": None, "seconds": 1.5}), b"250 complete=1 seconds=1.5\n"),
    (Reply(250, "", {"address": 0x08004000, "d": {"b": {"address": 1}}}), b"250 address=0x08004000 d.b.address=0x00000001\n"),
    (Reply(250, "", {"list": [1, "a", True], "empty": ""}), b'250 list=1,a,1 empty=""\n'),
    (Reply(250, "", {"banner": 'say "hi"\n\x07é😀'}), b'250 banner="say \\"hi\\"\\n\\x07\\xe9\\U0001f600"\n'),
    (Reply(250, "", {"text": "`HELP` costs $0"}), b"250 text='`HELP` costs $0'\n"),
    (Reply(250, "", {"text": "it's `a`"}), b'250 text="it\'s \\`a\\`"\n'),
    (Reply(214, "FLASH <target> [wait=0|1]", more=True), b"214-FLASH <target> [wait=0|1]\n"),
    (
        error_reply(NoSync("0x7F sent 3 times: no byte came", attempts=3, address=0x08000000), job="j1"),
        b'450 NO_SYNC job=j1 message="0x7F sent 3 times: no byte came" cause="',
    ),
]


@pytest.mark.parametrize(("reply", "raw"), REPLIES)
def test_golden_replies(reply: Reply, raw: bytes) -> None:
    made = format_reply(reply)
    assert made.startswith(raw) if reply.code >= 400 else made == raw
    back = parse_reply(made)
    assert (back.code, back.more) == (reply.code, reply.more)
    if reply.code != 214:
        assert [(k, v) for k, v in back.data.items()] == flatten(reply.data)
    assert parse_reply(format_reply(reply, as_json=True)) == reply


def well_formed(wire: bytes) -> bool:
    return (
        wire.endswith(b"\n")
        and wire.count(b"\n") == 1
        and wire[:-1].decode("ascii").isprintable()
        and wire[:3].isdigit()
        and wire[3:4] in (b" ", b"-")
    )


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.integers(100, 599), st.text(max_size=30), st.dictionaries(st.text(max_size=10), values, max_size=4), st.booleans())
def test_any_reply_is_one_printable_line_in_both_formats(code: int, text: str, data: dict[str, Any], more: bool) -> None:
    reply = Reply(code, text, data, more)
    wire = format_reply(reply)
    assert well_formed(wire)
    assert (parse_reply(wire).code, parse_reply(wire).more) == (code, more)
    shape = format_reply(reply, as_json=True)
    assert shape.count(b"\n") == 1
    assert shape.isascii()
    assert json.loads(shape)["code"] == code


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True), st.text(max_size=60), max_size=4))
def test_text_values_come_back_as_they_were(data: dict[str, str]) -> None:
    assert parse_reply(format_reply(Reply(250, "", data))).data == data


@given(st.binary(max_size=200))
def test_any_bytes_are_a_reply_or_refused(raw: bytes) -> None:
    try:
        reply = parse_reply(raw)
    except BadRequest:
        return
    assert 100 <= reply.code <= 999 or raw.startswith(b"{")


def test_a_script_that_evaluates_a_reply_runs_nothing_of_it() -> None:
    """Nobody should, somebody will: ``eval "${rest#* }"`` on a reply whose banner the target has chosen."""
    banner = "$(echo pwned) `echo pwned` ${HOME} \"; echo pwned; ' \\"
    raw = format_reply(Reply(250, "", {"banner": banner})).decode()[4:]
    done = subprocess.run(["sh", "-c", f'{raw}\nprintf %s "$banner"'], capture_output=True, text=True, check=True)
    assert done.stdout == banner


def test_long_values_are_cut_in_text_and_whole_in_json() -> None:
    reply = Reply(250, "", {"trace": "x" * 10_000})
    assert len(format_reply(reply)) < 5000
    assert parse_reply(format_reply(reply, as_json=True)) == reply


# --- tables -------------------------------------------------------------------------------------------------------


def test_every_error_has_a_reply_code_that_is_explained() -> None:
    # What is between a gateway, an operator and the broker is told there and in no reply.
    assert set(REPLY_CODES) == {code for code, cls in BY_CODE.items() if not issubclass(cls, FleetError)}
    assert set(REPLY_CODES.values()) <= set(CODE_TEXT)
    assert reply_code("FROM_A_NEWER_VERSION") == 400


def test_every_error_reply_says_what_why_and_what_to_do() -> None:
    for cls in BY_CODE.values():
        reply = parse_reply(format_reply(error_reply(cls("something happened", address=1))))
        assert reply.text == cls.code
        assert reply.data["message"] == "something happened"
        assert reply.data["cause"]
        assert reply.data["remedy"]
        assert reply.data["fact.address"] == "0x00000001"


def test_help_and_reference_name_every_verb_and_option() -> None:
    whole, listing = verbs_and_codes(), "\n".join(help_lines())
    for verb in VERBS.values():
        assert verb.synopsis in whole
        assert (verb.name in listing) == verb.available
        text = "\n".join(help_lines(verb.name.lower()))
        for param in (*verb.args, *verb.options):
            assert param.text in text
            assert param.kind in line._CONVERT
        assert len(text.splitlines()[0]) < 400
    with pytest.raises(UnknownVerb):
        help_lines("nope")
    for code in CODE_TEXT:
        assert f"| {code} |" in whole
