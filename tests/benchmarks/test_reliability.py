import pytest

from reliability import faults, table

TESTS = """
import pytest

@pytest.mark.fault("a kill", "nothing is lost")
@pytest.mark.parametrize("how", ["one", "two"])
@pytest.mark.parametrize(("a", "b"), [(1, 2), (3, 4), (5, 6)])
def test_a(how, a, b): ...

@pytest.mark.fault("a kill", "nothing is lost", tries=10)
def test_b(): ...

@pytest.mark.slow
@pytest.mark.fault("a full disk", "one line")
def test_c(): ...

def test_d(): ...

CASES = {"x": (1, 2), "y": (3, 4)}

@pytest.mark.fault("a flood", "a boat")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_e(case): ...
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "test_x.py").write_text(TESTS)
    return tmp_path


def test_tries_are_parameters_or_told(folder):
    found = faults(folder)
    assert [(what, row.outcome, row.tries, row.tests) for what, row in found.items()] == [
        ("a kill", "nothing is lost", 16, 2),
        ("a full disk", "one line", 1, 1),
        ("a flood", "a boat", 2, 1),
    ]


def test_table_with_the_trial_of_record(folder):
    header = "fault,tries,met,failed,seconds,date,commit\n"
    (folder / "soak.csv").write_text(header + "a kill,5,4 met,0,9,2026-01-01,abc\na kill,9,8 met,1,9,2026-01-02,def\n")
    assert table(folder, folder).splitlines()[2:] == [
        "| a kill | nothing is lost | 16 | 9 (8 met), 1 failed; 2026-01-02, commit def |",
        "| a full disk | one line | 1 |  |",
        "| a flood | a boat | 2 |  |",
    ]


def test_what_no_test_shows_is_refused(folder):
    (folder / "soak.csv").write_text("fault,tries,met,failed,seconds,date,commit\na storm,5,,0,9,2026-01-01,abc\n")
    with pytest.raises(ValueError, match="a storm"):
        table(folder, folder)


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ('fault("a kill", "all is lost")', "two outcomes"),
        ('fault("a kill")', "want fault"),
        ("fault(A, B)", "want fault"),
    ],
)
def test_bad_marks_are_named(folder, mark, message):
    (folder / "room" / "test_y.py").write_text(f"@pytest.mark.{mark}\ndef test_e(): ...\n")
    with pytest.raises(ValueError, match=message):
        faults(folder)
