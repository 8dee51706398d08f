"""Which tokens end a completion: those of the model, else that of the tokenizer."""

import json

import pytest

from codistill.config import ConfigError
from codistill.model import end_token_ids


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([7, 3], (7, 3)), (5, (5,)), (None, (1,))],
    ids=["several", "one", "the tokenizer's"],
)
def test_end_tokens_are_those_of_generation_config(tmp_path, tokenizer, ids, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert end_token_ids("small.path", str(tmp_path), tokenizer) == expected


def test_a_model_without_generation_config_ends_as_its_tokenizer(tmp_path, tokenizer):
    assert end_token_ids("small.path", str(tmp_path), tokenizer) == (tokenizer.eos_token_id,)


def test_a_model_that_names_no_end_token_is_refused(tmp_path):
    class Tokenizer:
        eos_token_id = None

    with pytest.raises(ConfigError, match="small.path = .* a model that names its end token"):
        end_token_ids("small.path", str(tmp_path), Tokenizer())
