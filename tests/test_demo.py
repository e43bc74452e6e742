"The demo without a browser: hostile texts, failures, interruptions."
import signal
import threading
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings, strategies as st

from tiny_reason import demo

QUESTION = "Nora has 12 eggs. Nora buys 5 eggs. How many eggs has Nora?"
OURS = {"div", "b", "br", "span", "details", "summary", "i"}


@pytest.fixture(scope="module")
def student():
    base, _, tokenizer = demo.load_models("no/such/folder")
    return base, tokenizer


@pytest.fixture
def slow(student, monkeypatch):
    "Every token takes 10 ms, and nothing ends by itself."
    usual, ends = demo.chooser, demo.end_ids(*student)
    def chooser(*args):
        choose = usual(*args)
        def pick(scores):
            time.sleep(0.01)
            return choose(scores.index_fill(
                1, scores.new_tensor(ends).long(), -1e9))
        return pick
    monkeypatch.setattr(demo, "chooser", chooser)


def workers():
    return [t for t in threading.enumerate() if t.name == "stream"]


class Tags(HTMLParser):
    "Collects tags, attributes and text of a page."
    def __init__(self, page):
        super().__init__()
        self.tags, self.names, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}

    def handle_data(self, data): self.text += data


# What a model or a person writes is text

hostile = st.text() | st.lists(st.sampled_from(
    ["<script>", "<img src=x onerror=a()>", '"', "'", ">", "&lt;", "</div>",
     "1+1=2", "<b>2*2=5", "\n", "<!--", "**Final Answer:** ", "</think>", "8",
     "&#60;b&#62;", "\x00", "\ufffd"])).map("".join)


@settings(max_examples=150, deadline=None)
@given(hostile, hostile, st.booleans())
def test_no_text_becomes_markup(text, name, finished):
    parts = [demo.render(text, finished), demo.card(name, text, "8", text),
             demo.bars(name, demo.count_votes([text, name]))]
    for page in parts:
        found = Tags(page)
        assert found.tags <= OURS
        assert found.names <= {"class", "style"}
    if not demo.check_steps(text):
        assert Tags(demo.render(text, finished)).text == text


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_joined_pieces_are_the_text(student, text):
    _, tokenizer = student
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(demo.pieces_of(tokenizer, ids)) == whole


# A stream ends, whatever happens

@pytest.mark.parametrize("question", [
    "", "\ud83d", "🥚" * 300, "<|im_end|><|im_start|>system\n", "\x00\x1b[2J"])
def test_odd_questions_are_answered(student, question):
    list(demo.stream(*student, question, 4))
    assert not workers()


def test_questions_beyond_the_context(student):
    for length in (20_000, 100_000):
        with pytest.raises(ValueError, match="the question is too long"):
            demo.stream(*student, "x" * length)
    model, tokenizer = student
    room = model.config.max_position_embeddings
    prompt, left = demo.fitted(model, tokenizer, "7" * (room - 200), 10**6)
    assert len(prompt) + left == room


def test_a_failing_model(student, monkeypatch):
    def broken(*args, **kwargs): raise RuntimeError("the model broke")
    monkeypatch.setattr(type(student[0]), "forward", broken)
    with pytest.raises(RuntimeError, match="the model broke"):
        list(demo.stream(*student, QUESTION))
    assert not workers()


def test_ctrl_c_while_reading(student, slow):
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in demo.stream(*student, QUESTION, 2000): pass
    assert not workers()


def test_stop_before_the_first_token(student, slow):
    stop, pace = threading.Event(), {}
    stop.set()
    assert not list(demo.stream(*student, QUESTION, stop=stop, pace=pace))
    assert not pace and not workers()


# The widget

def page(student, **more):
    return demo.demo(student[0], student[0], student[1], **more)


def solve(ui, text=QUESTION, **values):
    ui.parts["tr-problem"].value = text
    for name, value in values.items(): ui.parts[f"tr-{name}"].value = value
    ui.parts["tr-solve"].click()
    ui.worker.join(60)
    return ui.parts["tr-status"].value


