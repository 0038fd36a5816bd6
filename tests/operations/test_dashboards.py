"""The dashboards' files are what docker/dashboards.py makes, and Grafana can show them: no Prometheus is asked here."""

import importlib.util
import json
import re
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus import RULES, filled

from whipstaff.server import metrics

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker" / "grafana").glob("*.json"))
UNITS = {"s", "short", "percentunit", "reqps", "ops", "binBps", "tok/s", "x"}


def maker() -> Any:
    spec = importlib.util.spec_from_file_location("dashboards", ROOT / "docker" / "dashboards.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def board(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request.param.read_text())
    return found


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Those of rows, too."""
    for panel in board["panels"]:
        yield panel
        yield from panel.get("panels") or ()


def test_the_files_are_current() -> None:
    made = maker().written()
    assert {path.name: path.read_text() for path in FILES} == made
    assert maker().written() == made, "two runs differ"


def test_their_names_differ() -> None:
    boards = [json.loads(path.read_text()) for path in FILES]
    for key in ("uid", "title"):
        assert len({board[key] for board in boards}) == len(boards) == 4
    assert {f"whipstaff-{path.stem}" for path in FILES} == {board["uid"] for board in boards}


def test_ids_are_unique_and_panels_do_not_overlap(board: dict[str, Any]) -> None:
    found = list(panels(board))
    assert len({panel["id"] for panel in found}) == len(found) and all(panel["id"] > 0 for panel in found)
    for one, other in combinations((panel["gridPos"] for panel in found), 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in found)


def test_every_panel_says_what_it_shows_and_in_what_unit(board: dict[str, Any]) -> None:
    titles = [panel["title"] for panel in panels(board)]
    assert len(set(titles)) == len(titles)
    for panel in panels(board):
        assert len(panel["description"]) > 40, panel["title"]
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"] in UNITS and defaults["noValue"], panel["title"]
        steps = defaults.get("thresholds", {}).get("steps", [])
        if any(step["color"] == "red" for step in steps):
            assert re.search("Red|Above|Must|1:|Red:", panel["description"]), panel["title"]
        assert [step["value"] for step in steps][1:] == sorted(step["value"] for step in steps[1:])
        refs = [target["refId"] for target in panel["targets"]]
        assert refs and len(set(refs)) == len(refs) and all(refs)
        assert all(target["datasource"]["uid"] == "${datasource}" for target in [panel, *panel["targets"]])


def test_links_lead_somewhere(board: dict[str, Any]) -> None:
    uids = {json.loads(path.read_text())["uid"] for path in FILES}
    assert set(re.findall(r"/d/([\w-]+)", json.dumps(board))) <= uids
    assert [link["tags"] for link in board["links"]] == [["whipstaff"]] and board["tags"] == ["whipstaff"]


def test_variables_are_those_that_are_used(board: dict[str, Any]) -> None:
    made = {one["name"]: one for one in board["templating"]["list"]}
    assert list(made) == ["datasource", "model", "instance", "method", "slo_ttft", "slo_itl", "slo_e2e"]
    known = dict.fromkeys([*made, "__rate_interval", "__range", "__interval"], "1")
    for panel in panels(board):
        for target in panel["targets"]:
            filled(target["expr"], known)
    for name in ("model", "instance", "method"):
        assert made[name]["multi"] and made[name]["includeAll"] and made[name]["allValue"] == ".*"
        assert f"${name}" not in "".join(re.findall(rf'="\${name}"', json.dumps(board).replace('\\"', '"')))


def test_every_goal_is_a_bound(board: dict[str, Any]) -> None:
    """And written as Prometheus writes that bound."""
    made = {one["name"]: one for one in board["templating"]["list"]}
    for name, bounds in (
        ("slo_ttft", metrics.REQUEST_BUCKETS),
        ("slo_itl", metrics.TOKEN_BUCKETS),
        ("slo_e2e", metrics.REQUEST_BUCKETS),
    ):
        values = made[name]["query"].split(",")
        assert set(values) <= {str(float(bound)) for bound in bounds}
        assert made[name]["current"]["value"] in values


def test_bounds_are_near_one_another() -> None:
    for bounds in (metrics.REQUEST_BUCKETS, metrics.TOKEN_BUCKETS):
        assert list(bounds) == sorted(bounds)
        assert all(later <= 3 * bound for bound, later in pairwise(bounds))


def test_no_quantile_is_averaged_and_no_sum_divided_without_a_rate(board: dict[str, Any]) -> None:
    for panel in panels(board):
        for expr in (target["expr"] for target in panel["targets"]):
            assert not re.search(r"avg[^(]*\(\s*histogram_quantile", expr)
            assert all(re.search(r"sum by \(le\b", part) for part in re.findall(r"histogram_quantile\(.+", expr)), expr
            for name in re.findall(r"[\w:]+_(?:sum|count|bucket|total)\b\{", expr):
                assert re.search(rf"(?:rate|increase|changes)\({re.escape(name)}", expr), expr


def test_runbooks_are_there() -> None:
    rules = yaml.safe_load((RULES / "rules.yml").read_text())
    alerts = [rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    assert len({alert["alert"] for alert in alerts}) == len(alerts) >= 12
    for alert in alerts:
        path, _, anchor = alert["annotations"]["runbook"].partition("#")
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.M)
        assert anchor in {heading.lower() for heading in headings}, alert["alert"]
        assert alert["labels"]["severity"] in ("page", "ticket") and alert["annotations"]["summary"]
