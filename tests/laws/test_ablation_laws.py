"""Measured damage, over every architecture: running from the middle is running from the start, to the bit."""

import math

import numpy as np
import pytest
import torch

from avss.ablation import Judge, bytes_to_hold, leave_one_out, summarise, table_of
from avss.data.batches import Batches, content_hash
from avss.errors import NoObservationsError, UnsupportedArchitectureError
from avss.models.forward import run_outputs
from avss.models.load import adopt
from avss.models.shared_prefix import SharedPrefix, in_sharing_order
from avss.models.stack import bypassed
from avss.record import DataFacts
from tests.support.architectures import ARCHITECTURES, stored, token_batch
from tests.support.fakes import ANSWERS, CALLS, adding
from tests.support.oracles import hook_count, run, without_blocks

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)

HEADS = ("llama", "bert-masked", "distilbert-classifier", "bert", "bert-reward", "bert-labels", "t5")


def batches(token_ids, keep, batch_size):
    sequences = tuple(row[kept] for row, kept in zip(token_ids, keep, strict=True))
    facts = DataFacts(
        source="drawn",
        layout="padded",
        num_sequences=len(sequences),
        seq_len=token_ids.shape[1],
        num_tokens=int(keep.sum()),
        batch_size=batch_size,
        seed=0,
        content_hash=content_hash(sequences),
    )
    return Batches(sequences=sequences, batch_size=batch_size, pad_id=0, facts=facts)


@every_architecture
def test_a_shared_prefix_changes_no_bit(name):
    loaded = adopt(stored(name))
    token_ids, keep = token_batch()
    num = len(loaded.stack)
    sets = [(0,), (num - 1,), (1, 2), (0, num - 1), (2,), ()]
    shared = SharedPrefix(loaded, token_ids, keep)
    for removed in sets:  # in no helpful order: a state left over from another run would show
        with bypassed(loaded.stack, removed):
            expected = run_outputs(loaded, token_ids, keep)
        assert torch.equal(shared.without(removed), expected), removed
    assert all("forward" not in block.__dict__ for block in loaded.stack.blocks)


@every_architecture
def test_all_single_blocks_take_about_half_of_the_blocks(name):
    loaded = adopt(stored(name))
    num = len(loaded.stack)
    judge = Judge(loaded, batches(*token_batch(), batch_size=3))
    damages = leave_one_out(judge, num)
    assert [one.removed for one in damages] == [(block,) for block in range(num)]
    assert judge.num_blocks_run == num + num * (num - 1) // 2
    assert judge.num_blocks_naive == num + num * (num - 1)
    assert all(one.mean > 0 for one in damages)


def test_the_slow_way_gives_the_same_bits_and_runs_every_block():
    loaded = adopt(stored("llama"))
    num = len(loaded.stack)
    slow = Judge(loaded, batches(*token_batch(), batch_size=3), share=False)
    fast = Judge(loaded, batches(*token_batch(), batch_size=3))
    for one, other in zip(leave_one_out(slow, num), leave_one_out(fast, num), strict=True):
        assert list(one.distance) == list(other.distance)
        assert list(one.loss) == list(other.loss)
    assert slow.num_blocks_run == slow.num_blocks_naive == fast.num_blocks_naive


def test_the_order_of_sharing_is_a_walk_through_the_tree_of_prefixes():
    order = in_sharing_order([(1,), (0, 2), (2,), (0,), (1, 2), (2, 1)], num_blocks=3)
    assert [sorted(one) for one in order] == [[2], [1], [1, 2], [0], [0, 2]]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("call", CALLS)
def test_every_kind_of_block_can_be_left_out(answer, call):
    loaded, table, vectors = adding(answer=answer, call=call)
    token_ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    shared = SharedPrefix(loaded, token_ids, torch.ones_like(token_ids, dtype=torch.bool))
    for removed in [(1,), (0, 3), (2,)]:
        kept = sum(vector for index, vector in enumerate(vectors) if index not in removed)
        assert torch.allclose(shared.without(removed), table[token_ids] + kept)


