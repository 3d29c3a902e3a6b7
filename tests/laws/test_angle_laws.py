"""The triangle of angles across runs of blocks, against every hidden state of a plain forward pass."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tools.sweep.shrink import small_model

from avss.collect import collect
from avss.config import PlanConfig
from avss.criteria.table import find_criteria
from avss.models.load import adopt
from avss.plan import make_plan
from avss.reporting.block_charts import windows_chart
from avss.scoring import score_blocks
from avss.statistics import CosineSimilarity, WindowAngles
from avss.statistics.observation import Passage
from tests.support.architectures import stored, token_batch
from tests.support.fakes import adding
from tests.support.observations import angle

BATCHES = [token_batch(3, 12, seed=1), token_batch(2, 9, seed=2, padded=False)]


def states_of(model: Any, path: str) -> list[list[torch.Tensor]]:
    """Per batch, the input of every block and the output of the last, by plain hooks."""
    blocks, found = model.get_submodule(path), []
    for token_ids, keep in BATCHES:
        states: list[torch.Tensor] = []
        handles = [
            block.register_forward_hook(lambda _m, args, out, into=states: into.extend((args[0].clone(), out.clone())))
            for block in blocks
        ]
        with torch.no_grad():
            model(input_ids=token_ids, attention_mask=keep.long())
        for handle in handles:
            handle.remove()
        found.append([states[0], *states[1::2]])
    return found


def slow_triangle(recorded: list[list[torch.Tensor]], token: str) -> dict[tuple[int, int], float]:
    """d(l, n) for every run, token by token."""
    num_states = len(recorded[0])
    found = {}
    for start, stop in itertools.combinations(range(num_states), 2):
        angles = []
        for states, (_, keep) in zip(recorded, BATCHES, strict=True):
            for row in range(len(keep)):
                places = keep[row].nonzero().flatten().tolist()
                for place in places[-1:] if token == "last" else places:
                    angles.append(angle(states[start][row, place].numpy(), states[stop][row, place].numpy()))
        found[start, stop - start] = float(np.mean(angles))
    return found


@pytest.mark.parametrize("token", ["last", "all"])
@pytest.mark.parametrize(("name", "path"), [("llama", "model.layers"), ("bert", "encoder.layer")])
def test_every_run_equals_its_definition(name, path, token):
    model = copy.deepcopy(stored(name)).double()
    expected = slow_triangle(states_of(model, path), token)
    criterion = f"angular{'-all' if token == 'all' else ''}"
    (scores,) = score_blocks(collect(adopt(model), BATCHES, [WindowAngles(token)]), find_criteria(criterion))
    num_blocks = scores.num_blocks
    assert [len(row) for row in scores.windows] == list(range(num_blocks, 0, -1))
    for (start, length), value in expected.items():
        assert scores.windows[length - 1][start] == pytest.approx(value, abs=1e-7), (start, length)
    assert scores.values == scores.windows[0]


def test_a_run_holds_the_blocks_it_names():
    """Blocks add known vectors: the run [l, l + n) turns by what blocks l to l + n - 1 add, no more and no less."""
    loaded, table, vectors = adding(num_blocks=4)
    token_ids = torch.tensor([[1, 2, 3]])
    seen = collect(loaded, [(token_ids, torch.ones(1, 3, dtype=torch.bool))], [WindowAngles("last")])
    windows = score_blocks(seen, find_criteria("angular"))[0].windows
    start = table[3]
    for block in range(4):
        for length in range(1, 5 - block):
            before = start + sum(vectors[:block], torch.zeros(6))
            after = before + sum(vectors[block : block + length], torch.zeros(6))
            assert windows[length - 1][block] == pytest.approx(angle(before.numpy(), after.numpy()), abs=1e-7)


def test_one_block_agrees_with_its_cosine_where_all_tokens_turn_alike():
    loaded, _, _ = adding(num_blocks=3)
    one_token = [(torch.tensor([[4]]), torch.ones(1, 1, dtype=torch.bool))]
    seen = collect(loaded, one_token, [WindowAngles("all"), CosineSimilarity()])
    cosine = seen.summarise(CosineSimilarity())["cosine"]
    assert seen.summarise(WindowAngles("all"))["window_1"] == pytest.approx(np.arccos(cosine) / np.pi, abs=1e-6)


def test_a_contiguous_plan_takes_the_run_with_the_smallest_distance():
    model = copy.deepcopy(stored("llama")).double()
    (scores,) = score_blocks(collect(adopt(model), BATCHES, [WindowAngles("last")]), find_criteria("angular"))
    expected = slow_triangle(states_of(model, "model.layers"), "last")
    for length in range(1, scores.num_blocks):
        best = min(range(scores.num_blocks - length + 1), key=lambda start, n=length: expected[start, n])
        plan = make_plan(scores, PlanConfig(count=length, contiguous=True), protects_ends=False)
        assert plan.removed == tuple(range(best, best + length))


@pytest.mark.parametrize("length", [10, 100])
@pytest.mark.parametrize("stride", [1, 3, 4, 7, 40])
def test_memory_is_bounded_by_taking_every_kth_token(monkeypatch, stride, length):
    """And only real ones count, whatever the stride: the second sequence is padded with nan on the left."""
    wanted = 2 * length * 4 * 4 * 3
    monkeypatch.setattr(Passage, "MOST_BYTES", -(-wanted // stride))
    generator = torch.Generator().manual_seed(0)
    keep = torch.ones(2, length, dtype=torch.bool)
    keep[1, : length // 3] = False
    states = [torch.randn((2, length, 4), generator=generator) for _ in range(3)]
    for state in states:
        state[1, : length // 3] = torch.nan
    passage = Passage(2, "all")
    for index in range(2):
        passage.record(index, states[index], states[index + 1], keep)
    taken = -(-wanted // -(-wanted // stride))
    places = [(row, place) for row in range(2) for place in range(0, length, taken) if keep[row, place]]
    expected = [angle(states[0][place].numpy(), states[2][place].numpy()) for place in places]
    seen = passage.windows_from(0)
    assert seen.tokens.sum().item() == len(expected)
    assert seen.angles[:, :, 1].sum().item() == pytest.approx(sum(expected))


@pytest.mark.parametrize(("class_name", "model_type"), [("LongformerModel", "longformer"), ("LEDModel", "led")])
def test_models_that_lengthen_a_batch_have_angles_of_their_real_tokens(class_name, model_type):
    loaded = adopt(small_model(getattr(transformers, class_name), model_type))
    text = torch.randint(8, 50, (3, 10), generator=torch.Generator().manual_seed(1))
    alone = collect(loaded, [(text, torch.ones_like(text, dtype=torch.bool))], [WindowAngles("all")])
    padded = torch.nn.functional.pad(text, (0, 3), value=loaded.pad_id)
    keep = torch.nn.functional.pad(torch.ones_like(text, dtype=torch.bool), (0, 3))
    longer = collect(loaded, [(padded, keep)], [WindowAngles("all")])
    for name, values in alone.summarise(WindowAngles("all")).items():
        assert longer.summarise(WindowAngles("all"))[name] == pytest.approx(values, abs=1e-4, nan_ok=True)


def test_chunks_of_tokens_change_nothing(monkeypatch):
    loaded = adopt(copy.deepcopy(stored("llama")).double())
    whole = collect(loaded, BATCHES, [WindowAngles("all")]).summarise(WindowAngles("all"))
    monkeypatch.setattr(Passage, "_CHUNK_BYTES", 1)
    for name, values in collect(loaded, BATCHES, [WindowAngles("all")]).summarise(WindowAngles("all")).items():
        assert values == pytest.approx(whole[name], abs=1e-12, nan_ok=True)


def test_the_heat_map_shows_every_run_and_marks_the_smallest_of_each_length():
    model = copy.deepcopy(stored("llama"))
    (scores,) = score_blocks(collect(adopt(model), BATCHES, [WindowAngles("last")]), find_criteria("angular"))
    chart = windows_chart(scores).to_dict()
    rows = next(iter(chart["datasets"].values()))
    assert len(rows) == 5 * 6 / 2
    assert {(row["start"], row["length"]) for row in rows} == {(s, n) for n in range(1, 6) for s in range(6 - n)}
    for length in range(1, 6):
        values = scores.windows[length - 1]
        best = [row["start"] for row in rows if row["length"] == length and row["best"]]
        assert best == [min(range(len(values)), key=values.__getitem__)]
        assert [row["distance"] for row in rows if row["length"] == length] == list(values)
