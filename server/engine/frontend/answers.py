"""Answers of a request that are not just what the engine generates: those of a search, or the best of candidates."""

from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Protocol

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.logprobs import LogprobsProcessor

from whipstaff.decoding.method import Candidate
from whipstaff.decoding.search.beams import num_shared
from whipstaff.server.engine.searches import DRAFT_KEY, SEARCH_KEY, as_lists, stop_token
from whipstaff.server.plan import Computed

WORST = -1e9  # JSON has no infinities
Outputs = AsyncGenerator[Any, None]


class Answers(Protocol):
    """Makes the answers of one prompt."""

    def of(self, outputs: Outputs, tokenizer: Any) -> Outputs:
        """The outputs as they are answered; closing this closes `outputs`."""

    def explained(self, sequence: int, told: dict[str, Any]) -> None:
        """What the engine says of the next token of one of its sequences, or of the whole search."""


class SearchAnswers:
    """The best answer of a search is what the engine generates, as far as it settles; the others are told when the
    search is over, and come with its end.

    Where retractions are wanted, the text goes ahead of what is settled: to what lives first. Token ids do not.
    """

    def __init__(
        self,
        num: int,
        params: SamplingParams,
        note: Callable[[dict[str, Any]], None],
        retract: Callable[[int], None] | None = None,
    ) -> None:
        """
        Args:
            num: how many answers are wanted.
            params: by which the engine generates.
            note: called with what the search has come to, whenever that is told.
            retract: called with how many of the last characters are taken back; None: only what is settled is sent.
        """
        self._num, self._params, self._note, self._retract = num, params, note, retract
        self._record: Mapping[str, Any] = {}
        self._draft: Mapping[str, Any] = {}
        self._settled, self._shown, self._tokens = "", "", list[int]()  # text, text, tokens of the first

    def explained(self, _: int, told: dict[str, Any]) -> None:
        """What the engine says of the request."""
        self._draft = told.get(DRAFT_KEY, self._draft)
        if SEARCH_KEY in told:
            self._tell(told[SEARCH_KEY])

    async def of(self, outputs: Outputs, tokenizer: Any) -> Outputs:
        async with aclosing(outputs):
            async for output in outputs:
                if self._retract is not None and output.outputs:
                    self._go_ahead(output, tokenizer, self._retract)
                if output.finished:
                    output.outputs += self._further(output, tokenizer)
                    if "hypotheses" not in self._record:  # a text ended it, of which the engine knows nothing
                        self._tell({"counts": self._record.get("counts", {}), "ended_by": "stop"})
                yield output

    def _tell(self, record: Mapping[str, Any]) -> None:
        self._record = record
        self._note(dict(record))

    def _go_ahead(self, output: RequestOutput, tokenizer: Any, retract: Callable[[int], None]) -> None:
        """Let an output say what the text may become, after what no longer holds was taken back."""
        first, draft = output.outputs[0], self._draft
        self._settled, self._tokens = self._settled + first.text, [*self._tokens, *first.token_ids]
        if output.finished:
            wanted = self._settled
        elif draft and draft["settled"] == len(self._tokens):
            wanted = self._text([*self._tokens, *draft["tokens"]], False, output, tokenizer)
        else:
            wanted = self._shown
        num_kept = len(self._shown)
        if not wanted.startswith(self._shown):
            num_kept = num_shared((self._shown, wanted), 0)
            retract(len(self._shown) - num_kept)
        self._shown, first.text = wanted, wanted[num_kept:]

    def _further(self, output: RequestOutput, tokenizer: Any) -> list[CompletionOutput]:
        """All answers but the best one."""
        others = self._record.get("hypotheses", ())[1 : self._num]
        return [self._answer(index, one, output, tokenizer) for index, one in enumerate(others, 1)]

    def _answer(self, index: int, hypothesis: Mapping[str, Any], output: RequestOutput, tokenizer: Any) -> Any:
        tokens, is_stopped = list(hypothesis["tokens"]), hypothesis["finish_reason"] == "stop"
        told = self._log_probs(index, tokenizer)
        return CompletionOutput(
            index=index,
            text=self._text(tokens, is_stopped, output, tokenizer),
            token_ids=tokens,
            cumulative_logprob=told and told.cumulative_logprob,
            logprobs=told and told.logprobs,
            finish_reason=hypothesis["finish_reason"],
            stop_reason=stop_token(tokens, self._params) if is_stopped else self._record.get("ended_by"),
            lora_request=output.lora_request,
        )

    def _log_probs(self, index: int, tokenizer: Any) -> LogprobsProcessor | None:
        """Of the tokens of an answer, in vLLM's words; None where nobody asked."""
        if "logprobs" not in self._record:
            return None
        request: Any = SimpleNamespace(sampling_params=self._params)
        told = LogprobsProcessor.from_new_request(self._names(tokenizer), request)
        told.update_from_output(EngineCoreOutput("", [], new_logprobs=as_lists(self._record["logprobs"][index])))
        return told

    def _names(self, tokenizer: Any) -> Any:
        return tokenizer if self._params.detokenize else None

    def _text(self, tokens: list[int], is_stopped: bool, output: RequestOutput, tokenizer: Any) -> str:
        """As vLLM would write it out token by token."""
        request: Any = SimpleNamespace(
            request_id=output.request_id,
            sampling_params=self._params,
            prompt_token_ids=output.prompt_token_ids,
            prompt_embeds=None,
        )
        detokenizer = IncrementalDetokenizer.from_new_request(self._names(tokenizer), request)
        detokenizer.update(tokens, is_stopped)
        text: str = detokenizer.get_next_output_text(finished=True, delta=False)
        return text


