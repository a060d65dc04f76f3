"""The import direction of the rooms, read from the source with ``ast``: late imports and imports for types count too.

The table is the one of docs/ARCHITECTURE.md. When this test fails the usual cure is to move the code, not to add a word to
the table: an import that points down the table means that a room has learned of one that it should not know.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

from bridged import cli

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bridged"
PICTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text()

EVERYBODY = {"errors", "events", "config", "findings"}
ALL = {
    "protocol",
    "chips",
    "stub",
    "images",
    "target",
    "console",
    "jobs",
    "api",
    "fleet",
    "sim",
    "client",
    "terminal",
    "cli",
    "doctor",
    "init",
    "demo",
    "app",
    "logs",
    "systemd",
    "release",
}
MAY_IMPORT: dict[str, set[str]] = {
    "": set(),  # bridged/__init__.py: the session process starts from it
    "errors": set(),
    "events": set(),
    "findings": set(),
    "logs": {"errors", "config"},
    "systemd": {"logs"},
    "config": {"errors"},
    "protocol": EVERYBODY,
    "chips": EVERYBODY,
    "stub": EVERYBODY,
    "images": EVERYBODY | {"chips"},
    "target": EVERYBODY | {"protocol", "chips", "stub", "images"},
    "console": EVERYBODY | {"protocol", "target"},
    "jobs": EVERYBODY | {"images", "target"},
    "api": EVERYBODY | {"protocol", "images", "console", "jobs", "logs"},
    "fleet": EVERYBODY | {"images", "jobs", "api"},
    "sim": EVERYBODY | {"protocol", "chips"},
    "client": {"errors", "protocol"},
    "terminal": set(),
    "cli": EVERYBODY | {"protocol", "client", "terminal"},
    "doctor": EVERYBODY | {"protocol", "chips", "target"},
    "init": EVERYBODY | {"chips", "target", "doctor"},
    "release": EVERYBODY | {"jobs", "target", "logs"},
    "app": EVERYBODY | ALL,
    "demo": EVERYBODY | ALL,
    "__main__": EVERYBODY | ALL,
}
# The command line hands `serve`, `sim`, `demo`, `init`, `doctor` and `fleet` over: its only imports that point down, all late.
HANDED_OVER = {("cli", "app"), ("cli", "demo"), ("cli", "doctor"), ("cli", "fleet"), ("cli", "init"), ("cli", "sim")}

# Where packages from outside belong: a room (all of it) or one module.
OUTSIDE = {
    "serial": {"target"},
    "serial_asyncio": {"target"},
    "gpiod": {"target"},
    "aiohttp": {"api.web"},
    "prometheus_client": {"api.metrics"},
    "nats": {"fleet.link"},
    "systemd": {"systemd"},
    "bincopy": {"images.formats"},
    "elftools": {"images.formats"},
    "cryptography": {"images.minisign", "fleet.credentials"},
}

STDLIB_ONLY = (
    "client",
    "terminal",
    "protocol",
    "chips",
    "images.model",
    "images.plan",
    "target.uart",
    "target.lines",
    "target.session",
    "target.worker",
)


LONG_LINES = 600


@functools.cache
def modules() -> dict[str, Path]:
    """``bridged.target.uart`` to its file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_in(source: str, module: str, is_package: bool) -> set[tuple[str, int]]:
    """Full dotted names (of what could be a module) with the line, wherever they stand."""
    found = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module or "") if part)
            found |= {(f"{origin}.{alias.name}", node.lineno) for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("importlib.") in (
            "import_module",
            "__import__",
        ):
            found |= {(name, node.lineno) for name in by_string(node, module)}
    return found


def by_string(call: ast.Call, module: str) -> list[str]:
    """Modules that an import by string can mean. A room may do so with modules of its own, whose common name is written out in
    the call, as in ``f"bridged.chips.table_{name}"``; and the command line with those of its table."""
    name = call.args[0]
    if module == "bridged.cli" and ast.unparse(name) == "handed.module":
        return [handed.module for handed in cli.HANDED_OVER.values()]
    first = name.values[0] if isinstance(name, ast.JoinedStr) else name
    prefix = str(first.value) if isinstance(first, ast.Constant) else ""
    own = ".".join(module.split(".")[:2]) + "."
    assert prefix.startswith(own), f"{module}:{call.lineno}: an import by string cannot be checked"
    return [known for known in modules() if known.startswith(prefix)]


@functools.cache
def imports(module: str) -> dict[str, int]:
    """Modules that ``module`` imports: ours as the module itself (not the name taken from it), others by top-level name."""
    path = modules()[module]
    found: dict[str, int] = {}
    for name, line in sorted(imports_in(path.read_text(), module, path.name == "__init__.py")):
        outermost, *rest = name.split(".")
        if outermost == "bridged":
            prefixes = [".".join(("bridged", *rest[:n])) for n in range(len(rest), -1, -1)]
            found.setdefault(next(prefix for prefix in prefixes if prefix in modules()), line)
        else:
            found.setdefault(outermost, line)
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def ours(module: str) -> dict[str, int]:
    return {name: line for name, line in imports(module).items() if name.split(".")[0] == "bridged"}


def outside(module: str) -> dict[str, int]:
    """Packages that are neither ours nor of the standard library."""
    found = imports(module).items()
    return {name: line for name, line in found if name.split(".")[0] not in (sys.stdlib_module_names | {"bridged", "_sha2"})}


def test_imports_point_up_the_table() -> None:
    wrong = []
    for module in modules():
        assert room(module) in MAY_IMPORT, (
            f"{module}: a new room; say in MAY_IMPORT and docs/ARCHITECTURE.md what it may import"
        )
        allowed = MAY_IMPORT[room(module)] | {room(module), ""}
        wrong += [
            f"{module}:{line} imports {name}, but {room(module)} may import only {sorted(allowed - {''})}"
            for name, line in ours(module).items()
            if room(name) not in allowed and (room(module), room(name)) not in HANDED_OVER
        ]
    assert wrong == []


def test_the_command_line_hands_over_late() -> None:
    """`bridged status` must not load the daemon: these imports stand inside functions."""
    top = {
        node.module if isinstance(node, ast.ImportFrom) else alias.name
        for module, path in modules().items()
        if room(module) == "cli"
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not {name for name in top if name and name.split(".")[:2] in [["bridged", down] for _, down in HANDED_OVER]}
    assert "asyncio" not in top


@functools.cache
def picture() -> dict[str, int]:
    """Each room of the table in docs/ARCHITECTURE.md, with the number of its row."""
    table = PICTURE.partition("## Rooms")[2].partition("\nWithin ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {room: number for number, row in enumerate(rows) for room in re.findall(r"`(\w+)(?:\.py|/)`", row)}


def within(name: str) -> dict[str, int]:
    """The modules of a room in the order of its paragraph there; those of the first group may import each other."""
    text = " ".join(PICTURE.partition(f"Within `{name}/`")[2].partition("\n\n")[0].split())
    groups = text.partition(": ")[2].partition("). ")[0].split(" · ")
    return {module: number for number, group in enumerate(groups) for module in re.findall(r"`(\w+)`", group)}


def test_the_picture_in_the_docs_is_what_is_checked() -> None:
    assert set(picture()) == set(MAY_IMPORT) - {""}
    down = [
        f"{one} imports {other}, which stands below it"
        for one, others in MAY_IMPORT.items()
        for other in others & set(picture())
        if one and picture()[other] > picture()[one]
    ]
    assert down == []


def test_nothing_is_allowed_that_nobody_does() -> None:
    """A permission that is not used any more is an invitation."""
    used = {(room(module), room(name)) for module in modules() for name in ours(module)}
    everything = {"app", "demo", "__main__"}
    spare = {(one, other) for one, others in MAY_IMPORT.items() for other in others - EVERYBODY if one not in everything} - used
    assert spare == set()


@pytest.mark.parametrize("name", ["target", "jobs"])
def test_within_a_room_imports_go_one_way(name: str) -> None:
    order = within(name)
    known = {module.rpartition(".")[2] for module in modules() if module.startswith(f"bridged.{name}.")}
    assert len(order) > 10
    assert set(order) <= known
    wrong = []
    for module in modules():
        rank = order.get(module.rpartition(".")[2], 0)
        for imported, line in ours(module).items():
            if room(module) == room(imported) == name and f"bridged.{name}" not in (module, imported):
                other = order.get(imported.rpartition(".")[2], 0)
                if other > rank or (other == rank and rank > 0):
                    wrong.append(f"{module}:{line} imports {imported}")
    assert wrong == []


def test_packages_from_outside_stay_where_they_belong() -> None:
    wrong = []
    for module in modules():
        for name, line in outside(module).items():
            places = OUTSIDE.get(name)
            assert places is not None, f"{module}:{line} imports {name}: say in OUTSIDE where it belongs"
            if not {room(module), module.removeprefix("bridged.")} & places:
                wrong.append(f"{module}:{line} imports {name}, which belongs in {sorted(places)}")
    assert wrong == []


def reached(module: str) -> set[str]:
    """Everything of ours that importing ``module`` may load, packages on the way included."""
    found: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [*ours(name), *({name.rpartition(".")[0]} & set(modules()))]
    return found


def test_the_hot_path_is_stdlib_only_and_has_no_event_loop() -> None:
    """The session process must be up in milliseconds and must stay small; its modules reach nothing that is neither."""
    start = [m for m in modules() if any(f"{m}.".startswith(f"bridged.{hot}.") for hot in STDLIB_ONLY)]
    assert "bridged.protocol.flow" in start
    wrong = [
        f"{module}:{line} imports {name} (reached from {first})"
        for first in start
        for module in sorted(reached(first))
        for name, line in imports(module).items()
        if name == "asyncio" or name in outside(module)
    ]
    assert wrong == []


def test_protocol_has_no_io_clock_or_async() -> None:
    forbidden = {"asyncio", "os", "socket", "select", "selectors", "time", "logging", "threading", "subprocess", "termios"}
    wrong = []
    for module in modules():
        if room(module) == "protocol":
            wrong += [f"{module}:{line} imports {name}" for name, line in imports(module).items() if name in forbidden]
            wrong += [
                f"{module}:{node.lineno} is asynchronous"
                for node in ast.walk(ast.parse(modules()[module].read_text()))
                if isinstance(node, ast.AsyncFunctionDef | ast.AsyncFor | ast.AsyncWith | ast.Await)
            ]
    assert wrong == []


def test_no_module_imports_itself_over_others() -> None:
    """A ring of modules has no first one to read."""
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        if module in way:
            ring = way[way.index(module) :]
            # Hand-overs of the command line run in another process than the one that comes back.
            assert any(pair in HANDED_OVER for pair in zip(ring, (*ring[1:], ring[0]), strict=True)), " -> ".join(
                (*ring, module)
            )
            return
        if module not in done:
            for name in ours(module):
                if name != module and not module.startswith(f"{name}."):
                    visit(name, (*way, module))
            done.add(module)

    for module in modules():
        visit(module, ())
    assert done == set(modules())


def test_a_long_file_says_why_it_is_one() -> None:
    """Beyond a length that can be held in mind the docstring tells what makes it one file."""
    texts = {path: path.read_text() for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]}
    long = [path for path, text in texts.items() if text.count("\n") > LONG_LINES]
    assert [str(path) for path in long if "one file" not in (ast.get_docstring(ast.parse(texts[path])) or "")] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os.path, bridged.errors", {"os.path", "bridged.errors"}),
        ("from bridged.target import uart", {"bridged.target.uart"}),
        ("def f():\n    from bridged.jobs.model import Job", {"bridged.jobs.model.Job"}),
        ("if TYPE_CHECKING:\n    import gpiod", {"gpiod"}),
        ("from .uart import Uart", {"bridged.target.uart.Uart"}),
        ("from ..images import plan", {"bridged.images.plan"}),
    ],
)
def test_the_reader_sees_every_import(source: str, expected: set[str]) -> None:
    assert {name for name, _ in imports_in(source, "bridged.target.session", is_package=False)} == expected


def test_imports_by_string_stay_within_a_room() -> None:
    for argument in ("'bridged.api'", "name", "f'{name}.x'", "f'bridged.{name}'"):
        with pytest.raises(AssertionError, match="cannot be checked"):
            imports_in(f"import importlib\nimportlib.import_module({argument})", "bridged.target.uart", is_package=False)
    own = imports_in("import_module(f'bridged.chips.mod{x}')", "bridged.chips", is_package=True)
    assert own == {("bridged.chips.model", 1)}
