"""What the holder of the admin key may do: change vectors and presets while the server runs.

The key is not the user's, which vLLM's --api-key guards /v1 with. It is taken as `Authorization: Bearer`, and then it
opens everything below /v1/steering/ alone; or, beside the user's key there, as `X-Whipstaff-Admin-Key`.
"""

import asyncio
import hashlib
import json
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastapi import APIRouter, Body, Depends, Query, Request
from fastapi.responses import JSONResponse
from pydantic import SecretStr

from whipstaff.server import metrics
from whipstaff.server.access.keys import HOLDER
from whipstaff.server.api.descriptions import Deleted, answers
from whipstaff.server.api.descriptions import Preset as PresetAnswer
from whipstaff.server.api.descriptions import Vector as VectorAnswer
from whipstaff.server.api.generate import preset_to_json, vector_to_json
from whipstaff.server.errors import BadRequest, Forbidden, TooLarge, Unauthorized
from whipstaff.server.registry.live import LiveRegistry
from whipstaff.server.registry.presets import MAX_BYTES, Preset
from whipstaff.server.registry.vectors import NAME
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers import import_file
from whipstaff.steering.importers.importer import Hints
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Vector, is_native, packed, parse

HEADER = "x-whipstaff-admin-key"
ROOT = "/v1/steering/"
_SUFFIXES = {b"GGUF": ".gguf", b"\x93NUMPY": ".npy", b"PK\x03\x04": ".pt"}  # by a file's first bytes
_FURTHER_FILES = [name for name, field in Hints.model_fields.items() if field.annotation == Path | None]


@dataclass(frozen=True)
class Admin:
    """The key, hashed, and the size of what its holder may send."""

    digest: bytes | None
    max_upload: int

    @staticmethod
    def of(key: SecretStr | None, max_upload: int) -> "Admin":
        return Admin(_hashed(key.get_secret_value()) if key else None, max_upload)

    def opens(self, path: str, headers: Mapping[str, str]) -> bool:
        """Whether a request may pass for its admin key, whatever vLLM says of the user's."""
        return path.startswith(ROOT) and self._is_key(_bearer(headers))

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises: Forbidden, Unauthorized."""
        if self.digest is None:
            raise Forbidden("the admin routes are off; start the server with --admin-key KEY and --registry DIR")
        if not self._is_key(headers.get(HEADER, "")) and not self._is_key(_bearer(headers)):
            raise Unauthorized("send the admin key, as `Authorization: Bearer KEY` or `X-Whipstaff-Admin-Key: KEY`")

    def _is_key(self, said: str) -> bool:
        return self.digest is not None and secrets.compare_digest(_hashed(said), self.digest)


def _hashed(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _bearer(headers: Mapping[str, str]) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key if scheme.lower() == "bearer" else ""


def admitted(raw: Request) -> LiveRegistry:
    """A dependency of every route here: the library, for who has the key."""
    if (holder := HOLDER.get()) is None:
        raw.app.state.whipstaff_admin.check(raw.headers)
    elif not holder.is_admin:
        raise Forbidden("this key does not open that")
    library: LiveRegistry = raw.app.state.whipstaff
    return library


router = APIRouter()


@router.post("/v1/steering/vectors", responses=answers(VectorAnswer, 200, 201))
async def put_vector(
    raw: Request,
    name: str = Query(description="to be named by in requests"),
    filename: str = Query("", max_length=255, description="of a foreign file: some formats are known by it"),
    format: str | None = Query(None, max_length=64, description="of a foreign file, where it is not found out"),
    library: LiveRegistry = Depends(admitted),
) -> JSONResponse:
    """Upload a vector, or replace the one of that name. The body is the file: one of ours, or a foreign one that is a
    single file and no pickle. What a foreign one leaves unsaid are further parameters: `layer`, `scale` ..."""
    said = {key: value for key, value in raw.query_params.items() if key not in ("name", "filename", "format")}
    with metrics.registry_change("vector", "add") as meant:
        _check_name(name)
        hints = _hints(said)
        model = (await library.current()).registry.model
        with library.writable.spool() as file:
            await _receive(raw, file, raw.app.state.whipstaff_admin.max_upload)
            data, vector = await asyncio.to_thread(_read, file, filename or name, format, hints, model)
        entry, replaced = await library.put_vector(name, data, vector)
        if replaced is not None:
            meant("replace")
    status = 201 if replaced is None else 200
    return JSONResponse({**vector_to_json(entry), "replaced": replaced}, status_code=status)


@router.patch("/v1/steering/vectors/{name}", responses=answers(VectorAnswer))
async def rename_vector(
    name: str, to: str = Body(embed=True, alias="name"), library: LiveRegistry = Depends(admitted)
) -> dict[str, Any]:
    """Rename a vector: {"name": "its new name"}. Requests that were taken before keep it until they end; presets that
    name it are not changed."""
    with metrics.registry_change("vector", "rename"):
        _check_name(to)
        return vector_to_json(await library.rename_vector(name, to))


@router.delete("/v1/steering/vectors/{name}", responses=answers(Deleted))
async def remove_vector(name: str, library: LiveRegistry = Depends(admitted)) -> dict[str, Any]:
    """Remove a vector. Requests that were taken before keep it until they end."""
    with metrics.registry_change("vector", "remove"):
        await library.remove_vector(name)
    return {"id": name, "object": "steering.vector", "deleted": True}


@router.post("/v1/steering/presets", responses=answers(PresetAnswer, 200, 201))
async def put_preset(raw: Request, library: LiveRegistry = Depends(admitted)) -> JSONResponse:
    """Add a preset, or replace the one of that name: {"name", "description", "default": {...}, "forced": {...}}."""
    with metrics.registry_change("preset", "add") as meant:
        with library.writable.spool() as file:
            await _receive(raw, file, MAX_BYTES)
            preset = _preset(file.read())
        if was_there := await library.put_preset(preset):
            meant("replace")
    return JSONResponse(preset_to_json(preset), status_code=200 if was_there else 201)


@router.delete("/v1/steering/presets/{name}", responses=answers(Deleted))
async def remove_preset(name: str, library: LiveRegistry = Depends(admitted)) -> dict[str, Any]:
    """Remove a preset."""
    with metrics.registry_change("preset", "remove"):
        await library.remove_preset(name)
    return {"id": name, "object": "steering.preset", "deleted": True}


def _preset(data: bytes) -> Preset:
    """Raises: BadRequest."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"not JSON: {error}") from None
    if not isinstance(body, dict) or not isinstance(body.get("name"), str):
        raise BadRequest("a preset is a JSON object with a name", "name")
    _check_name(name := body.pop("name"))
    return Preset.of(name, body, is_fixed=False)


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise BadRequest("a name has at most 128 letters, digits, `.`, `_` and `-`, and begins with no sign", "name")


