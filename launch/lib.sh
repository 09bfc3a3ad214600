# shellcheck shell=bash
# Sourced by the launchers: printing and running commands, copying the tree, resuming.
#   DRY_RUN   where not empty, commands are printed instead of run

# shellcheck source=launch/setup_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_venv.sh"
# shellcheck source=launch/env.sh
source "$ROOT/launch/env.sh"

DRY_RUN=""
# Exit codes, as rae_jax/training/interrupts.py and watchdog.py have them.
EXIT_PREEMPTED=75
EXIT_HUNG=79
EXIT_STOPPED=130
EXIT_TERMINATED=143 # By SIGTERM before the first step.
EXIT_KILLED=137
EXIT_DISCONNECTED=255 # Of ssh.
POLL_SECONDS=${RAE_POLL_SECONDS:-20}
MAX_DROPS=10 # Of the connection, one soon after the other.
MAX_HANGS=3
# What a machine needs of the tree.
TREE=(LICENSE README.md configs launch pyproject.toml rae_jax setup.cfg)

# Prints words so that a shell reads the same words again.
quoted() {
  local word line="" escape="'\\''"
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//\'/$escape}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# Runs a command, or prints it so that it can be pasted.
run() {
  if [[ $DRY_RUN ]]; then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}

# The value of the option that is the first of the words.
value() {
  if (($# < 2)) || [[ $2 == -- ]]; then
    die "$1 needs a value; see --help."
  fi
  printf '%s' "$2"
}

# Reads the words of a launcher: verb first, then its options by `read_option`, which
# sets USED to the words it took, or 0; then those of all launchers; then a command.
verb=""
logs="$ROOT/runs/launch"
restarts=100
pairs=()
COMMAND=()
read_words() {
  (($#)) || set -- --help
  case $1 in
    -*) ;;
    *)
      # shellcheck disable=SC2034 # Of the scripts.
      verb=$1
      shift
      ;;
  esac
  while (($#)); do
    case $1 in
      --) COMMAND=("${@:2}") && return ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    USED=2
    case $1 in
      -h | --help)
        usage
        exit
        ;;
      --dry-run) DRY_RUN=1 USED=1 ;;
      --env) pairs+=("$(value "$@")") ;;
      --max-restarts) restarts=$(value "$@") ;;
      --logs) logs=$(value "$@") ;;
      *) read_option "$@" ;;
    esac
    ((USED)) || die "unknown option $1; see --help. A command comes after --."
    shift "$USED"
  done
}

