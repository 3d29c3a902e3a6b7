"""What every statistic obeys: one row per sequence, no say for padding, the same numbers however the data come."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from avss.errors import DataError, NoObservationsError
from avss.statistics import (
    STATISTICS,
    AbstractStatistic,
    CosineSimilarity,
    Moments,
    NearZero,
    PublishedAverages,
    RelativeUpdate,
    RelativeVariance,
    Rows,
    Unchanged,
    WindowAngles,
)
from avss.statistics.collected import Collected
from tests.support.observations import Batch, observe, oracle, random_batch, shown

SETTINGS: tuple[AbstractStatistic, ...] = (
    CosineSimilarity(),
    Moments("input"),
    Moments("output"),
    Moments("update"),
    NearZero("output", 1e-2),
    NearZero("update", 0.3),
    NearZero("input", 0.5, relative=False),
    NearZero("output", 1e-5, relative=False),
    PublishedAverages(),
    RelativeUpdate(),
    RelativeVariance(),
    Unchanged(),
    Unchanged(0.5),
    WindowAngles("last"),
    WindowAngles("all"),
)
"""Those of the forward pass; the others have laws of their own, in `test_gradient_laws`."""
MASKED = tuple(statistic for statistic in SETTINGS if not statistic.counts_padding)

every_statistic = pytest.mark.parametrize("statistic", SETTINGS, ids=str)
every_masked_statistic = pytest.mark.parametrize("statistic", MASKED, ids=str)

lengths = st.lists(st.integers(1, 6), min_size=1, max_size=6)


def summary(statistic: AbstractStatistic, batches: list[Batch], *, first_token: bool = True) -> dict[str, float]:
    return statistic.summarise(observe(statistic, batches), first_token=first_token)


def assert_same(one: dict[str, float], other: dict[str, float], *, rel: float = 1e-12) -> None:
    assert one.keys() == other.keys()
    assert one == pytest.approx(other, rel=rel, abs=max(1e-12, rel / 10))


def trimmed(batch: Batch) -> list[Batch]:
    """Each sequence in a batch of its own, without its padding."""
    return [
        Batch(before[keep][None], after[keep][None], keep[keep][None])
        for before, after, keep in zip(batch.before, batch.after, batch.keep, strict=True)
    ]


def test_every_statistic_is_tested():
    assert {type(one) for one in SETTINGS} == {one for one in STATISTICS if one.probe in ("block", "stack")}


def test_only_the_published_averages_count_padding():
    assert [statistic for statistic in STATISTICS if statistic.counts_padding] == [PublishedAverages]


@every_statistic
def test_a_statistic_is_a_frozen_value(statistic):
    assert statistic == dataclasses.replace(statistic)
    assert len({statistic, dataclasses.replace(statistic)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        statistic.site = "input"


# --- the right number ---


@every_statistic
def test_equals_its_definition_after_every_batch(statistic):
    batches = [random_batch((5, 3, 4), seed=1), random_batch((6, 1), seed=2), random_batch((2,), seed=3)]
    for number in range(1, len(batches) + 1):
        assert_same(summary(statistic, batches[:number]), oracle(statistic, batches[:number]), rel=2e-6)


@every_masked_statistic
@given(lengths=lengths, seed=st.integers(0, 99), width=st.integers(1, 9), left=st.booleans(), first=st.booleans())
def test_equals_its_definition_for_any_shape(statistic, lengths, seed, width, left, first):
    batch = random_batch(lengths, width=width, seed=seed, left=left)
    # One token, or one hidden unit, of which nothing varies: there is nothing to observe.
    undefined = width == 1 and isinstance(statistic, RelativeVariance)
    if undefined or (not first and max(lengths) == 1):
        with pytest.raises(NoObservationsError):
            summary(statistic, [batch], first_token=first)
        return
    expected = oracle(statistic, [batch], first_token=first)
    # Absolute: one unit is pinned to cosine +-1 and variances near nought, where relative says nothing.
    assert summary(statistic, [batch], first_token=first) == pytest.approx(expected, rel=5e-6, abs=1e-6)


def test_moments_equal_numpy():
    batch = random_batch((7, 4), width=16)
    kept = batch.after[batch.keep].double().numpy()
    found = summary(Moments("output"), [batch])
    assert found["variance"] == pytest.approx(np.var(kept), rel=1e-6)
    assert found["mean"] == pytest.approx(np.mean(kept), rel=1e-6)
    assert found["count"] == kept.size


def test_published_averages_equal_the_published_script_with_a_short_last_batch():
    outputs = [random_batch((4, 4, 4), seed=1), random_batch((4,), seed=2)]
    variances, sparsities = [], []
    for batch in outputs:
        pooled = batch.after.numpy().mean(axis=1)
        variances.append(np.mean(pooled.var(axis=1, ddof=1)))
        sparsities.append(np.mean(np.abs(batch.after.numpy()) < 1e-5))
    found = summary(PublishedAverages(), outputs)
    assert found["variance"] == pytest.approx(np.mean(variances), rel=1e-6)
    assert found["sparsity"] == pytest.approx(np.mean(sparsities), rel=1e-6)
    # The short batch weighs as much as the full one; weighing sequences alike would give another number.
    assert found["variance"] != pytest.approx(np.average(variances, weights=[3, 1]), rel=1e-3)


@pytest.mark.parametrize(
    ("before", "after", "cosine"),
    [([1, 0], [1, 0], 1), ([1, 0], [-2, 0], -1), ([1, 0], [0, 3], 0), ([0, 0], [0, 0], 1), ([0, 0], [1, 0], 0)],
)
def test_cosine_of_corner_cases(before, after, cosine):
    batch = Batch(torch.tensor([[before]]).float(), torch.tensor([[after]]).float(), torch.tensor([[True]]))
    assert summary(CosineSimilarity(), [batch]) == {"cosine": cosine}


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_cosine_and_ratio_do_not_depend_on_scale(scale):
    batch = random_batch((5, 3))
    scaled = Batch(batch.before * scale, batch.after * scale, batch.keep)
    for statistic in (CosineSimilarity(), RelativeUpdate()):
        assert_same(summary(statistic, [scaled]), summary(statistic, [batch]), rel=1e-5)


def test_update_ratio_leaves_out_tokens_without_input():
    before, after = torch.tensor([[[0.0, 0], [3, 4]]]), torch.tensor([[[1.0, 1], [3, 9]]])
    assert summary(RelativeUpdate(), [Batch(before, after, torch.tensor([[True, True]]))]) == {"ratio": 1.0}


def test_near_zero_threshold_is_strict_and_relative_to_the_token():
    after = torch.tensor([[[3.0, -4, 0, 0]]])  # root mean square 2.5
    batch = Batch(after, after, torch.tensor([[True]]))
    assert summary(NearZero("output", 1.2 * (1 + 1e-6)), [batch])["below"] == 3
    assert summary(NearZero("output", 1.2 * (1 - 1e-6)), [batch])["below"] == 2
    assert summary(NearZero("output", 3.0, relative=False), [batch])["below"] == 2
    scaled = Batch(after * 1e4, after * 1e4, batch.keep)
    assert summary(NearZero("output", 1.3), [scaled])["below"] == 3


def test_smoothed_share_is_never_nought_or_one():
    batch = random_batch((3,))
    none, everything = NearZero("input", 0.0), NearZero("input", 1e9)
    assert summary(none, [batch])["share"] == 0
    assert summary(everything, [batch])["share"] == 1
    assert 0 < summary(none, [batch])["smoothed_share"] < summary(everything, [batch])["smoothed_share"] < 1


# --- the same number ---


@every_masked_statistic
@given(data=st.data(), lengths=lengths, seed=st.integers(0, 99))
def test_other_batches_give_the_same_summary(statistic, data, lengths, seed):
    whole = random_batch(lengths, seed=seed)
    sizes, left = [], len(lengths)
    while left:
        sizes.append(data.draw(st.integers(1, left)))
        left -= sizes[-1]
    assert_same(summary(statistic, whole.split(sizes)), summary(statistic, [whole]))


def test_published_averages_depend_on_the_batches():
    """A quirk of the published script, kept: where a batch ends changes the number."""
    whole = random_batch((4, 4, 4))
    one, other = summary(PublishedAverages(), [whole]), summary(PublishedAverages(), whole.split([1, 2]))
    assert one["variance"] != pytest.approx(other["variance"], rel=1e-3)


@every_statistic
def test_merge_order_does_not_matter(statistic):
    parts = [
        observe(statistic, [random_batch(lengths, seed=seed)]) for seed, lengths in enumerate(((5, 2), (3,), (1, 4)))
    ]
    summaries = [statistic.summarise(Rows.merge(order), first_token=True) for order in itertools.permutations(parts)]
    for other in summaries[1:]:
        assert_same(other, summaries[0])


@every_statistic
def test_merge_is_associative(statistic):
    one, two, three = (observe(statistic, [random_batch((3, 2), seed=seed)]) for seed in range(3))
    left, right = Rows.merge([Rows.merge([one, two]), three]), Rows.merge([one, Rows.merge([two, three])])
    assert left.columns.keys() == right.columns.keys()
    assert all(np.array_equal(left.columns[name], right.columns[name]) for name in left.columns)


@every_statistic
def test_empty_rows_are_the_identity_of_merge(statistic):
    rows = observe(statistic, [random_batch((5, 3))])
    for merged in (Rows.merge([Rows.empty(), rows]), Rows.merge([rows, Rows.empty()]), Rows.merge([rows])):
        assert merged.num_sequences == 2
        assert all(np.array_equal(merged.columns[name], rows.columns[name]) for name in rows.columns)
    assert Rows.merge([]).num_sequences == Rows.merge([Rows.empty(), Rows.empty()]).num_sequences == 0


@every_statistic
def test_rows_are_float64_with_one_per_sequence(statistic):
    seen = statistic.observe(shown(statistic, random_batch((5, 3))))
    for column in seen.values():
        assert column.dtype == torch.float64
        assert tuple(column.shape) in {(2,), (2, 2), (2, 2, 1)}


@every_statistic
def test_resampling_repeats_sequences(statistic):
    batch = random_batch((4, 4, 4))
    if statistic.counts_padding:
        # Its rows remember the size of their batch; batches of one sequence are the case that can be repeated.
        rows = observe(statistic, batch.split([1, 1, 1]))
        repeated = [batch.part(2, 3), batch.part(0, 1), batch.part(2, 3)]
    else:
        rows, repeated = observe(statistic, [batch]), [batch.part(2, 3), batch.part(0, 1), batch.part(2, 3)]
    drawn = statistic.summarise(rows.resample(np.array([2, 0, 2])), first_token=True)
    assert_same(drawn, summary(statistic, repeated))


# --- padding ---


@every_masked_statistic
@pytest.mark.parametrize("filler", [float("nan"), float("inf"), 0.0, 1e30, -7.0])
@pytest.mark.parametrize("left", [False, True])
def test_padding_never_matters(statistic, filler, left):
    batch = random_batch((6, 2, 4), left=left)
    filled = Batch(
        torch.where(batch.keep[..., None], batch.before, filler),
        torch.where(batch.keep[..., None], batch.after, filler),
        batch.keep,
    )
    for first_token in (True, False):
        expected = summary(statistic, trimmed(batch), first_token=first_token)
        assert_same(summary(statistic, [filled], first_token=first_token), expected)


@pytest.mark.parametrize("statistic", [s for s in SETTINGS if s.counts_padding], ids=str)
def test_padding_matters_to_those_that_say_so(statistic):
    batch = random_batch((6, 2, 4))
    filled = Batch(batch.before, torch.where(batch.keep[..., None], batch.after, 0.0), batch.keep)
    one, other = summary(statistic, [batch]), summary(statistic, [filled])
    assert one["variance"] != pytest.approx(other["variance"], rel=1e-3)
    assert one["sparsity"] != pytest.approx(other["sparsity"], rel=1e-3)


@every_masked_statistic
def test_without_first_token_equals_sequences_without_their_first_token(statistic):
    batch = random_batch((6, 2, 4))
    shorter = Batch(batch.before[:, 1:], batch.after[:, 1:], batch.keep[:, 1:])
    assert_same(summary(statistic, [batch], first_token=False), summary(statistic, [shorter]))


@every_masked_statistic
def test_first_token_is_the_first_real_one(statistic):
    right, left = random_batch((5, 3)), random_batch((5, 3))
    # The same sequences with their padding on the other side.
    order = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 0, 1, 2]])[..., None].expand(-1, -1, 8)
    left = Batch(right.before.gather(1, order), right.after.gather(1, order), right.keep.flip(1))
    assert_same(summary(statistic, [left], first_token=False), summary(statistic, [right], first_token=False))


@every_masked_statistic
def test_a_massive_first_token_is_left_out_on_request(statistic):
    """Attention sinks carry activations thousands of times larger than the rest."""
    batch = random_batch((6, 4))
    sink = Batch(batch.before.clone(), batch.after.clone(), batch.keep)
    sink.before[:, 0] *= 1e4
    sink.after[:, 0] *= -1e4
    assert_same(summary(statistic, [sink], first_token=False), summary(statistic, [batch], first_token=False))


# --- nothing to see ---


@every_statistic
def test_nothing_seen_is_an_error(statistic):
    with pytest.raises(NoObservationsError, match="no token was kept"):
        statistic.summarise(Rows.empty(), first_token=True)


@every_masked_statistic
def test_nothing_kept_is_an_error(statistic):
    batch = random_batch((4, 4))
    nothing = Batch(batch.before, batch.after, torch.zeros_like(batch.keep))
    with pytest.raises(NoObservationsError, match="no token was kept"):
        summary(statistic, [nothing])


@every_masked_statistic
def test_nothing_but_first_tokens_is_an_error_without_them(statistic):
    batch = random_batch((1, 1))
    summary(statistic, [batch], first_token=True)
    with pytest.raises(NoObservationsError, match="at least two tokens"):
        summary(statistic, [batch], first_token=False)


@every_masked_statistic
def test_an_empty_sequence_adds_nothing(statistic):
    batch = random_batch((4, 3, 4))
    hidden = Batch(batch.before, batch.after, batch.keep & torch.tensor([True, False, True])[:, None])
    without = [batch.part(0, 1), batch.part(2, 3)]
    assert_same(summary(statistic, [hidden]), summary(statistic, without))


# --- numbers ---


@every_statistic
def test_inputs_are_not_modified(statistic):
    batch = random_batch((5, 3))
    copies = batch.before.clone(), batch.after.clone(), batch.keep.clone()
    summary(statistic, [batch])
    assert all(
        torch.equal(one, other) for one, other in zip(copies, (batch.before, batch.after, batch.keep), strict=True)
    )


@every_statistic
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_counts_as_the_same_input_upcast(statistic, dtype):
    half = random_batch((5, 3), dtype=dtype)
    wide = Batch(half.before.float(), half.after.float(), half.keep)
    assert summary(statistic, [half]) == summary(statistic, [wide])


@pytest.mark.parametrize("site", ["input", "output"])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_variance_survives_a_large_offset(site, offset):
    """`E[x^2] - E[x]^2` in float32 returns noise here."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((4, 50, 64), generator=generator) + offset
    batch = Batch(values, values.clone(), torch.ones(4, 50, dtype=torch.bool))
    exact = values.double().numpy()
    for batches in ([batch], batch.split([1, 3]), batch.split([1, 1, 1, 1])):
        found = summary(Moments(site), batches)
        assert found["variance"] == pytest.approx(exact.var(), rel=1e-3)
        assert found["mean"] == pytest.approx(exact.mean(), rel=1e-6)


