#!/usr/bin/env bash
# Runs a command as several processes with simulated devices, on this machine's CPU.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/simulate.sh [--dry-run] PROCESSESxDEVICES COMMAND ...

Runs COMMAND as PROCESSES processes that find each other on loopback, as the machines
of a pod or a cluster do, with DEVICES simulated CPU devices each. `rae-jax` is that of
.venv, if it is there. When one process fails, the others are ended, and its exit code
is returned; Ctrl-C and SIGTERM are passed on to all. Addresses of buckets need the
extra gcs or s3 there: bash launch/worker.sh install cpu,gcs

  bash launch/simulate.sh 2x4 rae-jax train --config configs/dit_dh.py:smoke \
    --workdir runs/simulated
  bash launch/simulate.sh 2x4 rae-jax train --config configs/dit_dh.py:smoke \
    --workdir gs://my-bucket/simulated
TEXT
}

GRACE_SECONDS=${RAE_GRACE_SECONDS:-20}

# A port that nothing listens on.
free_port() {
  local port
  for _ in 1 2 3 4 5 6 7 8 9 10; do
    port=$((20000 + RANDOM % 12000))
    (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

# Puts the words that start process $1 into LINE.
line_of() {
  LINE=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices" RAE_DISTRIBUTED=1
    "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes"
    "JAX_PROCESS_ID=$1" "${COMMAND[@]}")
}

prefix() {
  local line
  while IFS= read -r line || [[ $line ]]; do
    printf '[%s] %s\n' "$1" "$line"
  done
}

# Starts each process in a group of its own, so that what it starts ends with it.
start_all() {
  local i
  set -m
  for ((i = 0; i < processes; i++)); do
    line_of "$i"
    mkfifo "$scratch/$i"
    # Both ends are opened here: a process that is killed early may never open its own.
    exec 3<>"$scratch/$i"
    exec 4<"$scratch/$i"
    exec 5>"$scratch/$i" 3>&-
    prefix "$i" <&4 5>&- &
    printers+=($!)
    "${LINE[@]}" >&5 2>&1 </dev/null 4<&- 5>&- &
    pids+=($!)
    exec 4<&- 5>&-
  done
  set +m
}

signal_all() {
  local pid
  for pid in "${pids[@]}"; do
    kill "-$1" -- "-$pid" 2>/dev/null || true
  done
}

# Once: a second signal would end at once what is being saved.
pass_on() {
  [[ $passed ]] || signal_all "$1"
  passed=1
}

# Waits for all; `status` becomes that of the first that fails.
wait_for_all() {
  local left=$processes i code ended=() deadline=""
  while ((left)); do
    for ((i = 0; i < processes; i++)); do
      if [[ -z ${ended[i]-} ]] && ! kill -0 "${pids[i]}" 2>/dev/null; then
        code=0
        wait "${pids[i]}" || code=$?
        ended[i]=1
        left=$((left - 1))
        if ((code != 0 && status == 0)); then
          status=$code
          say "process $i ended with code $code"
          pass_on TERM
          deadline=$((SECONDS + GRACE_SECONDS))
        fi
      fi
    done
    [[ ! $deadline ]] || ((SECONDS < deadline)) || signal_all KILL
    # A signal to this script's group ends the sleep as well.
    ((left == 0)) || sleep 0.2 || true
  done
}

if [[ ${1-} == --dry-run ]]; then
  DRY_RUN=1
  shift
fi
case ${1-} in
  "" | -h | --help)
    usage
    exit
    ;;
esac
[[ $1 =~ ^([1-9][0-9]*)x([1-9][0-9]*)$ ]] ||
  die "expected PROCESSESxDEVICES such as 2x4, got '$1'; see --help."
processes=${BASH_REMATCH[1]}
devices=${BASH_REMATCH[2]}
shift
(($#)) || die "no command after ${processes}x$devices; see --help."
COMMAND=("$@")
port=$(free_port)
[[ ! -x $VENV/bin/rae-jax ]] || PATH="$VENV/bin:$PATH"
if [[ $DRY_RUN ]]; then
  for ((i = 0; i < processes; i++)); do
    line_of "$i"
    run "${LINE[@]}"
  done
  exit
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
pids=()
printers=()
status=0
passed=""
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
start_all
wait_for_all
signal_all KILL # What they left running would keep the printers waiting.
wait "${printers[@]}"
exit "$status"
