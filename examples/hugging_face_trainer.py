"""Fine-tune with the Trainer of transformers (pip install 'tokendial[transformers]').

The Trainer needs a model that takes a batch by keyword and returns its loss. A module of a few
lines around the wrapped model does that. LoRA is trained, and ToMe merges tokens. The program
prints the evaluation loss and accuracy before and after training.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from transformers import EvalPrediction, Trainer, TrainingArguments

import tokendial as td
from tokendial.data import Scenes


class ForTrainer(nn.Module):
    """Takes pixel_values and labels, and returns loss and logits, as models of transformers do."""

    def __init__(self, model: td.DialViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss of a batch, and its logits."""
        logits = self.model(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Counting(Dataset[dict[str, Any]]):
    """Scenes, and how many sneakers are on each."""

    def __init__(self, scenes: Any, model: td.DialViT, size: int) -> None:
        self.scenes, self.size = scenes, size
        config = model.pretrained_cfg
        self.prepare = v2.Compose(
            [
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(config["mean"], config["std"]),
            ]
        )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.scenes[index]
        return {"pixel_values": self.prepare(image), "labels": int(label)}


def accuracy(outputs: EvalPrediction) -> dict[str, float]:
    """Share of right answers."""
    found = torch.as_tensor(outputs.predictions).argmax(dim=-1)
    return {"accuracy": float((found == torch.as_tensor(outputs.label_ids)).float().mean())}


def main() -> None:
    """Train for a few steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="updates")
    parser.add_argument("--out", type=Path, default=Path("example_trainer"), help="checkpoints")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    backbone = td.Backbone(name="scenes_vit", weights="shipped", args={"num_classes": 5})
    model = td.wrap(
        backbone.create(), reduce=td.ToMe(r=2), adapt=td.LoRA(rank=8), backbone=backbone
    )
    splits = Scenes(task="count", train_size=320, val_size=100).build(seed=0)
    trainer = Trainer(
        model=ForTrainer(model),
        args=TrainingArguments(
            output_dir=str(arguments.out),
            max_steps=arguments.steps,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=50,
            learning_rate=0.005,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Counting(splits.train, model, 320),
        eval_dataset=Counting(splits.val, model, 100),
        compute_metrics=accuracy,
    )
    for when in ("before", "after"):
        if when == "after":
            trainer.train()
        found = trainer.evaluate()
        print(f"{when}: loss {found['eval_loss']:.3f}, accuracy {found['eval_accuracy']:.1%}")
    model.save_pretrained(arguments.out / "model")  # the adapters and the head, for td.load


if __name__ == "__main__":
    main()
