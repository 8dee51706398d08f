"""From a problem to the text of its prompt and the tokens of that text."""

import datetime
import os
import unicodedata
from typing import Any

from codistill.config.base import ConfigError

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
DATE = datetime.date(2024, 7, 26)
"""What a chat template that asks for today's date is told, so that a run has the same prompts
whenever it goes on. Llama 3's templates name this date where they know no other."""

Message = dict[str, str]
"""A turn of a conversation: role and content."""
Argument = bool | int | float | str
"""What a chat template may be given besides the conversation."""


def is_template(template: str) -> bool:
    """Whether `render` can make a prompt of it: a name, or a text with a place for the problem."""
    named = template in (*NAMED, CHAT)
    return named or ("{problem}" in template and broken_character(template) is None)


def broken_character(text: str) -> str | None:
    """The first character that no text has, NUL or half of a surrogate pair; None without one."""
    return next((char for char in text if char == "\0" or "\ud800" <= char <= "\udfff"), None)


def asks_for_the_date(tokenizer: Any) -> bool:
    """Whether prompts of the chat template may have a date in them."""
    return "strftime_now" in str(tokenizer.chat_template)


def render(
    template: str,
    problem: str | list[Message],
    tokenizer: Any,
    *,
    system: str | None = None,
    arguments: dict[str, Argument] | None = None,
) -> str:
    """Text of a prompt, up to where the completion begins.

    problem: messages with the template chat, whose last is the user's; else a text.
    system: with the template chat, a message before those of a problem that begins with none.
    arguments: of the chat template.

    Raises:
        ConfigError: the tokenizer's chat template fails.
    """
    if template == CHAT:
        messages: list[Message] = []
        messages += [{"role": "user", "content": problem}] if isinstance(problem, str) else problem
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        pinned = {"strftime_now": DATE.strftime} if asks_for_the_date(tokenizer) else {}
        try:
            return tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=True,
                **pinned,
                **(arguments or {}),
            )
        except Exception as error:  # a template is a program, which may raise anything
            message = " ".join(str(error).split())
            raise ConfigError(f"the tokenizer's chat template fails: {message}") from error
    assert isinstance(problem, str)
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


def lost_text(text: str, tokenizer: Any) -> tuple[str, str] | None:
    """Where a prompt and the text of its tokens differ: a few characters of each; None if they are
    equal.

    A tokenizer without a token for a character leaves it out or puts an unknown token, and the
    model answers another problem. transformers gives some types of models a tokenizer that does so
    whatever their tokenizer.json says: its Qwen2 one has a pre-tokenizer of its own. White space,
    capitals and forms of one character (NFKC) may differ, as tokenizers of good models change them.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    read = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    written, read = compared(text), compared(read)
    if written == read:
        return None
    start = max(0, len(os.path.commonprefix([written, read])) - 10)
    return written[start : start + 20], read[start : start + 20]


def compared(text: str) -> str:
    """A text without what tokenizers may change."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
