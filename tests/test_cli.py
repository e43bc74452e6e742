"The command line from outside: real processes, real signals, real pipes."
import json, os, re, signal, subprocess, sys, time, weakref
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from tiny_reason import cli
from tiny_reason.app import ask, flags, settings
from tiny_reason.lib import checkpoints, loading
from tiny_reason.data import make_problems

COMMAND = [sys.executable, "-m", "tiny_reason.cli"]
SHORT = ["--num_samples", "40", "--warmup_steps", "1", "--eval_steps", "2",
         "--save_steps", "2"]
KEYS = [f"{section}.{f.name}" for section, part in flags.SECTIONS.items()
        for f in fields(part)]


def run(*args, **kwargs):
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True,
                          text=True, timeout=120, **kwargs)


def refused(capsys, *args):
    "The one sentence on stderr of a command that exits with 2."
    assert cli.main(list(map(str, args))) == 2
    text = capsys.readouterr().err.strip()
    assert text.startswith("tiny_reason: ") and "\n" not in text
    return text


# Wrong arguments

def test_help_loads_no_torch():
    code = ("import sys, tiny_reason.cli as c\n"
            "codes = [c.main(a) for a in (['--help'], ['train', '--help'],"
            " ['chat', '--help'], ['train', '--max_step', '3'])]\n"
            "heavy = {'torch', 'transformers', 'trl', 'datasets', 'peft'}\n"
            "print(codes, sorted(heavy & set(sys.modules)))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True,
                         text=True, timeout=60)
    assert out.stdout.strip().splitlines()[-1] == "[0, 0, 0, 2] []"


def test_a_real_process_exits_with_2_and_one_line():
    out = run("train", "--learning_rat", "1e-3")
    assert out.returncode == 2 and out.stdout == ""
    assert out.stderr == ("tiny_reason: unknown flag --learning_rat; did you "
                          "mean --learning_rate?\n")


@pytest.mark.parametrize("args, words", [
    ([], "name a command"),
    (["trian"], "'train'"),
    (["train", "--config", "studnet"], "'student'"),
    (["train", "--config", "qwen2.5-1.5"], "'qwen2.5-1.5b'"),
    (["train", "--config", "no/such.yaml"], "no/such.yaml"),
    (["train", "--learning_rate", "abc"], "between 0 and 1"),
    (["train", "--learning_rate", "nan"], "between 0 and 1"),
    (["train", "--learning_rate", "inf"], "between 0 and 1"),
    (["train", "--max_steps", "-1"], "whole number above 0"),
    (["train", "--max_steps", "2.5"], "whole number above 0"),
    (["train", "--validation_split", "1"], "between 0 and 1"),
    (["train", "--lora.dropout", "1"], "below 1"),
    (["train", "--model.device", "gpu"], "cuda"),
    (["train", "--model.device", "cuda:1"], "CUDA_VISIBLE_DEVICES=1"),
    (["train", "--model.four_bit", "3"], "true or false"),
    (["train", "--data.style", "thinking"], "think, instruction or question"),
    (["train", "--data.calculator", "drop"], "strip, keep or equations"),
    (["train", "--config", "student", "--save_steps", "30"],
     "multiple of training.eval_steps"),
    (["train", "--lora_r"], "expected one argument"),
    (["train", "student"], "student"),
    (["chat", "--resume"], "unknown flag --resume"),
    (["chat", "--temperature", "-1"], "0 or more"),
    (["chat", "--mode", "genrate"],
     "reasoning, chat or generate; did you mean 'generate'?"),
])
def test_wrong_arguments(args, words, capsys):
    assert words in refused(capsys, *args)


def mistyped(key):
    "One-letter slips in the last part of a dotted key."
    section, name = key.split(".")
    middle = len(name) // 2
    for slip in (name[:middle] + name[middle + 1:], name + name[-1],
                 name[:middle] + "x" + name[middle + 1:]):
        if len(name) > 2: yield f"{section}.{slip}"


@pytest.mark.parametrize("key", [k for k in KEYS if k != "lora.r"])
def test_typos_in_a_file_and_in_a_flag(key, tmp_path, capsys):
    for wrong in mistyped(key):
        section, slip = wrong.split(".")
        path = tmp_path / "my.yaml"
        path.write_text(yaml.safe_dump({section: {slip: 1}}))
        assert f"did you mean {key}?" in refused(capsys, "train", "--config",
                                                 path)
        assert f"did you mean --{key}?" in refused(capsys, "train",
                                                   f"--{wrong}", "1")


