"""LoFiT's checkpoints (fc2869/lo-fit): `model.layers.{l}.self_attn.attn_v.{h}` and `attn_A.{h}`, [head_dim] each.

Only the heads of the .npy list are meant; the others hold what they were initialised with, so they are left out. A fork
keeps nested dicts, layer_{l} -> head_{h}.
"""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.added import is_torch
from whipstaff.steering.importers.head_lists import by_layer, read_heads
from whipstaff.steering.importers.importer import Draft, Hints, Importer
from whipstaff.steering.importers.source import WEIGHTS, Source, numbers
from whipstaff.steering.shape import ModelShape

_KEY = re.compile(r"(?:.*\.)?layers\.(\d{1,4})\.(?:self_attn|attn|attention)\.attn_([Av])\.(\d{1,4})")
_LAYER, _HEAD = re.compile(r"layer_(\d{1,4})"), re.compile(r"head_(\d{1,4})")


class LoFiTFiles(Importer):
    name, files = "lofit", "a checkpoint with attn_v.{h} or attn_A.{h}, and the list of heads"
    takes = frozenset({"heads", "num_heads"})

    def claims(self, source: Source) -> bool:
        if source.is_folder:
            return any(name.endswith((".safetensors", ".bin")) and _has_rows(source, name) for name in source.names)
        return source.name.endswith((".safetensors", ".bin", ".pt", ".pth")) and _has_rows(source, source.name)

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        heads = read_heads(hints, model)
        rows: dict[str, dict[tuple[int, int], Tensor]] = {"A": {}, "v": {}}
        for name in source.checkpoints():
            source.named(name).harmless(*WEIGHTS)
            for part, place, tensor in _rows(source, name):
                if place in heads:
                    rows[part][place] = numbers(f"attn_{part} of {place}", tensor, model.head_dim)
        found = {part: its for part, its in rows.items() if its}
        for part, its in found.items():
            if missing := [place for place in heads if place not in its]:
                raise SteeringError(f"{source.name} has no attn_{part} of (layer, head) {missing[0]}", "heads")
        tensors = {name: tensor for part, its in found.items() for name, tensor in by_layer(part, its, model).items()}
        if not tensors:
            raise SteeringError(f"{source.name} has no attn_v and no attn_A")
        return Draft("lofit", tensors)


def _has_rows(source: Source, name: str) -> bool:
    if is_torch(name) and not (
        isinstance(found := source.torch(name), Mapping) and all(isinstance(k, str) for k in found)
    ):
        return False
    return next(_rows(source, name), None) is not None


def _rows(source: Source, name: str) -> Iterator[tuple[str, tuple[int, int], Tensor]]:
    for key, tensor in source.tensors(name, _KEY):
        if match := _KEY.fullmatch(key):
            yield match[2], (int(match[1]), int(match[3])), tensor
    if not is_torch(name):
        return
    found = source.torch(name)
    for key in found:
        layer = _LAYER.fullmatch(str(key))
        rows = found[key] if layer else {}
        for key_ in rows if isinstance(rows, Mapping) else {}:
            if (head := _HEAD.fullmatch(str(key_))) and layer:
                yield "v", (int(layer[1]), int(head[1])), rows[key_]
