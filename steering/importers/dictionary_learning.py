"""Autoencoders in torch files with the names of torch's Linear.

dictionary_learning  ae.pt beside config.json {trainer: {dict_class, layer}, buffer} (saprmarks/dictionary_learning)
                     AutoEncoder           encoder.weight [features, hidden], encoder.bias, decoder.weight, bias
                     AutoEncoderNew        the same with decoder.bias, which is not taken off before encoding
                     GatedAutoEncoder      encoder.weight, decoder.weight, decoder_bias, r_mag, gate_bias, mag_bias
                     JumpReluAutoEncoder   W_enc [hidden, features], W_dec, b_enc, b_dec, threshold [features]
                     AutoEncoderTopK       encoder.weight, encoder.bias, decoder.weight, b_dec, k; the k largest
                     BatchTopKSAE          the same, with one threshold that takes the place of k after training
                     MatryoshkaBatchTopKSAE  as BatchTopKSAE, with W_enc, W_dec, b_enc
goodfire             *.pth with encoder_linear.weight, encoder_linear.bias, decoder_linear.weight, decoder_linear.bias;
                     the layer is in its name, -l19
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.autoencoder import (
    TRANSCODER,
    check_sandwich,
    check_size,
    drafted,
    filled,
    gated,
    k_of,
    linear,
    parts_of,
    rescaled,
    scalar,
)
from whipstaff.steering.importers.importer import Draft, Hints, Importer, layer_of
from whipstaff.steering.importers.ledger import Ledger
from whipstaff.steering.importers.source import Source
from whipstaff.steering.shape import ModelShape, Site

_CONFIG = "config.json"
_GATED = {"r_mag": "r_mag", "b_mag": "mag_bias", "b_gate": "gate_bias"}
_SUBMODULES: dict[str, Site] = {
    "resid_post": "resid_post",
    "attention": "attn_out",
    "attn_out": "attn_out",
    "mlp": "mlp_out",
}
_TRAINING = (  # of trainers of release 0.1 and before: what a run was told, which is over
    "auxk_alpha",
    "bandwidth",
    "decay_start",
    "device",
    "group_fractions",
    "group_weights",
    "l1_penalty",
    "lambda_warm*",
    "lm_name",
    "lr",
    "n_sparsity_updates",
    "p_end",
    "p_start",
    "anneal_*",
    "resample_steps",
    "seed",
    "sparsity_*",
    "steps",
    "target_l0",
    "threshold_*",
    "top_k_aux",
    "trainer_class",
    "wandb_name",
    "warmup_steps",
    "initial_sparsity_penalty",
)


class _Class(NamedTuple):
    """A dictionary class: its numbers as ours, and how it computes."""

    weights: Callable[[Ledger], dict[str, Any]]
    activation: str
    takes_bias_off: bool


class DictionaryLearning(Importer):
    name, files = "dictionary_learning", "a folder with ae.pt and config.json (trainer, dict_class)"
    takes = frozenset({"layer", "site"})

    def claims(self, source: Source) -> bool:
        return "ae.pt" in source.names and _CONFIG in source.names

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        config, found = source.json(_CONFIG), source.named("ae.pt")
        trainer = config.section("trainer")
        trainer.harmless(*_TRAINING)
        config.section("buffer").harmless("*_per_buffer", "*_batch_size", "ctx_len", "d_submodule", "device", "n_ctxs")
        kind = _CLASSES.get(str(name := trainer.get("dict_class")))
        if kind is None:
            raise SteeringError(f"dict_class {name!r:.64} of {_CONFIG}; known are {', '.join(_CLASSES)}")
        site, layer = _place(config, hints, model)
        parts, notes = parts_of(kind.weights(found), site, model)
        check_size(trainer.get("activation_dim"), model.width(site), "activation_dim", _CONFIG)
        check_size(trainer.get("dict_size"), len(parts["encoder"]), "dict_size", _CONFIG)
        if name == "AutoEncoder" and not _has_unit_rows(parts["decoder"]):
            parts = rescaled(parts)
            notes.append("the decoder's rows were brought to length 1, as the library does when it loads the file")
        own = {"activation": kind.activation, "apply_b_dec_to_input": kind.takes_bias_off}
        if kind.activation == "topk":
            own["k"] = _k(trainer, found)
        else:
            trainer.harmless("k")  # of training; the threshold stands for it
            found.harmless("k", "group_sizes")
        return drafted(site, layer, parts, own, notes)


class Goodfire(Importer):
    name, files = "goodfire", "a .pth or .pt file with encoder_linear and decoder_linear"
    takes = frozenset({"layer"})

    def claims(self, source: Source) -> bool:
        if source.is_folder or not source.name.endswith((".pt", ".pth")):
            return False
        found = source.torch(source.name)
        return isinstance(found, Ledger) and "encoder_linear.weight" in found

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        found = source.named(source.name)
        match = re.search(r"-l(\d{1,4})(?:\.|-|$)", source.name)
        layer = layer_of(hints, model, int(match[1]) if match else None)
        parts, notes = parts_of(
            linear(found, "encoder_linear", "decoder_linear", "decoder_linear.bias"), "resid_post", model
        )
        return drafted("resid_post", layer, parts, {"activation": "relu", "apply_b_dec_to_input": False}, notes)


def _gated(found: Ledger) -> dict[str, Any]:
    weights = linear(found, "encoder", "decoder", "decoder_bias")
    named = {"W_enc": weights["W_enc"], **{name: found.get(name) for name in _GATED.values()}}
    return weights | gated(named, _GATED)


def _plain(found: Ledger) -> dict[str, Any]:
    weights = {name: found.get(name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    threshold = found.get("threshold")
    value = scalar(threshold)
    return weights | {"threshold": threshold if value is None else filled(value, weights["W_enc"])}


def _batched(found: Ledger) -> dict[str, Any]:
    value = scalar(found.get("threshold"))
    if value is None:
        raise SteeringError("the file has no threshold, one number, which a batch's k becomes after training")
    weights = linear(found, "encoder", "decoder", "b_dec")
    return weights | {"threshold": filled(value, weights["W_enc"])}


def _topped(found: Ledger) -> dict[str, Any]:
    found.harmless("threshold")  # which the library's encode leaves alone unless it is told to
    return linear(found, "encoder", "decoder", "b_dec")


_CLASSES = {
    "AutoEncoder": _Class(lambda found: linear(found, "encoder", "decoder", "bias"), "relu", True),
    "AutoEncoderNew": _Class(lambda found: linear(found, "encoder", "decoder", "decoder.bias"), "relu", False),
    "GatedAutoEncoder": _Class(_gated, "jumprelu", True),
    "JumpReluAutoEncoder": _Class(_plain, "jumprelu", False),
    "AutoEncoderTopK": _Class(_topped, "topk", True),
    "BatchTopKSAE": _Class(_batched, "jumprelu", True),
    "MatryoshkaBatchTopKSAE": _Class(_plain, "jumprelu", True),
}


def _k(trainer: Ledger, found: Ledger) -> int:
    stored, said = found.get("k"), trainer.get("k")
    if isinstance(stored, Tensor) and stored.numel() == 1:
        check_size(said, int(stored), "k", _CONFIG)
        return int(stored)
    return k_of(said, _CONFIG)


def _has_unit_rows(decoder: Tensor) -> bool:
    return bool((decoder.flatten(1).norm(dim=1) - 1).abs().max() < 1e-4)


def _place(config: Ledger, hints: Hints, model: ModelShape) -> tuple[Site, int]:
    """Where it reads and writes: submodule_name and layer, and the buffer's io. Raises: SteeringError."""
    io = config.section("buffer").get("io", "out")
    if io != "out":
        raise SteeringError(
            TRANSCODER.format(what=f"io {io!r} of {_CONFIG}", reads="a module's input", writes="its output")
        )
    said = config.section("trainer").get("submodule_name")
    name = re.sub(r"_?layer_?\d+.*$", "", str(said)) if said is not None else "resid_post"
    site = hints.site or _SUBMODULES.get(name)
    if site is None:
        raise SteeringError(
            f"submodule_name {said!r:.64} of {_CONFIG} is none of {', '.join(_SUBMODULES)}; say the site", "site"
        )
    check_sandwich(site, model)
    layer = config.section("trainer").get("layer")
    return site, layer_of(hints, model, layer if isinstance(layer, int) else None)
