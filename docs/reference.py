"""Writes the parts of docs/ that follow from the code: in http-api.md routes, fields, methods and series; in errors.md
what a server without an engine answers to wrong requests; in vllm-seam.md which of our classes stand over vLLM's.

`python docs/reference.py` writes them, between the marks in each file; tests/test_docs.py holds them to the code.
"""

import ast
import inspect
import json
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_type_hints

import torch
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from prometheus_client import Counter, Gauge, Histogram
from pydantic import BaseModel, SecretStr

from whipstaff.decoding.methods import METHODS as DECODING
from whipstaff.server import demo, errors, metrics
from whipstaff.server.api import admin, batch, captures, fits, messages, responses
from whipstaff.server.api import generate as routes
from whipstaff.server.api.admin import Admin
from whipstaff.server.errors import WhipstaffError
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.vectors import VectorSnapshot, read_vectors
from whipstaff.steering import vector_file
from whipstaff.steering.method import HookPoint
from whipstaff.steering.methods import METHODS as STEERING
from whipstaff.steering.planner import SteeringParams

FOLDER = Path(__file__).parent
ROUTERS = (
    routes.router,
    batch.router,
    messages.router,
    responses.router,
    captures.router,
    admin.router,
    fits.router,
)
BEGIN, END = "<!-- written by docs/reference.py -->", "<!-- end of what is written -->"
KEY = "secret"  # of the example's administrator
MOST = 1000  # bytes that it takes

Schema = Mapping[str, Any]


def main() -> None:
    for name, text in written().items():
        (FOLDER / name).write_text(text)


def written() -> dict[str, str]:
    """Each file as it has to be."""
    made = {"http-api.md": http_api(), "errors.md": error_kinds(), "vllm-seam.md": seam()}
    return {name: _between(FOLDER / name, "\n".join(lines)) for name, lines in made.items()}


def _between(path: Path, text: str) -> str:
    head, _, rest = path.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}"


def _table(*rows: tuple[str, ...]) -> Iterator[str]:
    """A table, of which the first row is the head."""
    for number, row in enumerate(rows):
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
        if number == 0:
            yield "|" + "---|" * len(row)


# ---- http-api.md


def http_api() -> Iterator[str]:
    yield "## Routes"
    yield ""
    yield from _table(("route", "key", "what", "parameters"), *map(_route, ours()))
    yield ""
    yield "## Fields of requests"
    yield ""
    yield "`POST /v1/chat/completions`, `POST /v1/completions`, `POST /v1/responses` and"
    yield "`POST /v1/chat/completions/batch` take these beside OpenAI's and vLLM's fields, and `POST /v1/messages`"
    yield "beside Anthropic's:"
    yield ""
    yield from _table(("field", "what"), *((f"`{name}`", what) for name, what in added_fields().items()))
    yield ""
    yield "And these names of other servers, each for a parameter of a method:"
    yield ""
    names = [
        (f"`{field}`", f"`{method.name}`: `{param}`")
        for method in DECODING.values()
        for field, param in [*method.shorthands.items(), *((gate, "on or off") for gate in method.gates)]
    ]
    yield from _table(("field", "method and parameter"), *names)
    yield ""
    yield "## An entry of `steering`"
    yield ""
    yield "What every method takes; a method's own parameters stand beside these."
    yield ""
    yield from _fields(SteeringParams)
    yield ""
    yield "## Steering methods"
    for method in STEERING.values():
        yield from _method(method.name, method.paper, method.params, f"tokens by default: `{method.where}`")
    yield ""
    yield "## Decoding methods"
    yield ""
    yield "An entry of `decoding` is an object with `method` and that method's parameters."
    for mixer in DECODING.values():
        yield from _method(mixer.name, mixer.paper, mixer.params, f"stage: {mixer.stage}")
    yield ""
    yield "## Series of `/metrics`"
    yield ""
    yield "Beside vLLM's own:"
    yield ""
    yield from _table(("series", "labels", "what"), *_series())


def ours() -> list[APIRoute]:
    """The routes that are not vLLM's own."""
    return [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]


def _route(route: APIRoute) -> tuple[str, ...]:
    """Whose key opens it, the first sentence of what it says of itself, and the parameters of its address."""
    is_admins = any(one.call is admin.admitted for one in route.dependant.dependencies)
    query = [f"`{one.name}`: {one.field_info.description}" for one in route.dependant.query_params]
    method, what = " ".join(sorted(route.methods)), (route.description or "").partition("\n\n")[0]
    return f"`{method} {route.path}`", "admin" if is_admins else "user", what, "; ".join(query)


