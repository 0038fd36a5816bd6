"""Sparse autoencoders of SAELens and of sparsify. Whose features are steered, a request says.

saelens      cfg.json and sae_weights.safetensors (jbloomAus/SAELens): W_enc [hidden, features], b_enc, W_dec [features,
             hidden], b_dec, threshold; gated ones r_mag, b_mag, b_gate. Releases before 6 have other keys in cfg.json,
             and may have a scaling_factor [features] of what is decoded.
sparsify     cfg.json and sae.safetensors (EleutherAI/sparsify): encoder.weight [features, hidden], encoder.bias, W_dec
             [features, hidden], b_dec; the layer is the folder's name, layers.{l}; TopK
"""

import re

import torch
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.autoencoder import (
    HOOKS,
    TRANSCODER,
    check_sandwich,
    check_size,
    drafted,
    gated,
    k_of,
    of_hook,
    parts_of,
    rescaled,
    transposed,
)
from whipstaff.steering.importers.importer import Draft, Hints, Importer, layer_of
from whipstaff.steering.importers.ledger import Ledger
from whipstaff.steering.importers.source import Source
from whipstaff.steering.shape import ModelShape, Site

_GATED = {name: name for name in ("r_mag", "b_mag", "b_gate")}
_NORMS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
_CONFIG = "cfg.json"
_TRAINING = (  # what a run of SAELens was told, which its weights show or which is over; releases 1 to 6
    "act_store_device",
    "activation_store_batch_size",
    "activations_mixing_fraction",
    "adam_beta*",
    "autocast*",
    "aux_loss_coefficient",
    "b_dec_init_method",
    "cached_activations_path",
    "checkpoint_path",
    "compile_*",
    "context_size",
    "d_sae_explicit",
    "dataset*",
    "dead_feature_*",
    "decoder_*init*",
    "decoder_orthogonal_init",
    "device",
    "disable_concat_sequences",
    "dtype",
    "eval_*",
    "exclude_special_tokens",
    "expansion_factor",
    "feature_sampling_*",
    "finetuning_method",
    "finetuning_tokens",
    "from_pretrained_path",
    "hook_eval",
    "init_encoder_as_decoder_transpose",
    "is_dataset_tokenized",
    "jumprelu_*",
    "l0_*",
    "l1_*",
    "llm_*",
    "log_*",
    "logger",
    "lp_norm",
    "lr*",
    "mse_loss_normalization",
    "n_*",
    "neuronpedia_id",
    "noise_scale",
    "normalize_sae_decoder",
    "output_path",
    "pre_act_loss_coefficient",
    "prefetch_llm_batches",
    "prepend_bos",
    "resume*",
    "run_name",
    "sae_compilation_mode",
    "sae_lens_*version",
    "save_final_checkpoint",
    "scale_sparsity_penalty_by_decoder_norm",
    "seed",
    "seqpos_slice",
    "sequence_separator_token",
    "sparsity_*",
    "store_batch_size*",
    "streaming",
    "target_l0",
    "tokens_per_buffer",
    "topk_threshold_lr",
    "train_batch_size*",
    "training_tokens",
    "use_cached_activations",
    "use_chat_formatting",
    "use_ghost_grads",
    "use_sparse_activations",
    "verbose",
    "wandb_*",
    "model_class_name",
    "model_name",
    "model_kwargs",
)


