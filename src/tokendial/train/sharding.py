"""FSDP: parameters that are sharded over processes, and put together to be read or saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """Accelerate's FSDP settings; None if the launcher was not asked for FSDP.

    The whole objective is one FSDP unit. FSDP gathers a unit's parameters when the forward of that
    module is called, but `DialViT` takes blocks apart and never calls their own forward. Each
    process starts with all weights.

    Raises:
        ValueError: If the launcher was asked for settings that do not work here.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    requested = FullyShardedDataParallelPlugin()
    if requested.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version must be 2, got {requested.fsdp_version}: accelerate launch --use_fsdp "
            "--fsdp_version 2."
        )
    if requested.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing must be false, got true: use "
            "train.checkpoint_activations=true."
        )
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
    )


def use_fsdp(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Correct what Accelerate sets up for FSDP. Call it before `Accelerator.prepare`."""
    state = accelerator.state
    # On CPUs Accelerate ignores the plugin and would copy the model to each process.
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    # Autocast chooses the precision of each operation, as without FSDP: weights are gathered in
    # the precision that they have.
    plugin.mixed_precision_policy = None


@contextmanager
def gathered_parameters(model: nn.Module) -> Iterator[None]:
    """Give every process all parameters, to be read, while the block runs.

    All processes have to enter. Sharded parameters are replaced by whole copies, and put back
    after the block. FSDP's own `unshard` would end at the first `state_dict()` of a submodule.
    """
    sharded: list[tuple[nn.Module, str, DTensor]] = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    for module, name, shard in sharded:
        copy = nn.Parameter(shard.full_tensor().detach(), requires_grad=shard.requires_grad)
        setattr(module, name, copy)
    try:
        yield
    finally:
        for module, name, shard in sharded:
            setattr(module, name, shard)


def unshard(state: Any) -> Any:
    """A nested state whose sharded tensors are put together on the CPU.

    All processes have to call it. Tensors that are not sharded stay as they are.
    """
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, dict):
        return {name: unshard(value) for name, value in state.items()}
    return state


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A value on the device of another tensor of its shape, and sharded as that one is."""
    value = value.to(like.device)
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    # Each process has the whole value, so no source rank has to send it.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def shard_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The state of an optimizer with its moments sharded as the parameters they belong to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return state | {
        "state": {
            index: {
                name: shard_like(value, parameters[index]) if value.ndim else value
                for name, value in moments.items()
            }
            for index, moments in state["state"].items()
        }
    }
