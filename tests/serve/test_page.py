"""The page in a real browser, before a real server."""

import io
import shutil
from base64 import b64decode
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright
from served_runs import write_run
from serving import file, picture, serving

LONG = "a breed of cats whose name is far too long for a telephone"


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "google-chrome", "chromium-browser")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no browser is installed; Debian's package is chromium")
    expect.set_options(timeout=20_000)  # the machine may be busy
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("pets") / "run", [LONG, "dog", "hamster"])
    with serving({"pets": run}) as running:
        yield running


@dataclass
class Watched:
    """A page and what it did besides what is looked at."""

    page: Page
    errors: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    failures: list[tuple[int, str]] = field(default_factory=list)
    """Answers that were no success: they are errors, unless a test asks for them."""

    def find(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def choose(self, name: str, content: bytes, kind: str = "image/png") -> None:
        self.page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})

    def tokens(self) -> list[int]:
        """Of the layers, as the strip shows them."""
        return [int(bar.get_attribute("data-tokens")) for bar in self.find("#bars > div").all()]

    def drawn(self, side: str) -> str:
        """What is on the canvas of a side."""
        return self.find(f"figure.{side} canvas").evaluate("canvas => canvas.toDataURL()")

    def colour(self, x: float, y: float) -> list[int]:
        """Of a point on the canvas of the dial's degree, its place told as shares of the sides."""
        return self.find("figure.reduced canvas").evaluate(
            "(canvas, [x, y]) => [...canvas.getContext('2d')"
            ".getImageData(x * canvas.width, y * canvas.height, 1, 1).data]",
            [x, y],
        )[:3]

    def cost(self) -> float:
        """In GMACs, at the dial's degree."""
        text = self.find("article.reduced dl").get_by_text("GMACs").text_content()
        return float(text.partition(" ")[0])

    def asked(self, part: str) -> int:
        return sum(part in url for url in self.urls)

    def heard(self, message) -> None:
        # The browser says so of every answer that is no success; those are counted by themselves.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def answered(self, response) -> None:
        if response.status >= 400:
            self.failures.append((response.status, response.url.partition("?")[0]))


@contextmanager
def opened(browser, server, **options):
    """The page in a fresh window; at the end, it has to have kept to its server, and in order."""
    address = f"http://127.0.0.1:{server.port}"
    context = browser.new_context(**options)
    watched = Watched(context.new_page())
    watched.page.on("console", watched.heard)
    watched.page.on("pageerror", lambda error: watched.errors.append(str(error)))
    watched.page.on("request", lambda request: watched.urls.append(request.url))
    watched.page.on("response", watched.answered)
    watched.page.goto(address)
    try:
        yield watched
    finally:
        context.close()
    assert watched.errors == []
    assert watched.failures == []
    own = (f"{address}/", "data:", f"blob:{address}/")
    assert [url for url in watched.urls if not url.startswith(own)] == []


@pytest.fixture
def page(browser, server):
    with opened(browser, server) as watched:
        yield watched


def shown(page: Watched, degree: int) -> None:
    """Wait until the answer at a degree is there."""
    expect(page.find("figure.reduced figcaption")).to_have_text(f"Degree {degree}")
    expect(page.find("#result")).to_have_attribute("aria-busy", "false")


def test_an_image_is_predicted_and_its_tokens_are_drawn(page, server):
    page.choose("cat.png", file(picture()))
    shown(page, 0)
    reply = server.predict(file(picture()), query="?degree=0").json["predictions"][0]
    best = reply["classes"][0]
    for side in ("reduced", "full"):
        first = page.find(f"article.{side} .classes li").first
        expect(first).to_have_text(f"{best['name']}{100 * best['probability']:.0f} %")
        expect(page.find(f"figure.{side} .count")).to_have_text("17 tokens 16 patches alone")
    expect(page.find("#said")).to_contain_text(f"Degree 0: {best['name']}")
    assert page.tokens() == [17, 17, 17]


