"""Activations over HTTP: what an answer's file holds is what transformers computes of the answer's own tokens."""

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from asking import PROMPT, Post, assert_refused, data_events, ok, tokens
from safetensors.torch import load
from serving import MODEL, Server
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from whipstaff.steering import vector_file
from whipstaff.steering.method import HookPoint

pytestmark = pytest.mark.engine

PUSH: dict[str, Any] = {"vector": "push", "scale": 2.0, "where": "all"}
TOLERANCE = 1e-3
FETCHED = {"capture_format": "download"}
BEAMS = {"method": "beam_search", "num_beams": 2}


class Reference:
    """The served model in transformers, pushed or not."""

    def __init__(self, server: Server) -> None:
        own = {"dtype": torch.float32, "attn_implementation": "eager"}
        self.model = LlamaForCausalLM.from_pretrained(server.models["base"], **own).eval()
        self.vectors = Path(server.models["base"]).parent / "vectors"
        self.push = vector_file.read(self.vectors / "push.safetensors")

    @torch.inference_mode()
    def streams(self, ids: list[int], scale: float = 0.0) -> dict[str, Tensor]:
        """(T, width) of every layer's stream after the push, `before.L` it, and what its output projection gets."""
        found: dict[str, Tensor] = {}
        handles = []
        for layer, block in enumerate(self.model.model.layers):

            def leaving(_: Any, __: Any, output: Tensor, layer: int = layer) -> Tensor:
                found[f"before.{layer}"] = output[0]
                found[f"resid_post.{layer}"] = (
                    output[0] + scale * self.push.tensors[HookPoint("resid_post", layer)]["add"]
                )
                return found[f"resid_post.{layer}"][None]

            def entering(_: Any, given: Any, layer: int = layer) -> None:
                found[f"attn_head.{layer}"] = given[0][0]

            handles += [block.register_forward_hook(leaving)]
            handles += [block.self_attn.o_proj.register_forward_pre_hook(entering)]
        try:
            self.model(torch.tensor([ids]))
        finally:
            for handle in handles:
                handle.remove()
        return found


@pytest.fixture(scope="module")
def reference(server: Server) -> Reference:
    return Reference(server)


def files(answer: Any) -> list[dict[str, Tensor]]:
    """What was read, by choice."""
    told = answer["whipstaff"]["captured"]
    assert [one["choice"] for one in told] == list(range(len(told)))
    found = [load(base64.b64decode(one["safetensors"])) for one in told]
    assert [{name: list(tensor.shape) for name, tensor in one.items()} for one in found] == [
        one["tensors"] for one in told
    ]
    return found


