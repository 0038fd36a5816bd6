"""Jobs at work: one after another in a thread of each API server, each a fit as `whipstaff fit` makes it, whose vector
the registry then has whole or not at all."""

import asyncio
import copy
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from whipstaff.server import metrics
from whipstaff.server.engine.frontend.launch import Engine
from whipstaff.server.errors import BadRequest, Conflict, WhipstaffError
from whipstaff.server.fits.ask import Ask, ask_of, refusal
from whipstaff.server.fits.book import Book, Failure, Progress, Promotion, Record
from whipstaff.server.fits.source import EngineModel
from whipstaff.server.registry.live import LiveRegistry
from whipstaff.server.registry.presets import Preset
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit import fitting
from whipstaff.steering.fit.held_out import held_out
from whipstaff.steering.vector_file import packed, parse

logger = logging.getLogger("vllm.whipstaff")  # below vLLM's logger, so that its format and level apply
_TOLD_EVERY = 0.25  # seconds between two notes of how far a job is
DONE, FAILED, CANCELLED = "done", "failed", "cancelled"
Note = Callable[..., None]  # (event, **what): into the audit log


class Cancelled(Exception):
    """A job is to end; `reason` None: an administrator said so."""

    def __init__(self, reason: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class _Work:
    """A job that waits for its turn."""

    ask: Ask
    source: EngineModel
    record: Record
    lock: BinaryIO
    key: str  # whose it is


class Fits:
    """Of one API server."""

    def __init__(
        self,
        engine: Engine,
        library: LiveRegistry,
        model: str,
        chat_template: str | None,
        why_ending: Callable[[], str | None],
        note: Note,
    ) -> None:
        """
        Args:
            model: what requests call the engine's.
            chat_template: instead of the tokenizer's own.
            why_ending: why the server takes nothing new; None while it does.

        Raises: OSError.
        """
        self._engine, self._library, self._model, self._chat_template = engine, library, model, chat_template
        self._why_ending, self._note = why_ending, note
        self.book = Book(library.writable.fits)
        self._waiting: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def start(self, said: Any, key: str) -> Record:
        """Check what is asked for, and have it made. Raises: WhipstaffError; then nothing was scheduled."""
        caps = await self._library.current()
        source = EngineModel(
            self._engine,
            asyncio.get_running_loop(),
            self._model,
            await asyncio.to_thread(self._tokenizer),
            caps.model,
            caps.max_capture_bytes,
        )
        ask = await asyncio.to_thread(ask_of, said, source, caps)
        self._library.check_changeable(ask.body.name)
        record, lock = await asyncio.to_thread(
            self.book.add, ask.recipe.method, ask.body.name, ask.counts, list(ask.warnings)
        )
        self._waiting.put(_Work(ask, source, record, lock, key))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work_for_ever, name="fits", daemon=True)
            self._thread.start()
        return record

    def _tokenizer(self) -> Any:
        """The engine's, a copy. Raises: BadRequest."""
        if self._engine.model_config.skip_tokenizer_init:
            raise BadRequest("this server runs without a tokenizer, and data are texts", "data")
        found = copy.deepcopy(self._engine.get_tokenizer())
        if self._chat_template is not None:
            found.chat_template = self._chat_template
        return found

    # ---- in the thread

    def _work_for_ever(self) -> None:
        while True:
            work = self._waiting.get()
            try:
                _Running(self, work).run()
            except OSError:  # the disk is full: the next job's turn all the same
                logger.exception("what became of %s could not be written", work.record.id)

    # ---- presets

    async def promote(self, number: str, name: str, entry: Mapping[str, Any]) -> Record:
        """Make a preset steer by a job's vector by default. Raises: WhipstaffError naming the field."""
        record = self.book.get(number)
        if record.state != DONE:
            raise Conflict(f"{number} is {record.state}: there is nothing to promote")
        vectors = (await self._library.current()).registry
        if record.name not in vectors.names or vectors.entry(record.name).vector.digest != record.digest:
            raise Conflict(f"{record.name!r} is not the vector any more that {number} made")
        steering = [{"vector": record.name, **entry}]
        promoted: list[Record] = []

        def change(before: Preset | None) -> Preset:
            old, wire = record.promoted, {} if before is None else before.wire
            if old is not None and before is not None and (old.preset, old.digest) == (name, before.digest):
                raise Conflict(f"the preset {name!r} is what {number} made of it; roll it back first", "preset")
            default = {**wire.get("default", {}), "steering": steering}
            after = Preset.of(name, {**wire, "default": default}, is_fixed=False)
            promoted.append(
                record.but(promoted=Promotion(preset=name, digest=after.digest, before=wire if before else None))
            )
            return after

        with metrics.registry_change("preset", "promote"):
            await self._library.change_preset(name, change)
            await asyncio.to_thread(self.book.write, promoted[0])
        return promoted[0]

    async def roll_back(self, number: str) -> Record:
        """Make the preset what it was before the job's vector was promoted. Raises: WhipstaffError."""
        record = self.book.get(number)
        promoted = record.promoted
        if promoted is None:
            raise Conflict(f"{number} was not promoted")

        def change(now: Preset | None) -> Preset | None:
            if now is None or now.digest != promoted.digest:
                raise Conflict(f"the preset {promoted.preset!r} was changed since; nothing is rolled back")
            return None if promoted.before is None else Preset.of(promoted.preset, promoted.before, is_fixed=False)

        with metrics.registry_change("preset", "rollback"):
            await self._library.change_preset(promoted.preset, change)
        record = record.but(promoted=None)
        await asyncio.to_thread(self.book.write, record)
        return record


