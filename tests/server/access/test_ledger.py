"""What keys have used: nothing is taken twice, nothing is lost, and no clock on a wall matters."""

import math
import time
from multiprocessing import get_context

import pytest

from whipstaff.server.access.ledger import KINDS, Ledger, Meter, Spending
from whipstaff.server.access.policy import PerMinute, Policy
from whipstaff.server.errors import BadRequest, RateLimited


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def meter(ledger: Ledger | None = None, name: str = "team", **policy: object) -> Meter:
    return Meter.of(ledger or Ledger.of_one(), name, Policy.model_validate(policy))


def test_requests_come_back_with_time(clock: Clock) -> None:
    one = meter(per_minute={"requests": 3})
    for _ in range(3):
        one.begin()
    with pytest.raises(RateLimited, match="requests of this minute") as refused:
        one.begin()
    assert (refused.value.reason, refused.value.seconds) == ("rate_requests", 20)
    clock.now += 19.9
    with pytest.raises(RateLimited):
        one.begin()
    clock.now += 0.2
    one.begin()
    clock.now += 1e6  # however long nobody asks, no more than a minute's worth is saved up
    assert one.headers()["x-ratelimit-remaining-requests"] == "3"


def test_a_burst_may_be_saved_up(clock: Clock) -> None:
    one = meter(per_minute={"requests": 3}, burst=2)
    for _ in range(6):
        one.begin()
    with pytest.raises(RateLimited):
        one.begin()


