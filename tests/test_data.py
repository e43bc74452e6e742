"""Problems, files and tokens that 00_data's cells are too few to cover."""
import json
import os
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tiny_reason.data import (GROUPS, LAYOUTS, STYLES, encode, load_problems,
                              make_problems, overlap, parse_answer,
                              parse_completion, prepare, sort_out, to_messages,
                              write_equations)
from tiny_reason.lib.prompts import encode_text
from tiny_reason.lib.stories import (KINDS, OPERATORS, SPLITS, STORIES,
                                     draw_problem, reserved_for, split_of)

ROOT = Path(__file__).parents[1]
HOME = ROOT.parent / "shared" / "hf_home"
ROW = dict(question="How many are 2 and 3?", answer="2+3=<<2+3=5>>5\n#### 5")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(files("tiny_reason") / "student"))


# A reader of stories that knows the wordings alone: it shares no code with
# the functions that compose them, and never looks at an answer.

def wording_pattern(wording):
    "Named groups for the gaps: `{N} finds {n} more {o}`."
    seen = set()

    def group(found):
        gap = found[1]
        if gap in seen:
            return f"(?P={gap})"
        seen.add(gap)
        return f"(?P<{gap}>" + (r"\w+)" if gap in "NFGo" else
                                r"[a-z ]+)" if gap[1:] else r"\d+)")
    return re.compile(re.sub(r"\\{(\w+)\\}", group, re.escape(wording)), re.I)


STARTS = [("start", wording_pattern(w)) for w in STORIES["starts"]]
EVENTS = [(kind, wording_pattern(w)) for kind, about in KINDS.items()
          for w in about["wordings"]]
QUESTIONS = [("question", wording_pattern(w)) for w in STORIES["questions"]]
AS_NUMBER = {word: n for n, word in [*STORIES["parts"].items(),
                                     *STORIES["times"].items()]}


def find(sentence, readers):
    "The first reader that understands a sentence: kind, and gaps filled."
    text = re.sub("^(Then|Later|After that) ", "", sentence)
    return next((kind, found.groupdict()) for kind, pattern in readers
                if (found := pattern.fullmatch(text)))


def read_story(question):
    "Kinds and result of a story, from its text alone."
    start, *events, asked = question.split(". ")
    who, x, kinds = find(start, STARTS)[1], int(re.search(r"\d+", start)[0]), []
    for kind, gaps in [find(event, EVENTS) for event in events] + [
            ("asked", find(asked, QUESTIONS)[1])]:
        assert all(gaps.get(k, who[k]) == who[k] for k in "No"), question
        if kind == "asked":
            break
        v = {dict(part="k", times="t").get(gap, gap):
             AS_NUMBER.get(text.lower()) or int(text)
             for gap, text in gaps.items() if gap not in "NFGo"} | {"x": x}
        for a, op, b, _, c in KINDS[kind]["equations"].split():
            v[c] = OPERATORS[op](v[a], v[b])
            assert 0 < v[c] <= STORIES["largest"]
        kinds, x = [*kinds, kind], v["y"]
    return kinds, x


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("group", [None, *GROUPS])
def test_ten_thousand_stories(split, group):
    for p in make_problems(850, split=split, group=group):
        reasoning, final = parse_answer(p["answer"])
        assert read_story(p["question"]) == (p["kinds"], int(final))
        assert split_of(p["question"]) == split
        write_equations(reasoning)  # an error if an annotation is wrong
        assert re.findall(r"=(\d+)>>", reasoning)[-1] == final
        pairs = {reserved_for(*q) for q in zip(p["kinds"], p["kinds"][1:])}
        assert pairs - {None} == ({split} if group == "combined" else set())


@given(st.integers(0, 2**32), st.sampled_from(SPLITS),
       st.sampled_from(GROUPS))
@settings(max_examples=200, deadline=None)
def test_any_seed_gives_a_sound_story(seed, split, group):
    p = draw_problem(random.Random(seed), split, group)
    assert read_story(p["question"])[1] == int(parse_answer(p["answer"])[1])


# Files as people really have them.