def _hints(said: Mapping[str, str]) -> dict[str, Any]:
    """Raises: BadRequest."""
    for name in said:
        if name not in Hints.model_fields:
            raise BadRequest("unknown parameter", name)
        if name in _FURTHER_FILES:
            raise BadRequest("this format needs further files; convert it with `whipstaff vectors convert`", name)
    return {name: _meant(value) if name in ("where", "defaults") else value for name, value in said.items()}


def _meant(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # a bare word


async def _receive(raw: Request, file: BinaryIO, most: int) -> None:
    """The body, into a file. Raises: TooLarge, as soon as that is known."""
    length = raw.headers.get("content-length", "")
    size = int(length) if length.isdecimal() else 0
    if size <= most:
        size = 0
        async for chunk in raw.stream():
            if (size := size + len(chunk)) > most:
                break
            await asyncio.to_thread(file.write, chunk)
    if size > most:
        raise TooLarge(f"the body has more than {most} bytes, the most that is taken; of vectors --max-upload-bytes is")
    file.seek(0)


def _read(
    file: BinaryIO, filename: str, format: str | None, hints: Mapping[str, Any], model: ModelShape
) -> tuple[bytes, Vector]:
    """A vector file's bytes and what they hold. Raises: BadRequest."""
    data = file.read()
    try:
        if format is None and is_native(data):
            if hints:
                raise SteeringError("a vector file says this itself", next(iter(hints)))
            return data, parse(data)
        data = packed(*_imported(file, data, filename, format, hints, model))
        return data, parse(data)
    except SteeringError as error:
        raise BadRequest(str(error), error.param or "body") from None


def _imported(
    file: BinaryIO, data: bytes, filename: str, format: str | None, hints: Mapping[str, Any], model: ModelShape
) -> Any:
    suffix = next((suffix for start, suffix in _SUFFIXES.items() if data.startswith(start)), ".safetensors")
    name = Path(filename.replace("\0", "")).name or "upload"
    with tempfile.TemporaryDirectory() as folder:  # the file has no name of its own, and importers want one
        path = Path(folder) / (name if Path(name).suffix else name + suffix)
        path.symlink_to(f"/proc/self/fd/{file.fileno()}")
        return import_file(path, model, format, **hints)
