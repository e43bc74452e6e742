"""Photograph the demo for the tour: `make picture`.

    python tests/picture.py ADAPTER

Serves nbs/app/page.ipynb with Voila on 127.0.0.1, types a problem into it as a
reader would, waits until both models are done, and puts what is there to see into index.ipynb,
where the tour has its attachment demo.png. Nothing is scripted: the words are
the models' own. The text that stands for the picture is to be looked at, too."""
import os
import subprocess
import sys
import tempfile
from base64 import b64encode
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import nbformat
from PIL import Image
from playwright.sync_api import sync_playwright
from test_browser import CHROMIUM, FLAGS, free_port, serving, status, wait_for

ROOT = Path(__file__).resolve().parents[1]
PROBLEM = ("There are 7 keys in Anna's box. Then Anna receives twice as many "
           "keys as Anna has. Later Anna picks up 28 keys. How many keys does "
           "Anna have now?")
GOLD = "49"


@contextmanager
def page_of(adapter, log):
    port = free_port()
    env = os.environ | dict(TINY_REASON_ADAPTER=str(Path(adapter).resolve()))
    command = [sys.executable, "-m", "voila", str(ROOT / "nbs/app/page.ipynb"),
               "--no-browser", "--Voila.ip=127.0.0.1", f"--port={port}"]
    with serving(command, env, log) as server:
        wait_for(server, f"http://127.0.0.1:{port}/voila/static/voila.js", log)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM,
                                                 args=FLAGS)
            page = browser.new_page(viewport=dict(width=900, height=900),
                                    device_scale_factor=1.5)
            page.goto(f"http://127.0.0.1:{port}/", timeout=120_000)
            yield page
            browser.close()


def small(png):
    "The same picture in 64 colours, as base64: a third of the size."
    found = BytesIO()
    Image.open(BytesIO(png)).convert("RGB").quantize(64, dither=0).save(
        found, format="png", optimize=True)
    return b64encode(found.getvalue()).decode()


def main(adapter, tour=ROOT / "index.ipynb"):
    with tempfile.TemporaryDirectory() as scratch, page_of(
            adapter, Path(scratch, "log")) as page:
        status(page, "ready", 120)
        page.locator(".tr-problem textarea").fill(PROBLEM)
        page.locator(".tr-gold input").fill(GOLD)
        page.locator(".tr-solve").click()
        status(page, "thinking")
        status(page, "done")
        print(page.locator(".tr-base").first.inner_text(),
              page.locator(".tr-tuned").first.inner_text(), sep="\n---\n")
        seen = small(page.locator(".tr-demo").screenshot())
    nb = nbformat.read(tour, as_version=4)
    cell, = (c for c in nb.cells if "demo.png" in c.get("attachments", {}))
    cell.attachments["demo.png"]["image/png"] = seen
    nbformat.write(nb, tour)


if __name__ == "__main__":
    if not sys.argv[1:]: sys.exit(__doc__)
    main(sys.argv[1])
