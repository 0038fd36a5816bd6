"""`whipstaff vectors list | add | remove`: the vectors of a running server."""

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from whipstaff.server.errors import reason_in
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.hints import Hints

_CHUNK = 1 << 20  # bytes
_PATIENCE = httpx.Timeout(30, read=600)  # a large file is checked and loaded before the answer


def list_vectors(args: Namespace) -> int:
    rows = _asked(args, "GET", "/v1/steering/vectors")["data"]
    width = max([len("name"), *(len(row["id"]) for row in rows)])
    print(f"{'name':<{width}}  {'method':<20}  {'digest':<12}  layers")
    for row in rows:
        note = "" if row["fits"] else f"  cannot be used: {row['problem']}"
        layers = ",".join(map(str, row["layers"])) or "-"
        print(f"{row['id']:<{width}}  {row['method']:<20}  {row['digest'][:12]}  {layers}{note}")
    return 0


def add(args: Namespace) -> int:
    if not args.file.is_file():
        raise SteeringError(f"{args.file} is no file; a folder becomes one with `whipstaff vectors convert`")
    said = {name: getattr(args, name, None) for name in Hints.model_fields}
    hints = {key: _written(key, value) for key, value in said.items() if value is not None}
    if args.format is not None:
        hints["format"] = args.format
    params = {"name": args.name or args.file.name.partition(".")[0], "filename": args.file.name, **hints}
    found = _asked(args, "POST", "/v1/steering/vectors", params=params, file=args.file)
    what = "added" if found["replaced"] is None else "replaced" if found["replaced"] != found["digest"] else "the same"
    print(f"{found['id']}: {what}, {found['method']}, sha256 {found['digest']}")
    for warning in found["warnings"]:
        print(f"warning: {warning}")
    return 0


def remove(args: Namespace) -> int:
    _asked(args, "DELETE", f"/v1/steering/vectors/{args.name}")
    print(f"{args.name}: removed")
    return 0


def _written(name: str, value: Any) -> str:
    if name == "defaults":
        return json.dumps(dict(value))
    if name == "where" and not isinstance(value, str):
        return str(value.model_dump_json(exclude_none=True))
    return str(value)


def _asked(args: Namespace, method: str, path: str, params: Any = None, file: Path | None = None) -> dict[str, Any]:
    """What the server answers. Raises: SteeringError with its reason."""
    headers = {"Authorization": f"Bearer {key}"} if (key := args.api_key or args.admin_key) else {}
    if args.admin_key:
        headers["X-Whipstaff-Admin-Key"] = args.admin_key
    if file is not None:
        headers["Content-Length"] = str(file.stat().st_size)
    try:
        content = None if file is None else _read(file)
        answer = httpx.request(
            method, args.url.rstrip("/") + path, params=params, headers=headers, content=content, timeout=_PATIENCE
        )
    except httpx.HTTPError as error:
        raise SteeringError(f"{args.url}: {error}") from error
    if answer.is_success:
        found: dict[str, Any] = answer.json()
        return found
    raise SteeringError(f"{args.url} answers {answer.status_code}: {reason_in(answer.text)}")


def _read(path: Path) -> Iterator[bytes]:
    """A file's bytes, with a bar while they go."""
    with (
        path.open("rb") as file,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar,
    ):
        while chunk := file.read(_CHUNK):
            yield chunk
            bar.update(len(chunk))
