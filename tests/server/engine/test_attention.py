"""Edits inside attention: the goldens, and token for token against transformers under all that a batch can suffer."""

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import goldens
import pytest
import torch
from modes import a_core_for_each_rank
from reference import attended
from reference.attended import Bias, Override, Prefix, Side
from safetensors.torch import load_file, save
from stepping import SteppingEngine, steps
from torch import Tensor, nn
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, _get_attn_isa

from whipstaff.server.engine import UnsupportedEngine
from whipstaff.server.engine.config import require_eager_attention
from whipstaff.server.engine.worker.kv_cache import CacheLayout
from whipstaff.steering.kinds.attention import ScoreBias
from whipstaff.steering.methods.attention import Pasta, PastaParams, outside

TOLERANCE = 2e-4  # log-probabilities, float32 engine against float64 references (goldens' README)
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "compiled": ("llama_a", {}),
    "two ranks": ("llama_a", {"enforce_eager": True, "tensor_parallel_size": 2}),
    "window and soft cap": (
        "gemma2_a",
        {"enforce_eager": True, "hf_overrides": {"sliding_window": 40}, "num_gpu_blocks_override": 18},
    ),
}
NUM_TOKENS = 36
PLACEHOLDERS = 5


@dataclass
class Bench:
    model: str
    engine: SteppingEngine
    reference: nn.Module


KNOWN: dict[str, tuple[list[int], Tensor]] = {}  # references, by model and request: most modes serve the same model