class _Running:
    """One job at work."""

    def __init__(self, fits: Fits, work: _Work) -> None:
        self._fits, self._work, self._book = fits, work, fits.book
        self._record, self._told = work.record.but(state="running"), 0.0

    def run(self) -> None:
        """To its end, whatever that is."""
        started = time.monotonic()
        metrics.FITS_RUNNING.inc()
        try:
            ended = self._made()
        except Cancelled as cancelled:
            ended = self._record.but(state=CANCELLED)
            if cancelled.reason is not None:
                ended = self._record.but(state=FAILED, error=Failure(message=cancelled.reason))
        except SteeringError as error:
            refused = refusal(error)
            ended = self._record.but(state=FAILED, error=Failure(message=refused.message, param=refused.param))
        except WhipstaffError as error:
            ended = self._record.but(state=FAILED, error=Failure(message=error.message, param=error.param))
        except BaseException as error:  # an engine that died, a disk that is full: said, and the next job's turn
            logger.exception("%s failed", self._record.id)
            ended = self._record.but(state=FAILED, error=Failure(message=f"{type(error).__name__}: {error}"))
        metrics.FITS_RUNNING.dec()
        metrics.FITS.labels(ended.method, ended.state).inc()
        self._fits._note(
            "fit",
            key=self._work.key,
            object=ended.name,
            fit=ended.id,
            method=ended.method,
            outcome=ended.state,
            took_ms=round((time.monotonic() - started) * 1e3, 1),
        )
        self._book.close(ended.but(progress=None), self._work.lock)

    def _made(self) -> Record:
        """Raises: Cancelled, SteeringError, WhipstaffError."""
        self._check()
        self._book.write(self._record)
        source = replace(self._work.source, check=self._check, progress=self._progress)
        ask = self._work.ask
        job = ask.job(source, self._book.rows(self._record.id))
        made = fitting.fit(ask.recipe.method, job)
        evaluation = held_out(job, made.axis)
        said: dict[str, Any] = {"description": ask.body.description or made.header.description}
        said |= {"licence": ask.body.licence, "where": ask.where or made.header.where}
        said["provenance"] = {**made.header.provenance, "held_out": evaluation, "fit": self._record.id}
        header = made.header.model_copy(update=said)
        data = packed(header, made.tensors)
        vector = parse(data)
        self._check()
        putting = self._fits._library.put_vector(self._record.name, data, vector)
        entry, replaced = asyncio.run_coroutine_threadsafe(putting, source.loop).result()  # from here on it is done
        return self._record.but(
            state=DONE,
            evaluation=evaluation,
            warnings=list(dict.fromkeys([*made.warnings, *vector.warnings])),
            digest=entry.vector.digest,
            replaced=replaced,
            provenance=header.provenance,
        )

    def _check(self) -> None:
        """Raises: Cancelled."""
        if (reason := self._fits._why_ending()) is not None:
            raise Cancelled(reason)
        if self._book.is_cancelled(self._record.id):
            raise Cancelled

    def _progress(self, what: str, done: int, of: int) -> None:
        self._check()
        before, now = self._record.progress, time.monotonic()
        if before is not None and before.what == what and done < of and now < self._told + _TOLD_EVERY:
            return
        self._record, self._told = self._record.but(progress=Progress(what=what, done=done, of=of)), now
        self._book.write(self._record)
