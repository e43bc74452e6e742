"""The grader on a battery of ways to write a number, on hostile texts, and on
OpenAI's labels, which lie outside the repository and are skipped without it."""
import importlib.util
import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from tiny_reason.data import write_equations
from tiny_reason.lib.answers import (extract_answer, grade, is_correct,
                                     parse_number, read_answer)
from tiny_reason.lib.arithmetic import calculate, check_steps

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location(
    "battery", ROOT / "benchmarks" / "grading.py")
battery = importlib.util.module_from_spec(spec)
spec.loader.exec_module(battery)

LABELS = (ROOT.parent / "shared" / "data"
          / "openai_gsm8k_model_solutions.jsonl")
RUNS = "6b_finetuning 6b_verification 175b_finetuning 175b_verification"


def test_the_battery_is_as_large_as_it_says():
    assert len(battery.golds()) == 300
    assert len(battery.SPELLINGS) >= 28 and len(battery.CONTEXTS) >= 28
    assert battery.plain(Fraction(-2469, 2)) == "-1234.5"
    assert battery.in_words(2_017) == "two thousand and seventeen"


def test_right_answers_are_accepted_and_no_wrong_one():
    refused, accepted, total, seen = [], [], 0, set()
    for name, where, gold, _, text in battery.cases(every=331):
        total += 1; seen.add((name, where))
        if not is_correct(text, battery.plain(gold)):
            refused.append((name, where, text, extract_answer(text)))
        for wrong in battery.wrong_numbers(gold):
            said = battery.render(name, where, wrong)
            if said and is_correct(said, battery.plain(gold)):
                accepted.append((name, where, said, gold))
    assert accepted == []
    assert len(refused) <= 0.01 * total, (len(refused), refused[:20])
    assert total > 3000 and len(seen) > 2500


def test_every_spelling_of_every_number():
    "300 numbers in all spellings, each in one context after another."
    contexts, refused, accepted, total = list(battery.CONTEXTS), [], [], 0
    for i, gold in enumerate(battery.golds()):
        for j, name in enumerate(battery.SPELLINGS):
            where = contexts[(7 * i + j) % len(contexts)]
            if ((name, where) in battery.CLASH or where in battery.BOXED
                    and name in battery.NOT_LATEX): continue
            text = battery.render(name, where, gold)
            if text is None: continue
            total += 1
            if not is_correct(text, battery.plain(gold)):
                refused.append((name, where, text))
            off = battery.render(name, where, gold + 1)
            if off and is_correct(off, battery.plain(gold)):
                accepted.append((name, where, off, gold))
    assert accepted == []
    assert len(refused) <= 0.01 * total, (len(refused), refused[:20])
    assert total > 20_000


@pytest.mark.parametrize("text", battery.NO_ANSWER)
def test_what_could_mean_two_things_is_none(text):
    value, reason = read_answer(text)
    assert value is None and reason
    for frame in ("{}", "#### {}", "The answer is {}", "**Final Answer:** {}"):
        for gold in (1, 2, 3, 5, 6, 7):
            assert not is_correct(frame.format(text), gold), (frame, gold)


@pytest.mark.parametrize("text", battery.NO_STATEMENT)
def test_what_is_not_stated_is_not_accepted(text):
    for gold in (5, 6, 7):
        verdict = grade(text, gold)
        assert not verdict.correct and verdict.reason


@pytest.mark.parametrize("text, value", [
    ("The answer is 17... no, 18.", 18), ("#### 17\nWait, 18.", 18),
    ("The answer is ~~17~~ 18.", 18), ("18, not 17", 18),
    ("The answer is not 17 but 18.", 18), ("17.5 ≈ 18", 18),
    ("#### 3 * 6 = 18 eggs (eighteen)", 18), ("18 dollars and 50 cents", 18.5),
    ("**Final Answer**\n\n18 kg", 18), ("\\boxed{18 \\text{ m}^{2}}", 18),
    ("A: 18\n\nQ: next?\nA: 19", 18), ("18 eggs after 3 days.", 18),
    ("So after 3 days she has 18.", None), ("She ate 3 and has 18.", None),
    ("The answer is 18.\nThat took 3 steps.", 18), ("- 18", None),
    ("Answer - 18", 18), ("&minus;18", -18), ("(18)", 18), ("18.000", None),
    ("18,000", 18000), ("1.800.000", 1800000), ("1 800", None),
    ("<answer>18</answer> 3", 18), ("18\n\nUser: 19", 18),
    ("1, 200", 1200), ("#### 1, 200", 1200), ("The answer is 1, 200.", 1200),
    ("**Final Answer:** $18, 000", 18000), ("\\boxed{-1, 200}", -1200),
    ("**Final Answer: 1, 200 red apples**", 1200), ("1, 200%", 1200),
    ("The answers are 1, 200", None), ("She has 1, 200", None)])
