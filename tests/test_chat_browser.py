"""The chat in a headless Chromium, on a desktop and on a phone, by mouse and by keys.

`SHOTS=folder` keeps what a visitor saw last in each test.
"""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from gradio_client import Client
from playwright.sync_api import expect, sync_playwright
from test_chat import QUESTION, ask, expected, running_chat

from utils.config import MODELS, REPORT_QUESTIONS, SAFETY_NOTICE
from utils.feedback import read_votes

CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SHORT = 32
WAIT = 120_000  # a busy machine may be ten times slower than a quiet one
expect.set_options(timeout=WAIT)
# What a screen reader would say of each control that can be reached.
NAMELESS = """() => [...document.querySelectorAll("input, textarea, button, select")]
  .filter(e => e.offsetParent !== null)
  .filter(e => !(e.getAttribute("aria-label") || e.title || e.innerText.trim()
    || e.tagName !== "BUTTON" && ([...(e.labels || [])].some(l => l.innerText.trim())
      || e.closest("fieldset, .block")?.querySelector("[data-testid=block-info]"))))
  .map(e => e.outerHTML)"""
HOSTILE = (
    "<script>window.ran = 1</script> <style>body { display: none }</style> "
    "<img src=/x onerror='window.ran = 2'> <custom-tag>inside</custom-tag> "
    "![pixel](/pixel.png) [link](javascript:window.ran=3) &lt;i&gt; <!-- gone --> "
    "<svg onload=window.ran=4></svg> \u0007\u202e<|eot_id|> ../../etc/passwd"
)


