"""The second step of the published method, against a pandas transcription of its script, and every bad table."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import avss
from avss.errors import InvalidPlanError
from tests.commands.test_bad_input import refused


def published_second_step(variance: Path, sparsity: Path, threshold: float = 0.25) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the published script does with its two files, in its own order."""
    one, other = pd.read_csv(variance), pd.read_csv(sparsity)
    one.columns, other.columns = ["Layer", "Variance"], ["Layer", "Sparsity"]
    data = one.merge(other, on="Layer")
    data["AVSS"] = data["Variance"] / data["Sparsity"]
    data["Normalized_AVSS"] = data["AVSS"] / data["AVSS"].sum()
    data["Cumulative_AVSS"] = data["Normalized_AVSS"].cumsum()
    data = data.sort_values(by="AVSS", ascending=True)
    return data, data[data["Cumulative_AVSS"] <= threshold]


@pytest.fixture(params=[0, 1, 2])
def tables(request, tmp_path) -> tuple[Path, Path]:
    """Two tables of random layers, with the layers of the second in another order."""
    draw = np.random.default_rng(request.param)
    num = int(draw.integers(4, 40))
    variance, sparsity = tmp_path / "a.csv", tmp_path / "b.csv"
    pd.DataFrame({"Layer": range(num), "x": draw.lognormal(size=num)}).to_csv(variance, index=False)
    order = draw.permutation(num)
    pd.DataFrame({"Layer": order, "y": draw.uniform(1e-6, 0.1, size=num)}).to_csv(sparsity, index=False)
    return variance, sparsity


def test_reference_equals_the_published_script(tables):
    data, removed = published_second_step(*tables)
    table = avss.from_csv(*tables, reference=True)
    assert [row.layer for row in table.rows] == data["Layer"].tolist()
    for name, column in (("avss", "AVSS"), ("normalized", "Normalized_AVSS"), ("cumulative", "Cumulative_AVSS")):
        assert [getattr(row, name) for row in table.rows] == pytest.approx(data[column].tolist(), rel=1e-12)
    assert sorted(table.removed) == sorted(removed["Layer"].tolist())


def test_the_default_sorts_first_and_removes_a_count(tables):
    data, _ = published_second_step(*tables)
    ordered = data.sort_values(["AVSS", "Layer"])
    table = avss.from_csv(*tables)
    assert [row.cumulative for row in table.rows] == pytest.approx(ordered["Normalized_AVSS"].cumsum().tolist())
    count = int(0.25 * len(data) + 0.5)
    assert table.removed == tuple(sorted(ordered["Layer"][:count]))
    assert f"{count} of {len(data)} layers" in table.rule


def test_mass_takes_the_lowest_that_fit(tables):
    data, _ = published_second_step(*tables)
    ordered = data.sort_values("AVSS")
    expected = ordered["Layer"][ordered["Normalized_AVSS"].cumsum() <= 0.4]
    assert avss.from_csv(*tables, fraction=0.4, rule="mass").removed == tuple(sorted(expected))


def test_one_file_with_both_columns_gives_the_same(tables, tmp_path):
    both = pd.read_csv(tables[0]).merge(pd.read_csv(tables[1]), on="Layer")
    both.columns = ["Layer", "Average_Variance", "Average_Sparsity"]
    both.insert(1, "Average_L1Norm", 3.0)
    both.to_csv(tmp_path / "both.csv", index=False)
    assert avss.from_csv(tmp_path / "both.csv") == avss.from_csv(*tables)


def test_layers_that_count_from_one_keep_their_numbers(tmp_path):
    (tmp_path / "both.csv").write_text("layer,variance,sparsity\n1,1,0.5\n2,9,0.5\n3,5,0.5\n4,8,0.5\n", "utf-8")
    assert avss.from_csv(tmp_path / "both.csv").removed == (1,)


