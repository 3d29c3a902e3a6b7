"""Where a block writes to the residual stream: what a repair without training can solve for.

Facts by model type, each held by the tests; for any other type, what a trial on the model itself shows. A type whose
blocks normalise what they write is left alone by the methods that need an exact sum, with the reason; its maps can
still be steered.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from avss.models.forward import run_body
from avss.models.load import Loaded
from avss.models.probe import probe_inputs
from avss.models.stack import hidden_from_output, hooked


@dataclasses.dataclass(frozen=True)
class Projections:
    r"""The linear maps whose outputs a block adds to the residual stream.

    Pre-norm blocks: $y = x + g\,(W_a f_a + W_m f_m)$. Post-norm blocks (`closing_norm`):
    $y = \mathrm{LN}(x' + W_m f_m)$, where $x'$ is normalised too, so that only the MLP's map adds to the sum.

    Attributes:
        attention: Path of the attention's output projection within a block; None where it is not known.
        mlp: Path of the MLP's: the last map of the block. None where a mixture of experts has many.
        gain_field: Config field that the block multiplies both outputs with, if there is one.
        measured_gain: The same number where it was measured.
        channel_gain: Path within a block of the weight that scales what the MLP's map writes, channel by channel (the
            layer scale of DINOv2 and BEiT): $g$ is this vector then.
        closing_norm: Path of the norm that the sum passes at the end of a post-norm block.
        is_complete: Whether nothing else in a block writes to the stream; a trial does not show that.
        obstacle: Why the sum is not linear in these weights; None where it is.
    """

    attention: str | None
    mlp: str | None
    gain_field: str | None = None
    measured_gain: float = 1.0
    channel_gain: str | None = None
    closing_norm: str | None = None
    is_complete: bool = True
    obstacle: str | None = None

    def gain(self, config: Any) -> float:
        """What the block multiplies the projections' outputs with."""
        return float(getattr(config, self.gain_field)) if self.gain_field else self.measured_gain

    def gain_of(self, block: nn.Module, config: Any) -> Tensor:
        """What a block multiplies the MLP projection's outputs with, `[D]` or one number, in float64.

        Args:
            block: The block.
            config: The config that owns its stack.
        """
        if self.channel_gain is None:
            return torch.tensor(self.gain(config), dtype=torch.float64)
        return block.get_parameter(self.channel_gain).detach().double().flatten()

    @property
    def writers(self) -> tuple[str, ...]:
        """Every projection that is known, in the order data passes them."""
        return tuple(path for path in (self.attention, self.mlp) if path is not None)

    @property
    def last(self) -> str:
        """The MLP's, which a solve at a cut changes; asked for where there is no obstacle to one."""
        assert self.mlp is not None
        return self.mlp


_LLAMA = Projections(attention="self_attn.o_proj", mlp="mlp.down_proj")
_BERT = Projections(attention="attention.output.dense", mlp="output.dense", closing_norm="output.LayerNorm")
_NORMED_WRITES = (
    "its blocks normalise or rescale what they write to the residual stream, so no linear solve fits it exactly"
)
_NORMED = dataclasses.replace(_LLAMA, obstacle=_NORMED_WRITES)

