#!/usr/bin/env bash
# Installs the project and repeats the RAE paper's claims at the size of a CPU.
set -euo pipefail
# shellcheck source=launch/setup_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_venv.sh"
# shellcheck source=launch/claims_lib.sh
source "$ROOT/launch/claims_lib.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/claims.sh [--workdir DIR] [--seeds "42 7"]

Installs rae_jax[demo] in .venv as launch/quickstart.sh does, trains the encoder of the
quickstart and the runs of configs/claims.py, measures them and prints each claim of
the paper beside what was found, with the seeds behind it. About an hour on two idle
cores; the same command continues what was interrupted.

  --workdir DIR   folder of all runs, by default runs/claims in the clone's root; the
                  workdirs ldae and latent_stats of a quickstart may be copied into it
  --seeds LIST    seeds of every run but the encoder's, by default "42 7"
TEXT
}

parse_claims "$ROOT/runs/claims" "$@"

# train NAME FILE:VARIANT [ARGUMENT ...]: the run of a config in the workdir's folder.
train() {
  [[ ! -e $workdir/$1/finished ]] || return 0
  say "training $1"
  "$VENV/bin/rae-jax" train --config "$ROOT/configs/$2" --workdir "$workdir/$1" "${@:3}"
}

setup_venv demo
train ldae ldae.py:photos
train latent_stats latent_stats.py:photos
for seed in $seeds; do
  # The first seed's runs have plain names: others find the decoder by its.
  suffix="-seed$seed"
  [[ $seed != "${seeds%% *}" ]] || suffix=""
  # Decoders first: the others draw their pictures with one.
  for variant in decoder_noisy decoder_clean width_{48,64,96,128,192} \
    dit_dh no_shift paper_shift dit; do
    train "$variant$suffix" "claims.py:$variant" "--config.seed=$seed"
  done
done
"$VENV/bin/rae-jax" report --table claims --measure "$workdir"
