"""A training run: its epochs, its checkpoints, and what happens when it is interrupted or goes wrong."""

from __future__ import annotations

import copy
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from engine import TrainSettings, train_one_epoch
from pipeline.images import ImageDataset
from pipeline.loaders import TrainLoader
from training import checkpoint as ckpt
from training.devices import num_compiled_graphs
from training.output import OutputFolder
from training.signals import GO_ON, STOP, Interrupted, Interrupts, requeue
from training.state import TrainingProgress, TrainState, compare, load_state, refuse_other_run, to_state
from training.weights import stored_args
from utils import InputError, NonFiniteError, barrier, broadcast_object, format_seconds, is_main_process, log

TEST_RESULT = 'test.json'
MAX_REWINDS = 10  # in an epoch
Test = Callable[..., dict[str, float]]  # evaluates a model under a header, at a keep rate, until told to stop


def report_accuracy(stats: dict[str, float], *, images: str = 'test') -> None:
    log(f'Accuracy of the network on the {stats["images"]} {images} images: {stats["acc1"]:.1f}%')
    log(f'  acc@1 {stats["acc1"]:.4f}  acc@5 {stats["acc5"]:.4f}  loss {stats["loss"]:.6f}')


def _prefixed(prefix: str, stats: dict[str, float]) -> dict[str, float]:
    """Results as `log.txt` names them; the number of images is none of them."""
    return {f'{prefix}_{name}': value for name, value in stats.items() if name != 'images'}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How a run goes on from epoch to epoch, and what it does about trouble."""

    last_epoch: int  # how many epochs there are, the cool-down included
    updates_per_epoch: int  # optimizer steps
    lr_delay_epochs: int = 0  # by which training trails a schedule that goes by epochs
    ema_can_be_best: bool = False  # the moving average may be the best too
    checkpoint_every: tuple[str, float] | None = None  # 'steps' or 'minutes', and how many, inside an epoch
    rewinds: bool = False  # go back, once a step gives no finite numbers, and leave it out


@dataclass(kw_only=True)
class Run:
    """A training: its epochs, and what happens between, inside and after them."""

    state: TrainState
    train_model: nn.Module  # perhaps inside DistributedDataParallel
    loader: TrainLoader  # its batches are a `TrainBatches`
    dataset: ImageDataset  # the training images
    test: Test  # on the images that choose the best checkpoint
    final_test: Test | None = None  # on the test images, at the end, where those are others
    settings: TrainSettings
    run_settings: RunSettings
    metadata: Mapping[str, Any]  # what a checkpoint says beside the run's state: `classes`, `args`, `fingerprint`
    output: OutputFolder

    def __post_init__(self) -> None:
        self.batches = self.loader.batch_sampler
        self.val_name = 'test' if self.final_test is None else 'held-out'
        self.interrupts = Interrupts()
        self.progress = TrainingProgress()
        self.num_parameters = sum(p.numel() for p in self.state.model.parameters() if p.requires_grad)
        self._trained_epochs = 0  # by this process
        self._updates = 0  # optimizer steps before this place in the run
        self._rewound = 0  # since the last whole epoch
        self._steps_since_save, self._saved_at = 0, time.monotonic()

    def start_at(self, epoch: int) -> None:
        """Begins with another epoch than the first."""
        self.progress.epoch = epoch
        self.state.scheduler.update_groups(self.state.scheduler.base_values)  # which plateau goes on from
        self._set_rates()

    def _count_updates(self) -> int:
        """The optimizer steps before this place, as if all of them had had this run's batches."""
        progress, per_epoch = self.progress, self.run_settings.updates_per_epoch
        done = progress.done - sum(draw < progress.done for draw in progress.skipped_draws())
        return progress.epoch * per_epoch + per_epoch * done // (progress.num_draws or self.batches.num_draws)

    def _set_rates(self) -> None:
        """Brings the learning rates to where the schedule has this place."""
        self.state.scheduler.step_update(self._count_updates())  # timm's schedules follow one of the two
        self.state.scheduler.step(max(self.progress.epoch - self.run_settings.lr_delay_epochs, 0), None)

    def resume(self, checkpoint: dict[str, Any], source: str, *, force: bool = False) -> None:
        """Goes on from a checkpoint.

        Args:
            source: its name, for messages.
            force: go on although arguments or data differ; then those of this run count.

        Raises:
            InputError: if it is of a run that differs, unless forced.
        """
        stored, own = stored_args(checkpoint).get('opt'), self.metadata['args']['opt']
        if stored not in (None, own):
            raise InputError(f'{source} is of a run with --opt {stored}, not {own}')
        differences, notes, other_batch = compare(checkpoint, self.metadata['args'], self.metadata['fingerprint'])
        if differences and not force:
            refuse_other_run(source, differences)
        self.progress = load_state(self.state, checkpoint, source, schedule=not differences and not other_batch)
        if differences or other_batch:  # the rates of the new arguments
            self._set_rates()
        for line in (*differences, *notes):
            log(f'Note: {line}')
        within = f', {self.progress.batch} steps of epoch {self.progress.epoch}' if self.progress.batch else ''
        log(
            f'Resumed from {source}: {self.progress.epoch} epochs{within} are done, '
            f'best accuracy {max(self.progress.best, 0):.2f}%'
        )

    def save(self, *, best: bool = False) -> None:
        self.output.save(to_state(self.state, self.progress, self.metadata), best=best)
        self._steps_since_save, self._saved_at = 0, time.monotonic()

    def _save_is_due(self) -> bool:
        """Whether the main process wants a checkpoint now; not while the last one is still being written."""
        if self.run_settings.checkpoint_every is None or self.output.path is None or self.output.busy:
            return False
        unit, number = self.run_settings.checkpoint_every
        passed = self._steps_since_save if unit == 'steps' else (time.monotonic() - self._saved_at) / 60
        return passed >= number

    def _after_step(self, batch: int, read: Callable[[], None]) -> None:
        self._updates += 1
        self.state.scheduler.step_update(self._updates)
        self._steps_since_save += 1
        decision = self.interrupts.agree(save=self._save_is_due())
        if decision == GO_ON:
            return
        read()
        self.progress.batch, self.progress.done = batch, self.batches.batch_range(batch - 1)[1]
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
            if name == 'SIGUSR1' and is_main_process():
                requeue()
        barrier()  # a launcher ends all processes once one of them is gone
        raise Interrupted(number, f'{name} {where}: a checkpoint is written; --auto-resume goes on from it')

    def _dump(self, err: NonFiniteError) -> str:
        """Writes what is known about a step that gave no finite numbers; returns where, for a message."""
        first = err.step['batch']
        samples = [  # of each batch, of each process
            [
                [{'index': draw.image, 'repeat': draw.repeat, 'name': self.dataset.name(draw.image)} for draw in own]
                for own in self.batches.draws(number)
            ]
            for number in range(first, first + err.step['batches_in_step'])
        ]
        name = f'non_finite_epoch{err.step["epoch"]}_step{first}.json'
        return self.output.dump(name, {**err.step, 'samples': samples})

    def _rewind(self, err: NonFiniteError) -> None:
        """Goes back to the last checkpoint, and leaves out the batches of the step that failed.

        Raises:
            InputError: if that is not asked for, or has not helped.
        """
        where = self._dump(err)
        self.output.wait()
        if not self.run_settings.rewinds or self._rewound == MAX_REWINDS:
            kept = '; the last checkpoint is from before it' if self.output.wanted else ''
            hint = 'rewinding has not helped' if self._rewound else '--on-nan rewind leaves such a batch out'
            raise InputError(f'{err}{where}{kept}; {hint}')
        self._rewound += 1
        first, number = err.step['batch'], err.step['batches_in_step']
        begin, end = self.batches.batch_range(first)[0], self.batches.batch_range(first + number - 1)[1]
        left_out = [*self.progress.left_out, (self.progress.epoch, begin, end)]
        samples = len(set(range(begin, end)) - self.progress.skipped_draws())
        found = broadcast_object(self.output.newest())
        if found is None:
            raise err
        source, data = found
        self.progress = load_state(self.state, ckpt.from_bytes(data, source), source)
        self.progress.left_out = left_out
        log(f'Warning: {err}{where}. Back to {source}; the {samples} samples of that step are left out')

    def train(self) -> dict[str, Any]:
        """Runs the epochs that are left; returns the last line of the log.

        Raises:
            InputError: for a step that gave no finite numbers, unless it is left out.
            Interrupted: after a signal.
        """
        progress = self.progress
        started = time.perf_counter()
        if progress.epoch >= self.run_settings.last_epoch:
            log(f'Nothing is left to train: the checkpoint has all {self.run_settings.last_epoch} epochs')
            keep_rate = progress.keep_rate if self.settings.keep_rate is not None else None
            report_accuracy(self.test(self.state.model, 'Test', keep_rate), images=self.val_name)
        elif self.run_settings.rewinds:
            self.save()  # what to go back to: this run, with its arguments
        with self.interrupts.installed():
            while self.progress.epoch < self.run_settings.last_epoch:
                try:
                    stats = self._train_epoch()
                except NonFiniteError as err:
                    self._rewind(err)
                    continue
                self._finish_epoch(stats)
            if self.final_test is not None:
                self._test_best(self.final_test)
            self.output.close()
        best = f'{max(self.progress.best, 0):.2f}%{self._of_average()}'
        on = '' if self.final_test is None else f' on {self.val_name} images'
        log(f'Training time {format_seconds(time.perf_counter() - started)}, best accuracy {best}{on}')
        return self.progress.history[-1] if self.progress.history else {}

    def _of_average(self) -> str:
        return ' of the moving average' if self.progress.best_of == 'model_ema' else ''

    def _test_best(self, test: Test) -> None:
        """Evaluates the best checkpoint on the test images, which had no say in the choice."""
        self.output.wait()
        path = None if self.output.path is None else self.output.path / ckpt.BEST
        found = ckpt.load(str(path)) if path is not None and path.is_file() else None
        names = ('model', 'epoch', 'keep_rate')
        best = broadcast_object(found and {name: found.get(name) for name in names})
        if best is None:
            log(f'Warning: {self.output.path} has no {ckpt.BEST}: the best epoch was written elsewhere, or the file is '
                'gone. So nothing is tested on the test images')  # fmt: skip
            return
        model = copy.deepcopy(self.state.model)
        model.load_state_dict(best['model'])
        stats = self._evaluate(test, model, 'Test of the best', best['keep_rate'])
        weights = 'model_ema' if found and 'trained_model' in found else 'model'
        where = self.output.dump(TEST_RESULT, {'epoch': best['epoch'], 'weights': weights, **stats})
        log(f'The best checkpoint, of epoch {best["epoch"]}, on images that chose nothing{where}:')
        report_accuracy(stats)

    def _train_epoch(self) -> dict[str, float]:
        progress, state = self.progress, self.state
        self.batches.set_epoch(
            progress.epoch,
            done=progress.done,
            num_draws=progress.num_draws,
            left_out=progress.skipped_ranges(),
            first=progress.batch,
        )
        if self.batches.unplaced:
            log(f'Note: the last {self.batches.unplaced} samples of the epoch are too few for all processes')
        progress.num_draws = self.batches.length
        self._updates = self._count_updates()
        state.scheduler.step_update(self._updates)  # where steps of the epoch before were left out
        if state.model_ema is not None:
            state.model_ema.updates = self._updates
        compiled = num_compiled_graphs()
        stats = train_one_epoch(
            self.train_model,
            self.loader,
            state.optimizer,
            state.scaler,
            self.settings,
            epoch=progress.epoch,
            model_ema=state.model_ema,
            first=progress.batch,
            sums=progress.sums,
            after_step=self._after_step,
        )
        more = num_compiled_graphs() - compiled
        if self._trained_epochs and more:
            log(f'Warning: {more} further graphs were compiled in this epoch, which took time: --compile off')
        self._trained_epochs += 1
        return stats

    def _evaluate(self, test: Test, model: nn.Module, header: str, keep_rate: float | None) -> dict[str, float]:
        """A model's results, unless a signal comes."""
        stats = test(model, header, keep_rate, stop=lambda: bool(self.interrupts.signal))
        decision = self.interrupts.agree(save=False)
        if decision >= STOP:
            self._stop(decision - STOP)
        return stats

    def _finish_epoch(self, train_stats: dict[str, float]) -> None:
        """Evaluates, logs and saves."""
        progress, state, epoch = self.progress, self.state, self.progress.epoch
        progress.batch, progress.done = max(self.batches.first + len(self.batches), 1), self.batches.length
        rate = self.settings.keep_rate
        progress.keep_rate = rate and rate(epoch, progress.batch - 1, progress.batch)  # the last of the epoch
        self.dataset.log_bad_images()
        started = time.perf_counter()
        line = _prefixed('train', train_stats)
        stats = self._evaluate(self.test, state.model, 'Test', progress.keep_rate)
        report_accuracy(stats, images=self.val_name)
        line |= _prefixed('test', stats)
        if not math.isfinite(line['test_loss']):
            raise InputError(
                f'the test loss is {line["test_loss"]} after epoch {epoch}, with learning rate '
                f'{train_stats["lr"]:.3g}; the last checkpoint is from before the end of this epoch'
            )
        if state.model_ema is not None:
            average = copy.deepcopy(state.model_ema.module).to(self.settings.device)
            stats = self._evaluate(self.test, average, 'Test of the moving average', progress.keep_rate)
            log(f'  moving average: acc@1 {stats["acc1"]:.4f}')
            line |= _prefixed('ema_test', stats)
        accuracies = {'model': line['test_acc1']}
        if self.run_settings.ema_can_be_best:
            accuracies['model_ema'] = line['ema_test_acc1']
        better = max(accuracies, key=accuracies.__getitem__)
        is_best = accuracies[better] > progress.best
        if is_best:
            progress.best, progress.best_of = accuracies[better], better
        if self.run_settings.ema_can_be_best:
            line['best_is_ema'] = int(progress.best_of == 'model_ema')
            log(f'  best so far: {progress.best:.4f}{self._of_average()}')
        line |= {'max_accuracy': progress.best, 'epoch': epoch, 'n_parameters': self.num_parameters}
        if progress.keep_rate is not None:
            line['keep_rate'] = progress.keep_rate
        timing = {
            'epoch': epoch,
            'train_images': (progress.num_draws or 0) - len(progress.skipped_draws()),
            'train_seconds': round(progress.sums.seconds, 3),
            'data_seconds': round(progress.sums.data_seconds, 3),
            'step_seconds': round(progress.sums.seconds / (progress.sums.norms + progress.sums.skipped), 6),
            'test_seconds': round(time.perf_counter() - started, 3),
        }
        progress.history.append(line)
        progress.timings.append(timing)
        if epoch + 1 > self.run_settings.lr_delay_epochs:
            state.scheduler.step(epoch + 1 - self.run_settings.lr_delay_epochs, line['test_loss'])
        progress.next_epoch()
        self._rewound = 0
        self.save(best=is_best)
        self.output.add_events({**line, **timing})
