"""What a text or an answer's likelihood is worth on a task: one number from 0 to 1, higher is better."""

from collections.abc import Sequence
from functools import cache

from whipstaff.server.demo.tasks import Item, Task
from whipstaff.server.demo.world import mood_words, words
from whipstaff.server.suite.asking import Said
from whipstaff.steering.fit.scoring import Likelihoods, generated, multiple_choice

METRICS = {  # a task's score: what it is called in tables
    "choice": "MC1",
    "contains": "right answers",
    "mood": "mood words of the wanted mood",
    "word": "the word shown",
    "distinct": "distinct triples of words",
    "ends": "ended in time",
    "spread": "right, or new",
}


def chosen(task: Task, item: Item, log_p: Sequence[float]) -> dict[str, float]:
    """The first answer is right."""
    assert task.score == "choice"
    found = multiple_choice(Likelihoods(tuple(log_p), tuple(map(len, item.answers)), (0,), 0))
    return {"score": found["mc1"], "mc2": found["mc2"]}


def read(task: Task, item: Item, said: Sequence[Said]) -> dict[str, float]:
    """Of one answer, or of several samples."""
    readings = {
        "contains": lambda: _mean([generated(one.text, item.wanted)["contains"] for one in said]),
        "word": lambda: _mean([float(words(one.text)[:1] == [item.wanted]) for one in said]),
        "mood": lambda: _mean([_mood(one.text, item.wanted) for one in said]),
        "distinct": lambda: _mean([1 - generated(one.text, "")["rep_3"] for one in said]),
        "ends": lambda: _mean([float(one.reason == "stop") for one in said]),
        "spread": lambda: _spread(item, [one.text for one in said]),
    }
    return {"score": readings[task.score](), "words": _mean([float(len(one.text.split())) for one in said])}


def _mood(text: str, wanted: str) -> float:
    """The wanted mood's share of the words that show a mood; a half where there are none."""
    cheerful, gloomy = _mood_words()
    right, wrong = (cheerful, gloomy) if wanted == "cheerful" else (gloomy, cheerful)
    found = [word in right for word in words(text) if word in right | wrong]
    return sum(found) / len(found) if found else 0.5


def _spread(item: Item, texts: Sequence[str]) -> float:
    """With one answer: how many samples hold it. With many: how many of them are found, beside the samples."""
    if item.wanted:
        return _mean([generated(text, item.wanted)["contains"] for text in texts])
    return sum(any(text.strip().startswith(answer) for text in texts) for answer in item.answers) / len(texts)


@cache
def _mood_words() -> tuple[frozenset[str], frozenset[str]]:
    return mood_words()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
