"""From a rationale to its numeric answer, and the comparison of two answers.

    >>> numeric_answer("cot", "She pays 3 * $9.50. Final answer: $28.50 in total.")
    Fraction(57, 2)
    >>> numeric_answer("pot", "answer = 3 * 9.5")
    Fraction(57, 2)
    >>> same_number(numeric_answer("l2m", "Final answer: 1,000 eggs"), parse_number("1000"))
    True

The one place that decides what is correct: `is_correct`. The filter of the teacher's rationales, the filter of the student's
and the evaluation (steps 1 and 6) call it, so they cannot disagree. Read siked.py before; program.py, which evaluates
the programs, after.
Promised: every text is answered in a time linear in its length, and 0 is a value like any other; "nothing" is None.
Not promised: arithmetic after the marker ("Final answer: 3 + 4" is 3), words ("twelve"), mixed numbers ("1 1/2" is 1).
"""

import math
import re
from fractions import Fraction

from data.program import run_program

# Chain of Thought, Least-to-Most, Program of Thought. To add a strategy, add its name, of letters, digits and "_": tags,
# self-generation, mix, measures and report go by this tuple. Its answer is the number after "Final answer:", unless
# numeric_answer is told otherwise. A real teacher also needs eight worked examples, prompts/NAME.txt.
STRATEGIES = ("cot", "l2m", "pot")

# Two answers are the same if they differ by no more than one millionth, or by one millionth of the larger one. Exact
# answers need no tolerance, but programs compute in floats (0.07 * 100 is 7.000000000000001) and texts round.
TOLERANCE = Fraction(1, 1_000_000)

MARKER = re.compile(r"final\s{1,9}answer[\s*]{0,9}:", re.IGNORECASE)  # also "**Final answer**:"

# One number as people write it: "-$5", "1,234.50", "10.", ".5", "1/2", "1.5e3". A letter may not stand before it (the 2
# of "CO2" is no number), and a minus belongs to it only if no letter or digit stands before the minus ("5-3").
DIGITS = r"(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)"
SIGN = r"((?<![\w.])-)?[$€£]?\s?(-)?(?<![A-Za-z_0-9])"
NUMBER = re.compile(rf"{SIGN}({DIGITS})(?:e([-+]?[0-9]+)|\s?/\s?({DIGITS}))?", re.IGNORECASE)
THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9.]+")

MAX_DIGITS = 400  # of one number, and of its exponent's size: a float has at most 309 before its point


def numeric_answer(strategy, text):
    """The answer of a rationale in this strategy, exact, or None if it gives no number.

    cot and l2m: the first number in the first line after the last "Final answer:". pot: what the program leaves in
    `answer`; a float counts with all its digits, so compare answers by same_number. ValueError: an unknown strategy."""
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}: use one of {', '.join(STRATEGIES)}")
    if strategy == "pot":
        value = run_program(text)
        return None if value is None else Fraction(value)
    markers = list(MARKER.finditer(text))
    if not markers:
        return None
    line = text[markers[-1].end():].lstrip().partition("\n")[0].replace("\N{MINUS SIGN}", "-")
    match = NUMBER.search(line)
    return _number(match) if match else None


def is_correct(strategy, text, gold):
    """Whether the text's answer is the gold one. A text without a strategy (None) is never correct."""
    return strategy is not None and same_number(numeric_answer(strategy, text), gold)


def parse_number(text):
    """The number that is all of `text`, such as a gold answer: "18", "-1,234.50", "$5", "1/2", "50%". Else None."""
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    match = NUMBER.fullmatch(text.removesuffix("%").rstrip())
    return _number(match) if match else None


def same_number(a, b):
    """Whether two answers (Fraction, int, float, None) are the same number. None is not, not even the same as None;
    True is not 1; NaN and infinity are no answers."""
    a, b = _exact(a), _exact(b)
    return a is not None and b is not None and abs(a - b) <= TOLERANCE * max(1, abs(a), abs(b))


def _number(match):
    minus, minus_after_currency, digits, exponent, denominator = match.groups()
    parts = [_decimal(digits), _decimal(denominator or "1")]
    if None in parts or parts[1] == 0 or len(exponent or "") > 4 or abs(int(exponent or 0)) > MAX_DIGITS:
        return None
    sign = -1 if minus or minus_after_currency else 1
    return sign * parts[0] / parts[1] * Fraction(10) ** int(exponent or 0)


def _decimal(digits):
    """The Fraction in "1,234.50". None if commas do not group thousands ("3,4" is two numbers), and for monsters."""
    digits = digits.rstrip(",")
    if len(digits) > MAX_DIGITS or not THOUSANDS.fullmatch(digits):
        return None
    return Fraction(digits.replace(",", "").rstrip("."))


def _exact(value):
    if type(value) is float:
        return Fraction(value) if math.isfinite(value) else None
    return Fraction(value) if type(value) in (int, Fraction) else None
