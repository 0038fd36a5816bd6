"""What searches cost: against transformers, against the plain sequences that they are made of, and beside neighbours.

    python benchmarks/search.py [--model PATH | --hidden N --layers N] [--requests N] [--rounds N] [--minutes N]
        [--compiled]

In every round ways take turns on one engine, what is measured between two measurements of what it is compared with
(A B A), and then transformers; ratios are formed within a round, of seconds and of CPU time (of all processes; what
waits by spinning counts). At last a second engine starts, without what searches need, and both are asked for plain
requests alone ("idle"). There are fewer rounds than asked for where they would take too long. All requests of a wave
are there at once. Prompts have 32 tokens, answers 48, and prefix caching is off, so that every sequence is computed.

On transformers one request runs after the other. Beam search is its own `generate`. OPERA is the authors' loop with a
cache of keys and values: a pass for the beams and one per candidate, all with attention written out (eager), beams
re-ordered in the cache, and the whole texts computed anew where the beams go back. In favour of that loop, a tried
token is cut off the cache again instead of tried on a copy, and what is decided between passes is decided by our own
code. Each runs with one thread and with all, and the faster counts.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from load import HIDDEN, LAYERS, MAX_TOKENS, PROMPT_LEN, Job, beside, cpu_seconds, make_model, prompt, run
from transformers import AutoModelForCausalLM, DynamicCache
from vllm.engine.arg_utils import AsyncEngineArgs

from whipstaff.decoding.methods.opera_lite import OperaLite, OperaLiteParams
from whipstaff.decoding.plan import DecodingPlan, Rewrite, SearchPlan
from whipstaff.decoding.search.beam_search import BeamSearchParams
from whipstaff.decoding.search.opera import Opera, OperaSetting
from whipstaff.decoding.search.search import Decision, Living, Search, SearchFacts, Tried
from whipstaff.server.engine.frontend.launch import Engine, Setup, start
from whipstaff.server.plan import RequestPlan

BEAMS = 4
WHOLE = ((1, PROMPT_LEN),)  # the prompt without its first token
OPERA = OperaSetting(trusted=WHOLE)  # 5 beams, 5 candidates
OPERA_LITE = OperaLite().setting(**OperaLiteParams().model_dump(exclude={"span"}), span=WHOLE)
WIDTH = OPERA.beams * (1 + OPERA.candidates)  # sequences whose next token a step of OPERA computes
PLANS = {
    "beam search": RequestPlan(
        decoding=DecodingPlan(
            search=SearchPlan("beam_search", BeamSearchParams(num_beams=BEAMS).model_dump_json(), BEAMS)
        )
    ),
    "opera": RequestPlan(decoding=DecodingPlan(search=SearchPlan("opera", OPERA.model_dump_json(), OPERA.beams))),
    "opera_lite": RequestPlan(decoding=DecodingPlan(rewrites=(Rewrite("opera_lite", OPERA_LITE.model_dump_json()),))),
}
COSTS = {"beam search": (BEAMS, 1.15), "opera": (WIDTH, 1.5), "opera_lite": (1, 1.3)}  # plain sequences, and the bar
MIN_GAIN, MIN_NEIGHBOURS, MIN_IDLE = 5.0, 0.95, 0.97  # bars
ROUNDS_SHARE = 0.8  # of the time that is left once the first engine is warm; then a second one starts


class Loop:
    """A search over a transformers model that keeps keys and values."""

    def __init__(self, model: Any, search: Search, prompt: Sequence[int]) -> None:
        self.model, self.search, self.prompt = model, search, prompt
        self.cache = DynamicCache()

    @torch.no_grad()
    def run(self) -> tuple[int, ...]:
        """The best answer."""
        texts: list[tuple[int, ...]] = [()]
        logits, attention = self._pass([list(self.prompt)])
        while True:
            decision = self._decide(Living(texts, logits, attention=attention))
            if decision.hypotheses:
                return decision.hypotheses[0].tokens
            longer = [(*texts[one.source][: one.keep], *one.tokens) for one in decision.living]
            if all(one.keep == len(texts[one.source]) and len(one.tokens) == 1 for one in decision.living):
                self.cache.reorder_cache(torch.tensor([one.source for one in decision.living]))
                logits, attention = self._pass([[text[-1]] for text in longer])
            else:
                self.cache = DynamicCache()
                logits, attention = self._pass([[*self.prompt, *text] for text in longer])
            texts = longer

    def _decide(self, living: Living) -> Decision:
        steps = self.search.step(living)
        try:
            tokens = next(steps)
            while True:
                found = self._pass(tokens[:, None].tolist())
                self.cache.crop(-1)
                tokens = steps.send(Tried(*found))
        except StopIteration as stop:
            decision: Decision = stop.value
            return decision

    def _pass(self, tokens: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(S, V) logits, (S, C) attention of the last token of each."""
        ids = torch.tensor(tokens)
        out = self.model(ids, past_key_values=self.cache, use_cache=True, output_attentions=True, logits_to_keep=1)
        return out.logits[:, -1], out.attentions[-1][:, :, -1].amax(1)


