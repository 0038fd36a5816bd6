"""A browser that all stories share; each visit is a context of its own."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from browser import Visit, browsing
from playwright.sync_api import Browser

Visiting = Callable[..., Visit]


@pytest.fixture(scope="module")  # while it runs, a loop runs in this thread that no other test may have
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture
def visiting(browser: Browser) -> Iterator[Visiting]:
    """Opens pages of a server; whatever a page must never do fails the test."""
    visits: list[Visit] = []

    def visit(url: str, **settings: Any) -> Visit:
        visits.append(Visit(browser, url, **settings))
        return visits[-1]

    yield visit
    for one in visits:
        one.close()
    assert [wrong for one in visits for wrong in one.wrong] == []