@pytest.mark.parametrize("flag", flags.FLAT.values())
def test_typos_in_a_short_flag(flag, capsys):
    slip = flag[:-2] + flag[-1]
    assert f"did you mean {flag}" in refused(capsys, "info", slip, "1")


@pytest.mark.parametrize("text, words", [
    ("trainig: {max_steps: 3}", "'training'"),
    ("training: {r: 8}", "lora.r"),
    ("training: 3", "expected keys and values"),
    ("- 3", "expected sections"),
    ("lora: {r: 8, r: 9}", "stands 2 times"),
    ("lora: {r: 8}\nlora: {alpha: 9}", "stands 2 times"),
    ("lora: &a {r: 8}\nmodel: *a", "aliases"),
    ("project: {name: !!python/object/apply:os.getcwd []}", "line 1"),
    ("project: {name: [", "line"),
    ("training: {max_steps: yes}", "whole number above 0"),
    ("training: {max_steps: null}", "whole number above 0"),
    ("training: {learning_rate: .inf}", "between 0 and 1"),
    ("learning_rate: 1e-3", "'training.learning_rate'"),
    ("lora: {s: 8}", "lora.r?"),
    ("lora: {rr: 8}", "lora.r?"),
    ("[" * 3000, "my.yaml"),
    ("training: {max_steps: 1" + "0" * 5000 + "}", "my.yaml"),
])
def test_unsound_files(text, words, tmp_path, capsys):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    said = refused(capsys, "train", "--config", path)
    assert words in said and str(path) in said


@pytest.mark.parametrize("content, words", [
    (None, "No such file"), (b"", "holds 0"), (b" \n" * 5000, "holds 0"),
    (b"a short line\n", "holds 12"), (b"\x89PNG\r\n\x1a\n" * 900, "UTF-8"),
    (b"text \0 and more\n" * 900, "binary")])
def test_no_text_to_measure_on(content, words, tmp_path, capsys, monkeypatch):
    def load(*_, **__): raise AssertionError("a model was loaded")
    monkeypatch.setattr(loading, "load_any", load)
    path = tmp_path / "mine.txt"
    if content is not None: path.write_bytes(content)
    for name in (path, tmp_path) if content is None else (path,):
        said = refused(capsys, "evaluate", "--config", "student",
                       "--output_dir", tmp_path / "out", "--elsewhere", name)
        assert str(name) in said and (name == tmp_path or words in said)
    assert not (tmp_path / "out").exists()


# What is meant

def test_flags_beat_the_file_wherever_they_stand():
    for argv in (["train", "--max_steps", "6", "--config", "student"],
                 ["train", "--config=student", "--training.max_steps=6"]):
        _, settings = flags.parse(argv)
        assert settings.training.max_steps == 6
        assert settings.training.learning_rate == 4e-3
        assert type(settings.training.max_steps) is int


def test_every_bundled_configuration_is_sound():
    folder = Path(cli.__file__).parent / "configs"
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    assert names == ["distill", "pretrain", "qwen2.5-1.5b", "reinforce",
                     "student", "tinyllama-1.1b"]
    for name in "pretrain", "reinforce": flags.parse([name, "--config", name])
    for name in set(names) - {"pretrain", "reinforce"}:
        _, settings = flags.parse(["train", "--config", name])
        t = settings.training
        assert t.batch_size * t.gradient_accumulation_steps == 8
        assert (t.max_steps, t.warmup_steps, t.eval_steps) == (250, 50, 50)
        found = settings.lora.r, settings.lora.alpha, settings.lora.dropout
        assert found == ((8, 16, 0.05) if name == "distill" else (16, 32, 0))


def test_the_resolved_configuration_gives_itself(tmp_path):
    path = tmp_path / "config.yaml"
    _, first = flags.parse(["train", "--config", "qwen2.5-1.5b",
                            "--lora.target_modules", '["q_proj"]'])
    path.write_text(yaml.safe_dump(settings.plain(first)))
    _, again = flags.parse(["train", "--config", str(path)])
    assert settings.plain(again) == settings.plain(first)


