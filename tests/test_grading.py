"""The grader on OpenAI's labels, and on a battery of ways to write a number.

The labels lie outside the repository and are skipped where they are absent."""
import json
import re
from pathlib import Path

import pytest

from tiny_reason.eval import extract_answer, is_correct, parse_number

LABELS = (Path(__file__).parents[2] / "shared" / "data"
          / "openai_gsm8k_model_solutions.jsonl")
RUNS = "6b_finetuning 6b_verification 175b_finetuning 175b_verification"

ONES = ("zero one two three four five six seven eight nine ten eleven twelve "
        "thirteen fourteen fifteen sixteen seventeen eighteen nineteen").split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(n):
    "English words of 0 <= n < 10**9."
    if n < 20: return ONES[n]
    if n < 100: return TENS[n // 10] + ("-" + ONES[n % 10]) * (n % 10 > 0)
    for size, name in ((10**6, "million"), (1000, "thousand"),
                       (100, "hundred")):
        if n >= size:
            rest = n % size
            link = " and " if size == 100 or rest < 100 else " "
            return (f"{in_words(n // size)} {name}"
                    + (link + in_words(rest)) * (rest > 0))


def european(n): return f"{n:,}".replace(",", ".") + ",00"


RENDERINGS = {
    "plain": lambda n: f"{n}",
    "final": lambda n: f"</think>\n\n**Final Answer:** {n}",
    "final plain": lambda n: f"Final Answer: {n}.",
    "final bold number": lambda n: f"**Final Answer: {n}**",
    "final colon outside": lambda n: f"**Final Answer**: {n}",
    "final next line": lambda n: f"### Final Answer:\n{n}",
    "hashes": lambda n: f"2 + 3 = 5.\n#### {n}",
    "hashes comma": lambda n: f"So that is it.\n#### {n:,}",
    "boxed": lambda n: rf"Hence $\boxed{{{n}}}$.",
    "boxed text": lambda n: rf"\[ \boxed{{{n}\text{{ dollars}}}} \]",
    "boxed dollar": lambda n: rf"Final Answer: \(\boxed{{\${n:,}}}\)",
    "boxed group": lambda n: rf"\boxed{{{n:,}}}".replace(",", "{,}"),
    "the answer is": lambda n: f"The answer is {n}.",
    "the answer bold": lambda n: f"Therefore, the answer is **{n}** eggs.",
    "answer then chat": lambda n: f"The answer is {n}. I hope that helps!",
    "answer because": lambda n: f"The answer is {n} because 3 + 4 = 7.",
    "decimal unit": lambda n: f"**Final Answer:** {n}.0 meters",
    "cents": lambda n: f"#### ${n:,}.00 dollars",
    "currency after": lambda n: f"#### {n} €",
    "currency code": lambda n: f"#### USD {n:,}",
    "rupees": lambda n: f"#### Rs. {n:,}",
    "unit": lambda n: f"#### {n} kilometers",
    "foot": lambda n: f"#### {n} foot",
    "percent": lambda n: f"#### {n}%",
    "latex percent": lambda n: rf"The answer is ${n}\%$",
    "words": lambda n: f"#### {in_words(n)}",
    "words unit": lambda n: f"The answer is {in_words(n)} dollars.",
    "capital words": lambda n: f"**Final Answer:** {in_words(n).capitalize()}",
    "fraction": lambda n: f"#### {3 * n}/3",
    "latex fraction": lambda n: rf"\boxed{{\frac{{{2 * n}}}{{2}}}}",
    "scientific": lambda n: f"#### {n}e0",
    "scientific decimal": lambda n: f"#### {n / 10:.1f}e1",
    "power of ten": lambda n: rf"#### {n}00 \times 10^{{-2}}",
    "thin space": lambda n: f"#### {n:,}".replace(",", "\u202f"),
    "no-break space": lambda n: f"#### {n:,} kg".replace(",", "\u00a0"),
    "apostrophe": lambda n: f"#### {n:,}".replace(",", "'"),
    "european": lambda n: f"#### {european(n)} EUR",
    "equation": lambda n: f"#### x = {n}",
    "sum": lambda n: f"The answer is {n - 1} + 1 = {n} eggs",
    "arabic digits": lambda n: "#### " + f"{n}".translate(
        str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")),
    "full width": lambda n: "#### " + f"{n}".translate(
        str.maketrans("0123456789", "０１２３４５６７８９")),
    "corrected": lambda n: f"The answer is {n + 7}. Wait, it is {n}.",
    "given twice": lambda n: f"#### {n + 3}\nI forgot some.\n#### {n}",
    "last line": lambda n: f"3 + 4 = 7\nShe has {n} apples.",
    "openai": lambda n: f"She has 7 - 3 = 4.\nA: {n}",
    "bold line": lambda n: f"We add 3.\n\n**{n}**",
}
GOLDS = sorted({*range(0, 130), *range(130, 1000, 17), *range(1000, 10**4, 311),
                *range(10**4, 10**6, 10_009), 10**6, 2_500_000})[:300]


def test_every_rendering_of_the_right_number_and_no_other():
    refused, accepted = [], []
    for name, render in RENDERINGS.items():
        for gold in GOLDS:
            if not is_correct(render(gold), str(gold)):
                refused.append((name, gold, extract_answer(render(gold))))
            for wrong in {gold + 1, max(gold - 1, 0), gold * 10} - {gold}:
                if is_correct(render(wrong), str(gold)):
                    accepted.append((name, gold, wrong))
    cases = len(RENDERINGS) * len(GOLDS)
    assert accepted == []
    assert len(refused) <= 0.01 * cases, (len(refused), refused[:20])
    print(f"{cases - len(refused)} of {cases} right answers accepted, "
          f"{len(RENDERINGS)} renderings")


@pytest.mark.parametrize("gold", [1, 5, 18, 1234])
def test_negative_renderings(gold):
    for form in ("-{}", "-${}", "$-{}", "\u2212{}", "minus {}", "-{}.0 °C",
                 "negative {}", "$-{}$", "**-{}**", "\u2212${}"):
        assert parse_number(form.format(gold)) == -gold, form
        assert not is_correct("#### " + form.format(gold), str(gold))


@pytest.mark.skipif(not LABELS.exists(), reason=f"no labels at {LABELS}: "
                    "OpenAI's graded solutions are not part of the repository")
def test_openai_labels():
    agreed = total = 0
    for line in LABELS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        gold = row["ground_truth"].rpartition("A:")[2]
        for run in RUNS.split():
            label = row[run]["is_correct"]
            agreed += is_correct(row[run]["solution"], gold) == label
            total += 1
    assert (agreed, total) == (5276, 5276)


def test_time_grows_with_the_length_alone():
    from time import perf_counter
    from tiny_reason.eval import check_steps
    for unit in ("9", "answer is ", "\\boxed{", "#### ", " ", "\n", "1+", "(",
                 "9^", "and one ", "<think>", "final answer: 5 ", "=1", "$",
                 "- ", "1 ", "a ", "wait ", "not 5. ", "1,", "<<", "half "):
        for ends in ("", "#### ", "####"):
            text = ends + unit * (200_000 // len(unit))
            start = perf_counter()
            is_correct(text, "5"), check_steps(text)
            assert perf_counter() - start < 5, (unit, ends)
