"""What was configured: one TOML file, read into frozen dataclasses.

The dataclasses below are the reference: each field has its default, its limits and one sentence of help in its metadata, from
which the validator (``load``) and the commented reference configuration (``reference``) work. A new option is a new field
here and nothing else in this module.

All mistakes of a file are reported at once, each with line, column, what is allowed and the nearest known name. ``tomllib``
tells positions of syntax errors only, so ``_places`` scans the text a second time for where each key stands; it runs on
text that ``tomllib`` has accepted, and is therefore allowed to be lenient.

This module knows nothing of chips, ports or GPIO: whether a chip exists is asked of ``check_chip``, which the caller gives;
whether a device exists is not asked at all, because a target may be plugged in later.
"""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import ipaddress
import json
import math
import re
import textwrap
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from bridged.errors import ConfigError


def _f(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] = (),
    kind: str = "",
    required: bool = False,
    example: Any = None,
    zero: bool = False,
) -> Any:
    """One configuration field.

    ``kind``: how a string is checked (a key of ``_STRINGS``, or ``line``, ``chip``), or the items of a list (``sequence``,
    ``range``, ``scope``). ``low`` and ``high``: limits of a number, or of the length of a string. ``zero``: 0 is allowed as
    well, and means that the value is found out. ``example``: shown in the reference where the default would say nothing.
    """
    meta = {
        "help": help,
        "low": low,
        "high": high,
        "choices": choices,
        "kind": kind,
        "required": required,
        "example": example,
        "zero": zero,
    }
    if callable(default):  # a table, or a list
        return field(default_factory=default, metadata=meta)
    return field(default=default, metadata=meta)


BAUD_LOW, BAUD_HIGH = 300, 4_000_000  # Of an application; 4 Mbaud is what PL011 and FTDI adapters reach.


@dataclass(frozen=True, slots=True)
class Gateway:
    name: str = _f("", "Name of this gateway in greetings and metrics; empty: the host name.", high=64)
    state_dir: str = _f("", "Journal, images and traces; empty: $STATE_DIRECTORY, else /var/lib/bridged.", kind="path")


@dataclass(frozen=True, slots=True)
class Api:
    listen: str = _f(
        "127.0.0.1:7100",
        "Line protocol: HOST:PORT, several by space; empty: off. On loopback plain text, elsewhere TLS (see [tls])."
        " tls:HOST:PORT: TLS on loopback, too; plaintext:HOST:PORT: no TLS elsewhere, and everybody on the way may read tokens"
        " and firmware.",
        kind="listen",
    )
    socket: str = _f("", "Unix socket of the line protocol; empty: $RUNTIME_DIRECTORY/bridged.sock, or none.", kind="socket")
    metrics: str = _f("127.0.0.1:7102", "Prometheus metrics, HOST:PORT; loopback only; empty: off.", kind="loopback")
    http: str = _f(
        "127.0.0.1:7101",
        "HTTP and the web page, as `listen`; empty: off, and what it needs is not loaded.",
        kind="listen",
    )
    hosts: list[str] = _f(
        list,
        "Names of this gateway in a browser, besides addresses, localhost, its host name and `gateway.name`.",
        kind="host",
    )
    connections: int = _f(1000, "Most connections of the line protocol at once.", low=1, high=65536)
    http_connections: int = _f(200, "Most connections over HTTP at once.", low=1, high=65536)
    idle_timeout_s: float = _f(300.0, "A client that says nothing for so long is closed.", low=1, high=86400)


@dataclass(frozen=True, slots=True)
class Tls:
    """A secret is named by its file, or by ``credential:NAME`` as systemd's ``LoadCredential=`` provides it."""

    certificate: str = _f("", "Certificate chain of this gateway, PEM; empty: no TLS.", kind="secret")
    key: str = _f("", "Its private key, PEM, not readable for everybody.", kind="secret")
    client_ca: str = _f(
        "",
        "Mutual TLS: clients' certificates are checked against these, PEM; `TOKEN add certificate=` gives them rights.",
        kind="secret",
    )
    client_required: bool = _f(False, "A client without such a certificate is not even heard.")


@dataclass(frozen=True, slots=True)
class Auth:
    """Who may do what without a token. Beyond loopback and the Unix socket the answer is always: nothing."""

    loopback: list[str] = _f(
        lambda: ["flash", "console"],
        "Scopes (read, flash, console, admin) of whoever connects by TCP from this machine; []: a token is needed here, too.",
        kind="scope",
        example=["flash", "console"],
    )
    socket: list[str] = _f(
        lambda: ["flash", "console"],
        "Scopes of whoever may open the Unix socket (group of its directory); root always has all of them.",
        kind="scope",
        example=["flash", "console"],
    )
    admins: list[str] = _f(list, "Users (names or numbers) who have every scope on the Unix socket, as root has.", kind="user")


@dataclass(frozen=True, slots=True)
class Store:
    limit_mib: int = _f(512, "Most space that staged images and uploads may take.", low=1, high=1048576)
    image_limit_mib: int = _f(32, "Largest file that is accepted.", low=1, high=4096)
    traces: int = _f(20, "How many flight recordings are kept.", low=0, high=10000)


@dataclass(frozen=True, slots=True)
class Jobs:
    queue_limit: int = _f(100, "Most jobs that may wait for one target.", low=1, high=10000)
    keep: int = _f(1000, "How many ended jobs are remembered.", low=10, high=1000000)
    resume_limit: int = _f(3, "How often an interrupted job is resumed before it fails.", low=0, high=100)


@dataclass(frozen=True, slots=True)
class Fleet:
    """Dials out to NATS servers and takes jobs from there; needs the extra `fleet` and a `gateway.name`. See docs/fleet.md.

    Secrets are named by their file, or by ``credential:NAME`` as systemd's ``LoadCredential=`` provides it."""

    servers: list[str] = _f(
        list,
        "tls://HOST:PORT, several of one cluster; empty: no fleet, and nothing of it is loaded. nats://HOST:PORT on loopback"
        " only, or plaintext:nats://HOST:PORT where everybody on the way may read firmware and send jobs.",
        kind="server",
    )
    user: str = _f("", "User of the broker; empty: `gateway.name`, where there is a password.", high=64)
    password: str = _f("", "The file with its password.", kind="secret")
    credentials: str = _f("", "Instead: a .creds file of NATS (needs the package nkeys).", kind="secret")
    ca: str = _f("", "Who signs the broker's certificate, PEM; empty: the CAs of this system.", kind="secret")
    certificate: str = _f("", "Mutual TLS: our certificate chain, PEM.", kind="secret")
    key: str = _f("", "Its private key, PEM.", kind="secret")
    labels: list[str] = _f(
        list, "What an operator may select by, KEY=VALUE: site=berlin, line=3.", kind="label", example=["site=berlin"]
    )
    targets: list[str] = _f(list, "Targets that the fleet may see and flash; empty: all.", kind="target")
    poll_s: float = _f(600.0, "A request for jobs is renewed so often; jobs come at once all the same.", low=1, high=86400)
    ping_s: float = _f(
        240.0,
        "How often the link is tried, which also keeps it open in routers; a dead one is noticed after two of these.",
        low=5,
        high=3600,
    )
    progress_s: float = _f(15.0, "Progress of a job is told at most so often; 0: never.", low=1, high=3600, zero=True)


