#!/usr/bin/env bash
# Runs a command on all workers of a Cloud TPU pod, over preemptions.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/tpu_pod.sh VERB [OPTION ...] [-- COMMAND ...]

  run      create the pod or reuse it, copy this tree there, install, run COMMAND on
           all workers and bring its output back; where the pod was preempted, create
           it again and run COMMAND again, which resumes. Other failures stop.
  up       the same without a command
  each     run COMMAND on all workers as it is, to set them up
  logs     follow the command again, for example after Ctrl-C, which does not end it
  stop     ask the command to save a checkpoint and end
  status   what the pod and its request are
  list     all pods and requests of the zone
  delete   the pod and its request

  --name NAME       of pod and request (or RAE_TPU_NAME)
  --zone ZONE       (or RAE_ZONE)
  --project ID      (or RAE_PROJECT; default: gcloud's)
  --type TYPE       such as v5p-128, v6e-16, v5litepod-256 (or RAE_TPU_TYPE)
  --runtime NAME    software version; default: the usual one for the type
  --slices N        several slices of that type, joined over the network
  --spot            may be preempted, costs less; --reserved: from a reservation
  --no-queue        create at once or fail, without a queued request
  --create-flag F   another flag of gcloud's create command; repeatable
  --internal-ip     connect by internal addresses
  --env KEY=VALUE   for COMMAND; repeatable. Variables of launch/env.sh (RAE_BUCKET,
                    RAE_MOUNT, RAE_DATA, RAE_RUNS) and of the recipes are passed on
  --max-restarts N  after preemptions; default 100
  --logs FOLDER     for output; default runs/launch
  --dry-run         print the commands, no more

COMMAND runs in the root of the tree, with rae-jax on PATH. Workdirs and data must be
where all workers reach them, such as in a bucket, by its address; the workers' service
account must be allowed to write there. Recipes use that of RAE_BUCKET by themselves:

  bash launch/tpu_pod.sh run --name rae --zone us-east5-a --type v5p-128 --spot -- \
    rae-jax train --config configs/dit_dh.py:dinov2_b \
    --config.data.path=gs://my-bucket/data/imagenet \
    --workdir gs://my-bucket/runs/dit_dh
  RAE_BUCKET=gs://my-bucket bash launch/tpu_pod.sh run --name rae --zone us-east5-a \
    --type v5p-128 --spot -- bash launch/recipes/rae_imagenet256.sh decoder stats dit
TEXT
}

name=${RAE_TPU_NAME-}
zone=${RAE_ZONE-}
project=${RAE_PROJECT-}
accelerator=${RAE_TPU_TYPE-}
runtime=""
slices=1
tier=""
queue=1
create_flags=()
ssh_flags=(--quiet)

read_option() {
  case $1 in
    --name) name=$(value "$@") ;;
    --zone) zone=$(value "$@") ;;
    --project) project=$(value "$@") ;;
    --type) accelerator=$(value "$@") ;;
    --runtime) runtime=$(value "$@") ;;
    --slices) slices=$(value "$@") ;;
    --create-flag) create_flags+=("$(value "$@")") ;;
    --spot | --reserved) tier=$1 USED=1 ;;
    --no-queue) queue="" USED=1 ;;
    --internal-ip) ssh_flags+=("$1") USED=1 ;;
    *) USED=0 ;;
  esac
}

read_words "$@"
where=(--zone="$zone" ${project:+--project="$project"})
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
tpus() { run gcloud compute tpus "$@"; }

# What gcloud says of the pod (tpu-vm) or its request (queued-resources); nothing where
# there is none. Any other error could mean a second pod: it stops the launcher.
describe() {
  local attempt field="value(state)"
  [[ $1 == tpu-vm ]] || field="value(state.state)"
  for attempt in 1 2 3 4 5; do
    tpus "$1" describe "$name" "${where[@]}" --format="$field" 2>"$scratch/errors" &&
      return
    ! grep -q NOT_FOUND "$scratch/errors" || return 0
    ((attempt == 5)) || sleep "$POLL_SECONDS"
  done
  die "gcloud could not describe $name: $(<"$scratch/errors")"
}

# Prints absent, waiting, ready, gone (preempted or removed) or failed.
pod_state() {
  local request pod
  request=$(describe queued-resources) || exit
  case $request in
    "" | ACTIVE) ;;
    FAILED) echo failed && return ;;
    SUSPENDING | SUSPENDED | DELETING) echo gone && return ;;
    *) echo waiting && return ;;
  esac
  if [[ $request == ACTIVE && $slices != 1 ]]; then
    echo ready && return
  fi
  pod=$(describe tpu-vm) || exit
  case $pod in
    READY) echo ready ;;
    "") [[ $request ]] && echo gone || echo absent ;;
    CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | UNHIDING) echo waiting ;;
    STOPPED | STOPPING) die "$name is stopped: gcloud compute tpus tpu-vm start $name" ;;
    *) echo gone ;;
  esac
}

