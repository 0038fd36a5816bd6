"""What the suite asks: methods at their published or fitted setting, their rivals, and combinations of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from whipstaff.server.demo.tasks import Item

Body = dict[str, Any]
TUNED: Body = {"expert": "tuned", "antiexpert": "untuned"}


class Asked(NamedTuple):
    """An item as a variant asks it."""

    prompt: str
    body: Body


@dataclass(frozen=True)
class Variant:
    """One row of the table: plain, a method, a rival."""

    name: str
    family: str
    tasks: tuple[str, ...]
    body: Callable[[Item], Asked]
    is_rival: bool = False
    setting: str = ""  # in words, for the table
    scoring: Callable[[Item], Asked] | None = None  # without masks, which would leave answers no probability
    samples: bool = False  # draws, several times an item, where the task is read from one greedy answer otherwise


@dataclass(frozen=True)
class Grid:
    """Activation methods by logits methods, on one task."""

    task: str
    activations: tuple[str, ...]
    logits: tuple[str, ...]


def same(**body: Any) -> Callable[[Item], Asked]:
    """The item's prompt under the same fields, whatever the item."""
    return lambda item: Asked(item.prompt, body)


def shown(item: Item) -> Asked:
    """After the item's solved examples."""
    return Asked(item.shots + item.prompt, {})


def _decoding(name: str, family: str, *tasks: str, said: str = "", bare: Body | None = None, **params: Any) -> Variant:
    """A method of `decoding`. `bare`: its parameters where answers are scored."""
    entry = {"method": name, **params}
    scoring = None if bare is None else same(decoding=[entry | bare])
    label = f"{name}{said and f' {said}'}"
    return Variant(label, family, tasks, same(decoding=[entry]), setting=_words(params), scoring=scoring)


def _steering(vector: str, family: str, *tasks: str, said: str = "", **params: Any) -> Variant:
    entry = {"vector": vector, **params}
    return Variant(f"{said} `{vector}`", family, tasks, same(steering=[entry]), setting=_words(params) or "as fitted")


def _rival(name: str, family: str, *tasks: str, ask: Callable[[Item], Asked] | None = None, **body: Any) -> Variant:
    return Variant(name, family, tasks, ask or same(**body), is_rival=True, setting=_words(body))


def _words(params: Body) -> str:
    return ", ".join(f"{key} {value}" for key, value in params.items() if not isinstance(value, dict | list))


def _without_context(method: str, **params: Any) -> Callable[[Item], Asked]:
    """A contrast with the same prompt without its document."""

    def asked(item: Item) -> Asked:
        less = item.prompt.removeprefix(item.context)
        entry = {"method": method, **params, "negative_prompt" if method == "cfg" else "prompt_without": less}
        return Asked(item.prompt, {"decoding": [entry]})

    return asked


def _highlighted(item: Item) -> Asked:
    """SH2 on the document; where there is none, on the whole prompt."""
    entry = {"method": "sh2", "alpha": 6, "key_num": 10} | ({"context": item.context} if item.context else {})
    return Asked(item.prompt, {"decoding": [entry]})


def _without(item: Item) -> Asked:
    return Asked(item.prompt.removeprefix(item.context), {})


def _again(item: Item) -> Asked:
    return Asked(item.context + item.prompt, {})


TRUTH, ANSWERING, CONTEXT, MOOD = "truth", "answering", "faithfulness", "mood"
SHOTS, REPEATING, ENDING, TEMPERATURE = "in context", "repetition", "ending", "temperature"
_DOCUMENTS = ("contradictions", "told moods")
_CHOICES = ("misconceptions", "friends")
ANSWERERS = ("gladly_loreft", "gladly_direft", "gladly_noreft", "gladly_nodireft", "gladly_consreft", "gladly_lobireft")

