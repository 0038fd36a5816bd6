"""Autoencoders and ReFTs saved by their own libraries do here what those libraries compute (tests/foreign/make.py)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import ops as reference
from safetensors.torch import load_file
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers import detect, import_file
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import packed, parse

ROOT = Path(__file__).parents[1] / "foreign"
SHAPE = ModelShape(
    architecture="LlamaForCausalLM", hidden_size=16, num_layers=32, num_heads=2, head_dim=8, num_kv_heads=1
)
EDITS = [  # make.py's `changed`
    {"feature": 3, "set": 2.0},
    {"feature": 5, "scale": 0.0},
    {"feature": 7, "add": 1.5, "only_if_active": True},
]
SAES = {
    **{f"saelens_{kind}": "saelens" for kind in ("standard", "gated", "jumprelu", "topk", "layer_norm")},
    **{
        f"dictionary_learning_{kind}": "dictionary_learning"
        for kind in (
            "AutoEncoder",
            "AutoEncoderNew",
            "GatedAutoEncoder",
            "JumpReluAutoEncoder",
            "AutoEncoderTopK",
            "BatchTopKSAE",
            "MatryoshkaBatchTopKSAE",
        )
    },
    "gemma_scope_2/resid_post/layer_1_width_24_l0_small": "gemma_scope_2",
    "llama_scope/L1R": "llama_scope",
    "goodfire/Llama-3.1-8B-Instruct-SAE-l19.pth": "goodfire",
}
REFTS = {
    "loreft": "relu",
    "noreft": "tanh",
    "consreft": None,
    "lobireft": None,
    "direft": "silu",
    "nodireft": None,
}


def after(path: Path, x: Tensor, params: dict[str, Any], **hints: Any) -> Tensor:
    """Rows after the edit of an imported file, in float64."""
    header, tensors = import_file(path, SHAPE, **hints)
    vector = parse(packed(header, tensors))
    method: Any = vector.method
    said = method.params.model_validate(vector.header.known_defaults | params)
    method.check_params(said, vector.tensors)
    ((point, parts),) = vector.tensors.items()
    ops = method.ops(parts, said, point, SHAPE)
    return torch.stack([reference.edited(row.double(), ops) for row in x])


@pytest.mark.parametrize("name", SAES)
def test_features_are_the_librarys(name: str) -> None:
    path = ROOT / name
    assert detect(path) == SAES[name]
    said = load_file(ROOT / f"{name.split('/')[0]}.io.safetensors")
    got = after(path, said["x"], {"features": EDITS})
    torch.testing.assert_close(got, said["y"].double(), rtol=1e-4, atol=2e-5)
    assert (got - said["x"]).abs().max() > 0.1


@pytest.mark.parametrize("name", REFTS)
def test_interventions_are_the_librarys(name: str) -> None:
    path, activation = ROOT / f"pyreft_{name}", REFTS[name]
    assert detect(path) == "pyvene"
    said = load_file(ROOT / f"pyreft_{name}.io.safetensors")
    defaults = {} if activation is None else {"activation": activation}
    got = after(path, said["x"], {}, positions="l1", defaults=defaults)
    torch.testing.assert_close(got, said["y"].double(), rtol=1e-4, atol=2e-5)


def test_a_reft_is_not_silently_linear() -> None:
    """pyreft stores no act_fn: a folder that may have one says so, and one without does not."""
    for name in REFTS:
        header, _ = import_file(ROOT / f"pyreft_{name}", SHAPE, positions="l1")
        told = any("act_fn" in warning for warning in header.provenance.get("warnings", []))
        assert told == (name not in ("consreft", "lobireft")), name
    header, _ = import_file(ROOT / "pyreft_loreft", SHAPE, positions="l1", defaults={"activation": "relu"})
    assert header.defaults["activation"] == "relu" and "warnings" not in header.provenance


def test_a_trainers_checkpoint_asks_for_what_it_lacks() -> None:
    path = ROOT / "pyreft_checkpoint"  # of NodiReFT, whose names are NoReFT's too
    assert detect(path) == "pyvene"
    for hints, field in (({}, "positions"), ({"positions": "l1"}, "method")):
        with pytest.raises(SteeringError) as found:
            import_file(path, SHAPE, **hints)
        assert found.value.param == field
    header, tensors = import_file(path, SHAPE, positions="f1+l1", method="nodireft")
    _, wanted = import_file(ROOT / "pyreft_nodireft", SHAPE)
    assert header.method == "nodireft" and set(tensors) == set(wanted)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in wanted.items())


def test_the_versions_are_those_of_the_script() -> None:
    said = json.loads((ROOT / "versions.json").read_text())
    text = (ROOT / "make.py").read_text()
    assert all(f"{name}=={said[name]}" in text for name in ("sae-lens", "dictionary-learning", "pyreft", "pyvene"))


# ---- what strangers had (issue 12)

CASES = ROOT / "cases"
LLAMA = ModelShape(
    architecture="LlamaForCausalLM", hidden_size=64, num_layers=4, num_heads=4, head_dim=16, num_kv_heads=2
)
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).double()


def edited_case(path: Path, params: dict[str, Any], **hints: Any) -> dict[str, Tensor]:
    """Rows of X after a file's edit, by place."""
    header, tensors = import_file(path, LLAMA, **hints)
    vector = parse(packed(header, tensors))
    method: Any = vector.method
    said = method.params.model_validate(vector.header.known_defaults | params)
    found = {}
    for point, parts in vector.tensors.items():
        ops = method.ops(parts, said, point, LLAMA)
        found[f"{point.site}.{point.layer}"] = torch.stack([reference.edited(row, ops) for row in X])
    return found


