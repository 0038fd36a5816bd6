"""A real Prometheus for tests: its programs, a server that scrapes another every second, and questions to it."""

import fcntl
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from serving import free_port

RULES = Path(__file__).parents[2] / "docker" / "prometheus"
SCRAPE = 1  # seconds between two scrapes
PATIENCE = 60  # seconds, for it to start
UNPACKED = Path(sys.prefix) / "share" / "prometheus"


def programs() -> Path:
    """The folder of `prometheus` and `promtool`: on PATH, or Debian's package, unpacked beside the environment. Where
    neither can be had the test is skipped, with the reason."""
    if (found := shutil.which("prometheus")) and shutil.which("promtool"):
        return Path(found).parent
    UNPACKED.mkdir(parents=True, exist_ok=True)
    with (UNPACKED / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = UNPACKED / "usr" / "bin"
        if not (folder / "promtool").exists():
            _unpack(UNPACKED)
    return folder


def _unpack(folder: Path) -> None:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        pytest.skip("NO PROMETHEUS: it is not on PATH, and this is no Debian whose package could be unpacked")
    said = ""
    for first in ([], ["apt-get", "update"]):  # a new machine has no lists yet
        for command in filter(None, (first, ["apt-get", "download", "prometheus"])):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
            said += done.stderr
        if packages := sorted(folder.glob("prometheus_*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(packages[-1]), str(folder)], check=True)
            return
    pytest.skip(f"NO PROMETHEUS: it is not on PATH, and its package cannot be downloaded: {said[-500:]}")


@dataclass(frozen=True)
class Prometheus:
    """One that runs."""

    url: str

    def get(self, path: str, **params: Any) -> Any:
        """Raises: AssertionError with what it says is wrong."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=60).json()
        assert answer["status"] == "success", f"{params}: {answer.get('error')}"
        return answer["data"]

    def ask(self, expr: str, at: float, since: float | None = None, step: int = 5) -> list[dict[str, Any]]:
        """Series of an expression: [{"metric": labels, "values": [(time, value)]}]."""
        if since is None:
            found = self.get("query", query=expr, time=at)["result"]
            return [{"metric": one["metric"], "values": [_number(one["value"])]} for one in found]
        found = self.get("query_range", query=expr, start=since, end=at, step=step)["result"]
        return [{"metric": one["metric"], "values": list(map(_number, one["values"]))} for one in found]


def _number(sample: Any) -> tuple[float, float]:
    return float(sample[0]), float(sample[1])


def is_empty(series: list[dict[str, Any]]) -> bool:
    return all(math.isnan(value) for one in series for _, value in one["values"])


def is_zero(series: list[dict[str, Any]]) -> bool:
    return all(value == 0 or math.isnan(value) for one in series for _, value in one["values"])


@contextmanager
def scraping(folder: Path, target: str) -> Iterator[Prometheus]:
    """A Prometheus with our own configuration, but for the target and how often it looks."""
    config = yaml.safe_load((RULES / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE}s", "evaluation_interval": f"{SCRAPE}s"}
    config["rule_files"] = [str(RULES / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port, log = free_port(), folder / "prometheus.log"
    command = [
        str(programs() / "prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={"PATH": os.environ["PATH"]})
    try:
        found = Prometheus(f"http://127.0.0.1:{port}")
        _wait(found, process, log)
        yield found
    finally:
        process.terminate()
        process.wait(30)


def _wait(prometheus: Prometheus, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if prometheus.ask('up{job="whipstaff"} == 1', time.time()):
                return
        except (httpx.TransportError, ValueError):
            pass
        time.sleep(0.2)
    raise RuntimeError(f"Prometheus does not scrape: {log.read_text()[-2000:]}")


def filled(expr: str, variables: Mapping[str, str]) -> str:
    """An expression as Grafana would send it. Raises: AssertionError for a variable that nobody knows."""

    def value(match: "re.Match[str]") -> str:
        name = match[1] or match[2].partition(":")[0]
        assert name in variables, f"${name} in {expr}"
        return variables[name]

    return re.sub(r"\$(?:(\w+)|\{([\w:]+)\})", value, expr)
