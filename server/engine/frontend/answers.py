"""Answers of a request that are not just what the engine generates: those of a search."""

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any, Protocol

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

SEARCH = "search"  # under which the engine tells of a finished search, beside what it explains
Outputs = AsyncGenerator[Any, None]


class Answers(Protocol):
    """Makes the answers of one prompt."""

    def of(self, outputs: Outputs, tokenizer: Any) -> Outputs:
        """The outputs as they are answered; closing this closes `outputs`."""


class SearchAnswers:
    """The best answer of a search is what the engine generates, as far as it settles; the others are told when the
    search is over, and come with its end."""

    def __init__(self, num: int, params: SamplingParams, note: Callable[[dict[str, Any]], None]) -> None:
        """
        Args:
            num: how many answers are wanted.
            params: by which the engine generates.
            note: called with what the search came to.
        """
        self._num, self._params, self._note = num, params, note
        self._record: Mapping[str, Any] = {}

    def explained(self, _: int, told: dict[str, Any]) -> None:
        """What the engine says of the request."""
        self._record = record = told[SEARCH]
        self._note(record)

    async def of(self, outputs: Outputs, tokenizer: Any) -> Outputs:
        async with aclosing(outputs):
            async for output in outputs:
                if output.finished:
                    output.outputs += self._further(output, tokenizer)
                yield output

    def _further(self, output: RequestOutput, tokenizer: Any) -> list[CompletionOutput]:
        """All answers but the best one."""
        others = self._record.get("hypotheses", ())[1 : self._num]
        return [self._answer(index, one, output, tokenizer) for index, one in enumerate(others, 1)]

    def _answer(self, index: int, hypothesis: Mapping[str, Any], output: RequestOutput, tokenizer: Any) -> Any:
        tokens, is_stopped = list(hypothesis["tokens"]), hypothesis["finish_reason"] == "stop"
        return CompletionOutput(
            index=index,
            text=self._text(tokens, is_stopped, output, tokenizer),
            token_ids=tokens,
            cumulative_logprob=None,
            logprobs=None,
            finish_reason=hypothesis["finish_reason"],
            stop_reason=self._stop_reason(tokens) if is_stopped else None,
            lora_request=output.lora_request,
        )

    def _text(self, tokens: list[int], is_stopped: bool, output: RequestOutput, tokenizer: Any) -> str:
        """As vLLM would write it out token by token."""
        request: Any = SimpleNamespace(
            request_id=output.request_id,
            sampling_params=self._params,
            prompt_token_ids=output.prompt_token_ids,
            prompt_embeds=None,
        )
        detokenizer = IncrementalDetokenizer.from_new_request(tokenizer if self._params.detokenize else None, request)
        detokenizer.update(tokens, is_stopped)
        text: str = detokenizer.get_next_output_text(finished=True, delta=False)
        return text

    def _stop_reason(self, tokens: list[int]) -> int | None:
        """The token that ended an answer, if it is not the model's own."""
        is_asked = tokens[-1] in (self._params.stop_token_ids or ()) and tokens[-1] != self._params.eos_token_id
        return tokens[-1] if is_asked else None
