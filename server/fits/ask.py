"""What somebody asks to be fitted, checked whole before anything is scheduled: a recipe is followed up to its first
look at the model, so every row was rendered, and what it would read is known."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from whipstaff.server.errors import BadRequest, Unavailable, WhipstaffError, parsed
from whipstaff.server.fits.source import EngineModel, Enough
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.vectors import NAME
from whipstaff.steering.errors import NotServed, SteeringError
from whipstaff.steering.fit import fitting
from whipstaff.steering.fit.data import BadData, Dataset, Item, rows_data
from whipstaff.steering.fit.job import Job, Recipe
from whipstaff.steering.fit.options import Options
from whipstaff.steering.fit.render import Rendered, read_at
from whipstaff.steering.fit.source import Asked
from whipstaff.steering.method import HookPoint
from whipstaff.steering.where import Clause, Where

T = TypeVar("T")
MAX_ROWS = 20_000
MAX_BYTES = 1 << 30  # of activations that one fit keeps on the disk
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class FitBody(BaseModel):
    """What is to be fitted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field(description="of the vector: caa, repe, iti, probe ...; one that takes activations alone")
    name: str = Field(description="that the vector gets; one that has it is replaced")
    data: list[Any] = Field(
        min_length=1, max_length=MAX_ROWS, description="rows, as whipstaff fit reads them from files (docs/fit.md)"
    )
    options: dict[str, Any] = Field({}, description="whipstaff fit's flags by name: layers, read, seed ...")
    where: Clause | None = Field(None, description="the vector's own choice of tokens; default: the method's")
    split: tuple[Share, Share, Share] = Field(
        (0.7, 0.15, 0.15), description="shares of train, dev and test; the last is what it is evaluated on"
    )
    neutral: list[Any] | None = Field(
        None, min_length=1, max_length=MAX_ROWS, description="plain texts, on which a probe should not fire"
    )
    description: str = Field("", max_length=4096, description="kept in the vector")
    licence: str = Field("", max_length=256, description="kept in the vector")

    @field_validator("split")
    @classmethod
    def _learns_from_something(cls, shares: tuple[float, float, float]) -> tuple[float, float, float]:
        if shares[0] <= 0:
            raise ValueError("there has to be something to learn from")
        return shares

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError("a name has at most 128 letters, digits, `.`, `_` and `-`, and begins with no sign")
        return name


@dataclass(frozen=True)
class Ask:
    """A fit that can be made here, as far as can be known before the model is asked."""

    body: FitBody
    recipe: Recipe
    options: Options
    data: Dataset
    neutral: Dataset | None
    warnings: tuple[str, ...]
    counts: dict[str, int]  # rows by split

    def job(self, source: EngineModel, folder: Path) -> Job:
        """Raises: SteeringError."""
        return fitting.job_of(
            self.recipe,
            source,
            self.data,
            self.options,
            folder,
            self.neutral,
            self.body.split,
            progress=source.progress,
        )

    @property
    def where(self) -> Where | None:
        return None if self.body.where is None else Where.of(self.body.where)


def ask_of(said: Any, source: EngineModel, caps: Capabilities) -> Ask:
    """Blocks while rows are rendered. Raises: BadRequest, Unavailable naming the field."""
    body = parsed(FitBody, said, "")
    try:
        recipe = fitting.recipe_of(body.method)
        options = parsed(Options, body.options, "options")
        fitting.check_options(recipe, options)
        fitting.check_source(recipe, options, source)
        if find_spec("sklearn") is None:
            raise Unavailable(
                "fits take scikit-learn here: pip install 'whipstaff[fit]' where the server runs", "method"
            )
        data = rows_data(body.data, recipe.kinds, "data")
        neutral = None if body.neutral is None else rows_data(body.neutral, ["neutral"], "neutral")
        unmade = Ask(body, recipe, options, data, neutral, (), {})
        warnings, counts = _followed(unmade, source, caps)
    except SteeringError as error:
        raise refusal(error) from None
    return Ask(body, recipe, options, data, neutral, warnings, counts)


def refusal(error: SteeringError) -> WhipstaffError:
    """The same, naming a field of the body."""
    if isinstance(error, BadData) and error.place:
        return BadRequest(error.said, error.place + (f".{error.key}" if error.key else ""))
    if isinstance(error, NotServed):
        return Unavailable(str(error), error.param or "data")
    if error.param in Options.model_fields:
        return BadRequest(str(error), f"options.{error.param}")
    return BadRequest(str(error), "method" if error.param in ("method", "model") else "data")


def _followed(ask: Ask, source: EngineModel, caps: Capabilities) -> tuple[tuple[str, ...], dict[str, int]]:
    """Follow the recipe to where it would read: (warnings, rows by split). Raises: SteeringError."""
    with tempfile.TemporaryDirectory() as folder:
        job = ask.job(source.looking(), Path(folder) / "rows")
        for item in job.data.items:  # those of the test split, too, which the recipe does not look at
            for rendered, read in _shown(ask.recipe, job, item):
                read_at(rendered, ask.options.read or read, item)
        for item in ask.neutral.items if ask.neutral else ():
            _rendered(lambda row: job.template.render(row.text), item)
        try:
            ask.recipe.fit(job)
        except Enough as enough:
            _check_places(enough.points, caps)
            _check_size(enough.asked, enough.points, caps)
        return tuple(job.warnings), {name: len(rows) for name, rows in job.splits.items()}


def _shown(recipe: Recipe, job: Job, item: Item) -> Sequence[tuple[Rendered, str]]:
    return _rendered(lambda row: recipe.example(job, item), item)


def _rendered(render: Callable[[Any], T], item: Item) -> T:
    try:
        return render(item.row)
    except BadData:
        raise
    except SteeringError as error:
        raise BadData(str(error), item.place, param=error.param) from error


def _check_places(points: Sequence[HookPoint], caps: Capabilities) -> None:
    """Raises: NotServed."""
    for point in points:
        if point.canonical not in caps.hook_points:
            raise NotServed(
                f"this server does not read {point.site}; start it with --steering-sites {point.site}", "method"
            )
    layers = {point.canonical.layer for point in points}
    if missing := layers - caps.capture_layers:
        flag = ",".join(map(str, sorted(layers | caps.capture_layers)))
        raise NotServed(
            f"layer {min(missing)} cannot be read here; start the server with --capture-layers {flag}", "options.layers"
        )


def _check_size(asked: Sequence[Asked], points: Sequence[HookPoint], caps: Capabilities) -> None:
    """Raises: NotServed, BadData."""
    width = 4 * sum(caps.model.width(point.site) for point in points)
    most = width * max(len(one.positions) for one in asked)
    if most > caps.max_capture_bytes:
        raise NotServed(
            f"the activations of one text take {most} bytes, and this server reads {caps.max_capture_bytes} at once; "
            "name fewer layers, or start it with a larger --max-capture-bytes",
            "options.layers",
        )
    kept = width * sum(1 if one.is_mean else len(one.positions) for one in asked)
    if kept > MAX_BYTES:
        raise SteeringError(f"{kept} bytes of activations, and at most {MAX_BYTES} are kept: fewer layers or rows")
