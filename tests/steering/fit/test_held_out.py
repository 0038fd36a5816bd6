"""Files are judged on the test split: a planted direction is found there, nothing is nothing, and few rows are few."""

from pathlib import Path
from typing import Any

import pytest
from planted import SHAPE, Planted

from whipstaff.steering.fit import fitting
from whipstaff.steering.fit.data import rows_data
from whipstaff.steering.fit.held_out import held_out, wilson
from whipstaff.steering.fit.job import Job
from whipstaff.steering.fit.options import Options
from whipstaff.steering.method import HookPoint
from whipstaff.steering.shape import Site

from .test_fits import mark, sentences, tokenizer, unit  # noqa: F401

LABELLED = [
    {"text": f"{text} {word}", "label": n} for text in sentences(160) for word, n in (("bright", 1), ("dark", 0))
]
PAIRS = [{"positive": f"{text} bright", "negative": f"{text} dark"} for text in sentences(160)]
QUESTIONS = [{"question": text, "right": ["bright"], "wrong": ["dark", "dark dark"]} for text in sentences(160)]
FORM = "Q: {prompt} A: {response}"


def judged(
    method: str, rows: list[dict[str, Any]], source: Planted, folder: Path, form: str = "none"
) -> dict[str, Any]:
    recipe = fitting.recipe_of(method)
    data = rows_data(rows, recipe.kinds, "data")
    job: Job = fitting.job_of(recipe, source, data, Options(template=form), folder / "rows")
    return held_out(job, fitting.fit(method, job).axis)


@pytest.mark.parametrize(
    ("method", "rows", "form", "number"),
    [
        ("caa", PAIRS, "none", "ahead"),
        ("caa", LABELLED, "none", "accuracy"),
        ("probe", LABELLED, "none", "accuracy"),
        ("add_direction", LABELLED, "none", "accuracy"),
        ("angular", PAIRS, "none", "ahead"),
        ("iti", QUESTIONS, FORM, "ahead"),
    ],
)
def test_what_was_planted_is_found_in_rows_that_were_not_looked_at(
    method: str,
    rows: list[dict[str, Any]],
    form: str,
    number: str,
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    sites: dict[str, tuple[Site, ...]] = {"iti": ("attn_head",), "angular": ("attn_in", "mlp_in")}
    of_method = sites.get(method, ("resid_pre",) if method == "add_direction" else ("resid_post",))
    places = [HookPoint(site, layer) for layer in range(6) for site in of_method]
    numbers = {place: 4 * unit(SHAPE.width(place.site)) for place in places}
    for planted, is_found in ((numbers, True), ({}, False)):
        found = judged(method, rows, Planted(tokenizer, mark(tokenizer), planted), tmp_path, form)
        for name in ("auc", number):
            low, high = found[name]["interval"]
            assert low <= found[name]["value"] <= high
            assert (low > 0.6) if is_found else (low < 0.5 < high), (name, found)
        assert found["rows"] == found["groups"] == round(0.15 * len(rows))


def test_what_cannot_be_measured_is_said(tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    source = Planted(tokenizer, mark(tokenizer), {})
    assert "eval" in judged("actadd", PAIRS[:1], source, tmp_path)["problem"]
    rows = [row | {"split": "train" if index else "dev"} for index, row in enumerate(PAIRS)]
    assert "lacks a class" in judged("caa", rows, source, tmp_path)["problem"]


def test_all_of_a_few_is_not_certain() -> None:
    """Wilson 1927; 10 of 10 may be 0.72."""
    for share, num, expected in ((1.0, 10, (0.7225, 1.0)), (0.5, 100, (0.4038, 0.5962)), (0.0, 10, (0.0, 0.2775))):
        assert list(wilson(share, num)) == pytest.approx(expected, abs=1e-4)
