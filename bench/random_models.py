"""A small and a large model with random weights, and problems for them.

Models with random weights rarely end a completion, so nearly all completions reach the limit, and
every run of the step benchmark writes the same number of tokens.
"""

import json
import math
import string
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.device_mesh import DeviceMesh

from codistill.config.machinery import Checkpointing, LoraConfig, TrainingConfig
from codistill.model.policy import Policy, prepare

BYTES_PER_PARAMETER = 16  # fp32 weight, gradient and two Adam moments
END = "<|endoftext|>"  # a Qwen2 tokenizer has it in any case
LETTERS = string.ascii_lowercase
MEMORY_SHARE = (
    0.7  # share of the device for these; activations, engine and bf16 copies get the rest
)


@dataclass(frozen=True)
class Size:
    """Size of a Qwen2 model. The fields are those of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False

    def parameters(self) -> int:
        """Number of parameters, without norms and biases."""
        head = self.hidden_size // self.num_attention_heads
        attention = 2 * self.hidden_size * (self.hidden_size + head * self.num_key_value_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_hidden_layers * layer + embeddings


@dataclass(frozen=True)
class Pair:
    """Both models, and the sizes of a training step with them."""

    small: Size
    large: Size
    tokens: int
    """Size of the tokenizer; the models' vocabularies are larger."""
    prompts: int
    prompt_tokens: int
    completion_tokens: int
    dtype: str
    checkpointing: Checkpointing


PAIRS = {
    "tiny": Pair(  # only to see that it runs
        Size(64, 128, 2, 2, 1, 512),
        Size(128, 256, 2, 2, 1, 512),
        tokens=500,
        prompts=1,
        prompt_tokens=8,
        completion_tokens=16,
        dtype="float32",
        checkpointing="none",
    ),
    "cpu": Pair(
        Size(256, 1024, 4, 4, 2, 4096),
        Size(512, 2048, 8, 8, 2, 4096),
        tokens=4000,
        prompts=4,
        prompt_tokens=32,
        completion_tokens=96,
        dtype="float32",
        checkpointing="none",
    ),
    # Qwen2.5-Math-1.5B and 7B, from their config.json; lengths cut to what a benchmark may take.
    "paper": Pair(
        Size(1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True),
        Size(3584, 18944, 28, 28, 4, 152064),
        tokens=151665,
        prompts=4,
        prompt_tokens=128,
        completion_tokens=256,
        dtype="bfloat16",
        checkpointing="full",
    ),
}


def fitted(pair: Pair, device: torch.device) -> Pair:
    """The pair with so many layers as fit on the device: the same share of each model's."""
    if device.type == "cpu":
        return pair
    room = MEMORY_SHARE * torch.cuda.get_device_properties(0).total_memory / BYTES_PER_PARAMETER

    def shortened(size: Size, share: float) -> Size:
        return replace(size, num_hidden_layers=max(1, math.floor(share * size.num_hidden_layers)))

    for twentieths in range(20, 0, -1):
        small, large = (shortened(size, twentieths / 20) for size in (pair.small, pair.large))
        if small.parameters() + large.parameters() <= room:
            break
    return replace(pair, small=small, large=large)


def write(pair: Pair, folder: Path, *, weights: bool, seed: int = 0) -> None:
    """Write folder/small, folder/large and folder/problems.jsonl. Without weights the models'
    folders hold only configurations and tokenizers."""
    torch.manual_seed(seed)
    transformers.logging.disable_progress_bar()
    fast = make_tokenizer(pair.tokens)
    for name, size in (("small", pair.small), ("large", pair.large)):
        config = transformers.Qwen2Config(
            **asdict(size), eos_token_id=1, bos_token_id=None, max_position_embeddings=4096
        )
        model = transformers.Qwen2ForCausalLM(config) if weights else config
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    letters = torch.randint(len(LETTERS), (4 * pair.prompts, pair.prompt_tokens)).tolist()
    problems = [{"problem": "".join(LETTERS[i] for i in row), "answer": "1"} for row in letters]
    (folder / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))


def make_tokenizer(tokens: int) -> transformers.PreTrainedTokenizerFast:
    """As Qwen2's, which transformers makes of any Qwen2 model's, without a merge: each letter of a
    prompt is a token. The other tokens only make the softmax as large as it should be."""
    words = ["w0", END, *LETTERS]
    words += [f"w{index}" for index in range(len(words), tokens)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def random_policy(
    key: str,
    path: str,
    options: TrainingConfig,
    vocab_size: int,
    device: torch.device,
    *,
    lora: LoraConfig | None = None,
    mesh: DeviceMesh | None = None,
) -> Policy:
    """`load_policy` of a folder without weights: they are made on the device, not read."""
    assert lora is None
    with device:
        lm = transformers.Qwen2ForCausalLM(transformers.AutoConfig.from_pretrained(path))
    return prepare(lm, options, vocab_size, device, mesh)
