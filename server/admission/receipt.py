"""Receipts: what was done to a request, for its response. Same request and same receipt mean same behaviour."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from whipstaff.server.admission.captured import NamedSequence, Told, captured, in_base64, tensors_of
from whipstaff.server.admission.request import CompiledRequest
from whipstaff.server.admission.search import computed, told
from whipstaff.server.admission.steering import STOP_FIELD
from whipstaff.server.plan import PlacedRequest, PositionedPlan, RequestPlan
from whipstaff.steering.conditions import Readings
from whipstaff.steering.fed import Fed
from whipstaff.steering.plan import SteeringPlan

RECEIPT_FIELD = "whipstaff"  # of a response
ReadBy = Callable[[str], Awaitable[list[dict[str, Any]]]]  # what a request's conditions read, by its readings_id
Captures = Callable[[str], Awaitable[Sequence[Told]]]  # what each rank says of a request's activations, by captures_id
Keep = Callable[[Mapping[str, Tensor]], dict[str, Any]]  # activations as a file to fetch; says what is told of it


class Tally:
    """The tokens of a request's sequences, noted as its outputs pass by."""

    def __init__(self) -> None:
        self._prompts: dict[int, list[int]] = {}
        self._generated: dict[tuple[int, int], list[int]] = {}  # by prompt and answer
        self._names: dict[int, str] = {}  # what the engine calls sequences, by choice
        self._searches: dict[int, dict[str, Any]] = {}  # by prompt

    def note(self, prompt: int, output: Any) -> None:
        """One vLLM RequestOutput of a prompt; its token ids are what came since the last one."""
        if output.prompt_token_ids is not None:
            self._prompts[prompt] = output.prompt_token_ids
        for sequence in output.outputs:
            self._generated.setdefault((prompt, sequence.index), []).extend(sequence.token_ids)

    def name_sequence(self, choice: int, name: str) -> None:
        """What the engine calls the sequence of a choice."""
        self._names[choice] = name

    def names(self, num_answers: int) -> list[str]:
        """Of every sequence, in the order of `fed`; "" where it is not known."""
        return [self._names.get(prompt * num_answers + answer, "") for (prompt, answer), _ in self._by_answer()]

    def sequences(self, num_answers: int) -> list[NamedSequence]:
        """Those of the choices, of which every prompt has so many, in order."""
        fed = {prompt * num_answers + answer: one for (prompt, answer), one in self._by_answer()}
        return [NamedSequence(choice, self._names[choice], fed[choice].num_fed) for choice in sorted(fed)]

    def note_search(self, prompt: int, record: dict[str, Any]) -> None:
        """What the search of a prompt came to."""
        self._searches[prompt] = record

    @property
    def searches(self) -> list[dict[str, Any]]:
        """In the order of the prompts."""
        return [record for _, record in sorted(self._searches.items())]

    def num_computed(self, plans: Sequence[RequestPlan]) -> int | None:
        """Tokens that were computed for those of answers, with those that were tried; None where they are the same.

        Args:
            plans: of every prompt.
        """
        found, num_answered = sum(computed(record).num for record in self._searches.values()), 0
        for (prompt, _), generated in self._generated.items():
            num_answered += len(generated)
            found += 0 if prompt in self._searches else plans[prompt].computed(len(generated)).num
        return found if self._searches or found != num_answered else None

    def fed(self) -> list[Fed]:
        """Every sequence."""
        return [one for _, one in self._by_answer()]

    def _by_answer(self) -> Iterator[tuple[tuple[int, int], Fed]]:
        for (number, answer), generated in self._generated.items():
            prompt = self._prompts[number]
            num_fed = len(prompt) + max(len(generated) - 1, 0)
            yield (number, answer), Fed(len(prompt), num_fed, [*prompt, *generated])


