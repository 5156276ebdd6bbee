#!/usr/bin/env bash
# Every check, from a machine with nothing but Python: lint, format, types, tests. Arguments go to pytest.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
cd -- "$TRANSMLA_ROOT"

ruff check
ruff format --check
mypy
# Tests of one file stay together: they share what they have made. Each takes one thread.
pytest --numprocesses auto --dist loadfile "$@"
