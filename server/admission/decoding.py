"""Admission of a request's `decoding`: entries, and top-level fields that stand for entries, become one plan."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from whipstaff.decoding.method import (
    STAGES,
    DecodingError,
    HeadFile,
    LogitsRewriter,
    Method,
    Params,
    PromptFacts,
    Ranker,
    StreamMixer,
)
from whipstaff.decoding.methods import METHODS
from whipstaff.decoding.mix import Mix, added
from whipstaff.decoding.plan import DecodingPlan, Rewrite, SearchPlan
from whipstaff.decoding.search.search import SearchMethod, SearchParams
from whipstaff.server.admission.fields import entries_at
from whipstaff.server.admission.steering import SequenceSteering, SteeringEntry, admit_steering
from whipstaff.server.errors import (
    BadRequest,
    NotFound,
    Unavailable,
    VectorUnfit,
    did_you_mean,
    field_path,
    no_entry,
    parsed,
)
from whipstaff.server.names import fields_by_method, in_own_names, is_off
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.planner import MAX_EDITS, Planner
from whipstaff.steering.vector_file import Vector

MAX_DECODING = 8
NOTHING: Mapping[str, Any] = {}
_ORDER = {name: (STAGES.index(method.stage), index) for index, (name, method) in enumerate(METHODS.items())}


class GivenEntry(NamedTuple):
    """An entry of a request's `decoding`, or what its top-level fields say of one method."""

    path: str  # "": of top-level fields
    entry: Any
    names: Mapping[str, str] = {}  # parameter -> the request's field, for shorthands
    fields: Sequence[str] = ()  # all of these fields
    why_off: str = ""

    @property
    def where(self) -> str:
        """As warnings call it."""
        return " and ".join([*filter(None, [self.path]), *self.fields])

    @property
    def is_several(self) -> bool:
        """Whether that is more than one field."""
        return len(self.fields) + bool(self.path) > 1


@dataclass(frozen=True)
class DecodingEntry:
    """One entry of a request's `decoding`, resolved."""

    path: str
    method: Method[Any]
    params: Params
    mix: Mix | None = None  # of a method that mixes
    setting: Any = None  # of a method that rewrites or searches
    streams: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    early: tuple[int, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)  # parameter -> the request's field, for shorthands
    vectors: tuple[Vector, ...] = ()  # the files that it reads
    ahead: str = ""  # the parameter that names a head which reads tokens before one is chosen; "": none
    steered: Mapping[str, SequenceSteering] = field(default_factory=dict)  # parameter -> companions' own steering
    why_off: str = ""  # why it is left out; "": it is not

    def path_of(self, param: str) -> str:
        """Where in the request a parameter stands."""
        return _path_of(self.path, self.names, param)

    @property
    def stream_paths(self) -> dict[str, str]:
        """Auxiliary model -> the field that names it."""
        return {name: self.path_of(where) for where, name in self.method.streams(self.params).items()}

    @property
    def chooses_temperature(self) -> bool:
        """Whether its method, and not the request, says how hot the draw is."""
        return isinstance(self.method, LogitsRewriter) and self.method.chooses_temperature

    @property
    def bounds_draw(self) -> bool:
        """Whether, however hot the request's own temperature, not every token becomes about as likely."""
        return self.method.stage == "truncation" or self.chooses_temperature

    @property
    def num_tried(self) -> int:
        """Tokens that a method which rewrites rows tries for each token of an answer."""
        return self.method.num_tried(self.params) if self.ahead and isinstance(self.method, LogitsRewriter) else 0

    def at_prompt(self, prompt: PromptFacts, index: int = 0, num: int = 1) -> "DecodingEntry":
        """The entry in prompt `index` of a request's `num`. Raises: BadRequest."""
        try:
            if isinstance(self.method, LogitsRewriter | SearchMethod):
                return replace(self, setting=self.method.at_prompt(self.setting, prompt))
            return replace(self, params=self.method.of_prompt(self.params, index, num))
        except (DecodingError, SteeringError) as error:
            raise BadRequest(str(error), self.path_of(error.param)) from None

    def to_json(self) -> dict[str, Any]:
        """The entry as the receipt shows it."""
        said = self.params.model_dump(by_alias=True, exclude_none=True)
        return said | ({"layers": list(self.early)} if self.early else {})


