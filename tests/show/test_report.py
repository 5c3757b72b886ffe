from html.parser import HTMLParser

from matplotlib.figure import Figure

from tokendial.show.report import Section, report_html


class Page(HTMLParser):
    """Collects tags and the addresses that a page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.loaded, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_needs_nothing_but_itself():
    section = Section(
        title="A <b> title", header=("x",), rows=[("1",), ("2",)], figures=[Figure()], code="a < b"
    )
    page = Page(report_html("Report", [section]))
    assert page.tags.count("tr") == 3
    assert "A <b> title" in page.words
    assert "a < b" in page.words
    assert len(page.loaded) == 1
    assert page.loaded[0].startswith("data:image/png;base64,")


def test_an_empty_line_separates_paragraphs():
    page = Page(report_html("Report", [Section(title="x", text="one\nline\n\nanother")]))
    assert page.tags.count("p") == 2
    assert "another" in page.words
