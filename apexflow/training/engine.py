"""How a step is shared: one process, weights replicated (DDP), or weights sharded (FSDP2). All of it is PyTorch's own.

Losses are parts of a sum over the global batch, so gradients are summed over the processes, never averaged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from apexflow.backbones import second_time
from apexflow.conditioning import Condition
from apexflow.errors import UserError
from apexflow.objectives import Batch, Field, Networks
from apexflow.training.config import Recipe
from apexflow.training.distributed import gather, world


class Engine:
    """One process. `networks` is what an objective calls; a micro-batch's passes happen within `micro_batch`."""

    def __init__(self, networks: Networks) -> None:
        self.networks = networks

    @contextmanager
    def micro_batch(self, batch: Batch, last: bool) -> Iterator[None]:
        """Within, one micro-batch runs forward and backward; `last` says that the gradients are complete afterwards."""
        yield

    def owed(self) -> Tensor | float:
        """To be added to the loss: what keeps this process in step with the others, zero in value and gradient."""
        return 0.0


class Replicated(Engine):
    """DDP around the trained modules: gradients are summed while the last micro-batch runs backward."""

    def __init__(self, networks: Networks, modules: Sequence[nn.Module], partly_used: bool) -> None:
        # 1 x 1 kernels have gradients of another stride than DDP expects; it copies them, and warns.
        warnings.filterwarnings("ignore", message="Grad strides do not match")
        # Without init_sync: frozen weights came from the same files, and what is trained is sent here.
        for module in modules:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    dist.broadcast(parameter.data, 0)
        shell = _Shell(modules, networks.student)
        self._ddp = DistributedDataParallel(
            shell, forward_sync_buffers=False, init_sync=False, find_unused_parameters=partly_used
        )
        self._ddp.register_comm_hook(None, lambda _, bucket: _sum(bucket))
        self._plain = networks.student
        super().__init__(replace(networks, student=self._student))

    def _student(self, x_t: Tensor, t: Tensor, c: Condition, s: Tensor | None = None) -> Tensor:
        return self._ddp(x_t, t, c, s) if torch.is_grad_enabled() else self._plain(x_t, t, c, s)

    @contextmanager
    def micro_batch(self, batch: Batch, last: bool) -> Iterator[None]:
        with nullcontext() if last else self._ddp.no_sync():
            yield


class _Shell(nn.Module):
    """What DDP wraps: the trained modules, and the field that is made of them."""

    def __init__(self, modules: Sequence[nn.Module], field: Field) -> None:
        super().__init__()
        self.trained, self._field = nn.ModuleList(modules), field

    def forward(self, x_t: Tensor, t: Tensor, c: Condition, s: Tensor | None = None) -> Tensor:
        return self._field(x_t, t, c, s)


def _sum(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


class Sharded(Engine):
    """FSDP2, with the processes kept in lockstep.

    A forward pass of a sharded network is a collective, so all must make the same passes in the same order, but which
    passes an objective makes depends on the rows: the endpoint pass of APEX happens only where a row is chosen. So before
    each pass the processes say which one they want. The first in the table wins; whoever wants another one makes the winning
    pass on a row of its own first, and adds zero times the answer to its loss.
    """

    DONE = 1_000

    def __init__(self, networks: Networks) -> None:
        self._raw = [networks.student, networks.reference, networks.teacher]
        self._batch: Batch | None = None
        self._owed: list[Tensor] = []
        student, reference, teacher = (self._wrap(index) for index in range(3))
        frozen = {"student": _refuse_held, "reference": reference, "teacher": teacher}
        super().__init__(replace(networks, student=student, reference=reference, teacher=teacher, frozen=frozen))

    def _wrap(self, index: int) -> Field:
        def answer(x_t: Tensor, t: Tensor, c: Condition, s: Tensor | None = None) -> Tensor:
            self._wait_for(2 * index + torch.is_grad_enabled())
            return self._raw[index](x_t, t, c, s)

        return answer

    @contextmanager
    def micro_batch(self, batch: Batch, last: bool) -> Iterator[None]:
        self._batch, self._owed = batch, []
        yield

    def owed(self) -> Tensor | float:
        self._wait_for(self.DONE)
        return sum(self._owed)

    def _wait_for(self, wanted: int) -> None:
        """Make the passes that others want until all want `wanted`, or this process comes first."""
        while (agreed := min(gather(wanted))) != wanted:
            assert self._batch is not None
            one = slice(0, 1)
            x, c = self._batch.x[one], self._batch.c[one]
            t = torch.full((1,), 0.5, device=x.device)
            # All of it, since whoever waits may stand where no graph is built.
            with torch.set_grad_enabled(bool(agreed % 2)):
                F = self._raw[agreed // 2](x, t, c)
                if F.requires_grad:
                    self._owed.append(F.sum() * 0)


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum over the processes the gradients of a role that neither DDP nor FSDP2 looks after."""
    if not any(gather(any(p.grad is not None for p in parameters))):
        return  # it was nobody's turn
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def _refuse_held(*asked: Any) -> Tensor:
    raise UserError("this method holds the student's weights still in a pass, which sharding cannot: set parallel=ddp")


def shard(module: nn.Module, device: torch.device, half: bool) -> None:
    """Shard a denoiser over all processes in place, block by block; it moves to `device`.

    Nothing stays whole after a forward pass, the root neither: a root kept whole would not see the optimizer's step. With
    `half`, float32 weights travel in bfloat16; inputs are not cast, since times must keep their float32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,
    )
    options: Any = {
        "mesh": init_device_mesh(device.type, (world(),)),
        "reshard_after_forward": True,
        "mp_policy": policy,
    }
    for blocks in module.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                fully_shard(block, **options)
    fully_shard(module, **options)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def whole(tensor: Tensor) -> Tensor:
    """A tensor's full value; for a sharded one a collective, after which it lies on the CPU."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def unsharded(module: nn.Module) -> nn.Module:
    """A copy of a sharded network with whole weights on the CPU (a collective), or the module itself if it is whole."""
    if not isinstance(module, FSDPModule):
        return module
    tensors = {name: whole(tensor) for name, tensor in module.state_dict().items()}
    plain = original_class(module).from_config(module.config)
    if second_time.second_time_of(module) is not None:
        second_time.attach(plain)
    plain.load_state_dict(tensors)
    return plain.eval().requires_grad_(False)


def original_class(module: nn.Module) -> Any:
    """A network's class of diffusers, which sharding hides behind one of its own."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def parallel_kind(recipe: Recipe, transformer: nn.Module, device: torch.device) -> str:
    """ "alone", "ddp" or "fsdp". On its own it shards when weights, gradients, moments, average and teacher would fill more
    than half of a GPU. UserError for sharding together with a trained text encoder."""
    if world() == 1:
        return "alone"
    if recipe.tuning.text_encoder and recipe.parallel == "fsdp":
        raise UserError("tuning.text_encoder is trained with whole weights: set parallel=ddp")
    if recipe.parallel != "auto":
        return recipe.parallel
    # Layers in eight bits are cast as they run, which sharding does not see; nor are moments in eight bits shared out.
    if recipe.tuning.storage or recipe.optimizer.kind == "adamw8bit":
        return "ddp"
    if device.type != "cuda" or recipe.tuning.text_encoder:
        return "ddp"
    weights = sum(p.numel() * p.element_size() for p in transformer.parameters())
    copies = 1 if recipe.tuning.kind == "lora" else 6
    return "fsdp" if copies * weights > torch.cuda.get_device_properties(device).total_memory / 2 else "ddp"
