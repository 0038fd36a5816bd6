"""What every decoding method promises, whatever its formula."""

from typing import Any, get_args

import pytest
import torch
from decodings import (
    AUXILIARIES,
    HIDDEN,
    MEMBERS,
    VOCAB,
    Batch,
    StubPrompt,
    StubSource,
    StubVocabulary,
    random_batch,
    run,
)
from pydantic import BaseModel, ValidationError
from torch import Tensor

from whipstaff.decoding.method import STAGES, DecodingError, LogitsRewriter, Method, Params, StreamMixer, setting_type
from whipstaff.decoding.methods import METHODS
from whipstaff.decoding.methods.rule_adapter import RuleAdapter
from whipstaff.decoding.search.search import SearchMethod
from whipstaff.steering.kinds.head import HEAD
from whipstaff.steering.methods import METHODS as FILES

NAMED: dict[str, dict[str, Any]] = {
    "proxy_tuning": {"expert": "first", "antiexpert": "second"},
    "dexperts": {"expert": "first", "antiexpert": "second"},
    "contrastive": {"amateur": "first"},
    "contrastive_beta": {"amateur": "first"},
    "adapter_free_ensemble": {"weights": {"first": 1.0, "second": 3.0}},
    "cad": {"context": "bc"},
    "instructive": {"noisy_prompt": "no"},
    "prompt_ensemble": {"prompts": ["one", "two"]},
    "adapter_ensemble": {"weights": {"first": 1.0, "second": 3.0}},
    "streams": {"streams": [{"model": "first", "weight": 0.5}, {"prompt": "other", "weight": -1.0}]},
    "forced": {"ids": [5, 6, 3, 9]},
    "co_llm": {"assistant": "first", "head": "head"},
    "kwd": {"classifier": "head"},
    "kcts": {"classifier": "head"},
    "adaptive_temperature": {"head": "head"},
}
"""The parameters without a default."""

