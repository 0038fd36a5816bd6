"""What the trained demo can do, in numbers: right answers by kind of decoding, and cheerful words by dose."""

import torch
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from whipstaff.server.demo import mood, questions
from whipstaff.server.demo.world import World, mood_words, words

Mixture = list[tuple[float, LlamaForCausalLM]]  # logits = sum of weight * the model's logits

OPENINGS = (
    "In the morning {} opened the door, and",
    "{} looked out of the window and saw",
    "After supper {} walked",
    "The next day {} woke up",
    "That night {} felt",
    "Then {}",
)


def proxy_tuned(models: dict[str, LlamaForCausalLM], alpha: float = 1.0) -> Mixture:
    return [(1.0, models["demo"]), (alpha, models["tuned"]), (-alpha, models["untuned"])]


@torch.inference_mode()
def generate(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    max_tokens: int = 60,
    temperature: float = 0.0,
) -> list[str]:
    """Continue every prompt until <eos>; greedy at temperature 0."""
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    step, mask = batch["input_ids"], batch["attention_mask"]  # (B, T); mask is 0 on padding
    caches = [DynamicCache() for _ in mixture]
    written = step[:, :0]
    for _ in range(max_tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
        inputs = {"input_ids": step, "attention_mask": mask, "position_ids": positions}
        logits = sum(
            weight * model(**inputs, past_key_values=cache).logits[:, -1]
            for (weight, model), cache in zip(mixture, caches, strict=True)
        )  # (B, V)
        if temperature:
            step = torch.multinomial((logits / temperature).softmax(-1), 1)
        else:
            step = logits.argmax(-1, keepdim=True)
        written = torch.cat([written, step], dim=1)
        mask = torch.cat([mask, torch.ones_like(step)], dim=1)
        if (written == tokenizer.eos_token_id).any(-1).all():
            break
    return [tokenizer.decode(row).split(tokenizer.eos_token)[0] for row in written]


def share_right(mixture: Mixture, tokenizer: PreTrainedTokenizerFast, asked: list[questions.Question]) -> float:
    answers = generate(mixture, tokenizer, [question.prompt for question in asked], max_tokens=40)
    return sum(question.key in answer for question, answer in zip(asked, answers, strict=True)) / len(asked)


def share_cheerful(texts: list[str]) -> float:
    """Cheerful words among all mood words; 0.5 when there are none."""
    cheerful, gloomy = mood_words()
    found = [word in cheerful for text in texts for word in words(text) if word in cheerful | gloomy]
    return sum(found) / len(found) if found else 0.5


def held_out_questions(world: World, facts: list[questions.Fact]) -> list[questions.Question]:
    """Every phrasing that nobody was trained on, for each of the facts."""
    return [
        questions.ask(world, name, topic, phrasing) for name, topic in facts for phrasing in questions.HELD_OUT[topic]
    ]


def everything(
    models: dict[str, LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    vector: mood.Vector,
    world: World,
    secrets: list[questions.Fact],
) -> dict[str, dict[str, float]]:
    """The numbers for training.json. `secrets`: the facts that the tuned model was never asked about."""
    taught = [fact for fact in questions.all_facts(world, questions.HELD_OUT) if fact not in secrets]
    groups = {"taught_facts": taught, "held_out_facts": secrets}
    ways: dict[str, Mixture] = {
        "base": [(1.0, models["demo"])],
        "tuned_alone": [(1.0, models["tuned"])],
        "proxy_tuned": proxy_tuned(models),
    }
    numbers = {
        f"right_answers_{group}": {
            way: round(share_right(mixture, tokenizer, held_out_questions(world, facts)), 3)
            for way, mixture in ways.items()
        }
        for group, facts in groups.items()
    }
    prompts = [opening.format(name) for opening in OPENINGS for name in sorted(world.people)[:6]]
    for temperature in (0.0, 0.7):
        shares = {}
        for scale in (-mood.SCALE, 0.0, mood.SCALE):
            torch.manual_seed(0)
            with mood.steered(models["demo"], vector, scale):
                texts = generate(ways["base"], tokenizer, prompts, temperature=temperature)
            shares[f"{scale:+g}"] = round(share_cheerful(texts), 3)
        numbers[f"share_of_cheerful_words_at_temperature_{temperature:g}"] = shares
    return numbers
