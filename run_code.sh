#!/usr/bin/env bash
# Trains DHVT, DeiT or EViT from scratch:  bash run_code.sh [RECIPE] [further flags of main.py]
#
# RECIPE                total batch    learning rate   warm-up   epochs   published top-1
#                       T / S          (per 512)                          DHVT-T / DHVT-S
# digits (default)      64             8e-3            1         12       none; 99.7 here, 1 minute on 2 CPU cores
# cifar100, cifar10     512 / 256      1e-3            5         300      cifar100: 80.93 / 82.91 (patch 4)
# fast                  64             3.2e-2 (Muon)   1         10       none; our own for CIFAR-size images and few epochs
# imagenet              512            5e-4            10        300      76.5 / 82.3
# deit                  1024           5e-4            5         300      DeiT-S on ImageNet: 79.8
# evit                  2048           5e-4            5         300      EViT/0.7-DeiT-S on ImageNet, fused: 79.5
# clipart, infograph, painting, quickdraw, real, sketch
#                       256 / 128      1e-3            20        300      clipart: 71.73 / 73.89
# folder                256 / 128      1e-3            20        300      your images, in DATA/{train,val}/CLASS/;
#                       other data sets by --data-set (docs/data.md)
#
# Published values: DHVT (NeurIPS 2022), tables 3, 4 and 13 and appendix; DeiT (ICML 2021), EViT (ICLR 2022).
# Everything that they leave to main.py's defaults is DeiT's: AdamW, cosine, weight decay 0.05, RandAugment, mixup, cutmix, erasing, repeated augmentation.
#
# The same command again goes on from the newest checkpoint in its folder, output/RECIPE unless OUTPUT names another;
# with other flags it needs another OUTPUT.
#
# From the environment: MODEL (a ..._small_... one takes S's batch), DATA, OUTPUT, NPROC (all GPUs, or one CPU
# process), NNODES, MASTER_ADDR, MASTER_PORT, RESTARTS (of the group, once a process of it died), ACCUM (batches a
# step, where memory is short), PYTHON, DRY_RUN=1 (print the command only). The total batch stays what the table says,
# however many processes share it. slurm.sh submits a recipe to SLURM.
set -eo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/tools/launch.sh"

case ${1:-} in
    '' | -*) recipe=digits ;;
    *) recipe=$1; shift ;;
esac
data_flags "$recipe"

case $recipe in
    digits)
        model=dhvt_tiny_cifar_patch4 total=64 NPROC=${NPROC:-1}
        # The model sees 1,437 images twelve times: a flip makes another digit of some, mixing needs longer.
        flags=(--input-size 16 --epochs 12 --lr 8e-3 --warmup-epochs 1 --lr-delay-epochs 0 --drop-path 0
            --aa none --color-jitter 0 --hflip 0 --reprob 0 --mixup 0 --cutmix 0 --no-repeated-aug
            --no-model-ema --num_workers 0)
        ;;
    cifar100 | cifar10)
        model=dhvt_tiny_cifar_patch4 total=512 total_small=256
        flags=(--input-size 32 --epochs 300 --lr 1e-3 --warmup-epochs 5)
        ;;
    fast)
        model=dhvt_tiny_cifar_patch4 total=64
        # Chosen by experiment (docs/recipes.md): Muon, a schedule by steps, an average that warms up; plain images, and
        # from 20 epochs on cutmix in half of the batches, from 50 on light RandAugment too.
        flags=(--input-size 32 --epochs 10 --opt muon --lr 3.2e-2 --warmup-epochs 1 --sched-on-updates --drop-path 0
            --no-repeated-aug --aa none --color-jitter 0 --reprob 0 --mixup 0 --cutmix 0
            --model-ema-warmup --model-ema-decay 0.998)
        epochs=10 pattern='.* --epochs[= ]([0-9]{1,9})' # the last, as main.py takes it
        [[ " $*" =~ $pattern ]] && epochs=${BASH_REMATCH[1]}
        [ "$epochs" -lt 20 ] || flags+=(--cutmix 1 --mixup-prob 0.5)
        [ "$epochs" -lt 50 ] || flags+=(--aa rand-m5-mstd0.5-inc1)
        ;;
    imagenet)
        model=dhvt_tiny_imagenet_patch16 total=512
        flags=(--input-size 224 --epochs 300 --lr 5e-4 --warmup-epochs 10)
        ;;
    deit)
        model=deit_small_patch16_224 total=1024
        flags=(--input-size 224 --epochs 300 --lr 5e-4 --warmup-epochs 5)
        ;;
    evit)
        model=deit_small_patch16_shrink_base total=2048
        flags=(--input-size 224 --epochs 300 --lr 5e-4 --warmup-epochs 5 --base_keep_rate 0.7 --fuse_token
            --shrink_start_epoch 10 --shrink_epochs 100)
        ;;
    *)
        model=dhvt_tiny_domain_patch16 total=256 total_small=128
        flags=(--input-size 224 --epochs 300 --lr 1e-3 --warmup-epochs 20)
        ;;
esac
model=${MODEL:-$model}
case $model in *small*) total=${total_small:-$total} ;; esac

find_python
launch "$recipe" "$model" "$total" "${flags[@]}" "$@"
