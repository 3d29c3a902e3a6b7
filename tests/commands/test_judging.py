"""`avss damage`, `avss compare` and `avss stability`, on tiny models."""

import csv
import json
import math

import numpy as np
import pytest
import torch

import avss
from avss import composer
from avss.composer import comparison, damage
from avss.config import DataConfig
from avss.errors import ConfigError, DataError
from avss.record import Comparison, DamageTable, RunRecord, StabilityStudy
from tests.support.architectures import stored
from tests.support.oracles import run, without_blocks
from tests.support.tokenizers import word_tokenizer

SMALL = ("--samples", 12, "--seq-len", 16, "--batch-size", 4)


def test_damage_prints_measures_and_writes(avss_command, llama_folder, text_file, tmp_path):
    out = tmp_path / "damage"
    answer = avss_command("damage", llama_folder, "--data", text_file, "--out", out, *SMALL)
    assert answer.code == 0, answer.err
    assert "Computed 45 blocks instead of 75" in answer.out
    record = RunRecord.read(out)
    with (out / "damage.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["distance"]) for row in rows] == list(record.damage.values)
    assert (out / "figures" / "damage.png").stat().st_size > 1000
    assert "Measured damage of each block" in (out / "report.html").read_text()


def test_damage_is_what_plain_models_say(llama_folder, text_file):
    loaded = avss.load(llama_folder)
    table = damage(loaded, str(text_file), samples=6, seq_len=16, batch_size=4)
    from avss.composer import calibration

    batches = calibration(loaded, str(text_file), samples=6, seq_len=16, batch_size=4)
    smaller = without_blocks(loaded.model, loaded.stack.path, [2])
    found = []
    for row in batches.sequences:
        p, q = (run(model, row[None])[0].double().softmax(-1) for model in (loaded.model, smaller))
        found.append(float((p * (p / q).log()).sum(-1).mean()))
    assert table.values[2] == pytest.approx(np.mean(found), rel=1e-4)
    assert table.blocks[2].stderr == pytest.approx(np.std(found, ddof=1) / math.sqrt(6), rel=1e-3)


@pytest.mark.parametrize("folder", ["encoder_folder", "masked_folder", "classifier_folder"])
def test_damage_suits_the_head(avss_command, text_file, request, folder):
    answer = avss_command("damage", request.getfixturevalue(folder), "--data", text_file, "--json", *SMALL)
    assert answer.code == 0, answer.err
    table = DamageTable.model_validate(json.loads(answer.out))
    assert table.measure == ("cosine" if folder == "encoder_folder" else "kl")
    assert table.dense_loss is None
    assert all(value > 0 for value in table.values)


def test_compare_judges_every_criterion(avss_command, llama_folder, text_file, tmp_path):
    out = tmp_path / "comparison"
    answer = avss_command(
        "compare",
        llama_folder,
        "--data",
        text_file,
        "--count",
        2,
        "--damage-samples",
        6,
        "--greedy",
        "--out",
        out,
        *SMALL,
    )
    assert answer.code == 0, answer.err
    assert "block-influence" in answer.out
    record = RunRecord.read(out)
    comparison = record.comparison
    scored = {scores.criterion for scores in record.scores}
    assert {verdict.method for verdict in comparison.verdicts} == {*scored, "greedy"}
    assert comparison["greedy"].kind == "search"
    assert comparison["greedy"].spearman is None
    distances = [verdict.damage.distance for verdict in comparison.verdicts]
    assert distances == sorted(distances)
    assert all(len(verdict.damage.removed) == 2 for verdict in comparison.verdicts)
    assert comparison["first"].damage.removed == (0, 1)
    assert comparison["first"].depth == 1
    assert comparison["last"].kind == comparison["random"].kind == "baseline"
    assert comparison["random"].num_draws == 5
    # Damage was measured on sequences that no score saw.
    assert comparison.damage.data.content_hash != record.data.content_hash
    assert (record.data.num_sequences, comparison.damage.data.num_sequences) == (12, 6)
    page = (out / "report.html").read_text()
    assert "Criteria against measured damage" in page
    best = next(verdict for verdict in comparison.verdicts if verdict.kind != "baseline")
    assert f"By measured damage, {best.method} chooses best here" in page
    assert (out / "figures" / "verdicts.svg").is_file()


def test_the_cost_of_a_set_is_that_of_the_model_without_it(llama_folder, text_file):
    loaded = avss.load(llama_folder)
    record = avss.compare(
        loaded, str(text_file), criteria="last,first", count=2, samples=6, damage_samples=4, seq_len=16, batch_size=2
    )
    comparison: Comparison = record.comparison
    batches = avss.composer.calibration(loaded, str(text_file), samples=10, seq_len=16, batch_size=2)
    smaller = without_blocks(loaded.model, loaded.stack.path, [3, 4])
    losses = []
    for row in batches.sequences[6:]:
        log_q = run(smaller, row[None])[0].double().log_softmax(-1)
        losses.append(-float(log_q[torch.arange(len(row) - 1), row[1:]].mean()))
    assert comparison["last"].damage.removed == (3, 4)
    assert comparison["last"].damage.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    with pytest.raises(KeyError, match="`avss` was not compared"):
        comparison["avss"]


def test_compare_takes_another_text_for_damage(llama_folder, text_file):
    record = avss.compare(
        llama_folder,
        str(text_file),
        damage_data="builtin",
        criteria="avss,random",
        samples=4,
        damage_samples=3,
        seq_len=16,
    )
    assert record.comparison.damage.data.source == "builtin"
    assert record.data.source == text_file.name


def test_compare_takes_whole_settings_for_the_text_of_damage(llama_folder, text_file):
    other = avss.DataConfig(source="builtin", samples=3, seq_len=16)
    record = avss.compare(
        llama_folder, str(text_file), damage_data=other, criteria="avss,random", samples=4, seq_len=16
    )
    found = record.comparison.damage.data
    assert (found.source, found.num_sequences, found.seq_len) == ("builtin", 3, 16)


def test_stability_over_seeds_amounts_and_texts(avss_command, llama_folder, text_file, tmp_path):
    out = tmp_path / "stability"
    answer = avss_command(
        "stability", llama_folder, "--data", text_file, "--data", "builtin", "--seeds", 2, "--sizes", "3,6",
        "--criteria", "avss,block-influence,random", "--out", out, *SMALL,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    study: StabilityStudy = RunRecord.read(out).study
    assert {trial.criterion for trial in study.trials} == {"avss", "block-influence"}  # random reads no text
    assert {trial.num_sequences for trial in study.trials} == {3, 6, 12}
    assert {trial.source for trial in study.trials} == {text_file.name, "builtin"}
    assert len(study.trials) == 2 * 2 * 2 * 3
    first = study.trials[0]
    assert (first.num_sequences, first.seed, first.kendall, first.overlap) == (12, 0, 1, 1)
    assert [trial for trial in study.trials if trial.is_reference] == [first, study.trials[1]]  # one a criterion
    assert all(-1 <= trial.kendall <= 1 and 0 <= trial.overlap <= 1 for trial in study.trials)
    rows = {(row["criterion"], row["source"], row["num_sequences"]): row for row in study.summary()}
    for key, row in rows.items():
        same = [t for t in study.trials if (t.criterion, t.source, t.num_sequences) == key and not t.is_reference]
        assert row["num_seeds"] == len(same)
        assert row["kendall"] == pytest.approx(np.mean([trial.kendall for trial in same]))
    assert rows["avss", text_file.name, 12]["num_seeds"] == 1
    assert rows["avss", "builtin", 12]["num_seeds"] == 2
    assert "Stability over seeds" in (out / "report.html").read_text()


def test_draws_of_a_short_text_are_parts_of_it(llama_folder, tmp_path):
    """Every draw of the whole is the same: it would agree with itself."""
    short = tmp_path / "short.txt"
    short.write_text("the cat sees a dog and a dog sees the cat again. " * 8)
    num = len(composer.calibration(composer.load(llama_folder), str(short), samples=99, seq_len=16).sequences)
    assert 4 <= num < 20
    study = avss.stability(llama_folder, str(short), criteria="update-norm", num_seeds=3, samples=20, seq_len=16)
    whole = [trial for trial in study.trials if trial.num_sequences == num]
    assert [(trial.seed, trial.is_reference) for trial in whole] == [(0, True)]
    assert {trial.num_sequences for trial in study.trials} == {num, round(num / 2 + 1e-9), round(num / 4 + 1e-9)}
    assert [row["num_seeds"] for row in study.summary()] == [3, 3]
    with pytest.raises(ConfigError, match="compared with nothing"):
        avss.stability(llama_folder, str(short), criteria="avss", num_seeds=2, sizes=(20,), samples=20, seq_len=16)


def test_few_free_blocks_agree_with_themselves(llama_folder, text_file):
    study = avss.stability(
        llama_folder, str(text_file), criteria="block-influence", fraction=0.8, num_seeds=2, samples=6, seq_len=16
    )
    assert study.trials[0].is_reference
    assert study.trials[0].overlap == 1


def test_what_is_said_of_the_choice_is_said_of_the_blocks_that_may_go(llama_folder, text_file):
    text = {"data": str(text_file), "samples": 8, "seq_len": 16}
    record = avss.prune(llama_folder, count=2, criterion="update-norm", protect="0,1", **text).record
    (sure,) = record.stability
    assert set(sure.chosen) == set(record.cuts[0].plan.removed)
    assert not {0, 1} & {*sure.chosen, *sure.closest}
    for other in ({"contiguous": True, "count": 2}, {"rule": "mass", "fraction": 0.4}):
        assert avss.prune(llama_folder, criterion="update-norm", **other, **text).record.stability == ()


def test_damage_is_measured_on_other_sequences_than_the_scores(llama_folder, text_file, tmp_path):
    """Also where both texts are one, or where one of several is short; and as they are read unless told otherwise."""
    loaded = composer.load(llama_folder)
    settings = DataConfig(source=str(text_file), samples=6, seq_len=16, seed=3)
    for data in (settings, str(text_file)):
        given = {} if isinstance(data, DataConfig) else {"samples": 6, "seq_len": 16, "seed": 3}
        scoring, judging = comparison._parts(loaded, data, str(text_file), 4, given)
        assert (len(scoring.sequences), len(judging.sequences)) == (6, 4)
        assert (judging.facts.seq_len, judging.facts.seed) == (16, 3)
        seen = {tuple(one.tolist()) for one in scoring.sequences}
        assert not seen & {tuple(one.tolist()) for one in judging.sequences}
    short = tmp_path / "short.txt"
    short.write_text("the cat sees a dog and " * 20)
    num = len(composer.calibration(loaded, str(short), samples=99, seq_len=16).sequences)
    with pytest.raises(DataError, match="nothing but sequences that are scored on"):
        comparison._parts(loaded, str(short), str(short), 4, {"samples": num, "seq_len": 16})


def test_scores_come_with_intervals_and_say_whether_the_text_suffices(llama_folder, text_file):
    table = avss.score(llama_folder, str(text_file), samples=10, seq_len=16, criteria="avss,block-influence,random")
    assert {one.criterion for one in table.stability} == {"avss", "block-influence"}
    scores = table["block-influence"]
    assert all(low < value < high for low, value, high in zip(scores.lower, scores.values, scores.upper, strict=True))
    assert table["random"].lower is None
    for one in table.stability:
        assert any(one.describe() == warning for warning in table.warnings) != one.settled


def test_values_show_themselves_in_a_notebook(llama_folder, text_file):
    record = avss.compare(llama_folder, str(text_file), criteria="avss,last", samples=4, damage_samples=3, seq_len=16)
    assert "Criteria against measured damage" in record.comparison._repr_html_()
    assert "<svg" in record.damage._repr_html_()
    study = avss.stability(llama_folder, str(text_file), criteria="avss", num_seeds=1, samples=4, seq_len=16)
    assert "Kendall" in study._repr_html_()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("compare", "MODEL", "--count", 2, "--fraction", 0.5), "got both"),
        (("compare", "MODEL", "--count", 5), "5 blocks cannot be removed"),
        (("compare", "MODEL", "--criteria", "avs"), "Did you mean `avss`"),
        (
            ("compare", "MODEL", "--data", "TEXT", "--samples", 2, "--damage-samples", 1, "--seq-len", 16),
            "too few to score",
        ),
        (("stability", "MODEL", "--sizes", "a,b"), "is not a list of numbers"),
        (("stability", "MODEL", "--sizes", "99", "--samples", 4), "more than the 4 sequences"),
        (("stability", "MODEL", "--criteria", "random"), "read no data"),
        (("stability", "MODEL", "--seeds", 0), "must be at least 1"),
        (("damage", "MODEL", "--data", "missing.txt"), "There is no file"),
        (("damage", "MODEL", "--samples", 0), "samples"),
    ],
)
def test_bad_input_is_one_sentence(avss_command, llama_folder, text_file, arguments, says):
    names = {"MODEL": llama_folder, "TEXT": text_file}
    answer = avss_command(*(names.get(argument, argument) for argument in arguments))
    assert answer.code == 2
    assert says in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("name", ["gpt2-padless", "llama-padless", "llama-classifier", "bert-reward", "bert-labels"])
