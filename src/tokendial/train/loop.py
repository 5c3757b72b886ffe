"""The training loop, on Accelerate: one process or many, any device, killed and resumed."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch.utils.data import DataLoader

from tokendial.data.splits import Splits
from tokendial.data.transforms import eval_transform, train_transform
from tokendial.saving import load
from tokendial.tasks.classification import Classification
from tokendial.train.batches import EpochSampler, Prepared, eval_loader, seed_all, train_loader
from tokendial.train.checkpoint import (
    Ema,
    load_trained,
    newest_checkpoint,
    save_checkpoint,
    trained,
)
from tokendial.train.objective import Objective
from tokendial.train.optimizer import cosine, parameter_groups
from tokendial.train.progress import Display, display
from tokendial.train.recipe import Recipe
from tokendial.train.runs import Run
from tokendial.train.signals import StopRequest, stop_requests
from tokendial.vit import DialViT, wrap

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class InterruptedRunError(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM); a checkpoint has been written."""


@dataclass(slots=True)
class _Position:
    """Where a run stands; with the weights, all that its future depends on."""

    update: int = 0
    best: float = -1.0
    loss_sum: float = 0.0
    hits_sum: float = 0.0
    batches: int = 0


def train(recipe: Recipe, *, quiet: bool = False) -> Run:
    """Train as the recipe says; go on where a killed run of the same recipe stopped.

    Returns:
        The run's folder: recipe.yaml, classes.json, metrics.jsonl, checkpoints/, tensorboard/,
        best/ and last/ (saved models).

    Raises:
        ValueError: If the recipe does not fit the data or the model, or the folder holds another
            run.
        InterruptedRunError: If the process was asked to stop.
    """
    return _Trainer(recipe, quiet=quiet).run_to_end()


def build_model(recipe: Recipe, num_classes: int) -> DialViT:
    """The wrapped model of a recipe, with a fresh head, at the degree to train at."""
    backbone = recipe.model.backbone(num_classes)
    seed_all(recipe.seed)
    model = wrap(backbone.create(), reduce=recipe.reduce, adapt=recipe.adapt, backbone=backbone)
    if recipe.train.degree is not None:
        model.set_degree(recipe.train.degree)
    model.checkpoint_activations = recipe.train.checkpoint_activations
    return model