@pytest.fixture(scope="module", params=MODES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    name, flags = MODES[request.param]
    path = str(goldens.ROOT / "models" / name)
    with a_core_for_each_rank() if "tensor_parallel_size" in flags else nullcontext():
        engine = SteppingEngine(
            path,
            max_num_batched_tokens=48,
            max_num_seqs=8,
            enable_prefix_caching=True,
            disable_log_stats=False,
            **{"num_gpu_blocks_override": 10} | flags,
        )
    try:
        yield Bench(name, engine, attended.load(path, **flags.get("hf_overrides", {})))
    finally:
        engine.close()


@pytest.mark.engine
@pytest.mark.parametrize("bench", [mode for mode in MODES if MODES[mode][0] == "llama_a"], indirect=True)
def test_golden_cases(bench: Bench) -> None:
    """All five and a plain request in one batch."""
    engine, asks, cases = bench.engine, [], []
    for name in ("attn_override", "pasta_exclude", "adaption_prompt", "aligner", "prefix_kv"):
        folder = goldens.ROOT / "cases" / f"{name}_llama"
        said, params, case = (
            json.loads((folder / "case.json").read_text()),
            load_file(folder / "params.safetensors"),
            load_file(folder / "io.safetensors"),
        )
        prompt = case["input_ids"].tolist()
        asked: list[list[Any]] = []
        if name == "attn_override":
            for number, edit in enumerate(said["edits"]):
                engine.rpc("add_override", f"{name}{number}", *(edit[k] for k in ("layer", "head", "keys", "weights")))
                asked.append([f"{name}{number}", len(prompt) - 1, len(prompt)])
        elif name == "pasta_exclude":
            own = {field: said[field] for field in ("heads", "spans", "alpha", "scale_position")}
            asked = _pasta(engine, name, PastaParams(**own), len(prompt))
        elif name == "prefix_kv":
            rows = params["prompt_embeddings"]
            engine.rpc("add_prefix", name, save({"rows": rows.view(len(rows), 8, 2, 32)}))
            asked, prompt = [[name, 0, None]], [0] * len(rows) + prompt
        else:
            engine.rpc("add_side", name, save(_side_tensors(name, params)))
            asked = [[name, 0, None]]
        asks.append((prompt, {"attention": asked}, 16, name))
        cases.append(case)
    *edited, plain = engine.generate(*asks, (cases[0]["input_ids"].tolist(), None, 1, "plain"))
    for case, output in zip(cases, edited, strict=True):
        assert list(output.outputs[0].token_ids) == case["greedy_ids_f64"].tolist()
        _assert_close(steps(output), case["step_logits_f64"])
    _assert_close(steps(plain), cases[0]["base_last_logits_f64"][None])


def _pasta(engine: SteppingEngine, name: str, params: PastaParams, prompt_len: int) -> list[list[Any]]:
    """What it comes to for a prompt of that length, given to the engine; what a request asks for."""
    asked: list[list[Any]] = []
    for number, bias in enumerate(Pasta().attention_edits(params, {}, prompt_len)):
        assert isinstance(bias, ScoreBias)
        engine.rpc("add_bias", f"{name}{number}", bias.layer, list(bias.heads), list(bias.spans))
        asked.append([f"{name}{number}", 0, None])
    return asked


HIGHLIGHTED: dict[str, tuple[list[tuple[int, int | None]], list[range]]] = {  # as requests say it, and of 20 tokens
    "one": ([(5, 9)], [range(5, 9)]),
    "apart": ([(2, 5), (-3, None)], [range(2, 5), range(17, 20)]),
    "over each other": ([(4, 9), (2, 6), (5, 12)], [range(4, 9), range(2, 6), range(5, 12)]),
}


@pytest.mark.engine
@pytest.mark.parametrize("bench", ["compiled"], indirect=True)
def test_pasta_counts_every_span(bench: Bench) -> None:
    """As the release's loop over spans does: of k, a key inside one is weakened k - 1 times, one outside all k times;
    the other way round where the factor is for what is inside."""
    prompt, heads = (
        load_file(goldens.ROOT / "cases" / "pasta_exclude_llama" / "io.safetensors")["input_ids"].tolist(),
        [0, 3],
    )
    asks, expected = [], []
    for name, (spans, keys) in HIGHLIGHTED.items():
        for position in ("exclude", "include"):
            params = PastaParams(heads={1: heads}, spans=spans, alpha=0.2, scale_position=position)
            asked = _pasta(bench.engine, f"{name} {position}", params, len(prompt))
            asks.append((prompt, {"attention": asked}, 8, f"{name} {position}"))
            counts = [sum((key in span) == (position == "include") for span in keys) for key in range(len(prompt))]
            amounts = [(key, key + 1, count * math.log(0.2)) for key, count in enumerate(counts)]
            expected.append(attended.greedy(bench.reference, prompt, 8, [(Bias(1, heads, amounts), 0, None)]))
    for output, (tokens, rows) in zip(bench.engine.generate(*asks), expected, strict=True):
        assert list(output.outputs[0].token_ids) == tokens
        _assert_close(steps(output), rows)
    assert all((one - other).abs().max() > 100 * TOLERANCE for (_, one), (_, other) in combinations(expected, 2))


def _side_tensors(name: str, params: dict[str, Tensor]) -> dict[str, Tensor]:
    if name == "aligner":
        rows = {f"{layer}.rows": params["tokens"].clone() for layer in range(4)}
        return rows | {f"{layer}.gate": params["gates"][layer].clone() for layer in range(4)}
    rows = {f"{layer}.rows": params[f"layer{layer}.adaption_prompt"] for layer in (2, 3)}
    return rows | {f"{layer}.gate": params[f"layer{layer}.gate"] for layer in (2, 3)}


def _assert_close(said: list[dict[int, float]], logits: Tensor) -> None:
    """That what was said of each step agrees with (steps, V) logits or log-probabilities."""
    for step, row in zip(said, logits.log_softmax(-1), strict=True):
        for token, logprob in step.items():
            assert logprob == pytest.approx(row[token].item(), abs=TOLERANCE)


@pytest.mark.engine
def test_under_pressure(bench: Bench) -> None:
    """Chunked prefills and preemption, and prefixes that come from the cache."""
    generator = torch.Generator().manual_seed(11)
    edits = _edits(generator, bench.engine, 96 if bench.model == "gemma2_a" else 128)
    common = torch.randint(3, 320, (64,), generator=generator).tolist()
    requests = []
    for number in range(18):
        own = torch.randint(3, 320, (6 + 5 * (number % 9),), generator=generator).tolist()
        prompt = common[: (0, 40, 64)[number % 3]] + own
        which = ("", "bias", "override", "side", "prefix", "bias override side prefix")[number % 6].split()
        if "prefix" in which:
            prompt = [0] * PLACEHOLDERS + prompt
        last = len(prompt) - 1
        where = {
            "bias": (0, None),
            "override": (last, last + 1),
            "side": (last if number % 2 else 0, None),
            "prefix": (0, PLACEHOLDERS),
        }
        requests.append((prompt, [(name, *where[kind]) for kind in which for name in edits if name.startswith(kind)]))
    expected = []
    for prompt, asked in requests:
        key = repr((bench.model, prompt, asked))
        if key not in KNOWN:
            said: attended.Asked = [(edits[name], first, end) for name, first, end in asked]
            KNOWN[key] = attended.greedy(bench.reference, prompt, NUM_TOKENS, said)
            plain = attended.greedy(bench.reference, prompt, 1, [])[1][0]
            assert not asked or (KNOWN[key][1][0] - plain).abs().max() > 100 * TOLERANCE
        expected.append(KNOWN[key])
    asks = [(prompt, {"attention": asked}, NUM_TOKENS, repr(asked)) for prompt, asked in requests]
    outputs = bench.engine.generate(*asks)
    for ask, known in zip(asks[-6:], expected[-6:], strict=True):
        for _ in range(2):  # alone, then from the cache
            outputs += bench.engine.generate(ask)
            expected.append(known)
    for output, (tokens, rows) in zip(outputs, expected, strict=True):
        assert list(output.outputs[0].token_ids) == tokens
        _assert_close(steps(output), rows)
    seen = bench.engine.metrics()
    assert seen["vllm:num_preemptions"] > 0
    assert seen["vllm:prefix_cache_hits"] > 0


def _edits(
    generator: torch.Generator, engine: SteppingEngine, hidden_size: int
) -> dict[str, Bias | Override | Side | Prefix]:
    """Some of every kind, given to the engine: biases that meet on one head, overrides of every kv group."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    made: dict[str, Bias | Override | Side | Prefix] = {
        "bias 1": Bias(1, [0, 3], [(0, 4, -3.0), (2, 9, 2.0), (9, 70, -1.0)]),
        "bias 2": Bias(1, [3], [(3, 12, 2.5)]),
        "bias 3": Bias(2, [1, 2], [(0, 200, -4.0), (8, 30, 4.0)]),
        "override 1": Override(1, 2, [6, 3, 1], [0.5, 0.3, 0.2]),  # no key is out of a window
        "override 2": Override(3, 1, [2], [1.5]),
        "side": Side(
            {layer: draw(3, hidden_size) for layer in (1, 3)}, {layer: draw(4, scale=0.7) for layer in (1, 3)}
        ),
        "prefix": Prefix(draw(PLACEHOLDERS, 8, 2, 32, scale=0.7)),
    }
    for name, edit in made.items():
        if isinstance(edit, Bias):
            engine.rpc("add_bias", name, edit.layer, edit.heads, edit.spans)
        elif isinstance(edit, Override):
            engine.rpc("add_override", name, edit.layer, edit.head, edit.keys, edit.weights)
        elif isinstance(edit, Side):
            tensors = {f"{layer}.rows": rows for layer, rows in edit.rows.items()}
            engine.rpc("add_side", name, save(tensors | {f"{k}.gate": gate for k, gate in edit.gates.items()}))
        else:
            engine.rpc("add_prefix", name, save({"rows": edit.rows}))
    return made


def test_outside_of_a_span() -> None:
    assert outside((5, 9), 20) == [(0, 5), (9, 20)]
    assert outside((0, 3), 14) == [(3, 14)]
    assert outside((12, 14), 14) == [(0, 12)]
    assert outside((0, 99), 4) == []
    assert outside((8, 12), 4) == [(0, 4)]


def test_graphs_are_split_at_attention() -> None:
    config = CompilationConfig(splitting_ops=["vllm::unified_attention_with_output", "vllm::unified_kv_cache_update"])
    config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    require_eager_attention(config)
    assert config.cudagraph_mode == CUDAGraphMode.PIECEWISE
    config.splitting_ops = ["vllm::unified_attention_with_output"]
    with pytest.raises(UnsupportedEngine, match="split at attention"):
        require_eager_attention(config)
    config.cudagraph_mode = CUDAGraphMode.NONE
    require_eager_attention(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("head_size", "block_size"), [(32, 32), (64, 96), (80, 32)])
def test_layouts_are_learned(dtype: torch.dtype, head_size: int, block_size: int) -> None:
    """What vLLM's own kernel wrote is what is read, whatever form this processor keeps keys in."""
    attention: Any = SimpleNamespace(
        impl=object.__new__(CPUAttentionBackendImpl),
        attn_backend=CPUAttentionBackend,
        isa=_get_attn_isa(dtype, block_size, head_size),
        num_kv_heads=2,
        head_size=head_size,
        head_size_v=head_size,
        kv_cache=torch.zeros(5, 2, block_size, 2 * head_size, dtype=dtype),
        _k_scale_float=1.0,
        _v_scale_float=1.0,
    )
    attention.impl.attn_type, attention.impl.kv_cache_dtype = AttentionType.DECODER, "auto"
    layout = CacheLayout.learn(attention, "layer 0")
    assert layout.block_size == block_size
    key, value = torch.randn(2, block_size + 7, 2, head_size).to(dtype)
    slots = torch.cat([torch.arange(block_size) + 3 * block_size, torch.arange(7) + block_size])  # blocks 3 and 1
    attention.impl.do_kv_cache_update(attention, key, value, attention.kv_cache, slots)
    for where, written in ((layout.keys, key), (layout.values, value)):
        read = layout.read(attention.kv_cache, torch.tensor([3, 1]), where, [1, 0])
        assert torch.equal(read[: block_size + 7], written.flip(1).float())


def test_a_layout_that_is_not_understood_is_refused() -> None:
    class Forgetful:
        def do_kv_cache_update(self, *args: Any) -> None:
            pass

    attention: Any = SimpleNamespace(
        impl=Forgetful(), attn_backend=CPUAttentionBackend, num_kv_heads=2, head_size=8, head_size_v=8,
        kv_cache=torch.zeros(5, 2, 32, 16),
    )  # fmt: skip
    with pytest.raises(UnsupportedEngine, match="layer 7: CPU_ATTN keeps keys or values in a form unknown"):
        CacheLayout.learn(attention, "layer 7")
    attention.kv_cache = torch.zeros(5, 2, 33, 15)
    with pytest.raises(UnsupportedEngine, match="cannot be read"):
        CacheLayout.learn(attention, "layer 7")