def entries_of(
    fields: Mapping[str, Any],
    named: Sequence[tuple[str, Any]],
    merges: bool = False,
    shared: Mapping[str, Any] = NOTHING,
) -> Iterator[GivenEntry]:
    """Every entry: of `decoding`, and those that top-level fields stand for.

    Args:
        merges: whether the entries of `decoding` are defaults, whose parameters top-level fields overrule.
        shared: the fields that vLLM's requests have anyway, as far as this one says them.

    Raises: BadRequest.
    """
    short = fields_by_method(fields)
    for path, written in named:
        entry, own = in_own_names(written, path)
        name = entry.get("method") if isinstance(entry, dict) else None
        if merges and isinstance(name, str) and (said := short.pop(name, None)):
            names = {**own, **said.names}
            why_off = said.gate and f"{said.gate} is false"
            yield _with_shared(GivenEntry(path, {**entry, **said.params}, names, said.fields, why_off), shared)
        else:
            yield _with_shared(GivenEntry(path, entry, own), shared)
    for name, said in short.items():
        why_off = said.why_off(METHODS[name])
        found = GivenEntry("", {"method": name, **said.params}, said.names, said.fields, why_off)
        yield _with_shared(found, shared)


def _with_shared(given: GivenEntry, shared: Mapping[str, Any]) -> GivenEntry:
    """An entry with what the request's other fields say of its method, as far as it says nothing of it itself."""
    entry = given.entry
    method = METHODS.get(str(entry.get("method"))) if isinstance(entry, dict) else None
    if method is None or not method.shared or is_off(entry):
        return given
    taken = {param: name for name, param in method.shared.items() if name in shared and param not in entry}
    read = {param: method.read(name, shared[name]) for param, name in taken.items()}
    said = {param: value for param, value in read.items() if value is not None}
    return given._replace(entry={**entry, **said}, names={**given.names, **{param: taken[param] for param in said}})


def admit_decoding(given: GivenEntry, caps: Capabilities) -> DecodingEntry:
    """Check one entry.

    Raises: WhipstaffError with the JSON path of the field that cannot be honoured.
    """
    entry, path, names = given.entry, given.path, given.names
    if not isinstance(entry, dict):
        raise no_entry(entry, path, "method")
    name = entry.get("method")
    if not isinstance(name, str):
        raise BadRequest(f"name a method: one of {', '.join(METHODS)}", f"{path}.method")
    method = METHODS.get(name)
    if method is None:
        known = did_you_mean(name, METHODS) or f"; there are: {', '.join(METHODS)}"
        raise Unavailable(f"there is no decoding method {name!r}{known}", f"{path}.method")
    try:
        params = parsed(method.params, entry, path)
    except BadRequest as error:
        param = (error.param or "").removeprefix(path).lstrip(".")
        raise BadRequest(error.message, _path_of(path, names, param)) from None
    why_off = given.why_off or ("it is off" if method.is_off(params) else "")
    bare = DecodingEntry(path, method, params, names=names, why_off=why_off)
    if given.why_off:
        return bare
    try:
        return _resolved(bare, caps)
    except DecodingError as error:
        where = bare.path_of(error.param)
        is_short = not path or where in names.values()
        raise BadRequest(str(error), where if is_short else field_path(path, error.param, entry)) from None


def _resolved(bare: DecodingEntry, caps: Capabilities) -> DecodingEntry:
    """Raises: WhipstaffError, DecodingError."""
    method, params = bare.method, bare.params
    _check_streams(bare, caps)
    named = [name for name in method.head_fields if getattr(params, name) is not None]
    heads = {name: _head(bare, name, caps) for name in named}
    params = method.with_heads(
        params, {n: HeadFile(head.shared_parts, head.header.defaults) for n, head in heads.items()}
    )
    digests = tuple(head.digest for head in heads.values())
    vectors, ahead = tuple(heads.values()), _ahead(bare, heads, caps.looks_ahead)
    bare = replace(bare, params=params, vectors=vectors, ahead=ahead)
    streams = tuple(method.streams(params).values())
    if isinstance(method, StreamMixer):
        mix, steered = method.mix(params), method.steered(params)
        own = {param: _own_steering(said, bare.path_of(param), caps) for param, said in steered.items()}
        vectors = (*bare.vectors, *(vector for each in own.values() for vector in each.vectors))
        return replace(bare, mix=mix, streams=streams, heads=digests, steered=own, vectors=vectors)
    assert isinstance(method, LogitsRewriter | SearchMethod)
    if caps.words is None:
        if bare.why_off:
            return bare
        raise Unavailable(
            f"{method.name} needs the model's tokenizer, and this server runs without", bare.path_of("method")
        )
    if isinstance(method, SearchMethod):
        if (reason := lacking(method, caps)) and not bare.why_off:
            raise Unavailable(f"{method.name} {reason}", bare.path_of("method"))
        return replace(bare, setting=method.resolve(params, caps.words), streams=streams, heads=digests)
    early = tuple(method.early_layers(params, caps.depth))
    if reason := lacking(method, caps) if not bare.why_off else "":
        raise Unavailable(f"{method.name} {reason}", bare.path_of("method"))
    _check_early(bare, early, caps.depth.kept)
    return replace(bare, setting=method.resolve(params, caps.words), streams=streams, heads=digests, early=early)


