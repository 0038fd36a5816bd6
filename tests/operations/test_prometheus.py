"""Rules and dashboards before a real Prometheus: promtool, and a server under mixed traffic that is scraped."""

import asyncio
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from collector import Span, collecting
from pictures import draw
from prometheus import RULES, SCRAPE, Prometheus, filled, is_empty, is_zero, programs, scraping
from serving import serving_demo

from .mix import Mix

GRAFANA = RULES.parent / "grafana"
SECONDS = 75  # of traffic
STEP = 5  # seconds between two points of a panel
MOST_SAMPLES = 5000  # in one scrape

# What this traffic leaves at 0, or without any value, by panel and query: and why.
NOTHING = {
    ("Bad answers", "A"): "no engine fails here",
    ("Methods over the whole time range", "E"): "no engine fails here",
    ("Groups scheduled by half", "A"): "would be a bug",
}
# What may be 0 or not, as the machine is fast or slow.
EITHER = {
    ("Targets down", "A"): "a loaded machine answers a scrape too late",
    ("Queue by reason, and running", "A"): "the queue may be short whenever it is looked at",
    ("Preemptions, prefix-cache hits", "A"): "the KV cache may be large enough",
    ("Steps together, preemptions", "B"): "the KV cache may be large enough",
    ("Waiting for slots", "A"): "requests may wait for less than a second",
    ("Steps that were held", "A"): "prompts may be computed in one step",
    ("Doses above 1", "A"): "depends on what is generated",
    ("Forks and rollbacks of searches", "B"): "depends on what is generated",
    ("Tokens that searches tried or computed again", "B"): "none of the searches may be preempted",
    ("First tokens within the goal", "A"): "a slow machine reaches none",
}


def promtool(*words: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(programs() / "promtool"), *words], cwd=RULES, capture_output=True, text=True, timeout=60, **more
    )


@pytest.mark.parametrize("what", [("check", "config", "prometheus.yml"), ("test", "rules", "rules_test.yml")])
def test_promtool_takes_the_rules(what: tuple[str, ...]) -> None:
    done = promtool(*what)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested() -> None:
    rules = yaml.safe_load((RULES / "rules.yml").read_text())
    tests = yaml.safe_load((RULES / "rules_test.yml").read_text())["tests"]
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    fired = {one["alertname"] for test in tests for one in test["alert_rule_test"] if one["exp_alerts"]}
    assert fired == alerts


