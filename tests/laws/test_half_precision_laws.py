"""A cut in half precision is held to the same proof: only rounding may differ, and there is next to none."""

import pytest
import torch
from transformers import LiltConfig, LiltModel, LlamaForCausalLM

import avss
from avss.cut import cut
from avss.errors import UnsupportedArchitectureError
from avss.models.load import adopt, in_dtype
from avss.models.proof import allowed_difference, noise_of, refuse_other_outputs
from avss.record import Plan
from tests.support.architectures import ARCHITECTURES, randomise

HALF = [torch.bfloat16, torch.float16]


def without(loaded, *blocks):
    plan = Plan(num_blocks=len(loaded.stack), removed=blocks, method="explicit", rule="by hand")
    return cut(loaded, plan), plan


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cut_computes_what_a_bypass_computes(name, dtype):
    loaded = adopt(in_dtype(ARCHITECTURES[name](), dtype))
    smaller, _ = without(loaded, len(loaded.stack) // 2)
    assert smaller.model.dtype == dtype


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_buffers_that_the_caller_cast_are_no_reason_to_refuse(dtype):
    """`model.half()` rounds the rotary frequencies too; those of the smaller model come from its config."""
    loaded = adopt(ARCHITECTURES["llama"]().to(dtype))
    smaller, _ = without(loaded, 2)
    ours, theirs = (
        allowed_difference(torch.ones(1), *models) for models in ((smaller.model,) * 2, (loaded.model, smaller.model))
    )
    assert ours == 1e-3
    assert theirs > ours


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_attention_by_other_kernels_is_no_reason_to_withdraw(dtype, tmp_path):
    """A model object may attend in another way than a fresh load of what is saved does."""
    ARCHITECTURES["llama"]().save_pretrained(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype, attn_implementation="eager")
    pruned = avss.prune(model, blocks="3", out=tmp_path / "out")
    assert pruned.record.cuts[0].verification.passed


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_small_error_is_found_in_every_dtype(dtype):
    loaded = adopt(in_dtype(ARCHITECTURES["llama"](), dtype))
    smaller, plan = without(loaded, 2)
    refuse_other_outputs(loaded, smaller, plan)
    norm = smaller.model.get_submodule("model.norm")
    norm.weight = torch.nn.Parameter(norm.weight.detach() * 1.02)  # its own: a cut shares its weights
    with pytest.raises(UnsupportedArchitectureError, match="computes something else"):
        refuse_other_outputs(loaded, smaller, plan)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_two_streams_are_refused_in_every_dtype(dtype):
    """A block of LiLT is handed two streams, and a bypass carries one."""
    torch.manual_seed(0)
    config = LiltConfig(
        vocab_size=64,
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
        channel_shrink_ratio=4,
        max_2d_position_embeddings=64,
    )
    loaded = adopt(in_dtype(randomise(LiltModel(config)), dtype))
    with pytest.raises(UnsupportedArchitectureError):
        without(loaded, 1)


def test_noise_is_twice_what_another_run_shows():
    expected = torch.tensor([1.0, 2.0])
    assert noise_of(expected, lambda: expected.half()) == 0
    assert noise_of(expected, lambda: torch.tensor([1.0, 2.25])) == 0.5
