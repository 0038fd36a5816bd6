"""Which sites each architecture of vLLM's registry shows: models.json, and the table of models.md that is made of it.

    python docs/support.py                  builds what the file does not have for the versions that are installed
    python docs/support.py ARCHITECTURE ... builds these anew
    python docs/support.py --check ARCHITECTURE ... builds these, and says where the file or the page is not current

A model is made tiny by its configuration and built below the engine, with random weights, in a process of its own that
has a minute. What has no configuration here, or does not build, is in the table with the reason.
"""

import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from whipstaff.server.engine import vllm_version

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")

FOLDER = Path(__file__).parent
BUILT, PAGE = FOLDER / "models.json", FOLDER / "models.md"
BEGIN, END = "<!-- written by docs/support.py -->", "<!-- end of what is written -->"
SECONDS = 60.0  # that a model may take
AT_ONCE = 2
LAYERS = 4
MOST_LAYERS = 12  # where a model's blocks are of several types, so many that each is among them
COLUMNS = ("resid_post", "attn_in", "attn_out", "attn_head", "mlp_in", "router")  # `mlp_out` is where `mlp_in` is
MAX_REASON = 140  # characters
Found = dict[str, Any]  # {"layers": 4, "sites": {site: [layer, ...]}, "soft": bool} or {"reason": why not}

# What makes a model small, by every name that configurations have for it. Only what a configuration knows is set.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "padded_vocab_size", "vocab_size_per_layer_input"), 320),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "num_attention_groups"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "intermediate_size_mlp"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 64),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_head_dim"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_ngroups_state"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), 1),
    "pad_token_id": 0,
    "sliding_window": 64,
}
MIMO_WINDOWED = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "swa_v_head_dim": 16}
# What is one thing with what stands above, for single architectures.
OWN: dict[str, dict[str, Any]] = {
    "AfmoeForCausalLM": {
        "score_func": "sigmoid",
        "route_norm": True,
        "route_scale": 1.0,
        "n_group": 1,
        "topk_group": 1,
    },
    "ChatGLMModel": {"original_rope": True, "tie_word_embeddings": False},
    "ChatGLMForConditionalGeneration": {"original_rope": True, "tie_word_embeddings": False},
    "GPTJForCausalLM": {"rotary_dim": 16},
    "Glm4MoeForCausalLM": {"head_dim": 16},
    "Glm4MoeLiteForCausalLM": {"first_k_dense_replace": 1},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 16},
    "HYV3ForCausalLM": {"first_k_dense_replace": 1, "expert_hidden_dim": 64, "route_norm": True},
    "Lfm2ForCausalLM": {
        "layer_types": ["conv", "full_attention"] * 2,
        "block_dim": 64,
        "conv_dim": 64,
        "num_hidden_layers": 4,
    },
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "LongcatFlashForCausalLM": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "MiMoV2FlashForCausalLM": {"hybrid_layer_pattern": [0, 1, 0, 1], "layernorm_epsilon": 1e-5, **MIMO_WINDOWED},
    "MiniMaxM2ForCausalLM": {"rotary_dim": 16, "scoring_func": "sigmoid"},
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "NemotronHForCausalLM": {"layers_block_type": ["mamba", "mlp", "attention", "mlp"]},
    "Step3TextForCausalLM": {"moe_layers_enum": "2,3"},
    "Zamba2ForCausalLM": {"attention_head_dim": 32, "mamba_headdim": 16, "n_mamba_heads": 8},
}
# The configuration's type, where neither transformers nor vLLM has it by the architecture.
TYPES: dict[str, str] = {
    "DeepseekV32ForCausalLM": "deepseek_v32",
    "DeepseekV4ForCausalLM": "deepseek_v4",
    "HYV4ForCausalLM": "hy_v4",
    "HyperCLOVAXForCausalLM": "hyperclovax",
    "KimiLinearForCausalLM": "kimi_linear",
    "MuseGlimmerForCausalLM": "muse_glimmer_text",
    "Step3TextForCausalLM": "step3_text",
    "Step3p5ForCausalLM": "step3p5",
    "ChatGLMModel": "chatglm",
    "ChatGLMForConditionalGeneration": "chatglm",
    "InklingForCausalLM": "inkling_model",
    "Llama4ForCausalLM": "llama4_text",
    "PhiMoEForCausalLM": "phimoe",
}


class NotHere(Exception):
    """Why an architecture is not built."""


def architectures() -> list[str]:
    """Those that generate text, as vLLM's registry has them."""
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

    return list(_TEXT_GENERATION_MODELS)


