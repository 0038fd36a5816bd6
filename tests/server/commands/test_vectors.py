"""`whipstaff vectors`: files are converted, shown, combined and compared, and a wrong call says what is wrong."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from serving import environment, whipstaff
from torch import Tensor

from whipstaff.server.commands import main as cli
from whipstaff.server.commands import vectors as vectors_cli
from whipstaff.steering.algebra import Source, add, orthogonalise
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers import FORMATS, PICKLES
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header, read, write
from whipstaff.steering.where import Where

CASES, MODELS = goldens.ROOT / "cases", goldens.ROOT / "models"
SHAPE = ModelShape(architecture="Toy", hidden_size=16, num_layers=3, num_heads=2, head_dim=8)
SPELLED = "hidden=128,layers=4,heads=4,head_dim=32,kv_heads=2,architecture=LlamaForCausalLM"
GENERATOR = torch.Generator().manual_seed(11)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def made(path: Path, method: str, tensors: dict[str, Tensor], **said: Any) -> Path:
    write(path, Header(method=method, model=said.pop("model", SHAPE), **said), tensors)
    return path


def run(*words: object) -> int:
    return vectors_cli.main(list(map(str, words)))


A, B = numbers(16), numbers(16)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    one = made(tmp_path / "a.safetensors", "caa", {"resid_post.0.add": A, "resid_post.1.add": A})
    return one, made(tmp_path / "b.safetensors", "caa", {"resid_post.1.add": B}, licence="MIT")


# ---- convert


@pytest.mark.parametrize("model", [MODELS / "llama_a", MODELS / "llama_a" / "config.json", SPELLED])
def test_convert_writes_what_the_importer_says(model: object, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "knob.safetensors"
    words = ("convert", CASES / "knob_llama_prior" / "projection", target, "--model", model)
    assert run(*words, "--layer", 2, "--default", "value=6", "--scale", 0.5, "--licence", "MIT", "--where", "all") == 0
    vector = read(target)
    assert vector.header.model == goldens.shape_of("llama_a")
    assert vector.header.known_defaults == {"value": 6, "scale": 0.5}
    assert (vector.header.where, vector.header.licence) == ("all", "MIT")
    assert vector.header.provenance["format"] == "context_knob"
    assert vector.digest in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_shapes_are_read_from_every_golden_model(tmp_path: Path) -> None:
    for folder in MODELS.iterdir():
        found, wanted = vectors_cli.shape_of(str(folder)), goldens.shape_of(folder.name)
        assert found.fits(wanted) and found.architecture == wanted.architecture
    assert vectors_cli.shape_of(str(made(tmp_path / "v.safetensors", "caa", {"resid_post.0.add": A}))) == SHAPE


def test_pickles_need_the_word_and_are_warned_of(tmp_path: Path, capsys: Any) -> None:
    words = (
        "convert",
        CASES / "angular_70_llama" / "steering_config.npy",
        tmp_path / "v.safetensors",
        "--model",
        SPELLED,
    )
    assert run(*words) == 1
    assert "--unsafe-pickle" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert run(*words, "--unsafe-pickle", "--default", "angle=70") == 0
    assert "WARNING" in capsys.readouterr().err
    params = load_file(CASES / "angular_70_llama" / "params.safetensors")
    vector = read(tmp_path / "v.safetensors")
    assert all(torch.equal(parts[name], params[name]) for parts in vector.tensors.values() for name in params)


def test_nothing_is_written_over_and_nothing_is_left(tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "v.safetensors"
    target.write_bytes(b"mine")
    words = ("convert", CASES / "repeng_qwen2" / "control_vector.gguf", target, "--model", MODELS / "qwen2_a")
    assert run(*words) == 1
    assert "--force" in capsys.readouterr().err and target.read_bytes() == b"mine"
    assert run(*words, "--force") == 0
    assert read(target).header.method == "control_vector"
    for bad, reason in (
        ((*words[:2], tmp_path / "v.gguf", *words[3:]), ".safetensors"),
        ((*words[:2], tmp_path / "no" / "v.safetensors", *words[3:]), "no such folder"),
        ((*words[:2], tmp_path / "w.safetensors", "--model", SPELLED.replace("128", "64")), "shape"),
        (("convert", tmp_path / "x", tmp_path / "w.safetensors", "--model", SPELLED), "no such file"),
        ((*words, "--force", "--layer", "1"), "no use for layer"),
        (("show", CASES / "repeng_qwen2" / "control_vector.gguf"), "sound safetensors"),
    ):
        assert run(*bad) == 1
        assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "required"),
        (("paint",), "invalid choice"),
        (("convert", "a", "b"), "--model"),
        (("convert", "a", "b", "--model", "nowhere"), "no such folder"),
        (("convert", "a", "b", "--model", "hidden=3"), "layers"),
        (("convert", "a", "b", "--model", "hidden=x,layers=1,heads=1,head_dim=1"), "hidden"),
        (("convert", "a", "b", "--model", "colour=3"), "colour"),
        (("convert", "a", "b", "--model", SPELLED, "--where", "often"), "none of"),
        (("convert", "a", "b", "--model", SPELLED, "--default", "angle"), "NAME=JSON"),
        (("combine", "add", "a"), "--output"),
    ],
)
def test_wrong_calls_are_2(words: tuple[str, ...], reason: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(*words)
    assert exit_.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--help"], ["vectors", "convert", "--help"], ["vectors", "convert", "a", "b"], ["fit", "-h"]]
)
def test_help_and_wrong_calls_import_neither_torch_nor_vllm(words: list[str]) -> None:
    program = (
        "import sys\nfrom whipstaff.server.commands.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'vllm', 'transformers', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_formats_are_listed_with_their_flags(capsys: Any) -> None:
    assert run("formats") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"{name} ") for line in lines) for name in [*FORMATS, *PICKLES])
    assert next(line for line in lines if line.startswith("layers")).endswith("[--key --layer --method --site]")


def test_an_unknown_format_names_its_flag_and_the_nearest(tmp_path: Path, capsys: Any) -> None:
    source = CASES / "repeng_qwen2" / "control_vector.gguf"
    assert run("convert", source, tmp_path / "v.safetensors", "--model", SPELLED, "--format", "sealens") == 1
    said = capsys.readouterr().err
    assert "--format: 'sealens' is no format" in said and "vectors formats" in said and len(said) < 400


@pytest.mark.parametrize("command", [(), ("convert",), ("show",), ("combine",), ("diff",)])
def test_help_is_on_stdout(command: tuple[str, ...], capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(*command, "--help")
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    assert "usage: whipstaff vectors" in said
    if command == ("convert",):
        assert "vectors formats" in said and "--unsafe-pickle" in said and "--layer" in said


def test_the_command_is_there(tmp_path: Path) -> None:
    file = made(tmp_path / "a.safetensors", "caa", {"resid_post.0.add": A})
    done = subprocess.run(
        whipstaff("vectors", "show", str(file)), capture_output=True, text=True, timeout=120, env=environment()
    )
    assert done.returncode == 0 and "resid_post.0.add" in done.stdout
    assert "whipstaff vectors" in cli.USAGE


# ---- show


def test_show_says_what_a_vector_is_and_wants(tmp_path: Path, capsys: Any) -> None:
    tensors = {f"attn_head.{layer}.direction": numbers(2, 8) for layer in range(3)}
    tensors |= {f"attn_head.{layer}.sigma": torch.ones(2) for layer in range(3)}
    file = made(tmp_path / "t.safetensors", "iti", tensors, licence="MIT", description="honest")
    assert run("show", file, "--png", tmp_path / "t.png") == 0
    said = capsys.readouterr().out
    for part in (
        "iti",
        "arXiv:2306.03341",
        "hidden 16, 3 layers",
        "attn_head, layers 0-2",
        "each_last (the method's own)",
        "15 (the method's)",
        "MIT",
        "honest",
        "norms per head of attn_head.direction",
        "cosines of attn_head.direction",
        f"{float(tensors['attn_head.1.direction'].norm()):.4g}",
    ):
        assert part in said, part
    with Image.open(tmp_path / "t.png") as picture:
        assert picture.width > 100 and picture.height > 300
    assert run("show", file, "--png", tmp_path / "t.png") == 1


def test_show_takes_every_kind_of_file(tmp_path: Path, capsys: Any) -> None:
    shape = SHAPE.model_copy(update={"num_layers": 40})
    many = {f"resid_post.{layer}.add": numbers(16) for layer in (*range(20), 30)}
    file = made(tmp_path / "many.safetensors", "caa", many, model=shape)
    assert run("show", file) == 0
    assert "layers 0-19, 30" in (said := capsys.readouterr().out) and "cosine with the next layer" in said
    assert run("show", made(tmp_path / "rows.safetensors", "soft_prompt", {"rows": numbers(3, 16)})) == 0
    assert "rows beside the prompt" in capsys.readouterr().out
    centres = {"centres": numbers(2, 5)}
    file = made(tmp_path / "centres.safetensors", "adapter_centres", centres, defaults={"adapters": ["law", "art"]})
    assert run("show", file) == 0
    said = capsys.readouterr().out
    assert "read by `decoding`" in said and "tokens  " not in said
    assert run("show", made(tmp_path / "one.safetensors", "directional_ablation", {"direction": A})) == 0
    knob = made(tmp_path / "knob.safetensors", "context_knob", {"resid_post.1.basis": A[None]})
    assert run("show", knob, "--png", tmp_path / "knob.png") == 0
    assert "must say value" in capsys.readouterr().out


# ---- combine


@pytest.mark.parametrize(
    ("operation", "flags", "wanted"),
    [
        ("add", [], {0: A, 1: A + B}),
        ("subtract", [], {0: A, 1: A - B}),
        ("average", [], {0: A / 2, 1: (A + B) / 2}),
        ("orthogonalise", [], {0: A, 1: A - (A @ B) / (B @ B) * B}),
    ],
)
def test_algebra(operation: str, flags: list[str], wanted: dict[int, Tensor], two: Any, tmp_path: Path) -> None:
    target = tmp_path / "c.safetensors"
    assert run("combine", operation, *two, "-o", target, *flags, "--description", "made") == 0
    vector = read(target)
    stored = load_file(target)
    assert set(stored) == {f"resid_post.{layer}.add" for layer in wanted}
    for layer, tensor in wanted.items():
        torch.testing.assert_close(stored[f"resid_post.{layer}.add"], tensor, rtol=1e-5, atol=1e-6)
    assert (vector.header.method, vector.header.licence, vector.header.description) == ("caa", "MIT", "made")
    said = vector.header.provenance
    assert said["operation"] == operation
    assert [source["sha256"] for source in said["sources"]] == [read(path).digest for path in two]


def test_scaling_there_and_back_is_exact(two: Any, tmp_path: Path) -> None:
    assert run("combine", "scale", two[0], "--factor", -4, "-o", tmp_path / "c.safetensors") == 0
    assert run("combine", "scale", tmp_path / "c.safetensors", "--factor", -0.25, "-o", tmp_path / "d.safetensors") == 0
    assert all(torch.equal(t, A) for t in load_file(tmp_path / "d.safetensors").values())


def test_strengths_that_differ_are_multiplied_in(tmp_path: Path) -> None:
    """The sum at its own strength is both at theirs; ITI's deviations become part of its numbers."""
    iti = {"attn_head.1.direction": numbers(2, 8), "attn_head.1.sigma": torch.tensor([2.0, 0.0])}
    one = read(made(tmp_path / "a.safetensors", "iti", iti))
    other = read(made(tmp_path / "b.safetensors", "function_vector", {"attn_head.1.add": numbers(2, 8)}, scale=3.0))
    header, tensors = add([Source("a", one), Source("b", other)])
    assert (header.method, header.scale, header.where) == ("vector", 1.0, Where.of("each_last"))
    unit = iti["attn_head.1.direction"] / iti["attn_head.1.direction"].norm(dim=1, keepdim=True)
    wanted = 15 * iti["attn_head.1.sigma"][:, None] * unit + 3 * next(iter(other.tensors.values()))["add"]
    torch.testing.assert_close(tensors["attn_head.1.add"], wanted, rtol=1e-5, atol=1e-5)
    assert [source["multiplied_by"] for source in header.provenance["sources"]] == [15.0, 3.0]
    write(tmp_path / "c.safetensors", header, tensors)