class _Trainer:
    def __init__(self, recipe: Recipe, *, quiet: bool) -> None:
        settings = recipe.train
        self.recipe, self.settings = recipe, settings
        self.run = Run(recipe.output)
        data: Splits = recipe.data.build(recipe.seed)
        self.task = Classification(
            len(data.classes), multi_label=data.multi_label, augment=recipe.augment
        )
        model = build_model(recipe, len(data.classes))
        # One process may train twice, in another precision; Accelerate remembers the first one.
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision=_PRECISION[settings.precision],
            gradient_accumulation_steps=settings.accumulate,
            log_with="tensorboard",
            project_dir=self.run.folder,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.main = self.accelerator.is_main_process
        self.quiet = quiet or not self.main
        self._loaders(data, model)
        self.updates = self.sampler.updates * settings.epochs
        groups = parameter_groups(model, settings.weight_decay, settings.lr, settings.layer_decay)
        optimizer = torch.optim.AdamW(groups)
        if self.main:
            self.run.claim(recipe, data.classes, multi_label=data.multi_label)
        self.accelerator.wait_for_everyone()
        self.bare = model
        objective = Objective(
            model, self.task, load(settings.teacher) if settings.teacher else None
        )
        self.model, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.scheduler = cosine(optimizer, settings, self.sampler.updates)
        self.ema = Ema(model, settings.ema) if settings.ema else None
        self.at = _Position()
        self.stop = StopRequest()

    def _loaders(self, data: Splits, model: DialViT) -> None:
        recipe, settings, accelerator = self.recipe, self.settings, self.accelerator
        size = model.anatomy.image_size
        statistics = model.anatomy.statistics
        prepared = Prepared(
            data.train, train_transform(recipe.augment, size, *statistics), recipe.seed
        )
        shard = {"rank": accelerator.process_index, "processes": accelerator.num_processes}
        self.sampler = EpochSampler(
            len(prepared),
            batch_size=settings.batch_size,
            accumulate=settings.accumulate,
            seed=recipe.seed,
            **shard,
        )
        self.train_loader = train_loader(prepared, self.sampler, settings.workers)
        self.val_loader: DataLoader[Any] = eval_loader(
            data.val,
            eval_transform(recipe.augment, size, *statistics),
            batch_size=settings.batch_size,
            workers=settings.workers,
            **shard,
        )

    def run_to_end(self) -> Run:
        self._resume()
        with display(self.updates, self.at.update, quiet=self.quiet) as shown:
            if self.at.update == self.updates:
                shown.note(
                    f"{self.run.folder} is finished: nothing to do; best model: {self.run.best}"
                )
                return self.run
            if self.at.update:
                shown.note(f"resuming at update {self.at.update} of {self.updates}")
            self.accelerator.init_trackers("tensorboard")
            with stop_requests() as self.stop:
                for epoch in range(self.at.update // self.sampler.updates, self.settings.epochs):
                    self._train_epoch(epoch, shown)
                    self._finish_epoch(epoch, shown)
            self.accelerator.end_training()
            shown.note(f"best model: {self.run.best}")
        return self.run

    def _train_epoch(self, epoch: int, shown: Display) -> None:
        self.model.train()
        self.sampler.start(epoch, self.at.update - epoch * self.sampler.updates)
        loader = iter(self.train_loader)
        for _ in range(self.sampler.updates - self.sampler.first_update):
            self.scheduler.step_update(self.at.update)
            if self.bare.reducer:
                self.bare.reducer.at_step(self.at.update, self.sampler.updates)
            loss, hits, stop = self._together(*self._update(loader))
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

    def _update(self, loader: Iterator[Any]) -> tuple[float, float]:
        """One optimizer step; returns mean loss and share of hits of this process."""
        losses, hits = 0.0, 0.0
        for part in range(self.settings.accumulate):
            images, targets = (t.to(self.accelerator.device) for t in next(loader))
            # Dropout, stochastic depth and mixup draw from here on; a resumed run draws the same.
            seed_all(self.recipe.seed, self.at.update, part, self.accelerator.process_index)
            images, targets = self.task.mixed(images, targets)
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    loss, logits = self.model(images, targets)
                self.accelerator.backward(loss)
                if self.settings.clip_grad and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(
                        self.bare.trainable_parameters(), self.settings.clip_grad
                    )
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses += loss.item()
            hits += self.task.hits(logits.detach(), targets)
        if self.ema:
            self.ema.update(self.bare)
        return losses / self.settings.accumulate, hits / self.settings.accumulate

    def _together(self, loss: float, hits: float) -> tuple[float, float, bool]:
        """Means over all processes, and whether any of them was asked to stop.

        Every process gets the same answer, so that all of them stop, or fail, at the same update.
        """
        mine = torch.tensor([loss, hits, float(self.stop.asked)], device=self.accelerator.device)
        loss, hits, stop = self.accelerator.reduce(mine, "mean").tolist()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is not finite at update {self.at.update}: lower train.lr "
                f"({self.settings.lr}) or set train.clip_grad."
            )
        return loss, hits, stop > 0

    def _finish_epoch(self, epoch: int, shown: Display) -> None:
        at = self.at
        with self.ema.in_place(self.bare) if self.ema else nullcontext():
            scores = evaluate_loader(self.bare, self.val_loader, self.task, self.accelerator)
            record = {
                "epoch": epoch + 1,
                "update": at.update,
                "train_loss": at.loss_sum / at.batches,
                "train_accuracy": at.hits_sum / at.batches,
            } | {f"val_{name}": value for name, value in scores.items()}
            if self.main:
                if scores["accuracy"] > at.best:
                    self.bare.save_pretrained(self.run.best)
                self.bare.save_pretrained(self.run.last)
                self.run.record(record)
        at.best = max(at.best, scores["accuracy"])
        at.loss_sum, at.hits_sum, at.batches = 0.0, 0.0, 0
        self._checkpoint()
        numbers = {key: value for key, value in record.items() if key != "epoch"}
        self.accelerator.log(numbers, step=at.update)
        shown.note(
            f"epoch {epoch + 1}: train loss {record['train_loss']:.4f}, "
            f"val accuracy {scores['accuracy']:.2%}"
        )

    def _checkpoint(self) -> None:
        if self.main:
            state = {
                "position": asdict(self.at),
                "weights": dict(trained(self.bare)),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.average if self.ema else None,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            }
            save_checkpoint(self.run.checkpoints, self.at.update, state)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        state = newest_checkpoint(self.run.checkpoints)
        if state is None:
            return
        self.at = _Position(**state["position"])
        load_trained(self.bare, state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            average = state["ema"]
            self.ema.average = {n: v.to(self.accelerator.device) for n, v in average.items()}
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])


@torch.no_grad()
def evaluate_loader(
    model: DialViT,
    loader: DataLoader[Any],
    task: Classification,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Metrics of `model` over a loader, at its present degree; of all processes together."""
    device = next(model.parameters()).device
    metrics = task.metrics().to(device)
    model.eval()
    for images, targets in loader:
        with accelerator.autocast() if accelerator else nullcontext():
            logits = model(images.to(device))
        metrics.update(logits.float(), targets.to(device).long())
    return {name: float(value) for name, value in metrics.compute().items()}
