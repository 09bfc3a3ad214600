#!/usr/bin/env bash
# Installs the project, checks its style and runs its tests.
set -euo pipefail
# shellcheck source=launch/setup_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_venv.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/test.sh [--parity] [--slow] [-- PYTEST_ARGUMENT ...]

Installs rae_jax[demo,dev] in .venv, then runs ruff and pytest. The last line counts
the tests that were deselected.
  --parity   also the tests against torch, transformers and diffusers; installs them
             (8 GB of disk; less where pip finds a CPU build of torch, for example
             with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu)
  --slow     also the tests that take more than about 20 seconds each
TEXT
}

extras=demo,dev
gigabytes=3
parity="not parity"
slow="not slow"
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit
      ;;
    --parity)
      extras=demo,dev,parity
      gigabytes=8
      parity=""
      ;;
    --slow) slow="" ;;
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
exec "$VENV/bin/python" -m pytest --durations=15 \
  -m "$parity${parity:+${slow:+ and }}$slow" "$@"