OTHERS: dict[str, list[dict[str, Any]]] = {
    "proxy_tuning": [{"alpha": -0.5}],
    "dexperts": [{"antiexpert": None, "alpha": 0.7, "top_p": 1.0}, {"expert": None, "top_p": 0.5}],
    "contrastive": [{"alpha": 0.0, "beta": 0.5, "amateur_temperature": 0.5}, {"alpha": 1.0}],
    "contrastive_beta": [{"alpha": 0.0}, {"alpha": 0.4, "beta": 2.0}],
    "adapter_free_ensemble": [{"weights": {"second": 0.3}, "base_weight": 0.0}],
    "cfg": [{"guidance_scale": 3.0, "negative_prompt": "no"}, {"guidance_scale": 0.4}, {"until": 4, "from": 1}],
    "cad": [
        {"alpha": 1.0, "context": None, "prompt_without": [4, 5]},
        {"alpha": -0.5, "until": 9, "fade": "linear"},
        {"top_p": 0.4, "top_p_without": 0.3},
    ],
    "sh2": [{"alpha": 6.0, "placement": "append"}, {"relative_top": 0.1, "thinning": {"seed": 3}}, {"alpha": 0.0}],
    "instructive": [{"epsilon": 0.9, "noisy_prompt": [{"role": "user", "content": "no"}]}],
    "prompt_ensemble": [{"space": "log"}, {"weights": [0.0, 1.0, 2.0]}, {"prompts": [[3]], "weights": [1.0, 0.0]}],
    "adapter_ensemble": [{"base_weight": 0.0}, {"weights": {"first": 2.0}}],
    "streams": [
        {"streams": [{"prompt": "a", "weight": 0.5}, {"steering": [], "weight": 2.0}], "space": "probability"},
        {"streams": [{"adapter": "a", "weight": 0.5, "temperature": 2.0}], "space": "log", "top_p": 0.8},
        {"streams": [{"adapter": "a", "model": "second", "weight": 0.5}], "alpha": 0.1, "base_weight": -0.5},
    ],
    "forced": [{"text": "hello", "ids": None}, {"ids": []}],
    "co_llm": [{"threshold": -1.0}, {"threshold": 0.3, "strategy": "compose"}, {"warmup": "cosine"}],
    "kwd": [{"k": 1}, {"k": 7}],
    "dola": [{"layers": [3]}, {"layers": "high", "relative_top": 0.0}, {"layers": [1, 5, 6], "relative_top": 1.0}],
    "best_of": [{"model": "first"}, {"classifier": "head", "num_candidates": 2}, {"num_candidates": 1}],
    "rule_adapter": [{"ramp": False}, {"opening": True, "repetition": False}, {"after_ramp": "official"}],
    "dry": [{"allowed_length": 1, "base": 1.0}, {"penalty_last_n": 6, "sequence_breakers": ["e"]}, {"multiplier": 0}],
    "adaptive_temperature": [{"choose": "sample"}, {"level": "sequence"}, {"level": "sequence", "choose": "sample"}],
    "edt": [{"t0": 1.5, "theta": 0.3}, {"n": 1.0}, {"t0": 0.0}],
    "dynatemp": [{"range": 2.0, "exponent": 0.5}, {"range": 0.0}, {"low": 0.2, "high": 1.7}, {"low": 1.0, "high": 1.0}],
    "top_n_sigma": [{"n": 0.3}, {"n": -1}],
    "typical_p": [{"p": 0.2}, {"p": 1.0}],
    "top_a": [{"a": 1.0}],
    "epsilon_cutoff": [{"epsilon": 0.2}],
    "eta_cutoff": [{"epsilon": 0.5}],
    "xtc": [{"probability": 1.0, "threshold": 0.02}, {"threshold": 0.05}],
    "opera_lite": [
        {"span": [(0, 3)], "candidates": 1, "switch_length": 4},
        {"penalty_weight": 30.0, "scale_factor": 1e4, "history": 3, "penalty_cap": 2.0},
        {"switch_length": 0, "scale_factor": 400.0},
    ],
    "contrastive_search": [{"k": 1}, {"k": 9, "penalty_alpha": 1.0}, {"penalty_alpha": 0.1, "k": 256}],
    "mirostat": [{"mode": 0}, {"tau": 0.0}, {"tau": 0.5}, {"tau": 1.5, "eta": 1.0}],
    "opera": [{"beams": 1, "candidates": 2}, {"span": "bc", "penalty_weight": 0.5, "official_fp16": True}],
    "kcts": [{"k": 3, "simulations": 4}, {"exploration": 0.5, "repetition_penalty": 1.0}],
    "beam_search": [{"num_beams": 2, "early_stopping": True}, {"scoring": "vllm", "length_penalty": 0.5}],
}
"""Further parameters, so that rows of a batch differ."""

RUN = [name for name, method in METHODS.items() if not isinstance(method, SearchMethod)]
each_method = pytest.mark.parametrize("name", METHODS)
each_that_runs_on_rows = pytest.mark.parametrize("name", RUN)


def made(name: str, **own: Any) -> Params:
    params: Params = METHODS[name].params(**{**NAMED.get(name, {}), **own})
    return params


def revives(name: str) -> bool:
    """Whether it may choose what was banned."""
    return getattr(METHODS[name], "revives", False)


