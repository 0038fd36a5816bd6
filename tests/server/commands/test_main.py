"""The command line: a wrong call is told what is wrong, a server that cannot run says why, doctor shows findings."""

import json
import os
import re
import socket
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
import warm
from serving import LAYERS, environment, make_tokenizer, save_llama, save_models, save_vectors, whipstaff

from whipstaff.server.commands import main as cli
from whipstaff.server.engine import UnsupportedEngine, check_version, vllm_version
from whipstaff.server.settings import Settings

PATIENCE = 240  # seconds
FLAGS: tuple[str, ...] = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "128")
FLAGS += ("--kv-cache-memory-bytes", "32M", "--block-size", "32")


def run(*words: str, is_cold: bool = False) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own; one that `is_cold` starts as a user's does, with nothing imported."""
    if is_cold:
        return subprocess.run(whipstaff(*words), capture_output=True, text=True, timeout=PATIENCE, env=environment())
    done = warm.run(whipstaff(*words, forks=True), timeout=PATIENCE, env=environment(), has_vllm=True)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


# ---- without an engine


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_is_usage_on_stdout(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    assert exit_.value.code == 0
    assert capsys.readouterr().out == cli.USAGE


def test_the_version_is_that_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    declared = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["version"]
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"whipstaff {declared} over vLLM {vllm_version()}\n"


@pytest.mark.parametrize("words", [[], ["sreve"], ["--port", "8000"]])
def test_a_wrong_call_is_usage_on_stderr_and_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == cli.USAGE


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.32.0.dev3", "0.33.0"])
def test_every_0_32_is_supported(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.32.0", "0.3", "0.320.0"])
def test_any_other_vllm_is_refused_with_what_to_install(version: str) -> None:
    with pytest.raises(UnsupportedEngine, match=rf"vLLM {re.escape(version)} is installed. Install vllm==0\.33"):
        check_version(version)


def test_the_installed_vllm_is_one_of_them() -> None:
    check_version(vllm_version())


def test_flags_win_over_the_environment_which_wins_over_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        path.mkdir()
    monkeypatch.setenv("WHIPSTAFF_AUX", "a=/models/a,b=/models/b")
    monkeypatch.setenv("WHIPSTAFF_VECTORS", f"{paths[0]},{paths[1]}")
    _, from_environment = cli.parse("serve", ["some/model"])
    assert from_environment.aux == {"a": "/models/a", "b": "/models/b"}
    assert from_environment.vectors == paths
    assert from_environment.steering_slots is None
    _, from_flags = cli.parse("serve", ["some/model", "--aux", "c=/models/c", "--steering-slots", "3"])
    assert from_flags.aux == {"c": "/models/c"}
    assert (from_flags.vectors, from_flags.steering_slots) == (paths, 3)


def test_sites_and_doses_come_from_flags_and_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    _, own = cli.parse("doctor", ["some/model"])
    assert (own.steering_sites, own.max_dose, own.dose_policy) == ([], None, "refuse")
    monkeypatch.setenv("WHIPSTAFF_STEERING_SITES", "mlp_out,attention")
    monkeypatch.setenv("WHIPSTAFF_MAX_DOSE", "0.5")
    _, own = cli.parse("serve", ["some/model", "--dose-policy", "clamp"])
    assert (own.steering_sites, own.max_dose, own.dose_policy) == (["mlp_out", "attention"], 0.5, "clamp")
    _, own = cli.parse("serve", ["some/model", "--max-dose", "2", "--steering-sites", "router"])
    assert (own.steering_sites, own.max_dose, own.dose_policy) == (["router"], 2.0, "refuse")
    for said, layers in (("all", "all"), ("none", []), ("6,2, 4,2", [2, 4, 6])):
        assert cli.parse("serve", ["some/model", "--early-layers", said])[1].early_layers == layers
    assert own.early_layers is None and not own.lookahead
    assert cli.parse("serve", ["some/model", "--lookahead"])[1].lookahead
    assert not cli.parse("serve", ["some/model", "--lookahead", "--no-lookahead"])[1].lookahead
    assert not cli.parse("serve", ["some/model", "--no-playground"])[1].playground
    monkeypatch.setenv("WHIPSTAFF_GRAFANA_URL", "http://localhost:3000")
    assert cli.parse("serve", ["some/model"])[1].grafana_url == "http://localhost:3000"
    monkeypatch.setenv("WHIPSTAFF_LOOKAHEAD", "1")
    assert cli.parse("doctor", ["some/model"])[1].lookahead
    assert not own.attention_rows and own.hidden_states == 0
    _, own = cli.parse("serve", ["some/model", "--attention-rows", "--hidden-states", "3"])
    assert own.attention_rows and own.hidden_states == 3
    assert own.attention_layers == [] and (own.max_downloads, own.download_seconds) == (64, 600)
    reads = ("--attention-layers", "2,0", "--max-downloads", "0", "--download-seconds", "1.5")
    _, own = cli.parse("serve", ["some/model", *reads])
    assert own.attention_layers == [0, 2] and (own.max_downloads, own.download_seconds) == (0, 1.5)


def test_the_admin_key_is_nowhere_that_vllm_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WHIPSTAFF_REGISTRY", str(tmp_path))
    args, own = cli.parse("serve", ["some/model", "--admin-key", "secret word"])
    assert own.admin_key is not None and own.admin_key.get_secret_value() == "secret word"
    assert own.registry == tmp_path
    assert "secret word" not in repr(args) + repr(own)


def test_without_a_model_the_demo_is_served_and_flags_still_count() -> None:
    args, settings = cli.parse("serve", ["--port", "8123", "--max-model-len", "77"])
    assert Path(args.model).name == "demo" and args.served_model_name == ["demo"]
    assert (args.port, args.max_model_len) == (8123, 77)
    assert settings.aux.keys() == {"tuned", "untuned"}
    named, own = cli.parse("serve", ["some/model"])
    assert named.model == "some/model" and own == Settings()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--aux", "expert"], "--aux: 'expert' is not NAME=MODEL"),
        (["--aux", "=x"], "--aux: '=x' is not NAME=MODEL"),
        (["--aux", "my model=x"], "--aux: 'my model=x' is not NAME=MODEL"),
        (["--aux", "a=x", "--aux", "a=y"], "--aux: two auxiliary models are called 'a'"),
        (["--vectors", "/no/such/place"], "--vectors: /no/such/place: no such file or folder"),
        (["--steering-slots", "0"], "--steering-slots: Input should be greater than 0"),
        (["--steering-slots", "many"], "--steering-slots: Input should be a valid integer"),
        (["--steering-sites", "nose"], "--steering-sites: 'nose' is none of resid_pre, "),
        (["--steering-sites", "router", "--steering-sites", "mlp"], "--steering-sites: 'mlp' is none of resid_pre, "),
        (["--max-dose", "0"], "--max-dose: Input should be greater than 0"),
        (["--max-dose", "nan"], "--max-dose: Input should be a finite number"),
        (["--max-dose", "all"], "--max-dose: Input should be a valid number"),
        (["--max-dose", "1", "--dose-policy", "hope"], "--dose-policy: Input should be 'refuse' or 'clamp'"),
        (["--dose-policy", "clamp"], "--dose-policy says what happens beyond --max-dose, which is not given"),
        (["--early-layers", "2,last"], "--early-layers: 'last' is no layer; give numbers with commas between them"),
        (["--early-layers", "-1"], "--early-layers: '-1' is no layer"),
        (["--data-parallel-size", "2"], "data parallelism"),
        (["--admin-key", "secret"], "say where it is kept with --registry DIR"),
        (["--registry", "/proc/nowhere"], "--registry /proc/nowhere: "),
        (["--presets", "/no/such/place"], "--presets: /no/such/place: no such file or folder"),
        (["--grafana-url", "javascript:alert(1)"], "--grafana-url: 'javascript:alert(1)' is no address"),
        (["--grafana-url", "https://"], "--grafana-url: 'https://' is no address"),
        (["--grafana-url", "http://host:port"], "--grafana-url: Port could not be cast"),
        (["--grafana-url", "https://me:secret@host/d"], "--grafana-url: it is told to everybody"),
        (["--max-upload-bytes", "0"], "--max-upload-bytes: Input should be greater than 0"),
    ],
)
def test_bad_flags_end_the_start_with_one_line_that_names_them(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    last = told(capsys, "serve", "some/model", "--port", "0", *words)  # a port that nobody has
    assert last.startswith("whipstaff: ") and reason in last


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The last line of a call that is wrong."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([*words])
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_flag_that_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unrecognized arguments: --steering-slotz=3" in told(capsys, "serve", "some/model", "--steering-slotz=3")


@pytest.mark.parametrize(
    ("flag", "file", "data", "reason"),
    [
        ("--vectors", "happy.gguf", b"no such thing", "happy.gguf"),
        ("--vectors", "happy.safetensors", b"no such thing", "happy.safetensors"),
        ("--presets", "terse.json", b'{"defalt": {}}', "defalt"),
        ("--keys", "keys.json", b'{"keys": [{"id": "a", "sha256": ["ab"]}]}', "keys.json"),
        (
            "--keys",
            "keys.json",
            b'{"keys": [{"id": "a", "sha256": ["%s"]}], "policies": {"free": {"max_doze": 1}}}' % (b"ab" * 32),
            "policies.free.max_doze",
        ),
        ("--registry", "manifest.json", b"{", "given"),
    ],
)
def test_a_file_that_is_wrong_is_named_before_a_model_is_loaded(
    flag: str, file: str, data: bytes, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "given" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    path.chmod(0o600)
    given = path if flag in ("--keys", "--vectors", "--presets") else tmp_path / "given"
    last = told(capsys, "serve", "some/model", "--port", "0", flag, str(given))
    assert last.startswith("whipstaff: ") and reason in last


def test_a_port_in_use_is_said_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        last = told(capsys, "serve", "some/model", "--host", "127.0.0.1", "--port", port)
    assert last.startswith("whipstaff: ") and "Address already in use" in last


# ---- without a compiler


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only folder of PATH. What going without a compiler sets is set back afterwards."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    return tmp_path


def is_off() -> tuple[bool, bool]:
    """Whether torch.compile is, for processes that import torch anew and for those that are forked from this one."""
    return os.environ["TORCH_COMPILE_DISABLE"] == "1", torch._dynamo.config.disable


def test_where_there_is_a_compiler_it_is_used(monkeypatch: pytest.MonkeyPatch, no_compiler: Path) -> None:
    monkeypatch.setenv("CXX", "/usr/bin/g++")
    args, _ = cli.parse("serve", ["some/model"])
    assert is_off() == (False, False) and not args.enforce_eager and args.whipstaff_uncompiled is None


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (None, "there is no C++ compiler 'g++'"),
        ("echo 'x: fatal error: Python.h: No such file' >&2; exit 1", "Python.h: No such file"),
    ],
)
def test_a_cpu_without_a_compiler_compiles_nothing(no_compiler: Path, program: str | None, why: str) -> None:
    if program is not None:
        (no_compiler / "g++").write_text(f"#!/bin/sh\n{program}\n")
        (no_compiler / "g++").chmod(0o700)
    args, _ = cli.parse("serve", ["some/model"])
    assert is_off() == (True, True) and args.enforce_eager and why in args.whipstaff_uncompiled


