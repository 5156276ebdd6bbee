#!/usr/bin/env bash
# Is latent attention worth more than the grouped-query attention that it came from, at the same cache? Both start with the
# same logits (--exact) and train their attention on the same text, in the same order, for as many steps; the learning rate
# is each one's best of three by what is held out. Then both are measured on other text.
# Usage: [LEARNING_RATES="1e-4 3e-4 1e-3"] [BATCH_SIZE=8] [BF16=1] scripts/experiments/gqa.sh [STEPS [OUTPUT_DIR]]
# BF16 is for processors and GPUs that have units for it; others are hundreds of times slower with it.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"

steps="${1:-60}"
output="${2:-gqa-output}"
gguf=SmolLM2-135M-Instruct.Q4_1.gguf
read -ra rates <<<"${LEARNING_RATES:-1e-4 3e-4 1e-3}"
assets="$(python "$TRANSMLA_ROOT/scripts/fetch_assets.py")"
mkdir -p -- "$output"
exact="$output/exact"
[[ -e "$exact" ]] || transmla convert "$assets/smollm2" "$exact" --gguf-file "$gguf" --exact
# The GGUF file as a folder of weights.
source_folder="$(
    python - "$assets/smollm2" "$gguf" <<'PYTHON'
import sys
from transmla.checkpoint.source import open_source
print(open_source(sys.argv[1], gguf_file=sys.argv[2]).folder)
PYTHON
)"

best=()
for model in gqa mla; do
    start="$source_folder"
    [[ "$model" == mla ]] && start="$exact"
    runs=()
    for rate in "${rates[@]}"; do
        run="$output/$model-$rate"
        runs+=("$run")
        [[ -e "$run" ]] && continue
        printf '\n==> %s, learning rate %s\n' "$model" "$rate" >&2
        transmla finetune "$start" "$run" --dataset "$assets/wiki-tune.txt" --dataset "$assets/c4-tune.txt" \
            --teacher none --max-steps "$steps" --eval-steps "$steps" --learning-rate "$rate" --warmup-steps 0.1 \
            --num-eval-windows 16 --per-device-train-batch-size "${BATCH_SIZE:-8}" ${BF16:+--bf16} --resume
    done
    best+=("$(
        python - "${runs[@]}" <<'PYTHON'
import json, pathlib, sys
def held_out(run):
    return json.loads((pathlib.Path(run) / "transmla_finetune.json").read_text())["heldout"][-1]["nll"]
for run in sys.argv[1:]:
    print(f"{run}: {held_out(run):.4f} nats held out", file=sys.stderr)
print(min(sys.argv[1:], key=held_out))
PYTHON
    )")
done
transmla eval "$source_folder" "${best[@]}" --dataset "$assets/wiki-test.txt" --dataset "$assets/c4-test.txt" \
    --window 1024 --max-tokens 16384
