"""What may be said of a fit, apart from what it starts: nothing here imports torch."""

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from whipstaff.steering.errors import SteeringError

READS = ("last", "last-prompt", "answer", "response-mean", "prompt-mean")
_NUMBER = re.compile(r"-[1-9]\d{0,5}")


class Options(BaseModel):
    """What may be said of a fit; a recipe takes some of them, and others are errors. None: the recipe's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: str | None = Field(None, description='layers, as "8-16", "4,7", "all" or "40%%-90%%" of the depth')
    read: str | None = Field(
        None, description="the token that is read: last, -2, last-prompt, answer, response-mean ..."
    )
    aggregate: Literal["mean", "pca", "lat", "logistic"] | None = Field(None, description="how rows become a direction")
    template: str | None = Field(None, description="chat, none, or a form such as 'Q: {prompt} A: {response}'")
    system: str | None = Field(None, description="a system message, with the chat template")
    seed: int = Field(42, ge=0, lt=1 << 32)
    unit: bool | None = Field(None, description="bring every direction to length 1")
    num_heads: int | None = Field(None, ge=1, description="how many heads are chosen")
    folds: int | None = Field(None, ge=2, description="folds by question in which heads are ranked")
    shots: int | None = Field(None, ge=1, le=64, description="demonstrations of a prompt")
    trials: int | None = Field(None, ge=1, description="prompts of demonstrations that are averaged")
    corrupted: int | None = Field(None, ge=1, description="prompts with shuffled outputs that heads are tried on")
    experts: int | None = Field(None, ge=1, description="how many experts are switched off")
    marks: str | None = Field(None, description="words that begin an answer of the first class, with commas: I,Sorry")
    lr: float | None = Field(None, gt=0, le=10, description="Adam's learning rate")
    steps: int | None = Field(None, ge=1, description="steps of Adam")
    epochs: int | None = Field(None, ge=1, description="how often every row is learned from")
    rank: int | None = Field(None, ge=1, le=64, description="directions of a layer")
    positions: str | None = Field(None, description="prompt tokens that are edited, as pyreft says them: f1+l1")
    rows: int | None = Field(None, ge=1, le=1024, description="rows that are put before a prompt")
    text: str | None = Field(None, min_length=1, description="words whose embeddings the rows begin as")
    assistant: str | None = Field(None, description="the model that is deferred to, a folder or a name on the hub")
    l1: float | None = Field(None, ge=0, description="how much the size of scalings, or of features, costs")
    features: int | None = Field(None, ge=2, le=1 << 20, description="features of an autoencoder")
    num_features: int | None = Field(None, ge=1, le=64, description="how many features are chosen")
    tokens: int | None = Field(None, ge=1, le=4096, description="last tokens of each text that it is learned from")
    scale: float | None = Field(None, description="the file's default strength")

    @field_validator("read")
    @classmethod
    def _read_is_known(cls, value: str | None) -> str | None:
        if value is not None:
            check_read(value)
        return value


COMMON = {"seed", "layers", "template", "system", "scale"}  # options that every recipe takes


def check_read(read: str) -> None:
    """Raises: SteeringError."""
    if read not in READS and not _NUMBER.fullmatch(read):
        said = f"{read!r} is none of {', '.join(READS)}, nor a token counted from the end, such as -2"
        raise SteeringError(said, "read")
