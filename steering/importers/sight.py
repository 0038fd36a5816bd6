"""What a file is at first sight: pointers, pages and other things that stand where a file should be, each by name.

Also what torch's safe loader and the process of `unpickle.py` stumble on: Python objects, by their class, and what
opens them. Nothing here runs anything of a file's.
"""

import re
from pathlib import Path

from whipstaff.steering.errors import SteeringError

_GLOBAL = re.compile(r"(?:GLOBAL|Unsupported class|asks for) `?((?:\w+\.)+\w+)")
_ARRAYS = ("numpy.", "_codecs.encode")  # what `--unsafe-pickle` knows
_PROGRAMS = (
    "posix.",
    "os.",
    "nt.",
    "subprocess.",
    "sys.",
    "shutil.",
    "socket.",
    "runpy.",
    "builtins.e",
    "__builtin__.e",
)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LFS = b"version https://git-lfs.github.com/spec/"
_KINDS = {  # of files -> the endings of their names
    "a safetensors file": (".safetensors",),
    "an array of numpy's": (".npy",),
    "a GGUF file": (".gguf",),
    "a zip archive (torch's or numpy's)": (".pt", ".pth", ".bin", ".npz", ".pkl"),
}
_STARTS = {
    kind: re.compile(form)
    for kind, form in zip(_KINDS, (rb"[\s\S]{8}\{\s*\"", rb"\x93NUMPY", rb"GGUF", rb"PK\x03\x04"), strict=True)
}
_ENDINGS = {ending for endings in _KINDS.values() for ending in endings}
_ASDICT = "import dataclasses, torch\nfound = {load}\ntorch.save(dataclasses.asdict(found), 'vectors.pt')"
_LOAD = "torch.load({name!r}, weights_only=False)"
_OPENED: dict[str, tuple[str, str]] = {  # class -> its library, and the program that saves its numbers
    "steering_vectors.steering_vector.SteeringVector": ("steering-vectors", _ASDICT),
    "repeng.extract.ControlVector": ("repeng", "import torch\nfound = {load}\nfound.export_gguf('vectors.gguf')"),
    "activation_steering.steering_vector.SteeringVector": (
        "activation-steering",
        "import torch\nfound = {load}\nfound.save('vectors.svec')",
    ),
    "transformer_lens.ActivationCache.ActivationCache": (
        "transformer_lens",
        "import torch\nfound = {load}\ntorch.save(dict(found), 'cache.pt')",
    ),
    "saklas.core.profile.Profile": ("saklas", "import torch\nfound = {load}\nfound.save('vectors.safetensors')"),
}


def check_sight(path: Path) -> None:
    """Raises: SteeringError if the file only stands for the one that is meant, or has the wrong byte order."""
    with path.open("rb") as file:
        start = file.read(512)
    if (reason := _seen(start) or _misnamed(path.suffix, start)) is not None:
        raise SteeringError(f"{path.name} {reason}")


def kind_of(start: bytes) -> str | None:
    """What a file is that begins so, where that is certain."""
    return next((kind for kind, form in _STARTS.items() if form.match(start)), None)


def _misnamed(suffix: str, start: bytes) -> str | None:
    """A file of another kind than its name's ending says, by how it begins."""
    kind = kind_of(start)
    if kind is None or suffix not in _ENDINGS or suffix in _KINDS[kind]:
        return None
    return f"begins as {kind} does, which its name does not say; call it *{_KINDS[kind][0]} if it is one"


def _seen(start: bytes) -> str | None:
    text = start.lstrip().lower()
    if not start:
        return "is empty: nothing was written or downloaded"
    if start.startswith(_LFS):
        size = re.search(rb"^size (\d+)", start, re.MULTILINE)
        said = f" of {size[1].decode()} bytes" if size else ""
        return f"is a Git LFS pointer, not the file{said} that it stands for; fetch that with `git lfs pull`"
    if start.startswith((b"/annex/objects/", b"../.git/annex/", b".git/annex/")):
        return "is a git-annex pointer, not the file that it stands for; fetch that with `git annex get`"
    if text.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not the file that it shows; download the raw file (on a model hub: resolve, not blob)"
    if text.startswith(b"<?xml") or start.startswith((b"Entry not found", b"404: Not Found", b"Invalid username")):
        return f"is an answer of the server that it was downloaded from, not a file: {_first_words(start)}"
    if start[:4] == b"GGUF" and start[4:7] == b"\0\0\0":
        return "is a big-endian GGUF file; little-endian ones are read: gguf-convert-endian (of gguf) turns it round"
    return None


def _first_words(start: bytes) -> str:
    return start[:80].decode(errors="replace").strip().splitlines()[0]


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line without colours."""
    lines = _COLOURS.sub("", str(error)).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def refused_pickle(name: str, error: BaseException | str) -> str:
    """What a torch file or a pickle holds that is refused, and what opens it: of torch's error, or unpickle.py's."""
    loader = "" if isinstance(error, str) else " by torch's safe loader"
    found = _GLOBAL.search(_COLOURS.sub("", str(error)))
    if found is None:
        return (
            f"{name} is refused{loader}: {_COLOURS.sub('', error)[:500] if isinstance(error, str) else _reason(error)}"
        )
    what = found[1].rstrip(".")
    if what.startswith(_ARRAYS) and loader:
        return (
            f"{name} holds numpy's arrays in a pickle, which torch's safe loader does not open ({what}); "
            "convert it offline with --unsafe-pickle"
        )
    if what.startswith(_PROGRAMS):
        return (
            f"{name} is refused{loader}: its pickle asks to run {what}, which is a program and no data; do not open it"
        )
    library, program = _OPENED.get(what, (what.partition(".")[0], ""))
    held = (
        f"{name} holds a Python object, a pickled {what}, and is refused{loader}: opening it runs code of {library}. "
    )
    if not program:
        return f"{held}If you trust it, open it there and save its tensors by layer: torch.save({{layer: tensor}}, ...)"
    lines = program.format(load=_LOAD.format(name=name))
    return f"{held}If you trust its author, these lines, run where {library} is installed, save its numbers:\n{lines}"


def _reason(error: BaseException) -> str:
    """The line of torch's message that says why; its first is advice."""
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).strip().splitlines()]
    why = [line.partition(": ")[2] for line in lines if "Unpickler error: " in line]
    if why and "persistent" not in why[0]:
        return why[0][:300]
    if lines and not lines[0].startswith("Weights only load failed"):
        return lines[0][:300]
    return "its pickle holds more than tensors, dicts and lists, or is damaged"
