"""Models that PyTorch spreads over processes: what the verbs have to know of `torch.distributed.fsdp.fully_shard`.

Between steps the parameters of a sharded model are DTensors, of which every process holds a part; for a module's
forward and backward they are plain tensors. Nothing of PyTorch's is imported here before a program imports it itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The plain tensor: of a DTensor all of it, gathered, which every process of its mesh has to ask for."""
    if not is_sharded(tensor):
        return tensor
    full: Tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    return full


def model_class(module: nn.Module) -> type[nn.Module]:
    """A module's class; of one that `fully_shard` was called on, the class that it had before."""
    cls = type(module)
    return cls.__bases__[1] if _is_unit(module) else cls


def settle(model: nn.Module) -> None:
    """Let every module hold its sharded parameters, not the plain ones that a forward may have left in their places."""
    if "torch.distributed.fsdp" in sys.modules:
        for module in model.modules():
            if _is_unit(module):
                module.reshard()  # type: ignore[operator]


def _is_unit(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def check_whole(model: nn.Module, verb: str) -> None:
    """Raises RuntimeError, naming a parameter, if the model is sharded, for verbs that put modules or parameters in."""
    settle(model)
    check_not_flattened(model)
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise RuntimeError(
                f"cannot {verb} a sharded model: {name} is a DTensor, and fully_shard keeps to the parameters that it "
                "was given; do it before, or on a whole model that loads what save_adapter wrote"
            )


def check_not_flattened(model: nn.Module) -> None:
    """Raises RuntimeError, naming a parameter, for a model in FullyShardedDataParallel, the older way of sharding.

    Its parameters are pieces of one long vector, without the shapes that they had.
    """
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_fsdp_flattened", False):
            raise RuntimeError(f"{name} is flattened by FullyShardedDataParallel; fully_shard (FSDP2) is supported")


def mesh_of(tensors: Iterable[Tensor]) -> Any:
    """The device mesh of the first DTensor; None if there is none."""
    return next((tensor.device_mesh for tensor in tensors if is_sharded(tensor)), None)  # type: ignore[attr-defined]


def on_first_rank(mesh: Any, action: Callable[[], None]) -> None:
    """Call ``action`` on the first process of a mesh; all return when it has.

    Raises:
        Exception: on the first process what the action raised, on all others a RuntimeError that says so.
    """
    from torch.distributed.tensor import DTensor, Partial

    error: Exception | None = None
    if not any(mesh.get_coordinate()):
        try:
            action()
        except Exception as caught:
            error = caught
    own = torch.tensor(int(error is not None), device=mesh.device_type)
    failed = DTensor.from_local(own, mesh, [Partial()] * mesh.ndim).full_tensor()  # a sum, which waits for everybody
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("the process that writes for all has failed; its own error says why")
