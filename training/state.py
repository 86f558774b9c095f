"""The state of a run: what a checkpoint holds, and whether a run may go on from one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import torch
from timm.scheduler import PlateauLRScheduler
from torch import Tensor, nn

from training.ema import MovingAverage
from training.schema import base_optimizer, check_like, check_optimizer, is_count, is_line, is_number
from training.weights import check_whole, model_weights, stored_args
from utils import EpochSums, InputError, log, one_line

# Arguments that may differ on a resume: none of them changes what is computed. The batch is compared as a whole, the
# precision by what 'auto' has become, the data by its fingerprint.
FREE_ARGUMENTS = {
    *('output_dir', 'finetune', 'resume', 'auto_resume', 'force_resume', 'start_epoch', 'eval', 'dist_eval'),
    *('checkpoint_every', 'export_safetensors', 'on_nan', 'most_skips', 'timeout', 'test_speed', 'only_test_speed'),
    *('num_workers', 'pin_mem', 'data_path', 'data_layout', 'use_lmdb', 'verify_records', 'device', 'amp'),
    *('train_mode', 'local_rank', 'world_size', 'dist_url', 'batch_size', 'accum_steps'),
    *('model_ema_force_cpu', 'augment', 'cache_gib', 'report', 'allow_partial'),
    *('log_wandb', 'wandb_project', 'wandb_tags', 'experiment'),
}  # fmt: skip

MAX_EPOCHS = 1_000_000
PLATEAU_COUNTERS = ('best', 'num_bad_epochs', 'cooldown_counter', 'last_epoch')
# Those of the model and the data: with others a checkpoint's weights do not even fit.
MODEL_ARGUMENTS = {
    *('model', 'model_kwargs', 'in_chans', 'input_size', 'nb_classes', 'data_set', 'inat_category', 'finetune'),
}  # fmt: skip


@dataclass
class TrainingProgress:
    """How far a run is.

    `epoch` is trained next, or now: then `done` of its `num_draws` draws, of all processes, and the batches before
    number `batch` are behind it, and `sums` has their losses.
    """

    epoch: int = 0
    batch: int = 0
    done: int = 0
    num_draws: int | None = None
    sums: EpochSums = field(default_factory=EpochSums)
    best: float = -1.0  # accuracy in percent
    best_of: str = 'model'  # whose that is: the model's or, as 'model_ema', the average's
    keep_rate: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)  # the lines of log.txt
    timings: list[dict[str, Any]] = field(default_factory=list)  # the lines of timing.txt
    left_out: list[tuple[int, int, int]] = field(default_factory=list)  # epoch, and ranges of its draws

    def next_epoch(self) -> None:
        self.epoch += 1
        self.batch = self.done = 0
        self.num_draws, self.sums = None, EpochSums()

    def skipped_draws(self) -> set[int]:
        """The draws of this epoch that are left out, of ranges that may lie in one another."""
        return {draw for begin, end in self.skipped_ranges() for draw in range(begin, end)}

    def skipped_ranges(self) -> list[tuple[int, int]]:
        """What is left out of this epoch."""
        return [(begin, end) for epoch, begin, end in self.left_out if epoch == self.epoch]


def _schedule_state(scheduler: Any) -> dict[str, Any]:
    """timm's state of a schedule; of plateau its counters, which timm leaves out."""
    if isinstance(scheduler, PlateauLRScheduler):
        counters = {name: getattr(scheduler.lr_scheduler, name) for name in PLATEAU_COUNTERS}
        return {'plateau': counters, 'restore_lr': scheduler.restore_lr}
    return dict(scheduler.state_dict())


def _read_schedule(scheduler: Any, stored: Any, what: str) -> dict[str, Any]:
    """What of a schedule's stored state is not said by the flags; InputError if it is not of such a schedule."""
    own = _schedule_state(scheduler)
    known: dict[str, Any] = {name: own[name] for name in ('base_values', 'plateau') if name in own}
    if 'restore_lr' in own:  # None without noise
        noisy = isinstance(stored, Mapping) and isinstance(stored.get('restore_lr'), list)
        known['restore_lr'] = scheduler.base_values if noisy else None
    return check_like(stored, known, what)


def _load_schedule(scheduler: Any, state: Mapping[str, Any]) -> None:
    if not isinstance(scheduler, PlateauLRScheduler):
        scheduler.load_state_dict(dict(state))
        return
    if 'plateau' in state:
        scheduler.lr_scheduler.load_state_dict(state['plateau'])
    scheduler.restore_lr = state.get('restore_lr')


@dataclass
class TrainState:
    """What training changes. The model is not inside DistributedDataParallel."""

    model: nn.Module
    model_ema: MovingAverage | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler

    def state(self) -> dict[str, Any]:
        return {
            'model': self.model.state_dict(),
            'model_ema': self.model_ema.module.state_dict() if self.model_ema is not None else None,
            'optimizer': self.optimizer.state_dict(),
            'lr_scheduler': _schedule_state(self.scheduler),
            'scaler': self.scaler.state_dict(),
        }


