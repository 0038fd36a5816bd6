"""One fit from beginning to end: data, splits, a recipe, and a file that says where it came from."""

import json
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit.data import SPLITS, Dataset, read_data
from whipstaff.steering.fit.job import Axis, Job, Recipe
from whipstaff.steering.fit.options import COMMON, Options
from whipstaff.steering.fit.recipes import RECIPES
from whipstaff.steering.fit.render import Template, shown
from whipstaff.steering.fit.rows import Progress
from whipstaff.steering.fit.source import Source
from whipstaff.steering.vector_file import Header, packed, parse

_VERSIONS = ("whipstaff", "torch", "transformers", "scikit-learn", "numpy")
_SHOWN = 2  # texts of a dry run


@dataclass(frozen=True)
class Made:
    """A vector file, ready to be written."""

    header: Header
    tensors: dict[str, Tensor]
    warnings: tuple[str, ...]
    axis: Axis | None = None  # what tells texts apart: see `held_out`


def recipe_of(method: str) -> Recipe:
    """Raises: SteeringError."""
    if method not in RECIPES:
        raise SteeringError(f"{method!r} is none of the methods that can be fitted: {', '.join(RECIPES)}", "method")
    return RECIPES[method]


def check_options(recipe: Recipe, options: Options) -> None:
    """Raises: SteeringError for an option that the recipe does not take."""
    taken = COMMON - recipe.without | recipe.takes
    for name in options.model_fields_set - taken:
        if getattr(options, name) is not None:
            raise SteeringError(f"{recipe.method} does not take it; it takes {', '.join(sorted(taken))}", name)


def check_source(recipe: Recipe, options: Options, source: Source) -> None:
    """Raises: SteeringError where the recipe needs more of a model than a source gives."""
    needed = "answers" if options.marks and recipe.needs == "rows" else recipe.needs
    if needed not in source.gives:
        what = "--marks" if needed != recipe.needs else recipe.method
        why = "gradients or weights" if needed == "weights" else "what the model says under edits"
        able = ", ".join(name for name, each in RECIPES.items() if each.needs in source.gives)
        raise SteeringError(f"{what} takes {why}, for which a model on this machine is needed; here: {able}", "method")


def prepared(
    method: str,
    source: Source,
    paths: Sequence[Path],
    options: Options,
    folder: Path,
    *,
    shares: Sequence[float] = (0.7, 0.15, 0.15),
    limit: int | None = None,
    neutral: Path | None = None,
    goes_on: bool = False,
    progress: Progress = lambda what, done, of: None,
    say: Callable[[str], None] = lambda line: None,
) -> Job:
    """Everything that a fit needs, checked. Raises: SteeringError, OSError."""
    recipe = recipe_of(method)
    check_options(recipe, options)
    check_source(recipe, options, source)
    data = read_data(paths, recipe.kinds, limit)
    calm: Dataset | None = None if neutral is None else read_data([neutral], ["neutral"])
    return job_of(recipe, source, data, options, folder, calm, shares, goes_on, progress, say)


def job_of(
    recipe: Recipe,
    source: Source,
    data: Dataset,
    options: Options,
    folder: Path,
    neutral: Dataset | None = None,
    shares: Sequence[float] = (0.7, 0.15, 0.15),
    goes_on: bool = False,
    progress: Progress = lambda what, done, of: None,
    say: Callable[[str], None] = lambda line: None,
) -> Job:
    """The same of rows that were read, and options that go with the recipe. Raises: SteeringError."""
    splits = data.split(options.seed, shares)
    own = recipe.template
    if own == "chat" and not getattr(source.tokenizer, "chat_template", None):
        own = "none"
    template = Template(source.tokenizer, options.template or own, options.system, source.max_len)
    job = Job(options, data, splits, source, template, folder, goes_on, progress, say, neutral)
    counted = ", ".join(f"{name} {len(splits[name])}" for name in SPLITS)
    say(f"{', '.join(data.names)}: {len(data)} {data.kind}; by group: {counted}")
    _check_leaks(job)
    return job


def _check_leaks(job: Job) -> None:
    """Warn of rows that stand in two splits in the same words."""
    seen: dict[str, str] = {}
    for split in SPLITS:
        for item in job.splits[split]:
            text = item.row.model_dump_json(exclude={"id", "group", "split"})
            if seen.setdefault(text, split) != split:
                job.warn(f"{item.place}: the same row is in the splits {seen[text]} and {split}")


def dry_run(method: str, job: Job) -> Iterator[str]:
    """One row as the model would get it, with a mark at the tokens that are read."""
    recipe = recipe_of(method)
    item = (job.splits["train"] or job.data.items)[0]
    for rendered, read in recipe.example(job, item)[:_SHOWN]:
        asked = rendered.asked(job.options.read or read)
        yield f"{item.place}, {len(rendered.ids)} tokens, read: {job.options.read or read}" + (
            " (mean)" if asked.is_mean else ""
        )
        yield from shown(rendered, asked.positions)
        yield from (f"warning: {text}" for text in job.template.warnings(rendered))


def fit(method: str, job: Job) -> Made:
    """The file's header and tensors; rows that were read for it are gone then. Raises: SteeringError."""
    recipe = recipe_of(method)
    found = recipe.fit(job)
    provenance = {
        "made_by": "whipstaff fit",
        "recipe": {
            "method": method,
            "template": job.template.form,
            **_said(job.options),
        },
        "data": {
            "names": list(job.data.names),
            "kind": job.data.kind,
            "rows": len(job.data),
            "sha256": job.data.digest,
        },
        "splits": {name: len(job.splits[name]) for name in SPLITS},
        **job.source.identity(),
        "score": dict(found.score),
        "versions": versions(),
        **({"warnings": job.warnings} if job.warnings else {}),
    }
    header = Header(
        method=recipe.method,
        where=found.where,
        model=job.source.shape,
        scale=found.scale,
        defaults=dict(found.defaults),
        description=found.description or recipe.about,
        provenance=json.loads(json.dumps(provenance)),
    )
    tensors = dict(found.tensors)
    parse(packed(header, tensors))  # what cannot be served is no result
    if job.folder.exists():
        shutil.rmtree(job.folder)
    return Made(header, tensors, tuple(job.warnings), found.axis)


def _said(options: Options) -> dict[str, Any]:
    """Without what a folder's place says of a machine."""
    said = options.model_dump(exclude_none=True, exclude={"template"})
    folder = Path(said.get("assistant", ""))
    return said | ({"assistant": folder.name} if folder.name and folder.exists() else {})


def versions() -> dict[str, str]:
    """Of what numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe(made: Made) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "method": made.header.method,
        "tensors": sorted(made.tensors),
        "score": made.header.provenance["score"],
        "warnings": list(made.warnings),
        "provenance": made.header.provenance,
    }
