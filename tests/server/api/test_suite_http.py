"""The shape of what `whipstaff eval suite` finds on the demo, from a few greedy requests each: methods change what they
are for, by at least a third of what three seeds of the whole suite showed (docs/evidence.md), which is several times
what those seeds differ by."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import httpx
import pytest
from serving import Server

from whipstaff.server.demo import tasks, world
from whipstaff.server.suite import asking
from whipstaff.server.suite.methods import VARIANTS
from whipstaff.server.suite.running import AS_IS, PLAIN, Size, Suite

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(demo_server: Server) -> Server:
    return demo_server


@pytest.fixture(scope="module")
def suite(http: httpx.Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    size = Size(seeds=(0,), limit=6)
    yield Suite(asking.Server(http), world.build(7), size, Path(tmp_path_factory.mktemp("suite")))


def score(suite: Suite, name: str, task: str) -> float:
    (variant,) = [one for one in (AS_IS, *VARIANTS) if one.name == name and task in one.tasks]
    with ThreadPoolExecutor(6) as pool:
        return mean(row["score"] for row in suite.rows(variant, tasks.TASKS[task], pool))


@pytest.mark.parametrize(
    ("task", "better", "worse", "margin"),
    [
        ("answers", "proxy_tuning", PLAIN, 0.3),
        ("answers", "proxy_tuning", "few-shot, 3", 0.3),
        ("moods", "CAA `cheerful`", PLAIN, 0.2),
        ("sunny", "SITE `sunny_heads`", "few-shot, 4", 0.15),
        ("refrains", "dry", PLAIN, 0.2),
    ],
)
def test_a_method_does_what_it_is_for(suite: Suite, task: str, better: str, worse: str, margin: float) -> None:
    assert score(suite, better, task) >= score(suite, worse, task) + margin
