"""From a problem to the text of its prompt and the tokens of that text."""

from typing import Any

R1 = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think></think> "
    "and <answer></answer> tags, respectively, i.e., <think> reasoning process here </think> and "
    "<answer> answer here </answer>. User: {problem}. Assistant:"
)
BOXED = (
    "Please reason step by step, and put your final answer within \\boxed{}.\n"
    "Question: {problem}. Answer:"
)
NAMED = {"r1": R1, "boxed": BOXED}
"""Table 4 (Qwen, with the format reward) and Table 5 (Llama, without)."""
CHAT = "chat"
"""The tokenizer's own chat template, with the problem as the user's message."""


def is_template(template: str) -> bool:
    """Whether `render` can make a prompt of it: a name, or a text with a place for the problem."""
    return template in (*NAMED, CHAT) or "{problem}" in template


def render(template: str, problem: str, tokenizer: Any) -> str:
    """Text of a prompt, up to where the completion begins."""
    if template == CHAT:
        messages = [{"role": "user", "content": problem}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return NAMED.get(template, template).replace("{problem}", problem)


def encode(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a prompt. It begins with one BOS token if the tokenizer adds one or the text has
    one, as chat templates do, and with none otherwise; no end token is ever added.
    """
    ids, bos = tokenizer.encode(text, add_special_tokens=False), tokenizer.bos_token_id
    if bos is None:
        return ids
    begins = ids[:1] == [bos] or tokenizer.encode("")[:1] == [bos]
    while ids[:1] == [bos]:
        ids = ids[1:]
    return [bos, *ids] if begins else ids
