"""Reads texts and tables from where users keep them.

builtin                      a small text written for this project (`builtin:evaluation`, `builtin:choice`, ... too)
notes.txt, reviews.csv       a local file: txt, md, csv, tsv, json, jsonl, parquet
reviews.csv#body             one column of it
folder/                      a data set folder as `datasets` reads it
name[:config][@split][#column]   a data set on the hub, e.g. `Salesforce/wikitext:wikitext-2-raw-v1@test#text`
web.txt,chat.jsonl           several of these, where texts are read

Of a data set folder or a data set on the hub, the first 20,000 rows are read; it is said where there are more.
"""

import csv
import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from avss.errors import DataError, unknown_name

BUILTIN: dict[str, str] = {
    "calibration": "calibration.txt",
    "evaluation": "evaluation.txt",
    "choice": "choice.jsonl",
    "sentiment": "sentiment.csv",
}
"""Name -> file of the data that comes with avss. All of it was written for this project."""

TEXT_COLUMNS = ("text", "sentence", "content", "document", "article", "review", "question", "prompt")
"""Columns taken for text, in this order, where the user named none."""

_TEXT_SUFFIXES = frozenset({".txt", ".text", ".md"})
_TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet"})
_MAX_HUB_ROWS = 20_000
_LOOKED_AT = 100
_log = logging.getLogger(__name__)

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts and where they came from.

    Attributes:
        texts: None of them empty, unless blank rows were asked for.
        source: As the user named it; a path by its last part.
        column: Column they were in, if there were columns.
        is_prose: True for a text file, which is one running text rather than a list of examples.
    """

    texts: tuple[str, ...]
    source: str
    column: str | None = None
    is_prose: bool = False

    def paragraphs(self) -> tuple[str, ...]:
        """The texts as separate examples: a running text is split at blank lines."""
        if not self.is_prose:
            return self.texts
        parts = (part.strip() for text in self.texts for part in text.replace("\r\n", "\n").split("\n\n"))
        found = tuple(part for part in parts if part)
        # One paragraph a line is the other common layout of text files.
        return (
            found
            if len(found) > 1
            else tuple(line for text in self.texts for line in text.splitlines() if line.strip())
        )


def exists(name: str) -> bool:
    """Whether there is a file or folder of that name; a text that is too long for a name is none."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def split_sources(source: str | Path) -> tuple[str, ...]:
    """The sources that a name with commas stands for; a file may have a comma in its name."""
    name = str(source)
    if exists(name):
        return (name,)
    return tuple(part.strip() for part in name.split(",") if part.strip()) or (name,)


def read_texts(source: str | Path | Sequence[str], column: str | None = None, *, keep_blank: bool = False) -> Texts:
    """The texts of a source, or of several one after the other.

    Args:
        source: See the top of this file; or the texts themselves.
        column: Of every table among them that names none by `#column`; text files have no columns.
        keep_blank: Whether blank rows of a table stay: where rows are lines of one running text, they are a part of it.

    Raises:
        DataError: Missing, unreadable, empty, or without the column.
    """
    if not isinstance(source, str | Path):
        texts = tuple(text for text in source if isinstance(text, str) and text.strip())
        if not texts:
            raise DataError("The list of texts is empty. Give at least one text that is not blank.")
        return Texts(texts=texts, source=f"{len(texts)} texts")
    parts = [_read_one(part, column, keep_blank=keep_blank) for part in split_sources(source)]
    if len(parts) == 1:
        return parts[0]
    is_prose = all(part.is_prose for part in parts)
    return Texts(
        texts=tuple(text for part in parts for text in (part.texts if is_prose else part.paragraphs())),
        source=",".join(part.source for part in parts),
        is_prose=is_prose,
    )


