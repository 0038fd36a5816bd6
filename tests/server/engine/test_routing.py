"""Expert routing against a token-by-token reference: every scheme; models. (The goldens are in test_architectures.)"""

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Ask, EngineUnderTest, plan
from transformers import OlmoeConfig, OlmoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from whipstaff.server.engine.worker.edits.routing import RoutingTables, _adopt, _How, _reroute_all_
from whipstaff.steering.methods.mote import Experts, MoTEParams
from whipstaff.steering.plan import ModuleEdit, PlannedModuleEdit, SteeringPlan
from whipstaff.steering.routing_scheme import Routing, RoutingError, Scheme
from whipstaff.steering.vector_file import without_file
from whipstaff.steering.where import Where

TOLERANCE = 2e-4  # log-probabilities, float32 engine against float64 references (goldens' README)
EXPERTS, TOP_K = 16, 4


def routing(edit: dict[str, Any]) -> Routing:
    return Routing(edit["mode"], tuple(edit.get("off", ())), tuple(edit.get("on", ())))


SCHEMES: dict[str, dict[str, Any]] = {
    "renormalised": {},
    "as they are": {"renormalize": False},
    "grouped": {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2, "renormalize": False},
    "DeepSeek-V3": {
        "use_grouped_topk": True,
        "num_expert_group": 4,
        "topk_group": 2,
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "e_score_correction_bias": torch.linspace(-0.5, 0.5, EXPERTS),
    },
}
EDITS = [
    {"off": [1, 5, 6], "mode": "pre"},
    {"off": [1, 5, 6, 9], "mode": "zero"},
    {"off": [1, 5, 6, 9], "mode": "zero_renorm"},
    {"on": [3, 14], "mode": "force"},
    {"off": [0, 7], "on": [2], "mode": "zero_renorm"},
]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_every_scheme(name: str, edit: dict[str, Any]) -> None:
    own = SCHEMES[name]
    router = CPURouter(TOP_K, EXPERTS, **own)
    groups = own.get("num_expert_group", 1)
    bias = own.get("e_score_correction_bias")
    scheme = Scheme(EXPERTS, TOP_K, router.scoring_func, router.renormalize, groups, own.get("topk_group", 1), bias)
    generator = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(64, EXPERTS, generator=generator)
    plain = router._compute_routing(logits, logits, None)
    slots = torch.tensor(
        [-1, 0, 1, 2] * 16, dtype=torch.int32
    )  # none, the edit, an empty slot, one that does not exist
    tables = RoutingTables({0: scheme}, 2, torch.device("cpu"))
    tables.write(0, [(0, routing(edit))])
    _adopt(router, scheme, tables.code(0), slots)
    weights, ids = router._compute_routing(logits, logits, None)
    same = plain[0].clone(), plain[1].clone()  # as on a device, without branches
    how = _How(scheme.scoring, scheme.renormalize, scheme.num_groups, scheme.top_groups, bias)
    _reroute_all_(*same, logits, tables.code(0), slots, how)
    assert torch.equal(same[0], weights) and torch.equal(same[1], ids)
    changed = 0
    for token, slot in enumerate(slots):
        said = dict(zip(ids[token].tolist(), weights[token].tolist(), strict=True))
        before = dict(zip(plain[1][token].tolist(), plain[0][token].tolist(), strict=True))
        expected = _rerouted(logits[token].double(), before, edit, own) if slot == 0 else before
        assert said == (pytest.approx(expected, rel=1e-5) if slot == 0 else expected)
        changed += said != before
    assert changed


