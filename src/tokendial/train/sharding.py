"""Weights that are spread over the processes (FSDP), put together where they are needed whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """Accelerate's settings of FSDP; None if its launcher was not asked for it.

    The whole objective is one unit: `DialViT` takes the blocks apart, so that their own forward
    passes, which FSDP would wait for, never run. Each process starts with all weights.

    Raises:
        ValueError: If it was asked for something else than that.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    asked = FullyShardedDataParallelPlugin()
    if asked.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version must be 2, got {asked.fsdp_version}: accelerate launch --use_fsdp "
            "--fsdp_version 2."
        )
    if asked.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing must be false, got true: use "
            "train.checkpoint_activations=true."
        )
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
    )


def use_fsdp(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Settle what Accelerate leaves open, before anything is prepared."""
    state = accelerator.state
    # On CPUs it would take no notice of the plugin and copy the model to each process.
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    # Autocast rounds where it has to, as it does without FSDP; weights are gathered as they are.
    plugin.mixed_precision_policy = None


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Run a block in which every process holds all weights, to be read; all have to enter.

    Parameters change places with whole copies. FSDP's own `unshard` would be undone by the first
    `state_dict()` of a part of the model.
    """
    parts: list[tuple[nn.Module, str, DTensor]] = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    for module, name, part in parts:
        copy = nn.Parameter(part.full_tensor().detach(), requires_grad=part.requires_grad)
        setattr(module, name, copy)
    try:
        yield
    finally:
        for module, name, part in parts:
            setattr(module, name, part)


def whole(state: Any) -> Any:
    """A nested state with its spread tensors put together on the CPU; all processes have to call.

    What is not spread stays as it is.
    """
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    return state


def spread(value: Tensor, like: Tensor) -> Tensor:
    """The value in the place, and in the parts, of another tensor of its shape."""
    value = value.to(like.device)
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    # Without a source, no process waits for another: each one has the whole value.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def spread_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer, its moments spread like the parameters that they belong to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return state | {
        "state": {
            number: {
                name: spread(value, parameters[number]) if value.ndim else value
                for name, value in moments.items()
            }
            for number, moments in state["state"].items()
        }
    }
