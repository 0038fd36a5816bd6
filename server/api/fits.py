"""Making vectors over HTTP: what the holder of the admin key may have fitted on the model that is served, beside what
its clients ask for."""

from typing import Any

from fastapi import APIRouter, Body, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from whipstaff.server.access.keys import HOLDER
from whipstaff.server.api.admin import admitted
from whipstaff.server.api.descriptions import Fit, FitEnded, FitList, answers
from whipstaff.server.api.generate import check_text
from whipstaff.server.errors import BadRequest, WhipstaffError, parsed
from whipstaff.server.fits.ask import FitBody
from whipstaff.server.fits.book import Record
from whipstaff.server.fits.jobs import Fits
from whipstaff.server.registry.live import LiveRegistry
from whipstaff.server.registry.vectors import NAME


class PromoteBody(BaseModel):
    """Which preset steers by the vector from now on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str = Field(description="added, or changed: its default steering is the vector alone")
    entry: dict[str, Any] = Field({}, description="further fields of the steering entry: scale, layers, where ...")


def fits_of(raw: Request, library: LiveRegistry = Depends(admitted)) -> Fits:
    """A dependency of every route here: the jobs, for who has the key. Raises: Forbidden."""
    assert library.writable
    found: Fits = raw.app.state.whipstaff_fits
    return found


def _takes(model: type[BaseModel]) -> dict[str, Any]:
    """A body that we check ourselves, so that what is wrong is named, described."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


router = APIRouter(prefix="/v1/steering/fits", dependencies=[Depends(admitted)])
SOUND = [Depends(check_text)]


@router.post("", dependencies=SOUND, responses=answers(Fit, 202), openapi_extra=_takes(FitBody), status_code=202)
async def start_fit(body: Any = Body(...), fits: Fits = Depends(fits_of)) -> JSONResponse:
    """Make a vector of data, on the model that is served: {"method", "name", "data": [...], "options": {...}}. It is
    checked before this answers; the job runs beside traffic, at low priority, and the registry then has the vector."""
    holder = HOLDER.get()
    record = await fits.start(body, "" if holder is None else holder.id)
    return JSONResponse(_shown(record), 202, {"Location": f"/v1/steering/fits/{record.id}"})


@router.get("", responses=answers(FitList))
async def list_fits(fits: Fits = Depends(fits_of)) -> dict[str, Any]:
    """The jobs that there are, the newest first."""
    return {"object": "list", "data": [_shown(record) for record in fits.book.all()]}


@router.get("/{id}", responses=answers(Fit))
async def show_fit(id: str, fits: Fits = Depends(fits_of)) -> dict[str, Any]:
    """A job: its state and progress, and once it is done how well the vector tells held-out rows apart, and where it
    comes from."""
    return _shown(fits.book.get(id))


@router.delete("/{id}", responses=answers(FitEnded))
async def end_fit(id: str, fits: Fits = Depends(fits_of)) -> dict[str, Any]:
    """Cancel a job, which then leaves nothing behind; or forget one that ended, whose vector stays."""
    record = fits.book.cancel(id)
    if record.ended is not None:
        fits.book.remove(id)
    return {**_shown(record), "deleted": record.ended is not None}


@router.post("/{id}/promote", dependencies=SOUND, responses=answers(Fit), openapi_extra=_takes(PromoteBody))
async def promote_fit(id: str, body: Any = Body(...), fits: Fits = Depends(fits_of)) -> dict[str, Any]:
    """Make the vector what a preset steers by: {"preset": "NAME", "entry": {"scale": 4}}. What the preset was before
    is remembered."""
    said = parsed(PromoteBody, body, "")
    if not NAME.fullmatch(said.preset):
        raise BadRequest("a name has at most 128 letters, digits, `.`, `_` and `-`, and begins with no sign", "preset")
    if "vector" in said.entry:
        raise BadRequest("it is the vector that was fitted", "entry.vector")
    try:
        return _shown(await fits.promote(id, said.preset, said.entry))
    except WhipstaffError as error:
        param, path = error.param or "", "default.steering"
        if not param.startswith(path):
            raise
        raise type(error)(error.message, "entry" + param.removeprefix(path).removeprefix("[0]")) from None


@router.post("/{id}/rollback", responses=answers(Fit))
async def roll_back_fit(id: str, fits: Fits = Depends(fits_of)) -> dict[str, Any]:
    """Undo a promotion: the preset is again what it was, or gone if there was none."""
    return _shown(await fits.roll_back(id))


def _shown(record: Record) -> dict[str, Any]:
    return record.model_dump()
