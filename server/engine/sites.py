"""Installing the sites: vLLM's decoder blocks and attention output projections learn to edit what passes through them.

A module is changed by giving the instance a subclass of its own class under the same name, so that vLLM's interface
checks, its weight loading and torch.compile see the module they expect. The edit itself is one opaque operator that
reads persistent buffers; it is traced into compiled graphs and captured into CUDA graphs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.utils import PPMissingLayer

from whipstaff.cuda_ext import diag_edit_
from whipstaff.steering.artifacts import Vector
from whipstaff.steering.sites import DecoderLayer, find_layers
from whipstaff.steering.slots import SiteSpec, SlotTables


def install_sites(
    model: nn.Module,
    hidden_size: int,
    num_slots: int,
    slots: Tensor,
    vector_of: Callable[[str], Vector],
) -> SlotTables:
    """Hook every site of `model` to freshly made tables.

    Args:
        slots: (max_tokens,) int32, the slot of every token of the current step.
        vector_of: finds a loaded vector by digest.
    """
    layers = find_layers(
        model,
        is_attention=lambda module: isinstance(module, Attention),
        is_projection=lambda module: isinstance(_bare(module), RowParallelLinear),
        is_missing=lambda module: isinstance(module, PPMissingLayer),
    )
    tables = SlotTables(
        [spec for layer in layers for spec in _specs(layer, hidden_size)], num_slots, slots.device, vector_of
    )
    for layer in layers:
        _adopt(layer.block, _edit_output, tables.at("resid_post", layer.index), slots)
        _adopt(layer.output_projection, _edit_input, tables.at("attn_head", layer.index), slots)
    return tables


def _specs(layer: DecoderLayer, hidden_size: int) -> list[SiteSpec]:
    """Where this process's tables for one block begin and end: heads are sharded with the projection's input."""
    projection: Any = _bare(layer.output_projection)
    width = int(projection.input_size_per_partition)
    ranks = get_tensor_model_parallel_world_size()
    first = get_tensor_model_parallel_rank() * width
    return [
        SiteSpec("resid_post", layer.index, hidden_size, 0, hidden_size),
        SiteSpec("attn_head", layer.index, width * ranks, first, width),
    ]


def _bare(module: nn.Module) -> Any:
    """The linear layer itself, where vLLM has wrapped it for LoRA; edits come before the wrapper, so before both."""
    return getattr(module, "base_layer", module)


def _adopt(module: nn.Module, editing: Callable[[type], type], tables: tuple[Tensor, Tensor], slots: Tensor) -> None:
    cls = type(module)
    subclass = editing(cls)
    subclass.__name__, subclass.__qualname__, subclass.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    module.register_buffer("whipstaff_mul", tables[0], persistent=False)
    module.register_buffer("whipstaff_add", tables[1], persistent=False)
    module.register_buffer("whipstaff_slots", slots, persistent=False)
    module.__class__ = subclass


def _edit_output(cls: Any) -> type:
    """A decoder block whose output, the residual stream, is edited.

    vLLM's blocks return either the stream itself or (hidden, residual), whose sum is the stream.
    """

    class EditedBlock(cls):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = cls.forward(self, *args, **kwargs)
            if isinstance(output, torch.Tensor):
                diag_edit_(_rows(output), self.whipstaff_mul, self.whipstaff_add, self.whipstaff_slots)
            else:
                hidden, residual = output
                diag_edit_(hidden, self.whipstaff_mul, self.whipstaff_add, self.whipstaff_slots, residual=residual)
            return output

    return EditedBlock


def _edit_input(cls: Any) -> type:
    """An attention output projection whose input, the concatenated head outputs, is edited."""

    class EditedProjection(cls):
        def forward(self, heads: Tensor, *args: Any, **kwargs: Any) -> Any:
            diag_edit_(_rows(heads), self.whipstaff_mul, self.whipstaff_add, self.whipstaff_slots)
            return cls.forward(self, heads, *args, **kwargs)

    return EditedProjection


def _rows(x: Tensor) -> Tensor:
    """(T, width), sharing memory: models that vLLM runs through transformers' own code put a batch of one in front."""
    return x if x.dim() == 2 else x.view(-1, x.shape[-1])