VARIANTS: tuple[Variant, ...] = (
    _steering("honest", TRUTH, *_CHOICES, said="ITI"),
    _steering("honest", TRUTH, *_CHOICES, said="ITI at a third", scale=5),
    _decoding("proxy_tuning", TRUTH, *_CHOICES, **TUNED),
    _decoding("contrastive", TRUTH, *_CHOICES, amateur="untuned", bare={"alpha": 0}),
    _decoding("contrastive_beta", TRUTH, *_CHOICES, amateur="untuned", bare={"alpha": 0}),
    _decoding("dola", TRUTH, *_CHOICES, bare={"relative_top": 0}),
    Variant("sh2", TRUTH, _CHOICES, _highlighted, setting="alpha 6, key_num 10"),
    Variant("cad against the gossip", TRUTH, ("misconceptions",), _without_context("cad", alpha=-0.5), setting="-0.5"),
    _rival("gossip left out", TRUTH, "misconceptions", ask=_without),
    _decoding("proxy_tuning", ANSWERING, "answers", **TUNED),
    _decoding("dexperts", ANSWERING, "answers", **TUNED),
    _decoding("adapter_free_ensemble", ANSWERING, "answers", weights={"tuned": 0.5}),
    _steering("gladly", ANSWERING, "answers", said="LoFiT"),
    *(_steering(name, ANSWERING, "answers", said=name.removeprefix("gladly_")) for name in ANSWERERS),
    _steering("honest", ANSWERING, "answers", said="ITI"),
    _decoding("contrastive", ANSWERING, "answers", amateur="untuned"),
    _decoding("dola", ANSWERING, "answers"),
    Variant("sh2", ANSWERING, ("answers",), _highlighted, setting="alpha 6, key_num 10"),
    _rival("few-shot, 3", ANSWERING, "answers", ask=shown),
    _rival(
        "the small tuned model alone",
        ANSWERING,
        "answers",
        decoding=[{"method": "streams", "base_weight": 0, "streams": [{"weight": 1, "model": "tuned"}]}],
    ),
    Variant("cad", CONTEXT, _DOCUMENTS, _without_context("cad", alpha=0.5), setting="alpha 0.5"),
    Variant("cad, 1", CONTEXT, _DOCUMENTS, _without_context("cad", alpha=1.0), setting="alpha 1"),
    Variant("cfg", CONTEXT, _DOCUMENTS, _without_context("cfg", guidance_scale=1.5), setting="guidance_scale 1.5"),
    Variant("sh2", CONTEXT, _DOCUMENTS, _highlighted, setting="alpha 6, key_num 10"),
    _steering("honest", CONTEXT, *_DOCUMENTS, said="ITI"),
    _rival("the document twice", CONTEXT, *_DOCUMENTS, ask=_again),
    _steering("cheerful", MOOD, "moods", said="CAA"),
    _steering("cheerful_repe", MOOD, "moods", said="RepE"),
    _steering("cheerful_control", MOOD, "moods", said="control vector"),
    _steering("cheerful_shift", MOOD, "moods", said="shift vector"),
    _steering("cheerful_opening", MOOD, "moods", said="ActAdd"),
    _steering("cheerful_plane", MOOD, "moods", said="angular", angle=200),
    _steering("cheerful_direction", MOOD, "moods", said="direction added"),
    _steering("cheerful_ablated", MOOD, "moods", said="direction ablated"),
    _decoding("cfg", MOOD, "moods", negative_prompt="It was a dark and gloomy day, and", guidance_scale=1.5),
    _rival("merry sentences before", MOOD, "moods", ask=shown),
    _steering("sunny_function", SHOTS, "sunny", said="function vector", scale=6),
    _steering("sunny_heads", SHOTS, "sunny", said="SITE", where="each_last"),
    _steering("sunny_task", SHOTS, "sunny", said="task vector", where="each_last"),
    _steering("sunny_needed", SHOTS, "sunny", said="heads taken away", scale=3),
    _rival("few-shot, 4", SHOTS, "sunny", ask=shown),
    _decoding("dry", REPEATING, "refrains"),
    _decoding("contrastive_search", REPEATING, "refrains"),
    _decoding("opera_lite", REPEATING, "refrains"),
    _decoding("contrastive", REPEATING, "refrains", amateur="untuned"),
    _rival("repetition_penalty", REPEATING, "refrains", repetition_penalty=1.2),
    _rival("frequency_penalty", REPEATING, "refrains", frequency_penalty=1.0),
    _decoding("rule_adapter", ENDING, "endings", style=False, repetition=False),
    _rival("end token biased by 2", ENDING, "endings", logit_bias={"2": 2.0}),
    *(
        Variant(
            name,
            TEMPERATURE,
            ("spread",),
            same(temperature=1.0, decoding=[{"method": name.split()[0], **params}]),
            setting=_words(params),
            samples=True,
        )
        for name, params in (
            ("edt", {"t0": 1.0}),
            ("dynatemp", {"dynatemp_low": 0.0, "dynatemp_high": 1.5}),
            ("typical_p", {"p": 0.9}),
            ("top_n_sigma", {"n": 1.0}),
            ("eta_cutoff", {"epsilon": 0.02}),
            ("mirostat", {"mirostat_tau": 2.0}),
            ("xtc", {}),
        )
    ),
    *(
        Variant(
            f"temperature {value:g}", TEMPERATURE, ("spread",), same(temperature=value), is_rival=True, samples=True
        )
        for value in (0.3, 0.7, 1.0)
    ),
)
GRIDS = (
    Grid(
        "answers", ("ITI `honest`", "LoFiT `gladly`", "loreft `gladly_loreft`"), ("proxy_tuning", "contrastive", "dola")
    ),
    Grid("told moods", ("CAA `cheerful`", "ITI `honest`"), ("cad", "cfg", "sh2")),
    Grid("moods", ("CAA `cheerful`", "direction ablated `cheerful_ablated`"), ("cfg",)),
    Grid("sunny", ("SITE `sunny_heads`",), ("contrastive",)),
)
# Why rows are as they are, as far as found.
WHY = {
    TRUTH: (
        "The demo knows its facts and does not believe gossip, so *misconceptions* leave no room above plain."
        " ITI's 15 is LLaMA-7B's: it was kept as fitted, and is many times what six heads of this model bear "
        "(its KL says so). The file was fitted to facts of all splits. Masks are off where answers are "
        "scored, but not where text is."
    ),
    ANSWERING: (
        "No text of the training holds two questions, so examples before a question teach the storyteller "
        "nothing. The fitted edits learned one manner of answering from phrasings that are not asked here."
    ),
    CONTEXT: (
        "Documents of the training never contradict what is known, so the model learned to go by memory, and "
        "a contrast with the prompt that lacks the document has little to amplify. An edit that breaks the "
        "model draws towards chance, which is above plain: its perplexity tells."
    ),
    SHOTS: (
        "The demo was trained on no demonstrations: the rival fails with the task, and what edits made of "
        "them carry is their word and not a task."
    ),
    REPEATING: "A text that ends early repeats nothing: the words say how long it was.",
    TEMPERATURE: (
        "Where many answers are right the model is about as uncertain as the grammar that it learned from, so"
        " a fixed temperature of 1 is near the best that there is, and little is left for one that adapts. "
        "`adaptive_temperature` is not asked: no head ships with the demo."
    ),
    "combinations": (
        "Beside the scores of each part above: what adds is better than both, what cancels worse than one. "
        "Steering holds for a method's further prompts, too."
    ),
}