def varied(name: str) -> list[Params]:
    """The defaults and others, each a few times, in no order."""
    kinds = [{}, *OTHERS[name]]
    return [made(name, **kinds[(3 * r + r // 5) % len(kinds)]) for r in range(11)]


def batch_of(name: str, seed: int = 0) -> Batch:
    return random_batch(METHODS[name], varied(name), seed)


@each_method
def test_it_says_what_it_is(name: str) -> None:
    method = METHODS[name]
    assert method.paper and method.stage in STAGES and method.params.__doc__
    assert made(name).method == name == method.name
    assert all(field.description for key, field in method.params.model_fields.items() if key != "method")
    assert set(method.shorthands.values()) <= set(method.params.model_fields)
    assert {*method.stream_fields, *method.head_fields} <= set(method.params.model_fields)
    kinds = [*method.head_fields.values(), *method.ahead_fields.values()]
    assert all(FILES[kind].kind is HEAD for kind in kinds) and len(kinds) == len(set(kinds))
    assert set(method.ahead_fields) <= set(method.head_fields)
    assert not method.ahead_fields or "lookahead" in getattr(method, "needs", ())
    assert sum(isinstance(method, kind) for kind in (StreamMixer, LogitsRewriter, SearchMethod)) == 1


def test_shorthands_are_one_parameters_each() -> None:
    fields = [field for method in METHODS.values() for field in method.shorthands]
    assert len(fields) == len(set(fields))


@each_method
def test_it_names_its_streams(name: str) -> None:
    method, params = METHODS[name], made(name)
    named = method.streams(params)
    assert set(named.values()) <= set(AUXILIARIES) and len(named) >= method.num_streams
    if isinstance(method, StreamMixer):
        assert sorted(set(named.values())) == method.mix(params).models


@each_method
def test_it_makes_the_sequences_that_its_mix_reads(name: str) -> None:
    method = METHODS[name]
    if not isinstance(method, StreamMixer):
        return
    for params in varied(name):
        mix, source = method.mix(params), StubSource()
        scores = [-1.0 * index for index in range(len(method.scored(params, source)) - 1)]
        made = method.companions(params, source, scores)
        assert len(made) == mix.num_companions <= MEMBERS
        assert all(
            one.prompt and one.param.partition(".")[0].partition("[")[0] in method.params.model_fields for one in made
        )
        assert set(method.steered(params)) <= {one.steering for one in made}  # those that say it, and not the request


def test_only_one_method_says_what_was_banned() -> None:
    assert [name for name in METHODS if revives(name)] == ["forced"]


@each_that_runs_on_rows
def test_off_changes_nothing(name: str) -> None:
    if (off := METHODS[name].off(AUXILIARIES, ["head"])) is None:
        assert name in ("contrastive", "sh2", "prompt_ensemble", "dola", "kwd", "adaptive_temperature")
        return
    batch = random_batch(METHODS[name], [off] * 3)
    before = batch.rows.logits.clone()
    if batch.rows.temperature is not None:
        batch.rows.temperature.fill_(1.0)
    if isinstance(METHODS[name], StreamMixer):
        batch.rows.streams = {model: torch.full_like(before, torch.nan) for model in AUXILIARIES}
        batch.members = torch.full((3, MEMBERS, before.shape[1]), torch.nan)
    assert torch.equal(run(METHODS[name], batch), before)


@each_method
def test_what_is_off_is_what_changes_nothing(name: str) -> None:
    """Whatever else it says. A method that takes the temperature's place is never off: the request had one."""
    method = METHODS[name]
    off = method.off(AUXILIARIES, ["head"])
    assert off is None or method.is_off(off) == (name != "edt")
    assert not method.is_off(made(name))
    for params in filter(method.is_off, varied(name) if name in RUN else ()):
        batch = random_batch(method, [params])
        before = batch.rows.logits.clone()
        if batch.rows.temperature is not None:
            batch.rows.temperature.fill_(1.0)
        assert torch.equal(run(method, batch), before)


def test_a_prompt_each() -> None:
    cfg = METHODS["cfg"]
    for given, wanted in (("a", "a"), ([5, 6], [5, 6]), (["a", "b"], "b"), ([[5], [6, 7]], [6, 7]), (None, None)):
        assert cfg.of_prompt(made("cfg", negative_prompt=given), 1, 2).model_dump()["negative_prompt"] == wanted
    with pytest.raises(DecodingError) as caught:
        cfg.of_prompt(made("cfg", negative_prompt=["a"]), 1, 2)
    assert caught.value.param == "negative_prompt"


@each_that_runs_on_rows
def test_rows_do_not_see_each_other(name: str) -> None:
    method, batch = METHODS[name], batch_of(name)
    alone = [batch.take([r]) for r in range(len(batch.settings))]
    together = batch.take(range(len(batch.settings)))
    result = run(method, together)
    for row, one in enumerate(alone):
        assert torch.equal(run(method, one)[0], result[row]), row
        if one.rows.state is not None and together.rows.state is not None:
            torch.testing.assert_close(one.rows.state[0], together.rows.state[row], equal_nan=True, atol=0, rtol=0)


@each_that_runs_on_rows
def test_order_of_rows_does_not_matter(name: str) -> None:
    method, batch = METHODS[name], batch_of(name)
    order = torch.randperm(len(batch.settings), generator=torch.Generator().manual_seed(1)).tolist()
    result = run(method, batch.take(range(len(order))))
    assert torch.equal(run(method, batch.take(order)), result[order])


@each_that_runs_on_rows
def test_bans_stay_and_a_token_stays(name: str) -> None:
    for seed in range(4):
        batch = batch_of(name, seed)
        before = batch.rows.logits.clone()
        result = run(METHODS[name], batch)
        assert result.shape == before.shape and result.dtype == torch.float32
        assert revives(name) or torch.isneginf(result[torch.isneginf(before)]).all()
        assert (result > -torch.inf).any(1).all() and (result < torch.inf).all()


@pytest.mark.parametrize("name", [name for name in RUN if not revives(name)])
def test_one_token_that_is_allowed_stays(name: str) -> None:
    batch = batch_of(name)
    batch.rows.logits[:] = -torch.inf
    batch.rows.logits[:, 7] = -4.0
    result = run(METHODS[name], batch)
    assert (result > -torch.inf).nonzero()[:, 1].tolist() == [7] * len(result)


@each_that_runs_on_rows
def test_no_rows(name: str) -> None:
    assert run(METHODS[name], batch_of(name).take([])).shape == (0, batch_of(name).rows.logits.shape[1])


@each_that_runs_on_rows
def test_rows_of_a_wider_tensor(name: str) -> None:
    method, batch = METHODS[name], batch_of(name)
    expected = run(method, batch.take(range(len(batch.settings))))
    wide = torch.full((len(expected), 64), torch.nan)
    wide[:, : expected.shape[1]] = batch.rows.logits
    batch.rows.logits = wide[:, : expected.shape[1]]
    assert torch.equal(run(method, batch), expected)
    assert wide[:, expected.shape[1] :].isnan().all()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if getattr(method, "keeps_greedy", False)])
def test_the_best_token_stays_where_it_says_so(name: str) -> None:
    method = METHODS[name]
    for seed in range(8):
        batch = batch_of(name, seed)
        best = batch.rows.logits.argmax(1)
        assert torch.equal(run(method, batch).argmax(1), best)


@each_method
def test_it_reads_what_it_says(name: str) -> None:
    method = METHODS[name]
    if isinstance(method, LogitsRewriter):
        unread = {"lookahead"} if method.ahead_fields else set()  # heads of some kinds read it: see test_kwd
        for need in method.needs - unread:
            batch = batch_of(name)
            setattr(batch.rows, need, None)
            with pytest.raises(AssertionError):
                run(method, batch)


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if "lookahead" in getattr(method, "needs", ())]
)
def test_it_tries_as_many_tokens_as_it_says(name: str) -> None:
    """For a row that is alone."""
    method = METHODS[name]
    assert isinstance(method, LogitsRewriter)
    for params in varied(name):
        batch, num = random_batch(method, [params]), 0
        if method.ahead_fields:
            batch.rows.heads = {"classifier": {"weight": torch.randn(2, HIDDEN)}}

        def look(tokens: Tensor) -> Tensor:
            nonlocal num
            num += 1
            return torch.randn(len(tokens), HIDDEN)

        batch.rows.lookahead = look
        run(method, batch)
        assert num == min(method.num_tried(params), VOCAB) > 0


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "tokens" in getattr(method, "needs", ())])
def test_a_text_may_hold_tokens_without_a_logit(name: str) -> None:
    batch = batch_of(name)
    assert batch.rows.tokens is not None
    batch.rows.tokens[:, 2] = batch.rows.tokens[:, 3] = 10**6
    assert run(METHODS[name], batch).isfinite().any(1).all()


