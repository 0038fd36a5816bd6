"""The command line: `whipstaff serve [MODEL] [flags]`, `whipstaff doctor [MODEL] [flags]`, `whipstaff bench [flags]`,
`whipstaff vectors ...`, `whipstaff fit METHOD ...`, `whipstaff eval DATA ...`, `whipstaff keys ...`."""

import logging
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from whipstaff.server import __version__, demo
from whipstaff.server.commands import eval_flags, fit_flags, suite_flags, vectors_flags
from whipstaff.server.engine import ENGINE_DIED, EngineDied, UnsupportedEngine, causes, vllm_version

if TYPE_CHECKING:
    from whipstaff.server.settings import Settings

USAGE = """usage: whipstaff serve  [MODEL] [--aux NAME=MODEL] [--vectors PATH] [any flag of `vllm serve`]
       whipstaff doctor [MODEL] [the same flags]     show that every site obeys, then exit
       whipstaff bench [--mix FILE]                  put a load on a server: what do methods wait for?
       whipstaff vectors convert|show|combine|diff   vector files; see `whipstaff vectors --help`
       whipstaff vectors formats                     the foreign formats that `convert` reads
       whipstaff vectors list|add|remove             the vectors of a running server
       whipstaff fit METHOD --model M --data D -o F  make a vector file; `whipstaff fit methods` lists what can be made
       whipstaff eval DATA --vector NAME --scales A,B  what a server's vector does, and what it costs
       whipstaff eval suite                          every method on the demo's tasks, beside rivals and costs
       whipstaff keys hash|new                       the hash of a key, for the file of --keys
       whipstaff --version                           this version, and that of vLLM

Without MODEL the embedded demo model is served. `whipstaff serve --help` lists every flag.
"""

DEMO_FLAGS = tuple(
    word
    for name, value in (demo.ENGINE | demo.SETTINGS).items()
    for word in (f"--{name.replace('_', '-')}", *(() if value is True else (str(value),)))
)


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exits with 2 for a wrong call or a wrong file that it names, with 1 when the server cannot run, with
    70 when its engine died, each with the reason on stderr; with 128 and the signal's number when a second one ended it
    at once."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["vectors"]:
        flags = vectors_flags.parse(words[1:])  # help and wrong calls end here, before torch is imported
        from whipstaff.server.commands import vectors as vectors_cli

        sys.exit(vectors_cli.run(flags))
    if words[:1] == ["fit"]:
        fit_args = fit_flags.parse(words[1:])
        from whipstaff.server.commands import fit as fit_cli

        sys.exit(fit_cli.run(fit_args))
    if words[:2] == ["eval", "suite"]:
        suite_args = suite_flags.parse(words[2:])
        from whipstaff.server.commands import suite as suite_cli

        sys.exit(suite_cli.run(suite_args))
    if words[:1] == ["eval"]:
        eval_args = eval_flags.parse(words[1:])
        from whipstaff.server.commands import eval as eval_cli

        sys.exit(eval_cli.run(eval_args))
    if words[:1] == ["keys"]:
        from whipstaff.server.commands import keys

        sys.exit(keys.main(words[1:]))
    if words == ["--version"]:
        print(f"whipstaff {__version__} over vLLM {vllm_version()}")
        sys.exit(0)
    if not words or words[0] not in ("serve", "doctor", "bench"):
        is_help = words[:1] in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if is_help else sys.stderr, end="")
        sys.exit(0 if is_help else 2)
    with causes.asked():
        try:
            if words[0] == "bench":
                from whipstaff.server.commands import bench

                sys.exit(bench.run(words[1:]))
            args, settings = parse(words[0], words[1:])
            run = _serve if words[0] == "serve" else _doctor
            sys.exit(run(args, settings))
        except EngineDied as error:
            print(f"whipstaff: {error}", file=sys.stderr)
            sys.exit(ENGINE_DIED)
        except (UnsupportedEngine, ValidationError, RuntimeError, ValueError, OSError) as error:
            _log_details(error)
            print(f"whipstaff: {_sentence(error)}", file=sys.stderr)
            sys.exit(causes.status_of(error))
        except KeyboardInterrupt as error:
            sys.exit(error.args[0] if error.args else 130)


