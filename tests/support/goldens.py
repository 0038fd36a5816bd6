"""The steering goldens as what a user would have: vector files and the request entries that use them.

A case's pieces are applied in order. `cases` are those whose methods edit activations; `others` are served by the
engine in other ways (inserted tokens, attention, routing) and have pieces of the same form.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from whipstaff.steering.importers import PICKLES, import_file, import_pickle
from whipstaff.steering.methods.reft import where_of
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header
from whipstaff.steering.where import Where

ROOT = Path(__file__).parents[1] / "golden" / "steering"
OTHERS = (
    "adaption_prompt",
    "aligner",
    "attn_override",
    "mote",
    "pasta",
    "prefix_kv",
    "softprompt",
)


_OF_THE_FILE = ("activation", "k", "apply_b_dec_to_input", "normalize_activations")  # what an autoencoder's file states


class Piece(NamedTuple):
    """One file and one entry of a request's `steering`."""

    method: str
    tensors: dict[str, Tensor]  # as the file names them; empty where the method has no file
    params: dict[str, Any]  # fields of the entry besides vector and where
    where: Where | None = None  # None: the method's own

    def header(self, model: ModelShape) -> Header:
        stated = {name: self.params[name] for name in _OF_THE_FILE if name in self.params}
        return Header(method=self.method, model=model, defaults=stated)

    def entry(self, vector: str) -> dict[str, Any]:
        """The request's entry, for a file of that name."""
        where = {} if self.where is None else {"where": self.where.model_dump(exclude_none=True)}
        return {"vector": vector, **self.params, **where}


class Wild(NamedTuple):
    """A golden case's artifact as its community has it."""

    case: str
    file: str
    format: str
    hints: dict[str, Any] = {}  # noqa: RUF012

    @property
    def path(self) -> Path:
        return ROOT / "cases" / self.case / self.file

    def imported(self, model: ModelShape) -> tuple[Header, dict[str, Tensor]]:
        """What `whipstaff vectors convert` makes of it."""
        importing = import_pickle if self.format in PICKLES else import_file
        return importing(self.path, model, **self.hints)


WILD = [
    Wild("repeng_qwen2", "control_vector.gguf", "repeng"),
    Wild("repeng_renorm_gpt2", "control_vector.gguf", "repeng"),
    Wild("knob_llama_prior", "projection", "context_knob", {"layer": 2}),
    Wild("loreft_llama", "pyvene_checkpoint", "pyvene", {"positions": "f3+l3"}),
    Wild("sae_relu_llama", "sae", "saelens"),
    Wild("sae_topk_llama", "sae", "saelens"),
    Wild("sae_jumprelu_gemma2", "sae", "saelens"),
    Wild("prefix_kv_llama", "adapter", "peft"),
    Wild("adaption_prompt_llama", "adapter", "peft"),
    Wild("softprompt_peft_llama", "adapter", "peft"),
    Wild("softprompt_insert_llama", "added_token_embeddings.pt", "spring"),
    Wild("softprompt_system_qwen2", "soft_prompt.safetensors", "dro"),
    Wild("angular_70_llama", "steering_config.npy", "angular"),
    Wild("angular_180_adaptive_llama", "steering_config.npy", "angular"),
]


class Case(NamedTuple):
    name: str
    model: str
    pieces: list[Piece]
    io: dict[str, Tensor]


def cases(model: str) -> list[Case]:
    """Every golden case on one model that is edits of activations."""
    return [case for case in _all(model) if not case.name.startswith(OTHERS)]


def others(model: str) -> list[Case]:
    """Every other golden case on one model."""
    return [case for case in _all(model) if case.name.startswith(OTHERS)]


def shape_of(model: str) -> ModelShape:
    """A golden model's shape."""
    config = AutoConfig.from_pretrained(ROOT / "models" / model)
    num_heads = config.num_attention_heads
    return ModelShape(
        architecture=config.architectures[0],
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", num_heads),
        num_experts=getattr(config, "num_local_experts", 0),
    )


def _all(model: str) -> list[Case]:
    found = []
    for folder in sorted((ROOT / "cases").iterdir()):
        said = json.loads((folder / "case.json").read_text())
        if said["model"] == model:
            params = load_file(folder / "params.safetensors")
            found.append(Case(said["name"], model, _pieces(said, params), load_file(folder / "io.safetensors")))
    return found


