"""The two values that a request becomes: compiled, before any prompt is known, and placed, in each of its prompts.

Both are made before anything is scheduled and never change. `prepare` makes the first; `CompiledRequest.at_prompt`
makes the second, a `server.plan.PlacedRequest`, and checks what depends on the prompt: that clauses select something,
what room is left, how many slots and conditions the request and its companions need.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from whipstaff.decoding.method import Candidate, LogitsRewriter, Ranker
from whipstaff.decoding.plan import DecodingPlan, Explain
from whipstaff.server.admission.captures import (
    AnyEntry,
    Format,
    ProbeEntry,
    check_captures,
    most_file_bytes,
    probes_among,
    reading_at_prompt,
)
from whipstaff.server.admission.companions import (
    PlacedCompanion,
    check_number,
    companions_at_prompt,
    read_by_adapter,
    unsteered,
    wanted_scores,
)
from whipstaff.server.admission.decoding import DecodingEntry, may_retract, plan_of, ranking_of, search_of
from whipstaff.server.admission.explanations import LogprobsSource
from whipstaff.server.admission.fields import AskedRequest
from whipstaff.server.admission.positions import expanded, steering_at_prompt
from whipstaff.server.admission.search import check_answers, check_retractions, check_told, without_effect
from whipstaff.server.admission.steering import SequenceSteering, check_one_set
from whipstaff.server.errors import BadRequest, FieldOrigins, Unavailable, naming_prompt
from whipstaff.server.metrics import MIXED, PLAIN, SEVERAL
from whipstaff.server.plan import PlacedRequest, PositionedPlan, RequestPlan, Scoring
from whipstaff.server.prompt.message_spans import Prompt
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.presets import Preset
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.plan import SteeringPlan, num_slots
from whipstaff.steering.vector_file import Vector

MAX_TEMPERATURE = 100.0
_GREEDY_BELOW = 1e-5  # as in vLLM


@dataclass(frozen=True)
class Options:
    """What a request says beside its entries."""

    is_temperature_last: bool = False
    is_hot: bool = False  # whether its temperature is one that vLLM does not take
    explain: Explain | None = None
    logprobs_source: LogprobsSource = "final"
    streams_retractions: bool = False  # whether a search may tell what it may take back
    is_dry: bool = False  # whether it is only looked at
    capture_format: Format = "base64"  # how the client gets what was read

    def decoding_plan(self, entries: Sequence[DecodingEntry]) -> DecodingPlan | None:
        """The entries as one plan; None if decoding is vLLM's. Raises: BadRequest."""
        plan, scores_base = plan_of(entries) if entries else None, self.logprobs_source == "base"
        takes_over = self.is_temperature_last or self.is_hot or self.explain is not None or scores_base
        if plan is None and not takes_over:
            return None
        if plan is not None and plan.search is not None:
            search = plan.search._replace(tells_drafts=self.streams_retractions and may_retract(entries))
            return replace(plan, explain=self.explain, search=search)  # what it decides is explained, and no draw
        ranking = ranking_of(entries)
        needs_explaining = ranking is not None and _ranker(ranking).reads_rows(ranking.params)
        explain = Explain(0) if self.explain is None and needs_explaining else self.explain
        return replace(plan or DecodingPlan(), explain=explain, scores_base=scores_base)


