"""The remote back end against real servers on loopback: what works, what breaks.

`python tests/test_backends.py FOLDER PORT` is a server with the OpenAI protocol and
three real (tiny) models behind it. The first part of a path says how it behaves:
/plain, /slow (waits before it speaks), /locked (wants a token), /silent (accepts and
says nothing), /pings (the same, but keeps the line awake), /cut (leaves in mid-answer),
/ill (an error in the stream), /busy, /garbage.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import fastapi
import httpx
import huggingface_hub.constants
import pytest
import uvicorn
from fastapi.responses import JSONResponse, StreamingResponse
from gradio_client import Client
from test_chat import CAP, PLENTY, QUESTION, SYSTEM
from test_models import lively, save_three
from transformers import LlamaForCausalLM

from utils import prompts
from utils.backends import LocalBackend, Sampling
from utils.chat import build_chat, launch_options
from utils.chat_limits import RequestLimit
from utils.config import MODELS, ROOT, Settings, load_settings
from utils.models import load_three_models, use_model
from utils.remote import RemoteBackend

NAMES = {key: f"{key}-there" for key in MODELS}
TOKEN = "hf_theRightOneForThisTest"
MESSAGES = prompts.first_aid_messages(QUESTION)


def serve(settings: Settings) -> fastapi.FastAPI:
    app = fastapi.FastAPI()
    backend = LocalBackend(settings)
    keys = {name: key for key, name in NAMES.items()}
    state = {"stopped": 0, "finished": 0, "asked": [], "authorizations": []}

    @app.get("/state")
    def tell() -> dict:
        return state

    @app.get("/{how}/v1/models")
    def models(how: str):
        if how == "ill":
            return JSONResponse({"error": "ill"}, status_code=503)
        return {"data": [{"id": name} for name in keys]}

    def chunk(text: str | None, reason: str | None = None, **more) -> str:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
        body = {"id": "1", "created": 0, "model": "m", "system_fingerprint": "f"}
        body |= {"object": "chat.completion.chunk", "choices": [choice], **more}
        return f"data: {json.dumps(body)}\n\n"

    async def answer(how: str, body: dict, request: fastapi.Request):
        if how == "slow":
            await asyncio.sleep(1.5)
        while how == "silent":
            await asyncio.sleep(0.1)
        while how == "pings":
            yield ": still here\n\n"
            await asyncio.sleep(0.1)
        if how == "ill":
            yield 'data: {"error": "out of memory", "error_type": "generation"}\n\n'
            return
        if how == "garbage":
            yield "data: <html>\n\n"
            return
        sampling = Sampling(body["max_tokens"], body["temperature"] or 0)
        stream = backend.stream(keys[body["model"]], body["messages"], sampling)
        before, last = "", None
        try:
            while (so_far := await asyncio.to_thread(next, stream, None)) is not None:
                last = so_far
                yield chunk(so_far.text[len(before) :])
                before = so_far.text
                await asyncio.sleep(0.02)
                if how == "cut":
                    return
            usage = {"completion_tokens": last.tokens, "prompt_tokens": 1}
            usage["total_tokens"] = last.tokens + 1
            yield chunk(None, "stop")
            yield chunk(None, choices=[], usage=usage)
            yield "data: [DONE]\n\n"
            state["finished"] += 1
        except asyncio.CancelledError:
            state["stopped"] += 1
            raise
        finally:
            stream.close()

    @app.post("/{how}/v1/chat/completions")
    async def chat(how: str, request: fastapi.Request):
        body = await request.json()
        authorization = request.headers.get("authorization", "")
        state["asked"].append({k: v for k, v in body.items() if k != "messages"})
        state["authorizations"].append(authorization)
        if how == "locked" and authorization != f"Bearer {TOKEN}":
            return JSONResponse({"error": f"no: {authorization}"}, status_code=401)
        if how == "busy":
            return JSONResponse({"error": "busy"}, status_code=503)
        if body["model"] not in keys:
            return JSONResponse({"error": "no such model"}, status_code=404)
        return StreamingResponse(
            answer(how, body, request), media_type="text/event-stream"
        )

    return app


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert process.poll() is None, "the server ended"
        try:
            httpx.get(url, timeout=2)
            return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise AssertionError(f"{url} did not come up in {seconds} s")


@contextmanager
def process(command, url, **environ):
    started = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(url, started)
        yield started
    finally:
        started.kill()
        started.wait()


@pytest.fixture(scope="module", autouse=True)
def online():
    """Loopback is asked through huggingface_hub's session, which is off in tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_folder, tiny_tokenizer):
    tiny = LlamaForCausalLM.from_pretrained(tiny_folder).eval()
    return save_three(
        tmp_path_factory.mktemp("remote"), lively(tiny, tiny_tokenizer), tiny_tokenizer
    )


