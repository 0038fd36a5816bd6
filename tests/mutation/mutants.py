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


def swap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put what `make` makes of an attribute in its place. Raises: AttributeError where it is gone."""
    setattr(owner, name, make(getattr(owner, name)))


def _always(nothing: Any) -> Any:
    """Instead of a function, one that says nothing."""
    return lambda made: lambda *args: nothing


def _steering(name: str) -> dict[str, Patch]:
    def off(module: ModuleType) -> None:
        method = type(module.METHODS[name])
        for what, nothing in (("ops", ()), ("attention_edits", ()), ("routing", {})):
            if hasattr(method, what):
                swap(method, what, _always(nothing))

    further: dict[str, Patch] = {}
    if name == "probe":
        further = {"steering.tables": _unread}
    elif name == "soft_prompt":
        further = {"server.engine.worker.edits.soft_prompts": _uninserted}
    return {
        "steering.methods": off,
        "server.engine.worker.worker": lambda module: _headless(module, name),
        **further,
    }


def _unread(module: ModuleType) -> None:
    """A probe's readings are 0."""

    def zero(found: Any) -> Any:
        return type(found)(0 * found.direction, 0.0, found.condition_index, found.is_latched, False)

    swap(module, "_reading", lambda reading: lambda *args: zero(reading(*args)))


def _uninserted(module: ModuleType) -> None:
    swap(module.SoftRows, "_learned", lambda learned: lambda self, view: iter(()))


def _headless(module: ModuleType, name: str) -> None:
    """A learned head's numbers are 0."""

    def zeroing(head: Any) -> Any:
        def zeros(self: Any, digest: str) -> Any:
            found = head(self, digest)
            is_it = self._vectors[digest].method.name == name
            return {part: 0 * tensor for part, tensor in found.items()} if is_it else found

        return zeros

    swap(module.SteeredWorker, "_head", zeroing)


def _decoding(name: str) -> dict[str, Patch]:
    def off(module: ModuleType) -> None:
        method = type(module.METHODS[name])
        parts = [part for part in ("rewrite", "mix", "start") if hasattr(method, part)]
        assert parts, f"{name} does nothing that is known here"
        if "rewrite" in parts:
            swap(method, "rewrite", lambda rewrite: lambda self, rows, settings: rows.logits)
        if "mix" in parts:
            swap(method, "mix", lambda mix: lambda self, params: _weightless(mix(self, params)))

        if "start" in parts:
            swap(method, "start", _greedy(module))

    return {"decoding.methods": off}


def _greedy(methods: ModuleType) -> Callable[[Any], Any]:
    """Instead of a search, one of a single beam."""
    beams = methods.METHODS["beam_search"]
    start, alone = type(beams).start, beams.off((), ())
    return lambda started: lambda self, setting, facts: start(beams, alone, facts)


def _weightless(mix: Any) -> Any:
    """The served model's own logits, though the other streams are run."""
    terms = [type(term)(term.stream, float(index == 0)) for index, term in enumerate(mix.terms)]
    return mix._replace(terms=tuple(terms), is_probability=False)


def _stage(name: str) -> dict[str, Patch]:
    def metadata(module: ModuleType) -> None:
        if name == "mix":
            swap(module.DecodingMetadata, "mixed", lambda mixed: lambda self, *args: [])
        swap(
            module.DecodingMetadata,
            "calls",
            lambda calls: lambda self, *turns: calls(self, *(t for t in turns if t != name)),
        )

    def pipeline(module: ModuleType) -> None:
        if name == "own temperature":
            swap(module, "_temper", lambda temper: lambda *args: None)
        elif name == "own truncation":
            swap(module, "apply_top_k_top_p_min_p", lambda apply_top_k_top_p_min_p: lambda logits, *args: logits)

    return {"server.engine.worker.logits.metadata": metadata, "server.engine.worker.logits.pipeline": pipeline}


def _site(name: str) -> dict[str, Patch]:
    def module_edits(module: ModuleType) -> None:
        if name == "attention":
            swap(module.ModuleEdits, "_attention_edits", lambda make: lambda self, *args: ())
        elif name == "router":
            swap(module, "routing_of", lambda routing_of: lambda *args: {})

    def sites(module: ModuleType) -> None:
        names: list[str] = []

        def noting(install: Any) -> Any:
            def installed(*args: Any, **more: Any) -> Any:
                found = install(*args, **more)
                names[:] = [point.site for point in found.tables.hook_points]
                return found

            return installed

        def skipping(run: Any) -> Any:
            return lambda x, residual, bound, site: None if names[site] == name else run(x, residual, bound, site)

        swap(module, "install_sites", noting)
        swap(module, "run_bound_edits_", skipping)

    return {"server.engine.worker.edits.sites": sites, "server.engine.worker.edits.module_edits": module_edits}
