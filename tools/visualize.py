"""Draws what a trained model looks at.

    python tools/visualize.py attention CHECKPOINT IMAGE [IMAGE …] [--layers 2 5 8 11] [--size H W] --out FILE
    python tools/visualize.py evit-mask CHECKPOINT IMAGE [IMAGE …] --out mask.png

`attention` shows for each image, in a row for each chosen layer: the attention that the class token and each head token
pay to the patch tokens, over the image; the map of the attention of all tokens (a row each) to all, with the head
tokens at the right-hand side and at the bottom; and DAFF's channel weights. Above each image stand the predicted class
and its probability. Attention is the mean over the heads; each row has one scale of colours, and class and head tokens
are drawn broader than the patches. Any size that the patch size divides will do, rectangles too. Of models without head
tokens (DeiT) it shows the rest.

`evit-mask` shows for each image, in a row for each shrinking block, which patches are still kept (as they are), which
are fused into one token (dimmed) and which are dropped (dark).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter
from PIL import Image, ImageDraw, ImageOps
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as pixels_to

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.errors import one_line_errors
from config.flags import COUNT, FROM_ONE, PART, FlagParser, output_file, refuse_inputs
from config.models import evit_kwargs
from config.pretrained import Settings, add_checkpoint_flags, load_chosen, read_image
from models.dhvt import DHVT
from models.evit import EViT
from models.speed import plain_attention
from reports.figures import drawable, set_fonts, shorten_text
from training import checkpoint as ckpt
from utils import InputError, UsageError, one_line

KEPT, FUSED, DROPPED = 0, 1, 2
NAMES, SHADES = ('kept', 'fused', 'dropped'), np.array([1.0, 0.45, 0.12])  # of the patch's brightness
MARGIN, LABEL = 6, 16  # pixels
Drawn = tuple[Callable[[IO[bytes]], object], str]  # what writes the PNG, and what is said of it


def get_args_parser() -> FlagParser:
    parser = FlagParser('visualize.py', description='Draw what a trained model looks at.')
    parser.add_argument('what', choices=('attention', 'evit-mask'), help='where attention goes, or what EViT keeps')
    add_checkpoint_flags(parser)
    parser.add_argument('images', nargs='+', metavar='IMAGE', type=os.path.abspath, help='files that Pillow opens')
    parser.add_argument('--out', type=output_file('.png'), help='the PNG to write (attention.png, evit-mask.png)')
    group = parser.add_argument_group('attention')
    group.add_argument('--layers', nargs='+', type=COUNT, help='blocks, counted from 0; the last of each quarter')
    group.add_argument('--size', nargs=2, type=FROM_ONE, metavar=('H', 'W'), help="pixels; the checkpoint's")
    group = parser.add_argument_group('evit-mask')
    group.add_argument('--base_keep_rate', type=PART, help="in place of the checkpoint's, as is --fuse_token")
    group.add_argument('--fuse_token', action='store_true', help='fuse in place of dropping')
    return parser


# Attention


class Activations(NamedTuple):
    """What one forward pass did in each block: P class and distillation tokens, N patches, h head tokens or none."""

    attention: list[Tensor]  # (B, h, T, T), each row a token's attention to all; T = P+N+h
    channels: list[Tensor | None]  # DAFF's channel weights (B, D)
    probabilities: Tensor  # (B, C)
    grid: tuple[int, int]  # (H/P, W/P), N patches in row-major order
    num_prefix: int


@torch.no_grad()
def get_activations(model: DHVT | VisionTransformer, images: Tensor) -> Activations:
    """Runs a model on images (B, C, H, W) and returns the attention and the channel weights of that pass.

    The weights are those that the pass itself multiplied the values with.
    """
    made: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        made[module] = output

    blocks: Any = model.blocks
    weighers = [getattr(block.mlp, 'excitation', None) for block in blocks]
    watched = [*(block.attn.attn_drop for block in blocks), *filter(None, weighers)]
    hooks = [module.register_forward_hook(keep) for module in watched]
    try:
        with plain_attention(model):
            probabilities = model(images).softmax(dim=-1)
    finally:
        for hook in hooks:
            hook.remove()

    attention = [made[block.attn.attn_drop] for block in blocks]
    channels = [None if weigher is None else made[weigher][:, 0] for weigher in weighers]
    patch: Any = model.patch_embed
    sides = to_2tuple(patch.patch_size)
    grid = images.shape[-2] // sides[0], images.shape[-1] // sides[1]
    return Activations(attention, channels, probabilities, grid, int(model.num_prefix_tokens))


def load_attentive(args: argparse.Namespace) -> tuple[DHVT | VisionTransformer, Settings, tuple[int, int]]:
    """The DHVT or DeiT that is asked for in eval mode, its settings, and its images' (height, width).

    Raises:
        InputError: if the checkpoint is of another model.
        UsageError: if the model cannot have that size.
    """
    model, settings, _ = load_chosen(args)
    own = (settings.input_size, settings.input_size)
    size = tuple(args.size or own)
    if isinstance(model, EViT):
        raise InputError(f'{args.checkpoint} is of an EViT, whose patches move from layer to layer: draw evit-mask')
    blocks: Any = getattr(model, 'blocks', ())
    if not isinstance(model, (DHVT, VisionTransformer)) or model.cls_token is None or not hasattr(blocks[0], 'attn'):
        raise InputError(f'{args.checkpoint} is of {settings.name}: a DHVT or a DeiT is needed')
    sides = to_2tuple(model.patch_embed.patch_size)
    if size[0] % sides[0] or size[1] % sides[1]:
        raise UsageError(f'--size {size[0]} {size[1]}: {settings.name} needs multiples of its patch size, {sides[0]}')
    if size != own:
        try:
            model.set_input_size(size)  # of a DeiT the position embedding is resampled
        except ValueError as err:
            raise UsageError(f'--size {size[0]} {size[1]}: {one_line(err)}') from None
    return model, settings, size


def choose_blocks(layers: Sequence[int] | None, depth: int) -> list[int]:
    """The layers that were asked for, or the last of each quarter: 2, 5, 8 and 11 of twelve.

    Raises:
        UsageError: if the model has not so many.
    """
    chosen = sorted(set(layers or (max(depth * quarter // 4 - 1, 0) for quarter in (1, 2, 3, 4))))
    if chosen[-1] >= depth:
        raise UsageError(f'--layers {chosen[-1]}: the model has layers 0 to {depth - 1}')
    return chosen


def draw_layer(figure: Any, panels: Sequence[Axes], picture: Image.Image, seen: Activations, layer: int) -> None:
    """A row of the sheet: a panel for the class token and for each head token, the map, and channel weights if any."""
    mean = seen.attention[layer][0].mean(dim=0).numpy()  # (T, T)
    first, last = seen.num_prefix, seen.num_prefix + seen.grid[0] * seen.grid[1]
    tokens = [0, *range(last, len(mean))]
    scale: dict[str, Any] = {'cmap': 'inferno', 'vmin': 0, 'vmax': np.quantile(mean[tokens, first:last], 0.995)}
    extent = (0, picture.width, picture.height, 0)
    for axes, token in zip(panels, tokens, strict=False):
        axes.imshow(picture.convert('L'), cmap='gray', extent=extent)
        heat = mean[token, first:last].reshape(seen.grid)
        axes.imshow(heat, alpha=0.65, interpolation='nearest', extent=extent, **scale)
    panels[0].set_ylabel(f'layer {layer}', fontsize=8)

    axes = panels[len(tokens)]
    broad = max(len(mean) // 40, 1)  # a few tokens among hundreds would not be seen
    counts = np.full(len(mean), broad)
    counts[first:last] = 1
    shown = axes.imshow(mean.repeat(counts, axis=0).repeat(counts, axis=1), interpolation='nearest', **scale)
    for edge in (first * broad - 0.5, first * broad + last - first - 0.5):
        axes.axvline(edge, color='white', linewidth=0.6)
        axes.axhline(edge, color='white', linewidth=0.6)
    figure.colorbar(shown, ax=axes, format=PercentFormatter(1), extend='max', pad=0.03).ax.tick_params(labelsize=6)
    for axes in panels[: len(tokens) + 1]:
        axes.set(xticks=[], yticks=[])

    weight = seen.channels[layer]
    if weight is not None:
        axes = panels[-1]
        axes.bar(range(weight.shape[1]), weight[0].numpy(), width=1.0, color='#4c78a8')
        axes.axhline(0, color='black', linewidth=0.5)
        axes.set(xticks=[], xlim=(-0.5, weight.shape[1] - 0.5))
        axes.tick_params(labelsize=6, pad=1)
        axes.yaxis.tick_right()


def draw_attention(pictures: list[Image.Image], names: list[str], seen: list[Activations], layers: list[int]) -> Figure:
    """The sheet: below each other, a block for each picture, under its name, with a row for each layer."""
    head_tokens = seen[0].attention[0].shape[-1] - seen[0].num_prefix - seen[0].grid[0] * seen[0].grid[1]
    titles = ['class token', *(f'head token {number + 1}' for number in range(head_tokens)), 'attention map']
    tile, aspect = 1.25, pictures[0].width / pictures[0].height  # inches of height
    ratios = [1.5 * aspect, *[aspect] * (1 + head_tokens), 1.25]
    if any(weight is not None for weight in seen[0].channels):
        titles, ratios = [*titles, 'channel weights'], [*ratios, 1.3]
    figure = Figure(
        figsize=(tile * sum(ratios) + 1.0, len(pictures) * (len(layers) * tile + 0.45)),
        layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02),
    )
    blocks = figure.subfigures(len(pictures), 1, squeeze=False)[:, 0]
    for block, picture, name, one in zip(blocks, pictures, names, seen, strict=True):
        places = block.add_gridspec(len(layers), len(ratios), width_ratios=ratios)
        axes = block.add_subplot(places[:, 0])
        axes.imshow(picture)
        axes.set_axis_off()
        axes.set_title(name, fontsize=8)
        for row, layer in enumerate(layers):
            panels = [block.add_subplot(places[row, column]) for column in range(1, len(ratios))]
            draw_layer(block, panels, picture, one, layer)
            for axes, title in zip(panels, titles if row == 0 else (), strict=False):
                axes.set_title(title, fontsize=8)
    set_fonts(figure)
    return figure


def show(path: str, settings: Settings, size: tuple[int, int] | None = None) -> tuple[Tensor, np.ndarray]:
    """An image (C, H, W) as the model takes it, and what that shows, (H, W, 3) in uint8.

    Args:
        size: height and width, of which the largest part of that shape is taken; as evaluation sees it if not given.
    """
    image, mean, std = read_image(path, settings.reading), list(settings.mean), list(settings.std)
    if size is None:
        seen = settings.transform(image)
    else:
        fitted = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
        seen = pixels_to.normalize(pixels_to.to_dtype(pixels_to.pil_to_tensor(fitted), scale=True), mean, std)
    pixels = seen * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return seen, (pixels.clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()


def attention(args: argparse.Namespace) -> Drawn:
    model, settings, (height, width) = load_attentive(args)
    classes = settings.classes
    layers = choose_blocks(args.layers, len(model.blocks))
    pictures, seen = [], []
    scale = max(1, -(-240 // height))  # small ones are shown larger, without hard edges
    for path in args.images:
        image, pixels = show(path, settings, (height, width) if args.size else None)
        seen.append(get_activations(model, image[None]))
        pictures.append(Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.BICUBIC))
    best = [one.probabilities[0].max(dim=0) for one in seen]
    shown, _ = drawable(classes)
    names = [f'{shorten_text(shown[index], 30)}, {value:.1%}' for value, index in best]
    sheet = draw_attention(pictures, names, seen, layers)
    said = f'{len(pictures)} images of {height}x{width} px, layers {", ".join(map(str, layers))}'
    said += f'; predicted: {", ".join(classes[index] for _, index in best)}'
    return partial(sheet.savefig, format='png', dpi=110), said


# EViT


@torch.no_grad()
def find_states(model: EViT, image: Tensor) -> dict[int, np.ndarray]:
    """For each block that shrinks, what has become of each patch of an image (1, C, H, W), as KEPT, FUSED or DROPPED.

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


