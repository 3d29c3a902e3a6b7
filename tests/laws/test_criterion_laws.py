"""What every criterion obeys, on made-up evidence and on real passes through tiny models."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from avss.collect import collect
from avss.criteria import CRITERIA, AbstractCriterion, Evidence
from avss.criteria.table import find_criteria
from avss.data.batches import pad
from avss.errors import ConfigError, DegenerateStatisticError, NoObservationsError
from avss.models.load import Loaded, adopt
from avss.scoring import score_blocks
from avss.statistics import (
    AbstractStatistic,
    CosineSimilarity,
    GradientNorms,
    Moments,
    NearZero,
    PublishedAverages,
    RelativeUpdate,
    RelativeVariance,
    Rows,
    Unchanged,
    WeightNorms,
    WindowAngles,
)
from avss.statistics.collected import Collected
from avss.statistics.observation import Passage
from tests.support.architectures import VOCAB, stored
from tests.support.fakes import adding
from tests.support.observations import Batch, observe, oracle, random_batch

POSITIONAL = ("first", "last", "random")
"""Baselines: they score places, not blocks."""

READING = tuple(name for name in CRITERIA if name not in POSITIONAL)
MASKED = tuple(name for name in READING if all(need.has_first_token for need in CRITERIA[name].needs))
"""Those that read the states of real tokens."""

every_criterion = pytest.mark.parametrize("name", CRITERIA)
every_reading_criterion = pytest.mark.parametrize("name", READING)

NUM_BLOCKS = 6
FIELDS: dict[type[AbstractStatistic], tuple[str, ...]] = {
    CosineSimilarity: ("cosine",),
    GradientNorms: ("l1", "l2", "taylor"),
    Moments: ("count", "mean", "variance"),
    NearZero: ("below", "count", "share", "smoothed_share"),
    PublishedAverages: ("variance", "sparsity", "below", "count"),
    RelativeUpdate: ("ratio",),
    RelativeVariance: ("ratio",),
    Unchanged: ("below", "count", "share", "smoothed_share"),
    WeightNorms: ("l1", "l2"),
    WindowAngles: tuple(f"window_{length}" for length in range(1, NUM_BLOCKS + 1)),
}


def made_up(criterion: AbstractCriterion, seed: int = 0, num_blocks: int = NUM_BLOCKS) -> dict[Any, dict[str, Any]]:
    """Plausible summaries: every field drawn from (0, 1)."""
    rng = np.random.default_rng(seed)
    return {
        need: {field: rng.uniform(0.01, 0.99, num_blocks) for field in FIELDS[type(need)]} for need in criterion.needs
    }


def evidence(summaries: Mapping[Any, Any], num_blocks: int = NUM_BLOCKS, seed: int = 0) -> Evidence:
    return Evidence(num_blocks=num_blocks, summaries=summaries, seed=seed)


class Watched(Mapping[Any, Any]):
    """Hands out only what was declared, and has no other way in."""

    def __init__(self, summaries: Mapping[Any, Any]) -> None:
        self._summaries = summaries
        self.read: set[Any] = set()

    def __getitem__(self, key: Any) -> Any:
        if key not in self._summaries:
            raise AssertionError(f"{key} was read but not declared in `needs`")
        self.read.add(key)
        return self._summaries[key]

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the evidence was searched")

    def __len__(self) -> int:
        raise AssertionError("the evidence was measured")


FORMULAS: dict[str, Callable[[Mapping[Any, Mapping[str, Any]]], Any]] = {
    "angular": lambda s: s[WindowAngles("last")]["window_1"],
    "angular-all": lambda s: s[WindowAngles("all")]["window_1"],
    "avss": lambda s: s[RelativeVariance()]["ratio"] / s[Unchanged(0.03)]["smoothed_share"],
    "avss-paper": lambda s: s[Moments("output")]["variance"] / s[NearZero("output", 0.01)]["smoothed_share"],
    "avss-product": lambda s: (
        s[Moments("output")]["variance"]
        / s[Moments("output")]["variance"].sum()
        * (s[NearZero("output", 0.01)]["smoothed_share"] / s[NearZero("output", 0.01)]["smoothed_share"].sum())
    ),
    "avss-reference": lambda s: s[PublishedAverages()]["variance"] / s[PublishedAverages()]["sparsity"],
    "block-influence": lambda s: 1 - s[CosineSimilarity()]["cosine"],
    "gradient-l1": lambda s: s[GradientNorms()]["l1"],
    "gradient-l2": lambda s: s[GradientNorms()]["l2"],
    "magnitude": lambda s: s[WeightNorms()]["l1"],
    "magnitude-l2": lambda s: s[WeightNorms()]["l2"],
    "sparsity": lambda s: 1 - s[NearZero("output", 0.01)]["share"],
    "taylor": lambda s: s[GradientNorms()]["taylor"],
    "update-norm": lambda s: s[RelativeUpdate()]["ratio"],
    "variance": lambda s: s[Moments("output")]["variance"],
}
"""Each criterion's definition, by hand."""


