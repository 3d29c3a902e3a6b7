"""Blocks chosen by search, and by other targets than a count, through the command line on tiny models."""

import itertools
import json

import numpy as np
import pytest
from tools.sweep.shrink import small_model
from transformers import JambaForCausalLM

import avss
from avss import composer
from avss.ablation import Judge
from avss.compensation import ChoiceYardstick, Yardstick, compensate, split
from avss.composer import choosing, finals, whole
from avss.composer.choosing import read_search
from avss.composer.evaluating import target_warnings
from avss.composer.finals import judge_finalists
from avss.composer.searching import passes_of_all, search_loaded
from avss.config import Budget, DataConfig, PlanConfig, RunConfig, SearchConfig, TaskConfig
from avss.cut import cut
from avss.data.augment import Augmentation
from avss.errors import ConfigError, UnsupportedArchitectureError
from avss.models.load import adopt, load_model
from avss.plan import make_plan
from avss.progress import Timed, silent
from avss.record import BlockScores, Cut, ModelFacts, Plan, Retention, RunRecord, ScoreTable
from tests.commands.test_bad_input import refused
from tests.laws.test_every_architecture import tiny
from tests.support.gguf_files import write_gguf
from tests.support.tokenizers import word_tokenizer

SMALL = ("--samples", 6, "--seq-len", 16, "--batch-size", 2, "--quiet")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AVSS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pruned(avss_command, llama_folder, text_file, tmp_path):
    """Calls `avss prune` on the tiny Llama and returns the record."""
    places = itertools.count()

    def call(*arguments, model=llama_folder):
        out = tmp_path / f"out{next(places)}"
        answer = avss_command("prune", model, "--data", text_file, "--out", out, *SMALL, *arguments)
        assert answer.code == 0, answer.err
        return RunRecord.read(out)

    return call


def oracle(loaded, batches, size, free):
    """The set of a size with the lowest mean distance: every one of them is measured."""
    sets = list(itertools.combinations(free, size))
    damages = Judge(loaded, batches).judge(sets)
    return min(damages, key=lambda one: one.mean).removed


@pytest.mark.parametrize("select", ["greedy", "evolution", "window"])
def test_every_search_gives_a_curve_and_a_verified_cut(pruned, select, llama_folder, text_file):
    record = pruned("--select", select, "--count", 2, "--protect", "none")
    search = record.search
    assert search is not None
    assert [len(point.removed) for point in search.points] == [1, 2]
    assert record.cuts[0].plan.removed == search.points[1].removed
    assert record.cuts[0].plan.method == select
    assert record.cuts[0].verification.passed
    assert 0 < search.num_blocks_run / (search.num_blocks * 3) == search.passes
    assert all(point.num_sequences == 6 for point in search.points)
    # The figures are the judge's own.
    loaded = composer.load(llama_folder)
    batches = composer.calibration(loaded, str(text_file), samples=6, seq_len=16, batch_size=2)
    (damage,) = Judge(loaded, batches).judge([search.points[1].removed])
    assert search.points[1].distance == pytest.approx(damage.mean, rel=1e-5)
    assert search.points[1].loss_change == pytest.approx((damage.loss - damage.dense_loss).mean(), rel=1e-4)
    assert search.points[0].removed == oracle(loaded, batches, 1, range(5)) or select == "evolution"


@pytest.mark.parametrize("model", ["llama_folder", "encoder_folder", "classifier_folder"])
@pytest.mark.parametrize("holds_all", [True, False])
def test_what_the_ledger_counts_is_what_the_judge_ran(model, holds_all, request, text_file, monkeypatch):
    judges = []

    class Counted(Judge):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **(kwargs | {"holds_all": holds_all}))
            judges.append(self)

    monkeypatch.setattr("avss.composer.searching.Judge", Counted)
    loaded = composer.load(request.getfixturevalue(model))
    batches = composer.calibration(loaded, str(text_file), samples=6, seq_len=16, batch_size=2)
    found = search_loaded(
        loaded, batches, PlanConfig(select="greedy"), SearchConfig(resume=False), count=2, protected=(), prior=None,
        stages=silent,
    )  # fmt: skip
    assert found.num_blocks_run == judges[0].num_blocks_run
    assert found.points[1].removed == oracle(loaded, batches, 2, range(len(loaded.stack)))


def test_another_size_needs_no_new_search(pruned, avss_command, llama_folder, tmp_path, monkeypatch):
    first = pruned("--select", "greedy", "--count", 3)
    monkeypatch.setattr("avss.composer.choosing.search_loaded", None)  # would be an error to call
    out = tmp_path / "smaller"
    answer = avss_command(
        "prune", llama_folder, "--from-search", tmp_path / "out0", "--count", 1, "--out", out, "--quiet"
    )
    assert answer.code == 0, answer.err
    record = RunRecord.read(out)
    assert record.cuts[0].plan.removed == first.search.points[0].removed
    assert record.search == first.search
    refused(
        avss_command("prune", llama_folder, "--from-search", out, "--count", 4, "--out", tmp_path / "no", "--quiet"),
        "sets of 1 to 3", "`4`",
    )  # fmt: skip


def test_a_search_of_another_model_is_refused(pruned, avss_command, tmp_path, masked_folder, llama_folder):
    pruned("--select", "window", "--count", 1)
    pruned("--count", 1)
    arguments = ("--count", 1, "--out", tmp_path / "no", "--quiet")
    refused(avss_command("prune", masked_folder, "--from-search", tmp_path / "out0", *arguments), "another model")
    refused(avss_command("prune", llama_folder, "--from-search", tmp_path / "out1", *arguments), "holds no search")
    refused(avss_command("prune", llama_folder, "--from-search", tmp_path / "none", *arguments), "no record")


