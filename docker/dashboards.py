"""Writes the Grafana dashboards in docker/grafana/: `python docker/dashboards.py` (with what the tests need installed).

Every panel says what it shows and what to do where it is red; tests/operations asks a real Prometheus for each of their
expressions. `$__rate_interval` is Grafana's own, the other variables are made here.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DashboardSpecialValueMapOptions,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    GridPos,
    SpecialValueMap,
    SpecialValueMatch,
    Threshold,
    ThresholdsMode,
    ValueMappingResult,
    VariableHide,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FOLDER = Path(__file__).parent / "grafana"
SOURCE = DataSourceRef("prometheus", "${datasource}")
WIDTH = 24  # columns of Grafana's grid
GOALS = {  # seconds; each is a bound of the histogram that is held to it, as Prometheus writes it
    "slo_ttft": ("time to first token", ("0.1", "0.25", "0.5", "1.0", "2.5"), "0.5"),
    "slo_itl": ("time between tokens", ("0.025", "0.05", "0.1"), "0.05"),
    "slo_e2e": ("whole answer", ("1.0", "2.5", "5.0", "10.0"), "5.0"),
}
I = 'instance=~"$instance"'  # noqa: E741 - the short forms of the expressions below
M = f'{I},method=~"$method"'
N = f'model_name=~"$model",{I}'
R = "[$__rate_interval]"
TTFT, ITL, E2E = (
    f"whipstaff_{name}_seconds" for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency")
)
IDLE = "No traffic"


class Query(NamedTuple):
    """One expression of a panel."""

    expr: str
    legend: str = ""


class Panel(NamedTuple):
    """One panel; `red` are the values from which it is yellow and red, downwards where the second is the smaller."""

    kind: str  # stat, series, bars, heatmap or table
    title: str
    unit: str
    says: str
    queries: Sequence[Query]
    width: int = 8
    red: tuple[float, float] | None = None
    height: int = 8
    empty: str = IDLE  # what it says where there is nothing
    names: Sequence[str] = ()  # of a table's columns, after the method


def rate(series: str, *labels: str, by: str = "") -> str:
    """The sum of a counter's rates."""
    return f"sum{f' by ({by})' if by else ''} (rate({series}{{{','.join(labels)}}}{R}))"


def quantile(p: float, series: str, *labels: str, by: str = "") -> str:
    """Of a histogram."""
    return f"histogram_quantile({p}, {rate(f'{series}_bucket', *labels, by=f'le, {by}' if by else 'le')})"


def quantiles(series: str, goal: str) -> list[Query]:
    """p50, p95 and p99 of all methods that were chosen, and the goal as a line."""
    found = [Query(quantile(p, series, M), f"p{round(100 * p)}") for p in (0.5, 0.95, 0.99)]
    return [*found, Query(f"vector(${goal})", "goal")]


def by_method(series: str) -> list[Query]:
    return [Query(quantile(p, series, M, by="method"), f"{{{{method}}}} p{round(100 * p)}") for p in (0.5, 0.95)]


def within(series: str, goal: str) -> str:
    """The share that took no longer than a goal."""
    within_goal = f'sum(rate({series}_bucket{{{M},le="${goal}"}}{R}))'
    return f"{within_goal} / (sum(rate({series}_count{{{M}}}{R})) > 0)"


def ratio(part: str, whole: str) -> str:
    """Nothing where there is no traffic, rather than 0 / 0."""
    return f"{part} / ({whole} > 0)"


def buckets(series: str, *labels: str) -> list[Query]:
    return [Query(f"sum by (le) (increase({series}_bucket{{{','.join(labels)}}}{R}))", "{{le}}")]


