"""How fast models are beside each other: `python tools/benchmark.py MODEL MODEL … --input-size 224`.

Measures evaluation and a training step (forward, backward, AdamW) of each model in turn, round after round, on made-up
images that lie on the device, and prints for each the median rate and the median of its ratios to the first model in
the same round. `MODEL` may carry arguments: deit_small_patch16_shrink_base:base_keep_rate=0.5,fuse_token=True
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from factory import new_model
from flags import FROM_ONE, FlagParser, one_line_errors
from utils import UsageError, amp_name, default_device, find_amp_dtype, find_device, find_process, one_line


def get_args_parser() -> FlagParser:
    parser = FlagParser('benchmark.py', description='Images per second of models, in evaluation and in training.')
    parser.add_argument('models', nargs='+', metavar='MODEL', help='NAME or NAME:KEY=VALUE,KEY=VALUE')
    parser.add_argument('--input-size', type=FROM_ONE, default=224, help='pixels')
    parser.add_argument('--batch-size', type=FROM_ONE, default=16)
    parser.add_argument('--rounds', type=FROM_ONE, default=5)
    parser.add_argument('--steps', type=FROM_ONE, default=2, help='in a measurement')
    parser.add_argument('--device', help='cuda, cuda:N, mps or cpu; the best there is by default')
    parser.add_argument('--amp', default='auto', choices=('auto', 'off', 'fp16', 'bf16'))
    return parser


def build(text: str, input_size: int) -> nn.Module:
    """A model from `NAME:KEY=VALUE,…`.

    Raises:
        UsageError: if it cannot be read, or timm does not know the name.
    """
    name, _, settings = text.partition(':')
    kwargs: dict[str, Any] = {}
    for setting in filter(None, re.split(r',(?![^(\[]*[)\]])', settings)):
        key, _, value = setting.partition('=')
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise UsageError(f'{text}: {setting!r} is not of the form key=value') from None
    return new_model('MODEL', name, input_size, kwargs)


def seconds(step: Callable[[], torch.Tensor], steps: int) -> float:
    """The time of some steps, the device's work included."""
    began = time.perf_counter()
    for _ in range(steps):
        result = step()
    result.float().sum().item()
    return time.perf_counter() - began


def steps_of(model: nn.Module, images: torch.Tensor, amp: torch.dtype | None) -> dict[str, Callable[[], torch.Tensor]]:
    """The two things that are measured."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    kind = images.device.type

    def evaluate() -> torch.Tensor:
        model.eval()
        with torch.inference_mode(), torch.autocast(kind, amp, enabled=amp is not None):
            return model(images)

    def train() -> torch.Tensor:
        model.train()
        with torch.autocast(kind, amp, enabled=amp is not None):
            logits = model(images)
        loss = logits.float().logsumexp(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return {'evaluation': evaluate, 'training step': train}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program.

    Raises:
        SystemExit: with 2 for wrong flags, 1 for anything else that cannot be used, after one line that says so.
    """
    args = get_args_parser().parse_args(argv)
    with one_line_errors('benchmark.py'):
        process = find_process({})
        device = find_device(args.device or default_device(process), process=process)
        amp = find_amp_dtype(args.amp, device)
        images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=device)
        models = {text: steps_of(build(text, args.input_size).to(device), images, amp) for text in args.models}
        print(f'{device}, {amp_name(amp)}, batch {args.batch_size}, {args.input_size} px, {args.rounds} rounds, '
              f'{torch.get_num_threads()} threads')  # fmt: skip
        print('| | model | images/s | ratio |\n|---|---|---|---|')
        first = args.models[0]
        for what in models[first]:
            rates: dict[str, list[float]] = {text: [] for text in models}
            for text, steps in models.items():
                try:
                    seconds(steps[what], 1)
                except (AssertionError, ValueError) as err:
                    raise UsageError(f'{text} cannot do this: {one_line(err)}') from None
            for _ in range(args.rounds):
                for text, steps in models.items():
                    rates[text].append(args.steps * args.batch_size / seconds(steps[what], args.steps))
            for text, values in rates.items():
                ratio = statistics.median(value / base for value, base in zip(values, rates[first], strict=True))
                print(f'| {what} | {text} | {statistics.median(values):.1f} | {ratio:.2f} |', flush=True)


if __name__ == '__main__':
    main()
