"""The page in a browser: a conversation, stop, reload, edit, keyboard, narrow, dark."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (and a Chromium)")
pytest.importorskip("fastapi", reason="needs the extra `serve`")

from small_server import serving, write_run  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "talker")


@pytest.fixture(scope="module")
def url(chat_run):
    with serving(chat_run) as address:
        yield address


@pytest.fixture
def shots(tmp_path):
    """Where screenshots go: $HYBRIDLM_SCREENSHOTS, to look at them."""
    folder = Path(os.environ.get("HYBRIDLM_SCREENSHOTS", tmp_path))
    folder.mkdir(exist_ok=True)
    return folder


def opened(browser, url, **options):
    """A page of a new visitor, which must never report an error, such as one of the content policy."""
    page = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options)).new_page()
    page.set_default_timeout(10_000)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
    page.goto(url)
    page.get_by_role("heading", name="talker", level=1).wait_for()
    return page


def say(page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def finished(page) -> None:
    page.get_by_role("button", name="Send", exact=True).wait_for()


def answers(page) -> list[str]:
    return page.locator("article.assistant .text").all_inner_texts()


def test_a_conversation(browser, url, shots):
    page = opened(browser, url)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Seed").fill("3")
    page.get_by_label("Max tokens").fill("40")
    page.get_by_role("button", name="Settings").click()
    say(page, "hello")
    finished(page)
    (first,) = answers(page)
    assert first
    state = page.get_by_role("status").inner_text()
    assert "tokens/s" in state
    assert "of 512 tokens" in state
    page.get_by_role("button", name="Regenerate").click()
    finished(page)
    assert answers(page) == [first]  # of the same seed
    page.get_by_label("Your message").fill("and then?\nmore")
    page.keyboard.press("Enter")
    finished(page)
    assert len(answers(page)) == 2
    page.screenshot(path=shots / "conversation_1280.png")

    page.reload()
    page.get_by_role("heading", name="talker", level=1).wait_for()
    assert page.locator("article").count() == 4
    assert answers(page)[0] == first
    assert page.get_by_label("Seed").input_value() == "3"

    page.locator("article.user").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edited message").fill("good bye")
    page.keyboard.press("Enter")
    finished(page)
    assert page.locator("article").count() == 2
    assert page.locator("article.user .text").inner_text() == "good bye"

    page.get_by_role("button", name="New conversation").click()
    assert page.locator("article").count() == 0
    assert page.locator("#list li").count() == 2
    page.get_by_role("button", name="good bye", exact=True).click()
    assert page.locator("article").count() == 2
    page.get_by_role("button", name="Delete: good bye").click()
    assert page.locator("#list li").count() == 1
    assert page.problems == []


def test_stop(browser, chat_run):
    with serving(chat_run, context=100_000, answer=90_000) as url:
        page = opened(browser, url)
        for end in (lambda: page.keyboard.press("Escape"), lambda: page.get_by_role("button", name="Stop").click()):
            while True:  # an answer of noise may be short
                say(page, "go on")
                page.get_by_role("button", name="Stop").wait_for()
                page.wait_for_timeout(100)
                if page.get_by_role("button", name="Stop").is_visible():
                    break
            end()
            finished(page)
            assert page.locator("article.assistant").last.locator(".bar").inner_text().endswith("stopped")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Max tokens").fill("5")
        say(page, "still there?")
        finished(page)
        assert page.problems == []


def test_what_a_model_writes_is_text(browser, url, shots):
    page = opened(browser, url)
    evil = (
        "look:\n```html\n<img src=x onerror=alert(1)>\n"
        + "long " * 60
        + "\n```\n<b>not bold</b> <script>alert(2)</script>"
    )
    page.evaluate(
        "text => localStorage.setItem('hybridlm.conversations',"
        " JSON.stringify([{messages: [{role: 'user', content: '<i>?</i>'}, {role: 'assistant', content: text}]}]))",
        evil,
    )
    page.on("dialog", lambda dialog: page.problems.append("a dialog"))
    page.evaluate("conversations = kept(STORE, [])")  # the page writes them again as it is left
    page.reload()
    page.get_by_role("heading", name="talker", level=1).wait_for()
    text = page.locator("article.assistant .text")
    assert text.locator("img, b, script").count() == 0
    assert "<img src=x onerror=alert(1)>" in text.locator("pre").inner_text()
    assert "<b>not bold</b>" in text.locator(".plain").last.inner_text()
    assert page.locator("article.user i").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=shots / "code_1280.png")
    assert page.problems == []


def test_keyboard_alone(browser, url):
    page = opened(browser, url)
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"new", "theme", "configure", "input", "send", "log"} <= set(reached)
    page.locator("#configure").focus()
    page.keyboard.press("Space")
    assert page.get_by_label("Temperature").is_visible()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow(browser, url, shots, scheme):
    page = opened(browser, url, viewport={"width": 400, "height": 700}, color_scheme=scheme)
    say(page, "hello there, this is a line that is longer than a narrow screen is wide")
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert not page.get_by_role("button", name="New conversation").is_visible()
    page.screenshot(path=shots / f"narrow_400_{scheme}.png")
    page.get_by_role("button", name="Conversations").click()
    assert page.get_by_role("button", name="New conversation").is_visible()
    page.screenshot(path=shots / f"list_400_{scheme}.png")
    page.keyboard.press("Escape")
    assert not page.get_by_role("button", name="New conversation").is_visible()
    page.get_by_role("button", name="Settings").click()
    page.screenshot(path=shots / f"settings_400_{scheme}.png")
    assert page.problems == []


def test_a_base_model_continues_the_text(browser, tmp_path, shots):
    with serving(write_run(tmp_path / "talker", chat=False)) as url:
        page = opened(browser, url, color_scheme="dark")
        assert "continues your text" in page.locator("#log").inner_text()
        say(page, "once upon")
        finished(page)
        assert answers(page)
        page.screenshot(path=shots / "base_1280_dark.png")
        assert page.problems == []


def test_keys_and_errors(browser, chat_run):
    with serving(chat_run, keys=["letmein"]) as url:
        page = browser.new_context().new_page()
        page.set_default_timeout(10_000)
        page.goto(url)
        page.get_by_text("requires an API key").wait_for()
        page.get_by_label("API key").fill("letmein")
        page.keyboard.press("Tab")
        page.get_by_role("heading", name="talker", level=1).wait_for()
        say(page, "x" * 2000)
        page.get_by_text("leave no room for an answer").wait_for()
