"""What strangers sent to the demo: every field means what it says, alone and beside methods, on both protocols."""

import json
from typing import Any

import httpx
import pytest
from asking import Post, ok, post_json
from serving import Server

pytestmark = pytest.mark.engine

PROMPT = "In the morning Mara opened the door, and"
WATCHED = {260: " a", 263: " the", 1027: " larks", 706: " dead"}
STEERED = {260: -0.886, 263: -2.552, 1027: -2.359, 706: -2.843}  # by transformers with the vector at 4
CHEERFUL = {"vector": "cheerful", "scale": 4}
QUESTION = {"role": "user", "content": "Where does Mara live?"}
PREFILL = [QUESTION, {"role": "assistant", "content": "Gladly! Mara lives in"}]
GOES_ON = {"continue_final_message": True, "add_generation_prompt": False, "echo": True}
TUNED = {"expert": "tuned", "antiexpert": "untuned"}
LONG = "Mara walked to the fields. " * 160  # some 970 tokens of the demo's 1024
MASKS: dict[str, dict[str, Any]] = {
    "sh2": {"method": "sh2", "relative_top": 0.5},
    "contrastive": {"method": "contrastive", "amateur": "untuned"},
    "contrastive_beta": {"method": "contrastive_beta", "amateur": "untuned"},
    "dola": {"method": "dola"},
    "dexperts": {"method": "dexperts", **TUNED},
    "cad": {"method": "cad", "prompt_without": "Mara opened the door, and", "top_p": 0.5, "top_p_without": 0.5},
    "streams, alpha": {"method": "streams", "alpha": 0.9, "streams": [{"weight": 0.1, "model": "tuned"}]},
    "streams, top_p": {"method": "streams", "top_p": 0.1, "streams": [{"weight": 0.1, "model": "tuned"}]},
}


@pytest.fixture(scope="module")
def server(demo_server: Server) -> Server:
    return demo_server


@pytest.fixture(scope="module")
def complete(http: httpx.Client) -> Post:
    def post(prompt: Any = PROMPT, **fields: Any) -> httpx.Response:
        usual = {"model": "demo", "temperature": 0, "max_tokens": 3, "return_token_ids": True}
        return post_json(http, "/v1/completions", usual | {"prompt": prompt} | fields)

    return post


@pytest.fixture(scope="module")
def chat(http: httpx.Client) -> Post:
    def post(messages: Any = (QUESTION,), **fields: Any) -> httpx.Response:
        usual = {"model": "demo", "temperature": 0, "max_tokens": 6}
        return post_json(http, "/v1/chat/completions", usual | {"messages": list(messages)} | fields)

    return post


def ids(answer: httpx.Response) -> list[int]:
    found: list[int] = ok(answer)["choices"][0]["token_ids"]
    return found


def assert_blames(answer: httpx.Response, param: str | None, *said: str) -> None:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    for text in said:
        assert text in error["message"], error


def watched(complete: Post, **fields: Any) -> dict[int, float]:
    answer = ok(complete(max_tokens=1, logprobs=0, logprob_token_ids=list(WATCHED), **fields))
    (top,) = answer["choices"][0]["logprobs"]["top_logprobs"]
    return {token: top[text] for token, text in WATCHED.items()}


# ---- constraints beside masks


@pytest.mark.parametrize("name", MASKS)
def test_a_bias_bans_and_forces_whatever_a_mask_leaves(complete: Post, name: str) -> None:
    decoding = MASKS[name]
    alone = ids(complete(decoding=decoding, max_tokens=1))
    assert ids(complete(decoding=decoding, logit_bias={str(alone[0]): -100}, max_tokens=1)) != alone
    assert ids(complete(decoding=decoding, logit_bias={"940": 100})) == [940] * 3  # as it is plain
    assert ids(complete(decoding=decoding, logit_bias={"940": 100, "260": -100}, temperature=1, seed=3)) == [940] * 3


def test_a_bias_that_lifts_nothing_leaves_the_mask_alone(complete: Post) -> None:
    decoding = {"method": "contrastive", "amateur": "untuned", "alpha": 1}
    alone = complete(decoding=decoding, max_tokens=6, logprobs=5)
    beside = complete(decoding=decoding, max_tokens=6, logprobs=5, logit_bias={"5": -1})
    assert ok(alone)["choices"][0]["logprobs"] == ok(beside)["choices"][0]["logprobs"]


