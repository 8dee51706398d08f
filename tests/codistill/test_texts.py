"""The text of a completion: by token, up to a stop string, with and without special tokens."""

import copy
import importlib.util
import logging

import numpy as np
import pytest
import torch
from processes import spawn
from test_engine import CPU, END, PROMPTS, VOCAB, logp_gap
from tiny import FakeGrader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from codistill import distributed
from codistill.config.machinery import TrainingConfig
from codistill.engine import EngineSpec, Sampling, cut_at_end
from codistill.engine.hf import HFEngine
from codistill.engine.in_process import VLLMEngine
from codistill.hints import write_hints
from codistill.model.loading import load_policy
from codistill.texts import StopStrings, token_texts


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """A token per byte, and one special token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": ["</answer>"]})
    return fast


def test_a_character_belongs_to_the_token_that_completes_it(bytes_tokenizer):
    ids = bytes_tokenizer.encode("a é€</answer>b")
    assert token_texts(bytes_tokenizer, ids) == [
        *("a", " ", "", "é", "", "", "€", "</answer>", "b"),
    ]
    assert token_texts(bytes_tokenizer, []) == []


@pytest.mark.parametrize("text", ["a€", "€€", "</answer>€"])
def test_the_texts_are_the_whole_also_where_bytes_are_no_character(bytes_tokenizer, text):
    ids = bytes_tokenizer.encode(text)
    for tokens in (ids, ids[:-1], ids[1:], ids[:-1] + ids[:1], ids[-2:] * 3):
        texts = token_texts(bytes_tokenizer, tokens)
        assert "".join(texts) == bytes_tokenizer.decode(tokens) and len(texts) == len(tokens)


@pytest.mark.parametrize(
    ("strings", "length"),
    [
        (("€",), 6),  # at the last of its three tokens
        (("</answer>",), 7),
        (("b</ans",), None),
        (("€</ans", "c"), 7),
        (("bé", "€"), 3),
        (("b", "€"), 1),
        (("cc",), None),
    ],
)
def test_a_completion_ends_where_its_text_first_has_a_string(bytes_tokenizer, strings, length):
    ids = bytes_tokenizer.encode("bé€</answer>c")
    stop = StopStrings(bytes_tokenizer, strings)
    assert stop.end(ids) == length
    assert cut_at_end(ids, (), stop) == (ids[:length], length is None)


def test_what_comes_first_ends_a_completion(tokenizer):
    ids = tokenizer.encode("1+2=3;")
    stop = StopStrings(tokenizer, ("2=",))
    assert cut_at_end([*ids, 1], (1,), stop) == (ids[:4], False)
    assert cut_at_end([ids[0], 1, *ids], (1,), stop) == ([ids[0], 1], False)
    assert cut_at_end(ids[:3], (1,), stop) == (ids[:3], True)


STRINGS = ("+", "=1", "7</think>")


def check_stop(rank: int, path: str, has_vllm: bool) -> None:
    """Both engines end where the text first has a string, and nowhere else."""
    distributed.start(timeout=60)
    tokenizer = AutoTokenizer.from_pretrained(path)
    stop = StopStrings(tokenizer, STRINGS)
    terms = (path, VOCAB, (END,), 20, torch.float32, CPU, 0.1)
    policy = load_policy("small.path", path, TrainingConfig(dtype="float32"), VOCAB, CPU)
    hf, unstopped = HFEngine(EngineSpec(*terms, stop)), HFEngine(EngineSpec(*terms))
    sampling = Sampling(num_generations=16, temperature=1.0, max_tokens=12)
    written = hf.generate(PROMPTS, [1, 2, 3], sampling)
    for whole, cut in zip(unstopped.generate(PROMPTS, [1, 2, 3], sampling), written, strict=True):
        count = len(cut.token_ids)
        assert cut.token_ids == whole.token_ids[:count]
        assert cut.logps == pytest.approx(whole.logps[:count], abs=1e-5)
    check_ends(tokenizer, written)
    if not has_vllm:
        return
    engine = VLLMEngine(EngineSpec(*terms, stop))
    check_ends(tokenizer, engine.generate(PROMPTS, [1, 2, 3], sampling))
    assert logp_gap(engine, policy, 1.0) < 1e-4
    greedy = Sampling(num_generations=1, temperature=0.0, max_tokens=12)
    first, second = (e.generate(PROMPTS, [1, 2, 3], greedy) for e in (hf, engine))
    for ours, theirs in zip(first, second, strict=True):
        assert (ours.token_ids, ours.truncated) == (theirs.token_ids, theirs.truncated)
    engine.close()


def check_ends(tokenizer, completions) -> None:
    kinds = set()
    for completion in completions:
        ids = completion.token_ids
        has = [any(s in tokenizer.decode(ids[:n]) for s in STRINGS) for n in range(len(ids) + 1)]
        assert not any(has[:-1]) and len(completion.logps) == len(ids)
        assert completion.truncated == (not has[-1] and ids[-1] != END)
        assert not completion.truncated or len(ids) == 12
        kinds.add((has[-1], completion.truncated))
    assert kinds == {(True, False), (False, False), (False, True)}  # string, end token, length


def test_both_engines_stop_at_strings(models):
    has_vllm = importlib.util.find_spec("vllm") is not None
    spawn(check_stop, str(models["small"]), has_vllm, processes=1)


def test_a_string_may_begin_in_a_hint(make_trainer):
    """Hint and rest are one text; the log-probabilities stay those of the tokens."""
    strings = [a + b for a in "123456789" for b in "123456789"]
    changes = {"hint": {"tokens": 1}, "rollout": {"stop": strings}}
    trainer = make_trainer(changes, FakeGrader())
    numbers, rollouts, _ = trainer.step(1)
    assert numbers["rollout/logp_gap_max"] < 1e-3
    decode = trainer.inputs.tokenizer.decode
    within = 0
    for row in range(len(rollouts)):
        ids = rollouts.completions.rows(torch.tensor([row])).values.tolist()
        has = [any(s in decode(ids[:n]) for s in strings) for n in range(len(ids) + 1)]
        assert not any(has[:-1]), decode(ids)
        within += has[2] if len(has) > 2 else 0
    assert within  # some ended at the token after the hint


def test_a_hint_may_end_with_a_string(make_trainer):
    policy, stop = make_trainer().policies["large"], None
    uniforms = np.random.default_rng(0).random((40, 6))
    terms = dict(temperature=1.0, end_token_ids=())
    whole = write_hints(policy, [[3, 13]] * 40, uniforms, **terms, stop=stop)
    tokenizer = AutoTokenizer.from_pretrained("demo/small")
    cut = write_hints(
        policy, [[3, 13]] * 40, uniforms, **terms, stop=StopStrings(tokenizer, ("+",))
    )
    plus = tokenizer.convert_tokens_to_ids("+")
    assert cut == [row[: row.index(plus) + 1] if plus in row else row for row in whole]
    assert cut != whole


@pytest.fixture
def tagged(tokenizer):
    """The tags of the format reward are special tokens."""
    tokenizer = copy.deepcopy(tokenizer)
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tags})
    return tokenizer


def test_special_tags_are_graded_where_they_are_shown(
    settings, tagged, monkeypatch, caplog, models
):
    from codistill import inputs
    from codistill.config import Config

    monkeypatch.setattr(inputs, "load_tokenizers", lambda config: tagged)
    text = "<think>1</think><answer>2</answer>"
    ids = [*tagged.encode(text), tagged.eos_token_id]
    for skip, expected, warned in ((True, "12", 1), (False, text, 0)):
        caplog.clear()
        settings["rollout"]["skip_special_tokens"] = skip
        with caplog.at_level(logging.WARNING):
            found = inputs.load_inputs(Config(**settings))
        assert found.text(ids) == expected
        lines = [line for line in caplog.messages if line.startswith("reward.format: <think>")]
        assert len(lines) == warned