@pytest.mark.parametrize("place", ["lm_head", "model.layers.3.mlp"])
def test_nothing_survives_a_forward_that_raises(monkeypatch, place):
    loaded = adopt(ARCHITECTURES["llama"]())
    token_ids, keep = token_batch()
    shared = SharedPrefix(loaded, token_ids, keep)
    hooks = hook_count(loaded.model)

    def fail(*args, **kwargs):
        raise ValueError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(loaded.model.get_submodule(place), "forward", fail)
        with pytest.raises(ValueError, match="no room"):
            shared.without((1,))
    assert all("forward" not in block.__dict__ for block in loaded.stack.blocks)
    assert hook_count(loaded.model) == hooks
    # Of the run that failed, only what it reached is a prefix of the next.
    for removed in [(1,), (2,)]:
        with bypassed(loaded.stack, removed):
            assert torch.equal(shared.without(removed), run_outputs(loaded, token_ids, keep))


def test_a_forward_of_somebody_else_is_put_back():
    loaded = adopt(ARCHITECTURES["llama"]())
    block = loaded.stack.blocks[0]
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)  # as accelerate dispatches
    theirs = block.forward
    SharedPrefix(loaded, *token_batch()).without((1,))
    assert block.forward is theirs


def test_a_stack_whose_blocks_run_twice_is_refused():
    loaded, _, _ = adding()
    model = loaded.model
    once = model.forward
    model.forward = lambda input_ids, attention_mask=None: (once(input_ids), once(input_ids))[0]
    with pytest.raises(UnsupportedArchitectureError, match="once each in order"):
        SharedPrefix(loaded, torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool))


# --- the numbers, against plain loops ---


def plain_distance(head, dense, other, row):
    """One sequence's distance without padding around it, in float64 and plain words."""
    if head == "bert":
        p, q = dense.double().mean(0), other.double().mean(0)
        return 1 - float(p @ q / (p.norm() * q.norm()))
    if head == "bert-reward":
        return float((dense.double() - other.double()) ** 2)
    if head == "bert-labels":
        chances = [(1 / (1 + math.exp(-d)), 1 / (1 + math.exp(-o))) for d, o in zip(dense, other, strict=True)]
        return sum(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)) for p, q in chances)
    p, q = dense.double().softmax(-1), other.double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


@pytest.mark.parametrize("name", HEADS)
def test_distance_and_loss_match_plain_loops(name):
    loaded = adopt(stored(name))
    token_ids, keep = token_batch(num_sequences=4)
    damages = leave_one_out(Judge(loaded, batches(token_ids, keep, batch_size=3)), len(loaded.stack))
    for block in (0, 2):
        smaller = without_blocks(loaded.model, loaded.stack.path, [block])
        for place, (row, kept) in enumerate(zip(token_ids, keep, strict=True)):
            ids = row[kept][None]
            dense, other = run(loaded.model, ids)[0], run(smaller, ids)[0]
            assert damages[block].distance[place] == pytest.approx(
                plain_distance(name, dense, other, row), rel=2e-3, abs=1e-6
            )
            if name == "llama":
                log_q = other.double().log_softmax(-1)
                expected = -log_q[torch.arange(len(ids[0]) - 1), ids[0, 1:]].mean()
                assert damages[block].loss[place] == pytest.approx(float(expected), rel=1e-5)
    assert (damages[0].loss is not None) == (name == "llama")


@pytest.mark.parametrize("name", HEADS)
def test_batch_size_does_not_matter(name):
    loaded = adopt(stored(name))
    token_ids, keep = token_batch(num_sequences=5)
    one = leave_one_out(Judge(loaded, batches(token_ids, keep, batch_size=1)), 3)
    five = leave_one_out(Judge(loaded, batches(token_ids, keep, batch_size=5)), 3)
    for first, second in zip(one, five, strict=True):
        assert first.distance == pytest.approx(second.distance, rel=1e-3, abs=1e-6)


def test_some_batches_of_all_and_any_order_of_sets():
    loaded = adopt(stored("llama"))
    judge = Judge(loaded, batches(*token_batch(num_sequences=6), batch_size=2))
    everything = judge.judge([(3,), (0, 1), ()])
    part = judge.judge([(0, 1), (3,)], batches=[2, 0])
    assert len(judge) == 3
    assert list(part[1].distance) == list(everything[0].distance[[4, 5, 0, 1]])
    assert list(part[0].loss) == list(everything[1].loss[[4, 5, 0, 1]])
    # Nothing removed: no distance, to the bit.
    assert list(everything[2].distance) == [0.0] * 6
    assert list(everything[2].loss) == list(everything[2].dense_loss)


