"""What gradients and weights obey, against plain autograd on a copy of the model and numpy."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from avss.collect import collect, num_passes
from avss.criteria import CRITERIA
from avss.criteria.table import find_criteria
from avss.errors import ConfigError, NoObservationsError, UnsupportedArchitectureError
from avss.models.forward import run_outputs
from avss.models.gradients import watched_gradients
from avss.models.load import Loaded, adopt
from avss.models.loss import own_loss
from avss.models.sublayers import is_attention, weight_matrices
from avss.scoring import score_blocks
from avss.statistics import (
    STATISTICS,
    CosineSimilarity,
    GradientNorms,
    Moments,
    PublishedGradients,
    Rows,
    WeightNorms,
    WindowAngles,
)
from tests.support.architectures import BOS, EOS, HEADS, HIDDEN, PAD, POSITIONS, VOCAB, build, stored, token_batch
from tests.support.oracles import hook_count, state_copy
from tests.support.tokenizers import word_tokenizer

BACKWARD = (GradientNorms(), PublishedGradients())
HEADS_OF = ("llama", "gpt2", "gemma3", "bert-masked", "distilbert-classifier", "gpt2-classifier", "bert-tokens", "bert")


def test_every_statistic_of_gradients_and_weights_is_tested():
    assert {type(one) for one in (*BACKWARD, WeightNorms())} == {
        one for one in STATISTICS if one.probe in ("backward", "weights")
    }


def in_float64(name: str) -> Loaded:
    tokenizer = word_tokenizer() if name.endswith("masked") else None
    return adopt(copy.deepcopy(stored(name)).double(), tokenizer)


def batches_of(sizes: tuple[int, ...] = (3, 2)) -> list[tuple[Tensor, Tensor]]:
    return [token_batch(size, 12, seed=seed, padded=size > 2) for seed, size in enumerate(sizes)]


# --- the loss ---


def slow_loss(loaded: Loaded, token_ids: Tensor, keep: Tensor) -> tuple[Tensor, int]:
    """The loss from its definition: one target at a time."""
    model = loaded.model
    if loaded.head == "masked":
        chosen = torch.zeros_like(keep)
        for row in range(len(keep)):
            places = [place for place in range(keep.shape[1]) if keep[row, place]]
            chosen[row, places[3::7]] = True
        asked = torch.where(chosen, loaded.tokenizer.mask_token_id, token_ids)
        logits = model(input_ids=asked, attention_mask=keep.long()).logits
        terms = [-logits[r, p].log_softmax(-1)[token_ids[r, p]] for r, p in chosen.nonzero().tolist()]
        return torch.stack(terms).mean(), len(terms)
    outputs = model(input_ids=token_ids, attention_mask=keep.long())
    if loaded.head == "causal":
        places = [(r, p) for r, p in keep.nonzero().tolist() if p]
        terms = [-outputs.logits[r, p - 1].log_softmax(-1)[token_ids[r, p]] for r, p in places]
        return torch.stack(terms).mean(), len(terms)
    if "logits" in outputs and outputs.logits.dim() == 2:
        terms = [-row.log_softmax(-1).max() for row in outputs.logits]
        return torch.stack(terms).mean(), len(terms)
    if "logits" in outputs:
        terms = [-outputs.logits[r, p].log_softmax(-1).max() for r, p in keep.nonzero().tolist()]
        return torch.stack(terms).mean(), len(terms)
    directions = torch.randn(len(keep), HIDDEN, generator=torch.Generator().manual_seed(0))
    terms = []
    for hidden, real, direction in zip(outputs.last_hidden_state, keep, directions, strict=True):
        embedding = hidden[real].float().mean(0)
        terms.append(embedding @ direction / embedding.norm())
    return torch.stack(terms).mean(), len(terms)


@pytest.mark.parametrize("name", HEADS_OF)
def test_the_loss_is_what_it_says_for_every_head(name):
    loaded = in_float64(name)
    for token_ids, keep in batches_of():
        loss, targets = own_loss(loaded, token_ids, keep)
        expected, num = slow_loss(loaded, token_ids, keep)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
        assert int(targets) == num


def test_labels_asked_one_by_one_have_a_binary_loss():
    loaded = adopt(stored("bert-labels"))
    token_ids, keep = token_batch()
    loss, targets = own_loss(loaded, token_ids, keep)
    logits = run_outputs(loaded, token_ids, keep)
    # The likelier answer to each label, whichever it is: ln(1 + e^-|z|).
    assert float(loss.detach()) == pytest.approx(float(torch.log1p((-logits.double().abs()).exp()).mean()), rel=1e-5)
    assert int(targets) == 3


def test_a_regression_is_its_own_loss_and_a_missing_mask_token_leaves_the_text_alone():
    model = build("BertForSequenceClassification", transformers.BertConfig(**TINY_BERT, num_labels=1))
    token_ids, keep = token_batch()
    loss, targets = own_loss(adopt(model), token_ids, keep)
    assert int(targets) == 3
    with torch.no_grad():
        logits = model(input_ids=token_ids, attention_mask=keep.long()).logits
    assert loss.item() == pytest.approx(logits.mean().item())
    masked = adopt(copy.deepcopy(stored("bert-masked")))
    loss, targets = own_loss(masked, token_ids, keep)
    logits = masked.model(input_ids=token_ids, attention_mask=keep.long()).logits
    places = [(row, place) for row in range(3) for place in (3, 10) if keep[row, place]]
    terms = [-logits[r, p].log_softmax(-1)[token_ids[r, p]].item() for r, p in places]
    assert int(targets) == len(terms)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)


# --- the numbers ---


def slow_norms(loaded: Loaded, batches: list[tuple[Tensor, Tensor]]) -> list[list[dict[str, Any]]]:
    """Per batch and block: plain autograd on a copy, summed by numpy."""
    found = []
    for token_ids, keep in batches:
        copied = Loaded(copy.deepcopy(loaded.model), loaded.tokenizer, loaded.head, "copy")
        loss, targets = own_loss(copied, token_ids, keep)
        loss.backward()
        numbers = []
        for block in copied.stack.blocks:
            pairs = [
                (weight.detach().double().numpy(), weight.grad.double().numpy())
                for weight in block.parameters()
                if weight.dim() > 1
            ]
            numbers.append(
                {
                    "targets": int(targets),
                    "l1": sum(np.abs(grad).sum() for _, grad in pairs),
                    "l2": np.sqrt(sum((grad**2).sum() for _, grad in pairs)),
                    "l2_each": sum(np.sqrt((grad**2).sum()) for _, grad in pairs),
                    "taylor": sum(np.abs(weight * grad).sum() for weight, grad in pairs),
                }
            )
        found.append(numbers)
    return found


@pytest.mark.parametrize("name", HEADS_OF)
def test_gradient_norms_equal_plain_autograd(name):
    loaded, batches = in_float64(name), batches_of()
    seen = collect(loaded, batches, BACKWARD)
    slow = slow_norms(loaded, batches)
    weights = np.array([batch[0]["targets"] for batch in slow], dtype=float)
    summary = seen.summarise(GradientNorms())
    for field in ("l1", "l2", "taylor"):
        expected = np.array([[block[field] for block in batch] for batch in slow])
        assert summary[field] == pytest.approx(weights @ expected / weights.sum(), rel=1e-6), field
        assert expected.min() > 0
    published = seen.summarise(PublishedGradients())
    for field, source in (("l1", "l1"), ("l2", "l2_each")):
        expected = np.array([[block[source] for block in batch] for batch in slow])
        assert published[field] == pytest.approx(expected.mean(0), rel=1e-6), field
    assert all(rows.num_sequences == 2 for one in BACKWARD for rows in seen.rows[one])  # a row a batch


def test_taylor_in_one_batch_is_the_accumulated_gradient_of_the_paper():
    loaded, (token_ids, keep) = in_float64("llama"), token_batch(4, padded=False)
    copied = copy.deepcopy(loaded.model)
    for row in token_ids:  # accumulated sequence by sequence, all of one length
        (copied(input_ids=row[None], labels=row[None]).loss / 4).backward()
    expected = [
        sum(float((w.detach() * w.grad).abs().sum()) for w in block.parameters() if w.dim() > 1)
        for block in copied.model.layers
    ]
    (scores,) = score_blocks(collect(loaded, [(token_ids, keep)], [GradientNorms()]), (CRITERIA["taylor"],))
    assert scores.values == pytest.approx(expected, rel=1e-9)


def test_weight_norms_equal_numpy_and_need_no_pass():
    loaded, (token_ids, keep) = adopt(copy.deepcopy(stored("gpt2"))), token_batch()
    loaded.model.forward = None  # it must not run
    summary = collect(loaded, [(token_ids, keep)], [WeightNorms()]).summarise(WeightNorms())
    for index, block in enumerate(loaded.stack.blocks):
        flat = np.concatenate([w.detach().double().numpy().ravel() for w in block.parameters() if w.dim() > 1])
        assert summary["l1"][index] == pytest.approx(np.abs(flat).sum(), rel=1e-9)
        assert summary["l2"][index] == pytest.approx(np.linalg.norm(flat), rel=1e-9)


def test_half_precision_gradients_are_summed_wide():
    model = copy.deepcopy(stored("llama")).bfloat16()
    loaded, batches = adopt(model), [token_batch()]
    assert collect(loaded, batches, [GradientNorms()]).summarise(GradientNorms())["l1"] == pytest.approx(
        [block["l1"] for block in slow_norms(loaded, batches)[0]], rel=1e-6
    )


@pytest.mark.parametrize("name", HEADS_OF)
def test_padding_never_matters_to_gradients(name):
    loaded = in_float64(name)
    token_ids, keep = token_batch()
    wider = (torch.nn.functional.pad(token_ids, (0, 7)), torch.nn.functional.pad(keep, (0, 7)))
    one, other = (
        collect(loaded, [batch], [GradientNorms()]).summarise(GradientNorms()) for batch in ((token_ids, keep), wider)
    )
    for field, values in one.items():
        assert other[field] == pytest.approx(values, rel=1e-6), field


def test_gradients_come_without_a_first_token_part():
    (scores,) = score_blocks(collect(in_float64("llama"), batches_of(), [GradientNorms()]), (CRITERIA["taylor"],))
    assert scores.without_first_token is None


# --- one pass, bounded memory, nothing left behind ---


def test_all_gradient_criteria_take_one_more_pass_and_all_others_one():
    loaded, batches = in_float64("llama"), batches_of()
    calls: list[str] = []
    loaded.model.register_forward_hook(lambda *_: calls.append("whole"))
    loaded.model.model.register_forward_hook(lambda *_: calls.append("body"))
    done: list[int] = []
    needs = [need for criterion in find_criteria("all") for need in criterion.needs]
    collect(loaded, batches, needs, on_batch=lambda: done.append(1))
    assert (calls.count("body"), calls.count("whole")) == (4, 2)  # the head runs in the backward pass only
    assert len(done) == len(batches) * num_passes(needs) == 4
    assert num_passes([Moments(), WindowAngles()]) == num_passes([GradientNorms()]) == num_passes([WeightNorms()]) == 1


def test_batches_that_can_be_read_once_serve_both_passes():
    seen = collect(in_float64("llama"), iter(batches_of()), [Moments(), GradientNorms()])
    assert seen.rows[Moments()][0].num_sequences == 5
    assert seen.rows[GradientNorms()][0].num_sequences == 2


def test_one_gradient_is_held_at_a_time():
    loaded, (token_ids, keep) = in_float64("llama"), token_batch()
    others: list[int] = []

    def look(_index: int, _path: str, _weight: Tensor, _gradient: Tensor) -> None:
        others.append(sum(parameter.grad is not None for parameter in loaded.model.parameters()))

    with watched_gradients(loaded, [weight_matrices(block) for block in loaded.stack.blocks], look):
        own_loss(loaded, token_ids, keep)[0].backward()
    assert len(others) == sum(len(weight_matrices(block)) for block in loaded.stack.blocks)
    assert set(others) == {0}


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails, monkeypatch):
    loaded = in_float64("distilbert-classifier")
    parameters = list(loaded.model.parameters())
    parameters[3].requires_grad_(False)
    parameters[5].grad = torch.ones_like(parameters[5])
    before, asked = state_copy(loaded.model), [parameter.requires_grad for parameter in parameters]
    hooks = hook_count(loaded.model)
    if fails:
        monkeypatch.setattr(loaded.model.distilbert, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            collect(loaded, batches_of(), [GradientNorms()])
    else:
        with torch.no_grad():  # whatever the caller's mode is
            collect(loaded, batches_of(), [GradientNorms(), CosineSimilarity()])
    assert [parameter.requires_grad for parameter in parameters] == asked
    assert torch.equal(parameters[5].grad, torch.ones_like(parameters[5]))
    assert sum(parameter.grad is not None for parameter in parameters) == 1
    assert all(not parameter._post_accumulate_grad_hooks for parameter in parameters)
    assert hook_count(loaded.model) == hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())


def test_texts_with_nothing_to_predict_are_an_error():
    one_token = (torch.tensor([[7], [8]]), torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(NoObservationsError, match="anything to predict"):
        collect(in_float64("llama"), [one_token], [GradientNorms()])
    # A batch without a target adds nothing to one that has some.
    both = collect(in_float64("llama"), [one_token, token_batch()], [GradientNorms()])
    alone = collect(in_float64("llama"), [token_batch()], [GradientNorms()])
    assert both.summarise(GradientNorms())["l1"] == pytest.approx(alone.summarise(GradientNorms())["l1"])


def test_a_quantised_matrix_is_refused_by_name():
    loaded = in_float64("llama")
    weight = loaded.stack.blocks[1].mlp.up_proj.weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.int8)
    with pytest.raises(UnsupportedArchitectureError, match=r"`mlp.up_proj.weight` is stored as torch.int8"):
        collect(loaded, [token_batch()], [GradientNorms()])


@pytest.mark.parametrize("statistic", [*BACKWARD, WeightNorms()], ids=str)
def test_merge_is_associative_and_nothing_seen_is_an_error(statistic):
    loaded = in_float64("llama")
    parts = [collect(loaded, [batch], [statistic]).rows[statistic][0] for batch in batches_of((2, 3, 1))]
    left = Rows.merge([Rows.merge(parts[:2]), parts[2]])
    right = Rows.merge([parts[0], Rows.merge(parts[1:])])
    assert statistic.summarise(left, first_token=True) == statistic.summarise(right, first_token=True)
    backwards = statistic.summarise(Rows.merge(parts[::-1]), first_token=True)
    assert backwards == pytest.approx(statistic.summarise(left, first_token=True), rel=1e-12)
    with pytest.raises(NoObservationsError):
        statistic.summarise(Rows.empty(), first_token=True)


def test_a_block_that_does_nothing_has_no_taylor_score():
    loaded = in_float64("llama")
    with torch.no_grad():
        loaded.stack.blocks[2].self_attn.o_proj.weight.zero_()
        loaded.stack.blocks[2].mlp.down_proj.weight.zero_()
    (scores,) = score_blocks(collect(loaded, batches_of(), [GradientNorms()]), (CRITERIA["taylor"],))
    assert scores.ranking()[0] == 2
    assert scores.values[2] == 0


# --- which weights ---

TINY = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
}
TINY_BERT = TINY | {"max_position_embeddings": POSITIONS, "pad_token_id": PAD}

OTHERS = {
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TINY),
    "opt": ("OPTForCausalLM", "OPTConfig", TINY | {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN}),
    "bloom": ("BloomForCausalLM", "BloomConfig", TINY | {"n_layer": 2, "n_head": HEADS}),
    "falcon": ("FalconForCausalLM", "FalconConfig", TINY),
    "phi": ("PhiForCausalLM", "PhiConfig", TINY),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", TINY | {"num_key_value_heads": 2, "num_local_experts": 2}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2}),
}


def other(name: str) -> Any:
    model_class, config_class, settings = OTHERS[name]
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return build(model_class, getattr(transformers, config_class)(**settings, **ids))


FFN = {
    "bert": {"intermediate.dense", "output.dense"},
    "roberta": {"intermediate.dense", "output.dense"},
    "distilbert": {"ffn.lin1", "ffn.lin2"},
    "gpt2": {"mlp.c_fc", "mlp.c_proj"},
    "llama": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "phi3": {"mlp.gate_up_proj", "mlp.down_proj"},
    "stablelm": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "neox": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "opt": {"fc1", "fc2"},
    "bloom": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "falcon": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "phi": {"mlp.fc1", "mlp.fc2"},
}


@pytest.mark.parametrize("name", FFN)
def test_feed_forward_and_attention_matrices_are_told_apart(name):
    block = adopt(other(name) if name in OTHERS else stored(name)).stack.blocks[1]
    ffn, attention, every = (weight_matrices(block, choice) for choice in ("ffn", "attention", "all"))
    assert {path.removesuffix(".weight") for path in ffn} == FFN[name]
    assert attention
    assert all("att" in path for path in attention)
    assert {**ffn, **attention}.keys() == every.keys()
    assert all(weight.dim() == 2 for weight in every.values())


def test_experts_count_as_feed_forward_with_their_router():
    paths = set(weight_matrices(adopt(other("mixtral")).stack.blocks[0], "ffn"))
    assert any("experts" in path for path in paths)
    assert not any(is_attention(path) for path in paths)


def test_a_part_that_is_not_there_is_refused_with_what_is():
    block = adopt(other("mamba")).stack.blocks[0]
    with pytest.raises(UnsupportedArchitectureError, match=r"no weight matrix for `attention`. It has: `mixer.*Choose"):
        weight_matrices(block, "attention")
    with pytest.raises(ConfigError, match="Did you mean `ffn`"):
        weight_matrices(block, "fnn")
