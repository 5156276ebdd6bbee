#!/usr/bin/env bash
# Every check, from a machine with nothing but Python: lint, format, types, docs, tests. Arguments go to pytest.
# --fast, as the first one, leaves out docs and all tests but those of tests/fast.txt, for the inner loop.
# TRANSFORMERS=5.17 (or another set in constraints/) tests with those versions, in an environment of their own; lint,
# types and docs are checked with the newest.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
cd -- "$TRANSMLA_ROOT"

if [[ -z "${TRANSFORMERS:-}" ]]; then
    ruff check
    ruff format --check
    mypy
fi
tests=()
if [[ "${1:-}" == --fast ]]; then
    shift
    mapfile -t tests < <(grep -v '^#' tests/fast.txt)
elif [[ -z "${TRANSFORMERS:-}" ]]; then
    # Material's notice of a successor says nothing of these pages.
    NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict
fi
# Tests of one file stay together: they share what they have made. Each takes one thread.
pytest --numprocesses auto --dist loadfile "${tests[@]}" "$@"
