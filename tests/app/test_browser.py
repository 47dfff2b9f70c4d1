"""The page in a headless browser: answers, maps, mistakes, and where requests go."""

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from diffmm import TrainedModel
from diffmm.app.server import listener, make_server, upload_folder

CHROMIUM = Path("/usr/bin/chromium")
SECONDS = 20_000  # in milliseconds, for one answer on a busy machine

pytest.importorskip("gradio", reason="needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}"),
    # Gradio 6.31 under pandas 3.
    pytest.mark.filterwarnings("ignore:.*no_silent_downcasting.*"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated.*"),
]

MAPS = ["A₁", "A₂", "A₁ − λA₂"]
Open = Callable[[TrainedModel], Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        # As root, Chromium has no sandbox of its own.
        yield started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])


@contextmanager
def served(trained: TrainedModel) -> Iterator[str]:
    """The address of a model's page."""
    with upload_folder() as folder, closing(listener(0)) as at:
        server = make_server(trained, folder)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{at.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def visit(browser: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """`with visit(trained) as page` opens the page of a model, and checks at the end that neither
    the browser nor the server has asked another address for anything."""
    connect = socket.socket.connect

    def to_loopback(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        connect(self, address)

    @contextmanager
    def opened(trained: TrainedModel) -> Iterator[Any]:
        monkeypatch.setattr(socket.socket, "connect", to_loopback)
        with served(trained) as address:
            page = browser.new_page()
            page.set_default_timeout(SECONDS)
            asked: list[str] = []
            faults: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.goto(address)
            page.wait_for_selector("#answer", state="attached")
            yield page
            page.close()
        assert len(asked) > 10
        assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
        assert faults == []

    return opened


def rows_of(page: Any) -> list[tuple[str, str]]:
    """Name and value of each row of the answer."""
    names = page.locator("#answer .what").all_inner_texts()
    return list(zip(names, page.locator("#answer .value").all_inner_texts(), strict=True))


def shown(text: str) -> str:
    """A text as a browser has it."""
    return text.replace("\r", "\n").replace("\0", "\ufffd")


def drop(page: Any, file: str) -> None:
    page.set_input_files("#file input[type=file]", file)


def test_an_image_for_a_classifier(visit, classifier, picture, broken):
    with visit(classifier) as page:
        assert page.title() == "image/test · diffmm"
        assert "Classifies images into 3 classes. diff v2 attention" in page.inner_text("header")
        drop(page, picture)
        page.wait_for_selector("#answer .tile")
        found = classifier.predict(picture)
        assert rows_of(page) == [
            (label, f"{100.0 * score:.1f}%")
            for label, score in zip(found.labels, found.scores, strict=True)
        ]
        captions = page.locator("#answer figcaption").all_inner_texts()
        assert captions == ["input", *MAPS]
        loaded = "images => images.every(image => image.complete && image.naturalWidth > 0)"
        assert page.eval_on_selector_all("#answer img", loaded)
        last = page.inner_html("#answer .group.diff_v2")
        page.fill(".layer input[type=number]", "1")
        page.press(".layer input[type=number]", "Enter")
        page.wait_for_function(
            "() => document.querySelector('#answer').innerText.includes('layer 1')"
        )
        assert page.inner_html("#answer .group.diff_v2") != last
        # A request to another address, if anything on the page made one, would not be sent.
        with closing(listener(0)) as other:
            there = f"http://127.0.0.1:{other.getsockname()[1]}/"
            settings = "{mode: 'no-cors', signal: AbortSignal.timeout(3000)}"
            page.evaluate(f"url => fetch(url, {settings}).catch(() => null)", there)
        page.click("#file button[aria-label*=Clear], #file button[aria-label*=Remove]")
        page.wait_for_selector("#answer .tile", state="detached")
        drop(page, broken)
        page.wait_for_selector("#answer .problem")
        assert page.inner_text("#answer").startswith("broken.png cannot be decoded")
        assert "Traceback" not in page.content()


def test_a_text_for_a_decoder(visit, decoder):
    prompt = "def add(a, b): ${1 + 1} {{value}} <b>"
    with visit(decoder) as page:
        page.fill("#prompt textarea", prompt)
        page.click("#generate")
        page.wait_for_selector("#maps .tile")
        page.wait_for_selector("#answer .new:not(:empty)")
        text = decoder.generate(prompt, max_new_tokens=160 - len(prompt))
        page.wait_for_function(
            "text => document.querySelector('#answer .written').textContent === text",
            arg=(prompt + text).replace("\r", "\n"),
        )
        assert page.locator("#maps figcaption").all_inner_texts() == MAPS
        assert page.locator("#maps pre span").count() == len(prompt)
        assert page.locator("#maps pre").inner_text() == prompt
        page.fill("#prompt textarea", "")
        page.click("#generate")
        page.wait_for_selector("#answer .problem")
        assert page.inner_text("#answer").startswith("the prompt is empty")


def test_an_image_and_texts_for_a_contrastive_model(visit, contrastive, picture):
    texts = ["a red star", "two circles", "<i>nothing</i>"]
    with visit(contrastive) as page:
        page.fill("#texts textarea", "\n".join(texts))
        drop(page, picture)
        page.wait_for_selector("#answer .what")
        values = dict(zip(texts, contrastive.similarity(picture, texts)[0].tolist(), strict=True))
        rows = rows_of(page)
        assert [name for name, _ in rows] == sorted(texts, key=values.get, reverse=True)
        for name, value in rows:
            assert re.fullmatch(rf"{values[name]:.3f} · [0-9.]+%", value)
        assert page.locator("#answer figcaption").count() == 4 + 3
        page.fill("#texts textarea", "one\ntwo")
        page.click("#compare")
        page.wait_for_function("() => document.querySelectorAll('#answer .what').length === 2")
        assert sorted(name for name, _ in rows_of(page)) == ["one", "two"]


def test_an_image_for_a_captioning_model(visit, captioner, picture):
    with visit(captioner) as page:
        assert "Describes images. diff v2 attention" in page.inner_text("header")
        drop(page, picture)
        page.wait_for_selector("#maps .tile")
        written = "text => document.querySelector('#answer .written')?.textContent === text"
        page.wait_for_function(written, arg=shown(captioner.generate(picture)))
        assert page.locator("#maps figcaption").all_inner_texts()[:4] == ["input", *MAPS]
        page.fill("#beginning textarea, #beginning input", "a red c")
        page.press("#beginning textarea, #beginning input", "Enter")
        text = "a red c" + captioner.generate(picture, "a red c")
        page.wait_for_function(written, arg=shown(text))
        found = "() => document.querySelector('#maps').innerText.includes('“red”, layer 2')"
        page.wait_for_function(found)


def test_a_sound_for_a_ctc_model(visit, transcriber, sound):
    with visit(transcriber) as page:
        assert page.locator("#beginning").count() == 0
        drop(page, sound)
        page.wait_for_selector("#maps audio")
        written = "text => document.querySelector('#answer .written')?.textContent === text"
        page.wait_for_function(written, arg=shown(transcriber.predict(sound).text))
