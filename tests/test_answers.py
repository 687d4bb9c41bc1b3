"""Tests of data/answers.py:  python -m pytest tests/test_answers.py"""
import time
from fractions import Fraction

import pytest

from data.answers import is_correct, numeric_answer, parse_number, same_number

NUMBERS = {  # what follows "Final answer: " -> the number; as a gold answer, too
    "18": 18, "0": 0, "0.0": 0, "-5": -5, "+5": 5, "10.": 10, "10.00": 10, ".5": Fraction(1, 2), "007": 7,
    "-$5": -5, "$-5": -5, "-US$5": -5, "$29.00": 29, "$ 29": 29, "50%": 50,
    "\N{MINUS SIGN}5": -5, "\N{EN DASH}5": -5, "\N{EN DASH}$5": -5,
    "1.5e3": 1500, "2E-2": Fraction(1, 50),
    # thousands
    "1,234.50": Fraction("1234.5"), "$1,000,000.": 1_000_000, "1,00,000": 100_000, "29 000": 29_000,
    "1\N{NARROW NO-BREAK SPACE}234": 1234, "1_000": 1000, "1'000": 1000, "1.000.000": 1_000_000,
    "1.234,56": Fraction("1234.56"), "1{,}250": 1250, "11,\\!111": 11_111, "12\\,500": 12_500,
    # fractions, mixed numbers
    "1/2": Fraction(1, 2), "-1 / 4": Fraction(-1, 4), "2 2/3": Fraction(8, 3), "5 and 1/2": Fraction(11, 2),
    "3½": Fraction(7, 2), "-½": Fraction(-1, 2), "{7 \\over 2}": Fraction(7, 2), "\\frac12": Fraction(1, 2),
    "\\frac{1}{3}": Fraction(1, 3), "-\\dfrac{1}{2}": Fraction(-1, 2), "2\\frac{2}{3}": Fraction(8, 3),
}
SENTENCES = {  # the same, but more than a number
    "72, in total": 72, "**18** eggs.": 18, "She has 18 eggs": 18, "\n\n  $18\nShe is 7.": 18, "10/3 apples": Fraction(10, 3),
    "$5/hour": 5, "5 e-mails": 5, "18 km/h": 18, "18kg": 18, "5th": 5, "75¢": 75, "18 times as many": 18, "x = 18": 18,
    "18. She is glad.": 18, "Total: $18": 18, "USD 50": 50, "Rs. 50": 50, "about 18": 18, "(18)": 18, "18 seconds": 18,
    # decoration
    "\\boxed{18}": 18, "\\(18\\)": 18, "$18$": 18, "`18`": 18, "_18_": 18, "<b>18</b>": 18, "18<|eot_id|>": 18,
    "-**5**": -5, "-`5`": -5, "\\$18.50": Fraction(37, 2), "\\text{18 eggs}": 18, "18\\text{ eggs}": 18, "18\\%": 18,
    # on a following line: display math, a fence, a list
    "\n\\[\n\\boxed{42}\n\\]": 42, "\\[\n\\boxed{42}\n\\]": 42, "\n```text\n18\n```": 18, "\n\n- **18** eggs": 18, "\n- 18": 18,
    "\n* 18": 18, "18 eggs — that's all.": 18, "18 \N{WHITE HEAVY CHECK MARK}": 18, "18 km/h": 18,
    "\n\n---\n\n72": 72, "\n> **96 clips**": 96, "18 red M&Ms": 18, "$18 — the total": 18, "25 cm²": 25,
    # a dash behind a letter is no minus
    "Total-18": 18, "apples-5": 5,
    # magnitudes
    "2 thousand": 2000, "2.5k": 2500, "$1.2M": 1_200_000, "5 million dollars": 5_000_000, "2 hundred": 200,
}
NOTHING = [  # no number, or one whose value something may change
    "", "twelve", "unknown\n18", "3,4", "12,34", "1,2,3", "0,5", "1,234,5", "1/0", "x2", "-", "1e999", "1e999999999",
    "1e-999999999", "9" * 10_000, "12:00", "2:3", "18:", "5-3", "18 or 19", "18 (3 boxes)", "18. She has 3 left.", "1. 18",
    "3 + 4 = 7", "2x = 10", "5*2", "5**2", "5 **200**", "`5` 200", "5^2", "5²", "5^{2}", "\\sqrt{16}", "2\\sqrt{3}", "5\\pi",
    "\\frac{1}{2}3", "1/2/3", "2 3/2", "1.5 × 10^3", "5x", "5m", "5 K", "5!", "3.333...", "0.\\overline{3}", ">5", "5+",
    "- 5", "—5", "-Rs 5", "Rs.50", "-(5)", "negative 5", "minus 5", "not 18", "half of 18", "18 and a half", "3 quarters",
    "18 dozen", "5 hundred thousand", "18 squared", "eighteen (18)", "CO2: 12 kg", "log_2(8)", "101_{10}", "5'6\"",
    "Total - 18", "1 2345", "5 100-gram bars", "\n- 18\n- 5", "\n- 18\n\n- 5", "\n- 18\r\n\r\n- 5", "CO2 thou\u017fand", "\n1. 18",
    "5 degrees below zero", "$5 bn", "5 mil", "5 mn", "3 mio", "12 twentieths", "tens of 18", "0.33 repeating", "½2",
    "18 - x", "x-18", "n+7", "5 x", "18/x", "5·x", "5⋅x", "5ⁿ", "f(5)", "sqrt(16)", "5(x)", "0.3\N{COMBINING OVERLINE}",
    "0.33 ...", "18 eggs =", "18?", "5'", "18 тысяч", "2 thou\u017fand", "\n* 18\n* 12", "\n(a) 18\n(b) 12",
    "eggs * 2", "price*3", "18 * x", "x**5", "x_5", "a_{12}", "log_{10}", "<18>\n3 hens are left", "\n> 18\n> 12", "7 lac rupees",
    "$1.2 mln", "thrice 5", "5 twelfths", "sqrt 16", "18 divided by x", "18 multiplied by the rate", "none of the 12 eggs are left",
]
HEADINGS = {  # other ways to announce the answer
    "**Final Answer:**\n$18": 18, "**Final Answer**\n18": 18, "## Final Answer\n\n18": 18, "**Final answer** 18": 18,
    "### Final Answer: 18": 18, "Final answer (in dollars): 18": 18, "FINAL ANSWER : 18": 18, "__Final answer:__ 18": 18,
    "\\textbf{Final answer:} 18": 18, "Final answer = 18": 18,
    "Final Answer: The final answer is 18. I hope it is correct.": 18, "The final answer is $\\boxed{18}$.": 18,
    "## The Final Answer\n18": 18, "**The final answer** 18": 18, "So 18 is the final answer\nShe has 3 left.": None,
    "**18 is the final answer** for 3 kids": None, "Step 5: State the final answer\nWe have 3 steps.": None,
    "The final answer is **18 eggs**": 18, "Final answer: 17\nThe final answer is 3 times 6": None,
    "The final answer is what we want": None, "To get the final answer, multiply by 5": None,
    "Final answer: 17. The final answer was wrong, 18": None,
}


