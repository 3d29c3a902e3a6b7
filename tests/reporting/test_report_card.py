"""The model card: front matter that parses, and what an honest card has to say."""

import re

import pytest
import yaml

from avss.reporting import card


def front_matter(text):
    start, fields, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(fields)


@pytest.fixture(scope="module")
def rendered(record):
    return card.render_card(record, record.cuts[0])


def test_front_matter_is_what_hubs_read(rendered):
    assert front_matter(rendered) == {
        "library_name": "transformers",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "pipeline_tag": "text-generation",
        "tags": ["avss", "depth-pruning", "pruned"],
    }


@pytest.mark.parametrize(
    ("head", "auto_class", "task"),
    [
        ("masked", "AutoModelForMaskedLM", "fill-mask"),
        ("classifier", "AutoModelForSequenceClassification", "text-classification"),
        ("encoder", "AutoModel", "feature-extraction"),
        ("seq2seq", "AutoModelForSeq2SeqLM", "text2text-generation"),
    ],
)
def test_the_head_decides_how_it_is_loaded(record, head, auto_class, task):
    cut = record.cuts[0]
    other = cut.model_copy(update={"model": cut.model.model_copy(update={"head": head})})
    text = card.render_card(record.model_copy(update={"cuts": (other,)}), other)
    assert f"from transformers import {auto_class}, AutoTokenizer" in text
    assert front_matter(text)["pipeline_tag"] == task


def test_a_folder_is_no_base_model_on_the_hub(record):
    local = record.model_copy(update={"model": record.model.model_copy(update={"source": "my-model"})})
    assert "base_model" not in front_matter(card.render_card(local, local.cuts[0]))


def test_the_card_says_what_went_what_is_left_and_how_to_repeat_it(rendered, record):
    for piece in (
        "12-15, 17, 25-26",
        "| 16 | 12 |",
        "| 18-24 | 13-19 |",
        "| perplexity | 36.07 ± 0.81 | 121.7 ± 3.9 (3.374 ± 0.067x) |",
        "| choice:piqa, accuracy | 91.9 ± 2.1 % | 69.9 ± 7.0 % | 14.0 % |",
        "**93.1 ± 1.5 %**",
        "<https://arxiv.org/abs/2403.03853>",
        "eprint={2411.02117}",
        record.command,
        record.data.content_hash,
        "largest difference 1.9e-06",
        "Perplexity and free generation degrade first",
        "transformers 5.23.0",
    ):
        assert piece in rendered
    assert "71,418" not in rendered.split("## Evaluation")[1].split("## Verification")[0], "another cut's figures"


def test_tables_have_as_many_cells_as_columns(rendered):
    for block in re.findall(r"(?:^\|.*\|$\n)+", rendered, flags=re.MULTILINE):
        assert len({line.count("|") for line in block.strip().splitlines()}) == 1


def test_hostile_strings_stay_text(hostile_record):
    text = card.render_card(hostile_record, hostile_record.cuts[0])
    prose = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"(`+) ?[^\n]*? ?\1(?!`)", "", prose)
    assert not re.search(r"(?<!\\)<(?:script|img)", prose)
    assert front_matter(text)["tags"] == ["avss", "depth-pruning", "pruned"]


def test_a_fence_outlasts_the_ticks_inside():
    assert card._fenced("a ``` b").startswith("````\n")


def test_code_in_a_warning_stays_code(rendered):
    assert "- `avss` ranks the blocks" in rendered


def test_a_cut_that_was_not_evaluated_says_so(record):
    cut = record.cuts[1].model_copy(update={"measurements": (), "retention": ()})
    text = card.render_card(record.model_copy(update={"cuts": (cut,), "dense": ()}), cut)
    assert "It was not evaluated" in text
    assert "not verified" in text


def test_a_cut_of_another_record_is_refused(record, bare_record):
    with pytest.raises(ValueError, match="not in tuple"):
        card.render_card(bare_record, record.cuts[0])


def test_a_card_for_images_names_the_processor(record):
    cut = record.cuts[0]
    seen = cut.model_copy(update={"model": cut.model.model_copy(update={"head": "image-classifier"})})
    text = card.render_card(record.model_copy(update={"cuts": (seen,)}), seen)
    assert "import AutoModelForImageClassification, AutoImageProcessor" in text
    assert "processor = AutoImageProcessor.from_pretrained" in text
    assert "AutoTokenizer" not in text


def test_speed_is_no_share_that_is_kept_and_is_shown_alone_too(record):
    cut = record.cuts[0]
    speed = tuple(one for one in cut.measurements if one.task == "speed")
    dense = tuple(one for one in record.dense if one.task == "speed")
    assert speed
    text = card.render_card(record, cut)
    kept = text.partition("What is left")[2].partition("| size and speed")[0]
    assert "speed" not in kept
    assert "| size and speed" in text
    alone = cut.model_copy(update={"measurements": speed, "retention": ()})
    text = card.render_card(record.model_copy(update={"cuts": (alone,), "dense": dense}), alone)
    assert "| size and speed" in text