def overhead(of: str) -> str:
    """Mean time between tokens beside that of plain requests."""
    mean = f"sum by (method) (rate({ITL}_sum{{{M}}}{of})) / sum by (method) (rate({ITL}_count{{{M}}}{of}))"
    plain = f'{I},method="plain"'
    of_plain = f"sum(rate({ITL}_sum{{{plain}}}{of})) / sum(rate({ITL}_count{{{plain}}}{of}))"
    return f"({mean}) / on () group_left () ({of_plain})"


def bad_share(of: str, by: str = "") -> str:
    """Answers that the server cut short or failed to give, among all."""
    grouped = f"sum{f' by ({by})' if by else ''}"
    whole = f"{grouped} (rate(whipstaff_requests_total{{{M}}}{of}))"
    bad = f'{grouped} (rate(whipstaff_requests_total{{{M},outcome=~"error|cut"}}{of}))'
    none = f"{whole} * 0" if by else "vector(0)"
    return f"({bad} or {none}) / ({whole} > 0)"


OVERVIEW = [
    Panel(
        "series", "Requests by outcome", units.RequestsPerSecond,
        "Generations that ended, per second. `aborted` is a client that left, `cut` one whose answer the server ended, "
        "`error` a failure. Nothing here is red by itself.",
        [Query(rate("whipstaff_requests_total", M, by="outcome"), "{{outcome}}")], 12,
    ),
    Panel(
        "stat", "Bad answers", units.PercentUnit,
        "Share of generations that ended with `error` or `cut`. Red: read the server's log of that minute; is the "
        "engine alive (/health), was anything deployed or stopped?",
        [Query(bad_share(R), "bad")], 4, (0.001, 0.01),
    ),
    Panel(
        "stat", "First tokens within the goal", units.PercentUnit,
        "Share of requests whose first token came within $slo_ttft s. Red: where the queue below is long, add "
        "replicas; else look for one method in Latency by method, or for long prompts.",
        [Query(within(TTFT, "slo_ttft"), "within")], 4, (0.99, 0.95),
    ),
    Panel(
        "stat", "Targets down", units.Short,
        "Servers that Prometheus cannot scrape. Red: that process is gone or hangs; its log's last line says why it "
        "ended.",
        [Query('count(up{job="whipstaff"} == 0) or vector(0)', "down")], 4, (1, 1),
    ),
    Panel(
        "series", "Time to first token", units.Seconds,
        "From a request's arrival, waiting included. Above the goal: a long queue wants replicas, a short one has one "
        "method or long prompts behind it (Latency by method).",
        quantiles(TTFT, "slo_ttft"),
    ),
    Panel(
        "series", "Time between tokens", units.Seconds,
        "What a reader of a stream sees. Above the goal: the batch has grown (running requests), preemptions, or a "
        "method that runs auxiliary models (Coupled).",
        quantiles(ITL, "slo_itl"),
    ),
    Panel(
        "series", "Whole answer", units.Seconds,
        "From arrival to the last token. Above the goal while the other two are not: answers are longer than they "
        "were.",
        quantiles(E2E, "slo_e2e"),
    ),
    Panel(
        "series", "Queue by reason, and running", units.Short,
        "Waiting requests: `capacity` waits for seats or KV cache (add replicas, or lower --max-num-seqs where tokens "
        "have become slow), `deferred` for slots, adapters or grammars (Steering).",
        [
            Query(f"sum by (reason) (vllm:num_requests_waiting_by_reason{{{N}}})", "waiting: {{reason}}"),
            Query(f"sum(vllm:num_requests_running{{{N}}})", "running"),
        ],
    ),
    Panel(
        "series", "Time in the queue", units.Seconds,
        "p95 of what vLLM lets requests wait before they are first scheduled; its bounds begin at 0.3 s. Above the "
        "goal for the first token: the server is full.",
        [Query(quantile(0.95, "vllm:request_queue_time_seconds", N), "p95"), Query("vector($slo_ttft)", "goal")],
    ),
    Panel(
        "series", "Refusals by reason", units.RequestsPerSecond,
        "Requests that were answered with an error of theirs. `queue_full`: the server is full. `bad_value` and "
        "`unknown_name` that begin with a deployment of a client's are that client's.",
        [Query(rate("whipstaff_refusals_total", I, by="reason"), "{{reason}}")],
    ),
    Panel(
        "series", "Tokens", "tok/s",
        "Tokens of prompts and of answers, per second, as vLLM counts them. Falls to 0 while requests run: the engine "
        "hangs, restart it.",
        [
            Query(f"sum(rate(vllm:prompt_tokens_total{{{N}}}{R}))", "prompts"),
            Query(f"sum(rate(vllm:generation_tokens_total{{{N}}}{R}))", "answers"),
        ],
    ),
    Panel(
        "series", "KV cache in use", units.PercentUnit,
        "Fullest engine of each server. Red: requests are about to be preempted; lower --max-num-seqs or lengths, or "
        "give the cache more memory.",
        [Query(f"max by (instance, engine) (vllm:kv_cache_usage_perc{{{N}}})", "{{instance}} {{engine}}")],
        red=(0.9, 0.98),
    ),
    Panel(
        "series", "Preemptions, prefix-cache hits", units.Short,
        "Preempted requests are computed again, which the 99th percentile of the time between tokens shows. Hits: "
        "share of prompt tokens found in the prefix cache.",
        [
            Query(f"sum(rate(vllm:num_preemptions_total{{{N}}}{R}))", "preemptions/s"),
            Query(
                ratio(
                    f"sum(rate(vllm:prefix_cache_hits_total{{{N}}}{R}))",
                    f"sum(rate(vllm:prefix_cache_queries_total{{{N}}}{R}))",
                ),
                "share of hits",
            ),
        ],
    ),
    Panel(
        "stat", "Self-test", units.Short,
        "1: every hook was seen to obey when the server started. A server where one does not never gets here: it ends, "
        "and Targets down says so.",
        [Query(f"min(whipstaff_selftest_ok{{{I}}})", "ok")], 6, (1, 0.5),
    ),
    Panel(
        "stat", "Up for", units.Seconds,
        "Youngest server. Small again and again: something ends it; the log's last line says what.",
        [Query(f"time() - max(whipstaff_start_time_seconds{{{I}}})", "up")], 6,
    ),
    Panel(
        "table", "What runs", units.Short,
        "Versions, device and mode of each server. More than one row per deployment: an update is under way or was "
        "left half done.",
        [Query(f"sum by (instance, version, vllm, device, mode) (whipstaff_build_info{{{I}}})")], 12,
    ),
]  # fmt: skip

