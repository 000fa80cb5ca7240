#!/usr/bin/env bash
# Runs the tests on the oldest and the newest releases of transformers and torch that pyproject.toml allows, each in a
# fresh virtual environment. Pip takes torch's CUDA builds, some gigabytes. Arguments go to pytest: scripts/versions.sh -n 2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python3
if python3.11 -c "" 2>/dev/null; then python=python3.11; fi

# transformers and torch, and what that release needs in other versions than constraints.txt has
releases=(
    "transformers==5.17.0 torch==2.11.0 huggingface_hub==1.33.0 tokenizers==0.23.2"
    "transformers==5.23.0 torch==2.15.0"
)
for release in "${releases[@]}"; do
    echo "== $release"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    sed -E '/^(transformers|torch|setuptools|huggingface_hub|tokenizers)==/d' constraints.txt >"$work/constraints.txt"
    "$python" -m venv "$work/venv"
    # shellcheck disable=SC2086  # the words of a release are requirements of their own
    "$work/venv/bin/pip" install -q -c "$work/constraints.txt" ".[test]" $release
    "$work/venv/bin/pytest" "$@"
    rm -rf "$work"
done
