"""The commands that ask a gateway: one method of ``Command`` for each, which says what is asked and how the answer is shown."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridged.cli.exits import Exit, exit_code
from bridged.cli.screen import Screen, missing, say
from bridged.cli.texts import duration, facts, outcome, plan_text, size_text, table, update_text
from bridged.client import Client, Gateway, LinkLost, LocalFile, Refused
from bridged.client.files import is_special, signature_text, split_address
from bridged.errors import BadRequest, BridgedError, DaemonUnreachable, DigestMismatch
from bridged.protocol.reply import Reply, error_reply, flatten
from bridged.terminal import End, Talk, raw_keys

EXTRA = {"FLASH": "mode", "ENSURE": "evidence"}  # Options that only one of them has.
PAUSE_S = 0.5  # Before a console that ended is asked for again.


class Command:
    """One run of a command: its arguments, the gateway and the screen."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.screen = Screen(args.json)
        gateway = Gateway.find(
            args.gateway,
            token_file=args.token_file,
            ca=args.ca,
            certificate=args.client_cert,
            key=args.client_key,
            name=args.server_name,
        )
        self.client = Client(gateway, retry_s=args.retry_for, note=self.screen.note)
        self.job = ""
        self.problems = 0

    # images and jobs

    def put(self) -> Exit:
        self._print(self._stage(Path(self.args.file), self.args.name or ""))
        return Exit.DONE

    def flash(self) -> Exit:
        return self._with_image("FLASH")

    def ensure(self) -> Exit:
        return self._with_image("ENSURE")

    def verify(self) -> Exit:
        return self._with_image("VERIFY")

    def xmodem(self) -> Exit:
        return self._run_job(
            "XMODEM", self.args.target, self._image(), **self._options("addr", "type", "patch", "sig", "force")
        )

    def plan(self) -> Exit:
        args = self.args
        options = self._options("addr", "type", "patch", "outside", "unprotect", "protect", "force")
        rows: list[Reply] = []
        last = self._ask("PLAN", args.target, self._image(), each=rows.append, **options)
        self._print(
            plan_text(last.data, [row.data for row in rows if row.text == "part"], [r.data for r in rows if r.text == "range"])
        )
        return Exit.DONE

    def read(self) -> Exit:
        path = Path(self.args.output)
        parent = path.absolute().parent
        if os.path.isdir(path) or not os.path.isdir(parent):
            raise BadRequest(f"{path} cannot be written: give the name of a file in a directory that exists", path=str(path))
        # Before the target is bothered: a file is replaced, so it is its directory that counts.
        if not os.access(path if is_special(path) and os.path.exists(path) else parent, os.W_OK):
            raise BadRequest(f"{path} cannot be written: you may not", path=str(path))
        if os.path.exists(path) and os.path.samestat(path.stat(), os.fstat(1)):
            raise BadRequest("what is printed would be among the bytes: give the name of a file", path=str(path))
        done = self._run_job("READ", self.args.target, self.args.address, self.args.length)
        if done is not Exit.DONE or self.args.no_wait:
            return done
        size = self.client.get(self.job, path)
        self._print(f"{path}: {size_text(size)}")
        return Exit.DONE

    def erase(self) -> Exit:
        return self._run_job("ERASE", self.args.target, self.args.range, **self._options("entry"))

    def reset(self) -> Exit:
        return self._run_job("RESET", self.args.target, mode="boot" if self.args.boot else None)

    def id(self) -> Exit:
        return self._run_job("ID", self.args.target)

    def examine(self) -> Exit:
        done = self._run_job("DOCTOR", self.args.target)
        return Exit.FAILED if self.problems else done

    def option_bytes(self) -> Exit:
        args = self.args
        values = {"set": args.set, "raw": args.raw, "fields": args.field}
        wanted = {name: ",".join(value) if value else None for name, value in values.items()}
        if wanted["set"]:
            wanted["set"] = wanted["set"].replace("=", ":")
        return self._run_job("OPTION-BYTES", args.target, **wanted, **self._options("force"))

    def protect(self) -> Exit:
        sectors = self.args.sectors
        what = "write" if sectors else None
        return self._run_job("PROTECT", self.args.target, what=what, sectors=sectors, **self._options("force"))

    def unprotect(self) -> Exit:
        what = "write" if self.args.write else None
        return self._run_job("UNPROTECT", self.args.target, what=what, **self._options("force"))

    def _with_image(self, verb: str) -> Exit:
        names: tuple[str, ...] = ("addr", "type", "patch")
        if verb != "VERIFY":
            names += ("outside", "entry", "unprotect", "protect", "force", "sig")
        if verb in EXTRA:
            names += (EXTRA[verb],)
        return self._run_job(verb, self.args.target, self._image(), **self._options(*names))

    def _image(self) -> str:
        """Uploads the files; what is no file may be an image that is staged already. Images as the protocol names them."""
        named: list[str] = []
        for text in self.args.files:
            path, address = split_address(text)
            if path.startswith("sha256:") and not os.path.exists(path):
                named.append(path + address)
                continue
            named.append(self._stage(Path(path), "") + address)
        return ",".join(named)

    def _stage(self, path: Path, name: str) -> str:
        """Sends a file, as far as the gateway has not got it; as the protocol names it."""

        def progress(done: int, total: int, rate: float) -> None:
            self.screen.progress(path.name, "upload", done, total, rate)

        ref, reply = self.client.stage(LocalFile.of(path), name, self.args.type, progress)
        self.screen.end()
        self.screen.reply(reply)
        return ref

    def _options(self, *names: str) -> dict[str, Any]:
        args = self.args
        values = {
            "addr": getattr(args, "addr", None),
            "type": getattr(args, "type", None),
            "patch": ",".join(getattr(args, "patch", None) or []) or None,
            "outside": "discard" if getattr(args, "discard_outside", False) else None,
            "entry": "one-shot" if getattr(args, "one_shot", False) else None,
            "unprotect": 1 if getattr(args, "unprotect", False) else None,
            "protect": 1 if getattr(args, "protect", False) else None,
            "force": ",".join(getattr(args, "force", None) or []) or None,
            "sig": ",".join(signature_text(Path(name)) for name in getattr(args, "sig", None) or []) or None,
            "mode": "full" if getattr(args, "full", False) else None,
            "evidence": getattr(args, "evidence", None),
            "trace": 1 if getattr(args, "trace", False) else None,
            "resets": ",".join(getattr(args, "resets", None) or []) or None,
        }
        return {name: values[name] for name in names}

    def _run_job(self, verb: str, target: str, *words: str, **options: Any) -> Exit:
        reply = self.client.submitted(
            verb, target, *words, id=self.args.id or "", **self._options("trace", "resets"), **options
        )
        self.screen.reply(reply)
        self.job = str(reply.data.get("job", ""))
        if reply.code == 251:  # An ensure that was true already; there was nothing to wait for.
            self._print(outcome(reply))
            return Exit.DONE
        if self.args.no_wait:
            self._print(self.job)
            return Exit.DONE
        return self._follow()

    def _follow(self) -> Exit:
        """Waits for ``self.job``."""
        last = self.client.wait(self.job, self._show_progress)
        self.screen.end()
        self.screen.reply(last)
        self._print(outcome(last))
        return Exit.DONE

    def _show_progress(self, reply: Reply) -> None:
        self.screen.reply(reply)
        data = reply.data
        if reply.code == 250 and "level" in data:  # A finding of DOCTOR.
            self.screen.end()
            self.problems += data["level"] == "problem"
            self._print(f"{data['level']:8} {data['code']}: {data['text']}")
            if data.get("remedy"):
                self._print(f"         {data['remedy']}")
            return
        if data.get("event") == "Warned":
            self.screen.note(f"{data.get('target', '')}: warning: {data.get('text', '')}")
        state = str(data.get("state", ""))
        phase = str(data.get("phase") or "") if state == "running" else state
        if state in ("running", "queued", "waiting", "interrupted"):
            if data.get("reason") and not data.get("event"):  # Also of one that runs: its end waits for room on the disk.
                phase += f" ({data['reason']})"
            total, rate = int(data.get("total") or 0), float(data.get("rate") or 0)
            if phase == "plan" and total:
                phase = "plan: is it there already?"  # Bytes are compared, and nothing is written yet.
            self.screen.progress(str(data.get("target", "")), phase, int(data.get("done") or 0), total, rate)

    # looking

    def status(self) -> Exit:
        if not self.args.what:
            return self.targets()
        try:
            return self._show_facts(self.client.ask("STATUS", self.args.what), [])
        except Refused as refused:
            if refused.reply.text != "UNKNOWN_JOB":
                raise
            rows: list[Reply] = []
            try:
                info = self.client.ask("INFO", self.args.what, each=rows.append)
            except Refused as other:
                raise refused if other.reply.text == "UNKNOWN_TARGET" else other from None
            return self._show_facts(info, rows)

    def _show_facts(self, last: Reply, rows: list[Reply]) -> Exit:
        for reply in (*rows, last):
            self.screen.reply(reply)
        data = dict(last.data)
        for row in rows:
            data |= row.data
        self._print(facts(data))
        return Exit.DONE

    def targets(self) -> Exit:
        rows: list[Reply] = []
        self._ask("TARGETS", each=rows.append)
        found = [dict(flatten(row.data)) for row in rows]
        first = ["target", "state", "chip", "family", "image_name", "proven", "owner", "queued", "reason"]
        rest = sorted({key for row in found for key in row} - set(first))
        self._print(table(found, [*first, *(rest if self.args.long else ())]) if found else "no targets are configured")
        return Exit.DONE

    def jobs(self) -> Exit:
        args = self.args
        rows: list[Reply] = []
        self._ask("JOBS", each=rows.append, target=args.target, state=args.state, limit=args.limit, before=args.before)
        columns = ("job", "kind", "target", "state", "phase", "reason", "error", "image", "created", "ended")
        found = [dict(row.data) for row in rows]
        for row in found:
            if row.get("reason") == row.get("error"):
                row["reason"] = None
        self._print(table(found, columns) if rows else "no jobs")
        return Exit.DONE

    def watch(self) -> Exit:
        what = self.args.what
        if what != "*":
            try:
                self.job = str(self.client.status(what)["job"])
                return self._follow()
            except Refused as refused:
                if refused.reply.text != "UNKNOWN_JOB" or self.job:
                    raise
        if sys.stderr.isatty():  # Nothing may happen for hours, and a person should not wonder.
            say(f"watching {'everything' if what == '*' else what}; Ctrl-C ends", sys.stderr)
        self.client.watch(what, self._show_update)
        return Exit.FAILED

    def _show_update(self, reply: Reply) -> None:
        self.screen.reply(reply)
        data = reply.data
        if "job" in data:
            at = str(data.get("at") or "")[11:19]
            self._print(f"{at} {data.get('target', '')} {data['job']} {update_text(data)}")
        if self.screen.lost is not None:
            raise self.screen.lost  # It would go on for ever, and for nobody.

    def log(self) -> Exit:
        since = self.args.since

        def show(reply: Reply) -> None:
            self.screen.reply(reply)
            data = reply.data
            self._print(f"{data.get('seq', ''):>5} {data.get('at') or '':24} {update_text(data)}")

        self.screen.reply(self.client.ask("LOG", self.args.job, each=show, **{"from": since}))
        return Exit.DONE

    def trace(self) -> Exit:
        """Late import: nothing else needs the decoder."""
        text = self._recording(self.args.job)
        if self.args.raw:
            self.screen.out(text, end="")
            return Exit.DONE
        from bridged.protocol import trace_text
        from bridged.protocol.trace import decode

        found = decode(text)
        if self.args.json:
            for line in trace_text.json_lines(found):
                self.screen.out(line)
        else:
            self.screen.out(trace_text.table(found, fold=not self.args.all), end="")
        return Exit.DONE

    def _recording(self, what: str) -> str:
        """Of a job, or from a file that somebody sent us."""
        path = Path(what)
        if os.path.isfile(path):
            text = path.read_text("utf-8", "replace")
            if not re.search(r"^\s*\d+\.\d+ \S", text, re.MULTILINE):
                raise BadRequest(f"{path} holds no line of a recording", path=str(path))
            return text
        if "/" in what:  # In the name of no job.
            raise BadRequest(f"{what} is no file, or you may not read it", path=what)
        return self.client.trace(what).decode("utf-8", "replace")

    def cancel(self) -> Exit:
        reply = self._ask("CANCEL", self.args.job, force=1 if self.args.force else None)
        self._print(f"job {reply.data.get('job')}: {reply.data.get('state')}")
        return Exit.DONE

    def drain(self) -> Exit:
        self._ask("DRAIN", each=lambda _reply: self.screen.note("waiting for the jobs that run"))
        self._print("drained: no job runs, and the daemon ends")
        return Exit.DONE

    # the console

    def console(self) -> Exit:
        args = self.args
        until = re.compile(args.until.encode()) if args.until is not None else None
        with raw_keys() as keys:
            self.screen.raw = keys
            talk = Talk(keys, args.read_only, until, args.within)
            if keys:
                self.screen.note(f"console of {args.target}; Ctrl-] leaves")
            end = self._talk(talk)
        self.screen.raw = False
        if end is End.TIME and until is not None:
            self.screen.note(f"{args.target} did not say {args.until!r} within {args.within:g} s")
            return Exit.TIMED_OUT
        return Exit.DONE

    def _talk(self, talk: Talk) -> End:
        """Across as many connections as it takes; what is said between them is in the target's history."""
        replay = self.args.replay
        while True:
            args = self.args
            with self.client.console(args.target, write=not args.read_only, replay=replay, force=args.force) as wire:
                try:
                    return talk.over(wire)
                except LinkLost as lost:
                    self.screen.note(f"connection lost ({lost}); trying again")
            replay = 0  # Nothing twice.
            time.sleep(PAUSE_S)

    def lock(self) -> Exit:
        args = self.args
        reply = self._ask("LOCK", args.target, ttl=args.ttl, note=args.note, force=1 if args.force else None)
        self._print(f"{args.target} is locked for {reply.data.get('owner')}, for {duration(float(reply.data['ttl']))}")
        return Exit.DONE

    def unlock(self) -> Exit:
        reply = self._ask("UNLOCK", self.args.target, force=1 if self.args.force else None)
        self._print(f"{self.args.target} {'was not locked' if reply.code == 251 else 'is free again'}")
        return Exit.DONE

    # rights

    def token(self) -> Exit:
        args = self.args
        options: dict[str, Any] = {}
        if args.action == "add":
            options = {
                "scope": ",".join(args.scope),
                "targets": ",".join(args.target) or None,
                "expires": args.expires,
                "certificate": args.certificate,
            }
        words = [args.action, args.name] if args.action != "list" else [args.action]
        rows: list[Reply] = []
        last = self._ask("TOKEN", *words, each=rows.append, **options)
        if args.action == "list":
            columns = ("name", "kind", "scopes", "targets", "created", "expires", "certificate", "by")
            self._print(table([row.data for row in rows], columns) if rows else "no tokens")
        elif args.action == "add" and "token" in last.data:
            # The token alone on stdout, so that it can go into a file; nobody will see it again.
            self.screen.note(f"token {args.name} is in force; this is the only time that it is shown")
            self._print(str(last.data["token"]))
        else:
            self._print(f"{args.name}: {'in force' if args.action == 'add' else 'revoked'}")
        return Exit.DONE

    def audit(self) -> Exit:
        rows: list[Reply] = []
        self._ask("AUDIT", each=rows.append, limit=self.args.limit)
        columns = ("at", "who", "from", "what", "target", "job", "result", "detail")
        self._print(table([row.data for row in rows], columns) if rows else "nothing is noted yet")
        return Exit.DONE

    # saying

    def _ask(self, verb: str, *words: str, each: Callable[[Reply], None] = lambda _reply: None, **options: Any) -> Reply:
        def show(reply: Reply) -> None:
            self.screen.reply(reply)
            each(reply)

        reply = self.client.ask(verb, *words, each=show, **options)
        self.screen.reply(reply)
        return reply

    def _print(self, text: str) -> None:
        if not self.args.json:
            self.screen.end()
            self.screen.out(text)

    def run(self) -> Exit:
        """Carries the command out; every way to end has its exit code."""
        try:
            result: Exit = getattr(self, self.args.command.replace("-", "_"))()
            if told := missing(self.screen.lost):
                if result is Exit.DONE and (not self.job or getattr(self.args, "no_wait", False)):
                    raise BadRequest(told)
                self.screen.note(told)  # The code of a job is how the job ended.
        except Refused as refused:
            self.screen.error(refused.reply)
            return exit_code(refused.reply)
        except BrokenPipeError:
            return Exit.DONE  # Of what only ends with its reader: `bridged watch | head`.
        except BridgedError as error:
            reply = error_reply(error)
            self.screen.error(reply)
            if self.job and isinstance(error, DaemonUnreachable):
                self.screen.note(f"job {self.job} goes on at the gateway; follow it with: bridged watch {self.job}")
            return exit_code(reply) if isinstance(error, DaemonUnreachable | DigestMismatch) else Exit.USAGE
        except OSError as error:  # Of this machine: a file, the terminal.
            self.screen.error(error_reply(BadRequest(f"{error.filename or 'this machine'}: {error.strerror or error}")))
            return Exit.USAGE
        except KeyboardInterrupt:
            if self.job:
                text = f"job {self.job} goes on; follow it: bridged watch {self.job}, stop it: bridged cancel {self.job}"
            else:
                text = "interrupted before a job was started; an upload goes on where it stopped when you repeat the command"
            self.screen.note(text)
            return Exit.INTERRUPTED
        else:
            return result
        finally:
            self.screen.end()
            self.client.close()
