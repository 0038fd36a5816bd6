"""The same without HTTP: vLLM's `LLM` with the extra fields of requests as arguments.

What is asked passes the server's own admission and runs on the server's own engine; an answer is vLLM's
`RequestOutput`, with the receipt and the explanations beside it. The engine's event loop has a thread of its own, so
that a script, a notebook and an application that has a loop already all call the same functions.
"""

import asyncio
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from pydantic_settings import PydanticBaseSettingsSource
from tqdm import tqdm

from whipstaff.server import demo, metrics
from whipstaff.server.admission.explanations import EXPLAIN_FIELD, ChoiceExplanations
from whipstaff.server.admission.prepare import prepare
from whipstaff.server.admission.receipt import Tally, final_receipt
from whipstaff.server.admission.request import CompiledRequest
from whipstaff.server.api.preset_check import check
from whipstaff.server.app import launch, load, prove, read_files
from whipstaff.server.engine import causes
from whipstaff.server.engine.frontend import offline, openai
from whipstaff.server.engine.frontend.launch import Engine
from whipstaff.server.engine.frontend.offline import Offline, OfflineChat, OfflineText, Output, Writing
from whipstaff.server.engine.frontend.requests import Notes
from whipstaff.server.errors import BadRequest, WhipstaffError, calling
from whipstaff.server.registry.live import LiveRegistry
from whipstaff.server.settings import Settings

R = TypeVar("R")
Request = OfflineText | OfflineChat
# Arguments of `LLM` that are flags of `whipstaff serve`; the others of its flags are about serving.
SETTINGS = (
    *("aux", "vectors", "presets", "registry", "steering_slots", "steering_sites", "max_dose", "dose_policy"),
    *("early_layers", "lookahead", "attention_rows", "capture_layers", "max_capture_bytes", "hidden_states"),
    *("attention_layers", "one_form", "max_search_seqs"),
)
_LISTS = ("vectors", "presets", "steering_sites")  # of those
_PATIENCE = 30.0  # seconds for the engine's processes to end: vLLM takes ten, and kills what takes longer
_NAMES = {"model": "preset", "vllm_xargs": "extra_args", "prompt": "prompts"}  # as arguments are called here


class InvalidRequest(ValueError):
    """Something that cannot be honoured, told before anything was scheduled."""

    def __init__(self, message: str, param: str | None, index: int, status: int) -> None:
        """
        Args:
            param: the argument, as a path into it, such as "steering[2].vector"; None where it is none alone.
            index: which prompt it is about.
            status: as which a server would answer it.
        """
        super().__init__(f"{param}: {message}" if param else message)
        self.message, self.param, self.index, self.status = message, param, index, status