@pytest.mark.parametrize("shared", ("direction", "sigma"))
def test_a_part_that_layers_share_goes_into_each_ones_numbers(shared: str, tmp_path: Path) -> None:
    """A file that says ITI's deviations, or its directions, once for all layers combines as one that repeats them: what
    it shared is in the sums, and not beside them, where the result would be no sound file."""
    parts = {"direction": numbers(2, 8), "sigma": torch.tensor([2.0, 0.5])}
    (other,) = parts.keys() - {shared}
    own = {f"attn_head.{layer}.{other}": (layer + 1) * parts[other] for layer in range(2)}
    short = read(made(tmp_path / "short.safetensors", "iti", {shared: parts[shared], **own}))
    repeated = {f"attn_head.{layer}.{shared}": parts[shared] for layer in range(2)}
    long = read(made(tmp_path / "long.safetensors", "iti", repeated | own))
    further = Source("c", read(made(tmp_path / "c.safetensors", "iti", {"attn_head.0.add": numbers(2, 8)})))
    for how in (add, orthogonalise):
        header, tensors = how([Source("a", short), further])
        _, wanted = how([Source("b", long), further])
        assert tensors.keys() == wanted.keys() == {"attn_head.0.add", "attn_head.1.add"}
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
        write(tmp_path / f"{how.__name__}.safetensors", header, tensors)
        assert read(tmp_path / f"{how.__name__}.safetensors").header.method == "iti"