def settings_of(base, run) -> Settings:
    return load_settings(
        {"PROFILE": "pocket", "BASE_MODEL": str(base), "RUN_DIR": str(run)}
    )


@pytest.fixture(scope="module")
def local(folders):
    return LocalBackend(settings_of(*folders))


@contextmanager
def own_server(folders):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, __file__, *map(str, folders), str(port)]
    with process(command, f"{url}/state") as started:
        yield SimpleNamespace(url=url, process=started)


@pytest.fixture(scope="module")
def server(folders):
    with own_server(folders) as running:
        yield running


@pytest.fixture
def state(server):
    return lambda: httpx.get(f"{server.url}/state").json()


def remote(server, how="plain", **options):
    return RemoteBackend(f"{server.url}/{how}", NAMES, **options)


def last_of(backend, key="first_aid", cap=CAP, **options):
    *_, last = backend.stream(key, MESSAGES, Sampling(cap), **options)
    return last


def test_each_model_streams_what_the_local_one_says(server, local):
    for key in MODELS:
        seen = [
            so_far
            for so_far in remote(server).stream(key, MESSAGES, Sampling(CAP))
            if not so_far.note
        ]
        wanted = last_of(local, key)
        assert seen[-1].text == wanted.text
        assert seen[-1].tokens == wanted.tokens == CAP  # the server's own count
        assert len(seen) > 5
        assert all(b.text.startswith(a.text) for a, b in zip(seen, seen[1:]))
        assert 0 < seen[0].first_token_s <= seen[-1].seconds


def test_the_settings_arrive(server, state):
    sampling = Sampling(8, temperature=0.7, top_p=0.9, seed=5)
    list(remote(server).stream("base", MESSAGES, sampling))
    asked = state()["asked"][-1]
    assert asked["model"] == NAMES["base"] and asked["stream"] is True
    wanted = {"max_tokens": 8, "temperature": 0.7, "top_p": 0.9, "seed": 5}
    assert {key: asked[key] for key in wanted} == wanted
    list(remote(server).stream("base", MESSAGES, Sampling(8)))
    assert state()["asked"][-1]["temperature"] == 0


def test_stopping_stops_the_server(server, state):
    before = state()
    stream = remote(server).stream("base", MESSAGES, Sampling(500))
    next(so_far for so_far in stream if so_far.text)
    stream.close()
    until = time.monotonic() + 15
    while state()["stopped"] == before["stopped"] and time.monotonic() < until:
        time.sleep(0.1)
    assert state()["stopped"] == before["stopped"] + 1
    assert state()["finished"] == before["finished"]


def test_a_wrong_token_is_said_and_not_shown(server):
    wrong = "hf_aWrongOneThatNobodyMaySee"
    with pytest.raises(RuntimeError, match=r"not accept the token \(401\)") as caught:
        last_of(remote(server, "locked", token=wrong))
    assert wrong not in str(caught.value)
    assert "HF_TOKEN" in str(caught.value)


def test_the_visitors_token_comes_before_the_apps(server, state):
    assert last_of(remote(server, "locked", token=TOKEN)).text
    assert last_of(remote(server, "locked", token="hf_other"), token=TOKEN).text
    assert state()["authorizations"][-1] == f"Bearer {TOKEN}"


