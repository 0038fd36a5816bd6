"""SITE's files: mean activations <task>.pt [layers, heads, 1, head_dim] and alphas.pt [layers, heads], after the
sigmoid. A folder with both, or the first with the hint `alphas`."""

from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.added import bare_tensor, is_torch
from whipstaff.steering.importers.head_lists import existing, stacked
from whipstaff.steering.importers.importer import Draft, Hints, Importer
from whipstaff.steering.importers.source import Source, numbers, read_torch
from whipstaff.steering.shape import ModelShape


class SITEFiles(Importer):
    name, files = "site", "<task>.pt mean activations [layers, heads, 1, head_dim], and alphas.pt"
    takes = frozenset({"alphas"})

    def claims(self, source: Source) -> bool:
        if source.is_folder:
            return "alphas.pt" in source.names
        tensor = bare_tensor(source)
        return tensor is not None and tensor.ndim == 4 and tensor.shape[2] == 1

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        tasks = [name for name in source.names if is_torch(name) and name != "alphas.pt"]
        if len(tasks) != 1:
            raise SteeringError(f"{source.name} has {len(tasks)} files of mean activations beside alphas.pt; wanted 1")
        (name,) = tasks
        if hints.alphas is not None:
            alphas = read_torch(existing(hints.alphas, "alphas"))
        elif source.is_folder and "alphas.pt" in source.names:
            alphas = source.torch("alphas.pt")
        else:
            raise SteeringError("say where the alphas are: a .pt file [layers, heads]", "alphas")
        shape = (model.num_layers, model.num_heads)
        task = source.torch(name)
        if isinstance(task, Tensor) and task.ndim == 4 and task.shape[2] == 1:
            task = task[:, :, 0]
        tensors = stacked("task", numbers(name, task, *shape, model.head_dim))
        return Draft("site", tensors | stacked("alpha", numbers("alphas", alphas, *shape)))
