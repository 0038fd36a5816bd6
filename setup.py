"""Builds the two kernel libraries: `_cpu`, and `_cuda` wherever nvcc is found. WHIPSTAFF_BUILD_CPU=0 or
WHIPSTAFF_BUILD_CUDA=0 leaves one out."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.editable_wheel import editable_wheel
from torch.utils import cpp_extension

CSRC = Path("cuda_ext/csrc")
HEADERS = [str(path) for pattern in ("*.h", "*.cuh") for path in sorted(CSRC.glob(pattern))]
# torch's stable ABI of 2.11, and glibc's of 2.28: one binary serves every later one.
ABI = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-include", str((CSRC / "old_glibc.h").resolve())]
# Without contraction a product is rounded before it is added, on every processor, as in torch.
CPU_FLAGS = [
    "-O3",
    "-g0",
    "-fopenmp-simd",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]
# Where the toolchain links the C++ library statically, its symbols stay inside: torch's copy beside it would otherwise
# share the half of them, and a refusal's message, which formats numbers, crash.
LINK_FLAGS = ["-Wl,--exclude-libs,libstdc++.a"]
EDITABLE = Path("build/editable")
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"


def find_cuda() -> str | None:
    """The CUDA toolkit's folder; nvcc itself is asked, since the one on PATH may be a wrapper script."""
    if os.environ.get("WHIPSTAFF_BUILD_CUDA", "1") == "0":
        return None
    home = os.environ.get("CUDA_HOME") or cpp_extension.CUDA_HOME
    if home or not shutil.which("nvcc"):
        return home
    plan = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    return os.path.realpath(top.group(1)) if top else None


def library(name: str, suffix: str, **options: Any) -> Extension:
    sources = [str(path) for path in sorted(CSRC.glob(f"*{suffix}"))]
    return cpp_extension.CppExtension(
        f"whipstaff.cuda_ext.{name}",
        sources,
        depends=HEADERS,
        py_limited_api=True,
        extra_link_args=LINK_FLAGS,
        **options,
    )


def libraries() -> list[Extension]:
    found: list[Extension] = []
    if os.environ.get("WHIPSTAFF_BUILD_CPU", "1") != "0":
        found.append(library("_cpu", ".cpp", extra_compile_args=[*CPU_FLAGS, *ABI]))
    cuda = find_cuda()
    if cuda:
        cpp_extension.CUDA_HOME = cuda  # a CPU build of torch leaves it unset
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        found.append(
            library(
                "_cuda",
                ".cu",
                include_dirs=[f"{cuda}/include"],
                library_dirs=[f"{cuda}/lib64"],
                libraries=["cudart"],
                extra_compile_args={"cxx": ["-O3", "-DUSE_CUDA", *ABI], "nvcc": ["-O3", "-DUSE_CUDA", *ABI]},
            )
        )
    return found


def link_packages(folders: dict[str, str]) -> None:
    """Fill EDITABLE with links to the packages' folders, under the names that they are imported by.

    The parent package looks for them at the checkout's root. So a module's `__file__`, in tracebacks, debuggers and
    coverage, is the file itself and not the path through the link.
    """
    shutil.rmtree(EDITABLE, ignore_errors=True)
    for package, folder in folders.items():
        link = EDITABLE.joinpath(*package.split("."))
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(folder, link.parent))
    init = EDITABLE / "whipstaff" / "__init__.py"
    init.write_text(f"from pathlib import Path\n\n__path__ = [str(Path(__file__).parents[{len(init.parts) - 1}])]\n")


class LinkedEditableWheel(editable_wheel):
    """An editable install that is one line in a .pth file. Type checkers and editors follow that; the import hook that
    setuptools would write for folders that are not named like their packages, they do not."""

    def finalize_options(self) -> None:
        link_packages(self.distribution.package_dir)
        self.distribution.package_dir = {"": str(EDITABLE)}
        self.distribution.packages.append("whipstaff")  # whose folder's parent is that line
        super().finalize_options()


setup(
    ext_modules=libraries(),
    cmdclass={"build_ext": cpp_extension.BuildExtension, "editable_wheel": LinkedEditableWheel},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
