"""Foreign files become the edits that they were; files that lie, break or hold code are refused and leave no trace."""

import json
import os
import pickle
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import goldens
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import ops as reference
from safetensors.torch import load_file, save_file
from soak import tries
from torch import Tensor
from torch.nn.utils.parametrizations import orthogonal as parametrised
from transformers import AutoModelForCausalLM

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers import FORMATS, PICKLES, detect, import_file, import_pickle
from whipstaff.steering.importers.gguf import parse_gguf
from whipstaff.steering.importers.householder import orthogonal
from whipstaff.steering.importers.importer import Draft, Hints, Importer
from whipstaff.steering.importers.source import Source
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import packed, parse, read, write
from whipstaff.steering.where import Where

CASES, FITS = goldens.ROOT / "cases", goldens.ROOT / "fit"
TOLERANCE = 2e-4  # logits, as in test_methods
SHAPE = ModelShape(
    architecture="LlamaForCausalLM", hidden_size=16, num_layers=3, num_heads=2, head_dim=8, num_kv_heads=1
)
GENERATOR = torch.Generator().manual_seed(5)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


# ---- the goldens' wild files


@pytest.fixture(scope="module")
def models() -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    def model(name: str) -> Any:
        if name not in loaded:
            loaded[name] = AutoModelForCausalLM.from_pretrained(
                goldens.ROOT / "models" / name, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        return loaded[name]

    return model


def golden(name: str) -> goldens.Case:
    model = json.loads((CASES / name / "case.json").read_text())["model"]
    return next(case for case in [*goldens.cases(model), *goldens.others(model)] if case.name == name)


def edits_of(path: Path, piece: goldens.Piece) -> Iterator[reference.Edit]:
    """The edits of the golden's request, with the numbers of a file that was imported."""
    vector = read(path)
    method: Any = vector.method
    said = {name: value for name, value in piece.params.items() if name != "renorm"}
    params = method.params.model_validate(vector.header.known_defaults | said)
    method.check_params(params, vector.tensors)
    spans = (vector.header.where and Where.of(vector.header.where)) or piece.where or Where.of(method.where)

    def touches(position: int, prompt_len: int) -> bool:
        return any(a <= position and (b is None or position < b) for a, b in spans.intervals(prompt_len))

    for point, tensors in vector.tensors.items():
        ops = method.ops(tensors, params, point, vector.header.model)
        yield reference.Edit(point.site, point.layer, ops, touches, piece.params.get("renorm", False))


@pytest.mark.parametrize("wild", goldens.WILD, ids=lambda wild: f"{wild.case}-{wild.format}")
def test_wild_files_are_the_goldens_edits(wild: goldens.Wild, models: Callable[[str], Any], tmp_path: Path) -> None:
    case = golden(wild.case)
    (piece,) = case.pieces
    source, shape = wild.path, goldens.shape_of(case.model)
    if wild.format in PICKLES:
        with pytest.raises(SteeringError, match="unsafe-pickle"):
            import_file(source, shape, **wild.hints)
        header, tensors = import_pickle(source, shape, **wild.hints)
    else:
        assert detect(source) == wild.format
        header, tensors = import_file(source, shape, **wild.hints)
    assert header.method == piece.method
    assert header.model.fits(shape) and header.provenance["format"] == wild.format
    assert len(header.provenance["sha256"]) == 64
    assert set(tensors) == set(piece.tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(
            tensor, piece.tensors[name], rtol=0, atol=2e-7 if header.method == "context_knob" else 0
        )
    for name in ("activation", "k", "apply_b_dec_to_input", "normalize_activations"):
        assert header.defaults.get(name) == piece.params.get(name), name
    write(tmp_path / "vector.safetensors", header, tensors)
    if piece.method in ("soft_prompt", "prefix_kv", "side_attention"):
        return  # what the engine serves otherwise; equal numbers are all there is
    prompt = case.io["input_ids"].tolist()
    edits = list(edits_of(tmp_path / "vector.safetensors", piece))
    got = reference.logits(models(case.model), prompt, len(prompt), edits)
    assert (got.double() - case.io["logits_f64"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("wild", goldens.WILD[:12], ids=lambda wild: wild.case)
def test_round_trips_are_exact(wild: goldens.Wild, tmp_path: Path) -> None:
    shape = goldens.shape_of(golden(wild.case).model)
    header, tensors = import_file(wild.path, shape, **wild.hints)
    write(tmp_path / "a.safetensors", header, tensors)
    vector = read(tmp_path / "a.safetensors")
    assert vector.header == header
    stored = load_file(tmp_path / "a.safetensors")
    assert set(stored) == set(tensors) and all(torch.equal(stored[name], tensors[name]) for name in stored)
    again = packed(vector.header, stored)
    assert parse(again).digest == vector.digest


def test_tarot_checkpoints_give_their_best_angles() -> None:
    said = json.loads((FITS / "tarot_checkpoint" / "fit.json").read_text())
    layers, heads, angles = said["shape"]
    shape = SHAPE.model_copy(update={"num_heads": heads, "head_dim": 2 * angles, "num_layers": 8})
    header, tensors = import_pickle(FITS / "tarot_checkpoint" / "checkpoint.pkl", shape, layer=3)
    best = load_file(FITS / "tarot_checkpoint" / "data.safetensors")["best_angles"].float()
    assert header.method == "tarot" and set(tensors) == {f"attn_head.{3 + i}.angles" for i in range(layers)}
    for index, rows in enumerate(best):
        assert torch.equal(tensors[f"attn_head.{3 + index}.angles"], rows)


@pytest.mark.parametrize("name", ["tarot_givens_qwen2", "tarot_rotary_llama", "tarot_scale_llama"])
def test_a_tarot_search_that_found_a_goldens_edit_is_that_edit(
    name: str, models: Callable[[str], Any], tmp_path: Path
) -> None:
    case = golden(name)
    (piece,) = case.pieces
    layers = sorted(int(key.split(".")[1]) for key in piece.tensors)
    assert layers == list(range(layers[0], layers[-1] + 1))
    best = torch.stack([tensor.reshape(-1) for _, tensor in sorted(piece.tensors.items())]).reshape(-1)
    tried = torch.stack([numbers(len(best)), best, numbers(len(best))]).double()
    found = {"train_X": tried, "train_Y": torch.tensor([[0.3], [-2.0], [0.9]]).double()}
    checkpoint = tmp_path / "checkpoint.pkl"
    checkpoint.write_bytes(pickle.dumps(found))
    header, tensors = import_pickle(checkpoint, goldens.shape_of(case.model), layer=layers[0], site="attn_head")
    assert header.method == "tarot" and set(tensors) == set(piece.tensors)
    assert all(torch.equal(tensors[key], value) for key, value in piece.tensors.items())
    write(tmp_path / "vector.safetensors", header, tensors)
    prompt = case.io["input_ids"].tolist()
    edits = list(edits_of(tmp_path / "vector.safetensors", piece))
    got = reference.logits(models(case.model), prompt, len(prompt), edits)
    assert (got.double() - case.io["logits_f64"]).abs().max() < TOLERANCE


# ---- formats of which the goldens have no file: written here as their releases write them


def saved(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def folder(path: Path, **files: Any) -> Path:
    """A folder of JSON and safetensors files; `__` in a name stands for a dot."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        name = name.replace("__", ".")
        if name.endswith(".json"):
            (path / name).write_text(json.dumps(content))
        else:
            save_file({key: tensor.contiguous() for key, tensor in content.items()}, path / name)
    return path


def array(path: Path, values: Any, dtype: Any = np.float32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.asarray(values, dtype=dtype))
    return path


def gguf(*tensors: tuple[str, Tensor], architecture: str = "controlvector", hint: str = "llama") -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    fields = text("general.architecture") + struct.pack("<I", 8) + text(architecture)
    fields += text("controlvector.model_hint") + struct.pack("<I", 8) + text(hint)
    fields += text("general.tags") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    fields += text("general.source.sizes") + struct.pack("<IIQ3H", 9, 2, 3, 1, 2, 3)
    infos, data = b"", b""
    kinds = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
    for name, tensor in tensors:
        data += bytes(-len(data) % 32)
        infos += text(name) + struct.pack(f"<I{tensor.ndim}Q", tensor.ndim, *reversed(tensor.shape))
        infos += struct.pack("<IQ", kinds[tensor.dtype], len(data))
        data += tensor.contiguous().view(torch.uint8).numpy().tobytes()
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 4) + fields + infos
    return head + bytes(-len(head) % 32) + data


HEADS = [[2, 1], [0, 0], [1, 1]]
V = numbers(16)
TASK, ALPHAS = numbers(3, 2, 1, 8), torch.rand(3, 2, generator=GENERATOR)
ROWS = {(layer, head): numbers(8) for layer in range(3) for head in range(2)}
ENCODER, DECODER, B_ENC, B_DEC = numbers(16, 24), numbers(24, 16), numbers(24), numbers(16)
SAE = {"W_enc": ENCODER, "W_dec": DECODER, "b_enc": B_ENC, "b_dec": B_DEC}
SAE_HERE = {"encoder": ENCODER.T, "decoder": DECODER, "encoder_bias": B_ENC, "decoder_bias": B_DEC}
FEATURES, LABELS = numbers(20, 3, 16), [0, 1] * 10
SIGMA = torch.rand(3, 2, generator=GENERATOR) + 0.1


class Made(NamedTuple):
    """A file or folder, what to say of it, and what comes of it."""

    path: Path
    hints: dict[str, Any]
    method: str
    tensors: dict[str, Tensor]


def placed(point: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{point}.{part}": tensor for part, tensor in parts.items()}


def _repeng(root: Path) -> Made:
    path = root / "v.gguf"
    path.write_bytes(gguf(("direction.1", V), ("direction.2", V.half())))
    return Made(path, {}, "control_vector", {"resid_post.1.add": V, "resid_post.2.add": V.half().float()})


def _honest_llama(root: Path) -> Made:
    path = array(root / "llama_head_wise.npy", FEATURES, np.float16)
    labels, heads = array(root / "labels.npy", LABELS, np.int64), array(root / "heads.npy", HEADS, np.int64)
    features = FEATURES.half().double().view(20, 3, 2, 8)
    direction, sigma = torch.zeros(3, 2, 8), torch.zeros(3, 2)
    for layer, head in HEADS:
        rows = features[:, layer, head]
        theta = rows[1::2].mean(0) - rows[::2].mean(0)
        direction[layer, head] = (theta / theta.norm()).float()
        sigma[layer, head] = (rows @ (theta / theta.norm())).std().float()
    wanted = {f"attn_head.{layer}.direction": direction[layer] for layer in range(3)}
    wanted |= {f"attn_head.{layer}.sigma": sigma[layer] for layer in range(3)}
    return Made(path, {"labels": labels, "heads": heads}, "iti", wanted)


def _directions(root: Path) -> Made:
    path = array(root / "com_directions.npy", torch.stack(list(ROWS.values())))  # [layers * heads, head_dim]
    wanted = {f"attn_head.{at}.direction": torch.stack([ROWS[at, 0], ROWS[at, 1]]) for at in range(3)}
    wanted |= {f"attn_head.{at}.sigma": SIGMA[at] for at in range(3)}
    return Made(path, {"sigma": array(root / "sigma.npy", SIGMA)}, "iti", wanted)


def _baked(root: Path) -> Made:
    weights = {f"model.layers.{at}.self_attn.o_proj.bias": V * (at == 1) for at in range(3)}
    path = folder(root / "baked", config__json={"oproj_bias": True}, model__safetensors=weights)
    return Made(path, {}, "vector", {"attn_out.1.add": V})


def _lofit(root: Path) -> Made:
    state = {f"model.layers.{at}.self_attn.attn_v.{head}": row for (at, head), row in ROWS.items()}
    path = saved(root / "pytorch_model.bin", state)
    wanted = {f"attn_head.{at}.v": torch.zeros(2, 8) for at, _ in HEADS[:2]}
    for at, head in HEADS[:2]:
        wanted[f"attn_head.{at}.v"][head] = ROWS[at, head]
    return Made(path, {"heads": array(root / "top.npy", HEADS, np.int64), "num_heads": 2}, "lofit", wanted)


def _site(root: Path) -> Made:
    saved(root / "site" / "antonym.pt", TASK)
    saved(root / "site" / "alphas.pt", ALPHAS)
    wanted = {f"attn_head.{at}.task": TASK[at, :, 0] for at in range(3)}
    return Made(root / "site", {}, "site", wanted | {f"attn_head.{at}.alpha": ALPHAS[at] for at in range(3)})


def _function_vector(root: Path) -> Made:
    path = saved(root / "antonym_function_vector.pt", V[None])
    return Made(path, {"layer": 2}, "function_vector", {"resid_post.2.add": V})


def _caa(root: Path) -> Made:
    for layer in (0, 2):
        saved(root / "caa" / f"vec_layer_{layer}_Llama-2-7b.pt", (layer + 1) * V)
    return Made(root / "caa", {}, "caa", {"resid_post.0.add": V, "resid_post.2.add": 3 * V})


def _easysteer(root: Path) -> Made:
    return Made(
        saved(root / "happy.pt", V.bfloat16()),
        {"layer": 1},
        "control_vector",
        {"resid_post.1.add": V.bfloat16().float()},
    )


def _layers(root: Path) -> Made:
    content = {f"layer_{layer}": (layer + 1) * V for layer in range(3)}
    path = saved(root / "calm.pt", content)
    return Made(path, {}, "control_vector", {f"resid_post.{layer}.add": (layer + 1) * V for layer in range(3)})


def _svec(root: Path) -> Made:
    said = {"model_type": "llama", "directions": {"1": V.tolist()}, "explained_variances": {"1": 0.5}}
    (root / "refusal.svec").write_text(json.dumps(said))
    return Made(root / "refusal.svec", {}, "vector", {"resid_pre.1.add": V})


def _transformer_lens(root: Path) -> Made:
    rows = numbers(1, 4, 16)
    path = saved(root / "cache.pt", {"blocks.1.hook_resid_post": rows, "blocks.1.hook_mlp_out": numbers(1, 4, 16)})
    return Made(path, {}, "actadd", {"resid_pre.2.rows": rows[0]})


def _xl_vlms(root: Path) -> Made:
    content = {"steering_vector": numbers(2, 2, 16), "steering_vector_concept_0_to_1": V, "concepts1": numbers(2, 16)}
    path = saved(root / "shift.pth", content)
    return Made(path, {"layer": 1, "key": "steering_vector_concept_0_to_1"}, "shift_vector", {"resid_post.1.add": V})


def _refusal(root: Path) -> Made:
    path = folder(root / "refusal", direction_metadata__json={"pos": -2, "layer": 1})
    saved(path / "direction.pt", V.double())
    return Made(path, {"method": "add_direction"}, "add_direction", {"resid_pre.1.direction": V})


def _knob(root: Path) -> Made:
    linear = parametrised(torch.nn.Linear(3, 16, bias=False), orthogonal_map="householder")
    trained(linear)
    content = {name: tensor.detach() for name, tensor in linear.state_dict().items()}
    config = {"embed_dim": 16, "rank": 3, "orthogonalize": True}
    path = folder(root / "knob", config__json=config, model__safetensors=content)
    return Made(path, {"layer": 1}, "context_knob", {"resid_post.1.basis": weight_of(linear).T})


def _pyvene(root: Path) -> Made:
    weight, bias, rotate = numbers(2, 16), numbers(2), torch.linalg.qr(numbers(16, 2))[0]
    key = "layer.1.comp.block_output.unit.pos.nunit.1#0"
    config = {"sorted_keys": [key], "intervention_types": ["<class 'pyreft.interventions.DireftIntervention'>"]}
    path = folder(root / "reft", config__json=config)
    saved(path / f"intkey_{key}.bin", {"weight": weight, "bias": bias, "rotate_layer": rotate})
    return Made(path, {}, "direft", placed("resid_post.1", {"weight": weight, "bias": bias, "rotate": rotate.T}))


def _saelens(root: Path) -> Made:
    old = {"hook_point": "blocks.1.hook_resid_pre", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}
    path = folder(root / "sae", cfg__json=old | {"normalize_activations": False}, sae_weights__safetensors=SAE)
    return Made(path, {}, "sae", placed("resid_pre.1", SAE_HERE))


def _gemma_scope(root: Path) -> Made:
    path = root / "gemma-scope-2b-pt-res" / "layer_2" / "width_16k" / "average_l0_71" / "params.npz"
    path.parent.mkdir(parents=True)
    threshold = torch.rand(24, generator=GENERATOR)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in (SAE | {"threshold": threshold}).items()}
    np.savez(path, **arrays)
    return Made(path, {}, "sae", placed("resid_post.2", SAE_HERE | {"threshold": threshold}))


def _gemma_scope_2(root: Path) -> Made:
    config = {"hf_hook_point_in": "model.layers.1.output", "type": "sae", "width": 24, "architecture": "jump_relu"}
    threshold = torch.rand(24, generator=GENERATOR)
    weights = {name.lower(): tensor for name, tensor in (SAE | {"threshold": threshold}).items()}
    path = folder(root / "layer_1_width_16k_l0_small", config__json=config, params__safetensors=weights)
    return Made(path, {}, "sae", placed("resid_post.1", SAE_HERE | {"threshold": threshold}))


def _llama_scope(root: Path) -> Made:
    hook, rows = "blocks.1.hook_resid_post", DECODER / DECODER.norm(dim=1, keepdim=True)
    config = {"act_fn": "jumprelu", "jump_relu_threshold": 0.5, "norm_activation": "dataset-wise", "d_sae": 24}
    config |= {
        "dataset_average_activation_norm": {"in": 8.0, "out": 8.0},
        "hook_point_in": hook,
        "hook_point_out": hook,
    }
    path = folder(root / "L1R", hyperparams__json=config)
    weights = {"encoder.weight": ENCODER.T, "encoder.bias": B_ENC, "decoder.weight": rows.T, "decoder.bias": B_DEC}
    folder(path / "checkpoints", final__safetensors=weights)
    wanted = SAE_HERE | {"decoder": rows, "threshold": torch.full((24,), 0.25), "input_scale": torch.tensor(0.5)}
    return Made(path, {}, "sae", placed("resid_post.1", wanted))


def _dictionary_learning(root: Path) -> Made:
    trainer = {"dict_class": "AutoEncoderNew", "layer": 1, "activation_dim": 16, "dict_size": 24, "lr": 1e-3}
    path = folder(root / "ae", config__json={"trainer": trainer, "buffer": {"ctx_len": 128, "io": "out"}})
    weights = {"encoder.weight": ENCODER.T, "encoder.bias": B_ENC, "decoder.weight": DECODER.T, "decoder.bias": B_DEC}
    saved(path / "ae.pt", weights)
    return Made(path, {}, "sae", placed("resid_post.1", SAE_HERE))


def _goodfire(root: Path) -> Made:
    weights = {"encoder_linear.weight": ENCODER.T, "encoder_linear.bias": B_ENC}
    weights |= {"decoder_linear.weight": DECODER.T, "decoder_linear.bias": B_DEC}
    return Made(saved(root / "Llama-SAE-l2.pth", weights), {}, "sae", placed("resid_post.2", SAE_HERE))


def _sparsify(root: Path) -> Made:
    weights = {"encoder.weight": ENCODER.T, "encoder.bias": B_ENC, "W_dec": DECODER, "b_dec": B_DEC}
    weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
    config = {"k": 4, "d_in": 16, "expansion_factor": 2, "normalize_decoder": True}
    path = folder(root / "layers.1", cfg__json=config, sae__safetensors=weights)
    wanted = placed("resid_post.1", {name: tensor.bfloat16().float() for name, tensor in SAE_HERE.items()})
    return Made(path, {}, "sae", wanted)


def _peft(root: Path) -> Made:
    states = numbers(4, 3 * 2 * 8)
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "num_transformer_submodules": 1}
    path = folder(
        root / "prefix", adapter_config__json=config, adapter_model__safetensors={"prompt_embeddings": states}
    )
    view = states.view(4, 6, 1, 8)
    wanted = {f"attn_head.{at}.key": view[:, 2 * at] for at in range(3)}
    return Made(path, {}, "prefix_kv", wanted | {f"attn_head.{at}.value": view[:, 2 * at + 1] for at in range(3)})


def _spring(root: Path) -> Made:
    rows = numbers(5, 16)
    return Made(saved(root / "added_token_embeddings.pt", rows), {}, "soft_prompt", {"rows": rows})


def _dro(root: Path) -> Made:
    rows = numbers(5, 16)
    folder(root, dro__safetensors={"soft_prompt": rows})
    return Made(root / "dro.safetensors", {}, "soft_prompt", {"rows": rows})


def weight_of(module: torch.nn.Module) -> Tensor:
    """A parametrised one, which is computed."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def trained(module: torch.nn.Module) -> None:
    """Away from where it began, as training moves it: below the diagonal only."""
    with torch.no_grad():
        original = module.get_parameter("parametrizations.weight.original")
        original.add_(torch.randn(original.shape, generator=GENERATOR).tril(-1))


MAKERS: dict[str, list[Callable[[Path], Made]]] = {
    "repeng": [_repeng],
    "honest_llama": [_honest_llama, _directions],
    "honest_llama_baked": [_baked],
    "lofit": [_lofit],
    "site": [_site],
    "function_vector": [_function_vector],
    "caa": [_caa],
    "easysteer": [_easysteer],
    "layers": [_layers],
    "svec": [_svec],
    "transformer_lens": [_transformer_lens],
    "xl_vlms": [_xl_vlms],
    "refusal": [_refusal],
    "context_knob": [_knob],
    "pyvene": [_pyvene],
    "saelens": [_saelens],
    "gemma_scope": [_gemma_scope],
    "gemma_scope_2": [_gemma_scope_2],
    "llama_scope": [_llama_scope],
    "dictionary_learning": [_dictionary_learning],
    "goodfire": [_goodfire],
    "sparsify": [_sparsify],
    "peft": [_peft],
    "spring": [_spring],
    "dro": [_dro],
}
ALL = [(name, maker) for name, makers in MAKERS.items() for maker in makers]
IDS = [maker.__name__.lstrip("_") for _, maker in ALL]


def test_every_format_has_an_example() -> None:
    assert set(MAKERS) == set(FORMATS)


@pytest.mark.parametrize(("name", "maker"), ALL, ids=IDS)
def test_formats_give_their_numbers(name: str, maker: Callable[[Path], Made], tmp_path: Path) -> None:
    made = maker(tmp_path)
    assert detect(made.path) == name
    header, tensors = import_file(made.path, SHAPE, **made.hints)
    assert header.method == made.method and header.model == SHAPE
    assert set(tensors) == set(made.tensors)
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, made.tensors[key].contiguous(), rtol=1e-6, atol=1e-6)
    write(tmp_path / "out.safetensors", header, tensors)
    assert read(tmp_path / "out.safetensors").header == header


@pytest.mark.parametrize(("name", "maker"), ALL, ids=IDS)
def test_a_file_of_another_model_is_refused(name: str, maker: Callable[[Path], Made], tmp_path: Path) -> None:
    made = maker(tmp_path)
    other = SHAPE.model_copy(update={"hidden_size": 24, "head_dim": 12})
    with pytest.raises(SteeringError, match=r"shape|columns|wanted"):
        import_file(made.path, other, **made.hints)


# ---- what releases do besides


@pytest.mark.parametrize("base", [True, False])
def test_the_parametrisation_is_torchs_own(base: bool) -> None:
    for width, rank in ((16, 1), (16, 4), (7, 7)):
        module = parametrised(
            torch.nn.Linear(rank, width, bias=False), orthogonal_map="householder", use_trivialization=base
        )
        trained(module)
        state = module.state_dict()
        got = orthogonal(state["parametrizations.weight.original"], state.get("parametrizations.weight.0.base"))
        torch.testing.assert_close(got, weight_of(module).T, rtol=0, atol=2e-6)
        torch.testing.assert_close(got @ got.T, torch.eye(rank), rtol=0, atol=2e-6)


REFTS = {
    "NoreftIntervention": ("noreft", {"learned_source", "proj_layer"}),
    "NodireftIntervention": ("nodireft", {"learned_source", "proj_layer"}),
    "ConsreftIntervention": ("consreft", {"rotate"}),
    "LobireftIntervention": ("lobireft", {"rotate"}),
    "LowRankRotatedSpaceIntervention": ("context_knob", {"rotate"}),
    "AdditionIntervention": ("vector", set()),
}


@pytest.mark.parametrize("kind", REFTS)
def test_pyvenes_other_interventions(kind: str, tmp_path: Path) -> None:
    method, modules = REFTS[kind]
    state, wanted = {}, {}
    if "rotate" in modules:
        rotate = parametrised(torch.nn.Linear(2, 16, bias=False), orthogonal_map="householder")
        trained(rotate)
        state = {f"rotate_layer.{name}": tensor for name, tensor in rotate.state_dict().items()}
        part = "basis" if method == "context_knob" else "rotate"
        wanted[part] = weight_of(rotate).T
    if method in ("consreft", "lobireft"):
        wanted["bias"] = state["learned_source"] = numbers(2)
    for module, (weight, bias) in {
        "learned_source": ("weight", "bias"),
        "proj_layer": ("project", "project_bias"),
    }.items():
        if module in modules:
            wanted[weight] = state[f"{module}.weight"] = numbers(2, 16)
            state[f"{module}.bias"] = numbers(2)
            if (method, bias) != ("nodireft", "project_bias"):
                wanted[bias] = state[f"{module}.bias"]
    if method == "vector":
        wanted["add"] = state["source_representation"] = numbers(16)
    key = "comp_model_layers[2]_output_unit_pos_nunit_1#0"
    config = {"sorted_keys": [key], "intervention_types": [f"<class 'pyvene.models.interventions.{kind}'>"]}
    path = folder(tmp_path / "pv", config__json=config)
    saved(path / f"intkey_{key}.bin", state)
    header, tensors = import_file(path, SHAPE)
    assert header.method == method and set(tensors) == {f"resid_post.2.{part}" for part in wanted}
    for part, tensor in wanted.items():
        torch.testing.assert_close(tensors[f"resid_post.2.{part}"], tensor.contiguous(), rtol=0, atol=2e-6)


def test_reft_without_sharing_is_imported_by_part(tmp_path: Path) -> None:
    keys = [f"layer.1.comp.block_output.unit.pos.nunit.1#{part}" for part in range(2)]
    config = {"sorted_keys": keys, "intervention_types": ["<class 'p.LoreftIntervention'>"] * 2}
    path = folder(tmp_path / "reft", config__json=config)
    for part, key in enumerate(keys):
        state = {"weight": torch.full((2, 16), part + 1.0), "bias": numbers(2), "rotate_layer": numbers(16, 2)}
        saved(path / f"intkey_{key}.bin", state)
    with pytest.raises(SteeringError, match="part") as found:
        import_file(path, SHAPE)
    assert found.value.param == "part"
    header, tensors = import_file(path, SHAPE, part=1, positions="l3")
    assert tensors["resid_post.1.weight"][0, 0] == 2 and header.where == Where(prompt=[(-3, None)])


def test_iti_directions_are_the_releases() -> None:
    """From the golden's features and the rows that its fold uses: unit mass-mean directions, deviations with ddof 1."""
    found = load_file(FITS / "iti" / "data.safetensors")
    _, layers, heads, dim = found["activations"].shape
    shape = SHAPE.model_copy(update={"num_layers": layers, "num_heads": heads, "head_dim": dim})
    questions = set(found["fold0_train"].tolist()) | set(found["fold0_val"].tolist())
    of_row = np.repeat(np.arange(len(found["question_lengths"])), found["question_lengths"])
    rows = torch.tensor([question in questions for question in of_row])
    with goldens_folder() as root:
        path = array(root / "head_wise.npy", found["activations"][rows].flatten(2))
        hints: dict[str, Any] = {
            "labels": array(root / "labels.npy", found["labels"][rows], np.int64),
            "tuning": array(root / "tuning.npy", found["tuning_activations"].flatten(2)),
            "heads": array(root / "heads.npy", found["fold0_top_heads"], np.int64),
        }
        _, tensors = import_file(path, shape, **hints)
    for layer, head in found["fold0_top_heads"].tolist():
        direction, sigma = (tensors[f"attn_head.{layer}.{part}"][head] for part in ("direction", "sigma"))
        torch.testing.assert_close(direction, found["fold0_com_unit"][layer, head].float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sigma, found["fold0_com_sigma_ddof1"][layer, head].float(), rtol=1e-4, atol=1e-5)


@contextmanager
def goldens_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as root:
        yield Path(root)


def test_function_vectors_go_through_the_models_projections(tmp_path: Path) -> None:
    found = load_file(FITS / "function_vector" / "data.safetensors")
    path = saved(tmp_path / "antonym_mean_head_activations.pt", found["mean_activations"])
    effects = saved(tmp_path / "antonym_indirect_effect.pt", found["indirect_effect"])
    shape, weights = goldens.shape_of("llama_a"), goldens.ROOT / "models" / "llama_a"
    _, tensors = import_file(path, shape, effects=effects, weights=weights, layer=2)
    torch.testing.assert_close(
        tensors["resid_post.2.add"], found["function_vector"].float().flatten(), rtol=1e-4, atol=1e-5
    )
    header, tensors = import_file(path, shape, effects=effects)
    assert {name.split(".")[0] for name in tensors} == {"attn_head"} and header.provenance["warnings"]


def test_lofit_heads_come_best_first(tmp_path: Path) -> None:
    found = load_file(FITS / "lofit_heads" / "data.safetensors")
    layers, heads, dim = found["A"].shape
    shape = SHAPE.model_copy(update={"num_layers": layers, "num_heads": heads, "head_dim": dim})
    nested = {f"layer_{at}": {f"head_{h}": found["A"][at, h].clone() for h in range(heads)} for at in range(layers)}
    path = saved(tmp_path / "offsets.pt", nested)
    _, tensors = import_file(path, shape, heads=FITS / "lofit_heads" / "top_heads.npy", num_heads=3)
    kept = {(int(n.split(".")[1]), h) for n, t in tensors.items() for h in t.norm(dim=1).nonzero().flatten().tolist()}
    assert kept == {tuple(row) for row in found["top_heads"][:3].long().tolist()}


def test_baked_biases_in_the_wrong_space_are_refused(tmp_path: Path) -> None:
    weights = {"model.layers.1.self_attn.o_proj.bias": V}
    path = folder(tmp_path / "baked", config__json={"attention_bias": True}, model__safetensors=weights)
    with pytest.raises(SteeringError, match="August 2024"):
        import_file(path, SHAPE)
    header, tensors = import_file(path, SHAPE, projected=True)
    assert header.where == "all" and torch.equal(tensors["attn_out.1.add"], V)


def test_sae_settings_of_both_generations(tmp_path: Path) -> None:
    v6 = {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True}
    path = folder(
        tmp_path / "v6",
        cfg__json=v6 | {"metadata": {"hook_name": "blocks.2.attn.hook_z"}},
        sae_weights__safetensors=SAE,
    )
    header, tensors = import_file(path, SHAPE)
    norms = DECODER.norm(dim=1)
    torch.testing.assert_close(tensors["attn_head.2.encoder"].flatten(1), (ENCODER * norms).T.contiguous())
    torch.testing.assert_close(tensors["attn_head.2.decoder"].flatten(1), DECODER / norms[:, None])
    assert header.defaults["k"] == 3 and header.defaults["apply_b_dec_to_input"] is True
    old = {"hook_name": "blocks.0.hook_mlp_out", "activation_fn_str": "relu", "normalize_activations": True}
    path = folder(tmp_path / "old", cfg__json=old, sae_weights__safetensors=SAE)
    with pytest.raises(SteeringError) as found:
        import_file(path, SHAPE)
    assert found.value.param == "input_scale"
    _, tensors = import_file(path, SHAPE, input_scale=0.5)
    assert tensors["mlp_out.0.input_scale"] == 0.5
    with pytest.raises(SteeringError, match="norm behind"):
        import_file(path, SHAPE.model_copy(update={"architecture": "Gemma2ForCausalLM"}), input_scale=0.5)
    for bad in ({"architecture": "gated"}, {"activation_fn_str": "tanh-relu"}, {"normalize_activations": ["x"]}):
        path = folder(tmp_path / "bad", cfg__json=old | bad, sae_weights__safetensors=SAE)
        with pytest.raises(SteeringError):
            import_file(path, SHAPE)


def test_hints_say_what_is_missing_and_what_is_not_used(tmp_path: Path) -> None:
    easy = _easysteer(tmp_path).path
    for hints, field in (
        ({}, "layer"),
        ({"layer": 3}, "layer"),
        ({"layer": "x"}, "layer"),
        ({"layer": 1, "method": "iti"}, "method"),
        ({"layer": 1, "alphas": tmp_path}, "alphas"),
        ({"layer": 1, "colour": 1}, "colour"),
        ({"layer": 1, "format": "gguf"}, "format"),
        ({"layer": 1, "format": "angular"}, "format"),
    ):
        with pytest.raises(SteeringError) as found:
            import_file(easy, SHAPE, **hints)
        assert found.value.param == field, hints
    header, _ = import_file(easy, SHAPE, layer=1, scale=3.0, where="last_prompt", licence="MIT", description="calm")
    assert (header.scale, header.where, header.licence, header.description) == (3.0, "last_prompt", "MIT", "calm")


# ---- hostile files


class Bad(NamedTuple):
    """A file or folder that must be refused, and what the reason says."""

    path: Path
    reason: str
    hints: dict[str, Any] = {}  # noqa: RUF012


class Runs:
    """Code in a pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pickle-ran",)


def rewritten(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """An archive with changed members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))
    return path


def npy(shape: str, descr: str = "'<f4'", data: bytes = b"\0" * 64) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def bad_files(root: Path) -> Iterator[Bad]:
    def raw(name: str, data: bytes) -> Path:
        (root / name).write_bytes(data)
        return root / name

    layer = {"layer": 1}
    yield Bad(root / "nowhere", "no such file")
    yield Bad(raw("empty.pt", b""), "is empty")
    yield Bad(raw("pickle.pt", pickle.dumps(Runs())), "no torch file", layer)
    yield Bad(saved(root / "code.pt", {"steering_vector": Runs()}), "safe loader", layer)
    torch.save(V, root / "old.pt", _use_new_zipfile_serialization=False)
    yield Bad(root / "old.pt", "zip format", layer)
    grown = saved(root / "grown.pt", numbers(1, 16))  # 16 numbers that say they are 4000 * 16
    yield Bad(
        rewritten(grown, lambda name, data: data.replace(b"K\x01K\x10\x86", b"M\xa0\x0fK\x10\x86")),
        "safe loader",
        layer,
    )
    yield Bad(
        rewritten(saved(root / "deflated.pt", V), lambda _, data: data, zipfile.ZIP_DEFLATED), "compressed", layer
    )
    yield Bad(saved(root / "spread.pt", torch.zeros(1, 1).expand(1 << 20, 1 << 20)), "shape", {"format": "spring"})
    yield Bad(saved(root / "wide.pt", torch.zeros(1, 1).expand(1 << 26, 16)), "contiguous", {"format": "spring"})
    yield Bad(saved(root / "integers.pt", torch.arange(16)), "dtype", layer)
    yield Bad(saved(root / "sparse.pt", torch.eye(16)[0].to_sparse()), "plain|safe loader|shape", layer)
    yield Bad(saved(root / "nan.pt", V * torch.nan), "finite", layer)
    yield Bad(saved(root / "huge.pt", V.double() * 1e300), "finite", layer)
    yield Bad(saved(root / "meta.pt", torch.empty(16, device="meta")), "plain|safe loader", layer)
    yield Bad(raw("cut.gguf", gguf(("direction.1", V))[:-8]), "does not fit")
    yield Bad(raw("short.gguf", gguf(("direction.1", V))[:40]), "too early|says it has")
    yield Bad(raw("counts.gguf", b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60)), "at most")
    yield Bad(raw("string.gguf", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62)), "at most")
    yield Bad(raw("version.gguf", b"GGUF" + struct.pack("<IQQ", 1, 0, 0)), "version")
    yield Bad(raw("other.gguf", gguf(("direction.1", V), architecture="llama")), "architecture")
    yield Bad(raw("twice.gguf", gguf(("direction.1", V), ("direction.1", V))), "one name")
    yield Bad(raw("none.gguf", gguf()), "no tensors")
    yield Bad(raw("far.gguf", gguf(("direction.7", V))), "layers 0 to 2")
    yield Bad(raw("object.npy", npy("()", "'|O'", pickle.dumps(Runs()))), "unsafe-pickle")
    named = {"sigma": root / "object.npy", "format": "honest_llama"}
    yield Bad(raw("huge.npy", npy("(1099511627776, 3, 16)")), "bytes")
    yield Bad(raw("negative.npy", npy("(-4, 3, 16)")), "shape|sound")
    yield Bad(raw("void.npy", npy("(2,)", "[('a', '<f4')]", b"\0" * 8)), "dtype")
    yield Bad(raw("literal.npy", npy("(" * 60)), "sound")
    yield Bad(array(root / "directions.npy", numbers(6, 8)), "pickle", named)
    archive = root / "bomb.npz"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("W_enc.npy", npy("(16, 16)", data=bytes(16 << 20)))
    stream = layer | {"site": "resid_post"}
    yield Bad(archive, "bytes", stream)
    with zipfile.ZipFile(root / "object.npz", "w") as file:
        file.writestr("W_enc.npy", npy("()", "'|O'", pickle.dumps(Runs())))
    yield Bad(root / "object.npz", "pickle", stream)
    yield Bad(raw("no.npz", b"PK\3\4 nothing"), "npz", stream)
    yield Bad(raw("lies.safetensors", struct.pack("<Q", 1 << 40) + b"{}"), "sound safetensors")
    header = json.dumps({"soft_prompt": {"dtype": "F32", "shape": [4, 16], "data_offsets": [0, 1 << 40]}}).encode()
    yield Bad(raw("offsets.safetensors", struct.pack("<Q", len(header)) + header), "sound safetensors")
    for name, text in (("deep", "[" * 100_000), ("list", "[1]"), ("text", "{")):
        path = folder(root / name, model__safetensors={"weight": V})
        (path / "config.json").write_text(text)
        yield Bad(path, "JSON")
    lora = {"adapter_config__json": {"peft_type": "LORA"}, "adapter_model__safetensors": {"lora_A": V}}
    yield Bad(folder(root / "lora", **lora), "LoRA")
    kind = ["<class 'LoreftIntervention'>"]
    for name, key in (
        ("up", "../../secret"),
        ("away", "layer.1.comp.block_output.unit./../../x#0"),
        ("abs", "/etc/passwd"),
    ):
        config = {"sorted_keys": [key], "intervention_types": kind}
        yield Bad(folder(root / name, config__json=config), "has no file|names no layer")
    config = {"sorted_keys": ["layer.1.comp.block_output.unit.pos.nunit.1#0"], "intervention_types": ["<class 'X'>"]}
    yield Bad(folder(root / "unknown", config__json=config), "not known")
    zeros = {"parametrizations.weight.original": torch.zeros(16, 1), "parametrizations.weight.0.base": torch.eye(16)}
    yield Bad(folder(root / "zero", config__json={"embed_dim": 16}, model__safetensors=zeros), "length 0", layer)
    os.mkfifo(root / "pipe.pt")
    yield Bad(root / "pipe.pt", "neither a file nor a folder")
    yield Bad(raw("notes.txt", b"hello"), "no format")


