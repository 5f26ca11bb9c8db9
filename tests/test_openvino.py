"""The OpenVINO engine on the pocket Llama in float32: the same answers, faster.

The quick tests trace the model themselves (`traced.py`). `make test-slow` exports it as
`make export` does, which takes an environment of its own, made once.
"""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_chat_crowd import all_alone, crowd

from utils import dataset, sources
from utils.backends import LocalBackend, Sampling
from utils.chat import build_chat, launch_options
from utils.config import MODELS, ROOT, load_settings
from utils.export import export
from utils.feedback import Feedback
from utils.prompts import first_aid_messages, prompt_text

pytest.importorskip("openvino_genai", reason="pip install -r requirements-openvino.txt")
from utils.openvino_engine import OpenVinoBackend  # noqa: E402

CLOSE = 1e-3  # two logits closer than this may change places


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    run = tmp_path_factory.mktemp("engine") / "run"
    return load_settings({"PROFILE": "pocket", "RUN_DIR": str(run)})


@pytest.fixture(scope="module")
def engine(settings, traced_pocket):
    return OpenVinoBackend(settings, traced_pocket)


@pytest.fixture(scope="module")
def really_exported(settings, tmp_path_factory):
    """The engine on what `make export` makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.exported.EXPORTS", tmp_path_factory.mktemp("exports"))
        return OpenVinoBackend(settings, export(settings, "fp32"))


@pytest.fixture(scope="module")
def local(settings):
    return LocalBackend(settings)


@pytest.fixture(scope="module")
def questions(settings):
    split = dataset.split_rows(
        sources.load_source(settings.first_aid_dataset), progress=False
    )
    return [row["question"] for row in split.test]


def last_of(backend, key, question, cap=16, **sampling):
    messages = first_aid_messages(question)
    *_, last = backend.stream(key, messages, Sampling(cap, **sampling))
    return last


def gap_where_they_part(local, key, question, one: str, other: str) -> float:
    """The difference of the two best logits after what both answers begin with."""
    tokenizer, model = local.tokenizer, local.model
    prompt = prompt_text(tokenizer, first_aid_messages(question))
    begun = [
        tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
        for text in (one, other)
    ]
    shared = next(n for n, (a, b) in enumerate(zip(*begun)) if a != b)
    from utils.models import use_model

    with use_model(model, key), torch.inference_mode():
        logits = model(torch.tensor([begun[0][:shared]])).logits[0, -1]
    best = logits.topk(2).values
    return (best[0] - best[1]).item()


def check_equal(engine, local, questions, cap) -> tuple[int, int]:
    """How many answers were compared, and how many part at a near tie."""
    compared = parted = 0
    for question in questions:
        for key in MODELS:
            mine, theirs = (
                last_of(who, key, question, cap).text for who in (engine, local)
            )
            compared += 1
            if mine != theirs:
                parted += 1
                assert gap_where_they_part(local, key, question, mine, theirs) < CLOSE
    return compared, parted


def test_prompts_are_those_of_training(engine, local, questions):
    for question in questions[:5]:
        messages = first_aid_messages(question)
        assert engine.prompt(messages) == prompt_text(local.tokenizer, messages)


def test_it_says_what_transformers_says(engine, local, questions):
    compared, parted = check_equal(engine, local, questions[:4], 24)
    assert compared == 12 and parted <= 1


@pytest.mark.slow
def test_fifty_questions_get_the_same_answers_of_all_three(
    really_exported, local, questions
):
    compared, parted = check_equal(really_exported, local, questions[:50], 160)
    print(f"{compared} answers, of which {parted} part at a tie closer than {CLOSE}")
    assert compared == 150 and parted <= 3


def test_switching_back_and_forth_stays_right(engine, questions):
    alone = {key: last_of(engine, key, questions[0], 8).text for key in MODELS}
    assert len(set(alone.values())) == 3
    for n in range(100):
        key = list(MODELS)[n % 3]
        assert last_of(engine, key, questions[0], 8).text == alone[key], n


def test_twenty_at_once_get_their_own_models_answer(engine, questions):
    jobs = [(list(MODELS)[n % 3], questions[n % 4]) for n in range(20)]
    wanted = {job: last_of(engine, *job).text for job in set(jobs)}
    assert len(set(wanted.values())) == len(wanted)
    together = threading.Barrier(20)

    def ask(job):
        together.wait()
        return last_of(engine, *job).text

    with ThreadPoolExecutor(20) as pool:
        given = list(pool.map(ask, jobs))
    assert given == [wanted[job] for job in jobs]


@pytest.mark.slow
def test_twenty_visitors_of_the_app_get_their_own_models_answer(
    engine, settings, tmp_path
):
    wanted = all_alone(engine, 24)
    app = build_chat(settings, engine, feedback=Feedback(tmp_path))
    _, url, _ = app.launch(**launch_options(), prevent_thread_lock=True, quiet=True)
    try:
        came, wrong = crowd(url, wanted, 24)
    finally:
        app.close(verbose=False)
    assert came == 20 and wrong == []


def test_the_answer_grows_and_says_its_figures(engine, questions):
    messages = first_aid_messages(questions[0])
    seen = [p for p in engine.stream("first_aid", messages, Sampling(16)) if not p.note]
    assert [p.tokens for p in seen] == list(range(1, 17))
    assert all(b.text.startswith(a.text[:-1]) for a, b in zip(seen, seen[1:]))
    assert 0 < seen[0].first_token_s <= seen[-1].seconds
    assert "OpenVINO" in engine.about and "fp32" in engine.about


def test_sampling_follows_its_settings(engine, questions):
    warm = dict(cap=24, temperature=1.0, top_p=0.9)
    first, again = (
        last_of(engine, "base", questions[0], seed=5, **warm) for _ in range(2)
    )
    other = last_of(engine, "base", questions[0], seed=6, **warm)
    assert first.text == again.text != other.text


def test_stopping_stops_within_a_token(engine, questions):
    messages = first_aid_messages(questions[0])
    stream = engine.stream("first_aid", messages, Sampling(2_000))
    for _ in range(4):
        next(stream)
    computed = engine.computed
    stream.close()  # waits for the engine
    assert engine.computed - computed <= 2  # the one under way, and one between lines
    assert last_of(engine, "base", questions[0]).text


def test_an_error_reaches_the_reader_and_the_next_answer_is_right(
    engine, questions, monkeypatch
):
    wanted = last_of(engine, "first_aid", questions[0]).text

    class Broken:
        def get_generation_config(self):
            return pipeline.get_generation_config()

        def generate(self, prompt, config, streamer):
            config.max_new_tokens = 3
            pipeline.generate(prompt, config, streamer)
            raise RuntimeError("the engine is on fire")

    pipeline = engine.pipeline
    monkeypatch.setattr(engine, "pipeline", Broken())
    with pytest.raises(RuntimeError, match="broke off: the engine is on fire"):
        last_of(engine, "first_aid", questions[0])
    monkeypatch.undo()
    assert last_of(engine, "first_aid", questions[0]).text == wanted


def test_no_such_model(engine):
    with pytest.raises(KeyError, match="there are: base, first_aid, finetome"):
        last_of(engine, "gpt", "Hello")


HEAVY = "print(sorted({'transformers', 'torch', 'peft'} & set(sys.modules)))"


def run_alone(code, **environ):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{HEAVY}"],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_it_imports_no_transformers():
    assert run_alone("import utils.openvino_engine") == ["[]"]


def test_the_chat_with_it_imports_no_transformers_and_answers(traced_pocket, settings):
    code = """
from utils.protocol import Sampling
from utils.space import choose_cast, load_chat_settings, os
from utils import chat
cast = choose_cast(load_chat_settings(), os.environ)
chat.build_chat(cast.settings, cast.sources, about=cast.about)
*_, last = cast.sources["local"].stream(
    "first_aid", [{"role": "user", "content": "A burn?"}], Sampling(8)
)
print(cast.about)
print(last.tokens)
"""
    environ = {"CHAT_ENGINE": "openvino", "ENGINE_MODEL": str(traced_pocket.path)}
    environ |= {"PROFILE": "pocket", "RUN_DIR": str(settings.run_dir)}
    about, tokens, heavy = run_alone(code, **environ)
    assert "on this machine (OpenVINO, data/pocket_llama in fp32)" in about
    assert tokens == "8" and heavy == "[]"
