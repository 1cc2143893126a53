#!/bin/sh
# Usage: find_python.sh VERSION...
# Prints the executable of a final CPython of the first VERSION (such as 3.11) that is found on PATH
# or among pyenv's versions and can make environments; prints nothing when there is none.
set -u

# Candidates one a line, best first: by their versioned names in the order asked for, then by the
# plain names, which may be any version.
candidates() {
    directories=$(echo "$PATH" | tr ':' '\n')
    if command -v pyenv >/dev/null 2>&1; then
        directories=$(echo "$directories"; ls -d "$(pyenv root)"/versions/*/bin 2>/dev/null)
    fi
    for version in "$@"; do
        echo "$directories" | sed "s|\$|/python$version|"
    done
    echo "$directories" | sed 's|$|/python3|'
    echo "$directories" | sed 's|$|/python|'
}

# The candidate is executed, not only seen: a pyenv shim exists even where it refuses to run, and
# Debian's python3 may lack ensurepip. Free-threaded builds and pre-releases are passed over.
probe='
import ensurepip, sys, sysconfig, venv
final = sys.version_info.releaselevel == "final"
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
if final and not free_threaded and "%d.%d" % sys.version_info[:2] in sys.argv[1:]:
    print(sys.executable)
'

candidates "$@" | while IFS= read -r candidate; do
    [ -x "$candidate" ] || continue
    executable=$("$candidate" -c "$probe" "$@" 2>/dev/null </dev/null) || continue
    if [ -n "$executable" ]; then
        echo "$executable"
        break
    fi
done
