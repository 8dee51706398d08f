"""How measurements are written, compared and reported."""

from dataclasses import dataclass

import pytest

from bench import ahead_of_time, compare, report, results, roofline, step
from bench.growth import all_series, slopes_table
from bench.table import Table, text_of


@dataclass(frozen=True)
class Example:
    name: str
    size: int | None
    ms: float = 0.5
    note: str = ""


def example(path) -> Table[Example]:
    return Table(path, Example, ("name", "size"))


def test_a_table_reads_what_it_wrote(tmp_path):
    table = example(tmp_path / "new" / "table.csv")
    rows = [Example("a", 3, 1.23456), Example("b, c", None, 1000.0, "x")]
    table.write(rows)
    expected = 'name,size,ms,note\na,3,1.235,\n"b, c",,1000,x\n'
    assert table.path.read_text() == expected == text_of(Example, rows)
    assert table.read() == [Example("a", 3, 1.235), rows[1]]
    table.write([])
    assert table.is_there() and table.read() == []


def test_rows_of_one_key_replace_each_other_in_place(tmp_path):
    table = example(tmp_path / "table.csv")
    table.add([Example("a", 1), Example("b", None)])
    table.add([Example("c", 1), Example("a", 1, 7.0), Example("a", 2)])
    assert table.read() == [
        Example("a", 1, 7.0),
        Example("b", None),
        Example("c", 1),
        Example("a", 2),
    ]


def test_a_file_from_before_a_column_has_its_default(tmp_path):
    table = example(tmp_path / "table.csv")
    table.path.write_text("name,size\na,1\n")
    assert table.is_there() and table.read() == [Example("a", 1)]


@pytest.mark.parametrize(
    "header", ["", "name", "size,name", "name,size,note", "name,size,ms,note,x"]
)
def test_another_header_is_refused(tmp_path, header):
    table = example(tmp_path / "table.csv")
    table.path.write_text(f"{header}\n")
    assert not table.is_there()
    with pytest.raises(
        ValueError, match="table.csv must be a table with the columns name, size, ms"
    ):
        table.read()
    with pytest.raises(ValueError, match="must be a table"):  # and is not overwritten
        table.add([Example("a", 1)])
    assert table.path.read_text() == f"{header}\n"


@pytest.mark.parametrize("made", sorted(results.FOLDER.glob("*.csv")), ids=lambda path: path.name)
def test_committed_tables_can_be_read(made):
    kinds = (results.table, step.table, ahead_of_time.table)
    (table,) = [found for found in (kind(made) for kind in kinds) if found.is_there()]
    rows = table.read()
    assert len(rows) == len(made.read_text().splitlines()) - 1 > 0
    assert text_of(table.row_type, rows).count(",") == made.read_text().count(",")
    assert len({table.key_of(row) for row in rows}) == len(rows)


def test_rows_survive_a_file(make_row, tmp_path):
    rows = [make_row(), make_row(mode="forward", extra_mib=None, status="out of memory")]
    results.table(tmp_path / "gpu.csv").add(rows)
    assert results.table(tmp_path / "gpu.csv").read() == rows


def test_a_measurement_takes_the_place_of_the_old_one(make_row, tmp_path):
    path = tmp_path / "gpu.csv"
    results.table(path).add([make_row(), make_row(tokens=500)])
    results.table(path).add([make_row(median_ms=7.0, commit="def")])
    assert [row.median_ms for row in results.table(path).read()] == [7.0, 10.0]


def test_other_tables_are_left_alone(make_row, tmp_path):
    results.table(tmp_path / "gpu.csv").add([make_row()])
    (tmp_path / "ahead_of_time.csv").write_text("kernel,capability\nx,90\n")
    assert results.read_all(tmp_path) == [make_row()]
    with pytest.raises(ValueError, match="must be a table"):
        results.table(tmp_path / "ahead_of_time.csv").read()


