#!/bin/sh
# Makes the rivals' own environment: benchmarks/rivals/build.sh [FOLDER] (default: .venv-rivals)
set -eu
here=$(dirname "$0")
venv=${1:-.venv-rivals}
"${PYTHON:-python3.11}" -m venv --clear "$venv"
"$venv/bin/pip" install -q -r "$here/requirements.txt"
"$venv/bin/pip" install -q --no-deps -r "$here/rivals.txt"