def test_worked_examples(text, value):
    verdict = grade(text, 0)
    assert verdict.value == (None if value is None else Fraction(value))
    assert verdict.reason


def expressions():
    numbers = st.decimals(0, 10**6, places=2).map(str) | st.integers(
        0, 999).map(str)
    return st.recursive(numbers, lambda e: st.builds(
        "({}{}{})".format, e, st.sampled_from("+-*"), e), max_leaves=8)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(expressions())
def test_calculate_is_exact(expression):
    exact = re.sub(r"[\d.]+", lambda m: f"Fraction('{m[0]}')", expression)
    if len(expression) <= 200:
        assert calculate(expression) == eval(exact, {"Fraction": Fraction})


@pytest.mark.parametrize("text, value", [
    ("1_000+1", 1001), ("1,000+1", 1001), ("560//10", 56), ("7//2", 3),
    ("3*+6", 18), ("-18/-2", 9), ("2--3", 5), ("-(1+2)*-3/4.50", 2),
    ("50%*8", 4), ("1/3*3", 1), ("007+1", 8), ("2 3+", None), ("()5", None),
    ("2(3)", None), ("2++", None), ("8 apples", None), ("9**9", None),
    ("1e3", None), ("5%3", None), ("(2", None), ("2)", None), ("1/0", None)])
def test_annotations_are_worked_out_alike(text, value):
    "By the grader, which checks a trace, and by the data, which write it out."
    note = f"<<{text}={value}>>"
    assert [ok for _, ok in check_steps(note)] == [value is not None or None]
    try: written = write_equations(note)
    except ValueError: written = None
    assert written == (None if value is None else f"{text}={value}")


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text(), st.integers(-50, 50))
def test_any_text_is_graded(text, gold):
    verdict = grade(text, gold)
    assert verdict.correct == (verdict.value == gold)
    assert isinstance(verdict.reason, str) and verdict.reason
    assert isinstance(check_steps(text), list)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.integers(-10**7, 10**7), st.integers(-10**7, 10**7),
       st.sampled_from(list(battery.SPELLINGS)),
       st.sampled_from(list(battery.CONTEXTS)))
def test_only_equal_numbers_are_accepted(said, gold, name, where):
    text = battery.render(name, where, Fraction(said))
    if text and said != gold: assert not is_correct(text, gold)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.fractions(), st.integers(0, 40))
def test_scientific_notation_is_exact(x, power):
    if x.denominator == 1 and abs(x) < 10**9:
        assert parse_number(f"{x}e-{power}") == x / 10**power
    if abs(x) < 10**9 and x.denominator < 10**9:
        assert parse_number(f"{x}") == x


def test_a_question_does_not_mark_itself():
    from tiny_reason.eval import record_of
    shout = dict(question="**Final Answer:** 18\n#### 18", answer="#### 18")
    assert record_of(shout, "I cannot say.")["correct"] is False


def test_grading_loads_no_torch():
    code = ("import sys, tiny_reason.lib.answers\n"
            "print({'torch', 'transformers', 'datasets'} & set(sys.modules))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True,
                         text=True, timeout=60)
    assert out.stdout.strip() == "set()"


UNITS = ("9", "answer is ", "\\boxed{", "#### ", "#", " ", "\n", "1+", "(",
         "9^", "and one ", "<think>", "</think>", "final answer: 5 ", "=1", "$",
         "- ", "1 ", "a ", "wait ", "not 5. ", "1,", "<<", "half ", "\nA:",
         "½", "\ud800", "\\frac{", "{", "5. ", "(5) ", "one hundred ", "*a",
         "<a", "&", "1\u2009", "answer: wait 5 no, ", "\x00", "İ", "_", "'")


@pytest.mark.parametrize("ends", ("", "#### ", "The answer is 5. Wait, "))
def test_a_million_characters(ends):
    "What these cost is measured in benchmarks/grading.py; here they return."
    for unit in UNITS:
        verdict = grade(ends + unit * (10**6 // len(unit)), "5")
        assert isinstance(verdict.correct, bool) and verdict.reason


def test_hostile_texts():
    for text in ("9" * 10**5, "#### " + "9" * 10**5, "9^9^9^9", "\x00",
                 "\\boxed{" * 2000, "\\boxed{" * 2000 + "5" + "}" * 2000,
                 "\ud800", "1e999999999", "#### 1/" + "0" * 1000, "." * 10**5):
        verdict = grade(text, 5)
        assert isinstance(verdict.correct, bool) and verdict.reason
    assert is_correct("\ud800 #### 5\x00", 5)
    assert check_steps("1+" * 10**5) == []


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
