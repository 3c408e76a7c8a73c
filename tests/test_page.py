"""The page as a strict parser reads it: what is on it, what is escaped, and that it asks nobody for anything."""

import base64
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from darnet import NOTICE
from darnet.page import Bar, HtmlFigure, HtmlTable, Section, figure_to_svg, render_page

HOSTILE = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Collects texts, tags and attributes, and refuses tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def find(self, *tags: str) -> list[str]:
        """Texts right inside these tags."""
        return [text for tag, text in self.texts if tag in tags]


def draw_line() -> Figure:
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([0, 1], [0, 1])
    return figure


def test_title_paragraphs_table_and_notice_are_on_the_page() -> None:
    table = HtmlTable(["scan", "AUC", "n"], [["a", 0.98765, 3], ["b", float("nan"), None]], "two scans")
    reader = Reader(render_page("Title", "one\n\ntwo", [Section("Part", "three", [table])]))
    assert reader.find("h1", "title") == ["Title", "Title"]
    assert reader.find("p") == ["one", "two", NOTICE, "three"]
    assert reader.find("span") == ["two scans"]
    assert reader.find("th", "td") == ["scan", "AUC", "n", "a", "0.9877", "3", "b", "undefined", "–"]
    assert reader.find("footer") == [NOTICE]


def test_no_text_becomes_markup() -> None:
    table = HtmlTable([HOSTILE], [[HOSTILE]], HOSTILE)
    page = render_page(HOSTILE, HOSTILE, [Section(HOSTILE, HOSTILE, [table], [HtmlFigure("<svg/>", HOSTILE)])])
    reader = Reader(page)
    assert [tag for tag, _ in reader.tags if tag == "script"] == []
    assert len([text for _, text in reader.texts if text == HOSTILE]) == 9
    assert [attributes["alt"] for tag, attributes in reader.tags if tag == "img"] == [HOSTILE]


def test_a_bar_lies_where_its_numbers_are_and_is_not_read_aloud() -> None:
    bar = Bar(baseline=0.25, value=0.75, low=0.5, high=0.875, colour="#123456")
    below = Bar(baseline=0.25, value=0.125, low=0.0, high=0.25, colour="#123456")
    table = HtmlTable(["name", "bar"], [["a", bar], ["b", below]], "c", [("#123456", HOSTILE)])
    reader = Reader(render_page("t", "s", [Section("x", tables=[table])]))
    styles = [str(attributes["style"]) for tag, attributes in reader.tags if tag == "i"]
    assert styles == [
        "background:#123456",
        "left:25.00%;width:50.00%;background:#123456",
        "left:50.00%;width:37.50%;background:var(--ink)",
        "left:25.00%;width:0.00%;background:var(--ink)",
        "left:12.50%;width:12.50%;background:#123456",
        "left:0.00%;width:25.00%;background:var(--ink)",
        "left:25.00%;width:0.00%;background:var(--ink)",
    ]
    hidden = [attributes["class"] for _, attributes in reader.tags if attributes.get("aria-hidden") == "true"]
    assert hidden == ["bar", "bar"]
    assert reader.find("b") == [HOSTILE]


def test_a_page_refers_to_nothing_outside_itself() -> None:
    page = render_page("t", "s", [Section("f", figures=[HtmlFigure(figure_to_svg(draw_line()), "a line")])])
    reader = Reader(page)
    places = [value for _, attributes in reader.tags for name, value in attributes.items() if name in ("src", "href")]
    assert [str(place)[:26] for place in places] == ["data:image/svg+xml;base64,"]
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in page


def test_a_figure_is_a_drawing_without_letters_of_a_font() -> None:
    page = render_page("t", "s", [Section("f", figures=[HtmlFigure(figure_to_svg(draw_line()), "a line")])])
    (encoded,) = re.findall(r"base64,([^\"]+)\"", page)
    root = ElementTree.fromstring(base64.b64decode(encoded))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not list(root.iter("{http://www.w3.org/2000/svg}text"))
    assert list(root.iter("{http://www.w3.org/2000/svg}path"))


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert figure_to_svg(draw_line()) == figure_to_svg(draw_line())


def test_only_columns_of_numbers_stand_right() -> None:
    table = HtmlTable(
        ["name", "p", "mixed", "share"], [["a", "< 0.0001", "x", "1 of 20 (5%)"], ["b", 2.5, 3, None]], "c"
    )
    reader = Reader(render_page("t", "s", [Section("x", tables=[table])]))
    kinds = [attributes["class"] for tag, attributes in reader.tags if tag in ("th", "td")]
    assert kinds == ["text", "number", "text", "number"] * 3


def test_a_row_of_another_length_than_the_header_is_refused() -> None:
    with pytest.raises(ValueError, match="'c': a row is not as long"):
        render_page("t", "s", [Section("x", tables=[HtmlTable(["a", "b"], [["only"]], "c")])])
