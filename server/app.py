"""The application: a steerable engine, self-tested, behind vLLM's OpenAI server with our routes."""

import asyncio
import logging
import os
import signal
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.dependencies.utils import get_parameterless_sub_dependant
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from whipstaff import cuda_ext
from whipstaff.decoding.method import Depth
from whipstaff.server import metrics
from whipstaff.server.access.audit import Audit
from whipstaff.server.access.capture_files import CaptureFiles, folder_of_captures
from whipstaff.server.access.keys import HOLDER, Keyring, read_keys
from whipstaff.server.access.ledger import Ledger
from whipstaff.server.api import admin, batch, captures, fits, generate, lifecycle, messages, responses
from whipstaff.server.api.access import Access
from whipstaff.server.api.admin import Admin
from whipstaff.server.api.bounds import Bounds, Protocol
from whipstaff.server.api.greeting import Place, greeting
from whipstaff.server.api.lifecycle import Gate
from whipstaff.server.api.preset_check import check
from whipstaff.server.engine import SelfTestFailed, causes, vllm_version
from whipstaff.server.engine.frontend import guard, multi_api_server, openai
from whipstaff.server.engine.frontend.batch import serve_batches
from whipstaff.server.engine.frontend.counters import follow_counters
from whipstaff.server.engine.frontend.launch import Engine, Setup, configure, start
from whipstaff.server.engine.frontend.lifecycle import Lifecycle
from whipstaff.server.engine.frontend.lifecycle import serve as serve_until_told
from whipstaff.server.engine.frontend.messages import serve_messages
from whipstaff.server.engine.frontend.multi_api_server import SIGNALS as FORWARDED
from whipstaff.server.engine.frontend.multi_api_server import note_proven, proven
from whipstaff.server.engine.frontend.responses import serve_responses
from whipstaff.server.engine.frontend.selftest import Finding, calibrate, describe, self_test
from whipstaff.server.engine.frontend.vector_leases import VectorLeases
from whipstaff.server.errors import WhipstaffError
from whipstaff.server.fits.jobs import Fits
from whipstaff.server.playground.pages import serve_docs, serve_playground
from whipstaff.server.prompt.vocabulary import Vocabulary
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.folder import RegistryFolder
from whipstaff.server.registry.live import LiveRegistry
from whipstaff.server.registry.presets import preset_files, read_preset
from whipstaff.server.registry.vectors import VectorFile, VectorSnapshot, misfit, read_stored, read_vectors
from whipstaff.server.settings import Settings
from whipstaff.steering.edits import Lengths
from whipstaff.steering.method import HookPoint
from whipstaff.steering.served import Limit, ModuleAbilities
from whipstaff.steering.shape import ModelShape

logger = logging.getLogger("vllm.whipstaff")  # below vLLM's logger, so that its format and level apply

# vLLM's other routes that take JSON know nothing of the extra fields and would silently drop them: /invocations and
# whatever else there is. Where nothing is generated, dropping them does no harm.
_NOT_GENERATING = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")


async def serve(args: Namespace, settings: Settings) -> int:
    """Run the server until it is told to stop; the exit status. Raises: EngineDied."""
    with closing(openai.listen(args)[1]) as sock, folder_of_captures(_keeps_captures(settings)) as folder:
        args.whipstaff_captures = folder
        return await _serve(args, settings, sock)


def serve_several(args: Namespace, settings: Settings) -> int:
    """The same with several API servers around one engine, each a process of its own."""
    args.whipstaff_settings, args.whipstaff_ledger = settings, Ledger.of_several()

    def layout(config: Any) -> None:
        configure(config, _setup(settings, read_files(settings)[0].values()))

    with folder_of_captures(_keeps_captures(settings)) as folder:
        args.whipstaff_captures = folder
        return multi_api_server.run(args, layout, serve_one, settings.drain_timeout)


def serve_one(sock: Any, args: Namespace, client: dict[str, Any]) -> int:
    """One of them."""
    return multi_api_server.run_one(_serve(args, args.whipstaff_settings, sock, client))


