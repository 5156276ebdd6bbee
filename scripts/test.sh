#!/usr/bin/env bash
# Every check, from a machine with nothing but Python: lint, format, types, tests. Arguments go to pytest.
# TRANSFORMERS=5.17 (or another set in constraints/) tests with those versions, in an environment of their own; lint and
# types are checked with the newest.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
cd -- "$TRANSMLA_ROOT"

if [[ -z "${TRANSFORMERS:-}" ]]; then
    ruff check
    ruff format --check
    mypy
fi
# Tests of one file stay together: they share what they have made. Each takes one thread.
pytest --numprocesses auto --dist loadfile "$@"