def test_a_file_holds_what_transformers_computes(
    complete: Post, reference: Reference, tokenizer: PreTrainedTokenizerFast
) -> None:
    capture = [
        {"layers": [2, 0]},
        {"site": "attn_head", "layers": [1], "where": "generation", "dtype": "float16"},
        {"layers": [1], "edited": False, "where": {"prompt": [[-2, None]]}, "reduce": "mean"},
        {"layers": [2], "where": {"generation": "all"}, "reduce": "last"},
    ]
    for scale, more in ((0.0, {}), (2.0, {"n": 2, "temperature": 1.0, "seed": 6})):
        steering = [PUSH] if scale else []
        answer = ok(complete(steering=steering, capture=capture, ignore_eos=True, **more))
        assert [one["layers"] for one in answer["whipstaff"]["capture"]] == [[2, 0], [1], [1], [2]]
        for index, found in enumerate(files(answer)):
            prompt = tokenizer.encode(PROMPT)
            ids, start = [*prompt, *tokens(answer, index)[:-1]], len(prompt)
            seen = reference.streams(ids, scale)
            assert found["0.positions"].tolist() == list(range(len(ids)))
            assert found["1.positions"].tolist() == list(range(start, len(ids)))
            assert found["2.positions"].tolist() == [start - 2, start - 1]
            expected = {
                "0.resid_post.2": seen["resid_post.2"],
                "0.resid_post.0": seen["resid_post.0"],
                "1.attn_head.1": seen["attn_head.1"][start:].unflatten(1, found["1.attn_head.1"].shape[1:]).half(),
                "2.resid_post.1": seen["before.1"][start - 2 : start].mean(0),
                "3.resid_post.2": seen["resid_post.2"][-1],
            }
            assert {name for name in found if "positions" not in name} == expected.keys()
            for name, values in expected.items():
                torch.testing.assert_close(found[name], values, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_stream_ends_with_the_same_file(complete: Post) -> None:
    fields: dict[str, Any] = {"capture": {"layers": "all", "where": "all"}, "steering": [PUSH], "ignore_eos": True}
    chunks = [json.loads(event) for event in data_events(complete(stream=True, **fields))[:-1]]
    assert all("whipstaff" not in chunk for chunk in chunks[:-1])
    (streamed,), (whole,) = files(chunks[-1]), files(ok(complete(**fields)))
    assert streamed.keys() == whole.keys()
    for name, values in whole.items():
        torch.testing.assert_close(streamed[name], values, atol=TOLERANCE, rtol=TOLERANCE)


def fetched(http: httpx.Client, answer: Any) -> dict[str, Tensor]:
    """The file of an answer, by its own word for it."""
    said = answer["whipstaff"]["download"]
    response = http.get(said["url"])
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/octet-stream"
    assert int(response.headers["content-length"]) == len(response.content) == said["bytes"]
    return load(response.content)


def test_a_file_is_fetched_that_has_what_the_answer_would_have(complete: Post, chat: Post, http: httpx.Client) -> None:
    """One of all choices; whole and streamed."""
    capture = [{"layers": [2, 0]}, {"site": "attn_head", "layers": [1], "where": "generation", "reduce": "mean"}]
    fields: dict[str, Any] = {"capture": capture, "n": 2, "temperature": 1.0, "seed": 4, "ignore_eos": True}
    for post in (complete, chat):
        inline = ok(post(**fields))
        streamed = json.loads(data_events(post(stream=True, capture_format="download", **fields))[-2])
        for answer in (ok(post(capture_format="download", **fields)), streamed):
            told = answer["whipstaff"]["captured"]
            assert [one["choice"] for one in told] == [0, 1] and not any("safetensors" in one for one in told)
            found, wanted = fetched(http, answer), files(inline)
            assert found.keys() == {f"{choice}.{name}" for choice in (0, 1) for name in wanted[choice]}
            for choice, tensors in enumerate(wanted):
                assert {name: list(tensor.shape) for name, tensor in tensors.items()} == told[choice]["tensors"]
                for name, tensor in tensors.items():
                    torch.testing.assert_close(found[f"{choice}.{name}"], tensor, atol=TOLERANCE, rtol=TOLERANCE)
            url = answer["whipstaff"]["download"]["url"]
            assert ok(http.delete(url))["deleted"] is True
            for method in ("GET", "DELETE"):
                assert_refused(http.request(method, url), 404, "id")
    assert_refused(http.get("/v1/steering/captures/no-such"), 404, "id")
    assert httpx.get(f"{http.base_url}{url}").status_code == 401


@pytest.mark.parametrize("steering", [[], [PUSH]])
def test_what_probes_read_comes_with_the_tokens(
    complete: Post, chat: Post, reference: Reference, tokenizer: PreTrainedTokenizerFast, steering: list[Any]
) -> None:
    """Of prompts that come in chunks, and once more from the cache; before the edits at that place."""
    probe = vector_file.read(reference.vectors / "probe.safetensors").tensors[HookPoint("resid_post", 0)]["direction"]
    prompt = "import os\n\n" * 40
    captures = [
        {"probe": "probe"},
        {"layers": [0], "edited": False},
        {"probe": "probe", "where": {"prompt": [[3, 9]], "generation": [[1, 3]]}, "reduce": "mean"},
    ]
    fields: dict[str, Any] = {"steering": steering, "capture": captures, "ignore_eos": True, "max_tokens": 6}
    fields |= {"n": 2, "temperature": 1.0, "seed": 4}
    for _ in range(2):
        answer = ok(complete(prompt, **fields))
        chunks = [json.loads(event) for event in data_events(complete(prompt, stream=True, **fields))[:-1]]
        for choice, found in enumerate(files(answer)):
            start = len(tokenizer.encode(prompt))
            ids = [*tokenizer.encode(prompt), *tokens(answer, choice)[:-1]]
            expected = reference.streams(ids, PUSH["scale"] if steering else 0.0)["before.0"] @ probe
            assert found["0.positions"].tolist() == list(range(len(ids)))
            torch.testing.assert_close(found["0.probe.0"], expected, atol=TOLERANCE, rtol=TOLERANCE)
            torch.testing.assert_close(found["1.resid_post.0"] @ probe, expected, atol=TOLERANCE, rtol=TOLERANCE)
            some = [*range(3, 9), start + 1, start + 2]
            assert found["2.positions"].tolist() == some
            torch.testing.assert_close(found["2.probe.0"], expected[some].mean(), atol=TOLERANCE, rtol=TOLERANCE)
            streamed = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice]
            ahead = 0  # a token never comes before what was read of the one before it
            for one in streamed:
                ahead += len(one.get("readings", ())) - len(one.get("token_ids") or ())
                assert ahead >= 0
            read = [record for one in streamed for record in one.get("readings", ())]
            assert read == answer["choices"][choice]["readings"]
            assert [one["position"] for one in read] == list(range(start - 1, len(ids)))
            for one in read:
                at = one["position"]
                assert one["values"]["0"] == pytest.approx(expected[at].item(), abs=TOLERANCE, rel=TOLERANCE)
                assert ("2" in one["values"]) == (at in some)
    plain = ok(complete(prompt, stop_when={"probe": "probe", "above": 1e6}, max_tokens=3))
    assert "readings" not in plain["choices"][0] and "captured" not in plain["whipstaff"]
    both: dict[str, Any] = {"capture": {"probe": "probe"}, "explain": {"top": 1}, "max_tokens": 4, "ignore_eos": True}
    said = [json.loads(event) for event in data_events(chat(stream=True, **both))[:-1]]
    told = [choice for chunk in said for choice in chunk["choices"]]
    assert [sum(len(one.get(name, ())) for one in told) for name in ("explain", "readings")] == [4, 4]


