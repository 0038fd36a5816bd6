"""Data is read as what it means, in every form; what is wrong is named by file, line and key."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from whipstaff.steering.fit.data import KINDS, BadData, Dataset, read_data

PAIRS = [{"positive": "yes", "negative": "no", "prompt": f"is it {n}?"} for n in range(20)]
QUESTIONS = [{"question": f"what is {n}?", "right": [f"{n}", f"number {n}"], "wrong": ["none"]} for n in range(20)]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, *wanted: str) -> Dataset:
    return read_data([path], wanted or tuple(KINDS))


@pytest.mark.parametrize("rows", [PAIRS, QUESTIONS])
def test_four_forms_of_a_file_are_one_data_set(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()} for row in rows)
    wanted = read(lines(tmp_path / "a.jsonl", rows))
    for ending in ("json", "parquet", "csv"):
        found = read(tmp_path / f"a.{ending}")
        assert found.kind == wanted.kind
        assert [item.row for item in found.items] == [item.row for item in wanted.items]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"positive": "a", "negative": "b"}, "pairs"),
        ({"text": "a", "label": 1}, "labelled"),
        ({"prompt": "a", "response": "b", "label": 0}, "labelled"),
        ({"question": "a", "right": ["b"], "wrong": ["c"]}, "questions"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 0}, "choices"),
        ({"input": "a", "output": "b"}, "demos"),
        ({"prompt": "a", "class": "b"}, "classes"),
        ({"prompt": [{"role": "user", "content": "a"}], "response": "b"}, "responses"),
        ({"text": "a"}, "neutral"),
        (
            {"query": "a", "context": "b", "intent": "prior", "context_answer": "c", "prior_answer": "d"},
            "intents",
        ),
    ],
)
def test_the_kind_is_found_from_the_keys(row: dict[str, Any], kind: str, tmp_path: Path) -> None:
    assert read(lines(tmp_path / "a.jsonl", [row])).kind == kind


def test_files_of_others_are_read_as_what_they_mean(tmp_path: Path) -> None:
    caa = {"question": "Q (A) x (B) y", "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}
    (tmp_path / "caa.json").write_text(json.dumps([caa]))
    (item,) = read(tmp_path / "caa.json", "pairs").items
    assert (item.row.prompt, item.row.positive, item.row.negative) == (caa["question"], "(A)", "(B)")
    header = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    (tmp_path / "t.csv").write_text(header + 'A,B,Why?,Because,"Because; So it is",No; Never,http\n')
    (item,) = read(tmp_path / "t.csv", "questions").items
    assert (item.row.right, item.row.wrong, item.row.best) == (("Because", "So it is"), ("No", "Never"), "Because")
    targets = {"question": "Why?", "mc2_targets": {"choices": ["a", "b", "c"], "labels": [1, 0, 1]}, "mc1_targets": {}}
    (item,) = read(lines(tmp_path / "m.jsonl", [targets]), "questions").items
    assert (item.row.right, item.row.wrong) == (("a", "c"), ("b",))
    (tmp_path / "cast.json").write_text(json.dumps({"train": [{"harmful": "h", "harmless": "g"}]}))
    assert read(tmp_path / "cast.json", "pairs").items[0].row.positive == "h"
    for name in ("harmful", "harmless"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"instruction": f"do {name}", "category": "x"}]))
    found = read_data([tmp_path / "harmful.json", tmp_path / "harmless.json"], ["classes"])
    assert [(item.row.prompt, item.row.class_) for item in found.items] == [
        ("do harmful", "harmful"),
        ("do harmless", "harmless"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.jsonl", '{"positive": "a", "negative": "b"}\n{"positive": "a"}\n', "a.jsonl:2: negative: Field required"),
        ("a.jsonl", '{"positive": "a", "negative": "b", "weihgt": 2}\n', "a.jsonl:1: the keys"),
        (
            "a.jsonl",
            '{"positive": "a", "negative": "b"}\n\n{"positive": "a", "negative": "b", "x": 1}',
            "a.jsonl:3: x: unknown key",
        ),
        ("a.jsonl", '{"positive": "a", "negative": 3}\n', "a.jsonl:1: negative"),
        ("a.jsonl", '{"positive": "", "negative": "b"}\n', "a.jsonl:1: positive"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: a row is an object"),
        ("a.jsonl", '{"a": \n', "a.jsonl:1: no JSON"),
        ("a.jsonl", "", "no rows"),
        ("a.json", '{"a": 1}', "one list"),
        ("a.csv", "positive,negative\na,b\nc\n", "a.csv:3"),
        ("a.txt", "x", "files of data end in"),
        ("a.parquet", "x", "no Parquet"),
        ("a.jsonl", '{"prompt": "a", "choices": ["b", "c"], "answer": 2}\n', "answer counts choices from 0 to 1"),
        ("a.jsonl", '{"label": 1}\n', "say text, or prompt"),
        ("a.jsonl", '{"text": "a", "prompt": "b", "label": 1}\n', "say text, or prompt"),
    ],
)
def test_what_is_wrong_is_named(name: str, text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadData) as error:
        read(tmp_path / name)
    assert reason in str(error.value)


def test_splits_keep_groups_together_and_follow_the_seed(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": n % 2, "group": f"g{n // 4}"} for n in range(80)]
    rows[0]["split"] = "test"
    data = read(lines(tmp_path / "a.jsonl", rows))
    one, same, other = data.split(1), data.split(1), data.split(2)
    assert one == same and one != other
    assert any(item.row.text == "t0" for item in one["test"])
    homes: dict[str, set[str]] = {}
    for name, items in one.items():
        for item in items:
            if item.row.split is None:
                homes.setdefault(item.row.group, set()).add(name)
    assert all(len(home) == 1 for home in homes.values())
    assert [len(items) for items in data.split(1, (1, 0, 0)).values()] == [79, 0, 1]


def test_a_digest_tells_files_apart(tmp_path: Path) -> None:
    one, two = lines(tmp_path / "a.jsonl", PAIRS), lines(tmp_path / "b.jsonl", PAIRS[1:])
    assert read(one).digest == read(one).digest != read(two).digest
    assert len(read_data([one], ["pairs"], limit=3)) == 3
