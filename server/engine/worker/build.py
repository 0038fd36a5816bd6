"""What a worker does in a step is built whole, once its model is loaded: from the parts that this server has."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from whipstaff.server.engine.config import max_tokens
from whipstaff.server.engine.layout import Layout
from whipstaff.server.engine.worker import runner_v1, runner_v2
from whipstaff.server.engine.worker.attention_rows import AttentionRows, BlockTables, attention_of
from whipstaff.server.engine.worker.auxiliary import Auxiliary
from whipstaff.server.engine.worker.edits.captures import Captures
from whipstaff.server.engine.worker.edits.forms import Forms, add_plain_form, classes_of
from whipstaff.server.engine.worker.edits.histories import Histories
from whipstaff.server.engine.worker.edits.module_edits import ModuleEdits
from whipstaff.server.engine.worker.edits.sites import KINDS, install_sites, install_soft_rows
from whipstaff.server.engine.worker.edits.step_edits import StepEdits
from whipstaff.server.engine.worker.edits.token_table import TokenTable
from whipstaff.server.engine.worker.logits.early_exit import EarlyHead
from whipstaff.server.engine.worker.logits.hidden_histories import HiddenHistories
from whipstaff.server.engine.worker.logits.last_attention import LastAttention
from whipstaff.server.engine.worker.logits.lookahead import Lookahead, NoLookahead
from whipstaff.server.engine.worker.logits.model_hook import compose
from whipstaff.server.engine.worker.logits.pipeline import LogitsPipeline
from whipstaff.server.engine.worker.lora import StepAdapters, settle_adapters
from whipstaff.server.engine.worker.requests import Requests
from whipstaff.server.engine.worker.search.searches import Searches
from whipstaff.server.engine.worker.step import WorkerStep
from whipstaff.steering.sites import final_norm
from whipstaff.steering.vector_file import Vector

VectorOf = Callable[[str], Vector]  # finds a loaded vector by digest


def build_step(
    runner: Any, config: Any, vector_of: VectorOf, head_of: Callable[[str], dict[str, Tensor]]
) -> WorkerStep:
    """Load the auxiliary models, let the served model and `runner` call a step, and give that step.

    Args:
        runner: vLLM's model runner, its model loaded.
        config: vLLM's.
        head_of: finds the tensors of a learned head by digest, where the model is.

    Raises: UnsupportedEngine where the model cannot be steered as the layout asks.
    """
    layout, model = Layout.from_config(config.additional_config), runner.get_model()
    if config.lora_config is not None:
        settle_adapters(runner, model)
    auxiliaries = [Auxiliary(spec, config, runner.device) for spec in layout.auxiliaries]
    requests, adapters = Requests(), StepAdapters(runner)
    adapter = runner_v2 if is_v2(runner) else runner_v1
    attended = {layer: _attention_rows(model, layer, runner, adapter.block_tables) for layer in layout.attention_layers}
    edits = _edits(model, runner.device, config, layout, requests, vector_of, attended)
    attention = (
        LastAttention(model, runner, max_tokens(config), adapter.block_tables) if layout.reads_attention else None
    )
    lookahead = (
        Lookahead(runner, partial(type(model).forward, model), edits, adapter.block_tables, adapters, attention)
        if layout.looks_ahead
        else NoLookahead()
    )
    step = WorkerStep(
        requests,
        edits,
        LogitsPipeline(
            requests,
            [auxiliary.name for auxiliary in auxiliaries],
            config.model_config.max_model_len,
            runner.device,
            head_of,
            EarlyHead(
                partial(type(model).compute_logits, model), final_norm(model, KINDS), edits.sites.tables, adapters
            ),
            lookahead,
            Searches(requests, head_of, lookahead, attention, runner.device),
            attention,
            _histories(layout, config, runner.device),
        ),
    )
    compose(model, auxiliaries, step, int(config.model_config.get_hidden_size()))
    adapter.attach(runner, step)
    return step


def _histories(layout: Layout, config: Any, device: Any) -> HiddenHistories | None:
    size, dtype = int(config.model_config.get_hidden_size()), config.model_config.dtype
    if not layout.num_hidden_states:
        return None
    return HiddenHistories(layout.num_hidden_states, layout.max_len, max_tokens(config), size, dtype, device)


def _attention_rows(model: Any, layer: int, runner: Any, block_tables: BlockTables) -> AttentionRows:
    """Raises: UnsupportedEngine."""
    config = runner.vllm_config
    flag = f"--attention-layers {layer}"
    attention = attention_of(model, layer, config.model_config.max_model_len, config.model_config.dtype, flag)
    return AttentionRows(attention, f"layer {layer}", runner, max_tokens(config), block_tables)


def _edits(
    model: Any,
    device: Any,
    config: Any,
    layout: Layout,
    requests: Requests,
    vector_of: VectorOf,
    attended: Mapping[int, AttentionRows],
) -> StepEdits:
    num_tokens, model_config, forms = max_tokens(config), config.model_config, Forms()
    classes = classes_of(model)
    token_table = TokenTable(num_tokens, device)
    histories = Histories(requests, layout.num_histories, layout.max_len, device)
    sites = install_sites(model, layout, token_table, histories.values, vector_of, model_config.dtype)
    edits = StepEdits(
        requests,
        token_table,
        histories,
        sites,
        captures=Captures(requests, sites.arenas, layout.max_capture_bytes, attended),
        soft_rows=install_soft_rows(model, model_config, num_tokens, device, vector_of),
        module_edits=ModuleEdits(
            model,
            num_tokens,
            device,
            vector_of,
            layout.num_slots,
            edits_router="router" in layout.sites,
            edits_attention=layout.edits_attention,
        ),
        forms=forms,
    )
    if layout.has_plain_form:
        add_plain_form(model, classes, forms, config)
    return edits


def is_v2(runner: Any) -> bool:
    """Whether it is Model Runner V2."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    return isinstance(runner, GPUModelRunner)
