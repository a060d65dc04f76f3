"""The configuration: what is accepted, and that every mistake is told at once with its place and what would be right."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridged import chips, config
from bridged.config import Config
from bridged.config.file import LIMIT_BYTES, MAX_TARGETS, InvalidConfig, load, warnings_of
from bridged.config.places import places_of
from bridged.config.reference import reference
from bridged.config.sharing import groups, neighbours
from bridged.config.values import MAX_CHARS, MAX_ITEMS, parse_range
from bridged.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "config" / "examples").glob("*.toml"))


def mistakes(text: str) -> list[str]:
    """Every mistake of ``text`` as ``LINE:COLUMN: KEY: WHAT``."""
    with pytest.raises(InvalidConfig) as caught:
        load(text)
    return [str(mistake).removeprefix("configuration:") for mistake in caught.value.errors]


def check(text: str, *expected: str) -> None:
    """The mistakes of ``text`` are exactly ``expected`` (each the beginning of one, ``…`` standing for anything between)."""
    found = mistakes(text)
    patterns = [re.escape(line).replace("…", ".*") for line in expected]
    assert len(found) == len(expected), found
    for line, pattern in zip(found, patterns, strict=True):
        assert re.match(pattern, line), (line, pattern)


# --- what is accepted


def test_an_empty_file_is_all_defaults() -> None:
    assert load("") == Config()
    assert Config().api.listen == "127.0.0.1:7100"


def test_values_arrive_typed() -> None:
    loaded = load(
        """
        gateway.name = "bench"
        [api]
        listen = "[::1]:0"
        metrics = ""
        idle_timeout_s = 5
        [targets.m1]
        port = "/dev/ttyAMA0"
        lines = { kind = "gpio", nrst = "pin:11", boot0 = "pinctrl-rp1:27", enter = [
            "boot0=1", "nrst = 0", "wait=0.01", "nrst=1"] }
        [targets."m-2".lines]
        kind = "modem"
        nrst = "!dtr"
        boot0 = "by-hand"
        [targets.m-2]
        port = "/dev/ttyUSB0"
        """
    )
    assert loaded.gateway.name == "bench"
    assert loaded.api.idle_timeout_s == 5.0
    assert isinstance(loaded.api.idle_timeout_s, float)
    assert loaded.targets["m1"].lines.enter == ["boot0=1", "nrst = 0", "wait=0.01", "nrst=1"]
    assert loaded.targets["m-2"].lines.nrst == "!dtr"
    assert list(loaded.targets) == ["m1", "m-2"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load_and_say_what_was_not_tried(path: Path) -> None:
    loaded = load(path)
    (target,) = loaded.targets.values()
    assert target.lines.kind == "gpio"
    assert target.lines.nrst
    assert target.lines.boot0
    assert target.lines.nrst_open_drain
    assert warnings_of(loaded) == []
    text = path.read_text()
    for needed in ("Not tried on silicon", "disable-bt", "serial-getty", "Wiring"):
        assert needed in text


def test_there_are_the_three_examples() -> None:
    assert [path.stem for path in EXAMPLES] == ["nucleo-f756zg", "nucleo-h743zi", "nucleo-l476rg"]


# --- the reference


def test_the_committed_reference_is_what_the_code_says() -> None:
    committed = (ROOT / "config" / "bridged.toml").read_text()
    assert committed == reference(), 'stale: run "make reference"'
    assert load(committed) == Config()


def test_the_reference_with_every_setting_switched_on_is_the_defaults() -> None:
    text = re.sub(r"^#(?=[a-z\[])", "", reference(), flags=re.MULTILINE)
    loaded = load(text)
    assert loaded.targets == {"motor1": config.Target(port="/dev/ttyAMA0")}
    assert (loaded.gateway, loaded.api, loaded.store, loaded.jobs) == (
        config.Gateway(),
        config.Api(),
        config.Store(),
        config.Jobs(),
    )
    assert text.count("\n") > 60


# --- places


def test_syntax_errors_have_a_place() -> None:
    check('[api]\nlisten = "127', "2:…: not valid TOML: ")
    check("[api]\nconnections = ", "2:15: not valid TOML: ")
    check("a = [1,\n", "2:1: not valid TOML: ")
    check("[api]\n[api]\n", "2:5: not valid TOML: ")


def test_all_mistakes_come_at_once_with_their_places() -> None:
    check(
        """\