class Spent(NamedTuple):
    """What some work took."""

    seconds: float
    cpu: float  # seconds of CPU time

    def of(self, other: "Spent") -> "Spent":
        return Spent(self.seconds / other.seconds, self.cpu / other.cpu)


def mean(first: Spent, second: Spent) -> Spent:
    return Spent((first.seconds + second.seconds) / 2, (first.cpu + second.cpu) / 2)


async def spent(work: Awaitable[float]) -> Spent:
    """What it takes; the work says how many seconds of that count."""
    before = cpu_seconds()
    seconds = await work
    return Spent(seconds, cpu_seconds() - before)


@contextmanager
def running(options: argparse.Namespace, setup: Setup) -> Iterator[Engine]:
    args = AsyncEngineArgs(
        model=options.model,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=options.requests * (WIDTH + 2),
        enable_prefix_caching=False,
        enforce_eager=not options.compiled,
        kv_cache_memory_bytes=1 << 30,
        skip_tokenizer_init=True,
    )
    engine = start(args, setup)
    try:
        yield engine
    finally:
        engine.shutdown()


class Bench:
    """One run."""

    def __init__(self, options: argparse.Namespace, engine: Engine) -> None:
        self.engine, self.num = engine, options.requests
        self.vocabulary = engine.model_config.get_vocab_size()
        self.ratios: dict[str, list[Spent]] = {}

    def jobs(self, name: str) -> list[Job]:
        return [Job([prompt(index, PROMPT_LEN, self.vocabulary)], PLANS[name]) for index in range(self.num)]

    def plain(self, width: int) -> list[Job]:
        """As many requests at once, of so many sequences each."""
        return [
            Job([prompt(self.num * other + index, PROMPT_LEN, self.vocabulary) for other in range(width)])
            for index in range(self.num)
        ]

    async def run(self, jobs: Sequence[Job], engine: Engine | None = None) -> Spent:
        return await spent(run(engine or self.engine, jobs, self.num))

    async def beside(self, others: Sequence[Job]) -> Spent:
        """Plain requests, while others keep the engine busy."""
        return await spent(beside(self.engine, self.plain(1) * 2, others, self.num))

    async def round(self) -> dict[str, Spent]:
        """What every search takes."""
        found = {}
        for name, (width, _) in COSTS.items():
            jobs, plain = self.jobs(name), self.plain(width)
            before = await self.run(plain)
            first, second = await self.run(jobs), await self.run(jobs)
            found[name] = mean(first, second)
            self.note(f"{name}: cost of {width} plain", found[name].of(mean(before, await self.run(plain))))
        for name, (width, _) in COSTS.items():
            if width > 1:
                plain = self.plain(width)
                before, during = await self.beside(plain), await self.beside(self.jobs(name))
                self.note(f"{name}: neighbours", mean(before, await self.beside(plain)).of(during))
        return found

    async def idle(self, other: Engine) -> None:
        """What an engine takes that could search, beside one that could not."""
        plain = self.plain(4)
        before = await self.run(plain, other)
        during = mean(await self.run(plain), await self.run(plain))
        self.note("idle", mean(before, await self.run(plain, other)).of(during))

    def note(self, name: str, value: Spent) -> None:
        self.ratios.setdefault(name, []).append(value)
        print(json.dumps({"what": name, "round": len(self.ratios[name]), **value._asdict()}), flush=True)


