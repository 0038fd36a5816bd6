"""From engine arguments to a running, steerable engine: vLLM's AsyncLLM with our worker, scheduler and guard."""

from collections.abc import AsyncGenerator, Iterable
from importlib import metadata
from typing import Any

from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from whipstaff.server.engine import UnsupportedEngine, request
from whipstaff.server.engine.auxiliary import auxiliary_config
from whipstaff.server.engine.layout import AuxiliarySpec, Layout

_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "whipstaff.server.engine.worker.CpuWorker",
    "vllm.v1.worker.gpu_worker.Worker": "whipstaff.server.engine.worker.CudaWorker",
}
_SCHEDULERS = "whipstaff.server.engine.scheduler."
MAX_SLOTS = 256


class PlanDict(dict[str, Any]):
    """A plan in wire form that our own code made. A client can put JSON into `vllm_xargs`, but never one of these."""


class Engine(AsyncLLM):
    """AsyncLLM that takes plans from our front end only."""

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        extra = sampling_params.extra_args or {}
        if request.KEY in extra and not isinstance(extra[request.KEY], PlanDict):
            raise ValueError(f"vllm_xargs.{request.KEY} is reserved; send `steering` and `decoding` instead")
        async for output in super().generate(prompt, sampling_params, *args, **kwargs):
            yield output


def start(
    engine_args: AsyncEngineArgs, auxiliaries: Iterable[tuple[str, str]] = (), num_slots: int | None = None
) -> Engine:
    """Start an engine that can be steered; blocks until the model is loaded.

    Args:
        auxiliaries: (name, model) of further models to load beside the base.
        num_slots: distinct rows of edits that may be in use at once; None: as many as sequences, at most MAX_SLOTS.

    Raises:
        UnsupportedEngine: naming the setting that Whipstaff cannot serve.
    """
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    configure(config, auxiliaries, num_slots)
    return Engine.from_vllm_config(
        vllm_config=config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=engine_args.enable_log_requests,
        aggregate_engine_logging=engine_args.aggregate_engine_logging,
        disable_log_stats=engine_args.disable_log_stats,
    )


def configure(
    config: VllmConfig, auxiliaries: Iterable[tuple[str, str]] = (), num_slots: int | None = None
) -> Layout:
    """Put our worker, our scheduler and our layout into a resolved engine config."""
    _refuse_unsupported(config)
    specs = tuple(_auxiliary_spec(config, name, model) for name, model in auxiliaries)
    layout = Layout(
        version=metadata.version("whipstaff"),
        num_slots=num_slots or min(config.scheduler_config.max_num_seqs, MAX_SLOTS),
        auxiliaries=specs,
    )
    config.additional_config = {**(config.additional_config or {}), **layout.to_config()}
    config.parallel_config.worker_cls = _WORKERS[config.parallel_config.worker_cls]
    is_async = config.scheduler_config.async_scheduling
    config.scheduler_config.scheduler_cls = _SCHEDULERS + ("AsyncSteeredScheduler" if is_async else "SteeredScheduler")
    if specs and config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        # A full graph would run every auxiliary model in every step.
        config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    return layout


def _auxiliary_spec(config: VllmConfig, name: str, model: str) -> AuxiliarySpec:
    base = config.model_config
    auxiliary = auxiliary_config(base, model)
    if base.is_multimodal_model or base.enable_prompt_embeds:
        raise UnsupportedEngine("--aux: auxiliary models need token ids; this base takes embeddings")
    if base.skip_tokenizer_init and auxiliary.get_vocab_size() < base.get_vocab_size():
        raise UnsupportedEngine(
            f"--aux {name}={model}: its vocabulary has {auxiliary.get_vocab_size()} entries, the base's "
            f"{base.get_vocab_size()}, and without tokenizers nothing says that the rest is padding"
        )
    return AuxiliarySpec(name=name, model=model, max_len=min(auxiliary.max_model_len, base.max_model_len))


def _refuse_unsupported(config: VllmConfig) -> None:
    """Settings under which edits or mixes would be wrong or silently lost."""
    if config.parallel_config.worker_cls not in _WORKERS:
        raise UnsupportedEngine(f"no steered worker for {config.parallel_config.worker_cls}; CPU and CUDA are supported")
    refused = {
        "--speculative-config": config.speculative_config is not None,
        "--runner pooling": config.model_config.runner_type != "generate",
        "--pipeline-parallel-size > 1": config.parallel_config.pipeline_parallel_size > 1,
        "--enable-batch-sharded-sampling": config.parallel_config.enable_batch_sharded_sampling,
        "--enable-dbo": config.parallel_config.enable_dbo,
        "--prefill-context-parallel-size > 1": config.parallel_config.prefill_context_parallel_size > 1,
        "--kv-transfer-config": config.kv_transfer_config is not None,
    }
    for setting, is_on in refused.items():
        if is_on:
            raise UnsupportedEngine(f"{setting} is not supported together with per-request steering")