def test_the_dial_works_by_keyboard_and_degree_0_stays_beside_it(page, server):
    page.choose("cat.png", file(picture()))
    shown(page, 0)
    whole, cost = page.drawn("full"), page.cost()
    page.find("#dial").focus()
    for degree in (1, 2):
        page.page.keyboard.press("ArrowRight")
        shown(page, degree)
    expect(page.find("#auto")).not_to_be_checked()
    expect(page.find("#degree")).to_have_text("2")
    view = server.ask("/v1/tokens?degree=2", file(picture()), "image/png").json
    assert page.tokens() == [layer["tokens"] for layer in view["layers"]]
    assert page.tokens()[-1] < 17
    assert page.cost() == pytest.approx(view["gmacs"], rel=0.005)
    assert page.cost() < cost
    assert page.drawn("reduced") != page.drawn("full") == whole
    page.page.keyboard.press("ArrowLeft")
    shown(page, 1)
    page.page.keyboard.press("ArrowRight")
    shown(page, 2)
    # Whatever was answered once is not asked again.
    assert [page.asked(f"degree={degree}") for degree in ("auto", 0, 1, 2)] == [1, 0, 1, 1]


def test_a_token_has_the_mean_colour_of_its_patches(page, server):
    page.choose("cat.png", file(picture()))
    shown(page, 0)
    page.find("#dial").focus()
    page.page.keyboard.press("End")
    shown(page, 8)
    view = server.ask("/v1/tokens?degree=8", file(picture()), "image/png").json
    origin = np.reshape(view["layers"][-1]["origin"], (4, 4))
    token = np.bincount(origin[origin >= 0]).argmax()
    rows, columns = np.nonzero(origin == token)
    assert len(rows) > 1
    seen = np.asarray(Image.open(io.BytesIO(b64decode(view["image"]))), float)
    inside = (origin == token).repeat(8, axis=0).repeat(8, axis=1)
    colour = page.colour((columns[0] + 0.5) / 4, (rows[0] + 0.5) / 4)
    assert colour == pytest.approx(seen[inside].mean(axis=0).tolist(), abs=1)


def test_layers_are_shown_one_by_one(page):
    page.choose("cat.png", file(picture()))
    shown(page, 0)
    page.find("#dial").focus()
    page.page.keyboard.press("End")
    shown(page, 8)
    counts = page.tokens()
    last = page.drawn("reduced")
    page.find("#layer").focus()
    page.page.keyboard.press("Home")
    expect(page.find("#layer-name")).to_have_text("after layer 1 of 3")
    expect(page.find("figure.reduced strong")).to_have_text(f"{counts[0]} tokens")
    assert counts[0] > counts[2]
    assert page.drawn("reduced") != last
    page.find("#bars > div").nth(2).click()
    expect(page.find("#layer-name")).to_have_text("after layer 3 of 3")
    assert page.drawn("reduced") == last
    page.find("figure.reduced canvas").hover()
    assert page.drawn("reduced") != last


def test_everything_is_reached_by_the_tab_key_and_the_focus_is_seen(page):
    page.choose("cat.png", file(picture()))
    shown(page, 0)
    reached = {}
    for _ in range(5):
        page.page.keyboard.press("Tab")
        name, outline = page.page.evaluate(
            "() => { const e = document.activeElement;"
            "const seen = e.id === 'file' ? e.nextElementSibling : e;"
            "return [e.id, getComputedStyle(seen).outlineStyle] }"
        )
        reached[name] = outline
    assert list(reached) == ["model", "file", "layer", "auto", "dial"]
    # Sliders show it on their thumbs.
    assert [reached[name] for name in ("model", "file", "auto")] == ["solid"] * 3
    unnamed = "e => !(e.labels.length || e.ariaLabel)"
    assert not any(e.evaluate(unnamed) for e in page.find("input, select").all())


def test_the_live_panel_follows_the_server(page, server):
    expect(page.find("#state")).to_have_text("Serving at degree 0")
    before = page.find("#load .line").get_attribute("d")
    answered = server.engine.status().answered
    server.predict(file(picture()))
    expect(page.find("#totals")).to_contain_text(f"{answered + 1} answered")
    expect(page.find("#load .line")).not_to_have_attribute("d", before)
    expect(page.find("#latency output")).to_contain_text("ms")
    expect(page.find("#turns svg")).to_have_attribute(
        "aria-label", "Degree over the last minute: now 0, of 8"
    )


def test_nothing_is_wider_than_a_telephone(browser, server):
    with opened(browser, server, viewport={"width": 360, "height": 740}, has_touch=True) as page:
        page.choose("cat.png", file(picture()))
        shown(page, 0)
        assert page.page.evaluate("document.documentElement.scrollWidth") == 360
        expect(page.find("#dial")).to_be_in_viewport()