# No docstring: the reference says it with the table.
@dataclass(frozen=True, slots=True)
class Hawkbit:
    url: str = _f(
        "",
        "What stands before /controller/v1, as https://updates.example.org/DEFAULT; empty: off, and nothing of it is loaded."
        " http:// on loopback only, or plaintext:http:// where everybody on the way may read and write.",
        kind="url",
    )
    token: str = _f("", "The file with the token; empty: none.", kind="secret")
    token_kind: str = _f("TargetToken", "Whose token that is.", choices=("TargetToken", "GatewayToken"))
    ca: str = _f("", "Who signs the server's certificate, PEM; empty: the CAs of this system.", kind="secret")
    targets: list[str] = _f(list, "Targets that are controllers there; empty: all.", kind="target")


@dataclass(frozen=True, slots=True)
class Lines:
    """Control lines of one target. Names of lines: gpio: ``GPIO17``, ``pin:11``, ``LABEL:OFFSET``; modem: ``dtr``, ``rts``,
    ``!dtr``, ``!rts`` (! = the signal is inverted on its way to the pin). ``by-hand``: a person or a jumper sets it."""

    kind: str = _f("none", "How the lines are driven.", choices=("gpio", "modem", "socket", "none"))
    nrst: str = _f("", "The line that drives NRST; empty: not wired.", kind="line")
    boot0: str = _f("", "The line that drives BOOT0; empty: not wired; by-hand: held high by a person.", kind="line")
    power: str = _f("", "The line that switches the supply; empty: not wired.", kind="line")
    safe: str = _f(
        "",
        "The line by which the target says that it may be stopped: an input, asked before the first reset (see"
        " application.interlock; modem: cts, dsr, ri, cd); empty: not asked.",
        kind="line",
    )
    alive: str = _f(
        "",
        "The line by which the application says that it lives: an input, asked after the start of an image (see"
        " application.health); empty: not asked.",
        kind="line",
    )
    socket: str = _f("", "kind = socket: path of the Unix stream socket of the line box.", kind="socket")
    nrst_active_low: bool = _f(True, "Electrically low holds the target in reset.")
    nrst_open_drain: bool = _f(True, "gpio: drive NRST low or let it float, never push it high.")
    boot0_active_low: bool = _f(False, "Electrically low selects the loader (a transistor in between).")
    power_active_low: bool = _f(False, "Electrically low switches the supply on.")
    safe_active_low: bool = _f(False, "Electrically low says that it may be stopped.")
    alive_active_low: bool = _f(False, "Electrically low says that it lives.")
    reset_s: float = _f(0.02, "How long NRST is held low.", low=0.0001, high=10)
    boot0_setup_s: float = _f(0.005, "From BOOT0 to the release of NRST, at least.", low=0, high=10)
    enter: list[str] = _f(
        list, "Own sequence into the loader: boot0=0|1, nrst=0|1, power=0|1 (levels), wait=SECONDS.", kind="sequence"
    )
    leave: list[str] = _f(list, "Own sequence into the application, as `enter`.", kind="sequence")


# No docstring: the reference tells for each use what it is asked for.
@dataclass(frozen=True, slots=True)
class Talk:
    send: str = _f("", "Sent first, one byte a character (TOML knows \\n and \\u0003); empty: nothing.", high=256, kind="bytes")
    expect: str = _f("", "Regular expression that must come back; empty: not asked.", high=256, kind="regex")
    within_s: float = _f(3.0, "How long it is waited for.", low=0.05, high=300)


@dataclass(frozen=True, slots=True)
class Application:
    """What the application does on the same UART after it was started."""

    baud: int = _f(115200, "Baud rate of the application.", low=BAUD_LOW, high=BAUD_HIGH)
    parity: str = _f("N", "Parity of the application.", choices=("N", "E", "O"))
    listen_s: float = _f(1.0, "How long the start of the application is listened to after a job.", low=0, high=60)
    enter: str = _f("", "What makes the application jump into the loader, where BOOT0 is not wired.", high=256, kind="bytes")
    interlock: Talk = _f(
        Talk, "Asked before the first reset: may this target be stopped? With lines.safe that has to be active, too."
    )
    health: Talk = _f(Talk, "Asked after the start of an image: does it live? With lines.alive that has to be active, too.")
    crash_loop_s: float = _f(
        0.0,
        "Within so long after a good answer it may not come a second time, nor lines.alive go inactive; 0: not watched.",
        low=0,
        high=300,
    )


@dataclass(frozen=True, slots=True)
class Xmodem:
    """For jobs of kind xmodem: a bootloader in the target's own flash that takes its image by XMODEM. ``success.expect`` is
    required for them: an acknowledged block says nothing about flash."""

    reset: bool = _f(True, "Reset the target first, BOOT0 low, so that its bootloader starts.")
    reset_after: bool = _f(True, "Reset it again at the end, where NRST or power is wired.")
    baud: int = _f(0, "Baud rate of the bootloader; 0: application.baud.", low=BAUD_LOW, high=BAUD_HIGH, zero=True)
    enter: Talk = _f(Talk, "Sent each second until it answers: what keeps the bootloader from starting the application.")
    begin: Talk = _f(Talk, "Then this: the command that makes it wait for the transfer.")
    success: Talk = _f(Talk, "What it says when the image is in flash and good.")
    block: int = _f(1024, "Largest block in bytes; 1024 takes a CRC.", choices=(128, 1024))
    check: str = _f("auto", "auto: what the receiver asks for.", choices=("auto", "crc", "checksum"))
    pad: int = _f(255, "The byte that fills the last block.", low=0, high=255)
    start_s: float = _f(60.0, "How long it may take to ask for the first block.", low=0.5, high=600)
    answer_s: float = _f(10.0, "How long it may take for one block, in which it may erase flash.", low=0.1, high=120)
    tries: int = _f(10, "How often one block is sent.", low=1, high=100)


@dataclass(frozen=True, slots=True)
class Signing:
    keys: list[str] = _f(
        list,
        "Trusted public keys of minisign: the 56 characters (RW...), or the path of the file that holds them.",
        kind="key",
    )


