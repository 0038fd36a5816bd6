"""The table of foreign formats. Adding one is a class in a file here and a line below.

`import_file` never runs what it reads; formats that are pickles are for `whipstaff vectors convert --unsafe-pickle`,
which is `import_pickle`, in a process of its own, and never for a server.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from whipstaff.steering.artifacts import Header, packed, parse
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.added import CAAFiles, EasySteer, RefusalDirection, XLVLMs
from whipstaff.steering.importers.dictionary_learning import DictionaryLearning, Goodfire
from whipstaff.steering.importers.function_vector import FunctionVectorFiles
from whipstaff.steering.importers.gguf import Repeng
from whipstaff.steering.importers.honest_llama import Baked, HonestLlama
from whipstaff.steering.importers.importer import COMMON, HEADER, Draft, Hints, Importer
from whipstaff.steering.importers.lofit import LoFiTFiles
from whipstaff.steering.importers.peft import PEFT
from whipstaff.steering.importers.pickles import AngularFile, Pickle, TaRotFile, unpickled
from whipstaff.steering.importers.pyvene import Projection, Pyvene
from whipstaff.steering.importers.sae import SAELens, Sparsify
from whipstaff.steering.importers.scope import GemmaScope, GemmaScope2, LlamaScope
from whipstaff.steering.importers.site import SITEFiles
from whipstaff.steering.importers.soft_prompt import DRO, SPRING
from whipstaff.steering.importers.source import Source
from whipstaff.steering.shape import ModelShape

FORMATS: dict[str, Importer] = {
    importer.name: importer
    for importer in (
        Repeng(),
        HonestLlama(),
        Baked(),
        LoFiTFiles(),
        SITEFiles(),
        FunctionVectorFiles(),
        CAAFiles(),
        EasySteer(),
        XLVLMs(),
        RefusalDirection(),
        Projection(),
        Pyvene(),
        SAELens(),
        GemmaScope(),
        GemmaScope2(),
        LlamaScope(),
        DictionaryLearning(),
        Goodfire(),
        Sparsify(),
        PEFT(),
        SPRING(),
        DRO(),
    )
}
MAX_WARNINGS = 64  # of one file
PICKLES: dict[str, Pickle] = {pickle.name: pickle for pickle in (AngularFile(), TaRotFile())}


def detect(path: Path, model: ModelShape | None = None) -> str:
    """The name of the format of a file or folder. Raises: SteeringError if there is none, or more than one."""
    source = Source(path)
    found = [name for name, importer in FORMATS.items() if importer.claims(source)]
    if len(found) > 1 and model is not None:
        found = [name for name in found if FORMATS[name].fits(source, model)] or found
    if len(found) > 1:
        meanings = "; or ".join(f"{name}, {FORMATS[name].files}" for name in found)
        raise SteeringError(f"{source.name} has more than one meaning; say the format: {meanings}", "format")
    if not found:
        raise _unknown(source)
    return found[0]


def import_file(
    path: Path, model: ModelShape, format: str | None = None, **hints: Any
) -> tuple[Header, dict[str, Tensor]]:
    """A foreign file or folder as a vector for `model`; `hints` are fields of `Hints`.

    Raises: SteeringError; its `param` names the hint that is missing or wrong.
    """
    name = detect(path, model) if format is None else format
    if name not in FORMATS:
        wanted = f"convert it with --unsafe-pickle: {PICKLES[name].files}" if name in PICKLES else ", ".join(FORMATS)
        raise SteeringError(f"{name!r} is no format that is read here; {wanted}", "format")
    said = _hints(FORMATS[name].takes, name, hints)
    source = Source(path)  # a new one: what was looked at to find the format is not yet accounted for
    draft = FORMATS[name].draft(source, model, said)
    return _finished(name, source, draft, model, said)


def import_pickle(
    path: Path, model: ModelShape, format: str | None = None, **hints: Any
) -> tuple[Header, dict[str, Tensor]]:
    """As `import_file`, for formats that are pickles: the file is unpickled, restricted, in a process of its own."""
    source = Source(path)
    content = unpickled(source.file(source.name))
    found = [name for name, pickle in PICKLES.items() if pickle.knows(content)] if format is None else [format]
    if len(found) != 1 or found[0] not in PICKLES:
        known = "; ".join(f"{pickle.name}: {pickle.files}" for pickle in PICKLES.values())
        raise SteeringError(f"{source.name} is none of the pickles known here ({known})", "format")
    pickle = PICKLES[found[0]]
    said = _hints(pickle.takes, found[0], hints)
    account = source.account(content.fresh())
    return _finished(found[0], source, pickle.draft(account, model, said), model, said)


def _unknown(source: Source) -> SteeringError:
    if not source.is_folder and source.name.endswith(".npy"):
        return SteeringError(f"{source.name} is {PICKLES['angular'].files}; convert it offline with --unsafe-pickle")
    known = "; ".join(f"{name}: {importer.files}" for name, importer in FORMATS.items())
    return SteeringError(f"{source.name} has no format that is known here. Known are {known}", "format")


def _hints(takes: frozenset[str], name: str, said: dict[str, Any]) -> Hints:
    given = {key: value for key, value in said.items() if value is not None}
    try:
        hints = Hints.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        raise SteeringError(f"{path}: {first['msg']}", path) from error
    for key in given:
        if key not in takes | COMMON:
            raise SteeringError(f"{name} has no use for {key}; it takes {', '.join(sorted(takes | COMMON))}", key)
    return hints


def _finished(
    name: str, source: Source, draft: Draft, model: ModelShape, hints: Hints
) -> tuple[Header, dict[str, Tensor]]:
    """The header, checked with the tensors as a server would, once all that the files hold is accounted for."""
    notes = [*draft.notes, *(f"{ignored} was ignored, as was said" for ignored in source.settle(hints.ignore))]
    said_name = source.name.encode(errors="replace").decode()
    provenance: dict[str, Any] = {"format": name, "source": said_name, "sha256": source.digest}
    if notes:
        provenance["warnings"] = notes[:MAX_WARNINGS]
    if said := hints.model_dump(exclude_defaults=True, exclude=set(HEADER)):
        provenance["hints"] = {key: v.name if isinstance(v, Path) else v for key, v in said.items()}
    header = Header(
        method=draft.method,
        model=draft.model or model,
        scale=draft.scale if hints.scale is None else hints.scale,
        defaults={**draft.defaults, **hints.defaults},
        where=draft.where if hints.where is None else hints.where,
        description=hints.description,
        provenance=provenance,
        licence=hints.licence,
    )
    tensors = dict(draft.tensors)
    warnings = parse(packed(header, tensors)).warnings[:MAX_WARNINGS]
    if warnings:
        header = header.model_copy(update={"provenance": provenance | {"warnings": warnings}})
    return header, tensors
