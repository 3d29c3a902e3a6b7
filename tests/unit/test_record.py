"""Values between stages: immutable, checked, and the same after a trip to disk."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from avss.errors import DataError, InvalidPlanError
from avss.record import (
    SCHEMA_VERSION,
    BlockScores,
    Cut,
    DamageTable,
    DataFacts,
    FieldChange,
    Measurement,
    ModelFacts,
    Plan,
    Retention,
    RunRecord,
    ScoreTable,
    SetDamage,
    Verification,
    runs_of,
)

MODEL = ModelFacts(
    source="tiny",
    architecture="LlamaForCausalLM",
    model_type="llama",
    head="causal",
    stack="model.layers",
    num_blocks=5,
    hidden_size=32,
    num_parameters=1000,
    num_block_parameters=800,
    checkpoint_bytes=2000,
    dtype="bfloat16",
    compute_dtype="float32",
    device="cpu",
    fingerprint="0123456789abcdef",
)


def plan(*removed: int, num_blocks: int = 5) -> Plan:
    return Plan(num_blocks=num_blocks, removed=removed, method="explicit", rule="by hand")


def full_record() -> RunRecord:
    """One value in every field."""
    scores = BlockScores(
        criterion="toy",
        title="Toy",
        values=(0.1, math.nan, 1e-300, 1 / 3, -5.0),
        without_first_token=(1.0, 2.0, 3.0, 4.0, math.nan),
        factors={"variance": (1.0, 2.0, 3.0, 4.0, 5.0)},
        paper="Somebody (2024)",
        reference_url="https://example.org",
        note="With a note.",
    )
    measurement = Measurement(
        task="perplexity", metric="perplexity", value=12.5, stderr=math.nan, num_samples=7, higher_is_better=False
    )
    retention = Retention(task="choice", metric="accuracy", dense=0.8, value=0.7, ratio=0.875, kept=0.875, flips=0.1)
    cut = Cut(
        plan=plan(1, 3),
        model=MODEL,
        changes=(
            FieldChange(field="num_hidden_layers", before=5, after=3),
            FieldChange(field="layer_types", before=["a", "b"], after=["a"]),
        ),
        path="model",
        verification=Verification(reload_strict=True, max_diff_memory=0.0, max_diff_bypass=1e-7, tolerance=1e-4),
        measurements=(measurement,),
        retention=(retention,),
        samples=("Once upon a time ü 模型",),
    )
    return RunRecord(
        created="2026-11-23T10:00:00+00:00",
        command="avss run",
        versions={"torch": "2.13.0"},
        model=MODEL,
        data=DataFacts(
            source="builtin",
            layout="packed",
            num_sequences=4,
            seq_len=16,
            num_tokens=64,
            batch_size=2,
            seed=0,
            content_hash="f" * 16,
        ),
        scores=(scores,),
        warnings=("Careful.",),
        dense=(measurement,),
        cuts=(cut,),
        prompts=("Once",),
        samples=("upon",),
        seconds={"score": 1.25},
        settings={"model": {"source": "tiny"}, "tasks": [1, 2]},
    )


# --- plans ---


def test_plan_maps_original_indices_to_new_ones():
    one = plan(1, 2, 4, num_blocks=6)
    assert one.kept == (0, 3, 5)
    assert one.index_map == {0: 0, 3: 1, 5: 2}
    assert one.fraction == 0.5


@pytest.mark.parametrize(
    ("removed", "runs", "words"),
    [
        ((), [], ""),
        ((3,), [(3, 4)], "3"),
        ((0, 1), [(0, 2)], "0-1"),
        ((3, 12, 13, 14, 15, 17), [(3, 4), (12, 16), (17, 18)], "3, 12-15, 17"),
        ((27, 28, 29), [(27, 30)], "27-29"),
    ],
)
def test_plan_tells_its_runs(removed, runs, words):
    one = plan(*removed, num_blocks=30)
    assert runs_of(one.removed) == runs
    assert one.describe() == words


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=n - 1))))
def test_plan_runs_and_map_cover_every_block_once(case):
    num_blocks, removed = case
    one = plan(*sorted(removed), num_blocks=num_blocks)
    assert [block for start, stop in runs_of(one.removed) for block in range(start, stop)] == sorted(removed)
    assert sorted([*one.removed, *one.kept]) == list(range(num_blocks))
    assert list(one.index_map.values()) == list(range(num_blocks - len(removed)))
    assert list(one.index_map) == sorted(one.index_map)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ((5,), r"no block `5`: the model has 5 blocks, 0 to 4"),
        ((-1,), "no block `-1`"),
        ((1, 7, 9), "no block `7`, `9`"),
        ((3, 1), "ascending"),
        ((1, 1), "each named once"),
        ((0, 1, 2, 3, 4), "removes all 5 blocks"),
    ],
)
def test_wrong_plans_are_refused(removed, message):
    with pytest.raises(InvalidPlanError, match=message):
        plan(*removed)


def test_wrong_plan_in_a_record_file_is_refused(tmp_path):
    raw = json.loads(full_record().to_json())
    raw["cuts"][0]["plan"]["removed"] = [9]
    (tmp_path / "record.json").write_text(json.dumps(raw))
    with pytest.raises((DataError, InvalidPlanError), match=r"no block `9`|not a run record"):
        RunRecord.read(tmp_path)


# --- scores ---


def test_damage_that_is_no_number_is_the_dearest():
    blocks = tuple(SetDamage(removed=(block,), distance=one) for block, one in enumerate((math.nan, 0.5, 0.1, 0.3)))
    table = DamageTable(measure="kl", blocks=blocks, num_blocks_run=1, num_blocks_naive=1)
    assert table.ranking() == (2, 3, 1, 0)


def test_ranking_goes_from_least_important_with_ties_by_index():
    scores = BlockScores(criterion="toy", title="Toy", values=(0.5, 0.1, 0.5, 0.1, 0.9))
    assert scores.ranking() == (1, 3, 0, 2, 4)
    assert scores.ranks() == (2, 0, 3, 1, 4)


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=20))
def test_ranks_are_the_inverse_of_the_ranking(values):
    scores = BlockScores(criterion="toy", title="Toy", values=tuple(values))
    assert [scores.ranks()[block] for block in scores.ranking()] == list(range(len(values)))
    ordered = [values[block] for block in scores.ranking()]
    assert ordered == sorted(values)


def test_scores_need_a_block():
    with pytest.raises(ValidationError, match="at least 1 item"):
        BlockScores(criterion="toy", title="Toy", values=())


def test_table_finds_scores_by_name_and_lists_them_by_block():
    one = BlockScores(criterion="one", title="One", values=(0.2, 0.1), factors={"part": (7.0, 8.0)})
    two = BlockScores(criterion="two", title="Two", values=(1.0, 2.0), without_first_token=(3.0, 4.0))
    table = ScoreTable(scores=(one, two))
    assert table["two"] is two
    assert table.num_blocks == 2
    assert table.rows()[1] == {
        "block": 1,
        "one": 0.1,
        "one.rank": 0,
        "one.part": 8.0,
        "two": 2.0,
        "two.rank": 1,
        "two.without_first_token": 4.0,
    }
    with pytest.raises(KeyError, match=r"`three` was not scored\. Scored: one, two"):
        table["three"]


# --- verification ---


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"cached_generation": True}, True),
        ({"cached_generation": False}, False),
        ({"reload_strict": False}, False),
        ({"max_diff_memory": 2e-4}, False),
        ({"max_diff_bypass": 2e-4}, False),
        ({"max_diff_memory": math.nan}, False),
        ({"max_diff_bypass": math.inf}, False),
    ],
)
def test_verification_passes_only_if_every_check_held(changes, passed):
    good = {"reload_strict": True, "max_diff_memory": 0.0, "max_diff_bypass": 1e-4, "tolerance": 1e-4}
    assert Verification(**(good | changes)).passed is passed


# --- on disk and back ---


def test_record_survives_disk(tmp_path):
    record = full_record()
    (tmp_path / "record.json").write_text(record.to_json(), encoding="utf-8")
    for path in (tmp_path, tmp_path / "record.json"):
        again = RunRecord.read(path)
        assert again.to_json() == record.to_json()
        assert again.cuts[0].plan == record.cuts[0].plan
        assert again.scores[0].values[2:] == record.scores[0].values[2:]
        assert math.isnan(again.scores[0].values[1])
        # Where a field may be missing, null reads back as missing: there is no number either way.
        assert again.dense[0].stderr is None


def test_record_file_is_plain_json():
    text = full_record().to_json()
    raw = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert raw["scores"][0]["values"][1] is None
    assert raw["schema_version"] == SCHEMA_VERSION
    assert "模型" in text


@given(st.lists(st.floats(), min_size=1, max_size=6))
def test_every_score_survives_json(values):
    before = BlockScores(criterion="toy", title="Toy", values=tuple(values))
    after = BlockScores.model_validate_json(before.model_dump_json())
    for one, other in zip(before.values, after.values, strict=True):
        assert other == one if math.isfinite(one) else math.isnan(other)


def test_values_are_frozen_and_closed():
    record = full_record()
    with pytest.raises(ValidationError, match="frozen"):
        record.command = "another"
    with pytest.raises(ValidationError, match="Extra inputs"):
        FieldChange(field="a", before=1, after=2, comment="?")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[]", "schema version `None`"),
        (b"3", "schema version `None`"),
        (b"{}", "schema version `None`"),
        (b'{"schema_version": 999}', "schema version `999`; this avss reads version 1"),
        (b'{"schema_version": 1}', "is not a run record: `created`"),
    ],
)
def test_bad_record_files_are_data_errors(tmp_path, content, message):
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        RunRecord.read(tmp_path / "record.json")


def test_record_with_an_unknown_key_names_it(tmp_path):
    raw = json.loads(full_record().to_json())
    raw["model"]["colour"] = "red"
    (tmp_path / "record.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"`model\.colour`"):
        RunRecord.read(tmp_path)


def test_missing_record_is_a_data_error(tmp_path):
    for path in (tmp_path, tmp_path / "nothing.json"):
        with pytest.raises(DataError, match="There is no record at"):
            RunRecord.read(path)
