"""Admission of a search beside what else its request says: what it draws by, how many answers it wants, what is told.

A search takes the place of the draw, so that temperature and truncation do nothing: clients that always send them are
told. What it cannot do is refused by the field that asks for it.
"""

import math
from collections.abc import Mapping
from typing import Any

from whipstaff.decoding.plan import Explain
from whipstaff.decoding.search.search import SearchMethod, SearchParams
from whipstaff.server.admission.decoding import DecodingEntry, GivenEntry
from whipstaff.server.admission.fields import AskedRequest
from whipstaff.server.errors import BadRequest, Unavailable
from whipstaff.server.plan import Computed
from whipstaff.server.registry.capabilities import Capabilities

COUNTS = ("tokens_computed", "tried", "forks", "rollbacks")  # of a search, as its receipt says them
_OF_VLLM = {"num_beams": "n", "length_penalty": "length_penalty"}  # parameter -> field of its own beam search


def vllm_beam_search(num_beams: int, length_penalty: float) -> GivenEntry:
    """What vLLM's `use_beam_search` stands for."""
    params = {"num_beams": num_beams, "length_penalty": length_penalty, "scoring": "vllm"}
    names = {"method": "use_beam_search", "scoring": "use_beam_search", **_OF_VLLM}
    return GivenEntry("", {"method": "beam_search", **params}, names, ("use_beam_search",))


def effort(entry: DecodingEntry, num_tried: int) -> tuple[int, int, float]:
    """Tokens that a search computes and that are tried for each token of an answer, while it takes nothing back; and
    how many it may come to after each prompt. `num_tried` are tried by other methods for each that it computes."""
    method, params = _method(entry), entry.params
    assert isinstance(params, SearchParams)
    most = math.inf if params.max_computed_tokens is None else params.max_computed_tokens
    num_computed = method.num_computed(params)
    return num_computed, method.num_tried(params) + num_computed * num_tried, most


def check_room(entry: DecodingEntry, num_companions: int, caps: Capabilities) -> None:
    """Whether a search can ever have the sequences that it needs at once. Raises: Unavailable."""
    method = _method(entry)
    num_rows = 1 + num_companions + (method.adapter(entry.params) is not None)
    num, most = method.num_sequences(entry.params) * num_rows, min(caps.max_search_seqs, caps.max_seqs)
    if num > most:
        raise Unavailable(
            f"the request needs {num} sequences at once and searches run at most {most}; start the server with a "
            f"larger {'--max-search-seqs' if most < caps.max_seqs else '--max-num-seqs'}",
            entry.path_of(method.sequences_field),
        )


def check_explained(entry: DecodingEntry, asked: Explain, field: str) -> None:
    """Whether a search can say what it did to each token, as `field` asks. Raises: BadRequest."""
    if not _method(entry).explains:
        raise BadRequest(f"{entry.method.name} chooses whole answers, and explains no tokens; leave it out", field)
    for name, is_asked in (("unsteered", asked.unsteered is not None), ("drawn", asked.is_drawn)):
        if is_asked:
            raise BadRequest(f"{entry.method.name} draws no tokens, of which that could be told", f"{field}.{name}")


def check_answers(entry: DecodingEntry, num: int) -> None:
    """Whether a search comes to as many answers as the request wants. Raises: BadRequest."""
    method = _method(entry)
    if num > (most := method.num_answers(entry.params)):
        field = method.sequences_field
        why = "" if most == 1 or field == "method" else f", its {field}"
        answers = "one answer" if most == 1 else f"at most {most} answers"
        raise BadRequest(f"{method.name} comes to {answers}{why}", "n")


def check_told(entry: DecodingEntry, request: AskedRequest) -> None:
    """What is told of an answer that was searched. Raises: BadRequest."""
    name = entry.method.name
    if (field := request.logprobs_field) and (request.scores_prompt or not _method(entry).drafts):
        what = "a prompt" if request.scores_prompt else "its tokens"
        raise BadRequest(
            f"{name} tells no log-probabilities of {what}; the receipt has every answer's score. Score an answer with "
            "the method `forced`",
            field,
        )
    if request.repetition_detection is not None:
        raise BadRequest(f"{name} does not stop where a text repeats itself; leave it out", "repetition_detection")
    if request.stops_at_text and (request.n or 1) > 1:
        raise BadRequest(
            f"a text cuts one answer where it stands, and {name} is to come to {request.n}; stop_token_ids end each",
            "stop",
        )


def check_retractions(request: AskedRequest) -> None:
    """Whether what was streamed can be taken back. Raises: BadRequest."""
    if not request.stream:
        raise BadRequest("it is for answers that are streamed", "stream_retractions")


def without_effect(entry: DecodingEntry, request: AskedRequest) -> list[str]:
    """What to say of fields that change what is drawn from."""
    name = entry.method.name
    does = f"{name} draws by parameters of its own" if _method(entry).draws(entry.params) else f"{name} draws no tokens"
    return [f"{field} did nothing: {does}" for field in request.draw_fields]


def told(record: Mapping[str, Any], num_sequences: int) -> dict[str, Any]:
    """What the engine says of a finished search, for the receipt; `num_sequences` may have lived at once."""
    counts = record.get("counts", {})
    scores = [one["score"] for one in record.get("hypotheses", ())]
    said = {"sequences": num_sequences, **{name: int(counts.get(name, 0)) for name in COUNTS}, "scores": scores}
    return said | ({"ended_by": record["ended_by"]} if "ended_by" in record else {})


def computed(record: Mapping[str, Any]) -> Computed:
    """What a search, or candidates that were ranked, took so far, as the engine says it."""
    counts = record.get("counts", {})
    return Computed(int(counts.get("tokens_computed", 0)), int(counts.get("tried", 0)))


def _method(entry: DecodingEntry) -> SearchMethod[Any]:
    assert isinstance(entry.method, SearchMethod)
    return entry.method
