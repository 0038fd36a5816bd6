"""What the suite asks a server over HTTP, and what comes back.

Answers are scored by saying them token by token under the method (`forced`), which is what generation does, so that
every method is read in the same way.
"""

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any

import httpx

from whipstaff.server.errors import reason_in
from whipstaff.server.suite.methods import Asked, Body

_NOTHING = -9999.0  # what vLLM says of a token that a mask excludes
Read = tuple[list[float], list[dict[str, float]]]  # of a text's tokens: log-probabilities, and the likeliest tokens'


class SuiteError(Exception):
    """What the server refuses, or what is wrong with a call, in a sentence."""


class Refused(SuiteError):
    """The server does not do this: lacks a flag, a vector or a model."""


@dataclass(frozen=True)
class Said:
    """One generated text."""

    text: str
    reason: str  # "stop" or "length"
    num_tokens: int


@dataclass
class Server:
    """A running server's public API."""

    client: httpx.Client
    parallel: int = 8
    _known: dict[str, list[int]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    @cached_property
    def model(self) -> str:
        return str(self._ask("GET", "/v1/models")["data"][0]["id"])

    @cached_property
    def vectors(self) -> dict[str, str]:
        return {row["id"]: row["digest"] for row in self._ask("GET", "/v1/steering/vectors")["data"]}

    def version(self) -> str:
        return str(self._ask("GET", "/version").get("version", "?"))

    def check(self, asked: Asked) -> None:
        """Raises: Refused with the server's reason."""
        self.say(asked, max_tokens=1)

    def say(self, asked: Asked, max_tokens: int, **fields: Any) -> list[Said]:
        """Greedy unless the body says otherwise."""
        body = {"prompt": asked.prompt, "temperature": 0, "max_tokens": max_tokens, **fields, **asked.body}
        found = self._complete(body)
        return [Said(choice["text"], choice["finish_reason"], len(choice["token_ids"])) for choice in found["choices"]]

    def log_p(self, asked: Asked, answer: str) -> float:
        """The sum of an answer's log-probabilities after the prompt."""
        return sum(self.read(asked, answer)[0])

    def read(self, asked: Asked, text: str, top: int = 0) -> Read:
        """Of every token of a text, said after the prompt: its log-probability, and the likeliest tokens'."""
        ids = self.tokens(text)
        entries = [*asked.body.get("decoding", []), {"method": "forced", "ids": ids}]
        body = {"prompt": asked.prompt, **asked.body, "decoding": entries, "max_tokens": len(ids), "logprobs": top}
        found = self._complete(body | {"temperature": 0, "ignore_eos": True})["choices"][0]
        if found["token_ids"] != ids:
            raise SuiteError(f"{text!r} was not said as asked, but {found['text']!r}")
        read = found["logprobs"]
        return list(map(float, read["token_logprobs"])), [_finite(each) for each in read["top_logprobs"]]

    def tokens(self, text: str) -> list[int]:
        with self._lock:
            if text in self._known:
                return self._known[text]
        found = self._ask("POST", "/tokenize", {"model": self.model, "prompt": text, "add_special_tokens": False})
        with self._lock:
            self._known[text] = found["tokens"]
        return self._known[text]

    def pace(self, asked: Sequence[Asked], num_tokens: int) -> float:
        """Tokens per second of these requests at once."""
        start = time.perf_counter()
        with ThreadPoolExecutor(len(asked)) as pool:
            said = list(pool.map(lambda each: self.say(each, num_tokens, ignore_eos=True), asked))
        return sum(each.num_tokens for some in said for each in some) / (time.perf_counter() - start)

    def _complete(self, body: Body) -> dict[str, Any]:
        found: dict[str, Any] = self._ask(
            "POST", "/v1/completions", {"model": self.model, "return_token_ids": True, "seed": 0, **body}
        )
        return found

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        try:
            answer = self.client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise SuiteError(f"{self.client.base_url}: {error or type(error).__name__}") from error
        if answer.is_success:
            return answer.json()
        kind = Refused if answer.status_code in (400, 404, 409, 422) else SuiteError
        raise kind(f"{answer.status_code}, {reason_in(answer.text)}")


def _finite(top: Mapping[str, float] | None) -> dict[str, float]:
    return {token: value for token, value in (top or {}).items() if math.isfinite(value) and value > _NOTHING}
