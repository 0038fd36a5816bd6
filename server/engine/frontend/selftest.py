"""The self-test: through the running engine, in the mode it will serve in, every site must obey an edit and every
auxiliary model a weight, and a look ahead, attention and hidden states must show something; an edit of scale 0 must
change nothing. Shown by log-probabilities and by what methods read, not by counters."""

import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import torch
from vllm import SamplingParams

from whipstaff.decoding.methods.contrastive_search import ContrastiveSearchParams
from whipstaff.decoding.methods.kwd import KwdParams
from whipstaff.decoding.methods.opera_lite import OperaLiteParams, OperaLiteSetting
from whipstaff.decoding.mix import Mix
from whipstaff.decoding.plan import DecodingPlan, Explain, Rewrite
from whipstaff.server.engine.frontend.launch import Engine, PlanDict
from whipstaff.server.plan import PLAN_KEY, PositionedPlan, RequestPlan
from whipstaff.steering.method import HookPoint
from whipstaff.steering.plan import Edit, ModuleEdit, PlannedAttention, PlannedEdit, PlannedModuleEdit, SteeringPlan
from whipstaff.steering.served import ModuleAbilities
from whipstaff.steering.shape import ModelShape, Site
from whipstaff.steering.vector_file import Header, packed, without_file
from whipstaff.steering.where import Where

_PROMPT_LEN = 6
TEXT = (  # what activations are calibrated on
    "The river had risen in the night, and by morning the lower road was under water. People stood on the bridge and "
    "talked about other years. A letter to the council was read aloud: it asked for 12 new pumps, two boats and, above "
    'all, an answer. Why had nobody cleaned the drains? "Because," said the engineer, "nobody was asked to." In '
    "statistics, a mean is a sum divided by a count; in cooking, a pinch is what your fingers hold. def area(r): "
    "return 3.14159 * r * r. She laughed, put on her coat and went out to look for the cat. "
)
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


async def calibrate(engine: Engine) -> dict[HookPoint, float]:
    """The mean length of activations at every hook point, over all tokens of some plain text, ranks' slices joined.

    The prompts are longer than any captured graph, so nothing depends on which kernels a graph holds.
    """
    await engine.collective_rpc("whipstaff_norms")
    await _log_probabilities(engine, RequestPlan(SteeringPlan((), is_metered=True)), _plain_text(engine))
    ranks = await engine.collective_rpc("whipstaff_norms")
    squares: dict[HookPoint, list[float]] = {}
    for rank in ranks:
        for site, layer, total, num in rank:
            squares.setdefault(HookPoint(site, layer), []).append((total / max(num, 1)) ** 2)
    is_sliced = {point: point.site == "attn_head" for point in squares}
    return {point: math.sqrt(sum(each) if is_sliced[point] else each[0]) for point, each in squares.items()}


def _plain_text(engine: Engine) -> list[int]:
    """Token ids of ordinary sentences; without a tokenizer, of anything."""
    room = max(1, engine.model_config.max_model_len - _NUM_TOKENS)
    tokenizer = engine.get_tokenizer() if not engine.model_config.skip_tokenizer_init else None
    ids: list[int] = tokenizer.encode(TEXT) if tokenizer is not None else []
    vocabulary = engine.model_config.get_vocab_size()
    return (ids or [(7 + 13 * index) % vocabulary for index in range(256)])[:room]


