"""Draws docs/architecture.svg: the rooms, in which process each runs, and which imports which, read off the sources.

`python docs/draw.py` writes it; tests/test_docs.py holds it to the sources. An arrow points from who imports to what is
imported. Arrows that follow from others are left out; one that runs against the order of the picture is red.
"""

import ast
import textwrap
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
PACKAGES = ("server", "steering", "decoding", "cuda_ext")

WIDTH, BOX, ROW, GAP, TOP = 1080, 232, 118, 24, 36  # pixels
LEFT, HEIGHT = 40, 78  # of the first column; of a box
STYLE = """
  text { font-family: Helvetica, Arial, 'DejaVu Sans', sans-serif; font-size: 12px; fill: #1f2933 }
  .name { font-weight: 600; font-size: 13px }
  .lane { font-size: 12px; fill: #52606d; font-style: italic }
  .box { fill: #ffffff; stroke: #9aa5b1 }
  .down { fill: none; stroke: #7b8794 }
  .up { fill: none; stroke: #d64545; stroke-width: 2 }
"""


class Box(NamedTuple):
    """A box: one folder, with those below it that have no box of their own, or some files of `server/`."""

    name: str
    row: int
    column: float


# From top to bottom, whoever imports stands above what is imported; of a row, to the left.
BOXES = (
    Box("server/commands", 0, 0),
    Box("server/app.py", 0, 1),
    Box("server/api", 0, 2),
    Box("server/playground", 0, 3),
    Box("server/fits", 1, 0),
    Box("server/access", 1, 1),
    Box("server/admission", 1, 2),
    Box("server/registry", 1, 3),
    Box("server/engine/frontend", 2, 0),
    Box("server/suite", 2, 1),
    Box("server/demo", 2, 2),
    Box("server/prompt", 2, 3),
    Box("server/engine/scheduler", 3, 1),
    Box("server/engine/worker", 4, 1),
    Box("server/engine/worker/logits", 4, 2),
    Box("server/engine/worker/edits", 4, 3),
    Box("server/engine", 5, 0),
    Box("server/*.py", 5, 2.5),
    Box("steering", 6, 1),
    Box("decoding", 6, 2),
    Box("cuda_ext", 7, 1.5),
)
LANES = {  # first row: what runs there
    0: "API server: one process, or several",
    3: "scheduler: in the engine's process",
    4: "worker: one process for each rank",
    5: "what the processes share",
    6: "libraries: no HTTP, no vLLM",
}
OWN_WORDS = {  # of boxes that are no folder, or whose folder's docstring is longer than a box
    "server/app.py": "puts it all together",
    "server/*.py": "plan.py is what crosses processes; errors, settings, metrics",
    "server/engine/frontend": "vLLM's OpenAI server and its client of the engine, extended",
    "server/engine/scheduler": "cache keys, slots, sequences that advance together",
    "server/engine/worker": "loads the models; makes of each step a BatchView",
    "server/engine": "the seam to vLLM, whose internals nothing else imports",
    "server/suite": "what every method does on the demo's tasks, over HTTP",
    "server/demo": "three tiny models of one invented world",
    "steering": "hidden states: methods, importers, plans, tables",
    "decoding": "logits: methods, streams, mixing",
    "cuda_ext": "the kernels: C++ and CUDA, and in plain torch",
}


def main() -> None:
    PICTURE.write_text(drawn())


def drawn() -> str:
    """The picture as SVG."""
    places = {box.name: box for box in BOXES}
    body = [*_lanes(), *_arrows(places, imports()), *(part for box in BOXES for part in _box(box))]
    height = TOP + ROW * (max(box.row for box in BOXES) + 1)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
    marks = "".join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0,1 L7,4 L0,7 z" fill="{colour}"/></marker>'
        for name, colour in (("end-down", "#7b8794"), ("end-up", "#d64545"))
    )
    return "\n".join([head, f"<style>{STYLE}</style>", f"<defs>{marks}</defs>", *body, "</svg>", ""])


def imports() -> dict[str, set[str]]:
    """Which boxes a box's files import from. Raises: LookupError where a folder has no box."""
    found: dict[str, set[str]] = {box.name: set() for box in BOXES}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            own = box_of(path.relative_to(ROOT))
            found[own] |= {box_of(file) for file in _imported(path)} - {own}
    return found


