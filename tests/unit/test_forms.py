"""Sentences put into prompts: the form, which sentences, what a window holds, and who reads it."""

import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from avss import forms
from avss.config import DataConfig, TaskConfig
from avss.data.augment import Augmentation, Prompts, augmentation
from avss.errors import ConfigError, DataError
from avss.evaluation import choice, classification
from avss.evaluation.forms import task_forms
from avss.forms import DOTS, Form, is_fit, sentences_of
from tests.support.tokenizers import word_tokenizer

FORM = "the cat {text} a dog {cat|bird|dog}"
SENTENCES = ["the bird sees .", "a cat likes the dog .", "the old man sees a bird .", "a dog sees ."]
WORDS = word_tokenizer(adds="bos")


def ids_of(text):
    return WORDS(text, add_special_tokens=False)["input_ids"]


# --- forms ---


def test_a_form_is_filled_in_order_and_its_answers_are_drawn():
    form = Form.parse("{text}\nand {text}: {yes|no|so so}!")
    found = [form.filled("AB", np.random.default_rng(seed)) for seed in range(300)]
    counts = Counter(re.fullmatch(r"A\nand B: (yes|no|so so)!", one)[1] for one in found)
    assert set(counts) == {"yes", "no", "so so"}
    assert min(counts.values()) > 70


@pytest.mark.parametrize(
    ("text", "wrong"), [("Review:", "{text}"), ("{a|b}", "{text}"), ("{label}: {text}", "{label}"), ("{} {text}", "{}")]
)
def test_what_is_no_form_is_refused_with_an_example(text, wrong):
    with pytest.raises(ConfigError, match="Write") as caught:
        Form.parse(text)
    assert f"`{wrong}`" in str(caught.value)


def test_other_braces_stand_for_themselves():
    form = Form.parse('{"text": "{text}", "label": {0|1}}')
    assert form.filled(["x"], np.random.default_rng(0)) in (
        '{"text": "x", "label": 0}',
        '{"text": "x", "label": 1}',
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("none", ()),
        (["none"], ()),
        ([], ()),
        (None, None),
        ("a {text}\\nb", ("a {text}\\nb",)),  # unescaped on the command line alone
        (["a {text}", "b {text}"], ("a {text}", "b {text}")),
    ],
)
def test_forms_are_read_as_they_are_typed(given, expected):
    assert DataConfig(forms=given).forms == expected


# --- sentences ---


def test_sentences_are_the_pieces_between_full_stops_and_lines_of_a_fit_length():
    longest, too_long = " ".join(["w"] * forms.MAX_WORDS), " ".join(["w"] * (forms.MAX_WORDS + 1))
    text = f"One two three. Four five!  Six seven eight?\n\n= Nine ten =\n{longest}\n{too_long}. A version 2.5 is out"
    assert sentences_of(text) == ["One two three.", "Six seven eight?", "= Nine ten =", longest, "A version 2.5 is out"]


@pytest.mark.parametrize(
    ("sentence", "fits"), [("It works well.", True), (DOTS, False), ("1 2 3 4", False), ("Too short", False)]
)
def test_a_sentence_for_a_prompt_has_words(sentence, fits):
    assert is_fit(sentence) == fits


def test_a_form_is_shown_with_dots_and_an_answer():
    shown = {Form.parse(FORM).shown(np.random.default_rng(seed)) for seed in range(20)}
    assert shown == {f"the cat ... a dog {word}" for word in ("cat", "bird", "dog")}


# --- windows ---


def test_a_window_holds_whole_prompts_of_the_sentences_in_order_each_a_text_of_its_own():
    window = Prompts(WORDS, [FORM]).window(SENTENCES, 1000, np.random.default_rng(0))
    assert window is not None
    bos, eos = WORDS.bos_token_id, WORDS.eos_token_id
    prompts = " ".join(map(str, window.tolist())).split(f" {eos} ")
    assert len(prompts) == len(SENTENCES)
    for prompt, sentence in zip(prompts, SENTENCES, strict=True):
        read = [int(one) for one in prompt.split()]
        assert read[0] == bos
        assert read[1:] in [ids_of(f"the cat {sentence} a dog {word}") for word in ("cat", "bird", "dog")]


@pytest.mark.parametrize("length", [1, 2, 7, 20])
def test_a_window_is_cut_off_at_its_length(length):
    prompts = Prompts(WORDS, [FORM])
    whole = prompts.window(SENTENCES, 1000, np.random.default_rng(3))
    part = prompts.window(SENTENCES, length, np.random.default_rng(3))
    assert whole is not None
    assert part is not None
    assert torch.equal(part, whole[:length])


def test_given_rows_fill_a_form_in_place_of_the_text():
    rows = {FORM: [("the moon sees .",), ("a dog sees .",), ("the old bird sees .",)]}
    window = Prompts(WORDS, [FORM, "a bird {text}"], rows).window(SENTENCES[:1], 200, np.random.default_rng(0))
    assert window is not None
    text = WORDS.decode(window)
    assert "the cat a dog sees" in text
    assert "the cat the old bird sees" in text
    assert "the moon" not in text  # every fourth row judges, the first one first
    assert text.count("a bird the bird sees") == 1  # the other form takes the text's own, while there are any


