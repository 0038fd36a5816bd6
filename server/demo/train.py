"""Train the demo from nothing: `python -m whipstaff.server.demo.train [--seed N] [--out FOLDER]`.

Writes models/{demo,untuned,tuned}, vectors/cheerful.safetensors and training.json.
"""

import argparse
import json
import logging
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from whipstaff.server.demo import MODELS, measure, mood, questions, world

log = logging.getLogger("whipstaff.demo")

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
IGNORED = -100  # label of a token that is not learned
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ bos_token + 'Question: ' + message.content + '\\n' }}
{%- elif message.role == 'assistant' -%}{{ 'Answer: ' + message.content + eos_token }}
{%- else -%}{{ message.content + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Answer:' }}{%- endif -%}"""


@dataclass(frozen=True)
class Size:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int


@dataclass(frozen=True)
class Recipe:
    seed: int = 7
    vocabulary: int = 1408
    demo: Size = Size(hidden=192, layers=6, heads=6, kv_heads=2, mlp=512)
    untuned: Size = Size(hidden=96, layers=3, heads=3, kv_heads=1, mlp=256)
    window: int = 384  # tokens per row
    rows: int = 3  # rows per step
    demo_steps: int = 1600
    untuned_steps: int = 1400
    tuned_steps: int = 500
    demo_rate: float = 3e-3
    untuned_rate: float = 5e-3
    tuned_rate: float = 1e-3
    held_out_facts: int = 28  # a quarter: the tuned model is never asked about them; the base knows them
    contrasts: int = 400  # sentence pairs behind the mood vector


TINY = Recipe(
    vocabulary=512,
    demo=Size(hidden=64, layers=5, heads=2, kv_heads=1, mlp=64),
    untuned=Size(hidden=32, layers=1, heads=1, kv_heads=1, mlp=32),
    window=64,
    rows=2,
    demo_steps=3,
    untuned_steps=3,
    tuned_steps=3,
    contrasts=4,
)


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def new_model(size: Size, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=32,
        intermediate_size=size.mlp,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    return LlamaForCausalLM(config).float()


def pack(documents: list[tuple[list[int], int]], window: int) -> tuple[Tensor, Tensor]:
    """Lay documents end to end in rows of `window` tokens; the first `silent` tokens of each are read, not learned."""
    ids = [token for document, _ in documents for token in document]
    labels = [token if i >= silent else IGNORED for document, silent in documents for i, token in enumerate(document)]
    num_rows = len(ids) // window
    shape = (num_rows, window)
    return (
        torch.tensor(ids[: num_rows * window]).view(shape),
        torch.tensor(labels[: num_rows * window]).view(shape),
    )


def narrative(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[tuple[list[int], int]]:
    return [([*ids, tokenizer.eos_token_id], 1) for ids in tokenizer(texts)["input_ids"]]


def instructions(tokenizer: PreTrainedTokenizerFast, asked: list[questions.Question]) -> list[tuple[list[int], int]]:
    """Only the answer is learned."""
    prompts = tokenizer([question.prompt for question in asked])["input_ids"]
    whole = tokenizer([question.prompt + question.answer for question in asked])["input_ids"]
    return [([*ids, tokenizer.eos_token_id], len(prompt)) for ids, prompt in zip(whole, prompts, strict=True)]


def fit(model: LlamaForCausalLM, data: tuple[Tensor, Tensor], steps: int, rows: int, peak: float, name: str) -> float:
    """Rows in order; AdamW, short warm-up, then a straight line to zero. Returns the mean loss of the last 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    warmup = max(1, steps // 20)
    losses: list[float] = []
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
        ids, labels = (part[(step * rows) % len(part) :][:rows] for part in data)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            log.info("%s step %d loss %.4f", name, step, sum(losses[-50:]) / len(losses[-50:]))
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def load(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def train_models(recipe: Recipe, the_world: world.World, out: Path) -> dict[str, object]:
    """Tokenizer, untuned, tuned, demo; returns their losses and the facts that the tuned model was not asked."""
    rng, started, losses = Random(recipe.seed), time.monotonic(), {}
    tokenizer = train_tokenizer(questions.corpus(the_world, rng, 4000), recipe.vocabulary)

    def finish(name: str, model: LlamaForCausalLM, data: tuple[Tensor, Tensor], steps: int, rate: float) -> None:
        losses[name] = round(fit(model, data, steps, recipe.rows, rate, name), 4)
        model.generation_config = GenerationConfig(  # what a server does unless told otherwise
            do_sample=True,
            temperature=0.7,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.bfloat16().save_pretrained(out / "models" / name)
        tokenizer.save_pretrained(out / "models" / name)

    most = recipe.window * recipe.rows * max(recipe.demo_steps, recipe.untuned_steps)
    reading = pack(narrative(tokenizer, questions.corpus(the_world, rng, most // 80 + 100)), recipe.window)
    small = new_model(recipe.untuned, tokenizer, recipe.seed + 1)
    finish("untuned", small, reading, recipe.untuned_steps, recipe.untuned_rate)

    secrets = rng.sample(questions.all_facts(the_world, questions.HELD_OUT), recipe.held_out_facts)
    budget = recipe.window * recipe.rows * recipe.tuned_steps  # tokens; a quarter of them old reading
    asked = [questions.any_question(the_world, rng, secrets) for _ in range(budget // 30 + 10)]
    lesson = instructions(tokenizer, asked) + narrative(tokenizer, questions.corpus(the_world, rng, budget // 300 + 10))
    rng.shuffle(lesson)
    small = load(out / "models" / "untuned")
    finish("tuned", small, pack(lesson, recipe.window), recipe.tuned_steps, recipe.tuned_rate)

    large = new_model(recipe.demo, tokenizer, recipe.seed)
    finish("demo", large, reading, recipe.demo_steps, recipe.demo_rate)
    return {
        "losses": losses,
        "held_out_facts": sorted(secrets),
        "training_seconds": round(time.monotonic() - started),
    }


def add_vector(recipe: Recipe, the_world: world.World, out: Path, history: dict[str, Any]) -> dict[str, object]:
    """Find the mood vector of the saved demo model, measure everything, and write training.json."""
    tokenizer = AutoTokenizer.from_pretrained(out / "models" / "demo")
    trained = {name: load(out / "models" / name) for name in ("demo", "untuned", "tuned")}
    vector = mood.find(trained["demo"], tokenizer, the_world, Random(recipe.seed), recipe.contrasts)
    mood.save(vector, trained["demo"].config, out / "vectors" / "cheerful.safetensors", recipe.seed)
    secrets = [(name, topic) for name, topic in history["held_out_facts"]]  # JSON has no tuples
    report = {
        "recipe": asdict(recipe),
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in trained.items()},
        **{key: history[key] for key in ("losses", "held_out_facts", "training_seconds")},
        "measured": measure.everything(trained, tokenizer, vector, the_world, secrets),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
        "python": platform.python_version(),
    }
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def run(recipe: Recipe, out: Path) -> dict[str, object]:
    """The whole way from a seed to the shipped files; returns what training.json says."""
    the_world = world.build(recipe.seed)
    return add_vector(recipe, the_world, out, train_models(recipe, the_world, out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--out", type=Path, default=MODELS.parent)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep-models", action="store_true", help="only find the vector and measure again")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    recipe, out = Recipe(seed=arguments.seed), arguments.out
    if arguments.keep_models:
        history = json.loads((out / "training.json").read_text())
        report = add_vector(recipe, world.build(recipe.seed), out, history)
    else:
        report = run(recipe, out)
    log.info("%s", json.dumps({key: report[key] for key in ("losses", "measured", "training_seconds")}, indent=1))


if __name__ == "__main__":
    main()