RANGE = "[$__range]"
METHODS = [
    Panel(
        "table", "Methods over the whole time range", units.Seconds,
        "Each method's rate, 95th percentiles, share of bad answers, and time between tokens beside plain requests'. "
        "An overhead beyond 1.5: see its panel in Steering or Coupled; a link leads there.",
        [
            Query(f"sum by (method) (rate(whipstaff_requests_total{{{M}}}{RANGE}))"),
            *(
                Query(f"histogram_quantile(0.95, sum by (le, method) (rate({h}_bucket{{{M}}}{RANGE})))")
                for h in (TTFT, ITL, E2E)
            ),
            Query(bad_share(RANGE, "method")),
            Query(overhead(RANGE)),
        ],
        24, names=("requests/s", "first token p95", "between tokens p95", "whole answer p95", "bad share", "overhead"),
    ),
    Panel(
        "series", "Time to first token by method", units.Seconds,
        "One method alone above the others: admission (Steering) or further prompts (Coupled) take that time.",
        by_method(TTFT),
    ),
    Panel(
        "series", "Time between tokens by method", units.Seconds,
        "`plain` is the line to hold the others against. Plain requests share steps with the rest: all rise together.",
        by_method(ITL),
    ),
    Panel(
        "series", "Whole answer by method", units.Seconds,
        "Follows the lengths of answers, which differ by method; compare a method with itself.",
        by_method(E2E),
    ),
    Panel(
        "series", "Overhead beside plain requests of the same minute", "x",
        "Mean time between tokens of each method, plain requests' being 1. Red: the batch grew, auxiliary models run, "
        "or methods look ahead.",
        [Query(overhead(R), "{{method}}")], 12, (1.5, 2), empty="No plain traffic to compare with",
    ),
    Panel(
        "series", "Tokens by method", "tok/s",
        "Tokens of answers, per second. A method that falls while its requests wait has met its limit: slots "
        "(Steering) or seats (Coupled).",
        [Query(rate("whipstaff_generated_tokens_total", M, by="method"), "{{method}}")], 12,
    ),
    Panel(
        "heatmap", "Time to first token", units.Seconds,
        "How many first tokens took how long. Two bands are two kinds of request, such as long and short prompts.",
        buckets(TTFT, M), 12,
    ),
    Panel(
        "heatmap", "Time between tokens", units.Seconds,
        "How many tokens took how long. Two bands are two kinds of step, such as with auxiliary models and without.",
        buckets(ITL, M), 12,
    ),
    Panel(
        "series", "Whole answer by preset", units.Seconds,
        "p95 of requests that name a preset, of whatever method. One that rises alone: it was changed (Steering shows "
        "when), or its clients ask for more.",
        [Query(quantile(0.95, "whipstaff_preset_e2e_request_latency_seconds", I, by="preset"), "{{preset}}")], 12,
    ),
    Panel(
        "series", "Requests by preset", units.RequestsPerSecond,
        "How often each is named, per second; beyond 100 presets, the rest is `other`.",
        [Query(rate("whipstaff_preset_requests_total", I, by="preset"), "{{preset}}")], 12,
    ),
]  # fmt: skip

