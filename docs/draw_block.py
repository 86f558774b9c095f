"""Draws dhvt-block.png, the picture of the README: `python docs/draw_block.py`."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

GREY, BLUE, GREEN, ORANGE, LINE = '#eef0f2', '#d6e4f5', '#d9efdd', '#fbe3c8', '#3b4045'


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    """A box with its lower left corner at (x, y), and text in its middle."""
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle='round,pad=0,rounding_size=0.08', fc=color, ec=LINE, lw=1)
    )
    axes.text(x + width / 2, y + height / 2, text, ha='center', va='center', fontsize=9, linespacing=1.35)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate(
        '', end, start, arrowprops={'arrowstyle': '-|>', 'color': LINE, 'lw': 1.2, 'shrinkA': 0, 'shrinkB': 0}
    )


def shortcut(axes: Axes, left: float, right: float, middle: float, top: float) -> None:
    """A residual connection: over the boxes, into the plus sign at `right`."""
    axes.plot([left, left, right], [middle, top, top], color=LINE, lw=1.2)
    arrow(axes, (right, top), (right, middle + 0.14))


def draw_steps(axes: Axes, top: float, bottom: float, title: str, *steps: tuple[str, str]) -> None:
    """Boxes beside each other, of text and colour, with arrows between them, below a title at `top`."""
    axes.text(0.2, top, title, fontsize=10, weight='bold')
    for number, (text, color) in enumerate(steps):
        box(axes, 0.2 + 2.75 * number, bottom, 2.35, 0.8, text, color)
        if number:
            arrow(axes, (2.75 * number - 0.2, bottom + 0.4), (2.75 * number + 0.2, bottom + 0.4))


def draw() -> Figure:
    figure = Figure(figsize=(11, 5.2), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 11)
    axes.set_ylim(0, 5.2)
    axes.axis('off')
    row = 4.0
    box(axes, 0.2, row - 0.4, 1.5, 0.8, 'SOPE\n3x3 convolutions,\nstride 2', GREY)
    box(axes, 2.05, row - 0.4, 1.25, 0.8, 'class token +\npatch tokens', GREY)
    axes.add_patch(FancyBboxPatch((3.55, row - 0.62), 5.65, 1.62, boxstyle='round,pad=0,rounding_size=0.1', fc='none',
                                  ec=LINE, lw=1, ls='--'))  # fmt: skip
    axes.text(9.1, row + 0.82, 'block, 12 times', ha='right', va='center', fontsize=9, style='italic')
    box(axes, 3.9, row - 0.25, 0.9, 0.5, 'LayerNorm', GREY)
    box(axes, 5.0, row - 0.25, 0.95, 0.5, 'HI-MHSA', BLUE)
    box(axes, 6.7, row - 0.25, 0.9, 0.5, 'LayerNorm', GREY)
    box(axes, 7.8, row - 0.25, 0.75, 0.5, 'DAFF', GREEN)
    box(axes, 9.5, row - 0.4, 1.3, 0.8, 'LayerNorm,\nhead on the\nclass token', GREY)
    for x in (6.3, 8.9):
        axes.text(x, row, '+', ha='center', va='center', fontsize=14, bbox={'boxstyle': 'circle,pad=0.12', 'fc': 'white', 'ec': LINE})  # fmt: skip  # noqa: E501
    starts, ends = (1.7, 3.3, 4.8, 5.95, 6.46, 7.6, 8.55, 9.06), (2.05, 3.9, 5.0, 6.14, 6.7, 7.8, 8.74, 9.5)
    for start, end in zip(starts, ends, strict=True):
        arrow(axes, (start, row), (end, row))
    shortcut(axes, 3.72, 6.3, row, row + 0.55)
    shortcut(axes, 6.58, 8.9, row, row + 0.55)

    draw_steps(
        axes, 2.95, 1.95, 'Head-interacted self-attention (HI-MHSA)',
        ('mean of all tokens,\ncut into h heads', GREY),
        ('one head token\nfor each head', ORANGE),
        ('attention of class,\npatch and head tokens', BLUE),
        ('mean of the head tokens,\nadded to the class token;\nthey are dropped', ORANGE),
    )  # fmt: skip
    draw_steps(
        axes, 1.45, 0.4, 'Dynamic aggregation feed-forward (DAFF)',
        ('patch tokens as a map:\n1x1 convolution', GREY),
        ('depthwise 3x3 convolution\nwith a shortcut', GREEN),
        ('1x1 convolution:\nthe new patch tokens', GREY),
        ("their mean gives the weights\nof the class token's channels", ORANGE),
    )  # fmt: skip
    return figure


if __name__ == '__main__':
    draw().savefig(Path(__file__).with_name('dhvt-block.png'), facecolor='white')