async def _serve(args: Namespace, settings: Settings, sock: Any, client: dict[str, Any] | None = None) -> int:
    loads = (client or {}).pop("api_server_loads", None)
    ledger = args.whipstaff_ledger if client else Ledger.of_one()
    files, store = read_files(settings)
    engine = launch(args, settings, files, client)
    try:
        registry = await load(engine, settings, files, store)
        del files  # from here on the registry alone says which vectors live
        if engine.index == 0:
            await prove(engine, await registry.current())
            await note_proven(engine, (await registry.current()).lengths.by_point)
            causes.forget()
        keyring = None if settings.keys is None else Keyring(settings.keys, ledger)
        life = Lifecycle(engine, settings.drain_timeout, FORWARDED if client else (signal.SIGTERM, signal.SIGINT))
        app = await extend(await _built(engine, args), engine, registry, settings, life, keyring)
        keep_captures(app, settings, args.whipstaff_captures)
        told = greeting(place_of(args, engine), await registry.current(), openai.has_chat(engine, args))

        def greet() -> None:
            print("\n".join(told if engine.index == 0 else ()), flush=True)

        with counting(engine):
            return await serve_until_told(app, args, sock, life, greet, loads and (loads, engine.index), Protocol)
    finally:
        engine.shutdown()


async def _built(engine: Engine, args: Namespace) -> FastAPI:
    """vLLM's application, with what it serves in APIs other than OpenAI's made ours, too."""
    app = await openai.build(engine, args)
    serve_messages(app)
    serve_batches(app)
    serve_responses(app)
    return app


def place_of(args: Namespace, engine: Engine) -> Place:
    """Where the server listens, as a client of the same machine says it."""
    host = {"": "localhost", "0.0.0.0": "localhost", "::": "localhost"}.get(args.host or "", args.host)
    scheme, host = "https" if args.ssl_certfile else "http", f"[{host}]" if ":" in host else host
    has_key = bool(args.api_key or os.environ.get("VLLM_API_KEY"))
    names = args.served_model_name or [engine.model_config.model]
    url = f"{scheme}://{host}:{args.port}{args.root_path or ''}"
    return Place(url, names[0], has_key, args.api_server_count or 1, args.whipstaff_uncompiled)


def read_files(settings: Settings) -> tuple[dict[str, VectorFile], RegistryFolder | None]:
    """The vectors given at start-up, and those that the registry's folder holds then; and that folder.

    Raises: BadVectorFile, BadStore, BadPreset, BadKeys: a file that is wrong is told of before a model is loaded.
    """
    for path in preset_files(settings.presets):
        read_preset(path)
    if settings.keys is not None:
        read_keys(settings.keys)
    files = read_vectors(settings.vectors)
    if settings.registry is None:
        return files, None
    store = RegistryFolder(settings.registry)
    return files | read_stored(store, files), store


def _setup(settings: Settings, files: Iterable[VectorFile]) -> Setup:
    """What the engine has to be made for."""
    return Setup(
        settings.aux.items(),
        settings.steering_slots,
        [file.vector for file in files],
        settings.steering_sites,
        settings.early_layers,
        settings.lookahead,
        settings.max_search_seqs,
        settings.attention_rows,
        settings.hidden_states,
        settings.capture_layers,
        settings.max_capture_bytes,
        settings.attention_layers,
        settings.one_form,
    )


def launch(
    args: Namespace, settings: Settings, files: Mapping[str, VectorFile], client: dict[str, Any] | None = None
) -> Engine:
    """Start the engine with what the vectors will need, or be a client of one that was started before."""
    return start(args, _setup(settings, files.values()), client)


