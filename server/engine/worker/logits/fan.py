"""Several tokens tried at one place of each sequence, in one forward pass.

They would write their keys and values over one another. So each layer's attention takes them in turns, one token of
each sequence a turn: their keys and values go where the last turn's were, and they look at what was before them and at
themselves. All else of the model, which is nearly all of its work, sees the tokens of all turns at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from whipstaff.server.engine.patch import swap


class Fan:
    """Of one model. It lies over what else watches or changes attention, which sees a turn at a time."""

    def __init__(self, model: nn.Module) -> None:
        self.num_turns = 1
        layers = [module for module in model.modules() if isinstance(module, AttentionLayerBase)]
        self.can_turn = all(map(_can_turn, layers))
        for layer in layers if self.can_turn else ():
            swap(layer.impl, _fanned(type(layer.impl), self))

    @contextmanager
    def turns(self, num: int) -> Iterator[None]:
        """A forward pass over so many times the tokens that its attention metadata is of, turn by turn."""
        assert num == 1 or self.can_turn
        self.num_turns = num
        try:
            yield
        finally:
            self.num_turns = 1


def _can_turn(layer: Any) -> bool:
    """Whether a layer keeps keys and values, of its own, and of tokens that each look at their own sequence alone."""
    return isinstance(layer, Attention) and layer.kv_sharing_target_layer_name is None


def _fanned(cls: Any, fan: Fan) -> type:
    """The class that is laid over that of an attention backend's implementation; see `last_attention`."""

    class FannedAttention(cls):
        def do_kv_cache_update(self, owner: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
            if fan.num_turns == 1:
                cls.do_kv_cache_update(self, owner, key, value, cache, slots)
            else:
                self.slots_of_turns = slots

        def forward(
            self,
            owner: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            cache: Tensor,
            metadata: Any,
            output: Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> Tensor:
            if fan.num_turns == 1:
                done: Tensor = cls.forward(self, owner, query, key, value, cache, metadata, output, *args, **kwargs)
                return done
            parts = (one.chunk(fan.num_turns) for one in (query, key, value, output))
            for one_query, one_key, one_value, one_output in zip(*parts, strict=True):
                if not owner.attn_backend.forward_includes_kv_cache_update:
                    cls.do_kv_cache_update(self, owner, one_key, one_value, cache, self.slots_of_turns)
                cls.forward(self, owner, one_query, one_key, one_value, cache, metadata, one_output, *args, **kwargs)
            return output

    return FannedAttention
