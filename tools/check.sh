#!/usr/bin/env bash
# Every check that is not a test. Runs them all, so that one broken thing does not hide the next, and fails at the end.
# Usage: tools/check.sh BIN ROOM... -- SCRIPT_FOLDER...
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bin=$1; shift
rooms=(); scripts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do rooms+=("$1"); shift; done
shift
for folder in "$@"; do
    [ -n "$(find "$folder" -name '*.py' -print -quit 2>/dev/null)" ] && scripts+=("$folder")
done

failed=()
step() {
    local name=$1 start=$SECONDS; shift
    echo "--- $name"
    if ! "$@"; then failed+=("$name"); fi
    echo "    $((SECONDS - start)) s"
}

step "ruff check" "$bin/ruff" check --quiet .
step "ruff format --check" "$bin/ruff" format --check --quiet .
step "mypy: packages" "$bin/mypy"
step "mypy: tools and their tests" "$bin/mypy" --explicit-package-bases "${scripts[@]}"
step "import arrows" "$bin/python" tools/check_imports.py . "${rooms[@]}"
step "docstrings and sizes" "$bin/python" tools/check_docs.py . "${rooms[@]}"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "All checks passed."
