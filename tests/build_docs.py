"""Writes the parts of the documentation that the code knows better: ``python -m tests.build_docs [--check]``.

``docs/errors.md`` is made from ``errors.HINTS`` and the tree of error classes, ``docs/limits.md`` by ``tests.limits``, and
``systemd/bridged.catalog`` from ``logs.Notice``. ``docs/line-protocol.md``, ``docs/http-api.md``, ``docs/protection.md`` and
``docs/metrics.md`` are written by hand down to ``MARK`` and made from the tables of the code after it, and
``docs/troubleshooting.md`` between two marks; the dashboards are from ``tests.build_dashboards``, and ``tests.build_shell``
adds what shells and `man` want. A test runs the check, so none can drift.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from pathlib import Path
from typing import Any

from bridged import chips, doctor, logs
from bridged.api import http_problem
from bridged.api.auth import Authority
from bridged.api.http import HttpServer
from bridged.api.http_call import Operation, Services
from bridged.api.metrics import Metrics
from bridged.api.transfers import Transfers
from bridged.chips.option_rows import LAYOUTS
from bridged.chips.options import WrpKind
from bridged.errors import (
    BY_CODE,
    HINTS,
    BridgedError,
    ChipError,
    FleetError,
    ImageError,
    JobError,
    LinkError,
    LoaderError,
    RequestError,
    TargetError,
)
from bridged.protocol.reply import CODE_TEXT, REPLY_CODES, reply_code
from bridged.protocol.verbs import VERBS
from tests import build_chips, build_settings, build_shell, limits
from tests.build_dashboards import dashboards

DOCS = Path(__file__).parent.parent / "docs"
END = "<!-- By hand from here on. -->\n"
MARK = "<!-- From here on made from the code by: python -m tests.build_docs -->\n"

ERRORS_HEAD = """\
# Errors

<!-- Made from the code by: python -m tests.build_docs -->

Every failure has a code that never changes its meaning, a message (what was attempted, where, what was expected, what came),
the facts as data, the likely cause and the remedy. In the line protocol: `NNN CODE message=… cause=… remedy=…`.

