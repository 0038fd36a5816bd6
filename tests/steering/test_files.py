"""Files that people have: as the libraries of their authors read them, and messages that say what a file holds.

`golden/files/make.py` made the folders with the libraries themselves; `given` came from users. Where a layout stands
here by hand, the test says so.
"""

import json
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import goldens
import numpy as np
import pytest
import torch
from reference import ops as reference
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from whipstaff.server.commands.vectors import shape_of
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers import FORMATS, detect, import_file, import_pickle
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Vector, packed, parse
from whipstaff.steering.where import Where

FILES = goldens.ROOT.parent / "files"
GIVEN = FILES / "given"
TOLERANCE = 2e-4  # logits, as in test_methods
STRENGTH = 1.5  # of make.py
HERE = goldens.shape_of("llama_a")
SHAPE = ModelShape(
    architecture="LlamaForCausalLM", hidden_size=16, num_layers=3, num_heads=2, head_dim=8, num_kv_heads=1
)
GENERATOR = torch.Generator().manual_seed(5)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


V = numbers(16)
ROWS = numbers(3, 16)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def read(path: Path, model: ModelShape = HERE, **hints: Any) -> Vector:
    return parse(packed(*import_file(path, model, **hints)))


def read_pickle(path: Path, model: ModelShape = HERE, **hints: Any) -> Vector:
    return parse(packed(*import_pickle(path, model, **hints)))


def added(vector: Vector) -> dict[str, Tensor]:
    return {f"{point.site}.{point.layer}": parts["add"] for point, parts in vector.tensors.items()}


def check_added(vector: Vector, wanted: dict[str, Tensor]) -> None:
    found = added(vector)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[point], wanted[point].float()) for point in wanted)


def refusal(path: Path, model: ModelShape = SHAPE, **hints: Any) -> SteeringError:
    with pytest.raises(SteeringError) as found:
        import_file(path, model, **hints)
    assert "\x1b" not in str(found.value)
    return found.value


# ---- what the libraries compute


@pytest.fixture(scope="module")
def llama() -> Any:
    return AutoModelForCausalLM.from_pretrained(
        goldens.ROOT / "models" / "llama_a", dtype=torch.float32, attn_implementation="eager"
    ).eval()


def edits_of(vector: Vector) -> Iterator[reference.Edit]:
    method: Any = vector.method
    params = method.params(scale=STRENGTH)
    spans = Where.of(vector.header.where or method.where)

    def touches(position: int, prompt_len: int) -> bool:
        return any(a <= position and (b is None or position < b) for a, b in spans.intervals(prompt_len))

    for point, tensors in vector.tensors.items():
        yield reference.Edit(
            point.site, point.layer, method.ops(tensors, params, point, vector.header.model), touches, False
        )