def test_who_wants_nothing_compiled_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, no_compiler: Path) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    args, _ = cli.parse("serve", ["some/model"])
    assert args.whipstaff_uncompiled is None and not args.enforce_eager  # as they said


def test_a_compiler_that_was_named_has_to_be_there(
    monkeypatch: pytest.MonkeyPatch, no_compiler: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "clang++-99")
    last = told(capsys, "serve", "some/model")
    assert last.startswith("whipstaff: CXX: there is no C++ compiler 'clang++-99'; name another")
    assert is_off() == (False, False)


# ---- in a process of its own


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


def assert_stopped(answer: "subprocess.CompletedProcess[str]", *reasons: str, status: int = 2) -> None:
    last = answer.stderr.strip().splitlines()[-1]
    assert answer.returncode == status, answer.stderr[-2000:]
    assert last.startswith("whipstaff: ") and all(reason in last for reason in reasons), answer.stderr[-2000:]


@pytest.mark.engine
def test_vocabularies_that_differ_are_refused_with_the_token_that_does(models: dict[str, str], tmp_path: Path) -> None:
    smaller = save_llama(tmp_path / "smaller", make_tokenizer(vocabulary=400), seed=5)
    answer = run("doctor", models["base"], *FLAGS, "--aux", f"small={smaller}")
    assert_stopped(answer, "--aux small=", "in the base's vocabulary and", "must share the base's tokens")


