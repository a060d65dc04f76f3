"""What was configured: frozen dataclasses, made from one TOML file.

The dataclasses below are the reference: each field has its default, its limits and one sentence of help in its metadata, from
which the validator (``file``, ``values``) and the commented reference configuration (``reference``) work. A new option is a new
field here and nothing else in this room, unless it is a kind of value that no other has.

This room knows nothing of chips, ports or GPIO.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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
    name: str = _f("", "Name of this gateway in greetings, in browsers and in a fleet; empty: the host name.", high=64)
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
    trusted_proxies: list[str] = _f(
        list,
        "Addresses or networks of reverse proxies before HTTP: who asks is whom their X-Forwarded-For names last, and has no"
        " right without a token. Only what adds to that header itself may stand here.",
        kind="network",
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
    credentials: str = _f("", "Instead: a .creds file of NATS (needs the extra `sign`).", kind="secret")
    ca: str = _f("", "Who signs the broker's certificate, PEM; empty: the CAs of this system.", kind="secret")
    certificate: str = _f("", "Mutual TLS: our certificate chain, PEM.", kind="secret")
    key: str = _f("", "Its private key, PEM.", kind="secret")
    labels: list[str] = _f(list, "What an operator may select by, KEY=VALUE: site=berlin, line=3.", kind="label")
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
        " Empty: always. Jobs wait for it; one that has begun to erase goes on.",
        kind="window",
    )


@dataclass(frozen=True, slots=True)
class Console:
    """The target's serial port for people and programs, while no job has it. Speed and parity are those of `application`."""

    listen: str = _f(
        "",
        "TCP port of the console: HOST:PORT, several by space; empty: none. On loopback plain text; elsewhere TLS, and who has"
        " no client certificate with rights gets nothing (see [tls] client_ca). tls:HOST:PORT: TLS on loopback, too.",
        kind="listen",
    )
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
        0,
        "Baud rate of the loader; 0: 57600 on an F7, else 115200. With NRST lower ones are tried where it does not work, with a"
        " warning (docs/jobs.md#how-fast).",
        low=1200,
        high=1000000,
        zero=True,
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
        "Ranges that no job may erase or write, each ADDR+LEN (0x08000000+0x4000): no sector with a byte of them is touched."
        " Not xmodem: where it writes, the target's own bootloader decides.",
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
