"""The training loop, on Accelerate: one process or many, any device, killed and resumed."""

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
from torch.utils.data import DataLoader

from tokendial.runs.card import write_versions
from tokendial.runs.loaders import Prepared, eval_loader, seed_all
from tokendial.runs.recipe import BaseRecipe
from tokendial.runs.run import Run
from tokendial.signals import StopRequest, stop_requests
from tokendial.train.batches import Awaited, EpochSampler, train_loader
from tokendial.train.checkpoint import (
    Ema,
    kept_buffers,
    load_buffers,
    load_trained,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
    trained,
)
from tokendial.train.job import Job
from tokendial.train.optimizer import cosine
from tokendial.train.progress import Display, display
from tokendial.train.sharding import (
    fsdp_plugin,
    gathered,
    spread,
    spread_optimizer,
    use_fsdp,
    whole,
)
from tokendial.train.tracking import check_trackers, hyper_parameters

NOT_FINITE = "the loss is not finite"
"""What the error of a run that diverged begins with."""
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


_MOST_WAITING = 0.1


class InterruptedRunError(Exception):
    """The run was asked to stop by a signal; a checkpoint has been written."""


@dataclass(slots=True)
class _Position:
    """Where a run stands; with the weights, all that its future depends on."""

    update: int = 0
    best: float = -1.0
    loss_sum: float = 0.0
    hits_sum: float = 0.0
    batches: int = 0


