"""The served model's two forms: with the sites, and plain, as vLLM made it.

Sites change the classes of modules in place. The plain form is a second tree beside the first: a module that was
changed exists twice, and so does what contains it; all else is shared, parameters, attention layers and their caches
among it. A step in which no site has anything to do runs it: eagerly none of our code, compiled the very graph that
stock vLLM compiles, captured the very graphs that it captures.

The form is chosen on the host, for each forward pass, where vLLM enters what it compiles. Captured whole graphs hold
what was chosen as they were captured, so whoever keeps such graphs keeps two sets.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig, set_current_vllm_config

from whipstaff.server.engine.layout import LAYOUT_KEY
from whipstaff.server.engine.patch import swap

Classes = Mapping[nn.Module, type]  # of modules, before anything was laid over them


class Forms:
    """Which form runs."""

    def __init__(self) -> None:
        self.runs_plain = True  # the next forward pass, where there are two forms
        self.has_two = False
        self.warms_both = False  # while vLLM compiles and captures: dummy passes are for both

    @contextmanager
    def with_sites(self) -> Iterator[None]:
        """Forward passes of what is not a step: with the sites."""
        before, self.runs_plain = self.runs_plain, False
        try:
            yield
        finally:
            self.runs_plain = before


def classes_of(model: nn.Module) -> Classes:
    """What the modules of a model are now."""
    return {module: type(module) for module in model.modules()}


def add_plain_form(model: nn.Module, classes: Classes, forms: Forms, config: VllmConfig) -> None:
    """Let the model run as it was when it had `classes`, too.

    Args:
        forms: from now on says which form runs.
        config: vLLM's, of the model.
    """
    compilation = config.compilation_config
    if compilation.mode == CompilationMode.STOCK_TORCH_COMPILE or is_breakable_cudagraph_enabled():
        return  # what is compiled is the whole model; or graphs are captured by what knows one form
    known = set(compilation.static_forward_context.values())  # by name, in compiled graphs: they have to stay one
    root = _root(model, {module for module in _own(model, known) if type(module) is not classes[module]})
    if root is model:
        return  # no place is left at which to choose
    plain = _form(root, classes, known, {})
    own = _config_of_plain(config)
    is_compiled = False
    for module in plain.modules():
        if _is_compiled(module) and module not in classes:
            _compile_anew(module, own)
            is_compiled = True
    swap(root, _two_forms(type(root)), whipstaff_forms=forms, whipstaff_plain=(plain,))
    forms.has_two = True
    forms.warms_both = is_compiled or compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE)


def _own(module: nn.Module, known: set[Any]) -> Iterator[nn.Module]:
    """A module and those in it, but for what is known by name."""
    if module not in known:
        yield module
        for child in module.children():
            yield from _own(child, known)


def _root(module: nn.Module, changed: set[nn.Module]) -> nn.Module:
    """The module to be entered in two ways: what vLLM compiles, if that has all that was changed in it; else the
    innermost one that has."""
    while module not in changed and not _is_compiled(module):
        inner = next((child for child in module.children() if changed <= set(child.modules())), None)
        if inner is None or type(inner).forward is nn.Module.forward:  # a list of modules is not entered
            break
        module = inner
    return module


def _form(module: nn.Module, classes: Classes, known: set[Any], made: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module as it was: itself, where nothing in it was changed."""
    if module in known:
        return module
    if module not in made:
        children = vars(module)["_modules"]
        forms = {
            name: None if child is None else _form(child, classes, known, made) for name, child in children.items()
        }
        has_same = all(form is children[name] for name, form in forms.items())
        made[module] = module
        if not has_same or type(module) is not classes[module]:
            made[module] = object.__new__(classes[module])
            parts = vars(module) if has_same else {**vars(module), "_modules": forms}
            object.__setattr__(made[module], "__dict__", parts)
    return made[module]


def _is_compiled(module: Any) -> bool:
    return isinstance(module, TorchCompileWithNoGuardsWrapper) and not module.do_not_compile


def _config_of_plain(config: VllmConfig) -> VllmConfig:
    """What a model without sites is compiled with: in vLLM's cache it is found under stock vLLM's key."""
    own = copy(config)
    own.additional_config = {key: value for key, value in dict(config.additional_config).items() if key != LAYOUT_KEY}
    own.compilation_config = copy(config.compilation_config)
    return own


def _compile_anew(module: Any, config: VllmConfig) -> None:
    """Let a copy of a module that vLLM compiles have a graph of its own."""
    module.vllm_config, module.compilation_config = config, config.compilation_config
    module.was_aot_compile_fn_loaded_from_disk, module.aot_compiled_fn = False, None
    with set_current_vllm_config(config), set_model_tag("plain"):
        TorchCompileWithNoGuardsWrapper.__init__(module, module._compile_prefix, module._is_encoder)


def _two_forms(cls: Any) -> type:
    """The class that is laid over that of the module which is entered in two ways."""

    class TwoForms(cls):
        whipstaff_forms: Forms
        whipstaff_plain: tuple[nn.Module]  # in a tuple: it is no part of this one

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if self.whipstaff_forms.runs_plain:
                return self.whipstaff_plain[0](*args, **kwargs)
            return super().__call__(*args, **kwargs)

    return TwoForms