@pytest.mark.parametrize("prompt", [PROMPT, "import os\n\n" * 40])
def test_what_heads_look_at_is_what_transformers_says(
    complete: Post, http: httpx.Client, reference: Reference, tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    captures = [
        {"attention": {"2": [3, 0], "0": "all"}},
        {"attention": {"0": [1, 2]}, "where": {"prompt": [[-3, None]], "generation": [[1, 3]]}, "reduce": "mean"},
        {"attention": {"2": "all"}, "where": "prompt", "reduce": "max", "dtype": "float16"},
    ]
    fields: dict[str, Any] = {"capture": captures, "ignore_eos": True, "n": 2, "temperature": 1.0, "seed": 4}
    answer = ok(complete(prompt, **fields))
    whole = fetched(http, ok(complete(prompt, stream=False, capture_format="download", **fields)))
    start = len(tokenizer.encode(prompt))
    for choice, found in enumerate(files(answer)):
        ids = [*tokenizer.encode(prompt), *tokens(answer, choice)[:-1]]
        with torch.inference_mode():
            seen = [one[0] for one in reference.model(torch.tensor([ids]), output_attentions=True).attentions]
        some = [*range(start - 3, start), start + 1, start + 2]
        assert found["0.positions"].tolist() == list(range(start, len(ids)))
        assert found["1.positions"].tolist() == some and found["2.positions"].tolist() == list(range(start))
        expected = {
            "0.attention.2": seen[2][[3, 0], start:].transpose(0, 1),
            "0.attention.0": seen[0][:, start:].transpose(0, 1),
            "1.attention.0": seen[0][[1, 2]][:, some].mean(0),
            "2.attention.2": seen[2][:, :start].amax(0).half(),
        }
        assert {name for name in found if "positions" not in name} == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, atol=TOLERANCE, rtol=TOLERANCE)
            torch.testing.assert_close(whole[f"{choice}.{name}"], values, atol=TOLERANCE, rtol=TOLERANCE)


def test_an_answer_ends_with_the_reading_that_ends_it(complete: Post) -> None:
    fields: dict[str, Any] = {"capture": {"probe": "probe", "where": "each_last"}, "ignore_eos": True, "max_tokens": 8}
    (found,) = files(ok(complete(**fields)))
    values = found["0.probe.0"][1:].tolist()
    limit = sorted(values)[-2]  # the largest reading ends it
    stop = {"probe": "probe", "above": limit}
    chunks = [json.loads(event) for event in data_events(complete(stream=True, stop_when=stop, **fields))[:-1]]
    read = [one for chunk in chunks for c in chunk["choices"] for one in c.get("readings", ())]
    assert [one["values"]["0"] for one in read[1:]] == pytest.approx(
        values[: values.index(max(values)) + 1], abs=TOLERANCE, rel=TOLERANCE
    )
    assert chunks[-1]["choices"][0]["stop_reason"] == "stop_when"


def test_validating_takes_no_room(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "capture": {"layers": [1]}, "capture_format": "download"}
    for _ in range(70):  # more than are kept at once
        assert "download" not in ok(http.post("/v1/steering/validate", json=body))["plan"]


