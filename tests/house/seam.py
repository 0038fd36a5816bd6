"""The seam to vLLM as a list: every member that `server/engine` imports, overrides or reaches into.

What is imported and what is overridden follows from our sources; what is reached into is said here. By minor version
`vllm-X.Y.json` holds each member's signature and, of what we override and so rely on the inside of, a digest of its
source. In this folder's parent:

    python -m house.seam                      what the installed vLLM moved
    python -m house.seam FOLDER               what another version's unpacked `vllm/` would move
    python -m house.seam [FOLDER] --write     take it as reviewed
"""

import argparse
import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from house.sources import Definition, Missing, Sources

HERE = Path(__file__).parent
ENGINE = HERE.parents[1] / "server" / "engine"
V1, V2 = "vllm.v1.worker.gpu_model_runner.GPUModelRunner", "vllm.v1.worker.gpu.model_runner.GPUModelRunner"
SCHEDULER = "vllm.v1.core.sched.scheduler.Scheduler"
REQUEST = "vllm.v1.request.Request"
ATTENTION = "vllm.model_executor.layers.attention.attention.Attention"
BLOCKS_OF_TYPE = "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager"
BLOCK_POOL = "vllm.v1.core.block_pool.BlockPool"
COORDINATOR = "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator"
KV_MANAGER = "vllm.v1.core.kv_cache_manager.KVCacheManager"
SERVING = "vllm.entrypoints.openai.completion.serving.OpenAIServingCompletion"
ROUTERS = "vllm.model_executor.layers.fused_moe.router"

