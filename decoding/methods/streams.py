"""Streams: any row of weights over any streams, for methods that have no name here.

    s = base_weight * f(base) + sum of weight_k * f(stream_k / temperature_k)

f is the identity (space "logits"), log-softmax ("log"), or the sum is one of distributions ("probability"). A stream is
an auxiliary model, another prompt, an adapter, other steering, or several of these at once: a steered and an unsteered
copy of one prompt can be contrasted, for example. Tokens that the base finds implausible can be masked.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from whipstaff.decoding.companions import CoupledParams
from whipstaff.decoding.method import Companion, Content, DecodingError, Source, StreamMixer
from whipstaff.decoding.mix import MAIN, Mix, Stream, Term

Weight = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class StreamParams(BaseModel):
    """One stream. What is not said is as in the request; the request's steering is that of its served model only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: Weight
    name: str | None = Field(None, max_length=64, description="for people")
    model: str | None = Field(None, description="auxiliary model; none: the served model")
    prompt: Content | None = Field(None, description="text, token ids or messages; none: the request's prompt")
    adapter: str | None = Field(None, description="adapter of this server")
    steering: Any = Field(None, description="as in a request; none: the request's own, []: a copy without steering")
    temperature: float = Field(1.0, gt=0, le=100, allow_inf_nan=False)

    @property
    def is_sequence(self) -> bool:
        """Whether it needs a sequence of its own."""
        return self.prompt is not None or self.adapter is not None or self.steering is not None

    def companion(self, path: str, source: Source) -> Companion:
        """That sequence; `path` is the stream's own place."""
        return Companion(
            source.ids if self.prompt is None else source.encode(self.prompt, f"{path}.prompt"),
            path if self.prompt is None else f"{path}.prompt",
            "steering" if self.steering is None else f"{path}.steering",
            None if self.adapter is None else (self.adapter, f"{path}.adapter"),
            {} if self.name is None else {"name": self.name},
        )


class StreamsParams(CoupledParams):
    """Which streams, and how they are summed."""

    method: Literal["streams"] = "streams"
    streams: list[StreamParams] = Field(min_length=1, max_length=16, description="beside the request's own")
    base_weight: Weight = Field(1.0, description="of the request's own stream")
    space: Literal["logits", "log", "probability"] = Field("logits", description="what is summed")
    alpha: float = Field(0.0, ge=0, le=1, allow_inf_nan=False, description="least share of the base's best token")
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False, description="of the base")


class Streams(StreamMixer[StreamsParams]):
    name, paper = "streams", "a row of weights over streams"
    params = StreamsParams
    example: ClassVar[Mapping[str, Any]] = {"streams": [{"prompt": "Tell me where Mara lives.", "weight": 2.0}]}

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> StreamsParams:
        return StreamsParams(streams=[StreamParams(model=streams[0], weight=0.0)])

    def is_off(self, params: StreamsParams) -> bool:
        return params == StreamsParams(streams=params.streams) and not any(stream.weight for stream in params.streams)

    def streams(self, params: StreamsParams) -> Mapping[str, str]:
        named = {f"streams[{number}].model": stream.model for number, stream in enumerate(params.streams)}
        return {where: model for where, model in named.items() if model is not None}

    def mix(self, params: StreamsParams) -> Mix:
        is_log, is_probability = params.space == "log", params.space == "probability"
        if is_probability:
            _check_distributions(params)
        base = Term(MAIN, params.base_weight, is_log, alpha=params.alpha, top_p=params.top_p)
        terms, num_companions = [base], 0
        for number, stream in enumerate(params.streams):
            if not stream.is_sequence and stream.model is None:
                raise DecodingError(
                    "this stream is the request itself; say its model, prompt, adapter or steering",
                    f"streams[{number}]",
                )
            if stream.model is not None and stream.steering:
                raise DecodingError("an auxiliary model is not steered", f"streams[{number}].steering")
            num_companions += stream.is_sequence
            where = Stream(stream.model or "", num_companions if stream.is_sequence else 0)
            terms.append(Term(where, stream.weight, is_log, stream.temperature))
        return Mix(tuple(terms), is_probability, params.window)

    def companions(self, params: StreamsParams, source: Source, scores: Sequence[float]) -> Sequence[Companion]:
        return [
            stream.companion(f"streams[{n}]", source) for n, stream in enumerate(params.streams) if stream.is_sequence
        ]

    def steered(self, params: StreamsParams) -> Mapping[str, Any]:
        own = {
            f"streams[{number}].steering": stream.steering
            for number, stream in enumerate(params.streams)
            if stream.steering is not None
        }
        return {**super().steered(params), **own}


def _check_distributions(params: StreamsParams) -> None:
    """Raises: DecodingError where their weighted sum would be none."""
    weights = {"base_weight": params.base_weight}
    weights |= {f"streams[{number}].weight": stream.weight for number, stream in enumerate(params.streams)}
    for param, weight in weights.items():
        if weight < 0:
            raise DecodingError("weights of distributions are 0 or more", param)
    if not any(weights.values()):
        raise DecodingError("the weights are all 0", "base_weight")
    if params.alpha or params.top_p < 1:
        raise DecodingError("distributions are not masked", "alpha" if params.alpha else "top_p")
