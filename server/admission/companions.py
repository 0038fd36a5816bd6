"""The companions of a request, which are further sequences that emit its tokens: their prompts, their steering, and
whether this server can hold them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from whipstaff.decoding.method import Companion, DecodingError, StreamMixer
from whipstaff.decoding.search.search import SearchMethod
from whipstaff.server.admission.decoding import DecodingEntry
from whipstaff.server.admission.positions import steering_at_prompt
from whipstaff.server.admission.steering import SequenceSteering, SteeringEntry, check_one_set
from whipstaff.server.errors import BadRequest, NotFound, Unavailable
from whipstaff.server.plan import STEPS_AHEAD, CompanionPlan, PositionedPlan, RequestPlan, Scoring
from whipstaff.server.prompt.message_spans import Adapter, Prompt
from whipstaff.server.prompt.prompt_source import PromptSource
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.plan import EditSet, PlannedEdit, PlannedModuleEdit, SteeringPlan

UNSTEERED = "explain.unsteered"


@dataclass(frozen=True)
class PlacedCompanion:
    """A companion of a request in one of its prompts."""

    path: str  # the field that it comes from
    plan: CompanionPlan
    told: Mapping[str, Any] = field(default_factory=dict)  # what its method says of it
    models: frozenset[str] = frozenset()  # auxiliary models that read it
    entries: Sequence[SteeringEntry] = ()  # what its steering came of

    @property
    def name(self) -> str:
        """As the client called it, or else its field."""
        return str(self.told.get("name", self.path))

    def room(self, caps: Capabilities) -> tuple[int, int]:
        """How many tokens can follow its prompt while it is needed, and the longest it may become. The scheduler itself
        ends a request whose sequence reaches the served model's context; see `groups`."""
        most = min([caps.max_len, *(caps.auxiliaries[model] for model in self.models)])
        room = most - len(self.plan.prompt)
        until = self.plan.until
        return (caps.max_len if until is not None and until + STEPS_AHEAD <= room else room), most

    def rows(self) -> frozenset[EditSet]:
        """The distinct rows of edits that it may need at once."""
        return PositionedPlan(RequestPlan(self.plan.steering), len(self.plan.prompt)).rows

    def to_json(self) -> dict[str, Any]:
        """The companion as the receipt shows it."""
        said = {"field": self.path, "prompt_tokens": len(self.plan.prompt), **self.told}
        return {**said, "steered": self.plan.steering is not None}


def wanted_scores(
    entries: Sequence[DecodingEntry], prompt: Prompt, caps: Capabilities, request: SequenceSteering
) -> dict[str, Scoring]:
    """The texts whose tokens must be scored before further prompts can be made, by their entry; `request` is the
    request's own steering.

    Raises: BadRequest.
    """
    found: dict[str, Scoring] = {}
    source = prompt.source
    for entry in _with_companions(entries) if source else ():
        assert source is not None
        if ids := _scored(entry, source, caps):
            own = entry.steered.get("steering")
            plan, expanded = _steered(
                request if own is None else own, own is None, ids, prompt, caps, entry.path_of("")
            )
            found[entry.method.name] = Scoring(expanded, plan)
    return found


def companions_at_prompt(
    entries: Sequence[DecodingEntry], prompt: Prompt, caps: Capabilities, request: SequenceSteering, is_dry: bool
) -> list[PlacedCompanion]:
    """Every companion that the entries ask for, in the order in which their mixes count them.

    Args:
        request: the request's own steering, which holds for companions that have none of their own.
        is_dry: whether nothing was scored, since nothing will run; what depends on scores is then left out.

    Raises: BadRequest, NotFound, Unavailable.
    """
    found: list[PlacedCompanion] = []
    for entry in _with_companions(entries):
        if prompt.source is None:
            raise BadRequest("further prompts can only be made of a prompt of text or tokens", entry.path_of("method"))
        if is_dry and _scored(entry, prompt.source, caps):
            continue
        try:
            made = _method(entry).companions(entry.params, prompt.source, prompt.scores.get(entry.method.name, ()))
        except DecodingError as error:
            raise BadRequest(str(error), entry.path_of(error.param)) from None
        found += [_checked(entry, number, companion, prompt, caps, request) for number, companion in enumerate(made, 1)]
    return found


def read_by_adapter(
    entry: DecodingEntry, prompt: Prompt, caps: Capabilities, request: SequenceSteering
) -> PlacedCompanion | None:
    """The request's own prompt under the adapter by which its search reads hidden states; None where it names none.

    Args:
        request: the request's own steering, which holds there, too.

    Raises: BadRequest, NotFound, Unavailable.
    """
    method = entry.method
    assert isinstance(method, SearchMethod)
    if (name := method.adapter(entry.params)) is None:
        return None
    path = entry.path_of(method.adapter_field)
    if prompt.source is None:
        raise BadRequest("an adapter can read a prompt of text or tokens only", path)
    companion = Companion(prompt.source.ids, method.adapter_field, adapter=(name, method.adapter_field))
    plan, expanded = _steered(request, True, companion.prompt, prompt, caps, path)
    its_plan = CompanionPlan(tuple(expanded), plan, adapter=_adapter(entry, companion, prompt, caps))
    return PlacedCompanion(path, its_plan, {"name": name}, entries=request.entries)


