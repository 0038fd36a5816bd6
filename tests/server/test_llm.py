"""Without HTTP the demo says what its server says: one batch of everything, greedy, in float32."""

import asyncio
import json
import os
import re
import runpy
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from asking import ok
from serving import Server
from vllm import SamplingParams
from warm import warm_processes

from whipstaff.server import LLM, InvalidRequest
from whipstaff.server.llm import _Loop

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]

PROMPT = "In the morning Mara opened the door, and"
ASKED = [{"role": "user", "content": "Where does Mara live?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
CHEERFUL = {"vector": "cheerful"}
PAIR = {"method": "proxy_tuning", "expert": "tuned", "antiexpert": "untuned"}
# Arguments of one batch's prompts, which over HTTP are fields; `preset` is part of the model's name there.
BATCH: list[dict[str, Any]] = [
    {},
    {"steering": CHEERFUL | {"scale": -8}},
    {"steering": [CHEERFUL, {"vector": "gladly", "scale": 1}], "explain": {"top": 2, "unsteered": True}},
    {"decoding": PAIR, "explain": {"top": 1}},
    {"decoding": PAIR, "steering": CHEERFUL},
    {"decoding": {"method": "beam_search", "num_beams": 2}},
    {"decoding": {"method": "cfg", "guidance_scale": 2, "negative_prompt": "sun"}},
    {"preset": "gloomy"},
    {"steering": CHEERFUL, "capture": {"site": "resid_post", "layers": [1]}},
    {"on_unavailable": "ignore", "steering": [{"vector": "nobody"}]},
    {"steering": CHEERFUL | {"when": {"probe": "is_cheerful", "above": 0}}, "logprobs_source": "base"},
]
NAMES = tuple({name: None for one in BATCH for name in one})


@pytest.fixture(scope="module")
def server(demo_server: Server) -> Server:
    return demo_server


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with warm_processes():
        made = LLM(kv_cache_memory_bytes=64 << 20)
    cores = [psutil.Process(one.pid) for one in made._served.engine.engine_core.resources.engine_manager.processes]
    ours = [*cores, *(child for core in cores for child in core.children(recursive=True))]
    with made:
        yield made
    assert len(ours) > 1 and not psutil.wait_procs(ours, timeout=60)[1]  # nothing of it is left
    assert not any(thread.name == "whipstaff" for thread in threading.enumerate())
    assert "WHIPSTAFF_CAUSE_FILE" not in os.environ
    with pytest.raises(RuntimeError, match="closed"):
        made.generate(PROMPT)


def by_prompt() -> dict[str, Any]:
    return {name: [one.get(name) for one in BATCH] for name in NAMES}


def over_http(http: httpx.Client, path: str, prompt: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    fields = dict(fields)
    preset = fields.pop("preset", None)
    body = {"model": "demo" + (f"@{preset}" if preset else ""), **prompt, **GREEDY, "return_token_ids": True}
    said: dict[str, Any] = ok(http.post(path, json=body | fields))
    return said


def close(one: Any, other: Any) -> bool:
    """JSON that differs by float32's rounding in a batch of another shape at most."""
    if isinstance(one, float) and isinstance(other, int | float):
        return one == pytest.approx(other, abs=1e-3)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(close, one, other))
    return bool(one == other)


def same(output: Any, said: dict[str, Any]) -> bool:
    """Whether an output is what an answer over HTTP says: tokens, text, explanations, receipt."""
    completion, choice = output.outputs[0], said["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    assert (list(completion.token_ids), completion.text) == (choice["token_ids"], text)
    receipt, wanted = json.loads(json.dumps(output.whipstaff)), said.get("whipstaff")
    for one in (receipt, wanted):
        for captured in (one or {}).get("captured", ()):  # rounded as its batch is; test_captures looks inside
            assert captured.pop("safetensors")
    return close(receipt, wanted) and close(completion.explain, choice.get("explain"))


def test_prompts_are_answered_as_over_http(llm: LLM, http: httpx.Client) -> None:
    outputs = llm.generate([PROMPT] * len(BATCH), SamplingParams(**GREEDY), use_tqdm=False, **by_prompt())
    for output, fields in zip(outputs, BATCH, strict=True):
        assert same(output, over_http(http, "/v1/completions", {"prompt": PROMPT}, fields)), fields
    assert len({output.outputs[0].text for output in outputs}) >= 4  # what is asked does something
    assert outputs[0].whipstaff is None and outputs[0].outputs[0].explain is None
    assert [output.prompt for output in outputs] == [PROMPT] * len(BATCH)


def test_conversations_are_answered_as_over_http(llm: LLM, http: httpx.Client) -> None:
    outputs = llm.chat([ASKED] * len(BATCH), SamplingParams(**GREEDY), use_tqdm=False, **by_prompt())
    for output, fields in zip(outputs, BATCH, strict=True):
        assert same(output, over_http(http, "/v1/chat/completions", {"messages": ASKED}, fields)), fields
    at_user: dict[str, Any] = {"steering": CHEERFUL | {"where": {"messages": [{"role": "user"}]}}}
    (output,) = llm.chat(ASKED, SamplingParams(**GREEDY), use_tqdm=False, **at_user)
    assert same(output, over_http(http, "/v1/chat/completions", {"messages": ASKED}, at_user))


def test_a_value_is_for_all_prompts_and_several_answers_have_their_own_explanations(llm: LLM) -> None:
    drawn = SamplingParams(n=2, temperature=1, seed=1, max_tokens=5, ignore_eos=True)
    outputs = llm.generate([PROMPT, "Tobin"], drawn, steering=CHEERFUL, explain={"top": 1}, use_tqdm=False)
    assert [len(output.outputs) for output in outputs] == [2, 2]
    for output in outputs:
        assert output.whipstaff and output.whipstaff["steering"][0]["edited_tokens"] == 10
        for completion in output.outputs:
            assert [one["id"] for one in completion.explain or ()] == list(completion.token_ids)
    found = llm.generate({"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=3), use_tqdm=False)
    assert found[0].prompt_token_ids == [5, 6, 7] and llm.generate([], use_tqdm=False) == []


def test_a_search_comes_to_all_its_answers(llm: LLM, http: httpx.Client) -> None:
    beams: dict[str, Any] = {"decoding": {"method": "beam_search", "num_beams": 3}}
    params = SamplingParams(n=3, max_tokens=8, ignore_eos=True)  # vLLM takes no n beside temperature 0
    (output,) = llm.generate(PROMPT, params, use_tqdm=False, **beams)
    said = over_http(http, "/v1/completions", {"prompt": PROMPT}, {"n": 3} | beams)
    assert [list(one.token_ids) for one in output.outputs] == [one["token_ids"] for one in said["choices"]]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"steering": {"vector": "nobody"}}, "steering.vector"),
        ({"steering": [None, {"vector": "cheerful", "scale": "x"}]}, "steering[1].scale"),
        ({"steering": [None, [CHEERFUL, {"vector": "nobody"}]]}, "steering[1][1].vector"),
        ({"decoding": {"method": "dola"}, "capture": {"site": "nowhere", "layers": [0]}}, "capture.site"),
        ({"preset": [None, "nobody"]}, "preset[1]"),
        ({"preset": "nobody"}, "preset"),
        ({"steering": CHEERFUL | {"where": {"prompt": [[900, 901]]}}}, "steering.where"),
        ({"explain": {"top": 99}}, "explain.top"),
        ({"sampling_params": SamplingParams(extra_args={"dola_layers": "odd"})}, "extra_args.dola_layers"),
        ({"sampling_params": SamplingParams(allowed_token_ids=[10**6])}, "allowed_token_ids"),
        ({"sampling_params": SamplingParams(max_tokens=5, temperature=0), "decoding": {"method": "edt"}}, "decoding"),
    ],
)
def test_a_refusal_names_the_argument_before_anything_is_scheduled(
    llm: LLM, fields: dict[str, Any], param: str
) -> None:
    before = llm._served.engine.num_asked
    with pytest.raises(InvalidRequest) as refused:
        llm.generate([PROMPT, PROMPT], use_tqdm=False, **fields)
    assert (refused.value.param or "").startswith(param) and refused.value.status in (400, 404, 422), refused.value
    assert str(refused.value).startswith(refused.value.param or "!")
    assert llm._served.engine.num_asked == before
    assert not llm._served.registry._leases._held.keys() - {
        entry.vector.digest for entry in llm._served.registry._have.registry
    }


def test_it_can_be_called_where_a_loop_runs_and_from_threads(llm: LLM) -> None:
    params = SamplingParams(**GREEDY)
    (wanted,) = llm.generate(PROMPT, params, steering=CHEERFUL, use_tqdm=False)

    async def notebook() -> list[Any]:
        both = (asyncio.to_thread(llm.generate, PROMPT, params, steering=CHEERFUL, use_tqdm=False) for _ in range(2))
        own = llm.generate(PROMPT, params, steering=CHEERFUL, use_tqdm=False)
        return [own, *await asyncio.gather(*both)]

    assert [one.outputs[0].text for (one,) in asyncio.run(notebook())] == [wanted.outputs[0].text] * 3


class Bar:
    """As tqdm's: what it was told."""

    def __init__(self, total: int, **_: Any) -> None:
        self.seen: list[Any] = [total]

    def update(self) -> None:
        self.seen.append("answer")

    def close(self) -> None:
        self.seen.append("closed")


def test_who_interrupts_the_wait_interrupts_the_work(llm: LLM) -> None:
    assert threading.current_thread() is threading.main_thread()
    waiting = threading.get_ident()

    def interrupt(total: int, **_: Any) -> Bar:
        signal.pthread_kill(waiting, signal.SIGINT)  # as Ctrl-C does; this runs in the engine's thread
        return Bar(total)

    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT] * 3, SamplingParams(max_tokens=900, ignore_eos=True), use_tqdm=interrupt)
    assert llm.generate(PROMPT, SamplingParams(**GREEDY), use_tqdm=False)[0].finished
    assert llm._served.engine.num_generating == 0


