"""What `avss.prune` and `avss.score` are told by keyword is read, or refused; nothing in between."""

import pytest

import avss
from avss.errors import ConfigError, OutputExistsError
from avss.record import RunRecord
from tests.support.architectures import stored


@pytest.mark.parametrize("way", [{"blocks": [2]}, {"blocks": [2], "on_disk": True}, {"count": 1}])
def test_a_setting_that_nothing_reads_is_refused(llama_folder, text_file, tmp_path, way):
    with pytest.raises(ConfigError, match="sampels"):
        avss.prune(str(llama_folder), data=str(text_file), out=tmp_path / "x", sampels=8, **way)
    with pytest.raises(ConfigError, match="ggfu"):
        avss.prune(str(llama_folder), file_format="ggfu", out=tmp_path / "x", **way)
    assert list(tmp_path.iterdir()) == []


def test_a_criterion_named_in_the_plan_is_the_one_that_is_scored(llama_folder, text_file):
    pruned = avss.prune(
        str(llama_folder), data=str(text_file), samples=4, seq_len=16, plan={"criterion": "avss", "count": 1}
    )
    assert [one.criterion for one in pruned.record.scores] == ["avss"]
    assert pruned.plan.method == "avss"


def test_what_a_search_or_a_task_was_read_from_is_not_replaced(llama_folder, text_file, tmp_path):
    out = tmp_path / "searched"
    small = {"data": str(text_file), "samples": 4, "seq_len": 16}
    avss.prune(str(llama_folder), count=1, select="greedy", search={"max_passes": 8}, out=out, **small)
    before = RunRecord.read(out)
    with pytest.raises(OutputExistsError, match="which is read here"):
        avss.prune(str(llama_folder), count=1, plan={"from_search": str(out)}, out=out, force=True, **small)
    assert RunRecord.read(out) == before


def test_the_stack_of_a_loaded_model_can_be_named(tmp_path, text_file):
    from avss.models.load import adopt
    from tests.support.tokenizers import word_tokenizer

    loaded = adopt(stored("t5"), word_tokenizer())
    one, two = (
        avss.score(loaded, str(text_file), criteria="avss", samples=4, stack=stack) for stack in ("encoder", "decoder")
    )
    assert (one.model.stack, two.model.stack) == ("encoder.block", "decoder.block")
