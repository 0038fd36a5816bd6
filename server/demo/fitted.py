"""Fit the demo's vector files: `python -m whipstaff.server.demo.fitted [--only NAME,NAME] [--out FOLDER]`.

One small file for each method that `whipstaff fit` makes and the demo's model can show, all from the embedded world:
the two moods of its narrator, its people's facts, and questions that it answers with a story unless moved to answer.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from whipstaff.server.demo import MODELS, VECTORS, mood, questions, world
from whipstaff.server.demo.grammar import SHARED
from whipstaff.steering import vector_file
from whipstaff.steering.fit import fitting
from whipstaff.steering.fit.local import LocalModel
from whipstaff.steering.fit.options import Options

log = logging.getLogger("whipstaff.demo")

MORNING = "In the morning Mara opened the door, and"  # what shows a mood
EVENING = "In the evening Mara sat near the"  # what has many answers, of which demonstrations show one
QUESTION = questions.PROMPT.format("Where does Mara live?")
FORM = "Question: {prompt}\nAnswer: {response}"
Lines = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class File:
    """How one of the demo's files is made, and a request that shows it."""

    method: str
    data: Callable[[world.World, Random], Lines]
    description: str
    options: Mapping[str, Any] = field(default_factory=dict)
    prompt: str = MORNING  # "": methods that read it say what shows it
    steering: Mapping[str, Any] = field(default_factory=dict)  # of that request, beside the vector's own name

    @property
    def example(self) -> dict[str, Any] | None:
        return {"prompt": self.prompt, "steering": dict(self.steering)} if self.prompt else None


def pairs(the_world: world.World, rng: Random, num: int = 240) -> Lines:
    """Scenes told in either mood, up to where the next word shows it."""
    for _ in range(num):
        told = mood.contrast(the_world, rng)
        yield {"positive": told["cheerful"], "negative": told["gloomy"]}


def many_pairs(the_world: world.World, rng: Random) -> Lines:
    yield from pairs(the_world, rng, 600)


def moods(the_world: world.World, rng: Random) -> Lines:
    for pair in pairs(the_world, rng, 200):
        yield {"prompt": pair["positive"], "class": "cheerful"}
        yield {"prompt": pair["negative"], "class": "gloomy"}


def opening(the_world: world.World, rng: Random) -> Lines:
    yield {
        "positive": "Everyone laughed and danced in the sunshine",
        "negative": "Everyone wept and shivered in the dark",
    }


def facts(the_world: world.World, rng: Random) -> Lines:
    """Every fact as a question, with the right answer and two of other people."""
    for name, topic in questions.all_facts(the_world, questions.HELD_OUT):
        own = the_world.people[name].facts()
        others = [person.facts() for person in the_world.people.values() if person.facts()[topic] != own[topic]]
        chosen = rng.sample(others, 2)
        wrong = [own | {key: other[key] for key in {topic, "where"} if topic in ("home", key)} for other in chosen]
        said = [questions.ANSWERS[topic].format_map(each) for each in (own, *wrong)]
        question = questions.DIRECT[topic][0].format_map(own)
        yield {"question": question, "right": said[:1], "wrong": said[1:]}


def answers(the_world: world.World, rng: Random, num: int = 320) -> Lines:
    """Questions, and answers in the manner of the small tuned model."""
    known = questions.all_facts(the_world, questions.HELD_OUT)
    for name, topic in rng.choices(known, k=num):
        asked = questions.ask(the_world, name, topic, rng.choice(questions.SEEN[topic]))
        prompt = asked.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        yield {"prompt": prompt, "response": asked.answer.strip()}


def told_and_answered(the_world: world.World, rng: Random, num: int = 200) -> Lines:
    """Stories, which the demo tells better than the small tuned model, and questions, which it does not answer."""
    for row in answers(the_world, rng, num):
        yield {"prompt": questions.PROMPT.format(row["prompt"]), "response": f" {row['response']}"}
        first, _, rest = the_world.story(rng, num_sentences=4).partition(". ")
        yield {"prompt": f"{first}.", "response": f" {rest}"}


def grounded(the_world: world.World, rng: Random) -> Lines:
    """Answers of which the first wrong word, and all behind it, are wrong."""
    for row in facts(the_world, rng):
        (right,) = row["right"]
        said = {"question": row["question"], "group": row["question"]}
        yield {**said, "response": right, "spans": [[0, len(right), 1]]}
        for wrong in row["wrong"]:
            same = next(index for index, pair in enumerate(zip(right, wrong, strict=False)) if len(set(pair)) > 1)
            first = wrong.rfind(" ", 0, same) + 1
            yield {**said, "response": wrong, "spans": [[0, first, 1], [first, len(wrong), 0]]}


def sunny(the_world: world.World, rng: Random) -> Lines:
    """Beginnings of sentences, and the one word of the ten that could follow."""
    names, spots = sorted(the_world.people), SHARED["when"]
    patterns = ("{when} {name} sat near the", "{when} {name} met {other} near the", "{when} {name} went to the")
    for _ in range(80):
        name, other = rng.sample(names, 2)
        yield {"input": rng.choice(patterns).format(when=rng.choice(spots), name=name, other=other), "output": "sunny"}