A code of a group (`TARGET`, `LOADER`, …) is used only where no finer one fits. *Again* means: the same request may work later
with nothing changed.
"""


# In the order in which a job meets them.
SIGN_GROUPS: dict[type[BridgedError], str] = {
    LinkError: "The port and the lines",
    LoaderError: "The loader",
    ChipError: "The chip and its protection",
    TargetError: "The image and its application",
    ImageError: "Files",
    JobError: "Jobs and the disk",
    RequestError: "Clients",
    FleetError: "Fleets",
    BridgedError: "Anything else",
}


def errors_page() -> str:
    """The whole page: groups in the order of the tree, one section for each code."""
    out = [ERRORS_HEAD]
    groups: list[type[BridgedError]] = [BridgedError, *BridgedError.__subclasses__()]
    for group in groups:
        classes = [group] if group is BridgedError else [cls for cls in BY_CODE.values() if issubclass(cls, group)]
        out.append(f"## {_title(group)}\n")
        for cls in classes:
            hint = HINTS[cls.code]
            again = " Again: yes." if cls.retryable else ""
            out.append(f"### {cls.code}\n")
            numbers = f"Reply code {reply_code(cls.code)}, over HTTP {http_problem.status_of(cls.code)}."
            if issubclass(cls, FleetError):
                numbers = "In the log of the gateway, or told by `bridged fleet`."
            out.append(f"- Cause: {hint.cause}\n- Remedy: {hint.remedy}\n- {numbers}{again}\n")
    return "\n".join(out)


def troubleshooting_page() -> str:
    """As it is in the file, and between the marks what can be seen of each error, by groups of the tree."""
    head, _, rest = (DOCS / "troubleshooting.md").read_text().partition(MARK)
    out = []
    for group, title in SIGN_GROUPS.items():
        rows = [cls for cls in BY_CODE.values() if _sign_group(cls) is group and HINTS[cls.code].sign]
        if not rows:
            continue
        out += [f"### {title}", "", "| what you see | what it probably is | what to do |", "|---|---|---|"]
        for cls in rows:
            hint, code = HINTS[cls.code], cls.code
            sign, cause, remedy = (text.replace("|", "\\|") for text in (hint.sign, hint.cause, hint.remedy))
            out.append(f"| {sign} [`{code}`](errors.md#{code.lower()}) | {cause} | {remedy} |")
        out.append("")
    made = "\n".join(out)
    return f"{head}{MARK}\n{made}\n{END}{rest.partition(END)[2]}"


def _sign_group(cls: type[BridgedError]) -> type[BridgedError]:
    """The finest of ``SIGN_GROUPS`` that it belongs to."""
    return next(base for base in cls.__mro__ if base in SIGN_GROUPS)


def _title(group: type[BridgedError]) -> str:
    titles = {
        "INTERNAL": "Defects",
        "CONFIG": "Configuration",
        "IMAGE": "Images",
        "TARGET": "Target, wiring and loader",
        "JOB": "Jobs",
        "REQUEST": "Requests",
        "FLEET": "Fleets",
    }
    return titles[group.code]


def protocol_page() -> str:
    """The hand-written head as it is in the file, then the reference."""
    head, mark, _ = (DOCS / "line-protocol.md").read_text().partition(MARK)
    reference = re.sub(r"\n{3,}", "\n\n", verbs_and_codes())
    return f"{head}{mark or MARK}\n{reference}"


def verbs_and_codes() -> str:
    """What each verb takes and answers, and what each reply code means (Markdown)."""
    out = ["## Verbs", ""]
    for verb in VERBS.values():
        out += [f"### {verb.name}", "", f"`{verb.synopsis}`", "", verb.text, ""]
        out += [f"- `{a.name}`: {a.text}" for a in verb.args]
        out += [f"- `{o.name}={o.values}`: {o.text}" for o in verb.options]
        out += ["", f"Reply: {verb.reply}", "", f"Scope: {verb.scope or 'none needed'}", ""]
    out += ["## Reply codes", ""]
    out += [
        "The last line of a job that was `rejected` has 550 whatever its error, and 400 stands there for 421, 423 and 429: go"
    ]
    out += ["by `state` and the error code.", ""]
    out += ["| code | meaning | error codes |", "|---|---|---|"]
    for code, text in CODE_TEXT.items():
        errors = ", ".join(f"`{name}`" for name, number in REPLY_CODES.items() if number == code)
        out.append(f"| {code} | {text} | {errors} |")
    return "\n".join([*out, ""])


def doctor_page() -> str:
    """The hand-written head as it is in the file, then the table of findings."""
    head, mark, _ = (DOCS / "doctor.md").read_text().partition(MARK)
    return f"{head}{mark or MARK}\n{doctor.reference()}"


def protection_page() -> str:
    """The hand-written head as it is in the file, then the layouts of option bytes."""
    head, mark, _ = (DOCS / "protection.md").read_text().partition(MARK)
    rows = ["| product id | parts | option bytes | write protection of | source, confidence |", "|---|---|---|---|---|"]
    units = {WrpKind.SECTORS: "single sectors", WrpKind.GROUPS: "4 KiB each", WrpKind.AREAS: "two runs of pages"}
    for pid, layout in sorted(LAYOUTS.items()):
        sure = layout.wrp is not None and all(layout.field(name).settable for name in layout.wrp.fields)
        unit = (units[layout.wrp.kind] + ("" if sure else ", shown only")) if layout.wrp else "not shown"
        written = f"shown only: {layout.why_not}" if layout.why_not else "written"
        source = f"{layout.source.source}; {layout.source.confidence}"
        rows.append(f"| `{pid:#05x}` | {', '.join(chips.CHIPS[pid].names)} | {written} | {unit} | {source} |")
    return "\n".join([f"{head}{mark or MARK}", *rows, ""])


def http_page() -> str:
    """The hand-written head as it is in the file, then the table of operations."""
    head, mark, _ = (DOCS / "http-api.md").read_text().partition(MARK)
    rows = ["| operation | what | right |", "|---|---|---|"]
    for one in asyncio.run(_operations()):
        rows.append(f"| `{one.method} {one.path}` | {one.summary} | {f'`{one.scope}`' if one.scope else 'everybody'} |")
    return "\n".join([f"{head}{mark or MARK}", *rows, ""])


def metrics_page() -> str:
    """The hand-written head as it is in the file, then a row for each metric that a daemon exports."""
    head, mark, _ = (DOCS / "metrics.md").read_text().partition(MARK)
    rows = ["| metric | kind | labels | what |", "|---|---|---|---|"]
    for one in Metrics().described():
        labels = ", ".join(f"`{label}`" for label in one.labels)
        rows.append(f"| `{one.name}` | {one.kind} | {labels} | {one.text} |")
    return "\n".join([f"{head}{mark or MARK}", *rows, ""])


def logs_page() -> str:
    """The hand-written head as it is in the file, then a row for each event."""
    head, mark, _ = (DOCS / "logs.md").read_text().partition(MARK)
    rows = ["| event | `MESSAGE_ID` | what it means, and what to do |", "|---|---|---|"]
    rows += [
        f"| `{one.name.lower()}` | `{one.message_id}` | {one.explanation.replace('|', chr(92) + '|')} |" for one in logs.Notice
    ]
    return "\n".join([f"{head}{mark or MARK}", *rows, ""])


async def _operations() -> tuple[Operation, ...]:
    nothing: Any = None
    return HttpServer(Services(nothing, nothing, Authority(), Transfers(0.0))).operations


def pages() -> dict[str, str]:
    """File name to content."""
    return {
        "doctor.md": doctor_page(),
        "errors.md": errors_page(),
        "limits.md": limits.page(),
        "line-protocol.md": protocol_page(),
        "http-api.md": http_page(),
        "protection.md": protection_page(),
        "metrics.md": metrics_page(),
        "logs.md": logs_page(),
        "troubleshooting.md": troubleshooting_page(),
        "chips.md": build_chips.page(),
        "configuration.md": build_settings.page(),
        "../systemd/bridged.catalog": logs.catalog(),
        **{f"../config/grafana/{name}": text for name, text in dashboards().items()},
    }


def stale() -> list[str]:
    """Names of the pages whose file is not what the code gives."""
    return [name for name, text in pages().items() if not (DOCS / name).exists() or (DOCS / name).read_text() != text]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.build_docs", description="Write the generated documentation.")
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    if parser.parse_args().check:
        names = [f"docs/{name}" for name in stale()] + [f"shell/{name}" for name in build_shell.stale()]
        print("\n".join(f"{name} is stale" for name in names) or "docs: as the code says")
        return 1 if names else 0
    for name, text in pages().items():
        (DOCS / name).write_text(text)
    build_shell.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
