"""Texts and tables from wherever users keep them, and a clear word for whatever is none."""

import json
from collections import Counter

import pandas as pd
import pytest

from avss.data.batches import make_batches
from avss.data.sources import BUILTIN, Texts, read_table, read_texts
from avss.errors import DataError
from tests.support.tokenizers import word_tokenizer

ROWS = [{"text": "The cat sees a dog.", "label": 0}, {"text": "NA", "label": 1}, {"text": "Ein Bär, zwei.", "label": 2}]
TEXTS = tuple(row["text"] for row in ROWS)

WRITERS = {
    "csv": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False),
    "tsv": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False, sep="\t"),
    "json": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8"),
    "jsonl": lambda path: path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", encoding="utf-8"),
    "ndjson": lambda path: path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8"),
    "parquet": lambda path: pd.DataFrame(ROWS).to_parquet(path),
}

every_table = pytest.mark.parametrize("ending", WRITERS)


@every_table
def test_tables_of_every_kind_hold_the_same_rows(tmp_path, ending):
    path = tmp_path / f"reviews.{ending}"
    WRITERS[ending](path)
    assert [dict(row) for row in read_table(path)] == ROWS
    assert read_texts(path) == Texts(texts=TEXTS, source=path.name, column="text")
    assert read_texts(f"{path}#text") == read_texts(str(path))


@pytest.mark.parametrize("ending", ["CSV", "JSONL", "Parquet"])
def test_endings_may_be_in_capitals(tmp_path, ending):
    path = tmp_path / f"reviews.{ending}"
    WRITERS[ending.lower()](path)
    assert read_texts(path).texts == TEXTS


def test_lines_of_json_may_hold_line_separators(tmp_path):
    rows = [{"text": "one\u2028two\x85three"}, {"text": "four"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), encoding="utf-8", newline="")
    assert read_table(path) == rows


def test_json_object_with_one_list_is_a_table(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    assert read_texts(tmp_path / "a.json").texts == TEXTS


@pytest.mark.parametrize("ending", ["txt", "text", "md", "TXT"])
def test_a_text_file_is_one_running_text(tmp_path, ending):
    path = tmp_path / f"notes.{ending}"
    path.write_text("First paragraph,\ntwo lines.\n\n\n  Second.  \n\n", encoding="utf-8")
    found = read_texts(path)
    assert (found.is_prose, found.column, found.source) == (True, None, path.name)
    assert found.texts == (path.read_text(encoding="utf-8"),)
    assert found.paragraphs() == ("First paragraph,\ntwo lines.", "Second.")


def test_windows_line_ends_separate_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One.\r\n\r\nTwo.\r\n")
    assert read_texts(tmp_path / "a.txt").paragraphs() == ("One.", "Two.")


def test_one_line_is_one_paragraph_where_there_is_no_blank_line(tmp_path):
    (tmp_path / "a.txt").write_text("One.\nTwo.\n")
    assert read_texts(tmp_path / "a.txt").paragraphs() == ("One.", "Two.")


def test_a_folder_is_read_as_a_data_set(tmp_path):
    folder = tmp_path / "reviews"
    folder.mkdir()
    WRITERS["jsonl"](folder / "train.jsonl")
    found = read_texts(folder)
    assert found.texts == TEXTS
    assert found.source == "reviews"
    assert read_texts(f"{folder}#text").texts == TEXTS


def test_a_list_of_texts_is_a_source():
    found = read_texts(["One.", "  ", "Two."])
    assert found.texts == found.paragraphs() == ("One.", "Two.")
    for nothing in ([], ["", " \n"], [None]):
        with pytest.raises(DataError, match="list of texts is empty"):
            read_texts(nothing)


# --- columns ---


def test_the_column_is_named_after_a_hash(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a text", "summary": "a summary"}))
    assert read_texts(f"{path}#summary") == Texts(texts=("a summary",), source="a.jsonl", column="summary")
    assert read_texts(path).texts == ("a text",)


def test_a_file_with_a_hash_in_its_name_is_found(tmp_path):
    path = tmp_path / "a#b.txt"
    path.write_text("Some text.")
    assert read_texts(path).texts == ("Some text.",)


def test_the_only_column_of_strings_is_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"n": 1, "body": "the body"}))
    assert read_texts(tmp_path / "a.jsonl").column == "body"