GOOD = json.dumps(ROW).encode()
BAD = {
    "empty": (b"", "the file holds no problem"),
    "blank lines": (b"\n\r\n \n", "the file holds no problem"),
    "cut in half": (GOOD[:30], "line 1: not JSON"),
    "second line cut": (GOOD + b"\n" + GOOD[:30], "line 2: not JSON"),
    "csv": (b"question,answer\nHow many?,4\n", "line 1: not JSON"),
    "array": (b"[" + GOOD + b"]", "line 1: need an object"),
    "wrong columns": (b'{"problem": "x", "solution": "y"}',
                      "found 'problem, solution'"),
    "number as answer": (b'{"question": "x", "answer": 4}', "in quotes"),
    "null as question": (b'{"question": null}', "line 1: need an object"),
    "latin-1": (GOOD + b'\n{"question": "caf\xe9"}', "line 2: not UTF-8"),
    "utf-16": (GOOD.decode().encode("utf-16"), "line 1: not UTF-8"),
    "lone surrogate": (b'{"question": "\\ud800"}', "surrogate"),
    "deep": (b"[" * 100_000, "line 1: not JSON"),
    "huge number": (b'{"question": ' + b"9" * 10_000 + b"}",
                    "line 1: not JSON"),
    "NUL bytes": (b"\0\0\0", "line 1: not JSON")}


@pytest.mark.parametrize("name", BAD)
def test_bad_file(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        load_problems(str(path))
    assert str(path) in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize("write", [
    lambda rows: b"\xef\xbb\xbf" + b"\n".join(rows),
    lambda rows: b"\r\n".join(rows) + b"\r\n\r\n",
    lambda rows: b"\n\n" + b"\n".join(rows)])
def test_odd_but_good_file(tmp_path, write):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(write([GOOD, GOOD, b'{"question": "No answer?"}']))
    assert load_problems(str(path)).to_list() == [
        ROW, ROW, dict(question="No answer?", answer="")]


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(max_examples=300, deadline=None)
def test_any_file_is_read_or_named(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    try:
        assert len(load_problems(str(path)))
    except ValueError as e:
        assert str(path) in str(e)


def test_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no train.jsonl"):
        load_problems(str(tmp_path))
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + GOOD)
    assert len(load_problems(str(tmp_path), split="test")) == 3
    (tmp_path / "test.jsonl").write_bytes(GOOD)
    assert len(load_problems(str(tmp_path), split="test")) == 1
    with pytest.raises(FileNotFoundError, match="no train.jsonl"):
        load_problems(str(tmp_path))


def test_asking_for_more_says_so(tmp_path, caplog):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(GOOD)
    assert len(load_problems(str(path), n=7)) == 1
    assert "asked for 7 problems" in caplog.text and "has 1" in caplog.text
    assert len(load_problems(str(path), n=0)) == 0
    with pytest.raises(ValueError, match="need 0 or more"):
        load_problems(str(path), n=-1)


def test_every_fault_is_counted(tmp_path, tokenizer):
    faults = {"duplicate": ROW, "empty question": dict(ROW, question=" \n"),
              "no delimiter": dict(ROW, question="a", answer="5"),
              "several delimiters": dict(ROW, question="b",
                                         answer="#### 1 #### 1"),
              "empty reasoning": dict(ROW, question="c", answer="#### 4"),
              "empty answer": dict(ROW, question="d", answer="x\n####"),
              "answer is no number": dict(ROW, question="e",
                                          answer="x\n#### many"),
              "reasoning closes its own tag": dict(
                  ROW, question="f", answer="x</think>y\n#### 4"),
              "wrong annotation": dict(ROW, question="g",
                                       answer="<<2*2=5>>5\n#### 5"),
              "too long": dict(ROW, question="h" * 100_000)}
    hostile = [dict(ROW, question=f"How many {text}?") for text in (
        "<|im_end|>", "<|im_start|>system", "</think>",
        "**Final Answer:** 5")]
    path = tmp_path / "faults.jsonl"
    path.write_text("\n".join(map(json.dumps, [
        ROW, *faults.values(), *hostile])))
    *_, report = prepare(str(path), tokenizer=tokenizer,
                         calculator="equations")
    assert report == dict(read=15, kept=5, dropped=dict.fromkeys(faults, 1))
    with pytest.raises(TypeError, match="needs a tokenizer"):
        prepare(str(path))


def test_solutions_of_one_question_stay_together(tmp_path, tokenizer):
    rows = [dict(question=f"How many are {i}?", answer=f"step {s}\n#### {i}")
            for s in range(4) for i in range(30)]
    path = tmp_path / "several.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    train, validation, report = prepare(str(path), tokenizer=tokenizer)
    assert report == dict(read=120, kept=120, dropped={})
    assert (len(train), len(validation)) == (108, 12)
    assert not {*train["question"]} & {*validation["question"]}


def test_nothing_left_is_an_error(tmp_path, tokenizer):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(ROW))
    with pytest.raises(ValueError, match="too few problems left"):
        prepare(str(path), tokenizer=tokenizer)


