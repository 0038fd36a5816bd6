"""IBM's activation-steering: .svec, JSON with model_type, directions {layer: [hidden]} and explained_variances.

There a direction is added to what *enters* its layer, at every token. Conditions are .svec files too; what they project
on is no direction of ours, so a file is read as a behaviour.
"""

from typing import Any

import torch
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.importer import Draft, Hints, Importer
from whipstaff.steering.importers.ledger import Ledger
from whipstaff.steering.importers.source import Source, numbers
from whipstaff.steering.shape import ModelShape


class Svec(Importer):
    name, files = "svec", "a .svec file of IBM's activation-steering: JSON with model_type and directions"
    takes = frozenset({"layer"})

    def claims(self, source: Source) -> bool:
        return not source.is_folder and source.name.endswith(".svec")

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        found = source.json(source.name)
        found.harmless("explained_variances")  # how well they were found
        directions = found.get("directions")
        if not isinstance(directions, Ledger) or not directions:
            raise SteeringError(f"{source.name}: directions is no object of vectors by layer")
        tensors = {
            f"resid_pre.{layer}.add": numbers(f"directions.{layer}", _row(layer, row), model.hidden_size)
            for key, row in directions.items()
            if hints.layer in (None, layer := _layer(key, model))
        }
        if not tensors:
            raise SteeringError(f"{source.name} has the layers {', '.join(directions)}", "layer")
        if len(tensors) < len(directions) and hints.layer is None:
            raise SteeringError(f"{source.name}: two directions are for one layer")
        return Draft("vector", tensors, where="all", notes=_notes(found.get("model_type"), model))


def _layer(key: str, model: ModelShape) -> int:
    layer = int(key) if key.lstrip("-").isdecimal() and len(key) < 6 else model.num_layers
    layer += model.num_layers if layer < 0 else 0
    if not 0 <= layer < model.num_layers:
        raise SteeringError(f"directions.{key[:64]}: the model has layers 0 to {model.num_layers - 1}")
    return layer


def _row(layer: int, row: Any) -> Tensor:
    if not isinstance(row, list) or not all(type(number) in (int, float) for number in row):
        raise SteeringError(f"directions.{layer} is no list of numbers")
    return torch.tensor(row, dtype=torch.float64)


def _notes(model_type: Any, model: ModelShape) -> list[str]:
    if isinstance(model_type, str) and model_type.replace("_", "").lower() not in model.architecture.lower():
        return [f"the file was made for {model_type[:64]!r}, the model is {model.architecture}"]
    return []
