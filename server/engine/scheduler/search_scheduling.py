"""Searches: groups whose sequences fork, die and shrink as a method decides.

A request that searches is a group (`groups`) with as many seats as it may have sequences. It is let in when there are
that many and blocks for what lives; the other seats stay reserved. At first the request itself lives alone. All who
live lack just their last token and get it in the same step; the worker, which then has everybody's logits, comes to a
verdict (`engine.searches`): what lives on, in which seat, from whose tokens. Nothing else is appended here.

quiet      a sequence that keeps its seat and all of its tokens gets one more, as every request does
moved      any other gets its seat's tokens replaced and its blocks by `reseat`, and the worker is told as of a request
           that was preempted and comes back; a seat in which nothing lives has no blocks and stands in no queue
preempted  a search whose verdict is still to come is not let in before: its state in the worker has gone on
client     gets the leading tokens that are settled, and the rest with the answer; with every step the front end is
           told what was computed, which holds when the client leaves, and if the client wants, what else stands in the
           sequence that lives first

Under asynchronous scheduling a search waits for each verdict before its next step is scheduled: it takes part in every
second step of the engine only. Nobody else waits.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from whipstaff.server.engine.compat import fail_request
from whipstaff.server.engine.scheduler.group import Group, SearchGroup
from whipstaff.server.engine.scheduler.groups import GroupedScheduling, take_out
from whipstaff.server.engine.scheduler.reseat import Move, can_reseat, forget_copies, give_up_copies, reseat
from whipstaff.server.engine.searches import (
    DRAFT_KEY,
    SEARCH_KEY,
    Placed,
    SearchStep,
    Verdict,
    as_lists,
    stop_token,
    verdicts_of,
)
from whipstaff.server.engine.step_notes import SearchUse


class SearchScheduling(GroupedScheduling):
    """Mixed into vLLM's schedulers."""

    _max_search_seqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._verdicts: Mapping[str, Verdict] = {}  # of the output that is being taken in
        self._told: dict[str, dict[str, Any]] = {}  # by primary, what goes with the output, likewise
        self._moved: set[str] = set()  # sequences that the worker has yet to be told anew
        self._totals: Counter[str] = Counter()
        self._computed: Counter[str] = Counter()  # tokens, by the label of whose they are
        self.stepping_searches: dict[str, SearchStep] = {}  # of the last step: see `StepNotes`
        self.told_seats: dict[str, str] = {}  # likewise

    def is_searching(self, request: Request) -> bool:
        return isinstance(self._group_of.get(request.request_id), SearchGroup)

    def _searches(self) -> list[SearchGroup]:
        return [group for group in self._groups.values() if isinstance(group, SearchGroup)]

    def search_use(self) -> SearchUse:
        running = [group for group in self._searches() if group.num_running] if self._groups else []
        living = sum(len(group.living) for group in running)
        totals = {name: self._totals[name] for name in SearchUse._fields[2:-1]}
        return SearchUse(len(running), living, **totals, computed=dict(self._computed))

    # -- who comes and goes ------------------------------------------------------------------------------------------

    def add_group(self, group: Group) -> None:
        super().add_group(group)
        if not isinstance(group, SearchGroup):
            return
        for one in group.sequences:
            if one not in group.members:  # in no queue, and ends with the others
                self.requests[one.request_id] = one
                one.status = RequestStatus.PREEMPTED
        name = group.primary.request_id
        if group.num_seats > self._max_search_seqs:
            fail_request(self, name, f"{group.num_seats} sequences are more than searches may have")
        elif not can_reseat(self.kv_cache_manager):
            fail_request(self, name, "the served model keeps a state that cannot be forked")

    def _limit(self, group: Group) -> None:
        super()._limit(group)
        if isinstance(group, SearchGroup):
            longest = max(member.num_prompt_tokens for member in group.members)
            group.room = min(self.max_model_len - longest, self._num_affordable(group)) - 1

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._moved.discard(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def _free_request_blocks(self, request: Request) -> None:
        if self.is_searching(request):
            forget_copies(self.kv_cache_manager, request)
        super()._free_request_blocks(request)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        group = self._group_of.get(request.request_id)
        if isinstance(group, SearchGroup) and not group.num_running:
            held = sum(other.num_seats for other in self._searches() if other.num_running)
            if held + group.num_seats > self._max_search_seqs:
                return False  # others may pass: it waits for searches alone
        return super()._handle_blocked_waiting_request(request)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        if self.is_searching(request):
            self._moved.discard(request.request_id)  # all is told when it comes back
            request.drop_stale_output = False  # a verdict is never dropped

    def _make_do(self, unit: Sequence[Request]) -> None:
        give_up_copies(self.kv_cache_manager, unit)

    # -- one step ----------------------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self.stepping_searches, self.told_seats = {}, {}
        return super().schedule(*args, **kwargs)

    def _introduce(self, output: Any, anew: list[Request]) -> None:
        super()._introduce(output, anew)
        told = self._moved & output.num_scheduled_tokens.keys()
        self._moved -= told
        for name in sorted(told):
            self._tell_moved(output, self.requests[name], output.num_scheduled_tokens[name])
        if not self.use_v2_model_runner:
            for name in output.scheduled_cached_reqs.resumed_req_ids:
                if isinstance(group := self._group_of.get(name), SearchGroup):
                    self.told_seats[name] = group.origin_of(name)
        for group in self._searches():
            for member in group.members:
                num = output.num_scheduled_tokens.get(member.request_id, 0)
                end = member.num_computed_tokens
                computed = max(0, end - max(end - num, member.num_prompt_tokens))
                group.counts["tokens_computed"] += computed
                self._computed[group.label] += computed

    def _tell_moved(self, output: Any, request: Request, num_scheduled: int) -> None:
        """Tell the worker all of a sequence's tokens and blocks."""
        name, cached = request.request_id, output.scheduled_cached_reqs
        if self.use_v2_model_runner:
            take_out(cached, name)
            output.scheduled_new_reqs.append(self._as_new(request, request.num_computed_tokens - num_scheduled))
            return
        cached.new_block_ids[cached.req_ids.index(name)] = self.kv_cache_manager.get_block_ids(name)
        cached.resumed_req_ids.add(name)
        cached.all_token_ids[name] = list(request._all_token_ids)

    def _note_released(self, output: Any, released: Sequence[Group]) -> None:
        for group in released:
            if isinstance(group, SearchGroup):
                self.stepping_searches[group.primary.request_id] = group.take_step()

    # -- what a step came to -----------------------------------------------------------------------------------------

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, EngineCoreOutputs]:
        if not self._groups:
            plain: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
            return plain
        self._verdicts, self._told = verdicts_of(model_runner_output), {}
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for name, verdict in self._verdicts.items():
            group = self._groups.get(name)
            if isinstance(group, SearchGroup) and verdict.living:  # else it has ended meanwhile
                self._settle(group, verdict)
        for one in (one for own in outputs.values() for one in own.outputs):
            if (said := self._verdicts.get(one.request_id, Verdict(())).log_probs) and said[0]:
                one.new_logprobs = as_lists(said[0])  # and not those of what vLLM drew
        self._verdicts = {}
        if self._told:
            told = getattr(model_runner_output, "whipstaff_explanations", {})
            own = {name: {**told.get(name, {}), **said} for name, said in self._told.items()}
            model_runner_output.whipstaff_explanations = {**told, **own}
            self._have_outputs(outputs)
        return outputs

    def _have_outputs(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """What is told travels with requests' outputs, also where no token is settled. One without a draft says nothing
        to vLLM, and ends where it is heard."""
        there = {one.request_id for own in outputs.values() for one in own.outputs}
        for name in self._told.keys() - there:
            request, stats = self.requests[name], None
            if DRAFT_KEY in self._told[name] and (stats := request.take_prefill_stats()) is not None:
                stats.finalize(self.kv_cache_manager.estimate_cached_tokens(request))
            own = outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs
            own.append(EngineCoreOutput(name, [], prefill_stats=stats))

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        group = self._group_of.get(request.request_id)
        if not isinstance(group, SearchGroup):
            found: tuple[list[int], bool] = super()._update_request_with_output(request, new_token_ids, *args, **kwargs)
            return found
        request.num_output_placeholders = 0
        if request is not group.primary:
            return [], False
        verdict = self._verdicts.get(request.request_id)
        assert verdict is not None, "a search took a step that came to nothing"
        if verdict.facts:
            group.facts.append(dict(verdict.facts))
        return self._end(group, verdict) if verdict.hypotheses else (self._settled(group, verdict), False)

    def _settled(self, group: SearchGroup, verdict: Verdict) -> list[int]:
        """What the client gets now."""
        first, told = verdict.living[0], self._told.setdefault(group.primary.request_id, {})
        text = [*self.requests[first.source]._output_token_ids[: first.keep], *first.tokens]
        start, group.num_told = group.num_told, max(group.num_told, verdict.settled)
        if group.tells_drafts:
            told[DRAFT_KEY] = {"settled": group.num_told, "tokens": text[group.num_told :]}
        found = text[start : group.num_told]
        told[SEARCH_KEY] = self._record(group, verdict) if found else {"counts": _counts(group, verdict)}
        return found

    def _record(self, group: SearchGroup, verdict: Verdict) -> dict[str, Any]:
        """What a search has come to so far, with what was not told yet of the tokens that the client gets."""
        facts, group.facts = group.facts, []
        return {"counts": _counts(group, verdict), **({"facts": facts} if facts else {})}

    def _end(self, group: SearchGroup, verdict: Verdict) -> tuple[list[int], bool]:
        """The rest of the best answer."""
        best, request = verdict.hypotheses[0], group.primary
        record = self._record(group, verdict)
        record["hypotheses"] = [{**one._asdict(), "tokens": list(one.tokens)} for one in verdict.hypotheses]
        if verdict.log_probs:
            record["logprobs"] = verdict.log_probs
        if group.ended_by:
            record["ended_by"] = group.ended_by
        self._told[request.request_id] = {SEARCH_KEY: record}
        request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        if best.finish_reason == "stop":
            request.status = RequestStatus.FINISHED_STOPPED
            request.stop_reason = stop_token(best.tokens, request.sampling_params)
        return list(best.tokens[group.num_told :]), True

    def _settle(self, group: SearchGroup, verdict: Verdict) -> None:
        """Let a search's sequences be what a verdict says."""
        group.num_tried = verdict.counts.get("tried", 0)
        quiet, moved = self._placements(group, verdict.living)
        told = [(member, self._kept(group, place, member)) for place in moved for member in group.rows[place.seat]]
        is_running = group.primary.status == RequestStatus.RUNNING
        woken, gone = group.settle([place.seat for place in verdict.living])
        if is_running:
            self._reseat(group, quiet, moved, gone)
        for member, tokens in told:
            _replace_output(member, tokens, self.hash_block_size)
        for place in quiet:
            for member in group.rows[place.seat]:
                member.append_output_token_ids(place.tokens[0])
        self._requeue(woken, gone, is_running)
        if is_running:
            self._moved |= {member.request_id for member, _ in told}

    def _placements(self, group: SearchGroup, living: Sequence[Placed]) -> tuple[list[Placed], list[Placed]]:
        """Those whose blocks stay, and the others."""
        quiet: list[Placed] = []
        moved: list[Placed] = []
        for place in living:
            num = group.rows[place.source][0].num_output_tokens
            is_fork, is_rollback = place.source != place.seat, place.keep < num
            (quiet if place.stays and not is_rollback else moved).append(place)
            group.counts["forks"] += is_fork
            self._totals["rollbacks"] += is_rollback
            self._totals["forks"] += is_fork
        return quiet, moved

    def _kept(self, group: SearchGroup, place: Placed, member: Request) -> list[int]:
        return [*group.rows[place.source][0]._output_token_ids[: place.keep], *place.tokens]

    def _reseat(
        self, group: SearchGroup, quiet: Sequence[Placed], moved: Sequence[Placed], gone: Sequence[Request]
    ) -> None:
        moves = [
            Move(target, source, _num_kept(source, place))
            for place in moved
            for target, source in zip(group.rows[place.seat], group.rows[place.source], strict=True)
        ]
        reseat(self.kv_cache_manager, moves, [one for place in quiet for one in group.rows[place.seat]], gone)
        for move in moves:
            move.target.num_computed_tokens = move.num_computed
            self._totals["moved_seats"] += 1
            self._totals["copied_blocks"] += move.num_copied
            self._totals["recomputed_tokens"] += move.num_wanted - move.num_computed

    def _requeue(self, woken: Sequence[Request], gone: Sequence[Request], is_running: bool) -> None:
        """Put sequences that live from now on where the others of their search are, and take the dead out."""
        for member in woken:
            member.status = RequestStatus.RUNNING if is_running else RequestStatus.PREEMPTED
            member.is_prefill_chunk = False
            member.take_prefill_stats()  # vLLM takes who has them for one that has generated nothing yet
        if not is_running:
            self.waiting.prepend_requests(woken)
            self.waiting.remove_requests(gone)
            self.deferred_waiting.difference_update(gone)
            return
        names = {member.request_id for member in gone}
        self.running = [request for request in self.running if request.request_id not in names] + list(woken)
        for member in gone:
            member.status, member.num_computed_tokens = RequestStatus.PREEMPTED, 0
        self._moved -= names
        self.reset_preempted_req_ids |= names  # Model Runner V2 keeps no room for them


def _counts(group: SearchGroup, verdict: Verdict) -> dict[str, int]:
    """Of the whole search, so far."""
    return {**verdict.counts, **group.counts}


def _num_kept(source: Request, place: Placed) -> int:
    """The leading tokens of a sequence that a continuation keeps and that are computed. Its last token never is: it is
    the one that the next step computes."""
    num = source.num_prompt_tokens + place.keep
    return int(min(num, source.num_computed_tokens, num + len(place.tokens) - 1))


def _replace_output(request: Request, tokens: Sequence[int], hash_block_size: int) -> None:
    """Let a sequence have generated `tokens`, with the keys of its blocks."""
    old = request._output_token_ids
    pairs = enumerate(zip(old, tokens, strict=False))
    num_common = next((index for index, (one, other) in pairs if one != other), min(len(old), len(tokens)))
    old[:] = tokens
    request._all_token_ids[request.num_prompt_tokens :] = tokens
    del request.block_hashes[(request.num_prompt_tokens + num_common) // hash_block_size :]
    request.update_block_hashes()
