"""What the formats of sparse autoencoders share: their hooks, their shapes, and what of them comes down to ours.

A gated autoencoder is a JumpReLU one. With z = exp(r) (W x) + b_mag its feature is relu(z) where W x + b_gate > 0, that
is where z > b_mag - exp(r) b_gate. A threshold below 0 acts as 0, for relu comes with it. A factor on features that are
decoded is one on the decoder's rows.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.importer import Draft, Hints
from whipstaff.steering.importers.source import numbers
from whipstaff.steering.shape import ModelShape, Site

TRANSCODER = (
    "{what} is a transcoder: it reads {reads} and writes {writes}. Whipstaff's features are those of an autoencoder, "
    "which writes where it reads, so its numbers have no meaning here"
)
HOOKS: dict[str, Site] = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "attn.hook_z": "attn_head",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
}
_SANDWICHED = ("Gemma2", "Gemma3")  # a norm follows the attention's and the MLP's output, and these hooks come after it


def check_sandwich(site: Site, model: ModelShape) -> None:
    """Raises: SteeringError where a norm comes between Whipstaff's site and the place that a file means."""
    if site in ("attn_out", "mlp_out") and model.architecture.startswith(_SANDWICHED):
        raise SteeringError(
            f"the file's numbers are for the {site} of {model.architecture} after the norm behind it; Whipstaff edits "
            "before it"
        )


def of_hook(hook: str, hints: Hints) -> tuple[Site | None, int | None]:
    """The site and layer of a TransformerLens hook, as far as it names them; what a user said of the site wins."""
    if match := re.fullmatch(r"blocks\.(\d{1,4})\.([\w.]+)", hook):
        return hints.site or HOOKS.get(match[2]), int(match[1])
    if match := re.fullmatch(r"(?:.*\.)?layers\.(\d{1,4})", hook):
        return hints.site or "resid_post", int(match[1])
    return hints.site, None


def transposed(tensor: object) -> object:
    """torch's Linear keeps [out, in]."""
    return tensor.T if isinstance(tensor, Tensor) and tensor.ndim == 2 else tensor


def linear(found: Mapping[str, Any], encoder: str, decoder: str, bias: str) -> dict[str, Any]:
    """W_enc, b_enc, W_dec and b_dec of two of torch's Linears; `bias` names the decoder's."""
    return {
        "W_enc": transposed(found.get(f"{encoder}.weight")),
        "b_enc": found.get(f"{encoder}.bias"),
        "W_dec": transposed(found.get(f"{decoder}.weight")),
        "b_dec": found.get(bias),
    }


def gated(found: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """W_enc, b_enc and threshold of a gated autoencoder; `names` are the file's for r_mag, b_mag and b_gate.

    Raises: SteeringError.
    """
    size = found["W_enc"].shape[1] if isinstance(found.get("W_enc"), Tensor) and found["W_enc"].ndim == 2 else None
    encoder = numbers("W_enc", found.get("W_enc"), None, size)
    r_mag, b_mag, b_gate = (numbers(name, found.get(name), size) for name in names.values())
    gain = r_mag.double().exp()
    threshold = b_mag.double() - gain * b_gate.double()
    return {"W_enc": (encoder * gain).float(), "b_enc": b_mag, "threshold": threshold.float()}


def parts_of(found: Mapping[str, Any], site: Site, model: ModelShape) -> tuple[dict[str, Tensor], list[str]]:
    """As our files have them, both matrices with a row per feature; and what a user should know.

    `found` has W_enc [width, features], W_dec [features, width] and perhaps b_enc, b_dec, threshold, of the file.
    Raises: SteeringError.
    """
    if missing := [name for name in ("W_enc", "W_dec") if found.get(name) is None]:
        raise SteeringError(f"the file has no {missing[0]}; it has {', '.join(sorted(found)) or 'nothing known'}")
    width = model.width(site)
    encoder = found["W_enc"]
    if not isinstance(encoder, Tensor) or encoder.ndim != 2:
        raise SteeringError(f"W_enc has shape {list(getattr(encoder, 'shape', []))}, wanted [{width}, features]")
    size = encoder.shape[1]
    parts = {
        "encoder": numbers("W_enc", encoder.T, size, width),
        "decoder": numbers("W_dec", found["W_dec"], size, width),
    }
    if site == "attn_head":
        parts = {name: rows.view(size, model.num_heads, model.head_dim) for name, rows in parts.items()}
    for theirs, ours in (("b_enc", "encoder_bias"), ("threshold", "threshold")):
        if found.get(theirs) is not None:
            parts[ours] = numbers(theirs, found[theirs], size)
    if found.get("b_dec") is not None:
        bias = numbers("b_dec", found["b_dec"], width)
        parts["decoder_bias"] = bias.view(model.num_heads, model.head_dim) if site == "attn_head" else bias
    return parts, _floored(parts)


def _floored(parts: dict[str, Tensor]) -> list[str]:
    """Thresholds below 0 become 0, which is how they act."""
    if "threshold" not in parts or not (below := int((parts["threshold"] < 0).sum())):
        return []
    parts["threshold"] = parts["threshold"].clamp(min=0)
    return [f"of the thresholds {below} are below 0; as features never are, these act as 0 and are stored so"]


def rescaled(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Readings times the norms of the decoder's rows; what is written, by as much less. Raises: SteeringError."""
    norms = parts["decoder"].flatten(1).norm(dim=1)
    if not norms.all():
        raise SteeringError("a row of W_dec has length 0")
    column = norms.view(-1, *[1] * (parts["decoder"].ndim - 1))
    scaled = {"encoder": parts["encoder"] * column, "decoder": parts["decoder"] / column}
    for name in ("encoder_bias", "threshold"):
        if name in parts:
            scaled[name] = parts[name] * norms
    return parts | scaled


def check_size(said: object, right: int, name: str, file: str, what: str = "its tensors say") -> None:
    """That a config's number is the tensors', or what else states it. Raises: SteeringError."""
    if said is not None and said != right:
        raise SteeringError(f"{name} of {file} is {said!r:.64}, {what} {right}")


def k_of(said: object, file: str) -> int:
    """How many features are active, which topk needs. Raises: SteeringError."""
    if not isinstance(said, int) or isinstance(said, bool) or said < 1:
        raise SteeringError(f"k of {file} is {said!r:.64}; topk needs a whole number above 0")
    return said


def drafted(site: Site, layer: int, parts: Mapping[str, Tensor], own: Mapping[str, Any], notes: list[str]) -> Draft:
    """`own` are the method's parameters that the file states."""
    tensors = {f"{site}.{layer}.{part}": tensor for part, tensor in parts.items()}
    return Draft(
        "sae", tensors, defaults={name: value for name, value in own.items() if value is not None}, notes=notes
    )


def scalar(value: object) -> float | None:
    """A number that a file keeps as a tensor without dimensions."""
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point() else None


def filled(value: float, like: object) -> Tensor | None:
    """One threshold for all features of W_enc."""
    return torch.full((like.shape[1],), value) if isinstance(like, Tensor) and like.ndim == 2 else None
