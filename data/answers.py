"""From a rationale to its numeric answer, and the comparison of two answers.

    >>> numeric_answer("cot", "She pays 3 * $9.50. Final answer: $28.50 in total.")
    Fraction(57, 2)
    >>> numeric_answer("pot", "answer = 3 * 9.5")
    Fraction(57, 2)
    >>> same_number(numeric_answer("l2m", "Final answer: 1,000 eggs"), parse_number("1000"))
    True

The one place that decides what is correct: `is_correct`. The filter of the teacher's rationales,
the filter of the student's and the evaluation (steps 1 and 6) call it, so they cannot disagree.
Read siked.py before; program.py, which evaluates the programs, after.

The rule for cot and l2m: behind the last "Final answer:", in the first line that is more than
decoration, stands one number, and nothing that may change its value. Else the answer is None. So
the filter loses a text now and then, but hardly ever keeps a wrong one.

Promised: every text is answered in a time linear in its length, and 0 is a value like any other;
"nothing" is None.
"""
import re
from fractions import Fraction

from data.program import run_program

# Chain of Thought, Least-to-Most, Program of Thought. To add a strategy, add its name: letters,
# digits and "_", and not the name of a mix. Tags, self-generation, mix, measures and report go by
# this tuple. Its answer is the number after "Final answer:", unless numeric_answer is told
# otherwise. A real teacher also needs eight worked examples, prompts/NAME.txt.
STRATEGIES = ("cot", "l2m", "pot")

# Two answers are the same if they differ by no more than one millionth, or by one millionth of the
# larger one. Exact answers need no tolerance, but programs compute in floats (0.07 * 100 is
# 7.000000000000001) and texts round.
TOLERANCE = Fraction(1, 1_000_000)
MAX_DIGITS = 400  # of one number, and of its exponent's size: a float has at most 309 before the .

MENTION = re.compile(r"final\s{1,9}answer", re.IGNORECASE)
# A mention that announces the answer: by a colon, the end of bold print, or the end of the line.
MARKER = re.compile(MENTION.pattern + r"(?: ?\([^()\n]{0,40}\))?"
                    r"(?:[\s*_]{0,9}[:=]|\*\*|[ *_]{0,9}$)", re.IGNORECASE | re.MULTILINE)

FRACTIONS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4"}
# What people and LaTeX write -> the same in plain signs; decoration -> "|". It is not just deleted:
# "5**2" must not become 52.
PLAINER = [
    ("[\N{MINUS SIGN}\N{EN DASH}\N{HYPHEN}\N{NON-BREAKING HYPHEN}]", "-"),
    (r"\{,\}|,\\!", ","),
    ("\\\\[,;: ]|~|[\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}\t\r]", " "),
    (r"(?<=[0-9]) ?(?=\\[dt]?frac|[½⅓⅔¼¾])", " "),   # mixed: "2\frac{1}{3}"
    *FRACTIONS.items(),
    (r"\\[dt]?frac ?\{(-?[0-9.,]+)\} ?\{([0-9.,]+)\}", r"\1/\2|"),
    (r"\\[dt]?frac ?([0-9]) ?([0-9])", r"\1/\2|"),
    (r"\{(-?[0-9.,]+) ?\\over ?([0-9.,]+)\}", r"\1/\2|"),
    (r"\\%", "%"),
    (r"```[a-z]*$|<[^<>\n]{0,40}>", "|"),                           # a fence, a tag
    (r"\\(?:[a-z]?box|boxed|text|text[a-z]{2}|math[a-z]{2}|left|right|displaystyle|quad)\b", "|"),
    (r"(?:\b(?:US|CA|AU|NZ|A|C))?\\?\$|[€£¥₹]", "|"),
    (r"\\[()\[\]!\\]|[*`#{}|]|(?<![0-9])_|_(?![0-9])", "|"),
]

# A stretch of digits with what may stand between them, and one number: "-5", "1.5e3", "7/2",
# "2 2/3", "2 and 2/3". A space counts if exactly three digits follow.
DIGITS = r"\.?[0-9](?:[.,_']?[0-9]| (?=[0-9]{3}(?![0-9/-])))*"
NUMBER = re.compile(rf"(?:(?P<sign>[-+])\|*)?(?P<digits>{DIGITS})"
                    r"(?:e(?P<exponent>[-+]?[0-9]{1,3})\b"
                    rf"| ?/ ?(?P<denominator>{DIGITS})"
                    r"| (?:and )?(?P<part>[0-9]{1,9})/(?P<parts>[0-9]{1,9})\b)?", re.IGNORECASE)
SPELLINGS = (  # of digits; the signs that group thousands; the decimal point
    (r"[0-9]*\.?[0-9]+", "", "."),                                          # 1234.5, .5
    (r"[1-9][0-9]{0,2}(?:,[0-9]{2,3})*,[0-9]{3}(?:\.[0-9]+)?", ",", "."),   # 1,234.5; 1,00,000
    (r"[1-9][0-9]{0,2}(?:[ _'][0-9]{3})+(?:\.[0-9]+)?", " _'", "."),        # 1 234.5, 1_234
    (r"[1-9][0-9]{0,2}(?:\.[0-9]{3})+,[0-9]+", ".", ","),                   # 1.234,5
    (r"[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,}", ".", ","),                       # 1.234.567
)
MAGNITUDES = {"k": 10 ** 3, "m": 10 ** 6, "b": 10 ** 9, "hundred": 100, "thousand": 10 ** 3,
              "million": 10 ** 6, "billion": 10 ** 9, "trillion": 10 ** 12}
