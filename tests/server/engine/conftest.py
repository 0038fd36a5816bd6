"""Engines that several modules share: a start takes longer than most tests."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from decodings import GOLDEN
from engines import CLOSING, PATIENCE, Ask, EngineUnderTest, running
from modes import COMPILED_WITH_RANKS, THREE
from transformers import AutoModelForCausalLM

from whipstaff.steering.vector_file import Vector

SHAPES: dict[str, dict[str, Any]] = {
    "base": {"num_hidden_layers": 4},
    "expert": {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 128},
    "anti": {"hidden_size": 64, "num_attention_heads": 2, "vocab_size": tiny.VOCABULARY + 8},
    "anti-2": {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1},
}


MAX_LEN = 128  # that the engine of `ahead` takes
ATTENDED = (0, 1, 2)  # layers of which it can tell what their heads look at; the last is read by methods, too


@dataclass
class Shared:
    """An engine and its models, the same in every mode, in transformers."""

    mode: str
    engine: EngineUnderTest
    models: dict[str, Any]


@pytest.fixture(scope="session", autouse=True)
def none_left() -> Iterator[None]:
    """At the very end all engines are gone."""
    yield
    for thread in CLOSING:
        thread.join(PATIENCE)


@pytest.fixture(scope="session", params=THREE)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Its step budget is smaller than long prompts (chunked prefill), there are blocks for a part of the requests only
    (preemption) and slots for a part of their configurations; prefixes are cached."""
    folder = tmp_path_factory.mktemp("models")
    paths = {name: tiny.save("llama", folder / name, seed, **SHAPES[name]) for seed, name in enumerate(SHAPES)}
    with running(
        request.param,
        paths["base"],
        [(name, path) for name, path in paths.items() if name != "base"],
        num_slots=24,
        skip_tokenizer_init=True,
        max_num_batched_tokens=48,
        max_num_seqs=16,
        num_gpu_blocks_override=16,
        enable_prefix_caching=True,
        worker_extension_cls="operators.CountsOperators",
    ) as engine:
        models = {name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for name, path in paths.items()}
        yield Shared(request.param, engine, models)


@pytest.fixture
def nobody_left(shared: Shared) -> Iterator[None]:
    """After the test nothing of any request is left in the shared engine, and every history is free."""
    yield
    shared.engine.generate(Ask([5, 6, 7], max_tokens=1))  # so that the worker hears of the last to finish
    counters = shared.engine.counters()
    assert counters["requests_held"] == counters["histories_used"] == 0


@pytest.fixture(scope="session", params=["v1-eager-async", "v2-eager-sync"])
def recorded(request: pytest.FixtureRequest) -> Iterator[EngineUnderTest]:
    """On the models of which most of the decoding goldens were recorded."""
    models = GOLDEN / "models"
    aux = [(name, str(models / name)) for name in ("expert", "antiexpert", "expert_bigvocab")]
    flags: dict[str, Any] = {"max_num_batched_tokens": 48, "max_num_seqs": 32, "skip_tokenizer_init": True}
    with running(request.param, str(models / "base"), aux, **flags) as engine:
        yield engine


@dataclass
class Ahead:
    """An engine that keeps all that methods can read, and its two models in transformers."""

    mode: str
    engine: EngineUnderTest
    vector: Vector  # of a stream, at two layers
    base: Any
    other: Any


@pytest.fixture(scope="session", params=COMPILED_WITH_RANKS)
def ahead(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ahead]:
    """Tokens are tried, and attention and hidden states are kept. Its step budget is smaller than long prompts
    (chunked prefill), there are blocks for a part of the requests only (preemption), and room for the hidden states of
    fewer than ask for it."""
    folder, mode = tmp_path_factory.mktemp("models"), request.param
    path = tiny.save("llama", folder / "base", 0)
    other = tiny.save("llama", folder / "other", 1, hidden_size=64, num_attention_heads=2)
    with running(
        mode,
        path,
        [("other", other)],
        lookahead=True,
        attention_rows=True,
        attention_layers=ATTENDED,
        hidden_states=2,
        skip_tokenizer_init=True,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=48,
        max_num_seqs=8,
        num_gpu_blocks_override=12,
    ) as engine:
        models = [
            AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32, attn_implementation="eager")
            for one in (path, other)
        ]
        random, size = torch.Generator().manual_seed(5), engine.shape.hidden_size
        vector = engine.add_vector(
            {f"resid_post.{layer}.add": 0.4 * torch.randn(size, generator=random) for layer in (0, 2)}
        )
        yield Ahead(mode, engine, vector, *models)
