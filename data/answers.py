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

The rule for cot and l2m: the last "final answer" of the text must announce one. Behind it, in the
first line that is more than decoration, stands one number; beside it only signs that leave it as it
is, and words, but no NUMBER_WORD. Else the answer is None. So the filter loses a text now and then,
but hardly ever keeps a wrong one.

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

MENTION = re.compile(r"final\s{1,9}answer", re.IGNORECASE)
REMARKED = MENTION.pattern + r"(?: ?\([^()\n]{0,40}\))?"
# A mention that announces the answer: "Final answer (in dollars):", "the final answer is 18"; or at
# the end of bold print or of a line, "## Final answer", but not "18 is the final answer".
MARKER = re.compile(rf"{REMARKED}(?:[\s*_]{{0,9}}[:=]| is(?=(?:\\boxed|[^a-z0-9\n]){{1,9}}[0-9]))"
                    rf"|(?<![a-z0-9,] the ){REMARKED}(?:\*\*|[ *_]{{0,9}}$)",
                    re.IGNORECASE | re.MULTILINE)
# What begins a line of a list, or a quotation.
ITEM = re.compile(r"^[ *]*(?:[-+*•>]|\(?[A-Za-z]\)) +", re.MULTILINE)

# What people and LaTeX write -> the same in plain signs; decoration -> "`". It is not just deleted:
# "5**2" must not become 52.
PLAINER = [
    (r"\b\*+\b|(?<=\w) \*+ (?=\w)", "×"),
    ("[\N{MINUS SIGN}\N{EN DASH}\N{HYPHEN}\N{NON-BREAKING HYPHEN}]", "-"),
    (r"\{,\}|,\\!", ","),
    ("\\\\[,;: ]|~|[\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}\t\r]", " "),
    (r"(?<=[0-9]) ?(?=\\[dt]?frac|[½⅓⅔¼¾])", " "),   # mixed: "2\frac{1}{3}"
    ("½", "1/2`"), ("⅓", "1/3`"), ("⅔", "2/3`"), ("¼", "1/4`"), ("¾", "3/4`"),
    (r"\\[dt]?frac ?(?:\{([^{}]*)\}|([0-9])) ?(?:\{([^{}]*)\}|([0-9]))", r"\1\2/\3\4`"),
    (r" ?\\over\b ?", "/"),
    (r"```[a-z]*$|<(?![0-9 ])[^<>\n]{0,40}>", "`"),                  # a fence, a tag
    (r"\\(?:[a-z]?box|boxed|text|text[a-z]{2}|math[a-z]{2}|left|right|displaystyle|quad)\b", "`"),
    (r"(?:\b(?:US|CA|AU|NZ|A|C))?\\?\$|[€£¥₹]", "`"),
    (r"\\[()\[\]!\\]|[*#{}]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9{])", "`"),
    (r"(?<=[0-9`]) ?\\?%", " percent "),
    (r"(?<=[a-z]{2})-(?=`*[0-9])", " "),                            # no minus: "Total-18"
    (r"(?<![0-9.,])[1-9][0-9]{0,2}(?:\.[0-9]{3}(?=[.,])){1,99}[.,][0-9]+",  # 1.234,5; 1.234.567
     lambda match: match[0].translate(str.maketrans(".,", ",."))),
]

# The digits of a number: 1,234.5 or 1,00,000; 1 234.5 or 1_234; 1234.5; .5
DIGITS = (r"(?:[1-9][0-9]{0,2}(?:(?:,[0-9]{2,3}){0,99},[0-9]{3}|(?:[ _'][0-9]{3}){1,99})"
          r"(?:\.[0-9]{1,99})?|[0-9]{1,300}(?:\.[0-9]{1,300})?|\.[0-9]{1,300})")
# A number: "-5", "1.5e3", "7/2", "2 2/3", "2 and 2/3". All its lengths are limited: Fraction reads
# every match, and fast.
NUMBER = (r"(?:(?P<sign>[-+])`*)?(?:(?P<whole>[0-9]{1,9}) (?:and )?(?=[1-9][0-9]{0,8}/))?"
          rf"(?P<top>{DIGITS}(?:e[-+]?[0-9]{{1,2}})?)(?: ?/ ?(?P<bottom>[1-9][0-9]{{0,8}}))?")
