#!/usr/bin/env bash
# l-DAE on ImageNet: pre-training, probe, and an RAE behind the encoder that it made.
set -euo pipefail
CHAIN=ldae_imagenet
STAGES=(prepare ldae probe decoder stats latents dit sample fid)
LATENTS_SIZE="1 TB with mirror images"
REFERENCE_FILE=VIRTUAL_imagenet256_labeled.npz
# shellcheck source=launch/recipes/chain.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/chain.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/recipes/ldae_imagenet.sh [OPTION ...] [STAGE ...]

l-DAE (arXiv:2401.14404) in its final form: ViT-B for 400 epochs and its linear probe;
then RAE behind it: the ViT-XL decoder with its critic, the statistics of the latents,
DiT-DH-XL for 800 epochs, 50,000 samples and their FID. Only the critic is downloaded.
TEXT
}

read_chain "$@"
encoder=(--config.encoder.weights=../ldae)

prepare
train ldae ldae.py:vit_b
train probe probe.py:vit_b "${encoder[@]}"
train decoder rae_decoder.py:xl "${encoder[@]}"
train stats latent_stats.py:vit_b "${encoder[@]}"
# This workdir is not beside the others: by its own path.
cache_latents dit_dh.py:xl_256 --config.encoder.weights="$runs/ldae"
train dit dit_dh.py:xl_256 "${encoder[@]}" ${cached[@]+"${cached[@]}"} \
  --config.latent_stats=../stats --config.decoder=../decoder
sample 1
fid samples
