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


class PassedOn(nn.Module):
    """A block whose work is thrown away: what came in goes out, in the form in which the block answers."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        # Models ask their blocks for settings, such as the kind of attention.
        return super().__getattr__(name) if name == "block" else getattr(self.block, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else next(iter(kwargs[name] for name in ("hidden_states", "x") if name in kwargs))
        answer = self.block(*args, **kwargs)
        if isinstance(answer, tuple | list):
            return type(answer)((given, *answer[1:]))
        if isinstance(answer, dict):
            answer[next(iter(answer))] = given
            return answer
        return given


def without_blocks(model: PreTrainedModel, path: str, removed: Iterable[int]) -> PreTrainedModel:
    """A copy of the model in which these blocks do nothing: the meaning of a cut."""
    bypass = copy.deepcopy(model)
    blocks = bypass.get_submodule(path)
    for index in removed:
        blocks[index] = PassedOn(blocks[index])
    return bypass.eval()


@torch.no_grad()
def run(model: PreTrainedModel, token_ids: Tensor, keep: Tensor | None = None) -> Tensor:
    """Logits, or the last hidden state of a model without a head; no cache. Both sides of a T5 read the same text."""
    inputs: dict[str, Any] = {"input_ids": token_ids}
    if keep is not None:
        inputs["attention_mask"] = keep.long()
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = token_ids
    elif is_causal(model):
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