@dataclass(frozen=True, slots=True)
class Policy:
    """What this target accepts. Words in the trusted comment of a signature (`minisign -S -t`) count: they are signed, too."""

    signature: bool = _f(False, "Only images with a signature by one of signing.keys.")
    no_downgrade: bool = _f(False, "Not older than what was proven there; needs `version:1.2.3` in the trusted comment.")
    board: str = _f("", "Only images with `board:NAME` in the trusted comment; empty: any.", high=64)
    patch: list[str] = _f(
        list, "With signature: ranges (ADDR+LEN) where patch= may put bytes of one unit, which nobody signs.", kind="range"
    )
    window: list[str] = _f(
        list,
        "When the target may be stopped, in the gateway's local time: 22:00-05:00, Mon-Fri 22:00-05:00, Sat,Sun 00:00-24:00."
        " Empty: always. Jobs wait for it; one that has begun goes on.",
        kind="window",
    )


@dataclass(frozen=True, slots=True)
class Console:
    """The target's serial port for people and programs, while no job has it. Speed and parity are those of `application`."""

    listen: str = _f("", "TCP port of the console, HOST:PORT; loopback only; empty: none.", kind="loopback")
    socket: str = _f("", "Unix socket of the console; empty: none.", kind="socket")
    protocol: str = _f(
        "raw", "raw: bytes and nothing else; rfc2217: telnet with control of the port.", choices=("raw", "rfc2217")
    )
    notices: str = _f(
        "inline",
        "How clients are told that a job has the port: a line among the bytes, or not; RFC 2217 has its own way always.",
        choices=("inline", "off"),
    )
    signals: str = _f(
        "unwired",
        "DTR and RTS that RFC 2217 clients may move: those that drive no line of the target, or all, or none.",
        choices=("unwired", "all", "none"),
    )
    clients: int = _f(32, "Most clients at once.", low=1, high=1000)
    buffer_kib: int = _f(256, "What one client may leave unread; beyond it bytes are dropped for it alone.", low=16, high=16384)
    writer_idle_s: float = _f(60.0, "A writer that sends nothing for so long makes way for another.", low=0.1, high=86400)
    history_kib: int = _f(64, "How much of what the target said is remembered.", low=0, high=16384)
    replay_kib: int = _f(16, "How much of it a new client is sent first; 0: nothing.", low=0, high=16384)
    log: str = _f("", "File for what the target said, each line with its time; empty: none.", kind="path")
    log_limit_mib: int = _f(10, "Size at which the file is rotated.", low=1, high=4096)
    log_files: int = _f(5, "How many rotated files are kept.", low=0, high=100)


@dataclass(frozen=True, slots=True)
class Target:
    port: str = _f(
        "",
        "Serial device; use a stable name (/dev/serial/by-id/..., /dev/ttyAMA0).",
        kind="path",
        required=True,
        example="/dev/ttyAMA0",
    )
    chip: str = _f("", "Expected chip: a name (F756), or a product id (0x449); empty: any known.", kind="chip")
    baud: int = _f(
        0, "First baud rate tried with the loader; 0: 57600 on an F7, else 115200.", low=1200, high=1000000, zero=True
    )
    bauds: list[int] = _f(
        list,
        "Faster rates to try with the loader, which need NRST: the highest that this target carries is used, and remembered."
        " For example [921600, 460800, 230400]. Beyond 115200 it is outside of what ST promises. Empty: `baud` alone.",
        low=1200,
        high=1000000,
    )
    supply_v: float = _f(
        0.0,
        "Lowest supply of the target in volts: from 2.7 V on the loader of an F2, F4 or F7 is told to erase and program 32 bits"
        " at a time, which is faster; 0: not known.",
        low=1.6,
        high=3.6,
        zero=True,
    )
    stub: str = _f(
        "off",
        "auto: flash, ensure and verify go through the second-stage loader where the chip has a row for it and NRST is wired;"
        " where it does not start the job goes on with the ROM loader and says why. Never tried on silicon"
        " (docs/second-stage.md).",
        choices=("off", "auto"),
    )
    stub_baud: int = _f(
        921600, "The fastest rate that is tried with the second-stage loader, then its halves.", low=115200, high=4000000
    )
    flash_kib: int = _f(0, "Flash size where the chip does not tell; 0: ask the chip.", low=0, high=16384)
    layout: str = _f("", "Sector layout where option bits decide or the table is unsure; empty: ask the chip.")
    startup_s: float = _f(0.0, "From reset to the listening loader; 0: the table's value.", low=0, high=60)
    shares: list[str] = _f(
        list,
        "Names of targets that share UART, NRST, BOOT0 or power; they run one at a time. Where a reset of this one resets them"
        " as well, each job has to name them: resets=NAME.",
        kind="target",
    )
    protect: list[str] = _f(
        list,
        "Ranges that no job may erase or write, each ADDR+LEN (0x08000000+0x4000): no sector with a byte of them is touched.",
        kind="range",
    )
    lines: Lines = _f(Lines, "Control lines.")
    application: Application = _f(Application, "The application's side of the UART.")
    policy: Policy = _f(Policy, "What this target accepts.")
    console: Console = _f(Console, "The console.")
    xmodem: Xmodem = _f(Xmodem, "A bootloader of the target's own.")


@dataclass(frozen=True, slots=True)
class Config:
    gateway: Gateway = _f(Gateway, "This gateway.")
    api: Api = _f(Api, "Listeners.")
    tls: Tls = _f(Tls, "TLS of all listeners beyond loopback.")
    auth: Auth = _f(Auth, "Rights without a token.")
    signing: Signing = _f(Signing, "Signed images.")
    store: Store = _f(Store, "Staged images.")
    jobs: Jobs = _f(Jobs, "Queue and journal.")
    fleet: Fleet = _f(Fleet, "This gateway as a member of a fleet.")
    hawkbit: Hawkbit = _f(Hawkbit, "Each target as a controller GATEWAY.TARGET of hawkBit (DDI). See docs/fleet.md.")
    targets: dict[str, Target] = _f(dict, "One table for each target: [targets.NAME].")


DEFAULT_FILE = Path("/etc/bridged/bridged.toml")
DEFAULT_STATE = Path("/var/lib/bridged")


# --- loading --------------------------------------------------------------------------------------------------------

LIMIT_BYTES = 1 << 20  # A thousand targets with every option set are a third of this; more is not a configuration.
HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63}){0,8}")
LABEL = re.compile(r"[A-Za-z0-9_.-]{1,32}=[A-Za-z0-9_.-]{1,64}")
TARGET_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")
MAX_TARGETS = 256  # Each has a port, a lane and up to a session process; a gateway with more wires is several gateways.
MAX_ITEMS = 64  # Of a list: steps of a sequence, targets that share.
MAX_CHARS = 4096  # Of a string that has no limit of its own; the longest path of Linux.

SCOPES = ("read", "flash", "console", "admin")  # As ``protocol.line.Scope``, which this module must not know.

KeyPath = tuple[str, ...]
ChipCheck = Callable[[str, str], Iterable[tuple[str, str]]]
"""Given the ``chip`` and ``layout`` of a target: yields (key, what is wrong with it). Its owner knows the chips; we do not."""

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Mistake:
    """One mistake of a configuration file; ``line`` and ``column`` count from 1."""

    file: str
    line: int
    column: int
    key: str
    text: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}"
        return f"{where}: {self.key}: {self.text}" if self.key else f"{where}: {self.text}"


