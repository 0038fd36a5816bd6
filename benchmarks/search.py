"""What searches yield on transformers, one request after the other, as their authors published them.

    python benchmarks/search.py [--model PATH] [--requests N] [--rounds N]

Beam search is transformers' own `generate`. OPERA is the authors' loop with a cache of keys and values: a pass for the
beams and one per candidate, all with attention written out (eager), beams re-ordered in the cache, and the whole texts
computed anew where the beams go back. In favour of that loop, a tried token is cut off the cache again instead of tried
on a copy, and what is decided between passes is decided by our own code. Each runs with one thread and with all, and
the faster counts; medians of the rounds, and the lowest and highest.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from load import MAX_TOKENS, PROMPT_LEN, make_model
from transformers import AutoModelForCausalLM, DynamicCache

from whipstaff.decoding.search.opera import Opera, OperaSetting
from whipstaff.decoding.search.search import Decision, Living, Search, SearchFacts, Tried

BEAMS = 4
OPERA = OperaSetting()  # 5 beams, 5 candidates


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
                logits, attention = self._pass(tokens[:, None].tolist())
                self.cache.crop(-1)
                tokens = steps.send(Tried(logits, attention))
        except StopIteration as stop:
            decision: Decision = stop.value
            return decision

    def _pass(self, tokens: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(S, V) logits, (S, C) attention of the last token of each."""
        ids = torch.tensor(tokens)
        out = self.model(ids, past_key_values=self.cache, use_cache=True, output_attentions=True, logits_to_keep=1)
        return out.logits[:, -1], out.attentions[-1][:, :, -1].amax(1)


def prompt(index: int, vocabulary: int) -> list[int]:
    return [(7 * index + 13 * place) % (vocabulary - 3) + 3 for place in range(PROMPT_LEN)]


def generate(model: Any, index: int, num_beams: int) -> int:
    ids = torch.tensor([prompt(index, model.config.vocab_size)])
    lengths = {"max_new_tokens": MAX_TOKENS, "min_new_tokens": MAX_TOKENS}
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=num_beams, do_sample=False, **lengths)
    return len(answer[0]) - PROMPT_LEN


def opera(model: Any, index: int) -> int:
    search = Opera().start(OPERA.model_copy(update={"trusted": ((1, PROMPT_LEN),)}), facts())
    return len(Loop(model, search, prompt(index, model.config.vocab_size)).run())


def facts() -> SearchFacts:
    return SearchFacts(PROMPT_LEN, MAX_TOKENS, frozenset())


def rate(answer: Callable[[int], int], num: int) -> float:
    """Tokens per second, by one thread or by all, whichever is faster."""
    answer(0)  # warms up
    rates, num_threads = [], torch.get_num_threads()
    for threads in {1, num_threads}:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        rates.append(sum(map(answer, range(num))) / (time.perf_counter() - started))
    torch.set_num_threads(num_threads)
    return max(rates)


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """By loop, tokens per second in every round."""
    fused, eager = (
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation=attention).eval()
        for attention in ("sdpa", "eager")
    )
    loops: dict[str, Callable[[int], int]] = {
        "greedy": lambda index: generate(fused, index, 1),
        f"beam search, {BEAMS} beams": lambda index: generate(fused, index, BEAMS),
        f"opera, {OPERA.beams} beams, {OPERA.candidates} candidates": lambda index: opera(eager, index),
    }
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(options.rounds):
        for name, answer in loops.items():
            rates[name].append(rate(answer, options.requests))
            print(json.dumps({"what": name, "round": number + 1, "tokens_per_second": rates[name][-1]}), flush=True)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: a random Llama that the script makes")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.model = options.model or make_model(folder)
        rates = measure(options)
    setup = vars(options) | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for name, each in rates.items():
        median = statistics.median(each)
        print(json.dumps({"what": name, "median": median, "rounds": each, **setup}), flush=True)
        print(f"{name:40} {median:9.2f} tokens/s ({min(each):.2f} to {max(each):.2f})", file=sys.stderr)


if __name__ == "__main__":
    main()