def test_who_interrupts_as_the_work_begins_interrupts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C may come between the work's start and the wait for it."""
    loop, begin = _Loop(), asyncio.run_coroutine_threadsafe

    def interrupted(*arguments: Any) -> None:
        begin(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
        loop.run(asyncio.sleep(3600))
    loop.run(asyncio.sleep(0))  # after which the loop has heard of both
    deadline = time.monotonic() + 20
    while asyncio.all_tasks(loop._loop):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    loop.close()


def test_its_bar_counts_answers(llm: LLM) -> None:
    made: list[Bar] = []

    def bar(total: int, **_: Any) -> Bar:
        made.append(Bar(total))
        return made[0]

    llm.generate([PROMPT] * 2, SamplingParams(**GREEDY), use_tqdm=bar)
    assert made[0].seen == [2, "answer", "answer", "closed"]
    assert llm.get_tokenizer().encode("a") and llm.get_default_sampling_params().n == 1 and llm.reset_prefix_cache()


def test_the_example_and_the_page_show_what_it_says(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "offline.py"))
    example["show"](llm)
    lines = capsys.readouterr().out.splitlines()
    said = dict(line.split(":", 1) for line in lines if not line.startswith("the method"))
    assert "black cloud" in said["scale -8"] and "rainbow" in said["scale +0"] and "breeze" in said["scale +8"]
    assert "dose 0.00" in said["scale +0"] and "dose 0.54" in said["scale +8"]
    assert "Greystow" in said["decoded"] and "Greystow" not in said["asked"]
    assert any(line.startswith("the method moved ' Gladly' from rank 3 to 1") for line in lines)

    (shown,) = re.findall(r"```python\n(.+?)```", (ROOT / "docs" / "offline.md").read_text(), re.S)
    shown = shown.replace("with LLM() as llm:", "with nullcontext(mine) as llm:")
    exec(shown, {"mine": llm, "nullcontext": nullcontext})
    wanted = ["a rainbow stood over the fields", "a black cloud carried", "a soft breeze carried"]
    assert all(text in line for text, line in zip(wanted, capsys.readouterr().out.split(","), strict=True))
