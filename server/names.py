"""Names of request fields: which of them are one thing, and which are nobody's."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from pydantic import ValidationError

from whipstaff.decoding.method import DecodingError, Method
from whipstaff.decoding.methods import METHODS
from whipstaff.server.errors import BadRequest, did_you_mean

SHORTHANDS: dict[str, tuple[str, str]] = {  # request field -> method, parameter
    field_name: (method.name, param) for method in METHODS.values() for field_name, param in method.shorthands.items()
}
SHARED = tuple({name for method in METHODS.values() for name in method.shared})  # fields of vLLM's requests
GATES = tuple(gate for method in METHODS.values() for gate in method.gates)
TEXTS = frozenset(name for method in METHODS.values() for name in method.texts)  # fields whose strings are no JSON
FIELDS = (
    "steering",
    "decoding",
    "explain",
    "capture",
    "capture_format",
    "stop_when",
    "logprobs_source",
    "on_unavailable",
    "on_unknown",
    "stream_retractions",
    "temperature_last",
    *SHORTHANDS,
    *GATES,
)
"""What Whipstaff adds to requests."""

# other servers' names of vLLM's fields
ALIASES = {"repeat_penalty": "repetition_penalty", "num_return_sequences": "n"}
_MAX_NAMES, _MAX_NAME = 32, 64  # that nobody knows, and their characters
_SAME = {**ALIASES, "max_completion_tokens": "max_tokens"}
_OF_OTHER_APIS = {  # fields of chats, by the name that responses have for the same
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text",
}
_STRENGTHS = ("scale", "strength", "coefficient")


def thing(name: str) -> Any:
    """What a field says: the same for all names of one thing."""
    return SHORTHANDS.get(name, _SAME.get(name, name))


class MethodFields(NamedTuple):
    """What a request's top-level fields say of one method."""

    fields: Sequence[str]  # in the method's order
    params: Mapping[str, Any]  # by parameter
    names: Mapping[str, str]  # parameter -> the field that says it
    gate: str = ""  # the field that turns the method off; "": none does

    def why_off(self, method: Method[Any]) -> str:
        """Why the method is off whatever it is told; "" if it is not."""
        if self.gate:
            return f"{self.gate} is false"
        if method.is_switched_on(self.params):
            return ""
        wanted = (" and ".join(_fields_of(method, switch)) for switch in method.switches)
        return f"{method.name} is off without {' or '.join(wanted)}"


def fields_by_method(fields: Mapping[str, Any]) -> dict[str, MethodFields]:
    """What shorthands say, by method. Raises: BadRequest for one parameter with two values."""
    found = {name: _fields_of_method(method, fields) for name, method in METHODS.items()}
    return {name: said for name, said in found.items() if said.fields}


def _fields_of_method(method: Method[Any], fields: Mapping[str, Any]) -> MethodFields:
    params: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, param in method.shorthands.items():
        if (value := _read(method, name, fields.get(name))) is None:
            continue
        if param in params and params[param] != value:
            raise BadRequest(f"given twice: {names[param]} is {params[param]!r}", name)
        params.setdefault(param, value)
        names.setdefault(param, name)
    gates = {name: fields[name] for name in method.gates if fields.get(name) is not None}
    if bad := [name for name, value in gates.items() if value not in (False, True)]:
        raise BadRequest("true or false", bad[0])
    said = [name for name in method.shorthands if fields.get(name) is not None]
    return MethodFields([*said, *gates], params, names, next((name for name, value in gates.items() if not value), ""))


def _read(method: Method[Any], name: str, value: Any) -> Any:
    if value is None:
        return None
    try:
        return method.read(name, value)
    except DecodingError as error:
        raise BadRequest(str(error), name) from None


def _fields_of(method: Method[Any], params: Iterable[str]) -> list[str]:
    """The first shorthand of each parameter."""
    fields = {param: name for name, param in reversed(tuple(method.shorthands.items()))}
    return [fields[param] for param in method.params.model_fields if param in params]


def is_off(entry: Any) -> bool:
    """Whether an entry, or what shorthands make of one, is sound and changes nothing."""
    method = METHODS.get(str(entry.get("method"))) if isinstance(entry, dict) else None
    try:
        return method is not None and method.is_off(method.params.model_validate(in_own_names(entry)[0]))
    except (ValidationError, BadRequest):
        return False


def in_own_names(entry: Any, path: str = "") -> tuple[Any, dict[str, str]]:
    """An entry of `decoding` by its method's own parameters, which it may call by their top-level names, too; and the
    path of each parameter that it calls so. Raises: BadRequest."""
    method = METHODS.get(str(entry.get("method"))) if isinstance(entry, dict) else None
    if method is None:
        return entry, {}
    own = method.params.model_fields
    others = {name: entry[name] for name in method.shorthands if name in entry and name not in own}
    try:
        said = _fields_of_method(method, others)
    except BadRequest as error:
        raise BadRequest(error.message, f"{path}.{error.param}") from None
    for param, name in said.names.items():
        if param in entry:
            raise BadRequest(f"given twice, here and as {param!r}", f"{path}.{name}")
    rest = {name: value for name, value in entry.items() if name not in others}
    return {**rest, **said.params}, {param: f"{path}.{name}" for param, name in said.names.items()}