def draw(pictures: Sequence[np.ndarray], states: Sequence[dict[int, np.ndarray]], patch: int) -> Image.Image:
    """A sheet: a column for each image (S, S, 3) in uint8, the image itself on top, then a row for each block.

    The state of a patch covers `patch` pixels in height and width; what is left of the image is in no patch.
    """
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
                shades = np.kron(SHADES[cells], np.ones((patch, patch)))
                shade[: len(shades), : len(shades)] = shades
                found = {name: int((cells == kind).sum()) for kind, name in enumerate(NAMES)}
                label = f'block {number}: ' + ', '.join(f'{count} {name}' for name, count in found.items() if count)
            pen.text((left, top), label, fill='black')
            sheet.paste(Image.fromarray((picture * shade[..., None]).astype(np.uint8)), (left, top + LABEL))
    return sheet


def evit_mask(args: argparse.Namespace) -> Drawn:
    given = {'base_keep_rate': args.base_keep_rate, 'fuse_token': args.fuse_token or None}
    model, settings, _ = load_chosen(args, further=evit_kwargs(given))
    if not isinstance(model, EViT):
        raise InputError(f'{args.checkpoint} is not of an EViT (deit_…_shrink_base)')
    pictures, states = [], []
    for path in args.images:
        image, pixels = show(path, settings)
        states.append(find_states(model, image[None]))
        pictures.append(pixels)
    if not states[0]:
        raise UsageError('no block of this model drops tokens: give a --base_keep_rate below 1')
    said = f'{len(pictures)} images, blocks {", ".join(map(str, states[0]))}'
    patch = model.patch_embed.patch_size[0]
    return lambda file: draw(pictures, states, patch).save(file, 'PNG'), said


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    with one_line_errors('visualize.py'):
        for name in ('base_keep_rate', 'fuse_token') if args.what == 'attention' else ('layers', 'size'):
            if getattr(args, name):
                raise UsageError(f'--{name} is not for {args.what}')
        out = Path(args.out or f'{args.what}.png')
        refuse_inputs('--out', out, args.images)
        write, said = (attention if args.what == 'attention' else evit_mask)(args)
        out.parent.mkdir(parents=True, exist_ok=True)
        ckpt.write_file(out, write)
        print(f'{out}: {said}')


if __name__ == '__main__':
    main()
