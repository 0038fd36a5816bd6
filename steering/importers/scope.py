"""Gemma Scope's and Llama Scope's autoencoders, of JumpReLU; the decoder's bias is not taken off before they encode.

gemma_scope    params.npz with W_enc [hidden, features], b_enc, W_dec [features, hidden], b_dec, threshold in a folder
               gemma-scope-{model}-{res,mlp,att}/layer_{l}/...; that name is all that tells a transcoder from them
gemma_scope_2  config.json and params.safetensors, the same in lower case; the config names the hooks
llama_scope    hyperparams.json and checkpoints/final.safetensors with encoder.weight [features, hidden], encoder.bias,
               decoder.weight, decoder.bias (OpenMOSS); one jump_relu_threshold. Rows are multiplied by a factor that
               brings their average norm to the root of their width, and the threshold too, as SAELens reads them
"""

import re

import torch
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers import contents
from whipstaff.steering.importers.autoencoder import (
    TRANSCODER,
    check_sandwich,
    check_size,
    drafted,
    linear,
    of_hook,
    parts_of,
)
from whipstaff.steering.importers.importer import Draft, Hints, Importer, layer_of
from whipstaff.steering.importers.ledger import Ledger
from whipstaff.steering.importers.source import Source
from whipstaff.steering.shape import ModelShape, Site

_KINDS: dict[str, Site] = {
    "res": "resid_post",
    "mlp": "mlp_out",
    "att": "attn_head",
    "resid_post": "resid_post",
    "mlp_out": "mlp_out",
    "attn_out": "attn_head",  # what the output projection receives
}
_HF_HOOKS: dict[str, Site] = {
    "output": "resid_post",
    "self_attn.o_proj.input": "attn_head",
    "post_feedforward_layernorm.output": "mlp_out",
}
_HYPERPARAMS = "hyperparams.json"
_TRAINING = (  # what a run of Llama Scope was told, which is over
    "*_coefficient",
    "*_size",
    "ddp*",
    "device",
    "dtype",
    "expansion_factor",
    "init_*",
    "lp",
    "remove_gradient_*",
    "sae_pretrained_name_or_path",
    "seed",
    "strict_mode",
    "top_k",
    "use_decoder_bias",
    "use_ghost_grads",
)
_PARTS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


class GemmaScope(Importer):
    name, files = "gemma_scope", "params.npz, below folders gemma-scope-{model}-{res,mlp,att}/layer_{l}"
    takes = frozenset({"layer", "site"})

    def claims(self, source: Source) -> bool:
        found = [name for name in source.names if name.endswith(".npz")]
        return bool(found) and (source.is_folder or "w_dec" in map(str.lower, contents.names(source)))

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        names = [name for name in source.names if name.endswith(".npz")]
        if len(names) != 1:
            raise SteeringError(f"{source.name} has {len(names)} .npz files; name one")
        kind, found = _folders(source)
        site = hints.site or _KINDS.get(kind or "")
        if site is None:
            raise SteeringError(
                "the folders do not say what was read (gemma-scope-..-res, -mlp or -att), and the file of a transcoder "
                "looks the same and has no meaning here: say the site if it is an autoencoder",
                "site",
            )
        return _drafted(source.arrays(names[0]), site, layer_of(hints, model, found), model)


class GemmaScope2(Importer):
    name, files = "gemma_scope_2", "a folder with config.json (hf_hook_point_in) and params.safetensors"
    takes = frozenset({"layer", "site"})

    def claims(self, source: Source) -> bool:
        return "params.safetensors" in source.names

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        found = source.named("params.safetensors")
        kind, layer = _folders(source)
        site = hints.site or _KINDS.get(kind or "")
        if "config.json" in source.names:
            said, layer = _hooked(source.json("config.json"), found)
            site = hints.site or said
        if site is None:
            raise SteeringError(
                "neither a config.json nor the folders say what was read: say the site, if it is an autoencoder",
                "site",
            )
        return _drafted(found, site, layer_of(hints, model, layer), model)


class LlamaScope(Importer):
    name, files = "llama_scope", "a folder with hyperparams.json and checkpoints/final.safetensors"
    takes = frozenset({"layer", "site"})

    def claims(self, source: Source) -> bool:
        return "hyperparams.json" in source.names

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        config = source.json(_HYPERPARAMS)
        config.harmless(*_TRAINING)
        site, layer = _hooks(config, hints, model)
        files = [name for name in source.names if name.endswith(".safetensors")]
        if len(files) != 1:
            raise SteeringError(
                f"{source.name} has {len(files)} files of weights; wanted checkpoints/final.safetensors"
            )
        parts, notes = parts_of(linear(source.named(files[0]), "encoder", "decoder", "decoder.bias"), site, model)
        check_size(config.get("d_model"), model.width(site), "d_model", _HYPERPARAMS)
        check_size(config.get("d_sae"), len(parts["encoder"]), "d_sae", _HYPERPARAMS)
        factor = _factor(config, model.width(site))
        parts["input_scale"] = torch.tensor(factor)
        parts["threshold"] = torch.full((len(parts["encoder"]),), factor * _threshold(config, parts))
        return drafted(site, layer, parts, {"activation": "jumprelu", "apply_b_dec_to_input": False}, notes)


