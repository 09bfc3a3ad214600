# shellcheck shell=bash
# Sourced: the environment of a run. `set_environment PLATFORM` (tpu, gpu or cpu)
# exports what follows; a variable that is set already is kept.
#   RAE_BUCKET  gs://NAME or s3://NAME, with a folder if you like (gs://NAME/FOLDER), that
#               all machines share; rae-jax reads and writes it by its address, and the
#               launchers install what it needs for that. Credentials are those of the
#               machines
#   RAE_MOUNT   folder; where it is set, the launchers mount RAE_BUCKET there, with
#               RAE_MOUNT_OPTIONS (-o of gcsfuse or s3fs), instead of using its address
#   RAE_DATA    folder or address of prepared data, default data, or $RAE_BUCKET/data
#               ($RAE_MOUNT/data)
#   RAE_RUNS    folder or address of workdirs, default runs, or $RAE_BUCKET/runs
#               ($RAE_MOUNT/runs); has to be shared by all machines of a run
#   AWS_ENDPOINT_URL, AWS_REGION  of s3:// in other stores than Amazon's; the launchers
#               pass them on, but no keys
#   RAE_TPU_TYPE  kind of TPU, such as v6e-16; the launchers set it; on other machines the
#               TPU_ACCELERATOR_TYPE of Google's images counts
#   RAE_CACHE   compiled programs, default ~/.cache/rae_jax
# LIBTPU_INIT_ARGS and XLA_FLAGS get the options below before your own, which win.

# Gathers of weights that run while the layer before them computes. libtpu 0.0.42.1
# accepts them for v5p and v6e; of those tried, these alone changed the program. Not
# accepted any more: xla_tpu_enable_async_all_gather, xla_enable_async_reduce_scatter.
RAE_TPU_FLAGS="--xla_enable_async_all_gather=true"
RAE_TPU_FLAGS+=" --xla_tpu_enable_async_collective_fusion=true"
RAE_TPU_FLAGS+=" --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"

# Vector memory for one operation, in KiB: larger tiles make a training step of DiT-DH-XL
# 8 % shorter on a v6e by the compiler's estimate.
RAE_V6E_FLAGS="--xla_tpu_scoped_vmem_limit_kib=65536"

# Collectives are asynchronous by default; these hide them behind products. Accepted by
# jaxlib 0.10.2 for an H100; gone are xla_gpu_enable_async_collectives and
# xla_gpu_enable_triton_softmax_fusion.
RAE_GPU_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true"
RAE_GPU_FLAGS+=" --xla_gpu_enable_pipelined_all_gather=true"
RAE_GPU_FLAGS+=" --xla_gpu_enable_pipelined_reduce_scatter=true"
RAE_GPU_FLAGS+=" --xla_gpu_enable_pipelined_all_reduce=true"

# Exports RAE_DATA and RAE_RUNS; fails where RAE_BUCKET is not the address of a bucket.
set_places() {
  local base="" bucket=${RAE_BUCKET-}
  if [[ $bucket ]]; then
    while [[ $bucket == */ ]]; do bucket=${bucket%/}; done
    if [[ ! $bucket =~ ^(gs|s3)://[^/]+(/[^/]+)*$ ]]; then
      printf 'rae-jax: error: RAE_BUCKET must be gs://NAME or s3://NAME, got %s\n' \
        "'$RAE_BUCKET'" >&2
      return 1
    fi
    export RAE_BUCKET=$bucket
    base="${RAE_MOUNT:-$bucket}/"
  fi
  if [[ ${RAE_MOUNT_OPTIONS-} && ! ${RAE_MOUNT-} ]]; then
    printf 'rae-jax: error: RAE_MOUNT_OPTIONS needs RAE_MOUNT, a folder\n' >&2
    return 1
  fi
  export RAE_DATA=${RAE_DATA:-${base}data} RAE_RUNS=${RAE_RUNS:-${base}runs}
}

set_environment() {
  local platform=$1
  set_places || return
  export RAE_CACHE=${RAE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/rae_jax}
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$RAE_CACHE/compiled}
  case $platform in
    tpu)
      # Without it, a TPU that another process holds is answered by a run on the CPU.
      export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}
      local flags=$RAE_TPU_FLAGS
      [[ ${RAE_TPU_TYPE:-${TPU_ACCELERATOR_TYPE-}} != v6e* ]] || flags+=" $RAE_V6E_FLAGS"
      export LIBTPU_INIT_ARGS="$flags${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
      ;;
    gpu)
      export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
      export XLA_FLAGS="$RAE_GPU_FLAGS${XLA_FLAGS:+ $XLA_FLAGS}"
      export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
      ;;
    cpu) export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} ;;
    *)
      printf 'rae-jax: error: unknown platform %s (tpu, gpu or cpu)\n' "$platform" >&2
      return 1
      ;;
  esac
}
