"""The mood vector: the mean difference between cheerful and gloomy text on the demo's residual stream."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from whipstaff.server.demo.grammar import CHEERFUL, SHARED
from whipstaff.server.demo.world import MOODS, World

LAYERS = (3, 4)  # of six blocks: where the model looks back for the mood
SCALE = 8.0  # the advised dose: eight times the mean difference; from ten on sentences begin to break
DESCRIPTION = "cheerful (positive scale) or gloomy (negative scale) storytelling; advised |scale| 4 to 8"

MOOD_SLOT = re.compile("|".join(rf"\[{symbol}\]" for symbol in CHEERFUL))
Vector = dict[int, Tensor]  # block index -> (H,) to add to the residual stream after that block


def contrast(world: World, rng: Random) -> dict[str, str]:
    """The same scenes told in each mood, up to the word where the next sentence must choose one."""
    person = world.people[rng.choice(sorted(world.people))]
    patterns = rng.sample(SHARED["turn"], 4)
    seed = rng.random()
    texts = {}
    for mood in MOODS:
        told = Random(seed)
        sentences = [world.sentence(pattern, person, mood, told) for pattern in patterns[1:]]
        fork = MOOD_SLOT.split(patterns[0])[0]
        texts[mood] = " ".join([*sentences, world.sentence(fork, person, mood, Random(seed))]).rstrip()
    return texts


@torch.inference_mode()
def find(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World, rng: Random, num_pairs: int
) -> Vector:
    """Mean residual at the last token, where a mood is due: after cheerful text minus after gloomy text."""
    pairs = [contrast(world, rng) for _ in range(num_pairs)]
    seen: Vector = {}

    def mean(mood: str) -> Tensor:
        last = []
        for pair in pairs:
            model(**tokenizer(pair[mood], return_tensors="pt"))
            last.append(torch.stack([seen[layer] for layer in LAYERS]))
        return torch.stack(last).mean(0)  # (layers, H)

    with ExitStack() as hooks:
        for layer in LAYERS:

            def watch(module: object, args: object, output: Tensor, layer: int = layer) -> None:
                seen[layer] = output[0, -1]

            hooks.callback(model.model.layers[layer].register_forward_hook(watch).remove)
        difference = mean("cheerful") - mean("gloomy")
    return {layer: difference[i].clone() for i, layer in enumerate(LAYERS)}


def save(vector: Vector, config: LlamaConfig, path: Path, seed: int) -> None:
    """Write Whipstaff's vector file: tensors `resid_post.{layer}.add` and the metadata entry `whipstaff`."""
    about = {
        "format": 1,
        "method": "caa",
        "model": {
            "architecture": "LlamaForCausalLM",
            "hidden_size": config.hidden_size,
            "num_layers": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            "head_dim": config.head_dim,
        },
        "scale": SCALE,
        "where": "each_last",
        "description": DESCRIPTION,
        "provenance": {"made_by": "python -m whipstaff.server.demo.train", "seed": seed},
        "licence": "Apache-2.0",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"resid_post.{layer}.add": add.float().contiguous() for layer, add in vector.items()}
    save_file(tensors, path, metadata={"whipstaff": json.dumps(about)})


def load(path: Path) -> Vector:
    return {int(name.split(".")[1]): add for name, add in load_file(path).items()}


@contextmanager
def steered(model: LlamaForCausalLM, vector: Vector, scale: float) -> Iterator[None]:
    """Within: add scale * vector at the last prompt token and at every generated token (with a key-value cache)."""
    with ExitStack() as hooks:
        for layer, add in vector.items():

            def edit(module: object, args: object, output: Tensor, step: Tensor = scale * add) -> Tensor:
                return torch.cat([output[:, :-1], output[:, -1:] + step], dim=1)

            hooks.callback(model.model.layers[layer].register_forward_hook(edit).remove)
        yield