@pytest.fixture
def run_compare(make_row, tmp_path, capsys):
    def run(*changes: dict, threshold: str = "1.1") -> tuple[int, str]:
        old, new = tmp_path / "old.csv", tmp_path / "new.csv"
        results.table(old).add([make_row(), make_row(implementation="eager")])
        new.unlink(missing_ok=True)
        results.table(new).add([make_row(**change) for change in changes])
        code = compare.main([str(old), str(new), "--threshold", threshold])
        return code, capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (dict(median_ms=10.9), 0),
        (dict(median_ms=11.1), 1),
        (dict(median_ms=20.0, matmul_tflops=2.0), 0),  # the machine was half as fast
        (dict(median_ms=10.0, matmul_tflops=8.0), 1),  # it was twice as fast, and we were not
        (dict(extra_mib=108.0), 0),
        (dict(extra_mib=120.0), 1),
        (dict(status="inaccurate: by far", median_ms=None), 1),
        (dict(implementation="eager", median_ms=50.0), 0),  # a peer, which we did not change
    ],
)
def test_compare(run_compare, change, code):
    found, printed = run_compare(change)
    assert found == code, printed
    assert ("WORSE" in printed) == (code == 1 or change.get("median_ms") == 50.0)


def test_compare_threshold_and_nothing_in_common(run_compare):
    assert run_compare(dict(median_ms=14.0), threshold="1.5")[0] == 0
    assert run_compare(dict(tokens=7))[0] == 2


def test_compare_of_what_is_no_table(tmp_path, capsys):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    paths = [str(tmp_path / "x.csv")] * 2
    assert compare.main(paths) == 2
    assert "x.csv must be a table with the columns device, driver" in capsys.readouterr().err


def test_report_says_where_we_lose(make_row):
    rows = [
        make_row(),
        make_row(implementation="eager", median_ms=8.0, extra_mib=400.0),
        make_row(implementation="TRL chunked", median_ms=12.0, extra_mib=50.0),
        make_row(implementation="codistill linear_logps", median_ms=1.0),  # ours too
    ]
    (sentence,) = report.losses(rows)
    assert "25% slower than eager and 50 MiB more than TRL chunked" in sentence
    assert report.losses([rows[0], rows[2]]) == [sentence.replace("25% slower than eager and ", "")]
    assert report.losses(rows[:1]) == []


def test_report_table(make_row):
    rows = [
        make_row(),
        make_row(implementation="slow", median_ms=123.4, extra_mib=None, tflops=None),
        make_row(implementation="wrong", status="inaccurate: result 0", median_ms=None),
        make_row(inactive=0.3, tokens=500),
    ]
    lines = report.table(rows).splitlines()
    assert lines[0] == "|  | Model<br>1000 × 64 × 2000 | Model<br>500 × 64 × 2000, 30% inactive |"
    assert lines[2] == "| **codistill_kernels** | 10 ms, 100 MiB, 75% | 10 ms, 100 MiB, 75% |"
    assert lines[3] == "| slow | 123 ms | – |"
    assert lines[4] == "| wrong | inaccurate | – |"


def test_slopes(make_row):
    """Time 2 + 5 N / 1000 ms, memory 64 + 0.5 N / 1000 MiB."""
    rows = [
        make_row(tokens=n, median_ms=2 + 5 * n / 1000, extra_mib=64 + n / 2000)
        for n in (1000, 2000, 8000)
    ]
    (series,) = all_series([*rows, make_row(tokens=4000, inactive=0.3)])
    assert series.axis == "tokens" and series.sizes == [1000, 2000, 8000]
    assert series.slope("median_ms") == pytest.approx(5)
    assert series.slope("extra_mib") == pytest.approx(0.5)
    assert 0.8 < series.exponent("median_ms") < 1
    assert "| codistill_kernels | tokens | N 1000 to 8000 | 5 | 0.5 |" in slopes_table(rows)


def test_readme_is_what_the_report_gives():
    text = report.README.read_text()
    assert report.with_section(text, "bench report", report.headline(results.read_all())) == text
    assert report.with_section(text, "bench roofline", roofline.summary()) == text
    assert (results.FOLDER / "README.md").read_text() == report.full(results.read_all())


def test_readme_without_markers():
    with pytest.raises(ValueError, match="<!-- bench report: begin -->"):
        report.with_section("no markers", "bench report", "x")