class InvalidConfig(ConfigError):
    """Everything that is wrong with one configuration file, in the order of its lines."""

    def __init__(self, file: str, mistakes: Iterable[Mistake]) -> None:
        self.errors = tuple(sorted(set(mistakes), key=lambda m: (m.line, m.column, m.key, m.text)))
        first = self.errors[0]
        count = len(self.errors)
        head = f"reading the configuration {file}: {count} mistake{'s' if count > 1 else ''}"
        super().__init__(
            "\n".join([head, *(f"  {mistake}" for mistake in self.errors)]),
            file=file,
            mistakes=count,
            line=first.line,
            column=first.column,
            key=first.key,
        )


def load(source: str | Path, *, check_chip: ChipCheck | None = None) -> Config:
    """The configuration in ``source``: a ``Path`` to a file, or the TOML text itself.

    Raises ``InvalidConfig`` (a ``ConfigError``) that names every mistake; ``ConfigError`` when the file cannot be read.
    """
    file, text = _read(source)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: its own, and a number with thousands of digits
        raise InvalidConfig(file, [_syntax_mistake(file, text, error)]) from error
    loader = _Loader(file, _places(text))
    config = loader.table(Config, data, ())
    loader.cross_check(config, check_chip)
    if loader.mistakes:
        raise InvalidConfig(file, loader.mistakes)
    return config


def warnings(config: Config) -> list[str]:
    """What is allowed but probably not meant, one sentence each."""
    found = [] if config.targets else ["no target is configured: add a table [targets.NAME]"]
    for name, target in config.targets.items():
        lines = target.lines
        if lines.boot0 and lines.boot0 != BY_HAND and not (lines.nrst or lines.power):
            found.append(
                f"targets.{name}.lines: boot0 is wired but neither nrst nor power; a chip looks at BOOT0 only while it leaves"
                " reset, so somebody has to reset it by hand for each job"
            )
        if re.fullmatch(r"/dev/tty(USB|ACM)\d+", target.port):
            found.append(
                f"targets.{name}.port: {target.port} is numbered in the order of plugging in; take its name under"
                " /dev/serial/by-id"
            )
        if target.shares and (target.console.listen or target.console.socket):
            found.append(
                f"targets.{name}.console: a target that shares its wires has its port open for jobs only, so its console stays"
                " silent"
            )
        xmodem = target.xmodem
        if xmodem != Xmodem() and not xmodem.success.expect:
            found.append(f"targets.{name}.xmodem: without success.expect no job of kind xmodem is accepted")
        for use, talk in (("interlock", target.application.interlock), ("health", target.application.health)):
            if talk.send and not talk.expect:
                found.append(
                    f"targets.{name}.application.{use}: without `expect` nothing is asked, so `send` is not sent either"
                )
    return found


def _read(source: str | Path) -> tuple[str, str]:
    if isinstance(source, str):
        return "configuration", source
    try:
        with source.open("rb") as stream:
            raw = stream.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"reading the configuration {source}: {error.strerror or error}", file=str(source)) from error
    if len(raw) > LIMIT_BYTES:
        raise ConfigError(f"reading the configuration {source}: larger than {LIMIT_BYTES} bytes", file=str(source))
    try:
        return str(source), raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        text = f"byte {raw[error.start]:#04x} is not UTF-8; TOML files are"
        raise InvalidConfig(str(source), [Mistake(str(source), line, column, "", text)]) from error


def _syntax_mistake(file: str, text: str, error: Exception) -> Mistake:
    """tomllib says where in words only: "... (at line 3, column 5)" or "... (at end of document)"."""
    if isinstance(error, RecursionError):
        return Mistake(file, 1, 1, "", "arrays or tables are nested too deeply")
    said = str(error)
    found = re.search(r"\s*\(at line (\d+), column (\d+)\)", said)
    if found:
        return Mistake(file, int(found[1]), int(found[2]), "", f"not valid TOML: {said[: found.start()]}")
    lines = text.split("\n")
    return Mistake(file, len(lines), len(lines[-1]) + 1, "", f"not valid TOML: {said}")


# --- where each key stands --------------------------------------------------------------------------------------------

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r"""\"{3}(?:\\.|"{1,2}(?!")|[^"\\])*"{3,5}|'{3}(?:'{1,2}(?!')|[^'])*'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'""", re.DOTALL
)
_SCALAR = re.compile(r"[^,\]}\n#]*")


def _places(text: str) -> dict[KeyPath, tuple[int, int]]:
    """Line and column of every key, table header and array item (its index as text) of valid TOML."""
    scanner = _Scanner(text)
    scanner.document()
    newlines = [at for at, char in enumerate(text) if char == "\n"]

    def place(offset: int) -> tuple[int, int]:
        line = bisect.bisect_left(newlines, offset)
        return line + 1, offset - (newlines[line - 1] if line else -1)

    return {path: place(offset) for path, offset in scanner.offsets.items()}


class _Scanner:
    """Walks over TOML that is known to be valid and notes the offset of the first mention of each key."""

    def __init__(self, text: str) -> None:
        self.text = text.replace("\r\n", " \n")  # as tomllib does, with the offsets kept
        self.at = 0
        self.offsets: dict[KeyPath, int] = {}

    def document(self) -> None:
        table: KeyPath = ()
        while self._skip(_BLANK) < len(self.text):
            if self.text[self.at] == "[":
                brackets = 2 if self.text.startswith("[[", self.at) else 1
                self.at += brackets
                table = self._key(())
                self.at += brackets
            else:
                self._pair(table)

    def _pair(self, table: KeyPath) -> None:
        path = self._key(table)
        self.at += 1  # =
        self._skip(_SPACE)
        self._value(path)

    def _key(self, table: KeyPath) -> KeyPath:
        path = table
        while True:
            start = self._skip(_SPACE)
            if quoted := _STRING.match(self.text, start):
                # Only tomllib knows all escapes.
                part = str(tomllib.loads(f"key = {quoted[0]}")["key"])
                self.at = quoted.end()
            else:
                self._skip(_BARE_KEY)
                part = self.text[start : self.at]
            path = (*path, part)
            self.offsets.setdefault(path, start)
            self._skip(_SPACE)
            if self.text[self.at : self.at + 1] != ".":
                return path
            self.at += 1

    def _value(self, path: KeyPath) -> None:
        match self.text[self.at : self.at + 1]:
            case "[":
                for index in self._items("]"):
                    item = (*path, str(index))
                    self.offsets.setdefault(item, self.at)
                    self._value(item)
            case "{":
                for _ in self._items("}"):
                    self._pair(path)
            case '"' | "'":
                self._skip(_STRING)
            case _:
                self._skip(_SCALAR)

    def _items(self, closing: str) -> Iterator[int]:
        """Stops before each item; the caller walks over it."""
        self.at += 1
        index = 0
        while self._skip(_BLANK) < len(self.text) and self.text[self.at] != closing:
            yield index
            index += 1
            if self._skip(_BLANK) < len(self.text) and self.text[self.at] == ",":
                self.at += 1
        self.at += 1

    def _skip(self, what: re.Pattern[str]) -> int:
        if found := what.match(self.text, self.at):
            self.at = found.end()
        return self.at


