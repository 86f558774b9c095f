#!/usr/bin/env bash
# What takes a GPU, in one go:  bash tools/full_size.sh MINUTES [further flags of main.py]
#
# On CIFAR-10, in this order: the training step with --compile off and on; DHVT-T/4 and S/4 by the recipe fast for 100
# epochs; both by the paper's recipe for 300. MINUTES is the limit of all runs together; a run that it stops keeps its
# checkpoint, and the same command again goes on; what step.txt has is not measured again. Each run has its folder below
# OUTPUT (output/full-size), each command is printed. From the environment: DATA (train/<class>/, val/<class>/; CIFAR-10
# is downloaded without it), EPOCHS (of fast and of the paper's recipe, "100 300"), ROUNDS (measurements of each step, 5),
# PYTHON, DRY_RUN=1.
set -eo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    echo 'error: usage: bash tools/full_size.sh MINUTES [further flags of main.py]' >&2
    exit 2
fi
end=$((SECONDS + 60 * $1))
shift
output=${OUTPUT:-output/full-size}
if ! [[ ${EPOCHS:=100 300} =~ ^[1-9][0-9]*\ [1-9][0-9]*$ ]]; then
    echo "error: EPOCHS is two whole numbers, of fast and of the paper's recipe, not '$EPOCHS'" >&2
    exit 2
fi
read -r fast paper <<< "$EPOCHS"
data=()
[ -z "$DATA" ] || data=(--data-set FOLDER)
find_python
export PYTHON=$python

# within COMMAND…: runs a command in the time that is left
within() {
    local left=$((end - SECONDS)) status=0
    if [ "$left" -le 0 ]; then
        echo "No time left for: $*"
        return
    fi
    timeout --foreground "$left" "$@" || status=$?
    [ "$SECONDS" -ge "$end" ] || [ "$status" -eq 0 ] || exit "$status"
}

kind=$("$python" -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")' 2> /dev/null || echo cpu)
if [ -n "$DRY_RUN" ]; then
    bash "$root/tools/benchmarks.sh" "$kind" step
elif [ ! -e "$output/step.txt" ]; then
    mkdir -p "$output"
    within bash "$root/tools/benchmarks.sh" "$kind" step | tee "$output/step.part"
    [ "$SECONDS" -ge "$end" ] || mv "$output/step.part" "$output/step.txt"
fi
for run in "fast $fast tiny" "fast $fast small" "cifar10 $paper tiny" "cifar10 $paper small"; do
    read -r recipe epochs size <<< "$run"
    MODEL=dhvt_${size}_cifar_patch4 OUTPUT=$output/$recipe-$size \
        within bash "$root/run_code.sh" "$recipe" --epochs "$epochs" "${data[@]}" "$@"
done
