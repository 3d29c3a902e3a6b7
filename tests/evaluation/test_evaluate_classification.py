"""Classification by every head against plain loops, the reading of labels, and solved examples."""

import copy
import csv
import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from avss.config import TaskConfig
from avss.errors import DataError, TaskError
from avss.evaluation import evaluate_task, retention
from avss.evaluation.base import standard_error
from avss.evaluation.classification import placements
from avss.evaluation.labelled import label_words, match_classifier, read_labelled
from avss.evaluation.scoring import score_continuations
from avss.evaluation.shots import Shots
from avss.models.load import adopt
from tests.support.architectures import stored

WORDS = ("red", "green", "big blue")


def task(data, **settings):
    return TaskConfig(**({"kind": "classification", "data": data, "batch_size": 4} | settings))


def word_task(data, **settings):
    return task(data, **({"labels": WORDS, "template": "{text} ."} | settings))


def read(path):
    with Path(path).open() as file:
        return [(row["text"], int(row["label"])) for row in csv.DictReader(file)]


def table(tmp_path, *rows):
    path = tmp_path / "table.csv"
    path.write_text("\n".join(["text,label", *rows, ""]))
    return str(path)


def plain_log_probabilities(loaded, texts):
    """One text at a time, so that nothing is padded."""
    rows = []
    for text in texts:
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([loaded.tokenizer(text)["input_ids"]])).logits[0]
        rows.append(torch.log_softmax(logits.double(), -1).numpy())
    return np.array(rows)


# --- a classifier's own labels ---


