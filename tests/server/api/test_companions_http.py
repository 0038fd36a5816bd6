"""Requests of several sequences over HTTP: every token is the best of the same sum in transformers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asking
import httpx
import pytest
import torch
from asking import ok, poll, tokens
from loras import Lora, merged, random_lora, save_lora
from reference import nearness, seeded
from reference.dexperts import top
from search_loop import JudgedLoop
from serving import BASE, MAX_LEN, MAX_SEQS, MODEL, SHAPE, VOCABULARY, Server, serving
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from whipstaff.decoding.search.kcts import Kcts, KctsParams
from whipstaff.steering import vector_file
from whipstaff.steering.vector_file import Header

pytestmark = pytest.mark.engine

PROMPT = "import os\n\ndef main(argv):\n    return"
NEGATIVE = "class Nothing:\n    pass"
SYSTEM, QUESTION = "The key is in the box. Answer in short.", "Where is the key, and where is the other one?"
ADMIN_KEY = "a key for admins"
NUM_TOKENS = 12
NEAR = 1e-3  # of log-scores: two tokens that near may change places between float32 implementations
Post = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def loras() -> dict[str, Lora]:
    with torch.device("meta"):
        shapes = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, intermediate_size=2 * BASE["hidden_size"], **BASE))
    return {name: random_lora(shapes, seed) for seed, name in enumerate(("law", "math"))}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, loras: dict[str, Lora]) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    modules = [f"{name}={save_lora(folder / name, lora)}" for name, lora in loras.items()]
    flags = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules", *modules)
    with serving(folder, *flags, "--registry", str(folder / "registry"), "--admin-key", ADMIN_KEY) as running:
        yield running


@pytest.fixture(scope="module")
def complete(complete: asking.Post) -> Post:
    """What is answered to a greedy completion, or to what the arguments make of it."""

    def post(prompt: Any = PROMPT, **fields: Any) -> dict[str, Any]:
        return dict(ok(complete(prompt, **{"ignore_eos": True} | fields)))

    return post


@pytest.fixture(scope="module")
def chat(http: httpx.Client) -> Post:
    def post(*messages: tuple[str, str], **fields: Any) -> dict[str, Any]:
        return dict(ok(http.post("/v1/chat/completions", json=chat_body(*messages) | fields)))

    return post


def chat_body(*messages: tuple[str, str]) -> dict[str, Any]:
    told = [{"role": role, "content": content} for role, content in messages]
    body = {"model": MODEL, "messages": told, "max_tokens": NUM_TOKENS, "temperature": 0}
    return body | {"ignore_eos": True, "return_token_ids": True}


class Reference:
    """Plain models, one sequence, everything computed at once."""

    def __init__(self, server: Server) -> None:
        self.models = {
            name: LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for name, path in server.models.items()
        }
        self.tokenizer = AutoTokenizer.from_pretrained(server.models["base"])
        self.push = vector_file.read(Path(server.models["base"]).parent / "vectors" / "push.safetensors")

    @torch.inference_mode()
    def logits(self, prompt: Any, answer: list[int], model: str = "base", push: float = 0.0) -> Tensor:
        """(T, V) that each of the answer's tokens is chosen from; `push` edits from the prompt's last token on."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        handles = [
            self.models[model].model.layers[layer].register_forward_hook(_adds(push * parts["add"], len(ids) - 1))
            for (_, layer), parts in (self.push.tensors.items() if push else ())
        ]
        try:
            return self.models[model](torch.tensor([ids + answer[:-1]])).logits[0, len(ids) - 1 :]
        finally:
            for handle in handles:
                handle.remove()

    def log_p(self, *args: Any, **own: Any) -> Tensor:
        return self.logits(*args, **own).log_softmax(-1)

    def chat(self, content: str, system: str | None = None) -> list[int]:
        """The prompt that the chat template makes of a user message, and of a system message before it."""
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": content})
        found: list[int] = self.tokenizer.apply_chat_template(messages, return_dict=False)
        return found

    def hardest(self, ids: list[int], share: float, push: float = 0.0) -> list[int]:
        """Positions of the tokens that the base model finds unlikeliest, in order."""
        log_p = self.log_p(ids[:1], ids[1:], push=push)[torch.arange(len(ids) - 1), ids[1:]]
        return sorted((log_p.topk(max(int(share * len(log_p)), 1), largest=False).indices + 1).tolist())


def _adds(vector: Tensor, start: int) -> Any:
    def hook(module: Any, args: Any, output: Any) -> Any:
        (output[0] if isinstance(output, tuple) else output)[:, start:] += vector
        return output

    return hook