LIBRARIES = {
    "steering_vectors_decoder_block/vectors.pt": ("resid_post", read),
    "steering_vectors_decoder_block/dict.pt": ("resid_post", read),
    "steering_vectors_mlp/vectors.pt": ("mlp_out", read),
    "steering_vectors_self_attn/vectors.pt": ("attn_out", read),
    "steering_vectors_post_attention_layernorm/vectors.pt": ("mlp_in", read),
    "repeng/asdict.pt": ("resid_post", read_pickle),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_file_does_what_its_library_does(name: str, llama: Any) -> None:
    site, reading = LIBRARIES[name]
    vector = reading(FILES / name)
    assert vector.sites == [site] and vector.header.where == "all"
    expected = load_file((FILES / name).with_name("expected.safetensors"))
    prompt = expected["input_ids"].tolist()
    got = reference.logits(llama, prompt, len(prompt), list(edits_of(vector)))
    assert (got - expected["logits"]).abs().max() < TOLERANCE
    plain = reference.logits(llama, prompt, len(prompt), [])
    assert (plain - expected["logits"]).abs().max() > 100 * TOLERANCE


def test_saklas_profiles_are_vectors_by_layer() -> None:
    expected = load_file(FILES / "saklas" / "expected.safetensors")
    vector = read(FILES / "saklas" / "calm.safetensors")
    check_added(vector, {f"resid_post.{layer}": expected[f"rows.{layer}"] for layer in (0, 3)})


def test_multitask_prompts_are_those_of_one_task() -> None:
    expected, path = load_file(FILES / "peft_multitask" / "expected.safetensors"), FILES / "peft_multitask"
    for task in range(2):
        found = read(path, part=task).shared_parts["rows"]
        torch.testing.assert_close(found, expected[f"rows.{task}"], rtol=1e-5, atol=1e-6)
    for hints in ({}, {"part": 2}):
        error = refusal(path, HERE, **hints)
        assert error.param == "part" and "tasks 0 to 1" in str(error)


def test_cpt_prompts_are_the_rows_that_are_inserted() -> None:
    found = read(FILES / "peft_cpt").shared_parts["rows"]
    torch.testing.assert_close(found, load_file(FILES / "peft_cpt" / "expected.safetensors")["rows"], rtol=0, atol=1e-6)
    assert refusal(FILES / "peft_cpt", HERE, part=0).param == "part"


def test_a_transformer_lens_cache_is_actadds_prompt() -> None:
    expected = load_file(FILES / "transformer_lens" / "expected.safetensors")
    for layer in range(4):
        vector = read(FILES / "transformer_lens" / "cache.pt", layer=layer)
        ((point, parts),) = vector.tensors.items()
        assert vector.header.method == "actadd" and point == ("resid_pre", layer)
        torch.testing.assert_close(parts["rows"], expected[f"rows.{layer}"][0], rtol=0, atol=1e-5)
    two = FILES / "transformer_lens" / "two.safetensors"  # what leaves block 1 enters block 2
    for prompt in range(2):
        rows = next(iter(read(two, layer=2, part=prompt).tensors.values()))["rows"]
        torch.testing.assert_close(rows, expected["rows.2"][prompt], rtol=0, atol=1e-5)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "layer"),
        ({"layer": 0}, "layer"),
        ({"layer": 2}, "part"),
        ({"layer": 2, "part": 2}, "part"),
    ]
    for hints, field in cases:
        assert refusal(two, HERE, **hints).param == field, hints


def test_a_cache_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    content = {"blocks.1.hook_resid_pre": numbers(1, 4, 16), "blocks.0.mlp.hook_post": numbers(1, 4, 8)}
    vector = read(saved(tmp_path / "cache.pt", content), SHAPE)
    assert vector.header.provenance["warnings"] and vector.layers == [1]
    assert "also holds coefficient" in str(refusal(saved(tmp_path / "more.pt", content | {"coefficient": numbers(1)})))


# ---- what users gave


def test_given_files_are_what_they_are() -> None:
    model = shape_of(str(GIVEN / "llama_config.json"))
    wanted = torch.load(GIVEN / "dict_int.pt")
    check_added(read(GIVEN / "dict_int.pt", model), {f"resid_post.{at}": row for at, row in wanted.items()})
    check_added(read(GIVEN / "dict_int.pt", model, layer=2), {"resid_post.2": wanted[2]})
    arrays = np.load(GIVEN / "dict.npy", allow_pickle=True).item()
    assert "--unsafe-pickle" in str(refusal(GIVEN / "dict.npy", model))
    check_added(
        read_pickle(GIVEN / "dict.npy", model), {f"resid_post.{at}": torch.tensor(row) for at, row in arrays.items()}
    )
    caa = read(GIVEN / "vec_layer_2.pt", model)
    assert (caa.header.method, caa.header.where or caa.method.where) == ("caa", "each_last")
    check_added(caa, {"resid_post.2": torch.load(GIVEN / "vec_layer_2.pt")})


def test_a_stack_is_a_question_that_its_format_answers() -> None:
    model, path = shape_of(str(GIVEN / "llama_config.json")), GIVEN / "per_layer_vectors_4x64.pt"
    error = refusal(path, model)
    assert error.param == "format" and "[4, 64]" in str(error)
    assert all(word in str(error) for word in ("layers", "spring", "--format"))
    rows = torch.load(path)
    check_added(read(path, model, format="layers"), {f"resid_post.{at}": row for at, row in enumerate(rows)})
    assert torch.equal(read(path, model, format="spring").shared_parts["rows"], rows)