# --- what is allowed --------------------------------------------------------------------------------------------------

BY_HAND = "by-hand"
_NUMBER = r"0[xX][0-9a-fA-F]{1,8}|[0-9]{1,10}"
_LINE_NAMES = ("nrst", "boot0", "power")
_INPUT_NAMES = ("safe", "alive")
_MODEM_INPUTS = ("cts", "dsr", "ri", "cd", "!cts", "!dsr", "!ri", "!cd")
_MODEM_LINES = ("dtr", "rts", "!dtr", "!rts")
_LOOPBACK_ONLY = (
    "only loopback can be bound (127.0.0.1, [::1], localhost): this page asks nobody for a token; for a remote client forward"
    " the port with ssh -L"
)


class _Loader:
    """Builds dataclasses from tables; a wrong value is noted and replaced by its default, so that the rest is checked too."""

    def __init__(self, file: str, places: Mapping[KeyPath, tuple[int, int]]) -> None:
        self.file = file
        self.places = places
        self.mistakes: list[Mistake] = []
        self.wrong: set[KeyPath] = set()

    def note(self, path: KeyPath, text: str) -> None:
        # The key itself may be absent (something required is missing): then the nearest table around it is shown.
        place = next((self.places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.places), (1, 1))
        self.wrong.add(path)
        self.mistakes.append(Mistake(self.file, *place, _dotted(path), text))

    def table(self, cls: type[C], data: Mapping[str, Any], path: KeyPath) -> C:
        fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
        kinds = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for key in data:
            if key not in fields:
                self.note((*path, key), f"no such key{_did_you_mean(key, fields)}; known here: {', '.join(fields)}")
        for name, spec in fields.items():
            if name in data:
                self._field(kinds[name], spec.metadata, data[name], (*path, name), values)
            elif spec.metadata["required"]:
                self.note((*path, name), f"is required: {spec.metadata['help']}")
        return cls(**values)

    def _field(self, kind: Any, meta: Mapping[str, Any], value: Any, path: KeyPath, values: dict[str, Any]) -> None:
        """Puts the value into ``values`` when it is right."""
        name = path[-1]
        if dataclasses.is_dataclass(kind) or kind == dict[str, Target]:
            if not isinstance(value, dict):
                self.note(path, f"must be a table, not {_shown(value)}")
            elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
                values[name] = self.table(kind, value, path)
            else:
                values[name] = self._targets(value, path)
        elif kind in (list[str], list[int]):
            if not isinstance(value, list):
                what = "strings" if kind == list[str] else "integers"
                self.note(path, f"must be a list of {what}, not {_shown(value)}")
                return
            if len(value) > MAX_ITEMS:
                self.note(path, f"has {len(value)} items, at most {MAX_ITEMS} are allowed")
                return
            bad = [
                (index, text)
                for index, item in enumerate(value)
                if (text := _wrong_item(item, meta) if kind == list[str] else _wrong_value(int, meta, item))
            ]
            for index, text in bad:
                self.note((*path, str(index)), text)
            if not bad:
                values[name] = value
        elif text := _wrong_value(kind, meta, value):
            self.note(path, text)
        else:
            values[name] = float(value) if kind is float else value

    def _targets(self, data: Mapping[str, Any], path: KeyPath) -> dict[str, Target]:
        found: dict[str, Target] = {}
        if len(data) > MAX_TARGETS:
            self.note(path, f"has {len(data)} targets, at most {MAX_TARGETS} are allowed")
            return found
        for name, value in data.items():
            here = (*path, name)
            if not TARGET_NAME.fullmatch(name):
                self.note(here, "not a name for a target: 1 to 32 of A-Z a-z 0-9 _ -")
            if isinstance(value, dict):
                found[name] = self.table(Target, value, here)
            else:
                self.note(here, f"must be a table, not {_shown(value)}; write [targets.{name}]")
        return found

    # --- rules about more than one value

    def cross_check(self, config: Config, check_chip: ChipCheck | None) -> None:
        api, store = config.api, config.store
        taken: dict[tuple[str, int], str] = {}
        for key in ("listen", "http", "metrics"):
            if ("api", key) in self.wrong:
                continue
            for listen in listeners(getattr(api, key)):
                first = taken.setdefault((listen.host, listen.port), key) if listen.port else key
                if first != key:
                    self.note(("api", key), f"{listen} is taken by api.{first} already")
        self._closed(config)
        self._fleet(config)
        if store.image_limit_mib > store.limit_mib:
            self.note(("store", "image_limit_mib"), f"exceeds store.limit_mib, which is {store.limit_mib}")
        for name, target in config.targets.items():
            path = ("targets", name)
            if not target.port and not {(*path, "port"), path} & self.wrong:
                self.note((*path, "port"), "must not be empty")
            self._lines(target.lines, (*path, "lines"))
            if not config.signing.keys and ("signing", "keys") not in self.wrong:
                for key in ("signature", "no_downgrade", "board"):
                    if getattr(target.policy, key):
                        self.note((*path, "policy", key), "needs signing.keys: by whom may an image be signed?")
            self._console(name, target, config)
            if check_chip is not None and not {(*path, "chip"), (*path, "layout")} & self.wrong:
                for key, text in check_chip(target.chip, target.layout):
                    self.note((*path, key), text)
        self._sharing(config.targets)

    def _closed(self, config: Config) -> None:
        """P7: beyond loopback nothing is said in plain text unless the file asks for it in so many words."""
        tls = config.tls
        for key, other in (("certificate", "key"), ("key", "certificate"), ("client_ca", "certificate")):
            if getattr(tls, key) and not getattr(tls, other) and ("tls", other) not in self.wrong:
                self.note(("tls", other), f"is required with tls.{key}")
        if tls.client_required and not tls.client_ca:
            self.note(("tls", "client_required"), "needs tls.client_ca: whose certificates are asked for?")
        tables: list[tuple[KeyPath, Any]] = [(("api",), config.api)]
        tables += [(("targets", name), target) for name, target in config.targets.items()]
        for path, table in tables:
            for spec in dataclasses.fields(table):
                here = (*path, spec.name)
                if spec.metadata["kind"] != "listen" or here in self.wrong or tls.certificate:
                    continue
                for listen in listeners(getattr(table, spec.name)):
                    if listen.scheme == "tls" or (not listen.scheme and not listen.loopback):
                        self.note(
                            here,
                            f"{listen} needs TLS: set tls.certificate and tls.key, or say plaintext:{listen} where everybody on"
                            " the network may read tokens and firmware; or stay on 127.0.0.1 and use ssh -L",
                        )

    def _fleet(self, config: Config) -> None:
        fleet, path = config.fleet, ("fleet",)
        for index, server in enumerate(fleet.servers):
            if text := _wrong_server(server):
                self.note((*path, "servers", str(index)), text)
        if fleet.servers and not FLEET_NAME.fullmatch(config.gateway.name) and ("gateway", "name") not in self.wrong:
            self.note(
                ("gateway", "name"),
                "a member of a fleet needs a name of its own: 1 to 64 of A-Z a-z 0-9 _ - (it becomes a part of subjects)",
            )
        for key, other in (("certificate", "key"), ("key", "certificate")):
            if getattr(fleet, key) and not getattr(fleet, other) and (*path, other) not in self.wrong:
                self.note((*path, other), f"is required with fleet.{key}")
        if config.hawkbit.url and not FLEET_NAME.fullmatch(config.gateway.name) and ("gateway", "name") not in self.wrong:
            self.note(("gateway", "name"), "hawkBit needs a name of this gateway: 1 to 64 of A-Z a-z 0-9 _ -")
        for table, names in (("fleet", fleet.targets), ("hawkbit", config.hawkbit.targets)):
            for index, name in enumerate(names):
                if name not in config.targets:
                    self.note((table, "targets", str(index)), f"no such target{_did_you_mean(name, config.targets)}")

    def _lines(self, lines: Lines, path: KeyPath) -> None:
        if (*path, "kind") in self.wrong:
            return  # Whatever is said of the lines depends on it.
        for name in (*_LINE_NAMES, *_INPUT_NAMES):
            value = getattr(lines, name)
            if value and (*path, name) not in self.wrong and (text := _wrong_line(lines.kind, name, value)):
                self.note((*path, name), text)
        if lines.kind == "socket" and not lines.socket and (*path, "socket") not in self.wrong:
            self.note((*path, "socket"), 'is required with kind = "socket": path of the Unix stream socket of the line box')
        if lines.kind != "socket" and lines.socket:
            self.note((*path, "socket"), f'has a meaning only with kind = "socket"; here kind is "{lines.kind}"')
        for key in ("enter", "leave"):
            for index, item in enumerate(getattr(lines, key)):
                name = item.partition("=")[0].strip()
                if name in _LINE_NAMES and getattr(lines, name) in ("", BY_HAND):
                    self.note((*path, key, str(index)), f"drives {name}, but {name} is not wired")

    def _console(self, name: str, target: Target, config: Config) -> None:
        """No two listeners at one place; port 0 is another one each time."""
        path, console = ("targets", name, "console"), target.console
        taken = {word: "api.listen" for word in config.api.listen.split()}
        taken |= {config.api.metrics: "api.metrics", config.api.socket: "api.socket"}
        for other, found in config.targets.items():
            if other == name:
                break
            taken |= {found.console.listen: f"targets.{other}.console.listen"}
            taken |= {found.console.socket: f"targets.{other}.console.socket"}
            taken |= {found.console.log: f"targets.{other}.console.log"}
        for key in ("listen", "socket", "log"):
            value = getattr(console, key)
            if value and value in taken and not value.endswith(":0"):
                self.note((*path, key), f"{value} is taken by {taken[value]} already")
        if console.replay_kib > console.history_kib and (*path, "replay_kib") not in self.wrong:
            self.note((*path, "replay_kib"), f"exceeds history_kib, which is {console.history_kib}")

    def _sharing(self, targets: Mapping[str, Target]) -> None:
        for name, target in targets.items():
            for index, other in enumerate(target.shares):
                path = ("targets", name, "shares", str(index))
                if other == name:
                    self.note(path, "a target cannot share with itself")
                elif other not in targets:
                    self.note(path, f"no such target{_did_you_mean(other, targets)}")
                elif name not in targets[other].shares and ("targets", other, "shares") not in self.wrong:
                    self.note(path, f'{other} must say so too: add shares = ["{name}"] to targets.{other}')
        users: dict[str, list[str]] = {}
        for name, target in targets.items():
            for thing in sorted(_things(target)):
                users.setdefault(thing, []).append(name)
        for thing, names in users.items():
            for name in names[1:]:
                first = targets[names[0]]
                if names[0] not in targets[name].shares and name not in first.shares:
                    self.note(
                        ("targets", name),
                        f"uses {thing}, as targets.{names[0]} does: both must declare it, here"
                        f' shares = ["{names[0]}"] and there shares = ["{name}"]',
                    )


