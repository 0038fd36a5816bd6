"""KCTS: a tree search for a text that a classifier finds grounded, token by token.

Choi et al. 2023, arXiv:2310.09044, as the authors' code does it. A node is a text; its value is f, the classifier's
probability of class 1 at its last token; its children are the k likeliest next tokens. A simulation walks from the
root, at each node to the child a with the largest

    q_a + exploration * p_a * sqrt(n) / (m_a + 1)        n visits of the node, m_a of the child, p_a its probability

and the first one that was never walked to becomes a node. Its f is averaged into the value of every node above, and q_a
is the child's value so far. After `simulations` of them the root's most visited child is said, and becomes the root
with what stands below it. The first of equal ones is taken everywhere.

Probabilities are of all tokens, after `temperature` and then `repetition_penalty`, of which the answer's own tokens are
penalised. Nothing is rolled out: f is read at the new node itself. What ends an answer has no children; walking there
again counts its f again. One sequence lives, and moves through the tree: what two nodes share is never computed twice
in a row.

The authors train the classifier with a LoRA adapter, which is off where the model says what comes next. `adapter` names
one: beside the sequence goes a second one with the same tokens under that adapter, of which f is read.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from whipstaff.decoding.prefix_classifier import classes
from whipstaff.decoding.search.beams import best_candidates, num_shared
from whipstaff.decoding.search.search import (
    Continuation,
    Decision,
    Hypothesis,
    Living,
    Search,
    SearchFacts,
    SearchMethod,
    SearchNeed,
    SearchParams,
    Steps,
)


class KctsParams(SearchParams):
    """The classifier, and how long and how widely is searched."""

    method: Literal["kcts"] = "kcts"
    classifier: str = Field(description="head of kind prefix_classifier")
    adapter: str | None = Field(
        None,
        description="LoRA adapter of this server, by which alone the classifier reads; none: the request's own model",
    )
    k: int = Field(50, ge=1, le=1024, description="children of a node")
    simulations: int = Field(50, ge=1, le=4096, description="per token")
    exploration: float = Field(
        3.0, ge=0, le=1e4, allow_inf_nan=False, description="c: how much unlikely values are tried"
    )
    temperature: float = Field(1.0, ge=0.01, le=100, allow_inf_nan=False, description="of the children's probabilities")
    repetition_penalty: float = Field(1.2, ge=0.01, le=100, allow_inf_nan=False, description="of the answer's tokens")


class Kcts(SearchMethod[KctsParams]):
    name, paper = "kcts", "Choi et al. 2023, arXiv:2310.09044"
    params = KctsParams
    head_fields: ClassVar[Mapping[str, str]] = {"classifier": "prefix_classifier"}
    needs: ClassVar[frozenset[SearchNeed]] = frozenset({"hidden"})
    adapter_field = "adapter"
    explains = True
    drafts = False  # what lives is where it looks

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> None:
        return None  # the classifier decides

    def num_sequences(self, params: KctsParams) -> int:
        return 1

    def num_computed(self, params: KctsParams) -> int:
        return params.simulations

    def start(self, setting: KctsParams, facts: SearchFacts) -> Search:
        return _Tree(setting, facts)


@dataclass
class _Node:
    """A text, and what is known of its children."""

    text: tuple[int, ...]
    parent: "_Node | None" = None
    slot: int = 0  # which child of its parent it is
    score: float = 0.0  # f
    value: float = 0.0
    visits: int = 1
    tokens: Sequence[int] = ()  # of its children, likeliest first; none where it ends an answer
    priors: Sequence[float] = ()
    values: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    children: dict[int, "_Node"] = field(default_factory=dict)

    def open(self, tokens: Sequence[int], priors: Sequence[float]) -> None:
        self.tokens, self.priors = tokens, priors
        self.values, self.counts = [0.0] * len(tokens), [0] * len(tokens)

    def best_slot(self, exploration: float) -> int:
        def promise(slot: int) -> float:
            hope = exploration * self.priors[slot] * math.sqrt(self.visits) / (self.counts[slot] + 1)
            return self.values[slot] + hope

        return max(range(len(self.tokens)), key=promise)


class _Tree(Search):
    def __init__(self, setting: KctsParams, facts: SearchFacts) -> None:
        self.setting, self.facts = setting, facts
        self.root = self.leaf = _Node(())  # the leaf is the node whose text the living sequence is
        self.simulations = 0  # since a token was said
        self.said: list[dict[str, Any]] = []  # in this step

    def step(self, living: Living) -> Steps:
        self._evaluate(living)
        self.said = []
        while (text := self._next()) is None:
            if self._say():
                return self._ended()
        keep = num_shared((text, living.generated[0]), 0)
        return Decision((Continuation(0, keep, text[keep:]),), settled=len(self.root.text), facts=self._facts())
        yield  # nothing is tried

    def stop(self, living: Living) -> Decision:
        """One more token is said of what was simulated."""
        self._evaluate(living)
        self.said = []
        self._say()
        return self._ended()

    def _ended(self) -> Decision:
        answer = self.root
        is_stop = bool(answer.text) and answer.text[-1] in self.facts.eos
        done = Hypothesis(answer.text, answer.score, "stop" if is_stop else "length")
        return Decision(hypotheses=(done,), facts=self._facts())

    def _facts(self) -> dict[str, Any]:
        return {"said": self.said} if self.said else {}

    def _evaluate(self, living: Living) -> None:
        """Make the leaf a node."""
        assert living.hidden is not None
        leaf = self.leaf
        if not self._ends(leaf.text):
            logits = self._penalised(living.logits[0], leaf.text)
            best = best_candidates(logits[None], self.setting.k)
            tokens = [one.token for one in best]
            leaf.open(tokens, logits.softmax(0)[tokens].tolist())
        if leaf.parent is not None:
            leaf.score = leaf.value = _grounded(self.facts.heads["classifier"], living.hidden[0])
            _back_up(leaf)

    def _ends(self, text: Sequence[int]) -> bool:
        room = self.facts.room
        return (bool(text) and text[-1] in self.facts.eos) or (room is not None and len(text) >= room)

    def _penalised(self, logits: Tensor, text: Sequence[int]) -> Tensor:
        logits = logits / self.setting.temperature
        said = sorted(set(text))
        penalty, own = self.setting.repetition_penalty, logits[said]
        logits[said] = torch.where(own > 0, own / penalty, own * penalty)
        return logits

    def _next(self) -> tuple[int, ...] | None:
        """Walk until a text has to be computed, and give it; None once there were simulations enough."""
        while self.simulations < self.setting.simulations:
            self.simulations += 1
            node = self.root
            while node.tokens:
                slot = node.best_slot(self.setting.exploration)
                if slot not in node.children:
                    self.leaf = node.children[slot] = _Node((*node.text, node.tokens[slot]), node, slot)
                    return self.leaf.text
                node = node.children[slot]
            _back_up(node)
        return None

    def _say(self) -> bool:
        """Move the root to its most visited child; whether that ends the answer."""
        root, self.simulations = self.root, 0
        if root.tokens:
            slot = max(range(len(root.tokens)), key=lambda slot: root.counts[slot])
            self.root = root.children[slot]
            self.root.parent = None
            self.said.append({"token": root.tokens[slot], "classifier": self.root.score, "visits": root.counts[slot]})
        return not self.root.tokens or len(self.root.text) >= self.facts.max_tokens


def _grounded(head: Mapping[str, Tensor], hidden: Tensor) -> float:
    """The probability of class 1 at a token."""
    return float(classes(hidden[None], head).softmax(1)[0, 1])


def _back_up(leaf: _Node) -> None:
    """Average a leaf's score into every node above it."""
    node = leaf
    while (parent := node.parent) is not None:
        parent.value = (parent.value * parent.visits + leaf.score) / (parent.visits + 1)
        parent.visits += 1
        parent.values[node.slot] = node.value
        parent.counts[node.slot] += 1
        node = parent