def unknown_reasons(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Of names that nobody knows, by name, what to say; of the first ones, where there are many."""
    some = (_utf8(name)[:_MAX_NAME] for name in islice(names, _MAX_NAMES))
    return {name: f"this route has no such field{near(name, known)}" for name in some}


def _utf8(text: str) -> str:
    """A text that can be sent: JSON's may hold half of a surrogate pair."""
    return text.encode(errors="backslashreplace").decode()


def near(name: str, known: Collection[str]) -> str:
    """The nearest name that exists, as the end of a sentence; "" where none is near."""
    if name.startswith("guided_"):  # vLLM's own, which it has no more
        return "; did you mean structured_outputs?"
    for same in (_SAME.get(name), _OF_OTHER_APIS.get(name)):
        if same in known:
            return f"; did you mean {same}?"
    return did_you_mean(name, known)


def that_change(fields: Mapping[str, Any]) -> list[str]:
    """Those of Whipstaff's fields that are more than neutral. Raises: BadRequest for one that says nothing sound."""
    of_methods = fields_by_method({name: fields.get(name) for name in (*SHORTHANDS, *GATES)})
    on = [said for name, said in of_methods.items() if not (said.why_off(METHODS[name]) or _is_off(name, said))]
    named = {field for said in on for field in said.fields}
    return [
        name
        for name in FIELDS
        if name in named or (name not in SHORTHANDS and name not in GATES and not _is_nothing(name, fields.get(name)))
    ]


def _is_off(method: str, said: MethodFields) -> bool:
    return is_off({"method": method, **said.params})


# ---- what a preset forces, against what a request says


def clash(forced: Mapping[str, Any], sent: Mapping[str, Any]) -> tuple[str, str] | None:
    """What a request says although a preset forces it: the preset's field and the request's. What is off or neutral
    says nothing."""
    return next(_clashes(forced, sent), None)


def _clashes(forced: Mapping[str, Any], sent: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    by_thing = {thing(name): name for name in forced}
    for name, value in sent.items():
        if name not in SHORTHANDS and name not in GATES and not _is_nothing(name, value):
            if thing(name) in by_thing:
                yield by_thing[thing(name)], name
            elif name == "decoding":
                yield from ((theirs, name) for entry in _listed(value) for theirs in _of_entry(entry, forced))
    for method, said in fields_by_method(sent).items():
        yield from _of_shorthands(METHODS[method], said, forced)


def _of_shorthands(method: Method[Any], said: MethodFields, forced: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    own = {SHORTHANDS[name][1]: name for name in forced if name in SHORTHANDS and SHORTHANDS[name][0] == method.name}
    if said.gate or _is_off(method.name, said):
        return
    if method.is_switched_on(own):
        yield next(iter(own.values())), said.fields[0]
    yield from ((own[param], name) for param, name in said.names.items() if param in own)
    if not said.why_off(method):
        yield from ((theirs, said.fields[0]) for theirs in _of_method(method, forced))


def _of_entry(entry: Any, forced: Mapping[str, Any]) -> Iterator[str]:
    """The forced fields that an entry of `decoding` would get round."""
    method = METHODS.get(str(entry.get("method"))) if isinstance(entry, Mapping) else None
    if method is None or is_off(entry):
        return
    yield from _of_method(method, forced)
    yield from (name for name in forced if name in SHORTHANDS and SHORTHANDS[name][0] == method.name)
    if "steering" in forced and _steers(entry):
        yield "steering"


def _of_method(method: Method[Any], forced: Mapping[str, Any]) -> Iterator[str]:
    if "decoding" in forced:
        yield "decoding"
    if "temperature" in forced and method.stage == "temperature":
        yield "temperature"


def _steers(value: Any) -> bool:
    """Whether an entry says anywhere how a sequence is steered."""
    if isinstance(value, Mapping):
        return "steering" in value or any(map(_steers, value.values()))
    return isinstance(value, list) and any(map(_steers, value))


def _is_nothing(name: str, value: Any) -> bool:
    """Whether a field is as good as absent."""
    if name == "decoding" and isinstance(value, list | Mapping):
        return all(map(is_off, _listed(value)))
    return value is None or (name == "steering" and all(map(_has_no_strength, _listed(value))))


def _has_no_strength(entry: Any) -> bool:
    """Whether an entry of `steering` is off, if it is sound."""
    strengths = [entry.get(name) for name in _STRENGTHS if name in entry] if isinstance(entry, Mapping) else []
    return bool(strengths) and not any(strengths)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def all_names(forced: Iterable[str]) -> list[str]:
    """These names, and the others that say the same."""
    forced = list(forced)
    things = {SHORTHANDS[name] for name in forced if name in SHORTHANDS}
    gates = (gate for name in {method for method, _ in things} for gate in METHODS[name].gates)
    same = (name for name, one in SHORTHANDS.items() if one in things)
    return list(dict.fromkeys((*forced, *same, *gates)))


def unsaid_defaults(default: Mapping[str, Any], sent: Mapping[str, Any]) -> dict[str, Any]:
    """What a preset says by default and a request does not, by any name."""
    said = set(map(thing, sent))
    entries = _listed(sent.get("decoding"))
    methods = {entry.get("method") for entry in entries if isinstance(entry, Mapping)}
    return {
        name: value
        for name, value in default.items()
        if thing(name) not in said and not (name in SHORTHANDS and SHORTHANDS[name][0] in methods)
    }