need_command() {
  ((${#COMMAND[@]})) || die "no command: write it after --."
  [[ $restarts =~ ^[0-9]+$ ]] || die "--max-restarts must be a number, got '$restarts'."
}

need() {
  [[ -n $2 ]] || die "$1 is missing; give it or set ${*:3}. See --help."
}

need_program() {
  [[ $DRY_RUN ]] || command -v "$1" >/dev/null || die "$1 is not on PATH. ${*:2}"
}

check_name() {
  [[ $2 =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    die "$1 must be of lower-case letters, digits and hyphens, starting with a" \
      "letter, got '$2'."
}

# Variables of env.sh and of the recipes, none of them secret.
FORWARDED=(RAE_BUCKET RAE_MOUNT RAE_MOUNT_OPTIONS RAE_DATA RAE_RUNS RAE_IMAGENET
  RAE_INCEPTION RAE_REFERENCE AWS_ENDPOINT_URL AWS_REGION)

# Prints the extras that addresses in these variables and in the words of a command need,
# a comma before each.
bucket_extras() {
  local name words="$*"
  for name in "${FORWARDED[@]}"; do
    [[ $name == RAE_BUCKET && ${RAE_MOUNT-} ]] || words+=" ${!name-}"
  done
  [[ $words != *gs://* ]] || printf ',gcs'
  [[ $words != *s3://* ]] || printf ',s3'
}

# Puts KEY=VALUE words for other machines into PAIRS: the variables above, then $@; and
# into EXTRAS what they and COMMAND need there beside the platform's packages.
PAIRS=()
EXTRAS=""
forward() {
  local name pair
  for name in "${FORWARDED[@]}"; do
    [[ -z ${!name-} ]] || PAIRS+=("$name=${!name}")
  done
  for pair in "$@"; do
    [[ $pair == [A-Za-z_]*=* ]] || die "--env takes KEY=VALUE, got '$pair'."
    PAIRS+=("$pair")
  done
  # In a process of its own: these are the other machines' variables.
  # shellcheck disable=SC2034 # Of the launchers.
  EXTRAS=$(
    for pair in ${PAIRS[@]+"${PAIRS[@]}"}; do
      [[ $pair != RAE_* ]] || export "${pair?}"
    done
    set_places && bucket_extras ${COMMAND[@]+"${COMMAND[@]}"}
  ) || exit 1
}

# Writes the tree without caches and results into the archive $1.
pack_tree() {
  run env COPYFILE_DISABLE=1 tar -czf "$1" --exclude=__pycache__ -C "$ROOT" "${TREE[@]}"
}

# The shell command that unpacks the archive on a machine and installs for platform $1,
# such as tpu,gcs.
# The environment and the runs beside the tree are kept; a running command is not
# disturbed.
unpack_command() {
  local tree="rae_jax_tree"
  printf '%s' "if [ -e $tree/launch/worker.sh ]; then bash $tree/launch/worker.sh idle;" \
    " fi && mkdir -p $tree && rm -rf $tree/rae_jax $tree/configs $tree/launch &&" \
    " tar -xzf rae_jax.tar.gz -C $tree && bash $tree/launch/worker.sh install $1"
}

# The shell command that starts job $1 on platform $2, or follows it if it runs; then
# KEY=VALUE words, -- and a command.
start_command() { printf '%s' "bash rae_jax_tree/launch/worker.sh run $(quoted "$@")"; }

worker_command() { printf '%s' "bash rae_jax_tree/launch/worker.sh $1"; }

# Whether a worker wrote into log $1 that the command ended with code $2 or $3.
ended_with() { grep -Eq "^\[[^]]*\] rae-jax: ended with code ($2|${3-$2})\$" "$1"; }

# Runs a job to its end over preemptions and broken connections. Uses functions of the
# script: `provide` (a machine with the tree; fails as the machine does), `start JOB`
# (follow it; its code) and `is_gone` (the machine was taken away).
#   $1 name of the job, $2 folder for logs, $3 most restarts
run_to_the_end() {
  local name=$1 logs=$2 restarts_left=$3 attempt=0 drops=0 hangs=0
  local code job="" log="" ready="" since
  [[ $DRY_RUN ]] || mkdir -p "$logs"
  while :; do
    if [[ -z $job ]]; then
      attempt=$((attempt + 1))
      job="$name-$(date +%Y%m%d-%H%M%S)-$$-$attempt"
      log="$logs/$job.log"
      ready=""
    fi
    code=0 since=$SECONDS
    if [[ $DRY_RUN ]]; then
      provide
      start "$job"
      return
    fi
    touch "$log"
    if [[ ! $ready ]]; then
      provide || code=$?
      ((code != 0)) || ready=1
    fi
    if [[ $ready ]]; then
      say "job $job, log in $log"
      start "$job" 2>&1 | tee -a "$log" || code=$?
    fi
    ((code != 0)) || return 0
    ((SECONDS - since < 600)) || drops=0
    if ended_with "$log" "$EXIT_STOPPED"; then
      say "stopped as asked; the same command resumes."
      return "$EXIT_STOPPED"
    elif ended_with "$log" "$EXIT_PREEMPTED" "$EXIT_TERMINATED" || is_gone; then
      ((restarts_left-- > 0)) || die "preempted again after $3 restarts."
      say "preempted; resuming ($restarts_left more restarts allowed)"
      job=""
    elif ended_with "$log" "$EXIT_HUNG" "$EXIT_KILLED" && ((hangs++ < MAX_HANGS)); then
      say "hung or killed; running it again ($((MAX_HANGS - hangs)) more times allowed)"
      job=""
    elif ((code == EXIT_DISCONNECTED && drops++ < MAX_DROPS)); then
      say "connection lost; connecting again"
    elif [[ $ready ]]; then
      say "error: the command failed with code $code; its output is in $log"
      return "$code"
    else
      die "the tree could not be copied or installed (code $code, see above)."
    fi
    sleep "$POLL_SECONDS"
  done
}
