#!/usr/bin/env bash
# Runs a command on all GPUs of one machine: this one, or one reached by ssh.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/gpu_node.sh VERB [OPTION ...] [-- COMMAND ...]

  run    install and run COMMAND; on another machine, copy this tree there first and
         bring the output back. COMMAND outlives a broken connection, and where the
         machine was preempted, it is run again once the machine is back, which
         resumes. Other failures stop.
  logs   follow the command on --host again
  stop   ask the command on --host to save a checkpoint and end

  --host [USER@]HOST  another machine; default: this one
  --gpus N            use the first N; default all
  --ssh-option OPT    such as -p2222; repeatable
  --env KEY=VALUE     for COMMAND; repeatable. Variables of launch/env.sh (RAE_BUCKET,
                      RAE_MOUNT, RAE_DATA, RAE_RUNS) and of the recipes are passed on
  --max-restarts N    after preemptions of --host; default 100
  --logs FOLDER       for output of --host; default runs/launch
  --dry-run           print the commands, no more

Workdirs and data may be in a bucket, by its address:

  bash launch/gpu_node.sh run -- rae-jax train --config configs/dit_dh.py:dinov2_b \
    --workdir runs/dit_dh
  bash launch/gpu_node.sh run -- rae-jax train --config configs/dit_dh.py:dinov2_b \
    --config.data.path=s3://my-bucket/data/imagenet --workdir s3://my-bucket/runs/dit_dh
TEXT
}

host=""
gpus=""
ssh_options=(-oServerAliveInterval=30)

read_option() {
  case $1 in
    --host) host=$(value "$@") ;;
    --gpus) gpus=$(value "$@") ;;
    --ssh-option) ssh_options+=("$(value "$@")") ;;
    *) USED=0 ;;
  esac
}

read_words "$@"
on_host() { run ssh "${ssh_options[@]}" "$host" "$1"; }

answers() { ssh "${ssh_options[@]}" -oConnectTimeout=20 "$host" true >/dev/null 2>&1; }

# A machine that does not answer was taken away, or is being started again.
is_gone() { ! answers; }

provide() {
  local waited=""
  until [[ $DRY_RUN ]] || answers; do
    [[ $waited ]] || say "$host does not answer; waiting"
    waited=1
    sleep "$POLL_SECONDS"
  done
  send_tree && on_host "$(unpack_command "gpu$EXTRAS")"
}

send_tree() {
  local archive="${TMPDIR:-/tmp}/rae_jax.${host##*@}.tar.gz"
  pack_tree "$archive" &&
    run scp "${ssh_options[@]}" "$archive" "$host:rae_jax.tar.gz"
}

start() {
  on_host "$(start_command "$1" gpu ${PAIRS[@]+"${PAIRS[@]}"} -- "${COMMAND[@]}")"
}

visible() {
  [[ $gpus =~ ^[1-9][0-9]*$ ]] || die "--gpus must be a number, got '$gpus'."
  pairs+=("CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((gpus - 1)))")
}

case $verb in
  run)
    need_command
    [[ -z $gpus ]] || visible
    forward ${pairs[@]+"${pairs[@]}"}
    if [[ $host ]]; then
      if [[ ! $DRY_RUN ]] && ! answers; then
        die "ssh $host does not work; try it by hand, with --ssh-option where needed."
      fi
      trap 'say "the command goes on; see logs and stop."; exit 130' INT
      run_to_the_end gpu "$logs" "$restarts"
    else
      words=(exec gpu ${PAIRS[@]+"${PAIRS[@]}"} -- "${COMMAND[@]}")
      [[ $DRY_RUN ]] || exec bash "$ROOT/launch/worker.sh" "${words[@]}"
      run bash "$ROOT/launch/worker.sh" "${words[@]}"
    fi
    ;;
  logs | stop)
    need --host "$host" it
    on_host "$(worker_command "$verb")"
    ;;
  *) die "unknown verb '$verb'; see --help." ;;
esac