async def load(
    engine: Engine, settings: Settings, files: Mapping[str, VectorFile], store: RegistryFolder | None
) -> LiveRegistry:
    """Find out what the engine can do, measure the model's activations, and give the workers the vectors that fit."""
    facts = await describe(engine)
    model = ModelShape.model_validate(facts["model"])
    abilities = ModuleAbilities.from_wire(facts["module_edits"])
    lengths = await calibrate(engine) if engine.index == 0 else await proven(engine)
    metrics.SLOTS.set(engine.layout.num_slots)
    metrics.STARTED.set(time.time())
    mode = "eager" if engine.vllm_config.model_config.enforce_eager else "compiled"
    device = engine.vllm_config.device_config.device_type
    metrics.BUILD.labels(engine.layout.version, vllm_version(), device, f"{mode} {facts['runner']}").set(1)
    logger.info(
        "kernels: %s; model runner: %s; vectors: %s; auxiliary models: %s",
        cuda_ext.IMPLEMENTATION,
        facts["runner"],
        [name for name, file in files.items() if misfit(file.vector, model) is None],
        list(engine.layout.limits),
    )
    config = engine.model_config
    caps = Capabilities(
        registry=VectorSnapshot({}, model),
        auxiliaries=engine.layout.limits,
        words=None
        if config.skip_tokenizer_init
        else Vocabulary.of(engine.get_tokenizer(), most=config.get_vocab_size()),
        vocabulary=config.get_vocab_size(),
        max_len=config.max_model_len,
        max_seqs=engine.vllm_config.scheduler_config.max_num_seqs,
        max_adapters=engine.vllm_config.lora_config.max_loras if engine.vllm_config.lora_config else 0,
        dtype=facts["dtype"],
        num_slots=engine.layout.num_slots,
        num_histories=engine.layout.num_histories,
        num_layers=engine.layout.shape.num_layers,
        hook_points=frozenset(HookPoint(*point) for point in facts["sites"]),
        lengths=Lengths(lengths),
        limit=Limit(settings.max_dose, settings.dose_policy) if settings.max_dose else None,
        tensor_parallel=engine.vllm_config.parallel_config.tensor_parallel_size,
        takes_soft_prompts=facts["takes_soft_prompts"],
        logprobs_mode=config.logprobs_mode,
        attention=abilities.attention,
        depth=Depth(
            engine.layout.shape.num_layers,
            bool(getattr(config.hf_text_config, "tie_word_embeddings", False)),
            frozenset(engine.layout.early_layers),
            facts["has_final_norm"],
        ),
        looks_ahead=engine.layout.looks_ahead,
        max_search_seqs=engine.layout.max_search_seqs,
        reads_attention=engine.layout.reads_attention,
        num_hidden_states=engine.layout.num_hidden_states,
        capture_layers=frozenset(engine.layout.capture_layers),
        max_capture_bytes=engine.layout.max_capture_bytes,
        attention_layers=frozenset(engine.layout.attention_layers),
        keeps_captures=_keeps_captures(settings),
        num_drafts=engine.layout.num_drafts,
        routing=abilities.routing,
    )
    registry = LiveRegistry(VectorLeases(engine), caps, files, store, settings.presets)
    await registry.start()
    return registry


async def prove(engine: Engine, caps: Capabilities) -> list[Finding]:
    """Run the self-test. Raises: SelfTestFailed, naming what did not obey."""
    findings = [finding async for finding in self_test(engine, list(caps.auxiliaries))]
    bad = [finding.what for finding in findings if not finding.is_good]
    if bad:
        raise SelfTestFailed(
            f"the self-test failed: {', '.join(bad)} did not obey an edit, or scale 0 was not off; `whipstaff doctor` "
            "shows each finding"
        )
    metrics.SELF_TEST.set(1)
    logger.info("self-test: %d of %d sites and auxiliary models obey", len(findings), len(findings))
    return findings