def test_variance_survives_sequences_of_other_means():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((6, 20, 32), generator=generator) + torch.linspace(-300, 900, 6)[:, None, None]
    batch = Batch(values, values, torch.ones(6, 20, dtype=torch.bool))
    assert summary(Moments(), [batch])["variance"] == pytest.approx(values.double().numpy().var(), rel=1e-5)


# --- on disk and back ---


def collected(num_blocks: int = 3) -> Collected:
    rows = {
        statistic: tuple(
            observe(statistic, [random_batch((5, 3), seed=block), random_batch((2,), seed=9 + block)])
            for block in range(num_blocks)
        )
        for statistic in SETTINGS
    }
    return Collected(num_blocks=num_blocks, rows=rows)


def assert_identical(one: Collected, other: Collected) -> None:
    assert one.num_blocks == other.num_blocks
    assert tuple(one.rows) == tuple(other.rows)
    for statistic, blocks in one.rows.items():
        for ours, theirs in zip(blocks, other.rows[statistic], strict=True):
            assert ours.columns.keys() == theirs.columns.keys()
            for name, column in ours.columns.items():
                assert column.tobytes() == theirs.columns[name].tobytes()
                assert column.shape == theirs.columns[name].shape


def test_collected_round_trip_is_bit_exact(tmp_path):
    before = collected()
    before.save(tmp_path / "rows.safetensors")
    assert_identical(before, Collected.load(tmp_path / "rows.safetensors", STATISTICS))


