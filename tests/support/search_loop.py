"""A search driven over a transformers model: an engine to hold the server's against, and to try methods on.

Nothing is cached: whatever a decision keeps is computed anew, and every token that is tried is a pass of its own. So
nothing can be left behind where sequences fork, die and shrink.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whipstaff.decoding.search.search import (
    Decision,
    Hypothesis,
    Living,
    Search,
    SearchFacts,
    SearchMethod,
    Steps,
    Tried,
)

Rewrite = Callable[[Sequence[Sequence[int]], Tensor], Tensor]  # (S,) whole texts, (S, V) logits -> (S, V)


class Seen(NamedTuple):
    """What the model made of S texts: of the last token of each."""

    logits: Tensor  # (S, V)
    hidden: Tensor  # (S, H)
    attention: Tensor  # (S, C); as in `Living`


class Noise:
    """What makes of what a model computes what another implementation might compute."""

    def __init__(self, scale: float = 0.0, seed: int = 0) -> None:
        """`scale` is relative to numbers of size 1; attention is off by a share of itself."""
        self._scale, self._random = scale, torch.Generator().manual_seed(seed)

    def on(self, logits: Tensor, hidden: Tensor, attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self._scale:
            return logits, hidden, attention
        return logits + self._of(logits), hidden + self._of(hidden), attention * (1 + self._of(attention))

    def _of(self, numbers: Tensor) -> Tensor:
        return self._scale * torch.randn(numbers.shape, generator=self._random)


@dataclass
class Ran:
    """A whole search."""

    hypotheses: Sequence[Hypothesis]
    decisions: list[Decision] = field(default_factory=list)
    texts: list[list[tuple[int, ...]]] = field(default_factory=list)  # that lived at first, and on after each decision

    @property
    def best(self) -> tuple[int, ...]:
        return self.hypotheses[0].tokens

    def count(self, name: str) -> int:
        return sum(decision.counts.get(name, 0) for decision in self.decisions)


class Asked(NamedTuple):
    """One request."""

    setting: Any
    prompt: Sequence[int]
    max_tokens: int
    eos: Sequence[int] = ()
    heads: Mapping[str, Mapping[str, Tensor]] = {}
    seed: int = 0
    num_steps: int | None = None  # after which it has to end; None: when it likes


class Loop:
    """A model that runs searches. With `reads_attention` it must be loaded with eager attention."""

    def __init__(
        self,
        model: Any,
        reads_attention: bool = False,
        rewrite: Rewrite | None = None,
        noise: Noise | None = None,
    ) -> None:
        self.model, self.reads_attention, self.rewrite = model, reads_attention, rewrite
        self.noise = noise or Noise()

    def run(self, method: SearchMethod[Any], *asked: Any, **more: Any) -> Ran:
        """One request, as `Asked` has it."""
        return self.run_all(method, [Asked(*asked, **more)])[0]

    def run_all(self, method: SearchMethod[Any], asked: Sequence[Asked]) -> list[Ran]:
        """Many at once, all of one method."""
        facts = [SearchFacts(len(one.prompt), one.max_tokens, frozenset(one.eos), one.heads) for one in asked]
        searches = [method.start(one.setting, known) for one, known in zip(asked, facts, strict=True)]
        random = [torch.Generator().manual_seed(one.seed) for one in asked]
        ran = [Ran((), [], [[()]]) for _ in asked]
        while going := [r for r, one in enumerate(ran) if not one.hypotheses]:
            decisions = self.step(
                [searches[r] for r in going],
                [asked[r].prompt for r in going],
                [ran[r].texts[-1] for r in going],
                [random[r] for r in going],
                [len(ran[r].decisions) == asked[r].num_steps for r in going],
            )
            for r, decision in zip(going, decisions, strict=True):
                before = ran[r].texts[-1]
                texts = [(*before[one.source][: one.keep], *one.tokens) for one in decision.living]
                check(decision, texts, ran[r], method.num_sequences(asked[r].setting))
                assert len(decision.hypotheses) <= method.num_answers(asked[r].setting)
                ran[r].decisions.append(decision)
                ran[r].texts.append(texts)
                ran[r].hypotheses = decision.hypotheses
        return ran

    def step(
        self,
        searches: Sequence[Search],
        prompts: Sequence[Sequence[int]],
        texts: Sequence[Sequence[tuple[int, ...]]],
        random: Sequence[torch.Generator],
        are_last: Sequence[bool],
    ) -> list[Decision]:
        """One decision of each search; the last, where it has to be."""
        whole = [[[*prompt, *text] for text in own] for prompt, own in zip(prompts, texts, strict=True)]
        living = [
            Living(own, *seen, numbers) for own, seen, numbers in zip(texts, self.see_all(whole), random, strict=True)
        ]
        decisions = {
            r: search.stop(own)
            for r, (search, own, is_last) in enumerate(zip(searches, living, are_last, strict=True))
            if is_last
        }
        steps = {r: search.step(living[r]) for r, search in enumerate(searches) if r not in decisions}
        wanted = {r: found for r, step in steps.items() if (found := advance(step, None, r, decisions)) is not None}
        while wanted:
            for r, tokens in wanted.items():
                assert tokens.shape == (len(whole[r]),) and tokens.dtype == torch.int64
            fed = [
                [[*text, token] for text, token in zip(whole[r], tokens.tolist(), strict=True)]
                for r, tokens in wanted.items()
            ]
            tried = zip(wanted, self.see_all(fed), strict=True)
            wanted = {
                r: found
                for r, seen in tried
                if (found := advance(steps[r], Tried(seen.hidden, seen.attention), r, decisions)) is not None
            }
        return [decisions[r] for r in range(len(searches))]

    def see_all(self, texts: Sequence[Sequence[Sequence[int]]]) -> list[Seen]:
        """What the model makes of several requests' texts."""
        seen = self.see([text for own in texts for text in own])
        sizes = [len(own) for own in texts]
        parts = zip(*(torch.split(part, sizes) for part in (seen.logits, seen.hidden, seen.attention)), strict=True)
        return [
            Seen(logits, hidden, attention[:, : max(map(len, own))])
            for (logits, hidden, attention), own in zip(parts, texts, strict=True)
        ]

    @torch.no_grad()
    def see(self, texts: Sequence[Sequence[int]]) -> Seen:
        """Texts of one length pass the model together."""
        longest = max(map(len, texts))
        rows: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for length in {len(text) for text in texts}:
            index = [row for row, text in enumerate(texts) if len(text) == length]
            ids = torch.tensor([list(texts[row]) for row in index])
            out = self.model(
                ids,
                use_cache=False,
                output_hidden_states=True,
                output_attentions=self.reads_attention,
                logits_to_keep=1,
            )
            attention = torch.zeros(len(index), longest)
            if self.reads_attention:
                attention[:, :length] = out.attentions[-1][:, :, -1].amax(1)
            found = out.logits[:, -1].float(), out.hidden_states[-1][:, -1].float(), attention
            rows |= {row: (found[0][at], found[1][at], found[2][at]) for at, row in enumerate(index)}
        logits, hidden, looked = (torch.stack([rows[row][part] for row in range(len(texts))]) for part in range(3))
        return Seen(*self.noise.on(self.rewrite(texts, logits) if self.rewrite else logits, hidden, looked))


