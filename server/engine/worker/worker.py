"""The worker: vLLM's own, which does what is in `step.py` in every step, and answers the front end's calls.

What it is mixed into is in a module for each platform, `cpu_worker` and `cuda_worker`: vLLM's module of the CPU's
worker puts stand-ins for CUDA's streams, events and pinned memory into torch as it is imported.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from whipstaff.server.engine import causes
from whipstaff.server.engine.layout import Layout
from whipstaff.server.engine.worker.build import build_step, is_v2
from whipstaff.server.engine.worker.step import WorkerStep
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.tables import Tables
from whipstaff.steering.vector_file import Vector, parse, read, without_file


class SteeredWorker:
    """Mixed into a platform's worker class. Methods named whipstaff_* are called over `collective_rpc`."""

    vllm_config: Any
    model_runner: Any
    _step: WorkerStep
    _vectors: dict[str, Vector]
    _holders: dict[str, set[str]]  # of the vectors that may be dropped: who holds each
    _heads: dict[str, dict[str, Tensor]]
    _proven: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        causes.tell()
        super().__init__(*args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        shape = Layout.from_config(self.vllm_config.additional_config).shape
        self._vectors = {vector.digest: vector for vector in without_file(shape).values()}
        self._holders, self._heads = {}, {}
        self._step = build_step(self.model_runner, self.vllm_config, self._vectors.__getitem__, self._head)

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_from_config(*args, **kwargs)  # type: ignore[misc]
        if self._step.edits.module_edits.attention is not None:
            self._step.edits.module_edits.attention.learn_layouts()
        if self._step.pipeline.attention is not None:
            self._step.pipeline.attention.learn_layout()
        for attention in self._step.edits.captures.attention.values():
            attention.learn_layout()

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        took = super().compile_or_warm_up_model(*args, **kwargs)  # type: ignore[misc]
        self._step.edits.forms.warms_both = False  # from here on a dummy pass stands for a step
        return took

    def execute_model(self, scheduler_output: Any) -> Any:
        self._step.note_schedule(scheduler_output)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._step.tell(super().sample_tokens(*args, **kwargs))  # type: ignore[misc]

    def _head(self, digest: str) -> dict[str, Tensor]:
        """The tensors of a learned head, where the model is."""
        if digest not in self._heads:
            device = self.model_runner.device
            self._heads[digest] = {
                part: tensor.to(device) for part, tensor in self._vectors[digest].shared_parts.items()
            }
        return self._heads[digest]

    def whipstaff_load_vector(self, path: str, digest: str, holder: str = "") -> str | None:
        """Read a vector file so that requests may name its digest, until every holder has dropped it. What is in the
        way, or None."""
        if digest not in self._vectors:
            try:
                vector = read(Path(path))
            except (SteeringError, OSError) as error:
                return f"{path} cannot be read: {error}"
            if vector.digest != digest:
                return f"{path} changed while it was being loaded"
            if (problem := self._tables.reserve(vector)) is not None:
                return problem
            self._vectors[digest] = vector
        self._holders.setdefault(digest, set()).add(holder)
        return None

    def whipstaff_add_vector(self, data: bytes) -> str:
        """Take a vector from the bytes of its file, and say its digest."""
        vector = parse(data)
        self._vectors[vector.digest] = vector
        self._holders.setdefault(vector.digest, set()).add("")
        return vector.digest

    def whipstaff_drop_vector(self, digest: str, holder: str = "") -> None:
        """Forget a vector once nobody holds it. No request that its holder made may name it any more."""
        holders = self._holders.get(digest, set())
        holders.discard(holder)
        if holders or digest not in self._holders:
            return
        del self._vectors[digest], self._holders[digest]
        self._tables.forget(digest)
        self._heads.pop(digest, None)
        self._step.edits.module_edits.forget(digest)

    @property
    def _tables(self) -> Tables:
        return self._step.edits.sites.tables

    def whipstaff_describe(self) -> dict[str, Any]:
        """The model's shape, its sites and the way it runs."""
        model_config = self.vllm_config.model_config
        return {
            "model": Layout.from_config(self.vllm_config.additional_config).shape.model_dump(),
            "sites": [list(point) for point in self._tables.hook_points],
            "dtype": str(model_config.dtype).removeprefix("torch."),
            "takes_soft_prompts": self._step.edits.soft_rows.is_on,
            "has_final_norm": self._step.pipeline.has_final_norm,
            "module_edits": self._step.edits.module_edits.facts(),
            "runner": "v2" if is_v2(self.model_runner) else "v1",
        }

    def whipstaff_readings(self, readings_id: str) -> list[dict[str, Any]]:
        """What the conditions of a request read: for each of its sequences, finished ones first, {"name": the engine's,
        "positions": how many were fed, "columns": a list of readings by position for each condition, or the one reading
        that decided}; None where nothing was read. Empty when nobody has that id, or not any more."""
        return self._step.edits.histories.readings_of(readings_id)

    def whipstaff_captures(self, captures_id: str) -> dict[str, list[dict[str, Any]]]:
        """The activations that a request asked for, by the engine's name of each of its sequences, for each of its
        entries: {"data": the bytes of (points, positions, width), "shape", "dtype", "seen": a byte for each position,
        whether it was computed}; then likewise for each layer whose attention is told, its width being heads times the
        positions that can be looked at. Where heads are sharded it is this rank's part. They are told once; empty when
        nobody has that id, or not any more."""
        return self._step.edits.captures.take(captures_id)

    def whipstaff_note_proven(self, facts: Any) -> None:
        """Keep what the API server that tested this engine has to say to those that did not."""
        self._proven = facts

    def whipstaff_proven(self) -> Any:
        """The same; None before."""
        return self._proven

    def whipstaff_norms(self) -> list[tuple[str, int, float, int]]:
        """(site, layer, sum of lengths, tokens) that were metered since the last call; this rank's part of them."""
        meters = self._step.edits.sites.meters
        measured = meters.tolist()
        meters.zero_()
        return [
            (*point, total, int(num)) for point, (total, num) in zip(self._tables.hook_points, measured, strict=True)
        ]

    def whipstaff_counters(self) -> dict[str, Any]:
        """What happened since the start, and what is held now."""
        step = self._step
        slot_use, group_use, cache_use = step.notes.slot_use, step.notes.group_use, step.notes.cache_use
        search_use, searched = step.notes.search_use, step.pipeline.searches.counts
        auxiliary_steps = step.pipeline.auxiliary_steps
        ran = auxiliary_steps.total()
        return {
            "steps": step.num_steps,
            "auxiliary_steps_run": dict(auxiliary_steps),
            "auxiliary_steps": {"yes": ran, "no": step.num_steps * step.pipeline.num_auxiliaries - ran},
            "lookahead_passes": step.pipeline.num_lookahead_passes,
            "table_uploads": self._tables.num_uploads,
            "table_upload_bytes": self._tables.num_uploaded_bytes,
            "rows_loaded": self._tables.num_used,
            "vectors_held": len(self._holders),
            "requests_held": len(step.requests),
            "slots_in_use": slot_use.num_used,
            "requests_waiting_for_slots": slot_use.num_waiting,
            "histories_used": step.edits.histories.num_used,
            "captures_held": step.edits.captures.num_held,
            "hidden_states_held": step.pipeline.num_hidden_states,
            "companions_running": group_use.num_companions,
            "group_steps": {"held": group_use.num_steps_held, "together": group_use.num_steps_together},
            "groups_preempted": group_use.num_preempted,
            "groups_half_scheduled": group_use.num_half_scheduled,
            "slot_waits": list(step.slot_waits),
            "num_slot_waits": step.num_slot_waits,
            "prefix_cache_queries": dict(cache_use.queries),
            "prefix_cache_hits": dict(cache_use.hits),
            "searches_running": search_use.num_searches,
            "search_sequences_living": search_use.num_living,
            "search_forks": search_use.forks,
            "search_rollbacks": search_use.rollbacks,
            "search_moved_seats": search_use.moved_seats,
            "search_copied_blocks": search_use.copied_blocks,
            "search_recomputed_tokens": search_use.recomputed_tokens,
            "search_tried": sum(searched.tried.values()),
            "search_computed": dict(Counter(search_use.computed) + Counter(searched.tried)),
            "search_seconds": searched.seconds,
        }
