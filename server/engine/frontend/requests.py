"""vLLM's request models with the extra fields, and their way from tokens to the engine.

A request carries what admission compiled of its extras. Serving (`openai`) then does three things more than vLLM's,
once the prompts are tokenised and before anything is scheduled: `check` what vLLM will sample by, `score` the texts
that the plan depends on, and `place` the request in each of its prompts, which may insert tokens. The sampling
parameters that vLLM then asks for carry the plan.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, Protocol, TypeVar, cast
from uuid import uuid4

from fastapi.exceptions import RequestValidationError
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParams
from pydantic import BaseModel, Field, PrivateAttr, TypeAdapter, ValidationError, model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.utils import api_utils as vllm_routes
from vllm.exceptions import VLLMClientError
from vllm.renderers.hf import HfRenderer, safe_apply_chat_template
from vllm.sampling_params import RequestOutputKind, SamplingParams

from whipstaff.decoding.method import Candidate
from whipstaff.server import leases
from whipstaff.server import plan as plans
from whipstaff.server.engine.compat import chat_params
from whipstaff.server.engine.frontend.answers import Answers, RankedAnswers, SearchAnswers
from whipstaff.server.engine.frontend.blame import blamed, is_broken
from whipstaff.server.engine.frontend.launch import Bill, PlanDict
from whipstaff.server.errors import BadRequest
from whipstaff.server.leases import Lease
from whipstaff.server.names import ALIASES, FIELDS
from whipstaff.server.plan import PlacedRequest, Scoring
from whipstaff.server.prompt.message_spans import Chat, Prompt
from whipstaff.server.prompt.prompt_source import LocateChat, PromptSource

T = TypeVar("T")
Render = Callable[[Sequence[Any], bool], str]  # of messages, as a prompt or as they stand in one
NoteToken = Callable[[int, dict[str, Any]], None]
Expect = Callable[[list[tuple[int, list[int], int]]], None]
"""Takes, of each prompt, its number of tokens, those of its further prompts, and how many may follow."""


class Notes(NamedTuple):
    """Who hears what of a request."""

    output: Callable[[int, Any], None] | None = None  # the number of a prompt, a vLLM RequestOutput
    token: NoteToken | None = None  # the number of a choice, what is said of its next token
    search: Callable[[int, dict[str, Any]], None] | None = None  # the number of a prompt, what is said of its search
    retract: Callable[[int, int], None] | None = None
    """The number of a choice, how many of its last characters are taken back, before anything more is streamed."""
    sequence: Callable[[int, str], None] | None = None  # the number of a choice, the engine's name for its sequence
    reading: NoteToken | None = None  # the number of a choice, what probes read of its last token
    placed: Callable[[Sequence[PlacedRequest]], None] | None = None
    """The request in its prompts, before anything is scheduled; may raise an exception that answers the client."""


UNHEARD = Notes()
OPENAI = frozenset((*ChatParams.__annotations__, *TextParams.__annotations__, "stream"))
_HOTTEST = 2.0  # temperature that vLLM takes
_GREEDY_BELOW = 1e-5  # as in vLLM


class Compiled(Protocol):
    """What is asked here of a compiled request: `CompiledRequest`, which admission makes and the engine does not know.

    All of it may raise an exception that answers the client.
    """

    @property
    def label(self) -> str: ...
    @property
    def asked(self) -> dict[str, Any]: ...
    @property
    def scores_prompts(self) -> bool: ...
    @property
    def reads_prompt(self) -> bool: ...
    @property
    def searches(self) -> bool: ...
    @property
    def num_candidates(self) -> int: ...
    def score(self, candidate: Candidate) -> float: ...
    def check_sampling(self, params: SamplingParams, index: int, num_prompts: int) -> None: ...
    def wanted_scores(self, prompt: Prompt) -> dict[str, Scoring]: ...
    def at_prompt(self, prompt: Prompt, most_tokens: Callable[[int], int], is_explicit: bool) -> PlacedRequest: ...


class Extras(BaseModel):
    """The fields that Whipstaff adds. They are checked by admission, which knows what this server has."""

    model: str | None = None  # as vLLM has it
    steering: Any = Field(None, description="vectors to add: GET /v1/steering/methods has the schema")
    decoding: Any = Field(None, description="decoding methods: GET /v1/steering/methods has the schema")
    explain: Any = Field(
        None, description='{"top": k, "unsteered": false, "drawn": false}: say of each token what was done to it'
    )
    capture: Any = Field(
        None,
        description='[{"site": "resid_post", "layers": [l]}, {"probe": name}, {"attention": {"l": [heads]}}]: '
        "read these; also where, reduce, edited, dtype",
    )
    capture_format: Any = Field(
        None, description='"base64" (default): what was read stands in the answer, or "download": in a file to fetch'
    )
    stop_when: Any = Field(
        None, description='{"probe": name, "above": x} or "below": end at the first token where the probe reads that'
    )
    logprobs_source: Any = Field(None, description='"final" (default), "base": before decoding methods, or "both"')
    temperature_last: Any = Field(None, description="whether truncation comes before temperature, as in llama.cpp")
    stream_retractions: Any = Field(None, description="whether a search streams what it may take back, and says so")
    on_unavailable: Any = Field(None, description='"error" (default) or "ignore": leave out what this server lacks')
    on_unknown: Any = Field(None, description='"warn" (default) of fields that nobody knows, or "error"')
    _compiled: Compiled | None = PrivateAttr(None)
    _placed: list[PlacedRequest] = PrivateAttr(default_factory=list)  # of its prompts, in order
    _num_scheduled: int = PrivateAttr(0)  # of those
    _notes: Notes = PrivateAttr(UNHEARD)
    _lease: Lease = PrivateAttr(leases.NOTHING)
    _expect: Expect | None = PrivateAttr(None)
    _bill: Callable[[], Bill] | None = PrivateAttr(None)
    _remarks: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _renames(cls, body: Any) -> Any:
        return renamed(body, cls.model_fields) if isinstance(body, dict) else body

    def attach(self, compiled: Compiled, notes: Notes = UNHEARD, lease: Lease = leases.NOTHING) -> None:
        """Give the request what its extras came to; from here on it is not plain. `lease` is of the vectors that it
        names."""
        self._compiled, self._notes, self._lease = compiled, notes, lease
        if compiled.searches and self._vllm.use_beam_search:
            self._vllm.use_beam_search = False  # it is a search of ours, and vLLM has one of its own

    def pay(self, expect: Expect, bill: Callable[[], Bill]) -> None:
        """`expect` is told before anything is scheduled what the request may come to; it may raise an exception that
        answers the client. `bill` makes what is told how many tokens came of a prompt, as they come."""
        self._expect, self._bill = expect, bill

    def sent(self, body: dict[str, Any]) -> dict[str, Any]:
        """What its client sent, by the names of our fields."""
        return body

    def remark(self, warning: str) -> None:
        """Say of the request what its client should know, before it is compiled."""
        self._remarks.append(warning)

    @property
    def remarks(self) -> list[str]:
        return self._remarks

    @property
    def names(self) -> dict[str, str]:
        """What its API calls fields of chats and texts otherwise, by their name or path."""
        return {}

    @property
    def num_answers(self) -> int:
        """Of each prompt."""
        return self._vllm.n or 1

    @property
    def is_plain(self) -> bool:
        return self._compiled is None

    @property
    def is_chat(self) -> bool:
        """Whether its prompts are conversations."""
        return False

    @property
    def reads_prompt(self) -> bool:
        """Whether what it asks for depends on more of its prompts than their lengths."""
        return self._compiled is not None and self._compiled.reads_prompt

    @property
    def retracts(self) -> bool:
        """Whether it streams what may be taken back."""
        return self._notes.retract is not None

    @property
    def placed(self) -> list[PlacedRequest]:
        """The request in its prompts, as far as they are tokenised."""
        return self._placed

    # ---- what admission asks of a request

    @property
    def _vllm(self) -> Any:
        """Itself, with the fields of its other base class."""
        return self

    @property
    def may_have_extras(self) -> bool:
        named = any(getattr(self, name, None) is not None for name in FIELDS)
        return named or bool(self._vllm.vllm_xargs) or self.is_hot or self._vllm.use_beam_search

    @property
    def is_hot(self) -> bool:
        """Whether its temperature is one that vLLM does not take."""
        own = self._vllm.temperature
        return own is not None and own > _HOTTEST and not self._vllm.use_beam_search

    @property
    def truncates(self) -> bool:
        """Whether it itself leaves out what is unlikely."""
        is_nucleus = self._vllm.top_p is not None and self._vllm.top_p < 1
        return is_nucleus or (self._vllm.top_k or 0) > 0 or (self._vllm.min_p or 0) > 0

    @property
    def has_grammar(self) -> bool:
        """Whether the answer must follow a grammar."""
        wanted = self._vllm.response_format
        shape = getattr(wanted, "type", "text") if wanted else "text"
        return shape != "text" or self._vllm.structured_outputs is not None

    @property
    def stops_at_text(self) -> bool:
        """Whether its answer ends where a text stands in it."""
        return bool(self._vllm.stop)

    @property
    def draw_fields(self) -> list[str]:
        """Its own fields that change what is drawn from."""
        own = self._vllm
        is_changed = {
            "temperature": own.temperature is not None and own.temperature >= _GREEDY_BELOW,
            "top_p": own.top_p is not None and own.top_p < 1,
            "top_k": (own.top_k or 0) > 0,
            "min_p": (own.min_p or 0) > 0,
            "temperature_last": self.temperature_last not in (None, False),
        }
        return [name for name, changed in is_changed.items() if changed and name in self.model_fields_set]

    def said(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of its fields that it says itself, where vLLM has a default."""
        return {name: getattr(self, name) for name in names if name in self.model_fields_set}

    @property
    def unknown_names(self) -> list[str]:
        """Its fields that neither OpenAI's protocol, vLLM nor Whipstaff knows, in its order."""
        known, more = self.known_names(), self.model_extra or {}
        return [name for name, value in more.items() if value is not None and name not in known]

    @classmethod
    def known_names(cls) -> frozenset[str]:
        """The fields of a request that mean something on its route, or nothing on either and OpenAI's protocol has
        them."""
        return _known_names(cls)

    # ---- from tokens to the engine

    @property
    def lists_tokens(self) -> bool:
        """Whether it says which tokens are allowed, of which nothing may be left."""
        return self._vllm.allowed_token_ids is not None and not self._vllm.use_beam_search

    async def check(self, inputs: list[Any], serving: Any, max_tokens: int | None) -> None:
        """Everything that vLLM checks when it schedules the request, before anything of ours. Raises: whatever it does;
        BadRequest."""
        tasks = await serving.engine_client.get_supported_tasks()
        for index, one in enumerate(inputs):
            most = _most_tokens(serving._extract_prompt_len(one), serving, max_tokens)
            params = self._vllm.to_sampling_params(most, serving.default_sampling_params)
            processor = serving.engine_client.input_processor
            made = await processor.process_inputs_async(f"check-{uuid4()}", one, params, tasks)
            check_something_is_left(made.sampling_params)
            if self._compiled is not None:
                self._compiled.check_sampling(made.sampling_params, index, len(inputs))

    def prompts(
        self, inputs: list[Any], serving: Any, max_tokens: int | None, chats: "Sequence[Chats | None]"
    ) -> list[Prompt]:
        """The request's prompts, as far as placing it needs them; `chats` has one of each."""
        room = serving.model_config.max_model_len - max(max_tokens or 1, 1)
        adapters = {name: (name, it.lora_int_id, it.lora_path) for name, it in serving.models.lora_requests.items()}
        found = []
        for index, (one, chat) in enumerate(zip(inputs, chats, strict=True)):
            ids = one["prompt_token_ids"] if one["type"] == "token" else None
            source = _source(self, one, serving, chat) if ids and self.reads_prompt else None
            its_chat = chat.locate(chat.messages, ids) if chat and ids else None
            num_tokens, tokenizer = serving._extract_prompt_len(one), serving.renderer.tokenizer
            own = adapters.get(self._vllm.model or "")
            where = index, len(inputs)
            images = [] if one["type"] != "multimodal" else _images(one)
            told = its_chat, source, adapters, own, *where
            found.append(Prompt(num_tokens, ids, room, tokenizer, *told, images=images))
        return found

    async def score(self, prompts: list[Prompt], serving: Any) -> None:
        """Let the engine score the texts that companions' prompts depend on."""
        assert self._compiled is not None
        for prompt in prompts:
            for name, wanted in self._compiled.wanted_scores(prompt).items():
                prompt.scores[name] = await _log_probabilities(serving, wanted, self._vllm.model, self._lease)

    def place(self, inputs: list[Any], prompts: list[Prompt], serving: Any, max_tokens: int | None) -> int | None:
        """Place the request in each of its prompts. What it may generate at most, where vLLM would let it more."""
        assert self._compiled is not None

        def most_tokens(num_tokens: int) -> int:
            return max(_most_tokens(num_tokens, serving, max_tokens), 1)  # to echo alone, vLLM generates one, too

        for one, prompt in zip(inputs, prompts, strict=True):
            placed = self._compiled.at_prompt(prompt, most_tokens, max_tokens is not None)
            if placed.ids is not None:
                one["prompt_token_ids"] = placed.ids
            self._placed.append(placed)
        if self._notes.placed is not None:
            self._notes.placed(self._placed)
        is_capped = any(placed.max_tokens < most_tokens(placed.num_tokens) for placed in self._placed)
        return min(placed.max_tokens for placed in self._placed) if is_capped else None

    def tell_price(self, inputs: list[Any], serving: Any, max_tokens: int | None) -> None:
        """Once it is placed: say what it may come to. Raises: what `expect` does."""
        if self._expect is None:
            return
        if self._placed:
            further = [[len(one.prompt) for one in placed.plan.companions] for placed in self._placed]
            its = zip(self._placed, further, strict=True)
            self._expect([(placed.num_tokens, lengths, placed.max_tokens) for placed, lengths in its])
        else:
            lengths = [serving._extract_prompt_len(one) for one in inputs]
            self._expect([(num, [], max(_most_tokens(num, serving, max_tokens), 1)) for num in lengths])

    def planned(self, make: Callable[[], SamplingParams]) -> SamplingParams:
        """vLLM asks for the sampling parameters of each prompt once, in order. A temperature that it does not take is
        one that our own stages apply; a search draws nothing, and has its answers from one request of the engine's."""
        if self._compiled is not None and self._compiled.searches:
            params = self._with(make, temperature=0.0, n=1)
        elif self._compiled is not None and self._compiled.num_candidates:
            params = self._ranked(make, self._compiled.num_candidates)
        elif not self.is_plain and self.is_hot:
            params = self.cooled(make)
        else:
            params = make()
        if self._bill is not None:
            params.whipstaff_bill = self._bill()  # stays in this process: it is no field
        if self._num_scheduled < len(self._placed):
            plan = self._plan_dict(self._num_scheduled, params)
            params.extra_args = {**(params.extra_args or {}), plans.PLAN_KEY: plan}
            self._num_scheduled += 1
        return params

    def _plan_dict(self, index: int, params: SamplingParams) -> PlanDict:
        """The plan of a prompt, with what watches its answers."""
        assert self._compiled is not None
        placed, note_token, first = self._placed[index], self._notes.token, index * (self._vllm.n or 1)

        def explained(choice: int, record: dict[str, Any]) -> None:
            assert note_token is not None
            note_token(first + choice, placed.by_client_names(record))

        told = None if note_token is None else explained
        answers = self._answers(index, params, told)
        watching = told if answers is None else answers.explained
        compiled, note = self._compiled, None if self._notes.output is None else partial(self._notes.output, index)
        own = note, watching, self._lease, answers, compiled.asked
        return PlanDict(
            placed.to_wire(params),
            *own,
            _at_choice(self._notes.sequence, first),
            _at_choice(self._notes.reading, first),
        )

    def _answers(self, index: int, params: SamplingParams, told: NoteToken | None) -> Answers | None:
        """What makes the answers of a prompt; None where they are just what the engine generates."""
        assert self._compiled is not None
        num, note = self._vllm.n or 1, partial(self._searched, index)
        if self._compiled.searches:
            retract = None if self._notes.retract is None else partial(self._notes.retract, index * num)
            return SearchAnswers(num, params, note, retract)
        if not self._compiled.num_candidates:
            return None
        return RankedAnswers(num, self._compiled.score, note, told, self._placed[index].plan.computed)

    def _ranked(self, make: Callable[[], SamplingParams], num_candidates: int) -> SamplingParams:
        """With candidates of which the best are answers. Which ones is known once all are there."""

        def hot_or_not() -> SamplingParams:
            return self.cooled(make) if self.is_hot else make()

        params = self._with(hot_or_not, n=num_candidates)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        params.logprobs = 0 if params.logprobs is None else params.logprobs
        return params

    def _searched(self, index: int, record: dict[str, Any]) -> None:
        """What the search of a prompt, or the ranking of its candidates, came to."""
        if self._notes.search is not None:
            self._notes.search(index, record)
        if self._notes.token is not None:
            for said in (said for facts in record.get("facts", ()) for said in facts.get("said", ())):
                facts = {name: value for name, value in said.items() if name != "token"}
                self._notes.token(index * (self._vllm.n or 1), {"id": said["token"], "facts": facts})

    def cooled(self, make: Callable[[], SamplingParams]) -> SamplingParams:
        """With a temperature that vLLM does not take."""
        params = self._with(make, temperature=1.0)
        params.temperature = self._vllm.temperature
        return params

    def _with(self, make: Callable[[], SamplingParams], **fields: Any) -> SamplingParams:
        """What vLLM makes of the request with other values of some of its fields."""
        asked = self._vllm
        own = {name: getattr(asked, name) for name in fields}
        try:
            for name, value in fields.items():
                setattr(asked, name, value)
            return make()
        finally:
            for name, value in own.items():
                setattr(asked, name, value)


