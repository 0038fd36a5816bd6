"""The worker: vLLM's own, plus a steerer, sites and auxiliary models attached to what it loads."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from whipstaff.server.engine import causes
from whipstaff.server.engine.config import max_tokens
from whipstaff.server.engine.explanations import attach
from whipstaff.server.engine.layout import Layout
from whipstaff.server.engine.occupancy import GroupUse, SlotUse
from whipstaff.server.engine.worker import runner_v1, runner_v2
from whipstaff.server.engine.worker.auxiliary import Auxiliary
from whipstaff.server.engine.worker.edits.module_edits import ModuleEdits
from whipstaff.server.engine.worker.edits.sites import install_sites
from whipstaff.server.engine.worker.edits.soft_prompts import install_soft_rows
from whipstaff.server.engine.worker.logits.lookahead import Lookahead
from whipstaff.server.engine.worker.logits.model_hook import compose
from whipstaff.server.engine.worker.logits.pipeline import Arrival, Decoder
from whipstaff.server.engine.worker.lora import StepAdapters, settle_adapters
from whipstaff.server.engine.worker.step import Steerer
from whipstaff.server.plan import PositionedPlan, RequestPlan
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.tables import Tables
from whipstaff.steering.vector_file import parse, read, without_file


class SteeredWorker:
    """Mixed into a platform's worker class. Methods named whipstaff_* are called over `collective_rpc`."""

    vllm_config: Any
    model_runner: Any
    _slot_use, _group_use = SlotUse(), GroupUse()
    _proven: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        causes.tell()
        super().__init__(*args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        config = self.vllm_config
        layout = Layout.from_config(config.additional_config)
        runner, hidden_size = self.model_runner, int(config.model_config.get_hidden_size())
        model = runner.get_model()
        if config.lora_config is not None:
            settle_adapters(runner, model)
        auxiliaries = [Auxiliary(spec, config) for spec in layout.auxiliaries]
        self._holders: dict[str, set[str]] = {}  # of the vectors that may be dropped: who holds each
        self._vectors = {vector.digest: vector for vector in without_file(layout.shape).values()}
        self._heads: dict[str, dict[str, Tensor]] = {}
        decoder = Decoder(
            runner.device,
            config.model_config.max_model_len,
            [auxiliary.name for auxiliary in auxiliaries],
            self._head,
        )
        self._steerer = Steerer(
            max_tokens(config),
            runner.device,
            decoder,
            layout.num_histories,
            layout.max_len,
        )
        self._steerer.tables = install_sites(
            model, layout, self._steerer, self._vectors.__getitem__, config.model_config.dtype
        )
        self._steerer.soft = install_soft_rows(
            model, config.model_config, max_tokens(config), runner.device, self._vectors.__getitem__
        )
        self._steerer.specials = ModuleEdits(
            model,
            max_tokens(config),
            runner.device,
            self._vectors.__getitem__,
            layout.num_slots,
            edits_router="router" in layout.sites,
            edits_attention=layout.edits_attention,
        )
        base, adapters = partial(type(model).forward, model), StepAdapters(runner)
        compose(model, auxiliaries, self._steerer, hidden_size, adapters)
        adapter = runner_v2 if _is_v2(runner) else runner_v1
        adapter.attach(runner, self._steerer)
        if layout.looks_ahead:
            decoder.look_ahead = Lookahead(runner, base, self._steerer, adapter.block_tables, adapters).after

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_from_config(*args, **kwargs)  # type: ignore[misc]
        assert self._steerer.specials is not None
        if self._steerer.specials.attention is not None:
            self._steerer.specials.attention.learn_layouts()

    def execute_model(self, scheduler_output: Any) -> Any:
        arrivals = [_arrival(new) for new in scheduler_output.scheduled_new_reqs]
        self._steerer.note_requests(
            scheduler_output.finished_req_ids, ((new.request_id, new.placed) for new in arrivals)
        )
        self._steerer.decoder.note_requests(scheduler_output.finished_req_ids, arrivals)
        # warm-up comes from no scheduler of ours
        self._steerer.groups = getattr(scheduler_output, "whipstaff_groups", {})
        self._slot_use, self._group_use = getattr(scheduler_output, "whipstaff_use", (self._slot_use, self._group_use))
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)  # type: ignore[misc]
        return attach(output, self._steerer.decoder.take_explanations())

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
        if self._steerer.specials is not None:
            self._steerer.specials.forget(digest)

    @property
    def _tables(self) -> Tables:
        assert self._steerer.tables is not None
        return self._steerer.tables

    def whipstaff_describe(self) -> dict[str, Any]:
        """The model's shape, its sites and the way it runs."""
        model_config = self.vllm_config.model_config
        return {
            "model": Layout.from_config(self.vllm_config.additional_config).shape.model_dump(),
            "sites": [list(place) for place in self._tables.hook_points],
            "dtype": str(model_config.dtype).removeprefix("torch."),
            "takes_soft_prompts": self._steerer.soft is not None,
            "has_final_norm": self._steerer.decoder.early is not None and self._steerer.decoder.early.has_norm,
            "specials": self._steerer.specials.facts() if self._steerer.specials else {},
            "runner": "v2" if _is_v2(self.model_runner) else "v1",
        }

    def whipstaff_readings(self, readings_id: str) -> list[dict[str, Any]]:
        """What the conditions of a request read: for each of its sequences, finished ones first,
        {"positions": how many were fed, "columns": a list of readings by position for each condition, or the one
        reading that decided}; None where nothing was read. Empty when nobody has that ticket, or not any more."""
        return self._steerer.readings_of(readings_id)

    def whipstaff_note_proven(self, facts: Any) -> None:
        """Keep what the API server that tested this engine has to say to those that did not."""
        self._proven = facts

    def whipstaff_proven(self) -> Any:
        """The same; None before."""
        return self._proven

    def whipstaff_norms(self) -> list[tuple[str, int, float, int]]:
        """(site, layer, sum of lengths, tokens) that were metered since the last call; this rank's part of them."""
        measured = self._steerer.meters.tolist()
        self._steerer.meters.zero_()
        return [
            (*place, total, int(num)) for place, (total, num) in zip(self._tables.hook_points, measured, strict=True)
        ]

    def whipstaff_counters(self) -> dict[str, Any]:
        """What happened since the start, and what is held now."""
        steerer = self._steerer
        return {
            "steps": steerer.num_steps,
            "auxiliary_steps_run": dict(steerer.decoder.auxiliary_steps.run),
            "auxiliary_steps_skipped": dict(steerer.decoder.auxiliary_steps.skipped),
            "table_uploads": self._tables.num_uploads,
            "rows_loaded": self._tables.num_used,
            "vectors_held": len(self._holders),
            "requests_held": steerer.num_requests + steerer.decoder.num_requests,
            "slots_in_use": self._slot_use.num_used,
            "requests_waiting_for_slots": self._slot_use.num_waiting,
            "histories_used": steerer.num_histories_used,
            "companions_running": self._group_use.num_companions,
            "group_steps_held": self._group_use.num_steps_held,
            "groups_half_scheduled": self._group_use.num_half_scheduled,
        }


class CpuWorker(SteeredWorker, CPUWorker):
    """On CPUs."""


class CudaWorker(SteeredWorker, Worker):
    """On CUDA devices."""


def _is_v2(runner: Any) -> bool:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    return isinstance(runner, GPUModelRunner)


def _arrival(new: Any) -> Arrival:
    parameters = new.sampling_params
    plan = RequestPlan.from_wire(parameters.extra_args if parameters else None)
    if plan is None:
        return Arrival(new.req_id, None, ())
    placed = PositionedPlan(plan, int(new.prompt_len))
    scores_prompt = parameters.prompt_logprobs is not None
    bans = parameters.structured_outputs, parameters.allowed_token_ids, parameters.bad_words, parameters.min_tokens
    ids, bias = new.prompt_token_ids or (), parameters.logit_bias or {}
    return Arrival(new.req_id, placed, ids, parameters.seed, scores_prompt, any(bans), bias)
