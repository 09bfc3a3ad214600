#!/usr/bin/env bash
# Runs a command on TPU slices of a GKE cluster, through XPK.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/gke.sh VERB [OPTION ...] [-- COMMAND ...]

  run      copy this tree into an image, queue COMMAND as a workload on all machines,
           wait for its end. Kueue starts it when there is room; the cluster starts it
           again where it was preempted (exit code 75), hung (79) or a machine was lost,
           which resumes; --max-restarts counts these. Other failures stop.
  logs     follow the output of the first machine
  status   of the workloads
  delete   the workload

  --name NAME         of the workload (or RAE_WORKLOAD)
  --cluster NAME      (or RAE_CLUSTER), made with: xpk cluster create
  --zone ZONE         (or RAE_ZONE); --project ID (or RAE_PROJECT)
  --type TYPE         such as v5p-128 (or RAE_TPU_TYPE); --slices N of them
  --image IMAGE       with rae-jax installed, used as it is: with its extra gcs or s3
                      for addresses of buckets, and RAE_MOUNT is not heeded
  --base-image IMAGE  with Python 3.11 and pip, gets this tree and installs it at each
                      start; default python:3.11-slim
  --storage NAME      of a storage that XPK attached to the cluster, whose folder all
                      machines then share; not needed for addresses; repeatable
  --grace SECONDS     to save a checkpoint on preemption; default 120
  --xpk-flag FLAG     another flag of `xpk workload create`; repeatable
  --detach            do not wait for the end
  --env KEY=VALUE     for COMMAND; repeatable. Variables of launch/env.sh (RAE_BUCKET,
                      RAE_MOUNT, RAE_DATA, RAE_RUNS) and of the recipes are passed on
  --max-restarts N    default 100
  --dry-run           print the commands, no more

Workdirs and data must be where all machines reach them, such as in a bucket:

  bash launch/gke.sh run --name rae --cluster pods --zone us-east5-a --type v5p-128 \
    -- rae-jax train --config configs/dit_dh.py:dinov2_b \
    --config.data.path=gs://my-bucket/data/imagenet \
    --workdir gs://my-bucket/runs/dit_dh
TEXT
}

name=${RAE_WORKLOAD-}
cluster=${RAE_CLUSTER-}
zone=${RAE_ZONE-}
project=${RAE_PROJECT-}
accelerator=${RAE_TPU_TYPE-}
slices=1
image=""
base_image=python:3.11-slim
grace=120
detach=""
flags=()

read_option() {
  case $1 in
    --name) name=$(value "$@") ;;
    --cluster) cluster=$(value "$@") ;;
    --zone) zone=$(value "$@") ;;
    --project) project=$(value "$@") ;;
    --type) accelerator=$(value "$@") ;;
    --slices) slices=$(value "$@") ;;
    --image) image=$(value "$@") ;;
    --base-image) base_image=$(value "$@") ;;
    --storage) flags+=(--storage="$(value "$@")") ;;
    --grace) grace=$(value "$@") ;;
    --xpk-flag) flags+=("$(value "$@")") ;;
    --detach) detach=1 USED=1 ;;
    *) USED=0 ;;
  esac
}

read_words "$@"
where=(--cluster="$cluster" --zone="$zone" ${project:+--project="$project"})

create() {
  local command=(exec bash launch/worker.sh exec tpu)
  forward RAE_DISTRIBUTED=1 RAE_TPU_TYPE="$accelerator" ${pairs[@]+"${pairs[@]}"}
  if [[ $image ]]; then
    # The image's own rae-jax: no tree, so no worker.sh.
    command=(exec env "${PAIRS[@]}" "${COMMAND[@]}")
    flags+=(--docker-image="$image")
  else
    command+=("${PAIRS[@]}" -- "${COMMAND[@]}")
    stage="${TMPDIR:-/tmp}/rae_jax.$name.tree"
    flags+=(--base-docker-image="$base_image" --script-dir="$stage")
    run rm -rf "$stage"
    run mkdir -p "$stage"
    pack_tree "$stage.tar.gz"
    run tar -xzf "$stage.tar.gz" -C "$stage"
  fi
  run xpk workload create "${where[@]}" --workload="$name" --tpu-type="$accelerator" \
    --num-slices="$slices" --max-restarts="$restarts" \
    --restart-on-exit-codes="$EXIT_PREEMPTED,$EXIT_HUNG" \
    --termination-grace-period-seconds="$grace" "${flags[@]}" \
    --command="$(quoted "${command[@]}")"
}

need --cluster "$cluster" RAE_CLUSTER
need --zone "$zone" RAE_ZONE
[[ $verb == status ]] || need --name "$name" RAE_WORKLOAD
need_program xpk "Install it: pip install xpk."
case $verb in
  run)
    need_command
    check_name --name "$name"
    need --type "$accelerator" RAE_TPU_TYPE
    create || die "xpk could not create $name (see above)."
    [[ $detach ]] || run xpk workload list "${where[@]}" \
      --wait-for-job-completion="$name" ||
      die "$name failed or is not known; see its output: launch/gke.sh logs"
    ;;
  logs)
    need_program kubectl "Install it: gcloud components install kubectl."
    run gcloud container clusters get-credentials "$cluster" \
      --location="${zone%-?}" ${project:+--project="$project"}
    run kubectl logs --follow --all-containers --tail=-1 --selector \
      "jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
    ;;
  status) run xpk workload list "${where[@]}" ;;
  delete) run xpk workload delete "${where[@]}" --workload="$name" ;;
  *) die "unknown verb '$verb'; see --help." ;;
esac