def to_state(state: TrainState, progress: TrainingProgress, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint: tensors and plain values.

    `epoch` is the last whole one, as DeiT has it; `progress` is None between two epochs. No random state is in it, as
    every draw is seeded by its place in the run (`utils.seed_all`).

    Args:
        metadata: what does not change in a run: its classes, arguments and fingerprint.
    """
    within = {
        'batch': progress.batch,
        'done': progress.done,
        'num_draws': progress.num_draws,
        'tally': asdict(progress.sums),
    }
    return {
        **state.state(),
        'epoch': progress.epoch - 1,
        'progress': within if progress.batch else None,
        'max_accuracy': progress.best,
        'best_of': progress.best_of,
        'keep_rate': progress.keep_rate,
        'history': list(progress.history),
        'timings': list(progress.timings),
        'left_out': list(progress.left_out),
        **metadata,
    }


def as_best(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpoint whose `model` is what its accuracy is of: where that is the average, `trained_model` is the model's.

    So whatever evaluates the best checkpoint's `model` finds its accuracy, and a run can go on from it too.
    """
    if state.get('best_of') != 'model_ema':
        return state
    return {**state, 'model': state['model_ema'], 'trained_model': state['model']}


def _match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Gives an optimizer's state the memory layout of its parameters, which fused kernels take for granted."""
    for parameter, entries in base_optimizer(optimizer).state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def read_progress(state: Mapping[str, Any], source: str) -> TrainingProgress:
    """How far the run of a checkpoint was; raises InputError if what it says of that is impossible."""
    found: dict[str, Any] = {'max_accuracy': -1.0, 'best_of': 'model', 'keep_rate': None,
                             'history': [], 'timings': [], 'left_out': [], **state}  # fmt: skip
    within: dict[str, Any] = {'batch': 0, 'done': 0, 'num_draws': None, 'tally': {}}
    if isinstance(state.get('progress'), Mapping):
        within |= state['progress']
    batch, done, num_draws, tally = (within[name] for name in ('batch', 'done', 'num_draws', 'tally'))
    most = done if num_draws is None else num_draws
    epoch, left_out = found['epoch'], found['left_out']
    for right, name in (
        (isinstance(epoch, int) and is_count(epoch + 1, high=MAX_EPOCHS), 'epoch'),
        (is_number(found['max_accuracy'], low=-1, high=100), 'max_accuracy'),
        (found['best_of'] in ('model', 'model_ema'), 'best_of'),
        (found['keep_rate'] is None or is_number(found['keep_rate'], high=1), 'keep_rate'),
        (state.get('progress') is None or isinstance(state['progress'], Mapping), 'progress'),
        (is_count(batch) and is_count(most) and is_count(done, high=most), 'place in the run'),
        (isinstance(tally, Mapping) and all(map(is_number, tally.values()))
         and tally.keys() <= asdict(EpochSums()).keys(), 'tally'),
        *((isinstance(found[name], (list, tuple)) and all(map(is_line, found[name])), name)
          for name in ('history', 'timings')),
        (isinstance(left_out, (list, tuple)) and all(isinstance(entry, (list, tuple)) for entry in left_out)
         and all(len(entry) == 3 and all(map(is_count, entry)) for entry in left_out), 'left_out'),
    ):  # fmt: skip
        if not right:
            raise InputError(f'{source} does not hold the state of such a run: its {name} is impossible')
    return TrainingProgress(
        epoch=epoch + 1,
        batch=batch,
        done=done,
        num_draws=num_draws,
        sums=EpochSums(**tally),
        best=float(found['max_accuracy']),
        best_of=found['best_of'],
        keep_rate=found['keep_rate'],
        history=[dict(line) for line in found['history']],
        timings=[dict(line) for line in found['timings']],
        left_out=[(begin, end, last) for begin, end, last in left_out],
    )


def load_state(parts: TrainState, state: Mapping[str, Any], source: str, *, schedule: bool = True) -> TrainingProgress:
    """Continues from a checkpoint. Everything is checked before anything is changed.

    Args:
        source: the checkpoint's name, for messages.
        schedule: take the schedule, and the optimizer's learning rate, decay and so on, from it too.

    Raises:
        InputError: if the checkpoint is of another kind of run.
    """
    lacking = [name for name in ('model', 'optimizer', 'lr_scheduler', 'epoch') if state.get(name) is None]
    if lacking:
        raise InputError(f'{source} has no {", ".join(lacking)}: it cannot be resumed; start from it with --finetune')
    weights = model_weights({'model': state.get('trained_model', state['model'])}, source)
    check_whole(parts.model, weights, source)
    average = weights
    if parts.model_ema is not None:
        if state.get('model_ema') is None:
            log(f'{source} holds no moving average: it starts from the weights')
        else:
            average = model_weights(state, source, ema=True)
        check_whole(parts.model_ema.module, average, source)
    optimizer = check_optimizer(parts.optimizer, state['optimizer'], source)
    scaler = {} if state.get('scaler') is None else state['scaler']
    scaler = check_like(scaler, parts.scaler.state_dict(), f'{source}: the scaler')
    lr_scheduler = _read_schedule(parts.scheduler, state['lr_scheduler'], f'{source}: the schedule')
    progress = read_progress(state, source)
    try:
        plateau = isinstance(parts.scheduler, PlateauLRScheduler)  # its rate is a state: a part of the first one
        kept = ('params', 'lookahead_step')  # are no options
        options = [
            {key: value for key, value in group.items() if key not in kept} for group in parts.optimizer.param_groups
        ]
        parts.model.load_state_dict(weights)
        if parts.model_ema is not None:
            parts.model_ema.module.load_state_dict(average)
        parts.optimizer.load_state_dict(optimizer)
        _match_memory_format(parts.optimizer)
        if schedule or plateau:
            _load_schedule(parts.scheduler, lr_scheduler)
        if not schedule:
            for number, (group, own) in enumerate(zip(parts.optimizer.param_groups, options, strict=True)):
                if plateau and group['initial_lr']:
                    factor = own['initial_lr'] / group['initial_lr']
                    own['lr'] = group['lr'] * factor
                    if parts.scheduler.restore_lr:
                        parts.scheduler.restore_lr[number] *= factor
                group.update(own)
        if scaler and parts.scaler.is_enabled():
            parts.scaler.load_state_dict(scaler)
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, IndexError) as err:
        raise InputError(f'{source} does not hold the state of such a run: {one_line(err)}') from None
    return progress


