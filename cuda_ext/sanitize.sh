#!/bin/sh
# Builds the CPU operators, and the CUDA operators for a CPU, with the address and undefined-behaviour sanitizers and runs
# the kernel tests on them. PYTHON chooses the interpreter (default: python3); arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
export PYTHON="${PYTHON:-python3}"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

flags="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
sh cuda_ext/compile.sh cpu "$folder/_cpu.so" $flags
sh cuda_ext/compile.sh cuda_on_cpu "$folder/cuda_on_cpu.so" $flags

# The CUDA kernels run what is made at random and what was worked by hand: sanitized fibers are slow.
# Operators under torch.compile and in other processes run the same loops: the compiler need not be sanitized.
export WHIPSTAFF_CUDA_EXT_FOLDER="$folder" WHIPSTAFF_CUDA_ON_CPU="$folder/cuda_on_cpu.so" OMP_NUM_THREADS=2
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
    "$PYTHON" -m pytest -q -p no:cacheprovider tests/cuda_ext -m 'not gpu' \
    --ignore tests/cuda_ext/test_libraries.py --ignore tests/cuda_ext/test_torch.py \
    -k 'not cuda_on_cpu or any or hand_worked' "$@"
