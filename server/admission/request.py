"""The extra request fields and their compilation: JSON in, a plan and its receipt out, or the error with its path."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from whipstaff.decoding.method import LogitsRewriter
from whipstaff.decoding.plan import DecodingPlan
from whipstaff.server.admission.companions import Coupled, Scoring, couple, wanted_scores
from whipstaff.server.admission.decoding import (
    MAX_DECODING,
    Decoded,
    Unplaced,
    admit_decoding,
    bounds_draw,
    check_draw,
    draws_itself,
    entries_at,
    entries_of,
    plan_of,
)
from whipstaff.server.admission.entries import admit
from whipstaff.server.admission.explanations import ExplainParams, LogprobsSource
from whipstaff.server.admission.positions import place_plan
from whipstaff.server.admission.steering import Fed, Steered, check_one_set
from whipstaff.server.api.text import check_characters
from whipstaff.server.errors import (
    BadRequest,
    NotFound,
    Unavailable,
    VectorUnfit,
    WhipstaffError,
    bad_field,
    no_entry,
    parsed,
)
from whipstaff.server.names import FIELDS, GATES, SHORTHANDS, TEXTS
from whipstaff.server.plan import PositionedPlan, RequestPlan
from whipstaff.server.prompt.message_spans import Prompt
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.plan import SteeringPlan, num_slots
from whipstaff.steering.planner import MAX_EDITS, Planner
from whipstaff.steering.vector_file import Vector

PLAIN = "plain"
SEVERAL = "several"
MAX_TEMPERATURE = 100.0

OnUnavailable = Literal["error", "ignore"]
OnUnknown = Literal["warn", "error"]


@dataclass
class Compiled:
    """A request's extras, ready to run."""

    plan: RequestPlan
    limits: Mapping[str, int]  # of the auxiliary models it needs
    caps: Capabilities
    steering: list[Steered] = field(default_factory=list)
    decoding: list[Decoded] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    is_temperature_last: bool = False
    is_hot: bool = False  # whether its temperature is one that vLLM does not take
    explain: int | None = None  # likeliest tokens of every stream to say
    logprobs_source: LogprobsSource = "final"
    is_dry: bool = False  # whether it is only looked at
    coupled: list[Coupled] = field(default_factory=list)  # further sequences of the prompt placed last
    asked: SteeringPlan = SteeringPlan(())  # noqa: RUF009 - frozen; what `steering` became, not placed in any prompt
    said_of_sequences: list[dict[str, Any]] = field(default_factory=list)  # of all prompts

    @property
    def label(self) -> str:
        """The methods in use, for metrics: few, since it holds names of our own only, and one of each side."""
        sides = {entry.label for entry in self.steering}, {entry.method.name for entry in self.decoding}
        names = [SEVERAL if len(side) > 1 else side.pop() for side in sides if side]
        return "+".join(sorted(names)) or PLAIN

    @property
    def vectors(self) -> list[Vector]:
        """Those of the registry that the engine will look up: kept until it is done with them."""
        named = [vector for entry in self.steering for vector in (entry.vector, entry.probe) if vector is not None]
        return [*named, *(head for entry in self.decoding for head in entry.vectors)]

    @property
    def is_plain(self) -> bool:
        """Whether the engine does nothing differently for it."""
        return self.plan.steering is None and self.plan.decoding is None

    def check(self, prompt_len: int, max_tokens: int, is_explicit: bool) -> int:
        """Check the plan against a prompt; what may be generated, at most.

        Raises: BadRequest for a clause that selects nothing or a context that an auxiliary model does not have.
        """
        allowed = max_tokens
        for name, limit in sorted(self.limits.items(), key=lambda item: item[1]):  # the tightest is the one to name
            if prompt_len >= limit or (is_explicit and prompt_len + max_tokens > limit):
                wanted = f"{prompt_len} prompt tokens" + (f" and max_tokens {max_tokens}" if is_explicit else "")
                path = next(entry.stream_paths[name] for entry in self.decoding if name in entry.stream_paths)
                raise BadRequest(f"auxiliary model {name!r} follows at most {limit} tokens, not {wanted}", path)
            if limit - prompt_len < allowed:
                allowed = limit - prompt_len
                self.warnings.append(
                    f"the answer may have {allowed} tokens: auxiliary model {name!r} follows at most {limit}"
                )
        for sequence in self.coupled:
            room, its_limit = sequence.room(self.caps)
            if room < 1 or (is_explicit and max_tokens > room):
                raise BadRequest(
                    f"after these {len(sequence.member.prompt)} prompt tokens there is room for {max(room, 0)}, not "
                    f"{max_tokens if is_explicit else 1}",
                    sequence.path,
                )
            if room < allowed and its_limit < self.caps.max_len:
                allowed = room
                self.warnings.append(
                    f"the answer may have {allowed} tokens: the sequence of {sequence.path} is followed for {its_limit}"
                )
        if self.plan.steering is not None or self.coupled:
            self._check_steering(self.plan.steering or SteeringPlan(()), prompt_len, allowed)
        return allowed

    def wanted_scores(self, prompt: Prompt) -> dict[str, Scoring]:
        """The texts whose tokens must be scored before the plan can be placed in a prompt. Raises: BadRequest."""
        return {} if self.is_dry else wanted_scores(self.decoding, prompt, self.caps, self.shared_parts)

    @property
    def draws_itself(self) -> bool:
        """Whether the request's own temperature and truncation travel in its plan, and are not vLLM's to do."""
        return draws_itself(self.decoding, self.is_temperature_last or self.is_hot)

    def check_logprobs(self, scores_prompt: bool) -> None:
        """Check where log-probabilities shall come from. Raises: BadRequest, Unavailable."""
        if scores_prompt and (silent := self._silent_on_prompts) is not None:
            raise BadRequest(self.silence_on_prompts, silent.path_of(silent.ahead or "method"))
        if self.logprobs_source == "both" and scores_prompt:
            raise BadRequest("a prompt is scored by one source at a time; ask twice", "logprobs_source")
        if self.logprobs_source != "final" and not self.caps.logprobs_mode.startswith("raw"):
            raise Unavailable(
                f"this server tells log-probabilities of what is drawn from; start it without --logprobs-mode "
                f"{self.caps.logprobs_mode}",
                "logprobs_source",
            )

    @property
    def scores_prompts(self) -> bool:
        """Whether log-probabilities of a prompt's tokens can be told."""
        return self._silent_on_prompts is None

    @property
    def silence_on_prompts(self) -> str:
        """Why they cannot."""
        silent = self._silent_on_prompts
        if silent is None:
            return ""
        if silent.ahead:
            return (
                f"{silent.method.name} tries what may come next, and does so for tokens that are generated only; score "
                "an answer with the method `forced`"
            )
        return (
            f"{silent.method.name} says nothing of a prompt's tokens, which other sequences do not share; score an "
            "answer with the method `forced`"
        )

    @property
    def _silent_on_prompts(self) -> Decoded | None:
        """The method that says nothing of a prompt's tokens; None where there is none, or nobody asks it."""
        silent = (entry for entry in self.decoding if entry.ahead or (entry.mix and entry.mix.num_members))
        return next(silent, None) if self.logprobs_source == "final" else None

    def decoding_plan(self, entries: Sequence[Decoded]) -> DecodingPlan | None:
        """The entries as one plan. Raises: BadRequest."""
        plan = plan_of(entries)
        draws = self.is_temperature_last or self.is_hot
        if plan is None and not (draws or self.explain is not None or self._scores_base):
            return None
        return replace(plan or DecodingPlan(), explain=self.explain, scores_base=self._scores_base)

    @property
    def _scores_base(self) -> bool:
        return self.logprobs_source == "base"

    def check_grammar(self, has_grammar: bool) -> None:
        """A method that says what was banned does not go together with a grammar. Raises: BadRequest."""
        for entry in self.decoding if has_grammar else ():
            if isinstance(entry.method, LogitsRewriter) and entry.method.revives:
                raise BadRequest(f"{entry.method.name} follows no grammar; leave one out", entry.path_of("method"))

    def check_draw(self, temperature: float | None) -> None:
        """Check the request's own sampling parameters. Raises: BadRequest."""
        check_draw(self.decoding, temperature)

    def take_heat(self, temperature: float, truncates: bool) -> None:
        """Take a temperature beyond those of vLLM, where something truncates. Raises: BadRequest."""
        if not (truncates or bounds_draw(self.decoding)):
            raise BadRequest(
                f"{temperature:g} is taken where something truncates, such as min_p, top_n_sigma, top_k or top_p; "
                "alone, at most 2 is: beyond, every token is about as likely",
                "temperature",
            )
        if not temperature <= MAX_TEMPERATURE:
            raise BadRequest(f"at most {MAX_TEMPERATURE:g} is taken", "temperature")
        self.is_hot = True
        self.plan = replace(self.plan, decoding=self.decoding_plan(self.decoding))

    def place(self, prompt: Prompt) -> list[int] | None:
        """Place the plan in a prompt; the prompt with room for inserted rows, None if it stays as it is.

        Raises: BadRequest for a field that does not go with this prompt.
        """
        if self.decoding:
            entries = [entry.placed(prompt, prompt.index, prompt.num) for entry in self.decoding]
            self.coupled = couple(entries, prompt, self.caps, self.shared_parts, self.is_dry)
            self._note_idle()
            self.said_of_sequences += [sequence.said() for sequence in self.coupled]
            members = tuple(sequence.member for sequence in self.coupled)
            self.plan = replace(self.plan, decoding=self.decoding_plan(entries), members=members)
        if self.plan.steering is None:
            return None
        shared_parts = self.shared_parts
        steering, ids = place_plan(shared_parts.plan, shared_parts.paths, shared_parts.soft, prompt)
        self.plan = replace(self.plan, steering=replace(steering, keeps=self.plan.steering.keeps))
        return ids

    @property
    def shared_parts(self) -> Unplaced:
        """The request's own steering, for any of its sequences."""
        return Unplaced(self.steering, self.asked)

    def _note_idle(self) -> None:
        """Say so where an entry of the request's steering finds nothing to edit in a further sequence."""
        for sequence in self.coupled:
            plan, num_tokens = sequence.member.steering, len(sequence.member.prompt)
            for entry in self.steering if plan is not None and sequence.entries is self.steering else ():
                assert plan is not None
                if not any(one.where.selects(num_tokens) for one in entry.planned(plan)) and entry.soft is None:
                    self.warnings.append(f"{entry.path} selects no token of the sequence of {sequence.path}")

    @property
    def stream_names(self) -> dict[str, str]:
        """As explanations call the streams of further sequences -> by the name or the field that the client gave."""
        names = [sequence.name for sequence in self.coupled]
        labels = [one.name if names.count(one.name) == 1 else one.path for one in self.coupled]
        mix = self.plan.decoding.mix if self.plan.decoding else None
        return {
            stream.label: f"{stream.model}[{labels[stream.member - 1]}]" if stream.model else labels[stream.member - 1]
            for stream in (mix.streams if mix and labels else ())
            if stream.member
        }

    def _check_steering(self, plan: SteeringPlan, prompt_len: int, allowed: int) -> None:
        check_one_set(self.steering, plan)
        for entry in self.steering:
            entry.check_keys(plan, prompt_len, self.caps)
            for planned in entry.planned(plan):
                try:
                    planned.where.check(prompt_len, allowed)
                except SteeringError as error:
                    raise BadRequest(str(error), f"{entry.path}.{error.param}") from None
        self._check_columns(plan)
        rows = PositionedPlan(self.plan, prompt_len).rows.union(*(sequence.rows() for sequence in self.coupled))
        wanted = sum(num_slots(row, self.caps.num_layers) for row in rows)
        if wanted > self.caps.num_slots:
            raise Unavailable(
                f"these vectors overlap in {len(rows)} different ways that take {wanted} slots together, and this "
                f"server has {self.caps.num_slots}; start it with a larger --steering-slots",
                "steering",
            )

    def _check_columns(self, plan: SteeringPlan) -> None:
        further = [sequence.member.steering for sequence in self.coupled]
        wanted = plan.num_columns + sum(one.num_columns for one in further if one is not None)
        if wanted > self.caps.num_histories:
            raise Unavailable(
                f"the conditions of the request's {1 + len(further)} sequences read {wanted} things, and this server "
                f"keeps {self.caps.num_histories} at once",
                "steering",
            )

    def leave_out(self, what: str, why: str, is_several: bool = False) -> None:
        """Say that something changes nothing, and was left out."""
        self.warnings.append(f"{what} {'were' if is_several else 'was'} left out: {why}")

    def receipt(self, fed: list[Fed]) -> dict[str, Any]:
        """What was done, for the response; `fed` are the finished sequences."""
        plan = self.plan.steering or SteeringPlan(())
        return {
            "steering": [entry.said(plan, fed, self.caps) for entry in self.steering],
            "decoding": [entry.said() for entry in self.decoding],
            **({"sequences": self.said_of_sequences} if self.said_of_sequences else {}),
            "warnings": self.warnings,
        }


