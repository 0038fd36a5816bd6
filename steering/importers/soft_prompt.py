"""Soft prompts beyond PEFT's.

spring  added_token_embeddings.pt, a bare tensor [tokens, hidden] (DaoD/SPRING)
dro     soft_prompt in a safetensors file (chujiezheng/LLM-Safeguard)
"""

import re

from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.added import bare_tensor
from whipstaff.steering.importers.contents import is_vector
from whipstaff.steering.importers.importer import Draft, Hints, Importer
from whipstaff.steering.importers.source import Source, numbers
from whipstaff.steering.shape import ModelShape

_KEY = re.compile("soft_prompt")


class SPRING(Importer):
    name, files = "spring", "added_token_embeddings.pt, a bare tensor [tokens, hidden]"

    def claims(self, source: Source) -> bool:
        tensor = bare_tensor(source)
        if tensor is None or not (tensor.ndim == 2 or (tensor.ndim == 3 and len(tensor) == 1)):
            return False
        return _is_called_so(source) or not is_vector(tuple(tensor.shape))

    def fits(self, source: Source, model: ModelShape) -> bool:
        """Rows of a file whose name says nothing may be anybody's activations, or the layers of another model."""
        tensor = bare_tensor(source)
        if tensor is None or tensor.shape[-1] != model.hidden_size:
            return False
        return _is_called_so(source) or tensor.shape[-2] - model.num_layers in (0, 1)

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        found = source.torch(source.name)
        rows = found[0] if isinstance(found, Tensor) and found.ndim == 3 and len(found) == 1 else found
        return Draft("soft_prompt", {"rows": numbers(source.name, rows, None, model.hidden_size)})


def _is_called_so(source: Source) -> bool:
    return any(word in source.name.lower() for word in ("embed", "prompt"))


class DRO(Importer):
    name, files = "dro", "a safetensors file with soft_prompt [tokens, hidden]"

    def claims(self, source: Source) -> bool:
        if source.is_folder or not source.name.endswith(".safetensors"):
            return False
        return any(source.tensors(source.name, _KEY))

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        found = source.named(source.name).get("soft_prompt")
        if found is None:
            raise SteeringError(f"{source.name} has no tensor soft_prompt")
        return Draft("soft_prompt", {"rows": numbers("soft_prompt", found, None, model.hidden_size)})