def _rerouted(
    logits: torch.Tensor, before: dict[int, float], edit: dict[str, Any], own: dict[str, Any]
) -> dict[int, float]:
    """One token's {expert: weight}, by the specification's words."""
    off, on, mode = set(edit.get("off", ())), set(edit.get("on", ())), edit["mode"]
    weights, total = dict(before), sum(before.values())
    gone = off if mode == "pre" else set()
    masked = logits.clone()
    masked[list(gone)] = -torch.inf
    scores = masked.sigmoid() if own.get("scoring_func") == "sigmoid" else masked.softmax(-1)
    bias = own.get("e_score_correction_bias", torch.zeros(EXPERTS))
    choice = {e: (scores[e] + bias[e]).item() for e in range(EXPERTS) if e not in gone}
    factor = own.get("routed_scaling_factor", 1.0)
    if gone:
        if "num_expert_group" in own:
            size = EXPERTS // own["num_expert_group"]
            members = [[choice[e] for e in choice if e // size == group] for group in range(own["num_expert_group"])]
            take = 2 if "e_score_correction_bias" in own else 1
            merit = [sum(sorted(m)[-take:]) if len(m) >= take else -torch.inf for m in members]
            best = sorted(range(len(merit)), key=lambda group: merit[group])[-own["topk_group"] :]
            choice = {e: c for e, c in choice.items() if e // size in best}
        selected = sorted(choice, key=lambda e: choice[e])[-TOP_K:]
        norm = sum(scores[e].item() for e in selected) if own.get("renormalize", True) else 1.0
        weights = {e: factor * scores[e].item() / norm for e in selected}
        total = sum(weights.values())
    missing = on - set(weights)
    for expert in missing:
        del weights[min(set(weights) - on, key=lambda e: weights[e])]
        weights[expert] = factor * scores[expert].item()
    if missing:
        norm = sum(weights.values())
        weights = {e: w * total / norm for e, w in weights.items()}
    if mode.startswith("zero"):
        was_hit = bool(off & set(weights))
        weights = {e: 0.0 if e in off else w for e, w in weights.items()}
        rest = sum(weights.values())
        if mode == "zero_renorm" and was_hit and rest:
            weights = {e: w * total / rest for e, w in weights.items()}
    return weights


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"off": [16], "mode": "zero"}, "there is no expert 16"),
        ({"off": [0], "mode": "off"}, "mode 'off' is not available"),
        ({"off": [0], "on": [0], "mode": "zero"}, "both off and on"),
        ({"off": [0], "mode": "force"}, "switches experts on"),
        ({"on": [0, 1, 2, 3, 4], "mode": "force"}, "5 experts are on, and a token is given 4"),
        ({"off": [*range(13)], "mode": "pre"}, "fewer than 4"),
    ],
)
def test_what_cannot_be_routed_is_refused(edit: dict[str, Any], said: str) -> None:
    tables = RoutingTables({2: Scheme(EXPERTS, TOP_K, "softmax", True, 1, 1, None)}, 2, torch.device("cpu"))
    with pytest.raises(RoutingError, match=said):
        tables.write(0, [(2, routing(edit))])
    with pytest.raises(RoutingError, match="layer 0 has no routed experts"):
        tables.write(0, [(0, routing(edit))])
    assert not tables.code(2).any()


def test_groups_must_keep_enough_experts() -> None:
    scheme = Scheme(EXPERTS, TOP_K, "softmax", True, 4, 2, None)
    scheme.check(Routing("pre", (0, 1, 2, 3), ()))  # two of the other groups always hold eight
    with pytest.raises(RoutingError, match="fewer than 4"):
        scheme.check(Routing("pre", (0, 1, 2, 4, 5, 6), ()))  # groups 0 and 1 may win, with one expert each


SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 3, "max_position_embeddings": 256, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K,
    "initializer_range": 0.12, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"head_dim": 32, "moe_intermediate_size": 64, "norm_topk_prob": False},
    ),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"norm_topk_prob": False}),
}


@pytest.mark.engine
@pytest.mark.parametrize("name", MODELS)
def test_other_models(name: str, tmp_path: Path) -> None:
    """Gates inside of the expert runner and outside, weights that do not sum to one: as in transformers."""
    config, kind, own = MODELS[name]
    torch.manual_seed(0)
    model = kind(config(**SHAPE | own)).eval()
    model.save_pretrained(tmp_path)
    engine = EngineUnderTest(str(tmp_path), sites=("router",), enforce_eager=True, skip_tokenizer_init=True)
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(3, 320, (len(EDITS) + 1, 11), generator=generator).tolist()
    digest, asks = without_file(engine.shape)["mote"].digest, []
    for prompt, edit in zip(prompts, [*EDITS, None], strict=True):
        steering = None
        if edit is not None:
            experts = Experts(off=edit.get("off", []), on=edit.get("on", []))
            special = ModuleEdit(digest, MoTEParams(mode=edit["mode"], experts={1: experts}).model_dump_json())
            steering = SteeringPlan((), module_edits=(PlannedModuleEdit(special, Where.of("all")),))
        asks.append(Ask(prompt, plan(steering), 6, {"logprobs": 5}))
    try:
        outputs = engine.generate(*asks)
    finally:
        engine.close()
    for prompt, edit, output in zip(prompts, [*EDITS, None], outputs, strict=True):
        rows, ids = [], list(prompt)
        hook = model.model.layers[1].mlp.gate.register_forward_hook(_rerouting(edit, own)) if edit else None
        for _ in range(6):
            with torch.no_grad():
                rows.append(model(torch.tensor([ids])).logits[0, -1])
            ids.append(int(rows[-1].argmax()))
        if hook:
            hook.remove()
        assert list(output.outputs[0].token_ids) == ids[len(prompt) :]
        for row, said in zip(torch.stack(rows).log_softmax(-1), output.outputs[0].logprobs, strict=True):
            for token, entry in said.items():
                assert entry.logprob == pytest.approx(row[token].item(), abs=TOLERANCE)


def _rerouting(edit: dict[str, Any], own: dict[str, Any]) -> Any:
    def hook(gate: Any, given: tuple[torch.Tensor], said: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        _, weights, ids = said
        logits = torch.nn.functional.linear(given[0].flatten(0, -2), gate.weight)
        for token in range(len(ids)):
            before = dict(zip(ids[token].tolist(), weights[token].tolist(), strict=True))
            after = _rerouted(logits[token].double(), before, edit, {"renormalize": own["norm_topk_prob"]})
            ids[token] = torch.tensor(list(after))
            weights[token] = torch.tensor(list(after.values()))
        return said

    return hook