def _things(target: Target) -> set[str]:
    """What of the gateway this target occupies, in words. Modem lines belong to the port and need no name of their own."""
    lines = target.lines
    found = {f"port {target.port}"} if target.port else set()
    if lines.kind == "gpio":
        found |= {f"line {v}" for n in (*_LINE_NAMES, *_INPUT_NAMES) if (v := getattr(lines, n)) not in ("", BY_HAND)}
    if lines.kind == "socket" and lines.socket:
        found.add(f"line box {lines.socket}")
    return found


def neighbours(targets: Mapping[str, Target], name: str) -> tuple[str, ...]:
    """The other targets that a reset of ``name`` resets as well: they declare that they share, and it is NRST or the power.

    Where two that share have nothing in common by name (one line under two names) nobody can tell what it is: it counts.
    """
    target = targets[name]
    ours, resets = _things(target), _resets(target)
    if not resets:
        return ()
    found = []
    for other in targets:
        if other != name and (other in target.shares or name in targets[other].shares):
            common = ours & _things(targets[other])
            if not common or common & resets & _resets(targets[other]):
                found.append(other)
    return tuple(found)


def _resets(target: Target) -> set[str]:
    """What of ``_things`` can reset it. A line box and the lines of a port are one thing: who has one moves all of it."""
    lines = target.lines
    wired = [v for v in (lines.nrst, lines.power) if v]
    match lines.kind if wired else "none":
        case "gpio":
            return {f"line {v}" for v in wired}
        case "modem":
            return {f"port {target.port}"}
        case "socket":
            return {f"line box {lines.socket}"}
    return set()


def _wrong_value(kind: Any, meta: Mapping[str, Any], value: Any) -> str:
    """What is wrong with a scalar, or an empty string. In TOML true is not 1, so neither here."""
    choices, low, high = meta["choices"], meta["low"], meta["high"]
    right = (
        isinstance(value, kind)
        if kind in (bool, str)
        else isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    )
    if choices:
        if right and value in choices:
            return ""
        guess = _did_you_mean(value, choices) if isinstance(value, str) else ""
        return f"{_shown(value)} is not one of {', '.join(map(json.dumps, choices))}{guess}"
    if not right:
        return f"must be {_wanted(kind, meta)}, not {_shown(value)}"
    if kind is str:
        most = MAX_CHARS if high is None else high
        if len(value) > most:
            return f"is longer than {most:g} characters"
        return _STRINGS.get(meta["kind"], _wrong_text)(value)
    if kind is bool or (meta["zero"] and value == 0):
        return ""
    if (
        (isinstance(value, float) and not math.isfinite(value))
        or (low is not None and value < low)
        or (high is not None and value > high)
    ):
        return f"must be {_wanted(kind, meta)}, not {_shown(value)}"
    return ""


