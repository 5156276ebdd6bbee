#!/usr/bin/env bash
# Perplexity after llama.cpp's own quantisation: SmolLM2, and its conversion with the quantizable profile, at the same types.
# Usage: [LLAMA_CPP=FOLDER] scripts/experiments/quantized.sh [OUTPUT_DIR]. LLAMA_CPP holds llama-quantize and llama-perplexity;
# without it both are built, which wants a C++ compiler and ten minutes.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
# shellcheck source=tests/engines/env.sh
source "$TRANSMLA_ROOT/tests/engines/env.sh"

output="${1:-quantized-output}"
gguf=SmolLM2-135M-Instruct.Q4_1.gguf
assets="$(python "$TRANSMLA_ROOT/scripts/fetch_assets.py")"
mkdir -p -- "$output"

make_engine_environment llama.cpp install_llama_cpp
vendor="$_engine_venv/source/vendor/llama.cpp"
tools="${LLAMA_CPP:-$vendor/build/bin}"
if [[ ! -x "$tools/llama-quantize" || ! -x "$tools/llama-perplexity" ]]; then
    "$_engine_venv/bin/pip" install -qq --disable-pip-version-check cmake ninja >&2
    PATH="$_engine_venv/bin:$PATH"
    cmake -S "$vendor" -B "$vendor/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF \
        -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF >&2
    cmake --build "$vendor/build" --target llama-quantize llama-perplexity >&2
fi
# The converter asks for sentencepiece before it looks at what kind of tokenizer there is.
"$_engine_venv/bin/pip" install -qq --disable-pip-version-check sentencepiece --no-deps --target "$output/sentencepiece" \
    --upgrade >&2

to_gguf() {
    PYTHONPATH="$vendor/gguf-py:$output/sentencepiece" python "$vendor/convert_hf_to_gguf.py" "$1" --outtype f32 \
        --outfile "$output/$2-f32.gguf" >&2
    for kind in Q8_0 Q4_K_M; do
        "$tools/llama-quantize" "$output/$2-f32.gguf" "$output/$2-$kind.gguf" "$kind" >&2
    done
}

if [[ ! -e "$output/converted" ]]; then
    transmla convert "$assets/smollm2" "$output/converted" --gguf-file "$gguf" --kv-lora-rank 96 \
        --qk-rope-head-dim 32 --profile quantizable --calibration "$assets/wiki-fit.txt" --num-windows 128 \
        --window 256 >&2
    # It asks for a number where DeepSeek-V3 says null.
    sed -i.bak 's/"q_lora_rank": null/"q_lora_rank": 0/' "$output/converted/config.json"
fi
to_gguf "$output/converted" converted
source_folder="$(
    python - "$assets/smollm2" "$gguf" <<'PYTHON'
import sys
from transmla.checkpoint.source import open_source
print(open_source(sys.argv[1], gguf_file=sys.argv[2]).folder)
PYTHON
)"
to_gguf "$source_folder" source

head -c 40000 "$assets/wiki-test.txt" >"$output/text.txt"
printf '%-8s %12s %12s %16s\n' type source converted 'converted, MB'
for kind in f32 Q8_0 Q4_K_M; do
    perplexities=()
    for model in source converted; do
        # Not repacked for units that some virtual machines claim and do not have.
        perplexities+=("$("$tools/llama-perplexity" -m "$output/$model-$kind.gguf" -f "$output/text.txt" -c 512 \
            --no-repack 2>&1 | sed -n 's/.*Final estimate: PPL = \([0-9.]*\).*/\1/p')")
    done
    printf '%-8s %12s %12s %16s\n' "$kind" "${perplexities[@]}" \
        "$(($(wc -c <"$output/converted-$kind.gguf") / 1000000))"
done