def test_svec_directions_are_added_to_what_enters_their_layer() -> None:
    """By the source of activation-steering, which is on no registry: its layer adds, then calls the block."""
    model = shape_of(str(GIVEN / "llama_config.json"))
    said = json.loads((GIVEN / "refusal.svec").read_text())
    vector = read(GIVEN / "refusal.svec", model)
    assert (vector.header.method, vector.header.where) == ("vector", "all")
    check_added(vector, {f"resid_pre.{at}": torch.tensor(row) for at, row in said["directions"].items()})
    assert added(read(GIVEN / "refusal.svec", model, layer=1)).keys() == {"resid_pre.1"}
    assert not vector.header.provenance.get("warnings")
    assert read(GIVEN / "refusal.svec", model.model_copy(update={"architecture": "Qwen2ForCausalLM"})).header.provenance


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"strength": 2}, "also holds strength"),
        ({"directions": {}}, "directions is no object"),
        ({"directions": {"3": [0.5] * 16}}, "directions.3: the model has layers 0 to 2"),
        ({"directions": {"x": [0.5] * 16}}, "directions.x: the model has"),
        ({"directions": {"1": [0.5] * 15}}, r"directions.1 has shape \[15\]"),
        ({"directions": {"1": ["a"] * 16}}, "directions.1 is no list of numbers"),
        ({"directions": {"-1": [0.5] * 16, "2": [0.5] * 16}}, "two directions"),
    ],
)
def test_bad_svecs_are_refused_by_field(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    said = {"model_type": "llama", "directions": {"1": [0.5] * 16}, "explained_variances": {"1": 0.5}}
    (tmp_path / "v.svec").write_text(json.dumps(said | change))
    with pytest.raises(SteeringError, match=reason):
        import_file(tmp_path / "v.svec", SHAPE)


# ---- dicts, stacks and single tensors by hand, as torch, safetensors and numpy write them


def write(path: Path, content: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    elif path.suffix == ".npz":
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in content.items()}
        np.savez(path, **arrays)
    else:
        torch.save(content, path)
    return path


KEYS = ("{}", "layer_{}", "layer.{}", "layers.{}", "model.layers.{}", "transformer.h.{}", "blocks.{}", "vec_layer_{}")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors", ".npz"])
def test_dicts_by_layer(suffix: str, tmp_path: Path) -> None:
    for number, key in enumerate(KEYS):
        path = write(tmp_path / f"v{number}{suffix}", {key.format(at): ROWS[at].reshape(1, -1) for at in (0, 2)})
        assert detect(path) == "layers"
        check_added(read(path, SHAPE), {f"resid_post.{at}": ROWS[at] for at in (0, 2)})


def test_modules_say_their_site(tmp_path: Path) -> None:
    content = {"model.layers.1.mlp": V, "model.layers.0.self_attn": 2 * V, "blocks.2.hook_resid_pre": 3 * V}
    vector = read(saved(tmp_path / "v.pt", content), SHAPE)
    check_added(vector, {"mlp_out.1": V, "attn_out.0": 2 * V, "resid_pre.2": 3 * V})
    check_added(read(saved(tmp_path / "w.pt", {1: V}), SHAPE, site="mlp_in"), {"mlp_in.1": V})
    behind = saved(tmp_path / "x.pt", {"layers.1.post_attention_layernorm": V})
    assert "follows the attention" in str(
        refusal(behind, SHAPE.model_copy(update={"architecture": "Gemma2ForCausalLM"}))
    )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz", ".npy"])
def test_stacks(suffix: str, tmp_path: Path) -> None:
    states = torch.cat([numbers(1, 16), ROWS])  # the embeddings' output first
    for rows, warns in ((ROWS, False), (states, True), (ROWS[:, None], False)):
        path = tmp_path / f"vectors{suffix}"
        if suffix == ".npy":
            np.save(path, rows.numpy())
        elif suffix == ".pt":
            saved(path, rows)
        else:
            write(path, {"vectors": rows})
        vector = read(path, SHAPE, format="layers")
        check_added(vector, {f"resid_post.{at}": ROWS[at] for at in range(3)})
        assert bool(vector.header.provenance.get("warnings")) is warns
    check_added(read(path, SHAPE, format="layers", layer=1), {"resid_post.1": ROWS[1]})
    error = refusal(path, SHAPE.model_copy(update={"num_layers": 7}), format="layers")
    assert "shape [3, 1, 16]" in str(error) and "[7, 16]" in str(error) and "[8, 16]" in str(error)


def test_numbers_up_to_the_number_of_blocks_count_hidden_states(tmp_path: Path) -> None:
    for content in ({1: ROWS[0], 2: ROWS[1], 3: ROWS[2]}, [V, *ROWS]):
        vector = read(saved(tmp_path / "v.pt", content), SHAPE)
        check_added(vector, {f"resid_post.{at}": ROWS[at] for at in range(3)})
        assert "hidden states" in vector.header.provenance["warnings"][0]
    assert "names layer 3" in str(
        refusal(saved(tmp_path / "w.pt", {"model.layers.3": V}))
    )  # a module's name is a block
    check_added(read(saved(tmp_path / "x.pt", {-1: V}), SHAPE), {"resid_post.2": V})


@pytest.mark.parametrize("shape", [(16,), (1, 16), (1, 1, 16), (16, 1)])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz", ".npy"])
def test_single_tensors_need_their_layer(shape: tuple[int, ...], suffix: str, tmp_path: Path) -> None:
    path, tensor = tmp_path / f"happy{suffix}", V.reshape(shape)
    if suffix == ".npy":
        np.save(path, tensor.numpy())
    elif suffix == ".pt":
        saved(path, tensor)
    else:
        write(path, {"vector": tensor})
    assert detect(path) == "easysteer" and refusal(path).param == "layer"
    check_added(read(path, SHAPE, layer=1), {"resid_post.1": V})


def test_caa_folders_give_one_layer_or_all(tmp_path: Path) -> None:
    (root := tmp_path / "sycophancy").mkdir()
    for at in range(3):
        saved(root / f"vec_layer_{at}.pt", ROWS[at])
    check_added(read(root, SHAPE), {f"resid_post.{at}": ROWS[at] for at in range(3)})
    check_added(read(root, SHAPE, layer=1), {"resid_post.1": ROWS[1]})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({0: V, "coefficient": numbers(1)}, "also holds coefficient"),
        ({0: V, "normalize": True}, "also holds normalize"),
        ({0: V, "layer_0": V}, "are for resid_post.0"),
        ({0: V, "0": V}, "one name"),
        ({0: numbers(4, 16)}, r"shape \[4, 16\], wanted \[16\]"),
        ({0: numbers(17)}, r"shape \[17\], wanted \[16\]"),
        ({0: torch.arange(16)}, "dtype"),
        ({"layer_activations": {0: V}, "layer_type": "nose"}, "layer_type 'nose' is none of"),
        ({"layer_activations": {0: V}, "layer_type": "mlp", "scale": 2.0}, "also holds scale"),
        ({"layer_activations": V, "layer_type": "mlp"}, "no dict of vectors"),
        ({"directions": {"a": V}, "model_type": "llama"}, "'a' is no layer"),
    ],
)
def test_what_is_not_accounted_for_is_refused_by_name(content: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match=reason):
        import_file(saved(tmp_path / "v.pt", content), SHAPE)


