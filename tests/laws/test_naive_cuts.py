"""What goes wrong without the facts: each naive cut here takes the right weights and is still another model.

A naive cut lowers the count in the config and renumbers the blocks, which is what most tools do. Each test shows first
that it differs from the original with the block bypassed, then what avss does instead.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from tools.sweep.shrink import small_model
from torch import Tensor

from avss.cut import cut, remap
from avss.errors import UnsupportedArchitectureError
from avss.models.forward import run_outputs
from avss.models.load import Loaded, adopt
from avss.models.probe import probe_inputs
from avss.models.stack import bypassed
from avss.record import Plan
from tests.support.architectures import randomise

TOLERANCE = 1e-5
ROPE_5 = [1, 0, 1, 1, 0]


def loaded_of(class_name: str, model_type: str, stack: str = "auto", **settings: object) -> Loaded:
    return adopt(small_model(getattr(transformers, class_name), model_type, **settings), stack=stack)


def plan_of(loaded: Loaded, *removed: int) -> Plan:
    return Plan(num_blocks=len(loaded.stack), removed=removed, method="explicit", rule="by hand")


def truth(loaded: Loaded, plan: Plan) -> Tensor:
    with bypassed(loaded.stack, plan.removed):
        return run_outputs(loaded, probe_inputs(loaded))


def naive(loaded: Loaded, plan: Plan) -> Tensor:
    """The outputs of a cut that knows the count and the weights, and nothing else."""
    config = copy.deepcopy(loaded.model.config)
    owner = loaded.stack.owner(config)
    setattr(owner, loaded.stack.count_field, len(plan.kept))
    for field in ("layer_types", "mlp_layer_types"):
        # transformers refuses a list of another length; the naive way out is its first entries.
        if isinstance(owner.to_dict().get(field), list):
            setattr(owner, field, getattr(owner, field)[: len(plan.kept)])
    model = randomise(type(loaded.model)(config), seed=1)
    state = remap(loaded.model.state_dict(), loaded.stack.path, plan)
    fitting = {
        key: tensor
        for key, tensor in state.items()
        if key in model.state_dict() and model.state_dict()[key].shape == tensor.shape
    }
    model.load_state_dict(fitting, strict=False)
    return run_outputs(loaded.with_model(model.eval()), probe_inputs(loaded))


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


EXPRESSIBLE: dict[str, tuple[Callable[[], Loaded], tuple[int, ...]]] = {
    "smollm3: which blocks have no positions": (
        lambda: loaded_of("SmolLM3ForCausalLM", "smollm3", no_rope_layers=ROPE_5),
        (0,),
    ),
    "llama4: which blocks have experts, and which have no positions": (
        lambda: loaded_of("Llama4ForCausalLM", "llama4_text", moe_layers=[1, 3], no_rope_layers=ROPE_5),
        (0, 2),
    ),
    "t5 encoder: the bias that its first block holds for all": (
        lambda: loaded_of("T5ForConditionalGeneration", "t5", "encoder", num_decoder_layers=3),
        (0,),
    ),
    "t5 decoder: the same, on its own": (
        lambda: loaded_of("T5ForConditionalGeneration", "t5", "decoder", num_decoder_layers=4),
        (0,),
    ),
    "deepseek: how many of the first blocks have no experts": (
        lambda: loaded_of("DeepseekV3ForCausalLM", "deepseek_v3", first_k_dense_replace=2),
        (0,),
    ),
    "qwen3-moe: every second block has experts": (
        lambda: loaded_of("Qwen3MoeForCausalLM", "qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3]),
        (0,),
    ),
    "gpt-neo: kinds written as repeats": (lambda: loaded_of("GPTNeoForCausalLM", "gpt_neo"), (0,)),
    "minicpm3: branches scaled by the number of blocks": (lambda: loaded_of("MiniCPM3ForCausalLM", "minicpm3"), (2,)),
    "gemma4: embeddings of all blocks in one table": (
        lambda: loaded_of(
            "Gemma4ForCausalLM",
            "gemma4_text",
            hidden_size_per_layer_input=8,
            layer_types=["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        ),
        (1,),
    ),
}

INEXPRESSIBLE: dict[str, tuple[Callable[[], Loaded], tuple[int, ...], str]] = {
    "gpt2: attention divided by the block's index": (
        lambda: loaded_of("GPT2LMHeadModel", "gpt2", scale_attn_by_inverse_layer_idx=True),
        (1,),
        "scale_attn_by_inverse_layer_idx",
    ),
    "modernbert: the first block has no norm": (
        lambda: loaded_of("ModernBertForMaskedLM", "modernbert"),
        (0,),
        r"Block 0 .*cannot be removed.*norm.*--protect 0",
    ),
    "diffllama: a share computed from the index": (
        lambda: loaded_of("DiffLlamaForCausalLM", "diffllama"),
        (1,),
        "computed from each block's index",
    ),
    "minimax: a decay computed from the index and the number of blocks": (
        lambda: loaded_of("MiniMaxForCausalLM", "minimax"),
        (4,),
        "computed from each block's index",
    ),
    "gpt-neox-japanese: only the last block adds a bias": (
        lambda: loaded_of("GPTNeoXJapaneseForCausalLM", "gpt_neox_japanese"),
        (4,),
        "Block 4 .*only its attention adds a bias",
    ),
    "deberta-v2: a convolution beside the first block": (
        lambda: loaded_of("DebertaV2ForMaskedLM", "deberta-v2", conv_kernel_size=3),
        (0,),
        "Block 0 .*convolution",
    ),
    "jamba: attention at uneven distances": (
        lambda: loaded_of("JambaForCausalLM", "jamba", attn_layer_period=2, attn_layer_offset=0),
        (1,),
        "uneven distances",
    ),
}


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_naive_cut_is_another_model_and_ours_is_the_bypass(name):
    builder, removed = EXPRESSIBLE[name]
    loaded = builder()
    plan = plan_of(loaded, *removed)
    expected = truth(loaded, plan)
    assert distance(naive(loaded, plan), expected) > 100 * TOLERANCE
    smaller = cut(loaded, plan)
    assert distance(run_outputs(smaller, probe_inputs(loaded)), expected) <= TOLERANCE


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_naive_cut_is_another_model_and_ours_is_refused_with_the_reason(name):
    builder, removed, reason = INEXPRESSIBLE[name]
    loaded = builder()
    plan = plan_of(loaded, *removed)
    # A bypass keeps DeBERTa's convolution too, and transformers stores MiniMax's decays: these two are refused
    # because the
    # first block's place would be lost, and because every other runtime computes the decays anew.
    if not name.startswith(("deberta", "minimax")):
        assert distance(naive(loaded, plan), truth(loaded, plan)) > 100 * TOLERANCE
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        cut(loaded, plan)


@pytest.mark.parametrize("name", ["diffllama", "minimax", "gpt2", "modernbert", "gpt_neox_japanese"])
def test_the_proof_alone_refuses_what_no_fact_explains(name, monkeypatch):
    """Facts make refusals readable; without any of them the proof still stops the cut."""
    classes = {"diffllama": "DiffLlamaForCausalLM", "minimax": "MiniMaxForCausalLM", "gpt2": "GPT2LMHeadModel"}
    classes |= {"modernbert": "ModernBertForMaskedLM", "gpt_neox_japanese": "GPTNeoXJapaneseForCausalLM"}
    settings = {"scale_attn_by_inverse_layer_idx": True} if name == "gpt2" else {}
    loaded = loaded_of(classes[name], name, **settings)
    monkeypatch.setattr("avss.models.families.FAMILIES", {})
    removed = 4 if name == "gpt_neox_japanese" else 0
    with pytest.raises(UnsupportedArchitectureError, match=r"built differently|computes something else"):
        cut(loaded, plan_of(loaded, removed))


def test_a_moved_bias_is_the_old_one():
    loaded = loaded_of("T5ForConditionalGeneration", "t5", "encoder", num_decoder_layers=3)
    key = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    smaller = cut(loaded, plan_of(loaded, 0, 1))
    assert torch.equal(smaller.model.state_dict()[key], loaded.model.state_dict()[key])
    decoder = key.replace("encoder", "decoder")
    assert torch.equal(smaller.model.state_dict()[decoder], loaded.model.state_dict()[decoder])
