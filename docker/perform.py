"""Perform a Dockerfile where there is no Docker: its steps in a folder that is a root, then the server from there.

    python docker/perform.py docker/Dockerfile --base DEBIAN --into FOLDER [--bind PATH ...]     # as root
    python docker/perform.py docker/Dockerfile --into FOLDER --serve [WORD ...]

DEBIAN stands for the image that `FROM` names: a root with python3 (3.11 to 3.13) and its headers, such as
`debootstrap --include=ca-certificates,python3,python3-venv,python3-dev bookworm DEBIAN` makes. `--bind` shows
paths of this machine inside, where apt and pip have their settings. Serving, the root is read-only but for the
volumes and /tmp, nothing of this machine is there but some devices, and USER is who serves. It is a proof of the
file's steps and of what the image holds, not of Docker.
"""

import argparse
import fnmatch
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dockerfile_parse import DockerfileParser

CONTEXT = Path(__file__).resolve().parents[1]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CONFIG = "image.json"  # beside the stages' roots: what a registry would keep of the last one
IGNORED = ("EXPOSE", "HEALTHCHECK", "STOPSIGNAL", "COMMENT")  # nothing to do for them here


class Step(NamedTuple):
    """One instruction, its variables not yet filled in."""

    name: str
    value: str


class Stage:
    """One stage: a root that steps change, and what they set for those after them."""

    def __init__(self, root: Path, arguments: Mapping[str, str]) -> None:
        self.root, self.given = root, dict(arguments)
        self.arguments: dict[str, str] = {}
        self.environment = {"PATH": PATH}
        self.workdir, self.user, self.volumes = "/", "0:0", list[str]()
        self.entrypoint: list[str] = []
        self.command: list[str] = []

    def variables(self) -> dict[str, str]:
        return self.arguments | self.environment

    def place(self, path: str) -> Path:
        """A path of the stage as one of this machine."""
        return self.root / os.path.join(self.workdir, path).lstrip("/")


def steps_of(dockerfile: Path) -> list[Step]:
    parser = DockerfileParser(fileobj=io.BytesIO(dockerfile.read_bytes()))
    return [Step(one["instruction"], one["value"]) for one in parser.structure]


def filled(text: str, variables: Mapping[str, str]) -> str:
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: variables.get(found[1] or found[2], ""), text)


def words(value: str) -> list[str]:
    """Of JSON form or of shell form."""
    return list(json.loads(value)) if value.startswith("[") else shlex.split(value)


# ---- steps


def perform(dockerfile: Path, base: Path, into: Path, binds: Sequence[str], given: Mapping[str, str]) -> Stage:
    """All stages; the last one."""
    before: dict[str, str] = {}  # arguments ahead of the first FROM
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for step in steps_of(dockerfile):
        print(f"== {step.name} {step.value}", flush=True)
        if step.name == "FROM":
            image, _, name = filled(step.value, {**before, **given}).partition(" AS ")
            stage = Stage(into / (name or "final"), given)
            stages[name or "final"] = stage
            print(f"   {base} stands for {image}", flush=True)
            subprocess.run(["cp", "-a", f"{base}/.", stage.root], check=True)
        elif stage is None:
            name, _, default = step.value.partition("=")
            before[name] = default
        else:
            take(step, stage, stages, binds)
    assert stage is not None, "there is no FROM"
    kept = ("environment", "workdir", "user", "volumes", "entrypoint", "command")
    (into / CONFIG).write_text(json.dumps({name: getattr(stage, name) for name in kept}))
    return stage


def take(step: Step, stage: Stage, stages: Mapping[str, Stage], binds: Sequence[str]) -> None:
    value = filled(step.value, stage.variables()) if step.name != "RUN" else step.value
    if step.name == "ARG":
        name, _, default = value.partition("=")
        if (said := stage.given.get(name, default)) or "=" in value:
            stage.arguments[name] = said
    elif step.name == "ENV":
        stage.environment |= dict(word.split("=", 1) for word in shlex.split(value))
    elif step.name == "WORKDIR":
        stage.workdir = os.path.join(stage.workdir, value)
        stage.place("").mkdir(parents=True, exist_ok=True)
    elif step.name == "COPY":
        copy(words(value), stage, stages)
    elif step.name == "RUN":
        run(stage, step.value, binds)
    elif step.name == "USER":
        stage.user = value
    elif step.name == "VOLUME":
        stage.volumes += words(value)
    elif step.name in ("ENTRYPOINT", "CMD"):
        setattr(stage, {"CMD": "command"}.get(step.name, "entrypoint"), words(value))
    elif step.name not in IGNORED:
        raise NotImplementedError(f"{step.name}: write here what Docker does for it")


