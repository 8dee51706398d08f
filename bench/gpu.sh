#!/usr/bin/env bash
# Everything that needs a GPU, in less than ten minutes: bench/gpu.sh [part ...]
#
#   first        rates, correctness at a real vocabulary, the goals' shapes beside predictions
#   suites       the kernels' tests on the Triton backend
#   experiments  measurements that tell why something is not as fast as predicted
#   tune         proposes settings of the kernels
#   kernels      every operation against every peer at full shapes, ours at the goals first
#   step         scoring and updates of a CoDistill step and of a GRPO step
#
# Without an argument all parts but `step` run. Each part has its share of the time, and the last one
# all that is left. Results are written at once, so that a part can be cut off at any moment:
#   gpu.log, <device>-first_contact.csv, <device>-tune.csv, <device>.csv, <device>-step.csv
#
# Needs Python 3.11 or newer, torch 2.11 and triton 3.6 with a GPU; no network, no installation.
# Nothing runs in Triton's interpreter: that of triton 3.6 does not work with numpy 2.5. Settings:
#   WHEELS=folder            wheels to install: peers (cut-cross-entropy, liger-kernel, trl, ...), and
#                            for `step` pydantic, pydantic-settings and pebble with what they need;
#                            packages that are installed already are left out
#   PYTHON=python            default: .venv/bin/python if there is one, else python3
#   CODISTILL_RESULTS=folder default: $OUT if that is set, else bench/results
#   CODISTILL_COMMIT=hash    for rows measured outside a git checkout
set -u
cd "$(dirname "$0")/.."
seconds=575  # for all parts together
parts=(${*:-first suites experiments tune kernels})
for name in "${parts[@]}"; do
  case $name in
    first | suites | experiments | tune | kernels | step) ;;
    *) echo "gpu.sh: expected first, suites, experiments, tune, kernels or step, got '$name'" >&2
       exit 2 ;;
  esac
done
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 TRITON_PRINT_AUTOTUNING=0
export CODISTILL_RESULTS=${CODISTILL_RESULTS:-${OUT:-bench/results}}
log=$CODISTILL_RESULTS/gpu.log

if ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  echo "gpu.sh: must run on a machine with a GPU that torch sees, found none" >&2
  exit 2
fi
mkdir -p "$CODISTILL_RESULTS"
: >"$log"

# PYTHONPATH precedes what is installed: a wheel of numpy, say, would hide the installed one.
absent_wheels() {
  "$python" - "$1" <<'END'
import importlib.metadata, pathlib, sys
for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    try:
        importlib.metadata.version(wheel.name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        print(wheel)
END
}
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  mapfile -t wheels < <(absent_wheels "$WHEELS")
  if [ ${#wheels[@]} -gt 0 ]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" "${wheels[@]}" || exit 1
  fi
  export PYTHONPATH="$PYTHONPATH:$site"
fi

absent() {  # prints those of the given modules that cannot be imported
  "$python" -c 'import sys, importlib.util as u
print(*(name for name in sys.argv[1:] if u.find_spec(name) is None))' "$@"
}

summary=()
part() {  # name, most seconds, needed modules, command, in which SECONDS_LEFT is its time
  local name=$1 most=$2 needs=$3 left=$((seconds - SECONDS)) missing from start=$SECONDS code
  shift 3
  [ "$name" = "${parts[-1]}" ] || [ "$left" -lt "$most" ] || left=$most
  missing=$(absent $needs)
  if [ -n "$missing" ]; then
    summary+=("$name: left out, not installed: $missing")
  elif [ "$left" -lt 20 ]; then
    summary+=("$name: left out, no time")
  else
    echo "== $name (at most $left s)" | tee -a "$log"
    from=$(wc -l <"$log")
    timeout --signal=INT --kill-after=10 "$left" "${@//SECONDS_LEFT/$((left - 15))}" >>"$log" 2>&1
    code=$?
    tail -n "+$((from + 1))" "$log" | tail -n 60
    summary+=("$name: exit code $code after $((SECONDS - start)) s")
    [ $code -eq 0 ] || failed=1
  fi
  echo "== ${summary[-1]}" | tee -a "$log"
}

failed=0
suites=(tests/kernels/test_{exponentials,linear_logps,linear_policy_loss,linear_reverse_kl,linear_token_loss,selective_logps}.py)
workers=$([ -n "$(absent xdist)" ] || echo "-n 8")
for name in "${parts[@]}"; do
  case $name in
    first) part first 180 "triton packaging" \
      "$python" -m bench first_contact --seconds SECONDS_LEFT ;;
    suites) part suites 150 "triton pytest" env CODISTILL_TEST_DEVICE=cuda \
      "$python" -m pytest -v --tb=short $workers -p no:cacheprovider -k "not sharded" "${suites[@]}" ;;
    experiments) part experiments 90 "triton packaging" \
      "$python" -m bench first_contact --experiments --seconds SECONDS_LEFT ;;
    tune) part tune 45 "triton" "$python" -m bench tune --seconds SECONDS_LEFT ;;
    kernels) part kernels 110 "triton pytest pytest_benchmark numpy packaging" \
      "$python" -m bench kernels --device cuda ;;
    step) part step 110 "triton numpy transformers pydantic pydantic_settings pebble" \
      "$python" -m bench step --rollouts random --steps 2 ;;
  esac
done
printf '== %s\n' "summary, log in $log" "${summary[@]}"
exit $failed
