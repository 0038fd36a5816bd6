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
test_axe_finds_nothing = stories.test_axe_finds_nothing
test_the_keyboard_alone_is_enough = stories.test_the_keyboard_alone_is_enough
test_a_fork = stories.test_a_fork_keeps_what_was_before_and_goes_on_with_the_choice
test_errors = stories.test_errors_stand_beside_the_field_that_the_server_names
test_a_link = stories.test_a_link_fills_the_page_and_does_not_run
test_nothing_is_lost = stories.test_nothing_is_lost_on_reload_and_all_can_be_cleared
test_a_stopped_pane = stories.test_a_stopped_pane_keeps_its_text_and_the_others_go_on
test_hostile_words = stories.test_hostile_words_are_shown_as_words
test_other_scripts = stories.test_other_scripts_keep_their_shape_and_direction
test_what_is_read = stories.test_what_is_read_of_the_model_is_what_the_api_tells