class Loops:
    """The same on transformers, one request after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        fused, eager = (
            AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation=way).eval()
            for way in ("sdpa", "eager")
        )
        self.vocabulary = fused.config.vocab_size
        self.loops: dict[str, Callable[[int], int]] = {
            "beam search": lambda index: self._generate(fused, index),
            "opera": lambda index: self._opera(eager, index),
        }

    def per_request(self, name: str, num: int) -> Spent:
        """What one takes of so many, by one thread or by all, whichever is faster."""
        answer, num_threads, found = self.loops[name], torch.get_num_threads(), []
        for threads in {1, num_threads}:
            torch.set_num_threads(threads)
            started, cpu = time.perf_counter(), time.process_time()
            lengths = list(map(answer, range(num)))
            assert lengths == [MAX_TOKENS] * num
            found.append(Spent((time.perf_counter() - started) / num, (time.process_time() - cpu) / num))
        torch.set_num_threads(num_threads)
        return min(found)

    def _generate(self, model: Any, index: int) -> int:
        ids = torch.tensor([prompt(index, PROMPT_LEN, self.vocabulary)])
        lengths = {"max_new_tokens": MAX_TOKENS, "min_new_tokens": MAX_TOKENS}
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=BEAMS, do_sample=False, **lengths)
        return len(answer[0]) - PROMPT_LEN

    def _opera(self, model: Any, index: int) -> int:
        search = Opera().start(OPERA, SearchFacts(PROMPT_LEN, MAX_TOKENS, frozenset()))
        return len(Loop(model, search, prompt(index, PROMPT_LEN, self.vocabulary)).run())


async def measure(options: argparse.Namespace) -> dict[str, list[Spent]]:
    """By what is compared, the ratios of every round."""
    deadline = time.monotonic() + 60 * options.minutes
    loops = Loops(options)
    seats = options.requests * max(OPERA.beams, BEAMS)
    searching = Setup(lookahead=True, attention_rows=True, max_search_seqs=seats)
    with running(options, searching) as engine:
        bench = Bench(options, engine)
        for name in PLANS:  # warms up
            await bench.run(bench.jobs(name))
        await bench.run(bench.plain(WIDTH))
        for name in loops.loops:
            loops.per_request(name, 1)
        for _ in within(options.rounds, ROUNDS_SHARE * (deadline - time.monotonic())):
            for name, taken in (await bench.round()).items():
                if name in loops.loops:
                    own = Spent(taken.seconds / bench.num, taken.cpu / bench.num)
                    bench.note(f"{name}: of transformers", loops.per_request(name, options.loops).of(own))
        with running(options, Setup()) as other:
            await bench.run(bench.plain(4), other)
            for _ in within(options.rounds, deadline - time.monotonic()):
                await bench.idle(other)
        return bench.ratios


def within(num: int, seconds: float) -> Iterator[int]:
    """Rounds, at least one: no more than `num`, and none that would not end in time if it took as long as the longest
    before."""
    started, longest = time.monotonic(), 0.0
    for index in range(num):
        began = time.monotonic()
        if index and began + longest > started + seconds:
            return
        yield index
        longest = max(longest, time.monotonic() - began)


def bars() -> dict[str, tuple[float, bool]]:
    """By what is compared, the bar, and whether more is better."""
    found = {f"{name}: cost of {width} plain": (bar, False) for name, (width, bar) in COSTS.items()}
    for name in ("beam search", "opera"):
        found |= {f"{name}: neighbours": (MIN_NEIGHBOURS, True), f"{name}: of transformers": (MIN_GAIN, True)}
    return found | {"idle": (MIN_IDLE, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: a random Llama that the script makes")
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--requests", type=int, default=4, help="at once")
    parser.add_argument("--loops", type=int, default=2, help="requests of each of transformers' turns")
    parser.add_argument("--rounds", type=int, default=3, help="at most")
    parser.add_argument("--minutes", type=float, default=12, help="no round begins that would end later")
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.model = options.model or make_model(folder, hidden=options.hidden, layers=options.layers)
        ratios = asyncio.run(measure(options))
    setup = vars(options) | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for name, (bar, is_more_better) in bars().items():
        seconds, cpu = zip(*ratios[name], strict=True)
        median = statistics.median(seconds)
        print(json.dumps({**setup, "what": name, "median": median, "rounds": seconds, "cpu": cpu}), flush=True)
        met = "met" if (median >= bar if is_more_better else median <= bar) else "MISSED"
        spread = f"{median:8.3f} ({min(seconds):.3f} to {max(seconds):.3f}), CPU {statistics.median(cpu):.3f}"
        print(f"{name:36} {spread:44} bar {bar} {met}", file=sys.stderr)


if __name__ == "__main__":
    main()