STEERING = [
    Panel(
        "series", "Slots in use", units.PercentUnit,
        "Distinct configurations of running requests beside what there is room for. Red: requests wait for slots; "
        "raise --steering-slots, or let clients use the same scales.",
        [
            Query(
                f"max by (instance) (whipstaff_slots_in_use{{{I}}}) / max by (instance) (whipstaff_slots{{{I}}})",
                "{{instance}}",
            )
        ],
        red=(0.8, 1),
    ),
    Panel(
        "series", "Waiting for slots", units.Short,
        "Requests that could run but for their steering. Above 0 for minutes: raise --steering-slots.",
        [Query(f"max by (instance) (whipstaff_requests_waiting_for_slots{{{I}}})", "{{instance}}")],
    ),
    Panel(
        "series", "Time that requests waited for slots", units.Seconds,
        "p50 and p95 of those that had to wait. It is part of their time to first token.",
        [Query(quantile(p, "whipstaff_slot_wait_seconds", I), f"p{round(100 * p)}") for p in (0.5, 0.95)],
    ),
    Panel(
        "series", "Vectors loaded and held", units.Short,
        "Loaded is what requests may name, held what the workers have. Held above loaded for long: some request keeps "
        "a version that was replaced.",
        [
            Query(f"max by (instance) (whipstaff_vectors_loaded{{{I}}})", "loaded {{instance}}"),
            Query(f"max by (instance) (whipstaff_vectors_held{{{I}}})", "held {{instance}}"),
        ],
    ),
    Panel(
        "series", "Table uploads", units.Short,
        "Configurations written per second. Many in steady traffic: requests differ in scales that could be the same.",
        [Query(rate("whipstaff_table_uploads_total", I), "uploads/s")],
    ),
    Panel(
        "series", "Bytes uploaded", units.BytesPerSecondIEC,
        "What these uploads copy to the device, between two steps. Beyond some 100 MiB/s the time between tokens shows "
        "it.",
        [Query(rate("whipstaff_table_upload_bytes_total", I), "bytes/s")],
    ),
    Panel(
        "series", "Conditional edits that were open", units.PercentUnit,
        "Share of tokens at which conditional edits were made. 0 or 1 for an hour: the threshold is not where the "
        "readings are (receipts tell them).",
        [
            Query(
                ratio(
                    rate("whipstaff_conditional_tokens_open_total", I), rate("whipstaff_conditional_tokens_total", I)
                ),
                "open",
            )
        ],
    ),
    Panel(
        "series", "Admission", units.Seconds,
        "p95 of the time to check and compile extra fields. Red: requests with very many entries, or a front end "
        "without a core of its own.",
        [Query(quantile(0.95, "whipstaff_admission_seconds", I, by="kind"), "{{kind}}")], red=(0.001, 0.01),
    ),
    Panel(
        "series", "Refusals by reason", units.RequestsPerSecond,
        "`unknown_name`: a vector or preset is missing, was it removed? `unavailable`: the server was started without "
        "what a method needs; the error names the flag. `conflict`: vectors made for another model.",
        [Query(rate("whipstaff_refusals_total", I, by="reason"), "{{reason}}")],
    ),
    Panel(
        "heatmap", "Doses", units.Short,
        "Largest edit of each steered request, relative to the activations that it edits. Beyond 1 answers fall apart.",
        buckets("whipstaff_dose", I),
    ),
    Panel(
        "stat", "Doses above 1", units.PercentUnit,
        "Share of steered requests whose largest edit is longer than what it edits. Red: start the server with "
        "--max-dose, or ask these clients for smaller scales.",
        [
            Query(
                "1 - " + ratio(rate("whipstaff_dose_bucket", I, 'le="1.0"'), rate("whipstaff_dose_count", I)),
                "above 1",
            )
        ],
        red=(0.05, 0.2),
    ),
    Panel(
        "series", "Prefix-cache hits by traffic", units.PercentUnit,
        "Share of prompt tokens found. Steered prompts share with others only what lies before the first edit: `where` "
        "that begins later, or fewer distinct scales, lets them share more.",
        [
            Query(
                ratio(
                    rate("whipstaff_prefix_cache_hits_total", I, by="traffic"),
                    rate("whipstaff_prefix_cache_queries_total", I, by="traffic"),
                ),
                "{{traffic}}",
            )
        ],
    ),
    Panel(
        "bars", "Registry changes", units.Short,
        "What administrators added, replaced and removed. Latency or refusals that begin here come from that change.",
        [
            Query(
                f"sum by (kind, action, outcome) (increase(whipstaff_registry_changes_total{{{I}}}{R}))",
                "{{action}} {{kind}}: {{outcome}}",
            )
        ],
        24,
    ),
]  # fmt: skip