def _pieces(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    make = next(make for family, make in _FAMILIES.items() if said["name"].startswith(family))
    return make(said, params)


def _from(position: int) -> Where:
    return Where(prompt=[(position, None)], generation="all")


def _actadd(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    tensors = {f"resid_pre.{said['layer']}.rows": params["activations"]}
    return [Piece("actadd", tensors, {"scale": said["coeff"], "location": said["addition_location"]})]


def _side_attention(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    if "gates" in params:
        gates = {f"attn_head.{layer}.gate": gate for layer, gate in enumerate(params["gates"])}
        return [Piece("side_attention", {"tokens": params["tokens"], **gates}, {})]
    names = {"adaption_prompt": "tokens", "gate": "gate"}
    return [Piece("side_attention", _by_layer("attn_head", params, names), {})]


def _angular(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    tensors: dict[str, Tensor] = {}
    for module in said["modules"]:
        *_, layer, norm = module.split(".")
        site = "attn_in" if norm == "input_layernorm" else "mlp_in"
        tensors |= {f"{site}.{layer}.{part}": vector.clone() for part, vector in params.items()}
    return [Piece("angular", tensors, {"angle": said["degree"], "adaptive": bool(said["adaptive_mode"])})]


def _attn_override(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    return [Piece("attention_override", {}, {"edits": said["edits"]})]


def _caa(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    where = _from(said["instruction_end_position"])
    return [Piece("caa", {f"resid_post.{said['layer']}.add": params["vector"]}, {"scale": said["multiplier"]}, where)]


def _composition(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    early, late = said["layers"]
    heads = params["head_offset"].view(4, 32)
    gain = torch.full_like(params["vector"], said["mlp_scale"] - 1)
    return [
        Piece("vector", {f"attn_head.{early}.add": heads}, {}, Where.of("each_last")),
        Piece("vector", {f"mlp_out.{early}.gain": gain}, {}, Where.of("all")),
        Piece("vector", {f"resid_post.{late}.add": params["vector"]}, {}, _from(said["from"])),
        Piece("directional_ablation", {f"resid_post.{late}.direction": params["ablate"]}, {}),
        Piece(
            "context_knob",
            {f"resid_post.{late}.basis": params["u"][None]},
            {"value": said["value"]},
            Where.of("generation"),
        ),
    ]


def _reft(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    names = {"weight": "weight", "bias": "bias", "rotate_layer": "rotate"} | {
        "learned_source.weight": "weight",
        "learned_source.bias": "bias",
        "proj_layer.weight": "project",
        "proj_layer.bias": "project_bias",
    }
    tensors = _by_layer("resid_post", params, names)
    tensors = {name: tensor.T.contiguous() if name.endswith("rotate") else tensor for name, tensor in tensors.items()}
    return [Piece(said["method"], tensors, {}, where_of(said["position_spec"]))]


def _fv_heads(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    mask = torch.zeros(params["mean_activations"].shape[:2])
    mask[tuple(params["heads"].long().T)] = 1
    if said["op"] == "add":
        tensors = _stacked("add", mask[..., None] * params["mean_activations"])
        return [Piece("function_vector", tensors, {}, Where.of("last_prompt"))]
    tensors = _stacked("mean", params["mean_activations"]) | _stacked("mean_mask", mask)
    return [Piece("head_scale", tensors, {}, Where.of("last_prompt"))]


def _fv(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    return [Piece("function_vector", {f"resid_post.{said['layer']}.add": params["vector"]}, {})]


def _heads_scale(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    return [Piece("head_scale", {k: v for part, p in params.items() for k, v in _stacked(part, p).items()}, {})]


def _iti(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    if "directions" in params:
        tensors: dict[str, Tensor] = {}
        for (layer, head), direction, sigma in zip(said["heads"], params["directions"], params["sigma"], strict=True):
            tensors.setdefault(f"attn_head.{layer}.direction", torch.zeros(4, 32))[head] = direction
            tensors.setdefault(f"attn_head.{layer}.sigma", torch.zeros(4))[head] = sigma
        return [Piece("iti", tensors, {"scale": said["alpha"]})]
    if said["name"].endswith("baked"):
        tensors = {f"attn_out.{k.removeprefix('bias_layer')}.add": v for k, v in params.items() if "bias" in k}
        return [Piece("vector", tensors, {}, Where.of("all"))]
    where = _from(said["start"]) if "start" in said else Where.of("generation")
    tensors = {f"attn_head.{k.removeprefix('offset_layer')}.add": v.view(4, 32) for k, v in params.items()}
    return [Piece("iti", tensors, {"scale": 1.0}, where)]


def _knob(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    return [Piece("context_knob", {f"resid_post.{said['layer']}.basis": params["u"][None]}, {"value": said["value"]})]


def _lofit(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    return [Piece("lofit", _stacked("A", params["A"]) | _stacked("v", params["v"]), {})]


def _mote(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    tensors = {}
    for layer, experts in said["edits"].items():
        for part, chosen in experts.items():
            tensors[f"router.{layer}.{part}"] = torch.zeros(8).index_fill(0, torch.tensor(chosen), 1.0)
    return [Piece("mote", tensors, {"mode": said["op"]})]


def _pasta(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    return [Piece("pasta", {}, {name: said[name] for name in ("heads", "spans", "alpha", "scale_position")})]


def _prefix_kv(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    layers = params["prompt_embeddings"].view(said["num_virtual_tokens"], 4, 2, 2, 32)  # P, layer, key or value, ...
    tensors = {}
    for layer in range(4):
        for index, part in enumerate(("key", "value")):
            tensors[f"attn_head.{layer}.{part}"] = layers[:, layer, index].contiguous()
    return [Piece("prefix_kv", tensors, {})]


def _refusal(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    if said["op"] == "ablate":
        return [Piece("directional_ablation", dict(params), {})]
    tensors = {f"resid_pre.{said['layer']}.direction": params["direction"]}
    if said["op"] == "add":
        return [Piece("add_direction", tensors, {"scale": said["coeff"]})]
    return [Piece("directional_patch", tensors, {"value": said["value"]})]


def _repe(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    own: dict[str, Any] = {"scale": said["coeff"], "renorm": said["normalize"]}
    method = "control_vector"
    if said["name"].startswith("repe_"):
        method = "repe"
        own["operator"] = {"linear_comb": "linear"}.get(said["operator"], said["operator"])
    return [Piece(method, {f"resid_post.{k.removeprefix('direction_layer')}.add": v for k, v in params.items()}, own)]


def _sae(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    parts = {
        "encoder": params["W_enc"].T.contiguous(),
        "encoder_bias": params["b_enc"],
        "decoder": params["W_dec"],
        "decoder_bias": params["b_dec"],
    }
    activation = "relu" if said["k"] is None else "topk"
    if "threshold" in params:
        activation, parts["threshold"] = "jumprelu", params["threshold"]
    features = []
    for edit in said["edits"]:
        is_careful = edit["op"] == "add" and said["add_only_if_active"]
        features.append({"feature": edit["feature"], edit["op"]: edit["value"], "only_if_active": is_careful})
    own = {name: said[name] for name in ("k", "apply_b_dec_to_input", "normalize_activations")}
    tensors = {f"resid_post.{said['layer']}.{part}": tensor for part, tensor in parts.items()}
    return [Piece("sae", tensors, {"features": features, "activation": activation, **own})]


def _shift(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    where = {
        "all": Where.of("all"),
        "from_start": _from(6),
        "last_prompt": Where.of("each_last"),
        "only_generated": Where.of("generation"),
    }[said["mode"]]
    tensors = {f"resid_post.{said['layer']}.add": params["vector"]}
    return [Piece("shift_vector", tensors, {"scale": said["alpha"]}, where)]


def _site(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    return [Piece("site", _stacked("task", params["task_embedding"]) | _stacked("alpha", params["alphas"]), {})]


def _soft_prompt(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    (rows,) = params.values()
    return [Piece("soft_prompt", {"rows": rows}, {"insert": said["insert_at"]})]


def _tarot(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    part = "scale" if "scales" in params else "angles"
    rows = zip(said["layers"], params["scales" if part == "scale" else part], strict=True)
    return [Piece("tarot", {f"attn_head.{layer}.{part}": row for layer, row in rows}, {})]


def _taskvec(said: dict[str, Any], params: dict[str, Tensor]) -> list[Piece]:
    return [Piece("task_vector", {f"resid_post.{said['layer']}.state": params["vector"]}, {})]


def _stacked(part: str, values: Tensor) -> dict[str, Tensor]:
    """(layers, heads, ...) as the tensors of a file."""
    return {f"attn_head.{layer}.{part}": value.clone() for layer, value in enumerate(values)}


def _by_layer(site: str, params: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """`layer{l}.{their name}` as the tensors of a file."""
    found = {}
    for key, tensor in params.items():
        layer, theirs = key.removeprefix("layer").split(".", 1)
        found[f"{site}.{layer}.{names[theirs]}"] = tensor
    return found


_FAMILIES = {
    "actadd": _actadd,
    "adaption_prompt": _side_attention,
    "aligner": _side_attention,
    "angular": _angular,
    "attn_override": _attn_override,
    "caa": _caa,
    "composition": _composition,
    "direft": _reft,
    "fv_heads": _fv_heads,
    "fv": _fv,
    "heads_scale": _heads_scale,
    "iti": _iti,
    "knob": _knob,
    "lofit": _lofit,
    "loreft": _reft,
    "mote": _mote,
    "noreft": _reft,
    "pasta": _pasta,
    "prefix_kv": _prefix_kv,
    "refusal": _refusal,
    "repe": _repe,
    "sae": _sae,
    "shift": _shift,
    "site": _site,
    "softprompt": _soft_prompt,
    "tarot": _tarot,
    "taskvec": _taskvec,
}