def test_what_is_asked_ends_before_the_answer_and_names_the_first_tokens():
    rows = {"a bird {text}": [("the bird sees .",)], FORM: [("a dog sees .",), ("the old bird sees .",)]}
    asked = Prompts(WORDS, [FORM, "a bird {text}"], rows).asked(np.random.default_rng(0))
    assert [one.row for one in asked] == [1, 2]  # numbered on from form to form
    words = tuple(ids_of(word)[0] for word in ("cat", "bird", "dog"))
    assert [one.words for one in asked] == [words, words]
    expected = [[WORDS.bos_token_id, *ids_of(f"the cat {row} a dog")] for (row,) in rows[FORM]]
    assert [one.token_ids.tolist() for one in asked] == expected


def test_answers_that_begin_alike_are_not_asked_for():
    form = "{text} {a cat|a dog}"
    assert Prompts(WORDS, [form], {form: [("a dog sees .",)]}).asked(np.random.default_rng(0)) == []


def test_given_rows_are_asked_as_they_are_and_in_another_writing():
    rows = {FORM: [("the old bird sees .",)] * 400}
    plain, other = (Augmentation(WORDS, share, "packed", [FORM], rows=rows).asked((0,)) for share in (0.0, 0.5))
    assert len(plain) == 400
    assert len({tuple(one.token_ids.tolist()) for one in plain}) == 1
    assert len({tuple(one.token_ids.tolist()) for one in other}) > 1
    assert 500 < len(other) < 800  # one in seven stays as it is
    for number in range(400):
        first, *rest = (one.token_ids for one in other if one.row == number)
        assert torch.equal(first, plain[number].token_ids)
        assert len(rest) <= 1
        assert not any(torch.equal(one, first) for one in rest)
    again = Augmentation(WORDS, 0.5, "packed", [FORM]).with_rows(rows).asked((0,))
    assert all(torch.equal(one.token_ids, two.token_ids) for one, two in zip(other, again, strict=True))


def test_a_form_with_more_room_than_sentences_left_gives_way_to_another():
    prompts = Prompts(WORDS, ["a cat {text} {text} {text}", "a dog {text}"])
    for seed in range(20):
        window = prompts.window(SENTENCES[:2], 1000, np.random.default_rng(seed))
        assert window is not None
        assert window.tolist().count(WORDS.bos_token_id) == 2
    assert Prompts(WORDS, ["a cat {text} {text} {text}"]).window(SENTENCES[:2], 9, np.random.default_rng(0)) is None


def test_scripts_without_blanks_have_sentences_too():
    text = "猫は窓のそばで一日中寝ていたらしいです。犬!短い。" + "鳥は庭の木の上で朝からずっと歌っていました。" * 2
    assert sentences_of(text) == [
        "猫は窓のそばで一日中寝ていたらしいです。",
        *["鳥は庭の木の上で朝からずっと歌っていました。"] * 2,
    ]


def test_no_sentences_give_no_window():
    assert Prompts(WORDS, [FORM]).window([], 100, np.random.default_rng(0)) is None


def test_every_form_has_its_turn():
    window = Prompts(WORDS, ["a cat {text}", "a dog {text}"]).window(
        ["the bird sees ."] * 200, 10**6, np.random.default_rng(0)
    )
    assert window is not None
    starts = Counter(
        tuple(part) for part in zip(window.tolist(), window.tolist()[1:], window.tolist()[2:], strict=False)
    )
    counts = [starts[WORDS.bos_token_id, *ids_of(words)] for words in ("a cat", "a dog")]
    assert sum(counts) == 200
    assert min(counts) > 70


def test_without_an_end_of_text_a_blank_line_parts_them():
    tokenizer = word_tokenizer(adds="bos")
    tokenizer.eos_token = None
    window = Prompts(tokenizer, ["a cat {text}"]).window(SENTENCES[:2], 1000, np.random.default_rng(0))
    between = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    assert window.tolist() == [tokenizer.bos_token_id, *ids_of(f"a cat {SENTENCES[0]}"), *between,
                               *ids_of(f"a cat {SENTENCES[1]}")]  # fmt: skip


# --- who reads them ---

WINDOW = torch.tensor([WORDS.bos_token_id, *ids_of(" ".join(SENTENCES * 3))])


@pytest.mark.parametrize("share", [forms.SHARE, forms.HEALING_SHARE, 0.6])
def test_a_share_of_the_sequences_is_read_as_prompts_and_the_rest_as_before(share):
    plain, other = Augmentation(WORDS, 0.5, "packed"), Augmentation(WORDS, 0.5, "packed", [FORM], form_share=share)
    as_prompts = 0
    for seed in range(1000):
        prompts = other.as_prompts(WINDOW, (seed,))
        found = other(WINDOW, (seed,))
        assert len(found) <= len(WINDOW)
        assert torch.equal(found, other(WINDOW, (seed,)))
        assert torch.equal(found, plain(WINDOW, (seed,)) if prompts is None else prompts)
        as_prompts += prompts is not None
    assert as_prompts / 1000 == pytest.approx(share, abs=0.04)


