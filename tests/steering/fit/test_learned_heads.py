"""Heads learned from last hidden states: what is planted is found, on rows that were not learned from."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from whipstaff.decoding.prefix_classifier import classes
from whipstaff.server import demo
from whipstaff.server.demo import fitted, world
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit import fitting
from whipstaff.steering.fit.data import Grounded, read_data
from whipstaff.steering.fit.learned_heads import labels_of
from whipstaff.steering.fit.local import LocalModel
from whipstaff.steering.fit.options import Options
from whipstaff.steering.fit.render import Template

NAMES = ("Mara", "Linnet", "Ewan", "Rufus", "Ada", "Tobias", "Ines", "Hugo", "Nora", "Felix", "Olga", "Bruno")
PLACES = ("the river", "the mill", "the hill", "the road")


@pytest.fixture(scope="module")
def source() -> LocalModel:
    return LocalModel.load(str(demo.MODELS / "demo"), batch_size=4)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(method: str, source: LocalModel, data: Path, **said: Any) -> fitting.Made:
    options = Options(**{"template": "none", **said})
    return fitting.fit(method, fitting.prepared(method, source, [data], options, data.parent / "rows"))


def test_a_text_is_scored_as_transformers_does(source: LocalModel) -> None:
    texts = [tuple(source.tokenizer(text)["input_ids"]) for text in ("Mara lives in Greystow.", "The sun", "It rained")]
    for ids, scored in zip(texts, source.score(texts), strict=True):
        with torch.no_grad():
            said = source.model(torch.tensor([ids]), output_hidden_states=True)
        log_p = said.logits[0, :-1].log_softmax(-1)
        torch.testing.assert_close(scored.states, said.hidden_states[-1][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(scored.log_p, log_p[range(len(ids) - 1), ids[1:]], atol=1e-4, rtol=1e-4)
        assert scored.is_best.tolist() == [
            int(row.argmax()) == token for row, token in zip(log_p, ids[1:], strict=True)
        ]


@pytest.mark.parametrize("form", ["none", "chat", "Q: {prompt} A: {response}"])
def test_a_tokens_label_is_that_of_the_span_in_which_it_ends(form: str, source: LocalModel) -> None:
    row = Grounded(question="Where?", response=" Mara lives in Greystow now", spans=((0, 14, 1), (14, 23, 0)))
    shown = Template(source.tokenizer, form).render(row.asked, row.response)
    words = {0: "", 1: ""}
    for index, label in labels_of(shown, row):
        words[label] += shown.text[slice(*shown.spans[index])]
    assert {label: "".join(text.split()) for label, text in words.items()} == {0: "Greystow", 1: "Maralivesin"}


@pytest.mark.parametrize("spans", [[[0, 99, 1]], [[3, 3, 1]], [[4, 9, 1], [2, 6, 0]], []])
def test_spans_that_do_not_stand_in_the_response_are_refused(spans: list[list[int]], tmp_path: Path) -> None:
    data = written(tmp_path / "data.jsonl", [{"question": "Where?", "response": "In the mill.", "spans": spans}])
    with pytest.raises(SteeringError, match=r"data.jsonl:1: .*spans"):
        read_data([data], ["grounded"])


def judged(path: Path) -> Path:
    """What is cold is wrong, and so is all behind it; names are of one split each."""
    rows = []
    for name in NAMES:
        for place in PLACES:
            start = f" {name} sat near {place} in the"
            for word, label in (("warm", 1), ("cold", 0)):
                said = f"{start} {word} wind"
                spans = [[0, len(start), 1], [len(start), len(said), label]]
                rows.append({"question": "And?", "response": said, "spans": spans, "group": name})
    return written(path, rows)


@pytest.mark.parametrize("method", ["prefix_classifier", "token_classifier"])
def test_planted_errors_are_found(method: str, source: LocalModel, tmp_path: Path) -> None:
    found = made(method, source, judged(tmp_path / "judged.jsonl"))
    score = found.header.provenance["score"]
    assert score["auc"] > 0.95 > 0.75 > score["auc_shuffled_labels"]
    assert score["first_errors_found"] > 0.9 and not found.warnings
    said = {}
    for word in ("warm", "cold"):
        ids = tuple(source.tokenizer(f"And? Mara sat near the mill in the {word}")["input_ids"])
        (scored,) = source.score([ids])
        if method == "prefix_classifier":
            said[word] = float(classes(scored.states[-1:], found.tensors).softmax(1)[0, 1])
        else:
            g = found.tensors["weight"][ids[-1]] @ scored.states[-2] + found.tensors["bias"][ids[-1]]
            said[word] = float(g.sigmoid())
    assert said["cold"] < 0.5 < said["warm"]


def test_labels_that_mean_nothing_are_said_to(source: LocalModel, tmp_path: Path) -> None:
    draws = Random(1)
    rows = [
        {"question": f"And {name}?", "response": f" sat near {place}", "spans": [[0, 14, draws.randint(0, 1)]]}
        for name in NAMES
        for place in PLACES
    ]
    found = made("prefix_classifier", source, written(tmp_path / "data.jsonl", rows))
    assert found.warnings or found.header.provenance["score"]["auc"] < 0.75


def test_one_label_alone_is_refused(source: LocalModel, tmp_path: Path) -> None:
    rows = [{"question": f"And {name}?", "response": " sat", "spans": [[0, 4, 1]]} for name in NAMES]
    with pytest.raises(SteeringError, match="no token of one of the labels"):
        made("prefix_classifier", source, written(tmp_path / "data.jsonl", rows))


def test_the_assistant_is_deferred_to_where_it_knows_better(source: LocalModel, tmp_path: Path) -> None:
    the_world = world.build(json.loads((demo.MODELS.parent / "training.json").read_text())["recipe"]["seed"])
    data = written(tmp_path / "data.jsonl", list(fitted.told_and_answered(the_world, Random(0), 60)))
    found = made("defer_head", source, data, assistant=str(demo.MODELS / "tuned"))
    score = found.header.provenance["score"]
    assert score["dev_loss_kept"] < min(score["dev_loss_model"], score["dev_loss_assistant"]) - 0.02
    assert found.header.provenance["recipe"]["assistant"] == "tuned"  # and no folder of this machine
    shares = []
    for text in ("Question: Where does Ewan live?\nAnswer:", "In the morning Mara opened the door, and a warm"):
        (scored,) = source.score([tuple(source.tokenizer(text)["input_ids"])])
        shares.append(float((found.tensors["weight"] @ scored.states[-1] + found.tensors["bias"]).sigmoid()))
    assert shares[0] > 0.5 > shares[1]


def test_an_assistant_is_wanted(source: LocalModel, tmp_path: Path) -> None:
    data = written(tmp_path / "data.jsonl", [{"prompt": name, "response": " sat"} for name in NAMES])
    with pytest.raises(SteeringError, match="name the model") as refused:
        made("defer_head", source, data)
    assert refused.value.param == "assistant"


@pytest.mark.parametrize("method", ["prefix_classifier", "token_classifier", "defer_head", "soft_prompt"])
@pytest.mark.parametrize("said", [{"layers": "2"}, {"scale": 2.0}])
def test_what_could_mean_nothing_is_refused(method: str, said: dict[str, Any]) -> None:
    (name,) = said
    with pytest.raises(SteeringError, match="does not take it") as refused:
        fitting.check_options(fitting.recipe_of(method), Options(**said))
    assert refused.value.param == name