class LLM:
    """A model that can be steered and decoded otherwise, in this process's hands. `close` it, or leave its `with`
    block, and nothing of it is left; Python's end does that, too."""

    def __init__(
        self, model: str | Path | None = None, *, chat_template: str | Path | None = None, **arguments: Any
    ) -> None:
        """
        Args:
            model: a folder or a name on the hub; None: the embedded demo, with its vectors, presets and further models.
            chat_template: in place of the model's own, as vLLM takes it.
            arguments: vLLM's engine arguments, and those in SETTINGS, which are flags of `whipstaff serve`: `vectors`
                and `presets` are paths of files or folders, `aux` says auxiliary models by name.

        Raises: UnsupportedEngine, BadVectorFile, BadPreset, ValueError, TypeError; what vLLM raises where a model
            cannot be loaded.
        """
        if model is None:
            model, arguments = demo.MODELS / "demo", _demo(arguments)
        settings = _settings({name: arguments.pop(name) for name in SETTINGS if name in arguments})
        self._loop, self._numbers = _Loop(), count()
        self._close = weakref.finalize(self, self._loop.close)
        try:
            args = offline.engine_args(str(model), **arguments)
            self._served: _Served = self._loop.run(_start(self._loop, args, settings, chat_template))
        except BaseException:
            self._close()
            raise

    def close(self) -> None:
        """End the engine and its processes; to repeat it does nothing."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        preset: Any = None,
        steering: Any = None,
        decoding: Any = None,
        explain: Any = None,
        capture: Any = None,
        stop_when: Any = None,
        logprobs_source: Any = None,
        temperature_last: Any = None,
        on_unavailable: Any = None,
    ) -> list[Output]:
        """Answers of prompts, in their order, as vLLM's `LLM.generate`. From `preset` on each argument is one value for
        all prompts, or a list with one for each; several entries for a prompt are a list in that list.

        Raises: InvalidRequest; EngineDied.
        """
        found, writing = offline.prompts_of(prompts), Writing(tokenization_kwargs or {}, mm_processor_kwargs)
        extras = _extras(preset, steering, decoding, explain, capture, stop_when)
        extras |= {"logprobs_source": logprobs_source, "temperature_last": temperature_last}
        extras |= {"on_unavailable": on_unavailable, "sampling_params": sampling_params}
        asked = _asked_of(len(found), lora_request=lora_request, priority=priority, **extras)
        return self._answer(OfflineText, "prompt", found, asked, writing, use_tqdm)

    def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        *,
        preset: Any = None,
        steering: Any = None,
        decoding: Any = None,
        explain: Any = None,
        capture: Any = None,
        stop_when: Any = None,
        logprobs_source: Any = None,
        temperature_last: Any = None,
        on_unavailable: Any = None,
    ) -> list[Output]:
        """Answers of a conversation or of several, as vLLM's `LLM.chat`; otherwise as `generate`.

        Raises: InvalidRequest; EngineDied.
        """
        own = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        template = {**(chat_template_kwargs or {}), **own, "tools": tools}
        written = chat_template, chat_template_content_format, template
        writing = Writing(tokenization_kwargs or {}, mm_processor_kwargs, *written)
        found = offline.conversations_of(messages)
        extras = _extras(preset, steering, decoding, explain, capture, stop_when)
        extras |= {"logprobs_source": logprobs_source, "temperature_last": temperature_last}
        extras |= {"on_unavailable": on_unavailable, "sampling_params": sampling_params}
        asked = _asked_of(len(found), lora_request=lora_request, priority=priority, **extras)
        return self._answer(OfflineChat, "messages", found, asked, writing, use_tqdm)

    def get_tokenizer(self) -> Any:
        """vLLM's."""
        return self._served.engine.get_tokenizer()

    def get_default_sampling_params(self) -> Any:
        """What the model's authors recommend, and what a call without parameters samples by."""
        return self._served.offline.default_params()

    def reset_prefix_cache(self) -> bool:
        """Forget the KV cache of what was answered; whether it was done."""
        return bool(self._loop.run(self._served.engine.reset_prefix_cache()))

    def _answer(
        self,
        kind: type[OfflineText] | type[OfflineChat],
        name: str,
        prompts: Sequence[Any],
        asked: "_Asked",
        writing: Writing,
        use_tqdm: bool | Callable[..., Any],
    ) -> list[Output]:
        default = self.get_default_sampling_params()
        calls = []
        for index, (prompt, said) in enumerate(zip(prompts, asked.values, strict=True)):
            fields = dict(said)
            params, adapter = fields.pop("sampling_params") or default, fields.pop("lora_request")
            priority, preset = fields.pop("priority") or 0, fields.pop("preset")
            own = {key: value for key, value in fields.items() if value is not None}
            if adapter is not None:
                own["model"] = adapter.lora_name
            request = kind.of(params, **own, **{name: _plainest(prompt)})
            calls.append(_Call(index, str(next(self._numbers)), request, adapter, priority, preset, asked.names(index)))
        with _Bar(use_tqdm) as bar:
            return self._loop.run(self._served.answer(calls, writing, bar))