def test_example():
    """What it is for: is a rationale right, whatever its strategy?"""
    gold = parse_number("$28.50")
    assert same_number(numeric_answer("cot", "Three cost 3 * $9.50 = $28.50. Final answer: $28.50 in total"), gold)
    assert same_number(numeric_answer("l2m", "What do three cost? 28.5.\nFinal answer: 28.5"), gold)
    assert same_number(numeric_answer("pot", "price = 9.5\nanswer = 3 * price"), gold)
    assert not same_number(numeric_answer("cot", "Three cost $28. Final answer: $28"), gold)
    assert not same_number(numeric_answer("cot", "I do not know."), gold)


@pytest.mark.parametrize("strategy", ["cot", "l2m"])
@pytest.mark.parametrize("text, number", [*NUMBERS.items(), *SENTENCES.items(), *dict.fromkeys(NOTHING).items()])
def test_number_after_the_marker(strategy, text, number):
    answer = numeric_answer(strategy, "There are 3 hens.\nFinal answer: " + text)
    assert answer == number and type(answer) is (type(None) if number is None else Fraction)


@pytest.mark.parametrize("text, number", HEADINGS.items())
def test_headings(text, number):
    assert numeric_answer("cot", "There are 3 hens.\n" + text) == number


def test_the_last_marker_counts_in_any_case():
    assert numeric_answer("cot", "Final answer: 3. No, wait.\nFINAL ANSWER : 4") == 4
    assert numeric_answer("cot", "**Final answer**: 4") == numeric_answer("cot", "**Final answer:** 4") == 4
    assert numeric_answer("cot", "The answer is 3.") is None
    # "İ" is two characters in lower case: positions in text.lower() are not positions in text
    assert numeric_answer("cot", "İİİİ Final answer: 18") == 18