COUPLED_METHODS = f'{M},method!="plain"'
COUPLED = [
    Panel(
        "series", "Further sequences running", units.Short,
        "Sequences that guide others. They take seats (--max-num-seqs) and KV cache like requests, and vLLM's own "
        "number of running requests holds them.",
        [
            Query(f"max by (instance) (whipstaff_group_sequences_running{{{I}}})", "further sequences {{instance}}"),
            Query(f"sum by (instance) (vllm:num_requests_running{{{N}}})", "all {{instance}}"),
        ],
    ),
    Panel(
        "series", "Steps that were held", units.PercentUnit,
        "Share of groups' steps in which some sequences waited for others, as they do while prompts are computed. Red: "
        "raise --max-num-batched-tokens or --max-num-seqs.",
        [
            Query(
                ratio(rate("whipstaff_group_steps_total", I, 'state="held"'), rate("whipstaff_group_steps_total", I)),
                "held",
            )
        ],
        red=(0.05, 0.2),
    ),
    Panel(
        "series", "Steps together, preemptions", units.Short,
        "Steps that groups took as one, per second, and groups that had to give their KV cache back. Preemptions: "
        "lower --max-num-seqs, or give the cache more memory.",
        [
            Query(rate("whipstaff_group_steps_total", I, 'state="together"'), "together/s"),
            Query(rate("whipstaff_group_preempted_total", I), "preemptions/s"),
        ],
    ),
    Panel(
        "stat", "Groups scheduled by half", units.Short,
        "Must be 0. Red: a bug; report it with the log.",
        [Query(f"max(increase(whipstaff_groups_half_scheduled_total{{{I}}}{RANGE}))", "half")], red=(1, 1),
    ),
    Panel(
        "series", "Emitted of computed tokens", units.PercentUnit,
        "Answers' tokens among all that were computed for them: 1 for most methods, a half with one further sequence. "
        "Falls: clients ask for more sequences.",
        [
            Query(
                ratio(
                    rate("whipstaff_generated_tokens_total", M, by="method"),
                    rate("whipstaff_computed_tokens_total", M, by="method"),
                ),
                "{{method}}",
            )
        ],
    ),
    Panel(
        "series", "Auxiliary models", units.PercentUnit,
        "Share of steps in which auxiliary models had to run. Every request in such a step waits for them: a server of "
        "its own for these methods keeps the others fast.",
        [Query(ratio(rate("whipstaff_aux_steps_total", I, 'ran="yes"'), rate("whipstaff_aux_steps_total", I)), "ran")],
        empty="No auxiliary models",
    ),
    Panel(
        "series", "Passes over tokens that were tried", units.OpsPerSecond,
        "Forward passes of methods that look ahead (--lookahead), each as long as a step.",
        [Query(rate("whipstaff_lookahead_passes_total", I), "passes/s")],
    ),
    Panel(
        "series", "Whole answer by method", units.Seconds,
        "p95 without plain requests. Rises with the first panel: seats are short.",
        [Query(quantile(0.95, E2E, COUPLED_METHODS, by="method"), "{{method}}")], 16,
    ),
    Panel(
        "series", "Searches and their living sequences", units.Short,
        "Requests that search, and the sequences that they have alive, which take seats and KV cache as requests do. "
        "At --max-search-seqs further searches wait.",
        [
            Query(f"max by (instance) (whipstaff_searches_running{{{I}}})", "searches {{instance}}"),
            Query(f"max by (instance) (whipstaff_search_sequences_living{{{I}}})", "sequences {{instance}}"),
        ],
        12,
        empty="No searches",
    ),
    Panel(
        "series", "Forks and rollbacks of searches", units.OpsPerSecond,
        "Sequences that went on from one that another went on from, too, and times that a search took tokens back, per "
        "second. Rollbacks without end: the answers of that search get no longer; lower its bounds.",
        [
            Query(rate("whipstaff_search_forks_total", I), "forks"),
            Query(rate("whipstaff_search_rollbacks_total", I), "rollbacks"),
        ],
        12,
        empty="No searches",
    ),
    Panel(
        "series", "Tokens that searches tried or computed again", "tok/s",
        "Tokens fed to see what they lead to, which are in no answer, and such as were computed a second time. Many: "
        "let clients ask for fewer candidates.",
        [
            Query(rate("whipstaff_search_tried_tokens_total", I), "tried"),
            Query(rate("whipstaff_search_recomputed_tokens_total", I), "computed again"),
        ],
        12,
        empty="No searches",
    ),
    Panel(
        "series", "Time in decisions of searches", units.PercentUnit,
        "Share of the time in which searches decide, with what they try; every request of the batch waits for it. Red: "
        "lower --max-search-seqs, or give searches a server of their own.",
        [Query(f"max by (instance) (rate(whipstaff_search_decision_seconds_total{{{I}}}{R}))", "{{instance}}")],
        12,
        (0.2, 0.5),
        empty="No searches",
    ),
]  # fmt: skip

