"""Makes this folder's files with the libraries whose formats they are, and records what those compute.

    python -m venv TOOLS
    TOOLS/bin/pip install sae-lens==6.54.12 dictionary-learning==0.1.0 pyreft==0.1.0 pyvene==0.1.8
    TOOLS/bin/python tests/foreign/make.py

Never in the server's environment. Each folder has what the library saved, and beside it is `{name}.io.safetensors` with
rows `x` [6, 16] and what the library makes of them, `y`: of an autoencoder, x and the difference between its features
decoded as `changed` leaves them and as they were; of an intervention, its output. Gemma Scope 2, Llama Scope, Goodfire
are published as files, not by a library: these layouts are written by hand, and SAELens' own loaders read them.
"""

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parent
WIDTH, FEATURES, ROWS = 16, 24, 6
SET, SCALED, ADDED = (3, 2.0), (5, 0.0), (7, 1.5)  # feature and number; the last only where it is active
GENERATOR = torch.Generator().manual_seed(12)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def changed(features: Tensor) -> Tensor:
    """The features after the edits that the tests ask for."""
    new = features.clone()
    new[:, SET[0]] = SET[1]
    new[:, SCALED[0]] *= SCALED[1]
    new[:, ADDED[0]] += ADDED[1] * (features[:, ADDED[0]] > 0)
    return new


def record(name: str, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]) -> None:
    """`encode` is called before every `decode`: some libraries keep a row's norm between them."""
    x = 2 * numbers(ROWS, WIDTH)
    with torch.no_grad():
        features = encode(x)
        before = decode(features)
        after = decode(changed(encode(x)))
    assert (features > 0).any() and (features == 0).any()
    content = {"x": x, "features": features.float(), "y": x + after - before}
    save_file({key: tensor.contiguous() for key, tensor in content.items()}, ROOT / f"{name}.io.safetensors")


def fresh(name: str) -> Path:
    path = ROOT / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def trained(module: torch.nn.Module) -> None:
    """Weights as if they had been trained: decoder rows of several lengths, biases that are not 0.

    Of an orthogonal parametrisation only what is below the diagonal moves, as in training.
    """
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if "parametrizations" in name:
                tensor.add_(numbers(*tensor.shape).tril(-1))
                continue
            tensor.copy_(numbers(*tensor.shape) * (0.3 if name.startswith("b") or "bias" in name else 0.5))


# ---- SAELens


def saelens() -> None:
    from sae_lens import SAE
    from sae_lens.saes.sae import SAEMetadata

    kinds: dict[str, dict[str, Any]] = {
        "standard": {"architecture": "standard"},
        "gated": {"architecture": "gated"},
        "jumprelu": {"architecture": "jumprelu", "apply_b_dec_to_input": False},
        "topk": {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True},
        "layer_norm": {"architecture": "standard", "normalize_activations": "layer_norm"},
    }
    for kind, said in kinds.items():
        metadata = SAEMetadata(hook_name="blocks.1.hook_resid_post", model_name="tiny", prepend_bos=True)
        sae = SAE.from_dict({"d_in": WIDTH, "d_sae": FEATURES, "metadata": metadata.to_dict(), **said})
        trained(sae)
        if kind == "jumprelu":
            with torch.no_grad():  # some below 0, where relu(z) * (z > threshold) is relu
                sae.threshold.copy_(numbers(FEATURES) * 0.5)
        path = fresh(f"saelens_{kind}")
        sae.save_model(path)
        loaded = SAE.load_from_disk(path)
        record(path.name, loaded.encode, loaded.decode)


# ---- dictionary_learning


