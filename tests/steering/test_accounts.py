"""Nothing in a foreign file is passed over: what its importer does not know is refused, what it needs is missed."""

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers import import_file, import_pickle
from whipstaff.steering.importers.ledger import Ledger, settle
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header, packed, parse

from .test_importers import ALL, IDS, SHAPE, Made, V, folder, gguf, numbers, saved

NEW = "nobody_knows_this"
OPTIONAL = {  # what files of a format may lack: another of its forms, or a default of its own library's
    "repeng": {"direction.1", "direction.2"},
    "honest_llama_baked": {f"model.layers.{at}.self_attn.o_proj.bias" for at in (0, 2)},
    "lofit": {f"model.layers.{at}.self_attn.attn_v.{head}" for at, head in ((0, 1), (1, 0), (1, 1), (2, 0))},
    "layers": {"layer_0", "layer_1", "layer_2"},
    "transformer_lens": {"blocks.1.hook_mlp_out"},
    "xl_vlms": {"steering_vector", "concepts1"},
    "refusal": {"pos"},
    "context_knob": {"embed_dim", "rank", "orthogonalize", "parametrizations.weight.0.base"},
    "saelens": {"activation_fn_str", "normalize_activations", "b_enc", "b_dec"},
    "gemma_scope": {"b_enc", "b_dec", "threshold"},
    "gemma_scope_2": {"b_enc", "b_dec", "threshold", "type", "width", "architecture"},
    "llama_scope": {"encoder.bias", "decoder.bias", "d_sae", "out", "hook_point_out"},
    "dictionary_learning": {
        "encoder.bias",
        "decoder.bias",
        "buffer",
        "activation_dim",
        "dict_size",
        "lr",
        "ctx_len",
        "io",
    },
    "goodfire": {"encoder_linear.bias", "decoder_linear.bias"},
    "sparsify": {"encoder.bias", "b_dec", "d_in", "expansion_factor", "normalize_decoder"},
    "peft": {"num_virtual_tokens", "num_transformer_submodules"},
}


def held(path: Path) -> dict[str, Any] | None:
    """What a file with names holds; None for a bare array."""
    if path.suffix == ".json":
        return dict(json.loads(path.read_text()))
    if path.suffix == ".safetensors":
        return {name: tensor.clone() for name, tensor in load_file(path).items()}  # not the mapped file
    if path.suffix == ".npz":
        return dict(np.load(path))
    if path.suffix in (".pt", ".pth", ".bin"):
        found = torch.load(path, weights_only=True)
        return dict(found) if isinstance(found, dict) else None
    return {"direction.1": V, "direction.2": V.half()} if path.suffix == ".gguf" else None


def hold(path: Path, content: dict[str, Any]) -> None:
    path.unlink(missing_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
    elif path.suffix == ".safetensors":
        save_file(content, path)
    elif path.suffix == ".npz":
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in content.items()}
        np.savez(path, **arrays)
    elif path.suffix == ".gguf":
        path.write_bytes(gguf(*content.items()))
    else:
        torch.save(content, path)


def named_files(made: Made) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files that are imported, as far as what they hold has names."""
    paths = sorted(path for path in made.path.rglob("*") if path.is_file()) if made.path.is_dir() else [made.path]
    for path in paths:
        if (content := held(path)) is not None:
            yield path, content


def is_the_models(path: Path) -> bool:
    """A baked checkpoint's config is that of a model, whatever that says."""
    return path.name == "config.json" and "oproj_bias" in path.read_text()


@pytest.mark.parametrize(("name", "maker"), ALL, ids=IDS)
def test_what_nobody_knows_is_refused_by_its_name(name: str, maker: Callable[[Path], Made], tmp_path: Path) -> None:
    made = maker(tmp_path)
    for path, content in named_files(made):
        if is_the_models(path):
            continue
        value: Any = 3 if path.suffix == ".json" else numbers(3)
        changes = {NEW: content | {NEW: value}}
        for key, inner in content.items():
            if isinstance(inner, dict):
                changes[f"{key}.{NEW}"] = content | {key: inner | {NEW: value}}
        for said, changed in changes.items():
            hold(path, changed)
            with pytest.raises(SteeringError, match=said.replace(".", r"\.")) as found:
                import_file(made.path, SHAPE, format=name, **made.hints)
            assert found.value.param == "ignore" and path.name in str(found.value)
            header, tensors = import_file(made.path, SHAPE, format=name, ignore=said, **made.hints)
            assert set(tensors) == set(made.tensors) and header.provenance["hints"]["ignore"] == said
            assert any(said in warning for warning in header.provenance["warnings"])
            hold(path, content | {NEW: None} if path.suffix == ".json" else content)  # null says nothing
            import_file(made.path, SHAPE, format=name, **made.hints)
        hold(path, content)
    with pytest.raises(SteeringError, match="nothing named 'absent'") as found:
        import_file(made.path, SHAPE, format=name, ignore="absent", **made.hints)
    assert found.value.param == "ignore"


