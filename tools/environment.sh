#!/bin/sh
# Usage: environment.sh PYTHON DIRECTORY REQUIREMENT...
# Makes the virtual environment DIRECTORY with PYTHON unless a working one stands there, installs the
# requirements into it, and stamps it with DIRECTORY/installed.
set -eu

python=$1
directory=$2
shift 2

if [ -z "$python" ]; then
    echo "No usable Python found for $directory: jaxdp needs Python >= 3.11 with venv and ensurepip" \
        "(Debian: the package python3-venv); install one, or name it, as in" \
        "make demo PYTHON=/path/to/python3." >&2
    exit 1
fi

if ! "$directory/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear "$directory"
fi
echo "Installing $* into $directory with $("$python" --version); the first time takes minutes."
"$directory/bin/python" -m pip install --quiet --quiet --disable-pip-version-check "$@"
touch "$directory/installed"
