"""Files as other people's libraries write them, with what those libraries make of them. Run in a tool environment:

    pip install torch==2.13.0 transformers==4.57.6 steering-vectors==0.12.2 repeng==0.4.0 peft==0.21.2 saklas==5.3.0
        transformer_lens==2.18.0
    python tests/golden/files/make.py

Each folder gets the files, and expected.safetensors with what the library computes: `logits` of `input_ids` under its
own hooks on the golden model llama_a, or `rows` as it inserts or stores them. The server never needs these libraries.
"""

import copy
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
MODEL = HERE.parent / "steering" / "models" / "llama_a"
IDS = torch.tensor([[5, 17, 42, 9, 77, 3, 28]])
STRENGTH = 1.5


def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()


def vectors(*layers: int) -> dict[int, Tensor]:
    return {layer: torch.randn(128) / 8 for layer in layers}


def logits(which: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"input_ids": IDS[0], "logits": which(IDS).logits[0].contiguous()}


def steering_vectors() -> None:
    from steering_vectors import SteeringVector

    for kind in ("decoder_block", "mlp", "self_attn", "post_attention_layernorm"):
        folder = made(f"steering_vectors_{kind}")
        vector, steered = SteeringVector(vectors(1, 2), kind), model()
        torch.save(dataclasses.asdict(vector), folder / "vectors.pt")
        if kind == "decoder_block":
            torch.save(vector, folder / "object.pt")
            torch.save(vector.layer_activations, folder / "dict.pt")
        with vector.apply(steered, multiplier=STRENGTH):
            save_file(logits(steered), folder / "expected.safetensors")


def repeng() -> None:
    vars(np)["float_"] = np.float64  # repeng 0.4.0 names it in an annotation; NumPy 2 has it no more
    from repeng import ControlModel, ControlVector

    folder = made("repeng")
    vector = ControlVector("llama", {layer: row.numpy() for layer, row in vectors(1, 2, 3).items()})
    torch.save(dataclasses.asdict(vector), folder / "asdict.pt")
    torch.save(vector, folder / "object.pt")
    steered = ControlModel(model(), [1, 2, 3])
    steered.set_control(vector, STRENGTH)
    save_file(logits(steered), folder / "expected.safetensors")


def saklas() -> None:
    from saklas.core.profile import Profile

    folder = made("saklas")
    profile = Profile(vectors(0, 3))
    profile.save(folder / "calm.safetensors")
    found = Profile.load(folder / "calm.safetensors")
    save_file({f"rows.{layer}": row.contiguous() for layer, row in found.items()}, folder / "expected.safetensors")


def peft() -> None:
    from peft import CPTConfig, MultitaskPromptTuningConfig, PeftModel, TaskType, get_peft_model

    common: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": 3}
    folder = made("peft_multitask")
    trained = get_peft_model(model(), MultitaskPromptTuningConfig(**common, num_tasks=2, num_ranks=2))
    for parameter in trained.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    trained.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(model(), folder)
    rows = {f"rows.{task}": loaded.get_prompt(1, torch.tensor([task]))[0].detach().clone() for task in range(2)}
    save_file(rows, folder / "expected.safetensors")

    folder = made("peft_cpt")
    said = {"cpt_token_ids": [4, 5, 6], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]}
    trained = get_peft_model(model(), CPTConfig(**common, **said))
    torch.nn.init.normal_(trained.prompt_encoder["default"].delta_embedding.weight)
    trained.save_pretrained(folder)
    rows = {"rows": trained.get_prompt(1)[0].detach().clone()}
    loaded = PeftModel.from_pretrained(model(), folder)
    assert torch.allclose(loaded.get_prompt(1)[0], rows["rows"], atol=1e-6)
    save_file(rows, folder / "expected.safetensors")


def transformer_lens() -> None:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    folder = made("transformer_lens")
    config = HookedTransformerConfig(
        n_layers=4, d_model=128, n_ctx=16, d_head=32, n_heads=4, d_mlp=16, d_vocab=100, act_fn="relu", seed=0
    )
    lens = HookedTransformer(config)
    both = torch.cat([IDS[:, :3], IDS[:, 3:6]])
    _, cache = lens.run_with_cache(IDS[:, :3], names_filter=lambda name: "resid" in name)
    torch.save(copy.deepcopy(dict(cache)), folder / "cache.pt")
    _, cache = lens.run_with_cache(both, names_filter=lambda name: name.endswith("_resid_post"))
    save_file({name: each.contiguous() for name, each in cache.items()}, folder / "two.safetensors")
    _, both = lens.run_with_cache(both, names_filter=lambda name: "resid" in name)
    rows = {f"rows.{layer}": both["resid_pre", layer].detach().clone() for layer in range(4)}
    save_file(rows, folder / "expected.safetensors")


def made(name: str) -> Path:
    (HERE / name).mkdir(exist_ok=True)
    return HERE / name


MAKERS: list[Callable[[], None]] = [steering_vectors, repeng, saklas, peft, transformer_lens]

if __name__ == "__main__":
    for maker in MAKERS:
        if maker.__name__ in sys.argv[1:] or not sys.argv[1:]:
            torch.manual_seed(12)
            maker()