def test_program_answers():
    assert numeric_answer("pot", "answer = 0") == 0
    assert numeric_answer("pot", "answer = 0.5") == Fraction(1, 2)
    for program in ["answer = True", "answer = 1,234", "answer = '18'", "answer = 1e999", "Final answer: 18", ""]:
        assert numeric_answer("pot", program) is None, program


@pytest.mark.parametrize("strategy, text, correct", [
    ("cot", "Final answer: $28.50 in total", True), ("l2m", "Final answer: 28.500000001", True),
    ("pot", "answer = 3 * 9.5", True), ("cot", "Final answer: 28.51", False),
    ("cot", "28.5", False), ("pot", "Final answer: 28.5", False), ("pot", "answer = 1 / 0", False),
    ("cot", "answer = 28.5", False), (None, "Final answer: 28.5", False)])
def test_is_correct(strategy, text, correct):
    """By the number that the text gives in its strategy. A text without one is never correct."""
    assert is_correct(strategy, text, Fraction(57, 2)) is correct


def test_zero_is_an_answer():
    """0 is correct where 0 is asked for; no answer is not."""
    assert is_correct("cot", "Final answer: 0", Fraction(0))
    assert not is_correct("cot", "Final answer: none", Fraction(0))


def test_unknown_strategy_is_named():
    with pytest.raises(ValueError, match="'tot'"):
        is_correct("tot", "Final answer: 18", Fraction(18))
    with pytest.raises(ValueError, match="'tot'"):
        numeric_answer("tot", "Final answer: 18")


def test_parse_number_wants_nothing_but_a_number():
    for text, number in NUMBERS.items():
        assert parse_number(f" {text}\n") == number, text
    assert parse_number("50%.") == 50
    more = ["72, in total", "She has 18 eggs", "$5/hour", "18kg", "2 thousand", "$1.2M", "x = 18", "Total-18"]
    for text in [*more, *NOTHING, "9 (apples)", "17; 8", "2:30", "blue", "5%%", "1 2", "NaN", "inf", "True"]:
        assert parse_number(text) is None, text


def test_same_number():
    same = [(0.07 * 100, 7), (0.0, Fraction(0)), (Fraction(1, 3), 1 / 3), (1e12, 1e12 + 1), (-5, -5), (1e-7, 0)]
    other = [(18, 19), (5, -5), (1e-3, 0), (33.33, Fraction(100, 3)), (1e6, 1e6 + 2), (1e308, 1)]
    never = [(None, None), (None, 0)]
    for a, b in same:
        assert same_number(a, b) and same_number(b, a), (a, b)
    for a, b in other + never:
        assert not same_number(a, b) and not same_number(b, a), (a, b)


def test_monsters_take_no_time():
    n = 200_000
    start = time.thread_time()
    beside = [f"5{signs * (n // 10)} 9" for signs in ("ab/cd", "ab-cd", " ab — cd", "=", "`", ", ", "a.b", " final answer is")]
    for text in ["9" * n, "1," * n, "x1" * n, "$ - " * n, "Final answer: " * n, "1e" + "9" * n, *beside]:
        numeric_answer("cot", "Final answer: " + text)
        parse_number(text)
    assert time.thread_time() - start < 20