async def extend(
    app: FastAPI,
    engine: Engine,
    registry: LiveRegistry,
    settings: Settings,
    life: Lifecycle,
    keyring: Keyring | None = None,
) -> FastAPI:
    """Put our routes, errors and metrics into vLLM's application. Raises: BadPreset."""
    app.state.whipstaff, app.state.whipstaff_life = registry, life
    app.state.whipstaff_links = {"grafana": settings.grafana_url}
    app.state.whipstaff_admin = admin_key = Admin.of(settings.admin_key, settings.max_upload_bytes)
    engine.watch = metrics.watch
    routers = (generate.router, batch.router, messages.router, responses.router)
    ours = {route.path for router in routers for route in router.routes if isinstance(route, APIRoute)}
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in ours]
    for route in app.router.routes:
        if isinstance(route, APIRoute) and "POST" in route.methods:
            _first(route, generate.drop_preset if route.path in _NOT_GENERATING else generate.refuse_extras)
            _first(route, generate.check_text)
    for router in routers:
        app.include_router(router)
    app.include_router(admin.router)
    app.include_router(fits.router)
    app.include_router(captures.router)
    app.include_router(lifecycle.router)
    guard.admit(app, admin_key.opens)
    if settings.playground:
        serve_playground(app)
    if openai.has_docs(app):
        serve_docs(app)
    openai.list_models(app, partial(_preset_names, registry))
    await registry.check_presets_with(partial(check, reason_against=partial(openai.reason_against, app=app)))
    app.add_exception_handler(WhipstaffError, generate.answer_refusal)
    app.add_exception_handler(HTTPException, generate.answer_http_error)
    audit = Audit(settings.audit_log)
    if settings.registry is not None:
        names, template = list(await openai.models(app)), openai.chat_template(app)
        app.state.whipstaff_fits = Fits(engine, registry, names[0], template, lambda: life.reason, audit.event)
    stack: Any = Bounds(app.build_middleware_stack())  # vLLM has built it already, without our handler
    if keyring is not None or settings.audit_log is not None:
        stack = Access(stack, keyring, audit, settings.open_metrics)
        app.state.whipstaff_reloading = asyncio.create_task(_reload(keyring, audit))
    app.middleware_stack = Gate(metrics.Refusals(stack), life)
    return app


def _keeps_captures(settings: Settings) -> bool:
    return min(settings.max_downloads, settings.max_download_bytes) > 0


def keep_captures(app: FastAPI, settings: Settings, folder: Path | None) -> None:
    """Let requests have what they read as files in that folder."""
    app.state.whipstaff_captures = None
    if folder is not None:
        bounds = settings.max_downloads, settings.max_download_bytes, settings.download_seconds
        app.state.whipstaff_captures = files = CaptureFiles(folder, *bounds)
        app.state.whipstaff_sweeping = asyncio.create_task(files.sweep_for_ever())


async def _preset_names(registry: LiveRegistry) -> Iterable[str]:
    """Those that who asks may name."""
    caps, holder = await registry.current(), HOLDER.get()
    return caps.presets if holder is None else holder.view.of(caps).presets


async def _reload(keyring: Keyring | None, audit: Audit) -> None:
    """Read the keys again when their file changes, or on SIGHUP, which means that the audit log was moved away, too."""

    def note(problem: str | None) -> None:
        audit.event("keys.reload", problem=problem)
        if problem is not None:
            logger.error("%s; the keys are what they were", problem)

    def hang_up() -> None:
        audit.reopen()
        if keyring is not None:
            note(keyring.reload())

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hang_up)
    if keyring is not None:
        await keyring.follow(note)


@contextmanager
def counting(engine: Engine) -> Iterator[None]:
    """Follow what the engine counts. One API server does, since the metrics of all are added up."""
    if engine.index != 0:
        yield
        return
    is_alone = engine.vllm_config.parallel_config._api_process_count <= 1
    following = asyncio.create_task(follow_counters(engine, metrics.WorkerCounts().note, is_alone))
    try:
        yield
    finally:
        following.cancel()


def _first(route: APIRoute, what: Callable[[Request], Awaitable[None]]) -> None:
    """Do something before everything else that a route of vLLM's does."""
    route.dependant.dependencies.insert(
        0, get_parameterless_sub_dependant(depends=Depends(what), path=route.path_format)
    )
