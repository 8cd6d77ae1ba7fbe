#!/usr/bin/env bash
# Everything that needs a GPU, side by side: the tests marked gpu, the fuzz at full size, and
# compute-sanitizer, spread over all visible GPUs. Prints a line per part and what failed; logs go to
# a folder. With ALL=1 the tests that need no GPU run as well, which takes far longer.
#
#   scripts/gpu_checks.sh [FOLDER]        PYTHON=python3, LIMIT=300 (seconds per part), ALL=0
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
logs=${1:-gpu-checks}
python=${PYTHON:-python3}
limit=${LIMIT:-300}
mkdir -p "$logs"
for file in tests/gpu/test_*.py; do
  grep -qF "$file" "${BASH_SOURCE[0]}" || { echo "no part runs $file" >&2 && exit 1; }
done
visible=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}
IFS=, read -ra gpus <<<"$visible"
next=0
cores=$(nproc) # before OMP_NUM_THREADS, which nproc answers with
# One thread per process, and few compilers: there are more processes than cores already.
export PYTHONPATH=. PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=4
xdist=no
"$python" -c "import xdist" 2>/dev/null && xdist=yes || echo "without pytest-xdist it takes longer"

part() { # NAME COMMAND...: prints its exit status and its last line
  local name=$1 status=0
  shift
  timeout "$limit" "$@" >"$logs/$name.log" 2>&1 || status=$?
  echo "$status $name: $(grep -v '^$' "$logs/$name.log" | tail -n 1 | cut -c1-150)"
  echo "$status" >"$logs/$name.status"
}
side_by_side() {
  local gpu=${gpus[next++ % ${#gpus[@]}]} # not in the next line, which counts in a subshell
  CUDA_VISIBLE_DEVICES=$gpu part "$@" &
}
pytest=("$python" -m pytest -q -rsfE --durations=3)
tests() { # NAME WORKERS ARGUMENTS...: as many processes of 64 cores
  local name=$1 workers=$(($2 * cores / 64)) spread=()
  shift 2
  [ $xdist = yes ] && [ $workers -gt 1 ] && spread=(-n "$workers" --dist worksteal)
  side_by_side "$name" "${pytest[@]}" "${spread[@]}" "$@"
}
tests_alone() { local name=$1 && shift && part "$name" "${pytest[@]}" "$@"; }

rm -f "$logs"/*.status
"$python" -m dwswap build || exit 1
# The longest first.
if [ "${ALL:-0}" = 1 ]; then
  # Whole models run on the CPU here, where one thread makes them slow.
  OMP_NUM_THREADS=2 tests no-gpu 16 tests -m "not gpu"
fi
# To compile a model takes minutes.
exported=$(PYTHONPATH=.:tests "$python" -c "from export_models import MODELS; print(*MODELS)") || exit 1
for model in $exported; do
  OMP_NUM_THREADS=2 tests "gpu-export-$model" 1 tests/gpu/test_gpu_export.py -k "library_alone and $model"
done
OMP_NUM_THREADS=2 tests gpu-export 4 tests/gpu/test_gpu_export.py -k "not library_alone"
tests others 1 -m gpu tests --ignore-glob "tests/gpu" --ignore-glob "tests/test_operator*"
OMP_NUM_THREADS=2 tests gpu-composition 4 tests/gpu/test_gpu_composition.py
OMP_NUM_THREADS=2 tests models 4 tests/gpu/test_gpu_models.py
for tool in memcheck initcheck racecheck; do
  options=()
  [ "$tool" = initcheck ] && options=(--no-bulk-stores)
  if command -v compute-sanitizer >/dev/null; then
    side_by_side "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" scripts/sanitize.py "${options[@]}"
  else
    echo "compute-sanitizer is not on PATH: $tool was not run" && echo 127 >"$logs/sanitizer-$tool.status"
  fi
done
for dtype in float32 float16 bfloat16 float64; do
  chosen=$dtype
  [ "$dtype" = float16 ] && chosen="float16 and not bfloat16"
  for what in forward gradients; do
    tests "fuzz-$dtype-$what" 3 tests/gpu/test_fuzz.py -k "$chosen and $what"
  done
  tests "kernels-$dtype" 1 tests/gpu/test_kernels.py -k "$chosen"
  tests "gradients-$dtype" 1 tests/gpu/test_gradient_kernels.py -k "$chosen"
done
tests batch-norm 1 tests/gpu/test_batch_norm_kernels.py
tests channel-scale 1 tests/gpu/test_channel_scale_kernels.py
tests small-kernels 1 tests/gpu/test_classifier_kernels.py tests/gpu/test_excitation_kernels.py tests/gpu/test_interleave_kernels.py \
  tests/gpu/test_mean_kernels.py tests/gpu/test_norm_kernels.py tests/gpu/test_separable_kernels.py \
  tests/gpu/test_stem_kernels.py
tests fuzz-other 1 tests/gpu/test_fuzz.py -k "not forward and not gradients"
tests kernels-other 1 tests/gpu/test_kernels.py -k "not float32 and not float16 and not float64"
tests pointwise 1 tests/gpu/test_gpu_pointwise.py tests/gpu/test_gpu_pointwise_operators.py
tests inner-graphs 1 tests/gpu/test_gpu_inner_graphs.py
tests reliability 1 tests/gpu/test_reliability.py
tests training 1 tests/gpu/test_training.py
tests operator 1 -m gpu tests/test_operator.py tests/test_operator_autograd.py
tests registration 1 -m gpu tests/test_operator_registration.py tests/test_operator_errors.py
tests selection 1 tests/gpu/test_gpu_selection.py
if [ ${#gpus[@]} -gt 1 ]; then
  several=(tests/gpu/test_reliability.py tests/test_composition.py tests/test_side_by_side.py)
  several+=(tests/gpu/test_gpu_pointwise_operators.py tests/test_examples_training.py -m gpu -k "two_ or not_the_current")
  part several-gpus "${pytest[@]}" "${several[@]}" & # with all of them visible
fi
wait
# These compare times, and the first has a test of two GPUs.
tests_alone cuda-graph tests/gpu/test_gpu_cuda_graph.py
tests_alone bench-models tests/gpu/test_gpu_bench_models.py tests/gpu/test_gpu_bench_training.py \
  tests/test_bench_families.py
tests_alone timing tests/gpu/test_timing.py

grep -hE '^(FAILED|ERROR)' "$logs"/*.log | cut -c1-200
grep -hE '^SKIPPED' "$logs"/*.log | sort -u | cut -c1-200
failed=$(grep -LxE '0|5' "$logs"/*.status | wc -l) # 5: no test was selected
echo "$failed parts failed; logs in $logs"
[ "$failed" = 0 ]
