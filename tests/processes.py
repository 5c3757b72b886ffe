"""Start processes as a shell or `accelerate launch` does, but faster.

They are forked from one process that has already imported all packages, which takes seconds.
"""

import json
import multiprocessing
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from tokendial.cli import app, main
from tokendial.data.transforms.image import Augment
from tokendial.data.transforms.masks import MaskAugment
from tokendial.runs import Recipe, Run
from tokendial.runs.loaders import eval_loader
from tokendial.tasks import BinaryMasks, Classification, Segmentation
from tokendial.train.fine_tuning import FineTuning
from tokendial.train.loop import Trainer

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
_TIMEOUT_S = 240
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["tokendial.cli", "tokendial.train", "torch.utils.tensorboard", "py_sod_metrics"]
)


def together(
    count: int,
    function: Callable[..., None],
    *arguments: Any,
    environment: dict[str, str] | None = None,
) -> None:
    """Call a function of this module in `count` processes; an AssertionError if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "ACCELERATE_USE_CPU": "true"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | (environment or {})
    processes = [
        _context.Process(
            target=_run, args=(variables | {"RANK": rank, "LOCAL_RANK": rank}, function, arguments)
        )
        for rank in range(count)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(_TIMEOUT_S)
        codes = [process.exitcode for process in processes]
        assert codes == [0] * count, codes
    finally:
        for process in processes:
            process.kill()


def _run(
    environment: dict[str, Any], function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    function(*arguments)


def start(folder: Path, *arguments: object) -> BaseProcess:
    """Start the command line as leader of a process group; its folder gets `stdout`, `stderr`."""
    process = _context.Process(target=_lead, args=(folder, list(map(str, arguments))))
    process.start()
    return process


def _lead(folder: Path, arguments: list[str]) -> None:
    os.setsid()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for number, name in ((1, "stdout"), (2, "stderr")):
        with (folder / name).open("w") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["tokendial", *arguments]
    main()


def start_to_hold(run: Run) -> BaseProcess:
    """Start a process that locks a run, and holds the lock until it is killed."""
    process = _context.Process(target=_hold, args=(run.folder,))
    process.start()
    wait_until(lambda: run.lock_file.exists() and run.lock_file.read_text(), process)
    return process


def _hold(folder: Path) -> None:
    run = Run(folder)
    with run.locked() as lock:
        run.write_owner(lock)
        time.sleep(_TIMEOUT_S)


def wait_until(
    happened: Callable[[], object], process: BaseProcess, seconds: float = 120.0
) -> None:
    """Wait until `happened()`; raise an error if the process ends first or the time is over."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def model_processes(pid: int) -> list[psutil.Process]:
    """Processes of a server that hold models: the fork servers, then the model processes."""
    found = [each for each in psutil.Process(pid).children(recursive=True) if _serves(each)]
    return sorted(found, key=lambda each: each.ppid() != pid)


def _serves(process: psutil.Process) -> bool:
    with suppress(psutil.Error, ProcessLookupError):  # it has ended
        return "tokendial.serve.workers.worker" in process.cmdline()
    return False


def ended(process: BaseProcess) -> int | None:
    """The exit code of a process, which ends within two minutes."""
    process.join(120)
    return process.exitcode


def command(out: Path, *arguments: str) -> None:
    """Run the command line, and write its output to `out/RANK.txt`."""
    sys.argv = ["tokendial", *arguments]
    with (out / f"{os.environ['RANK']}.txt").open("w") as file:
        sys.stdout = file
        main()


def command_in(most_bytes: float, *arguments: str) -> None:
    """Run the command line with at most `most_bytes` of memory."""
    app(list(arguments), standalone_mode=False)
    # Not ru_maxrss: that begins with the memory of the process which started this one.
    peak_kb = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    assert int(peak_kb) * 1024 < most_bytes, peak_kb


def train_spread(recipe: Recipe, last: int | None) -> None:
    """Train with sharded weights, check that they are sharded, and exit before update `last`."""

    class Watched(FineTuning):
        def before_update(self, update: int, updates_per_epoch: int) -> None:
            assert all(isinstance(p, DTensor) for p in self.objective.parameters())
            if update == last:
                os._exit(0)
            super().before_update(update, updates_per_epoch)

    Trainer(recipe, Watched(recipe), quiet=True).run_to_end()


def evaluate_every_task(out: Path, sizes: list[int]) -> None:
    """Write the metrics of all tasks, on sets of these sizes, to `out/RANK of COUNT.json`."""
    accelerator = Accelerator()
    rank, processes = accelerator.process_index, accelerator.num_processes
    found = [_metrics(size, rank, processes) for size in sizes]
    (out / f"{rank} of {processes}.json").write_text(json.dumps(found))


def _metrics(size: int, rank: int, processes: int) -> dict[str, float]:
    draw = torch.Generator().manual_seed(0)
    logits, maps = torch.randn(size, 7, generator=draw), torch.randn(size, 3, 4, 4, generator=draw)
    labels = torch.randint(0, 2, (size, 7), generator=draw)
    labels[0] = 1  # each one occurs
    masks = [torch.randint(0, 2, (4 + i % 3, 5), generator=draw) for i in range(size)]
    found = {}
    # auroc needs images of two classes.
    names = ["f1", "balanced_accuracy", *["auroc"] * (size > 1)]
    chosen = Classification(7, multi_label=False, augment=Augment(), metrics=names)
    for task, seen, targets in (
        (Classification(7, multi_label=False, augment=Augment()), logits, labels.argmin(1)),
        (chosen, logits, labels.argmin(1)),
        (Classification(7, multi_label=True, augment=Augment()), logits, labels),
        (BinaryMasks(MaskAugment()), maps[:, :1], masks),
        (Segmentation(3, MaskAugment()), maps, masks),
    ):
        metrics = task.metrics()
        samples = list(zip(seen, targets, strict=True))
        for batch in eval_loader(samples, _as_it_is, batch_size=2, rank=rank, processes=processes):
            metrics.update(*batch)
        found |= {name: float(value) for name, value in metrics.compute().items()}
    return found


def _as_it_is(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return image, target
