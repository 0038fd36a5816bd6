"""The contract of a decoding method: its parameters, its place in the pipeline, and what it does to rows of logits.

Every step's logits pass these stages, in this order; vLLM's own steps stand in brackets:

    mix          rows of weights over streams, then methods that choose between them
    rule         biases that follow from the tokens so far
    [logit bias, banned tokens, structured outputs, repetition, presence and frequency penalties]
    penalty      further penalties
    temperature  (after `truncation` where a request says temperature_last)
    truncation
    search       (`decoding/search/`: chooses tokens itself, for several sequences at once)
    [the draw]

Within a stage methods run in the order of their table.
"""

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from whipstaff.decoding.mix import Mix
from whipstaff.decoding.rows import Rows

_MAX_TEXT = 1 << 22  # characters

Stage = Literal["mix", "rule", "penalty", "temperature", "truncation", "search"]
STAGES: tuple[Stage, ...] = ("mix", "rule", "penalty", "temperature", "truncation", "search")
Need = Literal[  # see `Rows`
    "tokens", "hidden", "random", "temperature", "early_exit", "lookahead", "attention", "history"
]


class DecodingError(ValueError):
    """Bad decoding parameters. `param` is the path below the decoding entry, such as "expert"."""

    def __init__(self, message: str, param: str = "") -> None:
        super().__init__(message)
        self.param = param


class Params(BaseModel):
    """What a request may say about a method; `method` names it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str


def in_ten_thousandths(value: Any) -> Any:
    """A cutoff as a probability: Hugging Face says it so, while text-generation-webui and Aphrodite count in 1e-4. No
    probability is 1 or more, and no sensible count is less."""
    is_count = isinstance(value, int | float) and not isinstance(value, bool) and value >= 1
    return value * 1e-4 if is_count else value


class Vocabulary(Protocol):
    """The served model's tokens, as far as methods that speak of text need them."""

    @property
    def num_tokens(self) -> int:
        """How many there are."""

    @property
    def eos(self) -> Sequence[int]:
        """The ids that end a generation."""

    def id_of(self, text: str) -> int | None:
        """The one token that is exactly this text, or None."""

    def ids_with(self, text: str) -> Sequence[int]:
        """Every token whose text holds this text."""

    def encode(self, text: str) -> Sequence[int]:
        """The tokens of a text, without special ones."""


class Depth(NamedTuple):
    """What the served model has of early layers: 0 is what its embedding gives, l what leaves its l-th block."""

    num_layers: int
    is_tied: bool = False  # whether its head is its embedding
    kept: frozenset[int] = frozenset()  # the layers that requests may read
    has_norm: bool = True  # whether its final norm is known


class HeadFile(NamedTuple):
    """What a learned head's file holds."""

    parts: Mapping[str, Tensor]  # float32
    stated: Mapping[str, Any] = {}  # the parameters that its header states


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str = Field(min_length=1, max_length=64)
    content: str = Field(max_length=_MAX_TEXT)


Content = Annotated[
    Annotated[str, Field(max_length=_MAX_TEXT)]
    | Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1, max_length=1 << 20)]
    | Annotated[list[Message], Field(min_length=1, max_length=1024)],
    Field(union_mode="smart"),
]
"""A prompt in a request: text, token ids or messages. An empty text is the token that begins texts, alone."""

Contents = Annotated[
    Content
    | Annotated[
        list[
            Annotated[str, Field(max_length=_MAX_TEXT)]
            | Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1, max_length=1 << 20)]
        ],
        Field(min_length=1, max_length=1 << 16),
    ],
    Field(union_mode="smart"),
]
"""The same, or one for each of the request's prompts, as text or token ids."""


def content_of(contents: Contents, index: int, num: int, param: str) -> Content:
    """What is meant for prompt `index` of a request's `num`. Raises: DecodingError."""
    is_one = not isinstance(contents, list) or isinstance(contents[0], int | Message)
    if not is_one and len(contents) != num:
        raise DecodingError(
            f"a list of {len(contents)}, and the request has {num} prompt{'s' if num > 1 else ''}; give one text, or a "
            "list with one for each prompt",
            param,
        )
    found: Any = contents if is_one else contents[index]
    return cast(Content, found)


