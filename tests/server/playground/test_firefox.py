"""The stories that matter most, again in a second engine: Debian's Firefox as it is, by WebDriver BiDi."""

from collections.abc import Iterator

import pytest
from browser import FIREFOX, browsing
from playwright.sync_api import Browser

from . import test_stories as stories

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing(FIREFOX) as found:
        yield found


compare = stories.compare
test_a_first_visit = stories.test_a_first_visit_shows_what_the_project_is
test_the_keyboard_alone_is_enough = stories.test_the_keyboard_alone_is_enough
test_a_fork = stories.test_a_fork_keeps_what_was_before_and_goes_on_with_the_choice
test_nothing_is_lost = stories.test_nothing_is_lost_on_reload_and_all_can_be_cleared