# --- on paper ---


@every_criterion
def test_is_described(name):
    criterion = CRITERIA[name]
    assert criterion.name == name
    assert criterion.title
    assert type(criterion).__doc__
    assert not type(criterion).__doc__.startswith(f"{type(criterion).__name__}(")  # what a dataclass writes itself
    if name in POSITIONAL:
        assert criterion.needs == ()
        assert criterion.paper is criterion.reference_url is None
    else:
        assert criterion.needs
        assert criterion.paper
        assert criterion.reference_url.startswith("https://arxiv.org/abs/")


@every_reading_criterion
def test_equals_its_formula(name):
    summaries = made_up(CRITERIA[name])
    assert CRITERIA[name].score(evidence(summaries)).values == pytest.approx(FORMULAS[name](summaries), rel=1e-12)


@every_criterion
def test_reads_all_that_it_declares_and_nothing_else(name):
    criterion = CRITERIA[name]
    watched = Watched(made_up(criterion))
    criterion.score(evidence(watched))
    assert watched.read == set(criterion.needs)


def test_the_watch_notices_what_was_not_declared():
    with pytest.raises(AssertionError, match="not declared"):
        CRITERIA["avss"].score(evidence(Watched(made_up(CRITERIA["variance"]))))


@every_criterion
def test_is_deterministic_and_leaves_its_evidence_alone(name):
    criterion, summaries = CRITERIA[name], made_up(CRITERIA[name])
    before = copy.deepcopy(summaries)
    one, other = criterion.score(evidence(summaries, seed=7)), criterion.score(evidence(summaries, seed=7))
    assert np.array_equal(one.values, other.values)
    assert one.values.shape == (NUM_BLOCKS,)
    assert all(values.shape == (NUM_BLOCKS,) for values in one.factors.values())
    for need, fields in before.items():
        assert all(np.array_equal(summaries[need][field], values) for field, values in fields.items())


@every_reading_criterion
@given(order=st.permutations(range(NUM_BLOCKS)), seed=st.integers(0, 99))
def test_permuting_blocks_permutes_scores(name, order, seed):
    criterion, summaries = CRITERIA[name], made_up(CRITERIA[name], seed)
    permuted = {need: {f: values[list(order)] for f, values in fields.items()} for need, fields in summaries.items()}
    straight, other = criterion.score(evidence(summaries)), criterion.score(evidence(permuted))
    assert other.values == pytest.approx(straight.values[list(order)], rel=1e-12)
    for factor, values in straight.factors.items():
        assert other.factors[factor] == pytest.approx(values[list(order)], rel=1e-12)


def test_baselines_score_places():
    none = evidence({}, num_blocks=4)
    assert CRITERIA["first"].score(none).values.tolist() == [0, 1, 2, 3]
    assert CRITERIA["last"].score(none).values.tolist() == [3, 2, 1, 0]
    draws = {tuple(CRITERIA["random"].score(evidence({}, num_blocks=8, seed=seed)).values) for seed in range(5)}
    assert len(draws) == 5
    assert all(len(set(draw)) == 8 and min(draw) >= 0 and max(draw) < 1 for draw in draws)


class Summaries(Collected):
    """Made-up summaries in the place of collected rows."""

    def summarise(self, statistic: AbstractStatistic, **_: Any) -> Any:
        return self.rows[statistic]


