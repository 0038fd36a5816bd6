"""Installing the sites: vLLM's decoder blocks and their parts, and what embeds tokens, learn to edit what passes
through them.

A module is changed by giving the instance a subclass of its own class under the same name, so that vLLM's interface
checks, its weight loading and torch.compile see the module they expect. The edit itself is one opaque operator that
reads persistent buffers; it is traced into compiled graphs and captured into CUDA graphs. Where the buffers are is
bound once for each hook point: a graph takes one table of addresses in, and a call two or three tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import PPMissingLayer

from whipstaff.cuda_ext import BOUND_WORDS, bind_edits_, put_rows_, run_bound_edits_
from whipstaff.server.engine import UnsupportedEngine
from whipstaff.server.engine.layout import Layout
from whipstaff.server.engine.patch import swap
from whipstaff.server.engine.worker.edits.captures import Arena, arenas_of
from whipstaff.server.engine.worker.edits.soft_prompts import NoSoftRows, SoftRows
from whipstaff.server.engine.worker.edits.token_table import TokenTable
from whipstaff.steering.method import HookPoint
from whipstaff.steering.shape import ModelShape, Site
from whipstaff.steering.sites import CORE, DecoderLayer, Kinds, find_layers
from whipstaff.steering.tables import SiteSpec, SiteTables, Tables
from whipstaff.steering.vector_file import Vector

KINDS = Kinds(
    is_attention=lambda module: isinstance(module, Attention | MLAAttention),
    is_mixer=lambda module: isinstance(module, AttentionLayerBase),  # by which vLLM knows whatever has a cache
    is_projection=lambda module: isinstance(_bare(module), RowParallelLinear),
    is_linear=lambda module: isinstance(_bare(module), LinearBase),
    is_missing=lambda module: isinstance(module, PPMissingLayer),
)


class Sites(NamedTuple):
    """What the sites of a model read and write."""

    tables: Tables
    meters: Tensor  # (hook points, 2): sum of lengths and number of rows measured, in the tables' order
    arenas: Sequence[Arena] = ()  # where captured activations are, one for each width


def install_sites(
    model: nn.Module,
    layout: Layout,
    token_table: TokenTable,
    history: Tensor,
    vector_of: Callable[[str], Vector],
    dtype: torch.dtype,
) -> Sites:
    """Hook the sites of `model` that the layout asks for to freshly made tables, in all layers that have them.

    Args:
        history: see `Histories.values`.
        vector_of: finds a loaded vector by digest.
        dtype: of the model's activations.

    Raises:
        UnsupportedEngine: naming a site that no layer of this model shows.
    """
    hooks: dict[HookPoint, tuple[SiteSpec, nn.Module, Editing]] = {}
    for layer in find_layers(model, KINDS):
        found = _hook_points_of(layer, layout.shape)
        hooks |= {found[site][0].point: found[site] for site in layout.sites if site in found}
    for site in layout.sites:
        if site not in CORE and site not in {point.site for point in hooks}:
            raise UnsupportedEngine(f"--steering-sites {site}: no layer of {type(model).__name__} shows where that is")
    encoders = {HookPoint(site, layer): size for site, layer, size in layout.encoders}
    max_tokens, device = len(token_table.tokens), token_table.tokens.device
    captured = [spec for spec, _, _ in hooks.values() if spec.point.layer in layout.capture_layers]
    arenas = arenas_of(captured, max_tokens, dtype, device)
    kept = {point: arena.kept(point) for arena in arenas for point in arena.points}
    for point in map(HookPoint.entering, layout.early_layers):
        if point not in kept:
            kept[point] = torch.zeros(max_tokens, layout.shape.hidden_size, dtype=dtype, device=device)
    tables = Tables(
        [spec for spec, _, _ in hooks.values()],
        layout.num_slots,
        layout.shape.num_layers,
        device,
        vector_of,
        encoders,
        kept,
    )
    meters = torch.zeros(len(hooks), 2, device=device)
    bound = torch.zeros(len(hooks), BOUND_WORDS, dtype=torch.int64)  # all of whose addresses are those of `Sites`
    for index, (point, (_, module, editing)) in enumerate(hooks.items()):
        _bind(bound, index, tables.at(point), token_table, history, meters[index])
        swap(module, editing(type(module), index), whipstaff_bound=bound)
    return Sites(tables, meters, arenas)


def sites_shown(model: nn.Module, shape: ModelShape) -> dict[Site, list[int]]:
    """The layers in which each site is, of those that have any. Raises: SitesNotFound."""
    shown: dict[Site, list[int]] = {}
    for layer in find_layers(model, KINDS):
        for site in _hook_points_of(layer, shape):
            shown.setdefault(site, []).append(layer.index)
    return shown


def install_soft_rows(
    model: nn.Module, config: Any, max_tokens: int, device: torch.device, vector_of: Callable[[str], Vector]
) -> SoftRows | NoSoftRows:
    """Let the module that embeds the model's tokens override its output, where that can be.

    Args:
        config: of vLLM's model. Where prompts may hold embeddings or images, tokens are embedded outside of the step.
        vector_of: finds a loaded vector by digest.
    """
    hidden_size = int(config.get_hidden_size())
    module = input_embedding(model, device, hidden_size)
    if module is None or config.is_multimodal_model or config.enable_prompt_embeds:
        return NoSoftRows()
    soft = SoftRows(max_tokens, hidden_size, config.dtype, device, vector_of)
    module.register_buffer("whipstaff_soft_rows", soft.rows, persistent=False)
    module.register_buffer("whipstaff_soft_index", soft.index, persistent=False)
    swap(module, _edit_embedding(type(module)))
    return soft


def input_embedding(model: nn.Module, device: torch.device, hidden_size: int) -> nn.Module | None:
    """The module that turns token ids into the model's hidden states: the one that runs when the model embeds a token.

    An embedding that vLLM has wrapped for LoRA counts as its wrapper: learned rows are final.
    """
    seen: list[nn.Module] = []

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.shape == (1, hidden_size):
            seen.append(module)

    candidates = [module for module in model.modules() if _embeds(module)]
    hooks = [module.register_forward_hook(note) for module in candidates]
    try:
        model.embed_input_ids(torch.zeros(1, dtype=torch.long, device=device))  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
    return seen[-1] if seen and _is_whole(seen[-1]) else None  # wrappers run last


def _embeds(module: nn.Module) -> bool:
    bare = getattr(module, "base_layer", module)
    return isinstance(bare, VocabParallelEmbedding | nn.Embedding) and not isinstance(bare, ParallelLMHead)


def _is_whole(module: nn.Module) -> bool:
    """Whether every rank gets all of its output."""
    bare = getattr(module, "base_layer", module)
    return bool(getattr(bare, "reduce_results", True))


def _bind(
    bound: Tensor, index: int, tables: SiteTables, token_table: TokenTable, history: Tensor, meter: Tensor
) -> None:
    """Say what one hook point reads, for good."""
    encoders = tables.encoders
    bind_edits_(
        bound,
        index,
        tables.lines,
        tables.code,
        tables.args,
        token_table.tokens,
        token_table.gains,
        history,
        meter,
        encoders.weight if encoders else None,
        encoders.bias if encoders else None,
        tables.kept,
    )


Editing = Callable[[Any, int], type]  # the class of a module, and the number of its hook point


def _hook_points_of(layer: DecoderLayer, shape: ModelShape) -> dict[Site, tuple[SiteSpec, nn.Module, Editing]]:
    """Where in one block each site that it has is, how wide it is here, and which subclass edits it."""
    found: dict[Site, tuple[nn.Module, Editing]] = {"resid_post": (layer.block, _edit_stream)}
    if layer.index == 0:
        found["resid_pre"] = layer.block, _edit_input
    if layer.attention is not None:
        found["attn_in"] = layer.attention, _edit_input
    if layer.output_projection is not None:
        found["attn_out"] = layer.output_projection, _edit_output
    if layer.mlp_input is not None and layer.mlp_output is not None:
        found |= {"mlp_in": (layer.mlp_input, _edit_input), "mlp_out": (layer.mlp_output, _edit_output)}
    hook_points: dict[Site, tuple[SiteSpec, nn.Module, Editing]] = {
        site: (SiteSpec(HookPoint(site, layer.index), 0, shape.hidden_size), module, editing)
        for site, (module, editing) in found.items()
    }
    if layer.output_projection is not None and (heads := _heads(layer.index, layer.output_projection, shape)):
        hook_points["attn_head"] = heads, layer.output_projection, _edit_heads
    gates = [] if layer.mlp_input is None else _routers(layer.mlp_input, shape.num_experts)
    if len(gates) == 1:
        hook_points["router"] = SiteSpec(HookPoint("router", layer.index), 0, shape.num_experts), gates[0], _edit_output
    return hook_points


def _heads(layer: int, projection: nn.Module, shape: ModelShape) -> SiteSpec | None:
    """This rank's part of the head outputs; None where a layer has others than the model says."""
    width = int(_bare(projection).input_size_per_partition)  # heads are sharded with the projection's input
    if width * get_tensor_model_parallel_world_size() != shape.width("attn_head"):
        return None
    return SiteSpec(HookPoint("attn_head", layer), get_tensor_model_parallel_rank() * width, width)


