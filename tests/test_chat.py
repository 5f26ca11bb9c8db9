"""The chat as its visitors meet it: through its address and in a headless browser."""

import os
import re
import shutil
import threading
import time
from types import SimpleNamespace

import gradio as gr
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import expect, sync_playwright
from test_models import lively, save_three
from transformers import LlamaForCausalLM

from utils import prompts
from utils.backends import LocalBackend, Sampling
from utils.chat import CSS, MAX_CHARACTERS, build_chat
from utils.config import MODELS, REPORT_QUESTIONS, SAFETY_NOTICE, load_settings
from utils.generation import generate_answers
from utils.models import use_model

QUESTION = "What should I do about a burn?"
SYSTEM = prompts.SYSTEM_PROMPTS["first_aid"]
CAP = 32
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory, tiny_folder, tiny_tokenizer):
    """The chat over a real back end with two random adapters, on a free port."""
    tiny = LlamaForCausalLM.from_pretrained(tiny_folder).eval()
    base, run = save_three(
        tmp_path_factory.mktemp("chat"), lively(tiny, tiny_tokenizer), tiny_tokenizer
    )
    settings = load_settings(
        {"PROFILE": "pocket", "BASE_MODEL": str(base), "RUN_DIR": str(run)}
    )
    backend = LocalBackend(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        app = build_chat(settings, backend)
        _, url, _ = app.launch(
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            inbrowser=False,
            css=CSS,
            theme=gr.themes.Soft(),
        )
        yield SimpleNamespace(url=url, backend=backend, settings=settings)
        app.close(verbose=False)


@pytest.fixture
def client(chat):
    """A visitor with a conversation of their own."""
    return Client(chat.url, verbose=False)


def ask(client, message=QUESTION, model="first_aid", cap=CAP, **controls):
    """The answer and the figures under it."""
    values = {"temperature": 0, "top_p": 0.95, "seed": 1} | controls
    reply = client.predict(
        message, model, SYSTEM, cap, *values.values(), api_name="/chat"
    )
    return reply[0], reply[1]


def expected(chat, model, cap=CAP, question=QUESTION):
    with chat.backend.lock, use_model(chat.backend.model, model) as switched:
        return generate_answers(
            switched,
            chat.backend.tokenizer,
            [prompts.first_aid_messages(question)],
            max_new_tokens=cap,
            progress=None,
        )[0]["answer"]


@pytest.fixture
def slow(chat):
    """Every token takes 20 ms longer, and is counted."""
    calls = []

    def wait(*_):
        calls.append(1)
        time.sleep(0.02)

    hook = chat.backend.model.get_base_model().register_forward_pre_hook(wait)
    yield calls
    hook.remove()


# --- the back end ---


def test_a_stream_grows_and_counts_what_was_generated(chat):
    messages = prompts.first_aid_messages(QUESTION)
    stream = chat.backend.stream("finetome", messages, Sampling(max_new_tokens=CAP))
    seen = list(stream)
    assert seen[-1].text == expected(chat, "finetome")
    assert seen[-1].tokens == CAP  # this model never ends an answer itself
    assert [so_far.tokens for so_far in seen] == sorted(s.tokens for s in seen)
    assert len({so_far.first_token_s for so_far in seen}) == 1
    assert 0 < seen[0].first_token_s <= seen[-1].seconds


def test_a_closed_stream_frees_the_model(chat, slow):
    messages = prompts.first_aid_messages(QUESTION)
    stream = chat.backend.stream("base", messages, Sampling(max_new_tokens=128))
    next(stream)
    assert chat.backend.lock.locked()
    stream.close()
    assert not chat.backend.lock.locked()
    assert len(slow) < 100


def test_two_at_once_get_each_their_own_model(chat):
    wanted = {key: expected(chat, key) for key in MODELS}
    answers = {key: [] for key in MODELS}

    def run(key):
        for _ in range(4):
            messages = prompts.first_aid_messages(QUESTION)
            *_, last = chat.backend.stream(key, messages, Sampling(max_new_tokens=CAP))
            answers[key].append(last.text)

    threads = [threading.Thread(target=run, args=(key,)) for key in MODELS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {key: [wanted[key]] * 4 for key in MODELS}


# --- through its address ---


def test_each_model_answers_as_itself(chat):
    answers = {}
    for key, look in MODELS.items():
        answers[key], figures = ask(Client(chat.url, verbose=False), model=key)
        assert answers[key] == expected(chat, key)
        assert f"model-{key}" in figures
        assert re.search(
            rf"{look.label} · {CAP} tokens · first after [\d.]+ s · \d+ tokens/s",
            figures,
        )
    assert len(set(answers.values())) == 3


def test_earlier_turns_are_part_of_the_question(chat, client):
    first, _ = ask(client)
    second, _ = ask(client)
    messages = [
        *prompts.first_aid_messages(QUESTION, first),
        {"role": "user", "content": QUESTION},
    ]
    sampling = Sampling(max_new_tokens=CAP)
    *_, last = chat.backend.stream("first_aid", messages, sampling)
    assert second == last.text != first


@pytest.mark.parametrize("message", ["", "   \n"])
def test_an_empty_question_is_refused(client, message):
    with pytest.raises(AppError, match="Please type a question first"):
        ask(client, message)


def test_a_question_too_long_is_refused_and_the_limit_itself_is_not(client):
    with pytest.raises(AppError, match="has 4,001 characters; at most 4,000"):
        ask(client, "x" * (MAX_CHARACTERS + 1))
    assert ask(client, "x y " * (MAX_CHARACTERS // 4), cap=16)[0]


def test_an_unknown_model_is_refused(client):
    with pytest.raises(AppError, match="gpt"):
        ask(client, model="gpt")


@pytest.mark.parametrize("seed", [None, -1, 2**40])
def test_any_seed_will_do(client, seed):
    assert ask(client, seed=seed, temperature=1.0, cap=16)[0]


def test_a_broken_answer_says_so_and_the_next_one_is_whole(chat, client):
    calls = []

    def fail_at_the_tenth(*_):
        calls.append(1)
        if len(calls) == 10:
            raise MemoryError("no memory left")

    model = chat.backend.model.get_base_model()
    hook = model.register_forward_pre_hook(fail_at_the_tenth)
    try:
        text, _ = ask(client, model="finetome")
    finally:
        hook.remove()
    assert "broke off: no memory left. Please ask again." in text
    after, _ = ask(Client(chat.url, verbose=False), model="finetome")
    assert after == expected(chat, "finetome")


# --- in a browser ---


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


@pytest.fixture(params=[1280, 390])
def page(browser, chat, request):
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    page.set_default_timeout(20_000)
    page.goto(chat.url, wait_until="domcontentloaded")
    page.get_by_label("Your question").wait_for()
    yield page
    if os.environ.get("SHOTS"):  # a folder to keep what the visitor saw last
        page.screenshot(
            path=f"{os.environ['SHOTS']}/{request.node.name}.png", full_page=True
        )
    page.close()


def type_and_send(page, text):
    box = page.get_by_label("Your question")
    expect(box).to_be_enabled(timeout=20_000)
    box.fill(text)
    box.press("Enter")


def test_a_visitor_asks_and_switches_the_model(page, chat):
    expect(page.get_by_text(SAFETY_NOTICE)).to_be_visible()
    expect(page.get_by_text("It is not Llama 3.2 1B")).to_be_visible()
    chosen = page.get_by_role("radio", name=re.compile("^FirstAidQA"))
    expect(chosen).to_be_checked()

    cap = chat.settings.max_new_tokens
    wanted = {key: expected(chat, key, cap) for key in MODELS}
    type_and_send(page, QUESTION)
    bots = page.get_by_test_id("bot")
    figures = page.locator("[class^=model-]")
    expect(bots.last).to_have_text(wanted["first_aid"], timeout=20_000)
    expect(figures).to_contain_text(f"FirstAidQA · {cap} tokens · first after")

    # Wait until the page lets one ask again; then another model, in a new conversation.
    expect(page.get_by_label("Your question")).to_be_enabled()
    page.get_by_role("button", name="Clear").click()
    expect(bots).to_have_count(0)
    page.get_by_role("radio", name=re.compile("^Base")).check()
    type_and_send(page, QUESTION)
    expect(bots.last).to_have_text(wanted["base"], timeout=20_000)
    expect(figures).to_contain_text(f"Base · {cap} tokens")
    # Nothing is wider than the window.
    assert page.evaluate(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )


def test_a_refused_question_stays_and_can_be_mended(page, chat):
    box = page.get_by_label("Your question")
    type_and_send(page, "   ")
    expect(page.get_by_text("Please type a question first.")).to_be_visible()
    long = "word " * 1000
    type_and_send(page, long)
    expect(page.get_by_text("has 5,000 characters; at most 4,000")).to_be_visible()
    assert box.input_value() == long  # nobody loses what they wrote
    answer = expected(chat, "first_aid", chat.settings.max_new_tokens)
    type_and_send(page, QUESTION)
    expect(page.get_by_test_id("bot").last).to_have_text(answer, timeout=20_000)


def test_stop_ends_an_answer_and_the_next_can_be_asked(page, chat, slow):
    type_and_send(page, QUESTION)
    bots = page.get_by_test_id("bot")
    expect(bots.last).not_to_be_empty()
    page.locator("button.stop-button").click()
    expect(page.get_by_label("Your question")).to_be_enabled(timeout=20_000)
    assert len(slow) < chat.settings.max_new_tokens
    type_and_send(page, "And now?")
    expect(bots).to_have_count(2, timeout=20_000)


def test_a_closed_tab_leaves_the_model_to_the_others(browser, chat, slow):
    page = browser.new_page()
    page.goto(chat.url, wait_until="domcontentloaded")
    page.get_by_label("Your question").wait_for()
    type_and_send(page, QUESTION)
    expect(page.get_by_test_id("bot").last).not_to_be_empty()
    page.close()
    begun = time.monotonic()
    text, _ = ask(Client(chat.url, verbose=False), model="base")
    assert text == expected(chat, "base")
    assert time.monotonic() - begun < 15


def test_an_example_is_asked_by_a_click(page, chat):
    cap = chat.settings.max_new_tokens
    answer = expected(chat, "first_aid", cap, REPORT_QUESTIONS[2])
    page.get_by_text(REPORT_QUESTIONS[2]).click()
    expect(page.get_by_test_id("user")).to_have_text(REPORT_QUESTIONS[2])
    expect(page.get_by_test_id("bot")).to_have_text(answer, timeout=20_000)
