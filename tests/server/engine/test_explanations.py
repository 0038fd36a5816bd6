"""Explanations reach who asked for them, of the sequence that they are of, for as long as vLLM knows of it."""

from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from whipstaff.decoding.plan import DecodingPlan, Rewrite, SearchPlan
from whipstaff.server.engine.explanations import EXPLAIN_KEY, READINGS, relay
from whipstaff.server.engine.frontend.launch import Listening, PlanDict
from whipstaff.server.engine.patch import swap
from whipstaff.server.engine.searches import DRAFT_KEY, SEARCH_KEY
from whipstaff.server.plan import PLAN_KEY, CompanionPlan, RequestPlan


def request(name: str, plan: PlanDict | None) -> EngineCoreRequest:
    params = SamplingParams(detokenize=False, extra_args=None if plan is None else {PLAN_KEY: plan})
    return EngineCoreRequest(name, [1, 2], None, params, None, 0.0, None, None, None, external_req_id=name)


def output(name: str, token: int, is_last: bool = False) -> EngineCoreOutput:
    return EngineCoreOutput(name, [token], finish_reason=FinishReason.LENGTH if is_last else None)


def test_each_goes_to_the_sequence_that_it_is_of() -> None:
    told: list[tuple[str, int, Any]] = []

    def plan(name: str) -> PlanDict:
        def explained(index: int, record: dict[str, Any]) -> None:
            told.append((name, index, record["of"]))

        return PlanDict(RequestPlan().to_wire(), explained=explained)

    made: Any = OutputProcessor(None, log_stats=False)
    swap(made, Listening)
    silent = PlanDict(RequestPlan().to_wire())
    for name, its, index in (("a", plan("a"), 1), ("b", plan("b"), 0), ("silent", silent, 0), ("plain", None, 0)):
        queue = RequestOutputCollector(SamplingParams().output_kind, name)
        made.add_request(request(name, its), None, None, index, queue)

    def step(*outputs: EngineCoreOutput, **records: Any) -> None:
        relay({name: {"of": of} for name, of in records.items()}, {0: _Outputs(outputs)})
        made.process_outputs(list(outputs))
        assert all(one.kv_transfer_params is None for one in outputs)

    step(output("a", 5), output("b", 6), output("silent", 7), output("plain", 8), a="5", b="6")
    step(output("a", 9), output("plain", 8), a="9")
    step(output("a", 3, is_last=True), a="3")
    made.abort_requests(["b"], internal=True)
    step(output("a", 1), output("b", 2), a="1", b="2")  # on their way when it was over
    assert told == [("a", 1, "5"), ("b", 0, "6"), ("a", 1, "9"), ("a", 1, "3")]


def test_readings_go_to_who_asked_for_those() -> None:
    read: list[Any] = []
    explained: list[Any] = []
    made: Any = OutputProcessor(None, log_stats=False)
    swap(made, Listening)
    wire = RequestPlan().to_wire()
    both = PlanDict(
        wire,
        explained=lambda _, record: explained.append(record),
        read=lambda index, record: read.append((index, record)),
    )
    for name, its in (("a", both), ("alone", PlanDict(wire, read=lambda index, record: read.append((index, record))))):
        made.add_request(request(name, its), None, None, 2, RequestOutputCollector(SamplingParams().output_kind, name))
    outputs = [output("a", 5), output("alone", 6)]
    relay({"a": {"id": 5, READINGS: "x"}, "alone": {READINGS: "y"}}, {0: _Outputs(outputs)})
    made.process_outputs(outputs)
    assert read == [(2, "x"), (2, "y")] and explained == [{"id": 5}]


def test_what_a_search_has_computed_is_heard_and_is_no_output() -> None:
    """Where nothing is settled; a draft with it is one."""
    told: list[Any] = []
    made: Any = OutputProcessor(None, log_stats=False)
    swap(made, Listening)
    for name in ("a", "b", "plain"):
        plan = PlanDict(RequestPlan().to_wire(), explained=lambda index, record: told.append(record))
        queue = RequestOutputCollector(RequestOutputKind.DELTA, name)
        made.add_request(request(name, plan if name != "plain" else None), None, None, 0, queue)
    queues = {name: made.request_states[name].queue for name in ("a", "b", "plain")}
    records = [{SEARCH_KEY: {"counts": {"tried": 4}}}, {SEARCH_KEY: {"counts": {}}, DRAFT_KEY: {"tokens": [3]}}]
    outputs = [EngineCoreOutput("a", []), output("plain", 5), EngineCoreOutput("b", [])]
    relay(dict(zip("ab", records, strict=True)), {0: _Outputs(outputs)})
    made.process_outputs(outputs)
    assert told == records
    assert [queue.output is not None for queue in queues.values()] == [False, True, True]


def test_tokens_are_counted_as_the_engine_generates_them() -> None:
    """Of each sequence, and also where the client hears of no token, or leaves."""
    made: Any = OutputProcessor(None, log_stats=False)
    swap(made, Listening)
    trying = DecodingPlan(rewrites=(Rewrite("kwd", "{}", num_tried=3),))
    further = CompanionPlan((7,)), CompanionPlan((7,), until=1)
    own = PlanDict(RequestPlan(decoding=trying, companions=further).to_wire())
    search = DecodingPlan(search=SearchPlan("beam_search", "{}", 2))
    searching = PlanDict(RequestPlan(decoding=search).to_wire())
    for name, plan, index in (("a", own, 0), ("b", own, 1), ("search", searching, 0), ("plain", None, 0)):
        queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, name)
        made.add_request(request(name, plan), None, None, index, queue)
    made.process_outputs([output(name, 5) for name in ("a", "b", "search", "plain")])
    made.process_outputs([output("a", 6)])
    made.abort_requests(["b"], internal=True)
    made.process_outputs([output("b", 6), output("a", 7)])  # the first was on its way when it was over
    assert own.num_computed == (3 + 3 + 1 + 3 * 3) + (1 + 1 + 1 + 3)
    assert searching.num_computed == 0  # the engine counts


class _Outputs:
    """Of one client in one step."""

    def __init__(self, outputs: Any) -> None:
        self.outputs = outputs


def test_other_connectors_fields_stay() -> None:
    """The field is a KV connector's; what another one says in it is none of ours."""
    made: Any = OutputProcessor(None, log_stats=False)
    swap(made, Listening)
    made.add_request(request("a", None), None, None, 0, RequestOutputCollector(SamplingParams().output_kind, "a"))
    theirs = output("a", 5)
    theirs.kv_transfer_params = {"theirs": 1}
    made.process_outputs([theirs])
    assert theirs.kv_transfer_params == {"theirs": 1} and EXPLAIN_KEY not in theirs.kv_transfer_params
