"""The table of methods says what this server can do, and which flag would help."""

from dataclasses import replace

from catalogues import LIMITS

from whipstaff.decoding.companions import CoupledParams
from whipstaff.decoding.method import Depth, StreamMixer
from whipstaff.decoding.methods import METHODS
from whipstaff.server.api.method_table import method_table
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.steering.methods import METHODS as STEERING


def test_the_table_says_which_flag_keeps_early_layers(early: Capabilities) -> None:
    rows = [
        next(row for row in method_table(server, "base") if row["name"] == "dola")
        for server in (early, replace(early, depth=Depth(4)))
    ]
    assert [row["reason"] for row in rows] == [None, "start the server with --early-layers LAYERS"]


def test_the_table_says_what_a_search_lacks(early: Capabilities) -> None:
    able = replace(early, looks_ahead=True, reads_attention=True)
    rows = [next(row for row in method_table(server, "base") if row["name"] == "opera") for server in (early, able)]
    assert [row["available"] for row in rows] == [False, True]
    assert "start it with --lookahead and --attention-rows" in rows[0]["reason"]


def test_the_method_table_says_what_this_server_can_do(
    caps: Capabilities, everything: Capabilities, nothing: Capabilities
) -> None:
    dense, full, empty = (
        {row["name"]: row for row in method_table(server, "base")} for server in (caps, everything, nothing)
    )
    edits = {name: method for name, method in STEERING.items() if method.kind.named_in != "decoding"}
    assert dense.keys() == full.keys() == empty.keys() == {*edits, *METHODS}
    assert full["proxy_tuning"]["schema"]["properties"]["expert"]["enum"] == list(LIMITS)
    assert full["proxy_tuning"]["defaults"]["alpha"] == 1.0
    assert not any(row["available"] for row in empty.values())
    assert empty["caa"]["reason"] == "no vector of this method is loaded; start the server with --vectors PATH"
    assert empty["proxy_tuning"]["reason"] == "start the server with --aux NAME=MODEL"
    assert dense["mote"]["reason"] == "the served model has no experts"
    assert dense["pasta"]["reason"] == "start the server with --steering-sites attention"
    served = {entry.vector.method.name for entry in everything.registry} | {"mote", "pasta", "attention_override"}
    mixing = {
        name for name, method in METHODS.items() if isinstance(method, StreamMixer)
    }  # no tokenizer, no heads here
    decoding = {name for name in mixing if not issubclass(METHODS[name].params, CoupledParams)}
    for name, row in full.items():
        assert row["paper"] and row["kind"] == (METHODS[name].stage if name in METHODS else "edit")
        assert (row["reason"] is None) is row["available"] is (name in {*served, *decoding})
        assert (row["example"] is None) is (not row["available"] or name == "probe")  # which no entry names
    assert dense["vector"]["schema"]["properties"]["vector"]["enum"] == ["calm", "router", "strange"]
    for name in edits:
        schema = full[name]["schema"]
        assert schema["additionalProperties"] is False
        assert ("vector" in schema["required"]) is ("method" not in schema["properties"]) is STEERING[name].needs_file
    assert full["caa"]["schema"]["properties"].keys() >= {"scale", "layers", "where", "when", "schedule", "renorm"}
    assert full["mote"]["schema"]["properties"].keys() == {"vector", "method", "where", "mode", "experts"}
    assert full["soft_prompt"]["schema"]["properties"].keys() == {"vector", "insert", "tokens"}
