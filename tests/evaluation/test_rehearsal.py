"""A rehearsal passes wherever the task itself would, and says beforehand what the task would say."""

import pytest

from avss.config import TaskConfig
from avss.errors import DataError, TaskError
from avss.evaluation import evaluate_task, rehearse

SETTINGS = {"seq_len": 16, "batch_size": 4}
FITTING = [("causal", "perplexity"), ("masked", "perplexity"), ("encoder", "similarity"), ("causal", "choice")]
FITTING += [("masked", "similarity"), ("classifier", "similarity"), ("causal", "speed")]


def task_of(kind, request):
    data = {"choice": "quiz"}.get(kind, "prose")
    return TaskConfig(kind=kind, data=str(request.getfixturevalue(data)), **SETTINGS)


@pytest.mark.parametrize(("head", "kind"), FITTING)
@pytest.mark.parametrize("limit", [None, 3, 20])
def test_what_can_be_measured_can_be_rehearsed(head, kind, limit, request):
    loaded, task = request.getfixturevalue(head), task_of(kind, request).model_copy(update={"limit": limit})
    rehearse(loaded, [task, None])
    assert evaluate_task([loaded], task)[0].measurements


@pytest.mark.parametrize("head", ["encoder", "classifier"])
def test_what_cannot_is_refused_as_the_task_would(head, request):
    loaded, task = request.getfixturevalue(head), task_of("perplexity", request)
    said = []
    for way in (lambda: evaluate_task([loaded], task), lambda: rehearse(loaded, [task])):
        with pytest.raises((TaskError, DataError)) as caught:
            way()
        said.append(str(caught.value))
    assert said[0] == said[1]