def versions() -> dict[str, str]:
    """What was installed: the table is of these."""
    return {"vllm": vllm_version(), "transformers": version("transformers")}


# ---- one model, in a process of its own


def model_type(architecture: str) -> str:
    """Raises: NotHere."""
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

    alike = [name for name, where in _TEXT_GENERATION_MODELS.items() if where == _TEXT_GENERATION_MODELS[architecture]]
    for name in (architecture, *alike):  # vLLM runs these by the same class
        if found := TYPES.get(name) or _listed_type(name):
            return found
    raise NotHere("its configuration is in its checkpoints' own code, and in neither vLLM nor transformers")


def _listed_type(architecture: str) -> str | None:
    """As transformers lists it."""
    from transformers.models.auto import modeling_auto

    for names in (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_MAPPING_NAMES):
        for found, classes in names.items():
            if architecture in ([classes] if isinstance(classes, str) else classes):
                return str(found)
    return None


def config_class(name: str) -> Any:
    """Raises: NotHere."""
    from transformers import CONFIG_MAPPING
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    for mapping in (_CONFIG_REGISTRY, CONFIG_MAPPING):
        if name in mapping:
            return mapping[name]
    raise NotHere(f"no configuration of the type {name!r}")


def tiny_config(architecture: str) -> Any:
    """Raises: NotHere, and whatever a configuration does."""
    made = config_class(model_type(architecture))
    usual = made()
    known = {name: value for name, value in SIZES.items() if isinstance(_usual(usual, name), int)}
    known = {name: value for name, value in known.items() if not isinstance(getattr(made, name, None), property)}
    told = _few_layers(usual, known) | OWN.get(architecture, {})
    config = made(**told)
    config.architectures = [architecture]
    return config


def _usual(config: Any, name: str) -> Any:
    """What a configuration says; None too of what it says of each layer by itself."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
        return None


def _few_layers(usual: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes, with as many layers as show every type of block that the configuration lists."""
    lists = {
        name: value
        for name, value in vars(usual).items()
        if isinstance(value, list) and len(value) == getattr(usual, "num_hidden_layers", -1)
    }
    types = max((_first_of_all(value) for value in lists.values()), default=0)
    num = min(max(types, LAYERS), MOST_LAYERS)
    layers = {
        name: num for name, value in known.items() if name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    }
    return {**known, **layers, **{name: value[:num] for name, value in lists.items()}}


def _first_of_all(values: list[Any]) -> int:
    """How many of the first ones hold one of each kind."""
    seen: set[str] = set()
    last = 0
    for index, value in enumerate(values):
        if str(value) not in seen:
            seen.add(str(value))
            last = index + 1
    return last


def build(architecture: str) -> Found:
    """What the model shows that vLLM makes of a tiny configuration. Raises: NotHere, and whatever vLLM does."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models.registry import ModelRegistry

    from whipstaff.server.engine.worker.edits.sites import input_embedding, sites_shown
    from whipstaff.steering.shape import config_shape

    torch.set_num_threads(1)
    torch.manual_seed(0)
    ModelRegistry.models[architecture].load_model_cls()  # type: ignore[attr-defined]  # vLLM itself says less where that breaks
    with tempfile.TemporaryDirectory() as folder:
        tiny_config(architecture).save_pretrained(folder)
        args = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="float32",
            enforce_eager=True,
            max_model_len=64,
            kv_cache_memory_bytes=1 << 26,
        )
        config = args.create_engine_config()
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{folder}/meeting", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            model = initialize_model(config)
        shape = config_shape(config.model_config.hf_config, config.model_config.hf_text_config)
        sites = sites_shown(model, shape)
        embedding = None
        if not config.model_config.is_multimodal_model:
            embedding = input_embedding(model, torch.device("cpu"), shape.hidden_size)
    return {"layers": shape.num_layers, "sites": sites, "soft": embedding is not None}


def _reason(error: BaseException) -> str:
    """An exception as a sentence, without what differs from one run to the next."""
    text = str(error) if isinstance(error, NotHere) else f"{type(error).__name__}: {error}"
    text = re.sub(r"\[type=.*", "", text, flags=re.S)  # pydantic's, of what it was given
    text = re.sub(r"\d+ validation errors? for \w+|Value error, ", "", text)
    text = re.sub(r"0x[0-9a-f]+|/tmp/\S*", "...", text)
    text = " ".join(text.split()).removesuffix(":")
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 4].rstrip() + " ..."


def _child(architecture: str, to: Any) -> None:
    """Builds a model and says what it shows; whatever vLLM prints is not ours to show."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()  # this is one already
    try:
        found = build(architecture)
    except BaseException as error:
        found = {"reason": _reason(error)}
    to.send(found)
    to.close()
    os._exit(0)


