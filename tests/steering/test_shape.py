"""A model's shape: what its config says is what the engine makes of it, for a folder and for a server alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig
from vllm.config.model import MODEL_ARCH_CONFIG_CONVERTORS, ModelArchConfigConvertorBase, get_hf_text_config

from whipstaff.server.commands.vectors import main, shape_of
from whipstaff.steering.errors import VectorMismatch
from whipstaff.steering.shape import ModelShape, config_shape
from whipstaff.steering.vector_file import Header, Vector, packed, parse

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2}
LATENT = SIZES | {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24}
CONFIGS: dict[str, dict[str, Any]] = {  # by model type
    "llama": GROUPED,
    "qwen3": GROUPED | {"head_dim": 32},
    "gemma2": GROUPED | {"head_dim": 24},
    "phi3": GROUPED | {"pad_token_id": 0},
    "mixtral": GROUPED | {"num_local_experts": 6},
    "qwen3_moe": GROUPED | {"num_experts": 6},
    "olmoe": GROUPED | {"num_experts": 6},
    "phimoe": GROUPED | {"num_local_experts": 6},
    "granitemoe": GROUPED | {"num_local_experts": 6},
    "gpt_oss": GROUPED | {"num_local_experts": 6, "head_dim": 24},
    "jamba": GROUPED | {"num_experts": 6},
    "deepseek_v2": LATENT | {"n_routed_experts": 6, "head_dim": 16},
    "deepseek_v3": LATENT | {"n_routed_experts": 6},
    "minicpm3": LATENT,
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4},
    "gptj": {"n_embd": 64, "n_layer": 4, "n_head": 4},
    "gpt_neo": {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "gpt_neox": SIZES,
    "opt": SIZES | {"word_embed_proj_dim": 64},
    "bloom": {"hidden_size": 64, "n_layer": 4, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 4, "n_heads": 4},
    "phi": SIZES,
    "persimmon": SIZES,
    "falcon": SIZES | {"multi_query": False},
    "falcon multi-query": SIZES | {"multi_query": True},
    "falcon new": SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": True},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 4, "n_head": 4, "multi_query": True},
    "gpt_bigcode many": {"n_embd": 64, "n_layer": 4, "n_head": 4, "multi_query": False},
    "dbrx": {"d_model": 64, "n_layers": 4, "n_heads": 4, "attn_config": {"kv_n_heads": 2}},
    "zamba2": SIZES | {"layer_types": ["mamba", "hybrid"] * 2},
    "llava": {"text_config": {"model_type": "llama", **GROUPED}},
    "gemma3": {"text_config": GROUPED | {"head_dim": 24}},
    "qwen3_next": GROUPED | {"num_experts": 6, "head_dim": 24},
}
# Where vLLM's number is not the model's: rows of a latent cache are no heads, and DBRX keeps its experts elsewhere.
OURS = {"deepseek_v2": {"head_dim": 24}, "deepseek_v3": {"head_dim": 24}, "minicpm3": {"head_dim": 24}}
OURS |= {"dbrx": {"num_experts": 4}}


def config_of(name: str) -> Any:
    model_type = name.split()[0]
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers knows no {model_type}")
    return AutoConfig.for_model(model_type, **CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shape_is_what_the_engine_reads(name: str) -> None:
    config = config_of(name)
    text = get_hf_text_config(config)
    engine = MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, ModelArchConfigConvertorBase)(config, text).convert()
    shape = config_shape(config).model_dump(exclude={"architecture"})
    assert config_shape(config, text) == config_shape(config)
    assert shape == {
        "hidden_size": engine.hidden_size,
        "num_layers": engine.total_num_hidden_layers,
        "num_heads": engine.total_num_attention_heads,
        "head_dim": engine.head_size,
        "num_kv_heads": engine.total_num_kv_heads,
        "num_experts": engine.num_experts or 0,
    } | OURS.get(name, {})
    assert (shape["hidden_size"], shape["num_layers"], shape["num_heads"]) == (64, 4, 4)


def test_where_layers_have_heads_of_their_own_the_shape_has_the_usual_ones() -> None:
    config = AutoConfig.for_model(
        "gemma4_text", **GROUPED, head_dim=24, layer_types=["sliding_attention"] * 3 + ["full_attention"]
    )
    assert {layer.head_dim for layer in config.per_layer_config} == {24, config.per_layer_config[3].head_dim} != {24}
    assert config_shape(config).head_dim == 24


@pytest.mark.parametrize("name", ("gpt2", "deepseek_v2", "mixtral"))
def test_a_folder_has_the_shape_of_its_config(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    config.save_pretrained(tmp_path)
    assert shape_of(str(tmp_path)) == config_shape(config)


def vector(method: str, shape: ModelShape, **tensors: torch.Tensor) -> Vector:
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return parse(packed(Header(method=method, model=shape), named))


def test_a_vector_of_the_stream_does_not_ask_for_the_size_of_heads() -> None:
    """Its file was made when heads of latent attention were measured otherwise; the numbers are as right as before."""
    served = config_shape(config_of("deepseek_v2"))
    earlier = served.model_copy(update={"head_dim": 16, "num_kv_heads": 2})
    vector("control_vector", earlier, resid_post__1__add=torch.ones(64)).check_fits(served)
    heads = vector("function_vector", earlier, attn_head__1__add=torch.ones(4, 16))
    with pytest.raises(VectorMismatch):
        heads.check_fits(served)
    for wrong in ({"hidden_size": 32}, {"num_layers": 5}, {"num_heads": 2}, {"num_experts": 4}):
        other = served.model_copy(update=wrong)
        with pytest.raises(VectorMismatch):
            vector("control_vector", other, resid_post__1__add=torch.ones(other.hidden_size)).check_fits(served)


@pytest.mark.parametrize(("num_kv_heads", "status"), ((2, 1), (4, 0)))
def test_a_prefix_has_the_kv_heads_that_the_config_does_not_name(
    num_kv_heads: int, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2 has keys and values for every head, though nothing in its config says so."""
    config_of("gpt2").save_pretrained(tmp_path / "gpt2")
    peft = tmp_path / "prefix"
    peft.mkdir()
    said = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "num_transformer_submodules": 1}
    (peft / "adapter_config.json").write_text(json.dumps(said))
    save_file({"prompt_embeddings": torch.randn(3, 2 * 4 * num_kv_heads * 16)}, peft / "adapter_model.safetensors")
    made = str(tmp_path / "made.safetensors")
    assert main(["convert", str(peft), made, "--model", str(tmp_path / "gpt2")]) == status
    assert ("4 kv heads * 16" in capsys.readouterr().err) == bool(status)