NOTHING_LEFT: dict[str, tuple[dict[str, Any], str]] = {
    "words": ({"allowed_token_ids": [16], "bad_words": ["."]}, "bad_words"),
    "a least length": ({"allowed_token_ids": [2], "stop_token_ids": [2], "min_tokens": 2}, "min_tokens"),
}


@pytest.mark.parametrize("extra", [{}, {"decoding": {"method": "proxy_tuning", **TUNED}}, {"steering": CHEERFUL}])
@pytest.mark.parametrize("name", NOTHING_LEFT)
def test_bans_that_leave_nothing_are_refused(complete: Post, chat: Post, name: str, extra: dict[str, Any]) -> None:
    fields, param = NOTHING_LEFT[name]
    for answer in (complete(**fields, **extra), chat(**fields, **extra)):
        assert_blames(answer, param)
    banned = fields["allowed_token_ids"][0]
    (first,) = ids(complete(**{**fields, "allowed_token_ids": [16, 300, 2], "min_tokens": 0}, max_tokens=1, **extra))
    assert first in {16, 300, 2} - ({banned} if param == "bad_words" else set())


@pytest.mark.parametrize("extra", [{}, {"decoding": {"method": "proxy_tuning", **TUNED}}, {"guidance_scale": 2}])
def test_an_answer_ends_where_nothing_is_left(complete: Post, extra: dict[str, Any]) -> None:
    """A full stop may be said, but not two of them."""
    fields = {"allowed_token_ids": [16], "bad_words": [".."], "logprobs": 1, **extra}
    answer = ok(complete(**fields))
    (choice,) = answer["choices"]
    assert (choice["token_ids"], choice["text"], choice["logprobs"]["tokens"]) == ([16], ".", ["."])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "no_token_left")
    assert answer["usage"]["completion_tokens"] == 1
    assert '"stop_reason":"no_token_left"' in complete(**fields, stream=True).text


# ---- steering of further sequences


def assert_close(found: dict[int, float], expected: dict[int, float], tolerance: float = 2e-3) -> None:
    assert found == pytest.approx(expected, abs=tolerance)


def test_guidance_away_from_the_prompt_itself_changes_nothing_of_a_steered_request(complete: Post) -> None:
    guided = {"guidance_scale": 3, "negative_prompt": PROMPT}
    assert_close(watched(complete, steering=CHEERFUL), STEERED)
    assert_close(watched(complete, steering=CHEERFUL, **guided), STEERED)
    ensemble = {"method": "prompt_ensemble", "prompts": [PROMPT, PROMPT]}
    assert_close(watched(complete, steering=CHEERFUL, decoding=ensemble), STEERED)
    assert_close(watched(complete, steering=CHEERFUL, decoding={"method": "cad", "prompt_without": PROMPT}), STEERED)


def test_steering_can_be_switched_off_in_further_sequences(complete: Post) -> None:
    cfg = {"method": "cfg", "guidance_scale": 3, "negative_prompt": PROMPT}
    off = watched(complete, steering=CHEERFUL, decoding=cfg | {"steering": []})
    streams = [{"weight": -2, "prompt": PROMPT, "steering": []}]
    free = {"method": "streams", "base_weight": 3, "space": "log", "streams": streams}
    assert_close(off, watched(complete, steering=CHEERFUL, decoding=free))
    assert abs(off[263] - STEERED[263]) > 0.1
    assert_close(watched(complete, decoding=cfg | {"steering": CHEERFUL}), watched(complete, decoding=free | {
        "streams": [{"weight": -2, "steering": CHEERFUL}]
    }))  # fmt: skip


def test_the_receipt_says_which_sequences_were_steered(complete: Post) -> None:
    said = ok(complete(steering=CHEERFUL, guidance_scale=2, negative_prompt="Mara slept, and"))["whipstaff"]
    assert [one["steered"] for one in said["sequences"]] == [True]
    streams = [
        {"weight": -0.5, "steering": []},
        {"weight": 0.1, "model": "tuned", "prompt": PROMPT},
        {"weight": 0.1, "prompt": PROMPT},
    ]
    said = ok(complete(steering=CHEERFUL, decoding={"method": "streams", "streams": streams}))["whipstaff"]
    assert [one["steered"] for one in said["sequences"]] == [False, False, True]


def test_sh2_reads_what_the_steered_model_finds_hard(complete: Post) -> None:
    """Strongly enough steered, other tokens are hard; a copy that is left alone shows the model's own."""
    sh2 = {"method": "sh2", "key_num": 40}
    strong = {"vector": "cheerful", "scale": -40, "where": "all"}

    def keys(**fields: Any) -> list[int]:
        found: list[int] = ok(complete(**fields))["whipstaff"]["sequences"][0]["key_positions"]
        return found

    plain = keys(decoding=sh2)
    assert keys(decoding=sh2, steering=strong) != plain
    assert keys(decoding=sh2 | {"steering": []}, steering=strong) == plain


