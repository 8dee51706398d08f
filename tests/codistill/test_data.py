"""Problems: every form of file and field, drawn in order; batches of them."""

import copy
import csv
import gzip
import io
import json
import logging
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from codistill.config import ConfigError
from codistill.config.data import DataConfig
from codistill.data import (
    contradictions,
    counted,
    draw,
    gold_answers,
    golds_of_files,
    hidden_fields,
    load_problems,
    overlap,
)
from codistill.engine import cut_at_end, prompt_seeds
from codistill.grading import Grader


def test_every_epoch_draws_every_problem_once():
    drawn = [int(i) for step in range(6) for i in draw(9, 3, step, seed=4)]
    assert sorted(drawn[:9]) == sorted(drawn[9:]) == list(range(9))
    assert drawn[:9] != drawn[9:]


def test_draw_is_a_function_of_its_arguments_across_the_border_of_epochs():
    whole = [int(i) for step in range(10) for i in draw(7, 5, step, seed=0)]
    assert [int(i) for i in draw(7, 5, 6, seed=0)] == whole[30:35]
    assert all(sorted(whole[e * 7 : e * 7 + 7]) == list(range(7)) for e in range(7))
    assert len(draw(2, 7, 0, seed=0)) == 7  # more prompts a step than problems


def test_seeds_depend_on_the_problem_not_on_its_place():
    draws = [(3, 0), (8, 0), (3, 1)]
    seeds = prompt_seeds(1, 5, draws)
    assert prompt_seeds(1, 5, [(8, 0)]) == seeds[1:2]
    assert len({*seeds, *prompt_seeds(1, 6, draws), *prompt_seeds(2, 5, draws)}) == 9


def test_draws_are_counted():
    assert counted([7, 3, 7, 7, 3]) == [(7, 0), (3, 0), (7, 1), (7, 2), (3, 1)]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([4, 1, 1, 5], ([4, 1], False)), ([4, 5], ([4, 5], True)), ([2], ([2], False))],
    ids=["end", "truncated", "other end"],
)
def test_completion_ends_with_its_first_end_token(tokens, expected):
    assert cut_at_end(tokens, (1, 2)) == expected


ROWS = [
    {"question": "1+1", "final_answer": 2, "level": "easy"},
    {"question": "2+2", "final_answer": 4, "level": "hard"},
]


