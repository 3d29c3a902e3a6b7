"""Blocks that read the keys and values of earlier ones (Gemma 3n, Gemma 4): those stay, and are there when read."""

import pytest
import torch
from transformers import PreTrainedModel

from avss.ablation import Judge, leave_one_out
from avss.compensation import compensate
from avss.config import HealConfig
from avss.cut import cut
from avss.data.sources import Texts
from avss.errors import UnsupportedArchitectureError
from avss.healing import heal
from avss.models.forward import run_outputs
from avss.models.load import Loaded, adopt
from avss.models.rewrite import pinned_blocks
from avss.models.shared_prefix import SharedPrefix, num_alone
from avss.models.stack import bypassed
from avss.record import Plan
from tests.compensation.conftest import random_text
from tests.laws.test_every_architecture import tiny
from tests.support.architectures import randomise, token_batch
from tests.support.tokenizers import WORDS, word_tokenizer

# Of seven blocks the last two read: the sliding one what block 4 keeps, the full one what block 3 keeps.
KINDS = ["sliding_attention" if kind == "s" else "full_attention" for kind in "ssffssf"]
SHARING = {"num_hidden_layers": 7, "layer_types": KINDS, "num_kv_shared_layers": 2}
MODELS = {
    "gemma3n": tiny(
        "Gemma3nForCausalLM", "gemma3n_text", **SHARING, intermediate_size=48, activation_sparsity_pattern=[0.0] * 7
    ),
    "gemma4": tiny("Gemma4ForCausalLM", "gemma4_text", **SHARING, hidden_size_per_layer_input=8),
}


def built(name: str) -> PreTrainedModel:
    return randomise(MODELS[name]())


def without(loaded: Loaded, *blocks: int) -> Plan:
    return Plan(num_blocks=len(loaded.stack), removed=blocks, method="explicit", rule="by hand")


@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_that_are_read_stay(name):
    loaded = adopt(built(name))
    pins = {pin.block for pin in pinned_blocks(loaded.model.config, loaded.stack)}
    assert {3, 4} <= pins <= {3, 4, 6}
    assert num_alone(loaded) == 3
    for block in (3, 4):
        with pytest.raises(UnsupportedArchitectureError, match="read"):
            cut(loaded, without(loaded, block))
    cut(loaded, without(loaded, 1, 2))


@pytest.mark.parametrize("name", MODELS)
def test_every_block_can_be_left_out_for_a_measurement(name):
    """Those that others read from too: what they keep is made of what reaches them."""
    loaded = adopt(built(name))
    token_ids, keep = token_batch()
    shared = SharedPrefix(loaded, token_ids, keep)
    slow = SharedPrefix(loaded, token_ids, keep, share=False)
    for removed in [(block,) for block in range(7)] + [(3, 4), (0, 3), (2, 5)]:
        with bypassed(loaded.stack, removed):
            expected = run_outputs(loaded, token_ids, keep)
        assert torch.equal(shared.without(removed), expected)
        assert torch.equal(slow.without(removed), expected)
    shared.rewind()
    assert torch.equal(shared.without(()), shared.dense)
    damages = leave_one_out(Judge(loaded, random_text()), 7)
    assert all(damage.mean > 0 for damage in damages)


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_behind_them_is_repaired_and_healed(name):
    """Both run the first blocks once for both models, but not those that others read from."""
    dense = adopt(built(name), word_tokenizer(adds="bos"))
    plan = without(dense, 5)
    smaller = cut(dense, plan)
    if name == "gemma3n":
        with pytest.raises(UnsupportedArchitectureError, match="several streams"):
            compensate(dense, smaller, plan, random_text(), method="steer")
    else:
        _, story = compensate(dense, smaller, plan, random_text(), method="steer", rounds=1)
        assert story.after <= story.before
    text = Texts(texts=(" ".join(WORDS * 30),), source="text.txt", is_prose=True)
    settings = {"budget": "200 tokens", "seq_len": 16, "batch_size": 2, "precision": "float32", "augment": 0.0}
    _, healing, _ = heal(dense, smaller, plan, text, HealConfig(**settings, validations=1))
    assert healing.num_steps > 0