def test_without_a_token_no_saved_one_is_sent(server, state, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_savedOnThisMachine")
    last_of(remote(server), cap=4)
    assert state()["authorizations"][-1] == "Bearer EMPTY"


@pytest.mark.parametrize(
    ("endpoint", "sent"),
    [
        ("https://x.endpoints.huggingface.cloud", "t"),
        ("http://localhost:8000", "t"),
        ("http://gpu.lan:8000", "EMPTY"),
    ],
)
def test_no_token_travels_in_the_open(endpoint, sent):
    backend = RemoteBackend(endpoint, NAMES, token="t")
    assert backend._key(None) == sent
    assert backend._key("v") == ("v" if sent == "t" else "EMPTY")


def test_a_slow_server_is_waited_for_in_plain_sight(server, local):
    seen = list(remote(server, "slow").stream("base", MESSAGES, Sampling(8)))
    assert [so_far.note for so_far in seen[:3]] == ["waits for the endpoint"] * 3
    assert seen[-1].text == last_of(local, "base", 8).text
    assert seen[-1].first_token_s > 1.4


@pytest.mark.parametrize("how", ["silent", "pings"])
def test_a_silent_server_is_given_up_and_can_be_stopped(server, how):
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="said nothing for 1 s"):
        last_of(remote(server, how, wait_s=1))
    assert time.monotonic() - begun < 10
    stream = remote(server, "silent").stream("base", MESSAGES, Sampling(8))
    next(stream)
    begun = time.monotonic()
    stream.close()
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("busy", r"answered with an error \(503\); try again later"),
        ("ill", "answered with an error; its log says more"),
        ("garbage", "answered with an error; its log says more"),
        ("cut", "the connection to the endpoint broke"),
    ],
)
def test_what_goes_wrong_there_is_one_clear_line(server, how, said):
    with pytest.raises(RuntimeError, match=said):
        last_of(remote(server, how))


def test_a_name_that_is_not_served_points_to_model_names(server):
    backend = RemoteBackend(f"{server.url}/plain", dict.fromkeys(MODELS, "gpt"))
    with pytest.raises(RuntimeError, match="no model 'gpt' .*check MODEL_NAMES"):
        last_of(backend)


def test_an_endpoint_that_is_away_is_said_before_and_when_asked(server):
    away = RemoteBackend(f"http://127.0.0.1:{free_port()}", NAMES)
    assert "is away; start it, or check MODEL_ENDPOINT" in away.check()
    with pytest.raises(RuntimeError, match="is away"):
        last_of(away)
    assert remote(server).check() == ""
    assert "503" in remote(server, "ill").check()


def test_offline_mode_is_named(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="HF_HUB_OFFLINE=1"):
        last_of(remote(server))


TALKER = """
import http.server, json, sys, time
class Talker(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        delta = {"index": 0, "delta": {"content": "word "}, "finish_reason": None}
        chunk = {"id": "", "created": 0, "model": "", "system_fingerprint": ""}
        line = "data: " + json.dumps(chunk | {"choices": [delta]}) + chr(10) * 2
        while True:
            self.wfile.write(line.encode())
            time.sleep(0.02)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Talker).serve_forever()
"""


def test_a_server_killed_in_mid_answer_ends_the_answer():
    """One that never stops talking; the slow test below kills `transformers serve`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with process([sys.executable, "-c", TALKER, str(port)], url) as dying:
        backend = RemoteBackend(url, NAMES)
        stream = backend.stream("base", MESSAGES, Sampling(500))
        next(so_far for so_far in stream if so_far.text)
        dying.send_signal(signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(RuntimeError, match="connection to the endpoint broke"):
            list(stream)
        assert time.monotonic() - begun < 10
        # At first over a connection that was kept open, then over a new one.
        with pytest.raises(RuntimeError, match="is away|see whether it still runs"):
            last_of(backend)
        with pytest.raises(RuntimeError, match="is away"):
            last_of(backend)


@contextmanager
def app_with(sources, settings):
    app = build_chat(settings, sources, limit=RequestLimit(PLENTY))
    _, url, _ = app.launch(
        prevent_thread_lock=True, quiet=True, inbrowser=False, **launch_options()
    )
    yield Client(url, verbose=False)
    app.close(verbose=False)


def test_the_app_offers_the_local_model_when_the_endpoint_is_away(folders, local):
    away = RemoteBackend(f"http://127.0.0.1:{free_port()}", NAMES)
    settings = settings_of(*folders)
    asked = (QUESTION, "base")
    with app_with({"endpoint": away, "local": local}, settings) as visitor:
        controls = (SYSTEM, CAP, 0, 0.95, 1)
        message, figures = visitor.predict(
            *asked, "endpoint", *controls, api_name="/chat"
        )
        assert "is away" in figures
        assert "under Settings you can let this machine answer" in figures
        message, figures = visitor.predict(*asked, "local", *controls, api_name="/chat")
        assert message["content"][0]["text"] == last_of(local, "base").text


def test_a_visitor_who_logged_in_is_asked_for_with_their_token(
    server, folders, state, monkeypatch
):
    locked = remote(server, "locked", token="hf_ofTheApp")
    with app_with({"endpoint": locked}, settings_of(*folders)) as visitor:
        asked = (QUESTION, "base", "endpoint", SYSTEM, 16, 0, 0.95, 1)
        _, figures = visitor.predict(*asked, api_name="/chat")
        assert "does not accept the token (401)" in figures
        session = {"access_token": TOKEN, "scope": "", "expires_at": 0, "userinfo": {}}
        monkeypatch.setattr(
            "gradio.oauth._get_valid_oauth_info_from_session", lambda _: session
        )
        message, figures = visitor.predict(*asked, api_name="/chat")
        assert message["content"][0]["text"] and TOKEN not in str(message) + figures
    assert state()["authorizations"][-1] == f"Bearer {TOKEN}"


def test_three_columns_come_from_the_endpoint_at_once(server, folders, local, state):
    settings = settings_of(*folders)
    with app_with({"endpoint": remote(server, "slow")}, settings) as visitor:
        begun = time.monotonic()
        *texts, _, _, _, _ = visitor.predict(
            QUESTION, "endpoint", SYSTEM, 16, 0, 0.95, 1, api_name="/compare"
        )
        assert texts == [last_of(local, key, 16).text for key in MODELS]
        # Each waits 1.5 s before it speaks; one after the other that were 4.5 s.
        assert time.monotonic() - begun < 4.5
    assert len(state()["asked"]) >= 3


# --- transformers serve, with the pocket models merged ---


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Three whole pocket models in folders, which is what that server can load."""
    folder = tmp_path_factory.mktemp("merged")
    settings = load_settings({"PROFILE": "pocket", "RUN_DIR": str(folder / "run")})
    for key in MODELS:
        model, tokenizer = load_three_models(settings, verbose=False)
        if key == "base":
            whole = model.unload()
        else:
            with use_model(model, key):
                whole = model.merge_and_unload(adapter_names=[key])
        whole.save_pretrained(folder / key)
        tokenizer.save_pretrained(folder / key)
    return folder, settings