# Our class -> vLLM's that it is laid over: a base class, or what an instance was before its class was swapped.
CHATS = "vllm.entrypoints.openai.chat_completion"
LAID_OVER: dict[str, tuple[str, ...]] = {
    "worker.lora._SparingWrapper": ("vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU",),
    "worker.edits.attention.EditedAttention": (
        "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl",
        "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl",
    ),
    "worker.attention_rows.WatchedAttention": (
        "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl",
        "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl",
    ),
    "worker.logits.model_hook.Composite": ("vllm.model_executor.models.llama.LlamaForCausalLM",),
    "patch.Carrying": ("vllm.v1.outputs.AsyncModelRunnerOutput",),
    "frontend.launch.Listening": ("vllm.v1.engine.output_processor.OutputProcessor",),
    "scheduler.groups.GroupedScheduling": (SCHEDULER,),
    "frontend.launch.Engine": ("vllm.v1.engine.async_llm.AsyncLLM",),
    "frontend.requests.ChatRequest": ("vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest",),
    "frontend.requests.TextRequest": ("vllm.entrypoints.openai.completion.protocol.CompletionRequest",),
    "frontend.openai.ServingChat": ("vllm.entrypoints.openai.chat_completion.serving.OpenAIServingChat",),
    "frontend.batch.BatchRequest": (f"{CHATS}.protocol.BatchChatCompletionRequest",),
    "frontend.batch._OneChat": (f"{CHATS}.protocol.ChatCompletionRequest",),
    "frontend.batch.ServingBatch": (f"{CHATS}.batch_serving.OpenAIServingChatBatch",),
    "frontend.messages.MessageRequest": ("vllm.entrypoints.anthropic.protocol.AnthropicMessagesRequest",),
    "frontend.messages.ServingMessages": ("vllm.entrypoints.anthropic.serving.AnthropicServingMessages",),
    "frontend.responses.ResponseRequest": ("vllm.entrypoints.openai.responses.protocol.ResponsesRequest",),
    "frontend.responses.ServingResponses": ("vllm.entrypoints.openai.responses.serving.OpenAIServingResponses",),
    "frontend.responses.NotingRenderer": ("vllm.renderers.online_renderer.OnlineRenderer",),
    "frontend.offline.Output": ("vllm.outputs.RequestOutput",),
    "frontend.offline.Completion": ("vllm.outputs.CompletionOutput",),
    "frontend.openai.ServingCompletion": ("vllm.entrypoints.openai.completion.serving.OpenAIServingCompletion",),
    "frontend.openai.ServingModels": ("vllm.entrypoints.openai.models.serving.OpenAIServingModels",),
    "frontend.lifecycle.Server": ("vllm.entrypoints.launchers.launcher.NoSignalServer",),
    "frontend.guard.Guard": ("vllm.entrypoints.serve.middleware.authenticate.AuthenticationMiddleware",),
    "worker.edits.routing.EditedRouter": (
        f"{ROUTERS}.cpu_router.CPURouter",
        f"{ROUTERS}.custom_routing_router.CustomRoutingRouter",
        f"{ROUTERS}.fused_topk_bias_router.FusedTopKBiasRouter",
        f"{ROUTERS}.fused_topk_router.FusedTopKRouter",
        f"{ROUTERS}.grouped_topk_router.GroupedTopKRouter",
    ),
    "worker.runner_v1.SteeredRunner": (V1,),
    "worker.runner_v1.GraphsOfForms": ("vllm.compilation.cuda_graph.CUDAGraphWrapper",),
    "worker.runner_v1.WatchedSampler": ("vllm.v1.sample.sampler.Sampler",),
    "worker.runner_v2.SteeredRunner": (V2,),
    "worker.runner_v2.GraphsOfForms": ("vllm.v1.worker.gpu.cudagraph_utils.ModelCudaGraphManager",),
    "worker.runner_v2.WatchedSampler": ("vllm.v1.worker.gpu.sample.sampler.Sampler",),
    "worker.runner_v2.WatchedScorer": ("vllm.v1.worker.gpu.sample.prompt_logprob.PromptLogprobsWorker",),
    "scheduler.scheduler.IdleScheduling": (SCHEDULER,),
    "scheduler.scheduler.IdleScheduler": (SCHEDULER,),
    "scheduler.scheduler.AsyncIdleScheduler": ("vllm.v1.core.sched.async_scheduler.AsyncScheduler",),
    "scheduler.scheduler.SteeredScheduling": (SCHEDULER,),
    "scheduler.scheduler.SteeredScheduler": (SCHEDULER,),
    "scheduler.scheduler.AsyncSteeredScheduler": ("vllm.v1.core.sched.async_scheduler.AsyncScheduler",),
    "worker.edits.forms.TwoForms": ("vllm.model_executor.models.llama.LlamaModel",),
    "worker.edits.sites.EditedBlock": ("vllm.model_executor.models.llama.LlamaDecoderLayer",),
    "worker.edits.sites.EditedInput": ("vllm.model_executor.models.llama.LlamaAttention",),
    "worker.edits.sites.EditedOutput": ("vllm.model_executor.layers.linear.RowParallelLinear",),
    "worker.edits.sites.EditedProjection": ("vllm.model_executor.layers.linear.RowParallelLinear",),
    "worker.edits.sites.EditedEmbedding": (
        "vllm.model_executor.layers.vocab_parallel_embedding.VocabParallelEmbedding",
    ),
    "worker.worker.SteeredWorker": ("vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker"),
    "worker.cpu_worker.CpuWorker": ("vllm.v1.worker.cpu_worker.CPUWorker",),
    "worker.cuda_worker.CudaWorker": ("vllm.v1.worker.gpu_worker.Worker",),
}


def _of(owner: str, names: str) -> tuple[str, ...]:
    return tuple(f"{owner}.{name}" for name in names.split())


