#!/usr/bin/env bash
# Measures the README's tables:  bash tools/benchmarks.sh cpu|gpu [step eval augment loader epoch memory]
#
# Each command is printed before it runs; what it measured is written to OUTPUT. From the environment:
#   BASE       the commit to compare with (b1e8208, the last one before the work on speed)
#   DATA       train/<class>/ and val/<class>/ with 32-px images (data/cifar10-jpeg); where it is absent, other
#              measurements take made-up images, and augment is left out
#   OUTPUT     output/benchmarks
#   ROUNDS     measurements of each variant (5)
#   PYTHON     the interpreter
#   DRY_RUN=1  print the commands only
set -eo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

kind=${1:-}
case $kind in
    cpu) device=cpu fraction=0.2 ;;
    gpu) device=cuda fraction=1 ;;
    *)
        echo 'error: bash tools/benchmarks.sh cpu|gpu [step eval augment loader epoch memory]' >&2
        exit 2
        ;;
esac
shift
wanted=" ${*:-step eval augment loader epoch memory} "
BASE=${BASE:-b1e8208} DATA=${DATA:-data/cifar10-jpeg} OUTPUT=${OUTPUT:-output/benchmarks} ROUNDS=${ROUNDS:-5}
data=()
[ ! -d "$DATA" ] || data=(--data-set FOLDER --data-path "$DATA" --train-fraction "$fraction")
[ -n "$DRY_RUN" ] || find_python

# measure NAME WHAT FLAG…: prints and runs a command, which makes one table and NAME.json
measure() {
    local name=$1 what=$2 word
    shift 2
    [[ $wanted == *" $what "* ]] || return 0
    local command=(tools/benchmark.py "$what" "$@" --device "$device")
    [ "$what" = augment ] || command+=(--json "$OUTPUT/$kind-$name.json")
    printf '\n+ python'
    for word in "${command[@]}"; do
        case $word in *[!A-Za-z0-9_./:=,-]*) printf ' "%s"' "$word" ;; *) printf ' %s' "$word" ;; esac
    done
    printf '\n'
    [ -z "$DRY_RUN" ] || return 0
    mkdir -p "$OUTPUT"
    "$python" "$root/${command[0]}" "${command[@]:1}"
}

plain="--worktree $BASE --plain"
# glibc's own default: main.py leaves an allocator alone that the environment configures.
allocator='ENV:MALLOC_PERTURB_=0'
tiny=(--model dhvt_tiny_cifar_patch4 --input-size 32)
small=(--model dhvt_small_cifar_patch4 --input-size 32)
tiny224=(--model dhvt_tiny_imagenet_patch16 --input-size 224)
small224=(--model dhvt_small_imagenet_patch16 --input-size 224)
pipelines=(--baseline "LABEL:PIL --augment pil" --candidate "LABEL:batched --augment batched")

if [ "$kind" = cpu ]; then
    for what in step eval; do
        measure "$what" "$what" "${tiny[@]}" --batch-size 128 --augment pil --rounds "$ROUNDS" --seconds 5 \
            --baseline "LABEL:'plain float32' $plain --amp off" \
            --candidate "LABEL:'plain bfloat16' $plain --amp bf16" \
            --candidate "LABEL:'$BASE, float32' --worktree $BASE --amp off" \
            --candidate "LABEL:'$BASE, bfloat16' --worktree $BASE --amp bf16" \
            --candidate "LABEL:'float32, default allocator' --amp off $allocator" \
            --candidate "LABEL:'bfloat16, default allocator' --amp bf16 $allocator" \
            --candidate "LABEL:float32 --amp off" \
            --candidate "LABEL:bfloat16 --amp bf16"
        evit='--model deit_small_patch16_shrink_base --base_keep_rate 0.7 --fuse_token --shrink_start_epoch 0'
        measure "$what-evit" "$what" --input-size 224 --batch-size 16 --augment pil --rounds "$ROUNDS" \
            --baseline "LABEL:DeiT-S timm:deit_small_patch16_224" \
            --candidate "LABEL:'EViT-S, keep rate 0.7' $evit"
    done
    measure loader loader "${tiny[@]}" --batch-size 128 "${data[@]}" --rounds "$ROUNDS" --seconds 5 "${pipelines[@]}"
    measure epoch epoch "${tiny[@]}" --batch-size 128 "${data[@]}" --rounds 1 \
        --baseline "LABEL:'$BASE, float32' --worktree $BASE --amp off" \
        --candidate "LABEL:PIL --augment pil" \
        --candidate "LABEL:batched --augment batched"
    sizes32=(32 64 128 256) sizes224=(8 16 32 64)
