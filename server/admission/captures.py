"""Captures: activations, probes and attention that a request asks to be told: what it may say. `captured` has what came
of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from whipstaff.decoding.plan import DecodingPlan
from whipstaff.server.admission.decoding import DecodingEntry, ranking_of, search_of
from whipstaff.server.admission.fields import entries_in
from whipstaff.server.admission.positions import where_at_prompt
from whipstaff.server.errors import BadRequest, Unavailable, parsed
from whipstaff.server.plan import PositionedPlan
from whipstaff.server.prompt.message_spans import Prompt
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.method import HookPoint
from whipstaff.steering.plan import Capture, PlannedAttention, PlannedCapture, PlannedProbe, SteeringPlan
from whipstaff.steering.planner import reading_along
from whipstaff.steering.shape import ModelShape, Site
from whipstaff.steering.vector_file import Vector
from whipstaff.steering.where import Clause, Where

FIELD, FORMAT_FIELD = "capture", "capture_format"
Format = Literal["base64", "download"]
MAX_CAPTURES = 16  # entries of a request
_HEADER = 256  # bytes that a file says of a tensor, and of its positions, at most
Layer = Annotated[int, Field(strict=True, ge=0)]


class CaptureParams(BaseModel):
    """One entry of `capture`: activations at one site of some layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: Site = "resid_post"
    layers: Literal["all"] | Annotated[list[Layer], Field(min_length=1)] = Field(
        description="0-based blocks, or all of them"
    )
    where: Clause = Field("all", description="at which tokens", validate_default=True)
    reduce: Literal["none", "mean", "last"] = Field("none", description="every token's, their mean, or the last one's")
    edited: bool = Field(True, description="as the request's edits at that place leave them, or else as they come")
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


@dataclass(frozen=True)
class CaptureEntry:
    """One entry of a request's `capture`, checked."""

    path: str
    params: CaptureParams
    layers: tuple[int, ...]

    @property
    def where(self) -> Where:
        return Where.of(self.params.where)

    @property
    def points(self) -> tuple[HookPoint, ...]:
        """Where the engine finds it, in the order of the layers."""
        return tuple(HookPoint(self.params.site, layer).canonical for layer in self.layers)

    @property
    def planned(self) -> PlannedCapture:
        """Before any prompt is known."""
        return PlannedCapture(Capture(self.points, self.params.edited), self.where)

    def to_json(self) -> dict[str, Any]:
        """The entry as the receipt shows it."""
        said = self.params.model_dump(exclude={"where"})
        return {**said, "layers": list(self.layers), "where": self.where.model_dump(exclude_none=True)}


class ProbeParams(BaseModel):
    """One entry of `capture`: what a probe reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probe: str = Field(min_length=1, max_length=256, description="name of a loaded vector whose method is probe")
    layer: Layer | None = Field(None, description="which of the probe's layers; needed where it has several")
    where: Clause = Field("all", description="at which tokens", validate_default=True)
    reduce: Literal["none", "mean", "last"] = Field("none", description="every token's, their mean, or the last one's")
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


@dataclass(frozen=True)
class ProbeEntry:
    """One entry of a request's `capture` that names a probe, checked."""

    path: str
    params: ProbeParams
    probe: Vector
    layer: int
    column: int  # which of the request's conditions it is

    @property
    def where(self) -> Where:
        return Where.of(self.params.where)

    @property
    def name(self) -> str:
        """Of its tensor, after its number."""
        return f"probe.{self.layer}"

    def to_json(self) -> dict[str, Any]:
        """The entry as the receipt shows it."""
        said = self.params.model_dump(exclude={"where", "layer"})
        where = self.where.model_dump(exclude_none=True)
        return {**said, "digest": self.probe.digest, "layer": self.layer, "where": where}


