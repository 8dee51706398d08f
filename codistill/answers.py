"""The answer of a completion: where it stands in the text, and how it is spelled.

Everything here works on strings, in time proportional to their length; `comparing` does the
mathematics.
"""

import re
import unicodedata
from collections.abc import Iterator

ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
BOXED = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
BARE = re.compile(r"[^{}$\s]+")

MAX_SENTENCES = 4000
"""Characters at the end of a text in which sentences are looked for."""
MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
JOINED = re.compile(r"\s*(?:,|;|,?\s*and|,?\s*or)\s*")
ANSWER_IS = re.compile(
    r"\b(?:answers?|results?|solutions?)\b[^.\n$\\]{0,80}?(?:\b(?:is|are|was|be)\b|:|=)"
    r"(?:\s*[*_:]+)?\s*",
    re.IGNORECASE,
)
COPULA = re.compile(
    r"(?:\b(?:is|are|was|were|be|equals|get|gives|have|has)\b|[:=])\s*", re.IGNORECASE
)
FILLER = re.compile(
    r"(?:(?:therefore|thus|so|hence|exactly|simply|just|then|equal to|given by|now)\b[\s:,]*)+",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"[.!?](?=[\s*]|$)|\n")
NEGATION = re.compile(r"\b(?:not|never|neither|nor|cannot)\b|n['’]t\b", re.IGNORECASE)
HEDGE = re.compile(r"\b(?:or|and|not|nor|from|between)\W*$", re.IGNORECASE)
NUMBER = re.compile(
    r"(?<![\w.])-?\\?\$?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/\d+)?(?:\s*\\?%)?(?!\w)"
)
TUPLE = r"[(\[](?:[^()\[\],;]|\([^()\[\]]*\))*[,;](?:[^()\[\]]|\([^()\[\]]*\))*[)\]]"
TUPLES = re.compile(rf"{TUPLE}(?:(?:{JOINED.pattern}|\s*(?:∪|∩|U|\\cup|\\cap)\s*){TUPLE})*")
"""Intervals, points and tuples in plain text. A number in one is a part, no answer: [2, 5)."""
CLAUSE_END = re.compile(r"[,;](?=\s)")
WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}")

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n")
SYMBOLS = {
    **dict.fromkeys("×✕", r"\times "),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **dict.fromkeys("−–‐‑", "-"),
    **dict.fromkeys("“”", '"'),
    **{"÷": "/", "⁄": "/", "∕": "/", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ", "±": r"\pm "},
    **{"≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "},
    **{"α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta "},
    **{
        "λ": r"\lambda ",
        "μ": r"\mu ",
        "ω": r"\omega ",
        "τ": r"\tau ",
        "ρ": r"\rho ",
        "φ": r"\phi ",
    },
    **{"σ": r"\sigma ", "…": r"\ldots ", "’": "'"},
}
SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        # Two backslashes end a row of a matrix.
        (r"(?<!\\)\\!\s*", ""),
        (r"(?<!\\)\\(?:[,;:> ]|q?quad(?![A-Za-z])|thinspace|displaystyle)|~", " "),
        (r"\\limits(?![A-Za-z])", " "),
        (r"\\m?(?:left|right)\.", ""),
        (r"\\m?(?:left|right)(?![A-Za-z])", ""),
        (r"\\[bB]igg?[lrm]?(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (
            r"\\(?:mbox|mathrm|textrm|textbf|mathbf|textit|textnormal|operatorname)\s*(?=\{)",
            r"\\text",
        ),
        (r"\\text\s+(?=\{)", r"\\text"),
        (r"\\(?:lt|gt)(?![A-Za-z])", lambda match: {"l": "<", "g": ">"}[match.group()[1]]),
        (
            r"\\([lg]e)(?![A-Za-z])|\\([lg]eq)slant(?![A-Za-z])",
            lambda match: f"\\{match.group()[1]}eq",
        ),
        (r"\\%|\s*\\?\btext\{\s*percent\s*\}|\s*\bpercent\b", "%"),
        (r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\s*\\degree(?![A-Za-z])", ""),
        (r"\{\s*,\s*\}", ","),
        (r"\s*\bmillion\b", r" \\times 10^{6}"),
        (r"\s*\bbillion\b", r" \\times 10^{9}"),
        # A space between groups of three digits separates thousands: 12 345.
        (r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d,])", lambda match: match.group().replace(" ", "")),
        # A whole number before a fraction: 1 1/2.
        (r"(?<![\d./^])(\d+) (\d+)/(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
        # math-verify takes the e of 1e-5 for Euler's number.
        (r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]\+?(-?\d+)(?![\w^]|\.\d)", r"\1 \\times 10^{\2}"),
        (r"\\(?:times|cdot|ast)\s*10\s*\^\s*(?:\{\s*)?\+?(-?\d+)(?:\s*\})?", r"\\times 10^{\1}"),
        (r"(?<=\d)\s*[*xX]\s*10\s*\^\s*\{?\(?(-?\d+)\)?\}?", r" \\times 10^{\1}"),
    )
]
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
PAIRS = ((r"\(", r"\)"), (r"\[", r"\]"), ("__", "__"), ("`", "`"), ('"', '"'))
CLOSERS = {")": "(", "]": "[", "}": "{"}


