# shellcheck shell=bash
# What claims.sh and ldae_claims.sh share: sets `workdir` and `seeds` from arguments.

# parse_claims FOLDER ARGUMENT ...: FOLDER is the workdir unless one is given. The caller
# has `usage`, and `die` of setup_venv.sh.
# shellcheck disable=SC2034  # The caller uses them.
parse_claims() {
  workdir=$1
  seeds="42 7"
  shift
  while (($#)); do
    case $1 in
      -h | --help)
        usage
        exit
        ;;
      --workdir=* | --seeds=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
      --workdir | --seeds)
        (($# > 1)) || die "$1 needs a value; see --help."
        case $1 in --seeds) seeds=$2 ;; *) workdir=$2 ;; esac
        shift 2
        ;;
      *) die "unknown argument $1; see --help." ;;
    esac
  done
  [[ $seeds =~ ^[0-9]+(\ [0-9]+)*$ ]] ||
    die "--seeds must be numbers, each after one space, got '$seeds'."
}
