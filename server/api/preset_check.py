"""A preset is tried when it is added: it is compiled as a request that names it would be."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi.exceptions import RequestValidationError

from whipstaff.server.admission.fields import fields_of
from whipstaff.server.admission.prepare import compile_request
from whipstaff.server.engine.frontend.requests import ChatRequest, TextRequest, check_sampling, parse
from whipstaff.server.errors import BadRequest, WhipstaffError
from whipstaff.server.names import FIELDS, near
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.presets import Part, Preset

_WORD = "Hello"
ReasonAgainst = Callable[[Any], Awaitable[str | None]]  # why the model would not take a request's prompt


async def check(preset: Preset, caps: Capabilities, reason_against: ReasonAgainst) -> None:
    """What depends on a prompt, such as where its messages stand, is left to the requests.

    Raises: WhipstaffError naming the field of the preset that no request could use.
    """
    for name, part in (("default", preset.body.default), ("forced", preset.body.forced)):
        _check_names(part, name)
    tries: list[tuple[Any, dict[str, Any]]] = [(TextRequest, {"prompt": _WORD})] if preset.is_for_text else []
    if preset.is_for_chat:
        tries.append((ChatRequest, {"messages": [{"role": "user", "content": _WORD}]}))
    for model, body in tries:
        try:
            request = parse(model, body)
            filled = preset.fill(request, body)
            compiled = compile_request(request, caps, fields_of(request), preset.gives(filled, "decoding"))
            check_sampling(request, is_hot_taken=compiled is not None and compiled.options.is_hot)
        except RequestValidationError as error:
            raise BadRequest(str(error.errors()[0]["msg"]), ".".join(map(str, error.errors()[0]["loc"]))) from None
        except WhipstaffError as error:
            raise type(error)(error.message, _path(error.param, preset)) from None
        if preset.stated.keys() & {"system", "examples", "prompt"}:
            await _render(request, preset, reason_against)


def _check_names(part: Part, path: str) -> None:
    for name in part.model_extra or {}:
        if name not in FIELDS:
            known = {*FIELDS, *Part.model_fields}
            raise BadRequest(f"unknown key{near(name, known)}", f"{path}.{name}")


def _path(param: str | None, preset: Preset) -> str | None:
    """Where in the preset a request's field is."""
    forced = preset.body.forced.stated
    return param and f"{'forced' if param.split('.')[0].split('[')[0] in forced else 'default'}.{param}"


async def _render(request: Any, preset: Preset, reason_against: ReasonAgainst) -> None:
    """The model's own template must take the preset's messages, and its context hold them."""
    if (reason := await reason_against(request)) is not None:
        name = next(name for name in ("system", "examples", "prompt") if name in preset.stated)
        raise BadRequest(reason, _path(name, preset))
