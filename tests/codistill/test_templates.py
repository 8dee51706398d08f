"""Prompts: the texts of the paper's tables, chat templates, and one BOS whatever adds it."""

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from codistill.config import ConfigError
from codistill.config.data import DataConfig
from codistill.data import load_problems
from codistill.model.pretrained import load_tokenizer
from codistill.templates import asks_for_the_date, encode, lost_text, render

BOS, END, WORD = 1, 2, 3
CHAT = (
    "{% for message in messages %}<user> {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer(*, adds: str, bos: bool = True, chat: str | None = None):
    """Words as tokens. adds: what the tokenizer puts around a text, "<s> $A </s>" for example."""
    words = ["<unk>", "<s>", "</s>", "one", "<user>", "<assistant>"]
    words += ["system:", "two;", "user:", "one;", "a"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("<s>", BOS), ("</s>", END)]
    tokenizer.post_processor = TemplateProcessing(single=adds, special_tokens=special)
    names = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", chat_template=chat, **names
    )


@pytest.mark.parametrize(
    ("adds", "text", "expected"),
    [
        ("<s> $A", "one", [BOS, WORD]),
        ("<s> $A", "<s> one", [BOS, WORD]),
        ("<s> $A", "<s><s> one", [BOS, WORD]),
        ("<s> $A </s>", "one", [BOS, WORD]),  # an end token would end the prompt before it begins
        ("$A", "one", [WORD]),
        ("$A", "<s> one", [BOS, WORD]),
    ],
)
def test_a_prompt_has_one_bos_or_none(adds, text, expected):
    assert encode(text, make_tokenizer(adds=adds)) == expected


def test_a_tokenizer_without_bos_adds_none():
    assert encode("one", make_tokenizer(adds="$A", bos=False)) == [WORD]


@pytest.mark.parametrize("written", ["", "<s>"], ids=["by tokenizer", "by template"])
def test_chat_template_of_the_tokenizer(written):
    tokenizer = make_tokenizer(adds="<s> $A", chat=written + CHAT)
    text = render("chat", "one", tokenizer)
    assert text == written + "<user> one <assistant> "
    assert encode(text, tokenizer) == [BOS, 4, WORD, 5]


def test_chat_needs_a_chat_template(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"problem": "one", "answer": "1"}\n')
    config = DataConfig(train=path, eval=path, template="chat")
    with pytest.raises(ConfigError, match="data.template = 'chat': expected a tokenizer with a"):
        load_problems(
            "data.train",
            config,
            paths=config.train,
            tokenizer=make_tokenizer(adds="$A"),
            max_prompt_tokens=9,
        )


def test_a_chat_template_has_the_same_date_every_day():
    tokenizer = make_tokenizer(adds="$A", chat="{{ strftime_now('%d %b %Y') }} one")
    assert asks_for_the_date(tokenizer)
    assert render("chat", "one", tokenizer) == "26 Jul 2024 one"
    assert not asks_for_the_date(make_tokenizer(adds="$A", chat=CHAT))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ raise_exception('System role\nmust come first') }}", "System role must come first in"),
        ("{{ messages[3].content.x }}", "fails: "),
        ("{{ 1 / 0 }}", "fails: division by zero in row 1"),
        ("{% if", "fails: "),
    ],
    ids=["raises", "undefined", "divides", "syntax"],
)
def test_a_chat_template_that_fails_is_one_line(tmp_path, template, expected):
    path = tmp_path / "a.jsonl"
    path.write_text('{"problem": "one", "answer": "1"}\n')
    config = DataConfig(train=path, eval=path, template="chat")
    tokenizer = make_tokenizer(adds="$A", chat=template)
    with pytest.raises(ConfigError) as error:
        load_problems(
            "data.train", config, paths=config.train, tokenizer=tokenizer, max_prompt_tokens=9
        )
    start = f"data.train = {str(path)!r}: the tokenizer's chat template fails: "
    assert str(error.value).startswith(start) and expected in str(error.value)
    assert str(error.value).isprintable()