def test_two_columns_of_strings_must_be_told_apart(tmp_path):
    (tmp_path / "a.csv").write_text("left,right\none,two\n")
    with pytest.raises(DataError, match=r"no column that is clearly the text. Columns: left, right. .*`a.csv#column`"):
        read_texts(tmp_path / "a.csv")


def test_an_unknown_column_offers_near_names(tmp_path):
    (tmp_path / "a.csv").write_text("sentence,label\none,0\n")
    with pytest.raises(DataError, match=r"Unknown column `sentense`. Did you mean `sentence`"):
        read_texts(f"{tmp_path / 'a.csv'}#sentense")


def test_a_column_without_text_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\none,0\n")
    with pytest.raises(DataError, match=r"column `label` of `a\.csv` holds no text"):
        read_texts(f"{tmp_path / 'a.csv'}#label")


def test_a_text_file_has_no_columns(tmp_path):
    (tmp_path / "a.txt").write_text("Some text.")
    with pytest.raises(DataError, match="is a text file and has no column `body`"):
        read_texts(f"{tmp_path / 'a.txt'}#body")


def test_blank_cells_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": " "}\n{"text": null}\n{}\n{"text": 3}\n')
    assert read_texts(tmp_path / "a.jsonl").texts == ("one",)


# --- what is not what it says ---

