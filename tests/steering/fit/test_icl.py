"""Heads, states and directions that do something are found by trying them out, among those that do nothing."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import SHAPE, Planted
from torch import Tensor
from transformers import AutoTokenizer

from whipstaff.server import demo
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit import fitting
from whipstaff.steering.fit.local import LocalModel
from whipstaff.steering.fit.options import Options
from whipstaff.steering.fit.source import Asked, Entry
from whipstaff.steering.method import HookPoint

INPUTS = ("house", "door", "field", "river", "cloud", "bread", "garden", "stone", "morning", "window", "road", "friend")
OUTPUTS = INPUTS[5:] + INPUTS[:5]
RULE = dict(zip(INPUTS, OUTPUTS, strict=True))
HEAD = HookPoint("attn_head", 2)
GENERATOR = torch.Generator().manual_seed(4)
CARRIED = torch.randn(6, generator=GENERATOR) * 3  # what head 2.1 gives where demonstrations were understood
STATE = torch.randn(24, generator=GENERATOR) * 3  # what they leave at layer 3
FOUND_AT = 3  # the layer from which a state is read


class Learner(Planted):
    """Answers right where its prompt shows the rule, or where an edit brings what such prompts leave in it."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, -1, {})

    def _understands(self, ids: tuple[int, ...]) -> bool:
        shots = self.tokenizer.decode(ids, skip_special_tokens=True).split("\n\n")[:-1]
        told = [tuple(line.split(": ")[1] for line in shot.split("\n")) for shot in shots]
        return bool(told) and all(RULE[question.strip()] == answer.strip() for question, answer in told)

    def _rows(self, asked: Asked, point: HookPoint) -> Tensor:
        rows = super()._rows(asked, point)
        if point == HEAD:
            rows.view(-1, 4, 6)[:, 1] += CARRIED * self._understands(asked.ids)
        if point == HookPoint("resid_post", FOUND_AT):
            rows += STATE * self._understands(asked.ids)
        return rows

    def _is_told(self, entries: Sequence[Entry]) -> bool:
        for entry in entries:
            for point, parts in entry.tensors.items():
                if entry.method == "head_scale" and point == HEAD and parts["mean_mask"][1]:
                    return bool(parts["mean"][1] @ CARRIED > 0.5 * CARRIED @ CARRIED)
                if entry.method == "function_vector" and point.layer == FOUND_AT:
                    return bool(parts["add"][6:12] @ CARRIED > 0.5 * CARRIED @ CARRIED)
                if entry.method == "task_vector" and point.layer == FOUND_AT:
                    return bool(parts["state"] @ STATE > 0.5 * STATE @ STATE)
        return False

    def predict(self, texts: Sequence[tuple[int, ...]], entries: Sequence[Entry] = ()) -> Iterator[Tensor]:
        for ids in texts:
            question = self.tokenizer.decode(ids, skip_special_tokens=True).split("Q: ")[-1].split("\n")[0].strip()
            logits = torch.zeros(1408)
            broken = [e for e in entries if e.method == "head_scale" and HEAD in e.tensors and not self._is_told([e])]
            broken = [e for e in broken if e.tensors[HEAD]["mean_mask"][1]]
            if self._is_told(entries) or (self._understands(ids) and not broken):
                logits[self.tokenizer.encode(f"A: {RULE[question]}")[-len(self._answer(question))]] = 8.0
            yield logits.log_softmax(-1)

    def _answer(self, question: str) -> list[int]:
        return list(self.tokenizer.encode(f" {RULE[question]}", add_special_tokens=False))

    def projected(self, layer: int, heads: Tensor) -> Tensor:
        return heads.flatten(-2)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.MODELS / "demo")


