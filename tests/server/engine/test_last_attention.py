"""The last layer's attention, hidden states and room for them, below an engine: what is kept, found and refused."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, _get_attn_isa

from whipstaff.decoding.plan import DecodingPlan
from whipstaff.server.engine import UnsupportedEngine
from whipstaff.server.engine.layout import Layout
from whipstaff.server.engine.scheduler.scheduler import Slots
from whipstaff.server.engine.worker.attention_rows import attention_of, why_inexact
from whipstaff.server.engine.worker.batch import BatchView
from whipstaff.server.engine.worker.kv_cache import CacheLayout
from whipstaff.server.engine.worker.logits import last_attention
from whipstaff.server.engine.worker.logits.hidden_histories import HiddenHistories
from whipstaff.server.engine.worker.logits.last_attention import LastAttention
from whipstaff.server.plan import PositionedPlan, RequestPlan
from whipstaff.steering.shape import ModelShape

BLOCK, HEADS, KV_HEADS, SIZE, NAME = 32, 4, 2, 32, "model.layers.1.self_attn.attn"
CPU = torch.device("cpu")


class FakeImpl(CPUAttentionBackendImpl):
    """vLLM's, without what its own making asks of a running engine, and without its kernel."""

    def __init__(self) -> None:
        self.attn_type, self.kv_cache_dtype, self.scale = AttentionType.DECODER, "auto", 0.2

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return None


def attention(num_blocks: int = 9, dtype: torch.dtype = torch.float32, **own: Any) -> Any:
    """What a layer's attention shows of itself."""
    shown: dict[str, Any] = {
        "impl": FakeImpl(),
        "attn_backend": CPUAttentionBackend,
        "isa": _get_attn_isa(dtype, BLOCK, SIZE),
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_size": SIZE,
        "head_size_v": SIZE,
        "kv_cache": torch.zeros(num_blocks, KV_HEADS, BLOCK, 2 * SIZE, dtype=dtype),
        "_k_scale_float": 1.0,
        "_v_scale_float": 1.0,
        "layer_name": NAME,
        "sliding_window": None,
        "kv_cache_torch_dtype": dtype,
        "has_sink": False,
        "use_mm_prefix": False,
    }
    return SimpleNamespace(**shown | own)


class Bench:
    """Keys of two requests in scattered blocks, and the queries of a step in which both take part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, is_tiled: bool = False) -> None:
        random = torch.Generator().manual_seed(0)
        self.layer = attention()
        self.table = torch.tensor([[4, 2, 0], [1, 7, 5]], dtype=torch.int32)
        group = SimpleNamespace(layer_names=[NAME])
        runner = SimpleNamespace(
            vllm_config=SimpleNamespace(model_config=SimpleNamespace(max_model_len=96, dtype=torch.float32)),
            kv_cache_config=SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=["other"]), group]),
            device=CPU,
        )
        monkeypatch.setattr(last_attention, "attention_of", lambda *_: self.layer)
        monkeypatch.setattr(last_attention, "get_tensor_model_parallel_world_size", lambda: 1)
        other = torch.zeros(2, 6, dtype=torch.int32), 16
        self.attention = LastAttention(nn.Module(), runner, 64, lambda runner: [other, (self.table, BLOCK)])
        self.attention.learn_layout()
        if is_tiled:
            self.attention._keys = None
        self.keys = torch.randn(2, 80, KV_HEADS, SIZE, generator=random)
        for row, keys in enumerate(self.keys):
            slots = (self.table[row].long()[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:80]
            self.layer.impl.do_kv_cache_update(self.layer, keys, keys, self.layer.kv_cache, slots)
        self.queries = torch.randn(30, HEADS, SIZE, generator=random)

    def expected(self, query: Tensor, row: int, length: int) -> Tensor:
        wide = self.keys[row, :length].repeat_interleave(HEADS // KV_HEADS, 1)
        return (torch.einsum("hd,lhd->hl", query, wide) * 0.2).softmax(1).amax(0)


@pytest.mark.parametrize("is_tiled", [False, True])
def test_rows_are_those_of_a_softmax_over_all_keys(monkeypatch: pytest.MonkeyPatch, is_tiled: bool) -> None:
    """Of a chunk of a prompt and a token that was generated; in any order of rows; as strides say, and gathered."""
    bench = Bench(monkeypatch, is_tiled)
    bench.layer.impl.forward(bench.layer, bench.queries, None, None, None, None)
    view = BatchView([None, None], np.array([0, 25, 26]), np.array([20, 70]), ["a", "b"])
    found = bench.attention.rows(view, [1, 0])
    assert found.shape == (2, 71) and found.dtype == torch.float32
    torch.testing.assert_close(found[0], bench.expected(bench.queries[25], 1, 71), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[1, :45], bench.expected(bench.queries[24], 0, 45), atol=1e-6, rtol=1e-5)
    assert not found[1, 45:].any()


def test_what_is_tried_leaves_the_steps_queries_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.layer.impl.forward(bench.layer, bench.queries[:2], None, None, None, None)
    view = BatchView([None, None], np.array([0, 1, 2]), np.array([40, 70]), ["a", "b"])
    before = bench.attention.rows(view, [0, 1])
    with bench.attention.trying():
        bench.layer.impl.forward(bench.layer, bench.queries[5:6], None, None, None, None)
    tried = bench.attention.of_tried([1], np.array([71]))
    torch.testing.assert_close(tried[0], bench.expected(bench.queries[5], 1, 72), atol=1e-6, rtol=1e-5)
    assert torch.equal(bench.attention.rows(view, [0, 1]), before)
    with pytest.raises(AssertionError, match="no token was tried"):
        bench.attention.of_tried([1], np.array([71]))


def test_a_hook_that_does_not_fire_sees_everything_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is how the self-test notices it; what an earlier step left cannot be taken for this one's."""
    bench = Bench(monkeypatch)
    bench.layer.impl.forward(bench.layer, bench.queries, None, None, None, None)
    bench.attention.begin_step(2, is_asked=True)
    view = BatchView([None], np.array([0, 1]), np.array([40]), ["a"])
    torch.testing.assert_close(bench.attention.rows(view, [0]), torch.full((1, 41), 1 / 41))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0)])
