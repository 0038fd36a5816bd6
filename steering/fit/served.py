"""Activations of the model that a server runs, asked for by `capture`: the same numbers as a local model's, computed
beside whatever else the server does."""

import base64
import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from safetensors.torch import load
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit.source import Asked, Entry, Gives
from whipstaff.steering.method import HookPoint
from whipstaff.steering.shape import ModelShape, Site

Ask = Callable[[str, str, Any], Any]  # (HTTP's method, path, JSON) -> JSON; raises SteeringError with the reason
MOST_BYTES = 16 << 20  # of activations that one answer holds, about
_PROBE = "Is 1 + 1 = 2?\nYes: so it's said, naïvely."  # told apart by most tokenizers
_WINDOW = 4  # requests, for each that runs at once, whose texts are sorted by what is read of them


class ServedModel:
    """A `Source`: a server's model.

    Args:
        ask: puts one request; called from several threads at once.
        model: what requests call it.
        tokenizer: the model's own, on this machine.
        shape: of the model.
        experts_per_token: how many a router chooses; 0 without routers.
        batch_size: texts of one request.
        parallel: requests at once.
        max_len: tokens of a text; None: nobody says.

    Raises: SteeringError where the server has another tokenizer.
    """

    gives: frozenset[Gives] = frozenset({"rows"})

    def __init__(
        self,
        ask: Ask,
        model: str,
        tokenizer: Any,
        shape: ModelShape,
        experts_per_token: int = 0,
        batch_size: int = 8,
        parallel: int = 4,
        max_len: int | None = None,
    ) -> None:
        self.max_len = max_len
        self.ask, self.model, self.tokenizer, self.shape = ask, model, tokenizer, shape
        self.experts_per_token, self.batch_size, self.parallel = experts_per_token, batch_size, parallel
        self._check_tokenizer()

    def _check_tokenizer(self) -> None:
        body = {"model": self.model, "prompt": _PROBE, "add_special_tokens": False}
        theirs = self.ask("POST", "/tokenize", body)["tokens"]
        if theirs != self.tokenizer.encode(_PROBE, add_special_tokens=False):
            raise SteeringError(f"it is not the tokenizer of {self.model}, which the server runs", "tokenizer")

    def identity(self) -> dict[str, Any]:
        return served_identity(self.model, self.shape, self.tokenizer)

    def read(self, asked: Sequence[Asked], points: Sequence[HookPoint]) -> Iterator[dict[HookPoint, Tensor]]:
        """At most two windows of texts are in memory: the one that is told, and the one that the server computes."""
        size = self._texts_of_a_request(asked, points)
        window = size * self.parallel * _WINDOW
        ahead: deque[tuple[int, list[tuple[list[int], Future[list[dict[HookPoint, Tensor]]]]]]] = deque()
        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                for start in range(0, len(asked), window):
                    some = asked[start : start + window]
                    jobs = [
                        (chosen, pool.submit(self._read, [some[index] for index in chosen], points))
                        for chosen in _alike(some, size)
                    ]
                    ahead.append((len(some), jobs))
                    if len(ahead) == 2:
                        yield from _in_order(*ahead.popleft())
                while ahead:
                    yield from _in_order(*ahead.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def predict(self, texts: Sequence[tuple[int, ...]], entries: Sequence[Entry] = ()) -> Iterator[Tensor]:
        raise SteeringError("a server does not tell the probability of every token", "server")

    def _texts_of_a_request(self, asked: Sequence[Asked], points: Sequence[HookPoint]) -> int:
        width = sum(self.shape.width(point.site) for point in points)
        most = max((1 if each.is_mean else len(each.positions) for each in asked), default=1)
        return max(1, min(self.batch_size, MOST_BYTES // (4 * width * most)))

    def _read(self, some: Sequence[Asked], points: Sequence[HookPoint]) -> list[dict[HookPoint, Tensor]]:
        """Of texts that are read at the same tokens, counted from the end."""
        clause = {"prompt": _windows(some[0])}
        reduce = "mean" if some[0].is_mean else "none"
        entries = [
            {"site": site, "layers": [point.layer for point in group], "where": clause, "reduce": reduce}
            for site, group in by_site(points).items()
        ]
        body = {"model": self.model, "prompt": [list(each.ids) for each in some], "capture": entries}
        answer = self.ask("POST", "/v1/completions", body | {"max_tokens": 1, "temperature": 0})["whipstaff"]
        if answer["steering"] or answer["decoding"]:
            raise SteeringError("the server steers what this key asks for, and so what would be read", "api_key")
        return [self._rows(each, one, points) for each, one in zip(some, answer["captured"], strict=True)]

    def _rows(self, asked: Asked, told: Mapping[str, Any], points: Sequence[HookPoint]) -> dict[HookPoint, Tensor]:
        """Raises: SteeringError unless all that was asked for is there."""
        if "problem" in told:
            raise SteeringError(f"the server could not tell what was read: {told['problem']}", "server")
        tensors = load(base64.b64decode(told["safetensors"]))
        found: dict[HookPoint, Tensor] = {}
        for number, (site, group) in enumerate(by_site(points).items()):
            if tensors[f"{number}.positions"].tolist() != list(asked.positions):
                raise SteeringError(f"the server read other tokens than {list(asked.positions)[:8]}", "server")
            for point in group:
                rows = tensors[f"{number}.{site}.{point.layer}"].float()
                found[point] = rows.reshape(1 if asked.is_mean else len(asked.positions), -1)
                if found[point].shape[1] != self.shape.width(point.site):
                    raise SteeringError(f"{site} is {found[point].shape[1]} wide there; is it this model?", "tokenizer")
        return found


def served_identity(model: str, shape: ModelShape, tokenizer: Any) -> dict[str, Any]:
    """The served model's name, and a digest of its shape and vocabulary: weights do not leave a server."""
    said = f"{shape.model_dump_json()} {sorted(tokenizer.get_vocab().items())}"
    return {"model": model, "shape_digest": hashlib.sha256(said.encode()).hexdigest(), "read_from": "server"}


def by_site(points: Sequence[HookPoint]) -> dict[Site, list[HookPoint]]:
    """Places of equal width each, in order."""
    found: dict[Site, list[HookPoint]] = {}
    for point in points:
        found.setdefault(point.site, []).append(point)
    return found


def _windows(asked: Asked) -> list[list[int | None]]:
    """Positions as windows of a prompt, counted from its end, so that texts of different lengths share them."""
    found: list[list[int | None]] = []
    for _, run in itertools.groupby(enumerate(asked.positions), lambda each: each[1] - each[0]):
        places = [position for _, position in run]
        end = places[-1] + 1 - len(asked.ids)
        found.append([places[0] - len(asked.ids), end or None])
    return found


def _alike(some: Sequence[Asked], size: int) -> Iterator[list[int]]:
    """Which texts go into one request: at most so many, read at the same tokens, of similar lengths."""
    groups: dict[Any, list[int]] = {}
    for index in sorted(range(len(some)), key=lambda index: len(some[index].ids)):
        groups.setdefault((str(_windows(some[index])), some[index].is_mean), []).append(index)
    for group in groups.values():
        for at in range(0, len(group), size):
            yield group[at : at + size]


def _in_order(
    num: int, jobs: Sequence[tuple[list[int], Future[list[dict[HookPoint, Tensor]]]]]
) -> Iterator[dict[HookPoint, Tensor]]:
    found: dict[int, dict[HookPoint, Tensor]] = {}
    for chosen, future in jobs:
        found |= dict(zip(chosen, future.result(), strict=True))
    for index in range(num):
        yield found.pop(index)
