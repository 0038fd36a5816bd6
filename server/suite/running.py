"""One run of the suite: every variant on its tasks, item by item, kept as it goes, so that a run can be resumed."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from tqdm import tqdm

from whipstaff.server.demo import tasks
from whipstaff.server.demo.tasks import Item, Split, Task
from whipstaff.server.demo.world import World
from whipstaff.server.suite.asking import Read, Refused, Server, SuiteError
from whipstaff.server.suite.methods import GRIDS, VARIANTS, Asked, Grid, Variant, same
from whipstaff.server.suite.reading import chosen, read
from whipstaff.steering.fit.scoring import least_kl

PLAIN, COMBINED = "plain", "combinations"
AS_IS = Variant(PLAIN, PLAIN, tuple(tasks.TASKS), same())
SAMPLES = 8  # of an item where a task asks for several
_NEUTRAL, _NEUTRAL_PROMPT = 4, 12  # stories, and words of each that are the prompt
_PACE_REQUESTS, _PACE_TOKENS = 4, 32


@dataclass(frozen=True)
class Size:
    """How much is asked."""

    seeds: tuple[int, ...] = (0, 1, 2)
    limit: int = 12  # items of a task and seed
    turns: int = 2  # of A B B A, for the ratio of speeds
    split: Split = "test"


SMALL = Size(limit=4, turns=1)


class Suite:
    """The cells of a run, done and to do."""

    def __init__(self, server: Server, world: World, size: Size, folder: Path) -> None:
        self.server, self.world, self.size, self.folder = server, world, size, folder
        self.items = {
            name: [
                (seed, item) for seed in size.seeds for item in tasks.made(task, world, size.split, seed, size.limit)
            ]
            for name, task in tasks.TASKS.items()
        }
        self.neutral = [_halves(world.story(Random(f"neutral {index}"))) for index in range(_NEUTRAL)]

    def key(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        asked = [
            (variant.name, task, [(variant.scoring or variant.body)(item)._asdict() for _, item in self.items[task]])
            for variant in [*VARIANTS, *combined(GRIDS)]
            for task in variant.tasks
        ]
        said = [
            self.server.model,
            self.server.vectors,
            asdict(self.size),
            asked,
            [[item.answers for _, item in self.items[name]] for name in self.items],
        ]
        return {"key": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest(), "size": asdict(self.size)}

    def run(self, resume: bool, only: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
        """Every cell's record by its name. Raises: SuiteError."""
        done, path = self._left(resume)
        cells = [(variant, task) for variant in self._variants(only) for task in variant.tasks]
        with path.open("a") as file, ThreadPoolExecutor(self.server.parallel) as pool:
            for variant, task in tqdm(cells, desc="cells", disable=None):
                name = cell(variant.name, task)
                if name not in done:
                    done[name] = self._cell(variant, tasks.TASKS[task], pool)
                    file.write(json.dumps({"cell": name, **done[name]}) + "\n")
                    file.flush()
        return done

    def _variants(self, only: Sequence[str]) -> list[Variant]:
        """Plain on every task first."""
        every = [*VARIANTS, *combined(GRIDS)]
        if unknown := set(only) - {variant.family for variant in every}:
            raise SuiteError(f"--only: {sorted(unknown)} are no families; there are {families()}")
        some = [variant for variant in every if not only or variant.family in only]
        asked = {task for variant in some for task in variant.tasks}
        return [replace(AS_IS, tasks=tuple(name for name in tasks.TASKS if name in asked)), *some]

    def _left(self, resume: bool) -> tuple[dict[str, dict[str, Any]], Path]:
        """What an earlier run has left, if it asked the same."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, head = self.folder / "cells.jsonl", self.key()
        if not path.exists() or not resume:
            path.write_text(json.dumps(head) + "\n")
            return {}, path
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if not lines or lines[0].get("key") != head["key"]:
            raise SuiteError(f"{path} is of another server, other vectors or another size; leave out --resume")
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))  # without half a line
        return {line.pop("cell"): line for line in lines[1:]}, path

    def _cell(self, variant: Variant, task: Task, pool: ThreadPoolExecutor) -> dict[str, Any]:
        """A row per item, or why the server does not do it; what it costs."""
        items = [item for _, item in self.items[task.name]]
        try:
            self.server.check(variant.body(items[0]))
        except Refused as refused:
            return {"refused": str(refused)}
        return {"rows": self.rows(variant, task, pool)} | self._cost(variant, items, pool)

    def rows(self, variant: Variant, task: Task, pool: ThreadPoolExecutor) -> list[dict[str, Any]]:
        """Of every item: its group, its seed, its scores."""
        seeds, items = zip(*self.items[task.name], strict=True)
        found = pool.map(lambda seed, item: self._scores(variant, task, seed, item), seeds, items)
        return [
            {"group": item.group, "seed": seed, **scores}
            for seed, item, scores in zip(seeds, items, found, strict=True)
        ]

    def _scores(self, variant: Variant, task: Task, seed: int, item: Item) -> dict[str, float]:
        if task.score == "choice":
            asked = (variant.scoring or variant.body)(item)
            return chosen(task, item, [self.server.log_p(asked, answer) for answer in item.answers])
        fields: dict[str, Any] = {"stop": list(task.stop)} if task.stop else {}
        if task.score == "spread":
            fields |= {"n": SAMPLES, "seed": seed}
            fields |= {} if variant.samples else {"temperature": 1.0}
        return read(task, item, self.server.say(variant.body(item), task.max_tokens, **fields))

    # ---- costs

    def _cost(self, variant: Variant, some: Sequence[Item], pool: ThreadPoolExecutor) -> dict[str, Any]:
        """What other texts lose, where the method says the same of any prompt, and what speed is left."""
        asked = [variant.body(item) for item in some[:_PACE_REQUESTS]]
        if not any(each.body for each in asked):
            return {}
        first = asked[0].body
        neutral = self._neutral(first, pool) if all(each.body == first for each in asked) else {}
        return neutral | {"pace": self._pace(asked)}

    def _neutral(self, body: Any, pool: ThreadPoolExecutor) -> dict[str, Any]:
        def both(halves: tuple[str, str]) -> tuple[Read, Read]:
            prompt, rest = halves
            return self.server.read(Asked(prompt, {}), rest, 20), self.server.read(Asked(prompt, body), rest, 20)

        try:
            pairs = list(pool.map(both, self.neutral))
        except Refused as error:
            return {"neutral": None, "why": str(error)}
        kl = [least_kl(p, q) for (_, tops), (_, others) in pairs for p, q in zip(tops, others, strict=True)]
        lost = [a - b for (log_p, _), (other, _) in pairs for a, b in zip(log_p, other, strict=True)]
        return {"neutral": {"kl": sum(kl) / len(kl), "lost": [round(value, 4) for value in lost]}}

    def _pace(self, asked: Sequence[Asked]) -> list[float]:
        """Tokens per second beside plain's on the same prompts, a ratio for each turn of A B B A."""
        ways = {"a": [Asked(each.prompt, {}) for each in asked], "b": asked}
        ratios = []
        for _ in range(self.size.turns):
            found = [(way, self.server.pace(ways[way], _PACE_TOKENS)) for way in "abba"]
            rates = {name: median(rate for way, rate in found if way == name) for name in ways}
            ratios.append(round(rates["b"] / rates["a"], 4))
        return ratios


