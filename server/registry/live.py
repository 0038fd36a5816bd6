"""What requests may name, as it is now: files given at start-up, and beside them what the registry folder holds.

Whoever asks gets a `Capabilities` that never changes; a request keeps the one it was compiled with. Every process that
serves looks at the folder's manifest once per request that names something, so all see one registry as soon as a change
was answered. A vector is in the workers before `Capabilities` name it (see `engine.frontend.vector_leases`).
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from whipstaff.server import metrics
from whipstaff.server.engine.frontend.vector_leases import VectorLeases
from whipstaff.server.errors import Fixed, Forbidden, NameTaken, Unavailable, VectorUnfit, WhipstaffError
from whipstaff.server.leases import Lease
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.folder import BadStore, Manifest, RegistryFolder, telling_full
from whipstaff.server.registry.presets import BadPreset, Preset, preset_files, read_preset, stamp_of_files
from whipstaff.server.registry.vectors import Entry, VectorFile, VectorSnapshot, misfit
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.vector_file import Vector

logger = logging.getLogger("vllm.whipstaff")  # below vLLM's logger, so that its format and level apply
PAUSE = 1.0  # seconds between looks at the folder while nobody asks
CheckPreset = Callable[[Preset, Capabilities], Awaitable[None]]


class LiveRegistry:
    """Of one process."""

    def __init__(
        self,
        leases: VectorLeases,
        facts: Capabilities,
        files: Mapping[str, VectorFile],
        store: RegistryFolder | None = None,
        presets: Iterable[Path] = (),
    ) -> None:
        """`facts` says what the server can do; `files` are the vectors given at start-up, and those stored then."""
        self._leases, self._have, self._store = leases, facts, store
        self._lease = leases.hold(file.vector.digest for file in files.values())  # of what `_have` names
        self._files = {name: file._replace(vector=leases.adopt(file.vector)) for name, file in files.items()}
        self._fixed: dict[str, VectorFile] = {}
        self._preset_paths = tuple(presets)
        self._presets: dict[str, Preset] = {}  # those of files, as they were last sound
        self._check: CheckPreset | None = None
        self._seen: object = None
        self._turn, self._writers = asyncio.Lock(), asyncio.Lock()

    async def start(self) -> None:
        """Give the workers the vectors that fit."""
        for name, file in self._files.items():
            if file.is_fixed:
                self._fixed[name] = file._replace(problem=await self._load(file.vector, file.path))
        await self._refresh()
        for entry in self._have.registry:
            if entry.problem is not None:
                logger.warning("vector %r cannot be used: %s", entry.name, entry.problem)
        self._files = {}

    async def check_presets_with(self, check: CheckPreset) -> None:
        """From here on presets are served, those that `check` does not refuse. Raises: BadPreset."""
        for path in preset_files(self._preset_paths):
            preset = read_preset(path)
            if preset.name in self._presets:
                raise BadPreset(f"two presets are called {preset.name!r}; one is {path}")
            try:
                await check(preset, self._have)
            except WhipstaffError as error:
                raise BadPreset(f"{path}: {error.param}: {error.message}") from error
            self._presets[preset.name] = preset
        self._check = check
        await self._refresh()
        self._following = asyncio.create_task(self.follow())

    async def current(self) -> Capabilities:
        """What there is now."""
        if self._stamp() != self._seen:
            async with self._turn:
                while self._stamp() != self._seen:
                    await self._refresh()
        return self._have

    async def follow(self) -> None:
        """Look now and then, for ever: a server that nobody asks lets go of what was replaced, too."""
        while True:
            await asyncio.sleep(PAUSE)
            try:
                await self.current()
            except OSError as error:
                logger.error("the registry cannot be looked at: %s", error)

    def hold(self, vectors: Iterable[Vector]) -> Lease:
        """Keep what a request names until the lease is released; asked for before anything else is awaited, since what
        was `current` may be replaced then."""
        return self._leases.hold(vector.digest for vector in vectors)

    async def preset_names(self) -> Iterable[str]:
        return (await self.current()).presets

    # ---- changes

    async def put_vector(self, name: str, data: bytes, vector: Vector) -> tuple[Entry, str | None]:
        """Keep a vector file under a name; the entry, and the digest of what had the name before.

        Raises: Forbidden, Fixed, VectorUnfit, Unavailable.
        """
        if (reason := misfit(vector, self._have.registry.model)) is not None:
            raise VectorUnfit(reason, "name")
        if (reason := vector.method.kind.lacking(vector, None, self._have)) is not None:
            raise Unavailable(reason, "name")
        async with self._writing(name, self._fixed) as store:
            path = await asyncio.to_thread(store.put, data)
            with self._leases.hold([vector.digest]):  # until the registry, which names it then, holds it
                if (reason := await self._leases.load(self._leases.adopt(vector), path)) is not None:
                    raise Unavailable(reason, "name")
                manifest = store.read()
                replaced = manifest.vectors.get(name)
                await self._commit(store, manifest, vectors=manifest.vectors | {name: vector.digest})
            return self._have.registry.entry(name), replaced

    async def remove_vector(self, name: str) -> None:
        """Raises: Forbidden, Fixed, NotFound."""
        async with self._writing(name, self._fixed) as store:
            manifest = store.read()
            if name not in manifest.vectors:
                self._have.registry.entry(name)
            await self._commit(store, manifest, vectors=_without(manifest.vectors, name))

    def check_changeable(self, name: str) -> None:
        """Raises: Fixed, Forbidden, where no vector of that name can be put."""
        self._check_changeable(name, self._fixed)

    async def rename_vector(self, name: str, to: str) -> Entry:
        """The entry under its new name. Raises: Forbidden, Fixed, NotFound, NameTaken."""
        async with self._writing(name, self._fixed) as store:
            manifest = store.read()
            if name not in manifest.vectors:
                self._have.registry.entry(name)
            if to in manifest.vectors or to in self._fixed:
                raise NameTaken(f"there is a vector {to!r} already; remove it first", "name")
            vectors = {to if key == name else key: digest for key, digest in manifest.vectors.items()}
            await self._commit(store, manifest, vectors=vectors)
            return self._have.registry.entry(to)

    async def put_preset(self, preset: Preset) -> bool:
        """Keep a preset; whether there was one of that name. Raises: Forbidden, Fixed, and what its check does."""
        assert self._check is not None
        await self._check(preset, await self.current())
        async with self._writing(preset.name, self._presets) as store:
            manifest = store.read()
            await self._commit(store, manifest, presets=manifest.presets | {preset.name: preset.wire})
            return preset.name in manifest.presets

    async def change_preset(self, name: str, change: Callable[[Preset | None], Preset | None]) -> Preset | None:
        """Make another of the preset of that name, or None to remove it; what it was.

        Raises: Forbidden, Fixed, what `change` and the preset's check do.
        """
        assert self._check is not None
        async with self._writing(name, self._presets) as store:
            manifest = store.read()
            body = manifest.presets.get(name)
            before = None if body is None else Preset.of(name, body, is_fixed=False)
            after = change(before)
            if after is not None:
                await self._check(after, self._have)
            rest = _without(manifest.presets, name)
            await self._commit(store, manifest, presets=rest if after is None else rest | {name: after.wire})
            return before

    async def remove_preset(self, name: str) -> None:
        """Raises: Forbidden, Fixed, NotFound."""
        async with self._writing(name, self._presets) as store:
            manifest = store.read()
            if name not in manifest.presets:
                self._have.preset(name)
            await self._commit(store, manifest, presets=_without(manifest.presets, name))

    @asynccontextmanager
    async def _writing(self, name: str, fixed: Mapping[str, Any]) -> AsyncIterator[RegistryFolder]:
        """The folder, alone, and as it is; nobody may change a name that was given at start-up.

        Raises: Fixed, Forbidden, StorageFull.
        """
        store = self._check_changeable(name, fixed)
        async with self._writers:
            lock = await asyncio.to_thread(store.lock)
            try:
                with telling_full():
                    await self.current()
                    yield store
            except BaseException:
                await asyncio.to_thread(store.sweep)  # a file that nothing names is the first thing to make room
                raise
            finally:
                lock.close()

    def _check_changeable(self, name: str, fixed: Mapping[str, Any]) -> RegistryFolder:
        """The folder. Raises: Fixed, Forbidden."""
        store = self.writable
        if name in fixed:
            raise Fixed(f"{name!r} is a file given when this server was started; no request changes it", "name")
        return store

    @property
    def writable(self) -> RegistryFolder:
        """Raises: Forbidden."""
        if self._store is None:
            raise Forbidden("this server has no registry; start it with --registry DIR and --admin-key KEY")
        return self._store

    async def _commit(self, store: RegistryFolder, manifest: Manifest, **changes: Any) -> None:
        await asyncio.to_thread(store.commit, manifest.model_copy(update=changes))
        await self.current()
        await asyncio.to_thread(store.sweep)

    # ---- following the folder

    def _stamp(self) -> object:
        """Changes whenever there may be something new."""
        return self._store and self._store.stamp(), self._preset_paths and stamp_of_files(self._preset_paths)

    async def _refresh(self) -> None:
        seen = self._stamp()
        with ExitStack() as reading:
            try:
                manifest = self._store.read() if self._store else Manifest()
                files = self._fixed | await self._stored(manifest, reading)
            except BadStore as error:
                logger.error("%s; what it held before is served", error)
                self._seen = seen
                return
            await self._serve(manifest, files)
        self._seen = seen

    async def _serve(self, manifest: Manifest, files: Mapping[str, VectorFile]) -> None:
        """From here on these are what requests may name."""
        caps = replace(self._have, registry=VectorSnapshot(files, self._have.registry.model), presets={})
        caps = replace(caps, presets=await self._sound_presets(manifest, caps) if self._check else {})
        before, self._lease = self._lease, self._leases.hold(entry.vector.digest for entry in caps.registry)
        self._have = caps
        before.release()
        metrics.VECTORS.set(len(caps.registry.names))

    async def _stored(self, manifest: Manifest, reading: ExitStack) -> dict[str, VectorFile]:
        """The folder's vectors, in the workers where they fit, held while `reading` is open. Another process may
        replace one meanwhile."""
        found: dict[str, VectorFile] = {}
        for name, digest in manifest.vectors.items():
            if name in self._fixed:
                logger.error(
                    "the registry's vector %r has the name of %s, and is left out", name, self._fixed[name].path
                )
                continue
            path = self._store.path_of(digest)  # type: ignore[union-attr]
            reading.enter_context(self._leases.hold([digest]))
            try:
                vector = await self._leases.read(path, digest)
            except (SteeringError, OSError) as error:
                if path.exists():
                    logger.error("the registry's vector %r, %s, cannot be read: %s", name, path, error)
                continue  # else it was replaced just now, and `current` looks again
            found[name] = VectorFile(path, vector, False, await self._load(vector, path))
        return found

    async def _load(self, vector: Vector, path: Path) -> str | None:
        fits = misfit(vector, self._have.registry.model) is None
        return await self._leases.load(vector, path) if fits else None

    async def _sound_presets(self, manifest: Manifest, caps: Capabilities) -> dict[str, Preset]:
        """Every preset; a file that was changed into something unsound stays what it was."""
        assert self._check is not None
        found: dict[str, Preset] = {}
        for path in preset_files(self._preset_paths):
            before = self._presets.get(path.stem)
            try:
                preset = read_preset(path)
                if before is None or preset.digest != before.digest:
                    await self._check(preset, caps)
                found[path.stem] = preset
            except (BadPreset, WhipstaffError) as error:
                logger.error("%s is not taken: %s", path, error)
                found |= {} if before is None else {path.stem: before}
        self._presets = found
        return self._stored_presets(manifest) | found

    def _stored_presets(self, manifest: Manifest) -> dict[str, Preset]:
        found: dict[str, Preset] = {}
        for name, body in manifest.presets.items():
            try:
                found[name] = Preset.of(name, body, is_fixed=False)
            except WhipstaffError as error:
                logger.error("the registry's preset %r is left out: %s: %s", name, error.param, error.message)
        return found


def _without(named: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in named.items() if key != name}
