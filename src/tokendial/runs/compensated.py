"""Models of runs with a compensator."""

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
    model = load_to_compensate(run, plugin).to(device)
    plugin.attach(model, model.degree)
    return model


def load_to_compensate(run: Run, compensator: Compensator) -> DialViT:
    """Load the best model of a run, ready for a compensator to be attached.

    A run that was trained without reduction gets the compensator's reduction method, and degree 0.

    Returns:
        The model, at the degree that the compensator leads from: the one that it was trained at.

    Raises:
        ValueError: If the run has no model.
    """
    if run.recipe().reduce is not None:
        return run.model()
    model = run.model(compensator.reduce_config)
    model.set_degree(0)
    return model