def test_a_file_that_is_no_image_gives_one_line(page):
    page.choose("cat.png", file(picture()))
    shown(page, 0)
    page.choose("notes.png", b"no image")
    error = page.find("#error")
    expect(error).to_have_text("images[0] is not an image.")
    expect(error).to_have_attribute("role", "alert")
    page.choose("dog.png", file(picture(1)))
    expect(error).to_be_hidden()
    assert {status for status, _ in page.failures} == {422}
    page.failures.clear()


def test_a_server_that_is_away_is_shown_and_found_again(page):
    expect(page.find("#state")).to_have_text("Serving at degree 0")
    page.page.context.set_offline(True)
    page.choose("cat.png", file(picture()))
    expect(page.find("#error")).to_have_text("The server cannot be reached.")
    expect(page.find("#state")).to_have_text("Not reachable")
    page.page.context.set_offline(False)
    expect(page.find("#state")).to_have_text("Serving at degree 0")


@pytest.mark.parametrize(("event", "data"), [("drop", "dataTransfer"), ("paste", "clipboardData")])
def test_images_may_be_dropped_and_pasted(page, event, data):
    expect(page.find("#state")).to_have_text("Serving at degree 0")
    page.page.evaluate(
        "([name, data, bytes]) => { const held = new DataTransfer();"
        "held.items.add(new File([new Uint8Array(bytes)], 'a.png', {type: 'image/png'}));"
        "const kind = name === 'drop' ? DragEvent : ClipboardEvent;"
        "document.body.dispatchEvent(new kind(name, {[data]: held, bubbles: true})) }",
        [event, data, list(file(picture()))],
    )
    shown(page, 0)


def test_only_the_last_position_of_the_dial_is_answered(page, server):
    page.choose("cat.png", file(picture()))
    shown(page, 0)
    page.find("#dial").focus()
    with server.busy():
        for degree in (1, 2):
            with page.page.expect_request(f"**/v1/tokens?*degree={degree}"):
                page.page.keyboard.press("ArrowRight")
        expect(page.find("#result")).to_have_attribute("aria-busy", "true")
    shown(page, 2)
    expect(page.find("#error")).to_be_hidden()


@pytest.fixture(scope="module")
def locked(masks):
    with serving({"masks": masks}, api_keys=("secret",)) as running:
        yield running


def test_a_key_is_asked_for_and_kept_for_the_session(browser, locked):
    with opened(browser, locked) as page:
        for key in ("wrong", "secret"):
            page.find("#key-field").fill(key)
            page.page.keyboard.press("Enter")
        expect(page.find("#state")).to_have_text("Serving at degree 0")
        expect(page.find("#key")).to_be_hidden()
        expect(page.find("#error")).to_be_hidden()
        page.page.reload()
        expect(page.find("#state")).to_have_text("Serving at degree 0")
        assert {status for status, _ in page.failures} == {401}
        page.failures.clear()


def test_a_mask_lies_over_the_image(browser, locked):
    with opened(browser, locked) as page:
        page.find("#key-field").fill("secret")
        page.page.keyboard.press("Enter")
        page.choose("thing.png", file(picture()))
        shown(page, 0)
        secret = {"authorization": "Bearer secret"}
        reply = locked.ask("/v1/predict?degree=0", file(picture()), "image/png", **secret)
        share = reply.json["predictions"][0]["share"]
        box = page.find("article.reduced .mask")
        expect(box.locator("p")).to_have_text(f"Inside: {100 * share:.1f} % of the image")
        assert box.locator("canvas").evaluate("c => [c.width, c.height]") == [50, 40]
        page.failures.clear()  # before there was a key


def test_an_embedding_is_compared_with_that_of_degree_0(browser, embedder):
    with serving({"kept": embedder}) as running, opened(browser, running) as page:
        page.choose("thing.png", file(picture()))
        shown(page, 0)
        similarity = page.find("article.reduced dl").get_by_text("Similarity to degree 0")
        expect(similarity.locator("xpath=..")).to_contain_text("1.0000")
        page.find("#dial").focus()
        page.page.keyboard.press("End")
        last = embedder.model().degrees[-1]
        shown(page, last)
        both = [
            running.ask(f"/v1/predict?degree={degree}", file(picture()), "image/png").json[
                "predictions"
            ][0]["embedding"]
            for degree in (last, 0)
        ]
        reduced, full = (np.asarray(each) / np.linalg.norm(each) for each in both)
        assert f"{reduced @ full:.4f}" != "1.0000"
        expect(similarity.locator("xpath=..")).to_contain_text(f"{reduced @ full:.4f}")
        expect(page.find("#said")).to_contain_text(f"similarity to degree 0 {reduced @ full:.4f}")
