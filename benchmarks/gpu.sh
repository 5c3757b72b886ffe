#!/usr/bin/env bash
# All that is to be measured on a machine with a GPU, in under eight minutes:
#   benchmarks/gpu.sh [--quick]
# Environment: DEVICE (default cuda), OUT (folder for the results), TOME_CHECKOUT (the authors' ToMe).
# With DEVICE=cpu and --quick it shows that every command runs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-benchmarks/results/gpu}
checkout=(${TOME_CHECKOUT:+--tome-checkout "$TOME_CHECKOUT"})

# measure FOLDER BENCHMARK OPTIONS...: runs of one benchmark would replace each other's files.
measure() {
    "$python" -m benchmarks "$2" --device "${DEVICE:-cuda}" --out "$out/$1" "${quick[@]}" "${@:3}"
}
quick=("$@")

# Are the kernels right? They run on the GPU where there is one, interpreted elsewhere.
"$python" -m pytest -q tests/test_kernels.py tests/test_tokens.py

# Eager: one image, and batches, in both half precisions, beside plain timm.
measure eager inference --methods tome --costs 0.75,0.6 --batch 1,64,256 --dtype bf16,fp16 \
    --mode eager --repeats 7
# Optimised: what td.optimize keeps of the fused kernels. CUDA graphs come with compiling only.
measure optimised inference --methods tome --costs 0.75,0.6 --batch 1,64 --dtype bf16 \
    --mode optimised --repeats 7
measure peers peers "${checkout[@]}" --r 8 --batch 64 --dtype bf16 --mode eager,compiled --repeats 7
measure training training --methods linear,adaptformer,sparse_tuning_evit,full --batch 64 \
    --dtype bf16 --repeats 5
