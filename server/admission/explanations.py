"""Explanations in requests and responses: what `explain` may say, and each choice's records on their way out."""

from collections import defaultdict
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from whipstaff.decoding.plan import Explain
from whipstaff.server.prompt.vocabulary import Vocabulary

MAX_TOP = 20
DISTRIBUTIONS = ("final", "base", "unsteered", "drawn")  # of a record
EXPLAIN_FIELD, READINGS_FIELD = "explain", "readings"  # of a choice
LogprobsSource = Literal["final", "base", "both"]


class ExplainParams(BaseModel):
    """What to say of every generated token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top: int = Field(5, ge=0, le=MAX_TOP, description="likeliest tokens of every distribution")
    unsteered: bool = Field(False, description="also of the model without the request's steering, a further sequence")
    drawn: bool = Field(False, description="also of what is drawn from: after penalties, temperature and truncation")

    @property
    def plan(self) -> Explain:
        """Before any prompt is known: where nothing steers, the request's own sequence is the unsteered one."""
        return Explain(self.top, 0 if self.unsteered else None, self.drawn)


class ChoiceExplanations:
    """The records of one request's choices that have not been sent: of what was done to tokens, and read of them."""

    def __init__(self, words: Vocabulary | None) -> None:
        self._words = words
        self._records: dict[int, list[dict[str, Any]]] = defaultdict(list)
        self._readings: dict[int, list[dict[str, Any]]] = defaultdict(list)

    def note(self, choice: int, record: dict[str, Any]) -> None:
        """What the engine says of a choice's next token; of one that a search chose, it is facts alone."""
        seen = [record[name] for name in DISTRIBUTIONS if name in record]
        seen += record.get("streams", {}).values()
        for token in [record, *(token for one in seen for token in one["top"])]:
            token |= self._told(token["id"])
        self._records[choice].append(record)

    def note_reading(self, choice: int, position: int, values: dict[str, float]) -> None:
        """What probes read of a choice's token there, by the number of the entry that asks for it."""
        if values:
            self._readings[choice].append({"position": position, "values": values})

    def add_to(self, body: dict[str, Any]) -> None:
        """Put records into the choices of a response, or of a chunk of one."""
        for choice in body.get("choices", ()):
            is_opening = "role" in choice.get("delta", ()) and not choice.get("finish_reason")  # before any token
            if not is_opening:
                choice |= self.take(choice["index"])

    def take(self, choice: int = 0) -> dict[str, Any]:
        """What is to be said of one choice, by field."""
        found = {EXPLAIN_FIELD: self._records.pop(choice, []), READINGS_FIELD: self._readings.pop(choice, [])}
        return {name: records for name, records in found.items() if records}

    def _told(self, token: int) -> dict[str, Any]:
        if self._words is None or token >= self._words.num_tokens:
            return {"token": None, "bytes": None}
        return {"token": self._words.texts[token], "bytes": self._words.bytes_of(token)}