@each_method
def test_parameters_survive_json(name: str) -> None:
    method = METHODS[name]
    for params in varied(name):
        assert method.params.model_validate_json(params.model_dump_json()) == params
        if isinstance(method, LogitsRewriter | SearchMethod):
            setting: BaseModel = method.at_prompt(method.resolve(params, StubVocabulary()), StubPrompt())
            assert setting_type(method).model_validate_json(setting.model_dump_json()) == setting


@each_method
def test_bad_parameters_name_their_field(name: str) -> None:
    method = METHODS[name]
    for field in {*method.params.model_fields, "nonsense"} - {"steering"}:  # which is compiled as a request's is
        for bad in ([float("nan")], {"no": object()}, float("inf"), float("nan")):
            with pytest.raises(ValidationError) as caught:
                made(name, **{field: bad})
            assert {error["loc"][0] for error in caught.value.errors()} == {field}


@each_method
def test_numbers_are_bounded(name: str) -> None:
    numbers = [key for key, field in METHODS[name].params.model_fields.items() if field.annotation in (int, float)]
    for field in numbers:
        for far in (-(10**12), 10**12):
            with pytest.raises(ValidationError) as caught:
                made(name, **{field: far})
            assert caught.value.errors()[0]["loc"] == (field,)


@each_method
def test_settings_are_literals_of_their_name(name: str) -> None:
    assert get_args(METHODS[name].params.model_fields["method"].annotation) == (name,)


