#!/usr/bin/env bash
# Queues a command on the GPUs of several nodes of a SLURM cluster.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/gpu_slurm.sh VERB [OPTION ...] [-- COMMAND ...]

  run     install here (a file system that all nodes share), queue COMMAND and follow
          its output. One process per node uses all its GPUs. Where the time limit or a
          preemption ends it, it saves a checkpoint, and the same job is queued again
          and resumes. Other failures end the job.
  logs    follow the output of --job
  stop    cancel --job after it has saved a checkpoint

  --nodes N           default 1
  --gpus N            per node, default 8
  --partition NAME    --account NAME    --time LIMIT    --qos NAME
                      as of sbatch; default: the cluster's
  --sbatch-flag FLAG  another flag of sbatch; repeatable
  --job NUMBER        for logs and stop
  --detach            do not follow the output
  --no-install        .venv in this tree is ready, also for addresses of buckets:
                      bash launch/worker.sh install gpu,gcs (or gpu,s3)
  --env KEY=VALUE     for COMMAND; repeatable. Variables of launch/env.sh (RAE_BUCKET,
                      RAE_MOUNT, RAE_DATA, RAE_RUNS) and of the recipes are passed on
  --max-restarts N    default 100
  --logs FOLDER       for output; default runs/launch
  --dry-run           print the commands, no more

Workdirs and data may be in the shared file system or in a bucket, by its address:

  bash launch/gpu_slurm.sh run --nodes 4 --partition gpu --time 24:00:00 -- \
    rae-jax train --config configs/dit_dh.py:dinov2_b --workdir runs/dit_dh
  bash launch/gpu_slurm.sh run --nodes 4 --partition gpu --time 24:00:00 -- \
    rae-jax train --config configs/dit_dh.py:dinov2_b --workdir gs://my-bucket/dit_dh
TEXT
}

nodes=1
gpus=8
job=""
detach=""
install=1
flags=()

read_option() {
  case $1 in
    --nodes) nodes=$(value "$@") ;;
    --gpus) gpus=$(value "$@") ;;
    --partition | --account | --time | --qos) flags+=("$1=$(value "$@")") ;;
    --sbatch-flag) flags+=("$(value "$@")") ;;
    --job) job=$(value "$@") ;;
    --detach) detach=1 USED=1 ;;
    --no-install) install="" USED=1 ;;
    *) USED=0 ;;
  esac
}

# What scontrol says of field $2 of job $1; kept for minutes after the job's end.
job_field() {
  scontrol --oneliner show job "$1" | tr ' ' '\n' | sed -n "s/^$2=//p"
}

# Follows the output of job $1 until it ends, queued again or not; returns its code.
follow() {
  local log="$logs/slurm-$1.log" printer state code
  say "job $1, output in $log; Ctrl-C leaves it running"
  mkdir -p "$logs"
  touch "$log"
  tail -n +1 -F "$log" 2>/dev/null &
  printer=$!
  while :; do
    state=$(job_field "$1" JobState) || die "scontrol does not know job $1."
    case $state in
      COMPLETED | FAILED | CANCELLED | TIMEOUT | NODE_FAIL | OUT_OF_MEMORY | \
        BOOT_FAIL | DEADLINE | PREEMPTED) break ;;
    esac
    sleep "$POLL_SECONDS"
  done
  sleep 1
  kill "$printer"
  say "job $1: $state"
  [[ $state != COMPLETED ]] || return 0
  code=$(job_field "$1" ExitCode)
  code=${code%%:*}
  return "$((code ? code : 1))"
}

submit() {
  run sbatch --parsable --chdir="$ROOT" --nodes="$nodes" --gpus-per-node="$gpus" \
    --output="$logs/slurm-%j.log" --export=ALL,RAE_ROOT="$ROOT",RAE_MAX_RESTARTS="$restarts" \
    ${flags[@]+"${flags[@]}"} "$ROOT/launch/gpu_slurm.sbatch" \
    ${PAIRS[@]+"${PAIRS[@]}"} -- "${COMMAND[@]}"
}

read_words "$@"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || die "--nodes must be a number, got '$nodes'."
[[ $gpus =~ ^[1-9][0-9]*$ ]] || die "--gpus must be a number, got '$gpus'."
need_program sbatch "Run this on a login node of the cluster."
case $verb in
  run)
    need_command
    forward ${pairs[@]+"${pairs[@]}"}
    [[ ! $install ]] || run bash "$ROOT/launch/worker.sh" install "gpu$EXTRAS"
    if [[ $DRY_RUN ]]; then
      submit
    else
      mkdir -p "$logs"
      job=$(submit) || die "sbatch refused the job (see above)."
      job=${job%%;*}
      if [[ $detach ]]; then
        say "queued job $job"
      else
        follow "$job"
      fi
    fi
    ;;
  logs)
    need --job "$job" it
    follow "$job"
    ;;
  stop)
    need --job "$job" it
    # To the steps alone; a job that is stopped must not be queued again.
    run scontrol update "JobId=$job" Requeue=0
    run scancel --signal=TERM "$job"
    ;;
  *) die "unknown verb '$verb'; see --help." ;;
esac
