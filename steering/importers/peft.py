"""PEFT's prompt-learning adapters (huggingface/peft): adapter_config.json and adapter_model.safetensors, or .bin.

PROMPT_TUNING, P_TUNING, CPT  prompt_embeddings [tokens, hidden], as they are inserted           -> soft_prompt
MULTITASK_PROMPT_TUNING  the same, times prefix_task_cols[t] @ prefix_task_rows[t] of task t     -> soft_prompt
PREFIX_TUNING            prompt_embeddings [tokens, 2 * layers * kv_heads * head_dim], even K    -> prefix_kv
ADAPTION_PROMPT          per layer adaption_prompt [1, tokens, hidden] and adaption_gate [1]     -> side_attention
"""

import re

from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.autoencoder import check_size
from whipstaff.steering.importers.importer import Draft, Hints, Importer
from whipstaff.steering.importers.ledger import Ledger
from whipstaff.steering.importers.source import Source, numbers
from whipstaff.steering.shape import ModelShape

_LABELS = (  # where an adapter comes from, how it was trained, what its model is
    "auto_mapping",
    "base_model_name_or_path",
    "cpt_*",  # the loss of context-aware prompt tuning
    "encoder_*",
    "inference_mode",
    "num_attention_heads",
    "num_ranks",  # as the tensors show
    "opt_*",
    "peft_version",
    "prefix_projection",
    "prompt_tuning_init*",
    "revision",
    "task_type",
    "tokenizer_*",
)
_INSERTED = ("PROMPT_TUNING", "P_TUNING", "CPT")
_ADAPTION = re.compile(r"(?:.*\.)?layers\.(\d{1,4})\.self_attn\.adaption_(prompt|gate)")


class PEFT(Importer):
    name, files = (
        "peft",
        "a folder with adapter_config.json: prompt tuning, also of several tasks and CPT, prefix tuning, LLaMA-Adapter",
    )
    takes = frozenset({"part"})

    def claims(self, source: Source) -> bool:
        return "adapter_config.json" in source.names

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        config = source.json("adapter_config.json")
        kind = config.get("peft_type")
        name = next((n for n in ("adapter_model.safetensors", "adapter_model.bin") if n in source.names), None)
        if name is None:
            raise SteeringError(f"{source.name} has no adapter_model.safetensors")
        if config.get("num_transformer_submodules") not in (None, 1):
            raise SteeringError("the adapter is for an encoder-decoder model")
        config.harmless(*_LABELS)
        found = source.named(name)
        if hints.part is not None and kind != "MULTITASK_PROMPT_TUNING":
            raise SteeringError("only adapters of several tasks have parts: MULTITASK_PROMPT_TUNING", "part")
        if kind in (*_INSERTED, "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING"):
            _check_prompt(config, found, model)
        if kind == "MULTITASK_PROMPT_TUNING":
            return _of_task(config, found, hints.part, model)
        if kind in _INSERTED:
            return Draft(
                "soft_prompt", {"rows": numbers(name, found.get("prompt_embeddings"), None, model.hidden_size)}
            )
        if kind == "PREFIX_TUNING":
            return _prefix(found.get("prompt_embeddings"), model)
        if kind == "ADAPTION_PROMPT":
            return _adaption(config, found, model)
        raise SteeringError(f"adapters of type {kind!r} change weights or are unknown; vLLM itself serves LoRA")


def _check_prompt(config: Ledger, found: Ledger, model: ModelShape) -> None:
    """What an adapter's config says of its numbers must be so. Raises: SteeringError."""
    if (stored := found.get("prompt_embeddings")) is None:
        have = ", ".join(str(name)[:64] for name in list(found)[:8]) or "nothing"
        raise SteeringError(f"{found.file} has no prompt_embeddings; it has {have}")
    rows = len(stored) if isinstance(stored, Tensor) and stored.ndim else 0
    for name, right in (("num_virtual_tokens", rows), ("num_layers", model.num_layers), ("modules_to_save", None)):
        if (said := config.get(name)) not in (None, right):
            raise SteeringError(f"{name} of adapter_config.json is {said!r}, the adapter and the model have {right!r}")
    config.harmless("token_dim")  # of prefixes it is narrower than the model's; the shape itself is checked


def _of_task(config: Ledger, found: Ledger, task: int | None, model: ModelShape) -> Draft:
    """The rows of one task: those of all tasks, each number times the task's own."""
    shared = numbers("prompt_embeddings", found.get("prompt_embeddings"), None, model.hidden_size)
    cols = numbers("prefix_task_cols", found.get("prefix_task_cols"), None, len(shared), None)
    rows = numbers("prefix_task_rows", found.get("prefix_task_rows"), len(cols), cols.shape[2], model.hidden_size)
    check_size(config.get("num_tasks"), len(cols), "num_tasks", config.file)
    if task is None and len(cols) != 1:
        raise SteeringError(f"the adapter has the tasks 0 to {len(cols) - 1}; say which is meant", "part")
    if task is not None and task >= len(cols):
        raise SteeringError(f"the adapter has the tasks 0 to {len(cols) - 1}", "part")
    return Draft("soft_prompt", {"rows": shared * (cols[task or 0] @ rows[task or 0])})


def _prefix(stored: Tensor | None, model: ModelShape) -> Draft:
    rows = numbers("prompt_embeddings", stored, None, None)
    num_kv_heads, rest = divmod(rows.shape[1], 2 * model.num_layers * model.head_dim)
    if rest or not num_kv_heads or model.num_kv_heads not in (0, num_kv_heads):
        raise SteeringError(
            f"prompt_embeddings has {rows.shape[1]} columns, wanted 2 * {model.num_layers} layers * "
            f"{model.num_kv_heads or 'some'} kv heads * {model.head_dim}"
        )
    states = rows.view(len(rows), model.num_layers, 2, num_kv_heads, model.head_dim)
    tensors = {
        f"attn_head.{layer}.{part}": states[:, layer, index].clone()
        for layer in range(model.num_layers)
        for index, part in enumerate(("key", "value"))
    }
    return Draft("prefix_kv", tensors, model=model.model_copy(update={"num_kv_heads": num_kv_heads}))


def _adaption(config: Ledger, found: Ledger, model: ModelShape) -> Draft:
    config.harmless("target_modules")  # as its tensors show
    tensors = {}
    for key, tensor in found.items():
        match = _ADAPTION.fullmatch(key)
        if match is None:
            raise SteeringError(f"{key[:128]!r} is no adaption prompt of a layer's self_attn (GPT-2's form has no W_o)")
        if match[2] == "gate":
            tensors[f"attn_head.{match[1]}.gate"] = numbers(key, tensor, 1)
        else:
            tensors[f"attn_head.{match[1]}.tokens"] = numbers(key, tensor, 1, None, model.hidden_size)[0]
    prompts = [tensor for place, tensor in tensors.items() if place.endswith(".tokens")]
    check_size(config.get("adapter_layers"), len(prompts), "adapter_layers", config.file)
    for prompt in prompts:
        check_size(config.get("adapter_len"), len(prompt), "adapter_len", config.file)
    return Draft("side_attention", tensors)