def _demo(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the demo is served with, where the caller says nothing else."""
    aux = {name: str(demo.MODELS / name) for name in ("tuned", "untuned")}
    own = {"vectors": [demo.VECTORS], **({} if "aux" in arguments else {"aux": aux, "presets": [demo.PRESETS]})}
    lists = {name: [*own.get(name, ()), *_listed(arguments.get(name, ()))] for name in ("vectors", "presets")}
    return {**demo.ENGINE, **demo.SETTINGS, **own, **arguments, **lists}


class _Arguments(Settings):
    """Those that were given: an environment is a server's."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: Any, init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def _settings(given: dict[str, Any]) -> Settings:
    if isinstance(aux := given.get("aux"), Mapping):
        given["aux"] = {name: str(path) for name, path in aux.items()}
    own: dict[str, Any] = {name: _listed(value) if name in _LISTS else value for name, value in given.items()}
    return _Arguments(**own, max_downloads=0)  # what was read is given at once, and never fetched


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | Path) else list(value)


def _extras(preset: Any, steering: Any, decoding: Any, explain: Any, capture: Any, stop_when: Any) -> dict[str, Any]:
    said = {"preset": preset, "steering": steering, "decoding": decoding}
    return said | {"explain": explain, "capture": capture, "stop_when": stop_when}


class _Bar:
    """A bar of progress, where one is wanted."""

    def __init__(self, wanted: bool | Callable[..., Any]) -> None:
        """`wanted` is as vLLM's `use_tqdm`."""
        self._make = (wanted if callable(wanted) else tqdm) if wanted else None
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, num: int) -> None:
        """So many answers are to come."""
        if self._make is not None:
            self._bar = self._make(total=num, desc="Processed prompts", dynamic_ncols=True)

    def note(self) -> None:
        """One came."""
        if self._bar is not None:
            self._bar.update()


def _plainest(prompt: Any) -> Any:
    """A text in an object of its own as the text, which presets write into."""
    is_text = isinstance(prompt, Mapping) and prompt.keys() == {"prompt"} and isinstance(prompt["prompt"], str)
    return prompt["prompt"] if is_text else prompt


# ---- arguments by prompt


class _Asked(NamedTuple):
    """What is asked of each prompt."""

    values: Sequence[Mapping[str, Any]]
    by_prompt: frozenset[str]  # the arguments that came as lists

    def names(self, index: int) -> dict[str, str]:
        """What the fields of a prompt's request are called by who called, where that is not their own name."""
        named = {name: name for name in self.by_prompt} | _NAMES
        return {name: f"{ours}[{index}]" if ours in self.by_prompt else ours for name, ours in named.items()}


def _asked_of(num: int, **arguments: Any) -> _Asked:
    """The arguments of a call with so many prompts, by prompt. Raises: InvalidRequest for a list of another length."""
    by_prompt = frozenset(name for name, value in arguments.items() if isinstance(value, list | tuple))
    for name in arguments:
        if name in by_prompt and (said := len(arguments[name])) != num:
            why = "a list has one for each, and several entries for a prompt are a list in it"
            raise InvalidRequest(f"{said} values for {num} prompts: {why}", name, 0, BadRequest.status)
    each = [
        {name: value[index] if name in by_prompt else value for name, value in arguments.items()}
        for index in range(num)
    ]
    return _Asked(each, by_prompt)


# ---- in the event loop


class _Loop:
    """An event loop in a thread of its own, and what ends with it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="whipstaff", daemon=True)
        self._thread.start()
        self.at_end = ExitStack()  # what ends before the loop does

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """What a coroutine comes to. Who interrupts the wait interrupts the work, too. Raises: RuntimeError once it was
        closed."""
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("this LLM was closed")
        tasks: list[asyncio.Task[Any] | None] = []
        is_over = threading.Event()

        async def interruptible() -> R:
            tasks.append(asyncio.current_task())
            if is_over.is_set():
                work.close()
                raise asyncio.CancelledError
            return await work

        try:
            return asyncio.run_coroutine_threadsafe(interruptible(), self._loop).result()
        except BaseException:  # also where it comes as the work begins, before there is anything to wait for
            is_over.set()
            with suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks if task is not None])
            raise

    def close(self) -> None:
        if self._loop.is_closed():
            return
        try:
            asyncio.run_coroutine_threadsafe(_cancelled(), self._loop).result(_PATIENCE)
            self.at_end.close()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_PATIENCE)
            self._loop.close()


async def _cancelled() -> None:
    """Everything else that runs in this loop."""
    running = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def _start(loop: _Loop, args: Any, settings: Settings, chat_template: str | Path | None) -> "_Served":
    if not causes.is_asked():  # by another LLM of this process
        loop.at_end.enter_context(causes.asked())
    files, store = read_files(settings)
    engine = launch(args, settings, files)
    loop.at_end.callback(engine.shutdown, _PATIENCE)
    engine.watch = metrics.watch
    registry = await load(engine, settings, files, store)
    await prove(engine, await registry.current())
    causes.forget()
    served = _Served(engine, registry, Offline(engine, chat_template))
    await registry.check_presets_with(partial(check, reason_against=served.offline.reason_against))
    return served


@dataclass
class _Call:
    """One prompt of a call."""

    index: int
    number: str  # the engine's name for it
    request: Request
    adapter: Any
    priority: int
    preset: str | None
    names: Mapping[str, str]
    compiled: CompiledRequest | None = None
    prompt: Any = None  # as the engine takes it

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Let refusals be raised as Python's callers know them."""
        try:
            with calling(self.names):
                yield
        except WhipstaffError as error:
            raise InvalidRequest(error.message, error.param, self.index, error.status) from None


