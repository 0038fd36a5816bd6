"""Mutants: Whipstaff with one thing switched off, planted into whatever process imports it.

A mutant is named `kind:name`: a method of steering or decoding, a stage of the pipeline, a site of edits. `plant`
changes modules once they are loaded, or at once where they are; nothing of the product knows of it.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

VARIABLE = "WHIPSTAFF_TEST_MUTANT"
STAGES = ("mix", "rule", "penalty", "temperature", "late temperature", "truncation")
OWN = ("own temperature", "own truncation")  # a request's own sampling parameters, where our stages do them
HOOKS = ("resid_pre", "resid_post", "attn_in", "attn_head", "attn_out", "mlp_in", "mlp_out", "router", "attention")
Patch = Callable[[ModuleType], None]


def patches(mutant: str) -> Mapping[str, Patch]:
    """What a mutant changes: module -> what is done to it."""
    kind, name = mutant.split(":", 1)
    made = {"steering": _steering, "decoding": _decoding, "stage": _stage, "site": _site}[kind](name)
    return {f"whipstaff.{module}": patch for module, patch in made.items()}


def plant(mutant: str) -> None:
    """Switch a mutant's part off in this process."""
    for module, patch in patches(mutant).items():
        if module in sys.modules:
            patch(sys.modules[module])
        else:
            sys.meta_path.insert(0, _Planter(module, patch))


class _Planter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module as usual, then changes it."""

    def __init__(self, name: str, patch: Patch) -> None:
        self._name, self._patch = name, patch

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._patch(module)


def _steering(name: str) -> dict[str, Patch]:
    def off(module: ModuleType) -> None:
        method = module.METHODS[name]
        type(method).ops = lambda *args: ()
        if hasattr(method, "routing"):
            type(method).routing = lambda *args: {}

    return {
        "steering.methods": off,
        "steering.tables": lambda module: _unread(module) if name == "probe" else None,
        "server.engine.specials": lambda module: _unmade(module, name),
        "server.engine.soft": lambda module: _uninserted(module) if name == "soft_prompt" else None,
        "server.engine.worker": lambda module: _headless(module, name),
    }


def _unread(module: ModuleType) -> None:
    """A probe's readings are 0."""
    reading = module._reading

    def zero(*args: Any) -> Any:
        found = reading(*args)
        return type(found)(0 * found.direction, 0.0, found.column, found.is_latched, False)

    module._reading = zero


def _unmade(module: ModuleType, name: str) -> None:
    """An edit of attention is not made."""
    make = module.Specials._make

    def made(self: Any, special: Any, prompt_len: int) -> Any:
        return () if self._vector_of(special.digest).method.name == name else make(self, special, prompt_len)

    module.Specials._make = made


def _uninserted(module: ModuleType) -> None:
    module.SoftRows._pieces = lambda self, view: iter(())


def _headless(module: ModuleType, name: str) -> None:
    """A learned head's numbers are 0."""
    head = module.SteeredWorker._head

    def zeros(self: Any, digest: str) -> Any:
        found = head(self, digest)
        is_it = self._vectors[digest].method.name == name
        return {part: 0 * tensor for part, tensor in found.items()} if is_it else found

    module.SteeredWorker._head = zeros


def _decoding(name: str) -> dict[str, Patch]:
    def off(module: ModuleType) -> None:
        cls: Any = type(module.METHODS[name])
        if hasattr(cls, "rewrite"):
            cls.rewrite = lambda self, rows, settings: rows.logits
        if hasattr(cls, "mix"):
            mix = cls.mix
            cls.mix = lambda self, params: _weightless(mix(self, params))

    return {"decoding.methods": off}


def _weightless(mix: Any) -> Any:
    """The served model's own logits, though the other streams are run."""
    terms = [type(term)(term.stream, float(index == 0)) for index, term in enumerate(mix.terms)]
    return mix._replace(terms=tuple(terms), is_probability=False)


def _stage(name: str) -> dict[str, Patch]:
    def roster(module: ModuleType) -> None:
        tasks = module.Roster.tasks
        module.Roster.tasks = lambda self, *turns: tasks(self, *(turn for turn in turns if turn != name))
        if name == "mix":
            module.Roster.mixed = lambda self, *args: []

    def decoder(module: ModuleType) -> None:
        if name == "own temperature":
            module._temper = lambda *args: None
        if name == "own truncation":
            module.truncate = lambda logits, *args: logits

    return {"server.engine.roster": roster, "server.engine.decoder": decoder}


def _site(name: str) -> dict[str, Patch]:
    def sites(module: ModuleType) -> None:
        run = module._run
        module._run = lambda owner, site, *args: None if site == name else run(owner, site, *args)

    def specials(module: ModuleType) -> None:
        if name == "attention":
            module.Specials._make = lambda self, *args: ()
        if name == "router":
            module.routing_of = lambda *args: {}

    return {"server.engine.sites": sites, "server.engine.specials": specials}