def test_a_second_search_measures_nothing(pruned, own_cache, monkeypatch):
    first = pruned("--select", "greedy", "--count", 2)
    assert len(list(own_cache.rglob("*.jsonl"))) == 1

    def measured(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(Judge, "judge", measured)
    second = pruned("--select", "greedy", "--count", 2)
    assert second.search.points == first.search.points
    assert second.search.num_blocks_run == first.search.num_blocks_run
    with pytest.raises(AssertionError, match="measured again"):
        pruned("--select", "greedy", "--count", 2, "--no-resume")


def test_a_task_whose_rows_changed_is_measured_again(pruned, own_cache, choice_file, llama_folder, tmp_path):
    task = tmp_path / "questions.jsonl"
    rows = [json.loads(line) for line in choice_file.read_text().splitlines()]
    arguments = ("--select", "greedy", "--count", 1, "--objective", "accuracy", "--objective-task", f"choice={task}")

    def searched(answers):
        task.write_text("".join(json.dumps({**row, "answer": answer}) + "\n" for row, answer in answers))
        return pruned(*arguments).search.points[0]

    def accuracy(removed):
        small, tokenizer = avss.prune(llama_folder, blocks=removed).model, composer.load(llama_folder).tokenizer
        return avss.evaluate(small, [f"choice={task}"], tokenizer=tokenizer).dense[0].value

    for right in (False, True):  # of two answers, the wrong ones become the right ones
        point = searched([(row, row["answer"] if right else 1 - row["answer"]) for row in rows])
        assert 1 - point.cost == pytest.approx(accuracy(point.removed))
    searched([(row, row["answer"]) for row in rows])
    assert len(list(own_cache.rglob("*.jsonl"))) == 2


def test_measurements_of_other_versions_are_not_gone_on_with(pruned, own_cache, monkeypatch):
    pruned("--select", "window", "--count", 1)
    monkeypatch.setattr("avss.composer.searching.versions", lambda: {"torch": "another"})
    pruned("--select", "window", "--count", 1)
    assert len(list(own_cache.rglob("*.jsonl"))) == 2


def test_the_seed_of_the_text_is_the_searchs(pruned, llama_folder):
    for words in ((), ("--seed", 3)):
        search = pruned("--select", "evolution", "--count", 1, *words).search
        assert search.settings["seed"] == search.data.seed == (3 if words else 0)
    text = {"data": DataConfig(source="builtin", seed=5, samples=4, seq_len=16), "count": 1, "select": "window"}
    for given, seed in (({}, 5), ({"seed": 2}, 2)):
        assert avss.prune(llama_folder, search=given, **text).record.search.settings["seed"] == seed
    with pytest.raises(ConfigError, match="`samples` stands beside a whole `DataConfig`"):
        avss.prune(llama_folder, samples=8, **text)


def test_a_budget_ends_a_search_and_says_so(pruned):
    record = pruned("--select", "greedy", "--count", 3, "--max-passes", 0.6)
    assert record.search.passes <= 0.6
    assert not record.search.is_complete
    assert len(record.cuts[0].plan.removed) == 3
    assert any("budget of the search ended" in warning for warning in record.warnings)


def test_a_time_budget_is_understood(pruned):
    assert pruned("--select", "window", "--count", 1, "--search-time", "1h30m").search.settings["seconds"] == 5400


def test_the_loss_and_the_accuracy_of_a_task_can_be_the_objective(pruned, choice_file, llama_folder):
    by_loss = pruned("--select", "greedy", "--count", 1, "--objective", "loss").search
    assert by_loss.points[0].cost == pytest.approx(by_loss.points[0].loss_change)
    by_task = pruned(
        *("--select", "greedy", "--count", 2, "--objective", "accuracy", "--objective-task", f"choice={choice_file}")
    ).search
    record = avss.evaluate(
        avss.prune(llama_folder, blocks=by_task.points[1].removed).model,
        [f"choice={choice_file}"],
        tokenizer=composer.load(llama_folder).tokenizer,
    )
    assert 1 - by_task.points[1].cost == pytest.approx(record.dense[0].value)
    assert by_task.points[1].num_sequences == 12


def test_the_best_sets_are_judged_again_after_a_repair(pruned, llama_folder, text_file, tmp_path):
    arguments = ("--select", "greedy", "--count", 2, "--protect", "none", "--compensate", "refit")
    record = pruned(*arguments)
    search, loaded = record.search, load_model(llama_folder)
    assert len(search.finalists) == 3
    assert record.cuts[0].plan.removed == search.finalists[0].removed
    assert [one.after for one in search.finalists] == sorted(one.after for one in search.finalists)
    near = {one.removed for one in search.others if len(one.removed) == 2}
    assert {one.removed for one in search.finalists} <= near | {search.points[1].removed}
    batches = composer.calibration(loaded, text_file, samples=6, seq_len=16, batch_size=2).rewritten()
    for one in search.finalists:
        plan = Plan(num_blocks=len(loaded.stack), removed=one.removed, method="explicit", rule="by hand")
        _, story = compensate(loaded, cut(loaded, plan), plan, batches, method="refit")
        assert (one.before, one.after) == pytest.approx((story.before, story.after), rel=1e-4)
    # Another run that repairs takes the set that was best when repaired, one that does not the searched one.
    worst = search.model_copy(update={"finalists": search.finalists[::-1]})
    earlier = tmp_path / "earlier.json"
    earlier.write_text(record.model_copy(update={"search": worst}).to_json())
    again = pruned("--from-search", earlier, "--count", 2, "--compensate", "refit").cuts[0].plan
    assert again.removed == worst.finalists[0].removed
    assert "the best of 3 sets after a repair" in again.rule
    assert pruned("--from-search", earlier, "--count", 2).cuts[0].plan.removed == search.points[1].removed
    assert len(pruned("--from-search", earlier, "--count", 1, "--compensate", "refit").cuts[0].plan.removed) == 1
    assert pruned(*arguments, "--finalists", 1).search.finalists == ()
    assert pruned(*arguments[:-2]).search.finalists == ()
    assert pruned(*arguments, "--objective", "loss").search.finalists == ()


def test_sets_that_scores_choose_are_finalists_too(llama_folder, text_file, tmp_path):
    config = RunConfig(
        model={"source": str(llama_folder)},
        data={"source": str(text_file), "samples": 6, "seq_len": 16, "batch_size": 2},
        criteria=("avss-paper",),
        plan={"count": 2, "select": "greedy", "criterion": "last"},
        search={"finalists": 12},
        compensate="refit",
        out=str(tmp_path / "out"),
    )
    record = avss.run(config)
    sources = {one.removed: one.source for one in record.search.finalists}
    assert set(sources.values()) <= {"search", "runner-up", "avss-paper", "last", "shifted"}
    count = len(record.search.points[1].removed)
    by_score = {make_plan(scores, PlanConfig(count=count)).removed for scores in record.scores}
    assert by_score <= set(sources)


def test_a_criterion_can_screen(pruned):
    record = pruned("--select", "greedy", "--count", 2, "--screen", "update-norm", "--width", 2)
    assert record.search.settings["screen"] == "update-norm"


def test_several_texts_are_mixed_sequence_by_sequence(llama_folder, text_file, review_file):
    loaded = composer.load(llama_folder)
    settings = {"samples": 6, "seq_len": 16, "batch_size": 2}
    one, other = (composer.calibration(loaded, str(path), **settings) for path in (text_file, review_file))
    both = composer.calibration(loaded, f"{text_file},{review_file}", **settings)
    assert [s.tolist() for s in both.sequences[0::2]] == [s.tolist() for s in one.sequences[:3]]
    assert [s.tolist() for s in both.sequences[1::2]] == [s.tolist() for s in other.sequences[:3]]
    assert both.facts.source == "text.txt, reviews.csv"
    assert both.facts.num_sequences == 6
    assert both.facts.num_tokens == sum(len(s) for s in both.sequences)
    assert both.facts.content_hash not in (one.facts.content_hash, other.facts.content_hash)


# --- targets other than a count ---


def parameters(record):
    return record.cuts[0].model.num_parameters


@pytest.mark.parametrize("select", ["scores", "greedy"])
def test_the_fewest_blocks_that_fit_go(pruned, select):
    dense = pruned("--count", 1)
    block = dense.model.num_parameters - parameters(dense)
    limit = dense.model.num_parameters - 2 * block
    fits = pruned("--select", select, "--max-params", limit)
    assert parameters(fits) == limit
    assert "fewest" in fits.cuts[0].plan.rule
    assert len(pruned("--select", select, "--max-params", limit - 1).cuts[0].plan.removed) == 3
    width = dense.model.checkpoint_bytes / dense.model.num_parameters
    by_bytes = pruned("--select", select, "--max-bytes", f"{limit * width / 1000 + 0.1}kB")
    assert by_bytes.cuts[0].model.checkpoint_bytes <= limit * width + 100
    assert len(by_bytes.cuts[0].plan.removed) == 2


def test_a_size_that_cannot_be_is_refused(avss_command, llama_folder, tmp_path):
    out = ("--out", tmp_path / "out", *SMALL)
    refused(avss_command("prune", llama_folder, "--max-params", 10, *out), "are left, more than 10")
    refused(avss_command("prune", llama_folder, "--max-params", "1B", *out), "fits into 1,000,000,000 already")
    refused(avss_command("prune", llama_folder, "--max-params", "many", *out), "max-params", "many")
    refused(avss_command("prune", llama_folder, "--max-bytes", "3 parsecs", *out), "max-bytes", "parsecs")


def test_the_most_that_keep_a_share_go(pruned, text_file, monkeypatch):
    kept = {1: 0.99, 2: 0.96, 3: 0.9}
    sizes = []

    def fake(dense, other):
        sizes.append(other)
        return (type("Entry", (), {"kept": kept[other]})(),)

    monkeypatch.setattr("avss.composer.choosing.evaluate_task", lambda models, task, **_: [5 - len(models[0].stack)])
    monkeypatch.setattr("avss.composer.choosing.retention", fake)
    task = ("--retention-task", f"perplexity={text_file}", "--count", 3)
    for wanted, count in ((0.95, 2), (0.9, 3), (0.99, 1)):
        record = pruned("--min-retention", wanted, *task)
        assert len(record.cuts[0].plan.removed) == count
        assert f"keep {wanted:.1%} of perplexity" in record.cuts[0].plan.rule


def test_what_is_kept_is_measured_on_the_cut(pruned, text_file, llama_folder):
    record = pruned("--min-retention", 0.01, "--count", 2, "--retention-task", f"perplexity={text_file}")
    assert len(record.cuts[0].plan.removed) == 2


def test_a_retention_that_no_cut_keeps_names_the_best_plan(avss_command, llama_folder, text_file, tmp_path):
    out = tmp_path / "out"
    answer = avss_command(
        *("prune", llama_folder, "--min-retention", 1, "--retention-task", f"perplexity={text_file}"),
        *("--select", "greedy", "--count", 2, "--data", text_file, "--out", out, *SMALL),
    )
    if answer.code == 0:
        pytest.skip("on random weights a cut may be better than the whole")
    refused(answer, "No cut keeps 100.0%", "the best of one block")
    assert not out.exists()


def latencies(monkeypatch, *values):
    """The dense model's latency in ms, and that with half of the free blocks gone (one of three)."""
    results = [{"latency_ms": type("Entry", (), {"value": value})()} for value in values]
    monkeypatch.setattr("avss.composer.choosing.evaluate_task", lambda *_, **__: results)


def test_a_speedup_is_estimated_from_latency(pruned, monkeypatch):
    """One block takes 20 of 100 ms: 1.5 times faster takes 34 ms away, two blocks."""
    latencies(monkeypatch, 100.0, 80.0)
    record = pruned("--speedup", 1.5)
    assert len(record.cuts[0].plan.removed) == 2
    assert "estimated from measured latency" in record.cuts[0].plan.rule


def test_an_earlier_search_gives_the_size_of_a_speedup(pruned, avss_command, llama_folder, tmp_path, monkeypatch):
    latencies(monkeypatch, 100.0, 80.0)
    points = pruned("--select", "greedy", "--count", 3).search.points
    pruned("--select", "greedy", "--count", 1)
    record = pruned("--from-search", tmp_path / "out0", "--speedup", 1.5)
    assert record.cuts[0].plan.removed == points[1].removed
    assert "for a speedup of 1.5" in record.cuts[0].plan.rule
    arguments = ("--from-search", tmp_path / "out1", "--speedup", 1.5, "--out", tmp_path / "no", "--quiet")
    refused(avss_command("prune", llama_folder, *arguments), "speedup of 1.5 takes 2 blocks", "sets of 1 to 1")


def test_only_a_size_target_hashes_the_model(llama_folder, monkeypatch):
    loaded, calls = composer.load(llama_folder), []
    monkeypatch.setattr("avss.models.load.fingerprint", lambda model, *_: calls.append(model) or "none")

    def chosen(**target):
        config = PlanConfig(criterion="last", protect="none", **target)
        table = ScoreTable(scores=(BlockScores(criterion="last", title="Last", values=(4.0, 3.0, 2.0, 1.0, 0.0)),))
        return choosing.choose(loaded, config, SearchConfig(), Timed(silent), batches=None, table=table).plan.removed

    assert chosen(count=2) == chosen(fraction=0.4) == (3, 4)
    assert calls == []
    assert chosen(max_bytes=loaded.facts().checkpoint_bytes - 1) == (4,)
    assert len(calls) == 2  # that of the line above, and one


@pytest.mark.parametrize("text", ["90s", "10m", "1h30m", "1.5h", "30 min", "1 hour 30 minutes"])
def test_times_are_read_alike_everywhere(text):
    assert SearchConfig.model_validate({"seconds": text}).seconds == Budget.parse(text).seconds


def test_a_speedup_that_cannot_be_is_refused(avss_command, llama_folder, text_file, tmp_path, monkeypatch):
    out = ("--data", text_file, "--out", tmp_path / "out", *SMALL)
    for dense, shorter in ((100.0, 80.0), (100.0, 101.0)):
        latencies(monkeypatch, dense, shorter)
        refused(avss_command("prune", llama_folder, "--speedup", 4, *out), "speedup of 4 cannot be had")


def test_a_speedup_is_truly_measured(avss_command, llama_folder, text_file, tmp_path):
    """On a tiny model the clock decides whether it can be had; either way it was asked."""
    arguments = ("--speedup", 1.01, "--data", text_file, "--out", tmp_path / "out", *SMALL)
    answer = avss_command("prune", llama_folder, *arguments)
    if answer.code == 0:
        assert "estimated from measured latency" in RunRecord.read(tmp_path / "out").cuts[0].plan.rule
    else:
        refused(answer, "speedup of 1.01 cannot be had", "latency measured")


def test_scores_in_rounds_are_made_of_what_is_left(pruned, llama_folder, text_file):
    record = pruned("--count", 3, "--score-rounds", 3, "--criterion", "update-norm", "--protect", "none")
    removed: list[int] = []
    for _ in range(3):
        small = avss.prune(llama_folder, blocks=removed) if removed else None
        loaded = composer.load(llama_folder)
        model = loaded if small is None else small.model
        table = avss.score(
            model, str(text_file), criteria="update-norm", tokenizer=loaded.tokenizer,
            samples=6, seq_len=16, batch_size=2,
        )  # fmt: skip
        kept = [block for block in range(5) if block not in removed]
        removed = sorted([*removed, kept[table["update-norm"].ranking()[0]]])
    assert list(record.cuts[0].plan.removed) == removed
    assert "before each of 3 rounds" in record.cuts[0].plan.rule


def test_scores_in_rounds_are_made_of_repaired_models_where_a_repair_follows(llama_folder, text_file, monkeypatch):
    scored, real = [], choosing.score_loaded

    def spied(loaded, *arguments, **settings):
        found = real(loaded, *arguments, **settings)
        scored.append(found[0].scores[0].values)
        return found

    monkeypatch.setattr(choosing, "score_loaded", spied)
    text = {"data": str(text_file), "samples": 24, "seq_len": 16, "batch_size": 4}
    settings = {"criterion": "update-norm", "protect": "none", "compensate": "refit"}
    plan = avss.prune(llama_folder, count=3, plan={"score_rounds": 3}, **settings, **text).plan
    loaded, removed, expected, raw = composer.load(llama_folder), [], [], []
    for _ in range(3):
        scores = []
        for repair in ("refit", "none"):
            small = avss.prune(llama_folder, blocks=removed, compensate=repair, **text) if removed else None
            model = loaded if small is None else small.model
            table = avss.score(
                model, text["data"], criteria="update-norm", tokenizer=loaded.tokenizer,
                samples=24, seq_len=16, batch_size=4,
            )  # fmt: skip
            scores.append(table["update-norm"])
        expected.append(pytest.approx(scores[0].values, rel=1e-5))
        raw.append(scores[1].values)
        kept = [block for block in range(5) if block not in removed]
        removed = sorted([*removed, kept[scores[0].ranking()[0]]])
    assert list(plan.removed) == removed
    assert scored[-2:] == expected[1:]
    assert scored[-2:] != [pytest.approx(values, rel=1e-5) for values in raw[1:]]
    assert "scored again before each of 3 rounds, 2 of the 2 cuts between them repaired" in plan.rule


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--count", 1, "--select", "magic"), ("select", "magic")),
        (("--blocks", "1", "--select", "greedy"), ("--blocks", "--select greedy")),
        (("--count", 1, "--contiguous", "--select", "greedy"), ("--contiguous",)),
        (("--count", 1, "--objective", "joy"), ("objective", "joy")),
        (("--count", 1, "--objective", "accuracy"), ("--objective-task",)),
        (("--count", 1, "--objective-task", "choice"), ("--objective accuracy",)),
        (("--count", 1, "--screen", "avs", "--select", "greedy"), ("`avs`", "Did you mean")),
        (("--count", 1, "--max-passes", 0), ("max-passes", "0")),
        (("--count", 1, "--search-time", "soon"), ("seconds", "soon")),
        (("--count", 1, "--speedup", 2), ("exactly one", "--speedup")),
        (("--speedup", 1), ("speedup", "1")),
        (("--min-retention", 1.5), ("min-retention", "1.5")),
        (("--min-retention", 0.9), ("--retention-task",)),
        (("--min-retention", 0.9, "--blocks", "1"), ("--min-retention",)),
        (("--count", 1, "--width", 0), ("width", "0")),
        (("--count", 4, "--select", "greedy"), ("cannot be removed",)),
        (("--count", 2, "--score-rounds", 2, "--select", "greedy"), ("--score-rounds",)),
        (("--count", 2, "--score-rounds", 2, "--contiguous"), ("--score-rounds", "--contiguous")),
        (("--count", 1, "--from-search", "earlier", "--select", "greedy"), ("`--select greedy`", "`--from-search`")),
        (("--count", 1, "--from-search", "earlier", "--score-rounds", 2), ("`--score-rounds 2`", "`--from-search`")),
        (("--count", 1, "--from-search", "earlier", "--protect", "0"), ("`--protect 0`", "`--from-search`")),
        (("--count", 1, "--objective", "loss"), ("`--objective loss`", "`--select greedy`")),
        (("--count", 1, "--objective", "kl"), ("`--objective kl`", "`--select greedy`")),
        (("--count", 1, "--search-time", "10m"), ("`--search-time 600`", "`--select greedy`")),
        (("--count", 1, "--max-passes", 3), ("`--max-passes 3`", "`--select greedy`")),
        (("--count", 1, "--beam", 2), ("`--beam 2`", "`--select greedy`")),
        (("--count", 1, "--no-resume"), ("`--no-resume`", "`--select greedy`")),
        (("--count", 1, "--from-search", "earlier", "--width", 3), ("`--width 3`",)),
        (("--count", 1, "--select", "greedy", "--finalists", 3), ("`--finalists 3`", "`--compensate auto`")),
        (("--count", 1, "--retention-task", "choice"), ("`--retention-task`", "--min-retention")),
    ],
)
def test_bad_settings_are_refused(avss_command, llama_folder, text_file, tmp_path, arguments, parts):
    out = tmp_path / "out"
    refused(avss_command("prune", llama_folder, "--data", text_file, "--out", out, *SMALL, *arguments), *parts)
    assert not out.exists()


