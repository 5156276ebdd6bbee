#!/usr/bin/env bash
# A small real model, converted by both methods, measured beside its source, and speaking through stock transformers.
# Usage: scripts/quickstart.sh [OUTPUT_DIR]
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

output="${1:-quickstart-output}"
gguf=SmolLM2-135M-Instruct.Q4_1.gguf
ours="$output/mla-32-96"
rorope="$output/rorope-32-96"

step() { printf '\n==> %s\n' "$*" >&2; }

convert() {
    if [[ -f "$1/config.json" ]]; then
        step "Found $1; remove it to convert again"
        return
    fi
    step "Converting to $1: 384 cached numbers per token and layer become 32 + 96"
    transmla convert "$assets/smollm2" "$1" --gguf-file "$gguf" --qk-rope-head-dim 32 --kv-lora-rank 96 \
        --calibration "$assets/wiki-fit.txt" --num-windows 128 --window 256 "${@:2}"
}

step "Fetching SmolLM2-135M and Wikipedia text"
assets="$(python "$TRANSMLA_ROOT/scripts/fetch_assets.py")"
mkdir -p -- "$output"

convert "$ours"
# The paper's method, for comparison.
convert "$rorope" --method rorope --freq-fold 4

step "Measuring all three on Wikipedia articles that no conversion has seen, and having them copy"
transmla eval "$assets/smollm2" "$rorope" "$ours" --gguf-file "$gguf" \
    --dataset "$assets/wiki-test.txt" --window 1024 --max-tokens 16384 --needle-lengths 512 --probes copy,passage

step "Letting $ours speak"
for prompt in "The capital of France is" "Water is made of two elements,"; do
    printf '> %s' "$prompt"
    transmla generate "$ours" "$prompt" --no-chat-template --max-new-tokens 40
done

step "Done in $SECONDS s; the converted models are in $output"