def run(stage: Stage, command: str, binds: Sequence[str]) -> None:
    """As root, with this machine's network."""
    mounts = "".join(f"{mount(path, stage.root)} && " for path in ("/proc", "/dev", *binds))
    inside = shlex.join(["env", "-i", *(f"{k}={v}" for k, v in stage.variables().items()), "/bin/sh", "-ec", command])
    inside = shlex.join(["/bin/sh", "-c", f"cd {shlex.quote(stage.workdir)} && exec {inside}"])
    script = f"{mounts} exec chroot {shlex.quote(str(stage.root))} {inside}"
    subprocess.run(["unshare", "--mount", "--fork", "--pid", "--kill-child", "/bin/sh", "-ec", script], check=True)


def mount(path: str, root: Path) -> str:
    """A shell command that shows a path of this machine at the same place inside."""
    there = root / path.lstrip("/")
    if Path(path).is_dir():
        there.mkdir(parents=True, exist_ok=True)
    else:
        there.parent.mkdir(parents=True, exist_ok=True)
        there.touch()
    if path == "/proc":
        return f"mount -t proc proc {shlex.quote(str(there))}"
    return f"mount --rbind {shlex.quote(path)} {shlex.quote(str(there))}"


def copy(said: list[str], stage: Stage, stages: Mapping[str, Stage]) -> None:
    options = [word for word in said if word.startswith("--")]
    *sources, target = [word for word in said if not word.startswith("--")]
    there = stage.place(target)
    for option in options:
        name, _, value = option.partition("=")
        if name != "--from":
            raise NotImplementedError(f"COPY {name}")
        (source,) = sources
        there.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", f"{stages[value].root / source.lstrip('/')}/.", there], check=True)
        return
    for source in sources:
        for path in sorted(CONTEXT.glob(source)) if source != "." else [CONTEXT]:
            for file in files(path):
                relative = file.relative_to(path) if path.is_dir() else Path(path.name)
                is_name = not path.is_dir() and not target.endswith(("/", "."))
                to = there if is_name else there / relative
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, to)


def files(path: Path) -> Iterator[Path]:
    """Those of the context that .dockerignore leaves."""
    patterns = (CONTEXT / ".dockerignore").read_text().split()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        parts = file.relative_to(CONTEXT).parts
        heads = ["/".join(parts[: number + 1]) for number in range(len(parts))]
        if file.is_file() and not any(_is_ignored(head, pattern) for head in heads for pattern in patterns):
            yield file


def _is_ignored(path: str, pattern: str) -> bool:
    return fnmatch.fnmatch(f"/{path}", pattern.replace("**/", "*/")) if "**/" in pattern else path == pattern


# ---- the server


def serve(into: Path, command: Sequence[str]) -> int:
    """Like `docker run --read-only --tmpfs /tmp --user USER`, with the network of this machine; its exit status."""
    image = json.loads((into / CONFIG).read_text())
    root = into / "final"
    quoted = shlex.quote(str(root))
    lines = [f"mount --bind {quoted} {quoted}", f"mount -t proc proc {quoted}/proc"]
    lines += [f"mount --bind /sys {quoted}/sys", f"mount -o remount,ro,bind {quoted}/sys"]  # of the processors
    lines += [f"mount --bind {quoted}{path} {quoted}{path}" for path in image["volumes"]]
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {quoted}/dev", f"mkdir {quoted}/dev/shm"]
    for device in ("null", "zero", "random", "urandom"):
        lines.append(f"touch {quoted}/dev/{device} && mount --bind /dev/{device} {quoted}/dev/{device}")
    lines += [f"mount -t tmpfs tmpfs {quoted}{path}" for path in ("/dev/shm", "/tmp")]
    lines.append(f"mount -o remount,ro,bind {quoted}")
    words_ = [*image["entrypoint"], *(command or image["command"])]
    settings = [f"{name}={value}" for name, value in image["environment"].items()]
    inside = f"cd {shlex.quote(image['workdir'])} && exec {shlex.join(['env', '-i', *settings, *words_])}"
    lines.append(f"exec chroot --userspec={image['user']} --groups= {quoted} /bin/sh -c {shlex.quote(inside)}")
    script = " && ".join(lines)
    return subprocess.call(["unshare", "--mount", "--fork", "--pid", "--kill-child", "/bin/sh", "-ec", script])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--into", type=Path, required=True, help="where the stages' roots go")
    parser.add_argument("--base", type=Path, help="the root that stands for the image")
    parser.add_argument("--bind", action="append", default=[], metavar="PATH", help="shown to RUN inside; repeatable")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, metavar="WORD", help="start it (with another CMD)")
    args = parser.parse_args()
    if args.serve is not None:
        sys.exit(serve(args.into.resolve(), args.serve))
    if args.base is None or args.into.exists():
        parser.error("--base is needed, and --into must not be there yet")
    args.into.mkdir(parents=True)
    given = dict(word.split("=", 1) for word in args.build_arg)
    perform(args.dockerfile, args.base.resolve(), args.into.resolve(), args.bind, given)


if __name__ == "__main__":
    main()