def test_scores_of_an_earlier_run_cannot_be_searched(avss_command, llama_folder, text_file, tmp_path):
    scores, out = tmp_path / "scores", tmp_path / "out"
    small = ("--samples", 6, "--seq-len", 16, "--quiet")
    arguments = ("--criteria", "block-influence", "--data", text_file, "--out", scores, *small)
    assert avss_command("score", llama_folder, *arguments).code == 0
    refused(
        avss_command("prune", llama_folder, "--scores", scores, "--count", 1, "--select", "greedy", "--out", out, "-q"),
        "--scores", "no text",
    )  # fmt: skip
    assert avss_command("prune", llama_folder, "--scores", scores, "--count", 1, "--out", out, "-q").code == 0


@pytest.mark.parametrize("way", [("--on-disk",), ("--format", "gguf")])
def test_a_cut_from_file_to_file_does_not_search(avss_command, llama_folder, tmp_path, way):
    out = ("--out", tmp_path / "out", "--quiet", *way)
    refused(
        avss_command("prune", llama_folder, "--count", 1, "--select", "greedy", *out), "--select greedy", "file to file"
    )
    refused(avss_command("prune", llama_folder, "--speedup", 1.2, *out), "--speedup", "file to file")


@pytest.mark.parametrize("way", ["--on-disk", "gguf"])
def test_a_size_is_reached_from_file_to_file_too(avss_command, llama_folder, tmp_path, way):
    source = llama_folder if way == "--on-disk" else write_gguf(tmp_path / "model.gguf")
    flags = ("--criterion", "last", "--protect", "none", "--quiet", "--force")
    from_file = (*flags, *((way,) if way == "--on-disk" else ("--format", "gguf")))

    def cut_by(*arguments):
        answer = avss_command("prune", source, "--out", tmp_path / "out", *arguments)
        assert answer.code == 0, answer.err
        return RunRecord.read(tmp_path / "out")

    one = cut_by(*from_file, "--count", 1)
    limit = one.model.num_parameters - 2 * (one.model.num_parameters - parameters(one))
    fits = cut_by(*from_file, "--max-params", limit)
    assert parameters(fits) == limit
    assert "fewest that leave at most" in fits.cuts[0].plan.rule
    assert len(cut_by(*from_file, "--max-params", limit - 1).cuts[0].plan.removed) == 3
    if way == "--on-disk":
        assert cut_by(*flags, "--in-memory", "--max-params", limit).cuts[0].plan.removed == fits.cuts[0].plan.removed
        scored = ("--out", tmp_path / "none", "--on-disk", "--criterion", "update-norm")
        refused(avss_command("prune", source, "--max-params", 10, *scored), "parameters are left, more than 10")
    whole_size, size = one.model.checkpoint_bytes, one.cuts[0].model.checkpoint_bytes
    by_bytes = cut_by(*from_file, "--max-bytes", f"{(2 * size - whole_size) / 1000:.3f}kB")
    assert len(by_bytes.cuts[0].plan.removed) == 2
    none = ("--out", tmp_path / "none", *from_file)
    refused(avss_command("prune", source, "--max-params", 10, *none), "parameters are left, more than 10")
    refused(avss_command("prune", source, "--max-bytes", "1GB", *none), "bytes and so fits into 1,000,000,000 already")