def _wanted(kind: Any, meta: Mapping[str, Any]) -> str:
    word = {bool: "true or false", str: "a string", int: "a whole number", float: "a number"}[kind]
    low, high = meta["low"], meta["high"]
    if kind not in (int, float) or low is None or high is None:
        return word
    return f"{'0 or ' if meta['zero'] else ''}{word} from {low:.15g} to {high:.15g}"


def _wrong_text(value: str) -> str:
    return "" if value.isprintable() else "has characters that cannot be printed"


def _wrong_path(value: str) -> str:
    if value and not value.startswith("/"):
        return f"{_shown(value)} is not an absolute path; what it means would depend on where the daemon was started"
    return _wrong_text(value)


def _wrong_socket(value: str) -> str:
    # sun_path of unix(7) has 108 bytes with its final NUL.
    return (
        "is longer than the 107 bytes that the path of a Unix socket may have"
        if len(value.encode()) > 107
        else _wrong_path(value)
    )


@dataclass(frozen=True, slots=True)
class Listen:
    """One address to listen on. ``scheme``: ``tls``, ``plaintext``, or empty: plain text on loopback and TLS elsewhere."""

    host: str
    port: int
    scheme: str = ""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback


def listeners(text: str) -> tuple[Listen, ...]:
    """The addresses in a value that was checked."""
    return tuple(_listen(word) for word in text.split())


def _listen(word: str) -> Listen:
    scheme = next((name for name in ("tls", "plaintext") if word.startswith(f"{name}:")), "")
    host, _, port = word.removeprefix("tls:").removeprefix("plaintext:").rpartition(":")
    return Listen(host.removeprefix("[").removesuffix("]"), int(port), scheme)


def _wrong_listeners(value: str) -> str:
    for word in value.split():
        bare = word.removeprefix("tls:").removeprefix("plaintext:")
        if text := _wrong_listen(bare):
            return text
    return "" if value == " ".join(value.split()) else "separate several addresses by one space"


def wrong_loopback(value: str) -> str:
    """Why nobody may listen there who asks nobody for a token (P7), or why it is no address; empty: it is allowed."""
    text = _wrong_listen(value)
    if text or not value or _listen(value).loopback:
        return text
    return f"{_listen(value).host}: {_LOOPBACK_ONLY}"


def _wrong_secret(value: str) -> str:
    name = value.removeprefix("credential:")
    if name != value:
        return "" if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) else f"{_shown(name)} is not a name of a credential"
    return _wrong_path(value)


def _wrong_listen(value: str) -> str:
    if not value:
        return ""
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        return (
            f"{_shown(value)} is not HOST:PORT with a port from 0 (any that is free) to 65535, as 127.0.0.1:7100 or [::1]:7100"
        )
    if host == "localhost":
        return ""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return f"{host!r} is not an address; names other than localhost are not looked up"
    if address.version == 6 and bare == host:
        return f"write the IPv6 address in brackets: [{host}]:{port}"
    return ""


FLEET_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SERVER = re.compile(r"(tls|nats)://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]{1,253}):([0-9]{1,5})")


def _wrong_server(value: str) -> str:
    """P7 for connections that go out: who reads along could read firmware and send jobs."""
    bare = value.removeprefix("plaintext:")
    found = _SERVER.fullmatch(bare)
    if found is None or int(found[3]) > 65535:
        return f"{_shown(value)} is not tls://HOST:PORT, as tls://broker.example.org:4222"
    host = found[2].strip("[]")
    if found[1] == "nats" and bare == value and not _loopback_host(host):
        return f"{_shown(value)} is plain text: say tls://, or plaintext:{value} where everybody on the way may read and write"
    return ""


_URL = re.compile(r"(https?)://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]{1,253})(:[0-9]{1,5})?(/[A-Za-z0-9._~%/-]*)?")


def _wrong_url(value: str) -> str:
    bare = value.removeprefix("plaintext:")
    found = _URL.fullmatch(bare)
    if value and not found:
        return f"{_shown(value)} is not https://HOST[:PORT]/PATH"
    if found and found[1] == "http" and bare == value and not _loopback_host(found[2].strip("[]")):
        return (
            f"{_shown(value)} is plain text: say https://, or plaintext:{value} where everybody on the way may read and write"
        )
    return ""