def _routers(mlp: nn.Module, num_experts: int) -> list[nn.Module]:
    """The linear layers with an output for every expert, but for those inside of experts."""
    linear = [module for module in mlp.modules() if isinstance(_bare(module), LinearBase)]
    return [module for module in linear if num_experts and _bare(module).output_size == num_experts]


def _bare(module: nn.Module) -> Any:
    """The linear layer itself, where vLLM has wrapped it for LoRA; edits come before the wrapper, so before both."""
    return getattr(module, "base_layer", module)


def _edit_stream(cls: Any, site: int) -> type:
    """A decoder block whose output, the residual stream, is edited.

    vLLM's blocks return either the stream itself or (hidden, residual), whose sum is the stream.
    """

    class EditedBlock(cls):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = cls.forward(self, *args, **kwargs)
            x, residual = (output, None) if isinstance(output, torch.Tensor) else output[:2]
            run_bound_edits_(_rows(x), residual if residual is None else _rows(residual), self.whipstaff_bound, site)
            return output

    return EditedBlock


def _edit_heads(cls: Any, site: int) -> type:
    """An attention output projection whose input, the concatenated head outputs, is edited."""

    class EditedProjection(cls):
        def forward(self, heads: Tensor, *args: Any, **kwargs: Any) -> Any:
            run_bound_edits_(_rows(heads), None, self.whipstaff_bound, site)
            return cls.forward(self, heads, *args, **kwargs)

    return EditedProjection


