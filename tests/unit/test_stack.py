"""Hooks on blocks of every shape that transformers has had."""

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from avss.errors import UnsupportedArchitectureError
from avss.models.forward import run_body
from avss.models.stack import bypassed, hooked
from tests.support.fakes import ANSWERS, CALLS, AddingBlock, adding, stack_of

TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])

every_answer = pytest.mark.parametrize("answer", ANSWERS)
every_call = pytest.mark.parametrize("call", CALLS)


@every_answer
@every_call
def test_hidden_states_are_found_however_a_block_takes_and_returns_them(answer, call):
    loaded, table, vectors = adding(answer=answer, call=call)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    with hooked(loaded.stack, lambda index, before, after: seen.update({index: (before, after)})):
        run_body(loaded, TOKENS)
    hidden = table[TOKENS]
    for index, vector in enumerate(vectors):
        assert torch.equal(seen[index][0], hidden)
        hidden = hidden + vector
        assert torch.equal(seen[index][1], hidden)


@every_answer
@every_call
def test_bypassed_blocks_add_nothing(answer, call):
    loaded, table, vectors = adding(answer=answer, call=call)
    with bypassed(loaded.stack, (0, 2)):
        found = run_body(loaded, TOKENS)
    assert torch.allclose(found, table[TOKENS] + vectors[1] + vectors[3])
    assert torch.allclose(run_body(loaded, TOKENS), table[TOKENS] + sum(vectors))


@every_answer
def test_a_replaced_output_keeps_its_kind_and_the_rest_of_it(answer):
    block = AddingBlock(torch.ones(2), answer)
    hidden = torch.zeros(1, 3, 2)
    plain = block(hidden)
    with hooked(stack_of(block), lambda index, before, after: after * 5):
        replaced = block(hidden)
    assert type(replaced) is type(plain)
    first = replaced if answer == "tensor" else replaced[0]
    assert torch.equal(first, torch.full((1, 3, 2), 5.0))
    if answer in ("tuple", "list"):
        assert replaced[1] == plain[1]


def test_a_model_output_of_other_fields_is_understood():
    class Block(nn.Module):
        def forward(self, hidden_states: Tensor) -> CausalLMOutput:
            return CausalLMOutput(logits=hidden_states + 1)

    block = Block()
    with hooked(stack_of(block), lambda index, before, after: before):
        assert torch.equal(block(torch.zeros(1, 2, 3)).logits, torch.zeros(1, 2, 3))


class Returns(nn.Module):
    """Returns what it was made with, whatever it gets."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: object, **__: object) -> object:
        return self.value


def watch(block: nn.Module) -> object:
    return hooked(stack_of(block), lambda index, before, after: None)


@pytest.mark.parametrize("value", [torch.zeros(2, 3), torch.zeros(1, 2, 4), torch.zeros(1, 3, 3), (torch.zeros(2, 3),)])
def test_another_shape_is_refused(value):
    block = Returns(value)
    with watch(block), pytest.raises(UnsupportedArchitectureError, match=r"Block 0 \(`Returns`\) takes \(1, 2, 3\)"):
        block(torch.zeros(1, 2, 3))


def test_two_dimensional_states_are_refused():
    """`output[0]` of a tensor is its first sequence: the classic way to score a fraction of the data."""
    block = Returns(torch.zeros(2, 3))
    with watch(block), pytest.raises(UnsupportedArchitectureError, match=r"\[batch, token, hidden\]"):
        block(torch.zeros(2, 3))


@pytest.mark.parametrize("value", [None, "text", ("text", torch.zeros(1, 2, 3)), BaseModelOutput(attentions=(1,))])
def test_an_answer_without_a_hidden_state_is_refused(value):
    block = Returns(value)
    with watch(block), pytest.raises(UnsupportedArchitectureError, match="without a hidden state in first place"):
        block(torch.zeros(1, 2, 3))


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), (("text",), {}), ((), {"states": torch.zeros(1, 2, 3)})])
def test_a_call_without_a_hidden_state_is_refused(args, kwargs):
    block = Returns(torch.zeros(1, 2, 3))
    with watch(block), pytest.raises(UnsupportedArchitectureError, match="called without a hidden state"):
        block(*args, **kwargs)


def test_hooks_are_removed_when_attaching_fails():
    block = AddingBlock(torch.ones(2))
    stack = stack_of(block, nn.Identity())
    stack.blocks[1].register_forward_hook = None  # not callable
    with pytest.raises(TypeError), hooked(stack, lambda index, before, after: None):
        pass
    assert not block._forward_hooks