def _hooks(config: Ledger, hints: Hints, model: ModelShape) -> tuple[Site, int]:
    """Where it reads and writes. Raises: SteeringError."""
    reads = config.get("hook_point_in")
    if (writes := config.get("hook_point_out", reads)) != reads or config.get("use_glu_encoder"):
        raise SteeringError(TRANSCODER.format(what="the folder's", reads=reads, writes=writes))
    site, layer = of_hook(str(reads), hints)
    if site is None:
        raise SteeringError(f"hook_point_in {reads!r:.128} is no hook that is known here; say the site", "site")
    return site, layer_of(hints, model, layer)


def _factor(config: Ledger, width: int) -> float:
    """What a row is multiplied by before it is encoded: its mean length becomes the root of its width.

    Raises: SteeringError.
    """
    norms = config.section("dataset_average_activation_norm")
    given = [norms.get(name) for name in ("in", "out")]
    if config.get("norm_activation") != "dataset-wise" or not isinstance(given[0], int | float) or given[0] <= 0:
        raise SteeringError(f"norm_activation of {_HYPERPARAMS} is not 'dataset-wise' with an average norm")
    if given[1] not in (None, given[0]):
        raise SteeringError(f"the average norms of {_HYPERPARAMS} differ, {given[0]} in and {given[1]} out")
    return float(width**0.5 / given[0])


def _threshold(config: Ledger, parts: dict[str, Tensor]) -> float:
    """Raises: SteeringError for activations that compute something else."""
    value = config.get("jump_relu_threshold")
    if config.get("act_fn") != "jumprelu" or not isinstance(value, int | float):
        raise SteeringError(
            f"act_fn {config.get('act_fn')!r:.64} with jump_relu_threshold {value!r:.64}; wanted jumprelu"
        )
    if config.get("apply_decoder_bias_to_pre_encoder"):
        raise SteeringError("apply_decoder_bias_to_pre_encoder is true; in the releases it is false")
    uneven = (parts["decoder"].flatten(1).norm(dim=1) - 1).abs().max() > 0.02  # bfloat16's
    if config.get("sparsity_include_decoder_norm") and uneven:
        raise SteeringError("sparsity_include_decoder_norm is true, and the decoder's rows are not of length 1")
    return float(value)


def _drafted(found: Ledger, site: Site, layer: int, model: ModelShape) -> Draft:
    check_sandwich(site, model)
    spelled = {str(name).lower(): name for name in found}
    weights = {part: found[spelled[part.lower()]] for part in _PARTS if part.lower() in spelled}
    parts, notes = parts_of(weights, site, model)
    own = {"activation": "jumprelu" if "threshold" in parts else "relu", "apply_b_dec_to_input": False}
    return drafted(site, layer, parts, own, notes)


def _hooked(config: Ledger, found: Ledger) -> tuple[Site, int]:
    """Where config.json says that it reads and writes. Raises: SteeringError."""
    config.harmless("model_name", "l0")
    reads = config.get("hf_hook_point_in")
    writes = config.get("hf_hook_point_out") or reads
    kind = config.get("type") or "sae"
    if reads != writes or config.get("affine_connection") or kind != "sae":
        raise SteeringError(TRANSCODER.format(what=f"a {kind!r}, as config.json says,", reads=reads, writes=writes))
    if (architecture := config.get("architecture")) not in (None, "jump_relu"):
        raise SteeringError(f"architecture {architecture!r} of config.json, wanted 'jump_relu'")
    if "w_enc" in found:
        check_size(config.get("width"), found["w_enc"].shape[-1], "width", "config.json")
    match = re.fullmatch(r"(?:.*\.)?layers\.(\d{1,4})\.([\w.]+)", str(reads))
    if match is None or match[2] not in _HF_HOOKS:
        raise SteeringError(f"hf_hook_point_in {reads!r:.128} is none of a layer's {', '.join(_HF_HOOKS)}")
    return _HF_HOOKS[match[2]], int(match[1])


def _folders(source: Source) -> tuple[str | None, int | None]:
    """What was read and the layer, as the release's folders are called. Raises: SteeringError for a transcoder's."""
    names = list(source.path.absolute().parts)
    place = next((at for at in reversed(range(len(names))) if re.match(r"layer_\d", names[at])), None)
    if place is None:
        return None, None
    match = re.match(r"layer_(\d{1,4})(?:_|$)", names[place])
    repository = (
        place - 3 if names[place - 2 : place - 1] == ["snapshots"] else place - 1
    )  # of the hub's cache, or a copy
    above = names[max(repository, 0) : place]
    if any(re.search("transcoder|crosscoder|clt", name) for name in above):
        raise SteeringError(TRANSCODER.format(what=f"{'/'.join(above)}", reads="the MLP's input", writes="its output"))
    kinds = [kind for name in reversed(above) for kind in _KINDS if re.search(rf"(?:^|-){kind}(?:_all)?$", name)]
    return (kinds[0] if kinds else None), int(match[1]) if match else None
