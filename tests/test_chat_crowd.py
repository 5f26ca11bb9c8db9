"""Twenty visitors at once: every answer is the one that its model gives alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from test_chat import PLENTY, SYSTEM, running_chat

from utils.backends import LocalBackend, Sampling
from utils.chat import build_chat, launch_options
from utils.chat_limits import RequestLimit
from utils.config import MODELS, load_settings
from utils.feedback import Feedback

VISITORS = 20
CAP = 24
QUESTIONS = (
    "What should I do about a burn?",
    "How do I stop a nosebleed?",
    "Should I move somebody with a broken leg?",
)


class NoLock:
    """What stands in for the lock when it is taken out."""

    def acquire(self, timeout=None):
        return True

    def release(self):
        pass


def alone(backend, key, question, cap):
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": question},
    ]
    *_, last = backend.stream(key, messages, Sampling(cap))
    return last.text


def all_alone(backend, cap):
    """What each model says to each question when nobody else asks."""
    wanted = {
        (key, question): alone(backend, key, question, cap)
        for key in MODELS
        for question in QUESTIONS
    }
    assert len(set(wanted.values())) == len(wanted)  # or a mix-up would not show
    return wanted


def crowd(url, wanted, cap, rounds=1):
    """How many answers came, and which were not as they are alone, or an error."""
    jobs = [list(wanted)[n % len(wanted)] for n in range(VISITORS * rounds)]
    started = threading.Barrier(VISITORS)

    def visit(mine):
        visitor = Client(url, verbose=False)
        started.wait(120)
        said = []
        for key, question in mine:
            visitor.reset_session()
            asked = (question, key, "local", SYSTEM, cap, 0, 0.95, 1)
            try:
                message, _ = visitor.predict(*asked, api_name="/chat")
            except AppError as error:
                said.append(((key, question), f"error: {error}"))
                continue
            parts = [part["text"] for part in message["content"]]
            said.append(((key, question), parts[0] if len(parts) > 1 else ""))
        return said

    with ThreadPoolExecutor(VISITORS) as pool:
        shares = [jobs[n::VISITORS] for n in range(VISITORS)]
        answers = [pair for said in pool.map(visit, shares) for pair in said]
    wrong = [(job, text) for job, text in answers if text != wanted[job]]
    return len(answers), wrong


@pytest.fixture(scope="module")
def chat(tmp_path_factory, tiny_folder, tiny_tokenizer):
    """With the event's concurrency limit raised: the lock alone keeps order."""
    folder = tmp_path_factory.mktemp("crowd")
    with running_chat(
        folder, tiny_folder, tiny_tokenizer, at_once=2 * VISITORS
    ) as running:
        yield running


def test_twenty_at_once_get_what_each_model_says_alone(chat):
    answered, wrong = crowd(chat.url, all_alone(chat.backend, CAP), cap=CAP)
    assert answered == VISITORS and wrong == []


def test_without_the_lock_the_same_twenty_get_wrong_answers(chat, monkeypatch):
    wanted = all_alone(chat.backend, CAP)
    monkeypatch.setattr(chat.backend, "lock", NoLock())
    _, wrong = crowd(chat.url, wanted, cap=CAP)
    mixed = [text for _, text in wrong if not text.startswith("error: ")]
    assert mixed, "without the lock nothing went wrong: this check shows nothing"


@pytest.mark.slow
@pytest.mark.parametrize("locked", [True, False])
def test_twenty_at_once_on_the_pocket_models(tmp_path, locked):
    settings = load_settings({"PROFILE": "pocket", "RUN_DIR": str(tmp_path / "run")})
    backend = LocalBackend(settings)
    wanted = all_alone(backend, CAP)
    app = build_chat(
        settings,
        backend,
        limit=RequestLimit(PLENTY),
        feedback=Feedback(tmp_path),
        at_once=2 * VISITORS,
    )
    _, url, _ = app.launch(
        prevent_thread_lock=True, quiet=True, inbrowser=False, **launch_options()
    )
    if not locked:
        backend.lock = NoLock()
    try:
        answered, wrong = crowd(url, wanted, cap=CAP, rounds=3)
    finally:
        app.close(verbose=False)
    assert answered == 3 * VISITORS
    mixed = [text for _, text in wrong if not text.startswith("error: ")]
    assert wrong == [] if locked else mixed