# Members that are called or read on vLLM's objects; which of our files do so is found by name.
REACHED: tuple[str, ...] = (
    *_of(V1, "input_batch query_start_loc discard_request_mask sampler lora_config kv_cache_config attn_groups"),
    *_of(V1, "_set_active_loras num_spec_tokens supports_mm_inputs kv_caches"),
    *_of("vllm.model_executor.models.interfaces.SupportsMultiModal", "embed_input_ids requires_raw_input_tokens"),
    *_of("vllm.multimodal.inputs.PlaceholderRange", "extract_embeds_range"),
    *_of(
        "vllm.entrypoints.anthropic.serving.AnthropicServingMessages",
        "_merge_inline_system _get_disabled_thinking_effort disabled_thinking_effort_resolver",
    ),
    *_of("vllm.entrypoints.openai.responses.protocol.ResponsesRequest", "is_include_output_logprobs"),
    *_of("vllm.entrypoints.openai.responses.serving.OpenAIServingResponses", "_validate_generator_input enable_store"),
    *_of("vllm.entrypoints.openai.responses.serving.OpenAIServingResponses", "create_responses use_harmony"),
    *_of("vllm.renderers.online_renderer.OnlineRenderer", "exclude_tools_when_tool_choice_none"),
    *_of(
        "vllm.v1.worker.gpu_input_batch.InputBatch",
        "req_ids num_reqs num_computed_tokens_cpu generators block_table spec_token_ids",
    ),
    *_of("vllm.v1.worker.block_table.MultiGroupBlockTable", "block_tables"),
    *_of("vllm.v1.worker.block_table.BlockTable", "get_device_tensor block_size"),
    *_of(V2, "sampler prompt_logprobs_worker block_tables supports_mm_inputs"),
    *_of(
        "vllm.v1.worker.gpu.input_batch.InputBatch",
        "req_ids num_reqs query_start_loc_np num_computed_tokens_np prefill_len_np input_ids",
    ),
    *_of("vllm.v1.worker.gpu.block_table.BlockTables", "input_block_tables block_sizes"),
    *_of("vllm.v1.worker.gpu.cudagraph_utils.ModelCudaGraphManager", "_capture_mem_samples graphs"),
    *_of("vllm.compilation.cuda_graph.CUDAGraphWrapper", "concrete_cudagraph_entries"),
    *_of("vllm.compilation.wrapper.TorchCompileWithNoGuardsWrapper", "__init__ _compile_prefix _is_encoder"),
    *_of(
        SCHEDULER,
        "requests running kv_cache_manager policy hash_block_size block_size num_lookahead_tokens use_v2_model_runner "
        "max_num_active_reqs max_num_scheduled_tokens max_num_encoder_input_tokens max_model_len parallel_config "
        "scheduler_config need_mamba_block_aligned_split grammar_compile_error_reqs num_waiting_for_streaming_input "
        "deferred_waiting reset_preempted_req_ids _pause_state _inflight_prefill_reserved_blocks num_spec_tokens",
    ),
    *_of(
        REQUEST,
        "_all_token_ids _block_hasher _output_token_ids append_output_token_ids arrival_time block_hashes cache_salt "
        "client_index drop_stale_output is_prefill_chunk lora_request max_tokens num_computed_tokens "
        "num_output_placeholders num_output_tokens num_preemptions num_prompt_tokens "
        "num_stale_output_tokens num_tokens num_tokens_with_spec priority request_id sampling_params "
        "skip_reading_prefix_cache spec_token_ids status stop_reason take_prefill_stats update_block_hashes",
    ),
    *_of(KV_MANAGER, "block_pool coordinator empty_kv_cache_blocks get_blocks truncate_computed_blocks"),
    *_of(KV_MANAGER, "watermark_blocks"),
    *_of(BLOCK_POOL, "free_blocks get_new_blocks get_num_free_blocks is_block_writable num_gpu_blocks touch"),
    *_of(BLOCKS_OF_TYPE, "_pending_cow_copies block_size get_num_skipped_tokens num_cached_block req_to_blocks"),
    *_of("vllm.v1.core.kv_cache_utils.KVCacheBlock", "block_id is_null ref_cnt"),
    *_of(COORDINATOR, "get_num_blocks_to_allocate scheduler_block_size single_type_managers"),
    *_of(
        "vllm.v1.core.sched.output.CachedRequestData",
        "all_token_ids new_block_ids new_token_ids num_computed_tokens num_output_tokens req_ids resumed_req_ids",
    ),
    *_of("vllm.v1.core.sched.output.NewRequestData", "from_request num_computed_tokens prompt_token_ids"),
    *_of("vllm.v1.core.sched.output.NewRequestData", "sampling_params"),
    *_of("vllm.v1.core.sched.output.SchedulerOutput", "finished_req_ids num_scheduled_tokens scheduled_cached_reqs"),
    *_of(
        "vllm.v1.core.sched.output.SchedulerOutput",
        "scheduled_new_reqs scheduled_spec_decode_tokens total_num_scheduled_tokens kv_cache_block_copies "
        "new_block_ids_to_zero",
    ),
    *_of("vllm.v1.outputs.DraftTokenIds", "req_ids"),
    *_of("vllm.v1.outputs.ModelRunnerOutput", "req_id_to_index sampled_token_ids"),
    *_of("vllm.v1.engine.EngineCoreOutput", "kv_transfer_params new_logprobs new_token_ids request_id"),
    *_of("vllm.v1.engine.logprobs.LogprobsProcessor", "from_new_request update_from_output"),
    *_of("vllm.v1.engine.EngineCoreOutputs", "outputs scheduler_stats"),
    *_of(ATTENTION, "attn_backend attn_type has_sink head_size head_size_v impl kv_cache kv_cache_dtype"),
    *_of(ATTENTION, "kv_cache_torch_dtype kv_sharing_target_layer_name num_heads num_kv_heads query_quant"),
    *_of(ATTENTION, "sliding_window use_mm_prefix _k_scale layer_name"),
    *_of("vllm.distributed.parallel_state.GroupCoordinator", "device_group"),
    *_of(SERVING, "_extract_prompt_len default_sampling_params models online_renderer renderer"),
    *_of(f"{ROUTERS}.base_router.BaseRouter", "top_k"),
    *_of("vllm.model_executor.layers.linear.RowParallelLinear", "input_size_per_partition output_size"),
    *_of("vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase", "token_lora_indices sampler_indices"),
    *_of("vllm.v1.engine.async_llm.AsyncLLM", "output_processor collective_rpc from_vllm_config get_supported_tasks"),
    *_of("vllm.v1.engine.async_llm.AsyncLLM", "abort engine_core errored renderer input_processor"),
    *_of("vllm.renderers.base.BaseRenderer", "default_chat_tok_params default_cmpl_tok_params render_chat_async"),
    *_of("vllm.renderers.base.BaseRenderer", "render_cmpl_async"),
    *_of("vllm.renderers.ChatParams", "get_apply_chat_template_kwargs with_defaults"),
    *_of("vllm.config.ModelConfig", "get_diff_sampling_param"),
    *_of("vllm.v1.engine.output_processor.OutputProcessor", "propagate_error request_states"),
    *_of("vllm.v1.engine.core_client.BackgroundResources", "engine_dead engine_manager"),
    *_of("vllm.v1.engine.utils.CoreEngineProcManager", "failed_proc_name finished_procs"),
    *_of("vllm.engine.arg_utils.AsyncEngineArgs", "_api_process_count _api_process_rank create_engine_config"),
)
LOGGING: tuple[str, ...] = ("vllm.v1.executor.multiproc_executor.MultiprocExecutor.start_worker_monitor",)
"""What says in the log alone something that we read there."""


