#!/usr/bin/env bash
# Everything that a GPU can say about the backends triton and cuda, in one command and under 10 minutes:
#
#     bench/gpu_check.sh               results to $OUT, or bench/results
#     bench/gpu_check.sh --dry-run     this script and its Python on the CPU, tiny shapes
#
# First contact, each in a process of its own: softcl_cuda_check, built with bounded waits, and small
# calls of Triton. Then the tests with the interpreter off, small calls under compute-sanitizer where it
# is installed, the tables (bench/gpu_table.py: float64, CUDA graphs, equal bits over 20 runs, times),
# and a run's step with NCCL in it (bench/engine_cost.py). What a step printed is kept in $OUT/log as
# soon as it ends. One that fails is named at the end, and the others still run. Needs no network.
# PYTHON names another interpreter than .venv's.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SECONDS=0
limit=580
export OUT=${OUT:-$PWD/bench/results}
mkdir -p "$OUT/log"
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
failed=()

step() {  # step NAME SECONDS COMMAND...: within the time, whose end is a failure too
  local name=$1 most=$2 left=$((limit - SECONDS))
  shift 2
  if ((most > left)); then most=$left; fi
  if ((most < 5)); then failed+=("$name (no time left)"); return; fi
  echo "== $name (at most $most s, $SECONDS s so far)"
  timeout --kill-after=5 "$most" "$@" 2> >(tee "$OUT/log/${name// /-}.err" >&2) |
    tee "$OUT/log/${name// /-}.txt" || failed+=("$name")
}

if [[ ${1:-} == --dry-run ]]; then
  export TRITON_INTERPRET=1
  step "first contact triton" 120 "$python" bench/gpu_table.py --dry-run --small
  step "table triton" 200 "$python" bench/gpu_table.py --dry-run
else
  unset TRITON_INTERPRET
  check=build/check/softcl_cuda_check
  step "build" 100 "$python" setup.py build_ext --inplace
  step "configure the check" 30 cmake -S . -B build/check -DSOFTCL_PYTHON=OFF -DSOFTCL_BOUND_WAITS=ON
  step "build the check" 100 cmake --build build/check -t softcl_cuda_check -j
  step "first contact cuda" 20 "$check"
  step "first contact triton" 60 "$python" bench/gpu_table.py --small --backend triton
  # Compiling ahead of time and the interpreter need no GPU and run elsewhere.
  pytest=("$python" -m pytest -q -p no:cacheprovider -k "not in_interpreter and not test_tile and not gpu_check")
  step "tests of triton" 60 "${pytest[@]}" tests/test_triton_*.py
  step "tests of cuda" 20 "${pytest[@]}" tests/test_cuda_enqueue.py
  others=()
  for file in tests/test_*.py; do
    [[ $file == tests/test_triton_* || $file == tests/test_cuda_* ]] || others+=("$file")
  done
  step "other tests" 60 "${pytest[@]}" "${others[@]}"
  if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null)
  then
    sanitizer=${sanitizer%%$'\n'*}
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck; do
      step "$tool cuda" 30 "$sanitizer" --tool "$tool" --error-exitcode 1 "$check"
      step "$tool triton" 30 "$sanitizer" --tool "$tool" --error-exitcode 1 \
        "$python" bench/gpu_table.py --small --backend triton
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
  else
    echo "== compute-sanitizer is not installed here: neither memcheck nor racecheck was run"
  fi
  for backend in triton cuda; do
    step "table $backend" 110 "$python" bench/gpu_table.py --budget 90 --backend "$backend"
  done
  step "engine" 40 "$python" bench/engine_cost.py --rounds 40
fi

echo "== ${SECONDS} s"
if ((${#failed[@]})); then
  printf 'gpu_check: failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "gpu_check: all steps passed; results in $OUT"
