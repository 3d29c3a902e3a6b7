"""The parts inside a block: which weights are its attention's and which feed-forward, and what each part writes."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from avss.errors import ConfigError, UnsupportedArchitectureError, unknown_name
from avss.models.forward import run_body
from avss.models.load import Loaded
from avss.models.probe import probe_inputs
from avss.models.stack import hooked

WeightChoice = Literal["ffn", "attention", "all"]
"""The feed-forward matrices of a block, those of its attention, or both."""

ATTENTION_NAMES = (
    "attention",  # BERT, RoBERTa, ELECTRA, DistilBERT, DeBERTa, GPT-NeoX, StableLM alpha
    "attn",  # GPT-2, GPT-J, MPT, ModernBERT
    "self_attn",  # Llama, Mistral, Qwen, Gemma, Phi, OLMo, StableLM, OPT, BART
    "self_attention",  # Bloom, Falcon
    "crossattention",  # BERT and GPT-2 as decoders
    "encoder_attn",  # BART decoders
    "multi_head_attention",  # CTRL
)
"""Well-known names of a block's attention module. Everything else with a weight matrix is feed-forward: two modules of
a gated unit, BERT's `intermediate` and `output`, OPT's `fc1` and `fc2`, GPT-2's Conv1D, experts and their router."""

_LIKE_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def is_attention(path: str) -> bool:
    """Whether a dotted path inside a block leads into its attention: by a well-known name, or one that says so.

    Example:
        >>> is_attention("self_attn.q_proj.weight"), is_attention("mlp.up_proj.weight")
        (True, False)
    """
    parts = path.split(".")
    return any(part in ATTENTION_NAMES or _LIKE_ATTENTION.search(part) for part in parts)


def weight_matrices(block: nn.Module, choice: WeightChoice = "all") -> dict[str, nn.Parameter]:
    """The weight matrices of a block by their path inside it, in the order the block holds them.

    A matrix is a parameter of two dimensions or more, so biases and norms are none; neither are tables of an
    `nn.Embedding` (relative positions). The stacked weights of several experts are one.

    Args:
        block: One block.
        choice: Which part.

    Raises:
        ConfigError: The choice is unknown.
        UnsupportedArchitectureError: The block has no such matrix; the message lists those it has.
    """
    if choice not in get_args(WeightChoice):
        raise ConfigError(unknown_name("--weights", choice, get_args(WeightChoice)))
    tables = {id(module.weight) for module in block.modules() if isinstance(module, nn.Embedding)}
    every = {
        path: weight for path, weight in block.named_parameters() if weight.dim() >= 2 and id(weight) not in tables
    }
    chosen = {path: weight for path, weight in every.items() if _belongs(path, choice)}
    if not chosen:
        raise UnsupportedArchitectureError(
            f"A block `{type(block).__name__}` has no weight matrix for `{choice}`. It has: {_listed(every)}. Choose "
            "another of ffn, attention and all."
        )
    return chosen


def _belongs(path: str, choice: WeightChoice) -> bool:
    return choice == "all" or is_attention(path) == (choice == "attention")


def _listed(weights: Mapping[str, nn.Parameter]) -> str:
    return ", ".join(f"`{path}`" for path in weights) or "none"


# --- where the parts of a block write and read ---


@dataclasses.dataclass(frozen=True)
class SubLayers:
    """The modules of one block at which its sub-layers can be watched, found by watching one forward pass.

    Attributes:
        attention_out: The last projection that the attention runs; its output is what the attention adds, before any
            norm or scale of the architecture.
        mlp_out: The last projection outside the attention; its output is what the feed-forward part adds, and its input
            the activations inside.
        middle: The module whose input is the residual stream between the two; None where both read the block's input.
    """

    attention_out: nn.Module
    mlp_out: nn.Module
    middle: nn.Module | None


@dataclasses.dataclass(frozen=True)
class _Call:
    path: str
    module: nn.Module
    before: Tensor
    after: Tensor