@pytest.mark.parametrize("folder", ["layer_2/width_16k/average_l0_20", "layer_2/width_16k/average_l0_20/params.npz"])
def test_what_reads_one_place_and_writes_another_is_refused(folder: str, tmp_path: Path) -> None:
    path = CASES / "gemma-scope-2b-pt-transcoders" / folder
    for hints in ({}, {"site": "resid_post"}):
        with pytest.raises(SteeringError, match="reads the MLP's input and writes its output"):
            import_file(path, LLAMA, **hints)
    elsewhere = tmp_path / "layer_2" / "params.npz"  # where nothing says what it is, that is a question
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(
        (CASES / "gemma-scope-2b-pt-transcoders/layer_2/width_16k/average_l0_20/params.npz").read_bytes()
    )
    with pytest.raises(SteeringError, match="say the site") as found:
        import_file(elsewhere, LLAMA)
    assert found.value.param == "site"
    for repository in ("gemma-scope-2b-pt-res", "models--google--gemma-scope-2b-pt-res/snapshots/0a1b"):
        path = tmp_path / repository / "layer_2" / "params.npz"
        path.parent.mkdir(parents=True)
        path.write_bytes(elsewhere.read_bytes())
        _, tensors = import_file(path, LLAMA)
        assert "resid_post.2.encoder" in tensors
    path = tmp_path / "models--google--gemma-scope-2b-pt-transcoders" / "snapshots" / "0a1b" / "layer_2" / "params.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(elsewhere.read_bytes())
    with pytest.raises(SteeringError, match="transcoder"):
        import_file(path, LLAMA)


