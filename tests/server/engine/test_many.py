"""Many configurations in one batch, each as if it were alone; on two ranks and on Model Runner V2 the same answers."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice, product
from typing import Any

import pytest
import tiny
import torch
from engines import Ask, EngineUnderTest, plan
from modes import a_core_for_each_rank, v2_on_cpu
from reference import ops as reference
from torch import Tensor
from transformers import AutoModelForCausalLM

from whipstaff.cuda_ext import Phi
from whipstaff.steering.ops import Diagonal, EditOp, directions
from whipstaff.steering.planner import Planner, SteeringParams
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header, Vector, packed, parse
from whipstaff.steering.where import Region, Where

from .test_isolation import SCHEDULES, TOLERANCE, WHENS, WHERES, difference

pytestmark = pytest.mark.engine

LAYERS, WIDTH, HEADS, HEAD = 3, 64, 4, 32
SHAPE = ModelShape(
    architecture="LlamaForCausalLM",
    hidden_size=WIDTH,
    num_layers=LAYERS,
    num_heads=HEADS,
    head_dim=HEAD,
    num_kv_heads=2,
)
NUM_TOKENS, NUM_STEERED = 8, 64
PROMPTS = [torch.randint(3, 40, (num,), generator=torch.Generator().manual_seed(num)).tolist() for num in (5, 17, 29)]


@dataclass
class File:
    """A vector's file, and entries that use it."""

    vector: Vector
    data: dict[str, Tensor]
    header: Header
    entries: list[dict[str, Any]]


def file(method: str, entries: list[dict[str, Any]], data: dict[str, Tensor], **defaults: Any) -> File:
    header = Header(method=method, model=SHAPE, defaults=defaults)
    return File(parse(packed(header, data)), data, header, entries)


