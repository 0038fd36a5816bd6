"""A sparse autoencoder finds what was planted, and its first feature tells what it was not learned from."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from whipstaff.server import demo
from whipstaff.server.demo import fitted, world
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit import autoencoder, fitting
from whipstaff.steering.fit.job import Job
from whipstaff.steering.fit.local import LocalModel
from whipstaff.steering.fit.options import Options
from whipstaff.steering.method import HookPoint
from whipstaff.steering.vector_file import packed, parse


class Bare:
    """As much of a job as learning takes."""

    def __init__(self, **said: Any) -> None:
        self.options = Options(**said)

    def progress(self, what: str, done: int, of: int) -> None:
        pass


def test_planted_features_are_found() -> None:
    """Of sparse sums of known directions, each is a row of the decoder."""
    random = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(24, 32, generator=random), dim=1)
    active = torch.rand(6000, 24, generator=random) * (torch.rand(6000, 24, generator=random) < 0.08)
    rows = active @ planted
    rows = (rows - rows.mean(0)) / (rows - rows.mean(0)).square().mean().sqrt()
    job: Any = Bare(features=32, steps=2000, l1=1e-2)
    found = autoencoder._learn(job, rows)
    best = (planted @ found.decoder.T).amax(1)
    assert best.median() > 0.95 and (best > 0.9).float().mean() > 0.8
    untrained: Any = Bare(features=32, steps=1)
    assert (planted @ autoencoder._learn(untrained, rows).decoder.T).amax(1).median() < 0.7


@pytest.fixture(scope="module")
def source() -> LocalModel:
    return LocalModel.load(str(demo.MODELS / "demo"), batch_size=16)


def job_of(source: LocalModel, folder: Path, num: int = 120, **said: Any) -> Job:
    rows = fitted.pairs(world.build(3), Random(3), num)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Options(**{"template": "none", "layers": "4", "features": 48, "steps": 200, **said})
    return fitting.prepared("sae", source, [data], options, folder / "rows")


def test_the_first_feature_tells_what_it_was_not_learned_from(source: LocalModel, tmp_path: Path) -> None:
    job = job_of(source, tmp_path)
    made = fitting.fit("sae", job)
    score = made.header.provenance["score"]
    assert score["auc"] > 0.8 and abs(score["auc_shuffled_labels"] - 0.5) < 0.25
    assert score["explained"] > 0.5 and 1 < score["active"] < 30
    parts = {name.rpartition(".")[2]: tensor for name, tensor in made.tensors.items()}
    assert made.header.method == "sae" and parts["encoder"].shape == parts["decoder"].shape == (48, 192)
    shown = job.splits["test"][0].row  # what is served reads the model's own rows, by the formula of `methods.sae`
    point = HookPoint("resid_post", 4)
    texts = [job.template.render(None, text).asked("last") for text in (shown.positive, shown.negative)]
    for rows in source.read(texts, [point]):
        active = torch.relu((rows[point] - parts["decoder_bias"]) @ parts["encoder"].T + parts["encoder_bias"])
        again = active @ parts["decoder"] + parts["decoder_bias"]
        assert (again - rows[point]).norm() < 0.8 * (rows[point] - parts["decoder_bias"]).norm()
    assert not (tmp_path / "rows").exists()


def test_the_features_that_are_raised_are_the_first(source: LocalModel, tmp_path: Path) -> None:
    rows = fitted.pairs(world.build(3), Random(3), 60)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"features": 16, "num_features": 2, "steps": 20, "layers": "4", "template": "none"}
    made = fitting.fit(
        "lf_steering", fitting.prepared("lf_steering", source, [data], Options(**own), tmp_path / "rows")
    )
    assert made.header.known_defaults == {"activation": "relu", "features": [0, 1]}
    vector = parse(packed(made.header, made.tensors))
    vector.method.check_params(vector.method.params.model_validate(made.header.known_defaults), vector.tensors)


@pytest.mark.parametrize(("said", "param"), [({"layers": "2,3"}, "layers"), ({"read": "last"}, "read")])
def test_what_cannot_be_is_refused(source: LocalModel, tmp_path: Path, said: dict[str, Any], param: str) -> None:
    with pytest.raises(SteeringError) as refused:
        fitting.fit("sae", job_of(source, tmp_path, 30, **said))
    assert refused.value.param == param
