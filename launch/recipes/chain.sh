# shellcheck shell=bash
# Sourced by the recipes: options, and stages that can be chosen and repeated. A recipe
# defines CHAIN, STAGES, LATENTS_SIZE, REFERENCE_FILE and `usage`, calls
# `read_chain "$@"`, then the stages in their order.

# shellcheck source=launch/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib.sh"

chain_options() {
  cat <<TEXT

Stages, in this order: ${STAGES[*]}.
Without STAGE all are run. Repeat the same command after an interruption: every stage
continues where it was, and one that is finished takes a moment.

  --imagenet FOLDER   ImageNet: train/ and val/ with class folders (or RAE_IMAGENET)
  --data FOLDER       prepared images, default \$RAE_DATA/imagenet (data/imagenet)
  --runs FOLDER       workdirs, samples and scores, default \$RAE_RUNS/$CHAIN
                      (runs/$CHAIN)
  --latents FOLDER    encode all images once into this folder ($LATENTS_SIZE),
                      which spares the encoder in every step of dit
  --inception FILE    weights of the FID Inception (or RAE_INCEPTION), for fid:
                      weights-inception-2015-12-05-6726825d.pth of torch-fidelity
  --reference FILE    statistics of ImageNet (or RAE_REFERENCE), for fid:
                      $REFERENCE_FILE of ADM
  --set KEY=VALUE     of every training's config, such as mesh.fsdp=8; repeatable
  --dry-run           print the commands, no more

Folders and files may be addresses, gs://NAME/PATH or s3://NAME/PATH. With RAE_BUCKET,
data and runs are in that bucket (launch/env.sh).

On a pod or cluster all machines run a recipe together, but for prepare and latents:
run these stages on one machine first.
TEXT
}

imagenet=${RAE_IMAGENET-}
set_places
data=$RAE_DATA/imagenet
latents=""
inception=${RAE_INCEPTION-}
reference=${RAE_REFERENCE-}
settings=()
chosen=()
# Of a process that a signal reaches, the training acts on it; this waits for it.
trap : TERM

read_chain() {
  runs=$RAE_RUNS/$CHAIN
  while (($#)); do
    case $1 in
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case $1 in
      -h | --help)
        usage
        chain_options
        exit
        ;;
      --dry-run) DRY_RUN=1 && shift && continue ;;
      --imagenet) imagenet=$(value "$@") ;;
      --data) data=$(value "$@") ;;
      --runs) runs=$(value "$@") ;;
      --latents) latents=$(value "$@") ;;
      --inception) inception=$(value "$@") ;;
      --reference) reference=$(value "$@") ;;
      --set) settings+=("--config.$(value "$@")") ;;
      -*) die "unknown option $1; see --help." ;;
      *)
        [[ " ${STAGES[*]} " == *" $1 "* ]] ||
          die "unknown stage $1; choose from: ${STAGES[*]}."
        chosen+=("$1") && shift && continue
        ;;
    esac
    shift 2
  done
  local place
  for place in imagenet data runs latents inception reference; do
    tidy_address "$place"
  done
  [[ ! -x $VENV/bin/rae-jax ]] || PATH="$VENV/bin:$PATH"
  need_program rae-jax "Install it: bash launch/worker.sh install gpu (or tpu, cpu)."
  # Experiment files are named from the root; other paths stay the caller's.
  configs="$ROOT/configs"
}

# In an address, unlike in a path, a second slash is part of a name.
tidy_address() {
  local scheme rest
  [[ ${!1} == *://* ]] || return 0
  scheme=${!1%%://*}
  rest=${!1#*://}
  while [[ $rest == *//* ]]; do rest=${rest//\/\//\/}; done
  printf -v "$1" '%s' "$scheme://${rest%/}"
  [[ ${!1} =~ ^(gs|s3)://[^/]+ ]] ||
    die "--$1 may be a folder, gs://NAME/PATH or s3://NAME/PATH, got '${!1}'."
}

wanted() {
  ((${#chosen[@]} == 0)) || [[ " ${chosen[*]} " == *" $1 "* ]]
}

# Fails where a stage for one process is started by several.
alone() {
  [[ ${RAE_DISTRIBUTED-} != 1 || ${JAX_NUM_PROCESSES-} == 1 ]] ||
    die "stage $1 runs on one machine: run it there first, then the others here by" \
      "name, such as: decoder stats dit."
}

# `train STAGE FILE.py:VARIANT OVERRIDE ...` trains in the workdir of the stage's name.
train() {
  wanted "$1" || return 0
  say "stage $1"
  run rae-jax train --config "$configs/$2" --workdir "$runs/$1" \
    --config.data.path="$data" "${@:3}" ${settings[@]+"${settings[@]}"}
}

prepare() {
  wanted prepare || return 0
  alone prepare
  need --imagenet "$imagenet" RAE_IMAGENET
  say "stage prepare"
  # Files as they are: the trainings crop in different ways.
  run rae-jax prepare "$imagenet/train" "$data/train" --layout class
  run rae-jax prepare "$imagenet/val" "$data/validation" --layout class
}

# Writes the latents that `train` then reads by ${cached[@]}; FILE.py:VARIANT OVERRIDE ...
cached=()
cache_latents() {
  [[ $latents ]] || return 0
  # shellcheck disable=SC2034 # Of the recipes.
  cached=(--config.data.latents="$latents")
  wanted latents || return 0
  alone latents
  say "stage latents"
  run rae-jax prepare --latents "$latents" --config "$configs/$1" \
    --config.data.path="$data" "${@:2}" ${settings[@]+"${settings[@]}"}
}

# 50,000 images of stage dit for each guidance scale (several: separated by commas).
sample() {
  wanted sample || return 0
  say "stage sample"
  run rae-jax sample "$runs/dit" --num-samples 50000 --batch-size 256 \
    --guidance-scale "$1" --out "$runs/samples.npz" "${@:2}"
}

# FID, sFID, Inception Score, precision and recall of each file of samples.
fid() {
  wanted fid || return 0
  need --inception "$inception" RAE_INCEPTION
  need --reference "$reference" RAE_REFERENCE
  local name
  for name in "$@"; do
    say "stage fid, $name"
    run rae-jax evaluate "$runs/$name.npz" --inception "$inception" \
      --reference "$reference" --out "$runs/$name.json"
  done
}
