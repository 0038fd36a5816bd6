"""Sparse autoencoders. Whose features are steered, a request says.

saelens      cfg.json and sae_weights.safetensors (jbloomAus/SAELens): W_enc [hidden, features], b_enc, W_dec [features,
             hidden], b_dec, threshold. Releases before 6 have other keys in cfg.json.
gemma_scope  params.npz with the same arrays (google/gemma-scope-*); the layer is in the folder's name, layer_{l}
sparsify     cfg.json and sae.safetensors (EleutherAI/sparsify): encoder.weight [features, hidden], encoder.bias, W_dec
             [features, hidden], b_dec; the layer is the folder's name, layers.{l}; TopK
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.contents import names
from whipstaff.steering.importers.importer import Draft, Hints, Importer, layer_of
from whipstaff.steering.importers.source import Source, numbers, read_npz
from whipstaff.steering.shape import ModelShape, Site

_HOOKS: dict[str, Site] = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "attn.hook_z": "attn_head",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
}
_SANDWICHED = ("Gemma2", "Gemma3")  # a norm follows the attention's and the MLP's output, and these hooks come after it
_PARTS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


class SAELens(Importer):
    name, files = "saelens", "a folder with cfg.json and sae_weights.safetensors"
    takes = frozenset({"layer", "site", "input_scale"})

    def claims(self, source: Source) -> bool:
        return "cfg.json" in source.names and "sae_weights.safetensors" in source.names

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        config = _settings(source.json("cfg.json"))
        found = {name: tensor for name, tensor in source.tensors("sae_weights.safetensors") if name in _PARTS}
        site, layer = _place(str(config["hook"]), hints, model)
        activation, k = config["activation"], config["k"]
        norm = config["norm"]
        notes: list[str] = []
        if norm == "expected_average_only_in":
            if hints.input_scale is None:
                raise SteeringError(
                    "the autoencoder's input is scaled by a factor that its folder lacks (expected_average_only_in)",
                    "input_scale",
                )
            norm = "none"
        parts = _parts(found, site, model)
        if config["rescale"]:
            parts, notes = _rescaled(parts), ["rescale_acts_by_decoder_norm was folded into the encoder and decoder"]
        if activation == "jumprelu" and "threshold" not in parts:
            raise SteeringError("a jumprelu autoencoder without threshold")
        if hints.input_scale is not None:
            parts["input_scale"] = torch.tensor(hints.input_scale)
        own = {"activation": activation, "k": k, "normalize_activations": norm}
        own["apply_b_dec_to_input"] = config["apply_b_dec_to_input"]
        return _drafted(site, layer, parts, own, notes)


class GemmaScope(Importer):
    name, files = "gemma_scope", "params.npz, below a folder layer_{l}"
    takes = frozenset({"layer", "site"})

    def claims(self, source: Source) -> bool:
        found = [name for name in source.names if name.endswith(".npz")]
        return (source.is_folder and bool(found)) or any("w_dec" in map(str.lower, names(source)) for _ in found)

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        names = [name for name in source.names if name.endswith(".npz")]
        if len(names) != 1:
            raise SteeringError(f"{source.name} has {len(names)} .npz files; name one")
        known = {part.lower(): part for part in _PARTS}
        arrays = read_npz(source.file(names[0]))
        found = {known[name.lower()]: array for name, array in arrays if name.lower() in known}
        where = str(source.path.absolute())
        match = re.search(r"layer_(\d{1,4})(?:/|$)", where)
        layer = layer_of(hints, model, int(match[1]) if match else None)
        site = hints.site or _scope_site(where)
        _check_sandwich(site, model)
        own = {"activation": "jumprelu" if "threshold" in found else "relu", "apply_b_dec_to_input": False}
        return _drafted(site, layer, _parts(found, site, model), own, [])


class Sparsify(Importer):
    name, files = "sparsify", "a folder layers.{l} with cfg.json and sae.safetensors"
    takes = frozenset({"layer", "site"})

    def claims(self, source: Source) -> bool:
        return "cfg.json" in source.names and "sae.safetensors" in source.names

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        config = source.json("cfg.json")
        if config.get("transcode") or config.get("skip_connection"):
            raise SteeringError("a transcoder reads one place and writes another; it is no autoencoder")
        if config.get("activation", "topk") != "topk" or config.get("multi_topk"):
            raise SteeringError(f"activation {config.get('activation')!r} (multi_topk: {config.get('multi_topk')})")
        found = dict(source.tensors("sae.safetensors"))
        match = re.fullmatch(r"(?:layers|h)\.(\d{1,4})(\.mlp|\.attn|\.self_attn)?", source.path.absolute().name)
        inner: dict[str | None, Site] = {None: "resid_post", ".mlp": "mlp_out"}
        site = hints.site or inner.get(match[2] if match else None, "attn_out")
        layer = layer_of(hints, model, int(match[1]) if match else None)
        own = {"activation": "topk", "k": config.get("k"), "apply_b_dec_to_input": True}
        theirs = {
            "W_enc": _transposed(found.get("encoder.weight")),
            "b_enc": found.get("encoder.bias"),
            "W_dec": found.get("W_dec", _transposed(found.get("decoder.weight"))),
            "b_dec": found.get("b_dec"),
        }
        parts = _parts({name: tensor for name, tensor in theirs.items() if tensor is not None}, site, model)
        return _drafted(site, layer, parts, own, [])


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """cfg.json of any release."""
    metadata = config.get("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else {}
    options = config.get("activation_fn_kwargs")
    options = options if isinstance(options, Mapping) else {}
    said = config.get("activation_fn", config.get("activation_fn_str"))
    architecture = config.get("architecture", "standard")
    k = config.get("k", options.get("k"))
    if architecture == "topk" or (architecture == "standard" and said == "topk"):
        activation = "topk"
    elif architecture == "jumprelu":
        activation, k = "jumprelu", None
    elif architecture == "standard" and said in (None, "relu"):
        activation, k = "relu", None
    else:
        raise SteeringError(f"architecture {architecture!r} with activation {said!r}; wanted ReLU, JumpReLU or TopK")
    norm = config.get("normalize_activations", "none")
    if norm is None or isinstance(norm, bool):
        norm = "expected_average_only_in" if norm else "none"
    if norm not in ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"):
        raise SteeringError(f"normalize_activations {norm!r}")
    names = ("hook_name", "hook_point")
    hook = next((each[name] for each in (metadata, config) for name in names if each.get(name)), "")
    return {
        "activation": activation,
        "k": k,
        "norm": norm,
        "hook": hook,
        "apply_b_dec_to_input": bool(config.get("apply_b_dec_to_input", True)),
        "rescale": bool(config.get("rescale_acts_by_decoder_norm")) and activation == "topk",
    }


def _place(hook: str, hints: Hints, model: ModelShape) -> tuple[Site, int]:
    site, layer = hints.site, None
    if match := re.fullmatch(r"blocks\.(\d{1,4})\.([\w.]+)", hook):
        site, layer = site or _HOOKS.get(match[2]), int(match[1])
    elif match := re.fullmatch(r"(?:.*\.)?layers\.(\d{1,4})", hook):
        site, layer = site or "resid_post", int(match[1])
    if site is None:
        raise SteeringError(f"hook {hook[:128]!r} is none of {', '.join(_HOOKS)}; say the site", "site")
    _check_sandwich(site, model)
    return site, layer_of(hints, model, layer)


def _check_sandwich(site: Site, model: ModelShape) -> None:
    if site in ("attn_out", "mlp_out") and model.architecture.startswith(_SANDWICHED):
        raise SteeringError(
            f"the autoencoder reads the {site} of {model.architecture} after the norm behind it; Whipstaff edits before"
        )


def _scope_site(where: str) -> Site:
    if re.search(r"-mlp\b|/mlp/", where):
        return "mlp_out"
    return "attn_head" if re.search(r"-att\b|/attn/", where) else "resid_post"


def _parts(found: Mapping[str, Tensor], site: Site, model: ModelShape) -> dict[str, Tensor]:
    """As our files have them: both matrices with a row per feature."""
    if missing := [name for name in ("W_enc", "W_dec") if name not in found]:
        raise SteeringError(f"the file has no {missing[0]}; it has {', '.join(sorted(found)) or 'nothing known'}")
    width = model.width(site)
    if found["W_enc"].ndim != 2:
        raise SteeringError(f"W_enc has shape {list(found['W_enc'].shape)}, wanted [{width}, features]")
    size = found["W_enc"].shape[1]
    parts = {
        "encoder": numbers("W_enc", found["W_enc"].T, size, width),
        "decoder": numbers("W_dec", found["W_dec"], size, width),
    }
    if site == "attn_head":
        parts = {name: rows.view(size, model.num_heads, model.head_dim) for name, rows in parts.items()}
    for theirs, ours, num in (("b_enc", "encoder_bias", size), ("threshold", "threshold", size)):
        if theirs in found:
            parts[ours] = numbers(theirs, found[theirs], num)
    if "b_dec" in found:
        bias = numbers("b_dec", found["b_dec"], width)
        parts["decoder_bias"] = bias.view(model.num_heads, model.head_dim) if site == "attn_head" else bias
    return parts


def _rescaled(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Readings times the norms of the decoder's rows, before TopK; what is written, by as much less."""
    norms = parts["decoder"].flatten(1).norm(dim=1)
    if not norms.all():
        raise SteeringError("a row of W_dec has length 0")
    column = norms.view(-1, *[1] * (parts["decoder"].ndim - 1))
    scaled = {"encoder": parts["encoder"] * column, "decoder": parts["decoder"] / column}
    if "encoder_bias" in parts:
        scaled["encoder_bias"] = parts["encoder_bias"] * norms
    return parts | scaled


def _transposed(tensor: Tensor | None) -> Tensor | None:
    return tensor.T if tensor is not None and tensor.ndim == 2 else tensor


def _drafted(site: Site, layer: int, parts: Mapping[str, Tensor], own: dict[str, Any], notes: list[str]) -> Draft:
    tensors = {f"{site}.{layer}.{part}": tensor for part, tensor in parts.items()}
    return Draft(
        "sae", tensors, defaults={name: value for name, value in own.items() if value is not None}, notes=notes
    )
