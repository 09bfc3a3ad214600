#!/usr/bin/env bash
# RAE and DiT-DH-XL on ImageNet at 256 pixels, from the photographs to FID.
set -euo pipefail
CHAIN=rae_imagenet256
STAGES=(prepare decoder stats latents dit guide sample fid)
LATENTS_SIZE="1 TB with mirror images"
REFERENCE_FILE=VIRTUAL_imagenet256_labeled.npz
# shellcheck source=launch/recipes/chain.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/chain.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/recipes/rae_imagenet256.sh [OPTION ...] [STAGE ...]

RAE (arXiv:2510.11690) at 256 pixels behind DINOv2-B: the ViT-XL decoder with its critic,
the statistics of the latents, DiT-DH-XL for 800 epochs, a DiT-DH-S of 14 epochs that
guides it (scale 1.42), 50,000 samples with and without guidance, and their FID.
Encoder and critic are downloaded from the Hugging Face hub.
TEXT
}

read_chain "$@"
# DiT-DH-S for 14 epochs of ImageNet at batch 1024.
small=(--config.model.hidden_size="(384, 2048)" --config.model.depth="(12, 2)"
  --config.model.num_heads="(6, 16)" --config.num_steps=17514)

prepare
train decoder rae_decoder.py:dinov2_b
train stats latent_stats.py:dinov2_b
cache_latents dit_dh.py:dinov2_b
chain=(--config.latent_stats=../stats --config.decoder=../decoder)
train dit dit_dh.py:dinov2_b "${chain[@]}" ${cached[@]+"${cached[@]}"}
train guide dit_dh.py:dinov2_b "${chain[@]}" "${small[@]}" \
  ${cached[@]+"${cached[@]}"}
sample 1,1.42 --guide "$runs/guide"
fid samples_1 samples_1.42
