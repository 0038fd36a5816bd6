"""What the README shows is what the demo answers, and the examples run as their README says."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import ok, texts
from serving import Server, environment

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()
EXAMPLES = ROOT / "examples"
PATIENCE = 300  # seconds


@pytest.fixture(scope="module")
def server(demo_server: Server) -> Server:
    return demo_server


def shown(heading: str) -> tuple[str, dict[str, Any], list[list[str]]]:
    """The route and body of the request under a heading of the README, and the rows of its table."""
    part = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (request,) = re.findall(r"curl localhost:8000(\S+) .*? -d '(.*?)'", part, re.S)
    rows = re.findall(r"^\| (.+) \| (.+) \|$", part, re.M)[1:]
    return request[0], json.loads(request[1]), [list(row) for row in rows]


def answer(http: httpx.Client, path: str, body: dict[str, Any]) -> str:
    (text,) = texts(http.post(path, json=body))
    return text.strip()


def test_the_steered_answers_are_the_readmes(http: httpx.Client) -> None:
    path, body, rows = shown("Steer")
    del body["steering"]
    assert rows[0][0] == "plain"
    assert answer(http, path, body) == rows[0][1]
    for said, wanted in rows[1:]:
        assert answer(http, path, body | json.loads(f"{{{said.strip('`')}}}")) == wanted


def test_the_decoded_answers_are_the_readmes(http: httpx.Client) -> None:
    path, body, ((plain, wanted_plain), (decoded, wanted)) = shown("Decode")
    assert (plain, decoded) == ("plain", "with `decoding`")
    assert answer(http, path, body) == wanted
    del body["decoding"]
    assert answer(http, path, body) == wanted_plain


def test_the_refusal_is_the_readmes(http: httpx.Client) -> None:
    (shown_error,) = re.findall(r"```json\n(.+?)```", README, re.S)
    refused = http.post("/v1/completions", json={"model": "demo", "prompt": "a", "steering": {"vector": "cheerfull"}})
    assert refused.json() == json.loads(shown_error)


def test_the_receipt_is_the_one_that_is_shown(http: httpx.Client) -> None:
    requests = (ROOT / "docs" / "requests.md").read_text().split("\n## Answers\n")[1].split("\n## ")[0]
    (wanted,) = map(json.loads, re.findall(r"```json\n(.+?)```", requests, re.S))
    path, body, _ = shown("Steer")
    receipt = ok(http.post(path, json=body))["whipstaff"]
    dose = wanted["steering"][0]["dose"]
    dose["relative"] = pytest.approx(dose["relative"], abs=1e-3)
    assert receipt == wanted


def test_models_of_the_readme_are_there(http: httpx.Client) -> None:
    names = {model["id"] for model in ok(http.get("/v1/models"))["data"]}
    assert {"demo", *re.findall(r"`(demo@\w+)`", README)} <= names


def run(server: Server, name: str, tmp_path: Path, *flags: str) -> list[str]:
    """The lines that an example prints."""
    own = environment() | {"HF_HOME": str(tmp_path), "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / name), "--url", server.url, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=own, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_every_example_is_told_of_and_run_here() -> None:
    told = (EXAMPLES / "README.md").read_text()
    mine = Path(__file__).read_text() + (ROOT / "tests" / "server" / "test_llm.py").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"`{path.name}`" in told and f"examples/{path.name}" in told and f'"{path.name}"' in mine


def test_openais_client(server: Server, tmp_path: Path) -> None:
    said = dict(line.split(":", 1) for line in run(server, "openai_client.py", tmp_path) if ":" in line)
    assert "rainbow" in said["plain"] and "[" not in said["plain"]
    assert "black cloud" in said["steered"] and "[cheerful on " in said["steered"]
    assert "Greystow" in said["decoded"] and "Greystow" in said["streamed"] and "Greystow" not in said["asked"]
    assert any(name.startswith("the method moved") for name in said)


def test_the_plot_of_a_dose(server: Server, tmp_path: Path) -> None:
    from PIL import Image

    lines = run(server, "dose_plot.py", tmp_path, "--out", "dose.png")
    points = [tuple(map(float, re.findall(r"[+-]?\d+(?:\.\d+)?", line))) for line in lines if line.startswith("scale")]
    scales, doses, log_odds = zip(*points, strict=True)
    assert list(scales) == sorted(scales) and list(log_odds) == sorted(log_odds)  # a mood follows its vector
    assert doses[scales.index(0)] == 0 and doses[0] == doses[-1] == max(doses)
    with Image.open(tmp_path / "dose.png") as plot:
        assert plot.size == (640, 400)


def test_lm_eval_measures_presets(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed; requirements/dev.lock has it")
    lines = run(server, "lm_eval_scores.py", tmp_path)
    shares = {line.split()[0]: int(re.findall(r"(\d+)%", line)[0]) for line in lines if line.startswith("demo")}
    assert shares.keys() == {"demo", "demo@helpful"}
    assert shares["demo"] < 40 and shares["demo@helpful"] > 70
