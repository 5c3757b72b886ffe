"""NOAH's search on a run: which subnet of its supernet is best on the validation images."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokendial.adapt.noah import NOAH, NOAHSupernet, PromptModules, Widths
from tokendial.atomic import atomic_write
from tokendial.methods import from_json, to_json
from tokendial.runs.device import default_device
from tokendial.runs.evaluate import evaluate_loader, main_score, validation_set
from tokendial.runs.run import Run
from tokendial.tune.subnet_search import Evolution, SubnetSearch

SCORES_FILE = "noah.json"
"""File in a run's folder that holds the scores of the subnets that were judged."""


@dataclass(frozen=True, slots=True)
class FoundSubnet:
    """The result of a search."""

    subnet: NOAH
    """The best subnet."""
    widths: Widths
    """Its widths in each block."""
    parameters: int
    """Its number of parameters, without the head."""
    metric: str
    """Name of the run's main metric."""
    score: float
    """The metric on the validation set, with the weights of the supernet."""
    judged: int
    """Number of subnets that the search compared."""


def search_subnet(
    run: Run,
    max_parameters: int,
    *,
    evolution: Evolution | None = None,
    out: Path | None = None,
    batch_size: int = 64,
    device: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> FoundSubnet:
    """Search the best subnet of a run's supernet, and write the recipe that trains it anew.

    Each subnet is evaluated on the run's validation set, with the weights of the supernet. The
    scores are kept in the run's folder: a search that was interrupted continues, and a search with
    other settings uses them, too.

    Args:
        run: A run of `NOAHSupernet`.
        max_parameters: Largest number of parameters of a subnet, without the head.
        evolution: Settings of the search; None: the defaults.
        out: File for the recipe; None: subnet.yaml in the folder of the run.
        batch_size: Images per forward pass.
        device: Device to compute on. None means the accelerator if there is one, else the CPU.
        note: Called with a line of text when a round is over.

    Returns:
        The best subnet.

    Raises:
        ValueError: If the run has no supernet, or no subnet is small enough.
    """
    model = run.model().to(device or default_device()).eval()
    modules, supernet = model.adapter, model.adapt_config
    if not isinstance(modules, PromptModules) or not isinstance(supernet, NOAHSupernet):
        raise ValueError(f"{run.folder} is no run of a supernet: its adapt is not noah_supernet.")
    task, loader = validation_set(run, model, batch_size)
    known = _Scores(run)

    def judge(subnet: NOAH) -> float:
        if subnet not in known.scores:
            modules.use(subnet)
            known.add(subnet, evaluate_loader(model, loader, task))
        return known.scores[subnet]

    def after_round(number: int) -> None:
        (best,) = search.best(1)
        note(f"round {number}: {len(search.scores)} subnets, best {search.scores[best]:.2%}")

    search = SubnetSearch(
        supernet=supernet,
        depth=model.anatomy.shape.depth,
        num_parameters=modules.num_parameters,
        judge=judge,
        max_parameters=max_parameters,
        evolution=evolution or Evolution(),
        after_round=after_round,
    )
    best = search.run()
    changed: dict[str, Any] = {"adapt": best, "output": str(run.folder / "subnet")}
    with atomic_write(out or run.folder / "subnet.yaml") as path:
        path.write_text(run.recipe().model_copy(update=changed).to_yaml())
    return FoundSubnet(
        subnet=best,
        widths=best.widths(search.depth),
        parameters=modules.num_parameters(best),
        metric=known.metric,
        score=search.scores[best],
        judged=len(search.scores),
    )


class _Scores:
    """Scores of the subnets of a run's model, in a file that grows with each of them."""

    def __init__(self, run: Run) -> None:
        self.path, self.revision = run.folder / SCORES_FILE, run.revision()
        self.metric = ""
        self.scores: dict[NOAH, float] = {}
        if self.path.exists():
            try:
                found = json.loads(self.path.read_text())
                if found["revision"] == self.revision:  # else the model was trained on since
                    self.metric = found["metric"]
                    self.scores = {from_json("adapt", s): score for s, score in found["scores"]}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path} is damaged: {error}.") from None

    def add(self, subnet: NOAH, measured: dict[str, float]) -> None:
        """Add the main one of the metrics of a subnet, and write the file."""
        self.metric, self.scores[subnet] = next(iter(measured)), main_score(measured)
        scores = [[to_json("adapt", each), value] for each, value in self.scores.items()]
        content = {"revision": self.revision, "metric": self.metric, "scores": scores}
        with atomic_write(self.path) as path:
            path.write_text(json.dumps(content) + "\n")