def test_classifiers_of_every_kind_go_the_whole_way(avss_command, name, text_file, tmp_path):
    """Damage, search, repair, the proof of what was saved, and healing."""
    folder, out, tokenizer = tmp_path / "dense", tmp_path / "out", word_tokenizer(adds="cls")
    stored(name).save_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    text = ("--data", text_file, "--samples", 8, "--seq-len", 12)
    answer = avss_command("damage", folder, *text, "--json")
    assert answer.code == 0, answer.err
    damage = [one["distance"] for one in json.loads(answer.out)["blocks"]]
    assert min(damage) > 1e-7
    alone = avss.damage(str(folder), str(text_file), samples=8, seq_len=12, batch_size=1)
    assert damage == pytest.approx(alone.values, rel=1e-3)  # padding was not read
    search = ("--select", "greedy", "--count", 1, "--compensate", "refit", "--protect", "none")
    answer = avss_command("prune", folder, *search, *text, "--out", out)
    assert answer.code == 0, answer.err
    heal = ("--teacher", folder, "--data", text_file, "--budget", "300 tokens", "--seq-len", 12, "--validations", 1)
    answer = avss_command("heal", out, *heal, "--out", tmp_path / "healed")
    assert answer.code == 0, answer.err
    assert avss_command("report", out, "--out", tmp_path / "report", "--quiet").code == 0