[gatway]
name = "x"

[api]
  connections = true   # not a number
listen.port = 7100
"idle_timeout_s" = "5"

[targets.m1]
prot = "/dev/ttyS0"
baud = 115200.0
lines = { kind = "gipo", "boot0" = "GPIO27" }

[targets."a b"]
port = "ttyS1"
application = { listen_s = 61, parity = "even" }
""",
        "1:2: gatway: no such key; did you mean gateway?; known here: gateway, api, tls, auth, signing, store, jobs, fleet, "
        "hawkbit, targets",
        "5:3: api.connections: must be a whole number from 1 to 65536, not true",
        "6:1: api.listen: must be a string, not a table",
        '7:1: api.idle_timeout_s: must be a number from 1 to 86400, not "5"',
        "9:10: targets.m1.port: is required",
        "10:1: targets.m1.prot: no such key; did you mean port?",
        "11:1: targets.m1.baud: must be 0 or a whole number from 1200 to 1000000, not 115200.0",
        '12:11: targets.m1.lines.kind: "gipo" is not one of "gpio", "modem", "socket", "none"; did you mean gpio?',
        '14:10: targets."a b": not a name for a target',
        '15:1: targets."a b".port: "ttyS1" is not an absolute path',
        '16:17: targets."a b".application.listen_s: must be a number from 0 to 60, not 61',
        '16:32: targets."a b".application.parity: "even" is not one of "N", "E", "O"',
    )


def test_places_survive_awkward_toml() -> None:
    text = (
        '# comment with [table] and key = "x"\r\n'
        '[ targets . "m\\u0031" ]   # m1\r\n'
        'port = """\\\r\n'
        '   /dev/[x]"" # not a comment\r\n'
        "bad1 = 1\r\n"
        '"""\r\n'
        "bad2 = [ 1, # one ]\r\n"
        "   [2, { a.b = '}' }],\r\n"
        "]\r\n"
        "'bad3'=1979-05-27 07:32:00\r\n"
        "\tbad4 = '''it's'''''\r\n"
    )
    tomllib.loads(text)
    places = places_of(text)
    assert places["targets", "m1"] == (2, 13)
    assert places["targets", "m1", "bad2", "1", "1", "a", "b"] == (8, 12)
    check(
        text,
        "3:1: targets.m1.port: has characters that cannot be printed",
        "7:1: targets.m1.bad2: no such key",
        "10:1: targets.m1.bad3: no such key",
        "11:2: targets.m1.bad4: no such key",
    )


KEYS = st.text(st.sampled_from('ab-_1 ."\\é'), min_size=1, max_size=4)
LEAVES = st.one_of(st.integers(), st.booleans(), st.text(max_size=6), st.floats(allow_nan=False, allow_infinity=False))


@given(st.dictionaries(KEYS, st.dictionaries(KEYS, st.lists(LEAVES, max_size=3) | LEAVES, max_size=3), max_size=3))
def test_every_key_of_any_document_is_found_where_it_stands(data: dict[str, dict[str, object]]) -> None:
    def show(value: object) -> str:
        match value:
            case list():
                return "[ " + " ,\n# , ]\n".join(map(show, value)) + " ]"
            case bool():
                return str(value).lower()
            case str():
                return quote(value)
            case _:
                return repr(value)

    lines: list[str] = []
    expected: dict[tuple[str, ...], tuple[int, int]] = {}
    for table, pairs in data.items():
        lines.append(f"[{quote(table)}]")
        expected[(table,)] = (len(lines), 2)
        for key, value in pairs.items():
            expected[table, key] = (len(lines) + 1, 3)
            lines.extend(f"  {quote(key)} = {show(value)} # {key}".replace("\r", " ").split("\n"))
    text = "\n".join(lines)
    assert tomllib.loads(text) == data
    places = places_of(text)
    assert {path: place for path, place in places.items() if path in expected} == expected


def quote(text: str) -> str:
    return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in text) + '"'


