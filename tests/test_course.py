"What a lesson says of words and sources: each link has its entry."
import re
from pathlib import Path

import pytest

NBS = Path(__file__).parents[1] / "nbs"
PAGES = {path: path.read_text() for path in (
    *NBS.glob("*.ipynb"), NBS.parent / "index.ipynb")}
BOOKS = "glossary", "bibliography"


def headings(text):
    return re.findall(r"(?m)^## (.+)$", text)


def slug(heading):
    "The address of a heading, as GitHub and Quarto make it."
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("book", BOOKS)
def test_each_link_has_its_entry_and_each_entry_a_link(book):
    linked = {at for text in PAGES.values()
              for at in re.findall(rf"{book}\.md#([\w-]+)", text)}
    assert {*map(slug, headings((NBS / f"{book}.md").read_text()))} == linked


@pytest.mark.parametrize("book", BOOKS)
def test_entries_are_in_order_and_once(book):
    found = headings((NBS / f"{book}.md").read_text())
    assert found == sorted({*found}, key=str.casefold)


def test_a_paper_of_a_lesson_is_in_the_bibliography():
    known = re.findall(r"arXiv (\d{4}\.\d{5})",
                       (NBS / "bibliography.md").read_text())
    assert len(known) == len({*known})
    named = {number for text in PAGES.values()
             for number in re.findall(r"arXiv (\d{4}\.\d{5})", text)}
    assert named <= {*known}
