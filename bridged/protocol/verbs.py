"""The one table of verbs, of the line protocol and every other listener: what each takes, answers, and needs a right for.

``HELP``, the reference in the docs, the checks of arguments, the schemas of HTTP and the suggestions for misspelt names are
made from it. The table is one thing, so it is one file.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from bridged.errors import UnknownVerb
from bridged.protocol.words import suggest

PROTOCOL_VERSION = 1
TCP_PORT = 7100


class Scope(StrEnum):
    """What a principal may do. ``flash`` and ``console`` include ``read``, ``admin`` includes all."""

    READ = "read"  # Looks on: lists, states, histories, recordings.
    FLASH = "flash"  # Sends images and starts jobs; also those that only read, because they stop the machine.
    CONSOLE = "console"  # Types on the target's serial port, and reserves it.
    ADMIN = "admin"  # Gives and takes these rights.


@dataclass(frozen=True, slots=True)
class Param:
    """One argument or option. ``kind`` names its converter in ``line``; ``choices`` bounds it where not empty."""

    name: str
    kind: str
    text: str
    choices: tuple[str, ...] = ()

    @property
    def values(self) -> str:
        return "|".join(self.choices) if self.choices else _KIND_TEXT.get(self.kind, "")


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb. ``required`` of ``args`` must be given, the rest may. ``available`` False: named, but not in this version.

    ``scope``: what is needed to say it, ``None``: nothing, also before a token was shown.
    """

    name: str
    text: str
    reply: str
    args: tuple[Param, ...] = ()
    options: tuple[Param, ...] = ()
    required: int = -1
    available: bool = True
    scope: Scope | None = None

    @property
    def needed(self) -> int:
        return len(self.args) if self.required < 0 else self.required

    @property
    def synopsis(self) -> str:
        parts = [self.name]
        parts += [f"<{a.name}>" if i < self.needed else f"[{a.name}]" for i, a in enumerate(self.args)]
        parts += [f"[{o.name}={o.values}]" for o in self.options]
        return " ".join(parts)


_KIND_TEXT = {
    "address": "ADDR",
    "length": "BYTES",
    "number": "N",
    "seconds": "SECONDS",
    "note": "TEXT",
    "token": "TEXT",
    "name": "TEXT",
    "target": "TARGET",
    "targets": "TARGET,...",
    "signatures": "BASE64,...",
    "patches": "ADDR:HEX,...",
    "fields": "NAME:VALUE,...",
    "sectors": "N,N-N,...",
    "text": "TEXT",
}

TYPES = ("auto", "bin", "hex", "elf", "srec", "dfuse")

_TARGET = Param("target", "target", "name of a target, as in TARGETS")
_IMAGE = Param(
    "image",
    "images",
    "a staged image: its SHA-256, the start of it (8 digits or more), or its name=; @ADDR says where a raw binary belongs; "
    "up to 8 of them by comma, such as boot.bin@0x08000000,app.hex",
)
_JOB = Param("job", "text", "id of a job, as FLASH and its like answer it")
_ADDR = Param("addr", "address", "where a raw binary belongs; of several images each says it by @ADDR")
_PATCH = Param(
    "patch", "patches", "bytes of this one unit (serial number, MAC), laid over the images or beside them; up to 64 by comma"
)
_TYPE = Param(
    "type", "choice", "format of the file, also in gzip; auto looks at its content; bin: the bytes as they are", TYPES
)
_ID = Param("id", "token", "your own id: the same id and request again find the same job and start nothing")
_WAIT = Param("wait", "flag", "1: report progress (150 lines) and answer when the job has ended", ("0", "1"))
_OUTSIDE = Param(
    "outside", "choice", "bytes of a touched sector outside the image: kept unless you say discard", ("keep", "discard")
)
_ENTRY = Param("entry", "choice", "one-shot: accept that the loader cannot be entered again afterwards", ("one-shot",))
_FORCE = Param(
    "force",
    "list",
    "vectors: accept a vector table that looks wrong; interlock: reset without asking; erase-everything: the consent that "
    "unprotect=1 takes",
    ("vectors", "interlock", "erase-everything"),
)
_INTERLOCK = Param("force", "list", "interlock: reset without asking", ("interlock",))
_UNPROTECT = Param(
    "unprotect",
    "flag",
    "1: if readout protection is on remove it, which erases the whole flash; takes force=erase-everything",
    ("0", "1"),
)
_PROTECT = Param("protect", "flag", "1: readout protection of level 1, last of all, when everything is proven", ("0", "1"))
_WHAT = Param("what", "choice", "readout (the default) or write protection", ("readout", "write"))
_VERIFY = Param("verify", "choice", "full, always: everything is read back", ("full",))
_EVIDENCE = Param(
    "evidence",
    "choice",
    "what is enough where the image was proven before: record (the target is not touched), sample, full (the default; only this"
    " says proven)",
    ("record", "sample", "full"),
)
_FULL = Param("mode", "choice", "full: every sector of the image is erased and written", ("full",))
_TRACE = Param("trace", "flag", "1: keep the recording of the dialogue also when the job succeeds", ("0", "1"))
_RESETS = Param("resets", "targets", "other targets that this resets as well: those that share its NRST or power must be named")
_SIG = Param("sig", "signatures", "base64 of the image's .minisig file; of several images each, by comma")
_WRITING = (_ADDR, _TYPE, _PATCH, _SIG, _VERIFY, _OUTSIDE, _ENTRY, _UNPROTECT, _PROTECT, _FORCE, _RESETS, _TRACE, _ID, _WAIT)
_SUBMITTED = "250 job=ID state=queued (wait=1: 150 lines, then 250 done, 251 nothing to do, 400 and others failed)"