def _loopback_host(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _wrong_bytes(value: str) -> str:
    return "" if all(ord(c) < 256 for c in value) else "has characters beyond \\u00FF, which are no single bytes"


def _wrong_regex(value: str) -> str:
    try:
        re.compile(value.encode())
    except re.error as error:
        return f"is no regular expression: {error}"
    return ""


_STRINGS: dict[str, Callable[[str], str]] = {
    "path": _wrong_path,
    "socket": _wrong_socket,
    "listen": _wrong_listeners,
    "loopback": wrong_loopback,
    "secret": _wrong_secret,
    "url": _wrong_url,
    "bytes": _wrong_bytes,
    "regex": _wrong_regex,
}


def _wrong_line(kind: str, name: str, value: str) -> str:
    if name == "boot0" and value == BY_HAND:
        return ""
    match kind:
        case "none":
            return 'names a line, but kind is "none"; say kind = "gpio", "modem" or "socket"'
        case "modem":
            known = _MODEM_INPUTS if name in _INPUT_NAMES else _MODEM_LINES
            if value in known:
                return ""
            return f"{_shown(value)} is not one of {', '.join(map(json.dumps, known))}{_did_you_mean(value, known)}"
        case "socket":
            # The line box knows its lines by these names; the setting only says that this one is wired.
            return (
                "" if value == name else f'{_shown(value)}: a line box calls this line "{name}"; write that, or "" if not wired'
            )
    pin = re.fullmatch(r"pin:(\d+)", value)
    if pin:
        return "" if 1 <= int(pin[1]) <= 40 else f"the header has pins 1 to 40, not {pin[1]}"
    if re.fullmatch(r"[^\s:]+:\d{1,4}|[^\s:]+", value):
        return ""
    return f"{_shown(value)} is not a line: GPIO17 (its name), pin:11 (of the header), or LABEL:OFFSET"


def _wrong_item(item: Any, meta: Mapping[str, Any]) -> str:
    if not isinstance(item, str):
        return f"must be a string, not {_shown(item)}"
    if len(item) > MAX_CHARS:
        return f"is longer than {MAX_CHARS} characters"
    if meta["kind"] == "range":
        return _wrong_range(item)
    if meta["kind"] == "window":
        return _wrong_window(item)
    if meta["kind"] == "key":
        return (
            ""
            if item.startswith("/") or re.fullmatch(r"RW[A-Za-z0-9+/]{54}", item)
            else f"{_shown(item)} is no public key, nor a path"
        )
    if meta["kind"] == "label":
        return "" if LABEL.fullmatch(item) else f"{_shown(item)} is not KEY=VALUE, as site=berlin (A-Z a-z 0-9 . _ - in both)"
    if meta["kind"] == "host":
        return (
            ""
            if HOST_NAME.fullmatch(item)
            else f"{_shown(item)} is no name of a host; without a scheme and a port, as gw.example.org"
        )
    if meta["kind"] == "scope":
        guess = _did_you_mean(item, SCOPES)
        return "" if item in SCOPES else f"{_shown(item)} is not one of {', '.join(SCOPES)}{guess}"
    if meta["kind"] != "sequence":
        return _wrong_text(item)
    name, equals, value = (part.strip() for part in item.partition("="))
    if equals and name in _LINE_NAMES and value in ("0", "1"):
        return ""
    if equals and name == "wait":
        if re.fullmatch(r"\d{1,2}(\.\d{1,6})?", value) and float(value) <= 10:
            return ""
        return f"{_shown(item)}: wait takes 0 to 10 seconds, as wait=0.05"
    guess = _did_you_mean(name, (*_LINE_NAMES, "wait"))
    return f"{_shown(item)} is not a step{guess}; steps are boot0=0|1, nrst=0|1, power=0|1 and wait=SECONDS"


def parse_range(text: str) -> tuple[int, int]:
    """``ADDR+LEN`` as start and end (exclusive). Raises ``ValueError`` for anything else."""
    found = re.fullmatch(rf"({_NUMBER})\+({_NUMBER})", text)
    if found is None:
        raise ValueError(f"{_shown(text)} is not ADDR+LEN, as 0x08000000+0x4000")
    start, length = (int(word, 16 if word[:2].lower() == "0x" else 10) for word in found.groups())
    if not length or start + length > 1 << 32:
        raise ValueError(f"{_shown(text)} is empty, or ends beyond the 32-bit address space")
    return start, start + length


def _wrong_range(value: str) -> str:
    try:
        parse_range(value)
    except ValueError as error:
        return str(error)
    return ""


_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def parse_window(text: str) -> list[tuple[int, int]]:
    """``[Mon-Fri|Sat,Sun] HH:MM-HH:MM`` as minutes of the week, Monday 00:00 first; one over midnight ends beyond its day, and
    may end beyond the week. Raises ``ValueError``."""
    days, _, times = text.strip().rpartition(" ")
    found = re.fullmatch(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)", times)
    numbers: list[int] = []
    for part in days.lower().split(",") if days else ["mon-sun"]:
        first, dash, last = part.strip().partition("-")
        if first not in _DAYS or (dash and last not in _DAYS):
            raise ValueError(f"{_shown(text)} is no window, as Mon-Fri 22:00-05:00")
        begin, count = _DAYS.index(first), (_DAYS.index(last) - _DAYS.index(first)) % 7 if dash else 0
        numbers += [(begin + n) % 7 for n in range(count + 1)]
    if found is None:
        raise ValueError(f"{_shown(text)} is no window, as 22:00-05:00 or Mon-Fri 22:00-05:00")
    start, end = int(found[1]) * 60 + int(found[2]), int(found[3]) * 60 + int(found[4])
    if end > 1440 or start == end:
        raise ValueError(f"{_shown(text)}: a window ends at 24:00 at the latest, and not when it begins")
    return [(day * 1440 + start, day * 1440 + (end if end > start else end + 1440)) for day in sorted(set(numbers))]


def _wrong_window(value: str) -> str:
    try:
        parse_window(value)
    except ValueError as error:
        return str(error)
    return ""


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > 4096:
        return f"a number of {value.bit_length()} bits"  # Python refuses to write so many digits.
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _dotted(path: KeyPath) -> str:
    """As in TOML, with the place in an array in brackets: ``targets.m1.lines.enter[2]``."""
    text = ""
    for part in path:
        if part.isdigit() and text:
            text += f"[{part}]"
        else:
            shown = part if _BARE_KEY.fullmatch(part) else json.dumps(part)
            text += f".{shown}" if text else shown
    return text


# --- the reference ----------------------------------------------------------------------------------------------------

_HEAD = """\
Reference configuration of bridged: every setting with its default. Generated from bridged/config.py; change it there.
A setting that is commented out has the value that is shown. Read by `bridged serve --config FILE`; `bridged check-config
FILE` lists every mistake at once. SIGHUP (`systemctl reload bridged`) reads it again.
Ready examples for a Raspberry Pi with three NUCLEO boards are in config/examples/.
"""


def reference() -> str:
    """The commented reference configuration. It is valid, and equal to an empty file."""
    out = [_comment(_HEAD)]
    for spec in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[spec.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            out.append(f"\n# {spec.metadata['help']}\n[{spec.name}]\n{_settings(kind)}")
        else:
            out.append("\n" + _comment(f"{spec.metadata['help']} {_NAME_RULE}") + _example_table(Target, "targets.motor1"))
    return "".join(out)


_NAME_RULE = "NAME: 1 to 32 of A-Z a-z 0-9 _ -. A target whose device is absent is picked up when it appears."


def _example_table(cls: type[Any], name: str) -> str:
    tables = [s for s in dataclasses.fields(cls) if dataclasses.is_dataclass(typing.get_type_hints(cls)[s.name])]
    out = [f"#[{name}]\n{_settings(cls)}"]
    for spec in tables:
        kind = typing.get_type_hints(cls)[spec.name]
        doc = kind.__doc__ or ""
        about = "" if doc.startswith(f"{kind.__name__}(") else _comment(" ".join(doc.replace("``", "`").split()))
        out.append(f"\n{about or _comment(spec.metadata['help'])}{_example_table(kind, f'{name}.{spec.name}')}")
    return "".join(out)


def _settings(cls: type[Any]) -> str:
    out = []
    for spec in dataclasses.fields(cls):
        meta, kind = spec.metadata, typing.get_type_hints(cls)[spec.name]
        if dataclasses.is_dataclass(kind):
            continue
        limits = ""
        if meta["choices"]:
            limits = f" One of {', '.join(map(json.dumps, meta['choices']))}."
        elif kind in (int, float) and meta["low"] is not None:
            limits = f" {'0, or ' if meta['zero'] else ''}{meta['low']:.15g} to {meta['high']:.15g}."
        elif meta["high"] is not None:
            limits = f" At most {meta['high']} characters."
        value = spec.default if spec.default is not dataclasses.MISSING else []
        value = value if meta["example"] is None else meta["example"]
        note = " Required." if meta["required"] else ""
        out.append(f"{_comment(meta['help'] + limits + note)}#{spec.name} = {json.dumps(value)}\n")
    return "".join(out)


def _comment(text: str) -> str:
    lines = textwrap.wrap(" ".join(text.split()), 100, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)