def receipt(
    compiled: CompiledRequest,
    placed: Sequence[PlacedRequest] = (),
    fed: Sequence[Fed] = (),
    searches: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What was done, or would be.

    Args:
        placed: the request in its prompts, as far as it got there.
        fed: its finished sequences.
        searches: what its searches came to.
    """
    whole = placed[-1].plan if placed else compiled.plan
    plan = whole.steering or SteeringPlan(())
    preset, companions = compiled.preset, [one for each in placed for one in each.companions]
    return {
        **({} if preset is None else {"preset": {"id": preset.name, "digest": preset.digest}}),
        "steering": [entry.describe(plan, list(fed), compiled.caps) for entry in compiled.steering.entries],
        **({} if (stop := compiled.steering.stop) is None else {STOP_FIELD: stop.describe(plan, list(fed))}),
        "decoding": [entry.to_json() for entry in compiled.decoding],
        **({"sequences": companions} if companions else {}),
        **({"capture": [entry.to_json() for entry in compiled.captures]} if compiled.captures else {}),
        **({"search": [told(record, compiled.num_sequences) for record in searches]} if searches else {}),
        **({"drafts": _drafts(whole.undrafted_by)} if compiled.caps.num_drafts else {}),
        "warnings": warnings_of(compiled, placed),
    }


def _drafts(undrafted_by: str | None) -> dict[str, Any]:
    """Whether the engine may draft tokens for the request's greedy answers, and if not, what of it stands against
    that."""
    return {"allowed": True} if undrafted_by is None else {"allowed": False, "because_of": undrafted_by}


def warnings_of(compiled: CompiledRequest, placed: Sequence[PlacedRequest]) -> list[str]:
    """What the client should know, as far as the request got."""
    return [*compiled.warnings, *(warning for each in placed for warning in each.warnings)]


async def final_receipt(
    compiled: CompiledRequest,
    placed: Sequence[PlacedRequest],
    tally: Tally,
    readings: ReadBy,
    captures: Captures,
    num_answers: int,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """What was done, once everything is generated; every prompt has so many answers.

    Args:
        keep: for clients who fetch what was read; None: it stands in the receipt.
    """
    fed = tally.fed()
    if readings_id := compiled.plan.readings_id:
        found = await readings(readings_id)
        names = tally.names(num_answers)
        fed = [one._replace(columns=_taken(found, one, name)) for one, name in zip(fed, names, strict=True)]
    made = receipt(compiled, placed, fed, tally.searches)
    if compiled.captures:
        ranks = await captures(compiled.plan.captures_id) if compiled.plan.captures_id else ()
        columns = dict(zip(tally.names(num_answers), (one.columns for one in fed), strict=True))
        told = tally.sequences(num_answers), ranks, columns
        made |= await asyncio.to_thread(_read, compiled, placed, *told, num_answers, keep)  # may be large
    return made


def _read(
    compiled: CompiledRequest,
    placed: Sequence[PlacedRequest],
    sequences: Sequence[NamedSequence],
    ranks: Sequence[Told],
    columns: Mapping[str, Sequence[Readings]],
    num_answers: int,
    keep: Keep | None,
) -> dict[str, Any]:
    """What the receipt says of activations: of every choice, and of the file that has them all."""
    plans = [PositionedPlan(one.plan, one.num_tokens) for one in placed]
    said, whole = list[dict[str, Any]](), dict[str, Tensor]()
    for one in sequences:
        plan = plans[one.choice // num_answers]
        tensors = tensors_of(one, plan, compiled.captures, compiled.caps.model, ranks, columns[one.name])
        said.append(captured(one.choice, tensors))
        if tensors is not None and keep is None:
            said[-1]["safetensors"] = in_base64(tensors)
        elif tensors is not None:
            whole |= {f"{one.choice}.{name}": tensor for name, tensor in tensors.items()}
    return {"captured": said} | ({"download": keep(whole)} if keep is not None and whole else {})


def _taken(found: list[dict[str, Any]], sequence: Fed, name: str) -> list[Any]:
    """The readings of a sequence, or of one as long where its name is not known, which no other sequence then gets;
    none if they are gone."""
    for index, one in enumerate(found):
        if one["name"] == name or (not name and one["positions"] >= sequence.num_fed):
            columns: list[Any] = found.pop(index)["columns"]
            return columns
    return []