def added_fields() -> dict[str, str]:
    """The fields that our classes add to vLLM's request of a chat, with what they say of themselves."""
    (route,) = (route for route in ours() if route.path == "/v1/chat/completions")
    request = get_type_hints(route.endpoint)["request"]
    own = [base for base in request.__mro__ if base.__module__.startswith("whipstaff.")]
    names = {name for base in own for name in inspect.get_annotations(base)}
    return {
        name: field.description
        for name, field in request.model_fields.items()
        if name in names and field.description is not None
    }


def _method(name: str, paper: str, params: type[BaseModel], more: str) -> Iterator[str]:
    yield ""
    yield f"### `{name}`"
    yield ""
    yield f"{paper}; {more}"
    if params.model_fields:
        yield ""
        yield from _fields(params)


def _fields(model: type[BaseModel]) -> Iterator[str]:
    """A model's fields as a table, and below it those of the models that these hold."""
    schema = model.model_json_schema()
    yield from _table(*_rows(schema))
    for name, inner in schema.get("$defs", {}).items():
        yield ""
        about = inner.get("description", "").partition("\n\n")[0]
        yield f"`{name}`: {about}" if about else f"`{name}`"
        yield ""
        yield from _table(*_rows(inner))


def _rows(schema: Schema) -> Iterator[tuple[str, ...]]:
    yield "field", "type", "default", "what"
    required = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        default = json.dumps(field["default"], ensure_ascii=False) if "default" in field else ""
        default = "needed" if name in required else f"`{default}`" if default not in ("", "null") else ""
        yield f"`{name}`", kind(field), default, field.get("description", "")


def kind(schema: Schema) -> str:
    """A JSON schema's type in words, with its range."""
    if "$ref" in schema:
        return f"`{schema['$ref'].rpartition('/')[2]}`"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(kind(one) for one in schema["anyOf"] if one.get("type") != "null"))
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{json.dumps(one)}`" for one in schema.get("enum", [schema.get("const")]))
    named = schema.get("type")
    if named == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(kind(one) for one in schema['prefixItems'])}]"
        return f"list of {kind(schema.get('items', {}))}"
    if named == "object":
        values = schema.get("additionalProperties")
        return f"object of {kind(values)}" if isinstance(values, dict) and values else "object"
    return f"{named or 'any'}{_range(schema)}"


def _range(schema: Schema) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = {sign: schema[name] for name, sign in signs.items() if abs(schema.get(name, 2**31)) < 2**31}
    said = [f"{sign} {json.dumps(bound).removesuffix('.0')}" for sign, bound in bounds.items()]
    return f" {', '.join(said)}" if said else ""


def _series() -> Iterator[tuple[str, ...]]:
    for series in vars(metrics).values():
        if isinstance(series, Counter | Gauge | Histogram):
            (family,) = series.describe()
            name = family.name + ("_total" if isinstance(series, Counter) else "")
            yield f"`{name}`", ", ".join(f"`{label}`" for label in series._labelnames), family.documentation


# ---- errors.md


class Example(NamedTuple):
    """A request that is refused."""

    kind: type[WhipstaffError]
    route: str
    body: Any = None
    key: str = ""  # the administrator's


EXAMPLES = (
    Example(errors.BadRequest, "POST /v1/steering/validate", {"steering": {"vector": "cheerful", "scale": "much"}}),
    Example(
        errors.BadRequest, "POST /v1/steering/validate", {"steering": {"vector": "cheerful", "where": {"promt": "all"}}}
    ),
    Example(errors.BadRequest, "POST /v1/steering/validate", {"decoding": [{"method": "typical_p", "p": 2}]}),
    Example(errors.BadRequest, "POST /v1/steering/validate", {"xtc_probabilty": 0.5, "on_unknown": "error"}),
    Example(errors.Unauthorized, "DELETE /v1/steering/vectors/cheerful", key="guess"),
    Example(errors.Forbidden, "DELETE /v1/steering/vectors/cheerful"),
    Example(errors.NotFound, "POST /v1/steering/validate", {"steering": {"vector": "cheerfull"}}),
    Example(errors.NotFound, "GET /v1/steering/presets/terse"),
    Example(errors.VectorUnfit, "POST /v1/steering/validate", {"steering": [{"vector": "wide"}]}),
    Example(errors.TooLarge, "POST /v1/steering/vectors?name=large", "x" * (MOST + 1), KEY),
    Example(
        errors.Unavailable,
        "POST /v1/steering/validate",
        {"decoding": {"method": "proxy_tuning", "expert": "tuned", "antiexpert": "untuned"}},
    ),
    Example(
        errors.Unavailable,
        "POST /v1/steering/validate",
        {"steering": {"method": "pasta", "heads": {"1": [0]}, "spans": [[0, 3]]}},
    ),
)


def error_kinds() -> Iterator[str]:
    rows = [(f"`{one.__name__}`", str(one.status), f"`{one.type}`", _words_of(one)) for one in kinds()]
    yield from _table(("raised as", "status", "`type`", "what it says"), *rows)
    for one in kinds():
        yield ""
        yield f"### {one.status} `{one.__name__}`"
        for example in EXAMPLES:
            if example.kind is one:
                yield ""
                yield from _shown(example)


def kinds() -> list[type[WhipstaffError]]:
    return WhipstaffError.__subclasses__()


def _words_of(kind: type[WhipstaffError]) -> str:
    """What the tree at the head of errors.py says of one."""
    (words,) = re.findall(rf"^ \|- {kind.__name__} +\d+ +(.+)$", errors.__doc__ or "", re.M)
    return str(words)


def _shown(example: Example) -> Iterator[str]:
    answer = ask(example)
    assert answer.status_code == example.kind.status, answer.text
    body = json.dumps(example.body) if isinstance(example.body, dict) else f"{MOST + 1} bytes" if example.body else ""
    yield f"`{example.route}`" + (f" with `{body}`:" if body else ":")
    yield ""
    yield "```json"
    yield from textwrap.wrap(json.dumps(answer.json()), 110, break_long_words=False, break_on_hyphens=False)
    yield "```"


