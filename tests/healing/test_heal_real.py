"""Healing a real sentence encoder."""

import pytest

import avss
from avss.record import Plan


@pytest.mark.real
def test_a_sentence_encoder_comes_back_towards_its_embeddings(minilm_folder, tmp_path):
    small = avss.prune(str(minilm_folder), blocks=[2, 3], out=tmp_path / "smaller")
    assert isinstance(small.plan, Plan)
    healed = avss.heal(
        tmp_path / "smaller",
        teacher=str(minilm_folder),
        data="builtin",
        budget="6k tokens",
        batch_size=8,
        seq_len=64,
        validations=2,
        out=tmp_path / "healed",
    )
    cut = healed.record.cuts[0]
    assert cut.healing is not None
    assert cut.verification is not None
    assert cut.verification.passed
    assert cut.healing.after.loss < 0.8 * cut.healing.before.loss
    assert (tmp_path / "healed" / "modules.json").is_file()
    record = avss.evaluate(tmp_path / "healed", ["similarity"], baseline=str(minilm_folder), limit=20)
    before = avss.evaluate(tmp_path / "smaller", ["similarity"], baseline=str(minilm_folder), limit=20)
    assert record.cuts[0].measurements[0].value > before.cuts[0].measurements[0].value