@pytest.mark.parametrize("name", ["distilbert-classifier", "bert-classifier", "llama-classifier", "gpt2-classifier"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_classifier_matches_a_loop_without_batches(name, batch_size, classifier, reviews, shorter):
    loaded = adopt(stored(name), classifier.tokenizer)
    small = shorter(loaded, 1)
    dense, other = evaluate_task([loaded, small], task(reviews, batch_size=batch_size))
    texts, labels = zip(*read(reviews), strict=True)
    p, q = (plain_log_probabilities(model, texts) for model in (loaded, small))
    for result, expected in ((dense, p), (other, q)):
        correct = expected.argmax(1) == labels
        share, losses = correct.mean(), -expected[np.arange(30), labels]
        assert result.predictions["accuracy"].tolist() == expected.argmax(1).tolist()
        assert result["accuracy"].value == pytest.approx(share)
        assert result["accuracy"].stderr == pytest.approx(math.sqrt(share * (1 - share) / 29))
        assert result["accuracy"].chance == pytest.approx(1 / 3)
        assert result["loss"].value == pytest.approx(losses.mean(), abs=1e-5)
        assert result["loss"].stderr == pytest.approx(losses.std(ddof=1) / math.sqrt(30), rel=1e-4)
    divergences = (np.exp(p) * (p - q)).sum(1)
    assert other["kl"].value == pytest.approx(divergences.mean(), rel=1e-3)
    assert [m.metric for m in dense.measurements] == ["accuracy", "loss"]
    assert [m.metric for m in other.measurements] == ["accuracy", "loss", "kl"]


def test_a_decoder_without_padding_token_goes_one_text_at_a_time(classifier, reviews):
    loaded = adopt(stored("llama-classifier"), classifier.tokenizer)
    expected = evaluate_task([loaded], task(reviews))[0]
    config = copy.deepcopy(loaded.model.config)
    config.pad_token_id = None
    bare = type(loaded.model)(config).eval()
    bare.load_state_dict(loaded.model.state_dict())
    found = evaluate_task([dataclasses.replace(loaded, model=bare)], task(reviews))[0]
    assert found.samples["loss"] == pytest.approx(expected.samples["loss"], abs=1e-5)


def test_an_identical_classifier_keeps_exactly_everything(classifier, reviews, shorter):
    dense, same = evaluate_task([classifier, shorter(classifier)], task(reviews))
    assert same["kl"].value == 0
    for entry in retention(dense, same):
        assert (entry.ratio, entry.ratio_stderr, entry.kept) == (1, 0, 1)
        assert entry.flips == (0 if entry.metric == "accuracy" else None)


def test_a_classifier_reads_words_by_its_own_names(classifier, tmp_path, reviews):
    numbers = read(reviews)
    by_name = table(tmp_path, *(f"{text},label_{label}" for text, label in numbers))
    expected = evaluate_task([classifier], task(reviews))[0]
    assert evaluate_task([classifier], task(by_name))[0].samples["loss"] == pytest.approx(expected.samples["loss"])
    by_word = table(tmp_path, *(f"{text},{('poor', 'fair', 'good')[label]}" for text, label in numbers))
    named = evaluate_task([classifier], task(by_word, labels=("poor", "fair", "good")))[0]
    assert named.samples["loss"] == pytest.approx(expected.samples["loss"])


def test_a_classifier_refuses_other_labels(classifier, tmp_path, no_forward):
    with pytest.raises(DataError, match=r"label `sad` is not one of the classifier's: label_0, label_1, label_2"):
        evaluate_task([classifier], task(table(tmp_path, "the cat,label_0", "a dog,sad")))
    with pytest.raises(DataError, match=r"Row 2: the label `3` is not one of the classifier's, which are 0 to 2"):
        evaluate_task([classifier], task(table(tmp_path, "the cat,0", "a dog,3")))
    with pytest.raises(TaskError, match=r"names 2 label words, and the classifier has 3 labels"):
        evaluate_task([classifier], task(table(tmp_path, "the cat,sad", "a dog,gay"), labels=("sad", "gay")))
    with pytest.raises(TaskError, match=r"classifier cannot use examples; `shots` is `2`"):
        evaluate_task([classifier], task(table(tmp_path, "the cat,0"), shots=2))


def test_refuses_regression_and_classifiers_that_differ(classifier, reviews, no_forward):
    config = type(classifier.model.config).from_dict(
        classifier.model.config.to_dict() | {"num_labels": 1, "n_layers": 1}
    )
    single = dataclasses.replace(classifier, model=type(classifier.model)(config))
    with pytest.raises(TaskError, match="does not choose one of several labels"):
        evaluate_task([single], task(reviews))
    with pytest.raises(TaskError, match="classifiers have 3, 1 labels"):
        evaluate_task([classifier, single], task(reviews))


# --- label words ---


@pytest.mark.parametrize("head", ["causal", "masked"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_label_words_are_scored_as_continuations(head, batch_size, reviews, request):
    loaded = request.getfixturevalue(head)
    result = evaluate_task([loaded], word_task(reviews, batch_size=batch_size))[0]
    texts, labels = zip(*read(reviews), strict=True)
    pairs = [(f"{text} .", f" {word}") for text in texts for word in WORDS]
    scores = score_continuations([loaded], pairs, batch_size=1)[0].reshape(30, 3)
    assert result.predictions["accuracy"].tolist() == scores.argmax(1).tolist()
    assert result.samples["accuracy"].tolist() == (scores.argmax(1) == labels).tolist()
    assert result["accuracy"].chance == pytest.approx(1 / 3)
    assert result["accuracy"].task == "classification:reviews"


def test_words_of_one_token_share_a_forward_pass(causal, reviews):
    seen = []
    evaluate_task(
        [causal], word_task(reviews, labels=("red", "green", "blue")), on_step=lambda *step: seen.append(step)
    )
    assert len({text for text, _ in read(reviews)}) == 30
    assert seen[-1] == (8, 8)  # 30 contexts in batches of 4, not 90


def test_an_encoder_compares_with_a_sentence_for_each_label(encoder, reviews):
    result = evaluate_task([encoder], word_task(reviews))[0]
    pairs = [(text, f"This text is {word}.") for text, _ in read(reviews) for word in WORDS]
    scores = score_continuations([encoder], pairs, batch_size=1)[0].reshape(30, 3)
    assert result.predictions["accuracy"].tolist() == scores.argmax(1).tolist()


def test_order_and_limit(causal, reviews, shorter):
    one, two = shorter(causal, 1), shorter(causal, 2)
    first = evaluate_task([causal, one, two], word_task(reviews, limit=9, seed=4))
    second = evaluate_task([causal, two, one], word_task(reviews, limit=9, seed=4))
    assert first[1].measurements == second[2].measurements
    assert first[0]["accuracy"].num_samples == 9


@pytest.mark.parametrize("head", ["causal", "encoder"])
def test_refuses_what_does_not_fit(head, reviews, tmp_path, request, no_forward):
    loaded = request.getfixturevalue(head)
    with pytest.raises(TaskError, match=r"3 labels, and the task names 0 words for them \(none\)"):
        evaluate_task([loaded], task(reviews))
    with pytest.raises(TaskError, match=r"3 labels, and the task names 2 words"):
        evaluate_task([loaded], task(reviews, labels=("red", "green")))
    with pytest.raises(TaskError, match="must be different and not blank"):
        evaluate_task([loaded], task(reviews, labels=("red", "green", "red")))
    with pytest.raises(DataError, match="has no rows"):
        evaluate_task([loaded], task(table(tmp_path)))


def test_refuses_a_template_without_a_place(causal, reviews, no_forward):
    with pytest.raises(TaskError, match=r"has no `{text}`"):
        evaluate_task([causal], word_task(reviews, template="Review: {question}"))


def test_an_encoder_refuses_examples(encoder, reviews, no_forward):
    with pytest.raises(TaskError, match="encoder cannot use examples"):
        evaluate_task([encoder], word_task(reviews, shots=1))


# --- solved examples ---


def test_examples_stand_before_the_item_in_the_same_form(causal, tmp_path):
    data = table(tmp_path, "the cat,1", "a dog,0")
    result = evaluate_task([causal], task(data, labels=("red", "green"), template="{text} is", shots=1))[0]
    for row, context in enumerate(["a dog is red\n\nthe cat is", "the cat is green\n\na dog is"]):
        scores = score_continuations([causal], [(context, " red"), (context, " green")], batch_size=1)[0]
        assert result.predictions["accuracy"][row] == int(np.argmax(scores))


def test_examples_can_come_from_other_data(causal, tmp_path, reviews):
    pool = tmp_path / "pool.jsonl"
    pool.write_text('{"text": "a stone", "label": 2}\n')
    result = evaluate_task([causal], word_task(reviews, shots=1, shots_data=str(pool)))[0]
    pairs = [(f"a stone . big blue\n\n{text} .", f" {word}") for text, _ in read(reviews) for word in WORDS]
    scores = score_continuations([causal], pairs, batch_size=4)[0].reshape(30, 3)
    assert result.predictions["accuracy"].tolist() == scores.argmax(1).tolist()


def test_examples_come_from_the_column_that_is_named(causal, tmp_path, reviews):
    pool = tmp_path / "pool.jsonl"
    pool.write_text('{"text": "a stone", "body": "the moon", "label": 2}\n')
    result = evaluate_task([causal], word_task(reviews, shots=1, shots_data=f"{pool}#body"))[0]
    pairs = [(f"the moon . big blue\n\n{text} .", f" {word}") for text, _ in read(reviews) for word in WORDS]
    scores = score_continuations([causal], pairs, batch_size=4)[0].reshape(30, 3)
    assert result.predictions["accuracy"].tolist() == scores.argmax(1).tolist()


def test_examples_with_words_for_labels_may_lack_a_label(causal, tmp_path):
    data = table(tmp_path, "the cat,big", "a dog,red", "the bird,old")
    pool = tmp_path / "pool.jsonl"
    pool.write_text('{"text": "a stone", "label": "red"}\n')
    found = evaluate_task([causal], task(data, template="{text} is", shots=1, shots_data=str(pool)))[0]
    pairs = [(f"a stone is red\n\n{text} is", f" {word}") for text in ("the cat", "a dog", "the bird")
             for word in ("big", "old", "red")]  # fmt: skip
    scores = score_continuations([causal], pairs, batch_size=4)[0].reshape(3, 3)
    assert found.predictions["accuracy"].tolist() == scores.argmax(1).tolist()
    assert found.samples["accuracy"].tolist() == (scores.argmax(1) == [0, 2, 1]).tolist()


def test_a_column_named_with_the_source_counts(classifier, tmp_path):
    path = tmp_path / "columns.csv"
    path.write_text("text,body,label\nthe cat,a dog,1\nthe bird,a fish,0\n")
    by_source, by_task = task(f"{path}#body"), task(str(path), text_column="body")
    found, expected = (evaluate_task([classifier], one)[0].samples["loss"] for one in (by_source, by_task))
    assert found == pytest.approx(expected)
    assert found != pytest.approx(evaluate_task([classifier], task(str(path)))[0].samples["loss"])


def test_examples_are_balanced_seeded_and_never_the_item():
    texts = [f"text {index % 35}" for index in range(40)]  # five texts come twice
    labels = [0] * 30 + [1] * 8 + [2] * 2
    shots = Shots(texts, labels, seed=0)
    for text in texts:
        taken = shots.take(8, exclude=text)
        assert len(set(taken)) == 8
        assert text not in [texts[index] for index in taken]
        assert taken == Shots(texts, labels, seed=0).take(8, exclude=text)
        counts = Counter(labels[index] for index in taken)
        rare = sum(1 for index in range(38, 40) if texts[index] != text)
        assert counts[2] == rare
        assert abs(counts[0] - counts[1]) <= 1
    assert shots.take(8, exclude="") != Shots(texts, labels, seed=1).take(8, exclude="")
    last = {Shots(texts, labels, seed=seed).take(3, exclude="")[-1] for seed in range(20)}
    assert {labels[index] for index in last} == {0, 1, 2}


def test_too_few_examples_are_refused(causal, reviews, no_forward):
    with pytest.raises(DataError, match=r"30 solved examples are wanted, and there are 29 besides the item itself"):
        evaluate_task([causal], word_task(reviews, shots=30))


# --- reading ---


@pytest.mark.parametrize(
    ("labels", "indices", "names"),
    [
        ([0, 2, 1], (0, 2, 1), None),
        (["0", "2", " 1 "], (0, 2, 1), None),
        ([0.0, np.int64(2), True], (0, 2, 1), None),
        (["pos", "neg", "pos"], (1, 0, 1), ("neg", "pos")),
        (["b", "c", "a"], (1, 2, 0), ("a", "b", "c")),
        (["1 star", "5 stars", "1 star"], (0, 1, 0), ("1 star", "5 stars")),
    ],
)
def test_labels_are_numbers_or_words(labels, indices, names):
    data = read_labelled([{"text": "x", "label": label} for label in labels], "reviews")
    assert (data.labels, data.names) == (indices, names)


def test_words_take_their_index_from_the_task():
    rows = [{"text": "x", "label": label} for label in ("good", "poor")]
    assert read_labelled(rows, "reviews", names=("poor", "fair", "good")).labels == (2, 0)
    # Other words for the same labels stand beside the data's.
    names = ("poor=terrible", "good = great")
    data = read_labelled(rows, "reviews", names=names)
    assert (data.labels, data.names) == ((1, 0), ("poor", "good"))
    assert label_words(data, names) == ("terrible", "great")


def test_default_words():
    def words(*labels):
        return label_words(read_labelled([{"text": "x", "label": label} for label in labels], "reviews"), None)

    assert words(0, 1, 1) == words(1) == words(0) == ("negative", "positive")
    assert words("spam", "ham") == ("ham", "spam")


@pytest.mark.parametrize("column", ["text", "sentence", "content", "review"])
@pytest.mark.parametrize("label", ["label", "labels", "class", "sentiment", "target"])
def test_columns_are_found(column, label):
    data = read_labelled([{"id": 7, column: "x", label: 1}], "reviews")
    assert (data.texts, data.labels) == (("x",), (1,))


def test_columns_can_be_named():
    row = {"text": "x", "body": "y", "label": 0, "stars": 1}
    data = read_labelled([row], "reviews", text_column="body", label_column="stars")
    assert (data.texts, data.labels) == (("y",), (1,))
    with pytest.raises(DataError, match=r"Unknown column `star`. Did you mean `stars`"):
        read_labelled([row], "reviews", label_column="star")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ""}, r"Row 2 of `reviews` has no text"),
        ({"text": 5}, r"Row 2 of `reviews` has no text \(`5`\)"),
        ({"label": -1}, r"Row 2 of `reviews` has the label `-1`. Numbers count from 0"),
        ({"label": ""}, r"Row 2 of `reviews` has the label ``. Allowed: a number from 0 on, or a word"),
        ({"label": None}, r"Row 2 of `reviews` has the label `None`"),
        ({"label": 0.5}, r"Row 2 of `reviews` has the label `0.5`"),
    ],
)
def test_a_bad_row_is_named(row, message):
    good = {"text": "x", "label": 1}
    with pytest.raises(DataError, match=message):
        read_labelled([good, good | row], "reviews")


