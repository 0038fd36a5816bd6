"""Goldens of every way of being served, on Model Runner V2: programs, attention, inserted rows, experts."""

import goldens
import pytest
from engines import EngineUnderTest
from modes import v2_on_cpu

from whipstaff.steering import vector_file
from whipstaff.steering.needs import Hook

from .test_architectures import TOLERANCE, Served

CASES: dict[str, list[str]] = {
    "llama_a": [
        "composition",
        "angular_70",
        "sae_topk",
        "attn_override",
        "pasta",
        "aligner",
        "prefix_kv",
        "softprompt_insert",
    ],
    "mixtral_a": ["mote_pre", "mote_force"],
}
NUM_TOKENS = 4  # Triton's interpreter is slow

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("model", CASES)
def test_goldens_on_v2(model: str) -> None:
    found = [*goldens.cases(model), *goldens.others(model)]
    cases = [case for case in found if case.name.startswith(tuple(CASES[model]))]
    assert len(cases) == len(CASES[model])
    shape = goldens.shape_of(model)
    vectors = [
        vector_file.parse(vector_file.packed(piece.header(shape), piece.tensors))
        for case in cases
        for piece in case.pieces
        if piece.tensors
    ]
    sites: list[Hook] = ["router" if model == "mixtral_a" else "attention"]
    path = str(goldens.ROOT / "models" / model)
    with v2_on_cpu():
        engine = EngineUnderTest(
            path,
            sites=sites,
            vectors=vectors,
            num_slots=64,
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_num_seqs=16,
        )
        try:
            assert engine.facts["runner"] == "v2"
            served = Served(model, path, engine)
            asks = [served.ask(case) for case in cases]
            for ask in asks:
                ask.max_tokens, ask.sampling = NUM_TOKENS, {"logprobs": 5}
            outputs = engine.generate(*asks)
        finally:
            engine.close()
    for case, output in zip(cases, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == case.io["greedy_ids_f64"].tolist()[:NUM_TOKENS], case.name
        for said, row in zip(output.outputs[0].logprobs, case.io["step_logits_f64"].log_softmax(-1), strict=False):
            for token, entry in said.items():
                assert entry.logprob == pytest.approx(row[token].item(), abs=TOLERANCE), case.name