# Errors of a run

def test_expected_errors_are_one_sentence(tmp_path, capsys, monkeypatch):
    args = ["train", "--config", "student", "--output_dir", str(tmp_path),
            "--data.source", str(tmp_path / "none.jsonl"), "--max_steps", "2"]
    assert cli.main(args) == 1
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("tiny_reason: no problems at")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("TINY_REASON_DEBUG", "1")
    with pytest.raises(FileNotFoundError): cli.main(args)


def test_a_cuda_device_that_is_not_there(capsys):
    import torch
    if torch.cuda.is_available(): pytest.skip("there is a CUDA device")
    args = ["info", "--config", "student", "--model.device", "cuda"]
    assert cli.main(args) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_info_judges_the_data(tmp_path, capsys):
    path, args = tmp_path / "mine.jsonl", ["info", "--config", "student",
                                           "--data.source"]
    rows = [json.dumps(dict(question=f"{i} and 1?", answer=f"so\n#### {i}"))
            for i in range(4)]
    path.write_text("\n".join([*rows, '{"question": "cut']))
    assert cli.main([*args, str(path)]) == 1
    assert "mine.jsonl, line 5: not JSON" in capsys.readouterr().err
    path.write_text("\n".join([*rows, rows[0]]))
    assert cli.main([*args, str(path)]) == 0
    out = capsys.readouterr().out
    assert "5 read, 4 kept (dropped: duplicate: 1)" in out
    assert "overlap: nothing to compare with" in out
    assert cli.main([*args, str(path), "--data.test_source", str(path)]) == 0
    assert re.search(r"same text +5\n", capsys.readouterr().out)
    assert cli.main([*args, str(path), "--data.test_source", "no.jsonl"]) == 1


# The whole way round