def test_missing_columns_and_single_labels_are_refused():
    with pytest.raises(DataError, match=r"no column for the text. Columns: body, label. Allowed: text, sentence"):
        read_labelled([{"body": "x", "label": 1}], "reviews")
    with pytest.raises(DataError, match=r"no column for the label. Columns: text, stars. Allowed: label, labels"):
        read_labelled([{"text": "x", "stars": 1}], "reviews")
    with pytest.raises(DataError, match=r"Every row of `reviews` has the label `spam`"):
        read_labelled([{"text": "x", "label": "spam"}], "reviews")


def test_names_of_a_classifier_are_matched_without_case():
    data = read_labelled([{"text": "x", "label": "Positive"}, {"text": "y", "label": "negative"}], "reviews")
    matched = match_classifier(data, 3, {"NEGATIVE": 0, "NEUTRAL": 1, "POSITIVE": 2}, None)
    assert matched.labels == (2, 0)


@pytest.mark.parametrize("names", [("positive", "negative"), ("Positive", "NEGATIVE"), (" positive", "negative ")])
def test_words_of_the_data_are_known_whatever_their_case_and_blanks(names):
    rows = [{"text": "awful", "label": "Negative"}, {"text": "fine", "label": "Positive"}]
    data = read_labelled(rows, "reviews", names=names)
    words = label_words(data, names)
    assert [words[label].lower() for label in data.labels] == ["negative", "positive"]
    assert words == tuple(name.strip() for name in names)