def compile_extras(fields: Mapping[str, Any], catalogue: Capabilities, merges: bool = False) -> Compiled | None:
    """Compile a request's `steering` and `decoding`; None for a plain request.

    Args:
        merges: whether `decoding` is a preset's default, which the request's other fields overrule.

    Raises: WhipstaffError with the JSON path of the first field that cannot be honoured.
    """
    if all(fields.get(name) is None for name in FIELDS):
        return None
    is_lenient = _one_of(OnUnavailable, fields, "on_unavailable", "error") == "ignore"
    compiled = Compiled(RequestPlan(), {}, catalogue, is_temperature_last=_flag(fields, "temperature_last"))
    compiled.logprobs_source = _one_of(LogprobsSource, fields, "logprobs_source", "final")
    if (explain := fields.get("explain")) is not None or compiled.logprobs_source == "both":
        compiled.explain = parsed(ExplainParams, {} if explain is None else _json(explain, "explain"), "explain").top
    planner = Planner()
    for path, entry in _entries(fields.get("steering"), "steering", MAX_EDITS):
        try:
            steered = admit(entry, path, planner, compiled.steering, catalogue, compiled.warnings)
            compiled.leave_out(path, "it is off") if steered.is_off else compiled.steering.append(steered)
        except (NotFound, VectorUnfit, Unavailable) as error:
            _skip(error, compiled, is_lenient)
    named = _entries(fields.get("decoding"), "decoding", MAX_DECODING)
    short = {name: fields.get(name) if name in TEXTS else loose(fields.get(name)) for name in (*SHORTHANDS, *GATES)}
    for asked in entries_of(short, named, merges):
        try:
            decoded = admit_decoding(asked, catalogue)
            if decoded.why_off:
                compiled.leave_out(asked.where, decoded.why_off, asked.is_several)
            else:
                compiled.decoding.append(decoded)
                compiled.warnings += [said for own in decoded.steered.values() for said in own.warnings]
        except (NotFound, VectorUnfit, Unavailable) as error:
            _skip(error, compiled, is_lenient)
    decoding = compiled.decoding_plan(compiled.decoding)
    models = decoding.models if decoding else []
    everybodys = [compiled.steering, *(own.entries for entry in compiled.decoding for own in entry.steered.values())]
    if models and (soft := next((entry.soft for entries in everybodys for entry in entries if entry.soft), None)):
        raise BadRequest("auxiliary models have no embeddings for the rows of a soft prompt", f"{soft.path}.vector")
    steering = planner.plan if compiled.steering else None
    compiled.asked = planner.plan
    _check_ahead(compiled)
    if decoding and decoding.early_layers:
        steering = replace(steering or SteeringPlan(()), keeps=decoding.early_layers)
    compiled.plan = RequestPlan(steering, decoding, uuid4().hex if steering and steering.num_columns else "")
    compiled.limits = {name: catalogue.auxiliaries[name] for name in models}
    return compiled


