"""The command line's `whipstaff bench`: the load of a mix of methods, and what each of them waited for."""

import json
import os
import random
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, field_validator

from whipstaff.server import __version__, demo
from whipstaff.server.engine import bench, vllm_version
from whipstaff.server.engine.bench import Answer

PERCENTILES = (50, 95, 99)
LANES = 8  # requests at once, where no flag says how they arrive
OWN = ("stream", "stream_options", "prompt", "messages")  # fields that the load generator says itself
USUAL = {"num_prompts": 120, "input_len": 64, "output_len": 32, "temperature": 0.0}  # small: for the demo, on a CPU
EVERYTHING = "all"  # the name of the only method, where there is no mix
TIMES = {"ttft": "first token", "itl": "between tokens", "e2e": "whole answer"}


class Share(BaseModel):
    """Some of the requests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float = Field(gt=0, allow_inf_nan=False, description="beside the other shares: of any sum")
    extra: dict[str, Any] = Field({}, description="fields of the body")
    model: str | None = Field(None, min_length=1, description="another model than the server's first, such as a preset")

    @field_validator("extra")
    @classmethod
    def _leaves_the_rest(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if taken := [name for name in (*OWN, "model") if name in extra]:
            raise ValueError(f"{taken[0]} is not said here" + (": it has its own field" if taken[0] == "model" else ""))
        return extra

    @property
    def overrides(self) -> dict[str, Any]:
        return self.extra | ({} if self.model is None else {"model": self.model})


class Mix(RootModel[dict[str, Share]]):
    """A mix file: by name, in the order in which they are shown."""

    root: dict[str, Share] = Field(min_length=1)

    @classmethod
    def read(cls, path: Path) -> "Mix":
        """YAML, of which JSON is a part. Raises: ValueError with the file's name and the field's path, OSError."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(
                f"{path}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
            ) from error

    def assigned(self, num: int, seed: int) -> list[str]:
        """The name of each of `num` requests: as many as its share says, in an order that the seed says."""
        total = sum(one.share for one in self.root.values())
        exact = {name: num * one.share / total for name, one in self.root.items()}
        counts = {name: int(number) for name, number in exact.items()}
        largest = sorted(exact, key=lambda name: counts[name] - exact[name])
        for name in largest[: num - sum(counts.values())]:
            counts[name] += 1
        names = [name for name, count in counts.items() for _ in range(count)]
        random.Random(seed).shuffle(names)
        return names


class Summary(NamedTuple):
    """What one method's requests came to; times in milliseconds, by percentile."""

    requests: int
    errors: dict[str, int]  # by what was said
    times: dict[str, dict[str, float]]  # ttft, itl and e2e, less those of which there is none
    tokens: int

    def to_json(self, seconds: float, plain: "Summary | None") -> dict[str, Any]:
        return {
            "requests": self.requests,
            "errors": self.errors,
            **{f"{name}_ms": times for name, times in self.times.items()},
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / seconds,
            "of_plain": {} if plain is None else self.of(plain),
        }

    def of(self, plain: "Summary") -> dict[str, float]:
        """Medians beside those of plain requests of the same run, where these took any time."""
        both = [name for name in TIMES if name in self.times and plain.times.get(name, {}).get("p50")]
        return {name: self.times[name]["p50"] / plain.times[name]["p50"] for name in both}


def summary(answers: Sequence[Answer]) -> Summary:
    good = [one for one in answers if not one.error]
    values = {
        "ttft": [one.ttft for one in good if one.ttft],
        "itl": [gap for one in good for gap in one.itls],
        "e2e": [one.e2e for one in good],
    }
    return Summary(
        len(answers),
        dict(Counter(one.error for one in answers if one.error).most_common()),
        {name: _percentiles(each) for name, each in values.items() if each},
        sum(one.tokens for one in good),
    )


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": float(1e3 * np.percentile(seconds, p)) for p in PERCENTILES}


# ---- flags


def parser() -> ArgumentParser:
    """vLLM's flags, with defaults for a small server, and ours."""
    made: ArgumentParser = bench.parser("whipstaff bench")
    made.description = __doc__
    for action in made._actions:
        if action.dest == "backend":
            action.choices = list(bench.ENDPOINTS)
    made.set_defaults(endpoint=None, **USUAL)
    group = made.add_argument_group("whipstaff", "Whipstaff's own flags")
    what = "which share of the requests has which fields (YAML or JSON); the demo has one, others are asked plainly"
    group.add_argument("--mix", type=Path, metavar="FILE", help=what)
    group.add_argument("--json", type=Path, metavar="FILE", help="write what was measured, every request included")
    group.add_argument("--png", type=Path, metavar="FILE", help="draw how the times are distributed (needs matplotlib)")
    return made