_TABLE = (
    Verb("HELP", "Lists the verbs, or explains one.", "214", (Param("verb", "text", "the verb to explain"),), required=0),
    Verb("PING", "Answers PONG.", "250 PONG"),
    Verb("QUIT", "Ends the connection after everything before it is answered.", "221"),
    Verb(
        "HELLO",
        "Agrees on the protocol and the format of replies.",
        "250 proto=1 format=text|json",
        (),
        (
            Param("proto", "number", "version of this protocol, always needed", ("1",)),
            Param("format", "choice", "json: each reply line is one JSON object", ("text", "json")),
        ),
    ),
    Verb(
        "TARGETS",
        "Lists the targets: state, chip, running image.",
        "250- one line a target, then 250 targets=N",
        scope=Scope.READ,
    ),
    Verb("INFO", "Everything that is known about one target.", "250- one line a fact, then 250", (_TARGET,), scope=Scope.READ),
    Verb(
        "HAVE",
        "Says how much of an image is staged: the point from which PUT may go on.",
        "250 offset=N size=N complete=0|1, or 404",
        (Param("sha256", "sha256", "SHA-256 of the whole file, 64 hexadecimal digits"),),
        scope=Scope.FLASH,
    ),
    Verb(
        "PUT",
        "Stages a file: the line, then exactly size-offset raw bytes. They are always consumed, even when the image is here.",
        "354, then 250 image=sha256:HEX, 552 too big (and close), 554 the bytes do not have this SHA-256",
        (
            Param("size", "size", "size of the whole file in bytes"),
            Param("sha256", "sha256", "SHA-256 of the whole file, 64 hexadecimal digits"),
        ),
        (
            Param("offset", "number", "where this piece starts, as HAVE said"),
            Param("name", "name", "a name for the image, for FLASH and for people"),
            _TYPE,
        ),
        scope=Scope.FLASH,
    ),
    Verb(
        "GET",
        "Sends back a staged image, or what a READ job has read.",
        "250 size=N sha256=HEX, then exactly N raw bytes",
        (Param("image|job", "text", "SHA-256 or name of an image, or id of a READ job"),),
        scope=Scope.READ,
    ),
    Verb("FLASH", "Writes an image and proves it.", _SUBMITTED, (_TARGET, _IMAGE), (_FULL, *_WRITING), scope=Scope.FLASH),
    Verb(
        "ENSURE",
        "Writes an image unless it is proven to be in the target already.",
        "as FLASH; 251 already there, with the evidence",
        (_TARGET, _IMAGE),
        (_EVIDENCE, *_WRITING),
        scope=Scope.FLASH,
    ),
    Verb(
        "VERIFY",
        "Compares the flash with an image; changes nothing.",
        _SUBMITTED,
        (_TARGET, _IMAGE),
        (_ADDR, _TYPE, _PATCH, _RESETS, _TRACE, _ID, _WAIT),
        scope=Scope.FLASH,
    ),
    Verb(
        "READ",
        "Reads memory; fetch the bytes with GET <job>.",
        _SUBMITTED,
        (_TARGET, Param("addr", "address", "first address"), Param("len", "length", "number of bytes")),
        (_RESETS, _TRACE, _ID, _WAIT),
        scope=Scope.FLASH,
    ),
    Verb(
        "ERASE",
        "Erases the sectors of a range, which must begin and end on sector bounds: an erase is never widened.",
        _SUBMITTED,
        (_TARGET, Param("range", "range", "ADDR+LEN, or all")),
        (_ENTRY, _RESETS, _TRACE, _ID, _WAIT),
        scope=Scope.FLASH,
    ),
    Verb(
        "RESET",
        "Resets the target into its application, or into the loader.",
        _SUBMITTED,
        (_TARGET,),
        (Param("mode", "choice", "app: the application, boot: the ROM loader", ("app", "boot")), _RESETS, _TRACE, _ID, _WAIT),
        scope=Scope.FLASH,
    ),
    Verb(
        "DOCTOR",
        "Examines the wiring and the chip without changing its flash; resets it several times. The findings are in the result.",
        _SUBMITTED,
        (_TARGET,),
        (_RESETS, _TRACE, _ID, _WAIT),
        scope=Scope.FLASH,
    ),
    Verb(
        "OPTION-BYTES",
        "Shows the option bytes, decoded where the layout is known; writes those that set= or raw= names: the whole block is "
        "read, merged, written and read again. What shuts people out for ever is never written.",
        _SUBMITTED + "; the result has options.before and options.after",
        (_TARGET,),
        (
            Param("set", "fields", "fields to write, by their names in options.before: IWDG_SW:1,nBOOT1:1"),
            Param("raw", "patches", "bytes to lay over the block, complements computed; takes fields="),
            Param("fields", "text", "the fields that the bytes of raw= may change, by comma"),
            _INTERLOCK,
            _RESETS,
            _TRACE,
            _ID,
            _WAIT,
        ),
        scope=Scope.FLASH,
    ),
    Verb(
        "PROTECT",
        "Sets readout protection of level 1, or write protection of sectors besides those that have it.",
        _SUBMITTED,
        (_TARGET,),
        (
            _WHAT,
            Param("sectors", "sectors", "with what=write: numbers as PLAN shows them, 0,2-5"),
            _INTERLOCK,
            _RESETS,
            _TRACE,
            _ID,
            _WAIT,
        ),
        scope=Scope.FLASH,
    ),
    Verb(
        "UNPROTECT",
        "Removes readout protection, which ERASES THE WHOLE FLASH and takes force=erase-everything; or write protection, which "
        "erases nothing.",
        _SUBMITTED,
        (_TARGET,),
        (
            _WHAT,
            Param(
                "force",
                "list",
                "erase-everything: yes, the whole flash; interlock: reset without asking",
                ("erase-everything", "interlock"),
            ),
            _RESETS,
            _TRACE,
            _ID,
            _WAIT,
        ),
        scope=Scope.FLASH,
    ),
    Verb(
        "XMODEM",
        "Sends an image by XMODEM to a bootloader in the target's own flash (`[targets.NAME.xmodem]`), and waits for the words "
        "that say that it is there. The file as it is, unless type= says another format. evidence=receiver: the target said "
        "so; nothing was read back.",
        _SUBMITTED,
        (_TARGET, _IMAGE),
        (_ADDR, _TYPE, _PATCH, _SIG, _INTERLOCK, _RESETS, _TRACE, _ID, _WAIT),
        scope=Scope.FLASH,
    ),
    Verb("ID", "Asks the chip who it is.", _SUBMITTED, (_TARGET,), (_RESETS, _TRACE, _ID, _WAIT), scope=Scope.FLASH),
    Verb(
        "PLAN",
        "Shows what FLASH would erase, keep and write; touches nothing.",
        "250-part for each image and patch, 250-range for each run of sectors (action=stay|write|keep|lose), 250 with the sums",
        (_TARGET, _IMAGE),
        (_ADDR, _TYPE, _PATCH, _OUTSIDE, _UNPROTECT, _PROTECT, _FORCE),
        scope=Scope.READ,
    ),
    Verb(
        "JOBS",
        "Lists jobs, the newest first.",
        "250- one line a job, then 250 jobs=N",
        (),
        (
            Param("target", "target", "only of this target"),
            Param("state", "token", "only in this state"),
            Param("limit", "number", "at most so many (default 50)"),
            Param("before", "text", "only those older than this job: the last one of the answer before"),
        ),
        scope=Scope.READ,
    ),
    Verb(
        "STATUS",
        "The state of one job.",
        "250 job=ID state=.. phase=.. done=.. total=.. [trace=ID, see TRACE]",
        (_JOB,),
        scope=Scope.READ,
    ),
    Verb(
        "WAIT",
        "Reports progress until the job has ended.",
        "150- lines, then 250, 251, 400 and others as FLASH wait=1; 408 when the time is over",
        (_JOB,),
        (Param("timeout", "seconds", "give up waiting after so many seconds; the job goes on"),),
        scope=Scope.READ,
    ),
    Verb(
        "WATCH",
        "Follows a job until its end, a target or everything (*) until you close the connection.",
        "150- lines; for a job then its final line",
        (Param("job|target|*", "text", "what to follow"),),
        scope=Scope.READ,
    ),
    Verb(
        "CANCEL",
        "Cancels a job. Between the first erase and the proof only with force, for the target is left without firmware.",
        "250, or 409 not now",
        (_JOB,),
        (Param("force", "flag", "1: even though the target is left without firmware", ("0", "1")),),
        scope=Scope.FLASH,
    ),
    Verb(
        "LOG",
        "The history of a job.",
        "250- one line an entry, then 250 next=SEQ",
        (_JOB,),
        (Param("from", "number", "only entries from this sequence number on"),),
        scope=Scope.READ,
    ),
    Verb(
        "TRACE",
        "Sends the flight recording of a job: every byte of its dialogue, with times. `bridged trace` explains it.",
        "250 job=ID size=N, then exactly N raw bytes (text); 404 where none is kept",
        (_JOB,),
        scope=Scope.READ,
    ),
    Verb(
        "AUTH",
        "Says who you are, by a token; beyond loopback and the Unix socket nothing else but HELP, HELLO, PING and QUIT is "
        "answered before. Three wrong ones end the connection, and each makes your address wait longer.",
        "235 name=.. scopes=.. [targets=..], or 535",
        (Param("token", "secret", "as `bridged token add` printed it"),),
    ),
    Verb(
        "TOKEN",
        "Gives and takes rights: makes a token or names a client certificate, lists them, revokes one. At once in force.",
        "add: 250 token=.. (shown this once); list: 250- one line each, then 250 tokens=N; revoke: 250",
        (Param("action", "choice", "what to do", ("add", "list", "revoke")), Param("name", "token", "name of the token")),
        (
            Param("scope", "list", "rights, by comma (add)", tuple(Scope)),
            Param("targets", "targets", "only these targets (add)"),
            Param("expires", "seconds", "seconds until it ends by itself (add)"),
            Param("certificate", "text", "no token, but whoever shows a client certificate with this name (add)"),
        ),
        required=1,
        scope=Scope.ADMIN,
    ),
    Verb(
        "AUDIT",
        "Who did what, from where, and what came of it; the newest first.",
        "250- one line an entry, then 250 entries=N",
        (),
        (Param("limit", "number", "at most so many (default 50)"),),
        scope=Scope.ADMIN,
    ),
    Verb(
        "DRAIN",
        "Starts no further job, waits for those that run, and then ends the daemon. What waits goes on at its next start.",
        "150- lines while jobs run, then 250 drained=1",
        (),
        scope=Scope.ADMIN,
    ),
    Verb(
        "LOCK",
        "Reserves a target: new jobs of others wait, and only you write on its console. It runs out by itself.",
        "250 owner=YOU ttl=SECONDS, or 423 with the owner",
        (_TARGET,),
        (
            Param("ttl", "seconds", "for so long (default 3600, at most 86400)"),
            Param("note", "note", "why, for those who meet the lock"),
            Param("force", "flag", "1: take it over from another one, if you may", ("0", "1")),
        ),
        scope=Scope.CONSOLE,
    ),
    Verb(
        "UNLOCK",
        "Gives a reserved target back.",
        "250, 251 it was not locked, or 423 with the owner",
        (_TARGET,),
        (Param("force", "flag", "1: also the lock of another one, if you may", ("0", "1")),),
        scope=Scope.CONSOLE,
    ),
    Verb(
        "CONSOLE",
        "Connects to the target's serial port: from 101 on the connection is its bytes, to the end.",
        "101 target=.. mode=ro|rw, then raw bytes; 423 somebody else writes",
        (_TARGET, Param("mode", "choice", "ro: only look on, rw: write, too (the default)", ("ro", "rw"))),
        (
            Param("replay", "number", "so many bytes of what was said before come first (default: as configured)"),
            Param("force", "flag", "1: take over from who writes, if you may", ("0", "1")),
        ),
        required=1,
        scope=Scope.READ,
    ),
)

VERBS: dict[str, Verb] = {verb.name: verb for verb in _TABLE}


def help_lines(name: str = "") -> list[str]:
    """The text of HELP, or of HELP VERB. Raises ``UnknownVerb``."""
    if not name:
        width = max(len(verb.name) for verb in _TABLE)
        lines = [f"{verb.name:{width}} {verb.text}" for verb in _TABLE if verb.available]
        return [*lines, "HELP <verb> explains one. Options are key=value; quote as in a shell."]
    verb = VERBS.get(name.upper())
    if verb is None:
        raise UnknownVerb(f"unknown verb {name[:32]}{suggest(name.upper(), VERBS)}", verb=name[:32])
    lines = [verb.synopsis, verb.text]
    lines += [f"  <{a.name}> {a.text}" for a in verb.args]
    lines += [f"  {o.name}={o.values}  {o.text}" for o in verb.options]
    return [*lines, f"Reply: {verb.reply}", f"Scope: {verb.scope or 'none needed'}"]