def unsteered(prompt: Prompt) -> PlacedCompanion:
    """The request's own prompt without its steering, which no mix reads. Raises: BadRequest."""
    if prompt.ids is None:
        raise BadRequest("the model without steering reads a prompt of text or tokens only", UNSTEERED)
    return PlacedCompanion(UNSTEERED, CompanionPlan(tuple(prompt.ids)))


def check_number(found: Sequence[PlacedCompanion], prompt: Prompt, caps: Capabilities) -> None:
    """Whether this server can run all of a request's companions, of which there are some, at once. Raises:
    Unavailable."""
    adapters = {prompt.adapter, *(one.plan.adapter for one in found)} - {None}
    for num, most, what, flag in (
        (len(found) + 1, caps.max_seqs, "sequences", "--max-num-seqs"),
        (len(adapters), caps.max_adapters, "adapters", "--max-loras"),
    ):
        if num > most:
            raise Unavailable(
                f"the request needs {num} {what} at once and this server runs {most}; start it with a larger {flag}",
                found[0].path,
            )


def _with_companions(entries: Sequence[DecodingEntry]) -> Iterator[DecodingEntry]:
    return (entry for entry in entries if entry.mix is not None and entry.mix.num_companions)


def _method(entry: DecodingEntry) -> StreamMixer[Any]:
    assert isinstance(entry.method, StreamMixer)
    return entry.method


def _scored(entry: DecodingEntry, source: PromptSource, caps: Capabilities) -> Sequence[int]:
    try:
        ids = _method(entry).scored(entry.params, source)
    except DecodingError as error:
        raise BadRequest(str(error), entry.path_of(error.param)) from None
    if len(ids) >= caps.max_len:
        raise BadRequest(f"{len(ids)} tokens cannot be scored; at most {caps.max_len - 1}", entry.path_of("method"))
    return ids


def _checked(
    entry: DecodingEntry,
    number: int,
    companion: Companion,
    prompt: Prompt,
    caps: Capabilities,
    request: SequenceSteering,
) -> PlacedCompanion:
    path, ids = entry.path_of(companion.param), companion.prompt
    if not 0 < len(ids) < caps.max_len:
        raise BadRequest(f"this prompt has {len(ids)} tokens; it may have 1 to {caps.max_len - 1}", path)
    if bad := [token for token in ids if token >= caps.vocabulary]:
        raise BadRequest(f"token {bad[0]} is not in the vocabulary, which has {caps.vocabulary}", path)
    assert entry.mix is not None
    models = frozenset(s.model for s in entry.mix.streams if s.companion == number)
    own = entry.steered.get(companion.steering)
    steering = (request if own is None else own) if "" in models else SequenceSteering()
    plan, expanded = _steered(steering, own is None, ids, prompt, caps, path)
    its_plan = CompanionPlan(tuple(expanded), plan, entry.mix.window.end, _adapter(entry, companion, prompt, caps))
    return PlacedCompanion(path, its_plan, companion.told, models - {""}, steering.entries)


def _adapter(entry: DecodingEntry, companion: Companion, prompt: Prompt, caps: Capabilities) -> Adapter | None:
    if companion.adapter is None:
        return None
    name, param = companion.adapter
    if not caps.max_adapters:
        raise Unavailable(
            "this server takes no LoRA adapters; start it with --enable-lora --lora-modules NAME=PATH",
            entry.path_of(param),
        )
    if name not in prompt.adapters:
        known = ", ".join(prompt.adapters) or "none"
        raise NotFound(
            f"there is no adapter {name!r}; this server has: {known}; start it with --lora-modules {name}=PATH",
            entry.path_of(param),
        )
    return prompt.adapters[name]


def _steered(
    steering: SequenceSteering, is_shared: bool, ids: Sequence[int], prompt: Prompt, caps: Capabilities, path: str
) -> tuple[SteeringPlan | None, Sequence[int]]:
    """Steering in a further prompt, and that prompt with room for inserted rows. Raises: BadRequest.

    Args:
        is_shared: whether it is the request's own: a clause of that need not select anything here.
        path: the field that the prompt comes from.
    """
    if not steering.entries:
        return None, ids
    assert prompt.source is not None
    here = Prompt(len(ids), list(ids), caps.max_len - 1, prompt.tokenizer, prompt.source.chat(ids), prompt.source)
    try:
        plan, expanded = steering_at_prompt(steering.plan, steering.paths, steering.soft, here, is_shared)
        check_one_set(steering.entries, plan)
        num = len(ids if expanded is None else expanded)
        for entry in steering.entries:
            entry.check_prompt(plan, num, caps)
            for planned in () if is_shared else entry.planned(plan):
                _check_selects(planned, num, entry.path)
    except BadRequest as error:
        raise BadRequest(
            f"{error.message} (in the further sequence of {path}, which `steering: []` there leaves alone)", error.param
        ) from None
    return plan, ids if expanded is None else expanded


def _check_selects(planned: PlannedEdit | PlannedModuleEdit, num_tokens: int, path: str) -> None:
    try:
        planned.where.check(num_tokens, 1 << 30)
    except SteeringError as error:
        raise BadRequest(str(error), f"{path}.{error.param}") from None
