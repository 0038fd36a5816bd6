"""Requests of several sequences, without an engine: what they compile to, and what is wrong by its field."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from anyjson import EXTRAS
from catalogues import at_prompt
from hypothesis import given, settings
from serving import SHAPE, VOCABULARY, make_tokenizer
from soak import tries
from transformers import PreTrainedTokenizerFast

from whipstaff.decoding.methods.adapter_ensemble import nearness
from whipstaff.decoding.mix import Window
from whipstaff.server.admission.prepare import compile_extras
from whipstaff.server.admission.receipt import receipt, warnings_of
from whipstaff.server.admission.request import CompiledRequest
from whipstaff.server.api.method_table import method_table
from whipstaff.server.errors import WhipstaffError
from whipstaff.server.plan import PLAN_KEY, CompanionPlan, PlacedRequest, RequestPlan
from whipstaff.server.prompt.message_spans import Chat, Prompt
from whipstaff.server.prompt.prompt_source import PromptSource
from whipstaff.server.prompt.vocabulary import Vocabulary
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.vectors import VectorFile, VectorSnapshot
from whipstaff.steering.edits import Lengths
from whipstaff.steering.method import HookPoint
from whipstaff.steering.served import Limit
from whipstaff.steering.vector_file import Header, packed, parse

TEXT = "It rains. Is it raining?"
CFG = {"method": "cfg"}
ADAPTERS = {name: (name, number, f"/{name}") for number, name in enumerate(("law", "math", "art"), 1)}
MAX_LEN, MAX_SEQS = 40, 4


TOKENIZER = make_tokenizer()
JUDGED = {"method": "kcts", "classifier": "wary", "adapter": "law"}
CENTRES = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 2.0]])
FEATURE = [0.5, 0.4, 0.1]


def file_of(method: str, tensors: dict[str, torch.Tensor], **defaults: Any) -> VectorFile:
    return VectorFile(Path(), parse(packed(Header(method=method, model=SHAPE, defaults=defaults), tensors)))


FILES = {
    "centres": file_of("adapter_centres", {"centres": CENTRES}, adapters=list(ADAPTERS)),
    "elsewhere": file_of("adapter_centres", {"centres": CENTRES}, adapters=["law", "chess", "art"]),
    "defer": file_of("defer_head", {"weight": torch.ones(SHAPE.hidden_size)}),
    "wary": file_of("prefix_classifier", {"weight": torch.ones(2, SHAPE.hidden_size)}),
}
HAVE = Capabilities(
    VectorSnapshot(FILES, SHAPE),
    {"expert": 64, "anti": 20},
    Vocabulary.of(TOKENIZER),
    vocabulary=VOCABULARY,
    max_len=MAX_LEN,
    max_seqs=MAX_SEQS,
    max_search_seqs=3,
    max_adapters=2,
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return TOKENIZER


@pytest.fixture
def caps() -> Capabilities:
    return HAVE


def compiled(caps: Capabilities, **fields: Any) -> CompiledRequest:
    made = compile_extras(fields, caps)
    assert made is not None
    return made


def prompt_of(tokenizer: Any, text: str = TEXT, **own: Any) -> Prompt:
    ids = tokenizer.encode(text)

    def render(messages: Any) -> list[int]:
        found: list[int] = tokenizer.apply_chat_template(list(messages), return_dict=False)
        return found

    source = PromptSource(ids, tokenizer, True, render, written=text)
    return Prompt(
        **{"num_tokens": len(ids), "ids": ids, "room": MAX_LEN, "tokenizer": tokenizer, "source": source} | own
    )


class Made(NamedTuple):
    """A request in one prompt."""

    compiled: CompiledRequest
    placed: PlacedRequest

    @property
    def plan(self) -> RequestPlan:
        return self.placed.plan

    @property
    def receipt(self) -> dict[str, Any]:
        return receipt(self.compiled, [self.placed])

    @property
    def warnings(self) -> list[str]:
        return warnings_of(self.compiled, [self.placed])


def placed(caps: Capabilities, prompt: Prompt, max_tokens: int = 4, **fields: Any) -> Made:
    made = compiled(caps, **fields)
    wanted = made.wanted_scores(prompt)
    numbers = {name: range(len(one.positions) - 1) for name, one in wanted.items()}
    prompt.scores.update({name: [-float(index) for index in each] for name, each in numbers.items()})
    return Made(made, at_prompt(made, prompt, max_tokens))


def test_members_stand_in_the_order_in_which_their_mixes_count_them(
    caps: Capabilities, tokenizer: PreTrainedTokenizerFast
) -> None:
    chat = {"method": "proxy_tuning", "expert": "expert", "antiexpert": "anti", "expert_chat": True}
    made = placed(caps, prompt_of(tokenizer), decoding=[{"method": "cad", "context": "It rains. "}, chat])
    without, as_chat = tokenizer.encode("Is it raining?"), tokenizer.encode(f"<s>user: {TEXT}\nassistant:")
    assert made.plan.companions == (CompanionPlan(tuple(without)), CompanionPlan(tuple(as_chat)))
    assert made.plan.plan_of(1) is None and made.plan.plan_of(2) == RequestPlan(models=("expert",))
    assert RequestPlan.from_wire(json.loads(json.dumps({PLAN_KEY: made.plan.to_wire()}))) == made.plan


def test_the_receipt_tells_every_sequence(caps: Capabilities, tokenizer: PreTrainedTokenizerFast) -> None:
    named = {"prompt": [5, 6, 7], "weight": -1.0, "name": "wet"}
    said = placed(caps, prompt_of(tokenizer), decoding={"method": "streams", "streams": [named]}).receipt
    (one,) = said["sequences"]
    assert one == {"field": "decoding.streams[0].prompt", "prompt_tokens": 3, "name": "wet", "steered": False}
    windowed = placed(caps, prompt_of(tokenizer), decoding=CFG | {"from": 2, "until": 8})
    assert windowed.receipt["decoding"][0]["from"] == 2
    assert windowed.plan.decoding is not None and windowed.plan.decoding.mix is not None
    assert windowed.plan.decoding.mix.window == Window(2, 8) and windowed.plan.companions[0].until == 8


def test_shorthands_are_guidance(caps: Capabilities, tokenizer: PreTrainedTokenizerFast) -> None:
    entry = placed(caps, prompt_of(tokenizer), decoding=[CFG | {"guidance_scale": 3.0, "negative_prompt": "dry"}])
    short = placed(caps, prompt_of(tokenizer), guidance_scale=3.0, negative_prompt="dry")
    assert short.plan == entry.plan and short.plan.companions == (CompanionPlan(tuple(tokenizer.encode("dry"))),)
    last = placed(caps, prompt_of(tokenizer), guidance_scale=3.0)
    assert last.plan.companions == (CompanionPlan(tuple(tokenizer.encode(TEXT)[-1:])),)
    assert placed(caps, prompt_of(tokenizer), guidance_scale=1.0).plan.companions == ()


def test_keys_are_in_the_receipt_and_the_prompt(caps: Capabilities, tokenizer: PreTrainedTokenizerFast) -> None:
    sh2 = {"method": "sh2", "key_num": 20, "context": "It rains."}
    made = placed(caps, prompt_of(tokenizer), decoding=sh2)
    (said,) = made.receipt["sequences"]
    ids = tokenizer.encode("It rains.")
    assert said["key_positions"] == [len(ids) - 1] and said["keys"] == tokenizer.decode(ids[-1:])
    assert said["prompt"] == f"Pondering: {said['keys']}\n\nContext:{TEXT}"
    assert made.plan.companions == (CompanionPlan(tuple(tokenizer.encode(said["prompt"]))),)


def test_what_is_only_looked_at_scores_nothing(caps: Capabilities, tokenizer: PreTrainedTokenizerFast) -> None:
    made = compiled(caps, decoding={"method": "sh2"})
    made = made.dry()
    assert made.wanted_scores(prompt_of(tokenizer)) == {}
    assert "sequences" not in receipt(made, [at_prompt(made, prompt_of(tokenizer))])
    wrong = compiled(caps, decoding={"method": "sh2", "context": "It snows."}).dry()
    with pytest.raises(WhipstaffError) as caught:
        at_prompt(wrong, prompt_of(tokenizer))
    assert caught.value.param == "decoding.context"


ENSEMBLE = {"method": "adapter_ensemble", "weights": {"law": 1.0, "math": 2.0}}
NEAREST = {"method": "adapter_ensemble", "centres": "centres", "feature": FEATURE, "top_m": 2}
STREAM = {"weight": 1.0, "prompt": "a"}
BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "scale": ({"guidance_scale": "much"}, 400, "guidance_scale"),
    "no tokens": ({"negative_prompt": []}, 400, "negative_prompt"),
    "negative token": ({"negative_prompt": [5, -1]}, 400, "negative_prompt[1]"),
    "not a token": ({"negative_prompt": [5, "a"]}, 400, "negative_prompt[1]"),
    "not in the vocabulary": ({"guidance_scale": 2, "negative_prompt": [5, VOCABULARY]}, 400, "negative_prompt"),
    "message": ({"negative_prompt": [{"role": "user"}]}, 400, "negative_prompt[0].content"),
    "too long": ({"guidance_scale": 2, "negative_prompt": [5] * MAX_LEN}, 400, "negative_prompt"),
    "no room for the answer": ({"guidance_scale": 2, "negative_prompt": [5] * (MAX_LEN - 3)}, 400, "negative_prompt"),
    "window": ({"decoding": CFG | {"from": 4, "until": 4}}, 400, "decoding.until"),
    "endless fade": ({"decoding": CFG | {"fade": "linear"}}, 400, "decoding.fade"),
    "two contrasts": ({"guidance_scale": 2, "decoding": CFG}, 400, "guidance_scale"),
    "no sum": ({"decoding": [{"method": "cad", "context": "It"}, CFG]}, 400, "decoding[1].method"),
    "no context": ({"decoding": {"method": "cad"}}, 400, "decoding.context"),
    "context": ({"decoding": {"method": "cad", "context": "It snows."}}, 400, "decoding.context"),
    "nothing left": ({"decoding": {"method": "cad", "context": TEXT}}, 400, "decoding.context"),
    "scored context": ({"decoding": {"method": "sh2", "context": "It snows."}}, 400, "decoding.context"),
    "nothing to score": ({"decoding": {"method": "sh2", "context": "I"}}, 400, "decoding.context"),
    "template": ({"decoding": {"method": "sh2", "template": "{prompt}"}}, 400, "decoding.template"),
    "noise": ({"decoding": {"method": "instructive"}}, 400, "decoding.noisy_prompt"),
    "weights": ({"decoding": {"method": "prompt_ensemble", "prompts": ["a"], "weights": [1]}}, 400, "decoding.weights"),
    "many": ({"decoding": {"method": "prompt_ensemble", "prompts": ["a"] * MAX_SEQS}}, 422, "decoding.prompts[0]"),
    "itself": ({"decoding": {"method": "streams", "streams": [STREAM, {"weight": 1}]}}, 400, "decoding.streams[1]"),
    "stream's tokens": (
        {"decoding": {"method": "streams", "streams": [STREAM | {"prompt": [10**6]}]}},
        400,
        "decoding.streams[0].prompt",
    ),
    "stream's model": (
        {"decoding": {"method": "streams", "streams": [STREAM | {"model": "absent"}]}},
        404,
        "decoding.streams[0].model",
    ),
    "stream's model is short": (
        {"decoding": {"method": "streams", "streams": [{"prompt": [5] * 18, "model": "anti", "weight": 1}]}},
        400,
        "decoding.streams[0].prompt",
    ),
    "stream's adapter": (
        {"decoding": {"method": "streams", "streams": [STREAM | {"adapter": "absent"}]}},
        404,
        "decoding.streams[0].adapter",
    ),
    "stream's steering": (
        {"decoding": {"method": "streams", "streams": [{"weight": 1, "steering": [{"vector": "absent"}]}]}},
        404,
        "decoding.streams[0].steering[0].vector",
    ),
    "adapter": ({"decoding": ENSEMBLE | {"weights": {"absent": 1}}}, 404, "decoding.weights.absent"),
    "adapters": ({"decoding": ENSEMBLE | {"weights": dict.fromkeys(ADAPTERS, 1)}}, 422, "decoding.weights.law"),
    "classifier's adapter": ({"decoding": JUDGED | {"adapter": "absent"}}, 404, "decoding.adapter"),
    "no weights": ({"decoding": {"method": "adapter_ensemble"}}, 400, "decoding.weights"),
    "weights and centres": ({"decoding": NEAREST | ENSEMBLE}, 400, "decoding.centres"),
    "unknown centres": ({"decoding": NEAREST | {"centres": "absent"}}, 404, "decoding.centres"),
    "no centres": ({"decoding": NEAREST | {"centres": "defer"}}, 400, "decoding.centres"),
    "no feature": ({"decoding": NEAREST | {"feature": None}}, 400, "decoding.feature"),
    "short feature": ({"decoding": NEAREST | {"feature": [1.0]}}, 400, "decoding.feature"),
    "feature's number": ({"decoding": NEAREST | {"feature": [1.0, float("nan"), 0]}}, 400, "decoding.feature[1]"),
    "empty feature": ({"decoding": NEAREST | {"feature": [0, 0, 0]}}, 400, "decoding.feature"),
    "feature alone": ({"decoding": ENSEMBLE | {"feature": FEATURE}}, 400, "decoding.feature"),
    "more than there are": ({"decoding": NEAREST | {"top_m": 4}}, 400, "decoding.top_m"),
    "centres of adapters": ({"decoding": NEAREST | {"top_m": None}}, 422, "decoding.centres"),
    "centre's adapter": ({"decoding": NEAREST | {"centres": "elsewhere"}}, 404, "decoding.centres"),
    "answer": ({"decoding": {"method": "forced"}}, 400, "decoding.text"),
    "answer's tokens": ({"decoding": {"method": "forced", "ids": [VOCABULARY]}}, 400, "decoding.ids"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(caps: Capabilities, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    fields, status, param = BAD[name]
    with pytest.raises(WhipstaffError) as caught:
        placed(caps, prompt_of(tokenizer, adapters=ADAPTERS), **fields)
    assert (caught.value.status, caught.value.param) == (status, param), caught.value.message


def test_a_flag_is_named_where_one_would_help(caps: Capabilities, tokenizer: PreTrainedTokenizerFast) -> None:
    many = {"method": "prompt_ensemble", "prompts": ["a"] * MAX_SEQS}
    law = ADAPTERS["law"]
    for server, fields, flag, own in (
        (caps, many, "--max-num-seqs", None),
        (caps, ENSEMBLE, "--max-loras", ADAPTERS["art"]),
        (replace(caps, max_adapters=0), ENSEMBLE, "--enable-lora", None),
        (replace(caps, max_adapters=0), JUDGED, "--enable-lora", None),
        (replace(caps, max_adapters=1), JUDGED, "--max-loras", ADAPTERS["art"]),
        (replace(caps, max_search_seqs=1), JUDGED, "--max-search-seqs", None),
    ):
        with pytest.raises(WhipstaffError, match=flag) as caught:
            placed(server, prompt_of(tokenizer, adapters=ADAPTERS, adapter=own), decoding=fields)
        assert caught.value.status == 422
    made = placed(caps, prompt_of(tokenizer, adapters=ADAPTERS, adapter=law), decoding=ENSEMBLE)
    assert [companion.adapter for companion in made.plan.companions] == [law, ADAPTERS["math"]]


def test_a_classifier_reads_by_an_adapter_of_its_own(caps: Capabilities, tokenizer: PreTrainedTokenizerFast) -> None:
    """In a sequence after those that mixes count."""
    prompt = prompt_of(tokenizer, adapters=ADAPTERS)
    made = placed(caps, prompt, decoding=[JUDGED, CFG])
    own, others = tuple(tokenizer.encode(TEXT)), made.plan.companions
    assert others[1:] == (CompanionPlan(own, adapter=ADAPTERS["law"]),) and others[0].prompt != own
    assert made.plan.decoding is not None and made.plan.decoding.search is not None
    assert made.plan.decoding.search.hidden_of == 2
    assert RequestPlan.from_wire(json.loads(json.dumps({PLAN_KEY: made.plan.to_wire()}))) == made.plan
    told = made.receipt["sequences"][1]
    assert told == {"field": "decoding[0].adapter", "prompt_tokens": len(own), "name": "law", "steered": False}
    alone = placed(caps, prompt, decoding=JUDGED | {"adapter": None}).plan
    assert alone.decoding is not None and alone.decoding.search is not None
    assert (alone.companions, alone.decoding.search.hidden_of) == ((), 0)


def test_weights_come_from_the_nearest_centres(caps: Capabilities, tokenizer: PreTrainedTokenizerFast) -> None:
    made = placed(caps, prompt_of(tokenizer, adapters=ADAPTERS), decoding=NEAREST)
    assert [companion.adapter for companion in made.plan.companions] == [ADAPTERS["law"], ADAPTERS["math"]]
    shares = nearness(torch.tensor(FEATURE).double(), CENTRES.double(), 2).tolist()
    said = made.receipt
    assert said["decoding"][0] == {
        **{"method": "adapter_ensemble", "centres": "centres", "top_m": 2, "base_weight": 0.5},
        **{"weights": pytest.approx(dict(zip(("law", "math"), shares, strict=False))), "from": 0, "fade": "constant"},
    }
    assert [(one["field"], one["name"]) for one in said["sequences"]] == [
        ("decoding.centres", "law"),
        ("decoding.centres", "math"),
    ]
    assert made.plan.decoding is not None and made.plan.decoding.mix is not None
    weights = [term.weight for term in made.plan.decoding.mix.terms]
    assert weights == pytest.approx([0.5, shares[0] / 2, shares[1] / 2])
    assert made.compiled.vectors == [FILES["centres"].vector]


def test_an_adapter_that_is_not_there_names_its_flag(caps: Capabilities, tokenizer: PreTrainedTokenizerFast) -> None:
    fields = NEAREST | {"centres": "elsewhere"}
    with pytest.raises(WhipstaffError, match=r"law, math, art; start it with --lora-modules chess=PATH"):
        placed(caps, prompt_of(tokenizer, adapters=ADAPTERS), decoding=fields)


def test_longer_texts_than_the_model_takes_are_not_scored(
    caps: Capabilities, tokenizer: PreTrainedTokenizerFast
) -> None:
    made, prompt = compiled(caps, decoding={"method": "sh2"}), prompt_of(tokenizer, "a b c d " * MAX_LEN)
    with pytest.raises(WhipstaffError, match="at most 39") as caught:
        made.wanted_scores(prompt)
    assert caught.value.param == "decoding.method"


def test_a_prompt_of_more_than_text_has_no_others(caps: Capabilities) -> None:
    with pytest.raises(WhipstaffError) as caught:
        at_prompt(compiled(caps, decoding=CFG), Prompt(9, None, MAX_LEN, None))
    assert caught.value.param == "decoding.method"


def test_room_is_counted_until_a_sequence_is_not_needed(caps: Capabilities, tokenizer: PreTrainedTokenizerFast) -> None:
    long = [5] * (MAX_LEN - 6)
    assert placed(caps, prompt_of(tokenizer), 20, decoding=CFG | {"negative_prompt": long, "until": 4})
    with pytest.raises(WhipstaffError, match="room for 6"):  # two steps are under way when a sequence is let go
        placed(caps, prompt_of(tokenizer), 20, decoding=CFG | {"negative_prompt": long, "until": 5})
    made = compiled(caps, guidance_scale=2.0, negative_prompt=long)
    free = at_prompt(made, prompt_of(tokenizer), 30, is_explicit=False)
    assert free.max_tokens == 30 and not free.warnings  # the scheduler ends it, and says why


def test_room_beside_an_auxiliary_model_is_told(caps: Capabilities, tokenizer: PreTrainedTokenizerFast) -> None:
    pair = {"method": "proxy_tuning", "expert": "expert", "antiexpert": "anti"}  # which follows 20 tokens
    made = compiled(caps, decoding=pair)
    prompt = Prompt(9, list(range(9)), MAX_LEN, tokenizer)
    one = at_prompt(made, prompt, 30, is_explicit=False)
    assert one.max_tokens == 11
    assert one.warnings == ("the answer may have 11 tokens: auxiliary model 'anti' follows at most 20",)
    free = {"method": "streams", "streams": [{"weight": 1, "model": "anti", "prompt": [5] * 13}]}
    made = replace(compiled(caps, decoding=free), limits={})  # of the request's own sequence
    one = at_prompt(made, prompt_of(tokenizer), 30, is_explicit=False)
    assert one.max_tokens == 7
    assert one.warnings == (
        "the answer may have 7 tokens: the sequence of decoding.streams[0].prompt is followed for 20",
    )


STEERED = Capabilities(
    VectorSnapshot(
        {
            "push": file_of("caa", {"resid_post.1.add": torch.ones(SHAPE.hidden_size)}),
            "probe": file_of("probe", {"resid_post.0.direction": torch.ones(SHAPE.hidden_size)}),
            "soft": file_of("soft_prompt", {"rows": torch.ones(3, SHAPE.hidden_size)}),
        },
        SHAPE,
    ),
    {"expert": 64, "anti": 20},
    Vocabulary.of(TOKENIZER),
    vocabulary=VOCABULARY,
    max_len=MAX_LEN,
    max_seqs=MAX_SEQS,
    num_layers=SHAPE.num_layers,
    hook_points=frozenset(HookPoint("resid_post", layer) for layer in range(SHAPE.num_layers)),
)
PUSH = {"vector": "push", "scale": 2}
GUIDED: dict[str, Any] = {"guidance_scale": 2.0, "negative_prompt": "dry"}
COUPLED: dict[str, dict[str, Any]] = {
    "cfg": CFG | GUIDED,
    "cad": {"method": "cad", "context": "It rains. "},
    "sh2": {"method": "sh2"},
    "instructive": {"method": "instructive", "noisy_prompt": "dry"},
    "prompt_ensemble": {"method": "prompt_ensemble", "prompts": ["dry", "wet"]},
    "streams": {"method": "streams", "streams": [{"weight": -1, "prompt": "dry"}]},
}


@pytest.mark.parametrize("name", COUPLED)
def test_steering_is_that_of_all_sequences_unless_one_says_otherwise(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    entry = COUPLED[name]
    plan = compiled(STEERED, steering=PUSH).steering.plan
    shared = placed(STEERED, prompt_of(tokenizer), steering=PUSH, decoding=entry)
    assert [companion.steering for companion in shared.plan.companions] == [plan] * len(shared.plan.companions)
    assert all(one["steered"] for one in shared.receipt["sequences"])
    off = placed(STEERED, prompt_of(tokenizer), steering=PUSH, decoding=entry | {"steering": []})
    assert off.plan.steering == plan and not any(companion.steering for companion in off.plan.companions)
    own = placed(STEERED, prompt_of(tokenizer), steering=PUSH, decoding=entry | {"steering": PUSH | {"scale": 3}})
    other = compiled(STEERED, steering=PUSH | {"scale": 3}).steering.plan
    assert all(companion.steering == other for companion in own.plan.companions) and own.plan.steering == plan
    assert not any(
        companion.steering for companion in placed(STEERED, prompt_of(tokenizer), decoding=entry).plan.companions
    )


def test_what_is_scored_for_sh2_is_steered_as_its_further_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    for steering, expected in (({}, compiled(STEERED, steering=PUSH).steering.plan), ({"steering": []}, None)):
        made = compiled(STEERED, steering=PUSH, decoding={"method": "sh2"} | steering)
        assert made.wanted_scores(prompt_of(tokenizer))["sh2"].steering == expected
    made = compiled(STEERED, steering={"vector": "soft", "insert": 1}, decoding={"method": "sh2"})
    wanted = made.wanted_scores(prompt_of(tokenizer))["sh2"]
    ids = tokenizer.encode(TEXT)
    assert [wanted.ids[position] for position in wanted.positions] == ids and len(wanted.ids) == len(ids) + 3


def test_rows_are_inserted_into_every_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    made = placed(STEERED, prompt_of(tokenizer), steering={"vector": "soft"}, **GUIDED)
    (companion,) = made.plan.companions
    assert companion.steering is not None and made.plan.steering is not None
    assert companion.steering.inserts == made.plan.steering.inserts and companion.steering.inserts[0].num == 3
    assert list(companion.prompt[3:]) == tokenizer.encode("dry")
    with pytest.raises(WhipstaffError, match="negative_prompt") as caught:  # it has no token 5
        placed(STEERED, prompt_of(tokenizer), steering={"vector": "soft", "insert": 5}, **GUIDED)
    assert caught.value.param == "steering.insert"


def test_auxiliary_models_are_not_steered(tokenizer: PreTrainedTokenizerFast) -> None:
    pair = {"method": "proxy_tuning", "expert": "expert", "antiexpert": "anti", "expert_prompt": "wet"}
    made = placed(STEERED, prompt_of(tokenizer), steering=PUSH, decoding=pair)
    assert made.plan.companions[0].steering is None and not made.receipt["sequences"][0]["steered"]
    free = {"method": "streams", "streams": [{"weight": 1, "model": "expert", "steering": [PUSH]}]}
    with pytest.raises(WhipstaffError, match="not steered") as caught:
        compiled(STEERED, decoding=free)
    assert caught.value.param == "decoding.streams[0].steering"


def test_clauses_are_placed_in_each_sequences_own_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    late = {**PUSH, "where": {"prompt": [[6, 8]]}}
    made = placed(STEERED, prompt_of(tokenizer), steering=late, **GUIDED)
    (companion,) = made.plan.companions
    assert companion.steering is not None and not companion.steering.segments(len(companion.prompt))
    assert made.warnings == ["steering selects no token of the sequence of negative_prompt"]
    own = CFG | GUIDED | {"steering": late}
    with pytest.raises(WhipstaffError, match="selects no token") as caught:
        placed(STEERED, prompt_of(tokenizer), decoding=own)
    assert caught.value.param == "decoding.steering.where"


def test_what_an_operator_weakens_in_a_sequence_is_told(tokenizer: PreTrainedTokenizerFast) -> None:
    few = replace(STEERED, limit=Limit(1e-3, "clamp"), lengths=Lengths(dict.fromkeys(STEERED.hook_points, 10.0)))
    made = placed(few, prompt_of(tokenizer), decoding=CFG | GUIDED | {"steering": PUSH})
    assert made.warnings[0].startswith("decoding.steering: weakened to scale")


def test_a_sequence_tells_one_set_of_tokens_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    two = [{**PUSH, "where": {"tokens": [token]}} for token in (5, 6)]
    with pytest.raises(WhipstaffError, match="one set") as caught:
        placed(STEERED, prompt_of(tokenizer), decoding=CFG | GUIDED | {"steering": two})
    assert caught.value.param == "decoding.steering[1].where.tokens"
    placed(STEERED, prompt_of(tokenizer), steering=two[0], decoding=CFG | GUIDED | {"steering": two[1]})


def test_conditions_of_all_sequences_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    when = {**PUSH, "layers": None, "when": {"probe": "probe", "above": 0}}
    few = replace(STEERED, num_histories=1)
    assert placed(few, prompt_of(tokenizer), steering=when).plan.steering is not None
    with pytest.raises(WhipstaffError, match="2 sequences read 2 things") as caught:
        placed(few, prompt_of(tokenizer), steering=when, **GUIDED)
    assert caught.value.param == "steering"
    assert placed(STEERED, prompt_of(tokenizer), steering=when, **GUIDED).plan.companions[0].steering is not None


def test_messages_are_found_in_prompts_of_other_messages(tokenizer: PreTrainedTokenizerFast) -> None:
    def text_of(messages: Any, is_prompt: bool) -> str:
        said = tokenizer.apply_chat_template(list(messages), tokenize=False)
        return str(said if is_prompt else said.removesuffix("assistant:"))

    def ids_of(messages: Any) -> list[int]:
        return list(tokenizer.encode(text_of(messages, True)))

    def locate(messages: Any, ids: Any) -> Chat:
        return Chat(tokenizer, messages, ids, text_of)

    messages = [{"role": "user", "content": TEXT}]
    ids = ids_of(messages)
    source = PromptSource(ids, tokenizer, False, ids_of, messages, locate=locate)
    prompt = Prompt(len(ids), ids, MAX_LEN, tokenizer, locate(messages, ids), source)
    user = {**PUSH, "where": {"messages": [{"role": "user"}]}}
    made = placed(STEERED, prompt, steering=user, **GUIDED)
    (companion,) = made.plan.companions
    assert companion.steering is not None
    ((start, end),) = [(one.start, one.end) for one in companion.steering.segments(len(companion.prompt))]
    assert tokenizer.decode(companion.prompt[start:end]).strip() == "dry"


@pytest.mark.parametrize("scores", [True, False])
def test_prompts_are_scored_by_the_base_only(caps: Capabilities, scores: bool) -> None:
    for fields in ({"guidance_scale": 2.0}, {"guidance_scale": 2.0, "logprobs_source": "base"}):
        made = compiled(caps, **fields)
        if scores and "logprobs_source" not in fields:
            with pytest.raises(WhipstaffError, match="forced") as caught:
                made.check_logprobs(scores)
            assert caught.value.param == "guidance_scale"
        else:
            made.check_logprobs(scores)


def test_what_is_forced_follows_no_grammar(caps: Capabilities) -> None:
    made = compiled(caps, decoding=[{"method": "forced", "ids": [5]}])
    made.check_grammar(False)
    with pytest.raises(WhipstaffError) as caught:
        made.check_grammar(True)
    assert caught.value.param == "decoding[0].method"


def test_adapters_need_a_flag_in_the_method_table(caps: Capabilities) -> None:
    bare = replace(caps, registry=VectorSnapshot({}, SHAPE))
    for server, reason in ((bare, None), (replace(caps, max_adapters=0), "start the server with --enable-lora")):
        (row,) = (row for row in method_table(server, "base") if row["name"] == "adapter_ensemble")
        assert row["schema"]["properties"]["centres"]["enum"] == ([] if server is bare else ["centres", "elsewhere"])
        assert (row["reason"] is None) is (reason is None) and (reason or "") in (row["reason"] or "")


@settings(max_examples=tries(300), deadline=None)
@given(fields=EXTRAS)
def test_any_json_is_placed_or_refused_with_an_answer_that_can_be_sent(fields: dict[str, Any]) -> None:
    made: Made | None = None
    try:
        if compile_extras(fields, HAVE) is not None:
            made = placed(HAVE, prompt_of(TOKENIZER, adapters=ADAPTERS), **fields)
    except WhipstaffError as error:
        assert 400 <= error.status < 500 and error.param is not None
        json.dumps(error.body(), ensure_ascii=False, allow_nan=False).encode()
        return
    if made is not None:
        json.dumps(made.receipt, ensure_ascii=False, allow_nan=False).encode()
        assert RequestPlan.from_wire(json.loads(json.dumps({PLAN_KEY: made.plan.to_wire()}))) == made.plan