class Measured(NamedTuple):
    """A server that was under traffic, who scraped it, and the spans that it sent of its requests."""

    url: str
    prometheus: Prometheus
    since: float
    until: float
    mix: Mix
    spans: list[Span]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    folder = tmp_path_factory.mktemp("operations")
    programs()
    flags = [
        *("--steering-slots", "3", "--max-num-seqs", "8", "--max-num-queued-reqs", "12", "--block-size", "32"),
        *("--registry", str(folder / "registry"), "--admin-key", "admin-secret", "--max-upload-bytes", "1000000"),
        "--attention-rows",
        "--lookahead",
    ]
    with (
        collecting() as collector,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        yield from _measured(folder, [*flags, "--otlp-traces-endpoint", collector.url], collector.spans)


def _measured(folder: Path, flags: list[str], spans: list[Span]) -> Iterator[Measured]:
    with (
        serving_demo(folder, *flags) as server,
        scraping(folder, server.url.removeprefix("http://")) as prometheus,
    ):
        mix, since = Mix(server.url), time.time()
        asyncio.run(mix.run(SECONDS))
        yield Measured(server.url, prometheus, since + 5 * SCRAPE, time.time() - SCRAPE, mix, spans)


@pytest.fixture(scope="module")
def variables(measured: Measured) -> dict[str, str]:
    """As Grafana has them before anybody chooses: the values of queries are asked for."""
    board = json.loads((GRAFANA / "overview.json").read_text())
    found = {
        "__rate_interval": f"{max(4 * SCRAPE, STEP + SCRAPE)}s",
        "__interval": f"{STEP}s",
        "__range": f"{round(measured.until - measured.since)}s",
    }
    for one in board["templating"]["list"]:
        if one["type"] == "query":
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", one["query"])
            assert match is not None
            values = measured.prometheus.get(f"label/{match[2]}/values", **{"match[]": filled(match[1], found)})
            assert values, one["query"]
            found[one["name"]] = "(" + "|".join(values) + ")"
        elif one["type"] == "custom":
            found[one["name"]] = one["current"]["value"]
    return found


@pytest.fixture(scope="module")
def answers(measured: Measured, variables: dict[str, str]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """By dashboard, panel and query, what Prometheus says: nowhere an error."""
    found = {}
    for path in sorted(GRAFANA.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                since = None if target.get("instant") else measured.since
                expr = filled(target["expr"], variables)
                key = path.stem, panel["title"], target["refId"]
                found[key] = measured.prometheus.ask(expr, measured.until, since, STEP)
    return found


@pytest.mark.engine
def test_the_traffic_was_what_it_should_be(measured: Measured) -> None:
    assert not measured.mix.wrong, measured.mix.wrong[:5]
    assert measured.mix.ended > 50


@pytest.mark.engine
def test_every_panel_shows_something(answers: dict[tuple[str, str, str], list[dict[str, Any]]]) -> None:
    bad = []
    for (board, title, ref), series in answers.items():
        if (title, ref) in EITHER:
            bad += [(board, title, ref, "not there")] if not series else []
        elif (title, ref) in NOTHING:
            bad += [] if is_zero(series) else [(board, title, ref, f"is not listed rightly: {NOTHING[title, ref]}")]
        elif is_empty(series) or is_zero(series):
            bad.append((board, title, ref, "shows nothing"))
    assert not bad and {key[1:] for key in answers} >= {*NOTHING, *EITHER}, bad


@pytest.mark.engine
def test_every_series_that_is_named_exists(measured: Measured) -> None:
    """In rules, too, and behind an `or` that would hide a wrong name."""
    named = set(re.findall(r"\b(?:vllm:|whipstaff_)\w+(?=[{\[)])", (RULES / "rules.yml").read_text()))
    for path in GRAFANA.glob("*.json"):
        exprs = [target["expr"] for panel in json.loads(path.read_text())["panels"] for target in panel["targets"]]
        named |= set(re.findall(r"\b(?:vllm:|whipstaff_)\w+(?=\{)", "\n".join(exprs)))
    there = set(measured.prometheus.get("label/__name__/values"))
    assert len(named) > 40 and named - there == set()


@pytest.mark.engine
def test_rules_are_evaluated(measured: Measured) -> None:
    groups = measured.prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == 20
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
    for rule in rules:
        if rule["type"] == "recording":
            series = measured.prometheus.ask(rule["name"], time.time())
            assert not is_empty(series), rule["name"]
    overhead = measured.prometheus.ask('method:whipstaff_itl_overhead:ratio_5m{method="plain"}', time.time())
    assert [value for one in overhead for _, value in one["values"]] == pytest.approx([1])


@pytest.mark.engine
def test_a_scrape_is_bounded_and_well_formed(measured: Measured) -> None:
    (count,) = measured.prometheus.ask('max(scrape_samples_post_metric_relabeling{job="whipstaff"})', time.time())
    assert 500 < count["values"][0][1] < MOST_SAMPLES
    lines = httpx.get(f"{measured.url}/metrics").text.splitlines(keepends=True)
    ours = [line for line in lines if re.match(r"(# (HELP|TYPE) )?whipstaff_", line) and "_created" not in line]
    done = promtool("check", "metrics", input="".join(ours))
    assert done.returncode == 0, done.stderr


@pytest.mark.engine
def test_spans_say_what_requests_asked_for(measured: Measured) -> None:
    requests = [span for span in measured.spans if span.name == "llm_request"]
    assert len(requests) > 50 and all("gen_ai.usage.completion_tokens" in span.attributes for span in requests)
    asked = {tuple(span.attributes.get("whipstaff.methods", ())) for span in requests}
    assert {(), ("caa",), ("cfg",), ("proxy_tuning",), ("caa", "proxy_tuning"), ("opera",)} <= asked
    assert {span.attributes.get("whipstaff.preset") for span in requests} == {None, "gloomy", "helpful"}
    plans = {
        (tuple(at["whipstaff.methods"]), at["whipstaff.plan_digest"])
        for span in requests
        if "whipstaff.methods" in (at := span.attributes)
    }
    assert len({digest for _, digest in plans}) == len(plans)  # no two methods have one plan
    assert len([1 for methods, _ in plans if methods == ("proxy_tuning",)]) == 1  # and equal requests have


@pytest.mark.engine
def test_pictures_can_be_drawn(
    answers: dict[tuple[str, str, str], list[dict[str, Any]]], measured: Measured, tmp_path: Path
) -> None:
    """WHIPSTAFF_PICTURES=docs makes those of the documents."""
    folder = Path(os.environ.get("WHIPSTAFF_PICTURES", tmp_path))
    for name in ("overview", "methods"):
        panels = json.loads((GRAFANA / f"{name}.json").read_text())["panels"]
        own = {key[1:]: series for key, series in answers.items() if key[0] == name}
        path = folder / f"dashboard-{name}.png"
        draw(panels, own, measured.since, path)
        assert path.stat().st_size > 20_000
