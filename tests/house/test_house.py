"""The shape of the house: imports point down, transformers has its rooms, and some rooms open without torch.

Everything is computed from the files that are there, so a new room is held to the rules from its first day.
"""

import ast
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import avss

SOURCE = Path(avss.__file__).parent

LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("forms",),
    ("record", "config"),
    ("criteria", "statistics", "models", "data"),
    (
        "ablation",
        "collect",
        "compensation",
        "cut",
        "evaluation",
        "healing",
        "output",
        "plan",
        "progress",
        "reporting",
        "reproduction",
        "scoring",
        "search",
    ),
    ("composer",),
    ("cli",),
    ("__main__",),
)
"""From the ground up. A room may import from lower levels only; rooms of one level do not know each other."""

NEIGHBOURS = frozenset({("criteria", "statistics"), ("healing", "compensation")})
"""Imports within a level that are allowed: criteria name what they need, and healing ends with a solve."""

NOTEBOOK = ("record", "reporting.notebook")
"""The one import that points up (docs/decisions): a value shows itself. Inside a method only."""

TRANSFORMERS_ROOMS = frozenset({"models", "healing", "evaluation"})
"""Rooms that may import transformers."""

LIGHT_ROOMS = (
    "errors",
    "forms",
    "record",
    "config",
    "plan",
    "criteria",
    "scoring",
    "search",
    "reporting",
    "progress",
)
"""Rooms that open without torch and transformers, with everything in them."""

Import = tuple[str, str, bool]
"""Module that imports, module that is imported, and whether it does so inside a function."""


