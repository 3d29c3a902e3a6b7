"""Shells of every architecture: the head of known states, blocks that are known, blocks that are computed again."""

import pytest
import torch
import transformers
from tools.sweep.shrink import small_model

from avss.errors import UnsupportedArchitectureError
from avss.models.asked import AskedLogits
from avss.models.forward import run_body
from avss.models.load import adopt
from avss.models.shell import HeadShell, KnownBlock, RecomputedBlock, with_blocks, with_narrow_maps
from tests.support.architectures import ARCHITECTURES, VOCAB, stored, token_batch
from tests.support.oracles import hook_count, run, state_copy

PREDICTS_WORDS = [name for name in ARCHITECTURES if adopt(stored(name)).head in ("causal", "masked")]


@pytest.mark.parametrize("name", PREDICTS_WORDS)
def test_the_head_shell_answers_as_the_model(name):
    loaded = adopt(stored(name))
    token_ids, _ = token_batch(padded=False)
    with torch.no_grad():
        hidden = loaded.model.base_model(input_ids=token_ids)[0]
        assert torch.equal(HeadShell(loaded.model)(hidden), run(stored(name), token_ids))


@pytest.mark.parametrize(
    ("class_name", "model_type"),
    [
        ("BartForCausalLM", "bart"),
        ("FalconH1ForCausalLM", "falcon_h1"),
        ("Llama4ForCausalLM", "llama4_text"),
        ("Llama4ForConditionalGeneration", "llama4"),
        ("MllamaForCausalLM", "mllama_text_model"),
        ("LongformerForMaskedLM", "longformer"),
        ("MambaForCausalLM", "mamba"),
        ("MixtralForCausalLM", "mixtral"),
        ("OPTForCausalLM", "opt"),
        ("RwkvForCausalLM", "rwkv"),
    ],
)
def test_the_head_shell_answers_as_models_whose_heads_ask_for_more(class_name, model_type):
    """Heads that run a part of the body only, read a number of it, or pass on a cache or a router's logits."""
    loaded = adopt(small_model(getattr(transformers, class_name), model_type))
    token_ids, _ = token_batch(padded=False)
    hidden = run_body(loaded, token_ids)
    with torch.no_grad():
        assert torch.equal(HeadShell(loaded.model)(hidden.clone()), loaded.model(input_ids=token_ids).logits)


def test_a_model_whose_head_cannot_be_told_apart_is_refused_and_not_guessed():
    model = small_model(transformers.T5ForConditionalGeneration, "t5")
    with pytest.raises(UnsupportedArchitectureError, match=r"T5ForConditionalGeneration.*head cannot be run alone"):
        HeadShell(model)
    shell = HeadShell(small_model(transformers.ProphetNetForCausalLM, "prophetnet"))
    with pytest.raises(UnsupportedArchitectureError, match=r"`prophetnet` model asks its body for more"):
        shell(torch.zeros(1, 3, 32))


@pytest.mark.parametrize("name", PREDICTS_WORDS)
def test_the_logits_asked_for_are_those_of_the_whole_pass(name):
    loaded = adopt(stored(name))
    token_ids, keep = token_batch()
    asked = keep & (torch.arange(keep.shape[1]) % 3 == 1)
    ask = AskedLogits(loaded)
    expected = run(stored(name), token_ids, keep)[asked]
    torch.testing.assert_close(ask(token_ids, keep, asked), expected, rtol=1e-4, atol=1e-5)
    head = loaded.model.get_output_embeddings()
    seen = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    ask(token_ids, keep, asked)
    handle.remove()
    assert seen == [int(asked.sum())]  # the head has read nothing else
    assert hook_count(stored(name)) == 0


def test_a_head_past_the_body_is_run_on_all_of_them():
    """OPT's calls the decoder inside its body, so the body answers nothing that could be narrowed."""
    config = transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=64, do_layer_norm_before=True,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    token_ids, keep = token_batch()
    asked = keep & (torch.arange(keep.shape[1]) % 3 == 1)
    torch.testing.assert_close(AskedLogits(adopt(model))(token_ids, keep, asked), run(model, token_ids, keep)[asked])


def test_where_all_is_asked_all_is_answered():
    model = stored("llama")
    token_ids, keep = token_batch(padded=False)
    found = AskedLogits(adopt(model))(token_ids, keep, keep)
    assert torch.equal(found, run(model, token_ids, keep).flatten(0, 1))


class Neighbours(torch.nn.Linear):
    """A head that looks at all tokens of a sequence."""

    def forward(self, hidden):
        return super().forward(hidden + hidden.mean(1, keepdim=True))


def test_a_head_that_looks_at_its_neighbours_is_run_on_all_of_them():
    model = ARCHITECTURES["llama"]()
    model.lm_head.__class__ = Neighbours
    token_ids, keep = token_batch()
    asked = torch.zeros_like(keep)
    asked[0, 2:5] = True
    found = AskedLogits(adopt(model))(token_ids, keep, asked)
    torch.testing.assert_close(found, run(model, token_ids, keep)[asked])
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_shell_with_known_and_recomputed_blocks_answers_as_the_model(name):
    model = stored(name)
    loaded, before = adopt(model), state_copy(model)
    token_ids, keep = token_batch()
    blocks, outputs = loaded.stack.blocks, []
    handle = blocks[1].register_forward_hook(lambda _module, _args, output: outputs.append(output))
    expected = run(model, token_ids, keep)
    handle.remove()
    known = [KnownBlock(block) for block in blocks[:2]]
    for block in known:
        block.output = outputs[0]
    shell = with_blocks(model, loaded.stack, [*known, *(RecomputedBlock(block) for block in blocks[2:])])
    assert torch.equal(run(shell, token_ids, keep), expected)
    assert torch.equal(run(model, token_ids, keep), expected)
    assert loaded.stack.blocks is blocks
    assert hook_count(model) == 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_shell_with_narrow_maps_answers_as_the_model_under_autocast(name):
    model = stored(name)
    before = state_copy(model)
    token_ids, keep = token_batch()
    shell = with_narrow_maps(model, torch.bfloat16, lambda _: True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(shell, token_ids, keep), run(model, token_ids, keep))
    narrow = [value for value in shell.state_dict().values() if value.dtype == torch.bfloat16]
    assert bool(narrow) == any(type(module) is torch.nn.Linear for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_trained_weights_are_not_narrowed():
    model = ARCHITECTURES["llama"]()
    model.requires_grad_(False).lm_head.requires_grad_(True)
    shell = with_narrow_maps(model, torch.bfloat16, lambda value: not value.requires_grad)
    assert shell.lm_head.weight is model.lm_head.weight
    assert shell.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_recomputed_blocks_give_the_same_gradient():
    model = ARCHITECTURES["llama"]()
    loaded = adopt(model)
    token_ids, _ = token_batch(padded=False)
    gradients = []
    for shell in (model, with_blocks(model, loaded.stack, [RecomputedBlock(block) for block in loaded.stack.blocks])):
        model.zero_grad()
        shell(input_ids=token_ids, use_cache=False).logits.square().mean().backward()
        gradients.append({name: value.grad.clone() for name, value in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_stand_in_answers_for_its_block():
    block = stored("gemma3").model.layers[0]
    assert KnownBlock(block).self_attn is block.self_attn
    with pytest.raises(AttributeError):
        _ = KnownBlock(block).no_such_thing