class AttentionParams(BaseModel):
    """One entry of `capture`: how much heads look at what is before each token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: dict[Annotated[int, Field(ge=0)], Literal["all"] | Annotated[list[Layer], Field(min_length=1)]] = Field(
        min_length=1, description="heads by 0-based block, or all of a block's"
    )
    where: Clause = Field("generation", description="of which tokens", validate_default=True)
    reduce: Literal["none", "mean", "max"] = Field("none", description="every head's, or over the heads that are named")
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


@dataclass(frozen=True)
class AttentionEntry:
    """One entry of a request's `capture` that names heads, checked."""

    path: str
    params: AttentionParams
    heads: Mapping[int, tuple[int, ...]]  # by layer

    @property
    def where(self) -> Where:
        return Where.of(self.params.where)

    def to_json(self) -> dict[str, Any]:
        """The entry as the receipt shows it."""
        said = self.params.model_dump(exclude={"where", "attention"})
        heads = {str(layer): list(some) for layer, some in self.heads.items()}
        return {**said, "attention": heads, "where": self.where.model_dump(exclude_none=True)}

    def planned(self, where: Where) -> list[PlannedAttention]:
        return [PlannedAttention(layer, heads, where) for layer, heads in self.heads.items()]


AnyEntry = CaptureEntry | ProbeEntry | AttentionEntry


class Admitted(NamedTuple):
    """The entries of a request's `capture`, and its plan with what they read."""

    entries: tuple[AnyEntry, ...] = ()
    plan: SteeringPlan | None = None


def admit_captures(fields: Mapping[str, Any], plan: SteeringPlan | None, caps: Capabilities) -> Admitted:
    """Raises: WhipstaffError naming the field."""
    found: list[AnyEntry] = []
    for path, entry in entries_in(fields.get(FIELD), FIELD, MAX_CAPTURES):
        if isinstance(entry, dict) and "probe" in entry:
            probing, plan = _probing(entry, path, plan or SteeringPlan(()), caps)
            found.append(probing)
        elif isinstance(entry, dict) and "attention" in entry:
            found.append(_looking(entry, path, caps))
        else:
            found.append(_entry(entry, path, caps))
    capturing = captures_among(found)
    _check_one_way(capturing)
    if capturing:
        plan = replace(plan or SteeringPlan(()), captures=tuple(entry.planned for entry in capturing))
    if looking := tuple(one for entry in attention_among(found) for one in entry.planned(entry.where)):
        plan = replace(plan or SteeringPlan(()), attention=looking)
    return Admitted(tuple(found), plan)


def captures_among(entries: Sequence[AnyEntry]) -> list[CaptureEntry]:
    """Those that read activations."""
    return [entry for entry in entries if isinstance(entry, CaptureEntry)]


def probes_among(entries: Sequence[AnyEntry]) -> list[ProbeEntry]:
    return [entry for entry in entries if isinstance(entry, ProbeEntry)]


def attention_among(entries: Sequence[AnyEntry]) -> list[AttentionEntry]:
    return [entry for entry in entries if isinstance(entry, AttentionEntry)]


def _looking(entry: Any, path: str, caps: Capabilities) -> AttentionEntry:
    params = parsed(AttentionParams, entry, path)
    num, heads = caps.model.num_heads, dict[int, tuple[int, ...]]()
    for layer, wanted in params.attention.items():
        field = f"{path}.attention.{layer}"
        if layer >= caps.num_layers:
            raise BadRequest(f"the served model has layers 0 to {caps.num_layers - 1}", field)
        if layer not in caps.attention_layers:
            flag = ",".join(map(str, sorted({*caps.attention_layers, *params.attention})))
            raise Unavailable(
                f"what heads of layer {layer} look at is not known here; start the server with --attention-layers "
                f"{flag}",
                field,
            )
        heads[layer] = tuple(range(num)) if wanted == "all" else tuple(wanted)
        for index, head in enumerate(heads[layer]):
            if head >= num:
                raise BadRequest(f"layer {layer} has heads 0 to {num - 1}", f"{field}[{index}]")
            if head in heads[layer][:index]:
                raise BadRequest(f"head {head} is named twice", f"{field}[{index}]")
    found = AttentionEntry(path, params, heads)
    _check_no_tokens(found.where, path)
    return found


