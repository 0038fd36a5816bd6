"""HTTP in, tokens out: the FastAPI service around a stock vLLM engine."""

from importlib.metadata import version

# `whipstaff` itself is a namespace, shared by four folders, and has no file that could say this.
__version__ = version("whipstaff")
