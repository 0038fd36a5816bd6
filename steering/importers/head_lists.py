"""Lists of heads, and tensors with a row per head, as the head-level methods store them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.importer import Hints
from whipstaff.steering.importers.sight import check_sight
from whipstaff.steering.importers.source import as_tensor, read_npy
from whipstaff.steering.shape import ModelShape


def read_heads(hints: Hints, model: ModelShape) -> list[tuple[int, int]]:
    """The (layer, head) rows of the file that `heads` names, best first, cut to `num_heads`."""
    if hints.heads is None:
        raise SteeringError("say which heads: a .npy file of rows (layer, head)", "heads")
    array = read_npy(existing(hints.heads, "heads"))
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        raise SteeringError(
            f"{hints.heads.name} has shape {list(array.shape)} of {array.dtype}, wanted integers [K, 2]"
        )
    if len(array) > model.num_layers * model.num_heads:
        raise SteeringError(f"{hints.heads.name} names {len(array)} heads; the model has fewer")
    rows = [(int(layer), int(head)) for layer, head in array[: hints.num_heads]]
    for layer, head in rows:
        if not (0 <= layer < model.num_layers and 0 <= head < model.num_heads):
            raise SteeringError(f"{hints.heads.name} names layer {layer}, head {head}, which the model does not have")
    if len(set(rows)) != len(rows):
        raise SteeringError(f"{hints.heads.name} names a head twice")
    return rows


def best(scores: Tensor, num: int) -> list[tuple[int, int]]:
    """The (layer, head) of the highest of scores [layers, heads]."""
    order = scores.flatten().topk(min(num, scores.numel())).indices.tolist()
    return [divmod(index, scores.shape[1]) for index in order]


def by_layer(part: str, rows: dict[tuple[int, int], Tensor], model: ModelShape) -> dict[str, Tensor]:
    """Rows of single heads as the tensors of a file, zeros for the other heads of their layers."""
    tensors: dict[str, Tensor] = {}
    for (layer, head), row in sorted(rows.items()):
        name = f"attn_head.{layer}.{part}"
        tensors.setdefault(name, torch.zeros(model.num_heads, *row.shape))[head] = row
    return tensors


def stacked(part: str, values: Tensor) -> dict[str, Tensor]:
    """[layers, heads, ...] as the tensors of a file."""
    return {f"attn_head.{layer}.{part}": value.clone() for layer, value in enumerate(values)}


def existing(path: Path, hint: str) -> Path:
    if not path.is_file():
        raise SteeringError(f"{path}: no such file", hint)
    check_sight(path)
    return path


def read_float_npy(path: Path, hint: str) -> np.ndarray[tuple[int, ...], np.dtype[np.floating]]:
    array = read_npy(existing(path, hint))
    if array.dtype.kind != "f":
        raise SteeringError(f"{path.name} has dtype {array.dtype}, wanted a floating-point one", hint)
    return array


def float_rows(array: np.ndarray[tuple[int, ...], np.dtype[np.floating]], layer: int, lanes: slice) -> Tensor:
    """[N, lanes] of features [N, layers, width], as float64: all that is read of a mapped file."""
    return as_tensor(array[:, layer, lanes]).double()