@every_reading_criterion
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_scores_are_finite_or_refused_by_name(name, bad):
    criterion = CRITERIA[name]
    for need in criterion.needs:
        for field in FIELDS[type(need)]:
            summaries: Any = made_up(criterion)
            summaries[need][field][2] = bad
            refused = pytest.raises(DegenerateStatisticError, match=f"`{name}` is")
            used = not np.array_equal(FORMULAS[name](summaries), FORMULAS[name](made_up(criterion)))
            with refused if used and bad != 0 else contextlib.suppress(DegenerateStatisticError):
                (scores,) = score_blocks(Summaries(NUM_BLOCKS, summaries), (criterion,))
                assert np.isfinite(scores.values).all(), (need, field)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_model_with_a_damaged_weight_is_refused(name):
    """nan sorts anywhere: a ranking with one in it would be an accident."""
    model = copy.deepcopy(stored("llama"))
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(torch.nan)
    seen = collect(adopt(model), in_batches(ragged_sequences(), 3), CRITERIA[name].needs)
    with pytest.raises(DegenerateStatisticError, match=r"blocks? 2\b"):
        score_blocks(seen, (CRITERIA[name],))


@pytest.mark.parametrize("name", ["avss", "avss-paper", "avss-reference"])
def test_refusal_names_the_blocks_at_fault(name):
    summaries = made_up(CRITERIA[name])
    denominator = CRITERIA[name].needs[-1]
    field = "sparsity" if isinstance(denominator, PublishedAverages) else "smoothed_share"
    summaries[denominator][field][[1, 4]] = 0
    with pytest.raises(DegenerateStatisticError, match=rf"`{name}` is undefined for blocks 1, 4: .* by 0"):
        CRITERIA[name].score(evidence(summaries))


def test_find_criteria_takes_names_lists_and_all():
    assert [c.name for c in find_criteria("block-influence, avss")] == ["block-influence", "avss"]
    assert [c.name for c in find_criteria(["avss", "avss"])] == ["avss"]
    assert [c.name for c in find_criteria("all")] == list(CRITERIA)
    with pytest.raises(ConfigError, match="Did you mean `block-influence`"):
        find_criteria("blok-influence")
    for nothing in ("", " , ", []):
        with pytest.raises(ConfigError, match="No criterion was named"):
            find_criteria(nothing)


# --- on collected rows ---


def passed_by(need: WindowAngles, batches: list[Batch]) -> tuple[Rows, ...]:
    """The angles across all runs of a chain of blocks."""
    passage = Passage(len(batches), need.token)
    for index, batch in enumerate(batches):
        passage.record(index, batch.before, batch.after, batch.keep)
    seen = [need.observe(passage.windows_from(index)) for index in range(len(batches))]
    return tuple(Rows({name: column.numpy() for name, column in columns.items()}) for columns in seen)


def chain(updates: list[Tensor], keep: Tensor, start: Tensor) -> tuple[Collected, list[Batch]]:
    """Blocks that add known updates, one after the other, seen by every statistic of every masked criterion."""
    batches, hidden = [], start
    for update in updates:
        batches.append(Batch(hidden, hidden + update, keep))
        hidden = hidden + update
    needs = {need for name in READING for need in CRITERIA[name].needs}
    rows = {need: tuple(observe(need, [batch]) for batch in batches) for need in needs if need.probe == "block"}
    rows |= {need: passed_by(need, batches) for need in needs if isinstance(need, WindowAngles)}
    draw = np.random.default_rng(0)
    for need in needs - rows.keys():  # gradients and weights: any number will do
        names = ("targets", *FIELDS[type(need)])
        rows[need] = tuple(Rows({name: draw.uniform(1, 2, 3) for name in names}) for _ in batches)
    return Collected(num_blocks=len(updates), rows=rows), batches


@pytest.fixture(scope="module")
def collected() -> Collected:
    start = random_batch((6, 4, 5), width=16)
    silent = torch.ones(16).index_fill(0, torch.tensor([3]), 0)  # a hidden unit below every threshold
    updates = [random_batch((6, 4, 5), width=16, seed=10 + block).before * silent for block in range(NUM_BLOCKS)]
    return chain(updates, start.keep, start.before * silent)[0]