def check_attention(entries: Sequence[AnyEntry], redirected: Mapping[int, str]) -> None:
    """What a head looks at is computed from the model's own scores. Raises: BadRequest.

    Args:
        redirected: layers in which the request itself changes those, each with the field that does.
    """
    for entry in attention_among(entries):
        for layer in entry.heads:
            if (param := redirected.get(layer)) is not None:
                raise BadRequest(
                    f"{entry.path} reads what heads of layer {layer} look at, which this changes; leave one out", param
                )


def _probing(entry: Any, path: str, plan: SteeringPlan, caps: Capabilities) -> tuple[ProbeEntry, SteeringPlan]:
    params = parsed(ProbeParams, entry, path)
    probe = caps.registry.usable(params.probe, f"{path}.probe")
    where = Where.of(params.where)
    try:
        plan, column = reading_along(plan, probe, params.layer, where)
    except SteeringError as error:
        raise BadRequest(str(error), f"{path}.{error.param}") from None
    layer = probe.layers[0] if params.layer is None else params.layer
    if (reason := probe.method.kind.lacking(probe, [layer], caps)) is not None:
        raise Unavailable(reason, f"{path}.probe")
    _check_no_tokens(where, path)
    return ProbeEntry(path, params, probe, layer, column), plan


def _check_one_way(entries: Sequence[CaptureEntry]) -> None:
    """Raises: BadRequest."""
    seen: dict[HookPoint, CaptureEntry] = {}
    for entry in entries:
        for point in entry.points:
            if (other := seen.setdefault(point, entry)).params.edited != entry.params.edited:
                raise BadRequest(
                    f"{other.path} reads {point.site} of layer {point.layer} {_when(other)} the request's edits there, "
                    f"and this {_when(entry)} them; a request reads a place in one way",
                    f"{entry.path}.edited",
                )


def _when(entry: CaptureEntry) -> str:
    return "after" if entry.params.edited else "before"


def _entry(entry: Any, path: str, caps: Capabilities) -> CaptureEntry:
    params = parsed(CaptureParams, entry, path)
    num = caps.num_layers
    layers = tuple(range(num)) if params.layers == "all" else tuple(params.layers)
    found = CaptureEntry(path, params, layers)
    for index, (layer, point) in enumerate(zip(layers, found.points, strict=True)):
        field = f"{path}.layers" if params.layers == "all" else f"{path}.layers[{index}]"
        if layer >= num:
            raise BadRequest(f"the served model has layers 0 to {num - 1}", field)
        if layer in layers[:index]:
            raise BadRequest(f"layer {layer} is named twice", field)
        if point not in caps.hook_points:
            raise Unavailable(
                f"this server does not read {params.site}; start it with --steering-sites {params.site}",
                f"{path}.site",
            )
        if point.layer not in caps.capture_layers:
            flag = ",".join(str(one) for one in sorted({*caps.capture_layers, *(p.layer for p in found.points)}))
            raise Unavailable(
                f"{point.site} of layer {point.layer} cannot be read here; start the server with --capture-layers "
                f"{flag}",
                field,
            )
    _check_no_tokens(found.where, path)
    return found


def _check_no_tokens(where: Where, path: str) -> None:
    """Raises: BadRequest."""
    for name, region in (("tokens", where), ("exclude.tokens", where.exclude)):
        if region is not None and region.tokens:
            raise BadRequest(
                "activations are read by position; say windows or messages, and choose tokens among what is told",
                f"{path}.where.{name}",
            )


