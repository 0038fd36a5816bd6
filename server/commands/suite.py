"""`whipstaff eval suite`: what every method does on the demo's tasks, and what it costs."""

import hashlib
import json
import os
import platform
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from whipstaff.server import __version__
from whipstaff.server.demo import MODELS, world
from whipstaff.server.suite import report
from whipstaff.server.suite.asking import Server, SuiteError
from whipstaff.server.suite.running import SMALL, Size, Suite

_PATIENCE = httpx.Timeout(30, read=600)


def run(args: Namespace, transport: httpx.BaseTransport | None = None) -> int:
    """The exit status: 0, 2 with the reason on stderr, 130 after an interrupt; --resume then goes on."""
    headers = {} if args.api_key is None else {"Authorization": f"Bearer {args.api_key}"}
    size = replace(SMALL if args.subset == "small" else Size(), split=args.part)
    seed = json.loads((MODELS.parent / "training.json").read_text())["recipe"]["seed"]
    try:
        with httpx.Client(base_url=args.url, timeout=_PATIENCE, headers=headers, transport=transport) as client:
            suite = Suite(Server(client, args.parallel), world.build(seed), size, args.output)
            load = [os.getloadavg()[0]]
            found = report.lines(suite.run(args.resume, args.only))
            about = _about(args, suite, [*load, os.getloadavg()[0]])
    except (SuiteError, OSError, httpx.HTTPError) as error:
        print(f"whipstaff eval suite: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("whipstaff eval suite: stopped; --resume goes on where it was", file=sys.stderr)
        return 130
    written = report.save(found, about, args.output, args.write)
    print(json.dumps(report.summary(found, about)) if args.json else _told(found))
    print("wrote", *written, file=sys.stderr)
    return 0


def _about(args: Namespace, suite: Suite, loads: list[float]) -> dict[str, Any]:
    flags = [f"--subset {args.subset}"] if args.subset != "all" else []
    flags += [f"--only {','.join(args.only)}"] if args.only else []
    flags += [f"--part {args.part}"] if args.part != "test" else []
    weights = (MODELS / "demo" / "model.safetensors").read_bytes()
    vectors = json.dumps(suite.server.vectors, sort_keys=True).encode()
    return {
        "command": " ".join(["whipstaff eval suite", *flags]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores ({_processor()}), load {min(loads):.0f} to {max(loads):.0f}",
        "versions": f"whipstaff {__version__}, vLLM {suite.server.version()}",
        "model": f"{suite.server.model}, sha256 {hashlib.sha256(weights).hexdigest()[:12]}",
        "vectors": hashlib.sha256(vectors).hexdigest()[:12],
        "cells": hashlib.sha256((suite.folder / "cells.jsonl").read_bytes()).hexdigest()[:12],
        "size": asdict(suite.size),
    }


def _processor() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _told(found: list[report.Line]) -> str:
    width = max(len(f"{line.variant.name}, {line.task}") for line in found)
    rows = []
    for line in found:
        name = f"{line.variant.name}, {line.task}"
        if line.score is None or line.found is None:
            rows.append(f"{name:<{width}}  not served: {line.note}")
        else:
            mean, low, high = line.found
            change = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
            rows.append(f"{name:<{width}}  {line.plain:.2f} -> {line.score:.2f}  {change}  {line.verdict}")
    return "\n".join(rows)