@pytest.mark.engine
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: None, "no such"),
        (lambda folder: folder.mkdir(), "config.json"),
        (lambda folder: write_config(folder, architectures=["NoSuchForCausalLM"]), "NoSuchForCausalLM"),
    ],
)
def test_a_wrong_model_folder_ends_with_a_sentence(change: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    change(tmp_path / "model")
    answer = run("doctor", str(tmp_path / "model"), *FLAGS, is_cold=reason == "no such")
    assert_stopped(answer, reason)
    assert len(answer.stderr.strip().splitlines()[-1]) < 600


def write_config(folder: Path, **changes: Any) -> None:
    folder.mkdir()
    config = json.loads((goldens.ROOT / "models" / "llama_a" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.engine
def test_what_ends_the_engines_process_is_said_last(tmp_path: Path) -> None:
    write_config(tmp_path / "model")
    answer = run("doctor", str(tmp_path / "model"), *FLAGS, "--skip-tokenizer-init")
    assert_stopped(answer, str(tmp_path / "model"), status=1)
    assert "root cause" not in answer.stderr.strip().splitlines()[-1]


@pytest.mark.engine
def test_a_dense_model_has_no_router_to_hook(models: dict[str, str]) -> None:
    answer = run("doctor", models["base"], *FLAGS, "--steering-sites", "router")
    assert_stopped(answer, "--steering-sites router: the served model has no experts")


@pytest.mark.engine
def test_doctor_shows_that_every_site_and_auxiliary_model_obeys(models: dict[str, str], tmp_path: Path) -> None:
    vectors = save_vectors(tmp_path / "vectors")
    aux = ("--aux", f"expert={models['expert']}", "--aux", f"anti={models['anti']}")
    hooks = ("--steering-sites", "mlp_in", "--steering-sites", "attention", "--max-dose", "0.5")
    answer = run("doctor", models["base"], *FLAGS, *aux, *hooks, "--vectors", str(vectors))
    assert answer.returncode == 0, answer.stderr[-2000:]
    lines = answer.stdout.splitlines()  # vLLM logs to stdout too
    head, verdict = (next(line for line in lines if re.match(start, line)) for start in ("vLLM ", r"\d+ of "))
    findings = lines[lines.index(head) + 1 : lines.index(verdict)]
    assert head.startswith(f"vLLM {vllm_version()}, model runner v1, LlamaForCausalLM, pid ")
    # those of every server, those that the vectors need, and those asked for; the stream between blocks is one place
    hooked = ("resid_post", "attn_head", "attn_out", "mlp_out", "mlp_in", "attention")
    sites = [f"{site} of layer {layer}" for layer in range(LAYERS) for site in hooked]
    wanted = ["resid_pre of layer 0", *sites, "auxiliary model expert", "auxiliary model anti"]
    assert sorted(findings) == sorted(f"ok   {what}: edit changes the output, scale 0 does not" for what in wanted)
    assert verdict == f"{len(wanted)} of {len(wanted)} obey"
    assert "vector 'misfit' cannot be used" in answer.stderr + answer.stdout
