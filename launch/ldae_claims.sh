#!/usr/bin/env bash
# Installs the project and repeats the l-DAE paper's orderings at the size of a CPU.
set -euo pipefail
# shellcheck source=launch/setup_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_venv.sh"
# shellcheck source=launch/claims_lib.sh
source "$ROOT/launch/claims_lib.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/ldae_claims.sh [--workdir DIR] [--seeds "42 7"]

Installs rae_jax[demo,digits] in .venv, trains the runs of configs/ldae_claims.py on
digits and photographs, probes them, trains decoders and generators behind three
encoders, and prints the tables of the l-DAE paper beside what was found and which of
its orderings hold. Two hours on two idle cores; the same command continues what was
interrupted, and finished runs are kept.

  --workdir DIR   folder of all runs, by default runs/ldae_claims in the clone's root
  --seeds LIST    seeds of every run, by default "42 7"
TEXT
}

parse_claims "$ROOT/runs/ldae_claims" "$@"

# train FOLDER FILE:VARIANT [ARGUMENT ...]: the run of a config with a seed.
train() {
  [[ ! -e $workdir/$1/finished ]] || return 0
  say "training $1"
  "$VENV/bin/rae-jax" train --config "$ROOT/configs/$2" --workdir "$workdir/$1" \
    "--config.seed=$seed" "${@:3}"
}

# evaluate FOLDER [ARGUMENT ...]: the scores of a decoder or a generator.
evaluate() {
  [[ ! -e $workdir/$1/evaluation.json ]] || return 0
  say "measuring $1"
  "$VENV/bin/rae-jax" evaluate "$workdir/$1" "${@:2}"
}

# pretrain TIER: all rows of a tier and the probes of each.
pretrain() {
  local row run
  for row in t2_ppca_d{8,16,32,64,128} f5_pix_256_p16 x_ppca_cls x_ppca_ddpm \
    t3_orig_image x_single_sigma; do
    run="$1-seed$seed/$row"
    train "$run" "ldae_claims.py:${row}_$1"
    train "$run-probe" "ldae_claims.py:probe_$1" "--config.encoder.weights=../$row"
  done
  train "$1-seed$seed/t3_orig_image-probe_times" "ldae_claims.py:probe_times_$1" \
    "--config.encoder.weights=../t3_orig_image"
}

# as_encoder: decoders and generators behind a trained, an untrained and no encoder.
as_encoder() {
  local encoder
  train "rae-seed$seed/ldae" "ldae.py:photos"
  for encoder in ldae random pixels; do
    [[ $encoder == pixels ]] ||
      train "rae-seed$seed/stats_$encoder" "ldae_claims.py:stats_$encoder"
    train "rae-seed$seed/decoder_$encoder" "ldae_claims.py:decoder_$encoder"
    evaluate "rae-seed$seed/decoder_$encoder"
    train "rae-seed$seed/dit_dh_$encoder" "ldae_claims.py:dit_dh_$encoder"
    evaluate "rae-seed$seed/dit_dh_$encoder" --num-samples 160
  done
}

setup_venv demo,digits
for seed in $seeds; do pretrain digits; done
for seed in $seeds; do pretrain photos; done
for seed in $seeds; do as_encoder; done
"$VENV/bin/rae-jax" report --table ldae "$workdir" --out "$workdir/tables.md"
