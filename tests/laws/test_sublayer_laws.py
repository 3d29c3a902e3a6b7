"""The parts inside a block: the right modules, the right numbers, and a refusal by name where there are none."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import avss
from avss.collect import collect
from avss.criteria.sites import SITES, find_sites, site_needs, site_values
from avss.errors import ConfigError, UnsupportedArchitectureError
from avss.models.load import adopt
from avss.models.sublayers import find_sublayers
from avss.record import RunRecord
from avss.statistics import CosineSimilarity, Moments, NearZero, RelativeUpdate
from tests.laws.test_gradient_laws import OTHERS, TINY, other
from tests.support.architectures import build, stored, token_batch
from tests.support.oracles import hook_count
from tests.support.tokenizers import word_tokenizer

PARTS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm"),
    "gpt2": ("attn.c_proj", "mlp.c_proj", "ln_2"),
    "gemma2": ("self_attn.o_proj", "mlp.down_proj", "pre_feedforward_layernorm"),
    "gemma3": ("self_attn.o_proj", "mlp.down_proj", "pre_feedforward_layernorm"),
    "olmo2": ("self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj"),
    "phi3": ("self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm"),
    "granite": ("self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm"),
    "bert": ("attention.output.dense", "output.dense", "intermediate.dense"),
    "distilbert": ("attention.out_lin", "ffn.lin2", "ffn.lin1"),
    "opt": ("self_attn.out_proj", "fc2", "final_layer_norm"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h", "post_attention_layernorm"),
    "neox": ("attention.dense", "mlp.dense_4h_to_h", None),
    "phi": ("self_attn.dense", "mlp.fc2", None),
}
"""Last projection of the attention, last of the feed-forward part, and what reads the stream between them."""


def model_of(name: str) -> Any:
    return other(name) if name in OTHERS else copy.deepcopy(stored(name))


@pytest.mark.parametrize("name", PARTS)
def test_the_right_modules_are_found_in_every_block(name):
    loaded = adopt(model_of(name))
    before = hook_count(loaded.model)
    for block, found in zip(loaded.stack.blocks, find_sublayers(loaded), strict=True):
        attention, mlp, middle = PARTS[name]
        assert found.attention_out is block.get_submodule(attention)
        assert found.mlp_out is block.get_submodule(mlp)
        assert found.middle is (None if middle is None else block.get_submodule(middle))
    assert hook_count(loaded.model) == before


def recorded(model: Any, blocks: Any, paths: tuple[str, str, str | None], batch: Any) -> list[dict[str, np.ndarray]]:
    """Plain hooks on named modules: what goes in and out, one dictionary a block, real tokens only."""
    token_ids, keep = batch
    found: list[dict[str, np.ndarray]] = [{} for _ in blocks]
    handles = []

    def save(index: int, name: str, state: Any) -> None:
        state = state[0] if isinstance(state, tuple) else state
        found[index][name] = state.reshape(*keep.shape, -1)[keep].double().numpy()

    def watch(module: Any, index: int, before: str | None, after: str) -> None:
        def hook(_module: Any, args: Any, output: Any) -> None:
            save(index, after, output)
            if before is not None:
                save(index, before, args)

        handles.append(module.register_forward_hook(hook))

    for index, block in enumerate(blocks):
        attention, mlp, middle = paths
        watch(block, index, "input", "output")
        watch(block.get_submodule(attention), index, None, "attention")
        watch(block.get_submodule(mlp), index, "mlp-activation", "mlp")
        if middle is not None:
            handles.append(
                block.get_submodule(middle).register_forward_pre_hook(lambda _m, a, i=index: save(i, "middle", a))
            )
    with torch.no_grad():
        model(input_ids=token_ids, attention_mask=keep.long())
    for handle in handles:
        handle.remove()
    return found


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(((one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)).mean())


def length(one: np.ndarray, other: np.ndarray) -> float:
    return float((np.linalg.norm(other - one, axis=1) / np.linalg.norm(one, axis=1)).mean())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert", "distilbert", "opt"])
def test_figures_of_every_site_equal_their_definition(name):
    loaded, batch = adopt(model_of(name).double()), token_batch()
    seen = collect(loaded, [batch], [need for site in SITES for need in site_needs(site)])
    slow = recorded(loaded.model, loaded.stack.blocks, PARTS[name], batch)
    for site in SITES:
        found = site_values(site, seen.summarise)
        for block, states in enumerate(slow):
            state = states["output" if site == "block" else site]
            limit = 1e-2 * np.sqrt((state**2).mean(1, keepdims=True))
            below = np.abs(state) < limit
            expected = {
                "variance": state.var(),
                "near_zero": below.mean(),
                "below_1e-5": (np.abs(state) < 1e-5).mean(),
                "avss": state.var() * (state.size + 2) / (below.sum() + 1),
            }
            ends = {
                "block": ("input", "output"),
                "attention": ("input", "middle"),
                "mlp": ("middle", "output"),
            }
            if site in ends:
                start, stop = (states[end] for end in ends[site])
                expected |= {"influence": 1 - cosine(start, stop), "update_norm": length(start, stop)}
            assert {figure: values[block] for figure, values in found.items()} == pytest.approx(expected, rel=1e-6)


def test_in_a_pre_norm_block_the_parts_add_up_to_the_stream():
    """Llama: the stream between is the input plus what the attention wrote, and the output that plus the MLP's."""
    loaded, batch = adopt(model_of("llama").double()), token_batch()
    for states in recorded(loaded.model, loaded.stack.blocks, PARTS["llama"], batch):
        assert states["middle"] == pytest.approx(states["input"] + states["attention"])
        assert states["output"] == pytest.approx(states["middle"] + states["mlp"])