def test_words_beside_the_vectors_do_no_harm(tmp_path: Path) -> None:
    check_added(read(saved(tmp_path / "v.pt", {1: V, "model": "llama", "concept": "calm"}), SHAPE), {"resid_post.1": V})


# ---- pickles, in a process of their own


@pytest.mark.parametrize("new", [True, False])
def test_torch_files_that_the_safe_loader_refuses_are_opened_offline(new: bool, tmp_path: Path) -> None:
    content = {0: torch.nn.Parameter(V.bfloat16()), 1: ROWS[1], 2: ROWS[2, :].double()}
    wanted = {"resid_post.0": V.bfloat16(), "resid_post.1": ROWS[1], "resid_post.2": ROWS[2]}
    torch.save(content, tmp_path / "v.pt", _use_new_zipfile_serialization=new)
    check_added(read_pickle(tmp_path / "v.pt", SHAPE), wanted)
    arrays = saved(tmp_path / "arrays.pt", {"layer_1": V.numpy(), "model": "llama"})
    assert "numpy's arrays" in str(refusal(arrays)) and "--unsafe-pickle" in str(refusal(arrays))
    check_added(read_pickle(arrays, SHAPE), {"resid_post.1": V})
    check_added(read_pickle(saved(tmp_path / "one.pt", V.numpy()), SHAPE, layer=2), {"resid_post.2": V})
    many = saved(tmp_path / "many.pt", {"steering_vector": V.numpy(), "activations": ROWS.numpy()})
    check_added(read_pickle(many, SHAPE, layer=2), {"resid_post.2": V})  # as xl-vlms