# --- rules


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("127.0.0.1:7100", ""),
        ("127.9.8.7:1", ""),
        ("localhost:65535", ""),
        ("[::1]:7100", ""),
        ("", ""),
        ("0.0.0.0:7100", "0.0.0.0:7100 needs TLS: set tls.certificate…say plaintext:0.0.0.0:7100"),
        ("[::]:7100", "[::]:7100 needs TLS"),
        ("192.168.1.5:7100", "192.168.1.5:7100 needs TLS"),
        ("127.0.0.1:7100 192.168.1.5:7100", "192.168.1.5:7100 needs TLS"),
        ("tls:127.0.0.1:7100", "127.0.0.1:7100 needs TLS"),
        ("plaintext:192.168.1.5:7100", ""),
        ("127.0.0.1:7100 plaintext:192.168.1.5:7100", ""),
        ("127.0.0.1:7100  127.0.0.1:7101", "separate several addresses by one space"),
        ("plain:192.168.1.5:7100", "'plain:192.168.1.5' is not an address"),
        ("::1:7100", "write the IPv6 address in brackets: [::1]:7100"),
        ("gateway.local:7100", "'gateway.local' is not an address; names other than localhost are not looked up"),
        ("7100", '"7100" is not HOST:PORT'),
        ("127.0.0.1:65536", '"127.0.0.1:65536" is not HOST:PORT'),
        ("127.0.0.1:", '"127.0.0.1:" is not HOST:PORT'),
        ("127.0.0.1:-1", '"127.0.0.1:-1" is not HOST:PORT'),
        ("127.0.0.1:\u0661", '"127.0.0.1:\u0661" is not HOST:PORT'),
    ],
)
def test_beyond_loopback_only_with_tls_or_in_so_many_words(value: str, wrong: str) -> None:
    text = f'[api]\nlisten = "{value}"\n'
    if wrong:
        check(text, f"2:1: api.listen: {wrong}")
    else:
        assert load(text).api.listen == value


def test_a_trusted_proxy_is_an_address_and_not_everybody() -> None:
    assert load('[api]\ntrusted_proxies = ["127.0.0.1", "10.0.0.0/8", "fd00::/8"]\n').api.trusted_proxies
    check('[api]\ntrusted_proxies = ["proxy"]\n', '2:20: api.trusted_proxies[0]: "proxy" is neither an address nor a network')
    check('[api]\ntrusted_proxies = ["10.1.0.0/8"]\n', "2:20: …is neither an address nor a network")
    check('[api]\ntrusted_proxies = ["0.0.0.0/0"]\n', "2:20: …are all addresses")


