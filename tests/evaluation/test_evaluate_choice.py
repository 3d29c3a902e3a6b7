"""Scores of continuations against token-by-token loops, and the reading of questions."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from avss.config import TaskConfig
from avss.errors import DataError, TaskError
from avss.evaluation import evaluate_task, retention
from avss.evaluation.questions import read_questions
from avss.evaluation.scoring import score_continuations

TEMPLATE = "the cat hears {question} ?"


def task(quiz, **settings):
    return TaskConfig(**({"kind": "choice", "data": quiz, "batch_size": 5, "template": TEMPLATE} | settings))


def write(tmp_path, *rows, name="quiz.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    with Path(path).open() as file:
        return [json.loads(line) for line in file]


def plain_causal(loaded, context, continuation):
    """One token after the other, one forward pass each."""
    tokenizer = loaded.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer(context, add_special_tokens=False)["input_ids"]]
    total = 0.0
    for token in tokenizer(continuation, add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1]
        total += math.log(torch.softmax(logits.double(), -1)[token].item())
        ids.append(token)
    return total


def plain_masked(loaded, context, continuation):
    """Each token of the continuation hidden in turn, one forward pass each."""
    tokenizer = loaded.tokenizer
    inner = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    num_context = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    ids = [tokenizer.cls_token_id, *inner, tokenizer.sep_token_id]
    total = 0.0
    for place in range(1 + num_context, 1 + len(inner)):
        seen = torch.tensor([ids])
        seen[0, place] = tokenizer.mask_token_id
        with torch.no_grad():
            logits = loaded.model(input_ids=seen).logits[0, place]
        total += math.log(torch.softmax(logits.double(), -1)[ids[place]].item())
    return total


def plain_cosine(loaded, context, continuation):
    """One text at a time, so that nothing is padded."""
    vectors = []
    for text in (context, continuation):
        with torch.no_grad():
            hidden = loaded.model(input_ids=torch.tensor([loaded.tokenizer(text)["input_ids"]])).last_hidden_state
        vectors.append(hidden[0].mean(0).double().numpy())
    left, right = vectors
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


PLAIN = {"causal": plain_causal, "masked": plain_masked, "encoder": plain_cosine}


@pytest.mark.parametrize("head", PLAIN)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_scores_match_a_loop_without_batches(head, batch_size, quiz, request):
    loaded = request.getfixturevalue(head)
    pairs = [(row["question"], f" {choice}") for row in read(quiz)[:8] for choice in row["choices"]]
    expected = [PLAIN[head](loaded, *pair) for pair in pairs]
    assert score_continuations([loaded], pairs, batch_size=batch_size)[0] == pytest.approx(expected, abs=1e-4)


def test_both_accuracies_and_chance_by_hand(causal, quiz):
    result = evaluate_task([causal], task(quiz))[0]
    plain, normed, rows = [], [], read(quiz)
    for row in rows:
        context = TEMPLATE.replace("{question}", row["question"])
        scores = [plain_causal(causal, context, f" {choice}") for choice in row["choices"]]
        plain.append(int(np.argmax(scores)))
        normed.append(int(np.argmax([s / len(c.encode()) for s, c in zip(scores, row["choices"], strict=True)])))
    assert plain != normed
    for metric, predicted in (("accuracy", plain), ("accuracy_norm", normed)):
        share = np.mean([a == row["answer"] for a, row in zip(predicted, rows, strict=True)])
        assert result.predictions[metric].tolist() == predicted
        assert result[metric].value == pytest.approx(share)
        assert result[metric].stderr == pytest.approx(math.sqrt(share * (1 - share) / (len(rows) - 1)))
        assert result[metric].chance == pytest.approx(np.mean([1 / len(row["choices"]) for row in rows]))
    assert [m.metric for m in result.measurements] == ["accuracy", "accuracy_norm"]
    assert result["accuracy"].task == "choice:quiz"


def test_length_is_counted_in_bytes(causal, tmp_path):
    # Equal tokens (both unknown words), so equal sums; the second has fewer characters and more bytes.
    path = write(tmp_path, {"question": "the", "choices": ["qqqq", "äöü"], "answer": 1})
    result = evaluate_task([causal], task(path))[0]
    assert result.predictions["accuracy"] == 0
    assert result.predictions["accuracy_norm"] == 1


@pytest.mark.parametrize("head", PLAIN)
def test_neither_batches_nor_company_nor_order_matter(head, quiz, request, shorter):
    loaded = request.getfixturevalue(head)
    models = [loaded, shorter(loaded, 1), shorter(loaded, 2)]
    alone = [evaluate_task([model], task(quiz, batch_size=3))[0].measurements for model in models]
    for order in ([0, 1, 2], [0, 2, 1]):
        together = evaluate_task([models[place] for place in order], task(quiz, batch_size=16))
        assert [result.measurements for result in together] == [alone[place] for place in order]


def test_an_identical_model_flips_nothing(causal, quiz, shorter):
    for entry in retention(*evaluate_task([causal, shorter(causal)], task(quiz))):
        assert (entry.ratio, entry.ratio_stderr, entry.flips, entry.kept) == (1, 0, 0, 1)


def test_an_encoder_reads_question_and_choice_as_they_are(encoder, quiz):
    result = evaluate_task([encoder], task(quiz))[0]
    expected = [
        int(np.argmax([plain_cosine(encoder, row["question"], choice) for choice in row["choices"]]))
        for row in read(quiz)
    ]
    assert result.predictions["accuracy"].tolist() == expected
    assert [m.metric for m in result.measurements] == ["accuracy"]


def test_a_long_context_loses_its_beginning_but_not_bos(causal):
    words = " ".join(["the cat sees a dog and the bird hears rain ."] * 12)
    ids = causal.tokenizer(words, add_special_tokens=False)["input_ids"]
    kept = causal.tokenizer.decode(ids[len(ids) - (causal.max_len - 1 - 2) :])
    score = score_continuations([causal], [(words, " red fish")], batch_size=1)[0]
    assert score[0] == pytest.approx(plain_causal(causal, kept, " red fish"), abs=1e-4)


@pytest.fixture(scope="session")
def merging(causal):
    """The causal model with a byte-level BPE, whose tokens begin with the blank before a word."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    sentences = ["the cat sees the dog", "a dog hears the cat", "the bird finds the tree", "Answer: the cat"]
    alphabet = sorted(set("".join(sentences)) | {"Ġ"})
    core.train_from_iterator(sentences * 9, trainers.BpeTrainer(vocab_size=60, initial_alphabet=alphabet))
    return dataclasses.replace(causal, tokenizer=PreTrainedTokenizerFast(tokenizer_object=core))


