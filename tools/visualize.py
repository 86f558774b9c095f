"""Draws what a trained model looks at.

    python tools/visualize.py evit-mask CHECKPOINT IMAGE [IMAGE …] --out mask.png

`evit-mask` shows for each image, in a row for each shrinking block, which patches are still kept (as they are), which
are fused into one token (dimmed) and which are dropped (dark).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint as ckpt
from datasets import build_transform
from factory import keeps_tokens_by_rate
from flags import PART, FlagParser, one_line_errors
from images import decode
from main import build_model, parse_args, stored_flags
from models.evit import EViT
from utils import InputError, UsageError

KEPT, FUSED, DROPPED = 0, 1, 2
NAMES = {KEPT: 'kept', FUSED: 'fused', DROPPED: 'dropped'}
SHADES = {KEPT: 1.0, FUSED: 0.45, DROPPED: 0.12}  # of the patch's brightness
MARGIN, LABEL = 6, 16  # pixels


def get_args_parser() -> FlagParser:
    parser = FlagParser('visualize.py', description='Draw what a trained model looks at.')
    parser.add_argument('what', choices=('evit-mask',))
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='of main.py, path or URL')
    parser.add_argument('images', nargs='+', metavar='IMAGE', type=os.path.abspath)
    parser.add_argument('--out', default='evit-mask.png', type=os.path.abspath, help='the PNG to write')
    parser.add_argument('--base_keep_rate', type=PART, help="in place of the checkpoint's, as is --fuse_token")
    parser.add_argument('--fuse_token', action='store_true', help='fuse in place of dropping')
    return parser


def load_evit(path: str, *, base_keep_rate: float | None, fuse_token: bool) -> tuple[EViT, int]:
    """The EViT of a checkpoint, in eval mode, and its image size in pixels.

    Raises:
        InputError: if the checkpoint is not of one.
    """
    state = ckpt.load(path)
    weights = ckpt.model_weights(state, path)
    stored = ckpt.stored_args(state)
    if not keeps_tokens_by_rate(str(stored.get('model'))):
        raise InputError(
            f'{path} is not of an EViT (deit_…_shrink_base) but of {stored.get("model", "an unknown model")}'
        )
    args = parse_args(
        [
            *stored_flags(stored),
            *([] if base_keep_rate is None else [f'--base_keep_rate={base_keep_rate}']),
            *(['--fuse_token'] if fuse_token else []),
            *('--mixup', '0', '--cutmix', '0'),  # with which any batch size is right
        ]
    )
    head = weights.get('head.weight')
    model = build_model(args, None if head is None else len(head))
    ckpt.load_whole(model, weights, path)
    assert isinstance(model, EViT)
    return model.eval(), args.input_size


@torch.no_grad()
def find_states(model: EViT, image: Tensor) -> dict[int, np.ndarray]:
    """For each block that shrinks, what has become of each patch of an image (1, 3, H, W), as KEPT, FUSED or DROPPED.

    A fused token that a later block drops takes its patches with it; kept, it leaves them as they are.

    Returns:
        By the block's number, an array (H/P, W/P).
    """
    _, found = model.forward_kept(image)
    grid = model.patch_embed.grid_size
    state = np.full(grid[0] * grid[1], KEPT)
    tokens: list[list[int]] = [[patch] for patch in range(len(state))]  # the patches that each token stands for
    result = {}
    for number, kept in found.items():
        chosen = kept.indices[0].tolist()
        others = sorted(set(range(len(tokens))) - set(chosen))
        gone = [patch for token in others for patch in tokens[token]]
        fuses = bool(model.blocks[number].fuse_token)
        state[gone] = FUSED if fuses else DROPPED
        tokens = [tokens[token] for token in chosen] + ([gone] if fuses else [])
        result[number] = state.reshape(grid).copy()
    return result


def draw(pictures: Sequence[np.ndarray], states: Sequence[dict[int, np.ndarray]]) -> Image.Image:
    """A sheet: a column for each image (S, S, 3) in uint8, the image itself on top, then a row for each block."""
    size = pictures[0].shape[0]
    rows = list(states[0])
    width = len(pictures) * (size + MARGIN) + MARGIN
    height = (len(rows) + 1) * (size + LABEL + MARGIN) + MARGIN
    sheet = Image.new('RGB', (width, height), 'white')
    pen = ImageDraw.Draw(sheet)
    for row, number in enumerate([None, *rows]):
        top = MARGIN + row * (size + LABEL + MARGIN)
        for column, (picture, state) in enumerate(zip(pictures, states, strict=True)):
            left = MARGIN + column * (size + MARGIN)
            shade: np.ndarray = np.ones((size, size))
            label = 'image'
            if number is not None:
                cells = state[number]
                shade = np.kron(np.vectorize(SHADES.get)(cells), np.ones((size // len(cells), size // len(cells))))
                found = {name: int((cells == kind).sum()) for kind, name in NAMES.items()}
                label = f'block {number}: ' + ', '.join(f'{count} {name}' for name, count in found.items() if count)
            pen.text((left, top), label, fill='black')
            sheet.paste(Image.fromarray((picture * shade[..., None]).astype(np.uint8)), (left, top + LABEL))
    return sheet


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program.

    Raises:
        SystemExit: with 2 for wrong flags, 1 for anything else that cannot be used, after one line that says so.
    """
    args = get_args_parser().parse_args(argv)
    with one_line_errors('visualize.py'):
        model, size = load_evit(args.checkpoint, base_keep_rate=args.base_keep_rate, fuse_token=args.fuse_token)
        transform = build_transform(train=False, input_size=size)
        mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        pictures, states = [], []
        for path in args.images:
            try:
                image: Tensor = transform(decode(Path(path).read_bytes()))  # (3, S, S)
            except ValueError as err:
                raise InputError(f'{path} cannot be read as an image ({err})') from None
            states.append(find_states(model, image[None]))
            pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte()
            pictures.append(pixels.permute(1, 2, 0).numpy())
        if not states[0]:
            raise UsageError('no block of this model drops tokens: give a --base_keep_rate below 1')
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        ckpt.write_file(out, lambda file: draw(pictures, states).save(file, 'PNG'))
        print(f'{out}: {len(pictures)} images, blocks {", ".join(map(str, states[0]))}')


if __name__ == '__main__':
    main()
