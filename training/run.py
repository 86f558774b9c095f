"""A training run: its epochs, its checkpoints, and what happens when it is interrupted or goes wrong."""

from __future__ import annotations

import copy
import math
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

from torch import nn

from engine import NonFiniteError, train_one_epoch
from models.evit import KeepRateSchedule
from pipeline.images import ImageDataset
from pipeline.loaders import TrainLoader
from training import checkpoint as ckpt
from training.devices import num_compiled_graphs
from training.output import OutputFolder
from training.signals import GO_ON, STOP, Interrupted, Interrupts, requeue
from training.state import Parts, Progress, compare, load_state, to_state
from utils import InputError, barrier, format_seconds, from_main_process, is_main_process, log

MOST_REWINDS = 10  # in an epoch


def report_accuracy(stats: dict[str, float]) -> None:
    log(f'Accuracy of the network on the {stats["images"]} test images: {stats["acc1"]:.1f}%')
    log(f'  acc@1 {stats["acc1"]:.4f}  acc@5 {stats["acc5"]:.4f}  loss {stats["loss"]:.6f}')


class Run:
    """A training: its epochs, and what happens between, inside and after them.

    Args:
        parts: what training changes.
        trained: the model as it is called in training, perhaps inside DistributedDataParallel.
        loader: training batches, made by a `TrainBatches`.
        dataset: the training images.
        test: evaluates a model under a header, at a keep rate.
        epoch_options: further arguments of `train_one_epoch`.
        keep_rates: EViT's schedule, if the model is one.
        settings: what a checkpoint says beside the run's state: `classes`, `args`, `fingerprint`.
        last_epoch: how many epochs there are, the cool-down included.
        lr_delay_epochs: epochs by which training trails the schedule.
        checkpoint_every: ('steps' or 'minutes', how many) between two checkpoints inside an epoch.
        rewinds: go back, once a step gives no finite numbers, and leave it out.
        output: the run's folder.
        interrupts: whether the run is to stop.
    """

    def __init__(
        self,
        *,
        parts: Parts,
        trained: nn.Module,
        loader: TrainLoader,
        dataset: ImageDataset,
        test: Callable[..., dict[str, float]],
        epoch_options: Mapping[str, Any],
        keep_rates: KeepRateSchedule | None,
        settings: Mapping[str, Any],
        last_epoch: int,
        lr_delay_epochs: int,
        checkpoint_every: tuple[str, float] | None,
        rewinds: bool,
        output: OutputFolder,
        interrupts: Interrupts,
    ) -> None:
        self.parts = parts
        self.trained = trained
        self.loader = loader
        self.batches = loader.batch_sampler
        self.dataset = dataset
        self.test = test
        self.epoch_options = epoch_options
        self.keep_rates = keep_rates
        self.settings = settings
        self.last_epoch = last_epoch
        self.lr_delay_epochs = lr_delay_epochs
        self.checkpoint_every = checkpoint_every
        self.rewinds = rewinds
        self.output = output
        self.interrupts = interrupts
        self.progress = Progress()
        self.num_parameters = sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
        self._trained_epochs = 0  # by this process
        self._rewound = 0  # since the last whole epoch
        self._steps_since_save, self._saved_at = 0, time.monotonic()

    def resume(self, state: dict[str, Any], source: str, *, force: bool = False) -> None:
        """Goes on from a checkpoint.

        Args:
            state: the checkpoint.
            source: its name, for messages.
            force: go on although arguments or data differ; then those of this run count.

        Raises:
            InputError: if it is of a run that differs, unless forced.
        """
        stored, own = ckpt.stored_args(state).get('opt'), self.settings['args']['opt']
        if stored not in (None, own):
            raise InputError(f'{source} is of a run with --opt {stored}, not {own}')
        differences, notes, other_batch = compare(state, self.settings['args'], self.settings['fingerprint'])
        if differences and not force:
            raise InputError(
                f'{source} is of a run that differs: {"; ".join(differences)}. Start it as it was, choose another '
                '--output_dir, or go on with --force-resume'
            )
        self.progress = load_state(self.parts, state, source, schedule=not differences and not other_batch)
        if differences or other_batch:  # the rates of the new arguments
            self.parts.scheduler.step(max(self.progress.epoch - self.lr_delay_epochs, 0), None)
        for line in (*differences, *notes):
            log(f'Note: {line}')
        within = f', {self.progress.batch} steps of epoch {self.progress.epoch}' if self.progress.batch else ''
        log(
            f'Resumed from {source}: {self.progress.epoch} epochs{within} are done, '
            f'best accuracy {max(self.progress.best, 0):.2f}%'
        )

    def save(self, *, best: bool = False) -> None:
        self.output.save(to_state(self.parts, self.progress, self.settings), best=best)
        self._steps_since_save, self._saved_at = 0, time.monotonic()

    def _save_is_due(self) -> bool:
        """Whether the main process wants a checkpoint now; not while the last one is still being written."""
        if self.checkpoint_every is None or self.output.path is None or self.output.busy:
            return False
        unit, number = self.checkpoint_every
        passed = self._steps_since_save if unit == 'steps' else (time.monotonic() - self._saved_at) / 60
        return passed >= number

    def _after_step(self, batch: int, read: Callable[[], None]) -> None:
        self._steps_since_save += 1
        decision = self.interrupts.agree(save=self._save_is_due())
        if decision == GO_ON:
            return
        read()
        self.progress.batch, self.progress.done = batch, self.batches.stretch(batch - 1)[1]
        if decision >= STOP:
            self._stop(decision - STOP)
        self.save()

    def _stop(self, number: int) -> NoReturn:
        """Leaves after a signal, with a checkpoint if there is a folder for it."""
        where = f'in epoch {self.progress.epoch}, after step {self.progress.batch}'
        name = signal.Signals(number).name
        if not self.output.wanted:
            raise Interrupted(number, f'{name} {where}; there is no --output_dir, so nothing is saved')
        self.save()
        try:
            self.output.close()
        finally:
            if number == signal.SIGUSR1 and is_main_process():
                requeue()
        barrier()  # a launcher ends all processes once one of them is gone
        raise Interrupted(number, f'{name} {where}: a checkpoint is written; --auto-resume goes on from it')

    def _dump(self, err: NonFiniteError) -> str:
        """Writes what is known about a step that gave no finite numbers; returns where, for a message."""
        first = err.step['batch']
        draws = [self.batches.draws(number) for number in range(first, first + err.step['batches_in_step'])]
        samples = [
            [
                [{'index': draw.image, 'repeat': draw.repeat, 'name': self.dataset.name(draw.image)} for draw in own]
                for own in batch
            ]
            for batch in draws
        ]
        content = {**err.step, 'samples': samples}  # of each batch, of each process
        return self.output.dump(f'non_finite_epoch{err.step["epoch"]}_step{first}.json', content)

    def _rewind(self, err: NonFiniteError) -> None:
        """Goes back to the last checkpoint, and leaves out the batches of the step that failed.

        Raises:
            NonFiniteError: if that is not asked for, or has not helped.
        """
        if 'batches_in_step' not in err.step:
            raise err
        where = self._dump(err)
        self.output.wait()
        hint = '--on-nan rewind leaves such a batch out' if not self.rewinds else 'rewinding has not helped'
        if not self.rewinds or self._rewound == MOST_REWINDS:
            kept = '; the last checkpoint is from before it' if self.output.wanted else ''
            raise NonFiniteError(f'{err}{where}{kept}; {hint}', err.step)
        self._rewound += 1
        first, number = err.step['batch'], err.step['batches_in_step']
        stretch = self.batches.stretch(first)[0], self.batches.stretch(first + number - 1)[1]
        left_out = [*self.progress.left_out, (self.progress.epoch, *stretch)]
        found = from_main_process(self.output.newest())
        if found is None:
            raise err
        source, data = found
        self.progress = load_state(self.parts, ckpt.from_bytes(data, source), source)
        self.progress.left_out = left_out
        log(f'Warning: {err}{where}. Back to {source}; the {stretch[1] - stretch[0]} samples of that step are left out')

    def train(self) -> dict[str, Any]:
        """Runs the epochs that are left; returns the last line of the log.

        Raises:
            NonFiniteError: for a step that gave no finite numbers, unless it is left out.
            Interrupted: after a signal.
        """
        progress = self.progress
        started = time.perf_counter()
        if progress.epoch >= self.last_epoch:
            log(f'Nothing is left to train: the checkpoint has all {self.last_epoch} epochs')
            keep_rate = progress.keep_rate if self.keep_rates is not None else None
            report_accuracy(self.test(self.parts.model, 'Test', keep_rate))
        elif self.rewinds:
            self.save()  # what to go back to: this run, with its arguments
        with self.interrupts.installed():
            while self.progress.epoch < self.last_epoch:
                try:
                    stats = self._train_epoch()
                except NonFiniteError as err:
                    self._rewind(err)
                    continue
                self._finish_epoch(stats)
            self.output.close()
        best = max(self.progress.best, 0)
        log(f'Training time {format_seconds(time.perf_counter() - started)}, best accuracy {best:.2f}%')
        return self.progress.history[-1] if self.progress.history else {}

    def _train_epoch(self) -> dict[str, float]:
        progress, parts = self.progress, self.parts
        self.batches.start(
            progress.epoch,
            done=progress.done,
            num_draws=progress.num_draws,
            left_out=progress.stretches(),
            first=progress.batch,
        )
        if self.batches.unplaced:
            log(f'Note: the last {self.batches.unplaced} samples of the epoch are too few for all processes')
        progress.num_draws = self.batches.length
        steps = progress.batch + len(self.batches)
        compiled = num_compiled_graphs()
        stats = train_one_epoch(
            model=self.trained,
            loader=self.loader,
            optimizer=parts.optimizer,
            scaler=parts.scaler,
            model_ema=parts.model_ema,
            epoch=progress.epoch,
            keep_rate=partial(self.keep_rates, progress.epoch, steps=steps) if self.keep_rates is not None else None,
            first=progress.batch,
            tally=progress.tally,
            after_step=self._after_step,
            **self.epoch_options,
        )
        more = num_compiled_graphs() - compiled
        if self._trained_epochs and more:
            log(f'Warning: {more} further graphs were compiled in this epoch, which took time: --compile off')
        self._trained_epochs += 1
        return stats

    def _test(self, model: nn.Module, header: str, prefix: str) -> dict[str, float]:
        """A model's results for the log, unless a signal comes."""
        stats = self.test(model, header, self.progress.keep_rate, stop=lambda: bool(self.interrupts.signal))
        decision = self.interrupts.agree(save=False)
        if decision >= STOP:
            self._stop(decision - STOP)
        if prefix == 'test':
            report_accuracy(stats)
        else:
            log(f'  moving average: acc@1 {stats["acc1"]:.4f}')
        return {f'{prefix}_{name}': value for name, value in stats.items() if name != 'images'}

    def _finish_epoch(self, train_stats: dict[str, float]) -> None:
        """Evaluates, logs and saves."""
        progress, parts, epoch = self.progress, self.parts, self.progress.epoch
        progress.batch, progress.done = progress.batch + len(self.batches), self.batches.length
        progress.batch = max(progress.batch, 1)
        progress.keep_rate = train_stats.pop('keep_rate', None)
        self.dataset.log_bad_images()
        started = time.perf_counter()
        line = {f'train_{name}': value for name, value in train_stats.items()}
        line |= self._test(parts.model, 'Test', 'test')
        if not math.isfinite(line['test_loss']):
            raise NonFiniteError(
                f'the test loss is {line["test_loss"]} after epoch {epoch}, with learning rate '
                f'{train_stats["lr"]:.3g}; the last checkpoint is from before the end of this epoch', {}
            )  # fmt: skip
        if parts.model_ema is not None:
            average = copy.deepcopy(parts.model_ema.module).to(self.epoch_options['device'])
            line |= self._test(average, 'Test of the moving average', 'ema_test')
        is_best = line['test_acc1'] > progress.best
        progress.best = max(progress.best, line['test_acc1'])
        line |= {'max_accuracy': progress.best, 'epoch': epoch, 'n_parameters': self.num_parameters}
        if progress.keep_rate is not None:
            line['keep_rate'] = progress.keep_rate
        steps = max(progress.tally.losses, 1)
        timing = {
            'epoch': epoch,
            'train_images': (progress.num_draws or 0) - sum(end - begin for begin, end in progress.stretches()),
            'train_seconds': round(progress.tally.seconds, 3),
            'data_seconds': round(progress.tally.data_seconds, 3),
            'step_seconds': round(progress.tally.seconds / steps, 6),
            'test_seconds': round(time.perf_counter() - started, 3),
        }
        progress.history.append(line)
        progress.timings.append(timing)
        if epoch + 1 > self.lr_delay_epochs:
            parts.scheduler.step(epoch + 1 - self.lr_delay_epochs, line['test_loss'])
        progress.next_epoch()
        self._rewound = 0
        self.save(best=is_best)
        self.output.add_events({**line, **timing})