def box_of(file: Path) -> str:
    """The box that a file stands in: its own, or that of the nearest folder which has one."""
    names = {box.name for box in BOXES}
    if file.parent.name == "server":
        return str(file) if str(file) in names else "server/*.py"
    for folder in file.parents:
        if str(folder) in names:
            return str(folder)
    raise LookupError(f"{file} stands in no box of docs/draw.py")


def _imported(path: Path) -> Iterator[Path]:
    """The files of ours that a file imports, below the root."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("whipstaff."):
                yield _file(name.split(".")[1:])


def _file(parts: list[str]) -> Path:
    """The file of a module, or of the module that has this name in it."""
    path = Path(*parts)
    for module in (path, path.parent):
        for file in (module.with_suffix(".py"), module / "__init__.py"):
            if (ROOT / file).exists():
                return file
    raise LookupError(f"no file has {'.'.join(parts)}")


def _lanes() -> Iterator[str]:
    rows = max(box.row for box in BOXES) + 1
    starts = [*LANES, rows]
    for index, (row, words) in enumerate(LANES.items()):
        top, height = TOP + ROW * row - 26, ROW * (starts[index + 1] - row) - 6
        fill = "#f5f7fa" if index % 2 == 0 else "#e8eef5"
        yield f'<rect x="8" y="{top}" width="{WIDTH - 16}" height="{height}" rx="6" fill="{fill}"/>'
        yield f'<text class="lane" x="20" y="{top + 17}">{escape(words)}</text>'


def _box(box: Box) -> Iterator[str]:
    x, y = _corner(box)
    yield f'<rect class="box" x="{x}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="5"/>'
    yield f'<text class="name" x="{x + 10}" y="{y + 20}">{escape(box.name)}</text>'
    for number, line in enumerate(textwrap.wrap(words_of(box.name), 35)[:3]):
        yield f'<text x="{x + 10}" y="{y + 38 + 15 * number}">{escape(line)}</text>'


def words_of(name: str) -> str:
    """What a box holds: by its own words here, or by the first sentence of the folder's docstring."""
    if name in OWN_WORDS:
        return OWN_WORDS[name]
    said = ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text())) or ""
    return said.partition("\n\n")[0].replace("\n", " ").removesuffix(".")


def _corner(box: Box) -> tuple[int, int]:
    return LEFT + round((BOX + GAP) * box.column), TOP + ROW * box.row


def _arrows(places: Mapping[str, Box], found: Mapping[str, set[str]]) -> Iterator[str]:
    ranks = {box.name: rank for rank, box in enumerate(BOXES)}
    down = {name: {other for other in others if ranks[other] > ranks[name]} for name, others in found.items()}
    for name, others in found.items():
        for other in sorted(others, key=ranks.__getitem__):
            if other in down[name]:
                if not any(_leads(down, between, other) for between in down[name] - {other}):
                    yield _arrow(places[name], places[other], "down")
            elif not name.startswith(other + "/"):  # a folder below another may know what that holds
                yield _arrow(places[name], places[other], "up")


def _leads(down: Mapping[str, set[str]], start: str, end: str) -> bool:
    return start == end or any(_leads(down, step, end) for step in down[start])


def _arrow(start: Box, end: Box, kind: str) -> str:
    """From the middle of a side to that of another: sideways within a row, else by way of bottom and top."""
    (x1, y1), (x2, y2) = _corner(start), _corner(end)
    if start.row == end.row:
        x1, x2 = (x1 + BOX, x2) if x1 < x2 else (x1, x2 + BOX)
        path = f"M{x1},{y1 + HEIGHT // 2} L{x2},{y2 + HEIGHT // 2}"
    else:
        x1, x2 = x1 + BOX // 2, x2 + BOX // 2
        y1, y2 = (y1 + HEIGHT, y2) if y1 < y2 else (y1, y2 + HEIGHT)
        bend = (y2 - y1) // 2
        path = f"M{x1},{y1} C{x1},{y1 + bend} {x2},{y2 - bend} {x2},{y2}"
    return f'<path class="{kind}" d="{path}" marker-end="url(#end-{kind})"/>'


if __name__ == "__main__":
    main()
