"""KV blocks are keyed by what changed the KV in them: shared with plain traffic before, never after."""

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from whipstaff.decoding.mix import Mix
from whipstaff.decoding.plan import DecodingPlan
from whipstaff.server.engine.scheduler.block_keys import key_blocks
from whipstaff.server.engine.scheduler.group import companions
from whipstaff.server.plan import PLAN_KEY, CompanionPlan, PositionedPlan, RequestPlan
from whipstaff.steering.method import HookPoint
from whipstaff.steering.plan import Capture, Edit, PlannedCapture, PlannedEdit, SteeringPlan
from whipstaff.steering.where import Where

BLOCK = 16


class FakeRequest(SimpleNamespace):
    """A request as vLLM's block hasher sees it: keys are chained, and grow as tokens come."""

    def update_block_hashes(self) -> None:
        self.block_hashes.extend(self._block_hasher(self))


def chained(request: Any) -> list[bytes]:
    keys = list(request.block_hashes)
    known = len(keys)
    while (len(keys) + 1) * BLOCK <= len(request.tokens):
        block = bytes(request.tokens[len(keys) * BLOCK : (len(keys) + 1) * BLOCK])
        keys.append(hashlib.sha256((keys[-1] if keys else b"") + block).digest())
    return keys[known:]


def keys(tokens: list[int], prompt_len: int, plan: RequestPlan | None, later: int = 0) -> list[bytes]:
    """The keys of a request's blocks; `later` tokens arrive after the request was keyed."""
    request = FakeRequest(tokens=tokens[: len(tokens) - later], block_hashes=[], _block_hasher=chained)
    request.update_block_hashes()
    if plan is not None:
        key_blocks(request, PositionedPlan(plan, prompt_len), BLOCK)
    request.tokens = tokens
    request.update_block_hashes()
    return list(request.block_hashes)


def steering(where: Where, scale: Any = 1.0, digest: str = "a") -> RequestPlan:
    return RequestPlan(SteeringPlan((PlannedEdit(Edit(digest, scale, None), where),)))


TOKENS = [(index * 7) % 251 for index in range(100)]


@given(prompt_len=st.integers(1, 99), later=st.integers(0, 99))
def test_only_blocks_from_the_first_edited_position_differ_from_plain(prompt_len: int, later: int) -> None:
    plan = steering(Where.of("each_last"))
    plain, steered = keys(TOKENS, prompt_len, None), keys(TOKENS, prompt_len, plan, later=later)
    assert len(plain) == len(steered) == len(TOKENS) // BLOCK
    for index, (before, after) in enumerate(zip(plain, steered, strict=True)):
        is_tainted = (index + 1) * BLOCK > prompt_len - 1
        assert (before != after) == is_tainted


def test_generated_only_edits_share_the_whole_prompt() -> None:
    plan = steering(Where.of("generation"))
    assert keys(TOKENS, 64, plan)[:4] == keys(TOKENS, 64, None)[:4]
    assert keys(TOKENS, 64, plan)[4] != keys(TOKENS, 64, None)[4]


def test_equal_plans_share_and_different_plans_never_do() -> None:
    everywhere = Where.of("all")
    plans = [
        None,
        steering(everywhere),
        steering(everywhere, scale=2.0),
        steering(everywhere, digest="b"),
        steering(Where(prompt=[(0, 40)])),
        RequestPlan(decoding=DecodingPlan(Mix.of({"expert": 1.0}))),
        RequestPlan(steering(everywhere).steering, DecodingPlan(Mix.of({"expert": 1.0}))),
        RequestPlan(decoding=DecodingPlan(Mix.of({"expert": 1.0, "anti": -1.0}))),
    ]
    found = [tuple(keys(TOKENS, 80, plan)) for plan in plans]
    assert len(set(found)) == len(plans)
    assert len({key for row in found for key in row}) == len(plans) * len(found[0])
    assert found == [tuple(keys(TOKENS, 80, plan)) for plan in plans]


def test_weights_do_not_change_kv_and_auxiliary_models_do() -> None:
    """How much an auxiliary model counts changes no KV; whether it ran changes everything."""
    mild, strong = (RequestPlan(decoding=DecodingPlan(Mix.of({"expert": weight}))) for weight in (0.5, 2.0))
    assert keys(TOKENS, 80, mild) == keys(TOKENS, 80, strong)
    assert not set(keys(TOKENS, 80, mild)) & set(keys(TOKENS, 80, None))


@given(prompt_len=st.integers(1, 99))
def test_keeping_activations_changes_no_kv(prompt_len: int) -> None:
    reads = (PlannedCapture(Capture((HookPoint("resid_post", 0),), True), Where.of("all")),)
    only = RequestPlan(SteeringPlan((), keeps=(0, 1), captures=reads))
    assert keys(TOKENS, prompt_len, only) == keys(TOKENS, prompt_len, None)
    edited = steering(Where.of("each_last")).steering
    assert edited is not None
    kept = replace(edited, keeps=(0, 1), captures=reads)
    both = RequestPlan(kept)
    assert SteeringPlan.from_wire(json.loads(json.dumps(kept.to_wire()))) == kept
    assert keys(TOKENS, prompt_len, both) == keys(TOKENS, prompt_len, RequestPlan(edited))


def test_nothing_is_keyed_when_prefix_caching_is_off() -> None:
    request = FakeRequest(tokens=TOKENS, block_hashes=[], _block_hasher=None)
    key_blocks(request, PositionedPlan(steering(Where.of("all")), 10), BLOCK)
    assert request.block_hashes == [] and request._block_hasher is None


def test_companions_that_follow_the_primarys_entropy_are_keyed_by_what_it_asks_for_but_for_its_name() -> None:
    """Who asks what was read, and under which id, changes no KV."""
    follows = SteeringPlan((PlannedEdit(Edit("a", "{}", None), Where.of("all")),), entropy_column=0)

    def salt(scale: float, readings_id: str) -> str | None:
        plan = RequestPlan(
            None, DecodingPlan(Mix.of({"expert": scale})), readings_id, (CompanionPlan((1, 2), follows),)
        )
        params = SamplingParams(extra_args={PLAN_KEY: plan.to_wire()})
        primary = Request("p", [3, 4], params, pooling_params=None)
        (companion,) = companions(primary, plan)
        found: str | None = companion.cache_salt
        return found

    assert salt(0.5, "one") == salt(0.5, "two") != salt(0.7, "one")
