"""What keys have used: buckets that empty with time, shared by all API servers of one engine.

Time is `time.monotonic`, which all processes of a machine share: a wall clock that jumps neither locks nor frees.
"""

import hashlib
import math
import time
from collections.abc import Mapping, MutableSequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context

from whipstaff.server.access.policy import Policy
from whipstaff.server.errors import BadRequest, RateLimited

KINDS = ("requests", "tokens", "cost")
ROWS = 1 << 14  # keys that can be told apart; a row each
# Columns: whose row it is, its requests that run, when it was last looked at, and from there on what was spent.
_TAG, _RUNNING, _AT, _SPENT = 0, 1, 2, 3
_COLUMNS = _SPENT + len(KINDS)


class Ledger:
    """Memory with a row for each key."""

    def __init__(self, memory: MutableSequence[float], lock: AbstractContextManager[object]) -> None:
        self.memory, self.lock = memory, lock

    @staticmethod
    def of_one() -> "Ledger":
        """Of one API server."""
        return Ledger([0.0] * (ROWS * _COLUMNS), nullcontext())

    @staticmethod
    def of_several() -> "Ledger":
        """Of several: processes that are spawned with it share it."""
        context = get_context("spawn")
        return Ledger(context.RawArray("d", ROWS * _COLUMNS), context.Lock())

    def row(self, name: str) -> int:
        """Where the row of a key begins. Raises: RuntimeError when there is none left."""
        tag = float(1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]))  # exact in a double
        with self.lock:
            for step in range(ROWS):
                start = (int(tag) + step) % ROWS * _COLUMNS
                if self.memory[start + _TAG] in (0.0, tag):
                    self.memory[start + _TAG] = tag
                    return start
        raise RuntimeError(f"more than {ROWS} keys were used since the start")


@dataclass(frozen=True)
class Meter:
    """One key's use of what its policy allows."""

    ledger: Ledger
    row: int
    rates: tuple[float, ...]  # units a second that come back; infinite where there is no limit
    capacities: tuple[float, ...]
    concurrent: float

    @staticmethod
    def of(ledger: Ledger, name: str, policy: Policy) -> "Meter":
        per_minute = [getattr(policy.per_minute, kind) or math.inf for kind in KINDS]
        rates = tuple(units / 60 for units in per_minute)
        capacities = tuple(max(units * policy.burst, 1) for units in per_minute)
        return Meter(ledger, ledger.row(name), rates, capacities, policy.concurrent or math.inf)

    @property
    def is_free(self) -> bool:
        """Whether nothing is limited."""
        return self.concurrent == math.inf and all(rate == math.inf for rate in self.rates)

    def begin(self) -> None:
        """A request comes. Raises: RateLimited."""
        with self.ledger.lock:
            if self.ledger.memory[self.row + _RUNNING] >= self.concurrent:
                what = f"{self.concurrent:g} of this key's requests are running, as many as may at once"
                raise RateLimited(what, "concurrency", 1.0)
            self._take((1.0, 0.0, 0.0))
            self.ledger.memory[self.row + _RUNNING] += 1

    def end(self) -> None:
        """It was answered, or its client is gone."""
        with self.ledger.lock:
            self.ledger.memory[self.row + _RUNNING] -= 1

    def take(self, tokens: float, cost: float) -> None:
        """Raises: RateLimited; BadRequest for more than there ever is."""
        with self.ledger.lock:
            self._take((0.0, tokens, cost))

    def correct(self, tokens: float, cost: float) -> None:
        """By how much more was used than was taken; below 0, it comes back. What is used already is not refused: the
        key waits for it."""
        with self.ledger.lock:
            for index, units in ((1, tokens), (2, cost)):
                if self.rates[index] != math.inf:
                    column = self.row + _SPENT + index
                    self.ledger.memory[column] = max(self.ledger.memory[column] + units, 0.0)

    def headers(self) -> Mapping[str, str]:
        """What is left, in OpenAI's words."""
        found: dict[str, str] = {}
        with self.ledger.lock:
            self._refill()
            for index, kind in enumerate(KINDS):
                if (rate := self.rates[index]) != math.inf:
                    spent = self.ledger.memory[self.row + _SPENT + index]
                    found[f"x-ratelimit-limit-{kind}"] = str(math.floor(self.capacities[index]))
                    found[f"x-ratelimit-remaining-{kind}"] = str(max(math.floor(self.capacities[index] - spent), 0))
                    found[f"x-ratelimit-reset-{kind}"] = f"{spent / rate:.3f}s"
        return found

    def _refill(self) -> None:
        memory, now = self.ledger.memory, time.monotonic()
        passed = max(now - memory[self.row + _AT], 0.0)
        memory[self.row + _AT] = now
        for index, rate in enumerate(self.rates):
            if rate != math.inf:
                column = self.row + _SPENT + index
                memory[column] = max(memory[column] - rate * passed, 0.0)

    def _take(self, wanted: tuple[float, ...]) -> None:
        """All of it, or nothing."""
        self._refill()
        memory = self.ledger.memory
        for index, units in enumerate(wanted):
            rate, capacity = self.rates[index], self.capacities[index]
            if units > capacity:
                raise BadRequest(
                    f"this may take {units:g} {KINDS[index]}, and its key never has more than {capacity:g}",
                    "max_tokens",
                )
            missing = memory[self.row + _SPENT + index] + units - capacity
            if units and missing > 0:
                what = f"the key's {KINDS[index]} of this minute are used up ({rate * 60:g} come back every minute)"
                raise RateLimited(what, f"rate_{KINDS[index]}", missing / rate)
        for index, units in enumerate(wanted):
            if self.rates[index] != math.inf:
                memory[self.row + _SPENT + index] += units


