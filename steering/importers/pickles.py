"""Formats that are pickles, and the only way in which one is opened: restricted, in a process of its own, offline.

angular  .npy with a dict {module: {first_direction, second_direction}}, perhaps with `mode` (angular-steering)
tarot    a search's checkpoint {train_X [n, layers * heads * angles], train_Y}; the best is the row with the lowest Y

`unpickle.py` is that process. A pickle is a program all the same: open only those whose author you trust.
"""

import json
import re
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.importer import Draft, Hints
from whipstaff.steering.importers.sight import refused_pickle
from whipstaff.steering.importers.source import numbers
from whipstaff.steering.shape import ModelShape

SECONDS = 60
SEPARATOR = "\x1f"  # of unpickle.py
_PROGRAM = Path(__file__).with_name("unpickle.py")


class Pickled(dict[str, Tensor]):
    """Tensors by their path of keys, and what else was said."""

    said: dict[str, Any]

    def under(self) -> dict[str, dict[str, Tensor]]:
        """By the first key."""
        grouped: dict[str, dict[str, Tensor]] = {}
        for path, tensor in self.items():
            first, _, rest = path.partition(SEPARATOR)
            grouped.setdefault(first, {})[rest] = tensor
        return grouped

    def nested(self) -> Any:
        """As it was pickled, but for lists, which are dicts of their places here."""
        if not (whole := {**self, **self.said}).keys() - {""}:
            return whole.get("")
        content: dict[str, Any] = {}
        for path, value in whole.items():
            inner = content
            *keys, last = path.split(SEPARATOR)
            for key in keys:
                inner = inner.setdefault(key, {})
            inner[last] = value
        return content


def unpickled(path: Path) -> Pickled:
    """Open a pickle in a process of its own. Raises: SteeringError with what it says."""
    try:
        command = [sys.executable, "-I", str(_PROGRAM), str(path.absolute())]
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, cwd="/", stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise SteeringError(f"{path.name} took more than {SECONDS} s to unpickle") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [
            f"the process ended with {done.returncode}"
        ]
        raise SteeringError(refused_pickle(path.name, said[-1]))
    try:
        found = Pickled(load(done.stdout))
        length = int.from_bytes(done.stdout[:8], "little")
        found.said = json.loads(json.loads(done.stdout[8 : 8 + length])["__metadata__"]["said"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise SteeringError(f"{path.name} unpickles to nothing that is known here") from error
    return found


class Pickle(ABC):
    """As an `Importer`, of what a pickle held."""

    name: ClassVar[str]
    files: ClassVar[str]
    takes: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def knows(self, content: Pickled) -> bool: ...

    @abstractmethod
    def draft(self, content: Pickled, model: ModelShape, hints: Hints) -> Draft: ...


class AngularFile(Pickle):
    name, files = "angular", "angular steering's .npy with a pickled dict of modules"
    _sites: ClassVar = {
        "input_layernorm": "attn_in",
        "ln_1": "attn_in",
        "post_attention_layernorm": "mlp_in",
        "pre_feedforward_layernorm": "mlp_in",
        "ln_2": "mlp_in",
    }

    def knows(self, content: Pickled) -> bool:
        return any(path.endswith(f"{SEPARATOR}first_direction") for path in content)

    def draft(self, content: Pickled, model: ModelShape, hints: Hints) -> Draft:
        tensors = {}
        for module, parts in content.under().items():
            match = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d{1,4})\.(\w+)", module)
            site = self._sites.get(match[2]) if match else None
            if match and match[2] == "post_attention_layernorm" and model.architecture.startswith(("Gemma2", "Gemma3")):
                site = None  # there it follows the attention's output
            if match is None or site is None:
                raise SteeringError(f"module {module[:128]!r} is no norm before attention or MLP that is known here")
            for part in ("first_direction", "second_direction"):
                name = f"{part} of {module}"
                tensors[f"{site}.{match[1]}.{part}"] = numbers(name, parts.get(part), model.hidden_size)
        notes = [] if "angle" in hints.defaults else ["the file does not say its angle; requests must, or a default"]
        return Draft("angular", tensors, notes=notes)


class TaRotFile(Pickle):
    name, files = "tarot", "TaRot's checkpoint with train_X and train_Y"
    takes = frozenset({"layer"})

    def knows(self, content: Pickled) -> bool:
        return {"train_X", "train_Y"} <= set(content)

    def draft(self, content: Pickled, model: ModelShape, hints: Hints) -> Draft:
        points = numbers("train_X", content["train_X"], None, None)
        values = numbers("train_Y", content["train_Y"].reshape(-1), len(points))
        best = points[values.argmin()]
        start = hints.layer or 0
        layers = self._layers(len(best), start, model)
        rows = best.view(layers, model.num_heads, -1)
        part = "scale" if rows.shape[2] == 1 else "angles"
        rows = rows[:, :, 0] if part == "scale" else rows
        return Draft("tarot", {f"attn_head.{start + i}.{part}": row.clone() for i, row in enumerate(rows)})

    def _layers(self, size: int, start: int, model: ModelShape) -> int:
        """How many layers' rows a point holds: the kinds have head_dim / 2, head_dim - 1 and 1 numbers per head."""
        for angles in (model.head_dim // 2, model.head_dim - 1, 1):
            layers, rest = divmod(size, model.num_heads * angles)
            if not rest and 0 < layers <= model.num_layers - start:
                return layers
        raise SteeringError(f"points of {size} numbers are no angles of {model.num_heads} heads of {model.head_dim}")