class Source(Protocol):
    """A request's prompt, from which others are made. Everything raises DecodingError where it cannot be done, naming
    the parameter `param` that asked for it."""

    @property
    def ids(self) -> Sequence[int]:
        """Its tokens."""

    @property
    def text(self) -> str:
        """Its text; of a chat, the last user message's."""

    def encode(self, content: Content, param: str) -> Sequence[int]:
        """The tokens of another prompt, made as this one was. In a chat, text takes the last user message's place."""

    def changed(self, text: str) -> Sequence[int]:
        """The tokens of this prompt with another text in the place of its own."""

    def alone(self, text: str) -> Sequence[int]:
        """The tokens of a text by itself, as a prompt that starts with it."""

    def without(self, span: str, param: str) -> Sequence[int]:
        """The tokens of this prompt without a text that stands in it."""

    def as_chat(self, param: str) -> Sequence[int]:
        """The tokens of this prompt as a chat's: plain text becomes a user message."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens."""


class Companion(NamedTuple):
    """A further sequence of a request: another prompt, the same tokens."""

    prompt: Sequence[int]
    param: str  # the parameter that its prompt comes from
    steering: str = "steering"  # the parameter that holds its steering; where it says nothing, the request's holds
    adapter: tuple[str, str] | None = (
        None  # a LoRA adapter's name, and the parameter that holds it; None: the request's
    )
    told: Mapping[str, Any] = {}  # in the receipt


class PromptFacts(Protocol):
    """What is known of a request's prompt once it is tokenised."""

    @property
    def num_tokens(self) -> int:
        """Its length."""

    def last_user(self) -> int:
        """Position of the first token of the last user message; 0 where there are no messages."""

    def text_at(self, text: str, param: str) -> tuple[int, int]:
        """[start, end) of the tokens in which a text first stands. Raises: DecodingError naming `param`."""

    def messages_at(self, role: str | None, index: int | None, param: str) -> Sequence[tuple[int, int]]:
        """[start, end) of the contents of the messages that match, at least one. Raises: DecodingError naming
        `param`."""

    def images_at(self, index: int | None, param: str) -> Sequence[tuple[int, int]]:
        """[start, end) of the tokens that stand for an image, or for all of them; an image may have several. Raises:
        DecodingError naming `param`."""


P = TypeVar("P", bound=Params)


class Method(ABC, Generic[P]):
    """One method: a name users type, its paper, its parameters and the setting that changes nothing."""

    name: ClassVar[str]
    paper: ClassVar[str]
    stage: ClassVar[Stage]
    params: type[P]
    stream_fields: ClassVar[tuple[str, ...]] = ()  # parameters that name auxiliary models
    head_fields: ClassVar[Mapping[str, str]] = {}  # parameter that names a learned head -> the kind that is wanted
    ahead_fields: ClassVar[Mapping[str, str]] = {}
    """Parameter -> a further kind of learned head that it may name: one that reads tokens before they are chosen, for
    which the server must look one token ahead."""
    needs_adapters: ClassVar[bool] = False  # whether it reads adapters of the served model
    shorthands: ClassVar[Mapping[str, str]] = {}  # top-level field of a request -> the parameter that it stands for
    switches: ClassVar[Sequence[frozenset[str]]] = ()
    """Asked for by shorthands, the method is on where all parameters of one of these are said, and they are not off.
    The others alone do nothing, as at the servers whose names they are."""
    example: ClassVar[Mapping[str, Any]] = {}  # parameters of a request that shows it, beside models and heads
    texts: ClassVar[Sequence[str]] = ()  # shorthands whose strings are texts: no other value in JSON
    shared: ClassVar[Mapping[str, str]] = {}
    """Fields that vLLM's requests have already -> the parameter that says the same, where an entry says nothing of it.
    They turn nothing on."""
    gates: ClassVar[Sequence[str]] = ()  # further top-level fields: false is off, true says nothing

    def is_switched_on(self, said: Container[str]) -> bool:
        """Whether shorthands that say these parameters turn the method on."""
        return any(all(param in said for param in switch) for switch in self.switches)

    def read(self, field: str, value: Any) -> Any:
        """A shorthand's value in the parameter's own terms; None as if it was not said. Raises: DecodingError."""
        return value

    def is_off(self, params: P) -> bool:
        """Whether a request with these parameters gets exactly what it would get without the method."""
        return False

    def of_prompt(self, params: P, index: int, num: int) -> P:
        """The parameters for prompt `index` of a request's `num`. Raises: DecodingError naming the field."""
        return params

    @property
    def num_streams(self) -> int:
        """The fewest auxiliary models that a request can name."""
        return len(self.stream_fields)

    def streams(self, params: P) -> Mapping[str, str]:
        """The auxiliary models that these parameters name: path below the entry -> model."""
        named = {field: getattr(params, field) for field in self.stream_fields}
        return {field: model for field, model in named.items() if model is not None}

    @abstractmethod
    def off(self, streams: Sequence[str], heads: Sequence[str]) -> P | None:
        """Parameters that change nothing, exactly, given names for `num_streams` auxiliary models and for its heads;
        None if there are none."""

    def shown(self, streams: Sequence[str], heads: Mapping[str, str]) -> Mapping[str, Any] | None:
        """Parameters that show what it does, given names of auxiliary models, `num_streams` at least, and of its heads
        (field -> name); None if they cannot be known."""
        return {**dict(zip(self.stream_fields[: self.num_streams], streams, strict=False)), **heads, **self.example}

    def with_heads(self, params: P, heads: Mapping[str, HeadFile]) -> P:
        """The parameters, checked against the heads that they name (field -> file), with what these say filled in.

        Raises: DecodingError naming the field.
        """
        return params