def tried(architecture: str) -> Found:
    """The same, whatever becomes of the process."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(architecture, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        found: Found = ours.recv() if ours.poll(SECONDS) else {"reason": f"not built within {SECONDS:.0f} seconds"}
    except EOFError:
        process.join(5)
        found = {"reason": f"building it ended the process ({_signal(process.exitcode)})"}
    if process.is_alive():
        process.kill()
    process.join()
    return found


def _signal(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"


# ---- all of them


def read() -> dict[str, Any]:
    """What was built before, for the versions that are installed; else nothing."""
    said: dict[str, Any] = json.loads(BUILT.read_text()) if BUILT.exists() else {}
    return said if said.get("versions") == versions() else {"versions": versions(), "models": {}}


def write(said: Mapping[str, Any]) -> None:
    """A line for each model, so that changes can be read."""
    rows = [
        f"  {json.dumps(name)}: {json.dumps(said['models'][name])}" for name in sorted(said["models"], key=str.lower)
    ]
    head = f'{{"versions": {json.dumps(said["versions"])}, "date": {json.dumps(said["date"])},\n "models": {{\n'
    BUILT.write_text(head + ",\n".join(rows) + "\n}}\n")


def main(wanted: list[str]) -> None:
    import whipstaff.server.engine.worker.edits.sites  # noqa: F401  what every process needs is read once

    said = read()
    for name in wanted:
        said["models"].pop(name, None)
    todo = [name for name in wanted or architectures() if name not in said["models"]]
    started = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number, (name, found) in enumerate(zip(todo, pool.map(tried, todo), strict=True), 1):
            said["models"][name] = found
            said["date"] = datetime.now(UTC).date().isoformat()
            write(said)
            told = found.get("reason") or ", ".join(found["sites"])
            print(f"{number}/{len(todo)} {time.monotonic() - started:.0f}s {name}: {told}", flush=True)
    PAGE.write_text(page())


def differences(wanted: Iterable[str]) -> Iterator[str]:
    """Where what is built is not what the file has."""
    said = json.loads(BUILT.read_text())
    if said["versions"] != versions():
        yield f"models.json is of {said['versions']}, and {versions()} is installed: run `make support`"
        return
    if missing := set(architectures()) ^ set(said["models"]):
        yield f"not in both vLLM and models.json: {sorted(missing)}"
    for name in wanted:
        found = json.loads(json.dumps(tried(name)))
        if found != said["models"][name]:
            yield f"{name}: {found}, and models.json has {said['models'][name]}"
    if PAGE.read_text() != page():
        yield "models.md is not made of models.json: run `make support`"


# ---- the table


def page() -> str:
    """models.md as it has to be."""
    said = json.loads(BUILT.read_text())
    head, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n" + "\n".join(table(said)) + f"\n{END}{tail}"


def table(said: Mapping[str, Any]) -> Iterator[str]:
    models: dict[str, Found] = said["models"]
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, found in models.items():
        if "sites" in found:
            alike.setdefault(cells(found), []).append(f"`{name}`")
    yield (
        f"{len(models)} architectures of vLLM {said['versions']['vllm']} with the configurations of transformers "
        f"{said['versions']['transformers']}, {said['date']}; {sum(map(len, alike.values()))} were built."
    )
    yield ""
    yield from _rows(
        (*(f"`{column}`" for column in COLUMNS), "soft prompts", "architectures"),
        [(*key, ", ".join(names)) for key, names in sorted(alike.items(), key=lambda row: (-len(row[1]), row[0]))],
    )
    yield ""
    yield "Not built here:"
    yield ""
    whys: dict[str, list[str]] = {}
    for name, found in models.items():
        if "reason" in found:
            whys.setdefault(found["reason"], []).append(f"`{name}`")
    yield from _rows(
        ("why", "architectures"),
        [
            (why.replace("|", "\\|").replace("<", "&lt;"), ", ".join(names))
            for why, names in sorted(whys.items(), key=lambda row: (-len(row[1]), row[0]))
        ],
    )


def cells(found: Found) -> tuple[str, ...]:
    """What a model shows, by column: in all of its blocks, some, or none."""
    shown = [found["sites"].get(column, ()) for column in COLUMNS]
    told = ["–" if not layers else "all" if len(layers) == found["layers"] else "some" for layers in shown]
    return (*told, "yes" if found["soft"] else "–")


def _rows(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = list(head)
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        found = list(differences(sys.argv[2:]))
        print("\n".join(found))
        sys.exit(bool(found))
    main(sys.argv[1:])