class Seam:
    """What our sources use of vLLM."""

    def __init__(self, only: str = "*") -> None:
        """`only` one of our modules."""
        self._trees = {_module(path): ast.parse(path.read_text()) for path in sorted(ENGINE.rglob(f"{only}.py"))}

    def imported(self) -> set[str]:
        """Everything that is imported from vLLM."""
        return {
            f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            for tree in self._trees.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if ((node.module or "") if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0] == "vllm"
        }

    def classes(self) -> Iterator[tuple[str, ast.ClassDef]]:
        """Classes that are laid over vLLM's: named so in LAID_OVER, or with a base of vLLM's, or one that stands
        for such a class where it is laid over an instance: `Swapped` (see `patch.py`) or `cls`."""
        for module, tree in self._trees.items():
            ours = {alias.asname or alias.name for node in ast.walk(tree) for alias in _from_vllm(node)}
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                    if bases & {*ours, "Swapped", "cls"} or f"{module}.{node.name}" in LAID_OVER:
                        yield f"{module}.{node.name}", node

    def overridden(self, vllm: Sources) -> set[str]:
        """Members of vLLM's classes that ours define anew."""
        return {
            f"{theirs}.{member.name}"
            for name, node in self.classes()
            for theirs in LAID_OVER.get(name, ())
            for member in node.body
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef)
            if vllm.has(f"{theirs}.{member.name}")
        }

    def read(self) -> set[str]:
        """Every name of an attribute in our sources, and of a parameter that is passed by name."""
        nodes = [node for tree in self._trees.values() for node in ast.walk(tree)]
        return {node.attr for node in nodes if isinstance(node, ast.Attribute)}

    def private(self) -> set[str]:
        """Names with an underscore that are read on anything but `self`, less those that our sources define."""
        ours = {"_replace", "_asdict", "_fields"}.union(*map(_defined, self._trees.values()))  # named tuples'
        return {
            node.attr
            for tree in self._trees.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        } - ours


