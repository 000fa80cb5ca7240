#!/usr/bin/env bash
# Runs the tests on the oldest and the newest release of transformers that pyproject.toml allows, each in a fresh virtual
# environment. Arguments go to pytest:  scripts/versions.sh -n 2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python3
if python3.11 -c "" 2>/dev/null; then python=python3.11; fi

# transformers, and what that release needs in other versions than constraints.txt has
releases=(
    "transformers==5.17.0 huggingface_hub==1.33.0 tokenizers==0.23.2"
    "transformers==5.23.0"
)
for release in "${releases[@]}"; do
    echo "== ${release%% *}"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    sed -E '/^(transformers|huggingface_hub|tokenizers)==/d' constraints.txt >"$work/constraints.txt"
    "$python" -m venv "$work/venv"
    # shellcheck disable=SC2086  # the words of a release are requirements of their own
    "$work/venv/bin/pip" install -q -c "$work/constraints.txt" ".[test]" $release
    "$work/venv/bin/pytest" "$@"
    rm -rf "$work"
done