def test_parallel_parts_are_each_taken_alone():
    loaded, batch = adopt(other("neox").double()), token_batch()
    seen = collect(loaded, [batch], [CosineSimilarity("attention"), RelativeUpdate("mlp")])
    for block, states in enumerate(recorded(loaded.model, loaded.stack.blocks, PARTS["neox"], batch)):
        start = states["input"]
        assert seen.summarise(CosineSimilarity("attention"))["cosine"][block] == pytest.approx(
            cosine(start, start + states["attention"]), rel=1e-6
        )
        assert seen.summarise(RelativeUpdate("mlp"))["ratio"][block] == pytest.approx(
            length(start, start + states["mlp"]), rel=1e-6
        )


def test_sparsity_is_real_where_an_activation_cuts_off():
    """OPT's feed-forward part ends in a ReLU: about half of its activations are exactly 0, none of its output is."""
    loaded = adopt(other("opt"))
    needs = [NearZero(site, 1e-5, relative=False) for site in ("mlp-activation", "mlp")]
    seen = collect(loaded, [token_batch()], needs)
    inside, outside = (seen.summarise(need)["share"] for need in needs)
    assert ((inside > 0.2) & (inside < 0.8)).all()
    assert (outside < 0.01).all()


@pytest.mark.parametrize("name", ["mixtral", "mamba"])
def test_what_has_no_such_parts_is_refused_by_name(name):
    loaded = adopt(other(name))
    words = {"mixtral": r"Block 0 .*several experts \(`mlp.experts", "mamba": r"Block 0 .*no attention.*mixer"}
    with pytest.raises(UnsupportedArchitectureError, match=words[name]):
        collect(loaded, [token_batch(padded=False)], [Moments("mlp")])
    collect(loaded, [token_batch(padded=False)], [Moments("output")])


def test_padding_never_matters_inside_a_block():
    loaded = adopt(model_of("bert").double())
    token_ids, keep = token_batch()
    wider = (torch.nn.functional.pad(token_ids, (0, 5)), torch.nn.functional.pad(keep, (0, 5)))
    for site in SITES:
        one, more = (
            site_values(site, collect(loaded, [batch], site_needs(site)).summarise)
            for batch in ((token_ids, keep), wider)
        )
        for figure, values in one.items():
            assert more[figure] == pytest.approx(values, rel=1e-9), (site, figure)


def test_hooks_go_even_when_the_forward_raises(monkeypatch):
    loaded = adopt(model_of("llama"))
    before = hook_count(loaded.model)

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(loaded.stack.blocks[-1].mlp, "forward", fail)
    with pytest.raises(ZeroDivisionError):
        collect(loaded, [token_batch()], [Moments("mlp")])
    assert hook_count(loaded.model) == before


def test_site_names_are_checked():
    assert find_sites("all") == tuple(SITES)
    assert find_sites("mlp, attention,mlp") == ("mlp", "attention")
    with pytest.raises(ConfigError, match="Did you mean `attention`"):
        find_sites("atention")
    with pytest.raises(ConfigError, match="No site was named"):
        find_sites(" ,")


def test_scores_carry_the_sites_that_were_asked_for(tmp_path):
    model = build("LlamaForCausalLM", transformers.LlamaConfig(**TINY, num_key_value_heads=2))
    settings = {"tokenizer": word_tokenizer(), "samples": 3, "seq_len": 16, "criteria": "avss"}
    text = ["the cat sees the dog and the bird hears the fish ."] * 30
    table = avss.score(model, text, sites="attention,mlp-activation", **settings)
    assert [one.site for one in table.sites] == ["attention", "mlp-activation"]
    assert set(table.sites[0].values) - set(table.sites[1].values) == {"influence", "update_norm"}
    assert avss.score(model, text, **settings).sites == ()
    avss.composer.write_scores(table, tmp_path / "out", command="test")
    record = RunRecord.read(tmp_path / "out")
    assert record.sites == table.sites
    lines = (tmp_path / "out" / "sites.csv").read_text().splitlines()
    assert lines[0] == "block,site,variance,near_zero,below_1e-5,avss,influence,update_norm"
    assert lines[1].split(",")[:3] == ["0", "attention", repr(table.sites[0].values["variance"][0])]
    assert lines[3].endswith(",,")
    assert "Sub-layers" in (tmp_path / "out" / "report.html").read_text()
    assert json.loads(table.model_dump_json())["sites"][0]["title"] == "Attention output"
