"""Settings: every wrong one is named, all of them at once."""

import pytest

from avss.config import DataConfig, ModelConfig, PlanConfig, RunConfig, TaskConfig, build
from avss.errors import ConfigError

WHOLE = """
criteria = ["avss", "block-influence"]
first_token = false
compare = ["first", "random"]
prompts = ["Once upon a time"]
out = "runs/smaller"

[model]
source = "owner/model"
dtype = "bfloat16"

[data]
source = "notes.txt"
samples = 12
seq_len = 64

[plan]
criterion = "block-influence"
count = 3
protect = "0,-1"

[[tasks]]
kind = "perplexity"

[[tasks]]
kind = "choice"
data = "items.jsonl"
limit = 50
"""


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_whole_run_is_read_from_toml(tmp_path):
    config = RunConfig.read(write(tmp_path / "run.toml", WHOLE))
    assert config.model == ModelConfig(source="owner/model", dtype="bfloat16")
    assert config.data == DataConfig(source="notes.txt", samples=12, seq_len=64)
    assert config.plan == PlanConfig(criterion="block-influence", count=3, protect="0,-1")
    assert config.tasks == (TaskConfig(kind="perplexity"), TaskConfig(kind="choice", data="items.jsonl", limit=50))
    assert (config.criteria, config.compare) == (("avss", "block-influence"), ("first", "random"))
    assert (config.first_token, config.out, config.force) == (False, "runs/smaller", False)


def test_two_keys_are_enough(tmp_path):
    config = RunConfig.read(write(tmp_path / "run.toml", 'out = "o"\n[model]\nsource = "m"'))
    assert config.plan.fraction == 0.25
    assert config.data == DataConfig()


def test_overrides_replace_whole_keys(tmp_path):
    config = RunConfig.read(write(tmp_path / "run.toml", WHOLE), out="elsewhere", plan={"fraction": 0.5})
    assert config.out == "elsewhere"
    assert config.plan == PlanConfig(fraction=0.5)


def test_settings_survive_json():
    config = build(RunConfig, {"model": {"source": "m"}, "out": "o", "tasks": [{"kind": "speed"}]})
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({"modle": {}}, ["Unknown setting `modle`", "did you mean `model`", "`model` = "]),
        ({"model": {"source": "m", "dtyp": "x"}}, ["Unknown setting `model.dtyp`", "did you mean `dtype`"]),
        ({"data": {"sampels": 3}}, ["Unknown setting `data.sampels`", "did you mean `samples`", "seq_len"]),
        ({"plan": {"zzzzzz": 3}}, ["Unknown setting `plan.zzzzzz`; allowed: criterion, fraction"]),
        ({"data": {"samples": 0}}, ["`data.samples` = `0` is not allowed", "greater than or equal to 1"]),
        ({"data": {"seq_len": 1}}, ["`data.seq-len` = `1` is not allowed"]),
        ({"data": {"seed": -1}}, ["`data.seed` = `-1` is not allowed"]),
        ({"data": {"batch_size": 2.5}}, ["`data.batch-size` = `2.5` is not allowed"]),
        ({"data": {"layout": "loose"}}, ["`data.layout` = `loose` is not allowed", "packed"]),
        ({"plan": {"fraction": 0}}, ["`plan.fraction` = `0` is not allowed"]),
        ({"plan": {"fraction": 1.0}}, ["`plan.fraction` = `1.0` is not allowed"]),
        ({"plan": {"count": "many"}}, ["`plan.count` = `many` is not allowed"]),
        ({"tasks": [{"kind": "poetry"}]}, ["`tasks.0.kind` = `poetry` is not allowed", "perplexity"]),
        ({"tasks": [{"kind": "speed"}, {"kind": "choice", "limit": 0}]}, ["`tasks.1.limit` = `0`"]),
        ({"out": None}, ["`out` = `None` is not allowed"]),
    ],
)
def test_wrong_settings_are_named(values, messages):
    good = {"model": {"source": "m"}, "out": "o"}
    if "modle" in values:
        del good["model"]
    with pytest.raises(ConfigError) as caught:
        build(RunConfig, good | values)
    for message in messages:
        assert message in str(caught.value)


def test_unknown_key_of_a_task_offers_the_keys_of_a_task():
    with pytest.raises(ConfigError) as caught:
        build(RunConfig, {"model": {"source": "m"}, "out": "o", "tasks": [{"kind": "speed", "limt": 3}]})
    assert "Unknown setting `tasks.0.limt`" in str(caught.value)
    assert "did you mean `limit`" in str(caught.value)


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError) as caught:
        build(RunConfig, {"model": {"source": ""}, "data": {"samples": 0, "color": 1}, "plan": {"count": 0}})
    for part in ("model.source", "data.samples", "data.color", "plan.count", "out"):
        assert part in str(caught.value)


def test_missing_required_settings_are_named():
    with pytest.raises(ConfigError, match=r"`model`.*`out`"):
        build(RunConfig, {})


@pytest.mark.parametrize("content", [b"out = ", b"\xff\xfe", b"[model\n", b"a = 1\na = 2"])
def test_a_file_that_is_not_toml_is_a_config_error(tmp_path, content):
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(ConfigError, match="is not TOML"):
        RunConfig.read(tmp_path / "run.toml")


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="There is no config file"):
        RunConfig.read(tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("text", "kind", "data"),
    [
        ("speed", "speed", "builtin"),
        ("choice=items.jsonl", "choice", "items.jsonl"),
        ("perplexity=owner/set:config@test#text", "perplexity", "owner/set:config@test#text"),
        ("choice=a=b.jsonl", "choice", "a=b.jsonl"),
        (" choice =x.csv", "choice", "x.csv"),
    ],
)
def test_tasks_are_read_from_the_command_line(text, kind, data):
    task = TaskConfig.parse(text, limit=5)
    assert (task.kind, task.data, task.limit) == (kind, data, 5)


@pytest.mark.parametrize("text", ["", "poetry", "=items.jsonl"])
def test_unknown_tasks_are_config_errors(text):
    with pytest.raises(ConfigError, match="is not allowed"):
        TaskConfig.parse(text)


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        DataConfig().samples = 3
