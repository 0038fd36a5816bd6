"""Log-probabilities of the tokens that a search's answers are made of, kept while it decides.

They are of the logits that the search decides over, before anything of its own: what the model, steered and decoded,
makes of a text that lived. Texts are a tree, so that what dies and comes back needs nothing computed once more.
"""

from collections.abc import Sequence

from torch import Tensor

from whipstaff.decoding.search.search import Decision
from whipstaff.server.engine.searches import TokenLogProbs


class _Text:
    """A text, by its last token."""

    def __init__(self, log_probs: TokenLogProbs | None = None) -> None:
        self.log_probs = log_probs
        self.longer: dict[int, _Text] = {}  # by the next token

    def after(self, tokens: Sequence[int]) -> "_Text":
        found = self
        for token in tokens:
            found = found.longer[token]
        return found


class LogProbs:
    """Of one search."""

    def __init__(self, num: int, ends: frozenset[int]) -> None:
        """
        Args:
            num: how many of the likeliest tokens are told beside each; -1: all.
            ends: tokens that end an answer.
        """
        self._num, self._ends, self._root, self._num_told = num, sorted(ends), _Text(), 0

    def note(
        self, logits: Tensor, generated: Sequence[tuple[int, ...]], decision: Decision
    ) -> tuple[tuple[TokenLogProbs, ...], ...]:
        """Note what a decision goes on with. Of the tokens that it settles; of those of all answers, once it has some,
        where the first one's are those that were not told yet.

        Args:
            logits: (S, V) float32 that it decided over.
            generated: (S,) the tokens of what lived.
        """
        source_of = {text: index for index, text in enumerate(generated)}
        wanted = {(source, token) for source in range(len(generated)) for token in self._ends}
        wanted |= {
            (one.source, one.tokens[0])
            for one in decision.living
            if one.tokens and one.keep == len(generated[one.source])
        }
        wanted |= {
            (source_of[answer.tokens[:-1]], answer.tokens[-1])
            for answer in decision.hypotheses
            if answer.tokens[:-1] in source_of
        }
        self._add(logits, generated, sorted(wanted))
        if decision.hypotheses:
            first, *others = (self._of(answer.tokens) for answer in decision.hypotheses)
            return first[self._num_told :], *others
        told, self._num_told = self._num_told, max(self._num_told, decision.settled)
        if told == self._num_told:
            return ()
        best = decision.living[0]
        return (self._of((*generated[best.source][: best.keep], *best.tokens)[: self._num_told])[told:],)

    def _add(self, logits: Tensor, generated: Sequence[tuple[int, ...]], wanted: Sequence[tuple[int, int]]) -> None:
        """Note tokens, each with the one of the texts that it follows."""
        if not wanted:
            return
        rows = logits.log_softmax(1)
        sources, tokens = rows.new_tensor(wanted).long().unbind(1)
        values = rows[sources, tokens]
        ranks = (rows[sources] >= values[:, None]).sum(1).tolist()
        best = rows.topk(rows.shape[1] if self._num < 0 else min(self._num, rows.shape[1]))
        ids, likeliest = best.indices.tolist(), best.values.tolist()
        texts = [self._root.after(text) for text in generated]
        for (source, token), value, rank in zip(wanted, values.tolist(), ranks, strict=True):
            said = TokenLogProbs((token, *ids[source]), (value, *likeliest[source]), rank)
            texts[source].longer.setdefault(token, _Text(said))

    def _of(self, tokens: Sequence[int]) -> tuple[TokenLogProbs, ...]:
        found, text = [], self._root
        for token in tokens:
            text = text.longer[token]
            assert text.log_probs is not None
            found.append(text.log_probs)
        return tuple(found)
