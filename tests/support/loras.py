"""LoRA adapters for tests: saved as peft saves them, and merged into a model."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK, ALPHA = 4, 8
Lora = dict[str, tuple[Tensor, Tensor]]  # module name -> A (RANK, in) and B (out, RANK)
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")


def random_lora(model: torch.nn.Module, seed: int, size: float = 0.2) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            size * torch.randn(RANK, module.in_features, generator=generator),
            size * torch.randn(module.out_features, RANK, generator=generator),
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in TARGETS
    }


def save_lora(folder: Path, lora: Lora) -> str:
    folder.mkdir()
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(said | {"target_modules": list(TARGETS)}))
    tensors = {}
    for name, (down, up) in lora.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


def merged(model: torch.nn.Module, lora: Lora) -> torch.nn.Module:
    """A copy of the model with an adapter in its weights."""
    found = copy.deepcopy(model)
    for name, (down, up) in lora.items():
        found.get_parameter(f"{name}.weight").data += ALPHA / RANK * (up @ down)
    return found