async def self_test(engine: Engine, auxiliaries: list[str]) -> AsyncIterator[Finding]:
    """Try every hook point, attention and experts where they are edited, what methods read, then every auxiliary
    model."""
    facts = await describe(engine)
    shape = ModelShape.model_validate(facts["model"])
    hook_points = [HookPoint(*point) for point in facts["sites"]]
    plain = await _log_probabilities(engine, None)
    probes = {
        site: await _load_probe(engine, site, hook_points, shape) for site in dict.fromkeys(p.site for p in hook_points)
    }
    try:
        for site, layer in hook_points:
            shown = [await _log_probabilities(engine, _edit(probes[site], layer, scale)) for scale in (1.0, 0.0)]
            yield Finding(f"{site} of layer {layer}", shown[0] != plain, shown[1] == plain)
    finally:
        for digest in probes.values():
            await engine.collective_rpc("whipstaff_drop_vector", args=(digest,))
    async for finding in _try_module_edits(engine, ModuleAbilities.from_wire(facts["module_edits"]), shape, plain):
        yield finding
    if engine.layout.looks_ahead:
        yield await _try_ahead(engine, shape, plain)
    if engine.layout.reads_attention:
        yield await _try_attention(engine, plain)
    async for finding in _try_attended(engine, shape, plain):
        yield finding
    if engine.layout.looks_ahead and engine.layout.num_hidden_states:
        yield await _try_history(engine, plain)
    for name in auxiliaries:
        mixes = [DecodingPlan(Mix.of({name: weight})) for weight in (1.0, 0.0)]
        shown = [await _log_probabilities(engine, RequestPlan(decoding=mix)) for mix in mixes]
        yield Finding(f"auxiliary model {name}", shown[0] != plain, shown[1] == plain)


async def _try_module_edits(
    engine: Engine, abilities: ModuleAbilities, shape: ModelShape, plain: list[dict[int, float]]
) -> AsyncIterator[Finding]:
    """What methods without a file have to show; and the same asked for on tokens that are never generated, which must
    change nothing."""
    for vector in without_file(shape).values():
        for what, setting in vector.method.trials(abilities):
            edit = ModuleEdit(vector.digest, json.dumps(setting))
            wheres = Where.of("all"), Where(generation=[(_NUM_TOKENS, None)])
            plans = [SteeringPlan((), module_edits=(PlannedModuleEdit(edit, where),)) for where in wheres]
            shown = [await _log_probabilities(engine, RequestPlan(plan)) for plan in plans]
            yield Finding(what, shown[0] != plain, shown[1] == plain)


async def _try_ahead(engine: Engine, shape: ModelShape, plain: list[dict[int, float]]) -> Finding:
    """Opposite opinions of tokens once they are fed must differ, and no opinion must change no token."""
    weight = torch.randn(2, shape.hidden_size, generator=torch.Generator().manual_seed(1))
    shown = []
    for sign in (1, -1, 0):
        data = packed(Header(method="prefix_classifier", model=shape), {"weight": sign * weight})
        digest: str = (await engine.collective_rpc("whipstaff_add_vector", args=(data,)))[0]
        setting = KwdParams(classifier="self-test", k=8).model_dump_json()
        plan = RequestPlan(decoding=DecodingPlan(rewrites=(Rewrite("kwd", setting, heads=(digest,)),)))
        try:
            shown.append(await _log_probabilities(engine, plan))
        finally:
            await engine.collective_rpc("whipstaff_drop_vector", args=(digest,))
    best = [[max(step, key=step.__getitem__) for step in steps] for steps in (shown[2], plain)]
    return Finding("tokens that are tried", shown[0] != shown[1], best[0] == best[1])


async def _try_attention(engine: Engine, plain: list[dict[int, float]]) -> Finding:
    """Two tokens must not be looked at alike, as they are by a query of zeros; and no penalty must change nothing."""
    shown, read = [], []
    for weight, position in ((1.0, 1), (1.0, 2), (0.0, 1)):
        said = OperaLiteParams(penalty_weight=weight).model_dump(exclude={"span"})
        setting = OperaLiteSetting(**said, span=((position, position + 1),)).model_dump_json()
        decoding = DecodingPlan(rewrites=(Rewrite("opera_lite", setting),), explain=Explain(1))
        facts: list[dict[str, Any]] = []
        shown.append(await _log_probabilities(engine, RequestPlan(decoding=decoding), facts=facts))
        read.append([fact["penalty"] for fact in facts])
    differs = all(one != other for one, other in zip(*read[:2], strict=True))
    return Finding("attention of the last layer", len(read[0]) == _NUM_TOKENS and differs, shown[2] == plain)


