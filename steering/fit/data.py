"""Data to fit on and to evaluate with: JSON lines, JSON lists, CSV or Parquet, one schema for each kind of row.

The kind of a file is found from its keys, and every row is checked against it: an unknown key is an error, and an error
names the file and the line. Files as others publish them (CAA's, TruthfulQA's, the refusal papers') are read as
what they mean.
"""

import csv
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from whipstaff.steering.errors import SteeringError

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
MAX_LINE = 16 << 20  # characters


class BadData(SteeringError):
    """Data that cannot be used; the message names the file and the line.

    Args:
        said: what is wrong.
        place: the row, as file and line; "" where it is of no row.
        key: of that row.
        param: the option that does not go with it.
    """

    def __init__(self, said: str, place: str = "", key: str = "", param: str = "") -> None:
        super().__init__(f"{place}: {said}" if place else said, param)
        self.said, self.place, self.key = said, place, key


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str = Field(min_length=1)
    content: str


Words = Annotated[str, Field(min_length=1)]
Prompt = Words | Annotated[tuple[Message, ...], Field(min_length=1)]


class Row(BaseModel):
    """What rows of every kind may say."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    id: str | None = Field(None, description="named in messages; default: file and line")
    group: str | None = Field(None, description="rows of one group stay in one split; default: the row's own question")
    split: Split | None = Field(None, description="where the row belongs; default: drawn by the seed, by group")

    @property
    def own_group(self) -> str:
        """What must not be torn apart when the row names no group."""
        return self.model_dump_json(exclude={"id", "split"})


class Pair(Row):
    """Two texts that differ in what is to be found."""

    positive: Words
    negative: Words
    prompt: Prompt | None = Field(None, description="what both of them answer; without it they are whole texts")

    @property
    def own_group(self) -> str:
        return super().own_group if self.prompt is None else _key(self.prompt)


class Labelled(Row):
    """A text that shows something or does not."""

    label: Annotated[int, Field(ge=0, le=1)] = Field(description="1 shows it")
    text: Words | None = None
    prompt: Prompt | None = None
    response: Words | None = None

    @model_validator(mode="after")
    def _is_text_or_answer(self) -> "Labelled":
        if (self.text is None) == (self.prompt is None) or (self.response is not None and self.prompt is None):
            raise ValueError("say text, or prompt with or without response")
        return self

    @property
    def own_group(self) -> str:
        return super().own_group if self.prompt is None else _key(self.prompt)


class Question(Row):
    """A question with right and wrong answers."""

    question: Words
    right: Annotated[tuple[Words, ...], Field(min_length=1)]
    wrong: Annotated[tuple[Words, ...], Field(min_length=1)]
    best: Words | None = Field(None, description="the best of `right`; default: the first")
    context: str | None = Field(None, description="stands before the question")

    @property
    def own_group(self) -> str:
        return self.question

    @property
    def asked(self) -> str:
        return self.question if self.context is None else f"{self.context}\n{self.question}"


class Demo(Row):
    """An input and the output that a task has for it."""

    input: Words
    output: Words
    task: str | None = None

    @property
    def own_group(self) -> str:
        return self.input


class Classed(Row):
    """A prompt of some class: harmful or harmless, one topic or another."""

    prompt: Prompt
    class_: Words = Field(alias="class")

    @property
    def own_group(self) -> str:
        return _key(self.prompt)


class Choice(Row):
    """A prompt with several continuations, of which some are right."""

    prompt: Prompt
    choices: Annotated[tuple[Words, ...], Field(min_length=2)]
    answer: int | Annotated[tuple[int, ...], Field(min_length=1)]

    @property
    def own_group(self) -> str:
        return _key(self.prompt)

    @property
    def answers(self) -> tuple[int, ...]:
        return (self.answer,) if isinstance(self.answer, int) else self.answer

    @model_validator(mode="after")
    def _answers_exist(self) -> "Choice":
        if not all(0 <= index < len(self.choices) for index in self.answers):
            raise ValueError(f"answer counts choices from 0 to {len(self.choices) - 1}")
        return self


class Response(Row):
    """A prompt and the response that is wanted."""

    prompt: Prompt
    response: Words

    @property
    def own_group(self) -> str:
        return _key(self.prompt)


class Intent(Row):
    """A question whose context contradicts what the model knows, and which of the two is asked for."""

    query: Words
    context: Words
    intent: Literal["context", "prior"]
    context_answer: Words
    prior_answer: Words

    @property
    def own_group(self) -> str:
        return self.context


class Grounded(Row):
    """An answer, and which of its parts are as they should be."""

    question: Words
    response: Words
    spans: Annotated[tuple[tuple[int, int, Literal[0, 1]], ...], Field(min_length=1)] = Field(
        description="[[start, end, label]] in characters of the response, in order; 1 is wanted, as what is supported"
    )
    context: str | None = Field(None, description="stands before the question")

    @model_validator(mode="after")
    def _spans_stand_in_it(self) -> "Grounded":
        last = 0
        for start, end, _ in self.spans:
            if not last <= start < end <= len(self.response):
                raise ValueError(
                    f"spans: [{start}, {end}) is not within the response's {len(self.response)} characters, "
                    "behind the span before"
                )
            last = end
        return self

    @property
    def own_group(self) -> str:
        return self.context or self.question

    @property
    def asked(self) -> str:
        return self.question if self.context is None else f"{self.context}\n{self.question}"


class Neutral(Row):
    """Any text."""

    text: Words


KINDS: dict[str, type[Row]] = {
    "pairs": Pair,
    "labelled": Labelled,
    "questions": Question,
    "demos": Demo,
    "classes": Classed,
    "choices": Choice,
    "responses": Response,
    "intents": Intent,
    "grounded": Grounded,
    "neutral": Neutral,
}
_COMMON = set(Row.model_fields)


@dataclass(frozen=True)
class Item:
    """One row, and where it stands."""

    row: Any  # of the data set's kind
    place: str  # file:line


@dataclass(frozen=True)
class Dataset:
    """Rows of one kind, in the order of their files."""

    kind: str
    items: tuple[Item, ...]
    digest: str  # sha256 over the files, in their order
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.items)

    def split(self, seed: int, shares: Sequence[float] = (0.7, 0.15, 0.15)) -> dict[Split, list[Item]]:
        """Rows by split, whole groups at a time: the same for the same seed. Rows that name a split keep to it."""
        groups = sorted({_group(item.row) for item in self.items if item.row.split is None})
        random.Random(seed).shuffle(groups)
        ends = [round(sum(shares[: index + 1]) / sum(shares) * len(groups)) for index in range(3)]
        drawn = {group: SPLITS[sum(at >= end for end in ends[:2])] for at, group in enumerate(groups)}
        found: dict[Split, list[Item]] = {name: [] for name in SPLITS}
        for item in self.items:
            found[item.row.split or drawn[_group(item.row)]].append(item)
        return found


def _group(row: Row) -> str:
    return row.group if row.group is not None else row.own_group


def _key(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps([message.model_dump() for message in prompt])


def read_data(paths: Sequence[Path], wanted: Sequence[str], limit: int | None = None) -> Dataset:
    """The rows of some files, which must be of one of the wanted kinds.

    Args:
        wanted: names of KINDS, by preference where a row could be of several.
        limit: the first so many rows of each file.

    Raises: BadData, OSError.
    """
    digest, items, kind = hashlib.sha256(), [], ""
    for path in paths:
        digest.update(_digest(path))
        for number, (line, raw) in enumerate(_raw_rows(path)):
            if limit is not None and number >= limit:
                break
            place = f"{path.name}:{line}"
            meant = _renamed(raw, path, place, len(paths), wanted)
            kind = kind or _kind_of(meant, wanted, place)
            items.append(Item(_checked(meant, kind, place), place))
    if not items:
        raise BadData(f"{', '.join(path.name for path in paths)}: no rows")
    return Dataset(kind, tuple(items), digest.hexdigest(), tuple(path.name for path in paths))


def rows_data(rows: Sequence[Any], wanted: Sequence[str], name: str) -> Dataset:
    """The same of rows that somebody sent; the place of one is `name[index]`. Raises: BadData."""
    items, kind = [], ""
    for number, raw in enumerate(rows):
        place = f"{name}[{number}]"
        if not isinstance(raw, dict):
            raise BadData(f"a row is an object with keys, and this is {type(raw).__name__}", place)
        meant = _renamed(raw, Path(name), place, 1, wanted)
        kind = kind or _kind_of(meant, wanted, place)
        items.append(Item(_checked(meant, kind, place), place))
    if not items:
        raise BadData("no rows", name)
    lines = "".join(json.dumps(raw) + "\n" for raw in rows)  # as the file that has them
    digest = hashlib.sha256(hashlib.sha256(lines.encode()).digest())
    return Dataset(kind, tuple(items), digest.hexdigest(), (name,))


def _kind_of(raw: Mapping[str, Any], wanted: Sequence[str], place: str) -> str:
    """The kind that a row's keys fit."""
    for kind in wanted:
        fields = KINDS[kind].model_fields
        names = {field.alias or name for name, field in fields.items()}
        needed = {field.alias or name for name, field in fields.items() if field.is_required()}
        if needed <= set(raw) <= names:
            return kind
    said = "; ".join(f"{kind}: {_keys_of(kind)}" for kind in wanted)
    raise BadData(f"the keys {sorted(raw)} are those of none of these: {said}", place)