GARBAGE = bytes(range(256)) * 20


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet", "txt", "md"])
def test_binary_garbage_is_a_data_error(tmp_path, ending):
    path = tmp_path / f"garbage.{ending}"
    path.write_bytes(GARBAGE)
    with pytest.raises(DataError, match="garbage"):
        read_texts(path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet", "txt", "md"])
def test_nul_bytes_are_a_data_error(tmp_path, ending):
    path = tmp_path / f"nul.{ending}"
    path.write_bytes(b"\x00" * 64)
    with pytest.raises(DataError, match="nul"):
        read_texts(path)


@pytest.mark.parametrize("content", [b"", b"\n", b"  \n \n"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet", "txt", "md"])
def test_an_empty_file_is_a_data_error(tmp_path, ending, content):
    path = tmp_path / f"empty.{ending}"
    path.write_bytes(content)
    with pytest.raises(DataError, match="empty"):
        read_texts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\n", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.json", "{}", "must hold a list of objects"),
        ("a.json", '{"a": [1], "b": [2]}', "must hold a list of objects"),
        ("a.json", "[1, 2]", "must hold a list of objects"),
        ("a.json", '"text"', "must hold a list of objects"),
        ("a.json", '[{"text": "one"}', "is not JSON"),
        ("a.jsonl", '{"text": "one"}\n{"text": ', "Line 2 of .* is not JSON"),
        ("a.jsonl", '{"text": "one"}\n[1]\n', "Line 2 of .* is a list"),
        ("a.csv", 'a,b\n1,2,3,4\n"', "cannot be read as csv"),
        ("a.pdf", "%PDF", "unknown ending. Allowed: .csv"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_a_data_error(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / name)


def test_text_in_another_encoding_is_a_data_error(tmp_path):
    for name in ("a.txt", "a.csv", "a.jsonl"):
        (tmp_path / name).write_bytes("text\nein Bär\n".encode("latin-1"))
        with pytest.raises(DataError, match="UTF-8"):
            read_texts(tmp_path / name)


def test_a_table_is_not_a_text_and_a_text_not_a_table(tmp_path):
    (tmp_path / "a.txt").write_text("Some text.")
    with pytest.raises(DataError, match="is a text file; a table is needed"):
        read_table(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["missing.csv", "missing.txt", "./missing", "~/missing/of/avss"])
def test_a_missing_file_is_a_data_error(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="There is no file"):
        read_texts(name)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_a_data_error(name):
    with pytest.raises(DataError, match="The name of the data is empty"):
        read_texts(name)


def test_an_empty_folder_is_a_data_error(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_texts(tmp_path / "nothing")


def test_a_data_set_that_is_not_there_is_a_data_error(monkeypatch):
    import datasets

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "get_dataset_split_names", offline)
    with pytest.raises(DataError, match=r"data set `owner/name` cannot be read: no network.*name:config@split#column"):
        read_texts("owner/name")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", ("owner/name", None, "train", "text")),
        ("owner/name:config", ("owner/name", "config", "train", "text")),
        ("owner/name@test", ("owner/name", None, "test", "text")),
        ("owner/name:config@test#body", ("owner/name", "config", "test", "body")),
        ("owner/name#body", ("owner/name", None, "train", "body")),
        ("name", ("name", None, "train", "text")),
    ],
)
def test_hub_names_are_taken_apart(monkeypatch, source, expected):
    import datasets

    asked = {}

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.update(name=name, config=config, split=split, streaming=streaming)
        return [{"text": "a text", "body": "a body"}]

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["test", "train"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_texts(source)
    assert (asked["name"], asked["config"], asked["split"], found.column) == expected


def test_of_a_long_data_set_the_first_rows_are_read_and_it_is_said(monkeypatch, caplog):
    import datasets

    rows = [{"text": f"text {number}"} for number in range(20_001)]
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter(rows))
    assert read_texts("owner/name").texts == tuple(row["text"] for row in rows[:20_000])
    assert "first 20,000 rows" in caplog.text
    caplog.clear()
    rows.pop()
    assert len(read_texts("owner/name").texts) == 20_000
    assert not caplog.text


# --- several ---


def test_several_sources_follow_each_other(tmp_path):
    prose, more, table = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.csv"
    prose.write_text("One.\n\nTwo.")
    more.write_text("Three.")
    table.write_text("text\nFour.\n")
    both = read_texts(f"{prose}, {more}")
    assert both == Texts(texts=("One.\n\nTwo.", "Three."), source="a.txt,b.txt", is_prose=True)
    mixed = read_texts(f"{prose},{table}")
    assert mixed == Texts(texts=("One.", "Two.", "Four."), source="a.txt,c.csv", is_prose=False)
    with pytest.raises(DataError, match=r"no file .*missing\.txt"):
        read_texts(f"{prose},missing.txt")


def test_a_file_may_have_a_comma_in_its_name(tmp_path):
    (tmp_path / "a,b.txt").write_text("One.")
    assert read_texts(tmp_path / "a,b.txt").texts == ("One.",)


# --- what comes with avss ---


def test_unknown_built_in_data_is_a_data_error():
    with pytest.raises(DataError, match=r"Unknown built-in data `calibraton`\. Did you mean `calibration`"):
        read_texts("builtin:calibraton")


def test_built_in_is_the_calibration_text():
    assert read_texts("builtin").texts == read_texts("builtin:calibration").texts


def test_built_in_texts_fill_the_default_number_of_windows():
    """64 windows of 128 tokens, and an evaluation text that is not much smaller."""
    calibration, evaluation = read_texts("builtin:calibration"), read_texts("builtin:evaluation")
    for one in (calibration, evaluation):
        assert one.is_prose
        assert len(one.texts[0].split()) > 6000
        assert len(one.paragraphs()) > 50
    batches = make_batches(calibration, word_tokenizer(), layout="packed", samples=64, seq_len=64, batch_size=8, seed=0)
    assert len(batches.sequences) == 64


def test_built_in_evaluation_shares_nothing_with_calibration():
    calibration = set(read_texts("builtin:calibration").paragraphs())
    evaluation = set(read_texts("builtin:evaluation").paragraphs())
    assert not calibration & evaluation

    def phrases(paragraphs: set[str]) -> set[tuple[str, ...]]:
        words = [paragraph.lower().split() for paragraph in paragraphs]
        return {tuple(one[i : i + 10]) for one in words for i in range(len(one) - 9)}

    assert not phrases(calibration) & phrases(evaluation)


def test_built_in_sentiment_is_balanced():
    rows = read_table("builtin:sentiment")
    counts = Counter(row["label"] for row in rows)
    assert set(counts) == {0, 1}
    assert abs(counts[0] - counts[1]) <= 2
    assert len({row["text"] for row in rows}) == len(rows) >= 100


def test_built_in_choices_are_whole_and_their_answers_spread():
    rows = read_table("builtin:choice")
    assert len(rows) >= 80
    assert len({row["question"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"question", "choices", "answer"}
        assert len(row["choices"]) == len(set(row["choices"])) >= 2
        assert 0 <= row["answer"] < len(row["choices"])
    answers = Counter(row["answer"] for row in rows)
    assert max(answers.values()) <= 0.6 * len(rows)


def test_every_built_in_file_can_be_read():
    for name, file in BUILTIN.items():
        source = f"builtin:{name}"
        assert read_texts(source).texts if file.endswith(".txt") else read_table(source)


@pytest.mark.parametrize("rows", ["A good, warm film,1", "fine film,1,", "A good, warm film,1\nanother, one,0"])
def test_rows_longer_than_the_header_are_refused_and_not_shifted(tmp_path, rows):
    path = tmp_path / "reviews.csv"
    path.write_text(f"text,label\n{rows}\n")
    with pytest.raises(DataError, match="more cells than its header"):
        read_table(path)


@pytest.mark.parametrize(
    "name", ["The cat sees the dog. " * 30, ",".join(f"file{number:03}.txt" for number in range(60))]
)
def test_a_text_or_a_long_list_in_place_of_a_name_is_one_sentence(name):
    with pytest.raises(DataError, match="There is no file"):
        read_texts(name)


def test_the_column_of_texts_is_told_by_more_than_the_first_row(tmp_path):
    rows = [{"id": "abc1", "text": None}, *({"id": f"abc{n}", "text": f"Sentence {n}."} for n in range(2, 6))]
    path = tmp_path / "crawl.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_texts(path).texts[0] == "Sentence 2."
    path.write_text("\n".join(map(json.dumps, [{"source": "crawl 2024"}, *({"text": f"Line {n}."} for n in range(4))])))
    assert read_texts(path).texts == ("Line 0.", "Line 1.", "Line 2.", "Line 3.")


def test_a_column_given_apart_is_that_of_every_table(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "no", "body": f"Yes, {name}."}))
    (tmp_path / "notes.txt").write_text("A note.")
    names = ",".join(str(tmp_path / name) for name in ("one.jsonl", "two.jsonl", "notes.txt"))
    assert read_texts(names, "body").texts == ("Yes, one.", "Yes, two.", "A note.")
    assert read_texts(f"{tmp_path / 'one.jsonl'}#text", "body").texts == ("no",)


def test_json_nested_beyond_reason_is_one_sentence(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="is not JSON"):
        read_table(path)


def test_quotes_in_a_tsv_are_characters_where_lines_say_so(tmp_path):
    path = tmp_path / "glue.tsv"
    path.write_text('sentence\tlabel\n"a stirring film\t1\nplain\t0\nit is "good"\t1\n"again\t0\n')
    assert [row["sentence"] for row in read_table(path)] == ['"a stirring film', "plain", 'it is "good"', '"again']
    # Quotes that hold a line break, or a tab, together are still quotes.
    path.write_text('sentence\tlabel\n"two\nlines"\t1\n"a\ttab"\t0\n')
    assert [row["sentence"] for row in read_table(path)] == ["two\nlines", "a\ttab"]
