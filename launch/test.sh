#!/usr/bin/env bash
# Installs the project, checks its style and runs its tests.
set -euo pipefail
# shellcheck source=launch/setup_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_venv.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/test.sh [--parity] [--slow] [-- PYTEST_ARGUMENT ...]

Installs rae_jax[demo,dev] in .venv, then runs ruff and pytest, on up to four cores.
  --parity   also the tests against torch, transformers and diffusers; installs them
             (8 GB of disk; less where pip finds a CPU build of torch, for example
             with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu)
  --slow     also the tests that take more than about 20 seconds each; and all tests
             with programs compiled as for a user, which takes twice the time
TEXT
}

extras=demo,dev
gigabytes=3
parity=""
slow=" and not slow"
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit
      ;;
    --parity)
      extras=demo,dev,parity
      gigabytes=8
      parity=1
      ;;
    --slow)
      slow=""
      export JAX_DISABLE_MOST_OPTIMIZATIONS=0
      ;;
    --)
      shift
      break
      ;;
    *)
      usage >&2
      die "unknown argument $1"
      ;;
  esac
  shift
done

setup_venv "$extras" "$gigabytes"
cd "$ROOT"
"$VENV/bin/python" -m ruff check . || die "ruff check failed (see above)."
"$VENV/bin/python" -m ruff format --check . ||
  die "ruff format --check failed; \`ruff format\` mends it."

no_tests=5
status=$no_tests
# Runs the tests with the given markers; `status` becomes that of the first failure.
run_tests() {
  local code=0
  "$VENV/bin/python" -m pytest --numprocesses=logical --maxprocesses=4 \
    --dist=worksteal --durations=15 -m "$@" || code=$?
  if ((code != no_tests && (status == no_tests || status == 0))); then
    status=$code
  fi
}
run_tests "not parity$slow" "$@"
if [[ $parity ]]; then
  # Compiled as for a user: they are the comparison with other code.
  export JAX_DISABLE_MOST_OPTIMIZATIONS=0
  run_tests "parity$slow" "$@"
fi
exit "$status"
