#!/usr/bin/env bash
# Everything that a GPU can say about the backends triton and cuda, in one command and under 9 minutes:
#
#     bench/gpu_check.sh               results to $OUT, or bench/results
#     bench/gpu_check.sh --dry-run     this script and its Python on the CPU, tiny shapes
#
# Builds, checks and times (bench/gpu_table.py: float64, CUDA graphs, equal bits over 20 runs, the
# table), runs the tests with the interpreter off, lets compute-sanitizer watch small calls where it is
# installed, and times a run's step with NCCL in it (bench/engine_cost.py). What tells most comes
# first. A step that fails is named at the end, and the others still run. Needs no network.
# PYTHON names another interpreter than .venv's.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SECONDS=0
limit=520
export OUT=${OUT:-$PWD/bench/results}
mkdir -p "$OUT"
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
failed=()

step() {  # step NAME SECONDS COMMAND...: within the time, whose end is a failure too
  local name=$1 most=$2 left=$((limit - SECONDS))
  shift 2
  if ((most > left)); then most=$left; fi
  if ((most < 5)); then failed+=("$name (no time left)"); return; fi
  echo "== $name (at most $most s, $SECONDS s so far)"
  timeout --kill-after=5 "$most" "$@" || failed+=("$name")
}

if [[ ${1:-} == --dry-run ]]; then
  export TRITON_INTERPRET=1
  step "small calls" 120 "$python" bench/gpu_table.py --dry-run --small
  step "table" 200 "$python" bench/gpu_table.py --dry-run
else
  unset TRITON_INTERPRET
  step "build" 90 "$python" setup.py build_ext --inplace
  step "table" 240 "$python" bench/gpu_table.py --budget 200
  # The GPU's files first: a time limit would cut off others. Compiling ahead of time and the
  # interpreter need no GPU and run elsewhere. By name, for pytest takes files named with their folder
  # in the folder's order.
  files=(tests/test_triton_*.py tests/test_cuda_enqueue.py)
  for file in tests/test_*.py; do
    [[ " ${files[*]} " == *" $file "* ]] || files+=("$file")
  done
  step "tests" 150 "$python" -m pytest -q -p no:cacheprovider "${files[@]}" \
    -k "not in_interpreter and not test_tile and not gpu_check"
  if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null)
  then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck; do
      step "$tool" 40 "${sanitizer%%$'\n'*}" --tool "$tool" --error-exitcode 1 \
        "$python" bench/gpu_table.py --small
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
  else
    echo "== compute-sanitizer is not installed here: neither memcheck nor racecheck was run"
  fi
  step "engine" 40 "$python" bench/engine_cost.py --rounds 40
fi

echo "== ${SECONDS} s"
if ((${#failed[@]})); then
  printf 'gpu_check: failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "gpu_check: all steps passed; results in $OUT"
