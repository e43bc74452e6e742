"One place names the repository: settings.ini."
import re

import pytest
import yaml
from conftest import ROOT
from fork import home, main, texts

OTHER = "/".join(("someone", "think")) # not to be found in this file


def addresses(root): # of repositories with our package in them
    "{path: owner/name} of links to a clone, to Colab, and of install lines."
    pattern = r"(?:github\.com|colab\.research\.google\.com/github)/([\w.-]+/{})"
    name = home(root)[1]
    return {path: {*re.findall(pattern.format(re.escape(name)),
                               path.read_text(encoding="utf-8"))}
            for path in texts(root)}


def test_all_links_lead_to_the_home_that_settings_name():
    found = addresses(ROOT)
    assert {x for some in found.values() for x in some} == {
        "/".join(home(ROOT))}
    assert len([p for p, some in found.items() if some]) > 40


def test_a_fork_is_renamed_everywhere(copy, capsys):
    old = "/".join(home(copy))
    main([OTHER, str(copy)])
    assert f"files now speak of {OTHER}" in capsys.readouterr().out
    assert "/".join(home(copy)) == OTHER
    for path in texts(copy): assert old not in path.read_text(encoding="utf-8")
    told = (copy / "settings.ini").read_text()
    assert "lib_name = tiny_reason" in told # the package keeps its name
    main(["/".join(home(ROOT)), str(copy)])
    for path in texts(copy):
        assert path.read_bytes() == (
            ROOT / path.relative_to(copy)).read_bytes()


def test_the_citation_is_of_this_version():
    told = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    settings = (ROOT / "settings.ini").read_text()
    assert f"version = {told['version']}\n" in settings
    assert told["repository-code"] == "https://github.com/" + "/".join(
        home(ROOT))


@pytest.mark.parametrize("words", [[], ["name"], ["a/b/c"], ["a b/c"]])
def test_no_home(words):
    with pytest.raises(SystemExit, match="OWNER/NAME"): main(words)
