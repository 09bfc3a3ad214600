# shellcheck shell=bash
# Sourced by the other scripts. `setup_venv EXTRAS [GIGABYTES]` leaves the project,
# with these extras (comma separated), installed in .venv in the clone's root:
#   ROOT     the clone's root
#   VENV     the environment; $VENV/bin/python is its Python
# A later call with extras that are there takes a moment; an interrupted one is
# continued.

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
VENV="$ROOT/.venv"

say() { printf 'rae-jax: %s\n' "$*" >&2; }

die() {
  say "error: $*"
  exit 1
}

# Prints a version and fails where Python is too old or cannot make environments.
PYTHON_PROBE='
import sys
version = "%d.%d.%d" % sys.version_info[:3]
if sys.version_info < (3, 11):
    print(version)
    sys.exit(1)
try:
    import ensurepip, venv
except ImportError:
    print(version + " without venv")
    sys.exit(1)
print(version)
'

# Python 3.11 comes first because the pins in constraints.txt were tested with it.
find_python() {
  local name version found=""
  for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
    if version=$("$name" -c "$PYTHON_PROBE" 2>/dev/null); then
      command -v "$name"
      return
    fi
    [[ -z $version ]] || found+="${found:+, }$name is $version"
  done
  die "Python 3.11 or newer with the venv module is needed; found: ${found:-none}." \
    "Install one (apt-get install python3.11 python3.11-venv, brew install" \
    "python@3.11, pyenv install 3.11), put it first on PATH and run this again."
}

# Fails where the disk cannot take what is missing of $1 gigabytes.
check_disk() {
  local needed=$(($1 * 1000000)) used=0 free
  [[ ! -d $VENV ]] || used=$(du -sk "$VENV" | awk '{print $1}')
  free=$(df -Pk "$ROOT" | awk 'NR == 2 {print $4}')
  ((free + used >= needed)) ||
    die "not enough free disk space in $ROOT: installing takes up to $1 GB," \
      "$((free / 1000)) MB are free and .venv holds $((used / 1000)) MB."
}

venv_works() {
  [[ ! -e $VENV/.unfinished ]] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1
}

make_venv() {
  local python
  python=$(find_python) || exit
  [[ ! -e $VENV ]] || say "replacing the unfinished or broken $VENV"
  rm -rf "$VENV"
  mkdir "$VENV"
  touch "$VENV/.unfinished"
  say "creating $VENV with $python"
  "$python" -m venv "$VENV" || die "$python could not create $VENV (see above)."
  rm "$VENV/.unfinished"
}

# pip writes INSTALLER after a package's files: one without it was cut off, and pip
# would take it for installed.
remove_partial_packages() {
  local info
  for info in "$VENV"/lib/python*/site-packages/*.dist-info; do
    [[ ! -d $info || -e $info/INSTALLER ]] || rm -r "$info"
  done
}

pip_install() {
  PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 "$VENV/bin/python" -m pip install \
    --constraint "$ROOT/launch/constraints.txt" "$@" ||
    die "pip could not install $* (see its message above). If the network failed," \
      "run the same command again: it continues, and finished downloads are kept."
}

# Changes when the requirements change or the clone has moved.
fingerprint() {
  (cd "$ROOT" && cat setup.cfg pyproject.toml launch/constraints.txt && pwd) | cksum
}

install() {
  local extras=$1
  [[ ! -e $VENV/.installing ]] || remove_partial_packages
  touch "$VENV/.installing"
  say "installing rae_jax[$extras] in $VENV (the first time takes minutes)"
  # By itself first: its choice of a CPU or CUDA build must not depend on the rest.
  [[ ,$extras, != *,parity,* ]] || pip_install torch
  pip_install --editable "${ROOT}[$extras]"
  rm "$VENV/.installing"
}

# Whether the extras $1 are installed as the clone now has them, by one call or several.
are_installed() {
  local mark stamp extra found=,
  mark=$(fingerprint)
  for stamp in "$VENV"/.installed-*; do
    [[ ! -e $stamp || $(<"$stamp") != "$mark" ]] || found+="${stamp##*/.installed-},"
  done
  found=${found//-/,}
  for extra in ${1//,/ }; do
    [[ $found == *",$extra,"* ]] || return 1
  done
}

setup_venv() {
  local extras=$1 gigabytes=${2:-3}
  local stamp="$VENV/.installed-${extras//,/-}"
  # They would put other packages before those of the environment.
  unset PYTHONHOME PYTHONPATH
  if venv_works && [[ ! -e $VENV/.installing ]] && are_installed "$extras"; then
    return
  fi
  check_disk "$gigabytes"
  venv_works || make_venv
  "$VENV/bin/python" -c "$PYTHON_PROBE" >/dev/null ||
    die "$VENV was made with an older Python; remove it and run this again."
  install "$extras"
  fingerprint >"$stamp"
  say "installed"
}
