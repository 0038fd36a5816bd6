#!/bin/sh
# Compiles csrc by hand, all sources as one, into the library named by the second argument:
#   compile.sh cpu LIBRARY [FLAG..]           the CPU operators
#   compile.sh cuda_on_cpu LIBRARY [FLAG..]   the CUDA operators with g++ (csrc/cuda_on_cpu.h)
# PYTHON chooses the interpreter whose torch is taken (default: python3).
set -eu
what=$1 library=$2
shift 2
case $what in
    cpu) suffix=cpp ;;
    cuda_on_cpu) suffix=cu && set -- -DWHIPSTAFF_CUDA_ON_CPU -fno-strict-aliasing -Wno-unknown-pragmas "$@" ;;
    *) echo "there is no way to compile $what" >&2 && exit 2 ;;
esac
csrc=$(cd "$(dirname "$0")/csrc" && pwd)
torch=$("${PYTHON:-python3}" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
printf '#include "%s"\n' "$csrc"/*."$suffix" | g++ -x c++ - -shared -o "$library" \
    -std=c++20 -fPIC -fopenmp-simd -ffp-contract=off -DTORCH_TARGET_VERSION=0x020b000000000000 -isystem "$torch/include" \
    -L"$torch/lib" -ltorch -ltorch_cpu -lc10 "$@"