def modules() -> dict[str, Path]:
    """Every module of the package: dotted name below `avss` -> file."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str:
    return module.split(".")[0]


def level_of(room: str) -> int:
    return next(level for level, rooms in enumerate(LEVELS) if room in rooms)


def imports_of(name: str, tree: ast.AST) -> Iterator[Import]:
    """What a module imports at run time; `if TYPE_CHECKING` is for readers and does not count."""

    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child, inside)
            return
        if isinstance(node, ast.Import):
            yield from ((name, alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                yield name, f"{node.module}.{alias.name}", inside
        deeper = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, deeper)

    yield from visit(tree, False)


def all_imports() -> list[Import]:
    return [
        found
        for name, path in modules().items()
        for found in imports_of(name, ast.parse(path.read_text(encoding="utf-8")))
    ]


def inner_imports(imports: list[Import]) -> Iterator[Import]:
    """Imports of one part of avss by another, without the leading `avss.`."""
    rooms = {room_of(name) for name in modules() if name} | set(itertools.chain(*LEVELS))
    for importer, imported, inside in imports:
        if not imported.startswith("avss."):
            continue
        target = imported.removeprefix("avss.")
        if room_of(target) in rooms:  # anything else is a name that `avss` itself defines
            yield importer, target, inside


def wrong_way(imports: list[Import]) -> list[str]:
    """Imports that point up or sideways."""
    found = []
    for importer, target, inside in inner_imports(imports):
        here, there = room_of(importer), room_of(target)
        if here in ("", there) or (here, there) in NEIGHBOURS:
            continue
        if importer == NOTEBOOK[0] and target.startswith(NOTEBOOK[1]) and inside:
            continue
        if level_of(there) >= level_of(here):
            found.append(f"{importer} imports {target}")
    return found


def test_every_room_has_a_level():
    rooms = {room_of(name) for name in modules() if name}
    known = set(itertools.chain(*LEVELS))
    assert rooms <= known, f"give {sorted(rooms - known)} a place in LEVELS"


def test_no_room_has_two_levels():
    rooms = list(itertools.chain(*LEVELS))
    assert len(rooms) == len(set(rooms))


def test_imports_point_down():
    assert wrong_way(all_imports()) == []


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("errors", "from avss.record import Plan"),
        ("record", "from avss.statistics import Moments"),
        ("record", "from avss.reporting.notebook import scores_html"),
        ("statistics.base", "from avss.criteria import CRITERIA"),
        ("data.batches", "import avss.models.load"),
        ("collect", "from avss.cut import cut"),
        ("collect", "def f():\n    from avss.cut import cut"),
        ("config", "from avss.record import Plan"),
        ("models.load", "class A:\n    def f(self):\n        import avss.cli.main"),
    ],
)
def test_a_wrong_import_would_be_noticed(importer, line):
    assert len(wrong_way(list(imports_of(importer, ast.parse(line))))) == 1


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("record", "def f():\n    from avss.reporting.notebook import scores_html"),
        ("criteria.avss", "from avss.statistics.moments import Moments"),
        ("collect", "from avss.models.load import Loaded"),
        ("statistics.base", "if TYPE_CHECKING:\n    from avss.cli import main"),
        ("statistics.base", "import numpy"),
    ],
)
def test_a_right_import_is_left_alone(importer, line):
    assert wrong_way(list(imports_of(importer, ast.parse(line)))) == []


def test_the_upward_import_is_there_and_lazy():
    """Once it goes away, so must its exception."""
    upward = [
        (importer, target, inside)
        for importer, target, inside in inner_imports(all_imports())
        if importer == "record" and target.startswith(NOTEBOOK[1])
    ]
    assert upward
    assert all(inside for _, _, inside in upward)


def test_transformers_is_imported_in_its_rooms_only():
    users = {room_of(importer) for importer, imported, _ in all_imports() if room_of(imported) == "transformers"}
    assert "models" in users
    assert users <= TRANSFORMERS_ROOMS


def test_nothing_is_imported_from_tests_or_by_star():
    for importer, imported, _ in all_imports():
        assert room_of(imported) not in ("tests", "support", "pytest"), importer
        assert not imported.endswith(".*"), importer


# --- rooms without torch ---

HEAVY = ("torch", "transformers")


def heavy_after(statement: str, heavy: tuple[str, ...] = HEAVY) -> set[str]:
    """Which heavy packages are loaded after a statement, in a process of its own."""
    script = f"import sys\n{statement}\nprint(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def light_modules() -> list[str]:
    return [name for name in modules() if room_of(name) in LIGHT_ROOMS]


def test_light_rooms_import_no_torch():
    names = light_modules()
    assert {"errors", "record", "config", "criteria.avss"} <= set(names)
    statement = "\n".join(f"import avss.{name}" for name in names)
    assert heavy_after(statement) == set()


def test_avss_itself_and_its_command_import_no_torch():
    statements = ["import avss", "dir(avss)", "avss.RunRecord, avss.CRITERIA, avss.Plan"]
    if "cli.main" in modules():
        statements.append("import avss.cli.main")
    assert heavy_after("\n".join(statements)) == set()


@pytest.mark.skipif("cli.main" not in modules(), reason="there is no command yet")
def test_help_imports_no_torch():
    statement = (
        "import contextlib, io\nfrom avss.cli.main import main\nsys.argv = ['avss', '--help']\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n    main()"
    )
    assert heavy_after(statement) == set()


def test_the_watch_for_torch_can_fail():
    assert heavy_after("import avss.collect") == set(HEAVY)


def test_a_cut_on_disk_writes_its_card_without_the_chart_library():
    assert heavy_after("import avss.composer.disk, avss.reporting.card", ("altair", *HEAVY)) == set()
    assert heavy_after("import avss.reporting.page", ("altair",)) == {"altair"}


def test_statistics_name_themselves_without_torch():
    assert heavy_after("from avss.statistics import STATISTICS; [one() for one in STATISTICS]") == set()
    assert "torch" in heavy_after("import avss.statistics.observation")


# --- the public list ---


def test_public_names_are_sorted_and_all_there():
    assert sorted(avss.__all__) == sorted(set(avss.__all__))
    for name in avss.__all__:
        assert getattr(avss, name) is not None
    assert set(avss.__all__) <= set(dir(avss))


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute `scroe`"):
        avss.scroe  # noqa: B018