def test_glp_projects() -> None:
    path = CASES / "glp_project_glp.gguf"
    found = edited_case(path, {})
    directions = import_file(path, LLAMA)[1]
    assert set(found) == {"resid_post.1", "resid_post.2", "resid_post.3"}
    for point, rows in found.items():
        d = directions[f"{point}.direction"].double()
        d = d / d.norm()
        torch.testing.assert_close(rows, X - (X @ d)[:, None] * d, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"project", b"exotic!", "glp.mode 'exotic!'"),
        (b"residual_stream_post_layer", b"residual_stream_mid__layer", "residual_stream_mid__layer"),
        (b"glp.alpha_default", b"glp.alpha_unknown", "glp.alpha_unknown"),
    ],
)
def test_what_glp_may_also_say(old: bytes, new: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes((CASES / "glp_project_glp.gguf").read_bytes().replace(old, new))
    with pytest.raises(SteeringError, match=reason):
        import_file(path, LLAMA)


def test_a_scaling_factor_scales() -> None:
    """The change is decode(a') - decode(a), in which every feature is multiplied by its factor, 3."""
    path = CASES / "saelens_finetuning_scaling_factor"
    w = {name: tensor.double() for name, tensor in load_file(path / "sae_weights.safetensors").items()}
    a = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    new = a.clone()
    new[:, 3], new[:, 5], new[:, 7] = 2.0, 0.0, a[:, 7] + 1.5 * (a[:, 7] > 0)
    wanted = X + ((new - a) * w["scaling_factor"]) @ w["W_dec"]
    got = edited_case(path, {"features": EDITS})["resid_post.2"]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_negative_threshold_acts_as_zero() -> None:
    path = CASES / "saelens_jumprelu_negative_threshold"
    w = {name: tensor.double() for name, tensor in load_file(path / "sae_weights.safetensors").items()}
    assert (w["threshold"] < 0).any()
    feature = int((w["threshold"] < 0).nonzero()[0])
    z = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    a = z.relu() * (z > w["threshold"])
    new = a.clone()
    new[:, feature] = 2 * a[:, feature]
    got = edited_case(path, {"features": [{"feature": feature, "scale": 2.0}]})["resid_post.2"]
    torch.testing.assert_close(got, X + (new - a) @ w["W_dec"], rtol=1e-5, atol=1e-5)


def test_gemma_scope_2_is_read_by_its_config() -> None:
    path = CASES / "gemma_scope_2_layer"
    w = {name: tensor.double() for name, tensor in load_file(path / "params.safetensors").items()}
    z = X @ w["w_enc"] + w["b_enc"]
    a = z.relu() * (z > w["threshold"])
    new = a.clone()
    new[:, 4] = 1.5
    got = edited_case(path, {"features": [{"feature": 4, "set": 1.5}]})["resid_post.2"]
    torch.testing.assert_close(got, X + (new - a) @ w["w_dec"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"hf_hook_point_out": "model.layers.2.post_feedforward_layernorm.output"}, "transcoder"),
        ({"type": "crosscoder"}, "crosscoder"),
        ({"affine_connection": True}, "transcoder"),
        ({"architecture": "topk"}, "architecture"),
        ({"hf_hook_point_in": "model.layers.2.mlp.gate.output", "hf_hook_point_out": None}, "hf_hook_point_in"),
        ({"width": 31}, "width"),
        ({"skip": 1}, "also holds skip"),
    ],
)
def test_gemma_scope_2_of_other_kinds_is_refused(said: dict[str, Any], reason: str, tmp_path: Path) -> None:
    source = CASES / "gemma_scope_2_layer"
    (tmp_path / "params.safetensors").write_bytes((source / "params.safetensors").read_bytes())
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | said))
    with pytest.raises(SteeringError, match=reason):
        import_file(tmp_path, LLAMA)


def test_a_pyreft_checkpoint_without_config() -> None:
    path = CASES / "pyreft_checkpoint_without_config"
    with pytest.raises(SteeringError, match="positions") as found:
        import_file(path, LLAMA)
    assert found.value.param == "positions"
    header, _ = import_file(path, LLAMA, positions="f3+l3")
    assert header.method == "loreft" and header.where is not None
    for point, rows in edited_case(path, {}, positions="f3+l3").items():
        layer = point.split(".")[1]
        state = torch.load(path / f"intkey_layer_{layer}_comp_block_output_unit_pos_nunit_1#0.bin", weights_only=True)
        w, b, r = (state[name].double() for name in ("weight", "bias", "rotate_layer"))
        wanted = X + (X @ w.T + b - X @ r) @ r.T
        torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-5)
