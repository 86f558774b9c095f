#!/usr/bin/env bash
# Fine-tunes from a checkpoint:  bash finetune.sh CHECKPOINT RECIPE [further flags of main.py]
#
# CHECKPOINT is a file's path or URL, or a run's folder; it says the model, unless MODEL does. RECIPE is one of
# run_code.sh's: it says the data set; digits is tuned at 32 px from a CIFAR model, the others at 224 px from an ImageNet
# model.
#
# Published values: total batch 256, learning rate 5e-4 (per 512), at the end 1e-6, weight decay 1e-8, warm-up 2,
# 100 epochs, no repeated augmentation; evit, from a DeiT-S or an EViT on ImageNet: total batch 2048, 2e-5 (per 512),
# at the end 2e-6, weight decay 1e-6, no warm-up, 30 epochs at keep rate 0.7.
# Published top-1, DHVT-T / DHVT-S from ImageNet: cifar100 86.73 / 88.87, clipart 77.88 / 80.06, painting 72.05 / 74.18,
# sketch 70.79 / 73.32.
#
# As published, the model is tuned in eval mode (BatchNorm frozen, no drop path), except on digits, which is no
# published recipe; --train-mode and --no-train-mode change that.
# The same variables as for run_code.sh override: MODEL, DATA, OUTPUT (output/RECIPE-finetune), NPROC, ….
set -eo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/tools/launch.sh"

if [ $# -lt 2 ]; then
    echo 'error: usage: bash finetune.sh CHECKPOINT RECIPE [further flags]' >&2
    exit 2
fi
checkpoint=$1 recipe=$2
shift 2
data_flags "$recipe"

model='' # the checkpoint's
case $recipe in
    digits)
        total=64 NPROC=${NPROC:-1}
        # In training mode: the statistics of photographs are no use on digits (docs/recipes.md has both figures).
        flags=(--input-size 32 --epochs 5 --lr 4e-3 --warmup-epochs 0 --train-mode --aa none --color-jitter 0
            --hflip 0 --reprob 0 --mixup 0 --cutmix 0 --no-repeated-aug --no-model-ema --num_workers 0)
        ;;
    evit)
        model=deit_small_patch16_shrink_base total=2048
        flags=(--input-size 224 --epochs 30 --lr 2e-5 --min-lr 2e-6 --weight-decay 1e-6 --warmup-epochs 0
            --base_keep_rate 0.7 --fuse_token --shrink_start_epoch 0 --shrink_epochs 0)
        ;;
    *)
        total=256
        flags=(--input-size 224 --epochs 100 --lr 5e-4 --min-lr 1e-6 --weight-decay 1e-8 --warmup-epochs 2
            --no-repeated-aug)
        ;;
esac
find_python
launch "$recipe-finetune" "${MODEL:-$model}" "$total" --finetune "$checkpoint" "${flags[@]}" "$@"
