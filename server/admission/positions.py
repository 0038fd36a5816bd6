"""A request's steering in one of its prompts: messages become positions, soft prompts' rows get room."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from pydantic import ValidationError

from whipstaff.decoding.method import PromptFacts
from whipstaff.server.errors import BadRequest
from whipstaff.server.prompt.message_spans import ExpandedPrompt, Prompt, Span
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.inserts import InsertParams, Wanted, index_of, place_inserts, shift
from whipstaff.steering.plan import Insert, PlannedEdit, PlannedModuleEdit, SteeringPlan
from whipstaff.steering.where import NOWHERE, Messages, Where

Planned = TypeVar("Planned", PlannedEdit, PlannedModuleEdit)


@dataclass(frozen=True)
class SoftPrompt:
    """An entry that asks for learned rows in the prompt."""

    path: str  # of the entry in the request
    digest: str
    params: InsertParams
    num: int  # of rows


def steering_at_prompt(
    plan: SteeringPlan, paths: Sequence[str], soft: Sequence[SoftPrompt], prompt: Prompt, is_further: bool = False
) -> tuple[SteeringPlan, list[int] | None]:
    """The plan in this prompt, and the prompt with placeholders for rows; None if it stays as it is.

    Args:
        paths: where in the request each of the plan's edits stands, then each of its edits of modules.
        is_further: whether the plan was written for another prompt of the request: its messages need not be in this.

    Raises:
        BadRequest: naming the field that does not go with this prompt.
    """
    if not soft:
        return _resolved(plan, paths, prompt, is_further), None
    if prompt.ids is None:
        raise BadRequest("rows can only be inserted into a prompt of text or tokens", f"{soft[0].path}.vector")
    wanted = [Wanted(one.digest, one.num, _index(one, prompt)) for one in soft]
    room = prompt.room - prompt.num_tokens
    if (rows := sum(one.num for one in soft)) > room:
        raise BadRequest(
            f"{rows} rows do not fit: beside this prompt and what is to be generated there is room for {max(room, 0)}",
            f"{soft[-1].path}.vector",
        )
    _, inserts = place_inserts(prompt.ids, wanted)
    placed = _resolved(plan, paths, prompt, is_further, inserts)
    expanded, _ = place_inserts(prompt.ids, wanted, placed.token_ids)
    return replace(placed, inserts=inserts), expanded


def expanded(prompt: Prompt, inserts: Sequence[Insert], ids: Sequence[int] | None) -> PromptFacts:
    """A prompt as decoding methods are told of it: with the rows that steering puts into it. `ids` is what it then has;
    None: it stays as it is."""
    return prompt if ids is None else ExpandedPrompt(prompt, len(ids), partial(shift, inserts=inserts))


def _index(soft: SoftPrompt, prompt: Prompt) -> int:
    try:
        return index_of(soft.params, prompt.num_tokens, prompt.bounds)
    except SteeringError as error:
        raise BadRequest(str(error), f"{soft.path}.{error.param or 'insert'}") from None


def where_at_prompt(
    where: Where, path: str, prompt: Prompt, inserts: Sequence[Insert], is_further: bool = False
) -> Where:
    """A clause in windows and token ids only. Raises: BadRequest.

    Args:
        path: of the entry whose clause it is.
        inserts: that the prompt gets.
        is_further: whether it was written for another prompt of the request.
    """

    def spans(chosen: Messages) -> list[Span]:
        if is_further and prompt.chat is None:
            return [NOWHERE]
        found = [shift(span, inserts) for span in prompt.spans(chosen)]
        return found or ([NOWHERE] if is_further else [])

    if not where.needs_prompt:
        return where
    try:
        return where.resolved(spans, prompt.id_of)
    except SteeringError as error:
        raise BadRequest(str(error), f"{path}.{error.param or 'where'}") from None
    except ValidationError:  # the engine takes as many windows as a request may
        raise BadRequest("these are more messages than a clause may have windows", f"{path}.where.messages") from None


def _resolved(
    plan: SteeringPlan, paths: Sequence[str], prompt: Prompt, is_further: bool, inserts: Sequence[Insert] = ()
) -> SteeringPlan:
    """The plan with clauses in windows and token ids only."""

    def resolved(planned: Planned, path: str) -> Planned:
        return replace(planned, where=where_at_prompt(planned.where, path, prompt, inserts, is_further))

    num_edits = len(plan.edits)
    return replace(
        plan,
        edits=tuple(map(resolved, plan.edits, paths[:num_edits])),
        module_edits=tuple(map(resolved, plan.module_edits, paths[num_edits:])),
    )
