"""From the tokens of a completion to its text, whole or token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

UNFINISHED = "\ufffd"
"""What a tokenizer shows for bytes that are no character; perhaps the rest of one follows."""


class TextStream:
    """The text of a completion as it grows, special tokens shown.

    A token gives the text that it adds to those before it; one that leaves a character unfinished
    gives none, and the token that completes the character gives all of it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        # Text from `start` on depends on no token before it; up to `given` it has been given out.
        self.start, self.given = 0, 0

    def add(self, token: int) -> str:
        """The text that this token adds."""
        self.tokens.append(token)
        rest = self.rest()
        if not rest or rest.endswith(UNFINISHED):
            return ""
        self.start, self.given = self.given, len(self.tokens)
        return rest

    def rest(self) -> str:
        """The text that no token has given yet: an unfinished character."""
        before = self.decode(self.tokens[self.start : self.given])
        return self.decode(self.tokens[self.start :])[len(before) :]

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def graded_text(
    tokenizer: Any,
    token_ids: list[int],
    end_token_ids: Sequence[int],
    *,
    skip_special_tokens: bool,
) -> str:
    """The text of a completion, as it is graded: without the end token."""
    ends = token_ids[-1:] and token_ids[-1] in end_token_ids
    return tokenizer.decode(
        token_ids[:-1] if ends else token_ids, skip_special_tokens=skip_special_tokens
    )


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token; one after the other they are the whole, special tokens shown."""
    stream = TextStream(tokenizer)
    texts = [stream.add(token) for token in tokens]
    if texts:
        texts[-1] = texts[-1] or stream.rest()
    return texts


@dataclass(frozen=True)
class StopStrings:
    """Texts that end a completion: at the first token with which its text, special tokens shown,
    has one of them."""

    tokenizer: Any
    strings: tuple[str, ...]

    def watch(self) -> "StopWatch":
        return StopWatch(self)

    def end(self, tokens: Sequence[int]) -> int | None:
        """How many tokens there are up to and with the one that ends them; None without one."""
        watch = self.watch()
        ends = (place for place, token in enumerate(tokens, start=1) if watch.add(token))
        return next(ends, None)


class StopWatch:
    """Looks for stop strings in one completion as it grows."""

    def __init__(self, stop: StopStrings) -> None:
        self.strings, self.stream = stop.strings, TextStream(stop.tokenizer)
        self.longest = max(map(len, stop.strings), default=0)
        self.tail = ""

    def add(self, token: int) -> bool:
        """Whether the text has a stop string with this token, the first to complete one."""
        text = self.tail + self.stream.add(token)
        self.tail = text[-self.longest :]
        return any(string in text for string in self.strings)