@dataclass
class Bill:
    """What came of one prompt of a request."""

    num_generated: int = 0  # tokens that the engine generated, those of candidates that nobody gets among them
    num_answered: int | None = None  # tokens of its answers; None: it was cut off before all were there

    def note(self, num_tokens: int) -> None:
        """So many were generated."""
        self.num_generated += num_tokens

    def end(self, num_tokens: int) -> None:
        """Its answers are there, of so many tokens."""
        self.num_answered = num_tokens


class Spending:
    """Of one request: what it may come to is taken before it is scheduled, and corrected when it is known.

    Of a search, which tries tokens and takes some back, it is known only then what it computes: taken before is what it
    computes while it takes nothing back. Of candidates that were cut off nobody knows the best: as many tokens count as
    that many answers have in the mean.
    """

    def __init__(
        self,
        meter: Meter,
        num_answers: int,
        num_computed: int,
        num_models: int,
        num_tried: int = 0,
        most: float = math.inf,
    ) -> None:
        """
        Args:
            num_answers: that each prompt gets.
            num_computed: tokens of the request's own that are computed for each that follows a prompt, further prompts
                not counted.
            num_models: that read each of these.
            num_tried: tokens that the served model alone reads, likewise.
            most: tokens that are computed at most after each prompt.
        """
        self._meter, self._num_answers, self._num_models = meter, num_answers, num_models
        self._num_computed, self._num_tried, self._most = num_computed, num_tried, most
        self._taken, self._per_token, self._base = (0.0, 0.0), 0.0, (0.0, 0.0)
        self._bills: list[Bill] = []
        self._counted: dict[int, float] = {}  # by prompt, the cost that the engine has counted

    def expect(self, sizes: list[tuple[int, list[int], int]]) -> None:
        """Of each prompt: its tokens, those of its further prompts, and how many may follow. Raises: RateLimited,
        BadRequest."""
        read = sum(own for own, _, _ in sizes)
        computed = sum(own + sum(further) for own, further, _ in sizes) * self._num_models
        most = sum(following for _, _, following in sizes)
        cost = sum(self._cost(following, 1 + len(further)) for _, further, following in sizes)
        taken = read + most * self._num_answers, computed + cost
        self._meter.take(*taken)
        self._base, self._taken = (read, computed), taken
        self._per_token = cost / (most * self._num_computed) if most else 0.0

    def _cost(self, following: int, num_sequences: int) -> float:
        """Of so many tokens after a prompt with its further prompts."""
        computed, tried = following * self._num_computed * num_sequences, following * self._num_tried
        share = min(1.0, self._most / max(computed + tried, 1))
        return share * (computed * self._num_models + tried)

    def bill(self) -> Bill:
        """Of one more of its prompts."""
        self._bills.append(made := Bill())
        return made

    def note_search(self, prompt: int, counts: Mapping[str, int]) -> None:
        """What the search of a prompt has computed so far."""
        self._counted[prompt] = counts.get("tokens_computed", 0) * self._num_models + counts.get("tried", 0)

    def settle(self) -> None:
        """The request is over, however it ended."""
        generated, share = sum(bill.num_generated for bill in self._bills), self._num_answers / self._num_computed
        after, share = (sum(self._counted.values()), 1.0) if self._counted else (generated * self._per_token, share)
        tokens = sum(
            share * bill.num_generated if bill.num_answered is None else bill.num_answered for bill in self._bills
        )
        used = self._base[0] + tokens, self._base[1] + after
        self._meter.correct(*(one - taken for taken, one in zip(self._taken, used, strict=True)))
        self._base, self._taken, self._per_token = (0.0, 0.0), (0.0, 0.0), 0.0
        self._bills, self._counted = [], {}