@dataclass(frozen=True)
class CompiledRequest:
    """A request's extras, ready for any prompt."""

    caps: Capabilities
    plan: RequestPlan = RequestPlan()  # noqa: RUF009 - frozen
    steering: SequenceSteering = SequenceSteering()  # noqa: RUF009 - a tuple
    captures: tuple[AnyEntry, ...] = ()
    decoding: tuple[DecodingEntry, ...] = ()
    options: Options = Options()
    limits: Mapping[str, int] = field(default_factory=dict)  # of the auxiliary models that it needs
    warnings: tuple[str, ...] = ()
    origins: FieldOrigins = FieldOrigins()  # noqa: RUF009 - frozen
    preset: Preset | None = None

    @property
    def label(self) -> str:
        """The method in use, for metrics, which have no room for every combination."""
        steering, decoding = {e.label for e in self.steering.entries}, {e.method.name for e in self.decoding}
        if steering and decoding:
            return MIXED
        names = steering | decoding
        return SEVERAL if len(names) > 1 else next(iter(names), PLAIN)

    @property
    def asked(self) -> dict[str, Any]:
        """What traces say of it: the methods that it names, in their order, and the preset."""
        names = [*(e.label for e in self.steering.entries), *(e.method.name for e in self.decoding)]
        return {"methods": names} | ({"preset": self.preset.name} if self.preset else {})

    @property
    def vectors(self) -> list[Vector]:
        """Those of the registry that the engine will look up: kept until it is done with them."""
        heads = (head for entry in self.decoding for head in entry.vectors)
        probes = [entry.probe for entry in probes_among(self.captures)] if self.captures else []
        return [*self.steering.vectors, *heads, *probes]

    @property
    def asked_for(self) -> dict[str, str]:
        """The methods that the client itself named, by their paths; a preset's are its operator's."""
        steering = {entry.path: entry.vector.method.name for entry in self.steering.entries}
        decoding = {entry.path_of("method"): entry.method.name for entry in self.decoding}
        return {path: name for path, name in (steering | decoding).items() if not self.origins.is_filled(path)}

    @property
    def is_plain(self) -> bool:
        """Whether the engine does nothing differently for it."""
        return self.plan.steering is None and self.plan.decoding is None

    @property
    def tells_sequences(self) -> bool:
        """Whether its receipt says of each answer what was read for it."""
        return bool(self.captures) or (bool(self.plan.readings_id) and not self.num_candidates)

    @property
    def downloads(self) -> bool:
        """Whether its client fetches what was read."""
        return self.options.capture_format == "download"

    def most_file_bytes(self, placed: Sequence[PlacedRequest], num_answers: int) -> int:
        """How large the file with it can become, of so many answers to each prompt."""
        plans = [PositionedPlan(one.plan, one.num_tokens) for one in placed]
        return num_answers * sum(most_file_bytes(plan, self.caps.model) for plan in plans)

    @property
    def reads_prompt(self) -> bool:
        """Whether its prompts must be told apart: messages, tokens by their text, room for rows, other prompts."""
        steering = self.steering.plan
        clauses = [one.where for some in (steering.edits, steering.module_edits, self.captures) for one in some]
        return bool(self.decoding or self.steering.soft) or any(where.needs_prompt for where in clauses)

    @property
    def reads_along(self) -> bool:
        """Whether its client is told what probes read, as it comes."""
        return self.plan.steering is not None and bool(self.plan.steering.told)

    def readings_by_entry(self, values: Sequence[float | None]) -> dict[str, float]:
        """What was read of one token, by the number of the entry of `capture` that asks for it.

        Args:
            values: of the plan's `told`, in order.
        """
        assert self.plan.steering is not None
        at_column = dict(zip(self.plan.steering.told, values, strict=True))
        read = (
            (number, at_column[one.column]) for number, one in enumerate(self.captures) if isinstance(one, ProbeEntry)
        )
        return {str(number): value for number, value in read if value is not None}

    def dry(self) -> "CompiledRequest":
        """The same, to be looked at only."""
        return replace(self, options=replace(self.options, is_dry=True))

    # ---- in a prompt

    def wanted_scores(self, prompt: Prompt) -> dict[str, Scoring]:
        """The texts whose tokens must be scored before the plan can be placed in a prompt. Raises: BadRequest."""
        if self.options.is_dry or not self.decoding:
            return {}
        with self.origins.named():
            return wanted_scores(self.decoding, prompt, self.caps, self.steering)

    def at_prompt(self, prompt: Prompt, most_tokens: Callable[[int], int], is_explicit: bool) -> PlacedRequest:
        """The request in one of its prompts.

        Args:
            most_tokens: how many tokens vLLM lets follow a prompt of that many.
            is_explicit: whether the client itself said how many it wants.

        Raises: WhipstaffError naming the field that does not go with this prompt.
        """
        with naming_prompt(prompt.index, prompt.num), self.origins.named():
            return self._at_prompt(prompt, most_tokens, is_explicit)

    def _at_prompt(self, prompt: Prompt, most_tokens: Callable[[int], int], is_explicit: bool) -> PlacedRequest:
        plan, ids, companions, warnings = self.plan, None, list[PlacedCompanion](), list[str]()
        if plan.steering is not None:
            shared = self.steering
            steering, ids = steering_at_prompt(shared.plan, shared.paths, shared.soft, prompt)
            if self.captures:
                steering = reading_at_prompt(self.captures, steering, plan.steering, prompt)
            plan = replace(plan, steering=replace(steering, keeps=plan.steering.keeps))
        if self.decoding:
            facts = expanded(prompt, plan.steering.inserts if plan.steering else (), ids)
            entries = [entry.at_prompt(facts, prompt.index, prompt.num) for entry in self.decoding]
            companions = companions_at_prompt(entries, prompt, self.caps, self.steering, self.options.is_dry)
            plan = replace(plan, decoding=self.options.decoding_plan(entries))
            search = search_of(entries)
            if search and (reader := read_by_adapter(search, prompt, self.caps, self.steering)):
                companions.append(reader)
                plan = plan.reading(len(companions))
            warnings += self._idle(companions)
        if self.steering.entries and (explain := plan.explain) is not None and explain.unsteered is not None:
            companions.append(unsteered(prompt))
            plan = plan.explaining(explain._replace(unsteered=len(companions)))
        if companions:
            check_number(companions, prompt, self.caps)
            plan = replace(plan, companions=tuple(one.plan for one in companions))
        num_tokens = prompt.num_tokens if ids is None else len(ids)
        allowed = self._allowed(companions, num_tokens, most_tokens(num_tokens), is_explicit, warnings)
        if self.captures:
            plan = replace(plan, max_fed=num_tokens + allowed - 1)
            check_captures(self.captures, PositionedPlan(plan, num_tokens), allowed, self.caps)
        if plan.steering is not None or companions:
            self._check_steering(plan, companions, num_tokens, allowed)
        return PlacedRequest(
            replace(plan, label=self.label),
            num_tokens,
            allowed,
            ids,
            self.draws_itself,
            self.options.is_temperature_last,
            _stream_names(plan.decoding, companions),
            tuple(one.to_json() for one in companions),
            tuple(warnings),
        )

    def _idle(self, companions: Sequence[PlacedCompanion]) -> list[str]:
        """What to say where an entry of the request's steering finds nothing to edit in a companion."""
        found: list[str] = []
        for companion in companions:
            plan, num_tokens = companion.plan.steering, len(companion.plan.prompt)
            shared = self.steering.entries if companion.entries is self.steering.entries else ()
            for entry in shared if plan is not None else ():
                assert plan is not None
                if not any(one.where.selects(num_tokens) for one in entry.planned(plan)) and entry.soft is None:
                    found.append(f"{entry.path} selects no token of the sequence of {companion.path}")
        return found

    def _allowed(
        self,
        companions: Sequence[PlacedCompanion],
        prompt_len: int,
        max_tokens: int,
        is_explicit: bool,
        warnings: list[str],
    ) -> int:
        """How many tokens may be generated at most; why they are fewer is added to `warnings`.

        Raises: BadRequest for a context that an auxiliary model or a companion does not have.
        """
        allowed = max_tokens
        for name, limit in sorted(self.limits.items(), key=lambda item: item[1]):  # the tightest is the one to name
            if prompt_len >= limit or (is_explicit and prompt_len + max_tokens > limit):
                wanted = f"{prompt_len} prompt tokens" + (f" and max_tokens {max_tokens}" if is_explicit else "")
                path = next(entry.stream_paths[name] for entry in self.decoding if name in entry.stream_paths)
                raise BadRequest(f"auxiliary model {name!r} follows at most {limit} tokens, not {wanted}", path)
            if limit - prompt_len < allowed:
                allowed = limit - prompt_len
                warnings.append(
                    f"the answer may have {allowed} tokens: auxiliary model {name!r} follows at most {limit}"
                )
        for companion in companions:
            room, its_limit = companion.room(self.caps)
            if room < 1 or (is_explicit and max_tokens > room):
                raise BadRequest(
                    f"after these {len(companion.plan.prompt)} prompt tokens there is room for {max(room, 0)}, not "
                    f"{max_tokens if is_explicit else 1}",
                    companion.path,
                )
            if room < allowed and its_limit < self.caps.max_len:
                allowed = room
                warnings.append(
                    f"the answer may have {allowed} tokens: the sequence of {companion.path} is followed for "
                    f"{its_limit}"
                )
        return allowed

    def _check_steering(
        self, plan: RequestPlan, companions: Sequence[PlacedCompanion], prompt_len: int, allowed: int
    ) -> None:
        """Raises: BadRequest for a clause that selects nothing, Unavailable for what does not fit into this server."""
        steering = plan.steering or SteeringPlan(())
        check_one_set(self.steering.entries, steering)
        for entry in self.steering.entries:
            entry.check_prompt(steering, prompt_len, self.caps)
            for planned in entry.planned(steering):
                try:
                    planned.where.check(prompt_len, allowed)
                except SteeringError as error:
                    raise BadRequest(str(error), f"{entry.path}.{error.param}") from None
        further = [companion.plan.steering for companion in companions]
        num = self.num_sequences
        read = num * (steering.num_columns + sum(one.num_columns for one in further if one is not None))
        if read > self.caps.num_histories:
            raise Unavailable(
                f"the conditions of the request's {num * (1 + len(further))} sequences read {read} things, and this "
                f"server keeps {self.caps.num_histories} at once",
                "steering" if self.steering.entries else "capture",
            )
        rows = PositionedPlan(plan, prompt_len).rows.union(*(companion.rows() for companion in companions))
        wanted = sum(num_slots(row, self.caps.num_layers) for row in rows)
        if wanted > self.caps.num_slots:
            raise Unavailable(
                f"these vectors overlap in {len(rows)} different ways that take {wanted} slots together, and this "
                f"server has {self.caps.num_slots}; start it with a larger --steering-slots",
                "steering",
            )

    # ---- beside what else the request says

    @property
    def search(self) -> DecodingEntry | None:
        """The entry whose method searches; None where tokens are drawn."""
        return search_of(self.decoding)

    @property
    def searches(self) -> bool:
        return self.search is not None

    @property
    def retracts(self) -> bool:
        """Whether it streams what a search may take back."""
        search = self.plan.decoding.search if self.plan.decoding else None
        return search is not None and search.tells_drafts

    @property
    def ranking(self) -> DecodingEntry | None:
        """The entry whose method ranks answers; None where all that are drawn are wanted."""
        return ranking_of(self.decoding)

    @property
    def num_candidates(self) -> int:
        """How many answers are drawn, of which the best are returned; 0: those that the request wants."""
        ranking = self.ranking
        return _ranker(ranking).num_candidates(ranking.params) if ranking else 0

    def score(self, candidate: Candidate) -> float:
        """Of one of them; the higher the better."""
        ranking = self.ranking
        assert ranking is not None
        return _ranker(ranking).score(ranking.params, candidate)

    def check_candidates(self, num: int) -> None:
        """Whether enough answers are drawn. Raises: BadRequest."""
        ranking = self.ranking
        if ranking is not None and num > self.num_candidates:
            raise BadRequest(f"{ranking.method.name} draws {self.num_candidates} candidates; that is all there is", "n")

    @property
    def num_sequences(self) -> int:
        """The most sequences of the request's own that live at once: of a search, it may be several."""
        decoding = self.plan.decoding
        return decoding.search.num_sequences if decoding and decoding.search else self.num_candidates or 1

    def beside(self, request: AskedRequest) -> "CompiledRequest":
        """A search beside what else its request says. Raises: BadRequest."""
        search = self.search
        assert search is not None
        check_answers(search, request.n or 1)
        check_told(search, request)
        if request.logprobs_field and self.options.logprobs_source == "base":
            raise BadRequest(
                f"{search.method.name} decides over what is decoded, and tells no others", "logprobs_source"
            )
        if self.options.streams_retractions:
            check_retractions(request)
        self.check_grammar(request.has_grammar)
        return replace(self, warnings=(*self.warnings, *without_effect(search, request)))

    @property
    def draws_itself(self) -> bool:
        """Whether the request's own temperature and truncation travel in its plan, and are not vLLM's to do."""
        if self.search is not None:
            return False  # nothing is drawn
        stages = {entry.method.stage for entry in self.decoding}
        return (
            self.options.is_temperature_last
            or self.options.is_hot
            or (self.options.explain is not None and self.options.explain.is_drawn)
            or bool(stages & {"penalty", "temperature", "truncation"})
        )

    def heated(self, temperature: float, truncates: bool) -> "CompiledRequest":
        """With a temperature beyond those of vLLM, where something truncates. Raises: BadRequest."""
        if not (truncates or any(entry.bounds_draw for entry in self.decoding)):
            raise BadRequest(
                f"{temperature:g} is taken where something truncates, such as min_p, top_n_sigma, top_k or top_p; "
                "alone, at most 2 is: beyond, every token is about as likely",
                "temperature",
            )
        if not temperature <= MAX_TEMPERATURE:
            raise BadRequest(f"at most {MAX_TEMPERATURE:g} is taken", "temperature")
        options = replace(self.options, is_hot=True)
        plan = replace(self.plan, decoding=options.decoding_plan(self.decoding))
        return replace(self, options=options, plan=plan)

    def check_draw(self, temperature: float | None) -> None:
        """Methods that choose a temperature leave no meaning to a request's greedy 0. Raises: BadRequest."""
        for entry in self.decoding if temperature is not None and 0 <= temperature < _GREEDY_BELOW else ():
            if entry is self.ranking:
                raise BadRequest(
                    f"at temperature 0 the candidates of {entry.method.name} are all the same; leave one of them out",
                    entry.path_of("method"),
                )
            if entry.chooses_temperature:
                raise BadRequest(
                    f"{entry.method.name} chooses the temperature, and 0 leaves nothing to choose; leave one of them "
                    "out",
                    entry.path_of("method"),
                )

    def check_grammar(self, has_grammar: bool) -> None:
        """A method that says what was banned, or that has several sequences of which each would stand elsewhere in it,
        does not go together with a grammar. Raises: BadRequest."""
        for entry in self.decoding if has_grammar else ():
            if entry is self.search or (isinstance(entry.method, LogitsRewriter) and entry.method.revives):
                raise BadRequest(f"{entry.method.name} follows no grammar; leave one out", entry.path_of("method"))

    def check_sampling(self, params: Any, index: int, num_prompts: int) -> None:
        """Check what vLLM will sample a prompt by. Raises: BadRequest."""
        with naming_prompt(index, num_prompts), self.origins.named():
            self.check_grammar(params.structured_outputs is not None)

    def check_logprobs(self, scores_prompt: bool) -> None:
        """Check where log-probabilities shall come from. Raises: BadRequest, Unavailable."""
        source = self.options.logprobs_source
        if scores_prompt and (silent := self._silent_on_prompts) is not None:
            raise BadRequest(self.silence_on_prompts, silent.path_of(silent.ahead or "method"))
        if source == "both" and scores_prompt:
            raise BadRequest("a prompt is scored by one source at a time; ask twice", "logprobs_source")
        if source != "final" and not self.caps.logprobs_mode.startswith("raw"):
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
    def _silent_on_prompts(self) -> DecodingEntry | None:
        """The method that says nothing of a prompt's tokens; None where there is none, or nobody asks it."""
        silent = (entry for entry in self.decoding if entry.ahead or (entry.mix and entry.mix.num_companions))
        return next(silent, None) if self.options.logprobs_source == "final" else None


def _ranker(entry: DecodingEntry) -> Ranker[Any]:
    assert isinstance(entry.method, Ranker)
    return entry.method


def _stream_names(decoding: DecodingPlan | None, companions: Sequence[PlacedCompanion]) -> dict[str, str]:
    """As explanations call the streams of companions -> by the name or the field that the client gave."""
    names = [companion.name for companion in companions]
    labels = [one.name if names.count(one.name) == 1 else one.path for one in companions]
    streams = decoding.mix.streams if decoding and decoding.mix and companions else ()  # none: it is looked at only
    read = [(stream, labels[stream.companion - 1]) for stream in streams if stream.companion]
    return {stream.label: f"{stream.model}[{label}]" if stream.model else label for stream, label in read}
