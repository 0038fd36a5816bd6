"""The steering goldens that are diagonal edits, each as vectors in our terms: (tensors, scale, where clause)."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from whipstaff.steering.where import Region, Where

ROOT = Path(__file__).parent / "golden" / "steering"


class Piece(NamedTuple):
    tensors: dict[str, Tensor]
    scale: float
    where: Where


class Case(NamedTuple):
    name: str
    model: str
    pieces: list[Piece]
    io: dict[str, Tensor]


def cases(model: str) -> list[Case]:
    """Every golden case on one model."""
    found = []
    for folder in sorted((ROOT / "cases").iterdir()):
        said = json.loads((folder / "case.json").read_text())
        if said["model"] == model:
            params = load_file(folder / "params.safetensors")
            found.append(Case(said["name"], model, _pieces(said, params), load_file(folder / "io.safetensors")))
    return found


def _pieces(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    name = said["name"]
    everywhere, each_last, last_prompt = Where.of("all"), Where.of("each_last"), Where.of("last_prompt")
    if name.startswith("iti"):
        tensors = {f"attn_head.{k.removeprefix('offset_layer')}.add": v for k, v in params.items() if "offset" in k}
        where = each_last
        if name.endswith("gen_only"):
            where = Where.of("generation")
        elif name.endswith("from_pos"):
            where = Where(prompt=[(said["start"], None)], generation="all")
        return [Piece(tensors, 1.0, where)]
    if name.startswith("lofit"):  # v is zero outside of the chosen heads; A scales every head
        return [Piece(_by_layer("add", params["v"]) | _by_layer("gain", params["A"]), 1.0, everywhere)]
    if name.startswith("site"):
        alphas, wanted = params["alphas"][..., None], params["task_embedding"]
        tensors = _by_layer("add", alphas * wanted) | _by_layer("gain", (-alphas).expand_as(wanted))
        return [Piece(tensors, 1.0, last_prompt)]
    if name.startswith("heads_scale"):
        mask, scale, mean = params["mean_mask"][..., None], params["scale"][..., None], params["mean"]
        gain = torch.where(mask > 0, -1.0, scale - 1).expand_as(mean)
        return [Piece(_by_layer("gain", gain) | _by_layer("add", mean * mask), 1.0, everywhere)]
    if name.startswith("taskvec"):
        vector = params["vector"]
        tensors = {
            f"resid_post.{said['layer']}.gain": -torch.ones_like(vector),
            f"resid_post.{said['layer']}.add": vector,
        }
        return [Piece(tensors, 1.0, last_prompt)]
    if name.startswith("actadd"):  # adds to the input of a block: the output of the one before
        site = f"resid_post.{said['layer'] - 1}.add"
        scale = said["coeff"]
        rows = enumerate(params["activations"])
        return [Piece({site: row}, scale, Where(prompt=[(position, position + 1)])) for position, row in rows]
    if name.startswith(("repe_linear", "repeng_qwen2")):
        tensors = {f"resid_post.{k.removeprefix('direction_layer')}.add": v for k, v in params.items()}
        return [Piece(tensors, said["coeff"], everywhere)]
    vector = {f"resid_post.{said['layer']}.add": params["vector"]}
    if name.startswith("fv"):
        return [Piece(vector, 1.0, each_last)]
    if name.startswith("caa"):
        start = said["instruction_end_position"]
        return [Piece(vector, said["multiplier"], Where(prompt=[(start, None)], generation="all"))]
    where = {
        "all": everywhere,
        "from_start": Where(prompt=[(6, None)], generation="all"),
        "last_prompt": each_last,
        "only_generated": Where(prompt="all", generation="all", exclude=Region(prompt="all")),
    }[said["mode"]]
    return [Piece(vector, said["alpha"], where)]


def _by_layer(part: str, values: Tensor) -> dict[str, Tensor]:
    """(layers, heads, head_dim) as the tensors of a vector."""
    return {f"attn_head.{layer}.{part}": value for layer, value in enumerate(values)}