@pytest.fixture
def demos(tmp_path: Path) -> Path:
    path = tmp_path / "demos.jsonl"
    rows = [
        {"input": a, "output": b, "split": "train" if index < 9 else "dev"} for index, (a, b) in enumerate(RULE.items())
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(method: str, source: Any, data: Path, **said: Any) -> fitting.Made:
    return fitting.fit(method, fitting.prepared(method, source, [data], Options(**said), data.parent / "rows"))


def test_a_function_vector_is_of_the_head_that_carries_the_task(tokenizer: Any, demos: Path) -> None:
    made = run("function_vector", Learner(tokenizer), demos, shots=4, trials=40, corrupted=6, num_heads=1)
    score = made.header.provenance["score"]
    assert score["heads"] == [[2, 1]] and score["layer"] == FOUND_AT
    assert (score["accuracy_zero_shot"], score["accuracy"], score["accuracy_few_shot"]) == (0, 1, 1)
    add = made.tensors[f"resid_post.{FOUND_AT}.add"]
    torch.testing.assert_close(add[6:12], CARRIED, rtol=0, atol=0.6)
    assert not add[:6].any() and not add[12:].any()


def test_a_task_vector_is_the_state_that_demonstrations_leave(tokenizer: Any, demos: Path) -> None:
    made = run("task_vector", Learner(tokenizer), demos, shots=4, trials=60)
    score = made.header.provenance["score"]
    assert score["layer"] == FOUND_AT and (score["accuracy_zero_shot"], score["accuracy"]) == (0, 1)
    torch.testing.assert_close(made.tensors[f"resid_post.{FOUND_AT}.state"], STATE, rtol=0, atol=0.6)


def test_the_head_that_answers_need_is_found(tokenizer: Any, demos: Path) -> None:
    made = run("head_scale", Learner(tokenizer), demos, shots=4, trials=20)
    score = made.header.provenance["score"]
    assert score["heads"] == [[2, 1]] and score["interval"][0][0] > 1
    assert made.tensors["attn_head.2.mean_mask"].tolist() == [0, 1, 0, 0]
    assert not made.warnings


def test_demonstrations_that_teach_nothing_are_said_to_teach_nothing(tokenizer: Any, demos: Path) -> None:
    class Deaf(Learner):
        def _understands(self, ids: tuple[int, ...]) -> bool:
            return False

    made = run("task_vector", Deaf(tokenizer), demos, shots=4, trials=5)
    assert any("no effect beyond noise" in text for text in made.warnings)
    with pytest.raises(SteeringError, match="does not reach the model"):
        run("function_vector", Deaf(tokenizer), demos, shots=4, trials=5, corrupted=3)


def test_edits_that_are_tried_reach_a_real_model(demos: Path) -> None:
    """On the demo, which does not know the task: every head moves the answer a little."""
    source = LocalModel.load(str(demo.MODELS / "demo"))
    made = run("head_scale", source, demos, shots=3, trials=4, layers="1,4", num_heads=2)
    assert len(made.header.provenance["score"]["heads"]) == 2
    assert set(made.tensors) <= {f"attn_head.{layer}.{part}" for layer in (1, 4) for part in ("mean", "mean_mask")}


class Refuser(Planted):
    """Begins with the word "dark" where a direction is in its stream, and is not ablated."""

    DIRECTION = torch.nn.functional.normalize(torch.randn(24, generator=GENERATOR), dim=0)

    def __init__(self, tokenizer: Any) -> None:
        mark = min(set(tokenizer.encode("a x bright")) - set(tokenizer.encode("a x dark")))
        planted = {HookPoint("resid_pre", layer): 5 * self.DIRECTION for layer in range(1, 6)}
        super().__init__(tokenizer, mark, planted)
        self.says = tokenizer.encode(" stone", add_special_tokens=False)[0]

    def predict(self, texts: Sequence[tuple[int, ...]], entries: Sequence[Entry] = ()) -> Iterator[Tensor]:
        for ids in texts:
            strength = 5.0 * (self.mark in ids)
            for entry in entries:
                direction = next(iter(entry.tensors.values()))["direction"]
                along = float(torch.nn.functional.normalize(direction, dim=0) @ self.DIRECTION)
                added = entry.method == "add_direction"
                strength += float(direction @ self.DIRECTION) if added else -strength * along**2
            logits = torch.zeros(1408)
            logits[self.says] = 3 * strength
            yield logits.log_softmax(-1)


@pytest.mark.parametrize("method", ["add_direction", "directional_ablation"])
def test_a_direction_is_chosen_by_what_it_does(method: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{a} {b} {word}", "class": word} for a in INPUTS for b in INPUTS[:5] for word in ("bright", "dark")
    ]
    data = tmp_path / "classes.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = run(method, Refuser(tokenizer), data, marks="stone", template="none")
    (found,) = made.tensors.values()
    assert torch.nn.functional.normalize(found, dim=0) @ Refuser.DIRECTION > 0.9
    score = made.header.provenance["score"]
    assert (
        1 <= score["layer"] < 4 and score["log_odds_ablated"] < score["log_odds_plain"] < score["log_odds_added"] + 20
    )
    assert score["kl"] <= 0.1
    with pytest.raises(SteeringError, match="own words"):
        run(method, Planter(tokenizer), data, marks="stone", template="none")


class Planter(Refuser):
    """Its words have nothing to do with the direction."""

    def predict(self, texts: Sequence[tuple[int, ...]], entries: Sequence[Entry] = ()) -> Iterator[Tensor]:
        for _ in texts:
            yield torch.zeros(1408).log_softmax(-1)


def test_actadd_keeps_a_pairs_tokens_apart(tokenizer: Any, tmp_path: Path) -> None:
    data = tmp_path / "pair.jsonl"
    data.write_text(json.dumps({"positive": "bright morning road", "negative": "dark"}) + "\n")
    source = Planted(tokenizer, -1, {})
    made = run("actadd", source, data, layers="2", template="none")
    rows = made.tensors["resid_pre.2.rows"]
    ids = tuple(tokenizer("bright morning road")["input_ids"])
    (wanted,) = source.read([Asked(ids, tuple(range(len(ids))))], [HookPoint("resid_pre", 2)])
    short = tuple(tokenizer("dark")["input_ids"])
    space = tokenizer.encode(" ", add_special_tokens=False)[0]
    filled = short + (space,) * (len(ids) - len(short))
    (other,) = source.read([Asked(filled, tuple(range(len(ids))))], [HookPoint("resid_pre", 2)])
    torch.testing.assert_close(rows, wanted[HookPoint("resid_pre", 2)] - other[HookPoint("resid_pre", 2)])
    assert rows.shape == (len(ids), SHAPE.hidden_size)
