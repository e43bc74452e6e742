"""Give the repository another home: `make fork TO=owner/name`.

    python tests/fork.py OWNER/NAME [FOLDER]

settings.ini names owner and repository; badges, links and the install lines of
notebooks repeat them. This rewrites them all, below FOLDER (default: this
clone), and says how many files it changed."""
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = {".ipynb", ".md", ".py", ".ini", ".toml", ".yml", ".yaml", ".cff"}
LEFT_OUT = {".git", ".venv", "_build", "_docs", "build", "dist", "outputs"}


def home(root): # (owner, name)
    config = ConfigParser(interpolation=None)
    config.read(root / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]["user"], config["DEFAULT"]["repo"]


def texts(root):
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root).parts
        if (path.suffix in KINDS and path.is_file()
                and not LEFT_OUT & {*inside}): yield path


def move(root, owner, name): # how many files were changed
    before, changed = home(root), 0
    for path in texts(root):
        old = path.read_text(encoding="utf-8")
        new = old.replace("/".join(before), f"{owner}/{name}")
        new = new.replace(f"{before[0]}.github.io", f"{owner}.github.io")
        if path == root / "settings.ini":
            for key, value in ("user", owner), ("repo", name):
                new = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", new)
        if new != old:
            path.write_text(new, encoding="utf-8")
            changed += 1
    return changed


def main(words):
    found = re.fullmatch(r"([\w.-]+)/([\w.-]+)", words[0] if words else "")
    if not found: raise SystemExit(__doc__)
    root = Path(words[1]) if words[1:] else ROOT
    print(f"{move(root, *found.groups())} files now speak of {found[0]}")


if __name__ == "__main__": main(sys.argv[1:])