@pytest.fixture(scope="module")
def reference(server: Server, loras: dict[str, Lora]) -> Reference:
    found = Reference(server)
    found.models |= {name: merged(found.models["base"], lora) for name, lora in loras.items()}
    return found


def assert_best(answer: dict[str, Any], score: Callable[[list[int]], Tensor], choice: int = 0) -> None:
    """Every token has the best score, given those before it, ties apart."""
    said = tokens(answer, choice)
    assert len(said) == NUM_TOKENS
    scores = score(said)
    gaps = scores.amax(-1) - scores[torch.arange(len(said)), said]
    assert float(gaps.max()) < NEAR, gaps.tolist()


@pytest.mark.parametrize("kind", ["text", "ids", "messages", "none"])
def test_guidance_away_from_another_prompt(
    complete: Post, reference: Reference, tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    ids = tokenizer.encode(NEGATIVE)
    sent, other = {
        "text": (NEGATIVE, ids),
        "ids": (ids, ids),
        "messages": ([{"role": "user", "content": NEGATIVE}], reference.chat(NEGATIVE)),
        "none": (None, tokenizer.encode(PROMPT)[-1:]),
    }[kind]
    answer = complete(guidance_scale=2.5, **({} if sent is None else {"negative_prompt": sent}))
    assert_best(answer, lambda said: 2.5 * reference.log_p(PROMPT, said) - 1.5 * reference.log_p(other, said))
    assert [one["prompt_tokens"] for one in answer["whipstaff"]["sequences"]] == [len(other)]
    assert answer["usage"]["prompt_tokens"] == len(tokenizer.encode(PROMPT))
    assert tokens(answer) != tokens(complete())


def test_guidance_of_a_chat(chat: Post, reference: Reference) -> None:
    """A text takes the last user message's place."""
    answer = chat(("user", "Why?"), guidance_scale=0.4, negative_prompt="Why not?")
    prompts = reference.chat("Why?"), reference.chat("Why not?")
    assert_best(answer, lambda said: 0.4 * reference.log_p(prompts[0], said) + 0.6 * reference.log_p(prompts[1], said))


@pytest.mark.parametrize(
    "how", [{"context": "import os\n\n"}, {"prompt_without": PROMPT.removeprefix("import os\n\n")}]
)
def test_context_counts_for_more(complete: Post, reference: Reference, how: dict[str, str]) -> None:
    answer = complete(decoding={"method": "cad", "alpha": 1.0, **how})
    without = PROMPT.removeprefix("import os\n\n")
    assert_best(answer, lambda said: 2 * reference.logits(PROMPT, said) - reference.logits(without, said))


def test_context_counts_for_more_within_both_nuclei(complete: Post, reference: Reference) -> None:
    entry = {"method": "cad", "alpha": 1.0, "context": "import os\n\n", "top_p": 0.6, "top_p_without": 0.8}
    without = PROMPT.removeprefix("import os\n\n")

    def score(said: list[int]) -> Tensor:
        rows = [reference.logits(prompt, said) for prompt in (PROMPT, without)]
        kept = [
            torch.tensor([[v in top(row.tolist(), p) for v in range(len(row))] for row in each])
            for each, p in zip(rows, (0.6, 0.8), strict=True)
        ]
        found = (2 * rows[0] - rows[1]).masked_fill(~(kept[0] & kept[1]), -torch.inf)
        empty = ~(found > -torch.inf).any(1)
        found[empty] = rows[0][empty]
        return found

    answer = complete(decoding=entry)
    assert_best(answer, score)
    unmasked = 2 * reference.logits(PROMPT, tokens(answer)) - reference.logits(without, tokens(answer))
    assert not torch.equal(unmasked.argmax(1), torch.tensor(tokens(answer)))  # the nuclei matter here


def test_hard_tokens_are_shown_again(complete: Post, reference: Reference) -> None:
    answer = complete(decoding={"method": "sh2", "alpha": 1.6, "key_num": 20, "placement": "append", "before": "    "})
    (said_of,) = answer["whipstaff"]["sequences"]
    ids = reference.tokenizer.encode(PROMPT)
    assert said_of["key_positions"] == reference.hardest(ids, 0.2)
    assert said_of["keys"] == reference.tokenizer.decode([ids[position] for position in said_of["key_positions"]])
    shown = PROMPT.replace("    ", f"\nPondering: {said_of['keys']}    ")
    assert said_of["prompt"] == shown
    assert_best(answer, lambda said: 2.6 * reference.log_p(shown, said) - 1.6 * reference.log_p(PROMPT, said))


def test_an_expert_sees_a_chat(complete: Post, reference: Reference) -> None:
    pair = {"method": "proxy_tuning", "expert": "expert", "antiexpert": "anti", "expert_chat": True}
    assert_best(
        complete(decoding=pair),
        lambda said: (
            reference.logits(PROMPT, said)
            + reference.logits(reference.chat(PROMPT), said, model="expert")
            - reference.logits(PROMPT, said, model="anti")
        ),
    )


def test_away_from_a_noisy_instruction(complete: Post, reference: Reference) -> None:
    answer = complete(decoding={"method": "instructive", "noisy_prompt": NEGATIVE, "epsilon": 0.6})
    assert_best(answer, lambda said: reference.logits(PROMPT, said) - 0.6 * reference.logits(NEGATIVE, said))


@pytest.mark.parametrize("space", ["probability", "log"])
def test_prompts_agree(complete: Post, reference: Reference, space: str) -> None:
    others, weights = [NEGATIVE, "def f(x):"], [1.0, 2.0, 1.0]
    answer = complete(decoding={"method": "prompt_ensemble", "prompts": others, "weights": weights, "space": space})

    def score(said: list[int]) -> Tensor:
        rows = torch.stack([reference.log_p(prompt, said) for prompt in (PROMPT, *others)])
        shares = torch.tensor(weights)[:, None, None] / sum(weights)
        return (shares * rows.exp()).sum(0).log() if space == "probability" else (shares * rows).sum(0)

    assert_best(answer, score)


def test_steering_is_a_stream(complete: Post, reference: Reference) -> None:
    """A steered copy of the prompt against an unsteered one, beside an auxiliary model that reads another prompt."""
    named = [
        {"weight": 1.5, "steering": {"vector": "push", "scale": 0.05}, "name": "pushed"},
        {"weight": -1.5, "steering": []},
        {"weight": 0.5, "model": "expert", "prompt": NEGATIVE, "temperature": 2.0},
        {"weight": -0.25, "model": "anti"},
    ]
    answer = complete(decoding={"method": "streams", "streams": named})
    assert_best(
        answer,
        lambda said: (
            reference.logits(PROMPT, said)
            + 1.5 * reference.logits(PROMPT, said, push=0.05)
            - 1.5 * reference.logits(PROMPT, said)
            + 0.25 * reference.logits(NEGATIVE, said, model="expert")
            - 0.25 * reference.logits(PROMPT, said, model="anti")
        ),
    )
    assert [one.get("name") for one in answer["whipstaff"]["sequences"]] == ["pushed", None, None]


def test_adapters_agree(complete: Post, reference: Reference) -> None:
    """Of a request to the base model, and of one to an adapter."""
    ensemble = {"method": "adapter_ensemble", "weights": {"law": 1.0, "math": 3.0}}
    for own in ("base", "law"):
        assert_best(
            complete(decoding=ensemble, model=MODEL if own == "base" else own),
            lambda said, own=own: (  # type: ignore[misc]
                0.5 * reference.logits(PROMPT, said, model=own)
                + 0.125 * reference.logits(PROMPT, said, model="law")
                + 0.375 * reference.logits(PROMPT, said, model="math")
            ),
        )


def test_the_nearest_adapters_agree(http: httpx.Client, complete: Post, reference: Reference) -> None:
    """A file of centres comes over HTTP; each query's weights follow from its feature."""
    centres = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))
    header = Header(method="adapter_centres", model=SHAPE, defaults={"adapters": ["math", "law"]})
    admin, place = {"X-Whipstaff-Admin-Key": ADMIN_KEY}, {"name": "fields"}
    data = vector_file.packed(header, {"centres": centres})
    bad = vector_file.packed(header, {"centres": 0 * centres})
    assert http.post("/v1/steering/vectors", params=place, content=bad, headers=admin).status_code == 400
    uploaded = http.post("/v1/steering/vectors", params=place, content=data, headers=admin)
    assert uploaded.is_success, uploaded.text
    features = torch.randn(2, 5, generator=torch.Generator().manual_seed(3)).double()
    for feature, top_m in ((features[0], None), (features[1], None), (features[0], 1)):
        entry = {"method": "adapter_ensemble", "centres": "fields", "feature": feature.tolist(), "base_weight": 0.2}
        answer = complete(decoding=entry if top_m is None else entry | {"top_m": top_m})
        shares = nearness.shares(feature.numpy(), centres.double().numpy(), top_m)
        told = answer["whipstaff"]["decoding"][0]
        weights = {name: share for name, share in zip(("math", "law"), shares, strict=True) if share}
        assert told["weights"] == pytest.approx(weights) and "feature" not in told
        assert [one["name"] for one in answer["whipstaff"]["sequences"]] == list(weights)

        def score(said: list[int], weights: dict[str, float] = weights) -> Tensor:
            rows = [0.8 * share * reference.logits(PROMPT, said, model=name) for name, share in weights.items()]
            return 0.2 * reference.logits(PROMPT, said) + torch.stack(rows).sum(0)

        assert_best(answer, score)
    assert http.delete("/v1/steering/vectors/fields", headers=admin).is_success
    response = http.post("/v1/completions", json={"model": MODEL, "prompt": PROMPT, "decoding": entry})
    assert (response.status_code, response.json()["error"]["param"]) == (404, "decoding.centres")


