"""HTTP in, tokens out: the FastAPI service around a stock vLLM engine."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whipstaff.server.llm import LLM, InvalidRequest

__all__ = ["LLM", "InvalidRequest", "__version__"]

# `whipstaff` itself is a namespace, shared by four folders, and has no file that could say this.
__version__ = version("whipstaff")


def __getattr__(name: str) -> Any:
    """What takes a while to import is imported once it is asked for."""
    if name not in ("LLM", "InvalidRequest"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from whipstaff.server import llm

    return getattr(llm, name)
