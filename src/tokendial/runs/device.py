"""The device that models of runs compute on, unless the caller names another one."""

import torch


def default_device() -> str:
    """Name of this machine's accelerator, such as "cuda"; "cpu" if it has none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"