def find_sublayers(loaded: Loaded) -> tuple[SubLayers, ...]:
    """The sub-layers of every block.

    Names say what is attention; everything else is told by which tensor goes where in one pass over three tokens (or
    over a drawn image).
    Between the sub-layers, a block with norms before its parts (Llama, GPT-2) holds the stream that goes into the
    second norm; one with norms after them (BERT) hands on the normalised stream itself.

    Raises:
        UnsupportedArchitectureError: A block has no attention, no feed-forward part, or several experts in it; the
            message names the block and what it has.
    """
    calls: list[list[_Call]] = [[] for _ in loaded.stack.blocks]
    ends: dict[int, tuple[Tensor, Tensor]] = {}
    with contextlib.ExitStack() as hooks:
        for index, block in enumerate(loaded.stack.blocks):
            for path, module in block.named_modules():
                if _is_projection(module) or _is_norm(module):
                    hooks.callback(_record_calls(calls[index], path, module).remove)
        hooks.enter_context(hooked(loaded.stack, lambda index, before, after: ends.__setitem__(index, (before, after))))
        if loaded.reads_text:
            run_body(loaded, torch.arange(3).reshape(1, 3) % loaded.vocabulary)
        else:
            run_body(loaded, probe_inputs(loaded, num_sequences=1))
    return tuple(
        _sublayers_of(index, block, calls[index], *ends[index]) for index, block in enumerate(loaded.stack.blocks)
    )


def _is_projection(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_leaf = next(module.children(), None) is None
    return is_leaf and isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _record_calls(into: list[_Call], path: str, module: nn.Module) -> RemovableHandle:
    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            into.append(_Call(path, module, args[0], output))

    return module.register_forward_hook(after)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.data_ptr() == other.data_ptr()


def _sublayers_of(index: int, block: nn.Module, calls: list[_Call], start: Tensor, end: Tensor) -> SubLayers:
    projections = [call for call in calls if _is_projection(call.module)]
    attention = [call for call in projections if is_attention(call.path)]
    mlp = [call for call in projections if not is_attention(call.path)]
    experts = [path for path, weight in block.named_parameters() if weight.dim() > 2 or "expert" in path]
    if not attention or not mlp or experts:
        what = "no attention" if not attention else "no feed-forward part"
        what = f"several experts (`{experts[0]}`)" if attention and experts else what
        raise UnsupportedArchitectureError(
            f"Block {index} (`{type(block).__name__}`) has {what}, so its sub-layers cannot be watched. Projections it "
            f"ran: {', '.join(f'`{call.path}`' for call in projections) or 'none'}. Use `--sites block`."
        )
    norms = [call for call in calls if _is_norm(call.module)]
    reads = mlp[0]
    is_post_norm = any(_same(call.after, end) for call in norms)
    feeds = [call for call in norms if _same(call.after, reads.before)]
    middle = feeds[-1] if feeds and not is_post_norm else reads
    return SubLayers(
        attention_out=attention[-1].module,
        mlp_out=mlp[-1].module,
        middle=None if _same(middle.before, start) else middle.module,
    )


class SubLayerStates:
    """What the sub-layers of each block wrote in the current forward pass.

    Args:
        sublayers: One per block.
    """

    def __init__(self, sublayers: Sequence[SubLayers]) -> None:
        self._sublayers = sublayers
        self._held: dict[int, dict[str, Tensor]] = {}

    @classmethod
    @contextlib.contextmanager
    def watched(cls, loaded: Loaded) -> "Iterator[SubLayerStates]":
        """Watches every block while the context is open; no hook survives it."""
        states = cls(find_sublayers(loaded))
        with contextlib.ExitStack() as hooks:
            for index, one in enumerate(states._sublayers):
                for handle in states._attach(index, one):
                    hooks.callback(handle.remove)
            yield states

    def _attach(self, index: int, one: SubLayers) -> "Iterator[RemovableHandle]":
        held = self._held.setdefault(index, {})

        def attention(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            held["attention"] = output

        def mlp(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            held["mlp"], held["mlp-activation"] = output, args[0]

        def middle(_: nn.Module, args: tuple[Any, ...]) -> None:
            held["middle"] = args[0]

        yield one.attention_out.register_forward_hook(attention)
        yield one.mlp_out.register_forward_hook(mlp)
        if one.middle is not None:
            yield one.middle.register_forward_pre_hook(middle)

    def take(self, index: int, like: Tensor) -> dict[str, Tensor]:
        """The states of one block, `[B, T, width]`, by site (`middle` where there is one); they are let go.

        Args:
            index: The block, which has just run.
            like: Its input, `[B, T, D]`: some blocks flatten batch and tokens inside.
        """
        held = self._held[index]
        states = {name: state.reshape(*like.shape[:2], state.shape[-1]) for name, state in held.items()}
        held.clear()
        return states