def test_a_classifier_reads_by_an_adapter_of_its_own(http: httpx.Client, complete: Post, reference: Reference) -> None:
    """A tree search of the model without one, steered or mixed with another prompt or not."""
    random = torch.Generator().manual_seed(6)
    head = {"weight": torch.randn(2, SHAPE.hidden_size, generator=random), "bias": torch.tensor([0.5, -0.5])}
    admin, place = {"X-Whipstaff-Admin-Key": ADMIN_KEY}, {"name": "grounded"}
    data = vector_file.packed(Header(method="prefix_classifier", model=SHAPE), head)
    assert http.post("/v1/steering/vectors", params=place, content=data, headers=admin).is_success
    tree: dict[str, Any] = {"method": "kcts", "classifier": "grounded", "k": 5, "simulations": 6}
    params = KctsParams.model_validate(tree)

    def expected(judge: str, negative: list[int] | None = None) -> list[int]:
        def guided(texts: Any, rows: Tensor) -> Tensor:
            if negative is None:
                return rows
            (text,), (row,) = texts, rows
            away = reference.log_p(negative, [*text[len(prompt) :], 0])[-1]
            return (1.5 * row.log_softmax(-1) - 0.5 * away)[None]

        loop = JudgedLoop(reference.models["base"], reference.models[judge], guided)
        return list(loop.run(Kcts(), params, prompt, 6, (), {"classifier": head}).best)

    fields = {"max_tokens": 6, "explain": {"top": 0}}
    alone, judged = (complete(decoding=tree | own, **fields) for own in ({}, {"adapter": "law"}))
    prompt = judged["choices"][0]["prompt_token_ids"]
    assert (tokens(alone), tokens(judged)) == (expected("base"), expected("law")) and tokens(alone) != tokens(judged)
    (told,), (search,) = judged["whipstaff"]["sequences"], judged["whipstaff"]["search"]
    assert (told["field"], told["name"], told["prompt_tokens"]) == ("decoding.adapter", "law", len(prompt))
    assert search["tokens_computed"] > 2 * 6 and search["tokens_computed"] % 2 == 0  # of two sequences
    scores = [one["facts"]["classifier"] for one in judged["choices"][0]["explain"]]
    ids = torch.tensor([[*prompt, *tokens(judged)]])
    with torch.inference_mode():
        hidden = reference.models["law"].model(ids).last_hidden_state[0, len(prompt) :]
    assert scores == pytest.approx((hidden @ head["weight"].T + head["bias"]).softmax(-1)[:, 1].tolist(), abs=1e-3)
    cfg = {"method": "cfg", "guidance_scale": 1.5, "negative_prompt": NEGATIVE}
    both = complete(decoding=[cfg, tree | {"adapter": "law"}], max_tokens=6)
    assert tokens(both) == expected("law", reference.tokenizer.encode(NEGATIVE))
    assert [one["field"] for one in both["whipstaff"]["sequences"]][1:] == ["decoding[1].adapter"]
    for own, status, param in (({"adapter": "art"}, 404, "adapter"), ({"adapter": 3}, 400, "adapter")):
        body = {"model": MODEL, "prompt": PROMPT, "decoding": tree | own}
        response = http.post("/v1/completions", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (status, f"decoding.{param}")
    assert http.delete("/v1/steering/vectors/grounded", headers=admin).is_success


@pytest.mark.parametrize("negative", [NEGATIVE, NEGATIVE * 20], ids=["short", "chunked"])
def test_the_requests_steering_is_that_of_all_its_streams(complete: Post, reference: Reference, negative: str) -> None:
    push = {"vector": "push", "scale": 0.05}

    def guided(said: list[int], other: float) -> Tensor:
        return 2 * reference.log_p(PROMPT, said, push=0.05) - reference.log_p(negative, said, push=other)

    cfg = {"method": "cfg", "guidance_scale": 2.0, "negative_prompt": negative}
    for other, fields in (
        (0.05, {"guidance_scale": 2.0, "negative_prompt": negative}),
        (0.0, {"decoding": cfg | {"steering": []}}),
        (-0.05, {"decoding": cfg | {"steering": push | {"scale": -0.05}}}),
    ):
        for _ in range(2):  # the second time from the cache
            answer = complete(steering=push, **fields)
            assert_best(answer, lambda said, other=other: guided(said, other))  # type: ignore[misc]
            assert [one["steered"] for one in answer["whipstaff"]["sequences"]] == [bool(other)]


def test_what_a_steered_model_finds_hard_is_shown_again(complete: Post, reference: Reference) -> None:
    push = {"vector": "push", "scale": 0.3, "where": "all"}
    entry = {"method": "sh2", "key_num": 30}
    ids = reference.tokenizer.encode(PROMPT)
    steering: dict[str, Any]
    for steering, scale in (({}, 0.3), ({"steering": []}, 0.0)):
        (told,) = complete(steering=push, decoding=entry | steering)["whipstaff"]["sequences"]
        assert told["key_positions"] == reference.hardest(ids, 0.3, scale)


def test_sums_of_two_methods(complete: Post, reference: Reference) -> None:
    both = [
        {"method": "cad", "alpha": 0.5, "prompt_without": NEGATIVE},
        {"method": "proxy_tuning", "expert": "expert", "antiexpert": "anti", "antiexpert_prompt": NEGATIVE},
    ]
    assert_best(
        complete(decoding=both),
        lambda said: (
            1.5 * reference.logits(PROMPT, said)
            - 0.5 * reference.logits(NEGATIVE, said)
            + reference.logits(PROMPT, said, model="expert")
            - reference.logits(NEGATIVE, said, model="anti")
        ),
    )


@pytest.mark.parametrize(
    ("window", "gain"),
    [
        ({"from": 2}, lambda num: float(num >= 2)),
        ({"until": 5}, lambda num: float(num < 5)),
        ({"from": 1, "until": 9, "fade": "linear"}, lambda num: (1 - (num - 1) / 8) * (1 <= num < 9)),
    ],
)
def test_guidance_for_a_while(
    complete: Post, reference: Reference, window: dict[str, Any], gain: Callable[[int], float]
) -> None:
    answer = complete(decoding={"method": "cfg", "guidance_scale": 4.0, "negative_prompt": NEGATIVE, **window})

    def score(said: list[int]) -> Tensor:
        own, other = reference.log_p(PROMPT, said), reference.log_p(NEGATIVE, said)
        share = torch.tensor([gain(num) for num in range(len(said))])[:, None]
        return own + share * 3.0 * (own - other)

    assert_best(answer, score)


def test_log_probabilities_and_explanations_tell_the_streams(complete: Post, reference: Reference) -> None:
    answer = complete(
        guidance_scale=2.0, negative_prompt=NEGATIVE, logprobs=2, explain={"top": 2}, return_tokens_as_token_ids=True
    )
    said = tokens(answer)
    own, other = reference.log_p(PROMPT, said), reference.log_p(NEGATIVE, said)
    guided = (2 * own - other).log_softmax(-1)
    told = answer["choices"][0]["logprobs"]["token_logprobs"]
    index = torch.arange(len(said)), torch.tensor(said)
    assert told == pytest.approx(guided[index].tolist(), abs=NEAR)
    explained = answer["choices"][0]["explain"]
    for name, rows in (("base", own), ("final", guided)):
        assert [one[name]["logprob"] for one in explained] == pytest.approx(rows[index].tolist(), abs=NEAR)
    streams = [one["streams"] for one in explained]
    assert all(one.keys() == {"negative_prompt"} for one in streams)
    assert [one["negative_prompt"]["logprob"] for one in streams] == pytest.approx(other[index].tolist(), abs=NEAR)


def test_what_steering_changed_is_told(complete: Post, reference: Reference) -> None:
    """Of a request that only steers, too: what the model would think of the very same tokens without its vector."""
    push, num_prompt = {"vector": "push", "scale": 3.0}, len(reference.tokenizer.encode(PROMPT))
    sequence = {"field": "explain.unsteered", "prompt_tokens": num_prompt, "steered": False}
    for more in ({}, {"guidance_scale": 2.0, "negative_prompt": NEGATIVE}, {"n": 2, "temperature": 1.0, "seed": 4}):
        told = complete(steering=[push], explain={"top": 2, "unsteered": True}, **more)
        plain = complete(steering=[push], **more)
        for choice, alone in zip(told["choices"], plain["choices"], strict=True):
            said = choice["token_ids"]
            assert said == alone["token_ids"]
            steered, unsteered = reference.log_p(PROMPT, said, push=3.0), reference.log_p(PROMPT, said)
            final = steered
            if "guidance_scale" in more:
                other = reference.log_p(NEGATIVE, said, push=3.0)
                final = (2 * steered - other).log_softmax(-1)
            divergence = (final.exp() * (final - unsteered)).sum(-1)
            assert divergence.max() > 0.01  # the vector does something
            index = torch.arange(len(said)), torch.tensor(said)
            for name, rows in (("base", steered), ("unsteered", unsteered), ("final", final)):
                seen = [one[name] for one in choice["explain"]]
                assert [one["logprob"] for one in seen] == pytest.approx(rows[index].tolist(), abs=NEAR)
                best = [top["logprob"] for one in seen for top in one["top"]]
                assert best == pytest.approx(rows.topk(2).values.flatten().tolist(), abs=NEAR)
            found = [one["unsteered"]["kl"] for one in choice["explain"]]
            assert found == pytest.approx(divergence.tolist(), abs=NEAR)
        assert told["whipstaff"]["sequences"][-1] == sequence
    nothing = complete(explain={"top": 0, "unsteered": True})
    assert "sequences" not in nothing["whipstaff"]
    for one in nothing["choices"][0]["explain"]:
        assert one["unsteered"] == {**one["base"], "kl": 0}


def test_what_tokens_are_drawn_from_is_told(complete: Post, reference: Reference) -> None:
    """After penalties, temperature and truncation; asking changes no token."""
    sampled = {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.3, "seed": 5}
    choice = complete(**sampled, explain={"top": 6, "drawn": True})["choices"][0]
    assert choice["token_ids"] == complete(**sampled)["choices"][0]["token_ids"]
    said, ids = choice["token_ids"], reference.tokenizer.encode(PROMPT)
    for number, (row, one) in enumerate(zip(reference.logits(PROMPT, said), choice["explain"], strict=True)):
        seen = torch.tensor(sorted({*ids, *said[:number]}))
        row = row.clone()
        row[seen] = torch.where(row[seen] > 0, row[seen] / 1.3, row[seen] * 1.3)
        best = (row / 0.7).topk(5)
        log_p = dict(zip(best.indices.tolist(), best.values.log_softmax(-1).tolist(), strict=True))
        assert {top["id"]: top["logprob"] for top in one["drawn"]["top"]} == pytest.approx(log_p, abs=NEAR)
        assert one["drawn"]["logprob"] == pytest.approx(log_p[one["id"]], abs=NEAR)
    greedy = complete(explain={"top": 2, "drawn": True})["choices"][0]
    assert all(one["drawn"]["top"] == [{**one["drawn"]["top"][0], "logprob": 0.0}] for one in greedy["explain"])
    assert all(bytes(one["bytes"]).decode(errors="replace") == one["token"] for one in greedy["explain"])


def test_answers_are_scored_by_saying_them(complete: Post, reference: Reference) -> None:
    said = reference.tokenizer.encode(" None  # of several prompts")
    guidance = {"method": "cfg", "guidance_scale": 2.0, "negative_prompt": NEGATIVE}
    forced = {"method": "forced", "text": " None  # of several prompts"}
    answer = complete(decoding=[guidance, forced], max_tokens=len(said), logprobs=0)
    assert tokens(answer) == said
    guided = (2 * reference.log_p(PROMPT, said) - reference.log_p(NEGATIVE, said)).log_softmax(-1)
    expected = guided[torch.arange(len(said)), said]
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(expected.tolist(), abs=NEAR)


def test_streaming_says_the_same(http: httpx.Client, complete: Post) -> None:
    fields = {"guidance_scale": 2.0, "negative_prompt": NEGATIVE}
    whole = complete(**fields)
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    response = http.post("/v1/completions", json=body | fields | {"stream": True})
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line) for line in lines]
    assert "".join(one["text"] for chunk in chunks for one in chunk["choices"]) == whole["choices"][0]["text"]
    (receipt,) = [chunk["whipstaff"] for chunk in chunks if "whipstaff" in chunk]
    assert receipt["sequences"] == whole["whipstaff"]["sequences"]