async def _try_attended(engine: Engine, shape: ModelShape, plain: list[dict[int, float]]) -> AsyncIterator[Finding]:
    """No head of a layer that can be told of may look at everything alike, as by a query of zeros; and telling must
    change nothing."""
    where, heads = Where(prompt=[(-1, None)]), tuple(range(shape.num_heads))
    looks = tuple(PlannedAttention(layer, heads, where) for layer in engine.layout.attention_layers)
    captures_id = f"self-test-{uuid4()}"
    plan = RequestPlan(SteeringPlan((), attention=looks), captures_id=captures_id, max_fed=_PROMPT_LEN)
    if not looks or PositionedPlan(plan, _PROMPT_LEN).capture_bytes(shape) > engine.layout.max_capture_bytes:
        return
    shown = await _log_probabilities(engine, plan)
    told = await engine.collective_rpc("whipstaff_captures", args=(captures_id,))
    for number, look in enumerate(looks):
        parts = [part[number] for rank in told for part in rank.values()]
        rows = [torch.frombuffer(bytearray(part["data"]), dtype=torch.float32) for part in parts]
        heads_seen = torch.cat([row.view(-1, _PROMPT_LEN) for row in rows])
        differs = len(heads_seen) == shape.num_heads and bool((heads_seen.amax(1) > heads_seen.amin(1)).all())
        yield Finding(f"attention of layer {look.layer}", differs, shown == plain)


async def _try_history(engine: Engine, plain: list[dict[int, float]]) -> Finding:
    """What is tried must be like something before it; and where likeness costs nothing, no token must change."""
    shown, read = [], []
    for alpha in (0.5, 0.0):
        setting = ContrastiveSearchParams(k=2, penalty_alpha=alpha).model_dump_json()
        decoding = DecodingPlan(
            rewrites=(Rewrite("contrastive_search", setting),), explain=Explain(1), keeps_hidden=True
        )
        facts: list[dict[str, Any]] = []
        shown.append(await _log_probabilities(engine, RequestPlan(decoding=decoding), facts=facts))
        read.append([fact["likeness"] for fact in facts])
    return Finding("hidden states that are kept", len(read[0]) == _NUM_TOKENS and all(read[0]), shown[1] == plain)


def _edit(digest: str, layer: int, scale: float) -> RequestPlan:
    edit = Edit(digest, json.dumps({"scale": scale}), (layer,), num_lines=1, num_instructions=2)
    return RequestPlan(SteeringPlan((PlannedEdit(edit, Where.of("all")),)))


async def _load_probe(engine: Engine, site: Site, hook_points: list[HookPoint], shape: ModelShape) -> str:
    """Give the workers a random vector with a unit-variance edit wherever the model has the site; its digest."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.num_heads, shape.head_dim) if site == "attn_head" else (shape.width(site),)
    tensors = {
        f"{site}.{point.layer}.add": torch.randn(size, generator=generator)
        for point in hook_points
        if point.site == site
    }
    data = packed(Header(method="vector", model=shape), tensors)
    digest: str = (await engine.collective_rpc("whipstaff_add_vector", args=(data,)))[0]
    return digest


async def _log_probabilities(
    engine: Engine, plan: RequestPlan | None, ids: list[int] | None = None, facts: list[dict[str, Any]] | None = None
) -> list[dict[int, float]]:
    """What the model says after a prompt: per step, the likeliest tokens and their log-probabilities; to `facts` comes
    what methods say of each."""
    vocabulary = engine.model_config.get_vocab_size()
    prompt = {"prompt_token_ids": ids or [(7 + 13 * index) % vocabulary for index in range(_PROMPT_LEN)]}
    explained = None if facts is None else lambda index, record: facts.append(record["facts"])
    extra = None if plan is None else {PLAN_KEY: PlanDict(plan.to_wire(), explained=explained)}
    params = SamplingParams(
        temperature=0, max_tokens=_NUM_TOKENS, ignore_eos=True, logprobs=3, detokenize=False, extra_args=extra
    )
    steps: list[dict[int, float]] = []
    async for output in engine.generate(prompt, params, f"self-test-{uuid4()}"):
        steps = [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs or ()]
    return steps