DASHBOARDS = {  # by the last part of its uid and its file's name
    "overview": ("Whipstaff: overview", OVERVIEW),
    "methods": ("Whipstaff: latency by method", METHODS),
    "steering": ("Whipstaff: steering", STEERING),
    "coupled": ("Whipstaff: coupled sequences and searches", COUPLED),
}


def main() -> None:
    for name, text in written().items():
        (FOLDER / name).write_text(text)


def written() -> dict[str, str]:
    """Each file as it has to be."""
    return {
        f"{name}.json": JSONEncoder(sort_keys=True, indent=2).encode(_built(name, *said)) + "\n"
        for name, said in DASHBOARDS.items()
    }


def _built(name: str, title: str, panels: Sequence[Panel]) -> Any:
    made = (
        dashboard.Dashboard(title)
        .uid(f"whipstaff-{name}")
        .tags(["whipstaff"])
        .readonly()
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("Whipstaff")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["whipstaff"])
            .as_dropdown(True)
            .keep_time(True)
            .include_vars(True)
        )
        .annotation(
            dashboard.AnnotationQuery()
            .name("Registry changes")
            .datasource(SOURCE)
            .enable(True)
            .icon_color("purple")
            .expr(f"sum(changes(whipstaff_registry_changes_total{{{I}}}[$__interval])) > 0")
        )
    )
    for variable in _variables():
        made = made.with_variable(variable)
    for panel, place in _laid_out(panels):
        made = made.with_panel(_panel(panel).grid_pos(place))
    built = made.build()
    for number, one in enumerate(built.panels or [], 1):
        one.id_val = number
    return built