def test_an_objective_that_the_model_has_not_is_refused(avss_command, encoder_folder, text_file, tmp_path):
    arguments = ("--count", 1, "--select", "greedy", "--objective", "loss", "--data", text_file)
    refused(
        avss_command("prune", encoder_folder, "--out", tmp_path / "out", *arguments, *SMALL), "causal language model"
    )


def test_run_searches_reports_and_can_be_cut_again(avss_command, llama_folder, text_file, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    answer = avss_command(
        *("run", llama_folder, "--select", "greedy", "--count", 2, "--compare", "update-norm", "--data", text_file),
        *("--task", f"perplexity={text_file}", "--out", out, "--limit", 4, "--max-passes", 40),
        *("--samples", 6, "--seq-len", 16, "--batch-size", 2),
    )
    assert answer.code == 0, answer.err
    assert "passes of the whole model" in answer.out
    record = RunRecord.read(out)
    assert [cut.name for cut in record.cuts] == ["greedy", "update-norm"]
    assert (out / "figures" / "search.svg").is_file()
    assert (out / "search.csv").read_text().splitlines()[1].startswith("1,")
    assert 'id="search"' in (out / "report.html").read_text()
    assert read_search(out, composer.load(llama_folder)) == record.search
    assert avss_command("prune", llama_folder, "--from-search", out, "--count", 1, "--out", again, "-q").code == 0
    settings = json.loads((out / "record.json").read_text())["settings"]
    assert settings["search"]["max_passes"] == 40


def test_what_trying_everything_takes_is_counted_the_long_way():
    num, free, count, total = 12, 10, 4, 0
    for step in range(count):
        for _ in range(free - step):
            total += num - step - 1
    assert passes_of_all(num, free, count) == total / num


# --- what is found out before anything dear, and what is said after it ---


def test_a_budget_below_the_first_look_goes_by_the_scores(pruned, llama_folder, text_file):
    record = pruned("--select", "greedy", "--count", 2, "--max-passes", 0.1, "--criterion", "update-norm")
    by_scores = pruned("--criterion", "update-norm", "--count", 2, "--protect", "0,-1")
    assert record.cuts[0].plan.removed == by_scores.cuts[0].plan.removed
    assert record.search.settings["screen"] == "update-norm"
    assert any(
        "too small to measure each block alone first: it went by `update-norm`" in one for one in record.warnings
    )
    assert any("were compared; the likeliest blocks were added" in one for one in record.warnings)
    plenty = pruned("--select", "greedy", "--count", 2)
    assert plenty.search.settings["screen"] == "damage"
    assert not any("budget" in warning for warning in plenty.warnings)


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ((), ("--retention-task",)),
        (("--retention-task", "speed"), ("`speed` has no retention",)),
        (("--retention-task", "choice=missing.jsonl"), ("missing.jsonl",)),
    ],
)
def test_a_retention_without_a_fit_task_costs_no_search(
    avss_command, llama_folder, text_file, tmp_path, task, parts, monkeypatch
):
    monkeypatch.setattr(choosing, "search_loaded", lambda *_, **__: pytest.fail("searched"))
    arguments = ("--select", "greedy", "--min-retention", 0.9, *task, "--data", text_file, "--out", tmp_path / "x")
    refused(avss_command("prune", llama_folder, *arguments, *SMALL), *parts)