def test_strides_say_where_keys_lie(order: tuple[int, int, int]) -> None:
    """In caches that are themselves views; tiles are no strides."""
    sizes = BLOCK, KV_HEADS, SIZE
    at = torch.arange(BLOCK * KV_HEADS * SIZE).view([sizes[axis] for axis in order])
    keys = at.permute([order.index(axis) for axis in range(3)])
    layout = CacheLayout(BLOCK, keys, keys + keys.numel())
    cache = torch.randn(6, KV_HEADS, 3 * BLOCK, 2 * SIZE)[:, :, :BLOCK]
    view = layout.key_view(cache)
    assert view is not None and view.data_ptr() == cache.data_ptr()
    blocks = torch.tensor([3, 1])
    assert torch.equal(view[blocks], layout.keys_of(cache, blocks))
    tiles = keys.flatten()[torch.randperm(keys.numel(), generator=torch.Generator().manual_seed(0))].view(keys.shape)
    assert CacheLayout(BLOCK, tiles, keys).key_view(cache) is None


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"sliding_window": 64}, "it sees 64 tokens only; serve with --max-model-len up to that"),
        ({"has_sink": True}, "attention sinks"),
        ({"kv_cache_torch_dtype": torch.bfloat16}, "its keys are torch.bfloat16 and its queries torch.float32"),
    ],
)
def test_what_cannot_be_read_exactly_is_refused(own: dict[str, Any], reason: str) -> None:
    assert why_inexact(attention(sliding_window=96), 96, torch.float32) == ""
    assert reason in why_inexact(attention(**{"sliding_window": 96} | own), 96, torch.float32)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(UnsupportedEngine, match="--attention-rows: Linear shows no attention"):
        attention_of(nn.Linear(2, 2), None, 8, torch.float32, "--attention-rows")


def test_hidden_states_stand_where_their_positions_are() -> None:
    """A prompt in two chunks, the second beside another request; of length 1, as views."""
    histories, hidden = HiddenHistories(2, 16, 8, 3, torch.float32, CPU), torch.randn(8, 3)
    first, second = histories.add(), histories.add()
    histories.keep(hidden[:5])
    histories.note(BatchView([None], np.array([0, 5]), np.array([0]), ["a"]), [(0, first)])
    histories.keep(-hidden)
    histories.note(
        BatchView([None] * 3, np.array([0, 2, 4, 7]), np.array([0, 5, 9]), ["b", "a", "c"]), [(1, first), (0, second)]
    )
    own, other = histories.of([first, second], np.array([7, 2]))
    unit = torch.nn.functional.normalize(hidden, dim=1)
    torch.testing.assert_close(own, torch.cat([unit[:5], -unit[2:4]]))
    torch.testing.assert_close(other, -unit[:2])
    histories.remove(first)
    assert histories.add() == first
    with pytest.raises(IndexError):
        histories.add()


def test_hidden_states_are_slots_that_requests_wait_for() -> None:
    shape = ModelShape(architecture="x", hidden_size=8, num_layers=2, num_heads=2, head_dim=4, num_kv_heads=2)
    slots = Slots(Layout(version="0", num_slots=4, shape=shape, num_hidden_states=2))
    keeping = PositionedPlan(RequestPlan(decoding=DecodingPlan(keeps_hidden=True)), 5)
    plain = PositionedPlan(RequestPlan(decoding=DecodingPlan()), 5)
    assert keeping.needs_slots and not plain.needs_slots
    assert slots.take([keeping]) and slots.take([keeping]) and not slots.take([keeping])
    slots.free(keeping)
    assert slots.take([keeping]) and not slots.take([keeping])
