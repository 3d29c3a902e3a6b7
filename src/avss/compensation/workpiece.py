"""The smaller model while it is being repaired: gets new tensors of its own, remembers which, and can go back."""

import dataclasses

import torch
from torch import Tensor, nn

from avss.models.load import Loaded, assemble
from avss.models.projections import Projections, bias_of, matrix_of, set_linear
from avss.record import Plan

_CLOSED = 1e-3
"""Share of the largest gain of a block below which a channel counts as closed."""


@dataclasses.dataclass
class Workpiece:
    """A cut under repair.

    Its modules are its own, its tensors are those of the model it was cut from until a repair gives it new ones:
    nothing is ever written in place, so the original and other cuts of it stay what they were.

    Attributes:
        original: The dense model.
        plan: The blocks removed.
        smaller: The model under repair.
        facts: Where its blocks write; None where nothing is known.
        changed: State-dict names of the weights that were replaced, in order.
    """

    original: Loaded
    plan: Plan
    smaller: Loaded
    facts: Projections | None
    changed: dict[str, None] = dataclasses.field(default_factory=dict)

    @classmethod
    def begin(cls, original: Loaded, smaller: Loaded, plan: Plan, facts: Projections | None) -> "Workpiece":
        """A model with modules of its own over the same tensors."""
        model = assemble(type(smaller.model), smaller.model.config, smaller.model.state_dict())
        if getattr(smaller.model, "generation_config", None) is not None:
            model.generation_config = smaller.model.generation_config
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return cls(original, plan, dataclasses.replace(smaller, model=model), facts)

    def place(self, block: int) -> int:
        """Where a kept block of the original stands in the smaller model."""
        return self.plan.index_map[block]

    def linear(self, block: int, path: str) -> nn.Module:
        """A linear map of a kept block."""
        return self.smaller.stack.blocks[self.place(block)].get_submodule(path)

    def norm(self, block: int, path: str) -> nn.Module:
        """A norm of a kept block."""
        return self.smaller.stack.blocks[self.place(block)].get_submodule(path)

    def set(self, block: int, path: str, matrix: Tensor, bias: Tensor | None = None) -> None:
        """Gives a linear map a new weight `[out, in]` and, where it has one, a new bias `[out]`."""
        module = self.linear(block, path)
        set_linear(module, matrix, bias, stored_dtype=self.smaller.stored_dtype)
        self._note(block, path, "weight", *(("bias",) if bias is not None else ()))

    def add(self, block: int, path: str, delta: Tensor, bias_delta: Tensor | None = None) -> None:
        """Adds to a linear map's weight `[out, in]` and bias `[out]`."""
        module = self.linear(block, path)
        old = bias_of(module)
        matrix = matrix_of(module)
        at = "cpu" if matrix.device.type == "mps" else matrix.device  # Apple's GPUs have no float64
        bias = None if bias_delta is None or old is None else old.to(at).double() + bias_delta.to(at)
        self.set(block, path, matrix.to(at).double() + delta.to(at, torch.float64), bias)

    def gain(self, block: int) -> Tensor:
        """What a kept block multiplies with what its last projection returns: `[D]` or one number, float64, CPU."""
        assert self.facts is not None
        return self.facts.gain_of(self.smaller.stack.blocks[self.place(block)], self.smaller.owner).cpu()

    def write(self, block: int, delta: Tensor, constant: Tensor | None = None) -> None:
        """Changes the last projection of a block so that the block adds `delta` times its input more to the stream.

        A channel that the block all but closes is left as it is: no finite weight could write there.

        Args:
            block: Original index.
            delta: What is to be written more, `[out, in]`, after the block's gain.
            constant: A constant to be written besides, `[out]`, where the projection has a bias.
        """
        assert self.facts is not None
        gain = self.gain(block)
        is_open = gain.abs() > _CLOSED * gain.abs().max()
        per_unit = torch.where(is_open, 1 / gain, 0.0).to(delta.device)
        change = delta.double() * (per_unit[:, None] if per_unit.dim() else per_unit)
        self.add(block, self.facts.last, change, None if constant is None else constant * per_unit)

    def copy_norm(self, block: int, path: str, source: nn.Module) -> None:
        """Gives a norm the weight and bias of another one."""
        module = self.norm(block, path)
        for name, parameter in source.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            self._note(block, path, name)

    def _note(self, block: int, path: str, *names: str) -> None:
        stack = self.smaller.stack.path
        self.changed |= {f"{stack}.{self.place(block)}.{path}.{name}": None for name in names}

    def snapshot(self) -> "Snapshot":
        """What the model is now; holds no copy, since a repair writes nothing in place."""
        parameters = {name: dict(module._parameters) for name, module in self.smaller.model.named_modules()}
        return Snapshot(parameters, dict(self.changed))

    def restore(self, snapshot: "Snapshot") -> None:
        """Makes the model what it was."""
        for name, module in self.smaller.model.named_modules():
            module._parameters.update(snapshot.parameters[name])
        self.changed = dict(snapshot.changed)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The tensors of a workpiece at one moment."""

    parameters: dict[str, dict[str, nn.Parameter | None]]
    changed: dict[str, None]
