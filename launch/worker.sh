#!/usr/bin/env bash
# Runs commands on one machine of a pod or a cluster, for the launchers.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/worker.sh VERB ...

Runs commands on this machine, in the root of the tree, with `rae-jax` on PATH.
  install PLATFORM[,EXTRA ...]            rae_jax for tpu, gpu or cpu in .venv, with the
                                          extra gcs or s3 for addresses of buckets;
                                          for those of RAE_BUCKET, RAE_DATA and
                                          RAE_RUNS by itself
  exec PLATFORM [KEY=VALUE ...] -- COMMAND ...
                                          install, then become COMMAND
  run JOB PLATFORM [KEY=VALUE ...] -- COMMAND ...
                                          start COMMAND, which outlives a connection,
                                          or find JOB started; follow it to its end
  logs                                    follow the newest job
  stop                                    ask the newest job to save and end
  idle                                    fail if a job is running
TEXT
}

ENDED="rae-jax: ended with code"
jobs=${RAE_JOBS:-$HOME/.rae_jax/jobs}

# Images of TPU machines have Python 3.10; uv brings one without root.
provide_python() {
  local python
  (find_python >/dev/null 2>&1) && return
  say "no Python 3.11 here; fetching one with uv"
  if ! python3 -m pip install --quiet --user uv ||
    ! python3 -m uv python install 3.11 ||
    ! python=$(python3 -m uv python find --system 3.11); then
    die "Python 3.11 is missing and uv could not fetch it (see above)." \
      "Install python3.11 with its venv module on this machine."
  fi
  PATH="$(dirname -- "$python"):$PATH"
}

# $1: PLATFORM[,EXTRA ...]
install_for() {
  local platform=${1%%,*}
  local extras=${1#"$platform"}
  case $platform in
    tpu) setup_for "demo,tpu$extras" 5 ;;
    gpu) setup_for "demo,gpu$extras" 10 ;;
    cpu) setup_for "demo$extras" 3 ;;
    *) die "unknown platform $platform (tpu, gpu or cpu)" ;;
  esac
}

setup_for() {
  [[ -e $VENV/bin/python ]] || provide_python
  setup_venv "$@"
}

# Reads KEY=VALUE words up to -- into the environment; COMMAND is the rest.
read_command() {
  while (($#)) && [[ $1 != -- ]]; do
    [[ $1 == [A-Za-z_]*=* ]] || die "expected KEY=VALUE or --, got '$1'"
    export "${1?}"
    shift
  done
  (($# > 1)) || die "no command after --"
  COMMAND=("${@:2}")
}

# The extras for the addresses in KEY=VALUE words, -- and a command for platform $1.
extras_of() {
  (read_command "${@:2}" && set_environment "$1" && bucket_extras "${COMMAND[@]}")
}

enter() {
  read_command "${@:2}"
  set_environment "$1"
  export PATH="$VENV/bin:$PATH"
  cd "$ROOT"
  [[ -z ${RAE_BUCKET-} || -z ${RAE_MOUNT-} ]] || mount_bucket
}

# Mounts the bucket, or its folder, at RAE_MOUNT, unless it is.
mount_bucket() {
  local options=(${RAE_MOUNT_OPTIONS:+-o "$RAE_MOUNT_OPTIONS"})
  local name=${RAE_BUCKET#*://} folder=""
  [[ $name != */* ]] || folder=${name#*/}
  name=${name%%/*}
  ! mountpoint --quiet "$RAE_MOUNT" || return 0
  mkdir -p "$RAE_MOUNT"
  case $RAE_BUCKET in
    gs://*)
      need_program gcsfuse "It mounts gs:// buckets; install it on this machine:" \
        "https://cloud.google.com/storage/docs/cloud-storage-fuse/install"
      # Checkpoints are folders that are renamed when they are complete.
      gcsfuse --implicit-dirs --rename-dir-limit=1000000 \
        ${folder:+--only-dir="$folder"} "${options[@]}" "$name" "$RAE_MOUNT" >&2
      ;;
    s3://*)
      need_program s3fs "It mounts s3:// buckets; install it: apt-get install s3fs."
      s3fs "$name${folder:+:/$folder}" "$RAE_MOUNT" "${options[@]}" >&2
      ;;
  esac || die "$RAE_BUCKET could not be mounted at $RAE_MOUNT (see above)."
}

alive() {
  [[ -e $1/pid && ! -e $1/code ]] && kill -0 "$(<"$1/pid")" 2>/dev/null
}

# Runs in a session of its own until the command ends; a signal is the command's.
supervise() {
  local dir=$1 code=0
  trap : TERM INT HUP
  shift
  "$@" || code=$?
  [[ $code != "$EXIT_PREEMPTED" || ! -e $dir/stopped ]] || code=$EXIT_STOPPED
  echo "$code" >"$dir/code.partial"
  mv "$dir/code.partial" "$dir/code"
  echo "$ENDED $code"
}

start_job() {
  local dir=$1 platform=$2
  if [[ -e $dir/pid ]]; then
    return
  fi
  refuse_if_busy
  (
    enter "$platform" "${@:3}"
    mkdir -p "$dir"
    setsid bash "$ROOT/launch/worker.sh" supervise "$dir" "${COMMAND[@]}" \
      >"$dir/log" 2>&1 </dev/null &
    echo $! >"$dir/pid"
  )
  ln -sfn "$dir" "$jobs/newest"
}

refuse_if_busy() {
  ! alive "$jobs/newest" ||
    die "a command is still running on this machine: follow it with logs or end it" \
      "with stop."
}

# Prints a job's log with this machine's name before each line; returns its code.
follow() {
  local dir=$1 lines=+1 host
  host=$(hostname)
  [[ ! -e $dir/followed ]] || lines=20
  touch "$dir/followed"
  # The last line ends it; where there is none, the end of the process does.
  tail -n "$lines" -F --pid="$(<"$dir/pid")" "$dir/log" 2>/dev/null |
    sed -u -e "s/^/[$host] /" -e "/] $ENDED [0-9]*\$/q" || true
  [[ -e $dir/code ]] || {
    echo "[$host] $ENDED $EXIT_KILLED"
    return "$EXIT_KILLED"
  }
  return "$(<"$dir/code")"
}

stop_job() {
  local dir="$jobs/newest"
  alive "$dir" || die "no command is running on this machine."
  touch "$dir/stopped"
  kill -TERM -- "-$(<"$dir/pid")"
}

(($#)) || set -- --help
verb=$1
shift
case $verb in
  -h | --help) usage ;;
  install)
    set_places
    [[ ${1-} == *,* ]] || set -- "${1-}$(bucket_extras)"
    install_for "$1"
    ;;
  exec)
    extras=$(extras_of "${1-}" "${@:2}")
    install_for "$1$extras"
    enter "$@"
    exec "${COMMAND[@]}"
    ;;
  run)
    start_job "$jobs/$1" "${@:2}"
    follow "$jobs/$1"
    ;;
  supervise) supervise "$@" ;;
  logs)
    [[ -e $jobs/newest/pid ]] || die "no command was started on this machine."
    follow "$jobs/newest"
    ;;
  stop) stop_job ;;
  idle) refuse_if_busy ;;
  *)
    usage >&2
    die "unknown verb $verb"
    ;;
esac