@pytest.mark.parametrize("idle", range(NUM_BLOCKS))
@pytest.mark.parametrize("name", ["block-influence", "update-norm", "avss", "angular", "angular-all"])
def test_a_block_that_does_nothing_is_least_important(name, idle):
    start = random_batch((6, 4, 5), width=16)
    updates = [random_batch((6, 4, 5), width=16, seed=10 + block).before * 0.01 for block in range(NUM_BLOCKS)]
    updates[idle] = torch.zeros_like(updates[idle])
    (scores,) = score_blocks(chain(updates, start.keep, start.before)[0], (CRITERIA[name],))
    assert scores.ranking()[0] == idle
    # The inverse cosine of the last bit is an angle of 1e-8.
    assert scores.values[idle] == pytest.approx(0, abs=1e-7 if name.startswith("angular") else 1e-9)
    assert sorted(scores.values)[1] > 1e-6


@pytest.mark.parametrize("name", MASKED)
def test_scores_come_with_and_without_the_first_token(name, collected):
    criterion = CRITERIA[name]
    (with_it,) = score_blocks(collected, (criterion,))
    (without,) = score_blocks(collected, (criterion,), first_token=False)
    summaries = {need: collected.summarise(need, first_token=False) for need in criterion.needs}
    expected = criterion.score(evidence(summaries)).values
    assert with_it.without_first_token == without.values == without.without_first_token == tuple(expected)
    if name != "angular":  # it reads the last token
        assert with_it.values != without.values


@pytest.mark.parametrize("name", [name for name in CRITERIA if name not in MASKED])
def test_no_scores_without_first_token_where_there_is_no_such_part(name, collected):
    assert score_blocks(collected, (CRITERIA[name],))[0].without_first_token is None


@every_criterion
def test_scored_blocks_carry_the_description(name, collected):
    (scores,) = score_blocks(collected, (CRITERIA[name],), seed=3)
    criterion = CRITERIA[name]
    assert (scores.criterion, scores.title, scores.note) == (name, criterion.title, criterion.note)
    assert (scores.paper, scores.reference_url) == (criterion.paper, criterion.reference_url)
    assert scores.num_blocks == NUM_BLOCKS
    summaries = {need: collected.summarise(need) for need in criterion.needs}
    assert scores.values == tuple(criterion.score(evidence(summaries, seed=3)).values)


def test_scores_come_in_the_order_asked_for(collected):
    asked = ("update-norm", "first", "avss")
    assert tuple(one.criterion for one in score_blocks(collected, find_criteria(asked))) == asked


# --- on tiny models ---


def ragged_sequences(count: int = 7, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 14, (count,), generator=generator).tolist()
    return [torch.randint(5, VOCAB, (length,), generator=generator) for length in lengths]