def test_clauses_find_the_messages_of_each_sequence(chat: Post) -> None:
    user = {**CHEERFUL, "where": {"messages": [{"role": "user"}]}}
    negative = [{"role": "user", "content": "Who is the best friend of Linnet?"}]
    said = ok(chat(steering=user, guidance_scale=1.5, negative_prompt=negative))["whipstaff"]
    assert said["sequences"][0]["steered"] and not said["warnings"]
    said = ok(chat(steering=user, guidance_scale=1.5))["whipstaff"]  # its last token alone, which is no message
    assert any("steering selects no token" in warning for warning in said["warnings"]), said


# ---- both protocols


def test_echo_of_a_chat_scores_nothing_that_was_not_asked_for(chat: Post) -> None:
    plain = ok(chat(PREFILL, **GOES_ON))
    assert plain["choices"][0]["message"]["content"].startswith(PREFILL[1]["content"])
    for asked in ({}, {"logprobs": None}, {"logprobs": False}):
        answer = ok(chat(PREFILL, **GOES_ON, guidance_scale=1.5, **asked))
        assert answer["choices"][0]["message"]["content"].startswith(PREFILL[1]["content"])
        assert answer["prompt_logprobs"] is None and not answer["whipstaff"]["warnings"]
    said = ok(chat(PREFILL, **GOES_ON, guidance_scale=1.5, logprobs=True))
    assert said["choices"][0]["logprobs"]["content"] and said["prompt_logprobs"] is None
    assert "prompt_logprobs" in said["whipstaff"]["warnings"][0]
    assert ok(chat(PREFILL, **GOES_ON, steering=CHEERFUL))["prompt_logprobs"]  # the steered model's, as vLLM gives them
    assert_blames(chat(PREFILL, **GOES_ON, guidance_scale=1.5, prompt_logprobs=0), "guidance_scale", "forced")


def test_echo_of_a_completion_scores_what_was_asked_for(complete: Post) -> None:
    answer = ok(complete(echo=True, guidance_scale=1.5, return_token_ids=False))
    assert answer["choices"][0]["text"].startswith(("<bos>" + PROMPT, PROMPT))
    assert_blames(complete(echo=True, logprobs=0, guidance_scale=1.5), "guidance_scale", "forced")
    assert_blames(complete(prompt_logprobs=0, guidance_scale=1.5), "guidance_scale", "forced")


# ---- max_tokens 0


def test_scoring_alone_edits_the_last_prompt_token_too(complete: Post) -> None:
    scored = {"max_tokens": 0, "echo": True, "logprobs": 1}
    answer = ok(complete([[1, 1147, 263, 816], [1]], **scored, steering={"vector": "cheerful", "where": "all"}))
    assert answer["whipstaff"]["steering"][0]["edited_tokens"] == 5
    last = ok(complete(**scored, steering={"vector": "cheerful", "where": "last_prompt"}))
    assert last["whipstaff"]["steering"][0]["edited_tokens"] == 1
    for other in ("each_last", {"prompt": [[-1, None]]}, {"tokens": [" and"]}):
        assert complete(**scored, steering={"vector": "cheerful", "where": other}).status_code == 200
    assert_blames(complete(**scored, steering={"vector": "cheerful", "where": "generation"}), "steering.where")


# ---- who is to blame

