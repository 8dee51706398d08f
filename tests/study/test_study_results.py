"""What measures, claims and tables make of records."""

import re
from pathlib import Path

import pytest
from synthetic import make_record, write_study

from study import claims, results, tables
from study.methods import METHODS
from study.record import Record
from study.results import Results, load
from study.statistics import holm

BETTER = {"grpo_small": 0.5, "codistill_alpha1": 0.6, "grpo_large": 0.75}


def test_load(tmp_path):
    write_study(tmp_path / "words", ["kdrl", "grpo_small"], range(2), {})
    unfinished = make_record(METHODS["kdrl"], 7, 0.5)
    unfinished.starts = [{"at": "2026-01-02T03:04:05+00:00"}]
    unfinished.file = tmp_path / "words" / "kdrl" / "seed_7.json"
    unfinished.write()
    found = load(tmp_path / "words")
    assert list(found.records) == ["grpo_small", "kdrl"]  # the order of METHODS
    assert list(found.records["kdrl"]) == [0, 1, 7] and list(found.finished("kdrl")) == [0, 1]
    assert found.sets("small") == ["sums", "long_sums", "products", "longer"]
    assert not load(tmp_path / "nothing").records


def test_a_chain_is_whole_or_empty():
    run, longer = (make_record(METHODS[n], 0, 0.5) for n in ("grpo_large", "grpo_large_ct"))
    both = Results("words", {"grpo_large": {0: run}, "grpo_large_ct": {0: longer}})
    assert both.chain("grpo_large_ct", 0) == [run, longer]
    seconds = results.total("time/rollout")
    assert seconds([run, longer]) == pytest.approx(seconds([run]) + seconds([longer]))
    assert Results("words", {"grpo_large_ct": {0: longer}}).chain("grpo_large_ct", 0) == []


def test_measures():
    record = Record("grpo_small", 0)
    record.evaluations = [
        {"step": step, "small": value} for step, value in ((0, 0.1), (2, 0.5), (4, 0.3), (8, 0.4))
    ]
    record.metrics = {"a": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 100.0], "b": [3.0, 1.0, 2.0]}
    record.metrics["d"] = [1.0, None, 3.0]  # a number that was not finite
    chain = [record]
    assert results.final("small")(chain) == 0.4 and results.before("small")(chain) == 0.1
    assert results.gain("small")(chain) == pytest.approx(0.3)
    assert results.learning("small")(chain) == pytest.approx(0.4)  # without step 0
    assert results.accuracy_fall("small")(chain) == pytest.approx(0.2)
    assert results.early("a")(chain) == 2.5 and results.late("a")(chain) == 53.5
    assert results.median("a")(chain) == 4.5 and results.whole("a")(chain) == 16
    assert results.metric_fall("b")(chain) == 2  # three steps are too few to smooth
    assert results.whole("d")(chain) == 2 and results.total("d")([record, record]) == 8
    assert results.final("large")(chain) is None and results.late("c")(chain) is None


def rows(table: str) -> dict[str, list[str]]:
    """Claim -> verdict, difference, pairs, corrected p, exact p."""
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return {row[0]: row[2:] for row in cells}


def test_claims_name_methods():
    for claim in (claim for group in claims.GROUPS.values() for claim in group):
        assert {claim.high, claim.low} - {None} <= METHODS.keys(), claim


def test_verdicts(tmp_path):
    above = "CoDistill-GRPO, α = 1: above GRPO"
    write_study(tmp_path / "right", list(BETTER), range(5), BETTER)
    write_study(tmp_path / "wrong", list(BETTER), range(5), BETTER | {"grpo_small": 0.8})
    write_study(tmp_path / "few", list(BETTER), range(2), BETTER)
    right, wrong, few = (
        rows(claims.table(load(tmp_path / n), claims.GROUPS)) for n in ("right", "wrong", "few")
    )
    assert right[above][0] == "**shown**" and right[above][2] == "5 of 5"
    assert re.match(r"\+(9|10)\.\d points \(\+\d+\.\d to \+1\d\.\d\)", right[above][1])
    assert right[above][4] == "0.062"
    assert wrong[above][0] == "**opposite shown**" and wrong[above][2] == "0 of 5"
    assert few[above] == ["too few pairs (n < 3)", "–", "n = 2", "–", "–"]
    assert right["KDRL: above GRPO"][2] == "n = 0"


def test_p_values_are_corrected_within_a_group(tmp_path):
    write_study(tmp_path, list(METHODS), range(3), BETTER)
    found = load(tmp_path)
    for group in claims.GROUPS.values():
        adjusted = holm([claim.paired(found).p for claim in group])
        shown = [row[5] for row in claims.rows(group, found)]
        assert shown == [claims.p_text(p) for p in adjusted]


