#!/usr/bin/env bash
# Makes a virtual environment and installs the project with its developer tools into it.
# Usage: tools/install.sh [VENV]     PYTHON=... picks the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${1:-.venv}
log=$venv/install.log
say() { printf 'install: %s\n' "$*"; }
die() { printf 'install: error: %s\n' "$*" >&2; exit 1; }

# Prints the version if this interpreter satisfies requires-python; tomllib itself needs 3.11.
fits() {
    "$1" - 2>/dev/null <<'PY'
import re, sys, tomllib
spec = tomllib.load(open("pyproject.toml", "rb"))["project"]["requires-python"]
compare = {">=": tuple.__ge__, "<=": tuple.__le__, ">": tuple.__gt__, "<": tuple.__lt__}
for op, version in re.findall(r"([<>]=?)\s*([\d.]+)", spec):
    bound = tuple(int(part) for part in version.split("."))
    if not compare[op](sys.version_info[: len(bound)], bound):
        sys.exit(1)
print("%d.%d.%d" % sys.version_info[:3])
PY
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if command -v "$candidate" >/dev/null && fits "$candidate" >/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    local range
    range=$(sed -n 's/^requires-python *= *"\(.*\)".*/\1/p' pyproject.toml)
    die "no Python $range found (looked at: ${PYTHON:-python3.11 python3.12 python3}).
    Debian 12: apt-get install python3 python3-venv. Elsewhere: PYTHON=/path/to/python3.11 make install"
}

# Debian ships `venv` without ensurepip unless python3-venv is installed; virtualenv carries its own pip.
make_venv() {
    local python=$1
    if "$python" -c 'import ensurepip' 2>/dev/null && "$python" -m venv --clear "$venv"; then
        return
    fi
    if "$python" -m virtualenv --version >/dev/null 2>&1; then
        say "this Python lacks ensurepip, using virtualenv"
        "$python" -m virtualenv --quiet --clear "$venv"
    elif command -v virtualenv >/dev/null; then
        say "this Python lacks ensurepip, using virtualenv"
        virtualenv --quiet --clear --python "$python" "$venv"
    else
        local version
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        die "$python cannot make virtual environments (ensurepip is missing).
    Debian or Ubuntu: apt-get install python$version-venv
    Elsewhere: $python -m pip install --user virtualenv"
    fi
}

# Runs pip with its output in the log; shows the package at hand on a terminal, a sign of life elsewhere.
quiet_pip() {
    local what=$1 start=$SECONDS pid ticks=0; shift
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@" >>"$log" 2>&1 &
    pid=$!
    trap 'kill "$pid" 2>/dev/null' INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        ticks=$((ticks + 1))
        local now
        now=$(grep -E '^ *(Collecting|Downloading|Building|Installing|Preparing)' "$log" | tail -1 | sed 's/^ *//' | cut -c1-70 || true)
        if [ -t 1 ]; then
            printf '\r\033[Kinstall: %s, %d s: %s' "$what" $((SECONDS - start)) "$now"
        elif [ $((ticks % 30)) -eq 0 ]; then
            say "$what, $((SECONDS - start)) s: $now"
        fi
    done
    if [ -t 1 ]; then printf '\r\033[K'; fi
    trap - INT TERM
    if ! wait "$pid"; then
        echo "--- the last lines of $log" >&2
        tail -n 30 "$log" >&2
        die "pip failed: $what (whole log: $log)"
    fi
    say "$what: done in $((SECONDS - start)) s"
}

if [ -x "$venv/bin/python" ] && fits "$venv/bin/python" >/dev/null && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    say "$venv exists (Python $(fits "$venv/bin/python"))"
else
    python=$(find_python)
    say "making $venv from $python (Python $(fits "$python"))"
    make_venv "$python"
fi

: >"$log"
quiet_pip "the project and its dependencies" install -e '.[dev]'
"$venv/bin/python" -c 'import torch; gpu = torch.cuda.is_available(); print(f"install: torch {torch.__version__},", "GPU usable" if gpu else "no GPU in use")'