def test_blanks_at_the_end_of_a_context_belong_to_the_continuation(merging):
    scores = score_continuations([merging], [("Answer: ", "the cat"), ("Answer:", " the cat")], batch_size=2)[0]
    assert len(merging.tokenizer("Answer: ")["input_ids"]) > len(merging.tokenizer("Answer:")["input_ids"])
    assert scores[0] == scores[1]


def test_without_bos_the_first_token_of_the_context_is_only_read(merging):
    ids = merging.tokenizer("Answer: the cat")["input_ids"]
    start = len(merging.tokenizer("Answer:")["input_ids"])
    with torch.no_grad():
        log_p = torch.log_softmax(merging.model(input_ids=torch.tensor([ids])).logits[0], -1)
    expected = sum(log_p[place - 1, ids[place]].item() for place in range(start, len(ids)))
    assert score_continuations([merging], [("Answer:", " the cat")], batch_size=1)[0] == pytest.approx(
        expected, abs=1e-5
    )


# --- reading ---

PLAIN_ROW = {"question": "what", "choices": ["x", "y", "z"], "answer": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "1"},
        {"answer": "B"},
        {"answer": " b "},
        {"answer": 1.0},
        {"answer": np.int64(1)},
        {"choices": np.array(["x", "y", "z"], dtype=object)},
        {"choices": ("x", "y", "z")},
        {"choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answer": "2"},
        {"choices": {"text": ["x", "y", "z"], "label": [1, 2, 3]}, "answer": 2},
        {"choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answer": 2.0},
        {"choices": {"text": ["x", "y", "z"], "label": None}, "answer": 1},
        {"choices": {"text": np.array(["x", "y", "z"]), "label": np.array(["A", "B", "C"])}, "answer": "B"},
    ],
)
def test_answers_and_choices_are_read_in_every_common_form(row):
    question = read_questions([PLAIN_ROW | row], "quiz")[0]
    assert (question.text, question.choices, question.answer) == ("what", ("x", "y", "z"), 1)


