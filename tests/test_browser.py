"The demo in a real browser: JupyterLab and Voila, driven by Chromium."
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
SHOTS = ROOT / "_build" / "screenshots"
CHROMIUM = "/usr/bin/chromium"
missing = [name for name in ("playwright", "voila", "jupyterlab")
           if find_spec(name) is None]
if not Path(CHROMIUM).exists(): missing.append(CHROMIUM)
pytestmark = pytest.mark.skipif(bool(missing),
                                reason=f"not installed: {', '.join(missing)}")

FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
         "--disable-background-networking --disable-component-update "
         "--disable-sync").split()

# What the models say first, so that the test does not depend on weights: a
# right and a wrong equation, and markup. The rest is their own. One token takes
# 20 ms at least, so that there is something to see and a middle to stop in.
SCRIPT = """
import time
import torch
from tiny_reason.lib import decode
from tiny_reason.lib.prompts import encode_text
from tiny_reason.lib.folders import find_base, load_tokenizer
usual, said = decode.chooser, encode_text(
    '2*3=6 <img src=x onerror="window.hacked=1">\\n6+1=8 eggs\\n'
    '<script>window.hacked=1</script><b class="injected">bold</b>\\n',
    load_tokenizer(find_base("student")[0]))
def scripted(*args, **kwargs):
    choose, left = usual(*args, **kwargs), list(said)
    def pick(scores):
        time.sleep(0.02)
        if not left: return choose(scores)
        return torch.full_like(scores[:, 0], left.pop(0), dtype=torch.long)
    return pick
decode.chooser = scripted
"""
PROBLEM = ('<img src=x onerror="window.hacked=1"><|im_end|> Nora has 12 eggs. '
           "Nora buys 5 eggs. How many eggs has Nora? 🥚")