def test_seeds_and_several_answers(complete: Post) -> None:
    """With a companion that weighs nothing a seed draws what it draws for a plain request."""
    drawn = {"temperature": 1.0, "seed": 5}
    nothing = {"decoding": {"method": "streams", "streams": [{"prompt": NEGATIVE, "weight": 0.0}]}}
    assert tokens(complete(**drawn)) == tokens(complete(**drawn, **nothing))
    guided = {"guidance_scale": 2.0, "negative_prompt": NEGATIVE}
    several = complete(n=3, **drawn, **guided)
    again = complete(n=3, **drawn, **guided)
    answers = [tokens(several, choice) for choice in range(3)]
    assert answers == [tokens(again, choice) for choice in range(3)] and answers[0] != answers[1]
    assert len(several["whipstaff"]["sequences"]) == 1


def test_several_prompts_of_one_request(complete: Post, reference: Reference) -> None:
    answer = complete([PROMPT, "class A:"], guidance_scale=2.0)
    for choice, prompt in enumerate((PROMPT, "class A:")):
        last = reference.tokenizer.encode(prompt)[-1:]

        def score(said: list[int], prompt: str = prompt, last: list[int] = last) -> Tensor:
            return 2 * reference.log_p(prompt, said) - reference.log_p(last, said)

        assert_best(answer, score, choice)
    assert len(answer["whipstaff"]["sequences"]) == 2