def test_heads_are_orthogonalised_each_for_itself(tmp_path: Path) -> None:
    files = [
        read(made(tmp_path / f"{i}.safetensors", "function_vector", {"attn_head.0.add": numbers(2, 8)}))
        for i in range(3)
    ]
    _, tensors = orthogonalise([Source(str(index), file) for index, file in enumerate(files)])
    for head in range(2):
        for file in files[1:]:
            assert abs(tensors["attn_head.0.add"][head] @ next(iter(file.tensors.values()))["add"][head]) < 1e-5
    with pytest.raises(SteeringError, match="nothing is left"):
        orthogonalise([Source("a", files[0]), Source("b", files[0])])


def test_what_cannot_be_combined_is_refused(two: Any, tmp_path: Path, capsys: Any) -> None:
    other = made(
        tmp_path / "o.safetensors",
        "caa",
        {"resid_post.0.add": A[:8]},
        model=SHAPE.model_copy(update={"hidden_size": 8, "head_dim": 4}),
    )
    knob = made(tmp_path / "k.safetensors", "context_knob", {"resid_post.1.basis": A[None]})
    lofit = made(tmp_path / "l.safetensors", "lofit", {"attn_head.1.v": numbers(2, 8)})
    where = made(tmp_path / "w.safetensors", "caa", {"resid_post.0.add": A}, where="all")
    piecewise = made(
        tmp_path / "p.safetensors", "repe", {"resid_post.0.add": A}, defaults={"operator": "piecewise_linear"}
    )
    target = tmp_path / "c.safetensors"
    for words, reason in (
        (("add", two[0], other), "hidden 16"),
        (("add", two[0], knob), "not linear"),
        (("add", two[0], lofit), "different numbers"),
        (("add", two[0], where), "--where"),
        (("average", piecewise, piecewise), "piecewise"),
        (("add", two[0]), "at least 2"),
        (("scale", two[0]), "--factor"),
        (("scale", *two, "--factor", 2), "one file"),
        (("add", *two, "--factor", 2), "--factor"),
        (("scale", two[0], "--factor", "nan"), "finite"),
        (("subtract", two[0], tmp_path / "none.safetensors"), "No such file"),
    ):
        assert run("combine", *words, "-o", target) == 1, words
        assert reason in capsys.readouterr().err, words
        assert not target.exists()
    assert run("combine", "add", two[0], where, "-o", target, "--where", '{"prompt": [[0, 3]]}') == 0
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# ---- diff


def test_diff(two: Any, tmp_path: Path, capsys: Any) -> None:
    assert run("diff", two[0], two[0]) == 0
    assert "the same bytes" in capsys.readouterr().out
    assert run("diff", *two) == 1
    said = capsys.readouterr().out
    assert "resid_post.0.add: only in the first" in said and "cosine" in said and 'licence: "" -> "MIT"' in said
    assert run("diff", two[0], tmp_path / "none.safetensors") == 2
    assert run("diff", two[0], CASES / "repeng_qwen2" / "control_vector.gguf") == 2