def dictionary_learning() -> None:
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k
    from dictionary_learning.utils import load_dictionary

    kinds: dict[str, Callable[[], torch.nn.Module]] = {
        "AutoEncoder": lambda: dictionary.AutoEncoder(WIDTH, FEATURES),
        "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(WIDTH, FEATURES),
        "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(WIDTH, FEATURES),
        "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(WIDTH, FEATURES),
        "AutoEncoderTopK": lambda: top_k.AutoEncoderTopK(WIDTH, FEATURES, 4),
        "BatchTopKSAE": lambda: batch_top_k.BatchTopKSAE(WIDTH, FEATURES, 4),
        "MatryoshkaBatchTopKSAE": lambda: matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(WIDTH, FEATURES, 4, [8, 16]),
    }
    for kind, make in kinds.items():
        module = make()
        trained(module)
        if "TopK" in kind:
            module.get_buffer("threshold").fill_(0.7)
        path = fresh(f"dictionary_learning_{kind}")
        torch.save(module.state_dict(), path / "ae.pt")
        trainer = {"dict_class": kind, "trainer_class": "X", "activation_dim": WIDTH, "dict_size": FEATURES, "layer": 1}
        trainer |= {"lr": 1e-3, "seed": 0, "lm_name": "tiny", "submodule_name": "resid_post_layer_1", "device": "cpu"}
        trainer |= {"k": 4} if "TopK" in kind else {}
        buffer = {"d_submodule": WIDTH, "io": "out", "n_ctxs": 8, "ctx_len": 8, "refresh_batch_size": 8}
        buffer |= {"out_batch_size": 8, "device": "cpu"}
        (path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": buffer}))
        loaded, _ = load_dictionary(str(path), "cpu")
        record(path.name, loaded.encode, loaded.decode)


# ---- layouts by hand, read by SAELens


def layouts() -> None:
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    def local(repo_id: str, filename: str, *_: Any, subfolder: str = "", **__: Any) -> str:
        return str(ROOT / repo_id / subfolder / filename)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        from safetensors.torch import load_file

        return {name: list(tensor.shape) for name, tensor in load_file(local(repo_id, filename)).items()}

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = local, shapes

    def loaded(found: tuple[Any, ...], factor: float | None = None) -> Any:
        config, state, *_ = found
        sae = SAE.from_dict(handle_config_defaulting({**config, "dtype": "float32"}))
        sae.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        if factor is not None:
            sae.fold_activation_norm_scaling_factor(factor)
        return sae

    encoder, decoder = numbers(WIDTH, FEATURES) * 0.5, numbers(FEATURES, WIDTH)
    decoder /= decoder.norm(dim=1, keepdim=True)
    bias, decoder_bias, threshold = numbers(FEATURES) * 0.3, numbers(WIDTH) * 0.3, numbers(FEATURES).abs() * 0.5

    path = fresh("gemma_scope_2") / "resid_post" / "layer_1_width_24_l0_small"
    path.mkdir(parents=True)
    weights = {"w_enc": encoder, "w_dec": decoder, "b_enc": bias, "b_dec": decoder_bias, "threshold": threshold}
    save_file(weights, path / "params.safetensors")
    said = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "width": FEATURES, "l0": 10, "type": "sae"}
    said |= {"hf_hook_point_in": "model.layers.1.output", "hf_hook_point_out": "model.layers.1.output"}
    (path / "config.json").write_text(json.dumps(said | {"affine_connection": False}))
    sae = loaded(loaders.gemma_3_sae_huggingface_loader("gemma_scope_2", "resid_post/layer_1_width_24_l0_small"))
    record("gemma_scope_2", sae.encode, sae.decode)

    linear = {"weight": encoder.T.contiguous(), "bias": bias}, {"weight": decoder.T.contiguous(), "bias": decoder_bias}
    path = fresh("llama_scope") / "L1R"
    (path / "checkpoints").mkdir(parents=True)
    weights = {
        f"{name}.{key}": t.bfloat16()
        for name, of in zip(("encoder", "decoder"), linear, strict=True)
        for key, t in of.items()
    }
    save_file(weights, path / "checkpoints" / "final.safetensors")
    said = {"act_fn": "jumprelu", "jump_relu_threshold": 0.5, "norm_activation": "dataset-wise", "d_model": WIDTH}
    said |= {"hook_point_in": "blocks.1.hook_resid_post", "hook_point_out": "blocks.1.hook_resid_post", "top_k": 50}
    said |= {"dataset_average_activation_norm": {"in": 8.0, "out": 8.0}, "d_sae": FEATURES, "expansion_factor": 1.5}
    said |= {
        "sparsity_include_decoder_norm": True,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
    }
    (path / "hyperparams.json").write_text(json.dumps(said | {"use_glu_encoder": False, "dtype": "torch.float32"}))
    sae = loaded(loaders.llama_scope_sae_huggingface_loader("llama_scope", "L1R"), factor=WIDTH**0.5 / 8.0)
    record("llama_scope", sae.encode, sae.decode)

    path = fresh("goodfire")
    name = "Llama-3.1-8B-Instruct-SAE-l19.pth"
    torch.save({key.replace(".", "_linear."): tensor for key, tensor in weights.items()}, path / name)
    loaders.get_goodfire_config_from_hf = lambda *_, **__: {
        "architecture": "standard", "d_in": WIDTH, "d_sae": FEATURES, "apply_b_dec_to_input": False
    }  # fmt: skip
    sae = loaded(loaders.get_goodfire_huggingface_loader("goodfire", name))
    record("goodfire", sae.encode, sae.decode)


# ---- pyreft


def pyreft() -> None:
    import pyreft as reft
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 8, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(intermediate_size=16, num_key_value_heads=1, **sizes))
    kinds = {"Loreft": "relu", "Noreft": "tanh", "Consreft": None, "Lobireft": None, "Direft": "silu", "Nodireft": None}
    for kind, act in kinds.items():
        cls = getattr(reft.interventions, f"{kind}Intervention")
        said = {"embed_dim": WIDTH, "low_rank_dimension": 2, "add_bias": True, "dtype": torch.float32}
        made = cls(act_fn=act, **said).eval()
        trained(made)
        place = {"layer": 1, "component": "block_output", "low_rank_dimension": 2, "intervention": made}
        wrapped = reft.get_reft_model(model, reft.ReftConfig(representations=[place]))
        path = fresh(f"pyreft_{kind.lower()}")
        wrapped.save(str(path))
        x = 2 * numbers(ROWS, WIDTH)
        with torch.no_grad():
            save_file({"x": x, "y": made(x).float().contiguous()}, ROOT / f"{path.name}.io.safetensors")
    wrapped.save_intervention(str(fresh("pyreft_checkpoint")))  # as a trainer does, without config.json


def main() -> None:
    for part in (saelens, dictionary_learning, layouts, pyreft):
        part()
    made = {name: version(name) for name in ("sae-lens", "dictionary-learning", "pyreft", "pyvene", "torch")}
    (ROOT / "versions.json").write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