Score = Callable[[Reference, list[int]], Tensor]
OTHER = "Which box?"
AS_MESSAGES = [{"role": "system", "content": "Be wrong."}, {"role": "user", "content": OTHER}]


def own(reference: Reference) -> list[int]:
    return reference.chat(QUESTION, SYSTEM)


def other(reference: Reference) -> list[int]:
    return reference.chat(OTHER, SYSTEM)


CHATS: dict[str, tuple[dict[str, Any], Score]] = {
    "a context in a message": (
        {"method": "cad", "alpha": 1.0, "context": "The key is in the box. "},
        lambda models, said: (
            2 * models.logits(own(models), said) - models.logits(models.chat(QUESTION, "Answer in short."), said)
        ),
    ),
    "without a context": (
        {"method": "cad", "alpha": 0.5, "prompt_without": OTHER},
        lambda models, said: 1.5 * models.logits(own(models), said) - 0.5 * models.logits(other(models), said),
    ),
    "noise": (
        {"method": "instructive", "noisy_prompt": AS_MESSAGES, "epsilon": 0.6},
        lambda models, said: (
            models.logits(own(models), said) - 0.6 * models.logits(models.chat(OTHER, "Be wrong."), said)
        ),
    ),
    "an ensemble": (
        {"method": "prompt_ensemble", "prompts": [OTHER, AS_MESSAGES, [5, 6, 7]], "space": "log"},
        lambda models, said: sum(
            (models.log_p(prompt, said) for prompt in (other(models), models.chat(OTHER, "Be wrong."), [5, 6, 7])),
            models.log_p(own(models), said),
        ),
    ),
    "prompts of a pair": (
        {"method": "proxy_tuning", "expert": "expert", "antiexpert": "anti"}
        | {"expert_prompt": OTHER, "antiexpert_prompt": [5, 6, 7]},
        lambda models, said: (
            models.logits(own(models), said)
            + models.logits(other(models), said, model="expert")
            - models.logits([5, 6, 7], said, model="anti")
        ),
    ),
    "an expert of chats": (
        {"method": "proxy_tuning", "expert": "expert", "antiexpert": "anti", "expert_chat": True},
        lambda models, said: (
            models.logits(own(models), said)
            + models.logits(own(models), said, model="expert")
            - models.logits(own(models), said, model="anti")
        ),
    ),
    "streams": (
        {
            "method": "streams",
            "streams": [
                {"weight": 1.5, "prompt": OTHER, "adapter": "law"},
                {"weight": -1.0, "prompt": AS_MESSAGES, "model": "expert"},
                {"weight": 0.5, "steering": {"vector": "push", "scale": 0.05}},
            ],
        },
        lambda models, said: (
            models.logits(own(models), said)
            + 1.5 * models.logits(other(models), said, model="law")
            - models.logits(models.chat(OTHER, "Be wrong."), said, model="expert")
            + 0.5 * models.logits(own(models), said, push=0.05)
        ),
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_chats(chat: Post, reference: Reference, name: str) -> None:
    entry, score = CHATS[name]
    assert_best(chat(("system", SYSTEM), ("user", QUESTION), decoding=entry), lambda said: score(reference, said))


def test_a_chats_hard_tokens_are_shown_again(chat: Post, reference: Reference) -> None:
    """Those of the last user message, in its place."""
    entry = {"method": "sh2", "alpha": 1.6, "key_num": 20, "placement": "append", "before": ", and"}
    answer = chat(("system", SYSTEM), ("user", QUESTION), decoding=entry)
    (told,) = answer["whipstaff"]["sequences"]
    ids = reference.tokenizer.encode(QUESTION)
    assert told["key_positions"] == reference.hardest(ids, 0.2)
    shown = QUESTION.replace(
        ", and", f"\nPondering: {reference.tokenizer.decode([ids[at] for at in told['key_positions']])}, and"
    )
    prompt = reference.chat(shown, SYSTEM)
    assert (told["prompt"], told["prompt_tokens"]) == (shown, len(prompt))
    assert_best(answer, lambda said: 2.6 * reference.log_p(prompt, said) - 1.6 * reference.log_p(own(reference), said))


def test_a_streamed_chat_says_the_same(http: httpx.Client, chat: Post) -> None:
    messages, entry = (("system", SYSTEM), ("user", QUESTION)), CHATS["a context in a message"][0]
    whole = chat(*messages, decoding=entry)
    response = http.post("/v1/chat/completions", json=chat_body(*messages) | {"decoding": entry, "stream": True})
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line) for line in lines]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(one["delta"].get("content") or "" for one in choices) == whole["choices"][0]["message"]["content"]
    assert [token for one in choices for token in one.get("token_ids") or ()] == tokens(whole)
    (receipt,) = [chunk["whipstaff"] for chunk in chunks if "whipstaff" in chunk]
    assert receipt["sequences"] == whole["whipstaff"]["sequences"]


