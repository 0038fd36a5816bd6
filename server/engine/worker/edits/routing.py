"""Expert routing (MoTE): requests switch experts of a mixture-of-experts model off or force them on.

vLLM's router turns a token's logits into k experts and their weights; the edit sits behind it and before the expert
kernel, on logical expert ids (the expert-parallel load balancer renames them later). Four modes:

pre          an expert that is off is not selectable: the next best takes its place, as if its logit were -inf.
             Biased and grouped routers (DeepSeek-V3) lose it from the scores that select, and before groups are scored
zero         a selected expert that is off keeps its place with weight 0; nothing refills or rescales
zero_renorm  as zero, then the survivors are rescaled to the token's former weight sum
force        an expert that is on and was not selected takes the place of the weakest selected expert that is not on,
             with its own score as weight, and the token's weights are rescaled to their former sum

All of it is one opaque operator per layer that reads persistent buffers, `code[slot[token]]`; see `reroute_`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import direct_register_custom_op

from whipstaff.server.engine import UnsupportedEngine
from whipstaff.server.engine.patch import swap
from whipstaff.steering.kinds.router import ROUTER
from whipstaff.steering.plan import ModuleEdit
from whipstaff.steering.routing_scheme import FORCE, OFF, PRE, RENORM, ZERO, Routing, RoutingError, Scheme
from whipstaff.steering.vector_file import Vector

_ROUTERS = (CPURouter, CustomRoutingRouter, FusedTopKBiasRouter, FusedTopKRouter, GroupedTopKRouter)


class RoutingTables:
    """What every layer of experts does in every slot."""

    def __init__(self, schemes: Mapping[int, Scheme], num_slots: int, device: torch.device) -> None:
        self._schemes = dict(schemes)
        self._codes = {
            layer: torch.zeros(num_slots, scheme.num_experts, dtype=torch.int8, device=device)
            for layer, scheme in self._schemes.items()
        }
        self._written: set[int] = set()  # slots that may hold more than zeros

    @property
    def layers(self) -> list[int]:
        """0-based indices of the blocks that have routed experts."""
        return list(self._schemes)

    def num_experts(self, layer: int) -> int:
        return self._schemes[layer].num_experts

    def scheme(self, layer: int) -> Scheme:
        return self._schemes[layer]

    def code(self, layer: int) -> Tensor:
        """(num_slots, num_experts) int8, written in place and never replaced."""
        return self._codes[layer]

    def write(self, slot: int, edits: Iterable[tuple[int, Routing]]) -> None:
        """Make `slot` hold what each layer's router does; a layer may be named more than once, none clears the slot.

        Raises: RoutingError, with nothing written.
        """
        rows: dict[int, Tensor] = {}
        for layer, edit in edits:
            if layer not in self._schemes:
                raise RoutingError(f"layer {layer} has no routed experts; layers that have: {self.layers}")
            self._schemes[layer].check(edit)
            row = rows.setdefault(layer, torch.zeros(self.num_experts(layer), dtype=torch.int8))
            row[list(edit.off)] |= OFF.get(edit.mode, 0)
            row[list(edit.on)] |= FORCE
        if slot in self._written:
            for code in self._codes.values():
                code[slot] = 0
            self._written.remove(slot)
        for layer, row in rows.items():
            self._codes[layer][slot].copy_(row)
            self._written.add(slot)


def routing_of(edits: Iterable[ModuleEdit], vector_of: Callable[[str], Vector]) -> Iterator[tuple[int, Routing]]:
    """What entries of a request ask of the routers, for `RoutingTables.write`."""
    for edit in edits:
        yield from ROUTER.routing(vector_of(edit.digest), edit).items()


def install_routing(model: nn.Module, slots: Tensor, num_slots: int) -> RoutingTables:
    """Give every router of `model` an edit behind it.

    Args:
        slots: (>= max_tokens,) int32, each token's slot, -1 = leave alone; persistent, written by the caller.

    Raises:
        UnsupportedEngine: naming the layer whose routing cannot be reached.
    """
    runners = list(_runners(model))
    if not runners:
        raise UnsupportedEngine(f"{type(model).__name__} has no routed experts")
    tables = RoutingTables({layer: _scheme(layer, runner) for layer, runner in runners}, num_slots, slots.device)
    for layer, runner in runners:
        _adopt(runner.router, tables.scheme(layer), tables.code(layer), slots)
    return tables


def _runners(model: nn.Module) -> Iterable[tuple[int, Any]]:
    for module in model.modules():
        if isinstance(module, MoERunner):
            yield extract_layer_index(module.layer_name), module


def _scheme(layer: int, runner: Any) -> Scheme:
    router = runner.router
    if runner.is_monolithic:
        raise UnsupportedEngine(
            f"layer {layer}: its expert kernel ({type(runner.routed_experts.quant_method).__name__}) selects the "
            "experts itself, so routing cannot be edited; choose another with --moe-backend (triton, say)"
        )
    if not isinstance(router, _ROUTERS) or getattr(router, "num_fused_shared_experts", 0) > 0:
        raise UnsupportedEngine(f"layer {layer}: routing by {type(router).__name__} cannot be edited")
    by_scores = not (
        getattr(router, "custom_routing_function", None)
        or getattr(router, "_hash_indices_table", None) is not None
        or router.bias_vl is not None
    )
    num_experts = int(runner.moe_config.num_logical_experts)
    is_grouped = isinstance(router, GroupedTopKRouter) or getattr(router, "use_grouped_topk", False)
    groups = int(router.num_expert_group) if is_grouped else 1
    if num_experts % groups or num_experts == groups:  # vLLM's CUDA router falls back to plain top-k
        groups = 1
    return Scheme(
        num_experts=num_experts,
        top_k=int(router.top_k),
        scoring=router.scoring_func if by_scores else "",
        renormalize=bool(router.renormalize),
        num_groups=groups,
        top_groups=int(router.topk_group) if groups > 1 else 1,
        bias=getattr(router, "e_score_correction_bias", None) if by_scores else None,
    )


def _adopt(router: Any, scheme: Scheme, code: Tensor, slots: Tensor) -> None:
    cls: Any = type(router)

    class EditedRouter(cls):
        def _compute_routing(
            self, hidden_states: Tensor, router_logits: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            weights, ids = cls._compute_routing(self, hidden_states, router_logits, *args, **kwargs)
            torch.ops.vllm.whipstaff_reroute_(
                weights,
                ids,
                router_logits,
                self.whipstaff_code,
                self.whipstaff_slots,
                self.whipstaff_bias,
                scheme.scoring,
                scheme.renormalize,
                scheme.num_groups,
                scheme.top_groups,
            )
            return weights, ids

    assert isinstance(router, BaseRouter)
    swap(router, EditedRouter, whipstaff_code=code, whipstaff_slots=slots, whipstaff_bias=scheme.bias)


def reroute_(
    weights: Tensor,
    ids: Tensor,
    logits: Tensor,
    code: Tensor,
    slots: Tensor,
    bias: Tensor | None,
    scoring: str,
    renormalize: bool,
    num_groups: int,
    top_groups: int,
) -> None:
    """Apply code[slots[t]] to the routing of token t; tokens without a slot are left alone, bit for bit.

    weights, ids   (T, k) what the router chose, changed in place
    logits         (T, E) what it chose from
    code           (S, E) int8, bits PRE, ZERO, RENORM, FORCE
    slots          (>= T,) int32; outside [0, S) = leave alone
    """
    slots, how = slots[: weights.shape[0]], _How(scoring, renormalize, num_groups, top_groups, bias)
    (_reroute_asked_ if weights.device.type == "cpu" else _reroute_all_)(weights, ids, logits, code, slots, how)


def _reroute_asked_(weights: Tensor, ids: Tensor, logits: Tensor, code: Tensor, slots: Tensor, how: "_How") -> None:
    """On a CPU, where nothing is captured: only the tokens that have a slot are looked at."""
    rows = ((slots >= 0) & (slots < len(code))).nonzero().squeeze(1)
    if len(rows):
        new = _rerouted(weights[rows], ids[rows].long(), logits[rows], code[slots[rows].long()], how)
        weights[rows], ids[rows] = new[0].to(weights.dtype), new[1].to(ids.dtype)


def _reroute_all_(weights: Tensor, ids: Tensor, logits: Tensor, code: Tensor, slots: Tensor, how: "_How") -> None:
    """On a device: the same launches whoever asks, so that graphs can be captured."""
    asked = ((slots >= 0) & (slots < len(code))).unsqueeze(1)
    old_ids = ids.to(torch.int64)
    codes = code[slots.clamp(0, len(code) - 1).long()]
    new = _rerouted(weights, old_ids.clamp(min=0), logits, codes, how)  # vLLM marks padding by expert -1
    weights.copy_(torch.where(asked, new[0], weights))
    ids.copy_(torch.where(asked, new[1], old_ids))


class _How(NamedTuple):
    """What of a Scheme the operator needs."""

    scoring: str
    renormalize: bool
    num_groups: int
    top_groups: int
    bias: Tensor | None


def _rerouted(weights: Tensor, ids: Tensor, logits: Tensor, code: Tensor, how: _How) -> tuple[Tensor, Tensor]:
    """(T, k) float32 and (T, k) int64: the routing under (T, E) codes. A token whose codes are 0 keeps its own."""
    weights = weights.float()
    total = weights.sum(-1, keepdim=True)
    if how.scoring:
        off = (code & PRE) != 0
        scores = _scores(logits.float(), how.scoring)
        # What the model multiplies its scores by: 1 but for a scaling factor of its own (DeepSeek).
        factor = total if how.renormalize else total / scores.gather(1, ids).sum(-1, keepdim=True)
        scores = _scores(logits.float().masked_fill(off, float("-inf")), how.scoring)
        left = _select(scores, off, ids.shape[1], how)
        kept = scores.gather(1, left)
        kept = factor * (kept / kept.sum(-1, keepdim=True) if how.renormalize else kept)
        touched = off.any(-1, keepdim=True)
        weights, ids = torch.where(touched, kept, weights), torch.where(touched, left, ids)
        total = torch.where(touched, weights.sum(-1, keepdim=True), total)
        weights, ids = _force(weights, ids, total, factor * scores, (code & FORCE) != 0)
    selected = code.gather(1, ids)
    survivors = weights.masked_fill((selected & ZERO) != 0, 0.0)
    rest = survivors.sum(-1, keepdim=True)
    rescaled = survivors * (total / rest.where(rest != 0, torch.ones_like(rest)))
    return torch.where(((selected & RENORM) != 0).any(-1, keepdim=True), rescaled, survivors), ids


def _scores(logits: Tensor, scoring: str) -> Tensor:
    """(T, E) what a router weighs experts by; an expert whose logit is -inf gets 0."""
    if scoring == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if scoring == "sigmoid" else nn.functional.softplus(logits).sqrt()


def _select(scores: Tensor, off: Tensor, top_k: int, how: _How) -> Tensor:
    """(T, k) the experts with the highest (T, E) scores, bias added, among those not off, within the best groups.

    A group is as good as its best expert, or where a bias balances the load as its best two together (DeepSeek-V3).
    """
    choice = (scores if how.bias is None else scores + how.bias).masked_fill(off, float("-inf"))
    if how.num_groups > 1:
        grouped = choice.view(len(choice), how.num_groups, -1)
        merit = grouped.amax(-1) if how.bias is None else grouped.topk(2, dim=-1).values.sum(-1)
        is_good = torch.zeros_like(merit, dtype=torch.bool).scatter(1, merit.topk(how.top_groups, dim=-1).indices, True)
        choice = grouped.masked_fill(~is_good.unsqueeze(-1), float("-inf")).flatten(1)
    return choice.topk(top_k, dim=-1).indices


def _force(weights: Tensor, ids: Tensor, total: Tensor, scores: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
    """Forced experts that were not selected take the places of the weakest selected ones that are not forced."""
    missing = on & ~torch.zeros_like(on).scatter(1, ids, True)
    entering = missing.to(torch.int8).topk(ids.shape[1], dim=-1).indices  # the missing ones first, then others
    rank = weights.masked_fill(on.gather(1, ids), float("inf")).argsort(-1).argsort(-1)  # 0 = the weakest
    leaves = rank < missing.sum(-1, keepdim=True)
    ids = torch.where(leaves, entering.gather(1, rank), ids)
    entered = torch.where(leaves, scores.gather(1, ids), weights)
    return torch.where(leaves.any(-1, keepdim=True), entered * (total / entered.sum(-1, keepdim=True)), weights), ids


direct_register_custom_op(
    op_name="whipstaff_reroute_", op_func=reroute_, mutates_args=["weights", "ids"], fake_impl=lambda *args: None
)
