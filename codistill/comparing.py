"""Whether two answers are the same: as text, as quantities, else as mathematics."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from codistill.answers import NEGATION, answers_in, spelled
from codistill.mathematics import is_readable, rounds_to, same_mathematics

GRADER_VERSION = 3
"""Rises with every change of what is called right; results and caches of grading name it."""

MAX_LENGTH = 1000
"""Characters of an answer; a longer one is wrong, unless the gold answer is nearly as long."""
MAX_EXPONENT = 5000
PLAIN_DIGITS = 6
"""A decimal with at least so many significant digits may stand for a number that rounds to it."""

PROBE = "987654321"
"""What gold answers are compared with before a run; no right answer."""

OPTION = re.compile(r"\(?([A-J])\)?")
CHOICE = re.compile(r"(?:option |choice )?\(?([A-J])(?:$|[.):] ?.*)", re.IGNORECASE)
IN_TEXT = re.compile(r"\\text\{([^{}]*)\}")
WORDS = re.compile(r"[A-Za-z]{2,}(?:[ -][A-Za-z]{2,})*")
VERBS = r"(?:is|are|has|have|was|were|had|wins|won|runs|ran|will|does|did|can)\b"
BASE = re.compile(r"([0-9A-Fa-f]+) ?_ ?\{? ?(\d{1,2}) ?\}?")
DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
NUMBER = re.compile(
    rf"(?P<sign>[-+]?) ?(?:(?P<decimal>{DECIMAL})(?: ?\\times 10\^\{{(?P<exponent>-?\d+)\}})?"
    r"|10\^\{?(?P<power>-?\d+)\}?"
    r"|\\frac ?(?:\{ ?(?P<a>\d+) ?\}|(?P<b>\d)) ?(?:\{ ?(?P<c>\d+) ?\}|(?P<d>\d))"
    rf"|(?P<over>{DECIMAL}) ?/ ?(?P<under>\d+))"
)
SET_BUILDER = re.compile(r"\\\{.*(?:\||\\mid|:).*\\\}")
DOTS = re.compile(r"\\(?:[lc]?dots|dots[a-z]?)(?![A-Za-z])|\.\.")
CLOCK = re.compile(r"(?<!\d)\d{1,2}:\d{2}(?!\d)")
EQUALS = re.compile(r"(?<![<>!:])=")
SYMBOL = re.compile(
    r"(?:[A-Za-z]|\\[a-z]+)'*(?:_(?:\w|\{[^{}]*\}))? ?(?:\([A-Za-z0-9, ]{1,9}\))? ?"
)
MEMBER_OF = re.compile(r"[A-Za-z] ?\\in ?(?=[\[(\\])")

LETTER_UNITS = frozenset("m s g h L N J W V K A C F".split())
UNITS = frozenset(
    "cm mm km dm nm ft in inch foot feet yd yard mile mi mph kmph kg mg lb pound oz ounce ml liter"
    " litre gallon hr hour min minute sec second ms day week month year cent dollar degree radian"
    " unit meter metre centimeter kilometer millimeter gram kilogram erg ergs eV keV MeV Hz kHz MHz"
    " Pa kPa mol sq square cubic point percent rad deg people student apple pc kpc Mpc AU".split()
)
SAME_UNITS = {
    **dict.fromkeys(("inches", "inch", "in"), "in"),
    **dict.fromkeys(("feet", "foot", "ft"), "ft"),
    **dict.fromkeys(("degree", "degrees", "deg"), ""),
    **dict.fromkeys(("centimeter", "centimetre", "cm"), "cm"),
    **dict.fromkeys(("meter", "metre", "m"), "m"),
    **dict.fromkeys(("kilometer", "kilometre", "km"), "km"),
    **dict.fromkeys(("millimeter", "millimetre", "mm"), "mm"),
    **dict.fromkeys(("hour", "hr", "h"), "h"),
    **dict.fromkeys(("minute", "min"), "min"),
    **dict.fromkeys(("second", "sec", "s"), "s"),
    **dict.fromkeys(("gram", "g"), "g"),
    **dict.fromkeys(("kilogram", "kg"), "kg"),
}
NO_UNITS = frozenset(
    "or and not nor to plus minus times over by squared cubed mod choose pi sqrt sin cos tan log ln"
    " exp if when for with than but where thousand hundred dozen million billion trillion mmod"
    " infinity base half halves third thirds quarter quarters from".split()
)
UNIT_WORD = r"(?:\\text\{[A-Za-z. ]*\}|[A-Za-z]+)(?: ?\^ ?\{?-?\d\}?)?"
QUANTITY = re.compile(
    r"(?P<value>.*?(?:[\d.)\]}!]|\\pi|\\infty))(?P<space> ?)"
    rf"(?P<unit>{UNIT_WORD}(?:(?: ?/ ?| ?\\cdot ?| ){UNIT_WORD})*)"
)


def is_correct(text: str, answers: Sequence[str]) -> bool:
    """Whether `text` gives one of the gold `answers`, as mathematics, not as a string.

    A text without an answer is wrong.

    Raises:
        ValueError: a gold answer has nothing that can be compared.
        Exception: whatever math-verify, or sympy below it, raises on the prediction.
    """
    golds = [checked(answer) for answer in answers]
    given = answers_in(text)
    return any(same(gold, passage) for gold in golds for passage in given)


def checked(gold: str) -> str:
    """A gold answer in one spelling. Raises ValueError if nothing is left of it."""
    text = spelled(gold)
    if not text:
        raise ValueError(f"nothing can be compared with the gold answer {gold!r}")
    return text


def is_only_text(answer: str) -> bool:
    """Whether a gold answer is no mathematics, so that only the same text is right.

    It is compared with a number, so that one whose comparisons never end is found here.

    Raises:
        ValueError: it has nothing that can be compared.
    """
    same(checked(answer), PROBE)
    gold = Answer.of(checked(answer), is_gold=True)
    known = gold.number is not None or gold.digits is not None or is_word_or_option(gold.text)
    return not known and (has_no_value(gold.text) or not is_readable(gold.value))


def same(gold: str, passage: str) -> bool:
    """Whether a passage of a completion is the gold answer (in one spelling)."""
    if len(passage) > max(MAX_LENGTH, 2 * len(gold)):
        return False
    text = spelled(passage)
    name, _, named = text.partition("=")  # N = X says X
    texts = [text, text.rstrip("! "), named.strip() if SYMBOL.fullmatch(name.strip()) else text]
    if is_word_or_option(gold):
        return any(same_words(gold, each) for each in texts)
    if plain(gold) in map(plain, texts):
        return True
    if not text or NEGATION.search(text) or has_no_value(gold) or has_no_value(text):
        return False
    return any(
        same_quantity(Answer.of(one, is_gold=True), Answer.of(other))
        for one, other in readings(gold, text)
    )


def plain(text: str) -> str:
    """A spelling without the spaces and braces that mean nothing."""
    text = re.sub(r"(?<=\d) (?=\d)", "_", IN_TEXT.sub(r"\1", text)).replace(" ", "")
    text = re.sub(r"([_^])\{(\w)\}(?!\w)", r"\1\2", text)
    return re.sub(r"\\frac(?:\{(\d)\}|(\d))(?:\{(\d)\}|(\d))", r"\\frac\1\2/\3\4", text)


def is_word_or_option(gold: str) -> bool:
    """Whether a gold answer is a word, or the letter of an option. Letters without a vowel, such as
    xy, are a product."""
    text = IN_TEXT.sub(r"\1", gold).strip()
    if OPTION.fullmatch(text):
        return True
    vowels = all(re.search("[aeiou]", word, re.IGNORECASE) for word in re.split("[ -]", text))
    return bool(WORDS.fullmatch(text)) and (vowels or "\\text" in gold)


def same_words(gold: str, text: str) -> bool:
    """Whether a text is these words, or a sentence that begins with them as its subject.

    The letter of an option may be followed by what the option says: B. 12.
    """
    gold, text = (" ".join(IN_TEXT.sub(r" \1 ", each).split()) for each in (gold, text))
    option, choice = OPTION.fullmatch(gold), CHOICE.fullmatch(text)
    if option:
        return choice is not None and choice[1] == option[1]
    word = re.escape(gold)
    statement = re.compile(rf"(?:(?:the|an?) )?{word}(?: {VERBS}.*)?", re.IGNORECASE)
    return not NEGATION.search(text) and bool(statement.fullmatch(text))


def has_no_value(text: str) -> bool:
    """Whether an answer is of a kind that math-verify misreads: a set by its property, a sequence
    with dots, a time of day."""
    return bool(SET_BUILDER.search(text) or DOTS.search(text) or CLOCK.search(text))


def readings(gold: str, text: str) -> Iterator[tuple[str, str]]:
    """Pairs to compare: an answer may name what it is equal to (N = 5) where the gold does not, and
    the reverse."""
    gold, text = MEMBER_OF.sub("", gold), MEMBER_OF.sub("", text)
    ours, theirs = EQUALS.split(gold), EQUALS.split(text)
    if len(theirs) == len(ours):
        for end in ("", "!"):
            yield gold, text.removesuffix(end).strip()
    elif len(theirs) > len(ours):
        if "," not in text:
            yield gold, "=".join(theirs[-len(ours) :]).strip()
        elif len(theirs) == len(ours) + 1 and SYMBOL.fullmatch(theirs[0].strip()):
            yield gold, "=".join(theirs[1:]).strip()
        else:
            yield gold, text
    elif len(ours) == 2 and len(theirs) == 1 and SYMBOL.fullmatch(ours[0].strip()):
        yield ours[1].strip(), text


@dataclass(frozen=True)
class Answer:
    """An answer in one spelling, taken apart."""

    text: str
    value: str
    """The text without unit, percent sign and base."""
    unit: str
    is_percent: bool
    digits: str | None
    """The digits of a number with a base, such as 52_8; None for base ten."""
    base: str
    number: Fraction | None
    """The exact value of a plain number."""

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(text: str, *, is_gold: bool = False) -> "Answer":
        value, unit = split_unit(text, is_gold=is_gold)
        is_percent = value.endswith("%")
        value = value.rstrip("% ")
        based = BASE.fullmatch(value)
        digits, base = (based[1].upper(), based[2]) if based else (None, "10")
        if digits and base == "10":
            value, digits = digits, None
        return Answer(text, value, unit, is_percent, digits, base, number_of(value))


def split_unit(text: str, *, is_gold: bool) -> tuple[str, str]:
    """Value and unit, "" where there is none: 27 m^2 -> ("27", "m^2").

    In a gold answer a letter is a variable, unless it is marked as text. In an answer to it any
    word after a space is a unit.
    """
    if text.startswith("\\$"):
        return text.removeprefix("\\$").strip(), "dollar"
    found = QUANTITY.fullmatch(text)
    if not found:
        return text, ""
    unit = found["unit"]
    words = re.findall("[A-Za-z]+", IN_TEXT.sub(r" \1 ", unit))
    if not words or NO_UNITS & {word.lower() for word in words}:
        return text, ""
    first = words[0]
    is_known = bool({first, first.lower(), first.lower().rstrip("s")} & UNITS)
    is_letter = first in LETTER_UNITS and not is_gold
    is_word = len(first) > 2 and bool(found["space"]) and not is_gold
    if not (unit.startswith("\\text") or is_known or is_letter or is_word):
        return text, ""
    return found["value"], unit_name(unit)


def unit_name(unit: str) -> str:
    """A unit in one spelling."""
    words = re.sub(r"[{} ]*\^[{ ]*(-?\d)\}?", r"^\1", IN_TEXT.sub(r" \1 ", unit)).split()
    names = [word if len(word) < 4 else word.lower().rstrip("s") for word in words]
    return " ".join(SAME_UNITS.get(name, name) for name in names).strip()


def same_unit(gold: str, unit: str) -> bool:
    """Whether a unit is missing, or goes on where the other ends: cent, cent per ounce."""
    return (
        not gold
        or not unit
        or f"{unit} ".startswith(f"{gold} ")
        or f"{gold} ".startswith(f"{unit} ")
    )


def number_of(value: str) -> Fraction | None:
    """The exact value of a number: 12, .5, 3 \\times 10^{4}, 1/2, \\frac{1}{2}; else None."""
    found = NUMBER.fullmatch(value)
    if (
        not found
        or max(abs(int(found[name] or 0)) for name in ("exponent", "power")) > MAX_EXPONENT
    ):
        return None
    sign = -1 if found["sign"] == "-" else 1
    if found["decimal"]:
        return sign * Fraction(found["decimal"].rstrip(".")) * power(found["exponent"])
    if found["power"]:
        return sign * power(found["power"])
    over = found["over"] or found["a"] or found["b"]
    under = found["under"] or found["c"] or found["d"]
    return sign * Fraction(over.rstrip(".")) / int(under) if int(under) else None


def power(exponent: str | None) -> Fraction:
    return Fraction(10) ** int(exponent or 0)


def same_quantity(gold: Answer, answer: Answer) -> bool:
    """Whether two answers have the same value, and no other unit or base."""
    if gold.digits or answer.digits:
        return (gold.digits, gold.base) == (answer.digits, answer.base)
    if not same_unit(gold.unit, answer.unit):
        return False
    if same_value(gold, answer):
        return True
    if gold.unit != answer.unit and same_mathematics(gold.text, answer.text):
        return True  # what looks like a unit is a variable of both
    if gold.is_percent == answer.is_percent:
        return False
    whole, part = (answer, gold) if gold.is_percent else (gold, answer)
    return same_value(whole, hundredth(part))


def hundredth(answer: Answer) -> Answer:
    return Answer.of(f"\\frac{{{answer.value}}}{{100}}")


def same_value(gold: Answer, answer: Answer) -> bool:
    """Whether two values are equal: numbers exactly, the rest as mathematics."""
    if gold.number is not None and answer.number is not None:
        if gold.number == answer.number:
            return True
    elif same_mathematics(gold.value, answer.value):
        return True
    return any(
        is_long_decimal(one.value) and "." not in other.value and rounds_to(other.value, one.value)
        for one, other in ((gold, answer), (answer, gold))
    )


def is_long_decimal(value: str) -> bool:
    """Whether this is a decimal with so many digits that it may be rounded from another number."""
    if not re.fullmatch(r"[-+]? ?\d*\.\d+", value):
        return False
    return len(re.sub(r"\D", "", value).lstrip("0")) >= PLAIN_DIGITS