def test_no_two_listeners_are_at_one_place() -> None:
    text = '[api]\nlisten = "127.0.0.1:7100 127.0.0.1:7200"\n[targets.a]\nport = "/dev/a"\n[targets.a.console]\nlisten = '
    more = '\n[targets.b]\nport = "/dev/b"\n[targets.b.console]\nlisten = "127.0.0.1:7203 127.0.0.1:7202"\n'
    load(f'{text}"127.0.0.1:7201 127.0.0.1:7204"{more}')
    check(
        f'{text}"127.0.0.1:7201 127.0.0.1:7200"{more}', "6:1: targets.a.console.listen: 127.0.0.1:7200 is taken by api.listen"
    )
    check(f'{text}"127.0.0.1:7101"{more}', "6:1: targets.a.console.listen: 127.0.0.1:7101 is taken by api.http")
    where = "10:1: targets.b.console.listen: 127.0.0.1:7202 is taken by targets.a.console.listen"
    check(f'{text}"127.0.0.1:7202"{more}', where)


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ('kind = "gpio", nrst = "GPIO17", boot0 = "pin:13", power = "pinctrl-bcm2711:4"', ()),
        ('kind = "gpio", nrst = "pin:41"', ("nrst: the header has pins 1 to 40, not 41",)),
        ('kind = "gpio", nrst = "a:b"', ('nrst: "a:b" is not a line: GPIO17 (its name), pin:11',)),
        ('kind = "gpio", nrst = "by-hand"', ()),
        ('kind = "modem", nrst = "dtr", boot0 = "!rts"', ()),
        ('kind = "modem", nrst = "DTR"', ('nrst: "DTR" is not one of "dtr", "rts", "!dtr", "!rts"',)),
        ('kind = "modem", nrst = "!rst"', ("nrst: …; did you mean !rts?",)),
        ('nrst = "GPIO17"', ('nrst: names a line, but kind is "none"',)),
        ('boot0 = "by-hand"', ()),
        ('kind = "socket"', ('socket: is required with kind = "socket"',)),
        ('kind = "socket", socket = "/run/box", nrst = "nrst", boot0 = "boot0"', ()),
        ('kind = "socket", socket = "/run/box", nrst = "GPIO1"', ('nrst: "GPIO1": a line box calls this line "nrst"',)),
        ('kind = "gpio", socket = "/run/box"', ('socket: has a meaning only with kind = "socket"',)),
        (f'kind = "socket", socket = "/{"x" * 107}"', ("socket: is longer than the 107 bytes",)),
        ('kind = "gpio", nrst = "A", enter = ["nrst=0", "wait=0.1", "nrst=1"]', ()),
        ('kind = "gpio", nrst = "A", enter = ["boot0=1"]', ("enter[0]: drives boot0, but boot0 is not wired",)),
        (
            'kind = "gpio", nrst = "A", leave = ["nrst=2", "wait=11", "rnst=0", 5, "wait=nan"]',
            (
                'leave[0]: "nrst=2" is not a step; did you mean nrst?',
                'leave[1]: "wait=11": wait takes 0 to 10 seconds',
                'leave[2]: "rnst=0" is not a step; did you mean nrst?',
                "leave[3]: must be a string, not 5",
                'leave[4]: "wait=nan": wait takes',
            ),
        ),
        (
            "reset_s = 0.0, boot0_setup_s = nan, nrst_active_low = 1",
            (
                "reset_s: must be a number from 0.0001 to 10, not 0.0",
                "boot0_setup_s: must be a number from 0 to 10, not nan",
                "nrst_active_low: must be true or false, not 1",
            ),
        ),
    ],
)
def test_lines(lines: str, wrong: tuple[str, ...]) -> None:
    text = f'[targets.m]\nport = "/dev/ttyS0"\nlines = {{ {lines} }}\n'
    if wrong:
        check(text, *(f"3:…: targets.m.lines.{line}" for line in wrong))
    else:
        assert load(text).targets["m"].port == "/dev/ttyS0"


def two(a: str, b: str) -> str:
    return f'[targets.a]\nport = "/dev/ttyS0"\n{a}\n[targets.b]\nport = "/dev/ttyS1"\n{b}\n'


def test_what_is_shared_must_be_declared_by_both() -> None:
    line = 'lines = { kind = "gpio", nrst = "GPIO17" }'
    check(
        two(line, line),
        '4:10: targets.b: uses line GPIO17, as targets.a does: both must declare it, here shares = ["a"] and there …["b"]',
    )
    check(two(line + '\nshares = ["b"]', line), '4:11: targets.a.shares[0]: b must say so too: add shares = ["a"] to targets.b')
    shared = load(two(line + '\nshares = ["b"]', line + '\nshares = ["a"]'))
    assert shared.targets["a"].shares == ["b"]
    check(two('shares = ["a", "c"]', ""), "3:11: …cannot share with itself", "3:16: targets.a.shares[1]: no such target")
    one_port = two("", "").replace("ttyS1", "ttyS0")
    check(one_port, "4:10: targets.b: uses port /dev/ttyS0, as targets.a does")
    by_hand = 'lines = { boot0 = "by-hand" }'
    assert len(load(two(by_hand, by_hand)).targets) == 2, "by hand is no line of the gateway"


GPIO = 'lines = { kind = "gpio", nrst = "GPIO17", boot0 = "GPIO27" }'


@pytest.mark.parametrize(
    ("a", "b", "ports", "found"),
    [
        (GPIO, GPIO, "2", ("b",)),
        (GPIO, GPIO.replace("17", "18"), "2", ()),  # BOOT0 alone resets nobody.
        (GPIO.replace("nrst", "power"), GPIO, "2", ("b",)),
        (GPIO, GPIO.replace("GPIO17", "pin:11").replace("GPIO27", "pin:13"), "2", ("b",)),  # One line under two names.
        (GPIO, GPIO.replace("17", "18").replace("27", "22"), "1", ()),  # The same UART, and an NRST for each.
        ('lines = { kind = "modem", nrst = "dtr" }', 'lines = { kind = "modem", nrst = "dtr" }', "1", ("b",)),
        ('lines = { kind = "modem", boot0 = "rts" }', 'lines = { kind = "modem", boot0 = "rts" }', "1", ()),
        (
            'lines = { kind = "socket", socket = "/run/box", nrst = "nrst" }',
            'lines = { kind = "socket", socket = "/run/box", nrst = "nrst" }',
            "2",
            ("b",),
        ),
        ("", "", "1", ()),
    ],
)
def test_whom_a_reset_resets_as_well(a: str, b: str, ports: str, found: tuple[str, ...]) -> None:
    text = two(f'{a}\nshares = ["b"]', f'{b}\nshares = ["a"]')
    loaded = load(text.replace("ttyS1", "ttyS0") if ports == "1" else text)
    assert neighbours(loaded.targets, "a") == found
    assert neighbours(loaded.targets, "b") == (("a",) if found else ())


