"Progress that is written where nobody can redraw it."
import io
import sys

from tiny_reason.lib.show import progress_bar


def test_a_file_gets_a_line_every_five_seconds(monkeypatch):
    "A hundred steps of one second each, by a clock of our own."
    clock, log = [0.0], io.StringIO()
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar(100, desc="training", unit="step") as bar:
        for step in range(100):
            clock[0] += 1
            bar.set_postfix_str(f"loss {step}", refresh=False)
            bar.update()
    lines = [x for x in log.getvalue().replace("\r", "").split("\n") if x.strip()]
    assert 10 < len(lines) <= 22
    assert all(x.startswith("training: ") for x in lines)
    assert "100/100" in lines[-1] and "loss 99" in lines[-1]


def test_a_terminal_gets_a_bar(monkeypatch):
    clock, log = [0.0], io.StringIO()
    log.isatty = lambda: True
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar(100) as bar:
        for _ in range(100):
            clock[0] += 1
            bar.update()
    assert log.getvalue().count("\r") > 100