class Held:
    """An object of a class that is not known here."""

    def __init__(self) -> None:
        self.vector = V


def test_what_a_pickle_may_not_hold_is_named(tmp_path: Path) -> None:
    cases = {
        "is a set": {"a": {1, 2}},
        "also holds note": {"layer_1": V, "note": b"xyz"},
        "one name": {0: V, "0": V},
    }
    for reason, content in cases.items():
        with pytest.raises(SteeringError, match=f"{reason}|builtin"):
            import_pickle(saved(tmp_path / "v.pt", content), SHAPE)
    lying = saved(tmp_path / "lying.pt", {0: V})
    with zipfile.ZipFile(lying) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(lying, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[:8] if name.endswith("data/0") else data)
    with pytest.raises(SteeringError, match="has 8 bytes"):
        import_pickle(lying, SHAPE)


@pytest.mark.parametrize("path", [GIVEN / "sv_llama_obj.pt", FILES / "steering_vectors_decoder_block" / "object.pt"])
def test_objects_of_a_library_say_their_class_and_the_lines_that_open_them(path: Path) -> None:
    for reading in (import_file, import_pickle):
        with pytest.raises(SteeringError) as found:
            reading(path, HERE)
        said = str(found.value)
        assert "steering_vectors.steering_vector.SteeringVector" in said and "\x1b" not in said
        lines = said.splitlines()[-3:]
        compile("\n".join(lines), "said", "exec")
        assert path.name in lines[1] and "asdict" in lines[2]


def test_other_objects_say_their_class(tmp_path: Path) -> None:
    assert "repeng.extract.ControlVector" in str(refusal(FILES / "repeng" / "object.pt"))
    assert "export_gguf" in str(refusal(FILES / "repeng" / "object.pt"))
    said = str(refusal(saved(tmp_path / "v.pt", {"a": Held()})))
    assert f"{Held.__module__}.Held" in said and "weights_only" not in said and "\n" not in said
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"a": V}))
    assert "bare pickle" in str(refusal(tmp_path / "w.pt")) and "--unsafe-pickle" in str(refusal(tmp_path / "w.pt"))
    assert "persistent" not in str(refusal(tmp_path / "w.pt"))


# ---- what only stands for a file


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ((GIVEN / "lfs_pointer.gguf").read_bytes(), "a Git LFS pointer, not the file of 173632 bytes"),
        (b"/annex/objects/SHA256E-s64--abc.pt\n", "a git-annex pointer"),
        (b"\n<!DOCTYPE html>\n<html><body>", "a web page"),
        (b'<?xml version="1.0"?><Error>NoSuchKey</Error>', "an answer of the server"),
        (b"Entry not found", "an answer of the server"),
        (b"", "is empty"),
        (b"GGUF" + struct.pack(">IQQ", 3, 1, 0) + bytes(64), "a big-endian GGUF file"),
    ],
)
def test_what_stands_in_place_of_a_file_is_named(data: bytes, reason: str, tmp_path: Path) -> None:
    for name in ("v.gguf", "v.pt", "v.safetensors", "v.npz", "v.npy", "v.svec", "v"):
        (tmp_path / name).write_bytes(data)
        for format in (None, "layers", "repeng"):
            assert reason in str(refusal(tmp_path / name, format=format))
    (folder := tmp_path / "adapter").mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    (folder / "adapter_model.safetensors").write_bytes(data)
    assert reason in str(refusal(folder))
    np.save(tmp_path / "features.npy", np.zeros((4, 3, 16), dtype=np.float32))
    (tmp_path / "labels.npy").write_bytes(data)
    assert reason in str(refusal(tmp_path / "features.npy", labels=tmp_path / "labels.npy"))


def test_numbers_of_the_other_byte_order_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", V.numpy().astype(">f4"))
    check_added(read(tmp_path / "v.npy", SHAPE, layer=1), {"resid_post.1": V})


# ---- formats that are unknown


