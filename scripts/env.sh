# Sourced by the other scripts: puts a virtual environment with the tested versions on PATH, making it the first time.
# The versions are those of constraints/transformers-$TRANSFORMERS.txt, the newest unless told otherwise. It lies in .venv
# at the root of the checkout (.venv-$TRANSFORMERS for other versions), or where TRANSMLA_VENV says. After the first time
# this takes no time.

TRANSMLA_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

_say() { printf '%s\n' "$*" >&2; }

# The environment is finished when its stamp holds this: the requirements, and the checkout that it points into.
_wanted_stamp() {
    "$1" - "$TRANSMLA_ROOT" "$TRANSMLA_CONSTRAINTS" <<'PYTHON'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
files = b"".join((root / name).read_bytes() for name in ("pyproject.toml", sys.argv[2]))
print(hashlib.sha256(str(root).encode() + files).hexdigest())
PYTHON
}

_find_python() {
    local name
    for name in python3.13 python3.12 python3.11 python3; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$name"
            return
        fi
    done
    _say "No Python of version 3.11 or newer, with its venv module, was found; install one and run this again."
    return 1
}

_install() {
    local started=$SECONDS
    "$1" -m pip install -qq --disable-pip-version-check -c "$TRANSMLA_ROOT/$TRANSMLA_CONSTRAINTS" "${@:2}"
    _say "  done in $((SECONDS - started)) s"
}

_make_environment() {
    local venv="$1" stamp="$1/transmla-stamp" state python torch wanted
    state="$(cat -- "$stamp" 2>/dev/null || true)"
    if [[ -n "$state" && -x "$venv/bin/python" && "$state" == "$(_wanted_stamp "$venv/bin/python")" ]]; then
        return
    fi

    if [[ ! -e "$venv" || "$state" == unfinished ]]; then
        python="$(_find_python)"
        _say "Making a virtual environment in $venv with $("$python" --version)"
        mkdir -p -- "$venv"
        # Interrupted from here on, the next call starts over.
        printf 'unfinished\n' >"$stamp"
        find "$venv" -mindepth 1 ! -name transmla-stamp -delete
        "$python" -m venv "$venv"
    elif [[ -e "$venv/pyvenv.cfg" ]]; then
        rm -f -- "$stamp"
    else
        _say "$venv is not a virtual environment; remove it or set TRANSMLA_VENV to another folder."
        return 1
    fi

    wanted="$(_wanted_stamp "$venv/bin/python")"
    # torch comes first and alone: it is by far the largest, and nothing else may choose its version.
    torch="$(grep '^torch==' "$TRANSMLA_ROOT/$TRANSMLA_CONSTRAINTS")"
    _say "Installing $torch"
    _install "$venv/bin/python" "$torch"
    _say "Installing transmla and its tools"
    _install "$venv/bin/python" -e "${TRANSMLA_ROOT}[dev]"
    printf '%s\n' "$wanted" >"$stamp"
}

# _choose_constraints VERSION: the file of that set of versions, and of the newest one for none.
_choose_constraints() {
    local known newest
    known="$(cd -- "$TRANSMLA_ROOT/constraints" && printf '%s\n' transformers-*.txt | sed 's/transformers-\(.*\)\.txt/\1/' | sort -V)"
    newest="$(tail -n 1 <<<"$known")"
    if ! grep -qxF -- "${1:-$newest}" <<<"$known"; then
        _say "TRANSFORMERS=$1 is none of the tested sets of versions: $(paste -sd ' ' <<<"$known")"
        return 1
    fi
    TRANSMLA_CONSTRAINTS="constraints/transformers-${1:-$newest}.txt"
    [[ "${1:-$newest}" == "$newest" ]] || TRANSMLA_VENV="${TRANSMLA_VENV:-$TRANSMLA_ROOT/.venv-$1}"
}

_choose_constraints "${TRANSFORMERS:-}"
TRANSMLA_VENV="${TRANSMLA_VENV:-$TRANSMLA_ROOT/.venv}"
[[ "$TRANSMLA_VENV" == /* ]] || TRANSMLA_VENV="$PWD/$TRANSMLA_VENV"
_make_environment "$TRANSMLA_VENV"
export PATH="$TRANSMLA_VENV/bin:$PATH"