def test_an_allowance_moves_the_test_and_not_the_difference(tmp_path):
    """The large model ends 1 point below: within the 2 that the claim allows."""
    methods = ["grpo_large", "codistill_alpha1", "codistill_alpha1_ct"]
    write_study(tmp_path, methods, range(5), {"grpo_large": 0.75, "codistill_alpha1_ct": 0.74})
    found = rows(claims.table(load(tmp_path), claims.GROUPS))
    verdict, difference, pairs, *_ = found[
        "With continued training, α = 1: at most 2 points below GRPO"
    ]
    assert difference.startswith("-") and float(difference.split()[0]) == pytest.approx(-1, abs=0.6)
    assert verdict == "**shown**" and pairs == "5 of 5"


def by_hand(file: Path, seed: int, after: float) -> None:
    """A run of GRPO from 20 % to `after` on one set."""
    record = Record("grpo_small", seed, file=file / "grpo_small" / f"seed_{seed}.json")
    record.starts = [{"at": "2026-01-02T03:04:05+00:00", "status": "finished", "seconds": 1.0}]
    record.evaluations = [
        {"step": 0, "small": 0.2, "small/sums": 0.2},
        {"step": 8, "small": after, "small/sums": after},
    ]
    record.write()


def test_table_1(tmp_path):
    by_hand(tmp_path, 0, 0.5)
    by_hand(tmp_path, 1, 0.6)
    assert tables.accuracy(load(tmp_path), "small", tables.small_methods()).splitlines() == [
        "| Model | sums | Average |",
        "| --- | ---: | ---: |",
        "| small model before training | 20.00 ± 0.00 | 20.00 ± 0.00 |",
        "| GRPO (n = 2) | **55.00 ± 7.07** | **55.00 ± 7.07 (+35.00)** |",
    ]


def test_rows_of_table_2():
    names = [method.name for method in tables.large_methods()]
    assert names[:4] == [
        "grpo_large",
        "grpo_large_ct",
        "grpo_large_ct_low",
        "codistill_alpha1",
    ]


def test_verdicts_on_some_seeds_take_no_others(tmp_path):
    write_study(tmp_path, ["grpo_small"], range(5), {"grpo_small": 0.9})
    write_study(tmp_path, ["grpo_small"], range(5, 10), {"grpo_small": 0.1})

    def gained(seeds):
        table = rows(claims.table(load(tmp_path).among(seeds), claims.ACCURACY))
        verdict, _, pairs, *_ = table["GRPO improves the small model"]
        return verdict, pairs

    assert gained(range(5)) == ("**shown**", "5 of 5")
    assert gained(range(5, 10)) == ("**opposite shown**", "0 of 5")
    assert gained(range(10))[1] == "5 of 10"


def test_alphas_are_those_of_the_methods():
    found = {a: method.name for a, method in tables.alphas().items()}
    assert found[1.0] == "codistill_alpha1" and found[0.0] == "codistill_alpha0"
    assert list(found) == sorted(found) and "codistill_hints" not in found.values()


def test_every_start_is_counted(tmp_path):
    record = make_record(METHODS["kdrl"], 0, 0.5)
    record.starts = [
        {"at": "2026-01-02T03:04:05+00:00"},
        {"at": "2026-01-03T03:04:05+00:00", "status": "exit code 1", "seconds": 1.0},
        {"at": "2026-01-04T03:04:05+00:00", "status": "finished", "seconds": 9.0},
    ]
    other = make_record(METHODS["kdrl"], 1, 0.5)
    found = Results("words", {"kdrl": {0: record}, "codistill_alpha3": {1: other}})
    lines = tables.runs(found).splitlines()
    assert lines[2] == "| KDRL | 3 | 1 | 1 | 1 | 16 | 2026-01-02 | 2026-01-04 | abc1234 |"
    assert lines[3].startswith("| codistill_alpha3 (no longer a method) | 1 | 1 | 0 | 0 |")
    assert lines[4].startswith("| all | 4 | 2 | 1 | 1 |")
    assert tables.versions(found) == "torch 2.13.0"


def test_a_sweep_is_compared_on_its_own_seeds(tmp_path):
    write_study(tmp_path, ["codistill_alpha1"], range(10), {})
    write_study(tmp_path, ["codistill_alpha0"], range(2), {})
    write_study(tmp_path, ["kd_k3"], range(3), {})
    found = load(tmp_path)
    for table, counts in ((tables.alpha(found), ["2", "2"]), (tables.ablations(found), "323")):
        assert [line.split("|")[-2].strip() for line in table.splitlines()[2:]] == list(counts)