def _laid_out(panels: Sequence[Panel]) -> Iterator[tuple[Panel, GridPos]]:
    """From left to right, and a new line where one is full."""
    x = y = height = 0
    for panel in panels:
        if x + panel.width > WIDTH:
            x, y, height = 0, y + height, 0
        yield panel, GridPos(panel.height, panel.width, x, y)
        x, height = x + panel.width, max(height, panel.height)


def _variables() -> Iterator[Any]:
    yield dashboard.DatasourceVariable("datasource").label("data source").type("prometheus")
    for name, query in (
        ("model", "label_values(vllm:num_requests_running, model_name)"),
        ("instance", 'label_values(vllm:num_requests_running{model_name=~"$model"}, instance)'),
        ("method", "label_values(whipstaff_requests_total, method)"),
    ):
        yield (
            dashboard.QueryVariable(name)
            .label(name)
            .datasource(SOURCE)
            .query(query)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(VariableOption(text=["All"], value=["$__all"], selected=True))
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(VariableSort.ALPHABETICAL_ASC)
        )
    for name, (what, values, usual) in GOALS.items():
        yield (
            dashboard.CustomVariable(name)
            .label(f"goal: {what} (s)")
            .values(",".join(values))
            .options([VariableOption(text=one, value=one, selected=one == usual) for one in values])
            .current(VariableOption(text=usual, value=usual, selected=True))
            .hide(VariableHide.DONT_HIDE)
        )


def _panel(panel: Panel) -> Any:
    made: Any = _MAKE.get(panel.kind, timeseries.Panel)()
    made = made.title(panel.title).description(panel.says).datasource(SOURCE).unit(panel.unit)
    made = made.no_value(panel.empty).mappings(
        [SpecialValueMap(DashboardSpecialValueMapOptions(SpecialValueMatch.NA_N, ValueMappingResult(panel.empty)))]
    )
    for letter, query in zip("ABCDEFGH", panel.queries, strict=False):
        made = made.with_target(_target(panel, letter, query))
    if panel.red is not None:
        made = made.thresholds(_thresholds(*panel.red))
    return _DRESS[panel.kind](made, panel)