def _read_one(source: str, of_tables: str | None = None, *, keep_blank: bool = False) -> Texts:
    name, column = split_column(source)
    path = _local_path(name)
    if path is not None and path.suffix.lower() in _TEXT_SUFFIXES:
        if column:
            raise DataError(f"`{path.name}` is a text file and has no column `{column}`. Leave `#{column}` out.")
        text = _read_text_file(path)
        if not text.strip():
            raise DataError(f"`{path}` is empty. Give a text with at least a few sentences.")
        return Texts(texts=(text,), source=_short(name), is_prose=True)
    rows = read_table(name)
    column = column or of_tables or _text_column(rows, name)
    columns = dict.fromkeys(str(key) for row in rows[:_LOOKED_AT] for key in row)
    if column not in columns:
        raise DataError(f"`{_short(name)}`: {unknown_name('column', column, columns)}")
    texts = tuple(value for row in rows if isinstance(value := row.get(column), str) and (keep_blank or value.strip()))
    if not any(text.strip() for text in texts):
        raise DataError(f"The column `{column}` of `{_short(name)}` holds no text. Name another one with `#column`.")
    return Texts(texts=texts, source=_short(name), column=column)


def read_table(source: str | Path) -> list[Row]:
    """The rows of a table, as dictionaries.

    Raises:
        DataError: Missing, not what its name says, or empty.
    """
    name, _ = split_column(str(source))
    path = _local_path(name)
    if path is None:
        rows = _read_hub(name)
    elif path.is_dir():
        rows = _read_data_set(str(path), config=None, split=None)
    else:
        rows = _read_table_file(path)
    if not rows:
        raise DataError(f"`{_short(name)}` has no rows. Give a table with at least one.")
    return rows


def _short(source: str) -> str:
    return Path(source).name if exists(source) else source


def split_column(source: str) -> tuple[str, str | None]:
    """A source without its `#column`, and that column, if one is named."""
    name, mark, column = source.rpartition("#")
    return (name, column) if mark and column and not exists(source) else (source, None)


def _local_path(source: str) -> Path | None:
    """The file or folder a source names, or None where it names a data set on the hub."""
    if source == "builtin" or source.startswith("builtin:"):
        name = source.partition(":")[2] or "calibration"
        if name not in BUILTIN:
            raise DataError(unknown_name("built-in data", name, BUILTIN))
        return Path(str(resources.files("avss.data").joinpath("builtin", BUILTIN[name])))
    if not source.strip():
        raise DataError("The name of the data is empty. Give a file, a folder, a hub data set or `builtin`.")
    path = Path(source).expanduser()
    if exists(str(path)):
        return path
    if len(path.name) > 255 or "\n" in source:
        raise DataError(
            f"There is no file `{source[:40].splitlines()[0]}...`. To give the text itself, put it in a list: `[text]`."
        )
    known = path.suffix.lower() in _TEXT_SUFFIXES | _TABLE_SUFFIXES
    if known or path.is_absolute() or source.startswith((".", "~")):
        raise DataError(f"There is no file `{source}`. Give a file, a folder, a hub data set or `builtin`.")
    return None


def _read_text_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"`{path}` is not UTF-8 text (byte {error.start}). Convert it to UTF-8 text.") from error
    except OSError as error:
        raise DataError(f"`{path}` cannot be read: {error.strerror}.") from error
    if "\0" in text:
        raise DataError(f"`{path}` holds NUL bytes: it is no UTF-8 text. Convert it to UTF-8 text.")
    return text


