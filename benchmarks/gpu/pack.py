"""Packs what a machine with a GPU and no network lacks: vLLM's CUDA wheel, slimmed, and the wheels that it imports.

    .venv/bin/python benchmarks/gpu/pack.py FOLDER

FOLDER/site.tar.xz unpacks to a folder for PYTHONPATH. Of vLLM it has the Python files that a small Llama needs and the
one library that `vllm.platforms.cuda` insists on, with machine code for sm_90 alone. FlashAttention, the kernels of
mixtures of experts and of quantization stay behind, so `kit.py` asks for Triton's attention. The wheels are those of
requirements/cpu.lock, for CPython 3.12.
"""

import argparse
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
VLLM = "vllm==0.32.0"
LIBRARY = "vllm/_C_stable_libtorch.abi3.so"
PLACEHOLDER = "vllm/vllm_flash_attn/_vllm_fa2_C.py"
# What serving imports and a machine with torch, transformers, aiohttp and the like does not have.
WHEELS = [
    "annotated-types",
    "apache-tvm-ffi",
    "blake3",
    "cachetools",
    "cbor2",
    "compressed-tensors",
    "dnspython",
    "email-validator",
    "fastapi",
    "httpcore2",
    "httpx2",
    "jiter",
    "lark",
    "llguidance",
    "loguru",
    "msgspec",
    "openai",
    "oss-harmony",
    "partial-json-parser",
    "prometheus-fastapi-instrumentator",
    "pybase64",
    "pydantic",
    "pydantic_core",
    "pydantic-extra-types",
    "pydantic-settings",
    "python-dotenv",
    "python-json-logger",
    "python-multipart",
    "pyzmq",
    "setproctitle",
    "sniffio",
    "starlette",
    "truststore",
    "typing-inspection",
    "uvicorn",
    "watchfiles",
    "xgrammar",
]
LEFT_BEHIND = re.compile(
    r"vllm/(third_party/(?!pynvml|__init__|flash_attn_interface)[^/]+/|vllm_flash_attn/cute/|kernels/helion/configs/|"
    r"model_executor/layers/(fused_moe|quantization/utils)/configs/|vllm-rs$|examples/)"
)
LEFT_ENDINGS = (".so", ".hpp", ".h", ".cuh", ".inl", ".js", ".css", ".jpg", ".cu", ".png")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34, 35)] + ["manylinux2014_x86_64"]

FAT_MAGIC, FAT_HEADER, ELF = 0xBA55ED50, struct.Struct("<IHHQ"), 2
PART_HEADER, ARCHITECTURE_AT = struct.Struct("<HHIQ"), 28


def download(requirements: list[str], folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    target = ["--python-version", "3.12", "--implementation", "cp", *platforms]
    subprocess.run([*pip, *target, *requirements], check=True)


def locked(names: list[str]) -> list[str]:
    """As requirements/cpu.lock pins them."""
    lock = (ROOT / "requirements" / "cpu.lock").read_text()
    pins = dict(re.findall(r"^([^=\s#]+)==(\S+)", lock, re.MULTILINE))
    return [f"{name}=={pins[name]}" for name in names]


def parts(library: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(kind, architecture, first byte, last byte + 1) of every piece of device code in a library's fat binaries."""
    at = 0
    while (at := library.find(struct.pack("<I", FAT_MAGIC), at)) >= 0:
        _, version, header, size = FAT_HEADER.unpack_from(library, at)
        if (version, header) != (1, FAT_HEADER.size):
            at += 4
            continue
        part, at = at + header, at + header + size
        while part < at:
            kind, _, part_header, part_size = PART_HEADER.unpack_from(library, part)
            (architecture,) = struct.unpack_from("<I", library, part + ARCHITECTURE_AT)
            yield kind, architecture, part + part_header, part + part_header + part_size
            part += part_header + part_size


def for_one_architecture(library: bytes, wanted: int) -> bytes:
    """The same library with zeros for what another architecture runs, which compress to nothing."""
    slim = bytearray(library)
    for kind, architecture, start, end in list(parts(library)):
        if (kind, architecture) != (ELF, wanted):
            slim[start:end] = bytes(end - start)
    return bytes(slim)


def slim_vllm(wheel: Path, folder: Path) -> None:
    """Unpack what is needed of vLLM's wheel, and put a module where it looks for FlashAttention's library."""
    with zipfile.ZipFile(wheel) as packed:
        for name in packed.namelist():
            if name == LIBRARY:
                (folder / name).write_bytes(for_one_architecture(packed.read(name), 90))
            elif not LEFT_BEHIND.match(name) and not name.endswith(LEFT_ENDINGS):
                packed.extract(name, folder)
    (folder / PLACEHOLDER).write_text(
        '"""FlashAttention stayed behind: this is imported, and nothing of it called."""\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where site.tar.xz is to be")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        wheels, site = Path(temporary, "wheels"), Path(temporary, "site")
        download([VLLM, *locked(WHEELS)], wheels)
        (site / "vllm").mkdir(parents=True)
        for wheel in sorted(wheels.glob("*.whl")):
            if wheel.name.startswith("vllm-"):
                slim_vllm(wheel, site)
            else:
                with zipfile.ZipFile(wheel) as packed:
                    packed.extractall(site)
        shutil.rmtree(options.folder / "site", ignore_errors=True)
        options.folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(options.folder / "site.tar.xz", "w:xz", preset=6) as tar:
            tar.add(site, "site")
    print(f"{(options.folder / 'site.tar.xz').stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