def _edit_input(cls: Any, site: int) -> type:
    """A module whose hidden states are edited before it sees them; a copy, since others may read them too."""

    class EditedInput(cls):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if "hidden_states" in kwargs:
                hidden = kwargs["hidden_states"] = kwargs["hidden_states"].clone()
            else:
                index = next(
                    i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and arg.is_floating_point()
                )
                hidden = args[index].clone()
                args = (*args[:index], hidden, *args[index + 1 :])
            run_bound_edits_(_rows(hidden), None, self.whipstaff_bound, site)
            return cls.forward(self, *args, **kwargs)

    return EditedInput


def _edit_output(cls: Any, site: int) -> type:
    """A module whose output, or the first of its outputs, is edited."""

    class EditedOutput(cls):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = cls.forward(self, *args, **kwargs)
            x = output if isinstance(output, torch.Tensor) else output[0]
            run_bound_edits_(_rows(x), None, self.whipstaff_bound, site)
            return output

    return EditedOutput


def _edit_embedding(cls: Any) -> type:
    """A module that embeds tokens, in whose output learned rows take the place of some tokens' embeddings."""

    class EditedEmbedding(cls):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            embeddings: Tensor = cls.forward(self, *args, **kwargs)
            put_rows_(_rows(embeddings), self.whipstaff_soft_rows, self.whipstaff_soft_index)
            return embeddings

    return EditedEmbedding


def _rows(x: Tensor) -> Tensor:
    """(T, width), sharing memory: models that vLLM runs through transformers' own code put a batch of one in front."""
    return x if x.dim() == 2 else x.view(-1, x.shape[-1])
