"""How a step is shared: one process, weights replicated (DDP), or weights sharded (FSDP2). All of it is PyTorch's own.

Losses are parts of a sum over the global batch, so gradients are summed over the processes, never averaged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apexflow.backbones import Backbone
from apexflow.backbones.precision import bytes_of
from apexflow.conditioning import Condition
from apexflow.objectives import Batch, Field, Networks
from apexflow.training.config import Recipe
from apexflow.training.distributed import gather


class Engine:
    """One process. `networks` is what an objective calls; a micro-batch's passes happen within `micro_batch`."""

    def __init__(self, networks: Networks) -> None:
        self.networks = networks

    @contextmanager
    def micro_batch(self, batch: Batch, last: bool) -> Iterator[None]:
        """Within, one micro-batch runs forward and backward; `last` says that the gradients are complete afterwards."""
        yield

    def add(self, further: Mapping[str, Field], frozen: Mapping[str, Field]) -> None:
        """Make further networks known, and how they are asked with their weights held."""
        self.networks = replace(self.networks, further=further, frozen={**self.networks.frozen, **frozen})

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
            shell,
            forward_sync_buffers=False,
            init_sync=False,
            find_unused_parameters=partly_used,
            gradient_as_bucket_view=True,  # else they are held twice even with one micro-batch
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

    DONE = 1_000_000

    def __init__(self, networks: Networks) -> None:
        self._raw: list[Field] = []
        self._batch: Batch | None = None
        self._owed: list[Tensor] = []
        student, reference, teacher = map(self._wrap, (networks.student, networks.reference, networks.teacher))
        frozen = {name: self._wrap(field) for name, field in networks.frozen.items()}
        super().__init__(replace(networks, student=student, reference=reference, teacher=teacher, frozen=frozen))

    def add(self, further: Mapping[str, Field], frozen: Mapping[str, Field]) -> None:
        super().add(*({name: self._wrap(field) for name, field in fields.items()} for fields in (further, frozen)))

    def _wrap(self, raw: Field) -> Field:
        index = len(self._raw)
        self._raw.append(raw)

        def answer(x_t: Tensor, t: Tensor, c: Condition, s: Tensor | None = None) -> Tensor:
            self._wait_for(Wanted.of(x_t, c, s).number + Wanted.KINDS * index)
            return raw(x_t, t, c) if s is None else raw(x_t, t, c, s)

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
            index, kind = divmod(agreed, Wanted.KINDS)
            nothing = Wanted.numbered(kind).make(self._raw[index], self._batch)
            if nothing.requires_grad:
                self._owed.append(nothing)


@dataclass(frozen=True)
class Wanted:
    """What decides how the weights of a pass travel: whether it builds a graph, which of its inputs backward goes on to, and
    whether it hears a second time."""

    graph: bool
    point: bool
    condition: bool
    second: bool

    KINDS: ClassVar[int] = 16

    @classmethod
    def of(cls, x_t: Tensor, c: Condition, s: Tensor | None) -> Wanted:
        graph = torch.is_grad_enabled()
        return cls(graph, graph and x_t.requires_grad, graph and c.embeds.requires_grad, s is not None)

    @classmethod
    def numbered(cls, number: int) -> Wanted:
        return cls(*(bool(number >> bit & 1) for bit in range(4)))

    @property
    def number(self) -> int:
        return sum(int(said) << bit for bit, said in enumerate((self.graph, self.point, self.condition, self.second)))

    def make(self, field: Field, batch: Batch) -> Tensor:
        """Such a pass, on the first row of a batch: zero times its answer, summed up."""
        x, c = batch.x[:1].detach(), batch.c[:1]
        t = torch.full((1,), 0.5, device=x.device)
        # All of it, since whoever waits may stand where no graph is built.
        with torch.set_grad_enabled(self.graph):
            x.requires_grad_(self.point)
            asked = (x, t, c if self.condition else c.detach())
            return (field(*asked, t) if self.second else field(*asked)).sum() * 0


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum over the processes the gradients of a role that neither DDP nor FSDP2 looks after.

    A parameter that no process has a gradient of keeps none, as in one process: the optimizer leaves it alone.
    """
    reached = map(any, zip(*gather([p.grad is not None for p in parameters]), strict=True))
    for parameter, anywhere in zip(parameters, reached, strict=True):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def parallel_kind(recipe: Recipe, models: Sequence[Backbone], memory: int | None) -> Literal["ddp", "fsdp"]:
    """ "ddp" or "fsdp" for the first of `models`, and the teacher of its own that follows it, if one does; of shapes alone.

    memory: bytes of a GPU, None for a CPU. On its own it shards when weights, gradients, moments and average of what is
    trained, and teacher and further networks would fill more than half of that.
    """
    if recipe.parallel != "auto":
        return recipe.parallel
    # Layers in eight bits are cast as they run, which sharding does not see; nor are moments in eight bits shared out.
    if recipe.tuning.storage or recipe.optimizer.kind == "adamw8bit" or memory is None:
        return "ddp"
    student, pretrained = (bytes_of(model.transformer) for model in (models[0], models[-1]))
    trained = student + (bytes_of(models[0].text_encoder) if recipe.tuning.text_encoder else 0)
    further = sum(one.kind == "field" for one in recipe.build_objective().further)
    held = student if recipe.tuning.kind == "lora" else 5 * trained + (1 + 4 * further) * pretrained
    return "fsdp" if held > memory / 2 else "ddp"


def memory_of(device: torch.device) -> int | None:
    """Bytes of a GPU; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