def test_hostile_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (root := tmp_path / "files").mkdir()
    for bad in bad_files(root):
        before = listing(tmp_path)
        with pytest.raises(SteeringError, match=bad.reason):
            import_file(bad.path, SHAPE, **bad.hints)
            pytest.fail(f"{bad.path.name} was accepted")
        assert listing(tmp_path) == before, bad.path.name


@pytest.mark.usefixtures("cold_pickles")
def test_code_in_a_pickle_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_pickle(tmp_path / "code.npy", npy("()", "'|O'", pickle.dumps({"a": Runs()})), "asks to run .*system")


def test_pickles_know_arrays_only(tmp_path: Path) -> None:
    cut = (CASES / "angular_70_llama" / "steering_config.npy").read_bytes()[:900]
    check_pickle(tmp_path / "cut.npy", cut, "refused")
    check_pickle(tmp_path / "other.pkl", pickle.dumps({"a": 1}), "no format")


def check_pickle(path: Path, data: bytes, reason: str) -> None:
    """That it is refused, and nothing else is there then."""
    path.write_bytes(data)
    before = listing(path.parent)
    with pytest.raises(SteeringError, match=reason):
        import_pickle(path, SHAPE)
    assert listing(path.parent) == before


def listing(root: Path) -> set[tuple[str, int]]:
    return {(str(path), path.stat().st_size) for path in root.rglob("*")}


