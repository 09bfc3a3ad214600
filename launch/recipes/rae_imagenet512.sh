#!/usr/bin/env bash
# RAE and DiT-DH-XL on ImageNet at 512 pixels, from the photographs to FID.
set -euo pipefail
CHAIN=rae_imagenet512
STAGES=(prepare decoder stats latents dit guide sample fid)
LATENTS_SIZE="4 TB with mirror images"
REFERENCE_FILE=VIRTUAL_imagenet512.npz
# shellcheck source=launch/recipes/chain.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/chain.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/recipes/rae_imagenet512.sh [OPTION ...] [STAGE ...]

RAE (arXiv:2510.11690) at 512 pixels behind DINOv2-B: the ViT-XL decoder with its critic,
the statistics of the latents, DiT-DH-XL for 400 epochs, a DiT-DH-S of 20 epochs that
guides it (scale 1.5), 50,000 samples with and without guidance, and their FID.
Encoder and critic are downloaded from the Hugging Face hub.
TEXT
}

read_chain "$@"
# DiT-DH-S for 20 epochs of ImageNet at batch 1024.
small=(--config.model.hidden_size="(384, 2048)" --config.model.depth="(12, 2)"
  --config.model.num_heads="(6, 16)" --config.num_steps=25020)

prepare
train decoder rae_decoder.py:dinov2_b_512
train stats latent_stats.py:dinov2_b_512
cache_latents dit_dh.py:dinov2_b_512
chain=(--config.latent_stats=../stats --config.decoder=../decoder)
train dit dit_dh.py:dinov2_b_512 "${chain[@]}" ${cached[@]+"${cached[@]}"}
train guide dit_dh.py:dinov2_b_512 "${chain[@]}" "${small[@]}" \
  ${cached[@]+"${cached[@]}"}
sample 1,1.5 --guide "$runs/guide"
fid samples_1 samples_1.5