BLAMED: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "max_tokens": ({"max_tokens": -1, "steering": {"vector": "cheerful"}}, "max_tokens", "max_tokens"),
    "empty": ({"prompt": [[]], "guidance_scale": 1.5}, None, "cannot be empty"),
    "vocabulary": ({"prompt": [1, 2, 99999], "decoding": {"method": "sh2"}}, "prompt", "out of vocabulary"),
    "truncated": (
        {"truncate_prompt_tokens": 0, "steering": {"vector": "cheerful", "where": {"prompt": [[0, 2]]}}},
        None,
        "cannot be empty",
    ),
    "bias": ({"logit_bias": {"99999": 1}, "steering": {"vector": "cheerful", "where": {"prompt": [[90, 91]]}}},
             "logit_bias", "out-of-vocab"),
    "temperature": ({"temperature": -1, "decoding": {"method": "edt"}}, "temperature", "non-negative"),
    "window in a batch": (
        {"prompt": ["Mara", PROMPT], "steering": {"vector": "cheerful", "where": {"prompt": [[6, 7]]}}},
        "steering.where",
        "prompt[0]",
    ),
    "where": ({"steering": {"vector": "cheerful", "where": "somewhere"}}, "steering.where", "messages, tokens"),
    "steering": ({"steering": "cheerful"}, "steering", '{"vector": "cheerful"}'),
    "steering in a list": ({"steering": ["cheerful"]}, "steering[0]", '{"vector": "cheerful"}'),
    "decoding": ({"decoding": "dola"}, "decoding", '{"method": "dola"}'),
    "twice": ({"steering": {"vector": "cheerful", "scale": 1, "coefficient": 2}}, "steering.coefficient", "twice"),
    "names": ({"steering": {"vector": "cheerful", "coefficient": 1, "strength": 2}}, "steering.coefficient", "twice"),
    "tokens": ({"steering": {"vector": "cheerful", "where": {"tokens": [9999]}}}, "steering.where.tokens[0]", "9999"),
    "excluded": (
        {"steering": {"vector": "cheerful", "where": {"prompt": "all", "exclude": {"tokens": [5, 1408]}}}},
        "steering.where.exclude.tokens[1]",
        "1408",
    ),
    "forced": ({"decoding": {"method": "forced", "ids": [1408]}}, "decoding.ids", "1408"),
    "negative": ({"guidance_scale": 2, "negative_prompt": [1408]}, "negative_prompt", "1408"),
}  # fmt: skip


@pytest.mark.parametrize("name", BLAMED)
def test_errors_name_the_field_that_is_wrong(complete: Post, http: httpx.Client, name: str) -> None:
    fields, param, said = BLAMED[name]
    assert_blames(complete(**fields), param, said)
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 3, **fields}
    assert_blames(http.post("/v1/steering/validate", json=body), param, said)
    assert_blames(complete(**fields, stream=True), param, said)


def test_an_answer_that_a_further_prompt_shortens_says_so(chat: Post) -> None:
    fields = {"max_tokens": None, "ignore_eos": True, "guidance_scale": 2, "negative_prompt": LONG}
    choice = ok(chat(**fields))["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "member_context")


# ---- what vLLM gets wrong

HALVES: dict[str, tuple[dict[str, Any], str]] = {
    "stop": ({"stop": ["\ud83d"]}, "stop[0]"),
    "bad_words": ({"bad_words": ["a", "\ude00b"]}, "bad_words[1]"),
    "prompt": ({"prompt": "a\ud83d"}, "prompt"),
    "deep": ({"steering": {"vector": "cheerful", "where": {"tokens": ["\udfff"]}}}, "steering.where.tokens[0]"),
    "name": ({"steering": {"vector": "cheerful", "\ud83d": 1}}, "steering"),
    "string": ({"vllm_xargs": {"steering": '{"vector": "\\ud83d"}'}}, "vllm_xargs.steering.vector"),
}


@pytest.mark.parametrize("name", HALVES)
def test_half_a_character_is_refused_by_its_field(complete: Post, http: httpx.Client, name: str) -> None:
    fields, param = HALVES[name]
    assert_blames(complete(**fields), param)
    assert_blames(post_json(http, "/v1/steering/validate", {"model": "demo", "prompt": "a", **fields}), param)
    assert complete(stop=["\ud83d\ude00", "퟿"]).status_code == 200  # a whole one, and a syllable


def test_half_a_character_is_refused_elsewhere(http: httpx.Client) -> None:
    assert_blames(post_json(http, "/tokenize", {"model": "demo", "prompt": "\ud83d"}), "prompt")


def test_text_offsets_count_text(complete: Post) -> None:
    scored = {"logprobs": 0, "echo": True, "max_tokens": 4}
    expected = ok(complete(**scored))["choices"][0]["logprobs"]["text_offset"]
    assert expected[:12] == [0, 5, 7, 11, 19, 24, 31, 35, 40, 41, 45, 47] and len(expected) == 14
    named = scored | {"return_tokens_as_token_ids": True}
    said = ok(complete(**named))["choices"][0]["logprobs"]
    assert said["text_offset"] == expected and all(name.startswith("token_id:") for name in said["tokens"])
    found: dict[str, list[Any]] = {"text_offset": [], "tokens": []}
    for event in complete(**named, stream=True).text.split("data: ")[1:-1]:
        for choice in json.loads(event)["choices"]:
            for name, values in found.items():
                values += (choice["logprobs"] or {}).get(name, [])
    assert found == {name: said[name] for name in found}
