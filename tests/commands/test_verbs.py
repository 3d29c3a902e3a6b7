"""Each verb does what it says, on tiny models, through the command line as a person types it."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from avss import composer
from avss.cli.execute import merge_flags
from avss.composer.evaluating import choose_tasks
from avss.config import TaskConfig
from avss.errors import ConfigError
from avss.record import RunRecord
from tests.commands.test_bad_input import refused

SMALL = ("--samples", 6, "--seq-len", 16, "--batch-size", 2)


def test_help_answers_fast_because_torch_is_not_imported():
    code = (
        "import sys; sys.argv=['avss','--help']\ntry:\n import avss.cli.main as m; m.main()\nexcept SystemExit: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("False")
    assert "evaluate" in done.stdout


def test_every_verb_has_help_that_names_its_options(avss_command):
    for verb in ("run", "score", "prune", "verify", "evaluate", "report", "inspect", "demo"):
        answer = avss_command(verb, "--help")
        assert answer.code == 0
        assert "--json" in answer.out


def test_version_is_printed(avss_command):
    from avss import __version__

    assert avss_command("--version").out.strip() == f"avss {__version__}"


def test_score_prints_a_table_and_writes_scores_report_and_figures(avss_command, llama_folder, text_file, tmp_path):
    out = tmp_path / "scores"
    answer = avss_command(
        "score", llama_folder, "--data", text_file, "--criteria", "avss,block-influence", "--out", out, *SMALL
    )
    assert answer.code == 0, answer.err
    assert "influence" in answer.out  # the head of the table breaks long names at their hyphen
    record = RunRecord.read(out)
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["block-influence"]) for row in rows] == list(record.scores[1].values)
    assert (out / "report.html").stat().st_size > 100_000
    assert {path.suffix for path in (out / "figures").iterdir()} == {".png", ".svg"}


def test_score_json_is_the_table_and_nothing_else(avss_command, llama_folder, text_file):
    answer = avss_command("score", llama_folder, "--data", text_file, "--criteria", "all", "--json", "--quiet", *SMALL)
    table = json.loads(answer.out)
    assert "block-influence" in [scores["criterion"] for scores in table["scores"]]
    assert answer.err == ""


@pytest.mark.parametrize("model", ["llama_folder", "encoder_folder", "masked_folder", "classifier_folder"])
def test_prune_writes_a_verified_stock_checkpoint(avss_command, model, text_file, tmp_path, request):
    folder, out = request.getfixturevalue(model), tmp_path / "smaller"
    answer = avss_command("prune", folder, "--count", 2, "--data", text_file, "--out", out, *SMALL)
    assert answer.code == 0, answer.err
    assert "Verified" in answer.out
    assert "Original -> new" in answer.out
    record = RunRecord.read(out)
    proof = record.cuts[0].verification
    assert proof is not None
    assert proof.passed
    assert proof.max_diff_memory == proof.max_diff_bypass == 0
    assert record.cuts[0].model.num_blocks == record.model.num_blocks - 2
    card = (out / "README.md").read_text()
    assert "arxiv.org/abs/2403.03853" in card
    assert f"--out {out}" in card  # the exact command


def test_the_result_loads_and_generates_in_a_process_that_never_heard_of_avss(avss_command, llama_folder, tmp_path):
    out = tmp_path / "smaller"
    assert avss_command("prune", llama_folder, "--blocks", "1,2", "--out", out).code == 0
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained({str(out)!r}, output_loading_info=True)
assert not any(info.values()), info
tokens = AutoTokenizer.from_pretrained({str(out)!r})("the cat sees the dog", return_tensors="pt")
one = model.generate(**tokens, max_new_tokens=8, do_sample=False, use_cache=True)
two = model.generate(**tokens, max_new_tokens=8, do_sample=False, use_cache=False)
assert torch.equal(one, two)
assert not any(name.split(".")[0] == "avss" for name in sys.modules)
print(model.config.num_hidden_layers)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == RunRecord.read(out).model.num_blocks - 2


@pytest.mark.parametrize(
    ("model", "task", "data"),
    [
        ("llama_folder", "perplexity", "text_file"),
        ("llama_folder", "choice", "choice_file"),
        ("llama_folder", "classification", "review_file"),
        ("masked_folder", "perplexity", "text_file"),
        ("masked_folder", "choice", "choice_file"),
        ("classifier_folder", "classification", "review_file"),
        ("encoder_folder", "choice", "choice_file"),
        ("encoder_folder", "classification", "review_file"),
        ("encoder_folder", "similarity", "text_file"),
    ],
)
def test_evaluate_compares_with_the_baseline(avss_command, model, task, data, tmp_path, request):
    folder, out = request.getfixturevalue(model), tmp_path / "smaller"
    assert avss_command("prune", folder, "--blocks", "1", "--out", out).code == 0
    answer = avss_command(
        *("evaluate", out, "--baseline", folder, "--data", request.getfixturevalue(data), "--task", task),
        *("--limit", 6, "--seq-len", 16, "--json", "--quiet"),
    )
    assert answer.code == 0, answer.err
    record = RunRecord.model_validate_json(answer.out)
    assert record.cuts[0].plan.removed == (1,)
    assert {m.metric for m in record.dense} & {m.metric for m in record.cuts[0].measurements}
    assert all(kept.ratio > 0 for kept in record.cuts[0].retention)
    assert all(m.stderr is not None for m in record.dense)


def test_evaluating_a_model_against_itself_keeps_everything(avss_command, llama_folder, choice_file):
    answer = avss_command(
        *("evaluate", llama_folder, "--baseline", llama_folder, "--task", f"choice={choice_file}", "--json", "--quiet")
    )
    record = RunRecord.model_validate_json(answer.out)
    assert [kept.ratio for kept in record.cuts[0].retention] == [1.0] * len(record.cuts[0].retention)
    assert {kept.flips for kept in record.cuts[0].retention} <= {0.0, None}


def test_run_goes_the_whole_way(avss_command, llama_folder, text_file, choice_file, tmp_path):
    out = tmp_path / "run"
    answer = avss_command(
        *("run", llama_folder, "--out", out, "--data", text_file, "--count", 1, "--compare", "first", *SMALL),
        *("--task", f"perplexity={text_file}", "--task", f"choice={choice_file}", "--task", "speed", "--limit", 4),
    )
    assert answer.code == 0, answer.err
    assert "Verified" in answer.out
    assert "perplexity" in answer.out
    record = RunRecord.read(out)
    assert [cut.plan.method for cut in record.cuts] == ["block-influence", "first"]
    assert record.cuts[1].plan.removed == (0,)
    assert record.cuts[0].path == "model"
    assert record.cuts[1].path is None
    names = {"model", "record.json", "scores.csv", "report.html", "figures", "statistics.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "model" / "config.json").is_file()
    assert all(len(cut.samples) == len(record.prompts) > 0 for cut in record.cuts)


def test_run_reads_a_config_file_and_flags_win(avss_command, llama_folder, text_file, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        f"""
out = "{tmp_path / "from-file"}"
criteria = ["update-norm"]
[model]
source = "{llama_folder}"
[data]
source = "{text_file}"
samples = 4
seq_len = 16
[plan]
criterion = "update-norm"
fraction = 0.5
[[tasks]]
kind = "perplexity"
data = "{text_file}"
limit = 2
seq_len = 16
"""
    )
    answer = avss_command("run", "--config", file, "--count", 1, "--out", tmp_path / "from-flag", "--quiet")
    assert answer.code == 0, answer.err
    record = RunRecord.read(tmp_path / "from-flag")
    assert record.cuts[0].plan.method == "update-norm"
    assert len(record.cuts[0].plan.removed) == 1
    assert not (tmp_path / "from-file").exists()


def test_task_settings_reach_the_tasks_that_run_by_itself_and_those_of_the_file(llama_folder, text_file, tmp_path):
    flags = {"model": {"source": str(llama_folder)}, "data": {"seed": 3}, "plan": {"count": 1}, "out": str(tmp_path)}
    file = tmp_path / "run.toml"
    file.write_text('[search]\nseed = 1\n[heal]\nseed = 2\n[[tasks]]\nkind = "choice"\nlimit = 9\nshots = 1')
    settings = {"limit": 4, "seed": 3}
    config = merge_flags(None, flags, tasks=[], task_settings=settings)
    assert (config.task_settings.limit, config.task_settings.seed, config.tasks) == (4, 3, ())
    (task,) = merge_flags(file, flags, tasks=[], task_settings=settings).tasks
    assert (task.kind, task.limit, task.seed, task.shots) == ("choice", 4, 3, 1)
    seeds = [merge_flags(file, {**flags, "data": data}, tasks=[], task_settings={}) for data in ({}, {"seed": 3})]
    assert [(one.search.seed, one.heal.seed) for one in seeds] == [(1, 2), (0, 0)]


def test_what_the_text_is_read_as_wins_over_the_file_in_healing_too(llama_folder, tmp_path):
    flags = {"model": {"source": str(llama_folder)}, "data": {}, "plan": {"count": 1}, "out": str(tmp_path)}
    file = tmp_path / "run.toml"
    file.write_text("[data]\nforms = ['a {text}']\naugment = 0.1\n[heal]\nforms = ['b {text}']\naugment = 0.2")
    for given, expected in (
        ({}, (("a {text}",), 0.1, ("b {text}",), 0.2)),
        ({"forms": "none"}, ((), 0.1, None, 0.2)),
        ({"augment": 0.3}, (("a {text}",), 0.3, ("b {text}",), None)),
    ):
        config = merge_flags(file, {**flags, "data": given}, tasks=[], task_settings={})
        assert (config.data.forms, config.data.augment, config.heal.forms, config.heal.augment) == expected


def test_run_measures_its_own_tasks_as_it_is_told(avss_command, llama_folder, text_file, tmp_path):
    small = ("--samples", 4, "--seq-len", 16, "--batch-size", 2, "--limit", 3, "--seed", 5)
    arguments = ("--count", 1, "--data", text_file, "--quiet", *small, "--heal", "1k")
    answer = avss_command("run", llama_folder, "--out", tmp_path / "run", *arguments)
    assert answer.code == 0, answer.err
    answer = avss_command("evaluate", llama_folder, "--out", tmp_path / "evaluated", "--quiet", *small[2:])
    assert answer.code == 0, answer.err
    ran, evaluated = (RunRecord.read(tmp_path / name).dense for name in ("run", "evaluated"))
    exact = [[one for one in measured if one.task != "speed"] for measured in (ran, evaluated)]
    assert exact[0] == exact[1]
    assert {one.num_samples for one in exact[0]} == {3}
    record = RunRecord.read(tmp_path / "run")
    assert record.cuts[0].healing.settings["seed"] == record.data.seed == 5


def test_run_refuses_a_time_that_nothing_keeps(avss_command, llama_folder, tmp_path):
    out = ("--out", tmp_path / "x", "--count", 1, "--quiet")
    refused(avss_command("run", llama_folder, "--time", "40m", *out), "`--time 2400`", "`--quality best`")
    refused(avss_command("run", llama_folder, "--max-passes", 3, *out), "`--max-passes 3`", "`--select greedy`")
    best = ("--quality", "best", "--max-passes", 3, "--blocks", "1", *out[:2])
    refused(avss_command("run", llama_folder, *best), "`--max-passes 3`")


def test_two_runs_with_the_same_seed_give_the_same_record(avss_command, llama_folder, text_file, tmp_path):
    records = []
    for name in ("one", "two"):
        arguments = ("--data", text_file, "--count", 1, "--out", tmp_path / name, *SMALL)
        assert avss_command("prune", llama_folder, *arguments).code == 0
        record = RunRecord.read(tmp_path / name)
        records.append(record.model_copy(update={"created": "", "command": "", "seconds": {}}))
    assert records[0] == records[1]


def test_report_draws_a_record_again(avss_command, llama_folder, text_file, tmp_path):
    out = tmp_path / "scores"
    avss_command("score", llama_folder, "--data", text_file, "--out", out, "--quiet", *SMALL)
    (out / "report.html").unlink()
    assert avss_command("report", out).code == 0
    assert (out / "report.html").is_file()
    assert avss_command("report", out / "record.json", "--out", tmp_path / "again", "--quiet").code == 0
    assert (tmp_path / "again" / "scores.csv").read_text() == (out / "scores.csv").read_text()


@pytest.mark.parametrize(
    ("head", "settings", "tasks", "says"),
    [
        ("encoder", {"labels": ("neg", "pos")}, [], "`--labels 'neg'`"),
        ("encoder", {"shots": 4}, [], "`--shots 4`"),
        ("causal", {"shots_data": "train.csv"}, [], "solved examples"),
        (
            "causal",
            {},
            [TaskConfig(kind="choice", shots=5), TaskConfig(kind="classification")],
            "`--shots 5` is for tasks of the kind `classification`",
        ),
    ],
)
def test_settings_that_no_task_reads_are_refused(head, settings, tasks, says, llama_folder, encoder_folder):
    loaded = composer.load({"encoder": encoder_folder, "causal": llama_folder}[head])
    assert loaded.head == head
    with pytest.raises(ConfigError, match=re.escape(says)):
        choose_tasks(tasks, loaded, settings)


def test_a_report_beside_another_record_is_refused(avss_command, llama_folder, text_file, tmp_path):
    out = tmp_path / "scores"
    avss_command("score", llama_folder, "--data", text_file, "--out", out, "--quiet", *SMALL)
    before = (out / "record.json").read_text()
    (out / "older.json").write_text(before.replace('"created"', ' "created"'))
    answer = avss_command("report", out / "older.json", "--quiet")
    assert answer.code == 2
    assert "--out" in answer.err
    assert (out / "record.json").read_text() == before
    (out / "record.json").unlink()
    assert avss_command("report", out / "older.json", "--quiet").code == 0
    assert (out / "older.json").is_file()
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []


def test_inspect_shows_the_stack_and_what_a_cut_changes(avss_command, llama_folder):
    answer = avss_command("inspect", llama_folder)
    assert answer.code == 0
    assert "model.layers" in answer.out
    assert "LlamaDecoderLayer" in answer.out
    assert "num_hidden_layers" in answer.out
    raw = json.loads(avss_command("inspect", llama_folder, "--json").out)
    assert [change["field"] for change in raw["changes"]] == ["num_hidden_layers"]


def test_quiet_prints_nothing(avss_command, llama_folder, text_file, tmp_path):
    answer = avss_command("prune", llama_folder, "--blocks", "1", "--out", tmp_path / "x", "--quiet")
    assert (answer.out, answer.err) == ("", "")
    answer = avss_command("inspect", llama_folder, "--quiet")
    assert (answer.code, answer.out, answer.err) == (0, "", "")


def test_the_api_takes_model_objects_and_leaves_them_alone(llama_folder: Path, text_file: Path):
    import avss
    from tests.support.architectures import ARCHITECTURES
    from tests.support.oracles import hook_count, state_copy
    from tests.support.tokenizers import word_tokenizer

    model, tokenizer = ARCHITECTURES["llama"](), word_tokenizer(adds="bos")
    before = state_copy(model)
    table = avss.score(model, str(text_file), tokenizer=tokenizer, samples=4, seq_len=16)
    small = avss.prune(model, blocks=[1], tokenizer=tokenizer)
    record = avss.evaluate(small.model, [f"perplexity={text_file}"], baseline=model, tokenizer=tokenizer, seq_len=16)
    assert table["block-influence"].num_blocks == len(model.model.layers)
    assert len(small.model.model.layers) == len(model.model.layers) - 1
    assert record.cuts[0].retention
    assert all((before[key] == value).all() for key, value in model.state_dict().items())
    assert hook_count(model) == 0
    html = table._repr_html_()
    assert "<table" in html
    assert "<svg" in html


def test_run_at_its_best_searches_repairs_heals_and_measures_every_stage(
    avss_command, llama_folder, text_file, tmp_path
):
    out = tmp_path / "best"
    answer = avss_command(
        "run", llama_folder, "--quality", "best", "--time", "20s", "--heal", "3k", "--count", 2, "--data", text_file,
        "--task", f"perplexity={text_file}", "--limit", 4, "--compare", "last", "--out", out,
        "--samples", 12, "--seq-len", 16, "--batch-size", 4,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    record = RunRecord.read(out)
    final, *others = record.cuts
    assert record.search is not None
    assert record.search.data.num_tokens <= 8192
    assert record.search.settings["max_tokens"] == 8192
    assert final.healing is not None
    assert final.healing.num_tokens > 0
    assert final.name == "greedy, healed"
    assert final.verification.of_raw_cut
    assert final.verification.passed
    # Each stage before it stands beside it, on the same items, and the rival last.
    names = [cut.name for cut in others]
    assert names[-2:] == ["greedy", "last"]
    assert {cut.plan.removed for cut in record.cuts[:-1]} == {final.plan.removed}
    assert all(cut.measurements and cut.path is None for cut in others)
    page = (out / "report.html").read_text()
    assert "greedy, healed" in page


@pytest.mark.parametrize("budget", [("--heal", "6k"), ("--quality", "best", "--time", "15s", "--max-passes", 1)])
def test_a_run_that_dies_in_healing_goes_on_there(avss_command, llama_folder, text_file, tmp_path, monkeypatch, budget):
    from avss.healing.loop import Loop
    from avss.healing.state import Checkpoint

    monkeypatch.setattr(Checkpoint.__init__, "__defaults__", (0.0,))
    out = tmp_path / "healed"
    arguments = (
        "run", llama_folder, *budget, "--count", 1, "--compensate", "refit", "--data", text_file,
        "--task", f"perplexity={text_file}", "--limit", 2, "--out", out, "--samples", 12, "--seq-len", 16, "--quiet",
    )  # fmt: skip
    step, calls = Loop._step, []

    def dies(self):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        step(self)

    monkeypatch.setattr(Loop, "_step", dies)
    assert avss_command(*arguments).code == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".healed.healing"]
    assert avss_command(*arguments).code == 0
    healing = RunRecord.read(out).cuts[0].healing
    assert len(calls) - 3 == healing.num_steps - 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_healing_reads_the_calibration_text_unless_told_otherwise(avss_command, llama_folder, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text())
    settings = tmp_path / "run.toml"
    settings.write_text(f'[data]\nsource = "{text_file}"\n[heal]\nbudget = "200 tokens"\n')
    small = ("--config", settings, "--count", 1, "--task", f"perplexity={text_file}", "--limit", 1, "--quiet", *SMALL)
    for more, read in (((), [text_file.name]), (("--heal-data", f"{text_file},{other}"), [text_file.name, other.name])):
        out = tmp_path / f"{len(read)}"
        assert avss_command("run", llama_folder, *small, *more, "--out", out).code == 0
        assert RunRecord.read(out).cuts[0].healing.data.source == ",".join(read)


def test_short_windows_of_healing_are_asked_for_in_a_run(avss_command, llama_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("avss.data.short.SHORT", 8)
    task = ("--task", f"perplexity={text_file}", "--limit", 1, "--seq-len", 16)
    healed = ("--blocks", "1", "--data", text_file, "--heal", "300 tokens", "--short", 1, "--quiet")
    assert avss_command("run", llama_folder, *healed, *task, "--out", tmp_path / "x").code == 0
    assert RunRecord.read(tmp_path / "x").cuts[0].healing.settings["short"] == 1


@pytest.mark.parametrize(
    ("folder", "flags", "named"),
    [
        ("llama_folder", ("--short", 1), "128 tokens"),  # its positions end at 64
        ("masked_folder", ("--short", 0.5), "short"),
        ("encoder_folder", ("--config", '[heal]\ntemperature = 2.0\n'), "temperature"),
    ],
)  # fmt: skip
def test_what_healing_would_not_read_costs_no_search(
    avss_command, request, text_file, tmp_path, monkeypatch, folder, flags, named
):
    def too_late(*args: object, **settings: object) -> None:
        raise AssertionError("blocks were scored before the settings of healing were looked at")

    monkeypatch.setattr("avss.composer.whole.score_loaded", too_late)
    if flags[0] == "--config":
        (tmp_path / "run.toml").write_text(flags[1])
        flags = ("--config", tmp_path / "run.toml")
    model = request.getfixturevalue(folder)
    answer = avss_command(
        "run", model, "--blocks", "1", "--data", text_file, "--heal", "300 tokens", *flags, "--out", tmp_path / "x"
    )
    assert answer.code == 2
    assert named in answer.err
    assert "Traceback" not in answer.err
    assert not (tmp_path / "x").exists()


def test_what_run_wrote_is_a_model_for_every_verb(avss_command, llama_folder, text_file, tmp_path):
    out = tmp_path / "run"
    task = ("--task", f"perplexity={text_file}", "--limit", 1, "--seq-len", 16)
    assert avss_command("run", llama_folder, "--blocks", "1", "--data", text_file, *task, "--out", out, "-q").code == 0
    assert avss_command("verify", out, "--against", llama_folder, "-q").code == 0
    for model in (out, out / "model"):
        answer = avss_command("evaluate", model, "--baseline", llama_folder, *task, "--json", "-q")
        assert answer.code == 0, answer.err
        (cut,) = RunRecord.model_validate_json(answer.out).cuts
        assert cut.plan.removed == (1,)
        assert cut.retention == RunRecord.read(out).cuts[0].retention


def test_a_missing_healing_text_costs_no_search(avss_command, tmp_path):
    answer = avss_command(
        "run", tmp_path / "no-model", "--heal", "1k", "--heal-data", "missing.txt", "--out", tmp_path / "x"
    )
    assert answer.code == 2
    assert "missing.txt" in answer.err


def test_run_refuses_an_unknown_quality(avss_command, llama_folder, tmp_path):
    answer = avss_command("run", llama_folder, "--quality", "worst", "--out", tmp_path / "x")
    assert answer.code == 2
    assert "quality" in answer.err
    assert "Traceback" not in answer.err
