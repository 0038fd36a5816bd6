"""That a model's sites obey edits exactly where a transformers hook would make them."""

import torch
from engines import Ask, EngineUnderTest, edit, plan
from reference import ops as reference
from torch import Tensor
from transformers import PreTrainedModel

from whipstaff.steering.ops import Diagonal
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.vector_file import Vector
from whipstaff.steering.where import Where

NUM_TOKENS = 6


def assert_every_site_obeys(engine: EngineUnderTest, model: PreTrainedModel) -> None:
    """One site of one layer at a time, both a gain and an addition, at all positions from the third on; all of them in
    one batch, beside a plain request."""
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(3, model.config.vocab_size, (11,), generator=generator).tolist()
    where = Where(prompt=[(2, None)], generation="all")
    asks, expected = [], []
    for site, layer in engine.facts["sites"]:
        width = engine.shape.width(site)
        gain, add = (0.5 * torch.randn(width, generator=generator) for _ in range(2))
        vector = add_vector(engine, {f"{site}.{layer}.gain": gain, f"{site}.{layer}.add": add})
        asks.append(Ask(prompt, plan(SteeringPlan((edit(vector, 1.5, where),))), NUM_TOKENS))
        by_hand = reference.Edit(site, layer, [Diagonal(1 + 1.5 * gain, 1.5 * add)], lambda position, _: position >= 2)
        expected.append(reference.greedy(model, prompt, NUM_TOKENS, [by_hand])[0])
    plain = reference.greedy(model, prompt, NUM_TOKENS, [])[0]
    found = engine.tokens(*asks, Ask(prompt, max_tokens=NUM_TOKENS))
    named = [*(f"{site}.{layer}" for site, layer in engine.facts["sites"]), "plain"]
    wrong = {name: pair for name, *pair in zip(named, found, [*expected, plain], strict=True) if pair[0] != pair[1]}
    assert not wrong, wrong
    assert any(tokens != plain for tokens in expected)


def add_vector(engine: EngineUnderTest, tensors: dict[str, Tensor]) -> Vector:
    """Give the engine a vector; head-level tensors may come flat."""
    heads = (engine.shape.num_heads, engine.shape.head_dim)
    return engine.add_vector(
        {name: value.reshape(heads) if name.startswith("attn_head") else value for name, value in tensors.items()}
    )
