#!/usr/bin/env bash
# What a machine with a GPU is asked, in under nine minutes: the GPU tests, every kernel against its definition, tuned
# launches, times on other values, lrm27 as a device profile, and our kernels against what they have to beat. Everything
# goes to OUT (default: gpu-results); the ends of the logs come last, the table of our kernels at the very end.
#
#   benchmarks/gpu.sh [OUT]      PYTHON=... names the interpreter that has torch; wheels/*.whl are installed first
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-gpu-results}}
python=${PYTHON:-python3}
mkdir -p "$out"

"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else
    f"{sys.executable} with torch {torch.__version__} sees no CUDA device: benchmarks/gpu.sh measures one. Set PYTHON "
    "to an interpreter whose torch does.")' || exit 2
if compgen -G "wheels/*.whl" > /dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps wheels/*.whl || exit 2
fi

step() { # seconds, name, command: runs it, keeps its log, goes on whatever came of it
    local limit=$1 name=$2
    shift 2
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    echo "$name: exit code $?" | tee -a "$out/steps.log"
}

export LOKA_TUNING="$out/tuning.json" PYTHONUNBUFFERED=1
step 20 environment "$python" -m loka env --format json
step 150 tests "$python" -m pytest -q -m gpu -n 4 --dist worksteal tests
step 60 verify "$python" -m loka bench --suite lrm-small --verify
step 45 tune "$python" -m loka bench --suite lrm-small --tune --budget 35
step 40 values "$python" -m loka bench --suite lrm-small --compare-values normal,zeros --budget 25
step 130 lrm27 "$python" -m loka bench --suite lrm27 --budget 110 --export "$out/profile.json"
step 75 kernels "$python" -m benchmarks.gpu_kernels --budget 45 --profile "$out/profile.json"
cp benchmarks/results/*gpu_kernels.json "$out" 2> /dev/null

tail -n 4 "$out/tests.log"
tail -n 6 "$out/verify.log"
tail -n 8 "$out/tune.log"
tail -n 60 "$out/lrm27.log"
tail -n 36 "$out/kernels.log"
cat "$out/steps.log"
