"""What the server that most tests of HTTP share is started with, beside the models and vectors of every test server:
heads of decoding methods, soft prompts and presets."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from asking import PAIR
from serving import HIDDEN, SHAPE, VOCABULARY, Server, save_models, save_vectors, serving
from torch import Tensor
from transformers import LlamaForCausalLM

from whipstaff.steering import vector_file
from whipstaff.steering.vector_file import Header

WORDS = [40, 77, 130, 205, 66]  # tokens whose embeddings are the rows of the soft prompt "words"
PUSHED: dict[str, Any] = {"vector": "push", "scale": 0.5, "where": "all"}
PRESETS: dict[str, dict[str, Any]] = {
    "mixed": {"decoding": [PAIR], "steering": [PUSHED]},
    "early": {"decoding": [{"method": "dola", "layers": [0, 1, 2], "relative_top": 0}]},
}
HEADS = {  # and their methods
    "defer": "defer_head",
    "judge": "token_classifier",
    "narrow": "token_classifier",
    "tempers": "temperature_head",
    "wary": "prefix_classifier",
}
SOFT = ("words", "noise")


@contextmanager
def serving_all(folder: Path) -> Iterator[Server]:
    """A server that has it all. Nobody can upload to it: what one test leaves there, no other can find."""
    made = save_models(folder)
    save_vectors(folder / "vectors")
    save_heads(folder / "heads")
    save_soft(folder / "soft", made["base"])
    for name, fields in PRESETS.items():
        (folder / f"{name}.json").write_text(json.dumps({"default": fields}))
    flags = [
        *("--vectors", str(folder / "heads"), "--vectors", str(folder / "soft")),
        *(word for name in PRESETS for word in ("--presets", str(folder / f"{name}.json"))),
        *("--lookahead", "--attention-rows", "--attention-layers", "0,2", "--hidden-states", "3"),
    ]
    with serving(folder, *flags) as running:
        yield running


def save_heads(folder: Path) -> None:
    folder.mkdir()
    random = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    files: dict[str, dict[str, Tensor]] = {
        "defer": {"weight": normal(HIDDEN) / 4, "bias": torch.tensor(0.3)},
        "judge": {"weight": normal(VOCABULARY, HIDDEN)},
        "narrow": {"weight": normal(40, HIDDEN)},
        "tempers": {
            **{"temperatures": torch.tensor([0.0, 0.7, 1.3]), "w0": normal(8, HIDDEN), "b0": normal(8)},
            **{"w1": normal(8, 8), "b1": normal(8), "w2": normal(3, 8), "b2": normal(3)},
        },
        "wary": {"weight": normal(2, HIDDEN), "bias": torch.tensor([0.5, -0.5])},
    }
    for name, tensors in files.items():
        vector_file.write(folder / f"{name}.safetensors", Header(method=HEADS[name], model=SHAPE), tensors)


def save_soft(folder: Path, base: str) -> None:
    """Rows that are embeddings of the base model's tokens, and rows that are nobody's."""
    folder.mkdir()
    embeddings = LlamaForCausalLM.from_pretrained(base).get_input_embeddings().weight.detach()
    noise = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0))
    for name, rows in zip(SOFT, (embeddings[WORDS], noise), strict=True):
        vector_file.write(folder / f"{name}.safetensors", Header(method="soft_prompt", model=SHAPE), {"rows": rows})