def save(path: Path, rows: list) -> Path:
    """Write rows in the form that the name of the file says; a folder as datasets saves it."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif ".csv" in path.name.lower():
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        raw = text.getvalue().encode()
        path.write_bytes(gzip.compress(raw) if path.suffix.lower() == ".gz" else raw)
    elif ".json" in path.name.lower():
        raw = f"\ufeff{json.dumps(rows)}".encode()
        path.write_bytes(gzip.compress(raw) if path.suffix.lower() == ".gz" else raw)
    else:
        path.mkdir()
        parts = [{"filename": f"data-{part}.arrow"} for part in range(len(rows))]
        (path / "state.json").write_text(json.dumps({"_data_files": parts}))
        for part, row in zip(parts, rows, strict=True):
            table = pa.Table.from_pylist([row])
            with pyarrow.ipc.new_stream(str(path / part["filename"]), table.schema) as stream:
                stream.write_table(table)
    return path


def load(path: Path, tokenizer, template: str = "{problem}=") -> list:
    config = DataConfig(train=path, eval=path, template=template)
    return load_problems(
        "data.train", config, paths=config.train, tokenizer=tokenizer, max_prompt_tokens=99
    )


@pytest.mark.parametrize(
    "name",
    [
        *("rows.json", "rows.jsonl", "rows.parquet", "folder"),
        *("with_mark.JSON", "packed.json.gz", "rows.csv", "packed.CSV.GZ"),
    ],
)
def test_every_form_of_file_gives_the_same_problems(tmp_path, tokenizer, name):
    first, second = load(save(tmp_path / name, ROWS), tokenizer)
    assert (first.problem, first.answers, first.prompt) == ("1+1", ("2",), "1+1=")
    assert tokenizer.decode(first.prompt_ids) == "1+1="
    row = ROWS[1] if "csv" not in name.lower() else {k: str(v) for k, v in ROWS[1].items()}
    assert (second.problem, second.columns) == ("2+2", row)


def test_lines_may_be_packed_and_begin_with_a_mark(tmp_path, tokenizer):
    text = "\ufeff" + "\r\n".join(map(json.dumps, ROWS))
    (tmp_path / "rows.JSONL").write_bytes(text.encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("rows.JSONL", "rows.jsonl.gz"):
        assert [p.answers for p in load(tmp_path / name, tokenizer)] == [("2",), ("4",)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "1", "answer": "He has 5 - 3 = 2.\n#### 2"}, "2"),
        ({"question": "1", "answer": "long text", "final_answer": ["2"]}, "2"),
        ({"question": "1", "answer": "long text", "ground_truth": "2"}, "2"),
        ({"question": "1", "answer": "2", "solution": "\\boxed{3}"}, "2"),
        ({"question": "1", "reward_model": {"style": "rule", "ground_truth": "2"}}, "2"),
        ({"question": "1", "reward_model": "some model", "answer": "2"}, "2"),
    ],
    ids=["gsm8k", "final_answer", "ground_truth", "answer", "verl", "another reward_model"],
)
def test_the_most_specific_answer_counts(tmp_path, tokenizer, row, expected, caplog):
    with caplog.at_level(logging.INFO, "codistill"):
        (problem,) = load(save(tmp_path / "rows.jsonl", [row]), tokenizer)
    assert problem.answers == (expected,)
    answers = [
        name for name in ("final_answer", "ground_truth", "answer", "solution") if name in row
    ]
    said = [f"answers are those of {answers[0]}, not of {answers[1]}"] if answers[1:] else []
    assert [message.partition(": ")[2] for message in caplog.messages] == said


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_messages_are_for_the_chat_template(tmp_path, tokenizer, name):
    """The layouts of TRL (a list of messages) and verl (that, and reward_model)."""
    messages = [{"role": "system", "content": "3"}, {"role": "user", "content": "1+1"}]
    row = {"prompt": messages, "reward_model": {"ground_truth": "2", "style": "rule"}}
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '+' if m.role == 'system' }}{{ m.content }}={% endfor %}"
    )
    (problem,) = load(save(tmp_path / name, [row]), tokenizer, template="chat")
    assert (problem.problem, problem.answers) == ("1+1", ("2",))
    assert problem.prompt == "+3=1+1="
    with pytest.raises(ConfigError, match="expected data.template = 'chat' for the messages of"):
        load(tmp_path / name, tokenizer)


def test_contradictions_are_problems_with_two_answers(tmp_path, tokenizer):
    rows = [{"problem": a, "answer": b} for a, b in ("11", "22", "12", "22", "13", "34")]
    problems = load(save(tmp_path / "rows.jsonl", rows), tokenizer)
    assert contradictions(problems) == 1


def test_json_may_hold_one_row_on_many_lines(tmp_path, tokenizer):
    (tmp_path / "row.json").write_text(json.dumps(ROWS[0], indent=2))
    assert [problem.answers for problem in load(tmp_path / "row.json", tokenizer)] == [("2",)]


def test_json_may_hold_a_row_per_line(tmp_path, tokenizer):
    path = save(tmp_path / "rows.jsonl", ROWS).rename(tmp_path / "rows.json")
    assert [problem.answers for problem in load(path, tokenizer)] == [("2",), ("4",)]


def test_answers_of_one_file_may_be_of_different_kinds(tmp_path, tokenizer):
    """Also text that a guessing reader takes for a date."""
    answers = [7, "7", [1, "2"], 0.5, "2020-01-01"]
    rows = [{"problem": "1", "answer": answer} for answer in answers] + [{"problem": "1"}]
    problems = load(save(tmp_path / "rows.jsonl", rows[:-1]), tokenizer)
    assert [p.answers for p in problems] == [
        *(("7",), ("7",), ("1", "2")),
        *(("0.5",), ("2020-01-01",)),
    ]
    with pytest.raises(ConfigError, match="a text, a number or a list of them as answer in row 6"):
        load(save(tmp_path / "more.jsonl", rows), tokenizer)


def test_columns_are_those_of_all_rows(tmp_path, tokenizer):
    rows = [{"problem": "1", "answer": "1"}, {"problem": "2", "answer": "2", "level": 3}]
    problems = load(save(tmp_path / "rows.jsonl", rows), tokenizer)
    assert [problem.columns["level"] for problem in problems] == [None, 3]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("answer", " \\frac{1}{2}\n", ("\\frac{1}{2}",)),
        ("answer", 142.0, ("142",)),
        ("answer", Decimal("142.0"), ("142",)),
        ("answer", 1e-7, ("0.0000001",)),
        ("answer", -3, ("-3",)),
        ("answer", ["9.6\n", 10.0], ("9.6", "10")),
        ("answer", [], ()),
        ("answer", ["1", " "], ()),
        ("answer", None, ()),
        ("answer", float("nan"), ()),
        ("answer", {"value": 1}, ()),
        ("answer", True, ()),
        ("answer", "####", ()),
        ("answer", ["a\n#### 1", "2"], ("1", "2")),
        (
            "solution",
            "first $\\boxed{1}$ then $\\boxed{\\frac{1}{\\sqrt{2}}}$.",
            ("\\frac{1}{\\sqrt{2}}",),
        ),
        ("solution", "so $\\boxed 7$", ("7",)),
        ("solution", "so $\\fbox{7}$", ("7",)),
        ("solution", "so it is 7", ()),
        ("solution", "so \\boxed{7", ()),
        ("solution", "so \\boxed{}", ()),
    ],
)
def test_gold_answers(name, value, expected):
    assert gold_answers(name, value) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "", "a .jsonl, .json or .csv file, which may be a .gz, a .parquet file, a fol"),
        ("a.jsonl", '{"problem": "1", "answer": "1"}\n{"pro', "line 2: Unterminated string"),
        ("a.json", '["1"]', "row 1 is no object with fields"),
        ("a.parquet", "no parquet", "expected rows of problems: "),
        (
            "a.json",
            '[{"problem": "", "answer": "1"}]',
            "a list of messages as problem in row 1, which",
        ),
        (
            "a.json",
            '[{"prompt": [{"role": "user"}], "answer": 1}]',
            "or a list of messages as prompt",
        ),
        (
            "a.json",
            '[{"problem": "1", "solution": "1"}]',
            "a solution with a \\boxed{} answer in row",
        ),
        ("a.json", '[{"text": "1", "answer": 1}]', "rows with problem or question or prompt and"),
    ],
)
def test_wrong_data_is_named(tmp_path, tokenizer, name, text, expected):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        load(tmp_path / name, tokenizer)
    assert str(error.value).startswith(f"data.train = {str(tmp_path / name)!r}: expected")
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_folder_of_several_sets_names_them(tmp_path, tokenizer):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=f"give one of {tmp_path}/train, {tmp_path}/test"):
        load(tmp_path, tokenizer)
    (tmp_path / "dataset_dict.json").unlink()
    with pytest.raises(ConfigError, match="has no state.json"):
        load(tmp_path, tokenizer)


def test_overlap_counts_held_out_problems_but_for_white_space(tmp_path, tokenizer):
    rows = [{"problem": text, "answer": 1} for text in ("1+1", "1 + 2", "3")]
    train = load(save(tmp_path / "train.jsonl", rows), tokenizer)
    rows = [{"problem": text, "answer": 1} for text in ("1+1", " 1  +\n2 ", "1+2", "4")]
    assert overlap(train, load(save(tmp_path / "eval.jsonl", rows), tokenizer)) == 2


def configured(path: Path | list[Path], tokenizer, grader=None, **keys) -> list:
    config = DataConfig(train=path, eval="unused", **{"template": "{problem}="} | keys)
    return load_problems(
        "data.train",
        config,
        paths=config.train,
        tokenizer=tokenizer,
        max_prompt_tokens=9,
        grader=grader,
    )


UNUSABLE = [
    {"problem": "1+1", "answer": "2"},
    {"problem": "1+2", "answer": ""},
    {"problem": "1+2", "answer": None},
    {"problem": " ", "answer": "2"},
    {"problem": "1\u0000", "answer": "2"},
    {"problem": "1+1+1+1+1", "answer": "5"},
    {"problem": "2+2", "answer": "}"},
    {"problem": "2+3", "answer": "5"},
]


def test_unusable_rows_are_skipped_and_counted(tmp_path, tokenizer, grader, caplog):
    path = save(tmp_path / "rows.jsonl", UNUSABLE)
    problems = configured(path, tokenizer, grader, unusable="skip")
    assert [(p.problem, p.row) for p in problems] == [("1+1", 1), ("2+3", 8)]
    assert caplog.messages == [
        "data.train: 6 of 8 rows skipped: 2 without answer, 1 without problem, 1 with characters "
        "that no text has, 1 with a prompt of more than 9 tokens, 1 with an answer that cannot be "
        "graded"
    ]
    assert golds_of_files(problems) == {path: [("2",), *[()] * 6, ("5",)]}
    with pytest.raises(ConfigError, match="or a list of them as answer in row 2, which has"):
        configured(path, tokenizer, grader)
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, UNUSABLE[1:7])))
    with pytest.raises(ConfigError, match="expected at least one row to use, 6 of 6 rows skipped"):
        configured(tmp_path / "bad.jsonl", tokenizer, grader, unusable="skip")


def test_rows_of_another_spelling_are_not_skipped(tmp_path, tokenizer):
    rows = [{"problem": "1", "answer": "1"}, {"question": "1", "answer": "1"}]
    with pytest.raises(ConfigError, match="as problem, as in other rows, in row 2, which has ques"):
        configured(save(tmp_path / "rows.jsonl", rows), tokenizer, unusable="skip")


def test_an_answer_that_takes_too_long_is_not_skipped(tmp_path):
    with Grader(timeout=20) as slow:
        assert slow.unreadable([("2",), ("}",), ("\\frac{1}{2}", "}")]) == [1, 2]
        slow.call = lambda function, items: [TimeoutError()] * len(items)
        assert slow.unreadable([("}",)]) == []  # time is not the same on every process


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"content": "1", "gt": 2, "answer": "long"}, ("content", "gt")),
        ({"x": {"y": {"z": "1"}, "gt": "2"}, "answer": "3"}, ("x.y.z", "x.gt")),
        ({"x.y": "1", "x": {"y": "3"}, "answer": "2"}, ("x.y", None)),
        ({"problem": "1", "a.b": {"c": "2"}}, (None, "a.b.c")),
    ],
    ids=["names", "nested", "dot in a name", "nested in such"],
)
def test_fields_may_be_named(tmp_path, tokenizer, row, keys):
    path = save(tmp_path / "rows.jsonl", [row])
    problem_field, answer_field = keys
    (problem,) = configured(path, tokenizer, problem_field=problem_field, answer_field=answer_field)
    assert (problem.problem, problem.answers, problem.columns) == ("1", ("2",), row)


def test_a_named_field_that_is_missing(tmp_path, tokenizer):
    rows = [{"problem": "1", "reward_model": {"style": "rule", "truth": "2"}}]
    with pytest.raises(ConfigError) as error:
        configured(save(tmp_path / "a.jsonl", rows), tokenizer, answer_field="reward_model.gold")
    assert str(error.value).endswith(
        "expected rows with problem or question or prompt and reward_model.gold, found problem, "
        "reward_model, reward_model.style, reward_model.truth; data.problem_field and "
        "data.answer_field name others"
    )


def test_several_files_each_with_its_own_fields(tmp_path, tokenizer):
    first = save(tmp_path / "b.jsonl", ROWS)
    second = save(tmp_path / "a.parquet", [{"problem": "3", "answer": "3"}])
    problems = configured([first, second], tokenizer)
    assert [(p.problem, p.file.name, p.row) for p in problems] == [
        *(("1+1", "b.jsonl", 1), ("2+2", "b.jsonl", 2)),
        ("3", "a.parquet", 1),
    ]
    assert problems[2].columns["level"] is None and problems[0].columns["problem"] is None
    (tmp_path / "c.jsonl").write_text('{"problem": "1"}')
    with pytest.raises(ConfigError, match="^data.train = '.*c.jsonl': expected rows with"):
        configured([first, tmp_path / "c.jsonl"], tokenizer)


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_a_folder_of_parts_is_read_in_the_order_of_names(tmp_path, tokenizer, ending):
    rows = [{"problem": str(n), "answer": str(n)} for n in range(3)]
    for n in (2, 0, 1):
        save(tmp_path / f"train-0000{n}-of-00003{ending}", [rows[n]])
    (tmp_path / "README.md").write_text("no rows")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert [p.problem for p in configured(tmp_path, tokenizer)] == ["0", "1", "2"]
    save(tmp_path / f"test-00000-of-00001{ending}", [rows[0]])
    with pytest.raises(ConfigError, match="expected a folder of one set, found test, train: name"):
        configured(tmp_path, tokenizer)


def test_fields_that_no_prompt_shows(tmp_path, tokenizer):
    """A story or choices beside the question, as in ASDiv and MMLU."""
    rows = [{"question": "1", "answer": "1", "Body": "2", "choices": None, "options": ["1"]}]
    problems = configured(save(tmp_path / "rows.jsonl", rows), tokenizer)
    assert hidden_fields(None, problems) == ["Body", "options"]
    assert hidden_fields("Body", problems) == ["options"]
