"""Time and peak memory of a training step, method by method.

All methods are in memory and take turns. The memory of a method is its peak while its model and the
state of its optimizer are made and two steps run; that of the other methods is not counted.
"""

import argparse
from typing import Any

import timm
import torch

import tokendial as td
from benchmarks.alternating import Runner, alternate, page_faults, ratio, seconds
from benchmarks.memory import peak_of
from benchmarks.options import DTYPES, add_model, comma_separated, options, parse_options
from benchmarks.plots import bar_figure
from benchmarks.report import Column, Report, Row
from tokendial.attention import AttentionKernel
from tokendial.data.transforms.image import Augment
from tokendial.tasks.classification import Classification
from tokendial.train.objective import Objective

DENSE, PLAIN = td.DenseAdapter(dim=32), td.AdaptFormer(dim=64, scale=0.1)
METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapt": td.FullFineTuning()},
    "full_recomputing": {"adapt": td.FullFineTuning()},
    "linear": {"adapt": td.LinearProbe()},
    "adaptformer": {"adapt": PLAIN},
    "adaptformer_fused": {"adapt": PLAIN},
    "lora": {"adapt": td.LoRA(rank=8)},
    "dyt": {"adapt": PLAIN, "reduce": td.DyT()},
    "sparse_tuning_evit": {"adapt": DENSE, "reduce": td.EViT()},
    "sparse_tuning_tome": {"adapt": DENSE, "reduce": td.ToMe(r=16)},
    "sparse_tuning_dynamicvit": {"adapt": DENSE, "reduce": td.DynamicViT()},
}
COLUMNS = (
    Column("method", "method"),
    Column("trained_m", "trained (M)", "{:.2f}"),
    Column("step_s", "s / step", "{:.3f}"),
    Column("time", "of full", "{:.2f} ({low:.2f} to {high:.2f})"),
    Column("memory_mib", "MiB", "{:.1f}"),
    Column("memory", "of full", "{:.2f}"),
    Column("page_faults", "page faults", "{:.0f}"),
)


class Training:
    """A model with objective, optimizer and a batch, ready to train."""

    def __init__(self, method: str, asked: argparse.Namespace) -> None:
        size = {"img_size": asked.img_size} if asked.img_size else {}
        vit = timm.create_model(asked.model, num_classes=100, **size)
        self.model = td.wrap(vit, **METHODS[method])
        self.model.checkpoint_activations = "recomputing" in method
        task = Classification(100, multi_label=False, augment=Augment())
        self.objective = Objective(self.model, task).to(asked.device).train()
        self.device, self.dtype = torch.device(asked.device), DTYPES[asked.dtype]
        if "fused" in method:
            self.model.attention_kernel = AttentionKernel(fused=True)
        self.optimizer = torch.optim.AdamW(self.model.trainable_parameters(), lr=1e-4)
        height, width = self.model.anatomy.image_size
        self.images = torch.randn(asked.batch, 3, height, width, device=asked.device)
        self.targets = torch.randint(0, 100, (asked.batch,), device=asked.device)

    def step(self) -> None:
        """Do one update."""
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=mixed):
            loss, _ = self.objective(self.images, self.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main(arguments: list[str]) -> None:
    """Measure and write the results."""
    parser = options("training", __doc__, repeats=3)
    add_model(parser)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="autocast of the forward pass"
    )
    parser.add_argument("--methods", type=comma_separated(str), default=list(METHODS))
    asked = parse_options(parser, arguments, batch=2)
    if wrong := [name for name in asked.methods if name not in METHODS]:
        raise ValueError(f"methods must be some of {', '.join(METHODS)}, got {wrong[0]}.")
    rows = measure(list(dict.fromkeys(["full", *asked.methods])), asked)
    figure = bar_figure(rows, "method", {"time": "time of full", "memory": "memory of full"})
    Report(f"training_{asked.model}", COLUMNS, rows, figure).write(asked)


def measure(methods: list[str], asked: argparse.Namespace) -> list[Row]:
    """One row per method, compared with the first method."""
    trainings: dict[str, Training] = {}
    mib = {}

    def begin(method: str) -> None:
        trainings[method] = Training(method, asked)
        for _ in range(2):  # the first step creates the state of the optimizer
            trainings[method].step()

    for method in methods:
        mib[method] = peak_of(lambda name=method: begin(name), asked.device).whole / 2**20
    runners = {name: Runner(training.step) for name, training in trainings.items()}
    turns = alternate(runners, repeats=asked.repeats, device=asked.device, warm_up=1)
    base = methods[0]
    return [
        {
            "method": name,
            "trained_m": trainings[name].model.cost().trainable_params / 1e6,
            "step_s": seconds(turns[name]),
            **ratio(turns[name], turns[base]).as_row("time"),
            "memory_mib": mib[name],
            "memory": mib[name] / mib[base],
            "page_faults": page_faults(turns[name]),
            "seconds": [turn.seconds for turn in turns[name]],
        }
        for name in methods
    ]
