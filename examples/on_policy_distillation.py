"""On-policy distillation: a student writes, a teacher scores every token over the whole vocabulary.

    python examples/on_policy_distillation.py --kind reverse_kl --steps 20

The loss is the divergence of the student from the teacher at each token that the student wrote, so
the student learns from its own mistakes. `linear_divergence` takes both models' hidden states and
heads, and never holds all logits [tokens, vocabulary]. With its two tiny random models this takes
seconds on a CPU; any two causal language models with one tokenizer can take their place.
"""

import argparse

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from codistill_kernels import linear_divergence

EOS, VOCAB = 1, 200  # of the tokenizer; each head has more rows than that
PROMPT, COMPLETION = 4, 8  # tokens


def tiny_model(hidden: int, rows: int, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=hidden // 16,
        num_key_value_heads=hidden // 16,
        max_position_embeddings=64,
        initializer_range=0.2,  # logits far from uniform, so that there is something to learn
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config)


@torch.no_grad()
def sample(model: PreTrainedModel, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """[B, PROMPT + COMPLETION] tokens at temperature 1. A real run uses an inference engine."""
    ids = prompts
    for _ in range(COMPLETION):
        logits = model(input_ids=ids, logits_to_keep=1).logits[:, -1, :VOCAB]
        following = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
        ids = torch.cat((ids, following), dim=1)
    return ids


def completion_mask(ids: Tensor) -> Tensor:
    """[B, COMPLETION] bool, True through the first EOS."""
    ended = (ids[:, PROMPT:] == EOS).cumsum(dim=1)
    return (ended == 0) | ((ended == 1) & (ids[:, PROMPT:] == EOS))


def head_inputs(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states before each completion token [B, COMPLETION, H]; the head's weight and bias."""
    states = model.model(input_ids=ids).last_hidden_state[:, PROMPT - 1 : -1]
    head = model.get_output_embeddings()
    return states, head.weight, head.bias


def distillation_loss(student: tuple, teacher: tuple, mask: Tensor, kind: str) -> Tensor:
    """Mean over the tokens of the batch. With several micro-batches or processes the normalizer is
    the number of all their tokens."""
    options = dict(kind=kind, vocab_size=VOCAB, normalizer=mask.sum())
    loss, _ = linear_divergence(student, teacher, mask, **options)
    return loss


def train(kind: str = "reverse_kl", steps: int = 20, loss_of=distillation_loss) -> list[float]:
    """Loss of each step, in nats per token."""
    student, teacher = tiny_model(32, 208, seed=0), tiny_model(64, 256, seed=1).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        prompts = torch.randint(2, VOCAB, (16, PROMPT), generator=generator)
        ids = sample(student, prompts, generator)
        with torch.no_grad():
            scored = head_inputs(teacher, ids)
        loss = loss_of(head_inputs(student, ids), scored, completion_mask(ids), kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", default="reverse_kl", help="reverse_kl, forward_kl or jsd")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    for step, loss in enumerate(train(options.kind, options.steps), start=1):
        print(f"step {step:3d}  {options.kind} {loss:.4f} nats per token")


if __name__ == "__main__":
    main()
