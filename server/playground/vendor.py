"""Rewrite `static/vendor/` from npm, in the versions and with the hashes of package-lock.json; their licences, too.

    .venv/bin/python -m whipstaff.server.playground.vendor

The page uses the files as they are in the packages but for two things: browsers find no module by a bare name, and
uPlot's small file is a script that wants to be a module.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
VENDOR = HERE / "static" / "vendor"
LOCK = ("package.json", "package-lock.json")
FILES = {  # ours: theirs
    "preact.js": "preact/dist/preact.mjs",
    "hooks.js": "preact/hooks/dist/hooks.mjs",
    "htm.js": "htm/dist/htm.module.js",
    "uplot.js": "uplot/dist/uPlot.iife.min.js",
    "uplot.css": "uplot/dist/uPlot.min.css",
}


def vendored(packages: Path) -> dict[str, str]:
    """The files of `static/vendor/`, made of a folder of unpacked packages."""
    made = {name: _without_map((packages / path).read_text()) for name, path in FILES.items()}
    made["hooks.js"] = made["hooks.js"].replace('from"preact"', 'from"./preact.js"')
    made["uplot.js"] += "export default uPlot;\n"
    for name in sorted({path.partition("/")[0] for path in FILES.values()}):
        made[f"{name}.LICENSE"] = (packages / name / "LICENSE").read_text()
    return made


def _without_map(text: str) -> str:
    lines = [line for line in text.splitlines() if not line.startswith("//# sourceMappingURL=")]
    return "\n".join(lines).rstrip() + "\n"


def install(folder: Path) -> Path:
    """Unpack what the lock names below a folder, running none of its scripts. Raises: CalledProcessError."""
    for name in LOCK:
        shutil.copy(HERE / name, folder)
    subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, check=True, timeout=300)
    return folder / "node_modules"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = vendored(install(Path(folder)))
    shutil.rmtree(VENDOR, ignore_errors=True)
    VENDOR.mkdir()
    for name, text in made.items():
        (VENDOR / name).write_text(text)


if __name__ == "__main__":
    main()
