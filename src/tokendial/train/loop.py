"""The training loop, on Accelerate: any device, one process or many, resumable at any update."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)
from torch import Tensor
from torch.utils.data import DataLoader

from tokendial.runs.card import write_versions
from tokendial.runs.loaders import TransformedDataset, eval_loader, seed_all
from tokendial.runs.recipe import BaseRecipe, Recipe
from tokendial.runs.run import Run
from tokendial.signals import StopRequest, stop_requests
from tokendial.tasks import Classification
from tokendial.tasks.metric_titles import metric_title
from tokendial.train.batches import EpochSampler, TimedBatches, train_loader
from tokendial.train.checkpoint import (
    Ema,
    load_buffers,
    load_trainable,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
    saved_buffers,
    trainable,
)
from tokendial.train.display import TrainingDisplay, training_display
from tokendial.train.job import Job
from tokendial.train.optimizer import cosine_schedule
from tokendial.train.sharding import (
    fsdp_plugin,
    gathered_parameters,
    shard_like,
    shard_optimizer_state,
    unshard,
    use_fsdp,
)
from tokendial.train.tracking import check_trackers, hyper_parameters

NOT_FINITE = "the loss is not finite"
"""Start of the error of a run that diverged. Sweeps recognise such runs by it."""
_MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_MAX_WAIT_FRACTION = 0.1
"""Fraction of an epoch spent waiting for images above which a line recommends more workers."""
_UPDATES_BETWEEN_LOGS = 10


class InterruptedRunError(Exception):
    """A signal asked the run to stop. A checkpoint was written before this was raised."""


@dataclass(slots=True)
class _Position:
    """Progress of a run. Together with weights, optimizer and buffers it determines the rest.

    Checkpoints hold these fields by name.
    """

    update: int = 0
    """Finished updates of the whole run."""
    best: float = -1.0
    """Highest validation score so far; -1 before the first one."""
    loss_sum: float = 0.0
    """Sum of the training loss over the updates of the present epoch."""
    hits_sum: float = 0.0
    """Sum of the training score over the updates of the present epoch."""
    batches: int = 0
    """Finished updates of the present epoch; 0 after its evaluation."""


class Trainer:
    """Trains a job to the end of its recipe, resuming where an earlier process stopped."""

    def __init__(self, recipe: BaseRecipe, job: Job, *, quiet: bool = False) -> None:
        """Set up Accelerate, loaders, optimizer and schedule.

        Args:
            recipe: Recipe of the run.
            job: What to train.
            quiet: Whether to print nothing.

        Raises:
            ValueError: If the recipe does not fit the data or the model.
        """
        settings = recipe.train
        self.recipe, self.settings = recipe, settings
        self.run = Run(recipe.output)
        self.job = job
        # Accelerate would keep the precision of the first training in this process for the next.
        AcceleratorState._reset_state()
        fsdp = fsdp_plugin()
        check_trackers(settings.trackers)
        self.accelerator = Accelerator(
            mixed_precision=_MIXED_PRECISION[settings.precision],
            gradient_accumulation_steps=settings.accumulate,
            log_with=settings.trackers or None,
            project_config=ProjectConfiguration(self.run.folder, self.run.folder / "logs"),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
            fsdp_plugin=fsdp,
        )
        if fsdp:
            use_fsdp(self.accelerator, fsdp)
        self.is_main = self.accelerator.is_main_process
        self.quiet = quiet or not self.is_main
        self._make_loaders()
        self.updates = self.sampler.updates * settings.epochs
        optimizer = torch.optim.AdamW(job.parameter_groups())
        self.model, self.optimizer = self.accelerator.prepare(job.objective, optimizer)
        self.scheduler = cosine_schedule(optimizer, settings, self.sampler.updates)
        self.ema = Ema(job.module, settings.ema) if settings.ema else None
        self.position = _Position()
        self.stop = StopRequest()

    def _make_loaders(self) -> None:
        recipe, settings, accelerator = self.recipe, self.settings, self.accelerator
        data, task, anatomy = self.job.data, self.job.task, self.job.anatomy
        dataset = TransformedDataset(data.train, task.train_transform(anatomy), recipe.seed)
        process = {"rank": accelerator.process_index, "processes": accelerator.num_processes}
        self.sampler = EpochSampler(
            len(dataset),
            batch_size=settings.batch_size,
            accumulate=settings.accumulate,
            seed=recipe.seed,
            repeats=settings.repeats,
            **process,
        )
        self.train_loader = train_loader(dataset, self.sampler, settings.workers)
        self.val_loader: DataLoader[Any] = eval_loader(
            data.val,
            task.eval_transform(anatomy),
            batch_size=task.eval_batch_size(settings.batch_size),
            workers=settings.workers,
            **process,
        )

    def run_to_end(self, finish: Callable[[Run, torch.device], None] | None = None) -> Run:
        """Train to the last epoch; resume if the folder holds a checkpoint of the same recipe.

        Args:
            finish: Called in the main process after the last epoch, while this process still
                has the run's folder. It is called even if the run was finished before.

        Raises:
            ValueError: If the folder holds another run, or another process trains this one.
            InterruptedRunError: If a signal asked the process to stop.
        """
        with self.run.locked() if self.is_main else nullcontext() as lock:
            if self.is_main:
                self._claim_folder()
            self.accelerator.wait_for_everyone()
            self._resume()
            self._train(lock)
            if self.is_main and finish is not None:
                finish(self.run, self.accelerator.device)
        return self.run

    def _claim_folder(self) -> None:
        data, task = self.job.data, self.job.task
        self.run.claim(
            self.recipe,
            data.classes,
            multi_label=data.multi_label,
            dense=data.dense,
            video=data.video,
            class_weights=task.class_weights if isinstance(task, Classification) else None,
        )

    def _train(self, lock: TextIO | None) -> None:
        position = self.position
        with training_display(
            self.updates, done=position.update, score_name=self.job.score_name, quiet=self.quiet
        ) as display:
            if position.update == self.updates and not position.batches:
                display.print(
                    f"{self.run.folder} is finished: nothing to do; best model: {self.run.best}"
                )
                return
            if position.update:
                display.print(f"resuming at update {position.update} of {self.updates}")
            if lock is not None:
                self.run.write_owner(lock)
                write_versions(self.run)
            self.accelerator.init_trackers("tokendial", hyper_parameters(self.recipe))
            with stop_requests() as self.stop:
                # A run may have stopped between the last update of an epoch and its evaluation.
                # That epoch is not finished: `batches` is then above 0.
                unfinished = bool(position.batches)
                epochs_done = (position.update - unfinished) // self.sampler.updates
                for epoch in range(epochs_done, self.settings.epochs):
                    self._train_epoch(epoch, display)
                    self._finish_epoch(epoch, display)
            self.accelerator.end_training()
            display.print(f"best model: {self.run.best}")

    def _train_epoch(self, epoch: int, display: TrainingDisplay) -> None:
        position = self.position
        self.model.train()
        self.sampler.start(epoch, position.update - epoch * self.sampler.updates)
        self.batches = TimedBatches(self.train_loader)
        for _ in range(self.sampler.updates - self.sampler.first_update):
            self.scheduler.step_update(position.update)
            self.job.before_update(position.update, self.sampler.updates)
            loss, score, stop = self._mean_over_processes(*self._update())
            position.update += 1
            position.loss_sum += loss
            position.hits_sum += score
            position.batches += 1
            display.update(epoch + 1, position.update, self.sampler.per_update, loss, score)
            if position.update % _UPDATES_BETWEEN_LOGS == 0:
                rate = self.optimizer.param_groups[0]["lr"]
                self.accelerator.log({"loss": loss, "lr": rate}, step=position.update)
            if stop or position.update % self.settings.checkpoint_every == 0:
                self._checkpoint()
            if stop:
                raise InterruptedRunError

    def _update(self) -> tuple[float, float]:
        """Do one update. Returns the mean loss and the mean score of this process."""
        loss_sum, score_sum = 0.0, 0.0
        for part in range(self.settings.accumulate):
            images, targets = (t.to(self.accelerator.device) for t in next(self.batches))
            # Dropout, stochastic depth and mixup draw after this. Seeding here makes a resumed run
            # draw the same numbers as one that was not interrupted.
            seed_all(self.recipe.seed, self.position.update, part, self.accelerator.process_index)
            with self.accelerator.autocast():
                images, targets = self.job.augment_batch(images, targets)
            with self.accelerator.accumulate(self.model):
                for number in range(self.job.passes):
                    loss, score = self._pass(number, images, targets)
                    loss_sum += loss
                    score_sum += score / self.job.passes
                if self.settings.clip_grad and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(
                        trainable(self.job.module).values(), self.settings.clip_grad
                    )
                self.optimizer.step()
                self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.job.module)
        return loss_sum / self.settings.accumulate, score_sum / self.settings.accumulate

    def _pass(self, number: int, images: Tensor, targets: Tensor) -> tuple[float, float]:
        """Do a forward and a backward pass. Returns the loss and the score of this process."""
        self.job.before_pass(number)
        # Processes exchange gradients once per update, after its last pass.
        is_last = number + 1 == self.job.passes
        with nullcontext() if is_last else self.accelerator.no_sync(self.model):
            with self.accelerator.autocast():
                loss, outputs = self.model(images, targets)
            self.accelerator.backward(loss)
        return loss.item(), self.job.batch_score(outputs.detach(), targets)

    def _mean_over_processes(self, loss: float, score: float) -> tuple[float, float, bool]:
        """Means over all processes, and whether any of them was asked to stop.

        Every process gets the same result, so that all of them stop, or fail, at the same update.
        """
        own = torch.tensor(
            [loss, score, float(self.stop.requested)], device=self.accelerator.device
        )
        loss, score, stop = self.accelerator.reduce(own, "mean").tolist()
        if not math.isfinite(loss):
            raise ValueError(
                f"{NOT_FINITE} at update {self.position.update}: lower train.lr "
                f"({self.settings.lr}) or set train.clip_grad."
            )
        return loss, score, stop > 0

    def _finish_epoch(self, epoch: int, display: TrainingDisplay) -> None:
        """Evaluate, save the models, record the epoch, write a checkpoint."""
        position, wait_fraction = self.position, self.batches.wait_fraction
        averaged = self.ema.applied_to(self.job.module) if self.ema else nullcontext()
        with averaged, gathered_parameters(self.model):
            scores = {}
            if self.settings.evaluate == "every" or epoch + 1 == self.settings.epochs:
                scores = self.job.validation_scores(self.val_loader, self.accelerator)
            name, main_score = next(iter(scores.items()), ("", -1.0))
            record = {
                "epoch": epoch + 1,
                "update": position.update,
                "train_loss": position.loss_sum / position.batches,
                f"train_{self.job.score_name}": position.hits_sum / position.batches,
                "data_wait": wait_fraction,
            } | {f"val_{name}": value for name, value in scores.items()}
            if self.is_main:
                if main_score > position.best:
                    self.job.save(self.run.best)
                self.job.save(self.run.last)
                self.run.record(record)
        position.best = max(position.best, main_score)
        position.loss_sum, position.hits_sum, position.batches = 0.0, 0.0, 0
        self._checkpoint()
        numbers = {key: value for key, value in record.items() if key != "epoch"}
        self.accelerator.log(numbers, step=position.update)
        chosen = self.recipe.metrics if isinstance(self.recipe, Recipe) else None
        shown = list(scores.items())[: len(chosen or [name])]
        val = "".join(f", val {metric_title(name)} {value:.2%}" for name, value in shown)
        display.print(f"epoch {epoch + 1}: train loss {record['train_loss']:.4f}{val}")
        if wait_fraction > _MAX_WAIT_FRACTION:
            display.print(
                f"training waited for images {wait_fraction:.0%} of this epoch: raise "
                f"train.workers ({self.settings.workers})"
            )

    def _checkpoint(self) -> None:
        state = {
            "position": asdict(self.position),
            "weights": unshard(trainable(self.job.module)),
            "buffers": saved_buffers(self.job.module),
            "optimizer": unshard(self.optimizer.state_dict()),
            "ema": unshard(self.ema.average) if self.ema else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        if self.is_main:
            save_checkpoint(self.run.checkpoints, self.position.update, state)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        # The main process chooses the checkpoint, so that all processes resume from the same one.
        chosen = [newest_checkpoint(self.run.checkpoints) if self.is_main else None]
        (path,) = broadcast_object_list(chosen)
        if path is None:
            return
        state = read_checkpoint(path)
        self.position = _Position(**state["position"])
        load_trainable(self.job.module, state["weights"])
        load_buffers(self.job.module, state["buffers"])
        if _same_group_sizes(state["optimizer"], self.optimizer.state_dict()):
            self.optimizer.load_state_dict(
                shard_optimizer_state(state["optimizer"], self.optimizer)
            )
        elif not self.quiet:
            # Versions before 0.2 let more parameters decay, which gave other groups.
            print(
                "the checkpoint has other parameter groups: the optimizer's moments start from zero"
            )
        if self.ema:
            present = self.ema.average
            self.ema.average = {n: shard_like(v, present[n]) for n, v in state["ema"].items()}
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def _same_group_sizes(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two optimizer states have parameter groups of the same sizes."""
    sizes = [[len(group["params"]) for group in state["param_groups"]] for state in (first, second)]
    return sizes[0] == sizes[1]
