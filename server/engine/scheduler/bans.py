"""Requests whose bans leave no token to say: vLLM draws a banned one then, and does not see that it did."""

from collections.abc import Iterable

from vllm.v1.request import Request, RequestStatus

from whipstaff.decoding.method import LogitsRewriter
from whipstaff.decoding.methods import METHODS
from whipstaff.server.plan import plan_of

NO_TOKEN_LEFT = "no_token_left"  # the stop reason of such requests


def without_banned(request: Request, found: list[int], has_ended: bool) -> tuple[list[int], bool]:
    """What is told of tokens that vLLM drew, and whether the request ended, which it does with the first that is
    banned."""
    for index, token in enumerate(found):
        if is_banned(request, token, num_after=len(found) - 1 - index):
            request.status, request.stop_reason = RequestStatus.FINISHED_STOPPED, NO_TOKEN_LEFT
            return found[:index], True
    return found, has_ended


def is_banned(request: Request, token: int, num_after: int = 0) -> bool:
    """Whether a token that was drawn is one that the request bans: what vLLM draws where nothing else is left.

    Methods that say what was banned do so on purpose.

    Args:
        num_after: tokens that the request has after it already, where drafts were accepted.
    """
    params = request.sampling_params
    assert params is not None
    if params.allowed_token_ids is not None and token not in _allowed(request, params.allowed_token_ids):
        return not _revives(request)
    words, said = params.bad_words_token_ids or (), request.output_token_ids
    if num_after:
        said = said[:-num_after]
    return any(list(said[-len(word) :]) == word for word in words) and not _revives(request)


def _allowed(request: Request, ids: Iterable[int]) -> frozenset[int]:
    """The same as a set that is made once; a list may be as long as the vocabulary."""
    if not hasattr(request, "whipstaff_allowed"):
        request.whipstaff_allowed = frozenset(ids)
    found: frozenset[int] = request.whipstaff_allowed
    return found


def _revives(request: Request) -> bool:
    plan = plan_of(request)
    rewrites = plan.decoding.rewrites if plan is not None and plan.decoding is not None else ()
    return any(isinstance(method := METHODS[one.method], LogitsRewriter) and method.revives for one in rewrites)
