"""The web page in a real Chromium, against the real daemon with simulated parts: what a person would do, step by step."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from bridged import chips
from bridged.sim.demo_images import demo_image
from bridged.sim.loader import Timing
from tests.e2e.gateway import Gateway
from tests.images.builders import elf
from tests.jobs.test_policy import Signer
from tests.page.chrome import Browser, Page
from tests.support import free_port
from tests.target.bench import make_image

ELF = demo_image("F756").read()
QUICK = {"timing": Timing(sector_erase_s=0.02, spread=0, startup_s=0.01)}
SMALL_PAGES = "L476"  # 2 KiB each: at the speed of the wire a flash takes seconds.
BROWSER = Browser()
Body = Callable[[Page, Gateway, str], Coroutine[Any, Any, None]]
PICTURES = os.environ.get("BRIDGED_PICTURES", "")  # Where to put what was seen: docs/pictures are made with it.


@pytest.fixture(scope="module", autouse=True)
def _browser() -> Iterator[None]:
    with BROWSER:
        yield


def run(root: Path, body: Body, *, complaints: tuple[str, ...] = (), **settings: Any) -> None:
    """``complaints``: beginnings of what the browser may complain of; anything else fails the test."""
    port = free_port()

    async def main() -> None:
        async with BROWSER.page() as page:
            await body(page, gateway, f"http://127.0.0.1:{port}")
            left = [text for text in page.complaints if not any(text.startswith(start) for start in complaints)]
            # Whether an upload was begun before is asked by HEAD, and 404 is one of the two answers.
            left = [text for text in left if not ("status of 404" in text and "/v1/uploads/" in text)]
            assert left == []

    settings["settings"] = QUICK | settings.get("settings", {})
    with Gateway(root, settings.pop("chips_", {"m1": "F756"}), http=f"127.0.0.1:{port}", **settings) as gateway:
        asyncio.run(main())


def elf_of(size_bytes: int, chip: str = SMALL_PAGES) -> bytes:
    """Bootable, with a banner."""
    segment = make_image(chips.find(chip), size_bytes).segments[0]
    return elf([(segment.address, segment.data)], sections=True)


SMALL = elf_of(3000, "F756")  # Where it does not matter what is flashed.


async def picture(page: Page, name: str) -> None:
    if PICTURES:
        await page.picture(Path(PICTURES) / f"{name}.png")


async def at_target(page: Page, url: str, name: str = "m1") -> None:
    await page.go(f"{url}/#/t/{name}")
    await page.until("document.querySelector('.drop')")
    await page.until("document.querySelector('.tag.good')?.innerText === 'idle'")


async def flash(page: Page, data: bytes = ELF, name: str = "app.elf") -> None:
    await page.drop(".drop", data, name)
    await page.until("document.querySelector('#start')")


def test_a_dropped_elf_is_planned_flashed_watched_and_remembered(tmp_path: Path) -> None:
    data = elf_of(8_000)

    async def body(page: Page, gateway: Gateway, url: str) -> None:
        await page.go(url)
        await page.says("m1")
        await page.until("document.querySelector('#link').dataset.state === 'live'")
        await picture(page, "targets")
        await page.click("h2 a[href='#/t/m1']")
        await page.until("document.querySelector('.drop')")
        await flash(page, data)
        await page.says("What will happen to the flash")
        kinds = await page.js(
            "[...new Set([...document.querySelectorAll('.flash svg[role=img] rect[class]')].map((r) => r.className.baseVal))]"
        )
        assert "write" in kinds
        assert "stay" in kinds
        assert "erased and written" in await page.text("#plan-words")
        await picture(page, "plan-pages")
        # Everything that the page shows of the job, as it shows it.
        await page.js(
            "(() => { globalThis.seen = []; new MutationObserver(() => {"
            " const step = document.querySelector('[aria-current=step]');"
            " const bar = document.querySelector('#throughput'); seen.push([step && step.innerText, bar && bar.innerText]); })"
            ".observe(document.body, {subtree: true, childList: true, characterData: true, attributes: true}); })()"
        )
        await page.click("#start")
        await page.until("document.querySelector('#throughput')?.innerText.includes('/s')")
        await picture(page, "progress")
        await page.says("Done.", "#end", 90)
        seen = await page.js("seen")
        phases = list(dict.fromkeys(phase for phase, _ in seen if phase))
        assert [phase for phase in phases if phase in ("erase", "write", "verify")] == ["erase", "write", "verify"]
        assert any(text and " at " in text and "/s" in text for _, text in seen), "throughput was never shown"
        said = await page.text("#end")
        assert "every byte was read back and compared" in said
        assert "Compared" in said
        assert "bytes compared" not in said, "the rest is folded away"
        assert "bytes compared" in await page.js("document.querySelector('#figures').textContent")
        assert gateway.device("m1").memory.read(0x08000000, 4) != b"\xff" * 4
        await page.go(f"{url}/#/t/m1")
        await page.says("app.elf", "section[aria-label=Target]")
        await page.says("succeeded", "#history")
        # The same again: nothing is sent, and nothing is to be done.
        await flash(page, data)
        await page.says("was proven in the flash before", ".flash")
        await page.js("document.querySelector('#kind').value = 'ensure'")
        await page.click("#start")
        await page.says("Nothing was to be done", "#end")

    run(tmp_path, body, paced=True, chips_={"m1": SMALL_PAGES})


def test_a_failure_shows_cause_evidence_remedy_and_the_recording(tmp_path: Path) -> None:
    data = make_image(chips.find("F756"), 3000).segments[0].data

    async def body(page: Page, _gateway: Gateway, url: str) -> None:
        await at_target(page, url)
        await flash(page, data, "app.bin")
        assert await page.js("document.querySelector('#addr').value") == "0x08000000", "a raw binary is asked where it belongs"
        await page.click("#discard")
        await page.says("will be lost", ".flash")
        await page.until("document.querySelector('#start') && !document.querySelector('#start').disabled")
        await page.click("#start")
        await page.says("NACK", "#end")
        text = await page.text("#end")
        for words in ("Likely cause:", "Remedy:", "Evidence"):
            assert words in text
        assert len(await page.text("#remedy")) > 30
        assert await page.js("document.querySelector('.phases .broke').textContent") == "write, it failed here"
        await page.click("#show-trace")
        await page.says("Write Memory", "#trace")
        await picture(page, "failure")
        assert await page.js("document.activeElement.id") == "trace"
        end = "document.querySelector('#trace').scrollTop + document.querySelector('#trace').clientHeight"
        assert await page.js(f"document.querySelector('#trace').scrollHeight - ({end})") < 2, "it opens where it failed"

    allowed = ("network: Failed to load resource: the server responded with a status of 422",)
    run(tmp_path, body, complaints=allowed, settings={"faults": ["nack:0x31:0:address:*"]})


def test_cancel_and_what_it_would_cost(tmp_path: Path) -> None:
    async def body(page: Page, _gateway: Gateway, url: str) -> None:
        await at_target(page, url)
        await flash(page, elf_of(30_000))
        await page.click("#start")
        await page.until("document.querySelector('[aria-current=step]')?.innerText === 'write'")
        await page.click("#cancel")
        await page.says("NOT_CANCELLABLE", "section[aria-label=Progress]")
        await page.click("section[aria-label=Progress] .box ~ .row button")
        await page.says("canceled")

    allowed = ("network: Failed to load resource: the server responded with a status of 409",)
    run(tmp_path, body, complaints=allowed, paced=True, chips_={"m1": SMALL_PAGES})


def test_a_broken_link_in_the_middle_of_an_upload(tmp_path: Path) -> None:
    data = ELF + bytes(4 << 20)  # Behind the last section of an ELF may be anything.

    async def body(page: Page, _gateway: Gateway, url: str) -> None:
        await at_target(page, url)
        await page.do(
            "Network.emulateNetworkConditions", offline=False, latency=20, downloadThroughput=-1, uploadThroughput=3 << 20
        )
        await page.drop(".drop", data, "app.elf")
        await page.until("document.querySelector('#sent')?.value >= 524288")
        await page.offline(True)
        await page.says("the connection broke")
        assert await page.js("document.querySelector('#sent').value") < len(data)
        await page.offline(False)
        await page.says("is on the gateway")
        await page.until("document.querySelector('#start')")

    allowed = (
        "network: Failed to load resource: net::ERR_INTERNET_DISCONNECTED",
        "network: Failed to load resource: net::ERR_",
    )
    run(tmp_path, body, complaints=allowed)


def test_the_daemon_is_restarted_and_the_page_comes_back(tmp_path: Path) -> None:
    async def body(page: Page, gateway: Gateway, url: str) -> None:
        await page.go(url)
        await page.until("document.querySelector('#link').dataset.state === 'live'")
        await asyncio.to_thread(gateway.stop)
        await page.until("document.querySelector('#link').dataset.state === 'lost'")
        await asyncio.to_thread(gateway.start)
        await page.until("document.querySelector('#link').dataset.state === 'live'")

    run(tmp_path, body, complaints=("network: Failed to load resource: net::ERR_",))


# --- console


def test_typing_on_the_console(tmp_path: Path) -> None:
    async def body(page: Page, _gateway: Gateway, url: str) -> None:
        await at_target(page, url)
        await flash(page)
        await picture(page, "plan")
        await page.click("#start")
        await page.says("Done.", "#end")
        await at_target(page, url)
        await page.click("#open-console")
        await page.says("Open: type.", "#console-status")
        screen = "[...document.querySelectorAll('.xterm-rows > div')].map((row) => row.textContent).join('\\n')"
        await page.until(f"({screen}).includes('ready') || ({screen}).length > 20")
        await page.type("hello there\r")
        await page.until(f"({screen}).includes('ok hello there')")
        await page.says("You write.", "#console-status")
        await picture(page, "console")
        # Out of the terminal by keyboard, and the page goes on.
        await page.key("Escape", modifiers=2 | 8)
        assert await page.js("document.activeElement.id") == "close-console"
        await page.key("Enter")
        await page.says("Closed.", "#console-status")
        await page.click("#open-console")
        await page.says("Open: type.", "#console-status")

    run(tmp_path, body)


def test_two_at_the_console_and_one_writes(tmp_path: Path) -> None:
    async def body(page: Page, gateway: Gateway, url: str) -> None:
        await at_target(page, url)
        await page.js(
            "new Promise((done) => {"
            " globalThis.other = new WebSocket(location.origin.replace('http', 'ws') + '/v1/targets/m1/console');"
            " other.onopen = () => { other.send(new Uint8Array([120])); setTimeout(done, 300); }; })"
        )
        await page.click("#open-console")
        await page.says("Open: type.", "#console-status")
        await page.type("x")
        await page.says("not sent", "#console-status")
        await page.click("#take")
        await page.says("You write.", "#console-status")
        # The whole target for oneself, and back again.
        await page.click("#reserve")
        await page.says("local: on the web page", "section[aria-label=Target]")
        await page.until("document.querySelector('#reserve')?.innerText === 'Give it back'")
        await page.click("#reserve")
        await page.until("document.querySelector('#reserve')?.innerText.startsWith('Reserve')")
        # The gateway ends, and the page says that it was not the person.
        await asyncio.to_thread(gateway.stop)
        await page.says("Closed: the connection ended", "#console-status")

    run(tmp_path, body, complaints=("network: ", "javascript: WebSocket", "other: WebSocket"))


def test_a_target_that_takes_signed_images_only(tmp_path: Path) -> None:
    signer = Signer.make(tmp_path)
    (tmp_path / "app.elf").write_bytes(SMALL)

    async def body(page: Page, _gateway: Gateway, url: str) -> None:
        await at_target(page, url)
        await flash(page, SMALL)
        await page.click("#start")
        await page.says("takes signed images only", ".flash ~ .box")
        signature = signer.text(tmp_path / "app.elf", "version:1.0")
        await page.drop(".drop", signature.encode(), "app.elf.minisig")
        await page.says("Signed: app.elf.minisig", "#signed")
        await page.until("document.querySelector('#start') && !document.querySelector('.flash ~ .box')")
        await page.click("#start")
        await page.says("Done.", "#end")
        # Who shares its NRST is named by a person, on a button.
        found = await page.js(
            "import('/page/dom.js').then((m) => { let said = ''; const row = m.neighbours({problem: {code: 'CONSENT_MISSING',"
            " facts: {resets: 'm2,m3'}}}, (resets) => { said = resets; }); row.querySelector('#resets').click();"
            " return [row.innerText, said, Boolean(m.neighbours({problem: {code: 'POLICY'}}, null))]; })"
        )
        assert found == ["Go on: m2, m3 may be reset as well", "m2,m3", False]

    extra = f'[signing]\nkeys = ["{signer.public}"]\n[targets.m1.policy]\nsignature = true'
    run(
        tmp_path, body, complaints=("network: Failed to load resource: the server responded with a status of 403",), extra=extra
    )


def test_what_is_started_is_what_the_plan_was_shown_for(tmp_path: Path) -> None:
    """The plan of an image that was chosen before comes late: it is not shown over the name of another one."""
    small, large = elf_of(2000, "F756"), elf_of(5000, "F756")

    async def body(page: Page, _gateway: Gateway, url: str) -> None:
        await at_target(page, url)
        plans = []
        for data in (small, large):
            await flash(page, data)
            plans.append(await page.text("#plan-words"))
            await page.js("document.querySelector('#start').remove()")
        assert plans[0] != plans[1]
        digests = [hashlib.sha256(data).hexdigest() for data in (small, large)]
        await page.js(
            "(() => { globalThis.late = 0; globalThis.jobs = []; const real = fetch;"
            " globalThis.fetch = async (where, settings) => {"
            " if (String(where).endsWith('/jobs')) jobs.push(JSON.parse(settings.body).image);"
            " const answer = await real(where, settings);"
            f" if (String(where).endsWith('/plan') && settings.body.includes('{digests[0]}'))"
            " { await new Promise((go) => globalThis.letGo = go); setTimeout(() => { late = 1; }); } return answer; }; })()"
        )
        await page.drop(".drop", small, "small.elf")
        await page.until("globalThis.letGo")
        assert await page.js("!document.querySelector('#start')"), "of the plan before"
        await flash(page, large, "large.elf")
        await page.js("letGo()")
        await page.until("late")
        assert (await page.text("#plan-words"), "large.elf" in await page.text()) == (plans[1], True)
        await page.click("#start")
        await page.says("Done.", "#end")
        assert await page.js("jobs") == [f"sha256:{digests[1]}"]

    run(tmp_path, body)


# --- tokens


def test_a_token_opens_the_page_and_its_rights_are_those_of_the_page(tmp_path: Path) -> None:
    def made(gateway: Gateway, name: str, scope: str) -> str:
        command = [
            sys.executable,
            "-m",
            "bridged",
            "-g",
            f"unix:{gateway.root}/bridged.sock",
            "token",
            "add",
            name,
            "--scope",
            scope,
        ]
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        return next(word for word in out.split() if word.startswith("bridged_"))

    async def body(page: Page, gateway: Gateway, url: str) -> None:
        await page.go(url)
        await page.until("document.querySelector('#login').open")
        assert "m1" not in await page.text("main")
        await page.click("#token")
        await page.type("bridged_" + "x" * 43)
        await page.key("Enter")
        await page.until("document.querySelector('#login-problem').innerText")
        assert await page.js("document.querySelector('#login').open")
        await page.js("document.querySelector('#token').value = ''")
        await page.click("#token")
        await page.type(await asyncio.to_thread(made, gateway, "viewer", "read"))
        await page.key("Enter")
        await page.says("m1")
        await page.go(f"{url}/#/t/m1")
        await page.says("Your token may look, not flash.")
        assert await page.text("#open-console") == "Watch the console"
        await page.click("#open-console")
        await page.says("you may look, not type", "#console-status")
        await page.click("#who")
        await page.until("document.querySelector('#login')?.open")
        await page.click("#token")
        await page.type(await asyncio.to_thread(made, gateway, "worker", "flash"))
        await page.key("Enter")
        await page.until("document.querySelector('.drop')")
        assert await page.js("Object.keys(localStorage).length") == 0, "a token lives as long as its tab"
        assert await page.js("document.cookie") == ""

    run(
        tmp_path,
        body,
        complaints=("network: Failed to load resource: the server responded with a status of 401",),
        extra="[auth]\nloopback = []",
    )


# --- everybody


CONTRAST = (Path(__file__).parent / "contrast.js").read_text()


def test_on_a_phone_everything_fits_can_be_read_and_can_be_hit_by_day_and_by_night(tmp_path: Path) -> None:
    async def body(page: Page, _gateway: Gateway, url: str) -> None:
        async def check(where: str) -> None:
            for dark in (True, False):
                await page.look_like(width=360, height=740, dark=dark, touch=True)
                ground = await page.js("getComputedStyle(document.documentElement).backgroundColor")
                assert ground == ("rgb(16, 22, 28)" if dark else "rgb(246, 247, 249)")
                await fits(f"{where}, {'dark' if dark else 'light'}")
                await picture(page, f"phone-{where}-{'dark' if dark else 'light'}")

        async def fits(where: str) -> None:
            wide = await page.js(
                "[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1"
                " && !e.closest('.scroll, pre, .terminal')).map((e) => e.outerHTML.slice(0, 80))"
            )
            assert wide == [], where
            assert await page.js("document.documentElement.scrollWidth <= innerWidth"), where
            small = await page.js(
                "[...document.querySelectorAll('button, select, input:not(.unseen):not([type=checkbox])')]"
                ".filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 40)"
                ".map((e) => e.outerHTML.slice(0, 80))"
            )
            assert small == [], where
            assert await page.js(CONTRAST) == [], where

        await page.look_like(width=360, height=740, touch=True)
        await at_target(page, url)
        await flash(page, SMALL)
        await check("plan")
        await page.click("#start")
        await page.says("Done.", "#end")
        await check("job")
        await page.go(f"{url}/#/")
        await page.says("succeeded", "#history")
        await check("targets")

    run(tmp_path, body)


def test_everything_by_keyboard(tmp_path: Path) -> None:
    async def focus(page: Page, selector: str) -> None:
        """Tab on until it has the focus; nothing holds it on the way."""
        for _ in range(60):
            if await page.js(f"document.activeElement.matches({json.dumps(selector)})"):
                return
            await page.key("Tab")
        raise AssertionError(
            f"{selector} is never reached; the focus is at {await page.js('document.activeElement.outerHTML')}"
        )

    async def body(page: Page, gateway: Gateway, url: str) -> None:
        client = gateway.connect()
        client.put(SMALL, "app.elf")
        client.close()
        await page.go(url)
        await page.says("m1")
        await page.key("Tab")
        assert await page.js("document.activeElement.className") == "skip", "the first stop leads past the head"
        await focus(page, "a[href='#/t/m1']")
        await page.key("Enter")
        await page.until("document.activeElement.matches('h1')")
        await page.js("document.querySelector('.skip').focus()")
        await page.key("Enter")
        await page.until("document.activeElement.id === 'main'")
        assert await page.js("location.hash") == "#/t/m1", "past the head of this view, not to another one"
        await page.until("document.querySelectorAll('#staged option').length > 1")
        await focus(page, "#file")
        assert await page.js("getComputedStyle(document.querySelector('.drop')).outlineStyle") == "solid", "the focus is seen"
        await focus(page, "#staged")
        await page.key("ArrowDown")
        await page.until("document.querySelector('#start')")
        await focus(page, "#start")
        assert await page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        await page.key("Enter")
        await page.says("Done.", "#end")

    run(tmp_path, body)


def test_a_screen_reader_meets_names_and_is_told_what_happens(tmp_path: Path) -> None:
    async def body(page: Page, _gateway: Gateway, url: str) -> None:
        await at_target(page, url)
        await page.js(
            "(() => { globalThis.told = []; new MutationObserver(() => told.push(document.querySelector('#told').textContent))"
            ".observe(document.querySelector('#told'), {childList: true, characterData: true, subtree: true}); })()"
        )
        await flash(page, SMALL)
        tree = await page.tree()
        controls = {"button", "link", "textbox", "combobox", "checkbox", "progressbar", "image", "dialog", "table"}
        assert [node for node in tree if node[0] in controls and not node[1] and node[0] != "table"] == []
        assert ("heading", "m1") in tree
        picture_of = [name for role, name in tree if role == "image" and name]
        assert any("erased and written" in name for name in picture_of), "the picture is told in words"
        assert {"banner", "main"} <= {role for role, _ in tree}
        await page.click("#start")
        await page.says("Done.", "#end")
        told = await page.js("told")
        assert any("Plan:" in text for text in told)
        assert "erase" in told
        assert "verify" in told
        assert told[-1] == "The job has succeeded"
        assert ("heading", "flash of m1") in await page.tree()

    run(tmp_path, body)


def test_our_own_sha256_is_the_real_one(tmp_path: Path) -> None:
    """Beyond localhost without TLS browsers lend theirs to nobody."""
    import hashlib

    async def body(page: Page, _gateway: Gateway, url: str) -> None:
        await page.go(url)
        for size in (0, 1, 55, 56, 63, 64, 65, 119, 120, 1000, 100_000):
            found = await page.js(
                f"import('/page/sha256.js').then((m) => m.sha256(Uint8Array.from({{length: {size}}}, (_, i) => i * 7), null))"
            )
            assert found == hashlib.sha256(bytes((i * 7) % 256 for i in range(size))).hexdigest(), size

    run(tmp_path, body)


def test_names_from_strangers_are_text(tmp_path: Path) -> None:
    async def body(page: Page, _gateway: Gateway, url: str) -> None:
        await at_target(page, url)
        await page.js("globalThis.pwned = 0")
        await flash(page, SMALL, "<img src=x onerror=pwned=1>.elf")
        assert "<img src=x" in await page.text()
        await page.click("#start")
        await page.says("Done.", "#end")
        await page.go(f"{url}/#/t/%3Cimg%20src=x%20onerror=pwned=1%3E")
        await page.says("Targets")
        await page.go(f"{url}/#/j/..%2F..%2Fx")
        await page.says("Targets")
        assert await page.js("globalThis.pwned") == 0
        assert await page.js("document.querySelectorAll('main img').length") == 0

    run(tmp_path, body)


def test_the_policy_holds(tmp_path: Path) -> None:
    """That nothing was violated in the other tests says something only if violations are seen."""

    async def body(page: Page, _gateway: Gateway, url: str) -> None:
        await page.go(url)
        await page.says("m1")
        before = len(page.complaints)
        for attack in (
            "document.head.append(Object.assign(document.createElement('style'), {textContent: 'body { color: red }'}))",
            "document.body.setAttribute('style', 'color: red')",
            "new Image().src = 'http://127.0.0.1:1/x.png'",
            "fetch('http://127.0.0.1:1/').catch(() => 0)",
        ):
            count = len(page.complaints)
            await page.js(f"void ({attack})")
            async with asyncio.timeout(10):
                while len(page.complaints) == count:
                    await asyncio.sleep(0.02)
        for attack in (
            "eval('1')",
            "document.body.innerHTML = '<b>x</b>'",
            "document.body.append(Object.assign(document.createElement('script'), {text: 'x'}))",
        ):
            blocked = await page.js(f"(() => {{ try {{ {attack}; return false; }} catch (error) {{ return true; }} }})()")
            assert blocked, attack
        assert len(page.complaints) > before
        page.complaints.clear()

    run(tmp_path, body)