def gatekeeper(target: str) -> fastapi.FastAPI:
    """A proxy that lets only `TOKEN` through."""
    app = fastapi.FastAPI()

    @app.post("/v1/chat/completions")
    async def pass_on(request: fastapi.Request):
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({"error": "unauthorized"}, status_code=401)
        body = await request.body()
        client = httpx.AsyncClient(timeout=120)
        sent = client.build_request(
            "POST", f"{target}{request.url.path}", json=json.loads(body)
        )
        reply = await client.send(sent, stream=True)
        return StreamingResponse(reply.aiter_raw(), media_type="text/event-stream")

    return app


@contextmanager
def in_thread(app):
    port = free_port()
    running = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error")
    )
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(10)


@pytest.mark.slow
def test_transformers_serve_answers_as_the_pocket_models_do(merged):
    folder, settings = merged
    pytest.importorskip("openai", reason="transformers serve needs it")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "float32"]
    names = {key: str(folder / key) for key in MODELS}
    messages = prompts.first_aid_messages("What should I do about a burn?")
    local = LocalBackend(settings)
    with process(command, f"{url}/health", HF_HUB_OFFLINE="1") as started:
        backend = RemoteBackend(url, names)
        for key in MODELS:
            *_, said = backend.stream(key, messages, Sampling(24))
            assert said.text and said.tokens
            *_, wanted = local.stream(key, messages, Sampling(24))
            assert said.text == wanted.text

        with in_thread(gatekeeper(url)) as gate:
            *_, said = RemoteBackend(gate, names, token=TOKEN).stream(
                "base", messages, Sampling(8)
            )
            assert said.text
            with pytest.raises(RuntimeError, match=r"not accept the token \(401\)"):
                list(
                    RemoteBackend(gate, names, token="hf_no").stream(
                        "base", messages, Sampling(8)
                    )
                )

        stream = backend.stream("base", messages, Sampling(2000))
        next(so_far for so_far in stream if so_far.text)
        stream.close()
        *_, said = backend.stream("base", messages, Sampling(8))
        assert said.text  # the server is free again

        stream = backend.stream("finetome", messages, Sampling(2000, temperature=1.5))
        next(so_far for so_far in stream if so_far.text)
        started.kill()
        with pytest.raises(RuntimeError, match="broke|is away"):
            list(stream)


if __name__ == "__main__":
    base, run, port = sys.argv[1:]
    uvicorn.run(
        serve(settings_of(base, run)),
        host="127.0.0.1",
        port=int(port),
        log_level="error",
    )
