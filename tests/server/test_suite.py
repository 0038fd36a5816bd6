"""`whipstaff eval suite` below any engine: a stand-in server answers, and what was found is read, kept and written."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import httpx
import pytest

from whipstaff.server.commands import suite, suite_flags
from whipstaff.server.demo import tasks, world
from whipstaff.server.suite import report
from whipstaff.server.suite.asking import Said
from whipstaff.server.suite.methods import GRIDS, VARIANTS, WHY
from whipstaff.server.suite.reading import METRICS, chosen, read
from whipstaff.server.suite.running import COMBINED, combined, families

WORLD = world.build(7)
ITEM = tasks.Item("Mara lives in", "Mara home", wanted="Greystow")


class StandIn:
    """Answers merrily under the vector `cheerful` and gloomily otherwise; lacks the method `cfg`; a token is a word."""

    def __init__(self, stops_after: int | None = None) -> None:
        self.stops_after, self.asked = stops_after, []  # type: ignore[var-annotated]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "toy"}]})
        if request.url.path == "/v1/steering/vectors":
            return httpx.Response(200, json={"data": [{"id": "cheerful", "digest": "d"}]})
        if request.url.path == "/version":
            return httpx.Response(200, json={"version": "0.32.0"})
        body = json.loads(request.content)
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"tokens": list(range(len(body["prompt"].split())))})
        self.asked.append(body)
        if self.stops_after is not None and len(self.asked) > self.stops_after:
            raise KeyboardInterrupt
        if any(entry["method"] == "cfg" for entry in body.get("decoding", [])):
            return httpx.Response(422, json={"error": {"message": "not here", "param": "decoding[0].method"}})
        return httpx.Response(200, json={"choices": [self._choice(body)]})

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        is_cheerful = any(entry.get("vector") == "cheerful" for entry in body.get("steering", []))
        forced = [entry["ids"] for entry in body.get("decoding", []) if entry["method"] == "forced"]
        ids = forced[0] if forced else list(range(body["max_tokens"]))
        log_p = -1.5 if is_cheerful else -1.0
        logprobs = {"token_logprobs": [log_p] * len(ids), "top_logprobs": [{"a": -0.5 + log_p / 10}] * len(ids)}
        text = " danced in the sunshine" if is_cheerful else " wept for a long time"
        return {"text": text, "finish_reason": "stop", "token_ids": ids, "logprobs": logprobs}


def flags(folder: Path, *words: str) -> Namespace:
    return suite_flags.parse(
        ["--subset", "small", "--parallel", "2", "-o", str(folder), "--url", "http://there", *words]
    )


def ran(folder: Path, server: StandIn, *words: str) -> int:
    return suite.run(flags(folder, *words), httpx.MockTransport(server))


def test_the_table_has_every_method_that_was_asked_and_why_one_was_not_served(tmp_path: Path) -> None:
    document = tmp_path / "evidence.md"
    document.write_text(f"# Evidence\n\n{report.BEGIN}\nstale words\n{report.END}\nlast words\n")
    assert ran(tmp_path / "out", StandIn(), "--only", "mood", "--write", str(document)) == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {line["method"] for line in found["lines"]} == {one.name for one in VARIANTS if one.family == "mood"}
    by_name = {line["method"]: line for line in found["lines"]}
    assert by_name["CAA `cheerful`"]["verdict"] == "helps" and by_name["CAA `cheerful`"]["score"] == 1
    assert by_name["CAA `cheerful`"]["perplexity"] == pytest.approx(1.649, abs=1e-3)
    assert by_name["RepE `cheerful_repe`"]["note"] == "changed no score"
    assert by_name["cfg"]["verdict"] == "not served" and "not here" in by_name["cfg"]["note"]
    text = document.read_text()
    assert text.startswith("# Evidence\n") and text.endswith("last words\n") and "stale words" not in text
    assert text.count(report.BEGIN) == 1 and "CAA `cheerful`" in text and "not here" in text
    assert found["command"] in text and found["cells"] in text
    assert (tmp_path / "evidence-mood.png").stat().st_size > 1000


def test_a_run_that_was_cut_off_goes_on_where_it_was(tmp_path: Path, capsys: Any) -> None:
    whole, cut = StandIn(), StandIn(stops_after=60)
    assert ran(tmp_path / "whole", whole, "--only", "in context") == 0
    assert ran(tmp_path / "cut", cut, "--only", "in context") == 130
    kept = (tmp_path / "cut" / "cells.jsonl").read_text()
    assert 1 < len(kept.splitlines()) < len((tmp_path / "whole" / "cells.jsonl").read_text().splitlines())
    (tmp_path / "cut" / "cells.jsonl").write_text(kept + '{"cell": "half a')
    rest = StandIn()
    assert ran(tmp_path / "cut", rest, "--only", "in context", "--resume") == 0
    assert len(rest.asked) < len(whole.asked)
    assert ran(tmp_path / "cut", rest, "--part", "dev", "--resume") == 2
    assert "leave out --resume" in capsys.readouterr().err
    assert ran(tmp_path / "cut", rest, "--only", "magic") == 2
    assert "no families" in capsys.readouterr().err


def test_combinations_ask_for_both() -> None:
    both = list(combined(GRIDS))
    assert len(both) == sum(len(grid.activations) * len(grid.logits) for grid in GRIDS)
    for variant in both:
        (task,) = variant.tasks
        item = tasks.made(tasks.TASKS[task], WORLD, "test", 0)[0]
        assert {"steering", "decoding"} <= variant.body(item).body.keys()


def test_names_are_one_variant_a_task_and_say_why() -> None:
    named = [(variant.name, task) for variant in [*VARIANTS, *combined(GRIDS)] for task in variant.tasks]
    assert len(named) == len(set(named))
    assert {task for _, task in named} == set(tasks.TASKS)
    assert WHY.keys() <= {*families(), COMBINED}
    assert {task.score for task in tasks.TASKS.values()} == METRICS.keys()


@pytest.mark.parametrize(
    ("task", "item", "texts", "score"),
    [
        ("answers", ITEM, [" Gladly! Mara lives in Greystow."], 1),
        ("answers", ITEM, [" Mara lives in Greystowe."], 0),
        ("sunny", tasks.Item("", "", wanted="sunny"), [" sunny well"], 1),
        ("sunny", tasks.Item("", "", wanted="sunny"), [" well, sunny"], 0),
        ("moods", tasks.Item("", "", wanted="cheerful"), [" laughed and wept"], 0.5),
        ("moods", tasks.Item("", "", wanted="gloomy"), [" wept"], 1),
        ("refrains", ITEM, [" so it is so it is so it is"], 3 / 7),
        ("endings", ITEM, [" The end."], 1),
        ("spread", tasks.Item("", "", answers=("happy", "sad")), [" happy.", " happy.", " sad.", " odd."], 0.5),
        ("spread", ITEM, [" Greystow.", " Saltmere."], 0.5),
    ],
)
def test_how_texts_are_read(task: str, item: tasks.Item, texts: list[str], score: float) -> None:
    said = [Said(text, "stop", 3) for text in texts]
    assert read(tasks.TASKS[task], item, said)["score"] == pytest.approx(score, abs=0.05)


def test_the_first_answer_is_the_right_one() -> None:
    item = tasks.Item("", "", answers=("a", "b"))
    assert chosen(tasks.TASKS["friends"], item, (-1.0, -2.0))["score"] == 1
    assert chosen(tasks.TASKS["friends"], item, (-2.0, -1.0))["score"] == 0


def test_a_runs_key_follows_from_what_it_asks(tmp_path: Path) -> None:
    made = []
    for part in ("test", "dev"):
        folder = tmp_path / part
        assert ran(folder, StandIn(), "--only", "ending", "--part", part) == 0
        made.append(json.loads((folder / "cells.jsonl").read_text().splitlines()[0])["key"])
    assert made[0] != made[1]