def test_train_evaluate_chat(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usual = ["--config", "student", "--model.name", str(base)]
    assert cli.main(["info", *usual]) == 0
    assert "memory:" in capsys.readouterr().out

    train = ["train", *usual, *SHORT, "--max_steps", "4"]
    assert cli.main(train) == 0
    out = capsys.readouterr().out
    assert "36 to train on, 4 to validate" in out
    assert "next: tiny_reason evaluate --config" in out
    folder = tmp_path / "outputs" / "student"
    assert (folder / "adapter_model.safetensors").is_file()
    kept = (folder / "adapter_model.safetensors").read_bytes()
    assert cli.main(train) == 1 # nothing is lost unless somebody says so
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "adapter_model.safetensors").read_bytes() == kept
    assert cli.main([*train, "--overwrite"]) == 0
    card = folder / "config.yaml"
    assert yaml.safe_load(card.read_text())["training"]["max_steps"] == 4

    merged, real = [], loading.merge

    def alone(*args, **how): # a card of 6 GB has no room for two
        assert not [ref for ref in merged if ref()]
        made = real(*args, **how)
        merged.append(weakref.ref(made))
        return made

    monkeypatch.setattr("tiny_reason.model.merge", alone)
    assert cli.main(["evaluate", "--config", str(card), "--test_samples", "10",
                     "--max_new_tokens", "12"]) == 0
    assert len(merged) == 2
    out = capsys.readouterr().out
    for word in ("familiar", "taught", "combined", "twin", "base, question",
                 "tuned, think", "95 % interval", "p against"):
        assert word in out
    for name in ("base-think", "base-question", "tuned-think"):
        rows = (folder / f"{name}.jsonl").read_text().splitlines()
        assert len(rows) == 10 and "correct" in json.loads(rows[0])
    for name in ("summary.json", "table.md", "accuracy.png"):
        assert (folder / name).stat().st_size > 0
    records = [str(folder / f"{n}.jsonl") for n in ("base-think",
                                                    "tuned-think")]
    assert cli.main(["evaluate", "--compare", *records]) == 0
    assert "| tuned-think | 10 |" in capsys.readouterr().out
    assert cli.main(["evaluate", "--compare", "no.jsonl"]) == 1
    assert "no.jsonl" in capsys.readouterr().err

    # --resume asks only what is missing; --limit asks less
    kept = [json.loads(line) for line in Path(records[0]).read_text()
            .splitlines()]
    Path(records[0]).write_text("".join(json.dumps(r) + "\n"
                                        for r in kept[:4]) + '{"quest')
    again = ["evaluate", "--config", str(card), "--max_new_tokens", "12",
             "--resume"]
    assert cli.main([*again, "--limit", "10"]) == 0
    assert [json.loads(line) for line in Path(records[0]).read_text()
            .splitlines()][:4] == kept[:4]
    assert cli.main([*again, "--limit", "3"]) == 0
    assert len(Path(records[0]).read_text().splitlines()) == 3
    capsys.readouterr()

    # Problems without answers are answered all the same
    (tmp_path / "open.jsonl").write_text('{"question": "2 eggs and 3?"}\n')
    assert cli.main(["evaluate", "--config", str(card), "--max_new_tokens",
                     "4", "--data.test_source", "open.jsonl"]) == 0
    assert "not graded" in capsys.readouterr().out

    # The adapter belongs to another base: a sentence, not a mismatch of shapes
    assert cli.main(["evaluate", "--config", "student"]) == 1
    assert "was made for" in capsys.readouterr().err

    # A pipe, in a process of its own, without noise
    out = run("chat", "--config", card, "--max_new_tokens", "8",
              input="Nora has 2 eggs. How many?\n", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert "answer: " in out.stdout and out.stderr == ""


def test_what_tuning_costs_elsewhere(tmp_path, capsys, monkeypatch):
    from tiny_reason.model import add_lora, load_base
    monkeypatch.chdir(tmp_path)
    usual = ["evaluate", "--config", "student", "--limit", "3",
             "--max_new_tokens", "4", "--elsewhere"]
    assert cli.main(usual) == 0 # the base alone
    said = capsys.readouterr()
    assert "no adapter" in said.err and "| tuned |" not in said.out
    assert "| perplexity, narrative | 3 texts, " in said.out
    folder = tmp_path / "outputs" / "student"
    narrative, symbols, sums = json.loads(
        (folder / "summary.json").read_text())["elsewhere"]
    assert "after" not in narrative and sums["n"] == 3

    model, tokenizer = load_base("student", device="cpu")
    add_lora(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "mine.txt").write_text("\ufeffNora has two eggs.\n" * 300)
    assert cli.main([*usual, "mine.txt"]) == 0
    said = capsys.readouterr()
    assert re.search(r"^\| perplexity, mine.txt \| 3 texts, [\d,]+ tokens \|.*\| "
                     r"×1\.000 \[1\.000, 1\.000\] \|$", said.out, re.M)
    text, sums = json.loads(
        (folder / "summary.json").read_text())["elsewhere"]
    assert text["change"] == [1, 1, 1] and sums["p"] == 1 # a fresh adapter
    records = [[json.loads(line) for line in (folder / f"{who}-elsewhere.jsonl")
                .read_text().splitlines()] for who in ("base", "tuned")]
    assert records[0] == records[1] and len(records[0]) == 6
    assert "perplexity, mine.txt" in (folder / "table.md").read_text()
    assert cli.main(["evaluate", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "--elsewhere [FILE]" in told and "perplexity" in told


def test_chat_without_an_adapter_says_so(base, tmp_path, capsys):
    assert cli.main(["chat", "--config", "student", "--model.name", str(base),
                     "--output_dir", str(tmp_path), "--prompt", "2 eggs?",
                     "--max_new_tokens", "4"]) == 0
    said = capsys.readouterr()
    assert "no adapter" in said.err and "answer: " in said.out


def test_chat_with_whatever_was_trained(base, tmp_path, capsys, monkeypatch):
    from tiny_reason.model import add_lora, load_base
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_base(str(base), device="cpu")
    add_lora(model).save_pretrained("outputs/student")
    tokenizer.save_pretrained("outputs/student")
    def chat(*args):
        code = cli.main(["chat", "--config", "student", "--max_new_tokens", "4",
                         *args])
        said = capsys.readouterr()
        return code, said.out, said.err
    ask = ["--prompt", "Nora has 2 eggs. "]
    for mode in ("chat", "generate"):
        code, out, err = chat("--mode", mode, *ask, "--model.name", str(base))
        assert (code, err) == (0, "") and "answer: " not in out
    # An adapter by its folder; an adapter of another model is left alone
    assert chat(*ask, "--model.name", "outputs/student")[::2] == (0, "")
    code, _, err = chat(*ask)
    assert code == 0 and f"was made for {base}" in err
    code, _, err = chat("--mode", "chat", "--prompt", "eggs " * 3000)
    assert code == 1 and "context is 512 tokens\n" in err


def test_a_text_to_continue_is_taken_to_the_letter(monkeypatch):
    from types import SimpleNamespace
    from io import StringIO
    def asked(mode, prompt=None, piped=""):
        monkeypatch.setattr(sys, "stdin", StringIO(piped))
        return ask.asked_text(SimpleNamespace(mode=mode, prompt=prompt))
    for text in ("### Answer:\n", " 2 eggs  "):
        assert asked("generate", text) == asked("generate", None, text) == text
        assert asked("chat", text) == asked("reasoning", None, text) == (
            text.strip())
    with pytest.raises(ValueError, match="empty"): asked("generate", None, "\n")


def test_chat_in_a_terminal(base, tmp_path):
    "Keys, commands and Ctrl-C on a real terminal device."
    pexpect = pytest.importorskip("pexpect") # comes with Jupyter
    from tiny_reason.model import add_lora, load_base
    model, tokenizer = load_base(str(base), device="cpu")
    add_lora(model).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    args = ["-m", "tiny_reason.cli", "chat", "--config", "student",
            "--model.name", str(base), "--adapter_path", str(tmp_path),
            "--max_new_tokens", "1900", "--temperature", "1.5"]
    terminal = pexpect.spawn(sys.executable, args, timeout=90,
                             encoding="utf-8", dimensions=(24, 200))
    try:
        terminal.expect_exact("tuned> ")
        terminal.sendline("/base")
        terminal.expect_exact("base> ")
        terminal.sendline("Nora has 12 eggs?")
        terminal.expect_exact("eggs?\r\n")
        terminal.delaybeforesend = None
        terminal.expect(r"\S") # the seed makes it long enough to stop it
        terminal.sendintr()
        terminal.expect_exact("(stopped)")
        terminal.expect_exact("base> ")
        terminal.send("\x1b[A") # arrow up
        terminal.expect_exact("Nora has 12 eggs?")
        terminal.send("\x15/greedy\r") # Ctrl-U empties the line
        terminal.expect_exact("temperature 0.0")
        terminal.expect_exact("base> ")
        terminal.sendline("quit")
        terminal.expect(pexpect.EOF)
        terminal.close()
        assert terminal.exitstatus == 0
    finally: terminal.close(force=True)


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130),
                                        (signal.SIGTERM, 143)])