class _Served(NamedTuple):
    """A running engine and what can be named."""

    engine: Engine
    registry: LiveRegistry
    offline: Offline

    async def answer(self, calls: Sequence[_Call], writing: Writing, bar: _Bar) -> list[Output]:
        """The answers of calls, which begin once all of them were admitted."""
        caps = await self.registry.current()  # nothing may be awaited until what is named is held
        with ExitStack() as leases:
            tallies = []
            for call in calls:
                with call.naming():
                    preset = None if call.preset is None else caps.preset(call.preset, "model")
                    call.compiled = prepare(call.request, caps, preset, call.request.sent_fields)
                tallies.append(_Told(call, leases, self.registry))
                if call.adapter is not None:
                    self.offline.lora_requests[call.adapter.lora_name] = call.adapter
            await _all([self._admit(call, writing) for call in calls])
            bar.begin(len(calls))
            return await _all([self._generate(told, bar) for told in tallies])

    async def _admit(self, call: _Call, writing: Writing) -> None:
        with call.naming():
            call.prompt = await self.offline.admit(call.request, writing)

    async def _generate(self, told: "_Told", bar: _Bar) -> Output:
        call = told.call
        output = await self.offline.generate(call.request, call.prompt, call.number, call.adapter, call.priority)
        await told.tell(output, self.engine)
        bar.note()
        return output


class _Told:
    """What is heard of a request while it runs, for its output."""

    def __init__(self, call: _Call, leases: ExitStack, registry: LiveRegistry) -> None:
        """Attaches what the request came to, whose vectors are held until `leases` closes."""
        self.call, self._tally, self._explained = call, Tally(), None
        if (compiled := call.compiled) is None:
            return
        lease = leases.enter_context(registry.hold(compiled.vectors))
        if compiled.options.explain is not None:
            self._explained = ChoiceExplanations(compiled.caps.words)
        if not compiled.is_plain:
            notes = Notes(
                output=self._tally.note,
                token=self._explained.note if self._explained else None,
                search=self._tally.note_search,
                sequence=self._tally.name_sequence if compiled.tells_sequences else None,
            )
            call.request.attach(compiled, notes, lease)

    async def tell(self, output: Output, engine: Engine) -> None:
        """Put it into the output."""
        request, compiled = self.call.request, self.call.compiled
        if compiled is None:
            return
        told = openai.readings(engine), openai.captures(engine)
        output.whipstaff = await final_receipt(compiled, request.placed, self._tally, *told, request.n)
        if self._explained is not None:
            choices = [{"index": completion.index} for completion in output.outputs]
            self._explained.add_to({"choices": choices})
            for completion, choice in zip(output.outputs, choices, strict=True):
                completion.explain = choice.get(EXPLAIN_FIELD, [])


async def _all(works: Iterable[Coroutine[Any, Any, R]]) -> list[R]:
    """What coroutines come to that run together. When one fails, the others end; the error is that of the first."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION) if tasks else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
    return [task.result() for task in tasks]