# Text and tokens.

CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
HOSTILE = st.lists(st.sampled_from([
    *CONTROL, "<|im_", "start|>", "<", "|", "<think>", "</think>", "\n",
    "system", "é", "e\u0301", "4"]) | st.text(max_size=5)).map("".join).filter(
        lambda text: text == text.encode("utf-8", "ignore").decode())


@given(HOSTILE)
@settings(max_examples=500, deadline=None)
def test_text_never_forms_a_control_token(tokenizer, text):
    ids = encode_text(text, tokenizer)
    assert not {*ids} & {*tokenizer.get_added_vocab().values()}
    whole = unicodedata.normalize("NFC", tokenizer.decode(ids))
    assert whole == unicodedata.normalize("NFC", text)


@given(HOSTILE, HOSTILE)
@settings(max_examples=200, deadline=None)
def test_a_record_has_the_templates_control_tokens_alone(
        tokenizer, question, reasoning):
    p = dict(question=question, answer=f"so {reasoning}\n#### 4")
    if sort_out([p])[1]:
        return
    ids = encode(p, tokenizer, system_prompt=question)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids if i < 3] == [
        CONTROL[0], CONTROL[1]] * 3


@pytest.mark.parametrize("name", ["student", "Qwen/Qwen2.5-1.5B-Instruct"])
def test_no_spelling_of_a_control_token_becomes_one(name, tmp_path):
    "In the question, in the system prompt and in the answer."
    if name == "student": name = str(files("tiny_reason") / "student")
    elif not HOME.is_dir(): pytest.skip("needs Qwen2.5's tokenizer")
    else: shutil.copytree(HOME / "hub", tmp_path / "hub")
    tokenizer = AutoTokenizer.from_pretrained(
        name, cache_dir=tmp_path / "hub", local_files_only=True)
    control = {*tokenizer.get_added_vocab().values()}

    def count(p, **how):
        ids = encode(p, tokenizer, **how)["input_ids"]
        return Counter(i for i in ids if i in control), tokenizer.decode(ids)
    plain, _ = count(ROW)
    for t in tokenizer.get_added_vocab():
        p = dict(question=f"a{t}b {t}{t}", answer=f"so {t}, 1{t}\n#### 4{t}")
        found, text = count(p, system_prompt=f"c{t}d")
        assert found == plain and p["question"] in text


@given(st.sampled_from(STYLES), st.text(min_size=1), st.text(min_size=1))
@settings(max_examples=300, deadline=None)
def test_injection_round_trips(style, reasoning, final):
    p = dict(question="?", answer=f"{reasoning}\n#### {final}")
    try:
        parts = parse_answer(p["answer"])
        told = to_messages(p, style, calculator="keep")["completion"]
    except ValueError:
        return
    text = told if style in LAYOUTS else told[0]["content"]
    assert parse_completion(text, style) == parts


def test_overlap_finds_what_it_names():
    train = make_problems(50)
    test = [dict(question=train[0]["question"]),
            dict(question=re.sub(r"\d+", "7", train[1]["question"])),
            dict(question="Nothing of this stands in the training set at all, "
                 "not even a run of words as long as thirteen.")]
    leaks = overlap(train, test)
    assert leaks["same text"] == [0]
    assert leaks["same but for names and numbers"] == [0, 1]
    assert 0 in leaks["13 words in a row"] and 2 not in leaks[
        "13 words in a row"]


# The lesson's own assertions, on the real rows.

@pytest.mark.skipif(not HOME.is_dir(), reason=(
    "needs GSM8K and Qwen2.5's tokenizer in a Hugging Face home at "
    "../shared/hf_home"))
def test_lesson_on_real_rows(tmp_path):
    shutil.copytree(HOME, tmp_path / "hf")
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"),
                                "HF_HUB_OFFLINE": "1", "IN_TEST": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute",
         "--output-dir", str(tmp_path), str(ROOT / "nbs" / "00_data.ipynb")],
        env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "7,473 records agree" in (tmp_path / "00_data.ipynb").read_text()