def _images(prompt: Any) -> list[list[tuple[int, int]]]:
    """[start, end) of the tokens of each image of one of vLLM's prompts."""
    places = prompt["mm_placeholders"].get("image", ())
    return [[(first, last + 1) for first, last in place.extract_embeds_range()] for place in places]


def _at_choice(note: Callable[[int, T], None] | None, first: int) -> Callable[[int, T], None] | None:
    """Takes the number of a prompt's answer, for what takes that of a choice."""
    return None if note is None else lambda answer, said: note(first + answer, said)


def blaming(body: Any, handler: Callable[[Any], Any]) -> Any:
    """vLLM's validators look into fields before pydantic has checked these, and break where one is of an odd type.
    Raises: BadRequest naming the field without which they would not."""
    try:
        return handler(body)
    except Exception as error:
        if not is_broken(error) or not isinstance(body, dict):
            raise
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise BadRequest(f"this is not what the field may hold: {said}", blamed(body, handler)) from None


class ChatRequest(ChatCompletionRequest, Extras):
    """A chat completion with the extra fields."""

    @model_validator(mode="wrap")
    @classmethod
    def _blames(cls, body: Any, handler: Callable[[Any], Any]) -> Any:
        return blaming(body, handler)

    @model_validator(mode="after")
    def _reads_messages(self) -> "ChatRequest":
        """Pydantic checks the parts of a content as they are read, which would be where nobody knows the field."""
        read_messages(self.messages, "messages")
        return self

    @property
    def is_chat(self) -> bool:
        return True

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are wanted. `echo` repeats the text of the last message."""
        return self.prompt_logprobs is not None

    @property
    def echoes_scores(self) -> bool:
        """Whether vLLM scores its prompt though nobody asked."""
        return bool(self.echo and self.logprobs)

    @property
    def logprobs_field(self) -> str:
        """The field by which it asks for log-probabilities; "" if none does."""
        return "prompt_logprobs" if self.scores_prompt else "logprobs" if self.logprobs else ""

    @property
    def explicit_max_tokens(self) -> int | None:
        """How many tokens the client itself wants at most."""
        wanted = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return cast("int | None", wanted)

    def cap(self, most: int) -> None:
        """Where the client does not say how many: at most so many tokens."""
        self.max_completion_tokens = most

    @property
    def num_prompts(self) -> int:
        return 1

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        params = self.planned(partial(super().to_sampling_params, *args, **kwargs))
        if self._compiled is not None and not self.scores_prompt and not self._compiled.scores_prompts:
            # vLLM scores the prompt of every chat that echoes, asked or not: here it would be without the method
            params.prompt_logprobs, params.skip_reading_prefix_cache = None, False
        return params


def read_messages(messages: Iterable[Any], path: str) -> None:
    """Read the parts of contents. Raises: BadRequest."""
    for index, message in enumerate(messages):
        for name, value in message.items() if isinstance(message, dict) else ():
            if isinstance(value, Iterator):
                message[name] = _read(value, f"{path}[{index}].{name}")


def _read(parts: Iterator[Any], path: str) -> list[Any]:
    """Raises: BadRequest."""
    try:
        return list(parts)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadRequest(first["msg"], f"{path}[{first['loc'][0]}]" if first["loc"] else path) from None


class TextRequest(CompletionRequest, Extras):
    """A text completion with the extra fields."""

    @model_validator(mode="wrap")
    @classmethod
    def _blames(cls, body: Any, handler: Callable[[Any], Any]) -> Any:
        return blaming(body, handler)

    @property
    def echoes_scores(self) -> bool:
        """Whether vLLM scores its prompt though nobody asked: of texts, it does not."""
        return False

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are wanted."""
        return self.prompt_logprobs is not None or (bool(self.echo) and self.logprobs is not None)

    @property
    def logprobs_field(self) -> str:
        """The field by which it asks for log-probabilities; "" if none does."""
        return "prompt_logprobs" if self.prompt_logprobs is not None else "" if self.logprobs is None else "logprobs"

    @property
    def explicit_max_tokens(self) -> int | None:
        """How many tokens the client itself wants at most."""
        return cast("int | None", self.max_tokens if "max_tokens" in self.model_fields_set else None)

    def cap(self, most: int) -> None:
        """Where the client does not say how many: at most so many tokens."""
        self.max_tokens = min(self._vllm.max_tokens or most, most)

    @property
    def num_prompts(self) -> int:
        """A list of numbers is one prompt, a list of anything else several."""
        is_list = isinstance(self.prompt, list) and not isinstance(next(iter(self.prompt), 0), int)
        return len(cast("list[Any]", self.prompt)) if is_list else 1

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        return self.planned(partial(super().to_sampling_params, *args, **kwargs))