def _own_steering(said: Any, path: str, caps: Capabilities) -> SequenceSteering:
    """The steering of a companion, compiled as a request's own."""
    planner, entries, warnings = Planner(), list[SteeringEntry](), list[str]()
    for where, entry in entries_at(said, path, MAX_EDITS):
        admitted = admit_steering(entry, where, planner, entries, caps, warnings)
        if admitted.is_off:
            warnings.append(f"{where} was left out: it is off")
        else:
            entries.append(admitted)
    return SequenceSteering(entries, planner.plan, warnings)


def _check_streams(bare: DecodingEntry, caps: Capabilities) -> None:
    wanted, models = bare.method.streams(bare.params), caps.auxiliaries
    if wanted and not models:
        raise Unavailable(
            f"{bare.method.name} needs auxiliary models, and this server has none; start it with --aux NAME=MODEL for "
            "each",
            bare.path_of("method"),
        )
    for where, name in wanted.items():
        if name not in models:
            known = ", ".join(models)
            raise NotFound(
                f"there is no auxiliary model {name!r}; this server has: {known}; start it with --aux {name}=MODEL",
                bare.path_of(where),
            )


def _check_early(bare: DecodingEntry, layers: Sequence[int], kept: frozenset[int]) -> None:
    if missing := sorted(set(layers) - kept):
        wanted = ",".join(map(str, sorted(kept.union(layers))))
        raise Unavailable(
            f"{bare.method.name} reads layer {missing[0]}, which this server does not keep; start it with "
            f"--early-layers {wanted}",
            bare.path_of("layers"),
        )


def lacking(method: LogitsRewriter[Any] | SearchMethod[Any], caps: Capabilities) -> str:
    """What a method reads that this server does not have, and the flag that it lacks; "" if nothing."""
    tries = "tries tokens before one is chosen"
    needs = {
        "tries": (caps.looks_ahead, tries, "--lookahead"),
        "lookahead": (caps.looks_ahead or bool(method.ahead_fields), tries, "--lookahead"),
        "attention": (caps.reads_attention, "reads what the model's last layer attends to", "--attention-rows"),
        "history": (caps.num_hidden_states > 0, "reads the hidden states of all positions", "--hidden-states N"),
    }
    missing = [(what, flag) for need, (has, what, flag) in needs.items() if need in method.needs and not has]
    whats, flags = (" and ".join(one) for one in zip(*missing, strict=True)) if missing else ("", "")
    return f"{whats}, and this server does not; start it with {flags}" if missing else ""


def head_kinds(method: Method[Any], name: str) -> list[str]:
    """The kinds of learned heads that a parameter may name; the first needs no look ahead."""
    return [fields[name] for fields in (method.head_fields, method.ahead_fields) if name in fields]


def _ahead(bare: DecodingEntry, heads: Mapping[str, Vector], looks_ahead: bool) -> str:
    """The parameter that names a head which reads tokens before one is chosen. Raises: Unavailable."""
    for name, kind in bare.method.ahead_fields.items():
        if name in heads and heads[name].header.method == kind:
            if not looks_ahead:
                raise Unavailable(
                    f"a {kind} judges tokens once they are fed, and this server does not look ahead; start it with "
                    "--lookahead",
                    bare.path_of(name),
                )
            return name
    return "method" if always_tries(bare.method) else ""


def always_tries(method: Method[Any]) -> bool:
    """Whether a method tries tokens before one is chosen, whatever its parameters."""
    return isinstance(method, LogitsRewriter) and "lookahead" in method.needs and not method.ahead_fields


def _head(bare: DecodingEntry, name: str, caps: Capabilities) -> Vector:
    path, wanted = bare.path_of(name), getattr(bare.params, name)
    vector = caps.registry.usable(wanted, path)
    if vector.header.method not in (kinds := head_kinds(bare.method, name)):
        raise BadRequest(
            f"{wanted!r} is a {vector.header.method}; {bare.method.name} reads a {' or '.join(kinds)}", path
        )
    if (num := judged_tokens(vector)) not in (None, caps.vocabulary):
        raise VectorUnfit(f"{wanted!r} judges {num} tokens; the served model has {caps.vocabulary}", path)
    return vector


def judged_tokens(head: Vector) -> int | None:
    """For how many tokens a head has an opinion; None for one that has none of single tokens."""
    sizes = {
        head.shared_parts[part].shape[shape.index("vocab")]
        for part, shape in head.method.parts.items()
        if "vocab" in shape and part in head.shared_parts
    }
    return max(sizes, default=None)