# "2.5k", "$1.2M", "3 million". But "2m", "2b" and "5 K" may be units: None.
MAGNITUDES = {"k": 10 ** 3, "m": 10 ** 6, "b": 10 ** 9, "hundred": 100, "thousand": 10 ** 3,
              "million": 10 ** 6, "billion": 10 ** 9, "trillion": 10 ** 12}
MAGNITUDE = (r"(?:`* ?(?P<magnitude>hundred|thousand|million|billion|trillion"
             r"|(?<! )(?:k|(?-i:[MB])))s?(?![a-z]))?")

# What leaves a number as it is: words, and signs that calculate nothing (each sign in one way only,
# or a search would take forever) ...
BESIDE = "(?:" + "|".join([
    r"[a-z `,:;!?°¢\"“”()\[\]✅✓]",
    r"\.(?!\.)",                        # one "."; "0.33..." goes on
    r"(?<=[a-z])[-/'’&](?=[a-z])",      # long-term, km/h, Bob's
    r"(?<=[a-z] )-(?= [a-z]{2})",       # 18 eggs - as we saw
    r"—(?= ?[a-z]{2})",                 # $18 — the total
    r"(?<![a-z])/(?=[a-z]{2})",         # 18/week
    r"(?<=[a-z]{2})[²³]",               # 18 cm²
]) + ")*"
# ... except, before the number, in "x2", "f(5)", "Rs.50"; behind it in "5x", "5 K", "5!".
APART_BEFORE = r"(?<![a-z.,])(?<![a-z]\()"
APART_BEHIND = r"(?!`*(?:[a-z](?![a-z])|(?-i: [kKMBnxyz]\b)|[:!?(]))"
LINE = re.compile(rf"(?P<before>{BESIDE}(?:[=≈]{BESIDE})*){APART_BEFORE}{NUMBER}{MAGNITUDE}"
                  rf"{APART_BEHIND}(?P<behind>{BESIDE})", re.IGNORECASE | re.ASCII)
# Words that may change the number, or be another one.
NUMBER_WORD = re.compile(r"""\b(?:
    zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen
    |sixteen|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety
    |hundred|thousand|million|billion|trillion|bn|mil|mio|mn|lakh|crore|dozen|half|halve|third
    |quarter|fifth|eighth|ninth|twentieth|pi|plus|minus|negative|not|below|twice|double|triple
    |squared|cubed|root|factorial|repeating|recurring|lac|mln|thrice|twelfth|cannot|none|neither
    |sqrt|log|divided|multiplied)(?:th)?s?\b""", re.IGNORECASE | re.VERBOSE)


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
    """The number that is all of `text`, such as a gold answer: "18", "-1,234.50", "$5", "1/2"; or
    "50%", which is 50. Else None."""
    line = plain(text.strip().removesuffix(".").removesuffix("%"))
    match = re.fullmatch(NUMBER, line.strip("` "), re.IGNORECASE)
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
    for match in re.compile(".+").finditer(text, marker.end()):
        item = ITEM.match(text, match.start())  # in a list "- 18" is 18 ...
        line = plain(text[item.end():match.end()] if item else match[0])
        if item and len(ITEM.findall(text, match.start())) > 1:
            break  # ... but with a second item anywhere below, none is the answer
        if line.strip("`- "):
            return only_number(line), match.end()
    return None, len(text)


def only_number(line):
    """The one number in a plain line. None: there is none, there are several, or what is beside it
    may change it."""
    match = LINE.fullmatch(line)
    if not match or NUMBER_WORD.search(match["before"] + " " + match["behind"]):
        return None
    value = number_in(match)
    if value is not None and match["magnitude"]:
        value *= MAGNITUDES[match["magnitude"].lower()]
    return value


def number_in(match):
    """The value of a match of NUMBER. None: "2 3/2" may be two numbers."""
    value = Fraction(re.sub("[,_' ]", "", match["top"])) / int(match["bottom"] or 1)
    if match["whole"]:
        if value >= 1:
            return None
        value += int(match["whole"])
    return -value if match["sign"] == "-" else value