def parse(command: str, words: list[str]) -> "tuple[Namespace, Settings]":
    """vLLM's flags and ours."""
    from whipstaff.server.engine.frontend import flags
    from whipstaff.server.settings import Settings

    parser = flags.parser(f"whipstaff {command}")
    Settings.add_flags(parser)
    args = parser.parse_args(words)
    if args.model_tag is None and not flags.names_model(args):
        demo_words = [str(demo.MODELS / "demo"), *DEMO_FLAGS]
        args = parser.parse_args([*demo_words, *words])
        if not args.whipstaff_aux:  # what the demo's presets name
            args.whipstaff_aux = [f"{name}={demo.MODELS / name}" for name in ("tuned", "untuned")]
            args.whipstaff_presets = [*(args.whipstaff_presets or []), str(demo.PRESETS)]
        args.whipstaff_vectors = [*(args.whipstaff_vectors or []), str(demo.VECTORS)]
    flags.finish(args)
    _check_model(str(args.model))
    settings = Settings.from_args(args)
    if settings.keys is not None and (args.api_key or os.environ.get("VLLM_API_KEY")):
        raise UnsupportedEngine("--keys says who may do what; leave out --api-key and VLLM_API_KEY")
    return args, settings


def _check_model(model: str) -> None:
    """Raises: UnsupportedEngine if it can only be a path, and leads nowhere or to a folder that is no model's."""
    path = Path(model).expanduser()
    if model.startswith(("/", "./", "../", "~")) and not path.exists():
        raise UnsupportedEngine(f"{model}: no such folder; MODEL is a folder with a model, or a name on the hub")
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "params.json")):
        raise UnsupportedEngine(f"{model} has no config.json; MODEL is a folder with a model, or a name on the hub")


def _serve(args: Namespace, settings: "Settings") -> int:
    """Run the server until it is told to stop; the exit status."""
    import uvloop

    from whipstaff.server import app

    if (args.api_server_count or 1) > 1:
        return app.serve_several(args, settings)
    return uvloop.run(app.serve(args, settings))  # the event loop that `vllm serve` runs on


def _doctor(args: Namespace, settings: "Settings") -> int:
    """Start the engine as `serve` would and print every finding of the self-test; the exit status, 1 if one is bad."""
    import uvloop

    facts, findings = uvloop.run(_findings(args, settings))
    print(f"vLLM {vllm_version()}, model runner {facts['runner']}, {facts['model']['architecture']}, pid {os.getpid()}")
    for finding in findings:
        changes = "edit changes the output" if finding.changes else "EDIT DOES NOT CHANGE THE OUTPUT"
        off = "scale 0 does not" if finding.off_is_off else "SCALE 0 CHANGES IT"
        print(f"{'ok  ' if finding.is_good else 'FAIL'} {finding.what}: {changes}, {off}")
    num_good = sum(finding.is_good for finding in findings)
    print(f"{num_good} of {len(findings)} obey")
    return int(num_good < len(findings))


async def _findings(args: Namespace, settings: "Settings") -> tuple[dict[str, Any], list[Any]]:
    from whipstaff.server import app
    from whipstaff.server.engine.frontend.selftest import describe, self_test

    files, store = app.read_files(settings)
    engine = app.launch(args, settings, files)
    try:
        library = await app.load(engine, settings, files, store)
        caps = await library.current()
        return await describe(engine), [finding async for finding in self_test(engine, list(caps.auxiliaries))]
    finally:
        engine.shutdown()


def _sentence(error: Exception) -> str:
    """One sentence: of a flag of ours or vLLM's, or of what the engine's processes stumbled on."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = "--" + str(first["loc"][0]).replace("_", "-") + ": " if first["loc"] else ""
        said = (
            first["msg"].removeprefix("Value error, ").partition(" Supported architectures: ")[0]
        )  # hundreds of names
        return name + " ".join(said.split())[: causes.MAX_CHARACTERS]
    return causes.of(error)


def _log_details(error: Exception) -> None:
    """A traceback above the sentence that comes last, where the error may be no user's."""
    if not isinstance(error, RuntimeError | ValidationError):
        logging.getLogger("vllm.whipstaff").error("the server cannot run", exc_info=error)
