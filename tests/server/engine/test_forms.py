"""The model's plain form: what sites changed exists twice, all else once; graphs are kept for each form."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.config import CompilationMode, CUDAGraphMode

from whipstaff.server.engine.patch import swap
from whipstaff.server.engine.worker import runner_v1, runner_v2
from whipstaff.server.engine.worker.edits.forms import Forms, add_plain_form, classes_of


class Attention(nn.Module):
    """Known by name, and holds a projection that may be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.projection, self.missing = Attention(), nn.Linear(2, 2), None
        self.register_buffer("kept", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.projection(self.attention(x))
        return out


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layers, self.norm = nn.Embedding(4, 2), nn.ModuleList([Block(), Block()]), nn.LayerNorm(2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x)
        return out


class Model(nn.Module):
    """Its head is its embedding, as in many models: it is found twice."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = self.backbone.embedding

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.backbone(ids)
        return out


IDS = torch.tensor([1, 2])


class Edited:
    """Laid over a module: counts its calls and changes what comes of it."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Edited.calls += 1
        edited: Tensor = super().forward(x) + 1  # type: ignore[misc]
        return edited


def config(mode: CompilationMode = CompilationMode.NONE, **known: nn.Module) -> Any:
    compilation = SimpleNamespace(mode=mode, static_forward_context=known, cudagraph_mode=CUDAGraphMode.NONE)
    return SimpleNamespace(compilation_config=compilation, additional_config={"whipstaff": {}})


def two_forms(changes: Any, known: Any = lambda model: {}) -> tuple[Model, Forms, Any]:
    """A model, and its plain form if it has one."""
    torch.manual_seed(0)
    model, forms, Edited.calls = Model(), Forms(), 0
    classes = classes_of(model)
    for module in changes(model):
        swap(module, Edited)
    add_plain_form(model, classes, forms, config(**known(model)))
    backbone: Any = model.backbone
    plain = backbone.whipstaff_plain[0] if forms.has_two else None
    return model, forms, plain


def edited_parts(model: Model) -> list[nn.Module]:
    return [model.backbone.embedding, *model.backbone.layers, *(one.projection for one in model.backbone.layers)]


def test_the_plain_form_runs_none_of_ours_and_gives_what_the_model_gave() -> None:
    torch.manual_seed(0)
    expected = Model()(IDS)
    model, forms, plain = two_forms(edited_parts)
    assert torch.equal(model(IDS), expected) and Edited.calls == 0
    with forms.with_sites():
        assert not torch.allclose(model(IDS), expected) and Edited.calls == 5
    assert forms.runs_plain and not forms.warms_both
    assert not any(isinstance(module, Edited) for module in plain.modules())
    assert type(plain) is Backbone and [type(block) for block in plain.layers] == [Block, Block]


def test_all_but_what_was_changed_is_there_once() -> None:
    model, _, plain = two_forms(edited_parts)
    own: Any = model.backbone
    other = plain
    assert dict(own.named_parameters()).keys() == dict(other.named_parameters()).keys()
    assert all(one is two for one, two in zip(own.parameters(), other.parameters(), strict=True))
    assert own.norm is other.norm and own.layers[0].attention is other.layers[0].attention
    assert own.layers[0].projection is not other.layers[0].projection
    own.layers[0].projection.weight = nn.Parameter(torch.ones(2, 2))  # weights that are loaded anew
    own.layers[1].register_buffer("kept", torch.ones(1))
    assert other.layers[0].projection.weight is own.layers[0].projection.weight and other.layers[1].kept == 1
    assert "whipstaff" not in "".join(name for name, _ in model.named_modules())


def test_what_graphs_find_by_name_stays_one() -> None:
    """Though something in it was changed: caches are bound to it."""
    model, _, plain = two_forms(
        lambda model: [*edited_parts(model), model.backbone.layers[0].get_submodule("attention.inner")],
        lambda model: {"layers.0": model.backbone.layers[0].get_submodule("attention")},
    )
    layers: Any = model.backbone.layers
    assert plain.layers[0].attention is layers[0].attention
    assert isinstance(plain.layers[0].attention.inner, Edited)


def test_where_there_is_no_place_to_choose_there_is_one_form() -> None:
    model, forms, _ = two_forms(lambda model: [model])
    assert not forms.has_two and type(model) is not Model
    forms = Forms()
    add_plain_form(model, {}, forms, config(CompilationMode.STOCK_TORCH_COMPILE))
    assert not forms.has_two


class Wrapper:
    """As vLLM's wrapper of whole graphs: captures what is new, replays what it has."""

    def __init__(self) -> None:
        self.concrete_cudagraph_entries: dict[int, str] = {}
        self.forms: Any = None

    def __call__(self, size: int) -> str:
        form = "plain" if self.forms.runs_plain else "sites"
        return self.concrete_cudagraph_entries.setdefault(size, form)

    def clear_graphs(self) -> None:
        raise AssertionError


def test_whole_graphs_are_kept_for_each_form() -> None:
    wrapper, forms = Wrapper(), Forms()
    wrapper.forms = forms
    swap(wrapper, runner_v1.GraphsOfForms, whipstaff_forms=forms, whipstaff_graphs={True: {}, False: {}})
    with forms.with_sites():
        assert wrapper(8) == "sites"
    assert wrapper(8) == "plain"
    with forms.with_sites():
        assert wrapper(8) == "sites"
    wrapper.clear_graphs()
    assert wrapper.whipstaff_graphs == {True: {}, False: {}}  # type: ignore[attr-defined]


class Manager:
    """As Model Runner V2's: captures all at once, and replays by size."""

    def __init__(self) -> None:
        self.graphs: dict[int, str] = {}
        self._capture_mem_samples: list[int] | None = None
        self.forms: Any = None

    def capture(self, sizes: list[int]) -> None:
        for size in sizes:
            assert size not in self.graphs
            self.graphs[size] = "plain" if self.forms.runs_plain else "sites"
            if self._capture_mem_samples is not None:
                self._capture_mem_samples.append(size * (1 if self.forms.runs_plain else 100))

    def run_fullgraph(self, size: int) -> str:
        return self.graphs[size]

    def release_graphs(self) -> None:
        self.graphs.clear()


@pytest.mark.parametrize("samples", (None, []))
def test_v2_captures_both_forms_and_counts_their_memory(samples: list[int] | None) -> None:
    manager, forms = Manager(), Forms()
    manager.forms, manager._capture_mem_samples = forms, samples
    swap(manager, runner_v2.GraphsOfForms, whipstaff_forms=forms, whipstaff_graphs={True: {}, False: {}})
    manager.capture([8, 4])
    assert forms.runs_plain and samples in (None, [808, 404])
    assert [manager.run_fullgraph(size) for size in (8, 4)] == ["plain"] * 2
    with forms.with_sites():
        assert [manager.run_fullgraph(size) for size in (8, 4)] == ["sites"] * 2
    manager.release_graphs()
    assert manager.whipstaff_graphs == {True: {}, False: {}}  # type: ignore[attr-defined]


@pytest.mark.parametrize("adapter", (runner_v1, runner_v2))
def test_dummy_passes_are_for_both_forms_until_the_engine_serves(adapter: Any) -> None:
    forms, ran = Forms(), []

    class Runner:
        def _dummy_run(self, num: int) -> int:
            ran.append(("plain" if forms.runs_plain else "sites", num))
            return num

    runner = Runner()
    step = SimpleNamespace(edits=SimpleNamespace(forms=forms))
    swap(runner, adapter.SteeredRunner, whipstaff_step=step)
    forms.warms_both = True
    assert runner._dummy_run(3) == 3 and ran == [("sites", 3), ("plain", 3)]
    forms.warms_both = False
    assert runner._dummy_run(2) == 2 and ran[2:] == [("plain", 2)]
