"""The demo model is small, readable, steerable and tunable, and its training script runs."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from whipstaff.server.demo import MODELS, VECTORS, fitted, measure, mood, questions, train, world
from whipstaff.steering import vector_file
from whipstaff.steering.algebra import numbers_of
from whipstaff.steering.fit.local import LocalModel
from whipstaff.steering.fit.recipes import RECIPES

REPORT = json.loads((MODELS.parent / "training.json").read_text())
WORLD = world.build(REPORT["recipe"]["seed"])
NAMES = ("demo", "untuned", "tuned")
NOT_SHIPPED = ("mote", "token_classifier")  # no experts; large, and another classifier shows the same
PROMPTS = [opening.format(name) for opening in measure.OPENINGS for name in ("Mara", "Tobin")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODELS / "demo")


@pytest.fixture(scope="module")
def models() -> dict[str, LlamaForCausalLM]:
    return {name: LlamaForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval() for name in NAMES}


@pytest.fixture(scope="module")
def base(models: dict[str, LlamaForCausalLM]) -> measure.Mixture:
    return [(1.0, models["demo"])]


@pytest.fixture(scope="module")
def known_words() -> set[str]:
    return {word for text in questions.corpus(WORLD, Random(0), 3000) for word in world.words(text)}


def flaws(prompt: str, completion: str, known_words: set[str]) -> list[str]:
    """What keeps a completion from reading as English: made-up words, an opening without a sentence, no end."""
    text = prompt + completion
    found = [f"no word: {word}" for word in world.words(completion) if word not in known_words]
    found += [] if len(world.words(completion)) >= 3 else [f"too short: {completion}"]
    return found + ([] if text.endswith((".", '."')) else [f"does not end: {text[-30:]}"])


def repetitions(prompt: str, completion: str) -> list[str]:
    sentences = (prompt + completion).split(". ")
    return [f"said twice: {s}" for s in set(sentences) if sentences.count(s) > 1]


def test_everything_together_is_small() -> None:
    files = [file for folder in (MODELS, VECTORS) for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12_000_000


@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_a_complete_folder_with_the_same_vocabulary(name: str) -> None:
    folder = MODELS / name
    config = json.loads((folder / "config.json").read_text())
    assert (folder / "tokenizer.json").read_bytes() == (MODELS / "demo" / "tokenizer.json").read_bytes()
    assert config["vocab_size"] == len(AutoTokenizer.from_pretrained(folder))
    assert (folder / "model.safetensors").is_file()


def test_the_vector_file_says_which_model_it_fits() -> None:
    config = json.loads((MODELS / "demo" / "config.json").read_text())
    with safe_open(VECTORS / "cheerful.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["whipstaff"])
        sizes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
    assert sizes == {f"resid_post.{layer}.add": (config["hidden_size"],) for layer in mood.LAYERS}
    assert about["model"]["hidden_size"] == config["hidden_size"]
    assert about["model"]["num_layers"] == config["num_hidden_layers"] > max(mood.LAYERS)


def test_every_fitted_file_is_there_with_a_request_that_shows_it() -> None:
    assert {path.stem for path in VECTORS.iterdir()} == {"cheerful", *fitted.FILES}
    assert {file.method for file in fitted.FILES.values()} | {"caa", *NOT_SHIPPED} == {
        one.method for one in RECIPES.values()
    }
    shape = LocalModel.load(str(MODELS / "demo"), device="cpu").shape
    for name, file in fitted.FILES.items():
        vector = vector_file.read(VECTORS / f"{name}.safetensors")
        vector.check_fits(shape)
        assert vector.header.method == file.method
        assert vector.header.example == file.example


@pytest.mark.parametrize("name", ["cheerful_repe", "cheerful_opening"])
def test_the_fitting_script_makes_what_is_shipped(name: str, tmp_path: Path) -> None:
    fitted.make(name, LocalModel.load(str(MODELS / "demo"), device="cpu"), WORLD, REPORT["recipe"]["seed"], tmp_path)
    ours, shipped = (numbers_of(vector_file.read(folder / f"{name}.safetensors")) for folder in (tmp_path, VECTORS))
    assert ours.keys() == shipped.keys()
    for part, numbers in ours.items():
        torch.testing.assert_close(numbers, shipped[part], atol=1e-3, rtol=1e-2)


def test_the_chat_template_writes_the_trained_form(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "user", "content": "Where does Mara live?"}]
    written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert written == "<bos>" + questions.PROMPT.format("Where does Mara live?")
    assert tokenizer(questions.PROMPT)["input_ids"][0] == tokenizer.bos_token_id


def test_the_world_is_the_same_for_the_same_seed() -> None:
    def written(seed: int) -> list[str]:
        return questions.corpus(world.build(seed), Random(seed), 50)

    assert written(3) == written(3)
    assert written(3) != written(4)


def test_greedy_completions_are_sentences(
    base: measure.Mixture, tokenizer: PreTrainedTokenizerFast, known_words: set[str]
) -> None:
    """Greedily so small a model repeats itself; that is not asked of it here."""
    completions = measure.generate(base, tokenizer, PROMPTS, max_tokens=250)
    bad = [flaws(*pair, known_words) for pair in zip(PROMPTS, completions, strict=True)]
    assert sum(map(bool, bad)) <= 1, bad


def test_sampled_completions_are_varied_sentences(
    base: measure.Mixture, tokenizer: PreTrainedTokenizerFast, known_words: set[str]
) -> None:
    torch.manual_seed(0)
    completions = measure.generate(base, tokenizer, PROMPTS, max_tokens=250, temperature=0.7)
    pairs = list(zip(PROMPTS, completions, strict=True))
    bad = [flaws(*pair, known_words) + repetitions(*pair) for pair in pairs]
    assert sum(map(bool, bad)) <= 2, bad
    assert len(set(completions)) == len(PROMPTS)


def test_the_readability_check_can_fail(known_words: set[str]) -> None:
    assert flaws("Mara", " lives in far Blorp.", known_words)
    assert flaws("Mara", " is a baker. She is a", known_words)
    assert repetitions("Mara", " is a baker. She is sad. She is sad. She sang.")


def test_mood_follows_the_sign_of_the_scale(
    models: dict[str, LlamaForCausalLM], base: measure.Mixture, tokenizer: PreTrainedTokenizerFast
) -> None:
    shares = []
    for scale in (-mood.SCALE, 0.0, mood.SCALE):
        with mood.steered(models["demo"], mood.load(VECTORS / "cheerful.safetensors"), scale):
            shares.append(measure.share_cheerful(measure.generate(base, tokenizer, PROMPTS)))
    assert shares[0] < 0.2 < shares[1] < 0.9 < shares[2], shares


def test_steered_completions_stay_readable(
    models: dict[str, LlamaForCausalLM],
    base: measure.Mixture,
    tokenizer: PreTrainedTokenizerFast,
    known_words: set[str],
) -> None:
    for scale in (-mood.SCALE, mood.SCALE):
        with mood.steered(models["demo"], mood.load(VECTORS / "cheerful.safetensors"), scale):
            completions = measure.generate(base, tokenizer, PROMPTS, max_tokens=250)
        bad = [flaws(*pair, known_words) for pair in zip(PROMPTS, completions, strict=True)]
        assert sum(map(bool, bad)) <= 3, bad


def test_proxy_tuning_answers_where_the_base_does_not(
    models: dict[str, LlamaForCausalLM], base: measure.Mixture, tokenizer: PreTrainedTokenizerFast
) -> None:
    asked = measure.held_out_questions(WORLD, questions.all_facts(WORLD, questions.HELD_OUT)[::3])
    assert measure.share_right(base, tokenizer, asked) < 0.2
    assert measure.share_right(measure.proxy_tuned(models), tokenizer, asked) > 0.75
    [answer] = measure.generate(measure.proxy_tuned(models), tokenizer, [asked[0].prompt])
    assert answer == asked[0].answer


def test_the_training_script_runs_end_to_end(tmp_path: Path) -> None:
    report = train.run(train.TINY, tmp_path)
    written = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert {f"models/{name}/model.safetensors" for name in NAMES} <= written
    assert {"training.json", "vectors/cheerful.safetensors"} <= written
    losses = report["losses"]
    assert isinstance(losses, dict) and set(losses) == set(NAMES)
