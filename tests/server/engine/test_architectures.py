"""Sites are found by structure: every architecture obeys edits exactly where a transformers hook would make them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import goldens
import pytest
import tiny
import torch
from engines import Ask, EngineUnderTest, plan
from obeying import assert_every_site_obeys
from reference import dola
from torch import Tensor
from transformers import AutoModelForCausalLM

from whipstaff.decoding.methods.dola import DolaParams
from whipstaff.decoding.plan import DecodingPlan, Rewrite
from whipstaff.server.engine.frontend.selftest import Finding, self_test
from whipstaff.server.plan import RequestPlan
from whipstaff.steering import vector_file
from whipstaff.steering.inserts import Wanted, place_inserts
from whipstaff.steering.method import HookPoint
from whipstaff.steering.needs import Hook
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.planner import Planner, SteeringParams
from whipstaff.steering.shape import SITES

TOLERANCE = 2e-4  # log-probabilities, float32 engine against float64 or float32 references (goldens' README)
GOLDEN = ("llama_a", "gpt2_a", "gemma2_a", "qwen2_a", "mixtral_a")
RANDOM = ("qwen3", "mistral", "phi3", "gpt_neox")

pytestmark = pytest.mark.engine


@dataclass
class Served:
    name: str
    path: str
    engine: EngineUnderTest

    def ask(self, case: goldens.Case, wild: goldens.Wild | None = None) -> Ask:
        """A golden case as a request, by the way that requests take; with its vector out of its community's file."""
        planner, ids, rows = Planner(), case.io["input_ids"].tolist(), []
        for piece in case.pieces:
            entry = piece.entry("golden")
            own = {name: entry.pop(name) for name in [*entry] if name not in SteeringParams.model_fields}
            params = SteeringParams.model_validate(entry)
            vector = vector_file.without_file(self.engine.shape)[piece.method] if not piece.tensors else None
            if wild is not None:
                header, tensors = wild.imported(self.engine.shape)
                vector = self.engine.add_vector(tensors, header)
            vector = vector or self.engine.add_vector(piece.tensors, piece.header(self.engine.shape))
            match vector.method.kind.name:
                case "edits":
                    planner.add(params, own, vector, None)
                case "rows":
                    rows.append(Wanted(vector.digest, len(vector.shared_parts["rows"]), own["insert"]))
                case _:
                    planner.add_module_edit(params, own, vector)
                    if piece.method == "prefix_kv":
                        rows.append(Wanted(vector.digest, len(vector.tensors[HookPoint("attn_head", 0)]["key"]), 0))
        ids, inserts = place_inserts(ids, rows)
        num = len(case.io["greedy_ids_f64"]) if "greedy_ids_f64" in case.io else 1
        sampling = {"logprobs": 5, "prompt_logprobs": 5}
        return Ask(ids, plan(replace(planner.plan, inserts=inserts)), num, sampling)


@pytest.fixture(scope="module", params=GOLDEN + RANDOM)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    name = request.param
    if name in GOLDEN:
        path = str(goldens.ROOT / "models" / name)
    else:
        path = tiny.save(name, Path(tmp_path_factory.mktemp(name)))
    vectors = [
        vector_file.parse(vector_file.packed(piece.header(goldens.shape_of(name)), piece.tensors))
        for case in (goldens.cases(name) if name in GOLDEN else ())
        for piece in case.pieces
    ]
    vectors += [vector_file.parse(vector_file.packed(*wild.imported(goldens.shape_of(name)))) for wild in wilds(name)]
    sites: list[Hook] = [site for site in SITES if site != "router" or name == "mixtral_a"]
    if name != "gpt_neox":  # runs as transformers' own code
        sites.append("attention")
    engine = EngineUnderTest(
        path, sites=sites, vectors=vectors, num_slots=64, enforce_eager=True, skip_tokenizer_init=True, max_num_seqs=64
    )
    try:
        yield Served(name, path, engine)
    finally:
        engine.close()


def wilds(name: str) -> list[goldens.Wild]:
    """The foreign files of a golden model."""
    cases = {case.name for case in [*goldens.cases(name), *goldens.others(name)]} if name in GOLDEN else set()
    return [wild for wild in goldens.WILD if wild.case in cases]


def test_every_site_obeys_as_a_hook_does(served: Served) -> None:
    """One site of one layer at a time, both a gain and an addition, at all positions from the third on."""
    engine, shape = served.engine, served.engine.shape
    model = AutoModelForCausalLM.from_pretrained(served.path, dtype=torch.float32, attn_implementation="eager").eval()
    everywhere = {site for site in SITES if site != "router" or shape.num_experts}
    assert {(site, layer) for site, layer in engine.facts["sites"]} == {
        (site, layer) for site in everywhere for layer in range(shape.num_layers) if site != "resid_pre" or layer == 0
    }
    assert_every_site_obeys(engine, model)


