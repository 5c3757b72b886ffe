"""The model of a run with a compensator."""

from pathlib import Path

import torch

from tokendial.compensate import Compensator
from tokendial.model.dial_vit import DialViT
from tokendial.runs.run import Run


def load_compensated(
    run: Run, compensator: str | Path | None, device: str | torch.device = "cpu"
) -> DialViT:
    """Load the best model of a run, with a compensator attached where one is given.

    Args:
        run: The run. If it was trained without reduction, the model gets the compensator's.
        compensator: Folder of a compensator, or its name on the hub. None: without.
        device: Device to load both to.

    Returns:
        The model, at the degree that the run was trained at.

    Raises:
        ValueError: If the run has no model, or the compensator does not fit it.
    """
    if compensator is None:
        return run.model().to(device)
    plugin = Compensator.from_pretrained(compensator).to(device)
    unreduced = run.recipe().reduce is None
    model = run.model(plugin.reduce_config if unreduced else None).to(device)
    if unreduced:
        model.set_degree(0)
    plugin.attach(model, model.degree)
    return model