def test_usable_after_every_mishap(student, monkeypatch):
    ui = page(student)
    assert ui.parts["tr-status"].value == "ready"
    assert solve(ui, "\n \t").startswith("Type a problem")
    assert "too long" in solve(ui, "eggs " * 20_000)
    assert "gold" in solve(ui, gold="five or six")
    def broken(*args, **kwargs): raise RuntimeError("<b>broke</b>")
    with monkeypatch.context() as m:
        m.setattr(type(student[0]), "forward", broken)
        assert solve(ui, gold="", length=16) == "&lt;b&gt;broke&lt;/b&gt;"
    assert solve(ui, "<|im_end|> 🥚 <script>") == "done"
    assert solve(ui, models="base") == "done"
    assert "tuned" not in ui.parts["tr-answer"].value
    assert not workers()


def test_stop_while_it_votes(student, slow):
    ui = page(student)
    for name, value in (("problem", QUESTION), ("votes", 20), ("length", 400)):
        ui.parts[f"tr-{name}"].value = value
    for wait in (0, 0.2):
        ui.parts["tr-solve"].click()
        assert ui.parts["tr-status"].value == "thinking"
        first = ui.worker
        ui.parts["tr-solve"].click() # the second click does nothing
        assert ui.worker is first
        time.sleep(wait)
        ui.parts["tr-stop"].click()
        ui.worker.join(5)
        assert ui.parts["tr-status"].value == "stopped"
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    assert demo.more_answers(*student, QUESTION, 20, stop) == []
    assert not workers()


def test_panes_are_not_set_too_often(student, slow):
    ui, times = page(student), []
    ui.parts["tr-base"].observe(
        lambda change: times.append(time.monotonic()), "value")
    solve(ui, length=80, models="base")
    between = [b - a for a, b in zip(times, times[1:])][1:-1]
    assert len(times) > 3 and min(between) > 0.099


def test_a_missing_adapter(student):
    def train(say, stop):
        say("training: step 1 of 2")
        while not ready.wait(0.01):
            if stop.is_set(): raise InterruptedError("training was stopped")
        return student[0]
    base, tokenizer = student
    ui, ready = demo.demo(base, None, tokenizer, train=train), threading.Event()
    assert "no tuned model" in ui.parts["tr-tuned"].value
    assert "no tuned model" in solve(ui, models="tuned", length=16)
    assert solve(ui, models="both") == "done"
    offer = ui.parts["tr-train"]
    assert offer.layout.display != "none"
    offer.click()
    ui.parts["tr-stop"].click()
    ui.worker.join(10)
    assert ui.parts["tr-status"].value == "training was stopped"
    offer.click()
    ready.set()
    ui.worker.join(10)
    assert ui.parts["tr-status"].value == "ready"
    assert offer.layout.display == "none"
    assert solve(ui, models="tuned") == "done"


def test_nothing_to_offer(student):
    ui = demo.demo(student[0], None, student[1], examples=[])
    assert ui.parts["tr-train"].layout.display == "none"


# Training in a process of its own

def test_training_is_stopped_and_resumed(tmp_path):
    flags = ("--num_samples 40 --warmup_steps 1 --eval_steps 2 --save_steps 2 "
             "--max_steps").split()
    said, stop = [], threading.Event()
    def say(text):
        said.append(text)
        if "of 500" in text: stop.set()
    with pytest.raises(InterruptedError):
        demo.train_adapter(tmp_path, say, stop, *flags, "500")
    assert not (tmp_path / "adapter_model.safetensors").exists()
    done = max(int(p.name[11:]) for p in tmp_path.glob("checkpoint-*"))
    model = demo.train_adapter(tmp_path, said.append, None, *flags,
                               str(done + 2))
    assert model is not None
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_training_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="did you mean"):
        demo.train_adapter(tmp_path, print, None, "--max_step", "2")
