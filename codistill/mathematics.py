"""What math-verify and sympy make of a formula, guarded against what they get wrong.

math-verify reads only whole formulas here, never a part of one, and numbers are exact: a decimal is
the fraction that it writes. Expressions are compared by their values to 40 digits, relative to
their size; where they have none, as sets, tuples, relations and matrices, math-verify decides.
Both libraries are imported at the first formula: reading them takes a second.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

MAX_DEPTH = 20
"""A formula with deeper brackets is not read: its parser would take minutes."""
MAX_DIGITS = 2000
DIGITS = 40
TOLERANCE = 1e-25
"""Relative difference of two values that are equal: far above the rounding of `DIGITS` digits."""
LARGEST_EXACT = 10**2000
"""Larger numbers are equal where `DIGITS` digits are: all digits would take too long."""
PROBES = 4
INTEGER_PROBES = 12
# The time limit is that of `Grader`, so math-verify's own is off.
OPTIONS: dict[str, Any] = dict(parsing_timeout=None, raise_on_error=True)
FRACTION = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?![\d.])")
PROSE = re.compile(r"(?<![\\\\A-Za-z])[A-Za-z]{2,} [A-Za-z]{2,}")
TWO_NUMBERS = re.compile(r"\d +[\d.]")


def is_readable(text: str) -> bool:
    """Whether math-verify can read a whole formula."""
    return read(text) is not None


@lru_cache(maxsize=4096)
def read(text: str) -> Any:
    """The sympy object of a whole formula; None where math-verify reads none, or no value."""
    from math_verify import LatexExtractionConfig, parse
    from math_verify.parser import NormalizationConfig
    from sympy import nan, zoo

    if not is_balanced(text) or TWO_NUMBERS.search(text) or PROSE.search(text):
        return None
    steps = NormalizationConfig(basic_latex=True, malformed_operators=True, boxed="last")
    whole = LatexExtractionConfig(
        try_extract_without_anchor=False, boxed_match_priority=0, normalization_config=steps
    )
    boxed = f"\\boxed{{{exact_decimals(text)}}}"
    found = parse(boxed, [whole], fallback_mode="no_fallback", **OPTIONS)
    return with_named_derivatives(found[0]) if found and not found[0].has(nan, zoo) else None


def with_named_derivatives(formula: Any) -> Any:
    """Each derivative as a symbol: sympy would find that dx/dt is 0, as x does not name t."""
    from sympy import Derivative, Symbol

    if not formula.has(Derivative):
        return formula
    return formula.xreplace({part: Symbol(str(part)) for part in formula.atoms(Derivative)})


def is_balanced(text: str) -> bool:
    """Whether braces are in pairs and no bracket is too deep for the parser."""
    depth = braces = 0
    for letter in re.sub(r"\\\\[{}]", "", text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        braces += {"{": 1, "}": -1}.get(letter, 0)
        if braces < 0 or depth > MAX_DEPTH:
            return False
    return braces == 0 and not re.search(rf"\d{{{MAX_DIGITS}}}", text)


def exact_decimals(text: str) -> str:
    """Decimals as fractions of integers: 0.25 -> \\frac{25}{100}. A float would be rounded."""
    text = re.sub(r"\^ ?(-?\d*\.\d+)", r"^{\1}", text)
    return FRACTION.sub(
        lambda found: rf"\frac{{{int(found[1] + found[2])}}}{{{10 ** len(found[2])}}}", text
    )


def same_mathematics(gold: str, answer: str) -> bool:
    """Whether two formulas are equal; False where one cannot be read."""
    from math_verify import verify

    one = read(gold)
    other = None if one is None else read(answer)
    if one is None or other is None:
        return False
    if is_list(gold) and is_list(answer) and members(gold) != members(answer):
        return False  # a set forgets that a member is there twice
    verdict = equal(one, other)
    if verdict is not None:
        return verdict
    # verify is not symmetric: the gold answer comes first.
    return verify(one, other, timeout_seconds=None, raise_on_error=True)


def is_list(text: str) -> bool:
    """Whether a formula is a list without brackets."""
    return members(text) > 1 and not re.search(r"[(\[{]|\\pm", text)


def members(text: str) -> int:
    """How many members a list has, equal ones included."""
    return 1 + len(re.findall(r",? ?\b(?:and|or)\b|,", text))


def rounds_to(text: str, decimal: str) -> bool:
    """Whether a formula without variables is the decimal when rounded to as many places."""
    from sympy import Expr, Rational

    value = read(text)
    if not isinstance(value, Expr) or value.free_symbols:
        return False
    half = Rational(1, 2 * 10 ** len(decimal.partition(".")[2]))
    return bool(abs(value - Rational(decimal.replace(" ", ""))).evalf(DIGITS) <= half)


def equal(gold: Any, answer: Any) -> bool | None:
    """Whether two sympy objects are equal; None where math-verify has to decide."""
    from sympy import Expr, Interval, MatrixBase, Tuple
    from sympy import FiniteSet as Set

    if isinstance(gold, Expr) and isinstance(answer, Expr):
        return equal_expressions(gold, answer)
    if isinstance(gold, Set) and isinstance(answer, Set):
        return equal_sets(list(gold.args), list(answer.args))
    if isinstance(gold, Interval) and isinstance(answer, Interval):
        if (gold.left_open, gold.right_open) != (answer.left_open, answer.right_open):
            return False
        return equal_rows(gold.args[:2], answer.args[:2])
    if isinstance(gold, Tuple) and isinstance(answer, Tuple):
        return equal_rows(gold.args, answer.args)
    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
        return gold.shape == answer.shape and equal_rows(list(gold), list(answer))
    return None


def equal_rows(gold: Any, answer: Any) -> bool | None:
    """Whether two rows have equal members in the same places."""
    if len(gold) != len(answer):
        return False
    verdicts = [equal(one, other) for one, other in zip(gold, answer, strict=True)]
    if False in verdicts:
        return False
    return None if None in verdicts else True


def equal_sets(gold: list, answer: list) -> bool | None:
    """Whether each member of one set is equal to one of the other."""
    if len(gold) != len(answer):
        return False
    rest = list(answer)
    for one in gold:
        verdicts = [equal(one, other) for other in rest]
        if True in verdicts:
            rest.pop(verdicts.index(True))
        elif None in verdicts:
            return None
        else:
            return False
    return True


def equal_expressions(gold: Any, answer: Any) -> bool | None:
    """Whether two expressions are equal: numbers exactly, others by their values where their
    symbols are numbers; None where they have no values."""
    from sympy import Derivative, Integral, Limit
    from sympy.core.function import AppliedUndef

    if gold.is_Rational and answer.is_Rational:
        return gold == answer
    if any(each.has(AppliedUndef, Derivative, Integral, Limit) for each in (gold, answer)):
        return None
    if {s.name for s in gold.free_symbols} != {s.name for s in answer.free_symbols}:
        return None
    seen = False
    for one, other in zip(values(gold, answer), values(answer, gold), strict=True):
        if not (one.is_number and one.is_finite and other.is_number and other.is_finite):
            continue
        size = max(abs(one), abs(other))
        if abs(one - other) > TOLERANCE * size:
            return False
        seen = True
    if seen and not gold.free_symbols and max(abs(one), abs(other)) < LARGEST_EXACT:
        one, other = gold.doit(), answer.doit()
        return one == other if one.is_Rational and other.is_Rational else True
    return True if seen else None


def values(expression: Any, partner: Any) -> Iterator[Any]:
    """The values of an expression at fixed places, the same for the same names of symbols.

    Where one of the two counts something (floor, factorial), symbols are whole numbers.
    """
    from sympy import Abs, Integer, Mod, Rational, binomial, ceiling, factorial, floor

    counting = any(e.has(floor, ceiling, factorial, binomial, Mod) for e in (expression, partner))
    signed = any(e.has(Abs) for e in (expression, partner))
    symbols = sorted(expression.free_symbols, key=lambda symbol: symbol.name)
    for probe in range((INTEGER_PROBES if counting else PROBES) if symbols else 1):
        places = {}
        for number, symbol in enumerate(symbols):
            place = Rational(7 * probe + 5 * number + 3, 11 + 2 * number)
            if counting:  # in either order, as the factorial of one less another is often none
                order = number if probe % 2 else len(symbols) - 1 - number
                place = Integer(probe + 7 + 3 * order)
            places[symbol] = -place if signed and probe % 2 else place
        yield expression.subs(places).evalf(DIGITS)
