"""A tiny random model of LLaVA's architecture, which sees images of 28 x 28 pixels as four tokens, and how to serve it
where there is no torchvision."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from serving import MODEL, VOCABULARY, Server, make_tokenizer, serving_demo
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE, NUM_IMAGE, PIXELS, PATCH = "<image>", 4, 28, 14  # the token of an image, how many it has; sizes in pixels
MAX_LEN = 256


def save(folder: Path) -> str:
    """Write a checkpoint with a tokenizer and what makes pixels of images; the folder as a string."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    text = LlamaConfig(
        vocab_size=VOCABULARY + 8,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=PIXELS,
        patch_size=PATCH,
        projection_dim=64,
        initializer_range=0.2,
    )
    token = tokenizer.convert_tokens_to_ids(IMAGE)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=token,
        image_seq_length=NUM_IMAGE,
        initializer_range=0.15,
    )
    model = LlavaForConditionalGeneration(config)
    model.lm_head.weight.data[token:] = 0  # it never says that token, nor those that are none
    model.save_pretrained(folder)
    _name_as_published(folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": PIXELS}, "crop_size": {"height": PIXELS, "width": PIXELS}}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor", **size}))
    own = {"processor_class": "LlavaProcessor", "patch_size": PATCH, "image_token": IMAGE}
    own |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    (folder / "processor_config.json").write_text(json.dumps(own))
    return str(folder)


def _name_as_published(weights: Path) -> None:
    """As the checkpoints that there are name an image's encoder, and vLLM expects it; transformers reads both."""
    plain, published = "vision_tower.", "vision_tower.vision_model."
    tensors = {name.replace(plain, published): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Server]:
    """A server of it, by anybody's key."""
    own = ("--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", str(MAX_LEN), *flags)
    names = str(Path(__file__).parents[1] / "without_torchvision")
    with serving_demo(folder, save(folder / "llava"), *own, PYTHONPATH=names) as server:
        yield server


class Seeing:
    """A model of transformers' that has seen images, as one of texts."""

    def __init__(self, model: Any, pixels: Tensor) -> None:
        """`pixels`: (N, 3, H, W) of the images in each text."""
        self._model, self._pixels = model, pixels

    def __call__(self, ids: Tensor, **more: Any) -> Any:
        """(S, T) texts."""
        return self._model(input_ids=ids, pixel_values=self._pixels.repeat(len(ids), 1, 1, 1), **more)
