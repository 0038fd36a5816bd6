"""What to say of a file whose format is unknown, or more than one: what it holds, the formats nearest, and the flag."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Protocol

from whipstaff.steering.importers.contents import described, names
from whipstaff.steering.importers.source import Source
from whipstaff.steering.shape import ModelShape

NUM_NEAREST = 3
LIST_ALL = "`whipstaff vectors formats` lists them all"
BY_LAYER = "Entries that are vectors of layers are called 3, layer_3, model.layers.3 or blocks.3.hook_resid_post."
_NUMBER = re.compile(r"\d")
_WORD = re.compile(r"[a-z]{3,}|\.[a-z]+")
_COMMON = frozenset(
    {"with", "and", "the", "model", "file", "folder", "its", "vector", "bin", ".pt", ".pth", ".bin", ".npz", ".npy"}
)  # tell nothing apart


class Described(Protocol):
    """A format, as far as help needs it."""

    @property
    def files(self) -> str: ...


def unknown(source: Source, formats: Mapping[str, Described]) -> str:
    """For a file that no importer claims."""
    said = f" {BY_LAYER}" if any(_NUMBER.search(name) for name in names(source)) else ""
    if not said and (near := nearest(_words_of(source), formats)):
        said = f" The nearest formats are {_listed(near, formats)};"
    return f"{source.name} ({described(source)}) has no format that is known here.{said} {LIST_ALL}, --format names one"


def unknown_name(name: str, formats: Mapping[str, Described]) -> str:
    """For a format that there is not."""
    near = get_close_matches(name, formats, NUM_NEAREST) or nearest(_words(name), formats)
    said = f" The nearest: {', '.join(near)}." if near else ""
    return f"{name[:64]!r} is no format that is read here.{said} {LIST_ALL}"


def question(source: Source, found: Iterable[str], formats: Mapping[str, Described]) -> str:
    """For a file that may be several things."""
    return f"{source.name} ({described(source)}) may be {_listed(found, formats, ' or ')}; say which with --format"


def misfit(source: Source, found: Iterable[str], formats: Mapping[str, Described], model: ModelShape) -> str:
    """For a file that looks like several things, and has the shape of none of them for the model."""
    return (
        f"{source.name} ({described(source)}) does not say what it is, and for {model.num_layers} layers and "
        f"hidden size {model.hidden_size} its shape does not either. It may be {_listed(found, formats, ' or ')}; if "
        "it is one of them, say which with --format"
    )


def nearest(words: set[str], formats: Mapping[str, Described]) -> list[str]:
    """The formats with most of these words in their name and description, best first."""
    scores = {name: len(words & _words(f"{name} {one.files}")) for name, one in formats.items()}
    best = sorted((name for name in scores if scores[name]), key=lambda name: -scores[name])
    return best[:NUM_NEAREST]


def _words_of(source: Source) -> set[str]:
    kind = {"folder"} if source.is_folder else set()
    return kind | _words(" ".join([source.name, *source.names[:64]])) | _words(described(source))


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower())) - _COMMON


def _listed(names: Iterable[str], formats: Mapping[str, Described], between: str = "; ") -> str:
    return between.join(f"{name} ({formats[name].files})" for name in names)