def files() -> dict[str, File]:
    """One or more of every method that edits activations."""
    generator = torch.Generator().manual_seed(31)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(shape, generator=generator)

    def stream(**parts: Any) -> dict[str, Tensor]:
        return {f"resid_post.{i}.{p}": normal(*n, size=a) for i in range(LAYERS) for p, (a, *n) in parts.items()}

    def heads(**parts: Any) -> dict[str, Tensor]:
        return {f"attn_head.{i}.{p}": normal(HEADS, *n, size=a) for i in range(LAYERS) for p, (a, *n) in parts.items()}

    def autoencoder(num: int = 24) -> dict[str, Tensor]:
        return {
            "resid_post.1.encoder": normal(num, WIDTH, size=0.3),
            "resid_post.1.encoder_bias": normal(num, size=0.3),
            "resid_post.1.decoder": normal(num, WIDTH, size=0.3),
            "resid_post.1.decoder_bias": normal(WIDTH, size=0.1),
        }

    scales: list[dict[str, Any]] = [{"scale": 1.0}, {"scale": -0.7, "renorm": True}]
    features = [{"feature": 3, "set": 4.0}, {"feature": 7, "scale": 0.0}, {"feature": 11, "add": 3.0}]
    careful = [{"feature": feature, "add": 3.0, "only_if_active": True} for feature in range(8)]
    low_rank = {"bias": (1.0, 3), "rotate": (0.2, 3, WIDTH)}
    weighed = {"weight": (0.3, 3, WIDTH), **low_rank}
    projected = {"weight": (0.3, 3, WIDTH), "bias": (1.0, 3), "project": (0.2, 3, WIDTH)}
    added = stream(add=(0.5, WIDTH))
    return {
        "vector": file("vector", [*scales, {"normalize": True, "scale": 3.0}], added),
        "gain": file("vector", scales, stream(gain=(0.3, WIDTH), add=(0.3, WIDTH))),
        "caa": file("caa", scales, {"resid_post.1.add": normal(WIDTH)}),
        "repe": file(
            "repe", [{"scale": 1.5, "operator": "piecewise_linear"}, {"renorm": True}], stream(add=(0.5, WIDTH))
        ),
        "function_vector": file("function_vector", scales, heads(add=(0.5, HEAD))),
        "task_vector": file("task_vector", [{"scale": 0.5}, {}], {"resid_post.1.state": normal(WIDTH)}),
        "actadd": file(
            "actadd", [{}, {"location": "mid"}, {"location": "back"}], {"resid_pre.1.rows": normal(4, WIDTH)}
        ),
        "iti": file("iti", [{"scale": 2.0}], heads(direction=(1.0, HEAD)) | _on_heads("sigma", torch.ones(HEADS))),
        "lofit": file("lofit", scales, heads(A=(0.4, HEAD), v=(0.4, HEAD))),
        "site": file("site", [{}], heads(task=(1.0, HEAD)) | _on_heads("alpha", torch.tensor([0.0, 0.3, 0.6, 1.0]))),
        "head_scale": file("head_scale", [{}], _on_heads("scale", torch.tensor([0.0, 2.0, 1.0, 0.5]))),
        "rotary": file("tarot", scales, heads(angles=(0.8, HEAD // 2))),
        "givens": file("tarot", scales, heads(angles=(0.8, HEAD - 1))),
        "ablate": file("directional_ablation", scales, {"direction": normal(WIDTH)}),
        "add_direction": file("add_direction", [{"scale": 0.7}], {"resid_pre.1.direction": normal(WIDTH)}),
        "remove": file("directional_ablation", [{}], {"resid_post.1.direction": normal(WIDTH)}),
        "patch": file("directional_patch", [{"value": 4.0}], {"resid_post.0.direction": normal(WIDTH)}),
        "knob": file(
            "context_knob",
            [{"value": 3.0}, {"value": [-2.0, 5.0]}],
            {"resid_post.1.basis": torch.linalg.qr(normal(WIDTH, 2)).Q.T.contiguous()},
        ),
        "angular": file(
            "angular",
            [{"angle": 70.0}, {"angle": 200.0, "adaptive": True}],
            {"first_direction": normal(WIDTH), "second_direction": normal(WIDTH)},
        ),
        "loreft": file("loreft", [{}, {"activation": "tanh"}], stream(**weighed)),
        "noreft": file("noreft", [{"activation": "silu"}], stream(**projected, project_bias=(1.0, 3))),
        "consreft": file("consreft", [{}], stream(**low_rank)),
        "lobireft": file("lobireft", [{}], stream(**low_rank)),
        "direft": file("direft", [{"activation": "relu"}], stream(**weighed)),
        "nodireft": file("nodireft", [{}], stream(**projected)),
        "sae": file("sae", [{"features": features}, {"features": careful}], autoencoder()),
        "sae_topk": file("sae", [{"features": careful}], autoencoder(), activation="topk", k=6),
        "sae_whole": file("sae", [], autoencoder(150)),
        "lf": file("lf_steering", [{"features": [0, 1, 2, 3, 4, 5], "scale": 2.0}], autoencoder(), k=8),
        "probe": file("probe", [], {"resid_post.0.direction": normal(WIDTH, size=0.2)}),
    }


def _on_heads(part: str, numbers: Tensor) -> dict[str, Tensor]:
    return {f"attn_head.{layer}.{part}": numbers.clone() for layer in range(LAYERS)}


FILES = files()


def ask(prompt: list[int], *entries: dict[str, Any]) -> Ask:
    planner = Planner()
    for entry in entries:
        vector = FILES[entry["vector"]].vector
        own = {name: value for name, value in entry.items() if name not in SteeringParams.model_fields}
        said = SteeringParams.model_validate({name: value for name, value in entry.items() if name not in own})
        planner.add(said, own, vector, FILES["probe"].vector if said.when else None)
    return Ask(prompt, plan(planner.plan) if entries else None, NUM_TOKENS, {"logprobs": 0})


def configurations() -> list[Ask]:
    """Every setting of every method, then pairs of them with conditions and schedules, each with a clause in turn."""
    prompts, wheres = cycle(PROMPTS), cycle(WHERES)
    single = [{"vector": name, **entry} for name, made in FILES.items() for entry in made.entries]
    found = [
        ask(next(prompts), entry if entry["vector"] == "actadd" else entry | {"where": next(wheres)})
        for entry in single
    ]
    gated = [
        {"vector": name, "layers": [2], "when": {"probe": "probe", **when}, "schedule": schedule, "where": where}
        for (when, schedule), name, where in zip(
            product(WHENS, SCHEDULES), cycle(("loreft", "vector", "rotary", "ablate")), cycle(WHERES)
        )
    ]
    others = cycle(entry for entry in single if entry["vector"] != "actadd")
    found += [ask(next(prompts), next(others), one) for one in gated]
    return found[:NUM_STEERED]


def plain() -> list[Ask]:
    return [ask(prompt) for prompt in islice(cycle(PROMPTS), 6)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save("llama", tmp_path_factory.mktemp("model"), hidden_size=WIDTH, intermediate_size=96)


def start(path: str, **flags: Any) -> EngineUnderTest:
    engine = EngineUnderTest(
        path,
        num_slots=400,
        vectors=[made.vector for made in FILES.values()],
        enforce_eager=True,
        skip_tokenizer_init=True,
        **flags,
    )
    assert engine.shape == SHAPE
    for made in FILES.values():
        assert engine.add_vector(made.data, made.header).digest == made.vector.digest
    return engine


@dataclass
class Answers:
    """What an engine on one rank said."""

    together: list[Any]  # to all configurations and the plain requests
    alone: list[Any]
    num_steps: int  # that it took together
    ordered: list[Any]  # to `ordered`
    by_token: Any  # to `by_token`
    around: list[Any]  # to `around`
    decoded: Any  # to `decoded`


@pytest.fixture(scope="module")
def answers(path: str) -> Answers:
    engine = start(path, max_num_seqs=80, max_num_batched_tokens=4096, enable_prefix_caching=False)
    try:
        asks = [*configurations(), *plain()]
        before = engine.counters()["steps"]
        together = engine.generate(*asks)
        num_steps = engine.counters()["steps"] - before
        alone = [engine.generate(one)[0] for one in asks]
        in_order, token = engine.generate(*ordered()), engine.generate(by_token())[0]
        near, own = engine.generate(*around()), engine.generate(decoded())[0]
        return Answers(together, alone, num_steps, in_order, token, near, own)
    finally:
        engine.close()


def test_each_is_as_if_alone(answers: Answers) -> None:
    asks = configurations()
    assert len(asks) == NUM_STEERED == len({repr(one.plan) for one in asks})
    assert answers.num_steps <= 2 * NUM_TOKENS, "they were not in one batch"
    assert differing(answers.together, answers.alone) == []
    unsteered = {repr(one.prompt): output for one, output in zip(plain(), answers.alone[NUM_STEERED:], strict=True)}
    assert len(unsteered) == len(PROMPTS)
    silent = [i for i, one in enumerate(asks) if not difference(answers.alone[i], unsteered[repr(one.prompt)])]
    assert len(silent) < NUM_STEERED // 5, [asks[i].plan for i in silent]


def differing(outputs: list[Any], wanted: list[Any]) -> list[tuple[int, str]]:
    pairs = enumerate(zip(outputs, wanted, strict=True))
    return [(index, why) for index, (one, other) in pairs if (why := difference(one, other))]


def ordered() -> list[Ask]:
    """Ablate and add, and add and ablate, one direction at one place."""
    entries = [{"vector": name, "where": "all"} for name in ("remove", "caa")]
    return [ask(PROMPTS[1], *entries), ask(PROMPTS[1], *reversed(entries))]


def test_edits_are_made_in_the_order_given(answers: Answers, path: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    direction, add = (next(iter(FILES[name].data.values())) for name in ("remove", "caa"))
    unit = (direction / direction.norm())[None]
    ops: list[EditOp] = [directions(unit, unit, Phi.AFFINE, a=-1.0), Diagonal(None, add)]
    found = []
    for output, made in zip(answers.ordered, (ops, ops[::-1]), strict=True):
        edit = reference.Edit("resid_post", 1, made, lambda position, prompt_len: True)
        tokens, logits = reference.greedy(model, PROMPTS[1], NUM_TOKENS, [edit])
        assert list(output.outputs[0].token_ids) == tokens
        for token, said, row in zip(tokens, output.outputs[0].logprobs, logits.log_softmax(-1), strict=True):
            assert said[token].logprob == pytest.approx(row[token].item(), abs=TOLERANCE)
        found.append(logits)
    assert (found[0] - found[1]).abs().max() > 0.1


def around() -> list[Ask]:
    """ActAdd's rows around the middle of prompts of odd lengths."""
    return [ask(prompt, {"vector": "actadd", "location": "mid"}) for prompt in PROMPTS]


def only(at: int) -> Callable[[int, int], bool]:
    return lambda position, _: position == at


@pytest.mark.parametrize("index", range(len(PROMPTS)))
def test_rows_lie_around_the_middle_as_in_the_release(answers: Answers, path: str, index: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt, rows = PROMPTS[index], FILES["actadd"].data["resid_pre.1.rows"]
    first = len(prompt) // 2 - len(rows) // 2
    edits = [reference.Edit("resid_pre", 1, [Diagonal(None, row)], only(first + n)) for n, row in enumerate(rows)]
    tokens, logits = reference.greedy(model, prompt, NUM_TOKENS, edits)
    assert list(answers.around[index].outputs[0].token_ids) == tokens
    for token, said, row in zip(tokens, answers.around[index].outputs[0].logprobs, logits.log_softmax(-1), strict=True):
        assert said[token].logprob == pytest.approx(row[token].item(), abs=TOLERANCE)
    assert (logits - reference.greedy(model, prompt, NUM_TOKENS, [])[1]).abs().max() > 0.1


def decoded() -> Ask:
    """All 150 features of a file in the stream's place: more than read a row in one group, or fit a frame of code."""
    features = [{"feature": 3, "set": 4.0}, {"feature": 140, "scale": 0.0}]
    entry = {"vector": "sae_whole", "features": features, "use_error_term": False, "scale": 0.9, "where": "all"}
    return ask(PROMPTS[1], entry)


def test_an_autoencoder_takes_the_streams_place(answers: Answers, path: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    plain = reference.greedy(model, PROMPTS[1], NUM_TOKENS, [])[1]
    parts = {name.split(".")[-1]: tensor for name, tensor in FILES["sae_whole"].data.items()}

    def decode(module: Any, args: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        after = ((x - parts["decoder_bias"]) @ parts["encoder"].T + parts["encoder_bias"]).relu()
        after[..., 3], after[..., 140] = 4.0, 0.0
        x = x + 0.9 * (after @ parts["decoder"] + parts["decoder_bias"] - x)
        return x if isinstance(output, Tensor) else (x, *output[1:])

    model.model.layers[1].register_forward_hook(decode)
    tokens, logits = reference.greedy(model, PROMPTS[1], NUM_TOKENS, [])
    assert list(answers.decoded.outputs[0].token_ids) == tokens
    for token, said, row in zip(tokens, answers.decoded.outputs[0].logprobs, logits.log_softmax(-1), strict=True):
        assert said[token].logprob == pytest.approx(row[token].item(), abs=TOLERANCE)
    assert (logits - plain).abs().max() > 0.1


TOKENS = PROMPTS[1][2:5]


def by_token() -> Ask:
    """An edit at some tokens, and one at all others."""
    return ask(
        PROMPTS[1],
        {"vector": "caa", "where": Where(tokens=TOKENS)},
        {"vector": "remove", "where": Where(prompt="all", generation="all", exclude=Region(tokens=TOKENS))},
    )


def test_clauses_on_tokens_stay_apart(answers: Answers, path: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    direction, add = (next(iter(FILES[name].data.values())) for name in ("remove", "caa"))
    unit = (direction / direction.norm())[None]
    ids = list(PROMPTS[1])
    edits = [
        reference.Edit("resid_post", 1, [Diagonal(None, add)], lambda position, _: ids[position] in TOKENS),
        reference.Edit(
            "resid_post",
            1,
            [directions(unit, unit, Phi.AFFINE, a=-1.0)],
            lambda position, _: ids[position] not in TOKENS,
        ),
    ]
    for said in answers.by_token.outputs[0].logprobs:
        row = reference.logits(model, ids, len(PROMPTS[1]), edits)[-1].log_softmax(-1)
        ids.append(int(row.argmax()))
        assert said[ids[-1]].logprob == pytest.approx(row.max().item(), abs=TOLERANCE)


@pytest.fixture(scope="module")
def on_two_ranks(path: str) -> list[Any]:
    with a_core_for_each_rank():
        engine = start(path, max_num_seqs=80, max_num_batched_tokens=4096, tensor_parallel_size=2)
    try:
        return engine.generate(*configurations(), *plain())
    finally:
        engine.close()


def is_split(one: Ask) -> bool:
    """Whether rows of which each rank has a part are to keep their length: refused at admission."""
    sites = {made.vector.digest: made.vector.sites for made in FILES.values()}
    edits = one.plan.steering.edits if one.plan and one.plan.steering else ()
    return any(planned.edit.renorm and "attn_head" in sites[planned.edit.digest] for planned in edits)


def test_two_ranks_say_the_same(answers: Answers, on_two_ranks: list[Any]) -> None:
    whole = [i for i, one in enumerate([*configurations(), *plain()]) if not is_split(one)]
    assert differing([on_two_ranks[i] for i in whole], [answers.alone[i] for i in whole]) == []


def test_model_runner_v2_says_the_same(answers: Answers, path: str) -> None:
    """Every second of the conditional, scheduled ones, some of low rank, some plain; with blocks for a few, so that
    requests are preempted and come back."""
    asks = [*configurations(), *plain()]
    plans = [one.plan.steering if one.plan else None for one in asks]
    chosen = [i for i, one in enumerate(plans) if one and one.num_columns][::2]
    chosen += [i for i, one in enumerate(plans) if one and len(one.edits) == 1][-12::3]
    chosen += [len(asks) - 1]
    with v2_on_cpu():
        engine = start(path, max_num_seqs=len(chosen), num_gpu_blocks_override=9, served_model_name="v2")
    try:
        assert engine.facts["runner"] == "v2"
        outputs = engine.generate(*(asks[i] for i in chosen))
        assert differing(outputs, [answers.alone[i] for i in chosen]) == []
        assert engine.num_preemptions > 0
        engine.generate(Ask([5, 6, 7], max_tokens=1))
        left = engine.counters()
        assert left["requests_held"] == left["histories_used"] == 0
    finally:
        engine.close()
