#!/usr/bin/env bash
# Everything that needs a GPU, in nine minutes: bench/gpu.sh [tests] [kernels] [tune] [step]
#
#   tests     the gpu-marked tests: every kernel suite on the Triton backend
#   kernels   every operation against every peer at full shapes   -> results/<device>.csv
#   tune      proposes rows of the Triton tile table              -> results/<device>-tune.csv
#   step      score and update of a CoDistill and of a GRPO step  -> results/<device>-step.csv
#
# All four without an argument. Needs Python 3.11, torch 2.11 and triton 3.6 with a GPU; no network,
# no installation. Set, if wanted:
#   WHEELS=folder            wheels to use beside what is installed: peers (cut-cross-entropy,
#                            liger-kernel, trl, ...) and, for `step`, pydantic, pydantic-settings and
#                            pebble with what they need
#   PYTHON=python            default: .venv/bin/python if there is one, else python3
#   CODISTILL_RESULTS=folder default: bench/results
#   CODISTILL_COMMIT=hash    for rows measured outside a git checkout
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 TRITON_PRINT_AUTOTUNING=0
results=${CODISTILL_RESULTS:-bench/results}
mkdir -p "$results"

if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$WHEELS"/*.whl || exit 1
  PYTHONPATH="$PYTHONPATH:$site"  # last: what is installed comes first
fi
if ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  echo "gpu.sh: must run on a machine with a GPU that torch sees, found none" >&2
  exit 2
fi

failed=()
part() {  # name, seconds, command: its log in results, its end printed
  local name=$1 seconds=$2 log="$results/gpu-$1.log" start=$SECONDS code
  shift 2
  echo "== $name (at most $seconds s)"
  timeout --signal=INT --kill-after=10 "$seconds" "$@" >"$log" 2>&1
  code=$?
  tail -n 25 "$log"
  echo "== $name: exit code $code after $((SECONDS - start)) s, log in $log"
  [ $code -eq 0 ] || failed+=("$name")
}

for name in ${*:-tests kernels tune step}; do
  case $name in
    tests) part tests 140 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/kernels ;;
    kernels) part kernels 220 "$python" -m bench kernels --device cuda ;;
    tune) part tune 70 "$python" -m bench tune --seconds 55 ;;
    step) part step 105 "$python" -m bench step --rollouts random --steps 2 ;;
    *) echo "gpu.sh: expected tests, kernels, tune or step, got '$name'" >&2; exit 2 ;;
  esac
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