def _plain(value: Any) -> str:
    return json.dumps(value, default=str)


def different_arguments(stored: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, str]:
    """The arguments, of those that must be the same, in which two runs differ, with how they do."""
    names = [name for name in args if name in stored and name not in FREE_ARGUMENTS]
    if stored.get('finetune') and args.get('finetune'):  # once a run goes on, it may be left out
        names.append('finetune')
    return {
        name: f'--{name} was {_plain(stored[name])}, is {_plain(args[name])}'
        for name in names
        if stored[name] != args[name] and _plain(stored[name]) != _plain(args[name])  # 30 and 30.0 are one
    }


def refuse_other_run(source: str, differences: Iterable[str]) -> NoReturn:
    raise InputError(
        f'{source} is of a run that differs: {"; ".join(differences)}. Start it as it was, choose another '
        '--output_dir (OUTPUT=… before the command of a script), or go on with --force-resume'
    )


def compare(
    state: Mapping[str, Any], args: Mapping[str, Any], fingerprint: Mapping[str, Any]
) -> tuple[list[str], list[str], bool]:
    """How a run differs from the one that wrote a checkpoint.

    Args:
        fingerprint: of this run: `data`, `total_batch`, `processes`, `precision`, `train_mode`, `augment`, `threads`,
            `device`, `torch`.

    Returns:
        What must be the same and is not; what need not be, but is worth a note; whether the learning rate changes.
    """
    stored = stored_args(state)
    differences = [*different_arguments(stored, args).values()]
    known = state.get('fingerprint')
    if not isinstance(known, Mapping):
        notes = [f'the checkpoint is of another program: {line}' for line in differences]
        return [], [*notes, 'the checkpoint does not say with which data and precision it was made'], False
    for name, words in (('data', 'the data set'), ('precision', 'the precision'), ('train_mode', '--train-mode'),
                        ('augment', 'augmentation')):  # fmt: skip
        before = known.get(name, 'pil' if name == 'augment' else None)  # older checkpoints do not say how
        if before != fingerprint[name]:
            remedy = f' (--augment {str(before).partition(",")[0]})' if name == 'augment' else ''
            differences.append(f'{words} was {before}{remedy}, is {fingerprint[name]}')
    other_batch = known.get('total_batch') != fingerprint['total_batch']
    notes = []
    if other_batch:
        changed = [name for name in ('batch_size', 'accum_steps') if stored.get(name) != args[name]]
        differences += [f'--{name} was {stored.get(name)}, is {args[name]}' for name in changed]
        total = f'{known.get("total_batch")}, is {fingerprint["total_batch"]}'
        notes.append(f'the total batch was {total}, and the learning rate changes with it')
    for name, words in (('processes', 'the number of processes'), ('threads', 'the number of threads'),
                        ('device', 'the device'), ('torch', 'the version of torch')):  # fmt: skip
        if known.get(name) != fingerprint[name]:
            change = f'{words} was {known.get(name)}, is {fingerprint[name]}'
            notes.append(f'{change}: results agree to rounding, not to the bit')
    return differences, notes, other_batch