def parse(words: Sequence[str]) -> Namespace:
    """Raises: ValueError for what the load generator would find only after its load."""
    args = parser().parse_args(words)
    args.endpoint = args.endpoint or bench.ENDPOINTS[args.backend]
    if args.base_url is not None:
        args.base_url = args.base_url.rstrip("/").removesuffix("/v1")
    if args.max_concurrency is None and args.request_rate == float("inf") and args.ramp_up_strategy is None:
        args.max_concurrency = LANES
    key = os.environ.get("OPENAI_API_KEY")
    if key and not any(one.lower().startswith("authorization=") for one in args.header or ()):
        args.header = [*(args.header or ()), f"Authorization=Bearer {key}"]
    for path in (args.json, args.png):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path.parent}: no such folder")
    if args.png is not None and find_spec("matplotlib") is None:
        raise ValueError(
            "--png needs matplotlib, which is not installed: pip install 'whipstaff[bench]', or matplotlib alone"
        )
    return args


# ---- the run


def run(words: Sequence[str]) -> int:
    """The exit status: 0, or 1 where a request failed. Raises: ValueError, RuntimeError, OSError."""
    args = parse(words)
    mix = None if args.mix is None else Mix.read(args.mix)
    names: list[str] = []

    def assign(model: str, num: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        nonlocal mix
        mix = mix or usual_mix(model)
        names.extend(mix.assigned(num, args.seed))
        said = {name: one.overrides for name, one in mix.root.items()}
        print(f"{num} requests to {model}: {', '.join(said)}", file=sys.stderr, flush=True)
        return [said[name] for name in names], [said[name] for name in dict.fromkeys(names)]

    model, seconds, answers = bench.run(args, assign)
    assert mix is not None
    found = {name: summary(_of(name, names, answers)) for name in mix.root if name in names}
    print(table(found, seconds))
    for line in complaints(found):
        print(line, file=sys.stderr)
    if args.json is not None:
        args.json.write_text(json.dumps(report(args, model, mix, seconds, found, names, answers), indent=1) + "\n")
    if args.png is not None:
        from whipstaff.server.commands.bench_plot import draw

        draw({name: _of(name, names, answers) for name in found}, args.png)
    return 1 if any(one.errors for one in found.values()) else 0


def usual_mix(model: str) -> Mix:
    """That of the demo, or plain requests of any other model."""
    return Mix.read(demo.MIX) if model == "demo" else Mix({EVERYTHING: Share(share=1)})


def _of(name: str, names: Sequence[str], answers: Sequence[Answer]) -> list[Answer]:
    return [answer for mine, answer in zip(names, answers, strict=True) if mine == name]


def plain_of(found: Mapping[str, Summary]) -> Summary | None:
    return found.get("plain")


def table(found: Mapping[str, Summary], seconds: float) -> str:
    """Methods below one another, times in milliseconds."""
    width = max(len("method"), *map(len, found))
    heads = "".join(f"  {label:^23}" for label in TIMES.values())
    units = "".join("  " + "".join(f"{f'p{p}':>7} " for p in PERCENTILES).rstrip().rjust(23) for _ in TIMES)
    plain = plain_of(found)
    lines = [
        f"{'':{width}}  {'':>5} {'':>5}{heads}  (ms)",
        f"{'method':{width}}  {'sent':>5} {'bad':>5}{units}  tokens/s  of plain",
    ]
    for name, one in found.items():
        cells = "".join("  " + _cells(one.times.get(each)) for each in TIMES)
        ratio = "" if plain is None or "e2e" not in (of := one.of(plain)) else f"{of['e2e']:8.2f}x"
        bad = sum(one.errors.values())
        lines.append(
            f"{name:{width}}  {one.requests:>5} {bad:>5}{cells}  {one.tokens / seconds:8.1f}  {ratio}".rstrip()
        )
    return "\n".join(lines)


def _cells(times: Mapping[str, float] | None) -> str:
    """23 characters."""
    return " ".join(f"{times[f'p{p}']:>7.1f}" if times else f"{'-':>7}" for p in PERCENTILES)


def complaints(found: Mapping[str, Summary]) -> Iterator[str]:
    for name, one in found.items():
        for error, number in one.errors.items():
            yield f"{name}: {number} of {one.requests} failed: {error}"


def report(
    args: Namespace,
    model: str,
    mix: Mix,
    seconds: float,
    found: Mapping[str, Summary],
    names: Sequence[str],
    answers: Sequence[Answer],
) -> dict[str, Any]:
    """What --json writes. No header is in it, for a key may be among them."""
    plain = plain_of(found)
    how = ("backend", "dataset_name", "num_prompts", "input_len", "output_len", "max_concurrency", "burstiness", "seed")
    return {
        "whipstaff": __version__,
        "vllm": vllm_version(),
        "url": (args.base_url or f"http://{args.host}:{args.port}") + args.endpoint,
        "model": model,
        "load": {name: getattr(args, name) for name in how}
        | {"request_rate": None if args.request_rate == float("inf") else args.request_rate},
        "mix": mix.model_dump(exclude_defaults=True),
        "seconds": seconds,
        "methods": {name: one.to_json(seconds, plain) for name, one in found.items()},
        "requests": [{"method": name, **answer._asdict()} for name, answer in zip(names, answers, strict=True)],
    }
