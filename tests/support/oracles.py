"""Slow and obvious ways to get the numbers that avss gets fast."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

AUTO_CLASS_OF_SUFFIX = {
    "LMHeadModel": "AutoModelForCausalLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "Model": "AutoModel",
}


def auto_class_name(model: PreTrainedModel) -> str:
    """The auto class that a stranger would load this model with."""
    name = type(model).__name__
    return next(auto for suffix, auto in AUTO_CLASS_OF_SUFFIX.items() if name.endswith(suffix))


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model continues text."""
    return auto_class_name(model) == "AutoModelForCausalLM"


class Identity(nn.Module):
    """A block that does nothing, and answers in the form of the block whose place it takes."""

    def __init__(self, answers_with_tuple: bool) -> None:
        super().__init__()
        self.answers_with_tuple = answers_with_tuple

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if self.answers_with_tuple else hidden_states


_TUPLE_BLOCKS: dict[type[nn.Module], bool] = {}


def answers_with_tuple(model: PreTrainedModel, path: str) -> bool:
    """Whether the blocks at this path return tuples."""
    answers: list[Any] = []
    block = model.get_submodule(path)[0]
    if type(block) in _TUPLE_BLOCKS:
        return _TUPLE_BLOCKS[type(block)]
    handle = block.register_forward_hook(lambda _module, _args, output: answers.append(output))
    try:
        run(model, torch.tensor([[5, 6, 7]]))
    finally:
        handle.remove()
    return _TUPLE_BLOCKS.setdefault(type(block), isinstance(answers[0], tuple))


def without_blocks(model: PreTrainedModel, path: str, removed: Iterable[int]) -> PreTrainedModel:
    """A copy of the model in which these blocks do nothing: the meaning of a cut."""
    bypass = copy.deepcopy(model)
    blocks = bypass.get_submodule(path)
    kind = answers_with_tuple(model, path)
    for index in removed:
        blocks[index] = Identity(kind)
    return bypass.eval()


@torch.no_grad()
def run(model: PreTrainedModel, token_ids: Tensor, keep: Tensor | None = None) -> Tensor:
    """Logits, or the last hidden state of a model without a head; no cache."""
    inputs: dict[str, Any] = {"input_ids": token_ids}
    if keep is not None:
        inputs["attention_mask"] = keep.long()
    if is_causal(model):
        inputs["use_cache"] = False
    outputs = model(**inputs)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def hook_count(model: nn.Module) -> int:
    """Hooks of any kind on any module."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference of two tensors of the same shape."""
    assert one.shape == other.shape
    return float((one.double() - other.double()).abs().max())


def state_copy(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every weight and buffer."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
