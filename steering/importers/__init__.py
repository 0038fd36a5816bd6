"""The table of foreign formats. Adding one is a class in a file here and a line below.

`import_file` never runs what it reads; formats that are pickles are for `whipstaff vectors convert --unsafe-pickle`,
which is `import_pickle`, in a process of its own, and never for a server.
"""

import zipfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.added import CAAFiles, EasySteer, RefusalDirection, XLVLMs
from whipstaff.steering.importers.cache import Cache
from whipstaff.steering.importers.dictionary_learning import DictionaryLearning, Goodfire
from whipstaff.steering.importers.function_vector import FunctionVectorFiles
from whipstaff.steering.importers.gguf import Repeng
from whipstaff.steering.importers.honest_llama import Baked, HonestLlama
from whipstaff.steering.importers.importer import COMMON, HEADER, Draft, Hints, Importer
from whipstaff.steering.importers.layers import LayerFiles
from whipstaff.steering.importers.lofit import LoFiTFiles
from whipstaff.steering.importers.nearest import misfit, question, unknown, unknown_name
from whipstaff.steering.importers.peft import PEFT
from whipstaff.steering.importers.pickles import AngularFile, Pickle, TaRotFile, unpickled
from whipstaff.steering.importers.pyvene import Projection, Pyvene
from whipstaff.steering.importers.sae import SAELens, Sparsify
from whipstaff.steering.importers.scope import GemmaScope, GemmaScope2, LlamaScope
from whipstaff.steering.importers.sight import kind_of
from whipstaff.steering.importers.site_soft_injection import SITEFiles
from whipstaff.steering.importers.soft_prompt import DRO, SPRING
from whipstaff.steering.importers.source import Source, is_object_array
from whipstaff.steering.importers.svec import Svec
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header, is_native, packed, parse

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
        LayerFiles(),
        Svec(),
        Cache(),
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
MAX_HEADER = 1 << 24  # bytes of a file that are looked at for a vector file's header
PICKLES: dict[str, Pickle] = {pickle.name: pickle for pickle in (AngularFile(), TaRotFile())}


def detect(path: Path, model: ModelShape | None = None) -> str:
    """The name of the format of a file or folder. Raises: SteeringError if there is none, or more than one."""
    return _detected(Source(path), model)


def import_file(
    path: Path, model: ModelShape, format: str | None = None, **hints: Any
) -> tuple[Header, dict[str, Tensor]]:
    """A foreign file or folder as a vector for `model`; `hints` are fields of `Hints`.

    Raises: SteeringError; its `param` names the hint that is missing or wrong.
    """
    return _imported(Source(path), model, format, hints)


def import_pickle(
    path: Path, model: ModelShape, format: str | None = None, **hints: Any
) -> tuple[Header, dict[str, Tensor]]:
    """As `import_file`, of a pickle, which is opened, restricted, in a process of its own: those of `PICKLES`, and
    any other format in a pickle or a torch file that the safe loader refuses."""
    source = Source(path)
    _check_pickle(source)
    content = unpickled(source.file(source.name))
    found = [name for name, pickle in PICKLES.items() if pickle.knows(content)] if format is None else [format]
    if not found or found[0] not in PICKLES:
        source.hold(content.whole)
        return _imported(source, model, format, hints)
    pickle = PICKLES[found[0]]
    said = _hints(pickle.takes, found[0], hints)
    account = source.account(content.fresh())
    return _finished(found[0], source, pickle.draft(account, model, said), model, said)


def _imported(
    source: Source, model: ModelShape, format: str | None, hints: dict[str, Any]
) -> tuple[Header, dict[str, Tensor]]:
    name = _detected(source, model) if format is None else format
    if name in PICKLES and not source.is_held:
        raise SteeringError(
            f"{name} ({PICKLES[name].files}) is a pickle: convert it offline with --unsafe-pickle", "format"
        )
    if name not in FORMATS:
        raise SteeringError(unknown_name(name, FORMATS), "format")
    said = _hints(FORMATS[name].takes, name, hints)
    source = source.again()  # what was looked at to find the format is not yet accounted for
    return _finished(name, source, FORMATS[name].draft(source, model, said), model, said)


def _detected(source: Source, model: ModelShape | None) -> str:
    found = [name for name, importer in FORMATS.items() if importer.claims(source)]
    if len(found) > 1 and model is not None:
        fitting = [name for name in found if FORMATS[name].fits(source, model)]
        if not fitting:
            raise SteeringError(misfit(source, found, FORMATS, model), "format")
        found = fitting
    if len(found) > 1:
        raise SteeringError(question(source, found, FORMATS), "format")
    if not found:
        raise _unclaimed(source)
    return found[0]


def _unclaimed(source: Source) -> SteeringError:
    if not source.is_folder and not source.is_held and _is_pickle(source.path):
        return SteeringError(
            f"{source.name} is a pickle, which can run code when it is read (angular steering's, TaRot's, or a "
            "dict of vectors by layer, perhaps); convert it offline with --unsafe-pickle"
        )
    if not source.is_folder and _is_native(source.path):
        return SteeringError(f"{source.name} is a Whipstaff vector already; use it as it is")
    return SteeringError(unknown(source, FORMATS), "format")


def _check_pickle(source: Source) -> None:
    """Raises: SteeringError for what is certainly none."""
    if source.is_folder:
        raise SteeringError(f"{source.name} is a folder; --unsafe-pickle opens one file")
    with source.path.open("rb") as file:
        kind = kind_of(file.read(512))
    if kind is not None and not zipfile.is_zipfile(source.path) and not is_object_array(source.path):
        raise SteeringError(f"{source.name} is {kind}, no pickle; leave --unsafe-pickle out")


def _is_native(path: Path) -> bool:
    with path.open("rb") as file:
        return is_native(file.read(MAX_HEADER))


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or is_object_array(path)


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