def test_templates_of_the_paper():
    text = render("r1", "What is {1}?", None)
    assert text.startswith("A conversation between User and Assistant. The user asks a question, ")
    assert text.endswith("</answer>. User: What is {1}?. Assistant:")
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        assert text.count(tag) == 2
    assert render("boxed", "1+1", None) == (
        "Please reason step by step, and put your final answer within \\boxed{}.\n"
        "Question: 1+1. Answer:"
    )
    assert render("{problem} = {problem}", "x", None) == "x = x"


ROLES = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}; {% endfor %}"
    "{% if thinking is not defined or thinking %}<think>{% endif %}{{ n }}"
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one", "system: be short; user: one; <think>"),
        ([{"role": "user", "content": "one"}], "system: be short; user: one; <think>"),
        (
            [{"role": "system", "content": "be long"}, {"role": "user", "content": "one"}],
            "system: be long; user: one; <think>",
        ),
    ],
    ids=["text", "messages", "with their own"],
)
def test_a_system_message_is_before_a_problem_that_has_none(content, expected):
    tokenizer = make_tokenizer(adds="$A", chat=ROLES)
    assert render("chat", content, tokenizer, system="be short") == expected


def test_arguments_of_the_chat_template():
    tokenizer = make_tokenizer(adds="$A", chat=ROLES)
    assert render("chat", "one", tokenizer, arguments={"thinking": False}) == "user: one; "
    assert render("chat", "one", tokenizer, arguments={"n": 3}) == "user: one; <think>3"
    with pytest.raises(ConfigError, match="the tokenizer's chat template fails: .*tokenize"):
        render("chat", "one", tokenizer, arguments={"tokenize": True})


def test_both_come_from_the_configuration(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "one", "answer": "1"}\n')
    keys = {"template": "chat", "system": "two", "chat_template_arguments": {"thinking": "false"}}
    config = DataConfig(train=tmp_path / "a.jsonl", eval=tmp_path / "a.jsonl", **keys)
    tokenizer = make_tokenizer(adds="$A", chat=ROLES)
    (problem,) = load_problems(
        "data.train", config, paths=config.train, tokenizer=tokenizer, max_prompt_tokens=9
    )
    assert problem.prompt == "system: two; user: one; "
    for key in ("system", "chat_template_arguments"):
        with pytest.raises(ValueError, match=f"{key} = .*: expected nothing without template chat"):
            DataConfig(train="a", eval="a", **{key: keys[key]})


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("one one", None),
        ("  one\n\none ", None),  # white space is every tokenizer's own affair
        ("ONE", None),  # as is writing in capitals: this one writes them small
        ("ｏne", None),  # NFKC: a wide letter
        ("one two one", ("onetwoone", "one<unk>one")),
        ("one" + 40 * " one" + " two", (9 * "one" + "two", 9 * "one" + "<unk>")),
    ],
)
def test_text_that_a_tokenizer_loses(text, lost):
    tokenizer = make_tokenizer(adds="<s> $A </s>")
    small = [normalizers.NFKC(), normalizers.Lowercase()]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(small)
    found = lost_text(text, tokenizer)
    assert found == lost if lost is None else found and lost[0].endswith(found[0][-3:])


def test_a_tokenizer_that_transformers_replaces_is_said(tmp_path):
    """A model of type qwen2 gets Qwen2's tokenizer, which finds no word that is more than a letter
    among tokens that are whole words."""
    make_tokenizer(adds="$A").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    rows = ['{"problem": "a one", "answer": "1"}', '{"problem": "a", "answer": "1"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    tokenizer = load_tokenizer("small.path", str(tmp_path / "model"))

    def load(unusable: str):
        keys = {"template": "{problem}", "unusable": unusable}
        config = DataConfig(train=tmp_path / "a.jsonl", eval=tmp_path / "a.jsonl", **keys)
        return load_problems(
            "data.train", config, tokenizer, paths=config.train, max_prompt_tokens=9
        )

    with pytest.raises(ConfigError, match="keeps, it reads 'aone' as 'a' in row 1"):
        load("stop")
    assert [problem.row for problem in load("skip")] == [2]