def test_a_mistake_in_a_task_costs_no_run(avss_command, llama_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "score_loaded", lambda *_, **__: pytest.fail("scored"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "Which?", "choices": ["one", "two"], "answer": 7}\n')
    arguments = ("run", llama_folder, "--count", 1, "--data", text_file, "--out", tmp_path / "x", *SMALL)
    for task in ("choice=missing.jsonl", f"choice={bad}", f"classification={text_file}"):
        refused(avss_command(*arguments, "--task", f"perplexity={text_file}", "--task", task))
    assert not (tmp_path / "x").exists()


def test_a_criterion_to_compare_with_is_refused_before_the_search(
    avss_command, llama_folder, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(choosing, "search_loaded", lambda *_, **__: pytest.fail("the search was begun"))
    arguments = ("run", llama_folder, "--data", text_file, "--select", "greedy", "--count", 1, "--out", tmp_path / "x")
    # A handful of tokens has no activation below 1e-5: this score is undefined.
    few = ("--samples", 1, "--seq-len", 4, "--task", f"perplexity={text_file}", "--quiet")
    refused(avss_command(*arguments, "--compare", "avss-reference", *few), "avss-reference", "undefined")
    assert not (tmp_path / "x").exists()


def test_rounds_are_compared_with_one_round_of_the_same_criterion(avss_command, llama_folder, text_file, tmp_path):
    arguments = ("run", llama_folder, "--data", text_file, "--count", 3, "--criterion", "random", "--protect", "none")
    tasks = ("--task", f"perplexity={text_file}", "--limit", 2, "--compare", "random", *SMALL)
    found = []
    for rounds in (1, 3):
        out = tmp_path / str(rounds)
        answer = avss_command(*arguments, "--score-rounds", rounds, *tasks, "--out", out)
        assert answer.code == 0, answer.err
        found.append([cut.plan.removed for cut in RunRecord.read(out).cuts])
    (once,), (rounds, compared) = found
    assert compared == once != rounds


def test_rounds_go_with_a_size(pruned):
    dense = pruned("--count", 1)
    block = dense.model.num_parameters - parameters(dense)
    limit = dense.model.num_parameters - 2 * block
    record = pruned("--score-rounds", 2, "--max-params", limit, "--criterion", "update-norm")
    assert parameters(record) == limit
    assert record.cuts[0].plan.removed == pruned(
        "--score-rounds", 2, "--count", 2, "--criterion", "update-norm"
    ).cuts[0].plan.removed  # fmt: skip


def test_rounds_stop_where_fewer_blocks_are_enough(pruned, tmp_path):
    """The first block of this model is smaller than the others: two blocks are enough whichever, another alone too."""
    model = tiny("DeepseekV3ForCausalLM", "deepseek_v3", first_k_dense_replace=1)()
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    sizes = [sum(p.numel() for p in block.parameters()) for block in loaded.stack.blocks]
    assert sizes[0] < sizes[-1]
    limit = loaded.facts().num_parameters - sizes[-1]
    arguments = ("--criterion", "last", "--protect", "none", "--max-params", limit)
    for rounds in (1, 2):
        record = pruned(*arguments, "--score-rounds", rounds, model=tmp_path / "model")
        assert record.cuts[0].plan.removed == (len(sizes) - 1,)


def test_a_retention_is_kept_with_few_free_blocks(pruned, text_file):
    record = pruned("--min-retention", 0.01, "--retention-task", f"perplexity={text_file}", "--protect", "0,1,2")
    assert record.cuts[0].plan.removed == (3, 4)


def test_settings_of_tasks_reach_every_task(pruned, avss_command, llama_folder, choice_file, text_file, tmp_path):
    task = ("--objective", "accuracy", "--objective-task", f"choice={choice_file}")
    settings = pruned("--select", "greedy", "--count", 1, *task).search.settings["task"]
    assert (settings["batch_size"], settings["seq_len"]) == (2, 16)
    out = tmp_path / "run"
    answer = avss_command(
        *("run", llama_folder, "--select", "greedy", "--count", 1, *task, "--limit", 3, "--data", text_file),
        *("--task", f"perplexity={text_file}", "--out", out, *SMALL),
    )
    assert answer.code == 0, answer.err
    assert RunRecord.read(out).search.points[0].num_sequences == 3


def test_rounds_leave_out_the_first_token_where_scores_do(llama_folder, text_file, tmp_path, monkeypatch):
    seen, real = [], choosing.score_loaded

    def spied(loaded, batches, criteria, first_token, *rest, **settings):
        seen.append(first_token)
        return real(loaded, batches, criteria, first_token, *rest, **settings)

    monkeypatch.setattr(choosing, "score_loaded", spied)
    config = RunConfig(
        model={"source": str(llama_folder)}, data=DataConfig(source=str(text_file), samples=6, seq_len=16),
        plan=PlanConfig(count=2, score_rounds=2), first_token=False, out=str(tmp_path / "out"),
        tasks=({"kind": "perplexity", "data": str(text_file), "seq_len": 16},),
    )  # fmt: skip
    avss.run(config)
    assert seen == [False]


def test_the_best_keeps_what_was_asked_for():
    def best(**asked):
        found = whole._at_its_best(RunConfig(model={"source": "m"}, out="o", quality="best", **asked))
        return found.plan.select, found.compensate

    assert best(plan=PlanConfig(count=2)) == ("greedy", "auto")
    assert best(plan=PlanConfig(count=2, select="scores"), compensate="none") == ("scores", "none")
    assert best(plan=PlanConfig(count=2, score_rounds=2), compensate="refit") == ("scores", "refit")
    assert best(plan=PlanConfig(count=2, criterion="avss")) == ("greedy", "auto")


def test_a_set_that_cannot_go_is_no_finalist(llama_folder, text_file, monkeypatch):
    loaded = load_model(llama_folder)
    batches = composer.calibration(loaded, text_file, samples=6, seq_len=16, batch_size=2)

    def refusing(given, plan):
        if plan.removed == (1, 2):
            raise UnsupportedArchitectureError("not these")
        return cut(given, plan)

    monkeypatch.setattr(finals, "cut", refusing)
    sets = {(1, 2): "search", (2, 3): "runner-up", (1, 3): "avss"}
    found = judge_finalists(loaded, sets, batches, 3, Timed(silent))
    assert {one.removed for one in found} == {(2, 3), (1, 3)}


@pytest.mark.parametrize("seed", range(8))
def test_beside_each_set_stand_those_with_a_gap_moved_by_a_block(seed):
    draw = np.random.default_rng(seed)
    given = {tuple(sorted(draw.choice(20, size=6, replace=False).tolist())): f"set {place}" for place in range(4)}
    protected = (0, 19, int(draw.integers(20)))
    found = choosing._with_shifted(given, 20, protected)
    assert {removed: source for removed, source in found.items() if source != "shifted"} == given
    assert len(found) <= choosing._MOST_SETS
    expected = {
        other
        for one in given
        for other in itertools.combinations(range(20), 6)
        if _is_shifted(one, other) and not (set(other) - set(one)) & set(protected)
    }
    assert found.keys() <= expected | given.keys()
    assert len(found) == min(choosing._MOST_SETS, len(expected | given.keys()))


def _is_shifted(one, other):
    """A slow way to say it: a run of two blocks or more has lost its one end and gone on at the other."""
    joins, leaves = set(other) - set(one), set(one) - set(other)
    if len(joins) != 1:
        return False
    (new,), (old,) = joins, leaves
    between = range(min(new, old) + 1, max(new, old))
    behind = old - 1 if new > old else old + 1
    return len(between) > 0 and set(between) <= set(one) and behind not in one


@pytest.mark.parametrize(("screening", "read"), [(192, 80), (40, 40), (8, 80)])
def test_finalists_are_judged_by_choices_too_where_prompts_ask_for_some(
    llama_folder, text_file, monkeypatch, screening, read
):
    """Raw by some of the prompts; by all of them where so few would say nothing."""
    monkeypatch.setattr(finals, "SCREENING", screening)
    loaded = load_model(llama_folder)
    batches = composer.calibration(loaded, text_file, samples=24, seq_len=16, batch_size=4)
    names = sorted(word for word in loaded.tokenizer.get_vocab() if word.isalpha())
    draw = np.random.default_rng(0)
    rows = {"the cat {text} a dog {sees|runs}": [(" ".join(draw.choice(names, size=5)),) for _ in range(80)]}
    prompts = Augmentation(loaded.tokenizer, 0.0, "packed", list(rows), rows=rows).asked((0,))
    sets = {(1, 2): "search", (2, 3): "runner-up", (1, 3): "avss", (1, 4): "runner-up"}
    plain = judge_finalists(loaded, sets, batches, 3, Timed(silent))
    assert {one.lost for one in plain} == {None}
    lost, lost_raw = ChoiceYardstick(loaded, prompts), ChoiceYardstick(loaded, prompts[:read])
    raw = {}
    measure = Yardstick(loaded, split(batches.rewritten())[2], num_shared=0)
    for removed in sets:
        plan = Plan(num_blocks=len(loaded.stack), removed=removed, method="explicit", rule="by hand")
        raw[removed] = measure(cut(loaded, plan)) * lost_raw(cut(loaded, plan))
    found = judge_finalists(loaded, sets, batches, 3, Timed(silent), prompts=lambda: prompts)
    assert {one.removed for one in found} == set(sorted(raw, key=lambda removed: raw[removed])[:3])
    assert [one.damage for one in found] == sorted(one.damage for one in found)
    for one in found:
        plan = Plan(num_blocks=len(loaded.stack), removed=one.removed, method="explicit", rule="by hand")
        repaired, story = compensate(loaded, cut(loaded, plan), plan, batches.rewritten(), method="refit")
        assert (one.after, one.lost) == pytest.approx((story.after, lost(repaired)), rel=1e-4)
        assert one.damage == pytest.approx(one.after * one.lost)


@pytest.mark.parametrize(
    ("seconds", "given", "expected"), [(None, {}, 3), (2400, {}, 3), (600, {}, 1), (600, {"finalists": 2}, 2)]
)
def test_finalists_are_for_those_who_have_time(seconds, given, expected):
    config = RunConfig(model={"source": "m"}, out="o", quality="best", time=seconds, plan=PlanConfig(count=2),
                       search=SearchConfig(**given))  # fmt: skip
    assert whole._at_its_best(config).search.finalists == expected


def test_time_that_is_over_leaves_out_what_may_be_left_out(llama_folder, text_file):
    loaded = composer.load(llama_folder)
    batches = composer.calibration(loaded, str(text_file), samples=24, seq_len=16, batch_size=4)
    plan = Plan(num_blocks=5, removed=(1, 3), method="explicit", rule="by hand")
    smaller = cut(loaded, plan)
    for allowed in range(3):
        answers = iter([True] * allowed + [False] * 9)
        _, story = compensate(loaded, smaller, plan, batches, method="auto", may_go_on=lambda: next(answers))  # noqa: B023
        assert len(story.cuts) == 2
        assert len(story.steps) <= allowed
    sets = {(1, 3): "search", (1, 2): "runner-up", (2, 3): "runner-up"}
    for answers, count in (((), 0), ((True,), 1), ((True, True), 1), ((True, True, True), 2), ((True,) * 4, 3)):
        left = iter([*answers, *[False] * 9])
        found = judge_finalists(loaded, sets, batches, 3, Timed(silent), lambda: next(left))  # noqa: B023
        assert len(found) == count


def test_a_target_that_the_finished_model_misses_is_said():
    facts = ModelFacts.model_construct()
    plan = Plan(num_blocks=5, removed=(1,), method="greedy", rule="")

    def one(*kept):
        return Cut.model_construct(plan=plan, model=facts, retention=kept)

    lost = Retention(task="choice:questions", metric="accuracy", dense=0.8, value=0.6, ratio=0.75, kept=0.75)
    fine = Retention(task="perplexity", metric="perplexity", dense=10.0, value=10.5, ratio=1.05, kept=0.98)
    task = TaskConfig.parse("choice=questions.jsonl")
    asked = PlanConfig(min_retention=0.9, retention_task=task)
    (said,) = target_warnings(asked, one(fine, lost))
    assert "keeps 75.0% of choice:questions, accuracy, less than the 90.0%" in said
    assert target_warnings(asked, one(fine)) == ()
    assert target_warnings(PlanConfig(min_retention=0.7, retention_task=task), one(lost)) == ()
    slow = Retention(task="speed", metric="latency_ms", dense=100.0, value=90.0, ratio=0.9)
    (said,) = target_warnings(PlanConfig(speedup=1.3), one(slow))
    assert "1.11 times as fast, and 1.3 were asked for" in said
    assert target_warnings(PlanConfig(speedup=1.12), one(slow)) == ()


def jamba(tmp_path):
    """Attention in every second block: only sets that leave it so can be cut."""
    loaded = adopt(small_model(JambaForCausalLM, "jamba", attn_layer_period=2, attn_layer_offset=0))
    loaded.model.save_pretrained(tmp_path / "jamba")
    word_tokenizer().save_pretrained(tmp_path / "jamba")
    return load_model(tmp_path / "jamba")


def can_go(loaded, removed):
    try:
        cut(loaded, make_explicit(loaded, removed))
    except UnsupportedArchitectureError:
        return False
    return True


def make_explicit(loaded, removed):
    return Plan(num_blocks=len(loaded.stack), removed=removed, method="explicit", rule="by hand")


@pytest.mark.parametrize("objective", ["kl", "accuracy"])
@pytest.mark.parametrize("select", ["greedy", "evolution", "window"])
def test_a_search_finds_what_can_be_cut(select, objective, tmp_path, text_file, choice_file):
    """Every set of every size is tried by `cut`: the search's can go wherever one can, and else it says so."""
    loaded = jamba(tmp_path)
    free = range(1, len(loaded.stack) - 1)
    size = len(free) - 1
    possible = {
        size: [one for one in itertools.combinations(free, size) if can_go(loaded, one)] for size in range(1, size + 1)
    }
    assert any(possible.values())
    assert not all(possible.values())
    batches = composer.calibration(loaded, text_file, samples=4, seq_len=16, batch_size=2)
    task = TaskConfig(kind="choice", data=str(choice_file), limit=4)
    found = search_loaded(
        loaded,
        batches,
        PlanConfig(count=size, select=select, contiguous=select == "window"),
        SearchConfig(objective=objective, task=task if objective == "accuracy" else None, resume=False),
        count=size,
        protected=(0, len(loaded.stack) - 1),
        prior=None,
        stages=Timed(silent),
    )
    for point in found.points:
        assert (point.refusal is None) == can_go(loaded, point.removed)
        assert point.cost < 100
        if select != "window":  # runs of neighbours only
            assert (point.refusal is None) == bool(possible[len(point.removed)])
    assert all(can_go(loaded, one.removed) for one in found.others)


def test_a_size_of_which_no_set_can_go_is_refused_with_those_that_can(avss_command, text_file, tmp_path):
    jamba(tmp_path)
    out = tmp_path / "out"
    options = ("--select", "greedy", "--data", text_file, "--out", out, *SMALL)
    answer = avss_command("prune", tmp_path / "jamba", "--count", 1, *options)
    refused(answer, "None of the sets of 1 block that were tried", "uneven distances", "Ask for more.")
    assert not out.exists()
