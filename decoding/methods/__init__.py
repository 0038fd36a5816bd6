"""The table of decoding methods. Adding one is a file here and a line below."""

from typing import Any

from whipstaff.decoding.method import Method
from whipstaff.decoding.methods.proxy_tuning import ProxyTuning

METHODS: dict[str, Method[Any]] = {method.name: method for method in (ProxyTuning(),)}
