"""How weights follow gradients: AdamW, its learning rate from step to step, and the gradient's norm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from slurmkit.config.model import Optimizer, SchedulerPart


def make_optimizer(parameters: Iterable[torch.nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    """The optimiser of those parameters that train."""
    kwargs = settings.kwargs
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    meshes = by_mesh(trained)
    return torch.optim.AdamW(
        # One call of a kernel for many parameters asks that they lie on one mesh.
        [{"params": group} for group in meshes.values()],
        lr=kwargs.lr,
        betas=kwargs.betas,
        eps=kwargs.eps,
        weight_decay=kwargs.weight_decay,
        fused=True,  # one pass over the memory, on the CPU as well
    )


def by_mesh(parameters: Iterable[torch.nn.Parameter]) -> dict[Any, list[torch.nn.Parameter]]:
    """Parameters in groups that lie on one device mesh, in order."""
    groups: dict[Any, list[torch.nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return groups


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float | None) -> float:
    """Scale gradients down to `max_norm`, if there is one; the Euclidean norm they had, over all ranks. Collective."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norms = []
    for group in by_mesh(trained).values():
        norm = get_total_norm([parameter.grad for parameter in group if parameter.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    # Ranks may have added up in different orders; what they hold copies of must not drift apart.
    distributed.broadcast(total, src=0)
    if max_norm is not None:
        for group in by_mesh(trained).values():
            clip_grads_with_norm_(group, max_norm, total)
    return float(total)


class LearningRate:
    """What policy.scheduler makes of policy.optimizer.kwargs.lr.

    It follows from the training step alone, so that a run that goes on needs no saved position.
    """

    def __init__(self, base: float, parts: Sequence[SchedulerPart] | None) -> None:
        self._base = base
        self._parts = parts or ()
        self._restart()

    def _restart(self) -> None:
        self._step = 1
        # The schedule is torch's own, on an optimiser that has nothing to do.
        self._optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self._base)
        schedulers = [
            getattr(torch.optim.lr_scheduler, part.name.rpartition(".")[2])(self._optimizer, **part.kwargs)
            for part in self._parts
            if part.name is not None
        ]
        milestones = [milestone for part in self._parts for milestone in part.milestones or ()]
        self._scheduler: Any = None
        if len(schedulers) > 1:
            self._scheduler = torch.optim.lr_scheduler.SequentialLR(self._optimizer, schedulers, milestones)
        elif schedulers:
            self._scheduler = schedulers[0]

    def at(self, step: int) -> float:
        """The learning rate of a training step; steps count from 1."""
        if self._scheduler is None:
            return self._base
        if step < self._step:
            self._restart()
        while self._step < step:
            self._optimizer.step()
            self._scheduler.step()
            self._step += 1
        return float(self._optimizer.param_groups[0]["lr"])