@pytest.mark.parametrize(
    "row",
    [
        {"goal": "what", "sol1": "x", "sol2": "y", "label": 1},
        {"ctx": "what", "endings": ["x", "y"], "label": "1"},
        {"query": "what", "choices": ["x", "y"], "gold": 1},
        {"question_stem": "what", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
    ],
)
def test_columns_of_known_data_sets_are_found(row):
    question = read_questions([row], "quiz")[0]
    assert (question.text, question.choices, question.answer) == ("what", ("x", "y"), 1)


def test_columns_can_be_named():
    row = {"question": "cause", "premise": "what", "choices": ["x", "y"], "right": 0, "label": 1}
    assert read_questions([row], "quiz", text_column="premise", answer_column="right")[0].text == "what"
    with pytest.raises(DataError, match=r"Unknown column `premises`. Did you mean `premise`"):
        read_questions([row], "quiz", text_column="premises")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 3}, "Row 2 of `quiz`: the answer is `3`. Allowed: an index from 0 to 2, or a letter from A to C"),
        ({"answer": -1}, "Row 2 .*answer is `-1`"),
        ({"answer": "--1"}, "Row 2 .*answer is `--1`"),
        ({"answer": "D"}, "Row 2 .*answer is `D`"),
        ({"answer": ""}, "Row 2 .*answer is ``"),
        ({"answer": None}, "Row 2 .*answer is `None`"),
        ({"answer": True}, "Row 2 .*answer is `True`"),
        ({"answer": 0.5}, "Row 2 .*answer is `0.5`"),
        ({"answer": "the second"}, "Row 2 .*answer is `the second`"),
        ({"choices": "x, y"}, "Row 2 .*`x, y`, not a list.*csv files hold no lists"),
        ({"choices": None}, "Row 2 .*not a list"),
        ({"choices": ["x"], "answer": 0}, "Row 2 of `quiz` has 1 choice.*at least two"),
        ({"choices": ["x", " ", "z"]}, "Row 2 .*choice ` ` is not a text"),
        ({"choices": ["x", 7, "z"]}, "Row 2 .*choice `7` is not a text"),
        ({"question": " "}, "Row 2 .*no text in the column `question`"),
    ],
)
def test_a_bad_row_is_named(row, message):
    with pytest.raises(DataError, match=message):
        read_questions([PLAIN_ROW, PLAIN_ROW | row], "quiz")


@pytest.mark.parametrize("missing", ["question", "choices", "answer"])
def test_a_missing_column_is_named(missing):
    row = {key: value for key, value in PLAIN_ROW.items() if key != missing}
    with pytest.raises(DataError, match=rf"`quiz` has no column for the {missing}. Columns: .*Allowed: {missing}, "):
        read_questions([row], "quiz")


# --- refused before any forward pass ---


def test_refuses_a_classifier(classifier, quiz, no_forward):
    with pytest.raises(TaskError, match=r"`classifier` head.*`classification`"):
        evaluate_task([classifier], task(quiz))


def test_refuses_bad_data(causal, tmp_path, no_forward):
    with pytest.raises(DataError, match="There is no file"):
        evaluate_task([causal], task(str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match="has no rows"):
        evaluate_task([causal], task(write(tmp_path)))
    bad = write(tmp_path, PLAIN_ROW, PLAIN_ROW | {"answer": 9})
    with pytest.raises(DataError, match=r"Row 2 of `quiz.jsonl`"):
        evaluate_task([causal], task(bad, limit=1))


def test_refuses_a_template_without_a_place(causal, quiz, no_forward):
    with pytest.raises(TaskError, match=r"The template `Q: {text}` has no `{question}`"):
        evaluate_task([causal], task(quiz, template="Q: {text}"))


def test_refuses_what_cannot_be_scored(causal, merging, no_forward):
    with pytest.raises(TaskError, match=r"has 70 tokens and does not fit the model, which takes 64"):
        score_continuations([causal], [("the", " cat" * 70)], batch_size=1)
    with pytest.raises(TaskError, match="There is no token before ` the`"):
        score_continuations([merging], [("", " the")], batch_size=1)
    with pytest.raises(TaskError, match=r"`\t` has no token of its own"):
        score_continuations([causal], [("the cat", "\t")], batch_size=1)
    with pytest.raises(DataError, match="has no tokenizer"):
        score_continuations([dataclasses.replace(causal, tokenizer=None)], [("the", " cat")], batch_size=1)


def test_of_choices_with_one_text_each_is_right(causal, tmp_path):
    path = write(tmp_path, {"question": "the", "choices": ["cat", "dog", "cat"], "answer": 2})
    (result,) = evaluate_task([causal], TaskConfig(kind="choice", data=str(path)))
    (chosen,) = result.predictions["accuracy"]
    assert result["accuracy"].value == float(chosen in (0, 2))
    other = write(tmp_path, {"question": "the", "choices": ["cat", "cat"], "answer": 1})
    assert evaluate_task([causal], TaskConfig(kind="choice", data=str(other)))[0]["accuracy"].value == 1
