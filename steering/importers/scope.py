"""Gemma Scope's autoencoders, of JumpReLU, whose decoder's bias is not taken off before they encode.

gemma_scope    params.npz with W_enc [hidden, features], b_enc, W_dec [features, hidden], b_dec, threshold in a folder
               gemma-scope-{model}-{res,mlp,att}/layer_{l}/...; that name is all that tells a transcoder from them
gemma_scope_2  config.json and params.safetensors, the same in lower case; the config names the hooks
"""

import re

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.autoencoder import (
    TRANSCODER,
    check_sandwich,
    check_size,
    drafted,
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
_PARTS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


class GemmaScope(Importer):
    name, files = "gemma_scope", "params.npz, below folders gemma-scope-{model}-{res,mlp,att}/layer_{l}"
    takes = frozenset({"layer", "site"})

    def claims(self, source: Source) -> bool:
        return any(name.endswith(".npz") for name in source.names)

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