def test_what_a_mix_cannot_be_names_its_field() -> None:
    for name, own, field in (
        ("proxy_tuning", {"expert": "a", "antiexpert": "a"}, "antiexpert"),
        ("dexperts", {"expert": "a", "antiexpert": "a"}, "antiexpert"),
        ("dexperts", {"expert": None, "antiexpert": None}, "expert"),
        ("adapter_free_ensemble", {"weights": {"a": 0.0}}, "weights"),
        ("adapter_ensemble", {"weights": {"a": 0.0}}, "weights"),
        ("proxy_tuning", {"expert_chat": True, "expert_prompt": "a"}, "expert_chat"),
        ("cad", {"context": None}, "context"),
        ("cad", {"prompt_without": "a"}, "context"),
        ("sh2", {"template": "no keys"}, "template"),
        ("prompt_ensemble", {"weights": [1.0]}, "weights"),
        ("prompt_ensemble", {"weights": [0.0] * 3}, "weights"),
        ("streams", {"streams": [{"weight": 1.0}]}, "streams[0]"),
        ("streams", {"streams": [{"model": "a", "weight": -1.0}], "space": "probability"}, "streams[0].weight"),
        ("streams", {"streams": [{"model": "a", "weight": 1.0, "steering": [{}]}]}, "streams[0].steering"),
        ("streams", {"base_weight": -1.0, "space": "probability"}, "base_weight"),
        (
            "streams",
            {"streams": [{"model": "a", "weight": 0.0}], "base_weight": 0.0, "space": "probability"},
            "base_weight",
        ),
        ("streams", {"streams": [{"model": "a", "weight": 1.0}], "space": "probability", "top_p": 0.5}, "top_p"),
    ):
        method: Method[Any] = METHODS[name]
        assert isinstance(method, StreamMixer)
        with pytest.raises(DecodingError) as caught:
            method.mix(made(name, **own))
        assert caught.value.param == field


def test_only_what_reads_text_makes_settings_of_its_own() -> None:
    own = {
        name for name, method in METHODS.items() if isinstance(method, LogitsRewriter) and hasattr(method, "setting")
    }
    assert own == {"dry", "forced", "opera_lite", RuleAdapter.name}
