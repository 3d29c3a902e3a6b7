"""Hooks on blocks of every shape that transformers has had."""

from typing import Any

import pytest
import torch
import transformers
from tools.sweep.shrink import small_config
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from avss.errors import UnsupportedArchitectureError
from avss.models.forward import run_body
from avss.models.stack import bypassed, find_stack, find_stacks, hooked
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


# --- finding ---------------------------------------------------------------------------------------------------------


def on_meta(class_name: str, model_type: str, **settings: Any) -> Any:
    model_class = getattr(transformers, class_name)
    with torch.device("meta"):
        return model_class(small_config(model_type, **settings))


FOUND: list[tuple[str, str, dict[str, Any], dict[str, tuple[str, str]], str]] = [
    # class, type, settings, name -> (path, counted by), the one taken by itself
    ("LlamaForCausalLM", "llama", {}, {"blocks": ("model.layers", "num_hidden_layers")}, "blocks"),
    ("GPT2LMHeadModel", "gpt2", {}, {"blocks": ("transformer.h", "n_layer")}, "blocks"),
    ("OPTForCausalLM", "opt", {}, {"blocks": ("model.decoder.layers", "num_hidden_layers")}, "blocks"),
    (
        "BartForConditionalGeneration",
        "bart",
        {},
        {"encoder": ("model.encoder.layers", "encoder_layers"), "decoder": ("model.decoder.layers", "decoder_layers")},
        "decoder",
    ),
    (
        "T5ForConditionalGeneration",
        "t5",
        {"num_decoder_layers": 5},
        {"encoder": ("encoder.block", "num_layers"), "decoder": ("decoder.block", "num_decoder_layers")},
        "decoder",
    ),
    (
        "LlavaForConditionalGeneration",
        "llava",
        {},
        {
            "vision": ("model.vision_tower.encoder.layers", "vision_config.num_hidden_layers"),
            "text": ("model.language_model.layers", "text_config.num_hidden_layers"),
        },
        "text",
    ),
    ("NemotronHForCausalLM", "nemotron_h", {}, {"blocks": ("model.layers", "layers_block_type")}, "blocks"),
]


@pytest.mark.parametrize(("class_name", "model_type", "settings", "expected", "chosen"), FOUND)
def test_every_stack_is_found_with_the_field_that_counts_it(class_name, model_type, settings, expected, chosen):
    model = on_meta(class_name, model_type, **settings)
    stacks, _ = find_stacks(model)
    assert {one.name: (one.path, ".".join((*one.config_path, one.count_field))) for one in stacks} == expected
    taken = find_stack(model)
    assert taken.name == chosen
    assert taken.reason
    for name, (path, _) in expected.items():
        assert find_stack(model, name).path == find_stack(model, path).path == path


def test_a_decoder_is_not_counted_by_the_encoders_field():
    """`num_hidden_layers` of BART is the encoder's: a decoder of that length must not take it."""
    model = on_meta("BartForConditionalGeneration", "bart")
    model.config.decoder_layers = 9
    stacks, rejected = find_stacks(model)
    assert [one.path for one in stacks] == ["model.encoder.layers"]
    assert [one.path for one in rejected] == ["model.decoder.layers"]


def test_an_unknown_stack_is_refused_with_the_names():
    with pytest.raises(UnsupportedArchitectureError, match=r"Unknown stack `decodr`. Did you mean .*decoder.*encoder"):
        find_stack(on_meta("T5ForConditionalGeneration", "t5"), "decodr")


NO_STACK = [
    ("AlbertForMaskedLM", "albert", r"`albert.encoder.albert_layer_groups`.*no config says that there are 1"),
    ("XLMWithLMHeadModel", "xlm", r"`n_layers` also counts.*which of them is a block cannot be told"),
    ("SwinForImageClassification", "swin", r"`swin.encoder.layers` \(4 x SwinStage\)"),
    ("IdeficsForVisionText2Text", "idefics", r"no stack of text blocks.*gated_cross_attn_layers"),
]


@pytest.mark.parametrize(("class_name", "model_type", "reason"), NO_STACK)
def test_a_model_without_a_stack_is_refused_with_what_was_found(class_name, model_type, reason):
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        find_stack(on_meta(class_name, model_type))


def test_a_list_of_one_repeated_module_is_no_stack():
    model = on_meta("LlamaForCausalLM", "llama")
    block = model.model.layers[0]
    model.model.layers = nn.ModuleList([block] * 5)
    with pytest.raises(UnsupportedArchitectureError, match="several times: its repeats share their weights"):
        find_stack(model)


def test_several_streams_are_said_to_be_several_streams():
    block = Returns(torch.zeros(1, 2, 4, 3))
    with watch(block), pytest.raises(UnsupportedArchitectureError, match=r"several streams.*cut, not scored"):
        block(torch.zeros(1, 2, 4, 3))
