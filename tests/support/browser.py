"""Real browsers for tests, driven by Playwright: Debian's chromium and Firefox as they are, with a look at what pages
must never do."""

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import axe_playwright_python
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Dialog, Page, Route, sync_playwright

FONTS = ("fonts-inter", "fonts-noto-core")
PATIENCE = 300  # seconds, for 120 MB of packages
AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"
SLOW = 60_000  # milliseconds that a page may take on a loaded machine


class Engine(NamedTuple):
    """A browser, and where it comes from."""

    name: str  # Playwright's
    names: tuple[str, ...]  # of the program, on PATH
    package: str  # Debian's
    program: str  # in the package
    launch: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where the package is unpacked, beside the environment, if it is not installed."""
        return Path(sys.prefix) / "share" / self.name

    def path(self) -> Path:
        """The program: on PATH, or Debian's package with what it lacks here, unpacked. Where neither can be had the
        test is skipped, with the reason."""
        for name in self.names:
            if found := shutil.which(name):
                return Path(found)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            unpacked = self.folder / self.program
            if not unpacked.exists():
                self._unpack()
        return unpacked

    def _unpack(self) -> None:
        """The packages that installing it would bring, without installing them."""
        if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
            pytest.skip(f"NO {self.package}: none is on PATH, and this is no Debian whose package could be unpacked")
        wanted = ["apt-get", "install", "--simulate", "--no-install-recommends", self.package, *FONTS]
        said = ""
        for first in ([], ["apt-get", "update"]):  # a new machine has no lists yet
            plan = self._run(first) + self._run(wanted) if first else self._run(wanted)
            names = [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
            said = plan
            if self.package in names:
                said = self._run(["apt-get", "download", *names])
                break
        packages = sorted(self.folder.glob("*.deb"))
        if not any(path.name.startswith(f"{self.package}_") for path in packages):
            pytest.skip(f"NO {self.package}: none is on PATH, and it cannot be downloaded: {said[-500:]}")
        # the program last: it is what says that all is there
        for path in sorted(packages, key=lambda path: path.name.startswith(f"{self.package}_")):
            subprocess.run(["dpkg-deb", "-x", str(path), str(self.folder)], check=True)
            path.unlink()

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE)
        return done.stdout + done.stderr

    def environment(self) -> dict[str, str | float | bool]:
        """Where the unpacked libraries and fonts are."""
        folders = sorted({str(path.parent) for path in (self.folder / "usr" / "lib").rglob("*.so*")})
        if not folders:
            return {**os.environ}
        config = self.folder / "fonts.conf"
        fonts = (self.folder / "usr" / "share" / "fonts", "/usr/share/fonts")
        places = "".join(f"<dir>{place}</dir>" for place in fonts)
        cache = f"<cachedir>{self.folder / 'fontconfig'}</cachedir>"
        config.write_text(f'<?xml version="1.0"?><fontconfig>{places}{cache}</fontconfig>')
        return {**os.environ, "LD_LIBRARY_PATH": ":".join(folders), "FONTCONFIG_FILE": str(config)}


CHROMIUM = Engine(
    "chromium",
    ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"),
    "chromium-headless-shell",
    "usr/lib/chromium/chromium-headless-shell",
    {"args": ["--no-sandbox"]},
)
FIREFOX = Engine(  # a stock one, by WebDriver BiDi
    "firefox", ("firefox-esr", "firefox"), "firefox-esr", "usr/lib/firefox-esr/firefox-esr", {"channel": "moz-firefox"}
)


def relayed(firefox: Path) -> Path:
    """A program that runs that Firefox, with `bidi_relay.py` before it."""
    program = FIREFOX.folder / "relayed"
    program.parent.mkdir(parents=True, exist_ok=True)
    words = (sys.executable, str(Path(__file__).with_name("bidi_relay.py")), str(firefox))
    program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    program.chmod(0o755)
    return program


@contextmanager
def browsing(engine: Engine = CHROMIUM) -> Iterator[Browser]:
    """A browser without a window."""
    path = engine.path() if engine is CHROMIUM else relayed(engine.path())
    with sync_playwright() as playwright:
        kind = getattr(playwright, engine.name)
        found: Browser = kind.launch(executable_path=path, env=engine.environment(), **engine.launch)
        yield found
        found.close()


class Visit:
    """A page in a context of its own: nothing that it kept was there before. What it must never do is noted: load from
    another host, break its policy, or stop with an error."""

    def __init__(self, browser: Browser, url: str, **settings: Any) -> None:
        self.url, self.wrong, self.urls = url, list[str](), list[str]()
        self.context = browser.new_context(base_url=url, **{"viewport": {"width": 1280, "height": 860}} | settings)
        self.context.set_default_timeout(SLOW)
        if browser.browser_type.name == CHROMIUM.name:  # others have no such permissions
            self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page = self.context.new_page()
        self.watch(self.page)

    def watch(self, page: Page) -> None:
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        page.on("request", lambda request: self._asked(request.url))
        page.on("dialog", self._dismissed)

    def _heard(self, message: ConsoleMessage) -> None:
        # that an answer was no 200 is written there by the browser, for answers that are meant to be none
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.wrong.append(f"{message.type}: {message.text}")

    def _dismissed(self, dialog: Dialog) -> None:
        self.wrong.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _asked(self, url: str) -> None:
        self.urls.append(url)
        if not url.startswith((self.url, "data:", "blob:")):
            self.wrong.append(f"asked another host: {url}")

    def until(
        self, expression: str, seconds: float = SLOW / 1000, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        """Wait until it holds on the page: asked from here, since the page's policy lets no script evaluate texts."""
        deadline = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, expression
            meanwhile()
            self.page.wait_for_timeout(100)

    def make_endless(self) -> None:
        """From now on answers have all the tokens that they may have, whatever the model would say or end at."""

        def endless(route: Route) -> None:
            body = dict(route.request.post_data_json or {})
            route.continue_(post_data=json.dumps(body | {"ignore_eos": True, "stop": []}))

        self.page.route("**/v1/completions", endless)

    def close(self) -> None:
        self.context.close()


def violations(page: Page) -> list[str]:
    """What axe-core finds wrong with what is shown: rule, target, and why."""
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {node['target']}: {node['failureSummary']}"
        for one in found["violations"]
        for node in one["nodes"]
    ]