OpenAIRequest = ChatRequest | TextRequest
Request = TypeVar("Request", bound=Extras)


def renamed(body: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A request with other servers' names of vLLM's fields replaced. Raises: BadRequest."""
    for theirs, name in ALIASES.items() if ALIASES.keys() & body.keys() else ():
        if (value := body.get(theirs)) is None:
            continue
        try:
            checked = TypeAdapter(fields[name].annotation).validate_python(value)
        except ValidationError as error:
            raise BadRequest(str(error.errors()[0]["msg"]), theirs) from None
        if body.get(name) not in (None, checked):
            raise BadRequest(f"given twice: {name} is {body[name]!r}", theirs)
        body = {key: other for key, other in body.items() if key != theirs} | {name: checked}
    return body


@cache
def _known_names(model: type[Extras]) -> frozenset[str]:
    aliases = {field.alias for field in model.model_fields.values() if field.alias}
    of_others = {*ChatRequest.model_fields, *TextRequest.model_fields}
    return (OPENAI - of_others).union(model.model_fields, aliases, ALIASES, FIELDS)


def parse(model: type[Request], body: dict[str, Any]) -> Request:
    """A request from its JSON. Raises: what a route with this request model would."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def check_sampling(request: OpenAIRequest, is_hot_taken: bool) -> None:
    """Check the ranges of a request's sampling parameters. Raises: BadRequest."""
    make = partial(request.to_sampling_params, max(request.max_tokens or 1, request.min_tokens), {})
    try:
        request.cooled(make) if is_hot_taken else make()
    except (ValueError, VLLMClientError) as error:
        raise BadRequest(str(error.args[0]), getattr(error, "parameter", None)) from None


def check_something_is_left(params: SamplingParams) -> None:
    """Refuse bans that leave none of the allowed tokens: vLLM would generate padding. Raises: BadRequest.

    Args:
        params: with the tokens of words and the ones that stop, as vLLM's input processor leaves them.
    """
    if params.allowed_token_ids is None:
        return
    left = set(params.allowed_token_ids) - {word[0] for word in params.bad_words_token_ids or () if len(word) == 1}
    if not left:
        raise BadRequest("these are all of allowed_token_ids: no token is left to generate", "bad_words")
    if params.min_tokens and params.structured_outputs is None and not left - params.all_stop_token_ids:
        raise BadRequest(
            "no token is left to generate before so many: those of allowed_token_ids all end the answer", "min_tokens"
        )


def _most_tokens(num_tokens: int, serving: Any, max_tokens: int | None) -> int:
    """How many tokens vLLM lets follow a prompt of that length."""
    most: int = vllm_routes.get_max_tokens(
        serving.model_config.max_model_len,
        max_tokens,
        num_tokens,
        serving.default_sampling_params,
        serving.override_max_tokens,
    )
    return most


# ---- prompts


class Chats(NamedTuple):
    """A chat request's messages, and what its template makes of messages."""

    messages: Sequence[Any]
    text_of: Render
    locate: LocateChat
    adds_special_tokens: bool


def chats_of(request: Any, conversation: list[Any], serving: Any) -> Chats | None:
    """How the messages of a prompt are found; None where something else than a Hugging Face template made it."""
    renderer = serving.online_renderer
    tools = None
    if request.tools and not (request.tool_choice == "none" and renderer.exclude_tools_when_tool_choice_none):
        tools = [tool.model_dump() for tool in request.tools]
    return chats_with(tools, request, conversation, serving, request.add_special_tokens)


def chats_with(
    tools: list[Any] | None, request: Any, conversation: list[Any], serving: Any, adds_special_tokens: bool
) -> Chats | None:
    """The same of a conversation whose template is shown these tools."""
    renderer = serving.online_renderer
    defaults = {**renderer.default_chat_template_kwargs, "tools": tools, "tokenize": False}
    settings = chat_params(request, renderer).with_defaults(defaults).get_apply_chat_template_kwargs()
    return chats_by(settings, conversation, serving, adds_special_tokens)


def chats_by(
    settings: Mapping[str, Any], conversation: list[Any], serving: Any, adds_special_tokens: bool
) -> Chats | None:
    """The same of a conversation that its template writes by these settings."""
    tokenizer = serving.renderer.tokenizer
    if not isinstance(serving.renderer, HfRenderer) or serving.online_renderer.use_harmony or not tokenizer.is_fast:
        return None

    def text_of(messages: Sequence[Any], is_prompt: bool) -> str:
        ends_here = {} if is_prompt else {"add_generation_prompt": False, "continue_final_message": False}
        return str(
            safe_apply_chat_template(serving.model_config, tokenizer, list(messages), **{**settings, **ends_here})
        )

    def locate(messages: Sequence[Any], ids: Sequence[int]) -> Chat:
        return Chat(tokenizer, messages, ids, text_of)

    return Chats(conversation, text_of, locate, adds_special_tokens)


def _source(request: Extras, prompt: Any, serving: Any, chat: Chats | None) -> PromptSource | None:
    """A prompt as a source of others; None for chats that no Hugging Face template made."""
    tokenizer, renderer = serving.renderer.tokenizer, serving.online_renderer
    if tokenizer is None or (chat is None and request.is_chat):
        return None

    def ids_of(messages: Sequence[Any]) -> list[int]:
        if chat is not None:
            text, adds = chat.text_of(messages, True), chat.adds_special_tokens
        else:
            template = {"chat_template": renderer.chat_template, "add_generation_prompt": True, "tokenize": False}
            text = str(safe_apply_chat_template(serving.model_config, tokenizer, list(messages), **template))
            adds = False
        found: list[int] = tokenizer.encode(text, add_special_tokens=adds)
        return found

    adds_special_tokens = bool(getattr(request, "add_special_tokens", True))
    messages, written = chat.messages if chat else None, prompt.get("prompt")
    locate = None if chat is None else chat.locate
    return PromptSource(prompt["prompt_token_ids"], tokenizer, adds_special_tokens, ids_of, messages, written, locate)


async def _log_probabilities(serving: Any, wanted: Scoring, model: str | None, lease: Lease) -> list[float]:
    """Of every token of a text but the first, under the served model, or an adapter of it, steered as asked by vectors
    of which the caller has a lease."""
    plan = PlanDict(plans.RequestPlan(wanted.steering).to_wire(), lease=lease) if wanted.steering else None
    extra = {plans.PLAN_KEY: plan} if plan else None
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False, extra_args=extra)
    ids = list(wanted.ids)
    prompt, adapter, said = {"prompt_token_ids": ids}, serving.models.lora_requests.get(model), None
    async for output in serving.engine_client.unwatched(prompt, params, f"score-{uuid4()}", lora_request=adapter):
        said = output.prompt_logprobs or said
    return [said[position][ids[position]].logprob for position in wanted.positions[1:]] if said else []