def check_beside(captures: Sequence[AnyEntry], decoding: DecodingPlan | None, entries: Sequence[DecodingEntry]) -> None:
    """Whether they go with what else the request says. Raises: BadRequest."""
    for entry in (search_of(entries), ranking_of(entries)):
        if entry is not None:
            raise BadRequest(
                f"{entry.method.name} chooses among several sequences, whose activations are not kept apart; leave one "
                "of them out",
                FIELD,
            )
    early = {HookPoint.entering(layer) for layer in (decoding.early_layers if decoding else ())}
    for one in captures_among(captures):
        if not one.params.edited and early.intersection(one.points):
            raise BadRequest(
                "a decoding method reads that stream after the request's edits, so it can be captured after them only",
                f"{one.path}.edited",
            )


def reading_at_prompt(
    captures: Sequence[AnyEntry], steering: SteeringPlan, whole: SteeringPlan, prompt: Prompt
) -> SteeringPlan:
    """A plan in a prompt with what the client is told, whose clauses are then in windows only.

    Args:
        steering: without that.
        whole: with it, before any prompt is known.

    Raises: BadRequest.
    """
    places = [(entry, where_at_prompt(entry.where, entry.path, prompt, steering.inserts)) for entry in captures]
    planned = [PlannedCapture(one.planned.capture, where) for one, where in places if isinstance(one, CaptureEntry)]
    at_column = {one.column: where for one, where in places if isinstance(one, ProbeEntry)}
    looking = [each for one, where in places if isinstance(one, AttentionEntry) for each in one.planned(where)]
    more = [
        PlannedProbe(one.probe, at_column[one.probe.condition_index]) for one in whole.probes[len(steering.probes) :]
    ]
    return replace(
        steering,
        probes=(*steering.probes, *more),
        captures=tuple(planned),
        attention=tuple(looking),
        told=whole.told,
    )


def check_captures(captures: Sequence[AnyEntry], placed: PositionedPlan, max_tokens: int, caps: Capabilities) -> None:
    """Checks that need the prompt. Raises: BadRequest where a clause selects nothing, Unavailable where it is too
    much."""
    assert placed.plan.steering is not None
    steering = placed.plan.steering
    captured, looked = iter(steering.captures), iter(steering.attention)
    at_column = {one.probe.condition_index: one.where for one in steering.probes}
    for entry in captures:
        if isinstance(entry, ProbeEntry):
            clauses = [at_column[entry.column]]
        elif isinstance(entry, AttentionEntry):
            clauses = [next(looked).where for _ in entry.heads]
        else:
            clauses = [next(captured).where]
        try:
            clauses[0].check(placed.prompt_len, max_tokens)
        except SteeringError as error:
            raise BadRequest(str(error), f"{entry.path}.{error.param}") from None
    if (num := placed.capture_bytes(caps.model)) > caps.max_capture_bytes:
        raise Unavailable(
            f"with up to {placed.plan.max_fed} tokens these activations take up to {num} bytes as float32, and this "
            f"server reads {caps.max_capture_bytes} at once; say less in `where`, `layers`, heads or max_tokens, or "
            "start it with a larger --max-capture-bytes",
            FIELD,
        )


def check_download(captures: Sequence[AnyEntry], caps: Capabilities) -> None:
    """Whether what is read can be had as a file. Raises: BadRequest, Unavailable."""
    if not captures:
        raise BadRequest("nothing is read: say what in `capture`", FORMAT_FIELD)
    if not caps.keeps_captures:
        raise Unavailable(
            "this server keeps no files to fetch; start it with --max-downloads N and --max-download-bytes N",
            FORMAT_FIELD,
        )


def most_file_bytes(placed: PositionedPlan, shape: ModelShape) -> int:
    """How large a file can become with what was read of one choice."""
    read = sum(
        (8 + 4 * shape.width(point.site)) * max(one.num_positions, 1) + _HEADER
        for one in placed.captures
        for point in one.points
    )
    read += sum((8 + 4 * len(one.heads) * one.size) * one.num_positions + _HEADER for one in placed.attended)
    return read + MAX_CAPTURES * ((8 + 4) * placed.plan.max_fed + _HEADER)  # whatever probes there are