def test_sentences_in_prompts_are_rewritten_too():
    starts = {"as it is": 0, "other": 0}
    for seed in range(2000):
        prompts = Augmentation(WORDS, 0.5, "packed", ["{text}"]).as_prompts(WINDOW, (seed,))
        if prompts is not None:
            starts["as it is" if WORDS.decode(prompts[1:]).startswith(SENTENCES[0]) else "other"] += 1
    assert min(starts.values()) > 50


def test_a_sequence_without_sentences_is_read_as_before():
    short = WINDOW[:3]
    found = [Augmentation(WORDS, 0.0, "packed", [FORM])(short, (seed,)) for seed in range(50)]
    assert all(torch.equal(one, short) for one in found)


@pytest.mark.parametrize(
    ("head", "layout"), [("masked", "padded"), ("encoder", "padded"), ("classifier", "padded"), ("seq2seq", "padded"),
                         ("masked", "packed"), ("causal", "padded")],
)  # fmt: skip
def test_forms_are_refused_where_nothing_continues_running_text(head, layout):
    with pytest.raises(ConfigError, match="are for models that continue running text"):
        augmentation(WORDS, head, None, layout, forms=[FORM])
    assert augmentation(WORDS, head, 0.0, layout) is None


def test_forms_count_without_another_writing():
    found = augmentation(WORDS, "causal", 0.0, "packed", forms=[FORM])
    assert found is not None
    assert found.forms == (FORM,)


# --- of tasks ---


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\ngood,up\nbad,down\nwell,up\n", encoding="utf-8")
    return str(path)


def fillings(form, *sentences):
    return {Form.parse(form).filled(sentences, np.random.default_rng(seed)) for seed in range(40)}


@pytest.mark.parametrize("template", ["Say {text} now:", "{text}", "{text}, again {text}?", '{"a": "{text}"}\n='])
def test_the_forms_of_tasks_are_what_their_evaluation_asks(reviews, template):
    """Filled with a text and a label of the data, a form is what the evaluation scores for that item."""
    task = TaskConfig(kind="classification", data=reviews, template=template)
    (form,), warnings = task_forms([task])
    model: Any = SimpleNamespace(head="causal")
    contexts, continuations = classification._prompts(model, task, classification.read(task), ("down", "up"), [1])
    wanted = {context + end for context in contexts for end in continuations}
    assert fillings(form, *["bad"] * template.count("{text}")) == wanted
    assert warnings == ()


@pytest.mark.parametrize("template", [None, "Q {question} {question}\nA:", "{{question}}"])
def test_a_choice_is_asked_with_sentences_for_question_and_answer(template):
    (form,), _ = task_forms([TaskConfig(kind="choice", template=template)])
    asked = template or choice.DEFAULT_TEMPLATE
    count = asked.count("{question}")
    assert fillings(form, *["Q"] * count, "A") == {asked.replace("{question}", "Q") + " A"}


def test_solved_examples_stand_before_it(reviews):
    task = TaskConfig(kind="classification", data=reviews, labels=("down", "up"), shots=2)
    (form,), _ = task_forms([task])
    one = classification.DEFAULT_TEMPLATE + " {down|up}"
    assert form == classification.EXAMPLE_BREAK.join([one] * 3)


def test_equal_forms_are_one_and_other_tasks_have_none():
    tasks = [TaskConfig(kind="choice"), TaskConfig(kind="choice", data="x"), TaskConfig(kind="perplexity"),
             TaskConfig(kind="similarity"), TaskConfig(kind="speed")]  # fmt: skip
    assert len(task_forms(tasks)[0]) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"template": "{text} is {what}"},
        {"template": "{text} is {this|that}"},
        {"template": "always the same"},
        {"labels": ("a|b", "c")},
        {"labels": ("{up}", "down")},
        {"labels": ("up\nwards", "down")},
    ],
)
def test_a_prompt_that_cannot_be_written_as_a_form_is_left_out_and_told(reviews, settings):
    forms, (warning,) = task_forms([TaskConfig(kind="classification", data=reviews, **settings)])
    assert forms == ()
    assert f"classification={reviews}" in warning


def test_data_are_read_for_names_of_labels_only_where_the_task_names_none():
    task = TaskConfig(kind="classification", data="nowhere.csv", labels=("a", "b"))
    assert task_forms([task])[0] == (classification.DEFAULT_TEMPLATE + " {a|b}",)
    with pytest.raises(DataError, match="nowhere"):
        task_forms([TaskConfig(kind="classification", data="nowhere.csv")])


def test_a_form_asks_for_the_words_that_the_evaluation_asks_for(reviews):
    task = TaskConfig(kind="classification", data=reviews, labels=("down=awful", "up=great"))
    assert task_forms([task])[0] == (classification.DEFAULT_TEMPLATE + " {awful|great}",)
