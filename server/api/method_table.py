"""The table of every method for GET /v1/steering/methods: what it takes, and whether this server can run it."""

from typing import Any

from pydantic import BaseModel

from whipstaff.decoding.companions import CoupledParams
from whipstaff.decoding.method import LogitsRewriter
from whipstaff.decoding.method import Method as DecodingMethod
from whipstaff.decoding.methods import METHODS as DECODING
from whipstaff.decoding.search.search import SearchMethod
from whipstaff.server.admission.decoding import head_kinds, judged_tokens, lacking
from whipstaff.server.api import examples
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.steering.method import Method
from whipstaff.steering.methods import METHODS as STEERING
from whipstaff.steering.planner import SteeringParams


def method_table(caps: Capabilities, model: str) -> list[dict[str, Any]]:
    """Every method: kind, JSON schema with this server's names, defaults, paper, availability, and a request that shows
    it.

    Args:
        model: the name that requests have for the served model.
    """
    return [
        *(_steering(method, caps, model) for method in STEERING.values() if method.kind.named_in != "decoding"),
        *(_decoding(method, caps, model) for method in DECODING.values()),
    ]


def _steering(method: Method[Any], caps: Capabilities, model: str) -> dict[str, Any]:
    own = (entry for entry in caps.registry if entry.problem is None and entry.vector.method is method)
    vectors = {entry.name: entry.vector for entry in own}
    schema = _merged(SteeringParams, method.params)
    for name in method.kind.meaningless:
        del schema["properties"][name]
    schema["properties"]["vector"]["enum"] = list(vectors)
    if method.needs_file:
        del schema["properties"]["method"]
        schema["required"] = ["vector", *schema["required"]]
    else:
        schema["properties"]["method"]["enum"] = [method.name]
    return {
        "name": method.name,
        "kind": "edit",
        "schema": schema,
        "defaults": _defaults(schema),
        "paper": method.paper,
        "sites": list(method.sites),
        "where": method.where,
        "off": dict(method.off) or None,
        "parts": {part: list(shape) for part, shape in method.parts.items()},
        **_available(reason := _why_not(method, bool(vectors), caps)),
        "example": None if reason else examples.steered(method, vectors, caps, model),
    }


def _why_not(method: Method[Any], has_vectors: bool, caps: Capabilities) -> str | None:
    """Why no request can use a method on this server; None when one can."""
    if (reason := method.kind.why_not(caps)) is not None:
        return reason
    if method.needs_file and not has_vectors:
        return "no vector of this method is loaded; start the server with --vectors PATH"
    return None


def _decoding(method: DecodingMethod[Any], caps: Capabilities, model: str) -> dict[str, Any]:
    schema = method.params.model_json_schema()
    for name in method.stream_fields:
        schema["properties"][name]["enum"] = list(caps.auxiliaries)
    heads = {name: _fitting(method, name, caps) for name in method.head_fields}
    for name, fitting in heads.items():
        schema["properties"][name]["enum"] = fitting
    needed = {
        name: fitting[0]
        for name, fitting in heads.items()
        if fitting and method.params.model_fields[name].is_required()
    }
    missing = [
        f"start the server with --vectors PATH of a {' or, with --lookahead, a '.join(head_kinds(method, name))}"
        for name, fitting in heads.items()
        if not fitting and method.params.model_fields[name].is_required()
    ]
    if len(caps.auxiliaries) < method.num_streams:
        missing.append("start the server with --aux NAME=MODEL")
    if method.needs_adapters and not caps.max_adapters:
        missing.append("start the server with --enable-lora --lora-modules NAME=PATH")
    if isinstance(method, LogitsRewriter) and (reason := lacking(method, caps)):
        missing.append(f"it {reason}")
    if isinstance(method, LogitsRewriter) and "early_exit" in method.needs and not caps.depth.kept:
        missing.append("start the server with --early-layers LAYERS")
    if isinstance(method, SearchMethod) and (reason := lacking(method, caps)):
        missing.append(f"it {reason}")
    if (
        isinstance(method, LogitsRewriter | SearchMethod) or issubclass(method.params, CoupledParams)
    ) and caps.words is None:
        missing.append("this server runs without a tokenizer")
    return {
        "name": method.name,
        "kind": method.stage,
        "schema": schema,
        "defaults": _defaults(schema),
        "paper": method.paper,
        "shorthands": dict(method.shorthands),
        **_available("; ".join(missing) or None),
        "example": None if missing else examples.decoded(method, needed, list(caps.auxiliaries), model),
    }


def _fitting(method: DecodingMethod[Any], name: str, caps: Capabilities) -> list[str]:
    """The learned heads that a parameter may name on this server."""
    kinds = head_kinds(method, name)[: None if caps.looks_ahead else 1]
    fitting = [entry for entry in caps.registry if entry.problem is None and entry.vector.header.method in kinds]
    return [entry.name for entry in fitting if judged_tokens(entry.vector) in (None, caps.vocabulary)]


def _merged(entry: type[BaseModel], own: type[BaseModel]) -> dict[str, Any]:
    """The schema of an entry of a method: what all may say, and the method's own parameters."""
    general, special = entry.model_json_schema(), own.model_json_schema()
    return {
        **general,
        "$defs": {**general.get("$defs", {}), **special.get("$defs", {})},
        "properties": {**general["properties"], **special.get("properties", {})},
        "required": special.get("required", []),
    }


def _defaults(schema: dict[str, Any]) -> dict[str, Any]:
    return {name: field["default"] for name, field in schema["properties"].items() if "default" in field}


def _available(reason: str | None) -> dict[str, Any]:
    return {"available": reason is None, "reason": reason}