class StreamMixer(Method[P]):
    """A method that is a row of weights over streams: all of them run in one kernel."""

    stage = "mix"

    @abstractmethod
    def mix(self, params: P) -> Mix:
        """The weights that these parameters stand for. Raises: DecodingError naming the field."""

    def scored(self, params: P, source: Source) -> Sequence[int]:
        """A text whose tokens' log-probabilities `companions` must know; empty for most methods. Raises:
        DecodingError."""
        return ()

    def companions(self, params: P, source: Source, scores: Sequence[float]) -> Sequence[Companion]:
        """The sequences that the mix's streams name, in order. Raises: DecodingError naming the field.

        Args:
            scores: the log-probability of every token but the first of what `scored` gave.
        """
        return ()

    def steered(self, params: P) -> Mapping[str, Any]:
        """Parameter -> the steering of further sequences that it holds, as a request would say it; those that say
        nothing are left out."""
        said = getattr(params, "steering", None)
        return {} if said is None else {"steering": said}


class LogitsRewriter(Method[P]):
    """A method that rewrites rows of logits, all rows that use it at once."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    state_size: ClassVar[int] = 0  # floats kept per request from token to token
    keeps_greedy: ClassVar[bool] = False  # whether the best token always stays the best
    revives: ClassVar[bool] = False  # whether it may choose a token that was banned; no other method may

    @property
    def chooses_temperature(self) -> bool:
        """Whether the request's own temperature plays no part."""
        return self.stage == "temperature" and "temperature" not in self.needs

    setting: ClassVar[type[BaseModel]]
    """What travels to the engine, if that is something else than the parameters."""

    def resolve(self, params: P, words: Vocabulary) -> BaseModel:
        """The parameters as the engine needs them: text turned into tokens. Raises: DecodingError."""
        return params

    def early_layers(self, params: P, depth: Depth) -> Sequence[int]:
        """The early layers whose logits it reads, in the order of `Rows.early_exit`. Raises: DecodingError."""
        return ()

    def num_tried(self, params: P) -> int:
        """Tokens that it tries for each token of an answer, where it looks ahead."""
        return 0

    def takes_norm(self, params: P) -> bool:
        """Whether early layers pass the model's final norm before its head."""
        return False

    def tells_scores(self, params: P) -> bool:
        """Whether what it makes of a prompt's rows is told as it is, and not as log-probabilities."""
        return False

    def at_prompt(self, setting: Any, prompt: PromptFacts) -> BaseModel:
        """The setting for one prompt. Raises: DecodingError."""
        found: BaseModel = setting
        return found

    @abstractmethod
    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        """The rows' new logits, (R, V) float32; `rows.logits` may be changed in place and returned. Row r is what it
        would be alone. -inf stays -inf, and at least one token of each row stays allowed."""

    def note(self, rows: Rows, settings: Sequence[Any], sampled: Tensor) -> None:
        """Learn what was drawn: (R,) int64. `rows.logits` are what it was drawn from. For methods with state."""
        return None


class Candidate(NamedTuple):
    """An answer that was drawn, to be ranked among others; it has at least one token."""

    num_tokens: int
    log_probability: float  # of all of it, where its tokens were drawn from, before penalties, temperature, truncation
    explained: Sequence[Mapping[str, Any]]  # what is said of each of its tokens, where the method reads rows


class Ranker(LogitsRewriter[P]):
    """A method that ranks answers once they are drawn, and changes no logits. A request has at most one. Of the
    models and heads that it may name, each may be absent."""

    @abstractmethod
    def num_candidates(self, params: P) -> int:
        """How many answers are drawn."""

    @abstractmethod
    def reads_rows(self, params: P) -> bool:
        """Whether it must see rows on their way, and be told what is said of each token."""

    @abstractmethod
    def score(self, params: P, candidate: Candidate) -> float:
        """The higher the better."""


def setting_type(method: Method[Any]) -> type[BaseModel]:
    """What a method's settings are in the engine."""
    return getattr(method, "setting", method.params)