def _keys_of(kind: str) -> str:
    fields = {field.alias or name: field for name, field in KINDS[kind].model_fields.items() if name not in _COMMON}
    return ", ".join(name + ("" if field.is_required() else "?") for name, field in fields.items())


def _checked(raw: Mapping[str, Any], kind: str, place: str) -> Row:
    try:
        return KINDS[kind].model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        said = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise BadData(
            f"{key or 'the row'}: {said} (this file has {kind}: {_keys_of(kind)})",
            place,
            str(first["loc"][0]) if key else "",
        ) from error


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


# ---- files


def _raw_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line or row, its keys)."""
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
        ".jsonl": _json_lines,
        ".json": _json_list,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    if path.suffix not in readers:
        raise BadData(f"{path.name}: files of data end in {', '.join(readers)}")
    if not path.is_file():
        raise BadData(f"{path}: no such file")
    try:
        for line, raw in readers[path.suffix](path):
            if not isinstance(raw, dict):
                raise BadData(f"{path.name}:{line}: a row is an object with keys, and this is {type(raw).__name__}")
            yield line, raw
    except UnicodeDecodeError as error:
        raise BadData(f"{path.name}: not UTF-8: {error}") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, 1):
            if len(text) > MAX_LINE:
                raise BadData(f"{path.name}:{line}: longer than {MAX_LINE} characters")
            if text.strip():
                try:
                    yield line, json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise BadData(f"{path.name}:{line}: no JSON: {error}") from error


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadData(f"{path.name}: no JSON: {error}") from error
    rows = whole["train"] if isinstance(whole, dict) and set(whole) == {"train"} else whole
    if not isinstance(rows, list):
        raise BadData(f"{path.name}: a .json file of data is one list of objects; lines of objects are .jsonl")
    yield from enumerate(rows, 1)


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for raw in reader:
                if None in raw or None in raw.values():
                    raise BadData(f"{path.name}:{reader.line_num}: the line has not as many fields as the first one")
                yield reader.line_num, {key: _cell(value) for key, value in raw.items() if value != ""}
        except csv.Error as error:
            raise BadData(f"{path.name}:{reader.line_num}: no CSV: {error}") from error


def _cell(value: str) -> Any:
    """A cell that begins as a list or an object does may be one in JSON."""
    if value[:1] not in "[{":
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise BadData(f"{path.name}: Parquet takes pyarrow: pip install 'whipstaff[fit]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            row = 0
            for batch in file.iter_batches():
                for raw in batch.to_pylist():
                    row += 1
                    yield row, {key: value for key, value in raw.items() if value is not None}
    except ArrowException as error:
        raise BadData(f"{path.name}: no Parquet file: {error}") from error


# ---- what others call the same


def _renamed(
    raw: Mapping[str, Any], path: Path, place: str, num_files: int, wanted: Sequence[str]
) -> Mapping[str, Any]:
    """A row under our keys."""
    keys = set(raw)
    if {"question", "answer_matching_behavior", "answer_not_matching_behavior"} <= keys:  # CAA
        known = {
            "question": "prompt",
            "answer_matching_behavior": "positive",
            "answer_not_matching_behavior": "negative",
        }
        return {known.get(key, key): value for key, value in raw.items()}
    if keys == {"harmful", "harmless"}:  # CAST
        return {"positive": raw["harmful"], "negative": raw["harmless"]}
    if {"Question", "Correct Answers", "Incorrect Answers"} <= keys:  # TruthfulQA
        return _truthful(raw)
    if "mc2_targets" in keys:
        return _targets(raw, place)
    named = {"prompt": raw["instruction"]} if "instruction" in keys and "classes" in wanted else {}
    if num_files > 1 and "classes" in wanted and keys - {"id", "group", "split", "category"} in _LONE_PROMPTS:
        common = {key: raw[key] for key in _COMMON & keys}
        return {"prompt": raw.get("prompt"), **named, **common, "class": path.stem}  # the file's name is the class
    return raw


_LONE_PROMPTS = ({"prompt"}, {"instruction"})
_TRUTHFUL = {"Question": "question", "Correct Answers": "right", "Incorrect Answers": "wrong", "Best Answer": "best"}
_OF_NO_USE = {"Type", "Category", "Source", "Best Incorrect Answer"}  # of TruthfulQA's columns


def _truthful(raw: Mapping[str, Any]) -> dict[str, Any]:
    """TruthfulQA's CSV: answers are joined by "; "."""
    found = {_TRUTHFUL.get(key, key): value for key, value in raw.items() if key not in _OF_NO_USE}
    for key in ("right", "wrong"):
        found[key] = [part.strip() for part in str(found[key]).split(";") if part.strip()]
    return found


def _targets(raw: Mapping[str, Any], place: str) -> dict[str, Any]:
    """TruthfulQA as multiple choice: {"choices": [..], "labels": [1, 0, ..]}."""
    targets = raw["mc2_targets"]
    try:
        answers = list(zip(targets["choices"], targets["labels"], strict=True))
    except (TypeError, KeyError, ValueError) as error:
        raise BadData("mc2_targets: wanted equally many choices and labels", place, "mc2_targets") from error
    sides = {name: [text for text, label in answers if label == value] for name, value in (("right", 1), ("wrong", 0))}
    return {key: value for key, value in raw.items() if key not in ("mc1_targets", "mc2_targets")} | sides
