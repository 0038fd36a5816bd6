"""Formats that are pickles, and the only way in which one is opened: restricted, in a process of its own, offline.

angular  .npy with a dict {module: {first_direction, second_direction}}, perhaps with `mode` (angular-steering)
tarot    a search's checkpoint {train_X [n, layers * heads * angles], train_Y}; the best is the row with the lowest Y.
         A search over MLP outputs has layers * angles of whole rows, which may be as many: then `site` says which

`unpickle.py` is that process. A pickle is a program all the same: open only those whose author you trust.
"""

import json
import re
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.importer import Draft, Hints
from whipstaff.steering.importers.ledger import Ledger
from whipstaff.steering.importers.sight import refused_pickle
from whipstaff.steering.importers.source import numbers
from whipstaff.steering.shape import ModelShape, Site

SECONDS = 180  # by the clock; unpickle.py limits its own CPU time
SEPARATOR = "\x1f"  # of unpickle.py
_PROGRAM = Path(__file__).with_name("unpickle.py")


class Pickled(Ledger):
    """What a pickle held, as it was nested: tensors, strings and numbers; of other things no more than their type."""

    @classmethod
    def of(cls, file: str, flat: Mapping[str, Any]) -> "Pickled":
        """From values by their path of keys. Raises: SteeringError for a path below a value."""
        nested: dict[str, Any] = {}
        for path, value in flat.items():
            *above, last = path.split(SEPARATOR)
            inner = nested
            for key in above:
                inner = inner.setdefault(key, {})
                if not isinstance(inner, dict):
                    raise SteeringError(f"{file} unpickles to nothing that is known here")
            inner[last] = value
        return cls(file, nested)

    @property
    def whole(self) -> Any:
        """What was pickled, but for lists, which are dicts of their places here."""
        return self._content.get("") if self._content.keys() == {""} else self._content


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
        tensors = load(done.stdout)
        length = int.from_bytes(done.stdout[:8], "little")
        said = json.loads(json.loads(done.stdout[8 : 8 + length])["__metadata__"]["said"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise SteeringError(f"{path.name} unpickles to nothing that is known here") from error
    return Pickled.of(path.name, said | tensors)


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
        return any("first_direction" in parts for parts in dict(content).values() if isinstance(parts, Ledger))

    def draft(self, content: Pickled, model: ModelShape, hints: Hints) -> Draft:
        tensors = {}
        for module in content:
            parts = content.section(module)
            match = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d{1,4})\.(\w+)", module)
            site = self._sites.get(match[2]) if match else None
            if match and match[2] == "post_attention_layernorm" and model.architecture.startswith(("Gemma2", "Gemma3")):
                site = None  # there it follows the attention's output
            if match is None or site is None:
                raise SteeringError(f"module {module[:128]!r} is no norm before attention or MLP that is known here")
            for part in ("first_direction", "second_direction"):
                name = f"{part} of {module}"
                tensors[f"{site}.{match[1]}.{part}"] = numbers(name, parts.get(part), model.hidden_size)
            if (mode := parts.get("mode", "output")) != "output":
                raise SteeringError(
                    f"mode {mode!r} of {module}: only what comes out of the norm is edited, mode 'output'"
                )
        notes = [] if "angle" in hints.defaults else ["the file does not say its angle; requests must, or a default"]
        return Draft("angular", tensors, notes=notes)


class TaRotFile(Pickle):
    name, files = "tarot", "TaRot's checkpoint with train_X and train_Y"
    takes = frozenset({"layer", "site", "key"})

    def knows(self, content: Pickled) -> bool:
        return {"train_X", "train_Y"} <= set(content)

    def draft(self, content: Pickled, model: ModelShape, hints: Hints) -> Draft:
        content.harmless("iteration", "state_dict", "model_state_dict", "gp*", "mll*", "bounds", "seed")  # the search's
        points = numbers("train_X", content["train_X"], None, None)
        values = content["train_Y"]
        if not isinstance(values, Tensor):
            raise SteeringError("train_Y is no tensor")
        best = points[numbers("train_Y", values.reshape(-1), len(points)).argmin()]
        start = hints.layer or 0
        found = _meaning(len(best), start, model, hints)
        rows = best.view(found.layers, found.blocks, -1)
        part = "scale" if found.kind == "scale" else "angles"
        rows = rows[:, :, 0] if part == "scale" else rows
        tensors = {f"{found.site}.{start + i}.{part}": row.clone() for i, row in enumerate(rows)}
        is_guessed = hints.layer is None and found.layers < model.num_layers
        notes = [f"the file does not name its first of {found.layers} layers; 0 was taken: say layer if it is another"]
        return Draft("tarot", tensors, notes=notes if is_guessed else ())


class _Rotations(NamedTuple):
    """What the numbers of a search's point may be."""

    site: Site
    kind: str
    layers: int
    blocks: int  # that are turned by themselves, per layer

    def __str__(self) -> str:
        what = f"{self.blocks} heads" if self.site == "attn_head" else "the MLP's output"
        return f"site {self.site}, key {self.kind}: {self.kind} of {what} in {self.layers} layers"


def _meaning(size: int, start: int, model: ModelShape, hints: Hints) -> _Rotations:
    """What a point of that many numbers means for the model, by `site` and `key` where it may mean several things."""
    every = list(_meanings(size, start, model))
    found = [one for one in every if hints.site in (None, one.site) and hints.key in (None, one.kind)]
    if len(found) == 1:
        return found[0]
    if not every:
        raise SteeringError(
            f"points of {size} numbers are no angles of {model.num_heads} heads of {model.head_dim}, nor of MLP "
            f"outputs of {model.hidden_size}, in whole layers from {start}"
        )
    several = "more than one thing, and the file does not say which" if found else "other things"
    field = "key" if found and len({one.site for one in found}) == 1 else "site"
    raise SteeringError(f"points of {size} numbers mean {several}: {'; or '.join(map(str, found or every))}", field)


def _meanings(size: int, start: int, model: ModelShape) -> Iterator[_Rotations]:
    """The kinds have half the block's width, that less 1, and 1 number per block; blocks are heads, or whole rows."""
    blocks: tuple[tuple[Site, int, int], ...] = (
        ("attn_head", model.num_heads, model.head_dim),
        ("mlp_out", 1, model.hidden_size),
    )
    for site, num, width in blocks:
        is_power = not width & (width - 1)
        kinds = {"rotary": width // 2, "scale": 1} | ({"givens": width - 1} if is_power and width > 2 else {})
        for kind, angles in kinds.items():
            layers, rest = divmod(size, num * angles) if angles else (0, 1)
            if not rest and 0 < layers <= model.num_layers - start:
                yield _Rotations(site, kind, layers, num)