class JudgedLoop(Loop):
    """One in which hidden states are another model's."""

    def __init__(self, model: Any, judge: Any, rewrite: Rewrite | None = None) -> None:
        super().__init__(model, rewrite=rewrite)
        self.judge = Loop(judge)

    def see(self, texts: Sequence[Sequence[int]]) -> Seen:
        return super().see(texts)._replace(hidden=self.judge.see(texts).hidden)


def advance(steps: Steps, tried: Tried | None, request: int, decisions: dict[int, Decision]) -> Tensor | None:
    """The tokens that a step wants tried next; None once it has decided, which is noted."""
    try:
        return next(steps) if tried is None else steps.send(tried)
    except StopIteration as stop:
        decisions[request] = stop.value
        return None


def check(decision: Decision, texts: Sequence[Sequence[int]], ran: Ran, num_sequences: int) -> None:
    """What every search promises: not too many sequences, and that what is settled stays."""
    assert bool(decision.living) != bool(decision.hypotheses)
    assert len(texts) <= num_sequences
    before = ran.texts[-1]
    assert all(one.keep <= len(before[one.source]) and (one.keep or one.tokens) for one in decision.living)
    settled = before[0][: ran.decisions[-1].settled] if ran.decisions else ()
    assert not texts or len(settled) <= decision.settled <= len(texts[0])
    found = [answer.tokens for answer in decision.hypotheses] + [tuple(text) for text in texts[:1]]
    assert all(one[: len(settled)] == settled for one in found)


def of_vllm(model: Any, prompt: Sequence[int], params: Any, eos: int | None, length: int) -> list[Any]:
    """vLLM's loop, to its end: (tokens, score) with what ended an answer left out, as its clients get them."""
    beams: list[Any] = [((), 0.0)]
    completed: list[Any] = []
    for _ in range(length):
        candidates = []
        for text, total in beams:
            logits = Loop(model).see([[*prompt, *text]]).logits[0]
            best = logits.log_softmax(0).topk(2 * params.num_beams)
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                if token == eos:
                    completed.append((text, total + value))
                else:
                    candidates.append(((*text, token), total + value))
        beams = sorted(candidates, key=lambda one: -one[1])[: params.num_beams]
    scored = [
        (text, total / (len(prompt) + len(text)) ** params.length_penalty) for text, total in [*completed, *beams]
    ]
    return sorted(scored, key=lambda one: one[1], reverse=True)[: params.num_beams]
