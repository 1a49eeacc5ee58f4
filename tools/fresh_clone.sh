#!/usr/bin/env bash
# Clones HEAD into an empty folder and runs make targets there, as somebody who has just found the project would.
# Usage: tools/fresh_clone.sh [TARGET ...]      (default: demo test check; e.g. tools/fresh_clone.sh demo)
#   KEEP=1       keep the clone
#   INTO=FOLDER  clone there instead of into a new temporary folder (must not exist)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(demo test check)

if [ -n "$(git -C "$root" status --porcelain)" ]; then
    echo "fresh_clone: note: uncommitted changes are not part of what is checked" >&2
fi
if [ -n "${INTO:-}" ]; then
    [ ! -e "$INTO" ] || { echo "fresh_clone: error: $INTO exists" >&2; exit 1; }
    folder=$INTO
else
    folder=$(mktemp -d "${TMPDIR:-/tmp}/flamingo-clone.XXXXXX")
fi
cleanup() {
    if [ -n "${KEEP:-}" ]; then echo "fresh_clone: kept $folder"; else rm -rf "$folder"; fi
}
trap cleanup EXIT

# --no-local: objects travel as over a network, so nothing of this checkout can leak into the clone.
git clone --quiet --no-local "$root" "$folder/checkout"
echo "fresh_clone: $(git -C "$folder/checkout" log -1 --format='%h %s')"

# Nothing of the caller's virtual environment or paths may help.
unset VIRTUAL_ENV PYTHONPATH PYTHONHOME
for target in "${targets[@]}"; do
    start=$SECONDS
    echo "fresh_clone: make $target"
    if ! make -C "$folder/checkout" --no-print-directory "$target" </dev/null; then
        echo "fresh_clone: FAILED: make $target after $((SECONDS - start)) s" >&2
        exit 1
    fi
    echo "fresh_clone: make $target took $((SECONDS - start)) s"
done
echo "fresh_clone: all of it passed: ${targets[*]}"
