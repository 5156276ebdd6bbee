#!/usr/bin/env bash
# Our method beside the TransMLA paper's at every FreqFold in question, so that the paper's can be read at its best one. The
# best is picked on the very text it is judged by, which favours the paper's method; ours has nothing to pick. With
# HEAL_STEPS also ours healed, on two windows for each step, half of them from C4; then all are judged on C4, too.
# Usage: [FREQ_FOLDS="2 4"] scripts/experiments/methods.sh [QK_ROPE_HEAD_DIM [KV_LORA_RANK [OUTPUT_DIR [HEAL_STEPS]]]]
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"

rope="${1:-32}"
rank="${2:-96}"
output="${3:-compare-output}/$rope-$rank"
gguf=SmolLM2-135M-Instruct.Q4_1.gguf
heal_steps="${4:-0}"
corpora=(wiki)
# SmolLM2 has 32 rotary pairs: a fold puts as many of them on one slot as there are slots too few, or more.
least=$((rope < 64 ? 64 / rope : 1))
read -ra folds <<<"${FREQ_FOLDS:-$least $((2 * least)) $((4 * least)) $((8 * least > 32 ? 32 : 8 * least))}"
converted=()

step() { printf '\n==> %s\n' "$*" >&2; }

convert() {
    step "Converting to $1"
    transmla convert "$assets/smollm2" "$output/$1" --gguf-file "$gguf" \
        --qk-rope-head-dim "$rope" --kv-lora-rank "$rank" \
        --calibration "$assets/wiki-fit.txt" --num-windows 128 --window 256 --overwrite "${@:2}"
    converted+=("$output/$1")
}

assets="$(python "$TRANSMLA_ROOT/scripts/fetch_assets.py")"
mkdir -p -- "$output"
for fold in "${folds[@]}"; do
    convert "rorope-fold-$fold" --method rorope --freq-fold "$fold"
done
convert ours
if ((heal_steps)); then
    convert ours-healed --calibration "$assets/c4-fit.txt" --num-windows $((2 * heal_steps)) \
        --heal-steps "$heal_steps" --compute-dtype bfloat16
    corpora+=(c4)
fi

for corpus in "${corpora[@]}"; do
    report="$output/report-$corpus.json"
    step "Measuring; the report goes to $report"
    transmla eval "$assets/smollm2" "${converted[@]}" --gguf-file "$gguf" \
        --dataset "$assets/$corpus-test.txt" --window 1024 --max-tokens 16384 --json >"$report"
    python - "$report" <<'PYTHON'
import pathlib, sys
from rich.console import Console
from transmla.cli.eval_view import report_tables
from transmla.evaluate.report.report import EvalReport
Console().print(*report_tables(EvalReport.model_validate_json(pathlib.Path(sys.argv[1]).read_text())), sep="\n")
PYTHON
done