def in_batches(sequences: list[Tensor], size: int, extra: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of that size, with that many more columns of padding than needed."""
    batches = []
    for start in range(0, len(sequences), size):
        token_ids, keep = pad(sequences[start : start + size], 0)
        batches.append((torch.nn.functional.pad(token_ids, (0, extra)), torch.nn.functional.pad(keep, (0, extra))))
    return batches


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2", "bert", "distilbert-classifier"])
def loaded(request: pytest.FixtureRequest) -> Loaded:
    """In float64, so that a change of rounding cannot pass for a change of meaning, nor the other way round."""
    return adopt(copy.deepcopy(stored(request.param)).double())


def all_scores(loaded: Loaded, batches: list[tuple[Tensor, Tensor]], **settings: Any) -> dict[str, tuple[float, ...]]:
    criteria = find_criteria(MASKED)
    seen = collect(loaded, batches, [need for criterion in criteria for need in criterion.needs])
    return {one.criterion: one.values for one in score_blocks(seen, criteria, **settings)}


@pytest.mark.parametrize("first_token", [True, False])
def test_scores_do_not_depend_on_batch_size_order_or_padding(loaded, first_token):
    sequences = ragged_sequences()
    expected = all_scores(loaded, in_batches(sequences, 1), first_token=first_token)
    variants = {
        "batches of 3": in_batches(sequences, 3),
        "one batch": in_batches(sequences, len(sequences)),
        "backwards": in_batches(sequences[::-1], 2),
        "more padding": in_batches(sequences, 3, extra=9),
    }
    for variant, batches in variants.items():
        found = all_scores(loaded, batches, first_token=first_token)
        for name, values in expected.items():
            assert found[name] == pytest.approx(values, rel=1e-6), (variant, name)


def test_published_averages_do_depend_on_padding():
    loaded = adopt(stored("bert"))
    sequences = ragged_sequences()
    one = collect(loaded, in_batches(sequences, 3), [PublishedAverages()]).summarise(PublishedAverages())
    other = collect(loaded, in_batches(sequences, 3, extra=9), [PublishedAverages()]).summarise(PublishedAverages())
    assert not np.allclose(one["variance"], other["variance"], rtol=1e-3)


EVERYTHING = tuple({need: None for name in READING for need in CRITERIA[name].needs if need.probe == "block"})


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_collect_equals_recording_every_hidden_state(name):
    """The oracle: plain hooks that keep everything, and every statistic by its definition."""
    model = stored(name)
    stack = model.model.layers if name == "llama" else model.encoder.layer
    batches = in_batches(ragged_sequences(), 3)
    recorded: list[list[Batch]] = [[] for _ in stack]
    keep_now: list[Tensor] = []

    def recorder(index: int) -> Callable[..., None]:
        def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            recorded[index].append(Batch(before.clone(), output.clone(), keep_now[-1]))

        return record

    handles = [block.register_forward_hook(recorder(i), with_kwargs=True) for i, block in enumerate(stack)]
    with torch.no_grad():
        for token_ids, keep in batches:
            keep_now.append(keep)
            model(input_ids=token_ids, attention_mask=keep.long())
    for handle in handles:
        handle.remove()

    seen = collect(adopt(model), batches, EVERYTHING)
    assert seen.num_blocks == len(stack)
    for statistic in EVERYTHING:
        for first_token in (True, False):
            if statistic.counts_padding and not first_token:
                continue
            found = seen.summarise(statistic, first_token=first_token)
            for block, states in enumerate(recorded):
                expected = oracle(statistic, states, first_token=first_token)
                assert {key: values[block] for key, values in found.items()} == pytest.approx(
                    expected, rel=1e-5, abs=1e-7
                ), (statistic, block)


@pytest.mark.parametrize("answer", ["tensor", "tuple"])
@pytest.mark.parametrize("call", ["position", "keyword"])
def test_a_known_update_is_found_at_its_own_block(answer, call):
    """Off by one at either end, or at the embedding, gives other numbers."""
    loaded, table, vectors = adding(answer=answer, call=call)
    token_ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    keep = token_ids != 0
    seen = collect(
        loaded, [(token_ids, keep)], [Moments("update"), Moments("input"), Moments("output"), RelativeUpdate()]
    )
    hidden = table[token_ids[keep]].numpy()
    for block, vector in enumerate(vectors):
        added = vector.numpy()
        assert seen.summarise(Moments("input"))["mean"][block] == pytest.approx(hidden.mean())
        assert seen.summarise(Moments("update"))["mean"][block] == pytest.approx(added.mean())
        assert seen.summarise(Moments("update"))["variance"][block] == pytest.approx(added.var())
        ratio = np.linalg.norm(added) / np.linalg.norm(hidden, axis=1)
        assert seen.summarise(RelativeUpdate())["ratio"][block] == pytest.approx(ratio.mean())
        hidden = hidden + added
        assert seen.summarise(Moments("output"))["variance"][block] == pytest.approx(hidden.var())


def test_collect_observes_each_statistic_once_and_reports_each_batch():
    loaded, _, _ = adding()
    calls: list[int] = []
    batch = (torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool))
    seen = collect(loaded, [batch, batch], [Moments(), Moments()], on_batch=lambda: calls.append(1))
    assert len(calls) == 2
    assert list(seen.rows) == [Moments()]
    assert seen.rows[Moments()][0].num_sequences == 2


def test_collecting_nothing_is_an_error():
    loaded, _, _ = adding()
    with pytest.raises(NoObservationsError, match="no batch"):
        collect(loaded, [], [Moments()])


def test_baselines_alone_cost_no_forward_pass():
    loaded, _, _ = adding()

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    loaded.model.forward = fail
    batch = (torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool))
    seen = collect(loaded, [batch], [])
    assert score_blocks(seen, find_criteria("first"))[0].values == (0, 1, 2, 3)
