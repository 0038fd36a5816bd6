#!/bin/sh
# Shows that every kernel has code for every architecture in the CUDA library named by the first argument, or in one
# compiled here as setup.py does, but for the device's optimizers: two thirds of the time are theirs, and they neither add
# nor drop a kernel. No GPU is needed. PYTHON chooses the interpreter (default: python3).
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
architectures=${ARCHITECTURES:-"sm_80 sm_90 sm_100"}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# nvcc's own package has no cuobjdump; Triton brings one, and so does `pip install nvidia-cuda-cuobjdump`.
cuobjdump=$(command -v cuobjdump || "$python" -c '
import pathlib, sysconfig
tools = pathlib.Path(sysconfig.get_path("purelib")).glob("*/**/bin/cuobjdump")
print(next(tools, ""))')
[ -n "$cuobjdump" ] || { echo "cuobjdump not found: pip install nvidia-cuda-cuobjdump" >&2; exit 1; }

library=${1:-}
if [ -z "$library" ]; then
    export NVCC_APPEND_FLAGS="-Xcicc -O1 -Xptxas -O1${NVCC_APPEND_FLAGS:+ $NVCC_APPEND_FLAGS}"
    WHIPSTAFF_BUILD_CPU=0 MAX_JOBS=${MAX_JOBS:-2} "$python" setup.py -q build_ext --build-lib "$folder" --build-temp "$folder/objects" \
        > "$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
    library=$(find "$folder" -name '_cuda.*so')
fi
[ -f "$library" ] || { echo "there is no CUDA library: was nvcc found?" >&2; exit 1; }

kernels=$(sed -n 's/^__global__.* \([a-z_]*_kernel\)(.*/\1/p' cuda_ext/csrc/*.cuh)
for architecture in $architectures; do
    "$cuobjdump" -res-usage -arch "$architecture" "$library" 2>&1 | sed -n 's/^ *Function \(.*\):$/\1/p' > "$folder/functions"
    for kernel in $kernels; do
        count=$(grep -c "$kernel" "$folder/functions" || true)
        [ "$count" -gt 0 ] || { echo "$kernel has no code for $architecture" >&2; exit 1; }
        printf '%-8s %-24s %3d versions\n' "$architecture" "$kernel" "$count"
    done
done
