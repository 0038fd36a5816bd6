"""`whipstaff fit`: from data to a file that serves, and a sentence for everything that is wrong."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from whipstaff.server import demo
from whipstaff.server.commands import fit as fit_cli
from whipstaff.server.commands import main as cli
from whipstaff.server.demo.mood import contrast
from whipstaff.server.demo.world import build
from whipstaff.steering.algebra import numbers_of
from whipstaff.steering.fit.directions import cosine
from whipstaff.steering.fit.recipes import RECIPES
from whipstaff.steering.vector_file import read

SEED = json.loads((Path(demo.__file__).parent / "training.json").read_text())["recipe"]["seed"]


@pytest.fixture(scope="module")
def moods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of the demo's world, told cheerfully and gloomily, up to where the next word shows the mood."""
    world, draws = build(SEED), Random(3)
    told = [contrast(world, draws) for _ in range(60)]
    path = tmp_path_factory.mktemp("data") / "moods.jsonl"
    path.write_text("".join(json.dumps({"positive": t["cheerful"], "negative": t["gloomy"]}) + "\n" for t in told))
    return path


def run(*words: object) -> int:
    return fit_cli.main(list(map(str, words)))


def test_two_commands_from_pairs_to_a_vector_like_the_demos_own(moods: Path, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "mine.safetensors"
    assert run("caa", "--model", "demo", "--data", moods, "-o", target, "--template", "none", "--layers", "3,4") == 0
    said = capsys.readouterr().out
    vector, own = read(target), read(demo.VECTORS / "cheerful.safetensors")
    vector.check_fits(own.header.model)
    for point, parts in own.tensors.items():  # the demo's was made from other scenes
        assert cosine(vector.tensors[point]["add"].numpy(), parts["add"].numpy()) > 0.8
    assert vector.header.provenance["score"]["pairs_ahead"] > 0.9
    assert f"--vectors {target}" in said and '"vector": "mine"' in said
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert run("caa", "--model", "demo", "--data", moods, "-o", target) == 2
    assert "--force" in capsys.readouterr().err


def test_a_dry_run_shows_what_is_read_and_writes_nothing(moods: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("caa", "--model", "demo", "--data", moods, "--template", "none", "--dry-run", "--read", "-2") == 0
    said = capsys.readouterr().out
    assert "moods.jsonl:" in said and said.count("->") == 2 and "read: -2" in said
    assert not list(tmp_path.iterdir())


def test_json_is_all_that_is_printed(moods: Path, tmp_path: Path, capsys: Any) -> None:
    words = ("shift_vector", "--model", "demo", "--data", moods, "--template", "none", "--limit", 20, "--json")
    assert run(*words, "-o", tmp_path / "a.safetensors") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sha256"] == read(tmp_path / "a.safetensors").digest and found["score"]["auc"] > 0.9
    assert run(*words, "-o", tmp_path / "b.safetensors") == 0
    ours, others = (numbers_of(read(tmp_path / f"{name}.safetensors")) for name in "ab")
    assert all((ours[name] == others[name]).all() for name in ours)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("dance", "--model", "demo", "--data", "x.jsonl"), "--method: 'dance' is none of"),
        (("caa", "--data", "x.jsonl"), "--model: has to be said"),
        (("caa", "--model", "demo"), "--data: has to be said"),
        (("caa", "--model", "demo", "--data", "x.jsonl"), "--output: has to be said"),
        (("caa", "--model", "demo", "--data", "x.jsonl", "--num-heads", "3", "--dry-run"), "--num-heads: caa does not"),
        (("caa", "--model", "demo", "--data", "x.jsonl", "--seed", "few", "--dry-run"), "--seed: "),
        (("caa", "--model", "demo", "--data", "x.jsonl", "--read", "first", "--dry-run"), "'first' is none of"),
        (("caa", "--model", "/no/such", "--data", "x.jsonl", "--dry-run"), "--model: /no/such: no model"),
    ],
)
def test_a_wrong_call_is_told_what_is_wrong(words: tuple[str, ...], reason: str, capsys: Any) -> None:
    assert run(*words) == 2
    assert reason in capsys.readouterr().err


def test_methods_are_listed_and_help_comes(capsys: Any) -> None:
    assert run("methods") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--help"])
    assert end.value.code == 0 and "Two commands" in capsys.readouterr().out
