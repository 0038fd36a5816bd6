"""What of vLLM's resolved config the front end settles and workers rely on."""

from typing import Any

from vllm.config import CompilationConfig, CUDAGraphMode, ModelConfig

from whipstaff.server.engine import UnsupportedEngine

_SPLIT = {"vllm::unified_attention_with_output", "vllm::unified_kv_cache_update"}


def auxiliary_config(base: ModelConfig, model: str, max_len: int | None = None) -> ModelConfig:
    """The model config of an auxiliary model; `max_len` None derives it from the model itself."""
    return ModelConfig(
        model=model,
        tokenizer=base.tokenizer,
        skip_tokenizer_init=base.skip_tokenizer_init,
        trust_remote_code=base.trust_remote_code,
        dtype=base.dtype,
        max_model_len=max_len,
        enforce_eager=base.enforce_eager,
        seed=base.seed,
    )


def require_eager_attention(config: CompilationConfig) -> None:
    """Keep attention out of captured graphs. Raises: UnsupportedEngine where this configuration does not allow it."""
    if config.cudagraph_mode is None or config.cudagraph_mode == CUDAGraphMode.NONE:
        return
    if config.cudagraph_mode.has_full_cudagraphs():
        config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    if not set(config.splitting_ops or ()) >= _SPLIT:
        raise UnsupportedEngine(
            "edits inside attention need graphs that are split at attention; this compilation config splits at "
            f"{config.splitting_ops}: leave out fuse_attn_quant and use_inductor_graph_partition, or --enforce-eager"
        )


def max_tokens(config: Any) -> int:
    """The most tokens that one forward pass can have, padding for graph capture included."""
    sizes = config.compilation_config.cudagraph_capture_sizes or [0]
    return int(max(config.scheduler_config.max_num_batched_tokens, *sizes))
