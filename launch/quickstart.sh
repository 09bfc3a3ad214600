#!/usr/bin/env bash
# Installs the project and trains a small RAE from end to end.
set -euo pipefail
# shellcheck source=launch/setup_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_venv.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/quickstart.sh [--workdir DIR] [ARGUMENT ...]

Installs rae_jax[demo] in .venv (needs Python 3.11 or newer, 3 GB of disk and, the
first time, access to PyPI), then runs `rae-jax quickstart` with these arguments.
Results go to DIR, by default runs/quickstart in the clone's root.
TEXT
}

workdir_given=no
for argument in "$@"; do
  case $argument in
    -h | --help)
      usage
      exit
      ;;
    --workdir | --workdir=*) workdir_given=yes ;;
  esac
done
[[ $workdir_given == yes ]] || set -- --workdir "$ROOT/runs/quickstart" "$@"

setup_venv demo
exec "$VENV/bin/rae-jax" quickstart "$@"