def plan_of(entries: Sequence[DecodingEntry]) -> DecodingPlan | None:
    """The entries as one plan; None if they are none.

    Raises: BadRequest naming an entry that does not go with another.
    """
    _check_together(entries)
    mixes = [entry for entry in entries if entry.mix is not None]
    mix = mixes[0].mix if len(mixes) == 1 else added([entry.mix for entry in mixes if entry.mix is not None])
    rewriting = sorted(filter(_rewrites, entries), key=lambda e: _ORDER[e.method.name])
    rewrites = tuple(
        Rewrite(e.method.name, e.setting.model_dump_json(), e.streams, e.heads, e.early, e.num_tried) for e in rewriting
    )
    search, keeps_hidden = search_of(entries), any("history" in reads(e.method) for e in rewriting)
    plan = DecodingPlan(mix, rewrites, keeps_hidden=keeps_hidden, search=_search_plan(search) if search else None)
    return plan if entries else None


def reads(method: Method[Any]) -> frozenset[str]:
    """What a method that rewrites rows, or searches, reads beside logits."""
    return frozenset(method.needs) if isinstance(method, LogitsRewriter | SearchMethod) else frozenset()


def _rewrites(entry: DecodingEntry) -> bool:
    """Whether an entry's method has something to do with rows of logits."""
    method = entry.method
    return isinstance(method, LogitsRewriter) and not (
        isinstance(method, Ranker) and not method.reads_rows(entry.params)
    )


def ranking_of(entries: Sequence[DecodingEntry]) -> DecodingEntry | None:
    """The entry whose method ranks answers; None where all that are drawn are wanted."""
    return next((entry for entry in entries if isinstance(entry.method, Ranker)), None)


def search_of(entries: Sequence[DecodingEntry]) -> DecodingEntry | None:
    """The entry whose method searches; None where the request draws its tokens."""
    return next((entry for entry in entries if isinstance(entry.method, SearchMethod)), None)


def may_retract(entries: Sequence[DecodingEntry]) -> bool:
    """Whether there is a text to show that may be taken back."""
    search = search_of(entries)
    return search is not None and isinstance(search.method, SearchMethod) and search.method.drafts


def _search_plan(entry: DecodingEntry) -> SearchPlan:
    assert isinstance(entry.method, SearchMethod)
    num_sequences, params = entry.method.num_sequences(entry.params), entry.params
    assert isinstance(params, SearchParams)
    return SearchPlan(
        entry.method.name,
        entry.setting.model_dump_json(),
        num_sequences,
        entry.heads,
        entry.streams,
        params.max_time,
        params.max_computed_tokens,
    )


def _check_together(entries: Sequence[DecodingEntry]) -> None:
    """Combinations whose meaning nobody could say are refused."""
    seen: dict[str, DecodingEntry] = {}
    mix: DecodingEntry | None = None
    temperature: DecodingEntry | None = None
    search: DecodingEntry | None = None
    for entry in entries:
        name = entry.method.name
        if entry.mix is None and name in seen:
            raise BadRequest(
                f"{name} is given twice, here and in {seen[name].path or 'top-level fields'}", entry.path_of("")
            )
        if entry.mix is not None and mix is not None and not (entry.mix.is_sum and mix.mix and mix.mix.is_sum):
            raise BadRequest(
                f"{name} does not go together with {mix.method.name}: only methods that add raw logits add up",
                entry.path_of("method"),
            )
        if entry.method.stage == "temperature" and temperature is not None:
            raise BadRequest(f"{temperature.method.name} sets the temperature already", entry.path_of("method"))
        if isinstance(entry.method, SearchMethod) and search is not None:
            raise BadRequest(
                f"{name} does not go together with {search.method.name}: a request has one search",
                entry.path_of("method"),
            )
        seen[name] = entry
        search = entry if isinstance(entry.method, SearchMethod) else search
        mix = entry if entry.mix is not None else mix
        temperature = entry if entry.method.stage == "temperature" else temperature
    for entry in entries if search is not None else ():
        assert search is not None
        if isinstance(entry.method, Ranker):
            raise BadRequest(
                f"{entry.method.name} ranks what is drawn, and {search.method.name} draws nothing; leave one out",
                entry.path_of("method"),
            )
        if isinstance(entry.method, LogitsRewriter) and (entry.method.state_size or "history" in entry.method.needs):
            raise BadRequest(
                f"{entry.method.name} keeps what it learnt of one sequence, and {search.method.name} has several; "
                "leave one out",
                entry.path_of("method"),
            )
        if entry.method.stage in ("temperature", "truncation"):
            raise BadRequest(
                f"{entry.method.name} changes what is drawn from, and {search.method.name} draws nothing; leave one "
                "out",
                entry.path_of("method"),
            )


def _path_of(path: str, names: Mapping[str, str], param: str) -> str:
    first = param.partition(".")[0].partition("[")[0]
    if first in names:  # a shorthand: its field is the parameter
        return names[first] + param.removeprefix(first)
    if not path:
        return next(iter(names.values()), "")
    return f"{path}.{param}" if param and not param.startswith("[") else path + param
