"""From engine arguments to a running, steerable engine: vLLM's AsyncLLM with our worker, scheduler and guard."""

import asyncio
import time
from argparse import Namespace
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, Literal, Protocol

from transformers import AutoTokenizer
from vllm.config import ModelConfig, VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GracefulHTTPError, RetryableRequestError, VLLMClientError
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from whipstaff.decoding.plan import Rewrite
from whipstaff.server import plan as plans
from whipstaff.server.engine import UnsupportedEngine, causes
from whipstaff.server.engine.config import auxiliary_config, max_tokens, require_eager_attention
from whipstaff.server.engine.explanations import EXPLAIN_KEY, READINGS
from whipstaff.server.engine.frontend import tracing
from whipstaff.server.engine.frontend.answers import Answers
from whipstaff.server.engine.layout import AuxiliarySpec, Layout
from whipstaff.server.engine.patch import Swapped, swap
from whipstaff.server.engine.searches import DRAFT_KEY
from whipstaff.server.leases import NOTHING, Lease
from whipstaff.server.plan import Computed
from whipstaff.steering.method import HookPoint
from whipstaff.steering.needs import Hook, Needs
from whipstaff.steering.shape import SITES, ModelShape, config_shape
from whipstaff.steering.sites import CORE
from whipstaff.steering.vector_file import Vector

_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "whipstaff.server.engine.worker.cpu_worker.CpuWorker",
    "vllm.v1.worker.gpu_worker.Worker": "whipstaff.server.engine.worker.cuda_worker.CudaWorker",
}
_SCHEDULERS = "whipstaff.server.engine.scheduler.scheduler."
COUNTERS = "whipstaff_counters"  # the workers' method
NUM_HISTORIES = 64  # conditions in use at once
MIN_SLOTS, MAX_SLOTS = 16, 256  # by default; one request may need several
MIN_SEARCH_SEQS = 5  # that searches may have at once, where the engine runs as many: beams of the usual width
EARLY_BUDGET = 1 << 28  # bytes: where the streams of all layers take more, none are kept unless asked for
CAPTURE_BYTES = 1 << 28  # of activations that requests read at once, by default


class PlanDict(dict[str, Any]):
    """A plan in wire form that our own front end made. A client can put JSON into `vllm_xargs`, but never one of these.

    It counts its tokens. `note` is called with each of the request's outputs, `explained` with the
    number of a sequence and what is said of its next token, where the plan asks for that; `lease` is of the vectors
    that the plan names; `answers` makes the request's answers of what the engine generates, where they are not just
    that; `asked` is what its span says where requests are traced; `named` is called with the number of each of its
    sequences and the engine's name for it; `read` with the number of a sequence and what probes read of its last token,
    as it comes, where the plan asks for that.
    """

    def __init__(
        self,
        wire: dict[str, Any],
        note: Callable[[Any], None] | None = None,
        explained: Callable[[int, dict[str, Any]], None] | None = None,
        lease: Lease = NOTHING,
        answers: Answers | None = None,
        asked: Mapping[str, Any] | None = None,
        named: Callable[[int, str], None] | None = None,
        read: Callable[[int, dict[str, Any]], None] | None = None,
    ) -> None:
        super().__init__(wire)
        self.label, self.named, self.read = str(wire["label"]), named, read
        self._generated: Counter[int] = Counter()  # tokens, by the number of the sequence
        self.note, self.explained, self.lease, self.answers = note, explained, lease, answers
        self.asked = asked or {}

    def note_tokens(self, sequence: int, num: int) -> None:
        """The engine generated so many more, whoever gets them."""
        self._generated[sequence] += num

    @property
    def num_computed(self) -> int:
        """Tokens that its sequences have computed and tried so far; what a search has, only the engine counts."""
        decoding = self["decoding"]
        if decoding and decoding["search"]:
            return 0
        num_tried = sum(Rewrite(*one).num_tried for one in decoding["rewrites"]) if decoding else 0
        untils = [companion["until"] for companion in self["companions"]]
        return sum(Computed.of(num, untils, num_tried).num for num in self._generated.values())

    def __deepcopy__(self, _: dict[int, Any]) -> "PlanDict":
        return self  # a copy of a request's parameters is still that request's