def test_a_signal_says_how_to_go_on(sent, code, base, tmp_path, capsys):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*COMMAND, "train", "--config", "student", "--model.name", str(base),
         *SHORT, "--max_steps", "5000", "--output_dir", str(out)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        until = time.time() + 90
        while not list(out.glob("checkpoint-*")):
            assert process.poll() is None and time.time() < until
            time.sleep(0.05)
        process.send_signal(sent)
        said = process.communicate(timeout=60)[1]
    finally: process.kill()
    assert process.returncode == code and "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert "tiny_reason: interrupted." in last
    assert f"train --config {out}/config.yaml --resume" in last
    assert checkpoints.last_checkpoint(out) in last

    again = ["train", "--config", str(out / "config.yaml")]
    assert cli.main(again) == 1
    assert "add --resume" in capsys.readouterr().err
    done = max(int(p.name[11:]) for p in out.glob("checkpoint-*"))
    assert cli.main([*again, "--resume", "--max_steps", str(done + 2)]) == 0
    assert f"trained: {done + 2} steps" in capsys.readouterr().out


# Distillation

def test_distill_train_evaluate(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problems = [dict(p) for p in make_problems(12, group="familiar")]
    rows = [*problems, problems[0], dict(question="2 eggs and 3?")]
    (tmp_path / "ask.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ask = ["distill", "--config", "distill", "--teacher_model", "student",
           "--teacher_style", "question", "--input_file", "ask.jsonl",
           "--output_file", "out/traces.jsonl", "--max_new_tokens", "150"]
    assert cli.main(ask) == 0
    said = capsys.readouterr().out
    assert "questions: 13 (1 repeated" in said
    assert "judged by: gold: 12, vote: 1" in said
    assert "13 new, 0 there before" in said
    assert "--data.source out/traces.kept.jsonl" in said
    traces = (tmp_path / "out/traces.jsonl").read_bytes()
    (tmp_path / "out/traces.jsonl").write_bytes(traces[:-9]) # a kill
    assert cli.main(ask) == 0
    assert "1 new, 12 there before" in capsys.readouterr().out
    assert (tmp_path / "out/traces.jsonl").read_bytes() == traces
    kept = [json.loads(x) for x in (tmp_path / "out/traces.kept.jsonl")
            .read_text().splitlines()]
    assert {"question", "cot", "answer", "prediction"} <= set(kept[0])

    train = ["train", "--config", "distill", "--data.source",
             "out/traces.kept.jsonl", *SHORT, "--max_steps", "2"]
    for style in ("question", "think"):
        assert cli.main([*train, "--data.style", style, "--overwrite"]) == 0
        assert f"{len(kept)} kept (dropped: none)" in capsys.readouterr().out
    assert cli.main(["evaluate", "--config", "outputs/distill/config.yaml",
                     "--limit", "3", "--max_new_tokens", "150"]) == 0
    found = [json.loads(x) for x in Path("outputs/distill/predictions.jsonl")
             .read_text().splitlines()]
    assert len(found) == 3 and set(found[0]) == {
        "question", "generated_text", "prediction", "gold_answer"}
    capsys.readouterr()

    # The tuned model teaches; its traces are not mixed with the base's
    ask[ask.index("student")] = "outputs/distill"
    assert cli.main(ask) == 1
    assert "written with teacher" in capsys.readouterr().err
    assert (tmp_path / "out/traces.jsonl").read_bytes() == traces
    ask[ask.index("out/traces.jsonl")] = "out/second.jsonl"
    assert cli.main([*ask, "--limit", "2"]) == 0


@pytest.mark.parametrize("flags, code, words", [
    (["--input_file", "ask.jsonl"], 2, "needs --output_file"),
    (["--output_file", "out.jsonl"], 2, "needs --input_file"),
    (["--teacher_style", "chat"], 2, "think, question or instruction"),
    (["--timeout", "0"], 2, "a number above 0"),
    (["--input_file", "no.jsonl", "--output_file", "o.jsonl"], 1, "no.jsonl"),
    (["--input_file", "bad.jsonl", "--output_file", "o.jsonl"], 1, "line 2"),
    (["--input_file", "torn.jsonl", "--output_file", "o.jsonl"], 1, "line 2"),
    (["--input_file", "empty.jsonl", "--output_file", "o.jsonl"], 1,
     "holds no problem"),
    (["--input_file", "ask.jsonl", "--output_file", "folder"], 1,
     "cannot write traces to folder: it is a folder"),
    (["--input_file", "ask.jsonl", "--output_file", "ask.jsonl"], 1,
     "ask.jsonl, line 1: not a trace"),
    (["--input_file", "ask.jsonl", "--output_file", "o.jsonl",
      "--teacher_url", "127.0.0.1:1"], 1, "no address"),
])
def test_distill_on_bad_input(flags, code, words, tmp_path, monkeypatch,
                              capsys):
    monkeypatch.chdir(tmp_path)
    good = '{"question": "2 eggs and 3?", "answer": "2+3=5\\n#### 5"}\n'
    Path("folder").mkdir()
    for name, text in dict(ask=good, bad=good + '{"answer": "5"}\n', empty="",
                           torn=good + '{"question": "3 e').items():
        Path(f"{name}.jsonl").write_text(text)
    args = ["distill", "--config", "distill", "--teacher_model", "student"]
    assert cli.main([*args, *flags]) == code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("tiny_reason: ") and words in said
    assert Path("ask.jsonl").read_text() == good


# pretrain

SMALL = ["--preset", "student", "--batch_size", "1", "--row_length", "32"]


def test_the_presets_that_can_be_named_are_those_there_are():
    from tiny_reason import pretrain
    assert flags.PRESETS == pretrain.PRESETS


def test_pretrain_on_problems_of_ones_own(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [dict(question=p["question"], answer=p["answer"])
            for p in make_problems(30)] + [dict(question="", answer="#### 1")]
    Path("own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = ["pretrain", *SMALL, "--max_steps", "2", "--output_dir", "out"]
    assert cli.main([*flags, "--data.source", "own.jsonl",
                     "--validation_split", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "31 read, 30 kept (dropped: empty question: 1)" in out
    assert "2 steps of 1 × 1 rows of 32, 64 tokens in all" in out
    assert "memory: at most" in out
    card = yaml.safe_load(Path("out/config.yaml").read_text())
    assert card["model"]["name"] == "out"
    assert cli.main(["evaluate", "--config", "out/config.yaml", "--limit", "1",
                     "--data.test_source", "arithmetic",
                     "--max_new_tokens", "3"]) == 0
    assert cli.main([*flags, "--resume", "--data.source", "own.jsonl",
                     "--validation_split", "0.1", "--preset", "micro"]) == 1
    assert "another model: qwen2" in capsys.readouterr().err
    assert cli.main([*flags, "--overwrite", "--data.source", "own.jsonl",
                     "--validation_split", "0.1", "--row_length", "4096"]) == 1
    assert "choose a smaller --row_length" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--learning_rate", "0"], "between 0 and 1"),
    (["--max_steps", "0"], "above 0"),
    (["--row_length", "0"], "above 0"),
    (["--preset", "micor"], "did you mean 'micro'"),
    (["--curriculum", "easyfirst"], "did you mean 'easy-first'"),
    (["--compile", "maybe"], "auto, yes or no"),
    (["--preset", "tiny-rwkv", "--use_lora"], "starts from random numbers"),
    (["--training.optim", "sgd"], "no use for training.optim"),
    (["--training.report_to", "wandb"], "no use for training.report_to"),
    (["--training.save_total_limit", "9"], "training.save_total_limit")])
def test_pretrain_wrong_arguments(flags, words, capsys):
    assert words in refused(capsys, "pretrain", *flags)


def test_pretrain_ends_where_a_loss_is_no_number(tmp_path, capsys,
                                                 monkeypatch):
    from tiny_reason import pretrain
    monkeypatch.setattr(pretrain, "train_step", lambda *_: float("nan"))
    assert cli.main(["pretrain", *SMALL, "--max_steps", "3", "--output_dir",
                     str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "the loss is nan" in said and "Lower the learning rate" in said
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_pretrain_interrupted_and_gone_on_with(tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["pretrain", *SMALL, "--max_steps", "200", "--compile", "no",
             "--output_dir", str(out)]
    process = subprocess.Popen([*COMMAND, *flags, "--save_steps", "2"],
                               stdout=subprocess.DEVNULL, text=True,
                               stderr=subprocess.PIPE)
    try:
        until = time.time() + 90
        while not list(out.glob("checkpoint-*")):
            assert process.poll() is None and time.time() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally: process.kill()
    assert process.returncode == 130 and "Traceback" not in said
    assert "To go on: the same command with --resume" in said
    assert checkpoints.last_checkpoint(out) in said
    assert not (out / "model.safetensors").exists()
    assert cli.main([*flags, "--save_steps", "200"]) == 1 # neither flag
    assert cli.main([*flags, "--save_steps", "200", "--resume"]) == 0
    assert "pre-trained: 200 steps" in capsys.readouterr().out


# The bench

def test_bench(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["bench", "--config", "student", "--models", "student",
            "--tasks", "combined", "--limit", "4", "--max_new_tokens", "80"]
    assert cli.main([*args, "--output_dir", "out"]) == 0
    said = capsys.readouterr().out
    assert "saved: out/bench.md" in said
    for name in ("bench.md", "bench.json", "bench.png"):
        assert Path("out", name).stat().st_size > 0
    assert cli.main([*args, "--output_dir", "out"]) == 1
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*args, "--output_dir", "out", "--resume"]) == 0
    for more, code, words in (
            (["--tasks", "combind"], 2, "'combined'"),
            (["--models", "no/such"], 1, "no/such"),
            (["--models", "student", "student"], 1, "student")):
        capsys.readouterr()
        assert cli.main([*args, *more, "--output_dir", "other"]) == code
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert cli.main(["bench", "--config", "student"]) == 2
