"""The application: a steerable engine, self-tested, behind vLLM's OpenAI server with our routes."""

import logging
from argparse import Namespace
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.dependencies.utils import get_parameterless_sub_dependant
from fastapi.routing import APIRoute

from whipstaff import cuda_ext
from whipstaff.decoding.method import Depth
from whipstaff.server import metrics, routes
from whipstaff.server.catalogue import Catalogue, Limit
from whipstaff.server.engine import UnsupportedEngine, openai
from whipstaff.server.engine.launch import Engine, PlanDict, start
from whipstaff.server.engine.selftest import Finding, calibrate, describe, self_test
from whipstaff.server.errors import WhipstaffError
from whipstaff.server.registry import Registry, VectorFile, read_vectors
from whipstaff.server.schema import PLAIN
from whipstaff.server.settings import Settings
from whipstaff.server.words import Words
from whipstaff.steering.edits import Lengths
from whipstaff.steering.experts import Scheme
from whipstaff.steering.method import Place
from whipstaff.steering.shape import ModelShape

logger = logging.getLogger("vllm.whipstaff")  # below vLLM's logger, so that its format and level apply

# vLLM's other routes that take JSON know nothing of the extra fields and would silently drop them: /v1/responses,
# /v1/messages, /invocations and whatever else there is. Where nothing is generated, dropping them does no harm.
_NOT_GENERATING = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")


async def serve(args: Namespace, settings: Settings) -> None:
    """Run the server until it is told to stop."""
    _, sock = openai.listen(args)
    files = read_vectors(settings.vectors)
    engine = launch(args, settings, files)
    try:
        have = await load(engine, settings, files)
        await prove(engine, have)
        app = extend(await openai.build(engine, args), engine, have)
        stopped = await openai.serve(app, args, sock)
    finally:
        engine.shutdown()
        sock.close()
    await stopped


def launch(args: Namespace, settings: Settings, files: Mapping[str, VectorFile]) -> Engine:
    """Start the engine with what the vectors will need."""
    vectors = [file.vector for file in files.values()]
    return start(
        args, settings.aux.items(), settings.steering_slots, vectors, settings.steering_sites, settings.early_layers
    )


async def load(engine: Engine, settings: Settings, files: Mapping[str, VectorFile]) -> Catalogue:
    """Give the workers the vectors that fit, and measure the model's activations."""
    facts = await describe(engine)
    registry = Registry(files, ModelShape.model_validate(facts["model"]))
    for entry in registry:
        if entry.problem is None:
            await engine.collective_rpc("whipstaff_load_vector", args=(str(entry.path), entry.vector.digest))
        else:
            logger.warning("vector %r cannot be used: %s", entry.name, entry.problem)
    metrics.VECTORS.set(len(registry.names))
    metrics.SLOTS.set(engine.layout.num_slots)
    logger.info(
        "kernels: %s; model runner: %s; vectors: %s; auxiliary models: %s",
        cuda_ext.IMPLEMENTATION,
        facts["runner"],
        registry.names,
        list(engine.layout.limits),
    )
    return Catalogue(
        registry,
        engine.layout.limits,
        Words.of(engine.get_tokenizer()) if not engine.model_config.skip_tokenizer_init else None,
        engine.model_config.get_vocab_size(),
        engine.model_config.max_model_len,
        engine.vllm_config.scheduler_config.max_num_seqs,
        engine.vllm_config.lora_config.max_loras if engine.vllm_config.lora_config else 0,
        facts["dtype"],
        engine.layout.num_slots,
        engine.layout.shape.num_layers,
        frozenset(Place(*place) for place in facts["sites"]),
        Lengths(await calibrate(engine)),
        Limit(settings.max_dose, settings.dose_policy) if settings.max_dose else None,
        engine.vllm_config.parallel_config.tensor_parallel_size,
        facts["takes_soft_prompts"],
        engine.model_config.logprobs_mode,
        facts["specials"]["attention"],
        Depth(
            engine.layout.shape.num_layers,
            bool(getattr(engine.model_config.hf_text_config, "tie_word_embeddings", False)),
            frozenset(engine.layout.early_layers),
            facts["has_final_norm"],
        ),
        {layer: Scheme(**scheme) for layer, scheme in facts["specials"]["routing"].items()},
    )


async def prove(engine: Engine, have: Catalogue) -> list[Finding]:
    """Run the self-test. Raises: UnsupportedEngine, naming what did not obey."""
    findings = [finding async for finding in self_test(engine, list(have.auxiliaries))]
    bad = [finding.what for finding in findings if not finding.is_good]
    if bad:
        raise UnsupportedEngine(
            f"the self-test failed: {', '.join(bad)} did not obey an edit, or scale 0 was not off; `whipstaff doctor` "
            "shows each finding"
        )
    logger.info("self-test: %d of %d sites and auxiliary models obey", len(findings), len(findings))
    return findings


def extend(app: FastAPI, engine: Engine, have: Catalogue) -> FastAPI:
    """Put our routes, errors and metrics into vLLM's application."""
    app.state.whipstaff = have
    engine.watch = _watch
    ours = {route.path for route in routes.router.routes if isinstance(route, APIRoute)}
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in ours]
    for route in app.router.routes:
        if isinstance(route, APIRoute) and "POST" in route.methods and route.path not in _NOT_GENERATING:
            _first(route, routes.refuse_extras)
        elif isinstance(route, APIRoute) and route.path == "/metrics":
            _first(route, routes.read_worker)
    app.include_router(routes.router)
    app.add_exception_handler(WhipstaffError, routes.answer_refusal)
    app.middleware_stack = app.build_middleware_stack()  # vLLM has built it already, without our handler
    return app


def _first(route: APIRoute, what: Callable[[Request], Awaitable[None]]) -> None:
    """Do something before everything else that a route of vLLM's does."""
    route.dependant.dependencies.insert(
        0, get_parameterless_sub_dependant(depends=Depends(what), path=route.path_format)
    )


def _watch(plan: PlanDict | None, outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    return metrics.watch(plan.label if plan else PLAIN, outputs, plan.note if plan else None)