def test_who_shares_nothing_resets_nobody() -> None:
    loaded = load(two(GPIO, GPIO.replace("17", "18").replace("27", "22")))
    assert neighbours(loaded.targets, "a") == ()


def test_other_rules_over_two_values() -> None:
    check('[api]\nmetrics = "127.0.0.1:7100"\n', "2:1: api.metrics: 127.0.0.1:7100 is taken by api.listen already")
    check("[store]\nlimit_mib = 8\n", "1:2: store.image_limit_mib: exceeds store.limit_mib, which is 8")
    check(
        "[targets]\nm1 = 5\n[api]\nsocket = 3", "2:1: targets.m1: must be a table, not 5; write [targets.m1]", "4:1: api.socket"
    )
    check("targets = 5", "1:1: targets: must be a table, not 5")
    check('[targets.a]\nport = ""', "2:1: targets.a.port: must not be empty")
    check(f'[gateway]\nname = "{"x" * 65}"', "2:1: gateway.name: is longer than 64 characters")


def test_numbers_and_sizes_have_bounds() -> None:
    long = MAX_CHARS + 1
    check(f'[targets.m1]\nport = "/{"d" * long}"', f"2:1: targets.m1.port: is longer than {MAX_CHARS} characters")
    steps = ", ".join(['"wait=1"'] * (MAX_ITEMS + 1))
    check(
        f'[targets.m1]\nport = "/dev/p"\nlines.enter = [{steps}]',
        f"3:7: targets.m1.lines.enter: has {MAX_ITEMS + 1} items, at most {MAX_ITEMS} are allowed",
    )
    many = "\n".join(f'[targets.t{n}]\nport = "/dev/p{n}"' for n in range(MAX_TARGETS + 1))
    check(many, f"1:2: targets: has {MAX_TARGETS + 1} targets, at most {MAX_TARGETS} are allowed")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("9" * 400, "1:5: api.idle_timeout_s: must be a number from 1 to 86400, not 9999…"),
        ("inf", "1:5: api.idle_timeout_s: must be a number from 1 to 86400, not inf"),
        ("0x" + "f" * 5000, "1:5: api.idle_timeout_s: must be a number from 1 to 86400, not a number of 20000 bits"),
        ("9" * 5000, "1:5022: not valid TOML: …"),
    ],
)
def test_numbers_of_any_length_are_mistakes_and_no_defects(value: str, told: str) -> None:
    check(f"api.idle_timeout_s = {value}", told)


def test_the_caller_judges_chips() -> None:
    def judge(chip: str, layout: str, ranges: list[tuple[str, int, int]]) -> Iterable[tuple[str, str]]:
        yield from ((key, f"{start:#x} to {end:#x}") for key, start, end in ranges)
        if chip == "F765":
            yield "chip", "no such chip; did you mean F756?"
        if layout:
            yield "layout", f"{chip} has no layout {layout}"

    text = '[targets.a]\nport = "/dev/a"\nchip = "F765"\nlayout = "dual"\n[targets.b]\nport = "/dev/b"\nchip = 5\n'
    with pytest.raises(InvalidConfig) as caught:
        load(text, check_chip=judge)
    assert [(m.line, m.column, m.key) for m in caught.value.errors] == [
        (3, 1, "targets.a.chip"),
        (4, 1, "targets.a.layout"),
        (7, 1, "targets.b.chip"),
    ]


