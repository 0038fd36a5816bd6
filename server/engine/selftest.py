"""The self-test: through the running engine, in the mode it will serve in, every site must obey an edit and every
auxiliary model a weight; and an edit of scale 0 must change nothing. Shown by log-probabilities, not by counters."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save
from vllm import SamplingParams

from whipstaff.decoding.method import Mix
from whipstaff.server.engine.launch import Engine, PlanDict
from whipstaff.server.engine.request import KEY, RequestPlan
from whipstaff.steering.artifacts import SITES, Header, ModelShape, Site
from whipstaff.steering.plan import PlannedEdit, RowEdit, SteeringPlan
from whipstaff.steering.where import Where

_PROMPT_LEN = 6
_NUM_TOKENS = 3  # the first comes from a prefill, the others from decode steps: both kinds of graph are seen


@dataclass(frozen=True)
class Finding:
    """One thing that was tried."""

    what: str
    changes: bool  # whether the full edit changed the output
    off_is_off: bool  # whether the edit at scale 0 left it bit for bit

    @property
    def is_good(self) -> bool:
        return self.changes and self.off_is_off


async def describe(engine: Engine) -> dict[str, Any]:
    """The model's shape, its sites and the runner, from the first worker."""
    described: dict[str, Any] = (await engine.collective_rpc("whipstaff_describe"))[0]
    return described


async def self_test(engine: Engine, auxiliaries: list[str]) -> AsyncIterator[Finding]:
    """Try every site of every layer, then every auxiliary model."""
    facts = await describe(engine)
    shape = ModelShape.model_validate(facts["model"])
    plain = await _log_probabilities(engine, None)
    probes = {site: await _load_probe(engine, site, shape) for site in SITES}
    try:
        for site, layer in facts["sites"]:
            shown = [await _log_probabilities(engine, _edit(probes[site], layer, scale)) for scale in (1.0, 0.0)]
            yield Finding(f"{site} of layer {layer}", shown[0] != plain, shown[1] == plain)
    finally:
        for digest in probes.values():
            await engine.collective_rpc("whipstaff_drop_vector", args=(digest,))
    for name in auxiliaries:
        shown = [await _log_probabilities(engine, RequestPlan(mix=Mix({name: weight}))) for weight in (1.0, 0.0)]
        yield Finding(f"auxiliary model {name}", shown[0] != plain, shown[1] == plain)


def _edit(digest: str, layer: int, scale: float) -> RequestPlan:
    return RequestPlan(SteeringPlan((PlannedEdit(RowEdit(digest, scale, (layer,)), Where.of("all")),)))


async def _load_probe(engine: Engine, site: Site, shape: ModelShape) -> str:
    """Give the workers a random vector with a unit-variance edit at every layer; its digest."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.hidden_size,) if site == "resid_post" else (shape.num_heads, shape.head_dim)
    tensors = {f"{site}.{layer}.add": torch.randn(size, generator=generator) for layer in range(shape.num_layers)}
    data = save(tensors, metadata={"whipstaff": Header(method="self-test", model=shape).model_dump_json()})
    digest: str = (await engine.collective_rpc("whipstaff_add_vector", args=(data,)))[0]
    return digest


async def _log_probabilities(engine: Engine, plan: RequestPlan | None) -> list[dict[int, float]]:
    """What the model says after a fixed prompt: per step, the likeliest tokens and their log-probabilities."""
    vocabulary = engine.model_config.get_vocab_size()
    prompt = {"prompt_token_ids": [(7 + 13 * index) % vocabulary for index in range(_PROMPT_LEN)]}
    extra = None if plan is None else {KEY: PlanDict(plan.to_wire())}
    params = SamplingParams(
        temperature=0, max_tokens=_NUM_TOKENS, ignore_eos=True, logprobs=3, detokenize=False, extra_args=extra
    )
    steps: list[dict[int, float]] = []
    async for output in engine.generate(prompt, params, f"self-test-{uuid4()}"):
        steps = [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs or ()]
    return steps
