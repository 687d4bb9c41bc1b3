"""A data folder with a teacher's rationales but without a teacher, to try real students on real questions:

    python tests/derive_gsm8k.py --source FOLDER --out gsm8k-derived --train 1000 --test 319

--source holds two files of GSM8K (github.com/openai/grade-school-math, grade_school_math/data): test.jsonl and
test_socratic.jsonl, the same 1,319 questions, where a sub-question precedes each step. They give the Chain of Thought and
the Least-to-Most solution; a program is derived from the calculator marks, <<48/2=24>>. The first --train questions
become train.jsonl and teacher.jsonl, the last --test of the 1,319 become test.jsonl, so that nothing leaks.
"""
import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.answers import numeric_answer, parse_number, same_number  # noqa: E402
from data.prepare import prepare  # noqa: E402

MARK = re.compile(r"<<([^=<>]*)=([^<>]*)>>")
NUMBER = re.compile(r"(?<![\w.])\d+\.?\d*|(?<![\w.])\.\d+")


def derive_program(solution: str) -> str:
    """ "<<48/2=24>> ... <<48+24=72>>" -> "a = 48/2", "answer = 48+a": one line per mark; the result of an earlier mark is
    called by its name."""
    lines, names = [], {}  # value of an earlier mark -> its name
    marks = MARK.findall(solution)
    for i, (expression, result) in enumerate(marks):
        name = "answer" if i == len(marks) - 1 else f"step_{i + 1}"
        expression = re.sub(r"([\d.]+)%", r"(\1/100)", expression.replace(",", "").replace("$", ""))
        lines.append(f"{name} = " + NUMBER.sub(lambda m: names.get(parse_number(m[0]), m[0]), expression))
        names[parse_number(result)] = name
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=1000, help="training questions (default 1000)")
    parser.add_argument("--test", type=int, default=319, help="test questions (default 319)")
    args = parser.parse_args()
    raw = {name: (args.source / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("test", "test_socratic")}
    questions = prepare("gsm8k", raw["test"], "test.jsonl")
    plain, socratic = ([json.loads(line)["answer"].rpartition("####")[0].strip() for line in text.splitlines()]
                       for text in raw.values())
    if args.train + args.test > len(questions):
        parser.error(f"--train {args.train} and --test {args.test} are more than the {len(questions)} questions")
    teacher, right = [], dict.fromkeys(("cot", "l2m", "pot"), 0)
    for question, steps, sub_questions in list(zip(questions, plain, socratic))[:args.train]:
        ending = f"\nFinal answer: {question['answer']}"
        texts = {"cot": MARK.sub("", steps) + ending, "l2m": MARK.sub("", sub_questions).replace(" ** ", " ") + ending,
                 "pot": derive_program(steps)}
        for strategy, text in texts.items():
            teacher.append({"id": question["id"], "strategy": strategy, "text": text})
            right[strategy] += same_number(numeric_answer(strategy, text), parse_number(question["answer"]))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, records in ("train", questions[:args.train]), ("test", questions[-args.test:]), ("teacher", teacher):
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        print(f"{path}: {len(records)}")
    print("right, of the teacher's: " + ", ".join(f"{strategy} {count}" for strategy, count in right.items()))


if __name__ == "__main__":
    main()
