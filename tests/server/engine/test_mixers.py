"""Blocks that mix tokens otherwise than by attention of whole heads: every site that they have obeys edits exactly
where a transformers hook would make them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from engines import EngineUnderTest
from obeying import assert_every_site_obeys
from transformers import AutoModelForCausalLM

from whipstaff.steering.shape import Site

pytestmark = pytest.mark.engine

MLP: tuple[Site, ...] = ("mlp_in", "mlp_out")
ATTENTION: tuple[Site, ...] = ("attn_in", "attn_head", "attn_out")
EVERYWHERE = (0, 1, 2)
MODELS: dict[str, dict[Site, tuple[int, ...]]] = {  # and in which of three layers their sites are
    "deepseek_v2": {"resid_pre": (0,), **dict.fromkeys(("resid_post", *ATTENTION, *MLP), EVERYWHERE)},
    "lfm2": {
        "resid_pre": (0,),
        **dict.fromkeys(("resid_post", *MLP), EVERYWHERE),
        **dict.fromkeys(ATTENTION, (1,)),
    },
}


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(name: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(name, Path(tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def engine(name: str, path: str) -> Iterator[EngineUnderTest]:
    made = EngineUnderTest(
        path, sites=MODELS[name], num_slots=64, enforce_eager=True, skip_tokenizer_init=True, max_num_seqs=64
    )
    try:
        yield made
    finally:
        made.close()


def test_every_site_obeys_as_a_hook_does(name: str, path: str, engine: EngineUnderTest) -> None:
    assert {tuple(point) for point in engine.facts["sites"]} == {
        (site, layer) for site, layers in MODELS[name].items() for layer in layers
    }
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    assert_every_site_obeys(engine, model)