class SAELens(Importer):
    name, files = "saelens", "a folder with cfg.json and sae_weights.safetensors"
    takes = frozenset({"layer", "site", "input_scale"})

    def claims(self, source: Source) -> bool:
        return _CONFIG in source.names and "sae_weights.safetensors" in source.names

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        config, found = source.json(_CONFIG), source.named("sae_weights.safetensors")
        metadata = config.section("metadata")
        for each in (config, metadata):
            each.harmless(*_TRAINING)
        kind, k = _architecture(config)
        site, layer = _place(config, metadata, hints, model)
        weights = {name: found.get(name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        if kind == "jumprelu":
            weights["threshold"] = found.get("threshold")
            if weights["threshold"] is None:
                raise SteeringError("a jumprelu autoencoder without threshold")
        if kind == "gated":
            weights |= gated({name: found.get(name) for name in ("W_enc", *_GATED)}, _GATED)
            kind = "jumprelu"
        parts, notes = parts_of(weights, site, model)
        check_size(config.get("d_in"), model.width(site), "d_in", _CONFIG)
        check_size(config.get("d_sae"), len(parts["encoder"]), "d_sae", _CONFIG)
        notes += _centred(parts, config, metadata, site) + _scaled(parts, config, found)
        if config.get("rescale_acts_by_decoder_norm"):
            if kind != "topk":
                raise SteeringError(f"rescale_acts_by_decoder_norm of {_CONFIG} is true; only topk's is known")
            parts = rescaled(parts)
            notes.append("rescale_acts_by_decoder_norm was folded into the encoder and decoder")
        norm = _norm(config, hints)
        if hints.input_scale is not None:
            parts["input_scale"] = torch.tensor(hints.input_scale)
        own = {"activation": kind, "k": k, "normalize_activations": norm}
        own["apply_b_dec_to_input"] = _flag(config, "apply_b_dec_to_input", True)
        return drafted(site, layer, parts, own, notes)


class Sparsify(Importer):
    name, files = "sparsify", "a folder layers.{l} with cfg.json and sae.safetensors"
    takes = frozenset({"layer", "site"})

    def claims(self, source: Source) -> bool:
        return _CONFIG in source.names and "sae.safetensors" in source.names

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        config, found = source.json(_CONFIG), source.named("sae.safetensors")
        config.harmless("expansion_factor", "normalize_decoder")  # as its tensors show, and a constraint of training
        if config.get("transcode") or config.get("skip_connection"):
            raise SteeringError(TRANSCODER.format(what="the folder", reads="a module's input", writes="its output"))
        if (activation := config.get("activation", "topk")) != "topk":
            raise SteeringError(f"activation {activation!r}; of sparsify's, topk is served")
        if config.get("signed"):
            raise SteeringError("signed: the k largest by size, of either sign, which is not what topk is here")
        config.harmless("multi_topk")  # a second loss of training
        site, layer = _sparsify_place(source, model, hints)
        weights = {
            "W_enc": transposed(found.get("encoder.weight")),
            "b_enc": found.get("encoder.bias"),
            "W_dec": found.get("W_dec", transposed(found.get("decoder.weight"))),
            "b_dec": found.get("b_dec"),
        }
        parts, notes = parts_of(weights, site, model)
        check_size(config.get("d_in"), model.width(site), "d_in", _CONFIG)
        check_size(config.get("num_latents") or None, len(parts["encoder"]), "num_latents", _CONFIG)
        own = {"activation": "topk", "k": k_of(config.get("k"), _CONFIG), "apply_b_dec_to_input": True}
        return drafted(site, layer, parts, own, notes)


def _architecture(config: Ledger) -> tuple[str, int | None]:
    """relu, jumprelu, topk or gated, and k. Raises: SteeringError."""
    architecture = config.get("architecture", "standard")
    said = config.get("activation_fn", config.get("activation_fn_str"))
    k = config.get("k", config.section("activation_fn_kwargs").get("k"))
    if isinstance(architecture, str) and ("transcoder" in architecture or config.get("d_out") is not None):
        reads, writes = (config.section("metadata").get(name) or "one hook" for name in ("hook_name", "hook_name_out"))
        raise SteeringError(TRANSCODER.format(what=f"architecture {architecture!r}", reads=reads, writes=writes))
    if architecture == "topk" or (architecture == "standard" and said == "topk"):
        return "topk", k_of(k, _CONFIG)
    if architecture in ("jumprelu", "gated") and said in (None, "relu"):
        return architecture, None
    if architecture == "standard" and said in (None, "relu"):
        return "relu", None
    raise SteeringError(
        f"architecture {architecture!r} with activation {said!r}; served are standard with relu, gated, jumprelu, topk"
    )


def _norm(config: Ledger, hints: Hints) -> str:
    """How rows are scaled before encoding. Raises: SteeringError."""
    norm = config.get("normalize_activations", "none")
    if norm is None or isinstance(norm, bool):  # before release 3
        norm = "expected_average_only_in" if norm else "none"
    if norm not in _NORMS:
        raise SteeringError(f"normalize_activations {norm!r}; served are {', '.join(_NORMS)}")
    if norm in ("constant_norm_rescale", "layer_norm") and hints.input_scale is not None:
        raise SteeringError(
            f"normalize_activations {norm!r} scales every row by itself; input_scale is for none", "input_scale"
        )
    if norm != "expected_average_only_in":
        return str(norm)
    if hints.input_scale is None:
        raise SteeringError(
            "the autoencoder's input is scaled by a factor that its folder lacks (expected_average_only_in)",
            "input_scale",
        )
    return "none"


def _centred(parts: dict[str, Tensor], config: Ledger, metadata: Ledger, site: Site) -> list[str]:
    """What the run did to the model before it read it. Raises: SteeringError for what cannot be done to the weights."""
    notes = []
    for each in (config, metadata):
        options = each.section("model_from_pretrained_kwargs")
        options.harmless(
            "dtype", "n_devices", "device", "torch_dtype", "trust_remote_code", "center_unembed", "revision"
        )
        if site.startswith("resid"):
            options.harmless("fold_ln", "fold_value_biases")  # they leave the stream as it is
        if options.get("center_writing_weights") and site.startswith("resid"):
            parts["encoder"] = parts["encoder"] - parts["encoder"].mean(dim=1, keepdim=True)
            notes.append("center_writing_weights: the stream less its mean is read, which was folded into the encoder")
        elif options.get("center_writing_weights"):
            raise SteeringError(
                f"the run centred the model's weights (center_writing_weights), which changes its {site}"
            )
    return notes


def _scaled(parts: dict[str, Tensor], config: Ledger, found: Ledger) -> list[str]:
    """SAELens' scaling_factor multiplies features as they are decoded, if the config says that it is in use."""
    in_use = _flag(config, "finetuning_scaling_factor", False)
    factor = found.get("scaling_factor")
    if factor is None:
        if in_use:
            raise SteeringError("finetuning_scaling_factor is true, and the weights have no scaling_factor")
        return []
    size = len(parts["decoder"])
    if not isinstance(factor, Tensor) or factor.shape != (size,) or not factor.is_floating_point():
        raise SteeringError(f"scaling_factor has shape {list(getattr(factor, 'shape', []))}, wanted [{size}]")
    if not in_use:
        if not (factor == 1).all():
            raise SteeringError(
                "the weights have a scaling_factor that is not 1; finetuning_scaling_factor does not say so"
            )
        return []
    parts["decoder"] = parts["decoder"] * factor.float().view(-1, *[1] * (parts["decoder"].ndim - 1))
    return ["the finetuned scaling_factor was folded into the decoder"]


def _flag(config: Ledger, name: str, default: bool) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise SteeringError(f"{name} of {config.file} is {value!r:.64}, wanted true or false")
    return default if value is None else value


def _place(config: Ledger, metadata: Ledger, hints: Hints, model: ModelShape) -> tuple[Site, int]:
    """Where it reads and writes. Raises: SteeringError."""
    said = {
        name: next((value for each in (metadata, config) if (value := each.get(name)) is not None), None)
        for name in ("hook_name", "hook_point", "hook_head_index", "hook_point_head_index", "hf_hook_name")
    }
    if (head := said["hook_head_index"]) is not None or (head := said["hook_point_head_index"]) is not None:
        raise SteeringError(
            f"the autoencoder is of head {head!r:.64} alone (hook_head_index); whole rows are edited here"
        )
    hook = str(said["hook_name"] or said["hook_point"] or said["hf_hook_name"] or "")
    site, layer = of_hook(hook, hints)
    if site is None:
        raise SteeringError(
            f"hook {hook[:128]!r} is none of {', '.join(HOOKS)} of a block; say the site if it is one of Whipstaff's",
            "site",
        )
    check_sandwich(site, model)
    for name in ("hook_layer", "hook_point_layer"):
        said_layer = config.get(name)
        if layer is not None:
            check_size(said_layer, layer, name, _CONFIG, "its hook says")
    if (shape := config.get("reshape_activations")) not in (None, "none", "hook_z") or (shape == "hook_z") > (
        site == "attn_head"
    ):
        raise SteeringError(
            f"reshape_activations {shape!r:.64} at {hook[:128]!r}; heads' outputs are reshaped, nothing else"
        )
    return site, layer_of(hints, model, layer)


def _sparsify_place(source: Source, model: ModelShape, hints: Hints) -> tuple[Site, int]:
    name = source.path.absolute().name
    match = re.fullmatch(r"(?:layers|h)\.(\d{1,4})(\.mlp|\.attn|\.self_attn)?", name)
    inner: dict[str | None, Site] = {None: "resid_post", ".mlp": "mlp_out"}
    site = hints.site or (inner.get(match[2], "attn_out") if match else None)
    if site is None:
        raise SteeringError(
            f"folder {name!r} does not say what was read, as layers.3 or layers.3.mlp do; say the site", "site"
        )
    check_sandwich(site, model)
    return site, layer_of(hints, model, int(match[1]) if match else None)