class Trainer:
    """Runs a job to its end."""

    def __init__(self, recipe: BaseRecipe, job: Job, *, quiet: bool = False) -> None:
        """Set up the run.

        Args:
            recipe: Of the run.
            job: What it trains.
            quiet: Print nothing.

        Raises:
            ValueError: If the recipe does not fit the data or the model.
        """
        settings = recipe.train
        self.recipe, self.settings = recipe, settings
        self.run = Run(recipe.output)
        self.job = job
        # One process may train twice, in another precision; Accelerate remembers the first one.
        AcceleratorState._reset_state()
        fsdp = fsdp_plugin()
        check_trackers(settings.trackers)
        self.accelerator = Accelerator(
            mixed_precision=_PRECISION[settings.precision],
            gradient_accumulation_steps=settings.accumulate,
            log_with=settings.trackers or None,
            project_config=ProjectConfiguration(self.run.folder, self.run.folder / "logs"),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
            fsdp_plugin=fsdp,
        )
        if fsdp:
            use_fsdp(self.accelerator, fsdp)
        self.main = self.accelerator.is_main_process
        self.quiet = quiet or not self.main
        self._loaders()
        self.updates = self.sampler.updates * settings.epochs
        optimizer = torch.optim.AdamW(job.parameter_groups())
        self.model, self.optimizer = self.accelerator.prepare(job.objective, optimizer)
        self.scheduler = cosine(optimizer, settings, self.sampler.updates)
        self.ema = Ema(job.module, settings.ema) if settings.ema else None
        self.at = _Position()
        self.stop = StopRequest()

    def _loaders(self) -> None:
        recipe, settings, accelerator = self.recipe, self.settings, self.accelerator
        data, task, anatomy = self.job.data, self.job.task, self.job.anatomy
        prepared = Prepared(data.train, task.train_transform(anatomy), recipe.seed)
        shard = {"rank": accelerator.process_index, "processes": accelerator.num_processes}
        self.sampler = EpochSampler(
            len(prepared),
            batch_size=settings.batch_size,
            accumulate=settings.accumulate,
            seed=recipe.seed,
            repeats=settings.repeats,
            **shard,
        )
        self.train_loader = train_loader(prepared, self.sampler, settings.workers)
        self.val_loader: DataLoader[Any] = eval_loader(
            data.val,
            task.eval_transform(anatomy),
            batch_size=task.eval_batch(settings.batch_size),
            workers=settings.workers,
            **shard,
        )

    def run_to_end(self, finish: Callable[[Run, torch.device], None] | None = None) -> Run:
        """Train; go on where a killed run of the same recipe stopped.

        Args:
            finish: Called in the first process when the last epoch is done, before other processes
                may write the run again; also if it was done already.

        Raises:
            ValueError: If the folder holds another run, or another process has it.
            InterruptedRunError: If the process was asked to stop.
        """
        with self.run.alone() if self.main else nullcontext() as lock:
            if self.main:
                self._claim()
            self.accelerator.wait_for_everyone()
            self._resume()
            self._train(lock)
            if self.main and finish is not None:
                finish(self.run, self.accelerator.device)
        return self.run

    def _claim(self) -> None:
        data = self.job.data
        self.run.claim(
            self.recipe,
            data.classes,
            multi_label=data.multi_label,
            dense=data.dense,
            video=data.video,
        )

    def _train(self, lock: TextIO | None) -> None:
        with display(self.updates, self.at.update, shows=self.job.shows, quiet=self.quiet) as shown:
            if self.at.update == self.updates and not self.at.batches:
                shown.note(
                    f"{self.run.folder} is finished: nothing to do; best model: {self.run.best}"
                )
                return
            if self.at.update:
                shown.note(f"resuming at update {self.at.update} of {self.updates}")
            if lock is not None:
                self.run.sign(lock)
                write_versions(self.run)
            self.accelerator.init_trackers("tokendial", hyper_parameters(self.recipe))
            with stop_requests() as self.stop:
                # An epoch whose last update is done may still have to be evaluated.
                done = (self.at.update - bool(self.at.batches)) // self.sampler.updates
                for epoch in range(done, self.settings.epochs):
                    self._train_epoch(epoch, shown)
                    self._finish_epoch(epoch, shown)
            self.accelerator.end_training()
            shown.note(f"best model: {self.run.best}")

    def _train_epoch(self, epoch: int, shown: Display) -> None:
        self.model.train()
        self.sampler.start(epoch, self.at.update - epoch * self.sampler.updates)
        self.batches = Awaited(self.train_loader)
        for _ in range(self.sampler.updates - self.sampler.first_update):
            self.scheduler.step_update(self.at.update)
            self.job.before_update(self.at.update, self.sampler.updates)
            loss, hits, stop = self._together(*self._update())
            self.at.update += 1
            self.at.loss_sum += loss
            self.at.hits_sum += hits
            self.at.batches += 1
            shown.update(epoch + 1, self.at.update, self.sampler.per_update, loss, hits)
            if self.at.update % 10 == 0:
                rate = self.optimizer.param_groups[0]["lr"]
                self.accelerator.log({"loss": loss, "lr": rate}, step=self.at.update)
            if stop or self.at.update % self.settings.checkpoint_every == 0:
                self._checkpoint()
            if stop:
                raise InterruptedRunError

    def _update(self) -> tuple[float, float]:
        """One optimizer step; returns mean loss and share of hits of this process."""
        losses, hits = 0.0, 0.0
        for part in range(self.settings.accumulate):
            images, targets = (t.to(self.accelerator.device) for t in next(self.batches))
            # Dropout, stochastic depth and mixup draw from here on; a resumed run draws the same.
            seed_all(self.recipe.seed, self.at.update, part, self.accelerator.process_index)
            images, targets = self.job.mixed(images, targets)
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    loss, outputs = self.model(images, targets)
                self.accelerator.backward(loss)
                if self.settings.clip_grad and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(
                        trained(self.job.module).values(), self.settings.clip_grad
                    )
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses += loss.item()
            hits += self.job.hits(outputs.detach(), targets)
        if self.ema:
            self.ema.update(self.job.module)
        return losses / self.settings.accumulate, hits / self.settings.accumulate

    def _together(self, loss: float, hits: float) -> tuple[float, float, bool]:
        """Means over all processes, and whether any of them was asked to stop.

        Every process gets the same answer, so that all of them stop, or fail, at the same update.
        """
        mine = torch.tensor([loss, hits, float(self.stop.asked)], device=self.accelerator.device)
        loss, hits, stop = self.accelerator.reduce(mine, "mean").tolist()
        if not math.isfinite(loss):
            raise ValueError(
                f"{NOT_FINITE} at update {self.at.update}: lower train.lr "
                f"({self.settings.lr}) or set train.clip_grad."
            )
        return loss, hits, stop > 0

    def _finish_epoch(self, epoch: int, shown: Display) -> None:
        at, waited = self.at, self.batches.waited
        averaged = self.ema.in_place(self.job.module) if self.ema else nullcontext()
        with averaged, gathered(self.model):
            scores = {}
            if self.settings.evaluate == "every" or epoch + 1 == self.settings.epochs:
                scores = self.job.scores(self.val_loader, self.accelerator)
            name, judged = next(iter(scores.items()), ("", -1.0))
            record = {
                "epoch": epoch + 1,
                "update": at.update,
                "train_loss": at.loss_sum / at.batches,
                f"train_{self.job.shows}": at.hits_sum / at.batches,
                "data_wait": waited,
            } | {f"val_{name}": value for name, value in scores.items()}
            if self.main:
                if judged > at.best:
                    self.job.save(self.run.best)
                self.job.save(self.run.last)
                self.run.record(record)
        at.best = max(at.best, judged)
        at.loss_sum, at.hits_sum, at.batches = 0.0, 0.0, 0
        self._checkpoint()
        numbers = {key: value for key, value in record.items() if key != "epoch"}
        self.accelerator.log(numbers, step=at.update)
        val = f", val {name.replace('_', ' ')} {judged:.2%}" if scores else ""
        shown.note(f"epoch {epoch + 1}: train loss {record['train_loss']:.4f}{val}")
        if waited > _MOST_WAITING:
            shown.note(
                f"training waited for images {waited:.0%} of this epoch: raise train.workers "
                f"({self.settings.workers})"
            )

    def _checkpoint(self) -> None:
        state = {
            "position": asdict(self.at),
            "weights": whole(trained(self.job.module)),
            "buffers": kept_buffers(self.job.module),
            "optimizer": whole(self.optimizer.state_dict()),
            "ema": whole(self.ema.average) if self.ema else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        if self.main:
            save_checkpoint(self.run.checkpoints, self.at.update, state)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        # One process chooses: they must not go on from different ones.
        found = [newest_checkpoint(self.run.checkpoints) if self.main else None]
        (path,) = broadcast_object_list(found)
        if path is None:
            return
        state = read_checkpoint(path)
        self.at = _Position(**state["position"])
        load_trained(self.job.module, state["weights"])
        load_buffers(self.job.module, state["buffers"])
        if _grouped_alike(state["optimizer"], self.optimizer.state_dict()):
            self.optimizer.load_state_dict(spread_optimizer(state["optimizer"], self.optimizer))
        elif not self.quiet:
            # Earlier versions let more parameters decay, and kept the moments in another order.
            print("the checkpoint groups parameters otherwise: the optimizer's moments start anew")
        if self.ema:
            present = self.ema.average
            self.ema.average = {n: spread(v, present[n]) for n, v in state["ema"].items()}
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def _grouped_alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two states of optimizers have groups of the same sizes."""
    sizes = [[len(group["params"]) for group in state["param_groups"]] for state in (one, other)]
    return sizes[0] == sizes[1]
