"""Errors name the field by its path in the request."""

from typing import Any

import pytest

from whipstaff.server.errors import (
    field_path,
    json_path,
)


@pytest.mark.parametrize(
    ("loc", "data", "path"),
    [
        ((), {}, ""),
        (("a",), {"a": 1}, ".a"),
        (("a",), {}, ".a"),  # a missing field is named too
        (("a", 1, "b"), {"a": [0, {"b": 3}]}, ".a[1].b"),
        (("where", "Where", "prompt", "list[tuple]", 0, 1), {"where": {"prompt": [[0, "x"]]}}, ".where.prompt[0][1]"),
        (("where", "literal['all','none']"), {"where": 3}, ".where"),
        (("a", 5), {"a": [1]}, ".a"),  # no such step: the path ends where the data does
    ],
)
def test_paths_hold_the_steps_that_are_in_the_data(loc: tuple[int | str, ...], data: Any, path: str) -> None:
    assert json_path(loc, data) == path


@pytest.mark.parametrize(
    ("param", "data", "path"),
    [
        ("", {}, "p"),
        ("a", {}, "p.a"),
        ("a.1.b", {"a": [0, {"b": 3}]}, "p.a[1].b"),
        ("a[1].b", {"a": [0, {"b": 3}]}, "p.a[1].b"),
        ("heads.3.1", {"heads": {"3": [0, 9]}}, "p.heads.3[1]"),
        ("where.prompt", {"where": "all"}, "p.where"),
        ("features.0", {}, "p.features"),  # the file's own: the request has none
        ("scale", {"coefficient": 1}, "p.coefficient"),
        ("scale", {"features": []}, "p.scale"),
    ],
)
def test_fields_of_steering_become_paths_of_the_request(param: str, data: Any, path: str) -> None:
    assert field_path("p", param, data) == path