def test_collected_round_trip_without_statistics(tmp_path):
    before = Collected(num_blocks=4, rows={})
    before.save(tmp_path / "rows.safetensors")
    assert_identical(before, Collected.load(tmp_path / "rows.safetensors", STATISTICS))


def test_collected_merge_equals_one_pass():
    one, other = collected(), collected()
    merged = Collected.merge([one, other])
    for statistic in SETTINGS:
        summary = merged.summarise(statistic)
        assert {name: len(values) for name, values in summary.items()} == dict.fromkeys(summary, 3)
        twice = statistic.summarise(Rows.merge([one.rows[statistic][1], other.rows[statistic][1]]), first_token=True)
        assert {name: values[1] for name, values in summary.items()} == twice


def test_collected_resample_draws_the_same_sequences_at_every_block():
    seen = collected()
    drawn = seen.summarise(Moments(), resample=np.array([0, 0]))
    alone = [Moments().summarise(rows.resample(np.array([0, 0])), first_token=True) for rows in seen.rows[Moments()]]
    assert drawn["variance"].tolist() == [one["variance"] for one in alone]


def test_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="does not hold collected statistics"):
        Collected.load(tmp_path / "nothing.safetensors", STATISTICS)


@pytest.mark.parametrize("content", [b"", b"garbage" * 50, b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_garbage_is_a_data_error(tmp_path, content):
    (tmp_path / "rows.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="does not hold collected statistics"):
        Collected.load(tmp_path / "rows.safetensors", STATISTICS)


def test_truncated_file_is_a_data_error(tmp_path):
    file = tmp_path / "rows.safetensors"
    collected().save(file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataError, match="does not hold collected statistics"):
        Collected.load(file, STATISTICS)


GOOD_SPEC = [{"statistic": "CosineSimilarity"}]


@pytest.mark.parametrize(
    "metadata",
    [
        {"num_blocks": "1"},
        {"statistics": json.dumps(GOOD_SPEC)},
        {"num_blocks": "many", "statistics": json.dumps(GOOD_SPEC)},
        {"num_blocks": "2", "statistics": json.dumps(GOOD_SPEC)},  # a block more than there is
        {"num_blocks": "1", "statistics": "not json"},
        {"num_blocks": "1", "statistics": "[1, 2]"},
        {"num_blocks": "1", "statistics": "{}x"},
        {"num_blocks": "1", "statistics": json.dumps([{"statistic": "Unheard"}])},
        {"num_blocks": "1", "statistics": json.dumps([{"statistic": "CosineSimilarity", "site": "input"}])},
        {"num_blocks": "1", "statistics": json.dumps([{}])},
    ],
)
def test_wrong_metadata_is_a_data_error(tmp_path, metadata):
    file = tmp_path / "rows.safetensors"
    good = Collected(num_blocks=1, rows={CosineSimilarity(): (observe(CosineSimilarity(), [random_batch((3,))]),)})
    good.save(file)
    save_file(load_file(file), file, metadata=metadata)
    with pytest.raises(DataError, match="does not hold collected statistics"):
        Collected.load(file, STATISTICS)


def test_foreign_keys_are_a_data_error(tmp_path):
    file = tmp_path / "rows.safetensors"
    metadata = {"num_blocks": "1", "statistics": json.dumps(GOOD_SPEC)}
    save_file({"model.layers.0.weight": np.zeros(3)}, file, metadata=metadata)
    with pytest.raises(DataError, match="does not hold collected statistics"):
        Collected.load(file, STATISTICS)