RECORD = """() => {
  window.seen = [];
  const note = () => window.seen.push([performance.now(),
    document.querySelector(".tr-status").innerText.trim(),
    document.querySelector(".tr-base").innerText.length,
    document.querySelector(".tr-tuned").innerText.length]);
  new MutationObserver(note).observe(document.querySelector(".tr-demo"),
    {subtree: true, childList: true, characterData: true});
}"""
INJECTED = """() => document.querySelectorAll(
  ".tr-demo script, .tr-demo img, .tr-demo .injected").length
  + (window.hacked ? 1 : 0)"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def serving(command, env, log):
    "A server on 127.0.0.1; nothing of it is left afterwards."
    with open(log, "w") as out:
        server = subprocess.Popen(command, env=env, stdout=out, stderr=out)
    try: yield server
    finally:
        family = ([] if server.poll() is not None else
                  psutil.Process(server.pid).children(recursive=True))
        server.send_signal(signal.SIGTERM)
        try: server.wait(15)
        except subprocess.TimeoutExpired: server.kill()
        _, alive = psutil.wait_procs(family, timeout=5)
        for process in alive: process.kill()


def wait_for(server, url, log, seconds=90):
    until = time.time() + seconds
    while time.time() < until and server.poll() is None:
        try: return urllib.request.urlopen(url, timeout=5).status
        except OSError: time.sleep(0.2)
    pytest.fail(f"no answer at {url}:\n{Path(log).read_text()[-2000:]}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with the page, an adapter, and Jupyter's own folders."
    import torch
    from tiny_reason.model import add_lora, load_base
    folder = tmp_path_factory.mktemp("browser")
    model, tokenizer = load_base("student", device="cpu")
    tuned = add_lora(model)
    torch.manual_seed(3407) # trained a little, in no direction
    for name, p in tuned.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=0.01)
    tuned.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    (folder / "pages").mkdir()
    shutil.copy(ROOT / "nbs" / "app" / "page.ipynb", folder / "pages")
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "scripted.py").write_text(SCRIPT)
    for name, values in (("themes", {"theme": "JupyterLab Dark"}),
                         ("notification", {"fetchNews": "false",
                                           "checkForUpdates": False})):
        path = folder / "settings" / "@jupyterlab" / "apputils-extension"
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{name}.jupyterlab-settings").write_text(json.dumps(values))
    SHOTS.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def env(place):
    own = {f"JUPYTER_{name}_DIR": str(place / name.lower())
           for name in ("CONFIG", "DATA", "RUNTIME")}
    return os.environ | own | dict(
        IPYTHONDIR=str(place / "ipython"), HF_HUB_OFFLINE="1",
        JUPYTERLAB_SETTINGS_DIR=str(place / "settings"),
        JUPYTERLAB_WORKSPACES_DIR=str(place / "workspaces"),
        TINY_REASON_ADAPTER=str(place / "adapter"))


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM,
                                              args=FLAGS)
        yield chromium
        chromium.close()


@contextmanager
def voila(env, place, name):
    port = free_port()
    log = place / f"{name}.log"
    command = [sys.executable, "-m", "voila", str(place / "pages/page.ipynb"),
               "--no-browser", "--Voila.ip=127.0.0.1", f"--port={port}"]
    with serving(command, env, log) as server:
        wait_for(server, f"http://127.0.0.1:{port}/voila/static/voila.js", log)
        yield f"http://127.0.0.1:{port}/"


def status(page, wanted, seconds=60):
    "Wait until the status line says this."
    page.wait_for_function(
        "wanted => document.querySelector('.tr-status')?.innerText.trim()"
        ".startsWith(wanted)", arg=wanted, timeout=1000 * seconds)


def shots(page, name):
    "Pictures at 1,280 and 400 pixels, which nothing may overflow sideways."
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(300)
        page.locator(".tr-demo").screenshot(path=SHOTS / f"{name}-{width}.png")
        wide = page.evaluate("""() => { const d = document.querySelector(
          ".tr-demo"); return [d.scrollWidth, d.clientWidth] }""")
        assert wide[0] <= wide[1] + 1, f"{name} at {width}: {wide}"
    page.set_viewport_size({"width": 1280, "height": 900})


def drive(page, name):
    "Solve, look at three instants, stop midway, solve again."
    status(page, "ready", 120)
    page.evaluate(RECORD)
    box = page.locator(".tr-problem textarea")
    page.locator(".tr-gold input").fill("7")
    box.fill(PROBLEM)
    page.locator(".tr-solve").click()
    page.locator(".tr-solve").click() # the second does nothing
    status(page, "thinking")
    page.wait_for_function(
        "() => document.querySelector('.tr-tuned').innerText.length > 60")
    page.locator(".tr-stop").click()
    status(page, "stopped")
    assert page.evaluate(INJECTED) == 0
    seen = page.evaluate("() => window.seen")
    for column in (2, 3): # base, tuned
        lengths = sorted({row[column] for row in seen
                          if row[1] == "thinking" and row[column]})
        assert len(lengths) >= 3, f"the text did not grow: {lengths}"
    first_stop = next(i for i, row in enumerate(seen) if row[1] == "stopped")
    assert not any(row[1] == "thinking" for row in seen[first_stop:])

    box.fill("Nora has 12 eggs. Nora buys 5 eggs. How many eggs has Nora?")
    box.press("Control+Enter")
    status(page, "thinking")
    status(page, "done")
    for pane in (".tr-base", ".tr-tuned"):
        text = page.locator(pane).first.inner_text()
        assert "✓" in text and "✗ 6+1 = 8" in text
        assert '<script>window.hacked=1</script><b class="injected">' in text
    assert page.evaluate(INJECTED) == 0
    pane = page.locator(".tr-base").first
    assert pane.inner_text().startswith("base, asked in plain text")
    pane.locator("summary").first.press("Enter") # folds, for a keyboard too
    assert "✓" not in pane.inner_text() and "answer:" in pane.inner_text()
    pane.locator("summary").first.click()
    assert "✓" in pane.inner_text()
    legend = page.locator(".tr-legend").inner_text()
    assert all(sign in legend for sign in "✓✗?") and "true" in legend
    assert "Loading weights" not in page.locator("body").inner_text()
    page.locator(".tr-tuned summary").last.click()
    answer = page.locator(".tr-tuned").first.inner_text()
    assert "gold answer is 7" in answer and "first token after" in answer
    shots(page, name)


def test_voila(place, env, browser):
    with voila(env, place, "voila") as url:
        page = browser.new_page()
        page.goto(url, timeout=120_000)
        drive(page, "voila-light")
        page.locator(".tr-problem textarea").fill(" ")
        page.locator(".tr-solve").click()
        status(page, "Type a problem")
        page.locator(".tr-asked select").select_option(index=1)
        page.locator(".tr-example select").select_option(index=1)
        page.wait_for_function( # an example brings its right answer along
            "() => document.querySelector('.tr-gold input').value !== '7'")
        for _ in range(4):
            page.locator(".tr-votes :is(.noUi-handle, .ui-slider-handle)"
                         ).press("ArrowRight")
        page.locator(".tr-solve").click()
        status(page, "thinking")
        status(page, "done", 90)
        assert page.locator(".tr-bars").first.inner_text().count(
            "5 votes") == 2
        for pane in (".tr-base", ".tr-tuned"):
            title = page.locator(f"{pane} summary").first.inner_text()
            assert title.endswith("asked in chat, <think> opened")
        shots(page, "voila-votes")
        page.close()


def test_missing_adapter(place, env, browser):
    env = env | dict(TINY_REASON_ADAPTER=str(place / "none"))
    with voila(env, place, "missing") as url:
        page = browser.new_page()
        page.goto(url, timeout=120_000)
        status(page, "ready", 120)
        shots(page, "voila-no-adapter")
        page.locator(".tr-train").click()
        status(page, "training: getting ready")
        page.locator(".tr-stop").click()
        status(page, "training was stopped")
        page.locator(".tr-problem textarea").fill("2 eggs and 3 eggs?")
        page.locator(".tr-solve").click()
        status(page, "done")
        page.close()


def test_lab(place, env, browser):
    port, log = free_port(), place / "lab.log"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser",
               "--ip=127.0.0.1", f"--port={port}", "--allow-root",
               "--IdentityProvider.token=tiny",
               f"--ServerApp.root_dir={place / 'pages'}"]
    with serving(command, env, log) as server:
        base = f"http://127.0.0.1:{port}"
        wait_for(server, f"{base}/api?token=tiny", log)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{base}/lab/tree/page.ipynb?token=tiny&reset",
                  timeout=120_000)
        page.locator("#jp-main-statusbar", has_text="| Idle").wait_for(
            timeout=120_000)
        page.locator('.lm-MenuBar-item:has-text("Run")').click()
        page.locator('.lm-Menu [data-command="runmenu:run-all"]').click()
        page.locator(".tr-demo").wait_for(timeout=120_000)
        page.keyboard.press("Control+b") # the file list, too wide for 400
        drive(page, "lab-dark")

        # An interrupt of the kernel reaches no thread: it goes on, and Stop
        # and Solve still work.
        page.locator(".tr-solve").click()
        status(page, "thinking")
        kernel, = json.load(urllib.request.urlopen(
            f"{base}/api/kernels?token=tiny"))
        urllib.request.urlopen(urllib.request.Request(
            f"{base}/api/kernels/{kernel['id']}/interrupt?token=tiny",
            method="POST"))
        page.wait_for_timeout(300)
        status(page, "thinking")
        page.locator(".tr-stop").click()
        status(page, "stopped")
        page.locator(".tr-solve").click()
        status(page, "done")
        page.close()