MAGNITUDE = re.compile(r"\|*(?: ?(hundred|thousand|million|billion|trillion)s?|k|(?-i:[MB]))"
                       r"(?![a-z])", re.IGNORECASE | re.ASCII)

ITEM = re.compile(r"[| ]*[-+•] +")  # of a list

# What may change the value of a number that it stands before, or behind.
SIGNS_BEFORE = re.compile(r"[\\^<>+±×÷√…—/%]|(?<![A-Za-z])-|-(?![A-Za-z])|[.,]$")
SIGNS_BEHIND = re.compile(r"[\\^<>+±×÷√…=]|\.\.|^\|*([-—:!]|[A-Za-z](?![A-Za-z])| [kKMB]\b)")
NUMBER_WORDS = set("""
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred
    hundreds thousand thousands million millions billion billions trillion trillions lakh lakhs
    crore crores dozen dozens half halves third thirds quarter quarters fourth fourths fifth fifths
    sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths
    thousandth thousandths point plus minus negative not twice double triple squared cubed root
    factorial pi below bn mil mn
""".split())


def numeric_answer(strategy, text):
    """The answer of a rationale in this strategy, exact, or None if it gives no number.

    cot and l2m: see the rule above. pot: what the program leaves in `answer`; a float counts with
    all its digits, so compare answers by same_number. ValueError: an unknown strategy."""
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}: use one of {', '.join(STRATEGIES)}")
    if strategy == "pot":
        value = run_program(text)
        return None if value is None else Fraction(value)
    mentions = list(MENTION.finditer(text))
    marker = MARKER.match(text, mentions[-1].start()) if mentions else None
    return number_behind(text, marker)[0] if marker else None


def is_correct(strategy, text, gold):
    """Whether the text's answer is the gold one. A text without a strategy (None) never is."""
    return strategy is not None and same_number(numeric_answer(strategy, text), gold)


def parse_number(text):
    """The number that is all of `text`, such as a gold answer: "18", "-1,234.50", "$5", "1/2",
    "50%". Else None."""
    line = plain(text.strip().removesuffix("%").removesuffix("."))
    match = NUMBER.fullmatch(line.strip("| "))
    return number_in(match) if match else None


def same_number(a, b):
    """Whether two answers are the same number. None is not, not even the same as None."""
    if a is None or b is None:
        return False
    return abs(a - b) <= TOLERANCE * max(1, abs(a), abs(b))


def plain(text):
    for pattern, plainer in PLAINER:
        text = re.sub(pattern, plainer, text)
    return text


def number_behind(text, marker):
    """(the number behind this marker or None, the place in the text where its line ends)."""
    lines = re.compile(".+").finditer(text, marker.end())
    lines = [line for line in lines if line[0].strip()]
    for i, match in enumerate(lines):
        line = plain(match[0])
        item = ITEM.match(line) if match.start() > marker.end() else None  # in a list "- 18" is 18
        if item:
            line = line[item.end():]
            if i + 1 < len(lines) and ITEM.match(plain(lines[i + 1][0])):
                break  # of several items none is the answer
        if line.strip("| "):
            return only_number(line), match.end()
    return None, len(text)


def only_number(line):
    """The one number in a plain line. None: there is none, there are several, or something beside
    it may change its value."""
    match = NUMBER.search(line)
    value = number_in(match) if match else None
    if value is None:
        return None
    before = line[:match.start()]
    behind = line[match.end():]
    in_word = before[-1:].isalpha()
    if in_word:
        value = abs(value)  # "Total-18"
    magnitude = MAGNITUDE.match(behind)
    if magnitude:
        value *= MAGNITUDES[magnitude[0].strip("| ").lower().removesuffix("s")]
        behind = behind[magnitude.end():]
    beside = f"{before} {behind}".lower()
    if (in_word and not match["sign"]  # "CO2"
            or SIGNS_BEFORE.search(before) or SIGNS_BEHIND.search(behind)
            or any(map(str.isnumeric, beside))
            or NUMBER_WORDS & set(re.findall("[a-z]+", beside))):
        return None
    return value


def number_in(match):
    """The value of a match of NUMBER. None: "3,4" may be two numbers, "1/0" is none."""
    value = digits_value(match["digits"])
    exponent = int(match["exponent"] or 0)
    if value is None or abs(exponent) > MAX_DIGITS:
        return None
    value *= Fraction(10) ** exponent
    if match["denominator"]:
        denominator = digits_value(match["denominator"])
        if not denominator:
            return None
        value /= denominator
    if match["parts"]:
        part = int(match["part"])
        parts = int(match["parts"])
        if not match["digits"].isdecimal() or part >= parts:
            return None
        value += Fraction(part, parts)
    return -value if match["sign"] == "-" else value


def digits_value(digits):
    if len(digits) <= MAX_DIGITS:
        for spelling, groups, point in SPELLINGS:
            if re.fullmatch(spelling, digits):
                plainer = str.maketrans(point, ".", groups)  # the last are deleted
                return Fraction(digits.translate(plainer))
    return None
