"""What READMEs and docs/ say that can be counted: methods, goldens, formats, flags, endpoints, limits."""

import json
import re
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from fastapi.routing import APIRoute

from whipstaff.decoding.companions import CoupledParams
from whipstaff.decoding.method import STAGES
from whipstaff.decoding.methods import METHODS as DECODING
from whipstaff.decoding.methods import dry
from whipstaff.decoding.search.search import SearchParams
from whipstaff.server.api import admin, fits
from whipstaff.server.api import generate as routes
from whipstaff.server.settings import Settings
from whipstaff.server.suite.methods import GRIDS, VARIANTS
from whipstaff.server.suite.report import BEGIN, END
from whipstaff.server.suite.running import combined
from whipstaff.steering import conditions, planner
from whipstaff.steering.importers import FORMATS, PICKLES
from whipstaff.steering.methods import METHODS as STEERING
from whipstaff.steering.shape import SITES
from whipstaff.steering.where import Shorthand

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
README, STEERING_README, DECODING_README = "README.md", "steering/README.md", "decoding/README.md"


def text(name: str) -> str:
    return (ROOT / name).read_text()


def words(name: str) -> str:
    """A document as one line."""
    return " ".join(text(name).split())


def table(name: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    part = text(name).split(f"\n## {heading}\n", 1)[1]
    (rows,) = re.findall(r"\n\|.*\n\|[-|]+\n((?:\|.*\n)+)", part.split("\n## ", 1)[0])[:1]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows.strip().split("\n")]


