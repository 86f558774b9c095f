#!/usr/bin/env bash
# Measures steps, evaluation, the loader, augmentation and reading (docs/speed.md):  bash tools/benchmarks.sh cpu|gpu [step eval loader augment data]
#
# Each command is printed before it runs. From the environment:
#   DATA       train/<class>/ and val/<class>/ with 32-px images (data/cifar10-jpeg); without it loader reads the
#              digits, augment is left out, and data measures memory alone
#   ROUNDS     measurements of each variant (5)
#   PYTHON     the interpreter
#   DRY_RUN=1  print the commands only
set -eo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

kind=${1:-}
case $kind in
    cpu) device=cpu ;;
    gpu) device=cuda ;;
    *)
        echo 'error: bash tools/benchmarks.sh cpu|gpu [step eval loader augment data]' >&2
        exit 2
        ;;
esac
shift
wanted=" ${*:-step eval loader augment data} "
for word in "$@"; do
    case $word in
        step | eval | loader | augment | data) ;;
        *) echo "error: $word is none of step, eval, loader, augment, data" >&2; exit 2 ;;
    esac
done
DATA=${DATA:-data/cifar10-jpeg} ROUNDS=${ROUNDS:-5}
[ -n "$DRY_RUN" ] || find_python

# measure WHAT FILE FLAG…: prints and runs a command
measure() {
    [[ $wanted == *" $1 "* ]] || return 0
    shift
    printf '\n+ python%s\n' "$(printf ' %q' "$@")"
    [ -n "$DRY_RUN" ] || "$python" "$root/$1" "${@:2}"
}

if [ "$kind" = cpu ]; then
    models=(tiny_cifar_patch4:32:128:deit_tiny_cifar_patch4 small_imagenet_patch16:224:16:deit_small_patch16_224)
    compiled=()
else
    models=(tiny_cifar_patch4:32:256:deit_tiny_cifar_patch4 small_cifar_patch4:32:256:deit_small_cifar_patch4
        tiny_imagenet_patch16:224:128:deit_tiny_patch16_224 small_imagenet_patch16:224:128:deit_small_patch16_224)
    compiled=(--candidate "--amp bf16 --compile default" --candidate "--amp bf16 --compile max-autotune")
fi
for entry in "${models[@]}"; do
    IFS=: read -r model size batch deit <<< "$entry"
    sizes=(--device "$device" --input-size "$size" --batch-size "$batch" --rounds "$ROUNDS" --model "dhvt_$model"
        --baseline "--amp off" --candidate "--amp bf16" --candidate "--model $deit --amp bf16")
    measure step tools/benchmark.py step "${sizes[@]}" "${compiled[@]}"
    measure eval tools/benchmark.py eval "${sizes[@]}" # is not compiled
done
data=(--data-set DIGITS)
[ ! -d "$DATA" ] || data=(--data-set FOLDER --data-path "$DATA" --train-fraction 0.2)
measure loader tools/benchmark.py loader --device "$device" "${data[@]}" --rounds "$ROUNDS" \
    --baseline "--augment pil" --candidate "--augment batched"
if [ -d "$DATA" ]; then
    measure augment tools/benchmark_augment.py "$DATA" --input-size 32 --batch-size 256 --device "$device"
    measure augment tools/benchmark_augment.py "$DATA" --input-size 224 --batch-size 64 --device "$device"
    measure data tools/benchmark_data.py speed "$DATA" --input-size 32
fi
measure data tools/benchmark_data.py memory