@pytest.mark.parametrize("name", HEADS)
def test_a_judge_that_holds_all_runs_the_whole_model_once_a_batch(name):
    loaded = adopt(stored(name))
    data = batches(*token_batch(num_sequences=6), batch_size=2)
    fresh, holding = Judge(loaded, data), Judge(loaded, data, holds_all=True)
    calls = [([(1,), (2,)], [0, 1, 2]), ([(0, 2), (1, 2)], [2, 0]), ([(3,), ()], [1])]
    num = len(loaded.stack)
    for sets, chosen in calls:
        one, other = (judge.judge(sets, batches=chosen) for judge in (fresh, holding))
        for first, second in zip(one, other, strict=True):
            assert list(first.distance) == list(second.distance)
            assert (first.loss is None) == (second.loss is None)
            assert first.loss is None or list(first.loss) == list(second.loss)
    # The second and the third call ran the whole model again on three batches in all.
    assert fresh.num_blocks_run - holding.num_blocks_run == 3 * num
    assert fresh.num_blocks_naive - holding.num_blocks_naive == 3 * num
    assert bytes_to_hold(loaded, data) > data.facts.num_tokens * num


@every_architecture
def test_rewinding_forgets_what_ran_before(name):
    loaded = adopt(stored(name))
    shared = SharedPrefix(loaded, *token_batch())
    first = shared.without((1,))
    ran = shared.num_blocks_run
    shared.without((0,))
    shared.rewind()
    before = shared.num_blocks_run
    assert torch.equal(shared.without((1,)), first)
    assert shared.num_blocks_run - before == ran - len(loaded.stack)


def test_the_summary_is_of_paired_differences():
    loaded = adopt(stored("llama"))
    judge = Judge(loaded, batches(*token_batch(num_sequences=4), batch_size=2))
    (damage,) = judge.judge([(1, 2)])
    told = summarise(damage)
    difference = damage.loss - damage.dense_loss
    assert told.removed == (1, 2)
    assert told.distance == pytest.approx(np.mean(damage.distance), rel=1e-12)
    assert told.stderr == pytest.approx(np.std(damage.distance, ddof=1) / 2, rel=1e-12)
    assert told.loss_change == pytest.approx(np.mean(difference), rel=1e-12)
    assert told.loss_change_stderr == pytest.approx(np.std(difference, ddof=1) / 2, rel=1e-12)
    assert told.perplexity == pytest.approx(math.exp(np.mean(damage.loss)), rel=1e-12)


def test_the_table_ranks_blocks_by_what_they_cost():
    loaded = adopt(stored("llama"))
    data = batches(*token_batch(), batch_size=3)
    judge = Judge(loaded, data)
    damages = leave_one_out(judge, len(loaded.stack))
    table = table_of(judge, damages, model=loaded.facts(), data=data.facts)
    assert [table.values[block] for block in table.ranking()] == sorted(table.values)
    assert table.dense_perplexity == pytest.approx(math.exp(damages[0].dense_loss.mean()), rel=1e-12)
    assert [row["rank"] for row in table.rows()] == [table.ranking().index(block) for block in range(table.num_blocks)]
    assert type(table).model_validate_json(table.model_dump_json()) == table


def test_no_text_no_damage():
    loaded = adopt(stored("llama"))
    empty = batches(*token_batch(num_sequences=1), batch_size=1)
    with pytest.raises(NoObservationsError, match="no sequence"):
        Judge(loaded, Batches(sequences=(), batch_size=1, pad_id=0, facts=empty.facts))


@pytest.mark.parametrize("name", ["bert-reward", "bert-labels", "llama-reward"])
def test_heads_of_one_output_and_of_many_labels_tell_blocks_apart(name):
    judge = Judge(adopt(stored(name)), batches(*token_batch(num_sequences=4), batch_size=2))
    damages = leave_one_out(judge, 4)
    assert judge.measure == ("kl" if name == "bert-labels" else "squared")
    assert len({one.mean for one in damages}) == 4
    assert min(one.mean for one in damages) > 1e-6
    (nothing,) = judge.judge([()])
    assert list(nothing.distance) == [0.0] * 4