def test_a_range_that_is_no_flash_of_the_chip_guards_nothing() -> None:
    """A zero too few, the alias of another bus, an end too far: the bootloader that it should guard would be erased."""
    text = """[targets.a]
port = "/dev/a"
chip = "F746"
protect = ["0x0800000+0x4000", "0x08000000+0x4000",
           "0x00200000+0x4000"]
policy.patch = ["0x080FFFF0+16", "0x08100000+16"]
"""
    with pytest.raises(InvalidConfig) as caught:
        load(text, check_chip=chips.wrong_choice)
    assert [(m.line, m.key) for m in caught.value.errors] == [
        (4, "targets.a.protect[0]"),
        (5, "targets.a.protect[2]"),
        (6, "targets.a.policy.patch[1]"),
    ]
    assert "lies at 0x08000000..0x080fffff" in caught.value.errors[0].text
    assert load(text.replace('chip = "F746"', ""), check_chip=chips.wrong_choice).targets["a"].protect, "nobody knows"


def test_warnings_name_what_is_probably_not_meant() -> None:
    text = '[targets.a]\nport = "/dev/ttyUSB0"\nlines = { kind = "gpio", boot0 = "GPIO27" }'
    found = warnings_of(load(text))
    assert [line.split(":")[0] for line in found] == ["targets.a.lines", "targets.a.port"]
    assert warnings_of(Config()) == ["no target is configured: add a table [targets.NAME]"]


# --- files


def test_the_error_carries_data_and_the_file(tmp_path: Path) -> None:
    path = tmp_path / "b.toml"
    path.write_text("[jobs]\nkeep = 1\nqueue_limit = 0\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.code == "CONFIG"
    assert caught.value.facts == {"file": str(path), "mistakes": 2, "line": 2, "column": 1, "key": "jobs.keep"}
    assert f"{path}:3:1: jobs.queue_limit: must be a whole number from 1 to 10000, not 0" in caught.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file"):
        load(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"directory"):
        load(tmp_path)
    huge = tmp_path / "huge.toml"
    huge.write_bytes(b"#" * (LIMIT_BYTES + 1))
    with pytest.raises(ConfigError, match=r"larger than"):
        load(huge)
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'[gateway]\nname = "caf\xe9"\n')
    with pytest.raises(InvalidConfig, match=r"latin.toml:2:12: byte 0xe9 is not UTF-8"):
        load(latin)
    with pytest.raises(InvalidConfig, match=r"not valid TOML|nested too deeply"):
        load("a = " + "[" * 100_000)


# --- protected ranges ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0x08000000+0x4000", (0x08000000, 0x08004000)),
        ("0X0801f000+2048", (0x0801F000, 0x0801F800)),
        ("134217728+1", (0x08000000, 0x08000001)),
        ("0xFFFFFFFF+1", (0xFFFFFFFF, 1 << 32)),
    ],
)
def test_a_protected_range(text: str, found: tuple[int, int]) -> None:
    target = load(f'[targets.a]\nport = "/dev/ttyS0"\nprotect = ["{text}"]').targets["a"]
    assert [parse_range(item) for item in target.protect] == [found]


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ('"0x08000000"', '"0x08000000" is not ADDR+LEN, as 0x08000000+0x4000'),
        ('"0x08000000-0x08003fff"', "is not ADDR+LEN"),
        ('"0x08000000+16K"', "is not ADDR+LEN"),
        ('"0x08000000 + 16"', "is not ADDR+LEN"),
        ('"0x08000000+0"', "is empty, or ends beyond"),
        ('"0xffffffff+2"', "is empty, or ends beyond"),
        ("16384", "must be a string, not 16384"),
    ],
)
def test_what_is_no_protected_range(item: str, says: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load(f'[targets.a]\nport = "/dev/ttyS0"\nprotect = ["0x08000000+1", {item}]')
    (mistake,) = caught.value.errors
    assert (mistake.line, mistake.key) == (3, "targets.a.protect[1]")
    assert says in mistake.text


def test_who_shares_with_whom_directly_or_through_others() -> None:
    def shares(*names: str) -> config.Target:
        return config.Target(port="/dev/x", shares=list(names))

    targets = {"a": shares("c"), "x": shares(), "b": shares("d"), "c": shares("a", "d"), "d": shares("c", "b", "elsewhere")}
    assert groups(targets) == [{"a", "b", "c", "d"}, {"x"}]