@pytest.mark.parametrize(("name", "maker"), ALL, ids=IDS)
def test_what_is_needed_is_missed(name: str, maker: Callable[[Path], Made], tmp_path: Path) -> None:
    made = maker(tmp_path)
    for path, content in named_files(made):
        sections: list[tuple[dict[str, Any], Callable[..., Any]]] = [(content, lambda inner: inner)]
        for key, inner in content.items():
            if isinstance(inner, dict):
                sections.append((inner, lambda changed, key=key, content=content: content | {key: changed}))
        for section, whole in sections:
            for key in section:
                less = {other: value for other, value in section.items() if other != key}
                hold(path, whole(less))
                try:
                    import_file(made.path, SHAPE, format=name, **made.hints)
                    is_refused = False
                except SteeringError:
                    is_refused = True
                assert is_refused != (key in OPTIONAL.get(name, ())), f"{path.name} without {key}"
                hold(path, content)


def test_gguf_fields_are_accounted_for(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(gguf(("direction.1", V)).replace(b"general.source.sizes", b"special.source.sizes"))
    with pytest.raises(SteeringError, match=r"special\.source\.sizes"):
        import_file(path, SHAPE)
    import_file(path, SHAPE, ignore="special.*")


def test_safetensors_metadata_are_accounted_for(tmp_path: Path) -> None:
    path = tmp_path / "soft.safetensors"
    save_file({"soft_prompt": numbers(5, 16)}, path, metadata={"format": "pt", "scale": "3"})
    with pytest.raises(SteeringError, match=r"metadata of soft.safetensors also holds scale"):
        import_file(path, SHAPE)
    import_file(path, SHAPE, ignore="scale")


def test_pickles_are_accounted_for(tmp_path: Path) -> None:
    both: dict[str, Any] = {"first_direction": V, "second_direction": numbers(16)}
    modules = {"model.layers.1.input_layernorm": both}
    search: dict[str, Any] = {"train_X": numbers(3, 3 * 2 * 7), "train_Y": numbers(3, 1), "iteration": 5}
    for content, inner in ((modules, both), (search, search)):
        path = tmp_path / "pickle.pkl"
        path.write_bytes(pickle.dumps(content))
        import_pickle(path, SHAPE)
        for value in (numbers(3), "said", [1, 2]):
            inner[NEW] = value
            path.write_bytes(pickle.dumps(content))
            with pytest.raises(SteeringError, match=NEW):
                import_pickle(path, SHAPE)
            import_pickle(path, SHAPE, ignore=f"*{NEW}")
        del inner[NEW]
    both["mode"] = "input"
    path.write_bytes(pickle.dumps(modules))
    with pytest.raises(SteeringError, match="mode 'input'"):
        import_pickle(path, SHAPE)


def test_ledgers_keep_book() -> None:
    ledger = Ledger("x.json", {"a": 1, "b": {"c": 2, "d": None, "e": {}}, "lr_max": 3, "f": 4, 7: 5})
    assert "a" in ledger and len(ledger) == 5 and list(ledger)  # looking uses nothing
    assert [name for name, _ in ledger.left()] == ["a", "b", "lr_max", "f", "7"]
    ledger.harmless("lr_*")
    assert ledger["a"] == 1 and ledger.get("missing") is None and ledger.section("b").get("x") is None
    assert [name for name, _ in ledger.left()] == ["b.c", "f", "7"]
    assert settle([ledger], "b.*, f,7") == ["b.c", "f", "7"]
    with pytest.raises(SteeringError, match=r"x.json also holds b.c \(2\)"):
        settle([ledger], "f,7")
    with pytest.raises(SteeringError, match="no JSON object"):
        ledger.section("a")


@pytest.mark.parametrize(("rows", "wanted"), [((0, 1), ["add of resid_post.0 is all zeros"]), ((1, 1), [])])
def test_zeros_are_warned_of(rows: tuple[int, int], wanted: list[str], tmp_path: Path) -> None:
    path = folder(tmp_path / "caa")
    for layer, factor in enumerate(rows):
        saved(path / f"vec_layer_{layer}_llama.pt", factor * V)
    header, tensors = import_file(path, SHAPE)
    assert header.provenance.get("warnings", []) == wanted
    plain = header.model_copy(update={"provenance": {}})
    assert parse(packed(plain, tensors)).warnings == wanted  # as of a file that is uploaded as it is


def test_zeros_that_a_method_needs_are_warned_of() -> None:
    """A bias may be zero; what else is may not."""
    shape: ModelShape = SHAPE
    parts: dict[str, Tensor] = {
        "encoder": numbers(24, 16),
        "decoder": torch.zeros(24, 16),
        "decoder_bias": torch.zeros(16),
    }

    header = Header(method="sae", model=shape)
    vector = parse(packed(header, {f"resid_post.1.{name}": tensor for name, tensor in parts.items()}))
    assert vector.warnings == ["decoder, decoder_bias of resid_post.1 is all zeros"]
    parts["decoder"] = numbers(24, 16)
    assert parse(packed(header, {f"resid_post.1.{name}": t for name, t in parts.items()})).warnings == []