def test_early_layers_are_read_by_the_models_own_head(served: Served) -> None:
    """Soft caps, tied embeddings and scaled ones included; with and without the model's final norm. What is told of a
    prompt's token is the difference of its log-probabilities at the last layer and at the early one."""
    engine, layers = served.engine, range(served.engine.shape.num_layers)
    model = AutoModelForCausalLM.from_pretrained(served.path, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = torch.randint(3, tiny.VOCABULARY, (9,), generator=torch.Generator().manual_seed(4)).tolist()
    mature, streams = dola.mixed(model, prompt, 0, [], {})
    settings = [(layer, has_norm) for layer in layers for has_norm in (False, True)]
    asks = []
    for layer, has_norm in settings:
        params = DolaParams(layers=[layer], relative_top=0.0, final_norm_on_candidates=has_norm, post_softmax=False)
        decoding = DecodingPlan(rewrites=(Rewrite("dola", params.model_dump_json(), early=(layer,)),))
        asks.append(Ask(prompt, RequestPlan(SteeringPlan((), keeps=(layer,)), decoding), 1, {"prompt_logprobs": 0}))
    for (layer, has_norm), output in zip(settings, engine.generate(*asks), strict=True):
        early = _head(model, _norm(model)(streams[layer]) if has_norm else streams[layer])
        expected = mature.log_softmax(-1) - early.log_softmax(-1)
        for position, said in enumerate(output.prompt_logprobs[1:]):
            told = said[prompt[position + 1]].logprob
            assert told == pytest.approx(expected[position, prompt[position + 1]].item(), abs=2e-3), (layer, has_norm)


@torch.no_grad()
def _head(model: Any, stream: Tensor) -> Tensor:
    logits: Tensor = model.get_output_embeddings()(stream)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return cap * (logits / cap).tanh() if cap else logits


def _norm(model: Any) -> Any:
    """The final norm, by each family's own name."""
    if hasattr(model, "transformer"):
        return model.transformer.ln_f
    return model.gpt_neox.final_layer_norm if hasattr(model, "gpt_neox") else model.model.norm


def test_golden_cases(served: Served) -> None:
    """All cases of these models at once in one batch: prompt logits, tokens, step logits. Those of which there is a
    file as its community has it once more, with the vector out of that."""
    cases = [*goldens.cases(served.name), *goldens.others(served.name)] if served.name in GOLDEN else []
    if served.name in RANDOM:
        assert not cases
        return
    assert cases
    asks = [served.ask(case) for case in cases]
    for wild in wilds(served.name):
        cases.append(next(case for case in cases if case.name == wild.case))
        asks.append(served.ask(cases[-1], wild))
    for case, output in zip(cases, served.engine.generate(*asks), strict=True):
        prompt_rows = case.io["logits_f64"].log_softmax(-1)[-len(case.io["input_ids"]) :]
        for position, said in enumerate(output.prompt_logprobs[-len(prompt_rows) + 1 :]):
            for token, entry in said.items():
                assert entry.logprob == pytest.approx(prompt_rows[position, token].item(), abs=TOLERANCE), case.name
        last = case.io["logits_f64"][-1:]
        if "greedy_ids_f64" in case.io:
            assert list(output.outputs[0].token_ids) == case.io["greedy_ids_f64"].tolist(), case.name
        else:  # scored once: the last row is told of by the first token, and may be the only one that is edited
            assert (last - case.io["base_last_logits_f64"]).abs().max() > 100 * TOLERANCE, case.name
        steps = case.io.get("step_logits_f64", last).log_softmax(-1)
        for step, said in zip(steps, output.outputs[0].logprobs, strict=True):
            for token, entry in said.items():
                assert entry.logprob == pytest.approx(step[token].item(), abs=TOLERANCE), case.name


def test_the_self_test_tries_everything_and_finds_it_good(served: Served) -> None:
    async def findings() -> list[Finding]:
        return [finding async for finding in self_test(served.engine.engine, [])]

    found = served.engine.run(findings())
    assert all(finding.is_good for finding in found), found
    tried = {finding.what.split(" of ")[0] for finding in found}
    assert tried >= {place[0] for place in served.engine.facts["sites"]}
    assert ("attention" in tried) == (served.name != "gpt_neox")
    assert ("experts" in tried) == (served.name == "mixtral_a")