def _module(path: Path) -> str:
    """A module's name within `server.engine`."""
    return ".".join(path.relative_to(ENGINE).with_suffix("").parts)


def _from_vllm(node: ast.AST) -> list[ast.alias]:
    return node.names if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm" else []


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def said(vllm: Sources) -> dict[str, str]:
    """Every member of the list: what is known of it in this version."""
    seam = Seam()
    overridden = seam.overridden(vllm)
    names = seam.imported() | overridden | {*REACHED, *LOGGING}
    names |= {theirs for each in LAID_OVER.values() for theirs in each}
    return {name: _described(vllm, name, name in overridden) for name in sorted(names)}


def _described(vllm: Sources, name: str, with_inside: bool) -> str:
    try:
        found: Definition = vllm.find(name)
    except Missing as missing:
        return f"missing: {missing}"
    parts = [found.signature, found.digest if with_inside else ""]
    return " ".join(part for part in parts if part) or "here"


def version_of(vllm: Sources) -> str:
    """ "0.32" and so on."""
    found = re.search(r"__version__ = version = '(\d+\.\d+)", (vllm.folder / "_version.py").read_text())
    assert found is not None, f"{vllm.folder} is no vLLM"
    return found[1]


def recorded(version: str) -> dict[str, str]:
    """The list as it was reviewed for a version; {} if it never was."""
    file = HERE / f"vllm-{version}.json"
    found: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    return found


def moved(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What differs, a line each."""
    return [
        f"{name}\n    - {before.get(name, 'not listed')}\n    + {after.get(name, 'not listed')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="an unpacked vLLM; default: the installed one")
    parser.add_argument("--against", help="the reviewed version to compare with; default: the same, or the newest")
    parser.add_argument("--write", action="store_true", help="record the list as reviewed")
    args = parser.parse_args()
    vllm = Sources("vllm", args.folder)
    version, found = version_of(vllm), said(vllm)
    if args.write:
        (HERE / f"vllm-{version}.json").write_text(json.dumps(found, indent=0) + "\n")
        return
    reviewed = sorted(file.stem.removeprefix("vllm-") for file in HERE.glob("vllm-*.json"))
    against = args.against or (version if version in reviewed else reviewed[-1])
    print("\n".join([f"vLLM {version} against the list of {against}:", *moved(recorded(against), found)]))


if __name__ == "__main__":
    main()