class Bill(Protocol):
    """Hears what comes of one prompt."""

    def note(self, num_tokens: int) -> None:
        """So many more tokens were generated, whoever gets them."""

    def end(self, num_tokens: int) -> None:
        """All answers are there, of so many tokens."""


_BILL: ContextVar[Bill | None] = ContextVar("bill", default=None)
"""Of what is being asked of vLLM, which copies nothing but the fields of what it is asked."""

EarlyLayers = Sequence[int] | Literal["all"] | None  # None: all of them where that takes little memory
Watch = Callable[[PlanDict | None, AsyncGenerator[Any, None], tuple[type[Exception], ...]], AsyncGenerator[Any, None]]
ENDING = "the server is shutting down"
_LAST_WORDS, _PAUSE = 1.0, 0.02  # seconds that the engine's processes have to say why they ended; between two looks
_REFUSALS = (VLLMClientError, GracefulHTTPError)  # of requests that vLLM does not schedule


class Engine(AsyncLLM):
    """AsyncLLM that takes plans from our front end only, and lets it watch every generation."""

    layout: Layout
    index: int  # among the API servers of one engine
    watch: Watch | None = None
    num_asked = 0  # generations that began or ended, and calls of workers but those for counters
    num_generating = 0  # now
    is_cut = False  # whether the server ends, and no answer goes on

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """Raises: RetryableRequestError where the server ends before the answer does, or the engine dies."""
        if self.is_cut:
            raise RetryableRequestError(ENDING)
        plan, outputs = self._plan_of(sampling_params), self.unwatched(prompt, sampling_params, *args, **kwargs)
        bill: Bill | None = getattr(sampling_params, "whipstaff_bill", None)
        num_answered = 0  # tokens
        try:
            async with aclosing(self.watch(plan, outputs, _REFUSALS) if self.watch else outputs) as watched:
                async for output in watched:
                    if any(one.finish_reason == "abort" for one in output.outputs):  # by nobody who still reads
                        raise RetryableRequestError(ENDING)
                    if bill is not None:
                        num_answered += sum(len(one.token_ids) for one in output.outputs)
                        if output.finished:
                            bill.end(num_answered)
                    yield output
        except EngineDeadError:
            raise RetryableRequestError(await self.cause_of_death()) from None

    async def unwatched(
        self, prompt: Any, sampling_params: SamplingParams, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """The same for what no client asked for."""
        plan, outputs = self._plan_of(sampling_params), super().generate(prompt, sampling_params, *args, **kwargs)
        if plan is not None and plan.answers is not None:
            outputs = plan.answers.of(outputs, self.tokenizer)
        self.num_asked, self.num_generating = self.num_asked + 1, self.num_generating + 1
        _BILL.set(getattr(sampling_params, "whipstaff_bill", None))
        try:
            with nullcontext() if plan is None else plan.lease.again():
                async with aclosing(outputs):
                    async for output in outputs:
                        yield output
        finally:
            self.num_asked, self.num_generating = self.num_asked + 1, self.num_generating - 1

    async def collective_rpc(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self.num_asked += method != COUNTERS
        return await super().collective_rpc(method, *args, **kwargs)

    async def cut(self) -> int:
        """End every answer that runs, as one that broke off; how many there were."""
        self.is_cut, running = True, list(self.output_processor.request_states)
        await self.abort(running, internal=True)
        return len(running)

    def mourn(self) -> None:
        """The engine is dead, and everybody who waits for it shall know."""
        self.engine_core.resources.engine_dead = True
        self.output_processor.propagate_error(EngineDeadError())

    async def cause_of_death(self) -> str:
        """A sentence; processes say what ended them a moment after that is noticed."""
        deadline = time.monotonic() + _LAST_WORDS
        while not (cause := causes.told() or self._lost_process()) and time.monotonic() < deadline:
            await asyncio.sleep(_PAUSE)
        return f"the engine died: {cause or 'nobody said why'}"

    def _lost_process(self) -> str:
        """How a process of the engine ended that this one has started."""
        manager = self.engine_core.resources.engine_manager
        ended = {} if manager is None else manager.finished_procs()
        return next((causes.ending(name, status) for name, status in ended.items()), "")

    def _plan_of(self, params: SamplingParams) -> PlanDict | None:
        """Raises: ValueError for one that our front end did not make, or that this engine cannot take."""
        plan = (params.extra_args or {}).get(plans.PLAN_KEY)
        if plan is not None and not isinstance(plan, PlanDict):
            raise ValueError(f"vllm_xargs.{plans.PLAN_KEY} is reserved; send `steering` and `decoding` instead")
        if plan is not None and (reason := _why_refused(plan["companions"], self.vllm_config)):
            raise ValueError(reason)
        return plan


class Listening(Swapped):
    """Laid over vLLM's output processor: explanations go to who asked for them, whom it keeps with the rest of what it
    knows of a sequence that is not finished; and so for what a request's span says, and for who pays. An answer that is
    not streamed is not told of before its end, and one that is cut off never: its tokens are counted here."""

    whipstaff_counts = False  # whether anybody ever counted

    def add_request(
        self, request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, *args: Any, **kwargs: Any
    ) -> None:
        super().add_request(request, prompt, parent_req, request_index, *args, **kwargs)
        plan = (request.sampling_params.extra_args or {}).get(plans.PLAN_KEY) if request.sampling_params else None
        state, bill = self.request_states[request.request_id], _BILL.get()
        counts: list[Callable[[int], None]] = [] if bill is None else [bill.note]
        if isinstance(plan, PlanDict):
            counts.append(partial(plan.note_tokens, request_index))
        if counts:
            self.whipstaff_counts, state.whipstaff_counts = True, counts
        if not isinstance(plan, PlanDict):
            return
        if plan.named is not None:
            plan.named(request_index, request.request_id)
        if plan.explained is not None:
            state.whipstaff_explained = partial(plan.explained, request_index)
        if plan.read is not None:
            state.whipstaff_read = partial(plan.read, request_index)
        if self.tracing_enabled:
            state.whipstaff_plan = plan

    def process_outputs(self, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.whipstaff_counts:
            for output in engine_core_outputs:
                for note in getattr(self.request_states.get(output.request_id), "whipstaff_counts", ()):
                    note(len(output.new_token_ids))
        heard = set[int]()  # outputs that say nothing to vLLM
        for index, output in enumerate(engine_core_outputs):
            if output.kv_transfer_params and (told := output.kv_transfer_params.pop(EXPLAIN_KEY, None)) is not None:
                output.kv_transfer_params = None
                state = self.request_states.get(output.request_id)  # None: it was aborted just now
                read = told.pop(READINGS, None)
                if read is not None and (note := getattr(state, "whipstaff_read", None)) is not None:
                    note(read)
                if told and (hear := getattr(state, "whipstaff_explained", None)) is not None:  # searches tell unasked
                    hear(told)
                if not (output.new_token_ids or output.finished or DRAFT_KEY in told):
                    heard.add(index)
        if heard:
            engine_core_outputs = [one for index, one in enumerate(engine_core_outputs) if index not in heard]
        return super().process_outputs(engine_core_outputs, *args, **kwargs)

    def do_tracing(self, engine_core_output: Any, req_state: Any, *args: Any, **kwargs: Any) -> None:
        plan = getattr(req_state, "whipstaff_plan", None)
        with nullcontext() if plan is None else tracing.said_of(plan, plan.asked):
            super().do_tracing(engine_core_output, req_state, *args, **kwargs)


@dataclass(frozen=True)
class Setup:
    """What an engine is made for, beside what vLLM's own arguments say."""

    auxiliaries: Iterable[tuple[str, str]] = ()  # (name, model) of further models to load beside the base
    num_slots: int | None = None
    """Distinct rows of edits that may be in use at once; None: as many as sequences, within MIN_SLOTS and MAX_SLOTS."""
    vectors: Iterable[Vector] = ()  # what will be served: the hook points that they edit are hooked
    sites: Iterable[Hook] = ()  # further ones to hook, beside the residual stream and the head outputs; or attention
    early_layers: EarlyLayers = None  # whose streams can be kept for methods that read them: `steering.plan.StreamCopy`
    lookahead: bool = False  # whether methods may try tokens before one is chosen: `worker.logits.lookahead`
    max_search_seqs: int | None = None
    """Sequences that requests which search may have at once, all together; None: half of all, or enough for one with
    MIN_SEARCH_SEQS."""
    attention_rows: bool = False  # whether methods may read what the last layer attends to: `last_attention`
    hidden_states: int = 0  # sequences whose hidden states can be kept whole: `hidden_histories`
    capture_layers: EarlyLayers = None  # whose activations requests may read, at all sites: `worker.edits.captures`
    max_capture_bytes: int = CAPTURE_BYTES  # of activations that are read at once, counted as float32
    attention_layers: Sequence[int] | Literal["all"] = ()
    """Of which requests may be told what their heads look at: `worker.attention_rows`."""
    one_form: bool = False  # whether steps in which nothing is edited go through the sites, too: `edits.forms`


def start(args: Namespace | AsyncEngineArgs, setup: Setup = Setup(), client: Mapping[str, Any] | None = None) -> Engine:
    """Start an engine that can be steered; blocks until the model is loaded.

    Args:
        args: parsed command-line flags, or vLLM's engine arguments.
        client: where to find an engine that was launched before, for one of several API servers.

    Raises:
        UnsupportedEngine: naming the setting that Whipstaff cannot serve.
    """
    engine_args = AsyncEngineArgs.from_cli_args(args) if isinstance(args, Namespace) else args
    addresses = dict(client or {})
    count, index = addresses.pop("client_count", 1), addresses.pop("client_index", 0)
    if client is not None:
        engine_args._api_process_count, engine_args._api_process_rank = count, index
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    layout = configure(config, setup)
    engine: Engine = Engine.from_vllm_config(
        vllm_config=config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=engine_args.enable_log_requests,
        aggregate_engine_logging=engine_args.aggregate_engine_logging,
        disable_log_stats=engine_args.disable_log_stats,
        client_addresses=addresses or None,
        client_count=count,
        client_index=index,
    )
    engine.layout, engine.index = layout, index
    swap(engine.output_processor, Listening)
    if config.observability_config.otlp_traces_endpoint is not None:
        tracing.install()
    return engine


def configure(config: VllmConfig, setup: Setup = Setup()) -> Layout:
    """Put our worker, our scheduler and our layout into a resolved engine config. Raises: UnsupportedEngine."""
    _refuse_unsupported(config)
    _refuse_drafts(config, setup)
    if setup.lookahead:
        _refuse_lookahead(config)
    for flag, is_on in (("--attention-rows", setup.attention_rows), ("--attention-layers", setup.attention_layers)):
        if is_on:
            _refuse_attention_rows(config, flag)
    if setup.hidden_states:
        _refuse_hidden_states(config)
    specs = tuple(_auxiliary_spec(config, name, model) for name, model in setup.auxiliaries)
    shape = model_shape(config.model_config)
    needs = Needs.of((vector for vector in setup.vectors if vector.fits(shape)), hooks := tuple(setup.sites))
    if "router" in hooks and not shape.num_experts:
        raise UnsupportedEngine("--steering-sites router: the served model has no experts")
    early = _early_layers(setup.early_layers, config, shape)
    hooked = {*CORE, *needs.sites, *(HookPoint.entering(layer).site for layer in early)} - (
        set() if shape.num_experts else {"router"}
    )  # such vectors are refused by request
    most = config.scheduler_config.max_num_seqs
    layout = Layout(
        version=metadata.version("whipstaff"),
        num_slots=setup.num_slots or max(MIN_SLOTS, min(most, MAX_SLOTS)),
        shape=shape,
        num_histories=NUM_HISTORIES,
        max_len=config.model_config.max_model_len,
        sites=tuple(site for site in SITES if site in hooked),
        edits_attention=needs.attention,
        encoders=tuple((point.site, point.layer, size) for point, size in needs.encoders.items()),
        early_layers=early,
        auxiliaries=specs,
        looks_ahead=setup.lookahead,
        max_search_seqs=min(most, setup.max_search_seqs or max(most // 2, MIN_SEARCH_SEQS)),
        reads_attention=setup.attention_rows,
        attention_layers=_named_layers("--attention-layers", setup.attention_layers, shape.num_layers),
        num_hidden_states=setup.hidden_states,
        max_capture_bytes=setup.max_capture_bytes,
        has_plain_form=not setup.one_form,
        num_drafts=config.num_speculative_tokens,
    )
    layout = layout.model_copy(update={"capture_layers": _capture_layers(setup.capture_layers, config, layout)})
    if layout.edits_attention:
        require_eager_attention(config.compilation_config)
    config.additional_config = {**(config.additional_config or {}), **layout.to_config()}
    config.parallel_config.worker_cls = _WORKERS[config.parallel_config.worker_cls]
    is_async = config.scheduler_config.async_scheduling
    config.scheduler_config.scheduler_cls = _SCHEDULERS + ("AsyncSteeredScheduler" if is_async else "SteeredScheduler")
    if specs and config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        # A full graph would run every auxiliary model in every step.
        config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    return layout


def model_shape(config: ModelConfig) -> ModelShape:
    """The whole model's shape, whatever one rank holds of it."""
    return config_shape(config.hf_config, config.hf_text_config)


def _early_layers(wanted: EarlyLayers, config: VllmConfig, shape: ModelShape) -> tuple[int, ...]:
    everything = tuple(range(shape.num_layers))
    if wanted is None:
        of_one = max_tokens(config) * shape.hidden_size * config.model_config.dtype.itemsize
        return everything if of_one * shape.num_layers <= EARLY_BUDGET else ()
    layers = everything if wanted == "all" else tuple(sorted(set(wanted)))
    if outside := [layer for layer in layers if layer not in everything]:
        raise UnsupportedEngine(
            f"--early-layers {outside[0]}: the served model has {shape.num_layers} blocks; its early layers are 0 to "
            f"{shape.num_layers - 1}"
        )
    return layers


def _capture_layers(wanted: EarlyLayers, config: VllmConfig, layout: Layout) -> tuple[int, ...]:
    num = layout.shape.num_layers
    if wanted is None:
        of_one = max_tokens(config) * sum(map(layout.shape.width, layout.sites)) * config.model_config.dtype.itemsize
        return tuple(range(num)) if of_one * num <= EARLY_BUDGET else ()
    return _named_layers("--capture-layers", wanted, num)


def _named_layers(flag: str, wanted: Sequence[int] | Literal["all"], num: int) -> tuple[int, ...]:
    layers = tuple(range(num)) if wanted == "all" else tuple(sorted(set(wanted)))
    if outside := [layer for layer in layers if layer >= num]:
        raise UnsupportedEngine(f"{flag} {outside[0]}: the served model has blocks 0 to {num - 1}")
    return layers


def _auxiliary_spec(config: VllmConfig, name: str, model: str) -> AuxiliarySpec:
    base = config.model_config
    auxiliary = auxiliary_config(base, model)
    if base.is_multimodal_model or base.enable_prompt_embeds:
        raise UnsupportedEngine("--aux: auxiliary models need token ids; this base takes embeddings")
    if difference := _vocabulary_difference(base, auxiliary):
        raise UnsupportedEngine(f"--aux {name}={model}: {difference}; auxiliary models must share the base's tokens")
    return AuxiliarySpec(name=name, model=model, max_len=min(auxiliary.max_model_len, base.max_model_len))


def _vocabulary_difference(base: ModelConfig, auxiliary: ModelConfig) -> str | None:
    """How an auxiliary model's tokens differ from the base's, beyond padding; None if they do not."""
    if base.skip_tokenizer_init:
        if auxiliary.get_vocab_size() >= base.get_vocab_size():
            return None
        return (
            f"its vocabulary has {auxiliary.get_vocab_size()} entries, the base's {base.get_vocab_size()}, and "
            "without tokenizers nothing says that the rest is padding"
        )
    theirs = AutoTokenizer.from_pretrained(auxiliary.model, trust_remote_code=base.trust_remote_code).get_vocab()
    ours = AutoTokenizer.from_pretrained(base.tokenizer, trust_remote_code=base.trust_remote_code).get_vocab()
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != index:
            return f"token {token!r} is {index} in the base's vocabulary and {theirs.get(token, 'absent')} in its own"
    if auxiliary.get_vocab_size() < len(ours):
        return f"it has logits for {auxiliary.get_vocab_size()} tokens, the base's tokenizer {len(ours)}"
    return None


def _refuse_unsupported(config: VllmConfig) -> None:
    """Settings under which edits or mixes would be wrong or silently lost."""
    if config.parallel_config.worker_cls not in _WORKERS:
        raise UnsupportedEngine(
            f"no steered worker for {config.parallel_config.worker_cls}; CPU and CUDA are supported"
        )
    refused = {
        "--runner pooling": config.model_config.runner_type != "generate",
        "--pipeline-parallel-size > 1": config.parallel_config.pipeline_parallel_size > 1,
        "--enable-batch-sharded-sampling": config.parallel_config.enable_batch_sharded_sampling,
        "--enable-dbo": config.parallel_config.enable_dbo,
        "--prefill-context-parallel-size > 1": config.parallel_config.prefill_context_parallel_size > 1,
        "--kv-transfer-config": config.kv_transfer_config is not None,
    }
    for setting, is_on in refused.items():
        if is_on:
            raise UnsupportedEngine(f"{setting} is not supported together with per-request steering")


def _refuse_drafts(config: VllmConfig, setup: Setup) -> None:
    """Of vLLM's ways to speculate, all but those under which edits and methods are known to hold."""
    speculative = config.speculative_config
    if speculative is None:
        return
    refused = {
        f"--speculative-config with the method {speculative.method}; ngram": speculative.method != "ngram",
        "--speculative-config that accepts drafts at made-up rates (synthetic); one that verifies them": (
            speculative.rejection_sample_method != "standard"
        ),
        "--speculative-config on Model Runner V2; VLLM_USE_V2_MODEL_RUNNER=0 chooses V1, which": (
            config.use_v2_model_runner
        ),
    }
    for setting, is_on in refused.items():
        if is_on:
            refused_one, _, instead = setting.partition("; ")
            raise UnsupportedEngine(f"{refused_one} is not supported together with per-request steering; {instead} is")
    if setup.lookahead:
        _refuse("--lookahead", {"--speculative-config": True})


def _refuse_lookahead(config: VllmConfig) -> None:
    """What a token that is tried and not chosen would leave behind, or what a further pass would lack."""
    model = config.model_config
    refused = {
        "a model with recurrent state": model.is_hybrid or model.has_inner_state or model.is_attention_free,
        "a model with an encoder": model.is_encoder_decoder,
        "--enable-prompt-embeds": model.enable_prompt_embeds,
        "positions of several dimensions": model.uses_mrope,
        "--decode-context-parallel-size > 1": config.parallel_config.decode_context_parallel_size > 1,
        "--enable-eplb": config.parallel_config.enable_eplb,
        "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
    }
    _refuse("--lookahead", refused)


def _refuse_attention_rows(config: VllmConfig, flag: str) -> None:
    """Where one rank does not see all keys, or the layer not all tokens."""
    refused = {
        "a model with an encoder": config.model_config.is_encoder_decoder,
        "--decode-context-parallel-size > 1": config.parallel_config.decode_context_parallel_size > 1,
        "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
    }
    _refuse(flag, refused)


def _refuse_hidden_states(config: VllmConfig) -> None:
    """Where a forward pass does not give those of all of a step's tokens."""
    refused = {
        "a model with an encoder": config.model_config.is_encoder_decoder,
        "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
    }
    _refuse("--hidden-states", refused)


def _refuse(flag: str, refused: Mapping[str, bool]) -> None:
    for setting, is_on in refused.items():
        if is_on:
            raise UnsupportedEngine(f"{flag} is not supported together with {setting}")


def _why_refused(companions: Sequence[Mapping[str, Any]], config: VllmConfig) -> str | None:
    """Why an engine cannot take a plan's companions (in wire form), whatever their primary; None if it can."""
    most = config.scheduler_config.max_num_active_seqs or config.scheduler_config.max_num_seqs
    max_len = config.model_config.max_model_len
    if companions and len(companions) >= most:
        return (
            f"the request needs {len(companions) + 1} sequences at once and the engine runs at most {most}; "
            "start the server with a larger --max-num-seqs"
        )
    for index, companion in enumerate(companions, 1):
        if not 0 < len(companion["prompt"]) < max_len:
            return f"sequence {index} has a prompt of {len(companion['prompt'])} tokens; it may have 1 to {max_len - 1}"
        if not 0 <= min(companion["prompt"]) <= max(companion["prompt"]) < config.model_config.get_vocab_size():
            return f"sequence {index} has a prompt with tokens that are not in the vocabulary"
    block, num_blocks = config.cache_config.block_size, config.cache_config.num_gpu_blocks
    wanted = 1 + sum(-(-(len(companion["prompt"]) + 1) // block) for companion in companions)
    if companions and num_blocks and wanted >= num_blocks:
        return f"the request's prompts need {wanted} blocks of KV cache at once and there are {num_blocks - 1}"
    return None