PROJECTIONS: Mapping[str, Projections] = {
    "bert": _BERT,
    "distilbert": Projections(attention="attention.out_lin", mlp="ffn.lin2", closing_norm="output_layer_norm"),
    "electra": _BERT,
    "gemma": _LLAMA,
    "gemma2": _NORMED,
    "gemma3_text": _NORMED,
    "gpt2": Projections(attention="attn.c_proj", mlp="mlp.c_proj"),
    "granite": dataclasses.replace(_LLAMA, gain_field="residual_multiplier"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _NORMED,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _BERT,
    "stablelm": _LLAMA,
    "xlm-roberta": _BERT,
}
"""Model type of the config that owns a stack -> where its blocks write."""


def find_projections(loaded: Loaded) -> Projections | None:
    """Where a model's blocks write: the facts about its type, or what a trial shows; None where neither fits.

    None too where words alone do not reach the blocks, as those of a decoder that is only run beside an encoder.
    """
    if loaded.owner is not loaded.model.config:
        with _Trial.of(loaded) as trial:
            if trial.plain is None:
                return None
    facts = PROJECTIONS.get(loaded.owner.model_type)
    if facts is not None and all(_is_linear(loaded, path) for path in facts.writers):
        return facts
    return find_by_trial(loaded) or find_normed_by_trial(loaded) or find_first_by_trial(loaded)


def find_by_trial(loaded: Loaded) -> Projections | None:
    """Looks for the one linear map whose output a block adds to the residual stream last, and for the first.

    Pushes the output of each candidate in a middle block, every token another way: a plain summand moves what the block
    returns by the same multiple of each push, or each channel by its own, which a weight of the block holds. Post-norm
    blocks and normalised outputs do not pass, and nor does a map whose outputs are not one row a token.
    """
    with _Trial.of(loaded) as trial:
        candidates = trial.candidates()
        for path, module in reversed(candidates):
            gain = trial.last_gain(module)
            weight = trial.channel_gain(module) if gain is None or gain != 1.0 else None
            if gain is None and weight is None:
                continue
            others = [(other, one) for other, one in candidates if other != path]
            first = trial.first_of(others)
            if first is None:  # attention and MLP beside each other (Falcon, Phi): both are written last
                first = next((other for other, one in others if trial.last_gain(one) is not None), None)
            return Projections(first, path, measured_gain=gain or 1.0, channel_gain=weight, is_complete=False)
    return None


def find_normed_by_trial(loaded: Loaded) -> Projections | None:
    """Looks for the linear maps whose outputs a block normalises and then adds to the residual stream, first and last.

    What reads the output of each candidate next is tried in its place, as for maps that write themselves.
    """
    with _Trial.of(loaded) as trial:
        read = [(path, reader) for path, module in trial.candidates() if (reader := trial.reader(module)) is not None]
        first = next((path for path, reader in read if trial.first_gain(reader) is not None), None)
        last = next((path for path, reader in reversed(read) if trial.last_gain(reader) is not None), None)
    if first is None and last is None:
        return None
    return Projections(attention=first if first != last else None, mlp=last, obstacle=_NORMED_WRITES)


def find_first_by_trial(loaded: Loaded) -> Projections | None:
    r"""Looks for the one linear map whose output a block adds to the residual stream first: the attention's.

    For blocks that end in many maps at once, as a mixture of experts does. The output $r$ of each candidate in a middle
    block is drawn at random instead: if the map writes to the stream, something later in the block reads $x + g\,r$,
    where $x$ is what the block was given.
    """
    with _Trial.of(loaded) as trial:
        for path, module in trial.candidates():
            gain = trial.first_gain(module)
            if gain is not None:
                return Projections(attention=path, mlp=None, measured_gain=gain, obstacle=_MANY_MAPS)
    return None


class _Trial:
    """A middle block in use, on drawn tokens or images: which modules' outputs does it add to the residual stream?

    Attributes:
        block: The block.
        given: What it was given, `[B, T, D]`; None where words or images alone do not reach the stack, or not one row
            a token or place.
        plain: What it returned.
    """

    def __init__(self, loaded: Loaded, outputs: list[Tensor]) -> None:
        self._loaded, self._outputs = loaded, outputs
        self.block = _middle(loaded)
        self._generator = torch.Generator().manual_seed(0)
        self._drawn: Tensor | dict[str, Tensor] = (
            probe_inputs(loaded)
            if loaded.reads_images
            else torch.randint(loaded.vocabulary, (2, 8), generator=self._generator)
        )
        entering: list[Tensor] = []
        middle = len(loaded.stack.blocks) // 2

        def observe(index: int, before: Tensor, _: Tensor) -> None:
            if index == middle:
                entering.append(before)

        with hooked(loaded.stack, observe):
            self._run()
        self.given = entering[-1] if entering and self._is_by_place(entering[-1]) else None
        self.plain = outputs[-1] if outputs and self._is_by_place(outputs[-1]) else None
        dtypes = [one.dtype for one in (self.given, self.plain) if one is not None]
        self._rounding = max(torch.finfo(dtype).eps for dtype in (*dtypes, loaded.model.dtype))

    @classmethod
    @contextlib.contextmanager
    def of(cls, loaded: Loaded) -> Iterator["_Trial"]:
        with block_output(_middle(loaded)) as outputs:
            yield cls(loaded, outputs)

    def _is_by_place(self, state: Tensor) -> bool:
        """Whether it is one row a token; of images, one row a place."""
        if isinstance(self._drawn, Tensor):
            return state.shape[:-1] == self._drawn.shape
        return state.dim() == 3 and len(state) == len(self._drawn["pixel_values"])

    def candidates(self) -> list[tuple[str, nn.Module]]:
        """The linear maps as wide as the stream that every block has, in the order of their names."""
        state = self.plain if self.plain is not None else self.given
        if state is None:
            return []
        return [
            (path, module)
            for path, module in self.block.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
            and matrix_of(module).shape[0] == state.shape[-1]
            and _is_linear(self._loaded, path)
        ]

    def last_gain(self, module: nn.Module) -> float | None:
        """The multiple of a push of the module's output by which what the block returns moves, or None."""
        plain = self.plain
        if plain is None:
            return None
        push = _PUSH * torch.randn(plain.shape, generator=self._generator).to(plain) * plain.std()
        self._run(module.register_forward_hook(_pushing(push)))
        return _multiple(self._outputs[-1] - plain, push, self._rounding)

    def channel_gain(self, module: nn.Module) -> str | None:
        """Path of the block's weight that scales what the module writes, channel by channel, on its way to the sum.

        A weight is believed where the multiples measured are its values, and half as much again once it is.
        """
        gains = self._channel_gains(module)
        if gains is None:
            return None
        for path, weight in self.block.named_parameters():
            if weight.numel() != len(gains) or not self._agree(gains, weight.detach().flatten()):
                continue
            owner, _, leaf = path.rpartition(".")
            holder = self.block.get_submodule(owner)
            holder._parameters[leaf] = nn.Parameter(1.5 * weight.detach(), requires_grad=False)
            try:
                larger = self._channel_gains(module)
            finally:
                holder._parameters[leaf] = weight
            if larger is not None and self._agree(larger, 1.5 * weight.detach().flatten()):
                return path
        return None

    def _channel_gains(self, module: nn.Module) -> Tensor | None:
        """The multiple of a push by which what the block returns moves, for each channel `[D]`, or None."""
        self._run()
        plain = self._outputs[-1]
        push = _PUSH * torch.randn(plain.shape, generator=self._generator).to(plain) * plain.std()
        self._run(module.register_forward_hook(_pushing(push)))
        return _multiples(self._outputs[-1] - plain, push, self._rounding) if self.plain is not None else None

    def _agree(self, gains: Tensor, weight: Tensor) -> bool:
        off = (gains - weight.double()).abs().max() / gains.abs().max().clamp_min(1e-12)
        return bool(off < max(1e-3, 4 * self._rounding))

    def first_of(self, candidates: Sequence[tuple[str, nn.Module]]) -> str | None:
        """Path of the map that writes to the stream first, as it is or by way of what reads it: the attention's."""
        for path, module in candidates:
            reader = self.reader(module)
            written = (self._written_first(one) for one in (module, reader) if one is not None)
            if any(_multiples(*pair, self._rounding) is not None for pair in itertools.chain.from_iterable(written)):
                return path
        return None

    def first_gain(self, module: nn.Module) -> float | None:
        """The multiple of a drawn output of the module that the block's input has gained where something reads it."""
        gains = (_multiple(moved, drawn, self._rounding) for moved, drawn in self._written_first(module))
        return next((gain for gain in gains if gain is not None), None)

    def _written_first(self, module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """What the block's input has gained where something reads it, beside what the module was made to return."""
        given = self.given
        if given is None:
            return
        drawn = _PUSH * torch.randn(given.shape, generator=self._generator).to(given) * given.std()
        read: list[Tensor] = []

        def remember(_: nn.Module, args: tuple[Any, ...]) -> None:
            read.extend(one for one in args[:1] if isinstance(one, Tensor))

        def replaced(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
            return drawn.reshape(output.shape) if output.numel() == drawn.numel() else None

        self._run(
            module.register_forward_hook(replaced),
            *(one.register_forward_pre_hook(remember) for one in self.block.modules() if one is not self.block),
        )
        rows = (by_token(state, given.shape[:-1]) for state in read)
        yield from ((state - given, drawn) for state in rows if state.shape == given.shape)

    def reader(self, module: nn.Module) -> nn.Module | None:
        """The module, no map itself, that makes something else of this one's output as it is; None without one."""
        written: list[Any] = []
        found: list[nn.Module] = []

        def write(_: nn.Module, __: Any, output: Any) -> None:
            written.append(output)

        def read(other: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            is_read = bool(written and args) and args[0] is written[-1]
            if is_read and isinstance(output, Tensor) and not torch.equal(output, args[0]):
                found.append(other)

        others = [one for one in self.block.modules() if one is not module and not isinstance(one, nn.Linear | Conv1D)]
        self._run(module.register_forward_hook(write), *(one.register_forward_hook(read) for one in others))
        return found[0] if found else None

    def _run(self, *handles: Any) -> None:
        try:
            run_body(self._loaded, self._drawn)
        finally:
            for handle in handles:
                handle.remove()


def _pushing(push: Tensor) -> Any:
    """A hook that adds to what a module returns, where that is one row a token."""

    def pushed(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        fits = by_token(output, push.shape[:-1]).shape == push.shape
        return output + push.reshape(output.shape) if fits else output

    return pushed


def _middle(loaded: Loaded) -> nn.Module:
    return loaded.stack.blocks[len(loaded.stack.blocks) // 2]


_MANY_MAPS = "what its blocks write last is not the plain output of one linear map (but of experts, or a norm)"
_LEAST_GAIN, _LARGEST_MISS = 1e-3, 1e-6
_PUSH = 4.0
"""Size of a push, in standard deviations of what the block returns: well above what the sum is rounded by."""


def _multiple(moved: Tensor, push: Tensor, rounding: float) -> float | None:
    """The positive factor by which one tensor is a multiple of the other, as far as rounding lets one tell, or None."""
    moved, push = moved.double(), push.double()
    gain = float((moved * push).sum() / push.square().sum())
    off = float((moved - gain * push).square().mean() / push.square().mean())
    if not (gain > _LEAST_GAIN and off < max(_LARGEST_MISS, (2 * rounding) ** 2) * gain**2):
        return None
    return 1.0 if abs(gain - 1) < max(1e-4, rounding / 4) else gain


def _multiples(moved: Tensor, push: Tensor, rounding: float) -> Tensor | None:
    """The factors `[D]` by which the channels of one tensor are multiples of the other's, or None."""
    moved, push = (one.double().flatten(0, -2) for one in (moved, push))
    gains = (moved * push).sum(0) / push.square().sum(0)
    off = (moved - gains * push).square().mean() / push.square().mean()
    size = gains.square().mean()
    return gains if bool((size > _LEAST_GAIN**2) & (off < max(_LARGEST_MISS, (2 * rounding) ** 2) * size)) else None


def by_token(rows: Tensor, tokens: Sequence[int]) -> Tensor:
    """What a map within a block reads or writes, as `[B, T, F]`: some blocks (OPT's) pass it on as `[B * T, F]`.

    Args:
        rows: As the map saw it.
        tokens: `(B, T)`, the shape of the batch.
    """
    if rows.dim() == 2 and len(rows) == math.prod(tokens):
        return rows.unflatten(0, tuple(tokens))
    return rows


@contextlib.contextmanager
def block_output(block: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what a block returns, one tensor a forward pass, while the context is open."""
    outputs: list[Tensor] = []
    handle = block.register_forward_hook(lambda _, __, output: outputs.append(hidden_from_output(output)))
    try:
        yield outputs
    finally:
        handle.remove()


def _is_linear(loaded: Loaded, path: str) -> bool:
    """Whether every block has a linear map at this path."""
    try:
        found = [block.get_submodule(path) for block in loaded.stack.blocks]
    except AttributeError:
        return False
    return all(isinstance(module, nn.Linear | Conv1D) for module in found)


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a linear map as `[out, in]`; GPT-2's `Conv1D` stores it the other way round."""
    return oriented(module, cast(Tensor, module.weight))


def oriented(module: nn.Module, tensor: Tensor) -> Tensor:
    """Turns a tensor between the shape of a module's weight and `[out, in]`."""
    return tensor.T if isinstance(module, Conv1D) else tensor


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias `[out]`, if there is one."""
    return cast("Tensor | None", module.bias)


def set_linear(module: nn.Module, matrix: Tensor, bias: Tensor | None, *, stored_dtype: torch.dtype) -> None:
    """Gives a linear map new tensors of its own, rounded to the dtype they will be stored in.

    Never in place: the old tensors may be another model's. What is measured afterwards is what will be saved.
    """
    weight = cast(Tensor, module.weight)

    def own(tensor: Tensor) -> nn.Parameter:
        rounded = tensor.detach().to(stored_dtype).to(weight.dtype).to(weight.device)
        return nn.Parameter(rounded.contiguous().clone(), requires_grad=False)

    module.weight = own(oriented(module, matrix))
    if bias is not None:
        module.bias = own(bias)