def _target(panel: Panel, letter: str, query: Query) -> Any:
    made = prometheus.Dataquery().ref_id(letter).datasource(SOURCE).expr(query.expr).legend_format(query.legend)
    if panel.kind == "table":
        return made.instant().format(PromQueryFormat.TABLE)
    return made.format(PromQueryFormat.HEATMAP if panel.kind == "heatmap" else PromQueryFormat.TIME_SERIES)


def _thresholds(first: float, second: float) -> Any:
    """From green over yellow to red, or the other way where small values are the bad ones."""
    colors = ("green", "yellow", "red") if second >= first else ("red", "yellow", "green")
    low, high = sorted((first, second))
    steps = [Threshold(None, colors[0])]
    if low != high:
        steps.append(Threshold(low, colors[1]))
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps([*steps, Threshold(high, colors[2])])


def _dress_series(made: Any, panel: Panel) -> Any:
    legend = common.VizLegendOptions().show_legend(True).display_mode(kinds.LegendDisplayMode.LIST)
    made = made.legend(legend.placement(kinds.LegendPlacement.BOTTOM)).line_width(1).fill_opacity(5).min(0)
    made = made.tooltip(common.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI))
    if panel.red is not None:
        style = common.GraphThresholdsStyleConfig().mode(kinds.GraphThresholdsStyleMode.DASHED)
        made = made.thresholds_style(style)
    for name, properties in _LINES.items():
        made = made.override_by_name(name, [DynamicConfigValue(key, value) for key, value in properties.items()])
    return made


_LINES: dict[str, dict[str, Any]] = {
    "goal": {"custom.lineStyle": {"fill": "dash", "dash": [8, 8]}, "color": {"mode": "fixed", "fixedColor": "red"}},
    "plain p50": {"custom.lineWidth": 3},
    "plain p95": {"custom.lineWidth": 3},
}


def _dress_bars(made: Any, panel: Panel) -> Any:
    return _dress_series(made, panel).draw_style(kinds.GraphDrawStyle.BARS).fill_opacity(80)


def _dress_stat(made: Any, panel: Panel) -> Any:
    reduced = common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)
    return made.reduce_options(reduced).graph_mode(kinds.BigValueGraphMode.AREA)


def _dress_heatmap(made: Any, panel: Panel) -> Any:
    color = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64).exponent(0.5)
    return made.calculate(False).color(color).max_data_points(60).show_legend()


def _dress_table(made: Any, panel: Panel) -> Any:
    renamed = {f"Value #{letter}": name for letter, name in zip("ABCDEFGH", panel.names, strict=False)}
    hidden = {"Time": True} | ({} if panel.names else {"Value": True})
    made = made.with_transformation(DataTransformerConfig("merge", options={})).with_transformation(
        DataTransformerConfig("organize", options={"excludeByName": hidden, "renameByName": renamed})
    )
    special: dict[str, dict[str, Any]] = {
        "requests/s": {"unit": units.RequestsPerSecond},
        "bad share": {"unit": units.PercentUnit, **_colored(0.001, 0.01)},
        "overhead": {"unit": "x", **_colored(1.5, 3)},
        "method": {"links": [_STEERING_LINK]},
    }
    for name, properties in special.items() if panel.names else ():
        made = made.override_by_name(name, [DynamicConfigValue(key, value) for key, value in properties.items()])
    return made


_STEERING_LINK = {
    "title": "This method in Steering",
    "url": "/d/whipstaff-steering?var-method=${__value.raw}&${__url_time_range}",
}


def _colored(first: float, second: float) -> dict[str, Any]:
    return {
        "thresholds": _thresholds(first, second).build(),
        "custom.cellOptions": {"type": "color-text"},
    }


_MAKE: dict[str, Any] = {"stat": stat.Panel, "heatmap": heatmap.Panel, "table": table.Panel}
_DRESS = {
    "series": _dress_series,
    "bars": _dress_bars,
    "stat": _dress_stat,
    "heatmap": _dress_heatmap,
    "table": _dress_table,
}


if __name__ == "__main__":
    main()