def test_a_clock_on_the_wall_changes_nothing(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    one = meter(per_minute={"requests": 1})
    one.begin()
    for wrong in (0.0, 4e9):
        monkeypatch.setattr(time, "time", lambda wrong=wrong: wrong)
        with pytest.raises(RateLimited) as refused:
            one.begin()
        assert refused.value.seconds == 60


def test_as_many_run_at_once_as_may(clock: Clock) -> None:
    one = meter(concurrent=2)
    one.begin()
    one.begin()
    with pytest.raises(RateLimited, match="as many as may at once") as refused:
        one.begin()
    assert (refused.value.reason, refused.value.seconds) == ("concurrency", 1)
    one.end()
    one.begin()


def test_who_is_refused_for_one_limit_uses_up_no_other(clock: Clock) -> None:
    one = meter(per_minute={"tokens": 100, "cost": 150})
    with pytest.raises(BadRequest, match="never has more than 100"):
        one.take(101, 101)
    one.take(60, 100)
    with pytest.raises(RateLimited) as refused:
        one.take(30, 60)
    assert refused.value.reason == "rate_cost"
    left = one.headers()
    assert left["x-ratelimit-remaining-tokens"] == "40" and left["x-ratelimit-remaining-cost"] == "50"
    assert left["x-ratelimit-limit-cost"] == "150" and left["x-ratelimit-reset-tokens"] == "36.000s"
    assert "x-ratelimit-limit-requests" not in left  # what is not limited is not told


def test_what_a_request_does_not_need_is_given_back(clock: Clock) -> None:
    one = meter(per_minute={"tokens": 1000, "cost": 10000})
    spending = Spending(one, num_answers=2, num_computed=2, num_models=3)
    spending.expect([(10, [20], 50)])  # a prompt of 10 tokens, a further one of 20, at most 50 more
    taken = one.headers()
    assert taken["x-ratelimit-remaining-tokens"] == str(1000 - (10 + 2 * 50))
    assert taken["x-ratelimit-remaining-cost"] == str(10000 - 3 * (30 + 2 * 2 * 50))
    bill = spending.bill()
    bill.note(20)
    bill.note(5)
    bill.end(25)
    spending.settle()
    spending.settle()  # once
    used = one.headers()
    assert used["x-ratelimit-remaining-tokens"] == str(1000 - (10 + 25))
    assert used["x-ratelimit-remaining-cost"] == str(10000 - 3 * (30 + 2 * 25))


@pytest.mark.parametrize("counts", [{"tokens_computed": 40, "tried": 90}, {"tokens_computed": 4000}, {}], ids=str)
def test_a_search_is_charged_what_the_engine_counted(clock: Clock, counts: dict[str, int]) -> None:
    """However few of its tokens came, and also beyond what was taken for it: then its key waits."""
    one = meter(per_minute={"tokens": 1000, "cost": 10000})
    spending = Spending(one, num_answers=1, num_computed=4, num_models=3, num_tried=20)
    spending.expect([(10, [], 50)])
    assert one.headers()["x-ratelimit-remaining-cost"] == str(10000 - 30 - 50 * (4 * 3 + 20))
    spending.note_search(0, {"tokens_computed": 1})
    spending.note_search(0, counts)
    bill = spending.bill()
    bill.note(2)
    for _ in range(2):
        spending.settle()
    used = 30 + 3 * counts.get("tokens_computed", 0) + counts.get("tried", 0)
    left = one.headers()
    assert left["x-ratelimit-remaining-cost"] == str(max(10000 - used, 0))
    assert left["x-ratelimit-remaining-tokens"] == str(1000 - 12)
    if used > 10000:
        with pytest.raises(RateLimited) as refused:
            one.take(0, 1)
        assert refused.value.seconds == 13  # of a minute, for the 2031 that are too many


def test_who_is_cut_off_is_charged_what_was_generated(clock: Clock) -> None:
    """Of the candidates of one prompt all are computed, and of their tokens as many counted as its answers would have;
    of the prompt whose answers are there, these."""
    one = meter(per_minute={"tokens": 1000, "cost": 10000})
    spending = Spending(one, num_answers=2, num_computed=8, num_models=3)
    spending.expect([(10, [], 50), (10, [], 50)])
    for num_answered in (None, 17):
        bill = spending.bill()
        for _ in range(10):
            bill.note(8)
        if num_answered is not None:
            bill.end(num_answered)
    spending.bill()  # never scheduled
    spending.settle()
    used = one.headers()
    assert used["x-ratelimit-remaining-tokens"] == str(1000 - (20 + 80 * 2 // 8 + 17))
    assert used["x-ratelimit-remaining-cost"] == str(10000 - 3 * (20 + 2 * 80))


def test_a_search_with_a_budget_takes_no_more_than_that(clock: Clock) -> None:
    one = meter(per_minute={"cost": 10000})
    spending = Spending(one, num_answers=1, num_computed=4, num_models=1, num_tried=20, most=600)
    spending.expect([(10, [], 50)])
    assert one.headers()["x-ratelimit-remaining-cost"] == str(10000 - 10 - 600)


def test_a_request_that_was_refused_gives_nothing_back(clock: Clock) -> None:
    one = meter(per_minute={"tokens": 100})
    one.take(90, 0)
    spending = Spending(one, 1, 1, 1)
    with pytest.raises(RateLimited):
        spending.expect([(10, [], 50)])
    spending.settle()
    assert one.headers()["x-ratelimit-remaining-tokens"] == "10"


def test_keys_have_rows_of_their_own_and_a_policy_may_change(clock: Clock) -> None:
    ledger = Ledger.of_one()
    meters = [meter(ledger, f"key-{number}", per_minute={"requests": 1}) for number in range(1000)]
    assert len({one.row for one in meters}) == 1000
    meters[0].begin()
    again = meter(ledger, "key-0", per_minute={"requests": 2})  # as after a reload
    assert again.row == meters[0].row and again.headers()["x-ratelimit-remaining-requests"] == "1"
    assert meters[1].headers()["x-ratelimit-remaining-requests"] == "1"


def _begin_all(ledger: Ledger, num: int) -> None:
    one = meter(ledger, per_minute={"requests": 10**6}, concurrent=10**6)
    for _ in range(num):
        one.begin()


def test_processes_share_one_limit() -> None:
    ledger, context = Ledger.of_several(), get_context("spawn")
    processes = [context.Process(target=_begin_all, args=(ledger, 500)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    one = meter(ledger, concurrent=1000)
    with pytest.raises(RateLimited):
        one.begin()
    for _ in range(1000):
        one.end()
    one.begin()


def test_without_limits_nothing_is_counted() -> None:
    assert meter().is_free and not meter(concurrent=1).is_free and not meter(per_minute=PerMinute(cost=1)).is_free
    assert set(meter().rates) == {math.inf} and len(KINDS) == len(meter().rates)