def names(cell: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", cell)


def kind(provenance: str) -> str:
    """Whose code made a golden case."""
    kinds = {
        r"published .* executed": "own",
        r"re-expressed|^hook equivalent": "hooks",
        r"^independent": "independent",
        r"^PEFT library": "PEFT",
        r"SAELens classes": "SAELens",
        r"^official": "own",
        r"^transformers": "transformers",
    }
    (found,) = {name for pattern, name in kinds.items() if re.search(pattern, provenance)}
    return found


def test_whose_code_made_the_goldens() -> None:
    cases = [json.loads(path.read_text()) for path in (GOLDEN / "steering" / "cases").glob("*/case.json")]
    files = [json.loads(path.read_text()) for path in (GOLDEN / "decoding").glob("*.json")]
    made, recorded = (Counter(kind(said["provenance"]) for said in some) for some in (cases, files))
    assert (
        f"all {made.total()} steering goldens on five small models through the engine, many at once in one batch: "
        f"{made['own']} by the papers' own code, {made['hooks']} by its hooks written anew, {made['independent']} by "
        f"independent computations from the formulas, {made['PEFT']} by PEFT, {made['SAELens']} by SAELens"
    ) in words("docs/evidence.md")
    assert (
        f"of the {made.total()} steering cases it is the papers' own code in {made['own']}, its hooks written anew in "
        f"{made['hooks']}, PEFT in {made['PEFT']} and SAELens in {made['SAELens']}, and in {made['independent']} an "
        f"independent computation from the formula. Of the {recorded.total()} decoding files, {recorded['own']} come "
        f"from the papers' own code, {recorded['transformers']} from transformers, {recorded['independent']} from "
        "independent computations"
    ) in words("tests/golden/README.md")
    assert len(list((GOLDEN / "steering" / "models").iterdir())) == 5


def test_every_method_is_in_its_table_and_counted() -> None:
    steering = [name for first, *_ in table(STEERING_README, "Methods") for name in names(first)]
    decoding = {name: row[1] for row in table(DECODING_README, "Methods") for name in names(row[0])}
    assert sorted(steering) == sorted(STEERING) and decoding == {name: m.stage for name, m in DECODING.items()}
    assert f"There are {len(STEERING)} [steering methods]" in words(README)
    assert f"There are {len(DECODING)} [decoding methods]" in words(README)
    changelog = words("CHANGELOG.md")
    assert f"Steering: {len(STEERING)} methods" in changelog and f"Decoding: {len(DECODING)} methods" in changelog


def test_formats_are_counted() -> None:
    count = len(FORMATS) + len(PICKLES)
    assert f"# {count} formats" in words(README)
    assert f"lists all {count} with the flags of each" in words("docs/vectors.md")
    assert f"importers of {count} foreign formats" in words("CHANGELOG.md")


def test_what_a_steering_method_reads_and_where() -> None:
    """Its file's parts; the tokens that it edits unless a request says others; whether it needs a file."""
    told: dict[str, str] = {}
    for first, parts, _, tokens, _ in table(STEERING_README, "Methods"):
        told = told if parts == "the same" else dict.fromkeys(re.findall(r"`(\w+)\??`", parts), "")
        for name in names(first):
            method = STEERING[name]
            own = {part.rstrip("?") for part in method.parts}
            others = {"defaults", "adapters", "noreft", "project_bias"} | (own & {"on", "off"})
            assert own - told.keys() <= others and told.keys() - own <= others, name
            assert tokens in ("", method.where), name
    assert "Three methods need no file" in words(STEERING_README)
    assert sum(not method.needs_file for method in STEERING.values()) == 3


def test_every_parameter_and_shorthand_of_a_decoding_method_is_named() -> None:
    """By the shorthand where the table says that; what all of several prompts or all searches take stands below it."""
    told = [name for row in table(DECODING_README, "Other servers' names") for name in names(row[1])]
    for name, method in DECODING.items():
        (row,) = [row for row in table(DECODING_README, "Methods") if name in names(row[0])]
        shorthands = method.shorthands.items()
        said, common = set(names(row[2])), {"method", *CoupledParams.model_fields, *SearchParams.model_fields}
        for param in set(method.params.model_fields) - common:
            assert {param, *(field for field, meant in shorthands if meant == param)} & said, (name, param)
        assert {*method.shorthands, *method.gates} <= set(told), name


def test_methods_of_a_stage_stand_in_the_order_in_which_they_run() -> None:
    """Of mixes a request has one."""
    rows = [name for row in table(DECODING_README, "Methods") for name in names(row[0]) if row[1] != "mix"]
    assert rows == [name for name, method in DECODING.items() if method.stage != "mix"]
    assert [stage for stage, _ in table(DECODING_README, "The pipeline") if not stage.startswith("[")] == list(STAGES)


@pytest.mark.parametrize("name", DECODING)
def test_defaults_of_decoding_methods(name: str) -> None:
    """`name` (default), or under a shorthand's name, as the table says it."""
    (said,) = [row[2] for row in table(DECODING_README, "Methods") if name in names(row[0])]
    fields = DECODING[name].params.model_fields
    shorthands = DECODING[name].shorthands
    for param, default in re.findall(r"`(\w+)` \(([\w.-]+)[;)]", said):
        field = fields[shorthands.get(param, param)]
        if not field.is_required() and default not in ("all", "none", "a", "low"):
            assert json.loads(json.dumps(field.default)) == _value(default), (name, param)


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def test_flags() -> None:
    parser = ArgumentParser()
    Settings.add_flags(parser)
    ours = [set(action.option_strings) for action in parser._actions if "--help" not in action.option_strings]
    told = set(re.findall(r"^    (--[\w-]+) ", text("docs/operating.md"), re.M))
    assert told <= set().union(*ours)
    assert [names for names in ours if len(names & told) != 1] == []  # --x or --no-x, whichever is not the default


def test_endpoints() -> None:
    ours = {
        (method, route.path)
        for router in (routes.router, admin.router, fits.router)
        for route in router.routes
        if isinstance(route, APIRoute) and route.path.startswith("/v1/steering")
        for method in route.methods
    }
    assert {path.split("/")[3] for _, path in ours} == {"methods", "vectors", "validate", "presets", "fits", "links"}
    for method, path in ours:
        tail = path.removeprefix("/v1/steering/").split("/")[0]
        assert re.search(rf"`?{method} (?:/v1/steering|\.\.\.)/(?:{tail}|\{{name\}})", words("docs/requests.md")), (
            method,
            path,
        )


def test_limits() -> None:
    assert (
        f"At most {planner.MAX_EDITS} entries, {conditions.MAX_SCHEDULES} different schedules, "
        f"{conditions.MAX_CONDITIONS} different readings"
    ) in words(STEERING_README)
    assert f"DRY counts runs of up to {dry._LONGEST} tokens" in words(DECODING_README)


def test_sites_and_clauses() -> None:
    assert {name for first, *_ in table(STEERING_README, "Sites") for name in names(first)} == {*SITES, "attention"}
    for name in get_args(Shorthand):
        assert f"`{name}`" in words(STEERING_README) and f"`{name}`" in words("docs/requests.md")


def test_what_the_suite_found_is_what_documents_say() -> None:
    """The table is that of the summary beside it, leaves nothing out of the families that it has, and gives the README
    its numbers."""
    found = json.loads(text("docs/evidence.json"))
    written = text("docs/evidence.md").partition(BEGIN)[2].partition(END)[0]
    assert found["cells"] in written and f"`{found['command']}`" in written
    lines = {(line["method"], line["task"]): line for line in found["lines"]}
    families = {line["family"] for line in found["lines"]}
    for variant in (*VARIANTS, *combined(GRIDS)):
        for task in variant.tasks if variant.family in families else ():
            line = lines[variant.name, task]
            assert re.search(rf"\| {task}: .* \| \*?{re.escape(variant.name)}\*? \|", written), variant.name
            assert line["score"] is None or f"| {line['plain']:.2f} | {line['score']:.2f}" in written
    for method, task in (("proxy_tuning", "answers"), ("CAA `cheerful`", "moods"), ("dry", "refrains")):
        line = lines[method, task]
        assert line["verdict"] == "helps"
        assert f"from {line['plain']:.2f} to {line['score']:.2f}" in words(README)