SENTENCES = {"template": "none"}  # texts stand as they are
ICL = {"template": "{prompt} {response}", "shots": 4, "trials": 24}
FILES: dict[str, File] = {
    "cheerful_repe": File(
        "repe", pairs, "cheerful storytelling, by representation reading", SENTENCES | {"layers": "3,4", "scale": 8}
    ),
    "cheerful_control": File(
        "control_vector", pairs, "cheerful storytelling, as a control vector", SENTENCES | {"layers": "2-4", "scale": 6}
    ),
    "cheerful_shift": File(
        "shift_vector",
        pairs,
        "cheerful storytelling, from the mean over whole scenes",
        SENTENCES | {"layers": "3,4", "read": "last", "scale": 8},
    ),
    "cheerful_opening": File(
        "actadd",
        opening,
        "a merry sentence's states, on a prompt's first tokens",
        SENTENCES | {"layers": "3", "scale": 4},
    ),
    "cheerful_plane": File(
        "angular", pairs, "the plane of moods, in which activations are turned", SENTENCES, steering={"angle": 200}
    ),
    "cheerful_direction": File(
        "add_direction", pairs, "the direction of a cheerful mood", SENTENCES | {"layers": "4", "scale": 8}
    ),
    "cheerful_ablated": File(
        "directional_ablation", pairs, "takes the direction of moods away at every layer", SENTENCES | {"layers": "4"}
    ),
    "gladly": File(
        "lofit",
        answers,
        "heads that make the storyteller answer questions",
        {"num_heads": 8, "steps": 240, "lr": 2e-2},
        QUESTION,
    ),
    **{
        f"gladly_{method}": File(
            method,
            answers,
            "a low-rank edit of the prompt that makes the storyteller answer questions",
            {"layers": "3", "rank": 4, "steps": 240, "lr": 1e-2},
            QUESTION,
        )
        for method in ("loreft", "direft", "noreft", "nodireft", "consreft", "lobireft")
    },
    "gladly_prompt": File(
        "soft_prompt",
        answers,
        "rows before a question that make the storyteller answer it",
        {"rows": 16, "steps": 400, "lr": 1e-1},
        QUESTION,
    ),
    "gladly_defers": File(
        "defer_head",
        told_and_answered,
        "where the small tuned model should say the next token",
        SENTENCES | {"assistant": str(MODELS / "tuned")},
        "",
    ),
    "well_said": File(
        "prefix_classifier",
        grounded,
        "tells what is so in the world from what is not, token by token",
        {"template": FORM},
        "",
    ),
    "honest": File(
        "iti",
        facts,
        "heads that tell the world's facts from what is not so",
        {"template": FORM, "num_heads": 6},
        QUESTION,
    ),
    "moods": File(
        "sae",
        many_pairs,
        "features of a sparse autoencoder, the first of which is active where the mood is cheerful",
        SENTENCES | {"layers": "4", "features": 64},
        steering={"features": [{"feature": 0, "add": 8}]},
    ),
    "moods_raised": File(
        "lf_steering",
        many_pairs,
        "features of the same autoencoder that tell a cheerful mood, raised where they are active",
        SENTENCES | {"layers": "4", "features": 64},
        steering={"bias": 4},
    ),
    "is_cheerful": File(
        "probe",
        moods,
        "reads whether a prompt is cheerful, for `when`",
        SENTENCES | {"layers": "1-2"},
        "Mara was happy and sang a merry song. The sun shone and children danced. " + MORNING,
        {"vector": "cheerful", "scale": -8, "when": {"above": 0}},
    ),
    "sunny_function": File(
        "function_vector",
        sunny,
        "what heads write after demonstrations",
        ICL | {"corrupted": 6},
        EVENING,
        {"scale": 6},
    ),
    "sunny_heads": File(
        "site",
        sunny,
        "heads moved towards what demonstrations make of them",
        ICL | {"steps": 100},
        EVENING,
        {"where": "each_last"},
    ),
    "sunny_needed": File("head_scale", sunny, "without the heads that demonstrations need", ICL, EVENING, {"scale": 3}),
    "sunny_task": File(
        "task_vector", sunny, "the state that demonstrations leave", ICL, EVENING, {"where": "each_last"}
    ),
}


def make(name: str, source: LocalModel, the_world: world.World, seed: int, folder: Path) -> vector_file.Header:
    """Fit one file into a folder; its header."""
    what = FILES[name]
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / f"{name}.jsonl"
        rows = what.data(the_world, Random(seed))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = Options(seed=seed, **what.options)
        job = fitting.prepared(what.method, source, [data], options, Path(place) / "rows", say=log.info)
        made = fitting.fit(what.method, job)
    said = {"description": what.description, "licence": "Apache-2.0", "example": what.example}
    made_by = {**made.header.provenance, "made_by": "python -m whipstaff.server.demo.fitted"}
    header = made.header.model_copy(update=said | {"provenance": made_by})
    vector_file.write(folder / f"{name}.safetensors", header, made.tensors)
    return header


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(FILES))
    parser.add_argument("--out", type=Path, default=VECTORS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    seed = json.loads((MODELS.parent / "training.json").read_text())["recipe"]["seed"]
    source, the_world = LocalModel.load(str(MODELS / "demo"), device="cpu"), world.build(seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        header = make(name, source, the_world, seed, arguments.out)
        log.info("%s: %s", name, json.dumps(header.provenance["score"]))


if __name__ == "__main__":
    main()