def test_words_that_are_not_the_datas_are_not_guessed():
    """In the order of the alphabet `neg` would be called `positive`."""
    rows = [{"text": "awful", "label": "neg"}, {"text": "fine", "label": "pos"}]
    with pytest.raises(DataError, match=r"labels of `reviews` are `neg`, `pos`, and those named are `positive`"):
        read_labelled(rows, "reviews", names=("positive", "negative"))


# --- the area under the ROC curve ---


def slow_area(labels, margins):
    """Every pair of items with different labels, one after the other."""
    rows = list(zip(labels, margins, strict=True))
    pairs = [(m, o) for one, m in rows for other, o in rows if one > other]
    return sum(1.0 if m > o else 0.5 if m == o else 0.0 for m, o in pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(6))
def test_placements_average_to_the_area_and_spread_as_delong_says(seed):
    draw = np.random.default_rng(seed)
    labels = (draw.random(200) < 0.3).astype(int)
    margins = np.round(labels * draw.normal(0.8, 1, 200) + draw.normal(0, 1, 200), 1)  # with ties
    found = placements(labels, margins)
    positive, negative = margins[labels == 1], margins[labels == 0]
    statistic = mannwhitneyu(positive, negative).statistic
    assert found.mean() == pytest.approx(statistic / (len(positive) * len(negative)), abs=1e-12)
    assert found.mean() == pytest.approx(slow_area(labels, margins), abs=1e-12)

    def share(m, others):
        return np.mean(m > others) + np.mean(m == others) / 2

    parts = [np.array([share(m, negative) for m in positive]), np.array([1 - share(m, positive) for m in negative])]
    delong = math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))
    assert standard_error(found) == pytest.approx(delong, rel=0.02)