def ask(example: Example) -> Any:
    """What a server without an engine answers, which for a refusal is what one with an engine does."""
    method, path = example.route.split(" ")
    headers = {admin.HEADER: example.key} if example.key else {}
    content = example.body if isinstance(example.body, str) else None
    body = None if content is not None else example.body
    with TestClient(server(has_admin=bool(example.key))) as client:
        return client.request(method, path, json=body, content=content, headers=headers)


def server(has_admin: bool) -> FastAPI:
    """Our routes over the demo's vector, and one of a wider model."""
    app, caps = FastAPI(), capabilities()

    async def current() -> Capabilities:
        return caps

    app.state.whipstaff = SimpleNamespace(current=current, writable=SimpleNamespace(spool=tempfile.TemporaryFile))
    app.state.openai_serving_models, app.state.args = None, SimpleNamespace()
    app.state.whipstaff_admin = Admin.of(SecretStr(KEY) if has_admin else None, MOST)
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(WhipstaffError, routes.answer_refusal)
    return app


def capabilities() -> Capabilities:
    """Of the demo model, started with nothing but vectors."""
    cheerful = vector_file.read(demo.VECTORS / "cheerful.safetensors")
    shape = cheerful.header.model
    with tempfile.TemporaryDirectory() as folder:
        wide = cheerful.header.model_copy(update={"model": shape.model_copy(update={"hidden_size": 4096})})
        vector_file.write(Path(folder) / "wide.safetensors", wide, {"resid_post.1.add": torch.ones(4096)})
        files = read_vectors([demo.VECTORS, Path(folder)])
    points = frozenset(HookPoint("resid_post", layer) for layer in range(shape.num_layers))
    return Capabilities(VectorSnapshot(files, shape), {}, num_layers=shape.num_layers, hook_points=points)


# ---- vllm-seam.md


def seam() -> Iterator[str]:
    """By our class, the vLLM class that it is laid over, and of its members those that ours defines anew."""
    sys.path.insert(0, str(FOLDER.parent / "tests"))
    from house.seam import LAID_OVER, Seam
    from house.sources import Sources

    vllm, rows = Sources("vllm", None), {}
    for name, node in Seam().classes():
        theirs = LAID_OVER.get(name, ())
        members = [one.name for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
        anew = [member for member in members if any(vllm.has(f"{their}.{member}") for their in theirs)]
        rows[name] = ", ".join(f"`{their}`" for their in theirs), ", ".join(f"`{member}`" for member in anew)
    yield from _table(
        ("ours", "over vLLM's", "members anew"), *((f"`{name}`", *row) for name, row in sorted(rows.items()))
    )


if __name__ == "__main__":
    main()