class RankedAnswers:
    """The best of the answers that the engine generates, once all are there."""

    def __init__(
        self,
        num: int,
        score: Callable[[Candidate], float],
        note: Callable[[dict[str, Any]], None],
        explain: Callable[[int, dict[str, Any]], None] | None,
        computed: Callable[[int], Computed] = Computed,
    ) -> None:
        """
        Args:
            num: how many answers are wanted.
            score: of a candidate; the higher the better.
            note: called with what the ranking came to.
            explain: called with the number of an answer and what is said of its next token; None: nobody asked.
            computed: what a candidate of so many tokens takes.
        """
        self._num, self._score, self._note, self._explain = num, score, note, explain
        self._computed = computed
        self._explained: dict[int, list[dict[str, Any]]] = defaultdict(list)  # by candidate

    def explained(self, sequence: int, told: dict[str, Any]) -> None:
        """What the engine says of a candidate's next token."""
        self._explained[sequence].append(told)

    async def of(self, outputs: Outputs, tokenizer: Any) -> Outputs:
        async with aclosing(outputs):
            async for output in outputs:
                output.outputs = self._best(output.outputs)
                yield output

    def _best(self, candidates: Sequence[CompletionOutput]) -> list[CompletionOutput]:
        """The best of all candidates, of equal ones the first; numbered anew."""
        scored = [(self._scored(one), one) for one in candidates]
        scored.sort(key=lambda one: -one[0])
        fed, tried = map(sum, zip(*(self._computed(len(one.token_ids)) for one in candidates), strict=True))
        counts = {"tokens_computed": fed, "tried": tried}
        self._note({"hypotheses": [{"score": score} for score, _ in scored], "counts": counts})
        found = []
        for index, (_, one) in enumerate(scored[: self._num]):
            if self._explain is not None:
                for told in self._explained[one.index]:
                    self._explain(index, told)
            found.append(replace(one, index=index))
        return found

    def _scored(self, one: CompletionOutput) -> float:
        """One that was cut off before its first token is none."""
        if not one.token_ids or one.cumulative_logprob is None:
            return WORST
        return self._score(Candidate(len(one.token_ids), one.cumulative_logprob, self._explained[one.index]))
