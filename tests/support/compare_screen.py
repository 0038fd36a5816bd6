"""The first screen of the page, as somebody uses it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from browser import SLOW, Visit
from playwright.sync_api import Locator, expect
from serving import Server

MORNING = "In the morning Mara opened the door, and"
expect.set_options(timeout=SLOW)


class Compare:
    def __init__(self, visit: Visit, fragment: str = "") -> None:
        self.visit, self.page = visit, visit.page
        self.page.goto(f"/{fragment}")
        expect(self.page.get_by_role("button", name="Code", exact=True)).to_be_visible()

    def pane(self, name: str) -> Locator:
        return self.page.get_by_role("region", name=name, exact=True)

    def wait_until_done(self, *names: str) -> None:
        for name in names:
            expect(self.pane(name).locator(".figures .state")).to_have_class("state done")

    def text(self, name: str) -> str:
        """The answer, without what ended it or was taken back."""
        spans = self.pane(name).locator(".text [data-cell]:not(.withheld, .struck)")
        return "".join(spans.all_text_contents())

    def tokens(self, name: str) -> Locator:
        return self.pane(name).locator(".text [data-cell]")

    @contextmanager
    def asking_anew(self) -> Iterator[None]:
        """Leaves once the answers that were there are gone, so that nobody takes their end for the new ones'."""
        self.page.evaluate("document.querySelectorAll('.figures').forEach(one => one.classList.add('before'))")
        yield
        expect(self.page.locator(".figures.before")).to_have_count(0)

    def run(self) -> None:
        with self.asking_anew():
            self.page.get_by_role("button", name="Run").click()

    def example(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def drawer(self) -> Locator:
        return self.page.get_by_role("complementary", name="inside this token")

    def request(self, pane: str) -> dict[str, Any]:
        """What the page says that it sends, without streaming and records."""
        self.page.get_by_role("button", name="Code", exact=True).click()
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_role("radio", name=pane, exact=True).check()
        dialog.get_by_role("radio", name="JSON").check()
        said: dict[str, Any] = json.loads(dialog.locator("pre").inner_text())
        self.page.keyboard.press("Escape")
        expect(dialog).to_have_count(0)  # it gives the focus back as it closes
        return said


def answer(server: Server, path: str, **fields: Any) -> Any:
    with server.client() as client:
        return client.post(path, json={"model": "demo", "temperature": 0, "max_tokens": 22} | fields).json()