def test_the_area_does_not_ask_where_the_line_is():
    labels, margins = np.array([0, 0, 1, 1]), np.array([-9.0, -8.0, -7.0, -6.0])
    assert placements(labels, margins).tolist() == [1, 1, 1, 1]
    assert placements(labels, -margins).mean() == 0
    assert placements(labels, np.zeros(4)).mean() == 0.5
    assert placements(labels, np.full(4, np.nan)).mean() == 0


def test_two_labels_have_an_area_and_more_have_none(causal, tmp_path):
    rows = [
        (text, index % 2) for index, text in enumerate(["a cat", "the dog sees", "rain", "a red bird", "snow", "wind"])
    ]
    data = table(tmp_path, *(f"{text},{label}" for text, label in rows))
    (result,) = evaluate_task([causal], word_task(data, labels=("red", "green")))
    pairs = [(f"{text} .", f" {word}") for text, _ in rows for word in ("red", "green")]
    scores = score_continuations([causal], pairs, batch_size=1)[0].reshape(-1, 2)
    labels = [label for _, label in rows]
    assert result["auroc"].value == pytest.approx(slow_area(labels, scores[:, 1] - scores[:, 0]))
    assert (result["auroc"].chance, result["auroc"].num_samples) == (0.5, 6)
    assert [one.metric for one in result.measurements] == ["accuracy", "auroc"]
    one_kind = table(tmp_path, *(f"{text},0" for text, _ in rows))
    (result,) = evaluate_task([causal], word_task(one_kind, labels=("red", "green")))
    assert [one.metric for one in result.measurements] == ["accuracy"]