def test_command_writes_prints_and_explains_the_published_order(avss_command, tables, tmp_path):
    answer = avss_command("from-csv", *tables, "--reference", "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "Published order: the running sum is taken in layer order before the sort" in answer.out
    written = pd.read_csv(tmp_path / "out" / "avss.csv")
    data, removed = published_second_step(*tables)
    assert list(written.columns[:6]) == list(data.columns)
    assert sorted(written["Layer"][written["Removed"] == 1]) == sorted(removed["Layer"])
    assert avss_command("from-csv", *tables, "--out", tmp_path / "out").code == 2
    assert avss_command("from-csv", *tables, "--out", tmp_path / "out", "--force", "--quiet").out == ""
    shown = json.loads(avss_command("from-csv", *tables, "--json").out)
    assert "Published order" not in avss_command("from-csv", *tables).out
    assert [row["layer"] for row in shown["rows"] if row["removed"]] == [
        row.layer for row in avss.from_csv(*tables).rows if row.removed
    ]


def test_it_imports_no_torch(tables):
    code = (
        "import sys, avss.cli.main as m\n"
        f"sys.argv = ['avss', 'from-csv', {str(tables[0])!r}, {str(tables[1])!r}]\n"
        "try:\n    m.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")


GOOD = "Layer,Variance\n0,1\n1,2\n2,3\n"
GOOD_SPARSITY = "Layer,Sparsity\n0,0.1\n1,0.2\n2,0.3\n"


@pytest.mark.parametrize(
    ("variance", "sparsity", "parts"),
    [
        (GOOD, "Layer,Sparsity\n0,0.1\n1,0\n2,0.3\n", ("layer `1`", "is 0", "infinite")),
        (GOOD, "Layer,Sparsity\n0,0.1\n1,1.5\n2,0.3\n", ("layer `1`", "from 0 to 1")),
        (GOOD, "Layer,Sparsity\n0,0.1\n1,-0.5\n2,0.3\n", ("layer `1`", "from 0 to 1")),
        (GOOD, "Layer,Sparsity\n0,0.1\n1,0.2\n", ("b.csv", "no layer `2`", "the same layers")),
        ("Layer,Variance\n0,1\n1,2\n", GOOD_SPARSITY, ("a.csv", "no layer `2`", "the same layers")),
        ("Layer,Variance\n0,1\n2,3\n", "Layer,Sparsity\n0,0.1\n2,0.3\n", ("no layer `1`", "between 0 and 2")),
        ("Layer,Variance\n0,1\n1,2\n1,3\n2,1\n", GOOD_SPARSITY, ("layer `1` twice", "row 3")),
        ("Layer,Variance\n0,1\n1,nan\n2,3\n", GOOD_SPARSITY, ("layer `1`", "`nan`", "finite")),
        ("Layer,Variance\n0,1\n1,inf\n2,3\n", GOOD_SPARSITY, ("layer `1`", "`inf`")),
        ("Layer,Variance\n0,1\n1,many\n2,3\n", GOOD_SPARSITY, ("layer `1`", "`many`")),
        ("Layer,Variance\n0,1\n1,\n2,3\n", GOOD_SPARSITY, ("layer `1`", "``")),
        ("Layer,Variance\n0,1\n1,-2\n2,3\n", GOOD_SPARSITY, ("layer `1`", "negative")),
        ("Layer,Variance\n0,0\n1,0\n2,0\n", GOOD_SPARSITY, ("Every variance", "0")),
        ("Layer,Variance\n0,1e300\n1,2\n2,3\n", "Layer,Sparsity\n0,1e-300\n1,1\n2,1\n", ("overflows",)),
        ("Layer,Variance\na,1\n1,2\n2,3\n", GOOD_SPARSITY, ("Row 1", "`a`", "whole numbers")),
        ("Layer,Variance\n0.5,1\n1,2\n2,3\n", GOOD_SPARSITY, ("Row 1", "`0.5`")),
        ("Layer,Variance\n-1,1\n0,2\n1,3\n", GOOD_SPARSITY, ("`-1`", "from 0 on")),
        ("Layer,Variance,Mean\n0,1,2\n", GOOD_SPARSITY, ("no layer `1`",)),
        ("Layer,A,B\n0,1,2\n", GOOD_SPARSITY, ("no variance column", "Layer, A, B")),
        ("A,Variance,B\n0,1,2\n", None, ("no layer column", "A, Variance, B")),
        (GOOD, None, ("no sparsity column", "Layer, Variance")),
        ("Layer,Layer\n0,1\n", GOOD_SPARSITY, ("twice",)),
        ("Layer,Variance\n0,1,7\n", GOOD_SPARSITY, ("Row 1", "3 cells")),
        ("0,1\n1,2\n", GOOD_SPARSITY, ("begins with numbers",)),
        ("Layer,Variance\n", GOOD_SPARSITY, ("no rows",)),
        ("", GOOD_SPARSITY, ("no rows",)),
        (b"\xff\xfe\x00\x01", GOOD_SPARSITY, ("not a CSV file",)),
    ],
)
def test_a_bad_table_is_one_clear_sentence(avss_command, tmp_path, variance, sparsity, parts):
    one, other = tmp_path / "a.csv", tmp_path / "b.csv"
    one.write_bytes(variance if isinstance(variance, bytes) else variance.encode())
    files = [one]
    if sparsity is not None:
        other.write_text(sparsity, encoding="utf-8")
        files.append(other)
    refused(avss_command("from-csv", *files), *parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--fraction", 0), ("fraction", "0")),
        (("--fraction", "nan"), ("fraction",)),
        (("--rule", "heap"), ("`heap`", "count, mass")),
        (("--fraction", 0.01), ("rounds to none",)),
        (("--fraction", 0.99), ("rounds to all",)),
        (("--reference", "--rule", "mass"), ("`--rule mass`", "`--reference`")),
    ],
)
def test_bad_settings_are_refused(avss_command, tmp_path, arguments, parts):
    (tmp_path / "a.csv").write_text(GOOD)
    (tmp_path / "b.csv").write_text(GOOD_SPARSITY)
    refused(avss_command("from-csv", tmp_path / "a.csv", tmp_path / "b.csv", *arguments), *parts)
    refused(avss_command("from-csv", tmp_path / "missing.csv"), "missing.csv")


def test_a_share_that_would_take_all_is_refused(tmp_path):
    (tmp_path / "both.csv").write_text("layer,variance,sparsity\n0,1,0.5\n1,9,0.5\n", "utf-8")
    with pytest.raises(InvalidPlanError, match="rounds to all"):
        avss.from_csv(tmp_path / "both.csv", fraction=0.9)
