"""A model that sees images, over HTTP: what OPERA and its like read of it, and that tokens are tried as it is fed
them."""

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import llava
import pytest
import torch
from asking import assert_refused, ok, poll
from PIL import Image
from reference import contrastive_search
from search_loop import Loop
from serving import MODEL, Server
from transformers import AutoImageProcessor, LlavaForConditionalGeneration

from whipstaff.decoding.search.opera import Opera, OperaSetting

pytestmark = pytest.mark.engine

NUM_TOKENS = 24
OPERA = {"method": "opera", "beams": 2, "candidates": 3, "threshold": 2, "switch_length": 4, "visits": 2}
FLAGS = ("--lookahead", "--attention-rows", "--hidden-states", "1", "--max-num-seqs", "8", "--block-size", "32")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with llava.serving(tmp_path_factory.mktemp("llava"), *FLAGS, "--max-num-batched-tokens", "64") as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def picture(seed: int) -> Image.Image:
    """Larger than what the model sees, and not square."""
    numbers = torch.randint(256, (37, 50, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(numbers.numpy())


PICTURES = [picture(0), picture(1)]


def asked(http: httpx.Client, pictures: list[Image.Image], **fields: Any) -> httpx.Response:
    """A chat about pictures, greedy and to its end."""
    content: list[dict[str, Any]] = []
    for one in pictures:
        one.save(data := io.BytesIO(), "PNG")
        url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "def main(): why?"}]}]
    own = {"model": MODEL, "messages": messages, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    return http.post("/v1/chat/completions", json=own | {"return_token_ids": True} | fields)


def images_in(ids: list[int]) -> list[tuple[int, int]]:
    """[start, end) of the tokens of each."""
    token = max(ids)
    first = [at for at, one in enumerate(ids) if one == token][:: llava.NUM_IMAGE]
    return [(at, at + llava.NUM_IMAGE) for at in first]


@pytest.fixture(scope="module")
def seeing(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a model that has seen pictures."""
    folder = server.log.parent / "llava"
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    pixels = AutoImageProcessor.from_pretrained(folder)

    def made(pictures: list[Image.Image]) -> llava.Seeing:
        return llava.Seeing(model.eval(), pixels(pictures, return_tensors="pt")["pixel_values"])

    return made


@pytest.mark.parametrize("num", [1, 2])
def test_opera_trusts_what_it_sees(http: httpx.Client, seeing: Any, num: int) -> None:
    """Token for token as over transformers, at whatever images its span names; by default it is the whole prompt."""
    pictures, weight = PICTURES[:num], {"penalty_weight": 5.0}
    others: list[dict[str, Any]] = [{"temperature": 0}, {"pictures": PICTURES[::-1][:num], "decoding": OPERA | weight}]
    loop, found, rollbacks = Loop(seeing(pictures), reads_attention=True), [], 0
    for image in ("all", 0, -1, None):
        span = {} if image is None else {"span": {"image": image}}
        answer = ok(asked(http, pictures, decoding=OPERA | weight | span))
        prompt, (choice,), (search,) = answer["prompt_token_ids"], answer["choices"], answer["whipstaff"]["search"]
        places = images_in(prompt)
        assert len(places) == num
        trusted = {"all": places, 0: places[:1], -1: places[-1:], None: [(1, len(prompt))]}[image]
        ran = loop.run(Opera(), OperaSetting(**OPERA, **weight, trusted=tuple(trusted)), prompt, NUM_TOKENS)
        assert choice["token_ids"] == list(ran.best)
        assert search["scores"] == pytest.approx([ran.hypotheses[0].score], abs=1e-3)
        assert (search["tried"], search["rollbacks"]) == (ran.count("tried"), ran.count("rollbacks"))
        rollbacks += search["rollbacks"]
        found.append(choice["token_ids"])
    assert rollbacks > 0 and found[0] != found[3]
    for fields in others:
        assert ok(asked(http, **{"pictures": pictures} | fields))["choices"][0]["token_ids"] not in found


def test_beside_one_another(http: httpx.Client) -> None:
    """Blocks and seats of searches that see other pictures are theirs alone."""
    ways: list[tuple[list[Image.Image], dict[str, Any]]]
    ways = [([picture(seed)], {"decoding": OPERA | {"span": {"image": 0}}}) for seed in range(3)]
    ways += [([picture(seed)], {"num_beams": 2}) for seed in range(2)] + [([], {"num_beams": 2})]

    def said(way: tuple[list[Image.Image], dict[str, Any]]) -> list[int]:
        ids: list[int] = ok(asked(http, way[0], **way[1]))["choices"][0]["token_ids"]
        return ids

    alone = [said(way) for way in ways]
    with ThreadPoolExecutor(len(ways)) as pool:
        assert list(pool.map(said, ways)) == alone
    assert len(set(map(tuple, alone))) == len(ways)
    poll(http, lambda now: not now["whipstaff_searches_running", ()])


@torch.inference_mode()
def test_tokens_are_tried_as_the_model_is_fed_them(http: httpx.Client, seeing: Any) -> None:
    answer = ok(asked(http, PICTURES[:1], penalty_alpha=0.6, top_k=4, temperature=0))
    prompt, found, model = answer["prompt_token_ids"], list[int](), seeing(PICTURES[:1])

    def seen(ids: list[int]) -> Any:
        return model(torch.tensor([ids]), output_hidden_states=True)

    def feed(token: int) -> Any:
        return seen([*prompt, *found, token]).hidden_states[-1][0, -1].tolist()

    for _ in range(NUM_TOKENS):
        out = seen([*prompt, *found])
        before = out.hidden_states[-1][0].tolist()
        found.append(contrastive_search.choose(out.logits[0, -1].tolist(), before, feed, 4, 0.6)[0])
    assert answer["choices"][0]["token_ids"] == found


@pytest.mark.parametrize("method", ["opera", "opera_lite"])
def test_images_that_are_not_there_are_refused(http: httpx.Client, method: str) -> None:
    own = partial(asked, http, decoding={"method": method, "span": {"image": 1}})
    assert_refused(own(PICTURES[:1]), 400, "decoding.span")
    assert_refused(own([]), 400, "decoding.span")
    assert_refused(
        asked(http, PICTURES[:1], decoding={"method": method, "span": {"image": "first"}}), 400, "decoding.span.image"
    )