def cell(variant: str, task: str) -> str:
    return f"{variant} on {task}"


def families() -> list[str]:
    return list(dict.fromkeys(variant.family for variant in VARIANTS))


def combined(grids: Sequence[Grid]) -> Iterator[Variant]:
    """Every activation method beside every logits method of a grid: the steering of one, the decoding of the other."""
    for grid in grids:
        for one, other in product(grid.activations, grid.logits):
            steered, decoded = _named(one, grid.task), _named(other, grid.task)
            scoring = _both(steered.scoring or steered.body, decoded.scoring or decoded.body)
            body = _both(steered.body, decoded.body)
            yield Variant(f"{one} + {other}", COMBINED, (grid.task,), body, scoring=scoring)


def _named(name: str, task: str) -> Variant:
    """The one of that name that is asked on the task; another one, where none is."""
    return min((each for each in VARIANTS if each.name == name), key=lambda each: task not in each.tasks)


def _both(one: Callable[[Item], Asked], other: Callable[[Item], Asked]) -> Callable[[Item], Asked]:
    return lambda item: Asked(item.prompt, {**one(item).body, **other(item).body})


def _halves(story: str) -> tuple[str, str]:
    words = story.split(" ")
    return " ".join(words[:_NEUTRAL_PROMPT]), " " + " ".join(words[_NEUTRAL_PROMPT : 3 * _NEUTRAL_PROMPT])