def test_messages_and_stop_strings(chat: Post, complete: Post, reference: Reference) -> None:
    answer = ok(chat("Why so?", capture={"layers": [0], "where": {"messages": [{"role": "user"}]}}, max_tokens=2))
    (found,) = files(answer)
    positions = found["0.positions"]
    assert len(positions) and positions.diff().eq(1).all() and len(positions) < answer["usage"]["prompt_tokens"]
    plain = ok(complete(max_tokens=12, ignore_eos=True))
    text = plain["choices"][0]["text"]
    answer = ok(complete(max_tokens=12, ignore_eos=True, stop=[text[len(text) // 2 :][:2]], capture={"layers": [1]}))
    num_fed = answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"] - 1
    assert len(files(answer)[0]["0.positions"]) == num_fed


def test_every_prompt_has_its_own(complete: Post, reference: Reference, tokenizer: PreTrainedTokenizerFast) -> None:
    """With an observer beside it, whose sequence reads nothing."""
    prompts = [PROMPT, "import os\n\nfrom"]
    fields: dict[str, Any] = {"capture": {"layers": [1]}, "steering": [PUSH], "explain": {"unsteered": True}}
    answer = ok(complete(prompts, n=2, temperature=1.0, seed=2, ignore_eos=True, max_tokens=5, **fields))
    for index, found in enumerate(files(answer)):
        ids = [*tokenizer.encode(prompts[index // 2]), *tokens(answer, index)[:-1]]
        expected = reference.streams(ids, PUSH["scale"])["resid_post.1"]
        torch.testing.assert_close(found["0.resid_post.1"], expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_nobody_is_told_who_does_not_ask(complete: Post) -> None:
    for fields in ({}, {"steering": [PUSH]}, {"steering": [PUSH], "capture": []}):
        said = ok(complete(**fields)).get("whipstaff", {})
        assert not {"capture", "captured"} & said.keys()


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "no layers": ({"capture": {"site": "resid_post"}}, 400, "capture.layers"),
    "no site": ({"capture": [{"site": "resid", "layers": [0]}]}, 400, "capture[0].site"),
    "a layer too far": ({"capture": [{"layers": [0]}, {"layers": [0, 99]}]}, 400, "capture[1].layers[1]"),
    "a layer below": ({"capture": [{"layers": [-1]}]}, 400, "capture[0].layers[0]"),
    "a layer twice": ({"capture": [{"layers": [1, 1]}]}, 400, "capture[0].layers[1]"),
    "before and after": (
        {"capture": [{"layers": [1]}, {"layers": [1], "edited": False}]},
        400,
        "capture[1].edited",
    ),
    "single tokens": ({"capture": [{"layers": [1], "where": {"tokens": [5]}}]}, 400, "capture[0].where.tokens"),
    "nothing": ({"capture": [{"layers": [1], "where": {"generation": [[50, 60]]}}]}, 400, "capture[0].where"),
    "no message": ({"capture": [{"layers": [1], "where": {"messages": [{}]}}]}, 400, "capture[0].where"),
    "no word": ({"capture": "all"}, 400, "capture"),
    "more": ({"capture": [{"layers": [1], "heads": [2]}]}, 400, "capture[0].heads"),
    "too many": ({"capture": [{"layers": [1]}] * 17}, 400, "capture"),
    "a search": ({"capture": [{"layers": [1]}], "decoding": BEAMS}, 400, "capture"),
    "the best of": ({"capture": [{"layers": [1]}], "best_of": 3, "temperature": 1}, 400, "capture"),
    "no probe": ({"capture": [{"probe": "no-such"}]}, 404, "capture[0].probe"),
    "no probe of that layer": ({"capture": {"probe": "probe", "layer": 2}}, 400, "capture.layer"),
    "heads that are not kept": ({"capture": {"attention": {"1": "all"}}}, 422, "capture.attention.1"),
    "heads that are not there": ({"capture": [{"attention": {"0": [4]}}]}, 400, "capture[0].attention.0[0]"),
    "no format": ({"capture": [{"layers": [1]}], "capture_format": "file"}, 400, "capture_format"),
    "a file of nothing": ({"capture_format": "download"}, 400, "capture_format"),
    "a file too large": (
        {"capture": [{"layers": "all"}] * 16, **FETCHED, "n": 128, "temperature": 1.0, "max_tokens": 400},
        422,
        "capture_format",
    ),
    "not hooked": ({"capture": [{"site": "router", "layers": [1]}]}, 422, "capture[0].site"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_captures_are_refused(complete: Post, case: str) -> None:
    fields, status, param = BAD[case]
    assert_refused(complete(**fields), status, param)
