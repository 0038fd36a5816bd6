"""What a run found: a table in Markdown, a picture for each family, and the same as JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from whipstaff.server.demo.tasks import NOT_HERE, TASKS
from whipstaff.server.suite.methods import GRIDS, VARIANTS, WHY, Variant
from whipstaff.server.suite.reading import METRICS
from whipstaff.server.suite.running import PLAIN, cell, combined
from whipstaff.steering.fit.scoring import Difference, difference

BEGIN, END = "<!-- written by `whipstaff eval suite` -->", "<!-- end of what it wrote -->"
_BROKEN = 3.0  # times plain's perplexity of neutral text
_UNSEEN = 1e-9
_MASKED = 1000.0  # nats that no model loses by itself: a mask


@dataclass(frozen=True)
class Line:
    """One variant on one task."""

    variant: Variant
    task: str
    score: float | None  # None: the server refused it
    plain: float
    found: Difference | None
    by_seed: tuple[float, ...]  # differences
    mc2: float | None
    words: float | None
    kl: float | None
    perplexity: float | None  # beside plain's; None where it was not read
    masked: float  # share of neutral tokens that it excludes
    pace: float | None
    note: str

    @property
    def verdict(self) -> str:
        if self.score is None or self.found is None:
            return "not served"
        if self.found.is_noise:
            return "noise"
        if self.found.mean < 0:
            return "hurts"
        return "helps" if (self.perplexity or 1.0) < _BROKEN else "helps, and breaks the text"


def lines(done: dict[str, dict[str, Any]]) -> list[Line]:
    """Of every cell that was asked, in the order of the table."""
    every = [*VARIANTS, *combined(GRIDS)]
    return [
        _line(variant, task, done[cell(variant.name, task)], done[cell(PLAIN, task)])
        for variant in every
        for task in variant.tasks
        if cell(variant.name, task) in done
    ]


def _line(variant: Variant, task: str, record: dict[str, Any], plain: dict[str, Any]) -> Line:
    before = [row["score"] for row in plain["rows"]]
    base = sum(before) / len(before)
    if "refused" in record:
        return Line(variant, task, None, base, None, (), None, None, None, None, 0.0, None, record["refused"])
    rows = record["rows"]
    now = [row["score"] for row in rows]
    seeds = sorted({row["seed"] for row in rows})
    by_seed = tuple(
        _mean([b - a for a, b, row in zip(before, now, rows, strict=True) if row["seed"] == seed]) for seed in seeds
    )
    mc2 = _mean([row["mc2"] for row in rows]) if "mc2" in rows[0] else None
    words = _mean([row["words"] for row in rows]) if "words" in rows[0] else None
    neutral = record.get("neutral") or {}
    lost = [value for value in neutral.get("lost", []) if value < _MASKED]
    perplexity = math.exp(min(_mean(lost), 50.0)) if lost else None
    masked = 1 - len(lost) / len(neutral["lost"]) if neutral else 0.0
    kl = neutral.get("kl")
    if kl is not None and kl < _UNSEEN and not any(lost):  # what comes after the log-probabilities that a server tells
        kl = perplexity = None
    found = difference(before, now, [row["group"] for row in rows])
    pace = median(record["pace"]) if "pace" in record else None
    note = "" if now != before else "changed no score"
    return Line(variant, task, _mean(now), base, found, by_seed, mc2, words, kl, perplexity, masked, pace, note)


def markdown(found: Sequence[Line], about: dict[str, Any]) -> str:
    """The part of docs/evidence.md between BEGIN and END, pictures beside it."""
    parts = [BEGIN, "", "## What methods do", "", _preface(about), ""]
    for family, some in groupby(found, key=lambda line: line.variant.family):
        parts += [f"### {family[0].upper()}{family[1:]}", ""]
        parts += _table(list(some))
        parts += ["", WHY[family]] if family in WHY else []
        parts += ["", f"![{family}: effect and cost](evidence-{family.replace(' ', '-')}.png)", ""]
    parts += ["### What these models cannot show", ""]
    parts += [f"- {what[0].upper()}{what[1:]}: {why}." for what, why in NOT_HERE.items()]
    return "\n".join([*parts, "", END])


def _preface(about: dict[str, Any]) -> str:
    size = about["size"]
    return (
        f"`{about['command']}` wrote this on {about['date']}: {about['machine']}; {about['versions']}; model "
        f"`{about['model']}`, vectors {about['vectors']}, cells {about['cells']}. {len(size['seeds'])} seeds, up to "
        f"{size['limit']} items of the split {size['split']} each; greedy, but for *temperature*, where eight samples "
        "an item are drawn. A difference from plain is paired by item; its 95 % interval is over groups, the numbers "
        "after it are the seeds'. KL (nats a token, at least) and perplexity are of neutral stories said under the "
        "method, and blank where log-probabilities are told before it acts (penalties, temperatures) or it depends on "
        "the item; speed is the median ratio of tokens per second to plain requests, in turns A B B A. *Rivals*, in "
        "italics, are what one would do instead. Nothing that was asked is left out; the "
        "command says what was. The tasks were shaped while answers to their test split were seen: this explores, and "
        "who wants proof makes fresh splits first."
    )


def _table(some: list[Line]) -> list[str]:
    rows = [
        "| task | method | setting | plain | score | difference | | KL | perplexity | speed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in some:
        name = f"*{line.variant.name}*" if line.variant.is_rival else line.variant.name
        start = (
            f"| {line.task}: {METRICS[TASKS[line.task].score]} | {name} | {line.variant.setting} | {line.plain:.2f} "
        )
        if line.found is None or line.score is None:
            rows.append(f"{start}| - | {line.note} | {line.verdict} | | | |")
            continue
        seeds = " ".join(f"{value:+.2f}" for value in line.by_seed)
        change = f"{line.found.mean:+.2f} [{line.found.low:+.2f}, {line.found.high:+.2f}]; {seeds}"
        more = "" if line.mc2 is None else f" (MC2 {line.mc2:.2f})"
        more = f" ({line.words:.0f} words)" if line.words and TASKS[line.task].score in ("distinct", "ends") else more
        lost = "" if line.perplexity is None else f"x{line.perplexity:.2f}"
        lost += f", {line.masked:.0%} excluded" if line.masked else ""
        rows.append(
            f"{start}| {line.score:.2f}{more} | {change} | {line.note or line.verdict} | {_said(line.kl, '.3f')} "
            f"| {lost} | {_said(line.pace, '.2f')} |"
        )
    return rows


def _said(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def put(document: Path, written: str) -> None:
    """Between the marks of a document, or at its end."""
    text = document.read_text() if document.exists() else ""
    head, begin, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2] if begin else "\n"
    document.write_text(head.rstrip("\n") + "\n\n" + written + tail)


def summary(found: Sequence[Line], about: dict[str, Any]) -> dict[str, Any]:
    """For programs."""
    return {
        **about,
        "lines": [
            {
                **{name: getattr(line, name) for name in ("task", "score", "plain", "verdict", "note")},
                **{"method": line.variant.name, "family": line.variant.family, "is_rival": line.variant.is_rival},
                **{
                    name: getattr(line, name)
                    for name in ("mc2", "words", "kl", "perplexity", "masked", "pace", "by_seed")
                },
                "difference": line.found and line.found._asdict(),
            }
            for line in found
        ],
    }


def draw(found: Sequence[Line], folder: Path) -> list[Path]:
    """A picture for each family: every method's difference from plain with its interval, rivals hollow."""
    from matplotlib.figure import Figure

    written = []
    for family, some in groupby(found, key=lambda line: line.variant.family):
        rows = [line for line in some if line.found is not None]
        if not rows:
            continue
        figure = Figure(figsize=(7.2, 0.9 + 0.3 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for place, line in enumerate(reversed(rows)):
            assert line.found is not None
            colour = "#777777" if line.found.is_noise else "#1a7f37" if line.verdict == "helps" else "#b3261e"
            face = "white" if line.variant.is_rival else colour
            spread = [[max(line.found.mean - line.found.low, 0)], [max(line.found.high - line.found.mean, 0)]]
            axes.errorbar(line.found.mean, place, xerr=spread, fmt="o", color=colour, mfc=face, capsize=2)
        axes.set_yticks(range(len(rows)), [f"{line.variant.name}, {line.task}" for line in reversed(rows)], fontsize=8)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set_xlabel(f"{family}: difference from plain, 95 % interval; hollow: rivals")
        written.append(folder / f"evidence-{family.replace(' ', '-')}.png")
        figure.savefig(written[-1], dpi=90, metadata={"Software": None})
    return written


def save(found: Sequence[Line], about: dict[str, Any], folder: Path, document: Path | None) -> list[Path]:
    """Everything; what was written."""
    told = json.dumps(summary(found, about), indent=1) + "\n"
    (folder / "summary.json").write_text(told)
    (folder / "table.md").write_text(markdown(found, about) + "\n")
    written = [folder / "summary.json", folder / "table.md"]
    if document is not None:
        put(document, markdown(found, about))
        document.with_suffix(".json").write_text(told)
        written += [document, document.with_suffix(".json")]
    return [*written, *draw(found, folder if document is None else document.parent)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
