"""Every method that the demo can run has an example of a request, and the example shows that it does something."""

from typing import Any

import httpx
import pytest
from asking import ok
from serving import Server

from whipstaff.server.demo.fitted import FILES

pytestmark = pytest.mark.engine
OURS = ("steering", "decoding")


@pytest.fixture(scope="module")
def server(demo_server: Server) -> Server:
    return demo_server


def tokens(http: httpx.Client, body: dict[str, Any]) -> list[int]:
    (choice,) = ok(http.post("/v1/completions", json=body | {"return_token_ids": True}))["choices"]
    found: list[int] = choice["token_ids"]
    return found


def test_every_method_that_runs_here_is_shown_by_its_example(http: httpx.Client) -> None:
    rows = {row["name"]: row for row in http.get("/v1/steering/methods").json()["data"]}
    shown = {file.method for file in FILES.values() if file.prompt}  # of heads, those methods are that read them
    assert shown <= {name for name, row in rows.items() if row["available"]}
    assert all(row["example"] is None for row in rows.values() if not row["available"])
    inert = []
    for name, row in rows.items():
        if row["available"]:
            body = row["example"]
            plain = {key: value for key, value in body.items() if key not in OURS}
            assert len(plain) == len(body) - 1, name
            if tokens(http, body) == tokens(http, plain):
                inert.append(name)
    assert not inert