@pytest.fixture(scope="module")
def chat(tmp_path_factory, tiny_folder, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("chat")
    with running_chat(folder, tiny_folder, tiny_tokenizer) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if not found:
        pytest.skip("no Chromium on the PATH (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=CHROMIUM_ARGUMENTS
        )
        yield browser
        browser.close()


@pytest.fixture
def slow(chat):
    """Every token takes 60 ms longer, and is counted."""
    calls = []

    def wait(*_):
        calls.append(1)
        time.sleep(0.06)

    hook = chat.backend.model.get_base_model().register_forward_pre_hook(wait)
    yield calls
    hook.remove()


def opened(browser, chat, request, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(WAIT)
    page.goto(chat.url, wait_until="domcontentloaded")
    page.get_by_label("Your question").wait_for()
    yield page
    if os.environ.get("SHOTS"):
        name = f"{os.environ['SHOTS']}/{request.node.name}.png"
        page.screenshot(path=name, full_page=True)
    page.close()


@pytest.fixture
def page(browser, chat, request):
    yield from opened(browser, chat, request, 1280)


@pytest.fixture(params=[1280, 390])
def any_page(browser, chat, request):
    yield from opened(browser, chat, request, request.param)


def notice_is_clear(page):
    """Whether the emergency notice is in view with nothing in front of it."""
    notice = page.get_by_text(SAFETY_NOTICE)
    expect(notice).to_be_in_viewport()
    return notice.evaluate(
        """element => {
          const box = element.getBoundingClientRect();
          const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
          return document.elementFromPoint(x, y)?.closest(".notice") !== null;
        }"""
    )


def send(page, text):
    box = page.get_by_label("Your question")
    expect(box).to_be_enabled()
    box.fill(text)
    box.press("Enter")


def shorten(page, tokens=SHORT):
    """Ask for short answers, through the settings of the page."""
    page.get_by_role("button", name="Settings of both tabs").click()
    cap = page.get_by_label("number input for Longest answer (tokens)")
    # Only once its twin has moved does the page know. A page that has just unfolded
    # these settings may put its own values back over what was typed too early.
    twin = page.get_by_label("range slider for Longest answer (tokens)")
    deadline = time.monotonic() + WAIT / 1000
    while twin.input_value() != str(tokens):
        assert time.monotonic() < deadline, "the page does not take the length"
        cap.fill(str(tokens))
        cap.press("Tab")
        page.wait_for_timeout(500)
    page.get_by_role("button", name="Settings of both tabs").click()


def answers(page):
    """Every bubble of a model: what it said, and the line under it, in turn."""
    return page.get_by_test_id("bot")


def finished(page, count):
    """Wait until `count` answers stand there, with their figures, and all is quiet."""
    expect(answers(page)).to_have_count(2 * count)
    expect(page.get_by_label("Your question")).to_be_enabled()


def test_a_visitor_asks_each_model_and_votes(any_page, chat):
    page = any_page
    expect(page.get_by_text(SAFETY_NOTICE)).to_be_in_viewport()
    expect(page.get_by_text("It is not Llama 3.2 1B")).to_be_visible()
    chosen = page.get_by_role("radio", name=re.compile("FirstAidQA: "))
    expect(chosen).to_be_checked()
    shorten(page)
    for key in ("first_aid", "base", "finetome"):
        look = MODELS[key]
        page.get_by_role("radio", name=re.compile(f"{look.label}: ")).check()
        send(page, QUESTION)
        expect(answers(page).first).to_have_text(expected(chat, key, SHORT))
        line = f"{look.label} · {SHORT} tokens · first after"
        expect(answers(page).nth(1)).to_contain_text(line)
        finished(page, 1)
        expect(page.locator(f".figures .model-{key}")).to_contain_text(line)
        if key != "finetome":
            page.get_by_role("button", name="Clear").click()
            expect(answers(page)).to_have_count(0)

    before = len(read_votes(chat.votes))
    page.get_by_role("button", name="Like", exact=True).click()
    expect(page.get_by_label("Your vote")).to_have_value(re.compile("like.*FineTome"))
    page.get_by_label("Comment (optional)").fill("short, <b>not</b> useful")
    page.get_by_role("button", name="Save this vote").click()
    expect(page.get_by_text("your vote is saved")).to_be_visible()
    assert notice_is_clear(page)
    expect(page.get_by_label("Your vote")).to_be_hidden()
    (vote,) = read_votes(chat.votes)[before:]
    assert (vote["model"], vote["liked"]) == ("finetome", True)
    assert vote["comment"] == "short, <b>not</b> useful"
    assert vote["question"] == QUESTION
    assert vote["answer"] == expected(chat, "finetome", SHORT)
    assert vote["settings"]["max_new_tokens"] == SHORT
    assert vote["app_version"] and vote["time"]
    page.mouse.wheel(0, 5000)  # to the end of the page: the notice comes along
    assert notice_is_clear(page)
    assert page.evaluate(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    assert page.evaluate(NAMELESS) == []


def test_three_columns_stream_and_the_best_is_kept(any_page, chat):
    page = any_page
    shorten(page)
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("One question to all three").fill(REPORT_QUESTIONS[2])
    page.get_by_role("button", name="Ask all three").click()
    for key, look in MODELS.items():
        expect(
            page.get_by_label(re.compile(f"Answer of .*{look.label}"))
        ).to_have_value(expected(chat, key, SHORT, REPORT_QUESTIONS[2]))
    expect(page.get_by_text("ROUGE-L against the reference")).to_have_count(3)
    reference = page.get_by_label("Reference answer").input_value()
    assert reference.startswith("Leave the finger exactly as you found it.")
    expect(page.get_by_text(SAFETY_NOTICE)).to_be_in_viewport()
    before = len(read_votes(chat.votes))
    page.get_by_role("radio", name="■ FineTome", exact=True).check()
    page.get_by_label("Why? (optional)").fill("calm")
    page.get_by_role("button", name="Save this choice").click()
    expect(page.get_by_text("your vote is saved")).to_be_visible()
    (vote,) = read_votes(chat.votes)[before:]
    assert (vote["model"], vote["comment"]) == ("finetome", "calm")
    assert page.evaluate(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    assert page.evaluate(NAMELESS) == []


def test_stop_ends_a_comparison(page, chat, slow):
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("One question to all three").fill(QUESTION)
    page.get_by_role("button", name="Ask all three").click()
    expect(page.get_by_label(re.compile("Answer of .*Base"))).not_to_have_value("")
    page.get_by_role("button", name="Stop", exact=True).click()
    time.sleep(0.5)
    stopped_at = len(slow)
    time.sleep(0.5)
    assert len(slow) == stopped_at < 3 * chat.settings.max_new_tokens
    assert not chat.backend.lock.locked()
    expect(page.get_by_label(re.compile("Answer of .*FirstAidQA"))).to_have_value("")


def test_stop_retry_edit_undo_export_and_reload(page, chat, slow):
    send(page, QUESTION)
    expect(answers(page).last).not_to_be_empty()
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.get_by_label("Your question")).to_be_enabled()
    time.sleep(0.3)
    stopped_at = len(slow)
    assert stopped_at < chat.settings.max_new_tokens
    time.sleep(0.5)
    assert len(slow) == stopped_at  # nothing goes on being computed
    assert not chat.backend.lock.locked()

    shorten(page)
    page.get_by_role("button", name="Retry").click()
    wanted = expected(chat, "first_aid", SHORT)
    expect(answers(page).first).to_have_text(wanted)
    finished(page, 1)

    page.get_by_role("button", name="Edit").first.click()
    box = page.locator(".message textarea, [data-testid=user] textarea").first
    box.fill("And a <nosebleed>?")
    page.get_by_role("button", name="Submit", exact=True).click()
    wanted = expected(chat, "first_aid", SHORT, "And a <nosebleed>?")
    expect(answers(page).first).to_have_text(wanted)
    finished(page, 1)

    with page.expect_download() as download:
        page.get_by_role("button", name="Export as Markdown").click()
    assert re.fullmatch(r"conversation_\d+\.md", download.value.suggested_filename)
    text = Path(download.value.path()).read_text("utf-8")
    assert (
        f"```text\nAnd a <nosebleed>?\n```\n\n## ▲ FirstAidQA\n\n```text\n{wanted}"
        in text
    )
    assert f"{SHORT} tokens" in text and "Not medical advice" in text
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSON").click()
    turns = json.loads(Path(download.value.path()).read_text("utf-8"))["turns"]
    assert [turn["text"] for turn in turns] == ["And a <nosebleed>?", wanted]
    assert turns[1]["settings"]["max_new_tokens"] == SHORT

    page.get_by_role("button", name="Undo").click()
    expect(answers(page)).to_have_count(0)
    expect(page.get_by_label("Your question")).to_have_value("And a <nosebleed>?")

    page.reload(wait_until="domcontentloaded")
    page.get_by_label("Your question").wait_for()
    expect(answers(page)).to_have_count(0)  # nothing of the visitor's is kept
    expect(page.get_by_text(SAFETY_NOTICE)).to_be_in_viewport()
    shorten(page)
    send(page, QUESTION)
    wanted = expected(chat, "first_aid", SHORT)
    expect(answers(page).first).to_have_text(wanted)


def test_a_refused_question_stays_and_can_be_mended(page, chat):
    shorten(page)
    box = page.get_by_label("Your question")
    send(page, "   ")
    expect(page.get_by_text("Please type a question first.")).to_be_visible()
    long = "word " * 20_000
    send(page, long)
    expect(page.get_by_text("has 100,000 characters; at most 4,000")).to_be_visible()
    assert box.input_value() == long  # nobody loses what they wrote
    send(page, QUESTION)
    wanted = expected(chat, "first_aid", SHORT)
    expect(answers(page).first).to_have_text(wanted)


def test_a_closed_tab_leaves_the_model_to_the_others(browser, chat, slow):
    page = browser.new_page()
    page.goto(chat.url, wait_until="domcontentloaded")
    page.get_by_label("Your question").wait_for()
    send(page, QUESTION)
    expect(answers(page).last).not_to_be_empty()
    page.close()
    begun = time.monotonic()
    text, _ = ask(Client(chat.url, verbose=False), model="base")
    assert text == expected(chat, "base")
    assert time.monotonic() - begun < 20


def test_what_is_hostile_is_shown_as_text_and_nothing_runs(page, chat, monkeypatch):
    """In a question, and in an answer: the model is made to say the same."""

    def says(model, tokenizer, messages, **_):
        yield messages[-1]["content"]

    monkeypatch.setattr("utils.backends.stream_answer", says)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    send(page, HOSTILE)
    finished(page, 1)
    for bubble in (page.get_by_test_id("user").first, answers(page).first):
        shown = bubble.inner_text().replace("\u2060", "")
        for piece in (
            "<script>window.ran = 1</script>",
            "<style>body { display: none }</style>",
            "<custom-tag>inside</custom-tag>",
            "![pixel](/pixel.png)",
            "&lt;i&gt; <!-- gone -->",
        ):
            assert piece in shown
        kinds = "script, style, img, custom-tag, svg[onload], i, a"
        assert bubble.locator(kinds).count() == 0
    said = answers(page).first.inner_text()
    assert "\u0007" not in said and "\u202e" not in said and "<|" not in said
    assert page.evaluate("window.ran === undefined")
    assert not [url for url in asked if url.endswith(("/x", "/pixel.png"))]
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as Markdown").click()
    assert re.fullmatch(r"conversation_\d+\.md", download.value.suggested_filename)
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("One question to all three").fill(HOSTILE)
    page.get_by_role("button", name="Ask all three").click()
    expect(page.get_by_label(re.compile("Answer of .*FirstAidQA"))).to_have_value(
        re.compile("<script>window.ran")
    )
    assert page.evaluate("window.ran === undefined")


def test_everything_can_be_done_with_the_keyboard(page, chat):
    shorten(page)
    box = page.get_by_label("Your question")
    box.focus()
    page.keyboard.type(QUESTION)
    page.keyboard.press("Tab")
    focused = "document.activeElement.innerText"
    assert page.evaluate(focused).strip() == "Ask"
    page.keyboard.press("Enter")
    wanted = expected(chat, "first_aid", SHORT)
    expect(answers(page).first).to_have_text(wanted)
    finished(page, 1)
    like = page.get_by_role("button", name="Like", exact=True)
    like.focus()
    page.keyboard.press("Enter")
    comment = page.get_by_label("Comment (optional)")
    expect(comment).to_be_visible()
    comment.focus()
    page.keyboard.type("by keyboard")
    page.keyboard.press("Tab")
    assert page.evaluate(focused).strip() == "Save this vote"
    page.keyboard.press("Enter")
    expect(page.get_by_text("your vote is saved")).to_be_visible()
    assert read_votes(chat.votes)[-1]["comment"] == "by keyboard"
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("Tab")
    assert page.evaluate(focused).strip() == "Compare"
    page.keyboard.press("Enter")
    expect(page.get_by_label("One question to all three")).to_be_visible()


def test_an_example_is_asked_by_a_click(page, chat):
    shorten(page)
    wanted = expected(chat, "first_aid", SHORT, REPORT_QUESTIONS[2])
    page.get_by_text(REPORT_QUESTIONS[2]).first.click()
    expect(page.get_by_test_id("user")).to_have_text(REPORT_QUESTIONS[2])
    expect(answers(page).first).to_have_text(wanted)