def test_an_unknown_format_is_told_what_was_found_and_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "sae").mkdir()
    save_file({"encoder.weight": numbers(4, 16)}, tmp_path / "sae" / "sae_weights.safetensors")
    for path, words in (
        (tmp_path / "notes.txt", ["notes.txt"]),
        (tmp_path / "sae", ["sae_weights.safetensors", "saelens"]),
        (saved(tmp_path / "v.pt", {"weights": V, "biases": V}), ["entries weights, biases"]),
        (saved(tmp_path / "w.pt", numbers(2, 3, 4, 5, 6)), ["one tensor [2, 3, 4, 5, 6]"]),
    ):
        error = refusal(path)
        assert error.param == "format" and "no format that is known here" in str(error)
        assert all(word in str(error) for word in [*words, "`whipstaff vectors formats`"]), str(error)
        assert sum(f"{name} (" in str(error) for name in FORMATS) <= 3


def test_a_format_that_there_is_not_gets_the_nearest_names() -> None:
    error = refusal(GIVEN / "dict_int.pt", format="gemma")
    assert error.param == "format" and "gemma_scope" in str(error) and len(str(error)) < 300
    assert "--unsafe-pickle" in str(refusal(GIVEN / "dict_int.pt", format="tarot"))


def test_a_vector_file_is_said_to_be_one(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    path.write_bytes(packed(*import_file(GIVEN / "dict_int.pt", shape_of(str(GIVEN / "llama_config.json")))))
    assert "Whipstaff vector already" in str(refusal(path))


def test_hidden_states_enter_one_block_and_leave_another(tmp_path: Path) -> None:
    """State k is what block k receives and what block k - 1 leaves; it is no output of an MLP."""
    path = saved(tmp_path / "v.pt", [V, *ROWS])
    vector = read(path, SHAPE, site="resid_pre")
    check_added(vector, {"resid_pre.0": V, "resid_pre.1": ROWS[0], "resid_pre.2": ROWS[1]})
    assert "enters block k" in vector.header.provenance["warnings"][0]
    error = refusal(path, SHAPE, site="mlp_out")
    assert error.param == "site" and "mlp_out" in str(error)
    assert "hidden state 9" in str(refusal(saved(tmp_path / "w.pt", {3: V, 9: V}), SHAPE))


def test_libraries_that_count_blocks_do_not_count_hidden_states(tmp_path: Path) -> None:
    """steering-vectors and repeng number blocks, so a number too many is another model's."""
    for wrapped in ({"layer_activations": {1: V, 3: V}, "layer_type": "decoder_block"}, {"directions": {3: V}}):
        assert "names layer 3; the model has layers 0 to 2" in str(refusal(saved(tmp_path / "v.pt", wrapped), SHAPE))


@pytest.mark.parametrize("key", ["Layer {}", "layers_{}", "L{}", "l{}", "LAYER_{}", "block-{}", "blocks_{}"])
def test_other_spellings_of_layers(key: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "v.pt", {key.format(at): ROWS[at] for at in (0, 2)})
    check_added(read(path, SHAPE), {f"resid_post.{at}": ROWS[at] for at in (0, 2)})


def test_hooks_say_their_site(tmp_path: Path) -> None:
    content = {"blocks.1.hook_mlp_out": V, "blocks.0.hook_attn_out": 2 * V}
    path = saved(tmp_path / "v.pt", content)
    check_added(read(path, SHAPE), {"mlp_out.1": V, "attn_out.0": 2 * V})
    gemma = SHAPE.model_copy(update={"architecture": "Gemma2ForCausalLM"})
    assert "after the norm behind it" in str(refusal(path, gemma))
    for heads in (V, V.view(2, 8)):
        check_added(
            read(saved(tmp_path / "z.pt", {"blocks.1.attn.hook_z": heads}), SHAPE), {"attn_head.1": V.view(2, 8)}
        )


def test_a_dict_by_layer_may_stand_among_metadata(tmp_path: Path) -> None:
    by_layer = {at: ROWS[at] for at in range(3)}
    wanted = {f"resid_post.{at}": ROWS[at] for at in range(3)}
    check_added(read(saved(tmp_path / "v.pt", {"vectors": by_layer, "model": "x"}), SHAPE), wanted)
    assert "also holds scale (2.0)" in str(refusal(saved(tmp_path / "w.pt", {"vectors": by_layer, "scale": 2.0})))
    two = saved(tmp_path / "two.pt", {"positive": by_layer, "negative": {1: V}})
    error = refusal(two)
    assert error.param == "key" and "positive, negative" in str(error)
    check_added(read(two, SHAPE, key="negative"), {"resid_post.1": V})
    check_added(read(two, SHAPE, key="positive"), wanted)
    assert "has positive, negative" in str(refusal(two, key="other"))


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
@pytest.mark.parametrize("name", ["vector", "steering_vector", "direction"])
def test_a_vector_beside_its_layer(name: str, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"v{suffix}", {name: V, "layer": torch.tensor(2)})
    check_added(read(path, SHAPE), {"resid_post.2": V})
    check_added(read(path, SHAPE, layer=1), {"resid_post.1": V})
    halves = write(tmp_path / f"h{suffix}", {name: V, "layer": torch.tensor(1.5)})
    assert "the file's layer is 1.5" in str(refusal(halves))


def test_a_stack_is_no_vector_of_xl_vlms(tmp_path: Path) -> None:
    check_added(
        read(saved(tmp_path / "v.pt", {"steering_vectors": ROWS}), SHAPE),
        {f"resid_post.{at}": ROWS[at] for at in range(3)},
    )
    assert "none of them is one vector" in str(
        refusal(saved(tmp_path / "w.pt", {"steering_vector_a": ROWS}), format="xl_vlms")
    )


def test_what_numpy_saves_without_a_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", ROWS.numpy())
    check_added(read(tmp_path / "v.npz", SHAPE), {f"resid_post.{at}": ROWS[at] for at in range(3)})
    np.savez(tmp_path / "one.npz", V.numpy())  # no vector of layer 0
    assert refusal(tmp_path / "one.npz").param == "layer"
    check_added(read(tmp_path / "one.npz", SHAPE, layer=2), {"resid_post.2": V})
    np.savez(tmp_path / "two.npz", ROWS[0].numpy(), ROWS[1].numpy())
    check_added(read(tmp_path / "two.npz", SHAPE), {"resid_post.0": ROWS[0], "resid_post.1": ROWS[1]})


@pytest.mark.parametrize("content", [ROWS.numpy(), {at: row.numpy() for at, row in enumerate(ROWS)}])
@pytest.mark.parametrize("protocol", [2, 5])
def test_pickled_arrays(content: Any, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "v.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    with_format = {} if isinstance(content, dict) else {"format": "layers"}
    check_added(read_pickle(path, SHAPE, **with_format), {f"resid_post.{at}": ROWS[at] for at in range(3)})


def test_files_under_another_ending_are_named(tmp_path: Path) -> None:
    save_file({"1": V}, tmp_path / "v.safetensors")
    np.save(tmp_path / "v.npy", ROWS.numpy())
    saved(tmp_path / "v.pt", ROWS)
    for name, wrong, kind in (
        ("v.safetensors", "w.pt", "a safetensors file"),
        ("v.npy", "w.pth", "an array of numpy's"),
        ("v.pt", "w.safetensors", "a zip archive"),
        ("v.pt", "w.gguf", "a zip archive"),
    ):
        (tmp_path / wrong).write_bytes((tmp_path / name).read_bytes())
        assert f"{wrong} begins as {kind}" in str(refusal(tmp_path / wrong))
    for name in ("v.safetensors", "v.npy"):
        with pytest.raises(SteeringError, match="no pickle; leave --unsafe-pickle out"):
            import_pickle(tmp_path / name, SHAPE)
    with pytest.raises(SteeringError, match="is a folder"):
        import_pickle(tmp_path, SHAPE)


def test_a_field_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v.svec").write_text(f'{{"directions": {{"1": {[0.5] * 16}, "1": {[0.25] * 16}}}}}')
    assert "'1' is there twice" in str(refusal(tmp_path / "v.svec"))


def test_entries_that_may_be_layers_are_told_how_to_be_called(tmp_path: Path) -> None:
    error = refusal(saved(tmp_path / "v.pt", {"vector_of_3": V, "vector_of_4": V}))
    assert "model.layers.3" in str(error) and "function_vector" not in str(error)
