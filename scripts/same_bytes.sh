#!/usr/bin/env bash
# Whether the quickstart's conversions have the same bytes, in weights and config.json, as those of another commit.
# Usage: scripts/same_bytes.sh COMMIT [FOLDER]
# FOLDER keeps the other commit's conversions for the next call; each of the four takes minutes on two cores.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

commit="$(git -C "$TRANSMLA_ROOT" rev-parse --verify "${1:?COMMIT is missing}^{commit}")"
folder="$(realpath -m -- "${2:-same-bytes-output}")/$commit"
assets="$(python "$TRANSMLA_ROOT/scripts/fetch_assets.py")"
mkdir -p -- "$folder"
scratch="$(mktemp -d)"
trap 'rm -rf -- "$scratch"' EXIT

# convert CHECKOUT OUTPUT [FLAGS…]: what scripts/quickstart.sh converts, with the package of CHECKOUT.
convert() {
    [[ -f "$2/config.json" ]] && return
    PYTHONPATH="$1" PYTHONSAFEPATH=1 python -m transmla convert "$assets/smollm2" "$2" --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf \
        --qk-rope-head-dim 32 --kv-lora-rank 96 --calibration "$assets/wiki-fit.txt" --num-windows 128 --window 256 \
        --quiet "${@:3}" >&2
}

# The bytes that matter; the report has times, and the recipe folders, that differ from run to run.
sums() {
    (cd -- "$1" && sha256sum -- */*.safetensors */config.json)
}

git -C "$TRANSMLA_ROOT" archive "$commit" transmla | tar -x -C "$scratch"
convert "$scratch" "$folder/fitted"
convert "$scratch" "$folder/rorope" --method rorope --freq-fold 4
convert "$TRANSMLA_ROOT" "$scratch/now/fitted"
convert "$TRANSMLA_ROOT" "$scratch/now/rorope" --method rorope --freq-fold 4
diff <(sums "$folder") <(sums "$scratch/now")
printf 'The same bytes as at %s\n' "$commit"