def answers_in(text: str) -> list[str]:
    """The passages of a completion that may be its answer, the most literal first.

    The answer is what stands in the last <answer> </answer> pair, else in the last \\boxed{}, else
    what the last sentence says. Where it is a sentence, the formula, number or word that it states
    comes after the sentence itself. A last \\boxed{} that is cut off gives no answer.
    """
    tagged = ANSWER.findall(text)
    if tagged:
        boxed = BOXED.search(tagged[-1])
        answer = last_boxed(tagged[-1]) if boxed else tagged[-1]
    elif BOXED.search(text):
        answer = last_boxed(text)
    else:
        answer = text
    if answer is None:
        return []
    return list(dict.fromkeys(passage for passage in passages(answer) if passage.strip()))


def passages(answer: str) -> Iterator[str]:
    """The answer itself and, if it is a sentence, what it states."""
    yield answer
    answer = answer[-MAX_SENTENCES:].strip()
    if not (WORD.search(MATH.sub("", answer)) or "\n" in answer):
        return
    named = list(ANSWER_IS.finditer(answer))
    if named:
        yield from stated(sentence_at(answer, named[-1].end()))
        return
    lines = [line for line in answer.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if not MATH.search(last) and MATH.search(answer):
        last = answer
    yield from stated(last)


def sentence_at(text: str, start: int) -> str:
    """From `start` to the end of the sentence; a formula may hold what ends sentences elsewhere."""
    end = start
    for formula in MATH.finditer(text, start):
        stop = SENTENCE_END.search(text, end, formula.start())
        if stop:
            return text[start : stop.start()]
        end = formula.end()
    stop = SENTENCE_END.search(text, end)
    return text[start : stop.start()] if stop else text[start:]


def stated(sentence: str) -> Iterator[str]:
    """What a sentence states: its last formulas, else what comes after its last verb, else its last
    number, or the intervals or tuples that hold it. Nothing where the sentence denies something."""
    if NEGATION.search(MATH.sub("", sentence)):
        return
    yield sentence
    formulas = list(MATH.finditer(sentence))
    if formulas:
        first = len(formulas) - 1
        while first and JOINED.fullmatch(
            sentence, formulas[first - 1].end(), formulas[first].start()
        ):
            first -= 1
        before = sentence[: formulas[first].start()]
        if not HEDGE.search(before):
            yield ", ".join(formula.group() for formula in formulas[first:])
            yield sentence[formulas[first].start() :]  # with its unit
        return
    rest = sentence
    for verb in COPULA.finditer(sentence):
        rest = sentence[verb.end() :]
    rest = FILLER.sub("", rest, count=1) if FILLER.match(rest) else rest
    if rest != sentence:
        yield rest
    value = last_value(rest)
    if value and not HEDGE.search(rest[: value.start()]):
        end = CLAUSE_END.search(rest, value.end() - 1)
        yield rest[value.start() : end.start() if end else None]  # with its unit


def last_value(text: str) -> re.Match | None:
    """The last number of a text, or the intervals or tuples in which it stands."""
    numbers = list(NUMBER.finditer(text))
    if not numbers:
        return None
    place = numbers[-1].start()
    around = (found for found in TUPLES.finditer(text) if found.start() < place < found.end())
    return next(around, numbers[-1])


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{} (or \\fbox{}), in braces or not; None if there is none."""
    starts = [match.end() for match in BOXED.finditer(text)]
    rest = text[starts[-1] :] if starts else ""
    if not rest.startswith("{"):
        bare = BARE.match(rest)
        return bare.group() if bare else None
    depth = 0
    for end, letter in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return rest[1:end].strip() or None
    return None


def spelled(answer: str) -> str:
    """An answer as LaTeX in one spelling, without the markup and punctuation around it."""
    text = "".join(
        letter
        for letter in answer
        if unicodedata.category(letter) not in ("Cc", "Cf") or letter in "\n\t"
    )
    text = re.sub(
        "[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda run: f"^{{{run.group().translate(SUPERSCRIPTS)}}}", text
    )
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉₊₋ₙ]+", lambda run: f"_{{{run.group().translate(SUBSCRIPTS)}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda sign: " " + unicodedata.normalize("NFKC", sign.group()), text)
    text = unicodedata.normalize("NFKC", "".join(SYMBOLS.get(letter, letter) for letter in text))
    text = "".join(SYMBOLS.get(letter, letter) for letter in text)
    text = re.sub(r"(?<=[\w)])\*\*(?=[\w(])", "^", text).replace("**", "")
    text = trimmed(" ".join(text.split()))
    text = re.sub(r"(?<!\\)\$|\\[()\[\]]", " ", text)
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    if not re.search(r"[(\[]|\\\{", text):  # in brackets a comma separates coordinates
        text = THOUSANDS.sub(lambda number: number.group().replace(",", ""), text)
    return trimmed(" ".join(text.split()))


def is_visible(letter: str) -> bool:
    """Whether a character is no control or format character, such as NUL and zero-width space."""
    return letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf")


def trimmed(text: str) -> str:
    """A text without the markup, dollars, punctuation and unmatched brackets around it."""
    before = None
    while text != before:
        before = text
        text = text.strip(" \t\n").rstrip(".,;:*").lstrip("*=:,;").strip()
        if not text.endswith("\\$"):
            text = text.strip("$")
        for left, right in PAIRS:
            if text.startswith(left) and len(text) >= len(left) + len(right):
                text = text[len(left) :].removesuffix(right)
        closer = text[-1:]
        opener = CLOSERS.get(closer)
        if opener and not text.endswith("\\" + closer) and unmatched(text):
            text = text[:-1]
    return text


def unmatched(text: str) -> bool:
    """Whether a text closes more brackets of any kind than it opens; [0, 1) is no such text."""
    return sum(map(text.count, ")]}")) > sum(map(text.count, "([{"))