def _check_ahead(compiled: Compiled) -> None:
    """A token that is tried is steered as if it were chosen, which nothing may depend on. Raises: BadRequest."""
    trying = [entry.path_of(entry.ahead) for entry in compiled.decoding if entry.ahead]
    for entry in compiled.steering if trying else ():
        if entry.params.schedule is not None and entry.params.schedule.shape == "entropy":
            raise BadRequest(
                f"the entropy of what a token is drawn from is not known while {trying[0]} lets it be tried",
                f"{entry.path}.schedule",
            )


def _one_of(choices: Any, fields: Mapping[str, Any], name: str, default: str) -> Any:
    value = fields.get(name)
    try:
        return TypeAdapter(choices).validate_python(default if value is None else value)
    except ValidationError as error:
        raise bad_field(error, value, name) from None


def on_unknown(fields: Mapping[str, Any]) -> str:
    """What to do with names that nobody knows. Raises: BadRequest."""
    found: str = _one_of(OnUnknown, fields, "on_unknown", "warn")
    return found


def _json(value: Any, name: str) -> Any:
    """A value, or what a JSON string holds (vllm_xargs' way)."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"not JSON: {error}", name) from None
    check_characters(found, name)
    return found


def loose(value: Any) -> Any:
    """What a JSON string holds, or the string if it is none, such as `low`."""
    try:
        return _json(value, "")
    except BadRequest:
        return value


def _entries(value: Any, name: str, most: int) -> list[tuple[str, Any]]:
    """A field's entries by their paths: a list's, a single object, or either in a JSON string (vllm_xargs' way)."""
    if isinstance(value, str) and value.strip()[:1] not in ("{", "[", '"'):
        raise no_entry(value, name, "method" if name == "decoding" else "vector")
    return entries_at(_json(value, name), name, most)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = loose(fields.get(name))
    if value not in (None, False, True):  # 0 and 1 too: what vLLM's xargs make of the two
        raise BadRequest("true or false", name)
    return bool(value)


def _skip(error: WhipstaffError, compiled: Compiled, is_lenient: bool) -> None:
    """Leave an entry out if the request allows that, and say so in the receipt."""
    if not is_lenient:
        raise error
    compiled.warnings.append(f"{error.param} was left out: {error.message}")
