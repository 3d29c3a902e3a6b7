"""Tasks have names of their own, and settings that one of them reads."""

import pytest

from avss.composer.evaluating import choose_tasks
from avss.config import TaskConfig
from avss.errors import ConfigError
from avss.evaluation.base import task_name
from avss.models.load import adopt
from tests.support.architectures import stored

CAUSAL = adopt(stored("llama"))


def names(*tasks):
    return [task_name(task) for task in choose_tasks(tasks, CAUSAL, {})]


def test_names_that_would_be_one_are_made_longer():
    assert names("choice=cais/mmlu:anatomy@test", "choice=cais/mmlu:astronomy@test", "speed") == [
        "choice:mmlu:anatomy@test",
        "choice:mmlu:astronomy@test",
        "speed",
    ]
    assert names("choice=x/test.jsonl", "choice=y/test.jsonl") == ["choice:x/test", "choice:y/test"]
    assert names("choice=x/test.jsonl", "choice=x/test.jsonl") == ["choice:x/test #1", "choice:x/test #2"]
    assert names("choice=piqa.jsonl", "choice=siqa.jsonl") == ["choice:piqa", "choice:siqa"]


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("choice=mmlu.jsonl", {"shots": 5}),
        ("perplexity", {"labels": ("a", "b")}),
        ("similarity", {"template": "{text}"}),
        ("speed", {"text_column": "body"}),
    ],
)
def test_a_setting_that_no_task_reads_is_refused(task, settings):
    (name,) = settings
    with pytest.raises(ConfigError, match=f"`--{name.replace('_', '-')} .* is for tasks of the kind"):
        choose_tasks([task], CAUSAL, settings)
    # Flags are for all tasks: one that reads it is enough.
    assert len(choose_tasks([task, "classification"], CAUSAL, settings)) == 2


def test_settings_of_one_task_are_checked_too():
    with pytest.raises(ConfigError, match="shots"):
        choose_tasks([TaskConfig(kind="choice", shots=2)], CAUSAL, {})


def test_examples_and_templates_that_are_not_used_are_refused():
    with pytest.raises(ConfigError, match=r"`--shots-data pool.csv` is for solved examples.*add `--shots 4`"):
        choose_tasks(["classification"], CAUSAL, {"shots_data": "pool.csv"})
    for name, head in (("bert", "encoder"), ("bert-classifier", "classifier")):
        with pytest.raises(ConfigError, match=f"`--template .* is for models that continue text.*`{head}` head"):
            choose_tasks(["classification"], adopt(stored(name)), {"template": "Read {text}:"})