else
    for model in tiny_cifar_patch4 small_cifar_patch4 tiny_cifar_patch2 small_cifar_patch2 \
        tiny_imagenet_patch16 small_imagenet_patch16; do
        own=("${data[@]}") size=32 batch=256
        case $model in *imagenet*) own=() size=224 batch=128 ;; esac
        case $model in tiny*) deit=deit_tiny_patch16_224 ;; *) deit=deit_small_patch16_224 ;; esac
        flags=(--model "dhvt_$model" --input-size "$size" --batch-size "$batch")
        measure "step-$model" step "${flags[@]}" --augment pil --rounds "$ROUNDS" --profile "$OUTPUT/profile-$model" \
            --baseline "LABEL:'plain float32' $plain --amp off" \
            --candidate "LABEL:'plain bfloat16' $plain --amp bf16" \
            --candidate "LABEL:eager --compile off" \
            --candidate "LABEL:compiled --compile default" \
            --candidate "LABEL:'compiled, reduce-overhead' --compile reduce-overhead" \
            --candidate "LABEL:'compiled, max-autotune' --compile max-autotune" \
            --candidate "LABEL:'$deit, eager' timm:$deit --input-size 224 --batch-size 128 --compile off" \
            --candidate "LABEL:'$deit, compiled' timm:$deit --input-size 224 --batch-size 128 --compile default"
        measure "eval-$model" eval "${flags[@]}" --rounds "$ROUNDS" --profile "$OUTPUT/profile-$model" \
            --baseline "LABEL:'plain float32' $plain --amp off" \
            --candidate "LABEL:'plain bfloat16' $plain --amp bf16" \
            --candidate "LABEL:float32 --amp off --no-tf32" \
            --candidate "LABEL:bfloat16 --amp bf16" \
            --candidate "LABEL:'$deit, bfloat16' timm:$deit --input-size 224 --batch-size 128 --amp bf16"
        measure "epoch-$model" epoch "${flags[@]}" "${own[@]}" --epochs 2 --images 16384 --rounds 3 \
            --baseline "LABEL:'$BASE' --worktree $BASE" \
            --candidate "LABEL:'eager, PIL' --compile off --augment pil" \
            --candidate "LABEL:'eager, batched' --compile off --augment batched" \
            --candidate "LABEL:'compiled, batched' --compile default --augment batched"
    done
    measure loader loader "${tiny[@]}" --batch-size 256 "${data[@]}" --rounds "$ROUNDS" "${pipelines[@]}"
    sizes32=(128 256 512 1024) sizes224=(32 64 128 256)
fi

if [ -d "$DATA" ]; then
    measure augment-32 augment "$DATA" --input-size 32 --batch-size 256
    measure augment-224 augment "$DATA" --input-size 224 --batch-size 64
fi

for precision in off bf16; do
    variants=(--amp "$precision" --augment pil
        --baseline LABEL:kept --candidate "LABEL:recomputed --grad-checkpointing")
    measure "memory-tiny-32-$precision" memory "${tiny[@]}" --batch-sizes "${sizes32[@]}" "${variants[@]}"
    measure "memory-small-32-$precision" memory "${small[@]}" --batch-sizes "${sizes32[@]}" "${variants[@]}"
    measure "memory-tiny-224-$precision" memory "${tiny224[@]}" --batch-sizes "${sizes224[@]}" "${variants[@]}"
    measure "memory-small-224-$precision" memory "${small224[@]}" --batch-sizes "${sizes224[@]}" "${variants[@]}"
done
