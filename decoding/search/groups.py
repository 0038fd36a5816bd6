"""Beams in groups that avoid one another's tokens: diverse beam search, Vijayakumar et al. 2018, arXiv:1610.02424.

As transformers had it to version 4 and has it now as `transformers-community/group-beam-search`. Groups choose one
after the other, and of each token the ones after take `diversity_penalty` for every beam before that has just chosen
it. Each group keeps its own answers, as many as it has beams, in the older way: at the last token all its beams are
answers, and whether a group can still improve is judged by its best continuation, even one that ends an answer. A group
that is done waits for the others. There it goes on to choose the padding token, which the others then avoid; here it
chooses nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from whipstaff.decoding.search.beams import Candidate, Rules, best_candidates, num_shared
from whipstaff.decoding.search.search import Continuation, Decision, Hypothesis, Living, Search, Steps


@dataclass(frozen=True)
class _Group:
    """Some of the beams."""

    rules: Rules  # of the group alone
    scores: tuple[float, ...] = (0.0,)
    answers: tuple[Hypothesis, ...] = ()  # in the order in which they were found
    is_done: bool = False

    def advance(
        self, log_probs: torch.Tensor, generated: Sequence[Sequence[int]]
    ) -> tuple["_Group", Sequence[Candidate]]:
        """The group one token later, and what its beams chose: sources count within it."""
        rules, num_tokens = self.rules, len(generated[0]) + 1
        totals = log_probs + log_probs.new_tensor(self.scores)[:, None]
        candidates = best_candidates(totals, rules.num_candidates)
        running = [one for one in candidates if one.token not in rules.eos][: rules.num_beams]
        answers = self.answers
        for one in candidates[: rules.num_beams]:
            if one.token in rules.eos:
                answers = _with(answers, rules.answer(one, generated), rules.num_beams)
        is_done = not running or self._is_done(answers, candidates[0].score, num_tokens)
        if num_tokens >= rules.max_tokens and not is_done:
            for one in running:
                answers = _with(answers, rules.answer(one, generated), rules.num_beams)
            is_done = True
        return replace(self, scores=tuple(one.score for one in running), answers=answers, is_done=is_done), running

    def answers_now(self, generated: Sequence[Sequence[int]]) -> tuple[Hypothesis, ...]:
        """The answers where the beams are cut off."""
        answers = self.answers
        for one in self.rules.cut(generated, self.scores):
            answers = _with(answers, one, self.rules.num_beams)
        return answers

    def _is_done(self, answers: Sequence[Hypothesis], best: float, num_tokens: int) -> bool:
        if len(answers) < self.rules.num_beams:
            return False
        worst = min(answer.score for answer in answers)
        return self.rules.early_stopping is True or worst >= self.rules.best_possible(best, num_tokens)


def _with(answers: tuple[Hypothesis, ...], answer: Hypothesis, most: int) -> tuple[Hypothesis, ...]:
    """Answers with one more, and without the worst where there are too many, the first of equal ones."""
    found = [*answers, answer]
    if len(found) > most:
        found.remove(min(found, key=lambda one: one.score))
    return tuple(found)


class BeamGroups(Search):
    """Groups on their way. The living sequences are the beams of the first group that is not done, then the next's."""

    def __init__(self, rules: Rules, num_groups: int, diversity_penalty: float) -> None:
        own = replace(rules, num_beams=rules.num_beams // num_groups)
        self._groups, self._penalty, self._settled = [_Group(own)] * num_groups, diversity_penalty, 0

    def step(self, living: Living) -> Steps:
        log_probs, generated = living.logits.log_softmax(1), living.generated
        avoided = torch.zeros_like(log_probs[0])
        is_first, start = not generated[0], 0
        lives: list[Candidate] = []
        for index, group in enumerate(self._groups):
            if group.is_done:
                continue
            own = slice(0, 1) if is_first else slice(start, start + len(group.scores))
            self._groups[index], running = group.advance(log_probs[own] - self._penalty * avoided, generated[own])
            if not self._groups[index].is_done:
                lives += [one._replace(source=own.start + one.source) for one in running]
            avoided += torch.bincount(avoided.new_tensor([one.token for one in running]).long(), minlength=len(avoided))
            start += len(group.scores)
        answers = [answer for group in self._groups for answer in group.answers]
        if not lives:
            return Decision(hypotheses=_ranked(answers))
        texts = [(*generated[one.source], one.token) for one in lives]
        self._settled = num_shared([*texts, *(answer.tokens for answer in answers)], self._settled)
        return Decision(
            tuple(Continuation(one.source, len(generated[one.source]), (one.token,)) for one in lives),
            settled=self._settled,
        )
        yield  # nothing is tried

    def stop(self, living: Living) -> Decision:
        answers, start = list[Hypothesis](), 0
        for group in self._groups:
            num = 0 if group.is_done else len(group.scores)
            answers += group.answers_now(living.generated[start : start + num]) if num else group.answers
            start += num
        return Decision(hypotheses=_ranked(answers))


def _ranked(answers: Sequence[Hypothesis]) -> tuple[Hypothesis, ...]:
    """The answers of all groups in turn, best first; of equal ones the last, as there."""
    return tuple(sorted(reversed(answers), key=lambda answer: -answer.score))