def _read_table_file(path: Path) -> list[Row]:
    import pandas as pd  # half a second; only tables need it

    suffix = path.suffix.lower()
    if suffix in _TEXT_SUFFIXES:
        raise DataError(f"`{path.name}` is a text file; a table is needed here: csv, tsv, json, jsonl or parquet.")
    if suffix not in _TABLE_SUFFIXES:
        raise DataError(
            f"`{path.name}` has an unknown ending. Allowed: {', '.join(sorted(_TEXT_SUFFIXES | _TABLE_SUFFIXES))}."
        )
    try:
        if suffix in (".jsonl", ".ndjson"):
            return _json_lines(path)
        if suffix == ".json":
            return _json_rows(path)
        if suffix == ".parquet":
            frame = pd.read_parquet(path)
        else:
            # Cells stay what they are: "NA" and "null" are words.
            reads = functools.partial(pd.read_csv, path, keep_default_na=False, encoding="utf-8")
            frame = _read_tsv(reads) if suffix == ".tsv" else reads()
            if not isinstance(frame.index, pd.RangeIndex):  # pandas takes the first cell of longer rows for their name
                raise DataError(
                    f"The rows of `{path}` have more cells than its header. Put texts that hold the separator in "
                    "quotes, and leave out separators at the ends of rows."
                )
    except UnicodeDecodeError as error:
        raise DataError(f"`{path}` is not UTF-8 text (byte {error.start}), so it is no {suffix[1:]} file.") from error
    except (ValueError, OSError) as error:  # pandas' and pyarrow's parser errors are both
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"`{path}` cannot be read as {suffix[1:]}: {reason}. Check that it is what its ending says."
        ) from error
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _read_tsv(reads: Callable[..., Any]) -> Any:
    """A table with tabs between its cells, whose quotes may be plain characters, as in the GLUE files.

    They are where every line is a whole row without them, and with them rows would be lost: a quote at the beginning
    of a cell would run on to the next one, lines later.
    """
    try:
        plain = reads(sep="\t", quoting=csv.QUOTE_NONE)
    except ValueError:
        return reads(sep="\t")
    try:
        quoted = reads(sep="\t")
    except ValueError:
        return plain
    return plain if len(plain) > len(quoted) and bool(plain.notna().all(axis=None)) else quoted


def _json_lines(path: Path) -> list[Row]:
    rows: list[Row] = []
    # Not `splitlines`: inside a JSON string, U+2028 and its like may stand as they are.
    for number, line in enumerate(_read_text_file(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"Line {number} of `{path}` is not JSON ({error}). Each line must be one object."
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"Line {number} of `{path}` is a {type(row).__name__}; each line must be one JSON object.")
        rows.append(row)
    return rows


def _json_rows(path: Path) -> list[Row]:
    try:
        content = json.loads(_read_text_file(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"`{path}` is not JSON ({error}).") from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise DataError(f"`{path}` must hold a list of objects, or an object with one such list.")
    return content


def _read_hub(source: str) -> list[Row]:
    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    return _read_data_set(name, config=config or None, split=split or None)


def _read_data_set(name: str, *, config: str | None, split: str | None) -> list[Row]:
    import datasets  # a second and a half; only hub data needs it

    # datasets raises whatever its many readers raise; to the user they all mean: this data set cannot be read.
    try:
        chosen = split or _default_split(name, config)
        stream: Iterable[Any] = datasets.load_dataset(name, config, split=chosen, streaming=True)
        rows: list[Row] = [dict(row) for row in itertools.islice(stream, _MAX_HUB_ROWS + 1)]
    except DataError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
        raise DataError(
            f"The data set `{name}` cannot be read: {reason}. Write `name:config@split#column`, and check the network, "
            "or give a local file."
        ) from error
    if len(rows) > _MAX_HUB_ROWS:
        _log.warning(
            "Of the data set `%s`, the first %s rows are read. If it is sorted, by label say, give a shuffled file.",
            name,
            f"{_MAX_HUB_ROWS:,}",
        )
    return rows[:_MAX_HUB_ROWS]


def _default_split(name: str, config: str | None) -> str:
    import datasets

    splits = [str(split) for split in datasets.get_dataset_split_names(name, config)]
    return "train" if "train" in splits else splits[0]


def _text_column(rows: Sequence[Row], name: str) -> str:
    # The first row may be a heading, or have nothing where the others have their text.
    several = rows[:_LOOKED_AT]
    columns = list(dict.fromkeys(str(column) for row in several for column in row))
    counts = {column: sum(isinstance(row.get(column), str) for row in several) for column in columns}
    strings = [column for column, count in counts.items() if 2 * count > len(several)]
    strings = strings or [column for column, count in counts.items() if count]
    for candidate in TEXT_COLUMNS:
        if candidate in strings:
            return candidate
    if len(strings) == 1:
        return strings[0]
    raise DataError(
        f"`{_short(name)}` has no column that is clearly the text. Columns: {', '.join(columns)}. Name one: "
        f"`{_short(name)}#column`."
    )
