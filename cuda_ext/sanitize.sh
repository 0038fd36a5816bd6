#!/bin/sh
# Builds the CPU library with the address and undefined-behaviour sanitizers and runs the kernel tests on it.
# PYTHON chooses the interpreter (default: python3); arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
printf '%s\n' cuda_ext/csrc/*.cpp | xargs -P "${MAX_JOBS:-2}" -I{} sh -c '
    g++ -c {} -o "$0/$(basename {}).o" -std=c++20 -O1 -g -fPIC -fopenmp-simd -ffp-contract=off -fno-omit-frame-pointer \
        -fsanitize=address,undefined -fno-sanitize-recover=undefined \
        -DTORCH_TARGET_VERSION=0x020b000000000000 -isystem "$1/include"' "$folder" "$torch"
g++ -shared -fsanitize=address,undefined "$folder"/*.o -o "$folder/_cpu.so" -L"$torch/lib" -ltorch -ltorch_cpu -lc10

# Operators under torch.compile and in other processes run the same loops: the compiler need not be sanitized.
export WHIPSTAFF_CUDA_EXT_FOLDER="$folder" OMP_NUM_THREADS=2
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
    "$python" -m pytest -q -p no:cacheprovider tests/cuda_ext -m 'not gpu' \
    --deselect tests/cuda_ext/test_libraries.py -k 'not torch_compile and not registration' "$@"
