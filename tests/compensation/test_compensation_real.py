"""Repair of a real language model, where massive activations are."""

import pytest

from avss.compensation import compensate
from avss.compensation.streams import read_block
from avss.cut import cut
from avss.data.batches import make_batches
from avss.data.sources import read_texts
from avss.models.load import load_model
from avss.models.projections import find_projections
from tests.compensation.conftest import without


@pytest.mark.real
def test_real_cut_is_repaired_and_its_attention_sink_stays(smollm2_file):
    dense = load_model(str(smollm2_file), device="cpu")
    plan = without(30, *range(12, 19))
    raw = cut(dense, plan)
    text = make_batches(
        read_texts("builtin"), dense.tokenizer, layout="packed", samples=16, seq_len=128, batch_size=4, seed=0
    )
    repaired, story = compensate(dense, raw, plan, text, method="refit")
    assert story.applied, story.note
    assert story.after < 0.85 * story.before
    token_ids, keep = next(iter(text))
    facts = find_projections(dense)
    sink, before = (read_block(model, 11, facts, (), token_ids, keep).state[:, 0] for model in (repaired, dense))
    assert float(before.norm(dim=-1).median()) > 100, "there is no sink here, so nothing is tested"
    assert float((sink - before).norm() / before.norm()) < 0.05
