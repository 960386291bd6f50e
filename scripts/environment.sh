# Sourced by quickstart and test: a virtual environment inside the clone, made once per state of setup.cfg.
# shellcheck shell=bash

say() {
  if [[ -t 1 ]]; then printf '\033[1m%s\033[0m\n' "$*"; else printf '%s\n' "$*"; fi
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# make_environment FOLDER WHAT...: WHAT are pip's arguments. Leaves FOLDER/bin first on PATH.
make_environment() {
  local folder=$1 python stamp
  shift
  for python in python3.11 python3; do
    ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || break
    [[ $python != python3 ]] || fail "Python 3.11 or newer is needed, and neither python3.11 nor python3 is that"
  done
  stamp=$(cat setup.cfg pyproject.toml scripts/stubs/*/pyproject.toml <(echo "$PWD" "$@") | sha256sum)
  if [[ $(cat "$folder/.stamp" 2>/dev/null) != "$stamp" ]]; then
    say "Installing into $folder (two to four minutes, once)"
    "$python" -m venv --clear "$folder" ||
      fail "$python cannot make a virtual environment; on Debian: apt-get install python3-venv"
    "$folder/bin/python" -m pip install --disable-pip-version-check "$@" >"$folder/install.log" 2>&1 || {
      tail -n 20 "$folder/install.log" >&2
      fail "the installation failed; all its messages are in $folder/install.log, and the next try starts afresh"
    }
    echo "$stamp" >"$folder/.stamp"
  fi
  export PATH="$folder/bin:$PATH"
}