# ---- any bytes at all

MUTATIONS = st.lists(
    st.tuples(st.sampled_from(["cut", "flip", "put", "drop", "grow"]), st.floats(0, 1), st.binary(max_size=16)),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, with_ in changes:
        at = int(where * len(data))
        if kind == "cut":
            data = data[:at]
        elif kind == "flip":
            data = data[:at] + bytes(byte ^ 0xFF for byte in data[at : at + 1]) + data[at + 1 :]
        elif kind == "put":
            data = data[:at] + with_ + data[at + len(with_) :]
        elif kind == "drop":
            data = data[:at] + data[at + 8 :]
        else:
            data = data[:at] + with_ + data[at:]
    return data


@pytest.mark.parametrize(("name", "maker"), ALL, ids=IDS)
def test_mutated_files_are_read_or_refused(name: str, maker: Callable[[Path], Made], tmp_path: Path) -> None:
    """Nothing but SteeringError comes out, what is accepted can be written, and the disk stays as it was."""
    made = maker(tmp_path)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    whole = {path: path.read_bytes() for path in files}

    @settings(max_examples=tries(120), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(range(len(files))), MUTATIONS, st.booleans())
    def check(index: int, changes: list[tuple[str, float, bytes]], is_told: bool) -> None:
        path = files[index]
        try:
            path.write_bytes(mutated(whole[path], changes))
            before = listing(tmp_path)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    header, tensors = import_file(made.path, SHAPE, format=name if is_told else None, **made.hints)
                parse(packed(header, tensors))
            except SteeringError as error:
                assert str(error)
            assert listing(tmp_path) == before
        finally:
            path.write_bytes(whole[path])

    check()


@settings(max_examples=tries(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.binary(max_size=200),
    st.sampled_from([".gguf", ".pt", ".pth", ".npy", ".npz", ".safetensors", ".bin", ""]),
    st.sampled_from([None, *FORMATS]),
    st.sampled_from([b"", b"GGUF\3\0\0\0", b"\x93NUMPY\1\0", b"PK\3\4", b"\x20\0\0\0\0\0\0\0{"]),
)
def test_random_bytes_are_refused(data: bytes, suffix: str, format: str | None, start: bytes) -> None:
    with goldens_folder() as root, pytest.raises(SteeringError):
        path = root / f"file{suffix}"
        path.write_bytes(start + data)
        import_file(path, SHAPE, format=format)


@settings(max_examples=tries(150), deadline=None)
@given(MUTATIONS)
def test_gguf_never_reads_past_its_end(changes: list[tuple[str, float, bytes]]) -> None:
    try:
        found = parse_gguf(mutated(gguf(("direction.1", V), ("direction.2", V.half())), changes))
    except SteeringError:
        return
    assert all(tensor.numel() <= 4096 for tensor in found.tensors.values())


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
CONFIGS = {  # the keys that are read
    "saelens": ("cfg.json", ["architecture", "k", "activation_fn", "activation_fn_kwargs", "normalize_activations"]),
    "sparsify": ("cfg.json", ["k", "activation", "multi_topk", "transcode"]),
    "pyvene": ("config.json", ["sorted_keys", "intervention_types"]),
    "peft": ("adapter_config.json", ["peft_type", "num_transformer_submodules"]),
    "context_knob": ("config.json", ["embed_dim", "rank"]),
    "honest_llama_baked": ("config.json", ["oproj_bias", "attention_bias"]),
    "refusal": ("direction_metadata.json", ["layer", "pos"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_may_say_anything(name: str, tmp_path: Path) -> None:
    made = MAKERS[name][0](tmp_path)
    file, keys = CONFIGS[name]
    path = made.path / file
    whole = json.loads(path.read_text())
    said = st.dictionaries(st.sampled_from([*keys, "metadata", "hook_point", "apply_b_dec_to_input"]), JUNK, max_size=3)

    @settings(max_examples=tries(120), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(said)
    def check(changed: dict[str, Any]) -> None:
        path.write_text(json.dumps(whole | changed))
        try:
            header, tensors = import_file(made.path, SHAPE, **made.hints)
        except SteeringError:
            return
        parse(packed(header, tensors))

    check()


# ---- shapes with several meanings


def test_a_tarot_point_of_heads_or_of_mlp_outputs_is_a_question(tmp_path: Path) -> None:
    """Half of every head's width times the heads is half of the model's: the file alone cannot say which."""
    best = numbers(2 * 8)  # rotary angles of 2 layers, of 2 heads of 8 or of rows of 16
    path = tmp_path / "checkpoint.pkl"
    path.write_bytes(pickle.dumps({"train_X": torch.stack([best, -best]), "train_Y": torch.tensor([[-1.0], [0.0]])}))
    with pytest.raises(SteeringError, match=r"site attn_head.*; or site mlp_out") as found:
        import_pickle(path, SHAPE)
    assert found.value.param == "site"
    _, tensors = import_pickle(path, SHAPE, site="attn_head", layer=1)
    assert torch.equal(tensors["attn_head.1.angles"], best[:8].view(2, 4)) and "attn_head.2.angles" in tensors
    header, tensors = import_pickle(path, SHAPE, site="mlp_out")
    assert set(tensors) == {"mlp_out.0.angles", "mlp_out.1.angles"} and "layer" in header.provenance["warnings"][0]
    header, tensors = import_pickle(path, SHAPE, site="mlp_out", layer=1)
    assert "warnings" not in header.provenance
    assert torch.equal(tensors["mlp_out.2.angles"], best[8:][None]) and header.method == "tarot"
    with pytest.raises(SteeringError, match="mean other things"):
        import_pickle(path, SHAPE, site="mlp_out", key="givens")


def test_a_tarot_search_over_mlp_outputs_turns_whole_rows(tmp_path: Path) -> None:
    """15 givens angles fit no heads of 8, so nothing is asked; the rotation is the method's own at mlp_out."""
    best = 0.3 * numbers(15)
    path = tmp_path / "checkpoint.pkl"
    path.write_bytes(pickle.dumps({"train_X": best[None].double(), "train_Y": torch.tensor([[0.0]]).double()}))
    header, tensors = import_pickle(path, SHAPE, layer=2)
    assert set(tensors) == {"mlp_out.2.angles"} and tensors["mlp_out.2.angles"].shape == (1, 15)
    assert parse(packed(header, tensors)).sites == ["mlp_out"]


class _Rows(Importer):
    """Another reading of a bare matrix: a vector per layer."""

    name, files = "rows_by_layer", "a stack [layers, hidden]"

    def claims(self, source: Source) -> bool:
        return source.name.endswith(".pt")

    def fits(self, source: Source, model: ModelShape) -> bool:
        return len(source.torch(source.name)) == model.num_layers

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        rows = source.torch(source.name)
        return Draft("vector", {f"resid_post.{at}.add": row.clone() for at, row in enumerate(rows)})


def test_shapes_with_two_meanings_are_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, _Rows.name, _Rows())
    path = saved(tmp_path / "vectors.pt", numbers(3, 16))
    with pytest.raises(SteeringError, match=r"may be layers .* or spring .* or rows_by_layer .*--format") as found:
        import_file(path, SHAPE)
    assert found.value.param == "format"
    assert import_file(path, SHAPE, format="rows_by_layer")[0].method == "vector"
    assert import_file(path, SHAPE, format="spring")[0].method == "soft_prompt"


@pytest.mark.parametrize("sizes", [(7, 16), (1, 7, 16), (2, 16)])
def test_rows_that_nothing_names_are_a_question_too(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """They may be a soft prompt, or the layers of another model, or activations of as many prompts."""
    path = saved(tmp_path / "rows.pt", numbers(*sizes))
    with pytest.raises(SteeringError, match=r"3 layers and hidden size 16.* layers .* or spring .*--format") as found:
        import_file(path, SHAPE)
    assert found.value.param == "format"
    assert import_file(path, SHAPE, format="spring")[1]["rows"].shape == sizes[-2:]
    with pytest.raises(SteeringError, match="a stack of vectors has"):
        import_file(path, SHAPE, format="layers")
    named = saved(tmp_path / "prompt_embeddings.pt", numbers(*sizes))
    assert import_file(named, SHAPE)[0].method == "soft_prompt"


# ---- what SAELens' folders may also say


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"architecture": "transcoder"}, "transcoder"),
        ({"hook_layer": 9}, "hook_layer of cfg.json is 9, its hook says"),
        ({"rescale_acts_by_decoder_norm": True}, "only topk"),
        ({"architecture": "jumprelu_skip_transcoder"}, "transcoder"),
        ({"d_out": 16}, "transcoder"),
        ({"architecture": "matching_pursuit"}, "served are"),
        ({"architecture": "abstopk", "k": 3}, "served are"),
        ({"architecture": "temporal"}, "served are"),
        ({"hook_head_index": 1}, "hook_head_index"),
        ({"hook_name": "blocks.1.hook_resid_mid"}, "say the site"),
        ({"reshape_activations": "hook_z"}, "reshape_activations"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ({"activation_fn_kwargs": {"alpha": 2}}, "activation_fn_kwargs.alpha"),
        ({"d_sae": 25}, "d_sae"),
        ({"d_in": 8}, "d_in"),
        ({"finetuning_scaling_factor": True}, "no scaling_factor"),
        ({"finetuning_scaling_factor": "yes"}, "true or false"),
        ({"apply_b_dec_to_input": 1}, "true or false"),
        ({"architecture": "topk"}, "k of cfg.json"),
        ({"architecture": "topk", "k": True}, "k of cfg.json"),
        ({"architecture": "gated"}, "r_mag"),
        ({"metadata": [1]}, "no JSON object"),
        ({"model_from_pretrained_kwargs": {"fold_something": True}}, "fold_something"),
    ],
)
def test_what_else_saelens_says_is_refused(said: dict[str, Any], reason: str, tmp_path: Path) -> None:
    config = {"architecture": "standard", "d_in": 16, "d_sae": 24, "hook_name": "blocks.1.hook_resid_post"}
    path = folder(tmp_path / "sae", cfg__json=config, sae_weights__safetensors=SAE)
    import_file(path, SHAPE)
    folder(path, cfg__json=config | said)
    with pytest.raises(SteeringError, match=reason):
        import_file(path, SHAPE)


@pytest.mark.parametrize(("factor", "is_refused"), [(1.0, False), (3.0, True)])
def test_an_unused_scaling_factor_is_one(factor: float, is_refused: bool, tmp_path: Path) -> None:
    config = {"architecture": "standard", "hook_name": "blocks.1.hook_resid_post"}
    weights = SAE | {"scaling_factor": torch.full((24,), factor)}
    path = folder(tmp_path / "sae", cfg__json=config, sae_weights__safetensors=weights)
    if is_refused:
        with pytest.raises(SteeringError, match="scaling_factor that is not 1"):
            import_file(path, SHAPE)
    else:
        assert torch.equal(import_file(path, SHAPE)[1]["resid_post.1.decoder"], DECODER)


def test_rows_are_scaled_by_themselves_or_by_a_factor(tmp_path: Path) -> None:
    config = {"hook_name": "blocks.1.hook_resid_post", "normalize_activations": "layer_norm"}
    path = folder(tmp_path / "sae", cfg__json=config, sae_weights__safetensors=SAE)
    import_file(path, SHAPE)
    with pytest.raises(SteeringError, match="by itself") as found:
        import_file(path, SHAPE, input_scale=2.0)
    assert found.value.param == "input_scale"


def test_a_centred_models_stream_is_read_centred(tmp_path: Path) -> None:
    """TransformerLens' center_writing_weights takes the mean off every row of the stream."""
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True, "fold_ln": True}}
    config = {"architecture": "standard", "hook_name": "blocks.1.hook_resid_post", **kwargs}
    path = folder(tmp_path / "sae", cfg__json=config, sae_weights__safetensors=SAE)
    _, tensors = import_file(path, SHAPE)
    x = numbers(5, 16)
    wanted = (x - x.mean(dim=1, keepdim=True)) @ ENCODER
    torch.testing.assert_close(x @ tensors["resid_post.1.encoder"].T, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"transcode": True}, "transcoder"),
        ({"skip_connection": True}, "transcoder"),
        ({"activation": "groupmax"}, "groupmax"),
        ({"signed": True}, "signed"),
        ({"k": 0}, "k of cfg.json"),
        ({"d_in": 12}, "d_in"),
        ({"num_latents": 25}, "num_latents"),
    ],
)
def test_what_else_sparsify_says_is_refused(said: dict[str, Any], reason: str, tmp_path: Path) -> None:
    made = _sparsify(tmp_path)
    config = json.loads((made.path / "cfg.json").read_text())
    folder(made.path, cfg__json=config | said)
    with pytest.raises(SteeringError, match=reason):
        import_file(made.path, SHAPE)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"trainer": {"dict_class": "CrossCoder"}}, "dict_class"),
        ({"trainer": {"submodule_name": "embed"}}, "say the site"),
        ({"trainer": {"layer": None}}, "layer"),
        ({"trainer": {"dict_size": 25}}, "dict_size"),
        ({"buffer": {"io": "in_and_out"}}, "transcoder"),
        ({"buffer": {"layer": 3}}, "buffer.layer"),
    ],
)
def test_what_else_dictionary_learning_says_is_refused(
    said: dict[str, dict[str, Any]], reason: str, tmp_path: Path
) -> None:
    made = _dictionary_learning(tmp_path)
    config = json.loads((made.path / "config.json").read_text())
    folder(made.path, config__json={part: inner | said.get(part, {}) for part, inner in config.items()})
    with pytest.raises(SteeringError, match=reason):
        import_file(made.path, SHAPE)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1, "block_output", "pos", 1, 2, None, None, [[0, 1]], None, None, None, None, None, None], "subspaces"),
        ([1, "block_output", "pos", 1, 2, None, None, None, None, 0, None, None, None, None], "links"),
        ([1, "block_output", "h.pos", 1, 2, *[None] * 9], "unit pos"),
        ([1, "block_output", "pos", 2, 2, *[None] * 9], "unit pos"),
    ],
)
def test_pyvenes_links_and_subspaces_are_refused(row: list[Any], reason: str, tmp_path: Path) -> None:
    made = _pyvene(tmp_path)
    config = json.loads((made.path / "config.json").read_text())
    folder(made.path, config__json=config | {"representations": [row]})
    with pytest.raises(SteeringError, match=reason):
        import_file(made.path, SHAPE)


def test_a_reft_with_trained_weights_of_its_model_is_refused(tmp_path: Path) -> None:
    made = _pyvene(tmp_path)
    saved(made.path / "pytorch_model.bin", {})
    import_file(made.path, SHAPE)
    saved(made.path / "pytorch_model.bin", {"score.weight": numbers(2, 16)})
    with pytest.raises(SteeringError, match=r"score\.weight"):
        import_file(made.path, SHAPE)