def test_several_answers_to_a_chat_are_drawn_as_a_plain_loop_draws(chat: Post, reference: Reference) -> None:
    entry, score = CHATS["without a context"]
    answer = chat(("system", SYSTEM), ("user", QUESTION), decoding=entry, n=2, temperature=0.8, seed=11)
    for choice in range(2):
        drawn = seeded.noise("v1", 11 + choice, 0, NUM_TOKENS, VOCABULARY)  # vLLM counts the seed up
        noise = torch.stack(list(drawn))
        assert_best(answer, lambda said, noise=noise: score(reference, said) / 0.8 + noise, choice)  # type: ignore[misc]
    assert tokens(answer, 0) != tokens(answer, 1)


def test_stop_strings_and_grammars_end_the_group(complete: Post) -> None:
    fields = {"guidance_scale": 2.0, "negative_prompt": NEGATIVE}
    text = complete(**fields)["choices"][0]["text"]
    stop = text[len(text) // 2 :][:2]
    assert complete(**fields, stop=[stop])["choices"][0]["text"] == text[: text.index(stop)]
    choices = ["left", "right"]
    assert complete(**fields, structured_outputs={"choice": choices}, ignore_eos=False)["choices"][0]["text"] in choices


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "a prompt's scores": ({"guidance_scale": 2, "echo": True, "logprobs": 1}, 400, "guidance_scale"),
    "scores of a prompt": ({"guidance_scale": 2, "prompt_logprobs": 1}, 400, "guidance_scale"),
    "too many": (
        {"decoding": {"method": "prompt_ensemble", "prompts": ["a"] * MAX_SEQS}}, 422, "decoding.prompts[0]"
    ),
    "too long": ({"guidance_scale": 2, "negative_prompt": [5] * (MAX_LEN + 1)}, 400, "negative_prompt"),
    "no room": ({"guidance_scale": 2, "negative_prompt": [5] * (MAX_LEN - 5)}, 400, "negative_prompt"),
    "vocabulary": ({"guidance_scale": 2, "negative_prompt": [10**6]}, 400, "negative_prompt"),
    "unknown adapter": (
        {"decoding": {"method": "adapter_ensemble", "weights": {"a": 1}}}, 404, "decoding.weights.a"
    ),
    "context": ({"decoding": {"method": "cad", "context": "It snows."}}, 400, "decoding.context"),
    "soft prompt": (
        {"guidance_scale": 2, "negative_prompt": [5], "steering": {"vector": "soft", "insert": 2}},
        400,
        "steering.insert",
    ),
    "grammar": (
        {"decoding": {"method": "forced", "text": "a"}, "structured_outputs": {"choice": ["a"]}},
        400,
        "decoding.method",
    ),
    "no sum": (
        {"guidance_scale": 2, "decoding": [{"method": "cad", "context": "import"}]}, 400, "guidance_scale"
    ),
    "beam search": (
        {"guidance_scale": 2, "use_beam_search": True, "structured_outputs": {"choice": ["a"]}}, 400, "use_beam_search"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_its_field(http: httpx.Client, name: str) -> None:
    fields, status, param = REFUSED[name]
    for path in ("/v1/completions", "/v1/steering/validate"):
        response = http.post(path, json={"model": MODEL, "prompt": PROMPT, "max_tokens": NUM_TOKENS, **fields})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (status, param), error


def test_validation_tells_the_sequences(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "guidance_scale": 2, "negative_prompt": NEGATIVE}
    plan = http.post("/v1/steering/validate", json=body).json()["plan"]
    assert [one["field"] for one in plan["sequences"]] == ["negative_prompt"]


def test_nothing_is_left(http: httpx.Client) -> None:
    now = poll(http, lambda now: not now["whipstaff_group_sequences_running", ()])
    assert now["whipstaff_group_steps_total", (("state", "together"),)] > 0  # there were some
    assert now["whipstaff_groups_half_scheduled_total", ()] == 0
