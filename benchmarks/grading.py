"""How often graders accept right and wrong answers, by ways to write them.

    python benchmarks/grading.py [--every K] > benchmarks/grading.md

A case is a number, a spelling ("1,234.50", "\\frac{5}{2}", "eighteen") and a
context ("**Final Answer:** ...", a corrected answer, a table). Each case is
tried with the right number and with wrong ones: off by one, by a factor of
10, 100 or 1000, with the other sign, with two digits swapped.
Math-Verify is compared where it is installed (`pip install math-verify`).
lm-eval's flexible-extract is its published regular expression, from
lm_eval/tasks/gsm8k/gsm8k.yaml. The battery grew together with our grader, so
it flatters it; tests/test_grading.py asserts what is printed here."""
import argparse
import importlib.metadata
import importlib.util
import random
import re
from fractions import Fraction
from time import perf_counter

from tiny_reason.eval import flexible, strict
from tiny_reason.lib.answers import is_correct

ONES = ("zero one two three four five six seven eight nine ten eleven twelve "
        "thirteen fourteen fifteen sixteen seventeen eighteen nineteen").split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(n, hyphen="-", link=" and ", comma=" "):
    "English words of 0 <= n < 10**9."
    if n < 20: return ONES[n]
    if n < 100: return TENS[n // 10] + (hyphen + ONES[n % 10]) * (n % 10 > 0)
    for size, name in ((10**6, "million"), (1000, "thousand"),
                       (100, "hundred")):
        if n >= size:
            rest = n % size
            between = (link if size == 100 or rest < 100 else comma)
            return (f"{in_words(n // size, hyphen, link, comma)} {name}"
                    + (between + in_words(rest, hyphen, link, comma))
                    * (rest > 0))


def plain(x):
    "Exact decimal: -1234.5"
    sign, x, places = "-" * (x < 0), abs(x), 0
    while x * 10**places % 1: places += 1
    whole, part = divmod(int(x * 10**places), 10**places)
    return sign + str(whole) + (f".{part:0{places}d}" if places else "")


def grouped(x, comma=",", point="."):
    whole, _, part = plain(abs(x)).partition(".")
    return "-" * (x < 0) + f"{int(whole):,}".replace(",", comma) + (point + part
                                                           ) * bool(part)


def cents(x, comma=",", point="."):
    return grouped(x, comma, point) if x % 1 and x * 10 % 1 else (
        grouped(x, comma, point) + ("0" if x % 1 else point + "00"))


def signed(x, mark): # "$", "€": the sign may stand on either side
    return ("-" if x < 0 else "") + mark + cents(abs(x))


def digits_of(x, zero):
    return "".join(chr(ord(zero) + int(c)) if c.isdigit() else c
                   for c in plain(x))


def whole(render): # only for whole numbers from 0
    return lambda x: render(int(x)) if x % 1 == 0 and 0 <= x < 10**9 else None


def scientific(x, template):
    if x == 0: return template.format("0", 0)
    power = 0
    while abs(x) >= 10: x, power = x / 10, power + 1
    while abs(x) < 1: x, power = x * 10, power - 1
    return template.format(plain(x), power)


SUPER = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
SPELLINGS = {
    "plain": plain, "grouped": grouped, "decimals": cents,
    "one decimal": lambda x: plain(x) + ".0" * (x % 1 == 0),
    "dollars": lambda x: signed(x, "$"),
    "dollar then minus": lambda x: "$" + plain(x),
    "latex dollar": lambda x: signed(x, r"\$"),
    "math mode": lambda x: f"${plain(x)}$",
    "math mode dollar": lambda x: rf"$\${grouped(x)}$",
    "euro after": lambda x: f"{plain(x)} €",
    "euro after, glued": lambda x: f"{plain(x)}€",
    "pound": lambda x: signed(x, "£"),
    "rupee sign": lambda x: signed(x, "₹"),
    "code before": lambda x: f"USD {grouped(x)}",
    "code glued": lambda x: f"CHF{plain(x)}",
    "us dollar": lambda x: "US" + signed(x, "$"),
    "code after": lambda x: f"{grouped(x)} EUR",
    "rupees": lambda x: f"Rs. {grouped(x)}",
    "both currencies": lambda x: f"${plain(x)} dollars",
    "unit": lambda x: f"{plain(x)} kilometers",
    "unit of words": lambda x: f"{grouped(x)} large boxes of red apples",
    "unit glued": lambda x: f"{plain(x)}cm",
    "unit squared": lambda x: f"{plain(x)} m^2",
    "unit squared sign": lambda x: f"{plain(x)} m²",
    "unit with digit": lambda x: f"{plain(x)} tons of CO2",
    "unit per": lambda x: f"{plain(x)} km/h",
    "latex unit": lambda x: rf"{plain(x)}\ \text{{m}}^2",
    "latex speed": lambda x: rf"{plain(x)}\,\mathrm{{m\,s^{{-2}}}}",
    "degrees": lambda x: rf"{plain(x)}^\circ",
    "celsius": lambda x: f"{plain(x)} °C",
    "percent": lambda x: f"{plain(x)}%",
    "percent spaced": lambda x: f"{plain(x)} %",
    "percent word": lambda x: f"{plain(x)} percent",
    "latex percent": lambda x: rf"{plain(x)}\%",
    "bold": lambda x: f"**{grouped(x)}**",
    "bold dollar": lambda x: f"**{signed(x, '$')}**",
    "italic": lambda x: f"*{plain(x)}*",
    "underscores": lambda x: f"__{plain(x)}__",
    "code": lambda x: f"`{plain(x)}`",
    "quoted": lambda x: f'"{plain(x)}"',
    "curly quotes": lambda x: f"“{plain(x)}”",
    "brackets": lambda x: f"({plain(x)})",
    "latex inline": lambda x: rf"\({plain(x)}\)",
    "latex display": lambda x: rf"\[{plain(x)}\]",
    "latex text": lambda x: rf"\text{{{plain(x)}}}",
    "latex bold": lambda x: rf"\mathbf{{{plain(x)}}}",
    "comma and space": lambda x: (grouped(x, ", ") if x % 1 == 0
                                  and 1000 <= abs(x) < 10**6 else None),
    "comma, space, unit": lambda x: (f"${grouped(x, ', ')} dollars" if x % 1
                                     == 0 and 1000 <= x < 10**6 else None),
    "latex group": lambda x: grouped(x, "{,}"),
    "latex thin": lambda x: grouped(x, r"\,"),
    "latex negative space": lambda x: grouped(x, r",\!"),
    "thin space": lambda x: grouped(x, "\u2009"),
    "narrow no-break": lambda x: grouped(x, "\u202f") + " kg",
    "no-break space": lambda x: grouped(x, "\u00a0", ","
                                        if x * 100 % 1 == 0 else "."),
    "apostrophe": lambda x: grouped(x, "'"),
    "curly apostrophe": lambda x: grouped(x, "’"),
    "european": lambda x: cents(x, ".", ",") + " EUR",
    "unicode minus": lambda x: plain(x).replace("-", "\u2212"),
    "en dash minus": lambda x: signed(x, "$").replace("-", "–"),
    "minus word": lambda x: plain(x).replace("-", "minus "),
    "negative word": lambda x: plain(x).replace("-", "negative "),
    "full width": lambda x: digits_of(x, "０"),
    "arabic": lambda x: digits_of(x, "٠"),
    "devanagari": lambda x: digits_of(x, "०"),
    "bold digits": lambda x: digits_of(x, "𝟎"),
    "zero width": lambda x: "\u200b" + plain(x) + "\ufeff",
    "keycaps": lambda x: re.sub(r"(\d)", "\\1\ufe0f\u20e3", plain(x)),
    "emoji": lambda x: f"🎉 {plain(x)} 🎉",
    "words": whole(in_words),
    "words and unit": whole(lambda n: f"{in_words(n)} dollars"),
    "capital words": whole(lambda n: in_words(n).capitalize()),
    "shouted words": whole(lambda n: in_words(n).upper()),
    "words, american": whole(lambda n: in_words(n, "-", " ")),
    "words, no hyphen": whole(lambda n: in_words(n, " ")),
    "words, comma": whole(lambda n: in_words(n, comma=", ")),
    "word and digits": whole(lambda n: f"{in_words(n)} ({n})"),
    "digits and word": whole(lambda n: f"{n} ({in_words(n)})"),
    "words negative": lambda x: (f"minus {in_words(-int(x))}"
                                 if x % 1 == 0 and x < 0 else None),
    "words half": lambda x: (f"{in_words(int(x))} and a half"
                             if x % 1 == Fraction(1, 2) and 0 < x < 100
                             else None),
    "point in words": lambda x: (
        f"{in_words(int(x))} point {ONES[int(x * 10 % 10)]}"
        if x % 1 and x * 10 % 1 == 0 and x > 0 else None),
    "fraction": lambda x: f"{3 * x.numerator}/{3 * x.denominator}",
    "fraction spaced": lambda x: f"{2 * x.numerator} / {2 * x.denominator}",
    "latex fraction": lambda x: rf"\frac{{{2 * x.numerator}}}"
                                rf"{{{2 * x.denominator}}}",
    "latex dfrac": lambda x: rf"${'-' * (x < 0)}\dfrac{{{abs(x.numerator)}}}"
                             rf"{{{x.denominator}}}$",
    "mixed": lambda x: (f"{'-' * (x < 0)}{int(abs(x))} {abs(x.numerator) % x.denominator}"
                        f"/{x.denominator}" if x % 1 and abs(x) > 1 else None),
    "latex mixed": lambda x: (
        rf"{'-' * (x < 0)}{int(abs(x))}\tfrac{{{abs(x.numerator) % x.denominator}}}"
        rf"{{{x.denominator}}}" if x % 1 and abs(x) > 1 else None),
    "half sign": lambda x: (f"{'-' * (x < 0)}{int(abs(x))}½"
                            if x % 1 == Fraction(1, 2) else None),
    "e": lambda x: scientific(x, "{}e{}"),
    "E plus": lambda x: scientific(x, "{}E{:+03d}"),
    "times power": lambda x: scientific(x, "{} × 10^{}"),
    "superscript": lambda x: "{} × 10{}".format(*(
        (lambda a, b: (a, b.translate(SUPER)))(*scientific(x, "{} {}").split()))),
    "latex power": lambda x: scientific(x, r"{} \times 10^{{{}}}"),
    "latex cdot": lambda x: scientific(x, r"{} \cdot 10^{{{}}}"),
    "python power": lambda x: scientific(x, "{} * 10**{}"),
    "html power": lambda x: scientific(x, "{} × 10<sup>{}</sup>"),
    "thousand": lambda x: (f"{plain(x / 1000)} thousand"
                           if x % 10 == 0 and x >= 1000 else None),
    "million": lambda x: (f"${plain(x / 10**6)} million"
                          if x % 10**4 == 0 and x >= 10**6 else None),
    "equation": lambda x: f"x = {plain(x)}",
    "sum": lambda x: f"{plain(x - 7)} + 7 = {plain(x)}",
    "long sum": lambda x: f"2 × {plain(x / 2)} = {plain(x - 3)} + 3 = {plain(x)}",
    "about": lambda x: f"≈ {plain(x)}", "html": lambda x: f"<b>{plain(x)}</b>",
    "struck": lambda x: f"~~{plain(x + 3)}~~ {plain(x)}",
    "dollars and cents": lambda x: (
        f"{int(x)} dollars and {int(x % 1 * 100)} cents"
        if x > 0 and x * 100 % 1 == 0 else None),
}
CONTEXTS = {
    "think": "<think>\n2 + 3 = 5, so 5.\n</think>\n\n**Final Answer:** {}",
    "final": "3 + 4 = 7.\nFinal Answer: {}",
    "final bold": "**Final Answer: {}**",
    "final bold mark": "Add 3.\n\n**Final Answer**: {}",
    "final is": "The final answer is {}",
    "final hope": "Final Answer: The final answer is {}. I hope it is correct.",
    "heading": "We add 4 and 3.\n\n### Final Answer\n\n{}",
    "bold heading": "That is 7.\n\n**Final Answer**\n{}",
    "heading colon": "## Final Answer:\n\n{}\n",
    "hashes": "2 + 3 = 5.\n#### {}",
    "hashes, glued": "2 + 3 = 5.\n####{}",
    "boxed": r"Hence 3 + 4 = 7 and $\boxed{{{}}}$.",
    "boxed display": "So\n\\[ \\boxed{{{}}} \\]\nThat is all, in 3 steps.",
    "boxed final": r"**Final Answer**" "\n" r"\boxed{{{}}}",
    "answer is": "The answer is {}.", "answer colon": "So 3 + 4 = 7.\nAnswer: {}",
    "answer bold": "5 + 2 = 7.\n**Answer:** {}",
    "answer tag": "<think>3 + 4</think>\n<answer>{}</answer>",
    "answer unit": "Answer (in total): {}",
    "correct answer": "Therefore, the correct answer is: {}.",
    "to the question": "The answer to the question is {}.",
    "answer chatter": "The answer is {}. I hope that helps with all 3 parts!",
    "answer chatter lines": "The answer is {}.\n\nLet me know if you have "
                            "2 more questions.",
    "answer because": "The answer is {} because 3 + 4 = 7.",
    "answer check": "**Answer:** {}\n\nCheck: 3 + 4 = 7, as in step 1.",
    "corrected": "The answer is 1,017. Wait, I forgot 3 of them. "
                 "The answer is {}.",
    "corrected, it is": "The answer is 1,017. Wait, that's wrong: it is {}.",
    "corrected, actually": "Final Answer: 1,017\n\nActually, it should be {}.",
    "corrected, no": "The answer is 1,017? No, the answer is {}.",
    "given twice": "#### 1,017\nI forgot some.\n#### {}",
    "not but": "The answer is not 1,017. The answer is {}.",
    "question then answer": "Is it 1,017? Let me see.\nThe answer is {}",
    "few-shot": "A: {}\n\nQ: Tom has 3 apples. How many?\nA: 1,017",
    "next question": "#### {}\n\n### Question:\nWhat is 1,017?\n### Answer:\n3",
    "list": "- First: 3 + 4 = 7\n- Final answer: {}",
    "quote": "> The answer is {}", "end token": "The answer is {}<|im_end|>",
    "table": "| step | value |\n|---|---|\n| sum | 7 |\n\nFinal Answer: {}",
    # without a mark: the last line
    "bare": "{}", "last line": "3 + 4 = 7\nShe has {}",
    "in total": "First 3, then 4.\nIn total, there are {}",
    "therefore": "We know 3 + 4 = 7. Therefore, Ann needs {}.",
    "so after": "3 + 4 = 7\nSo after 3 days, they have {}.",
    "unmarked chatter": "She pays {}.\n\nI hope this helps!",
    "total": "3 + 4 = 7\n\n**Total:** {}", "fence": "```\n{}\n```",
    "table row": "| day | eggs |\n|---|---|\n| Sum | {} |",
}
# Where a spelling cannot stand in a context: it would say something else.
CLASH = {("italic", "final bold"), ("bold", "final bold"),
         ("bold dollar", "final bold"), ("underscores", "final bold"),
         ("half sign", "hashes, glued"), ("code", "fence"),
         ("bold digits", "final bold")}
BOXED = {"boxed", "boxed display", "boxed final"} # LaTeX spellings only
NOT_LATEX = {"bold", "bold dollar", "italic", "underscores", "code", "html",
             "struck", "html power", "math mode", "math mode dollar",
             "latex dfrac", "latex inline", "latex display", "python power"}

# Nothing here is one number that is meant: no number in it may be accepted.
NO_ANSWER = """5 or 6|5-6|5 – 6|5 to 6|between 5 and 6|5, 6|[5, 6]|(5, 6)|5; 6
5 and 6|5/6/7|5:6|5 : 6|5x6|5 × 6|5 * 6|5 + 6|5 - 6|5^6|5²|5**6|-(5)|- (5)|2(5)
(2)(5)|at least 5|at most 5|more than 5|less than 5|fewer than 5|over 5|under 5
up to 5|not 5|no more than 5|almost 5|nearly 5|> 5|>= 5|< 5|≥ 5|≤ 5|x > 5|x != 5
x ≠ 5|x >= 5|5 < x < 6|\\ge 5|\\neq 5|\\pm 5|±5|5 ± 1|5+|5-|5 or more|5 or fewer
5 or so|5k|5K|5 k|5M|5 M|5B|5 mil|5 mn|5 bn|5 thousands|5 hundreds|5 millions
5 dozen|five dozen|5 lakh|5 crore|5 squared|5 cubed|5 factorial|\\sqrt{5}|√5|5π
twice 5|double 5|half of 5|a third of 5|5 R2|5 r 2|5 remainder 2|5 rem. 2
5 below zero|5 minus 6|5 plus 6|5 times 6|5 divided by 6|5 out of 6|5 in 6|5 of 6
5 hours 6 minutes|5 ft 6 in|5'6"|5:06|5.6.7|1.5.5|5.000|x-5|f(5)|5(6)|5x|5x+6
log(5)|sin(5)|5%6|5|six or 5|five six|five or six|between five and six|5 hundredths
x = 5, y = 6|x = 5 or x = 6|x = 5 and y = 6|5 = x + 6|5 apples and 6 pears|5...6
5 apples or 6 pears|either 5 or 6|5 (or 6)|5 (maybe 6)|6 (or 5)|five million and a half
roughly 5 to 6|5-6 apples|5~6|5, maybe 6|5 if it rains, 6 otherwise|0.\\overline{5}
5 \\text{ or } 6|\\{5, 6\\}|5 \\pm 6|5_{6}|10^5.5|5e5e5|5,6,7|5.6,7|1,2345|12,5,5
1, 200 and 3|1, 200 or 3|1, 200 or more|(1, 200)|[1, 200]|1, 200, 300|1,200, 300
the answers are 1, 200|x = 1, 200|0, 100|1, 20|1, 2000|1, 200 respectively
1, 200 and 1, 300|1, 200 eggs and three pears|3 days, 200 eggs|room 1, 200 eggs"""
NO_ANSWER = [t for line in NO_ANSWER.split("\n") for t in line.split("|")
             if t != "5"]
NO_STATEMENT = r"""The answer is not 5.|The answer isn't 5.|Is the answer 5?
If the answer is 5, we are done.|The answer is 5 or 6.|5 is not the answer.
The answer cannot be 5.|The answer is unknown.|I do not know.|The answer is 5?
The answer is 5. Wait, that's wrong.|The answer is 5. No, that is incorrect.
The answer is 5. Scratch that.|The answer is 5. Wait, I made a mistake. Let me redo.
The wrong answer is 5.|\boxed{5} or \boxed{6}|\boxed{5|#### Step 5: add
A common wrong answer is 5.|Suppose the answer is 5.|<think>The answer is 5
<think>\nThe answer is 5.\n</think>\n|The answer is 5. Wait, it is not 5.
The answer depends on 5 things.|The answer is unclear. There are 5 eggs.
It is not possible to say. We only know 5.|She has more than 5.|She has 5 or 6.
Final Answer:\n1. 5 apples\n2. 6 pears|She ate 5 and has 6 left.|Is it 5?|5 is wrong|5 at most
5 is too low|greater than or equal to 5|at the most 5|5 less one|5 at least
\boxed{5} and \boxed{6}|\boxed{5, 6}|Final Answer: 5 and 6|#### 5 or 6
The answer is 5, but Tom ate some, so it is 6 or 7.|<think>\n#### 5"""
NO_STATEMENT = [t.replace(r"\n", "\n") for line in NO_STATEMENT.split("\n")
                for t in line.split("|")]


def golds():
    "300 numbers: small, large, negative, with decimals, zero."
    rng, out = random.Random(6), {Fraction(n) for n in range(0, 61)}
    out |= {Fraction(n) for n in (100, 1000, 1010, 10**4, 10**6, 2_500_000,
                                  12_345_678, 101, 110, 999, 1001, 20_000)}
    out |= {Fraction(n, 2) for n in (1, 3, 5, 7, 15, 37, 199, 2469)}
    out |= {Fraction(-n) for n in (1, 2, 5, 10, 18, 100, 1234)}
    out |= {Fraction(-n, 4) for n in (1, 10, 50)}
    while len(out) < 300:
        size = rng.choice((100, 1000, 10**4, 10**5, 10**6))
        out.add(Fraction(rng.randrange(size), rng.choice((1, 1, 1, 1, 10, 100)))
                * rng.choice((1, 1, 1, 1, -1)))
    return sorted(out)


def wrong_numbers(x):
    "Numbers that are not x and easily taken for it."
    out = [x + 1, x - 1, x * 10, x * 100, x * 1000, -x, x + Fraction(1, 100)]
    if x % 10 == 0: out.append(x / 10)
    if (x * 10).denominator == 1: out.append(x / 10)
    digits = plain(abs(x))
    if len(digits) > 1 and digits.isdigit():
        out.append(Fraction(digits[1] + digits[0] + digits[2:]))
    return sorted({w for w in out if w != x and (w * 100) % 1 == 0})


def cases(every=1):
    "Yield (spelling, context, x, text of x): every K-th of all there are."
    numbers, count = golds(), 0
    for name, spell in SPELLINGS.items():
        for where, context in CONTEXTS.items():
            if (name, where) in CLASH: continue
            if where in BOXED and name in NOT_LATEX: continue
            for x in numbers:
                count += 1
                if count % every: continue
                written = spell(x)
                if written is not None:
                    yield name, where, x, written, context.format(written)


def render(name, where, x):
    written = SPELLINGS[name](x)
    return None if written is None else CONTEXTS[where].format(written)


# The graders: (completion, gold) -> verdict

def math_verify(completion, gold):
    from math_verify import parse, verify
    return verify(parse(gold, parsing_timeout=None),
                  parse(completion, parsing_timeout=None),
                  timeout_seconds=None)


def graders():
    yield "strict `**Final Answer:**`", strict
    yield "lm-eval flexible-extract", flexible
    if importlib.util.find_spec("math_verify"):
        version = importlib.metadata.version("math-verify")
        yield f"Math-Verify {version}", math_verify
    yield "tiny_reason", is_correct


HOSTILE = {"digits": "9", "powers": "9^", "open boxes": "\\boxed{",
           "marks": "answer is ", "hashes": "#", "spaces": " ", "lines": "\n",
           "retractions": "#### 5 wait ", "fractions": "½", "brackets": "<<",
           "thoughts": "<think>", "surrogates": "\ud800", "NUL": "\0"}


def seconds(text):
    start = perf_counter()
    is_correct(text, "5")
    return perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=97,
                        help="take every K-th case (default 97)")
    every = parser.parse_args().every
    chosen = list(cases(every))
    wrong = [(g, render(n, c, w)) for n, c, g, *_ in chosen
             for w in wrong_numbers(g)]
    wrong = [(g, text) for g, text in wrong if text]
    none = [(str(n), text) for text in NO_STATEMENT + [
        f"The answer is {t}" for t in NO_ANSWER] for n in (5, 6, 7)]
    print(f"{len(SPELLINGS)} spellings in {len(CONTEXTS)} contexts, "
          f"{len(golds())} numbers; every {every}th case: {len(chosen):,} right "
          f"and {len(wrong):,} wrong answers, and {len(none)} questions put to "
          "texts that state no single number.\n")
    print("| grader | right accepted | wrong accepted | no answer, accepted "
          "| ms a text |\n|---|---|---|---|---|")
    for name, grader in graders():
        start = perf_counter()
        right = sum(grader(text, plain(g)) for *_, g, _, text in chosen)
        each = (perf_counter() - start) / len(chosen)
        false = sum(grader(text, plain(g)) for g, text in wrong)
        guessed = sum(grader(text, gold) for gold, text in none)
        print(f"| {name} | {right / len(chosen):.1%} | {false} of "
              f"{len(wrong):,} | {guessed} of {len(none)} | {1000 * each:.2f} |",
              flush=True)
    print("\nHostile texts, ms for the verdict:\n\n| text | 100,000 characters "
          "| 1,000,000 |\n|---|---|---|")
    for name, unit in HOSTILE.items():
        ms = [1000 * min(seconds(unit * (n // len(unit))) for _ in range(3))
              for n in (10**5, 10**6)]
        print(f"| {name} | {ms[0]:.1f} | {ms[1]:.1f} |")
    if not importlib.util.find_spec("math_verify"):
        print("\nMath-Verify is not installed here, and not compared.")


if __name__ == "__main__": main()
