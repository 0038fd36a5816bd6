"""Which field of a request vLLM means, where it breaks over one or does not say."""

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError
from vllm.exceptions import VLLMClientError


def blamed(body: dict[str, Any], handler: Callable[[Any], Any]) -> str | None:
    """The field without which validators take a request, or, where it has to be there, say what is missing."""
    first = None
    for name in body:
        try:
            handler({other: value for other, value in body.items() if other != name})
        except Exception as error:
            if first is None and not is_broken(error):
                first = name
        else:
            return name
    return first


def is_broken(error: Exception) -> bool:
    """Whether validators did not say what is wrong, or not where: what they read by hand has no field for pydantic."""
    if isinstance(error, ValidationError):
        return not isinstance(next(iter(error.errors(include_url=False)[0]["loc"]), None), str)
    is_placeless = isinstance(error, VLLMClientError) and getattr(error, "parameter", None) is None
    return is_placeless or isinstance(error, AttributeError | TypeError | LookupError | ArithmeticError)


def field_meant(message: str, request: BaseModel) -> str | None:
    """The field of a request that vLLM's sentence about it is about, where vLLM does not say; None where that is not
    clear. It begins with the field, or has its words in it."""
    said = [name for name in request.model_fields_set if name in type(request).model_fields]
    first = message.split(" ", 1)[0].strip("`'\"")
    if first in said:
        return first
    if message.startswith("Token id ") and message.endswith(" is out of vocabulary"):  # said of prompts alone
        return "prompt" if "prompt" in said else None
    words = message.lower().replace("_", " ")
    if "grammar" in words or "structured outputs" in words:
        said = [name for name in ("structured_outputs", "response_format", "text") if name in said]
        return said[0] if said else None
    return next((name for name in said if "_" in name and name.replace("_", " ") in words), None)
