#!/usr/bin/env bash
# A converted SmolLM2 in engines as they are released, against stock transformers in float32: next tokens, text, cache.
# Usage: tests/engines/check.sh [llama.cpp] [mlx] [vllm] [vllm-transformers]; all of them by default. OUTPUT_DIR says
# where the conversions and results go. Exit code 1 if an engine says anything else than transformers.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../../scripts/env.sh"
runners="$TRANSMLA_ROOT/tests/engines/runners"
# shellcheck source=tests/engines/env.sh
source "$TRANSMLA_ROOT/tests/engines/env.sh"

engines=("$@")
((${#engines[@]})) || engines=(llama.cpp mlx vllm vllm-transformers)
for engine in "${engines[@]}"; do
    [[ " llama.cpp mlx vllm vllm-transformers " == *" $engine "* ]] && continue
    printf 'Unknown engine %s; known: llama.cpp, mlx, vllm, vllm-transformers.\n' "$engine" >&2
    exit 2
done
output="${OUTPUT_DIR:-engines-output}"
gguf=SmolLM2-135M-Instruct.Q4_1.gguf
assets="$(python "$TRANSMLA_ROOT/scripts/fetch_assets.py")"
mkdir -p -- "$output"

# converted NAME RANK ROPE [FLAG …]: few windows, for what is compared is one checkpoint with itself.
converted() {
    local name="$1" folder="$output/checkpoints/$1"
    mkdir -p -- "$output/$name" "$output/checkpoints"
    if [[ ! -e "$folder" ]]; then
        transmla convert "$assets/smollm2" "$folder" --gguf-file "$gguf" --kv-lora-rank "$2" --qk-rope-head-dim "$3" \
            --calibration "$assets/wiki-fit.txt" --num-windows 16 --num-heldout-windows 2 --resume "${@:4}" >&2
    fi
    if [[ ! -e "$output/$name/transformers.npz" ]]; then
        python "$runners/run_transformers.py" "$folder" "$assets/wiki-test.txt" "$output/$name/prompts.json" \
            "$output/$name/transformers.npz"
    fi
}

# with_config CHECKPOINT COPY OLD NEW: links to the same files, with one value of config.json changed.
with_config() {
    rm -rf -- "$2"
    mkdir -p -- "$2"
    ln -s -- "$(realpath -- "$1")"/* "$2"
    rm -- "$2/config.json"
    sed "s/$3/$4/" "$1/config.json" >"$2/config.json"
}

for engine in "${engines[@]}"; do
    case "$engine" in
    llama.cpp)
        converted 96+32 96 32
        make_engine_environment llama.cpp install_llama_cpp
        vendor="$_engine_venv/source/vendor/llama.cpp"
        # It asks for a number where DeepSeek-V3 says null.
        with_config "$output/checkpoints/96+32" "$output/checkpoints/96+32-llama.cpp" \
            '"q_lora_rank": null' '"q_lora_rank": 0'
        PYTHONPATH="$vendor/gguf-py" python "$vendor/convert_hf_to_gguf.py" "$output/checkpoints/96+32-llama.cpp" \
            --outtype f32 --outfile "$output/checkpoints/96+32.gguf" >&2
        "$_engine_venv/bin/python" "$runners/run_llama_cpp.py" "$output/checkpoints/96+32.gguf" \
            "$output/96+32/prompts.json" "$output/96+32/llama.cpp.npz" >&2
        ;;
    mlx)
        converted 96+32 96 32
        make_engine_environment mlx install_mlx
        "$_engine_venv/bin/python" "$runners/run_mlx.py" "$output/checkpoints/96+32" "$output/96+32/prompts.json" \
            "$output/96+32/mlx.npz" >&2
        ;;
    vllm | vllm-transformers)
        # More than SmolLM2 fills, so the plain method will do, which is faster there.
        converted 512+64 512 64 --engine vllm-cpu --method rorope
        make_engine_environment vllm install_vllm
        checkpoint="$output/checkpoints/512+64"
        if [[ "$engine" == vllm-transformers ]]; then
            with_config "$checkpoint" "$checkpoint-transformers" DeepseekV3ForCausalLM TransformersForCausalLM
            checkpoint+=-transformers
        fi
        VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 "$_engine_venv/bin/python" "$runners/run_vllm.py" "$checkpoint" "$output/512+64/prompts.json" \
            "$output/512+64/$engine.npz" >&2
        ;;
    esac
done

folders=()
for folder in "$output"/96+32 "$output"/512+64; do [[ -e "$folder/transformers.npz" ]] && folders+=("$folder"); done
python "$TRANSMLA_ROOT/tests/engines/compare.py" "${folders[@]}"