is_gone() {
  local state
  state=$(pod_state) || exit
  [[ $state != ready ]]
}

create() {
  local flags=(${tier:+"$tier"} ${create_flags[@]+"${create_flags[@]}"})
  flags=("${where[@]}" --accelerator-type="$accelerator" ${flags[@]+"${flags[@]}"})
  if [[ ! $queue ]]; then
    tpus tpu-vm create "$name" "${flags[@]}" --version="$runtime" --quiet
  elif ((slices > 1)); then
    tpus queued-resources create "$name" "${flags[@]}" --quiet \
      --runtime-version="$runtime" --node-count="$slices" --node-prefix="$name"
  else
    tpus queued-resources create "$name" "${flags[@]}" --quiet \
      --runtime-version="$runtime" --node-id="$name"
  fi || die "gcloud could not create $name (see above)."
}

remove() {
  local request=queued
  [[ $DRY_RUN ]] || request=$(describe queued-resources) || exit
  if [[ $request ]]; then
    tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    tpus tpu-vm delete "$name" "${where[@]}" --quiet
  fi || say "gcloud could not delete $name now (see above)"
}

ensure_pod() {
  local state last="" created=""
  if [[ $DRY_RUN ]]; then
    describe queued-resources
    describe tpu-vm
    create
    return
  fi
  while :; do
    state=$(pod_state) || exit
    [[ $state == "$last" ]] || say "$name is $state"
    last=$state
    case $state in
      ready) return ;;
      failed)
        [[ ! $created ]] || die "the request failed; see: launch/tpu_pod.sh status"
        remove
        ;;
      gone) remove ;;
      absent)
        create
        created=1
        ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# Runs gcloud's ssh or scp for all workers of all slices at once.
on_workers() {
  local kind=tpu-vm flags=("${where[@]}" "${ssh_flags[@]}" --worker=all)
  if ((slices > 1)); then
    kind=queued-resources
    flags+=(--node=all --batch-size=all)
  fi
  tpus "$kind" "$1" "${flags[@]}" "${@:2}"
}

on_all() {
  on_workers ssh --ssh-flag=-oServerAliveInterval=30 --command="$1" "$name"
}

provide() {
  local archive="${TMPDIR:-/tmp}/rae_jax.$name.tar.gz"
  ensure_pod
  pack_tree "$archive" && on_workers scp "$archive" "$name:" &&
    on_all "$(unpack_command "tpu$EXTRAS")"
}

start() { on_all "$(start_command "$1" tpu "${PAIRS[@]}" -- "${COMMAND[@]}")"; }

check_pod_options() {
  check_name --name "$name"
  need --type "$accelerator" RAE_TPU_TYPE
  [[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices must be a number, got '$slices'."
  [[ $queue || $slices == 1 ]] || die "--no-queue creates one slice; leave it out."
  [[ $runtime ]] || case $accelerator in
    v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) die "no usual software version is known for $accelerator; give --runtime." ;;
  esac
}

need --zone "$zone" RAE_ZONE
[[ $verb == list ]] || need --name "$name" RAE_TPU_NAME
need_program gcloud "Install the Google Cloud CLI and log in: gcloud auth login."
case $verb in
  up)
    check_pod_options
    forward ${pairs[@]+"${pairs[@]}"}
    provide
    ;;
  run)
    need_command
    check_pod_options
    forward RAE_DISTRIBUTED=1 RAE_TPU_TYPE="$accelerator" ${pairs[@]+"${pairs[@]}"}
    trap 'say "the command goes on; see logs, stop and delete."; exit 130' INT
    run_to_the_end "$name" "$logs" "$restarts"
    ;;
  each)
    need_command
    on_all "$(quoted "${COMMAND[@]}")"
    ;;
  logs | stop) on_all "$(worker_command "$verb")" ;;
  status)
    tpus queued-resources describe "$name" "${where[@]}" || true
    ((slices > 1)) || tpus tpu-vm describe "$name" "${where[@]}"
    ;;
  list)
    tpus queued-resources list "${where[@]}"
    tpus tpu-vm list "${where[@]}"
    ;;
  delete) remove ;;
  *) die "unknown verb '$verb'; see --help." ;;
esac
