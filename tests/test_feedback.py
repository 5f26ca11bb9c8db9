"""Votes: one line each, whole, from many at once, without secrets, synced or not."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import huggingface_hub.constants
import pytest
from gradio_client import Client
from test_backends import free_port, process
from test_models import lively, save_three

from utils import feedback
from utils.chat_limits import MAX_COMMENT
from utils.chat_talk import Answer
from utils.chat_votes import vote_on, vote_on_three
from utils.config import ROOT
from utils.feedback import Feedback, Vote, read_votes

VOTE = Vote("base", True, "ja, „gut“\n\u2028<b>", "question?", "answer.", {"seed": 1})


def test_a_vote_is_one_line_with_all_that_was_asked_for(tmp_path):
    votes = Feedback(tmp_path / "votes")
    assert not (tmp_path / "votes").exists()  # nothing before the first vote
    votes.save(VOTE)
    votes.save(VOTE)
    (file,) = (tmp_path / "votes").iterdir()
    lines = file.read_bytes().split(b"\n")
    assert len(lines) == 3 and lines[-1] == b""
    row = json.loads(lines[0])
    expected = {"model": "base", "liked": True, "comment": VOTE.comment}
    expected |= {"question": "question?", "answer": "answer.", "settings": {"seed": 1}}
    assert row.items() >= expected.items()
    assert set(row) == {*expected, "kind", "time", "app_version"}
    assert row["app_version"] == feedback.app_version()
    assert read_votes(tmp_path / "votes") == [row, row]


def test_two_processes_never_share_a_file(tmp_path):
    Feedback(tmp_path).save(VOTE)
    Feedback(tmp_path).save(VOTE)
    assert len(list(tmp_path.iterdir())) == 2
    assert len(read_votes(tmp_path)) == 2


@pytest.mark.parametrize(
    "secret", ["hf_abcdefghijklmnopqrst", "sk-abcdefghijkl12345", "ghp_abcdefgh1234"]
)
def test_no_token_is_kept(tmp_path, secret):
    vote = Vote("base", True, f"my token is {secret}.", secret, "a", {"x": [secret]})
    votes = Feedback(tmp_path)
    votes.save(vote)
    text = votes.path.read_text("utf-8")
    assert secret not in text and text.count("[token removed]") == 3


def test_a_comment_is_cut_and_cleaned():
    answer = Answer("base", "q", {}, text="a")
    vote = vote_on(answer, liked=False, comment="\x00" + "x" * 9999)
    assert vote.comment == "x" * MAX_COMMENT
    assert vote_on_three({"base": answer}, "none", None).model == ""


def test_a_line_cut_by_a_kill_is_left_out_and_a_broken_one_is_named(tmp_path):
    votes = Feedback(tmp_path)
    votes.save(VOTE)
    with votes.path.open("ab") as file:
        file.write('{"time": "2026", "comment": "äh'.encode()[:-1])
    assert len(read_votes(tmp_path)) == 1
    with votes.path.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(ValueError, match=r"votes_.*\.jsonl, line 2"):
        read_votes(tmp_path)


def test_it_says_where_votes_go(tmp_path):
    assert "on the machine that runs this app" in Feedback(tmp_path).where
    assert "HF_TOKEN is not" in Feedback(tmp_path, repo="a/b").where


def test_without_the_hub_votes_stay_here_and_the_app_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    votes = Feedback(tmp_path, repo="owner/votes", token="hf_x")
    assert votes.scheduler is None
    assert "cannot be written to (OfflineModeIsEnabled)" in votes.where
    assert "hf_x" not in votes.where
    votes.save(VOTE)
    assert len(read_votes(tmp_path)) == 1


def test_with_a_repository_and_a_token_the_folder_is_synced(tmp_path, monkeypatch):
    made = {}

    class Scheduler:
        def __init__(self, **options):
            made.update(options)
            self.lock = threading.Lock()

    monkeypatch.setattr(feedback, "CommitScheduler", Scheduler)
    votes = Feedback(tmp_path, repo="owner/votes", token="hf_x")
    assert made["repo_id"] == "owner/votes" and made["repo_type"] == "dataset"
    assert made["folder_path"] == tmp_path and made["private"] is True
    assert made["allow_patterns"] == "votes_*.jsonl" and made["token"] == "hf_x"
    assert "synced to the Hub data set owner/votes every 5 minutes" in votes.where
    saved = threading.Event()

    def save():
        votes.save(VOTE)
        saved.set()

    with votes.scheduler.lock:  # while it lists what to send, no line is added
        threading.Thread(target=save, daemon=True).start()
        assert not saved.wait(0.2)
    assert saved.wait(5)


def test_a_full_disk_is_an_error_and_no_silence(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda file, data: len(data) - 1)
    with pytest.raises(OSError, match="is the disk full"):
        Feedback(tmp_path).save(VOTE)


@pytest.mark.slow
def test_the_app_killed_while_twenty_visitors_vote(
    tmp_path, tiny_model, tiny_tokenizer
):
    """As above, through the page's address and with the whole app killed."""
    base, run = save_three(tmp_path, lively(tiny_model, tiny_tokenizer), tiny_tokenizer)
    port = free_port()
    environ = {"PROFILE": "pocket", "BASE_MODEL": str(base), "RUN_DIR": str(run)}
    environ |= {"GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    confirmed, lock = set(), threading.Lock()

    def vote(who):
        visitor = Client(f"http://127.0.0.1:{port}", verbose=False)
        asked = (f"Question {who}?", "local", "", 16, 0, 0.95, 1)
        visitor.predict(*asked, api_name="/compare")
        for n in range(100):
            try:
                visitor.predict("base", f"{who} {n}", api_name="/best")
            except Exception:  # noqa: BLE001 - killed: any way to fail will do
                return
            with lock:
                confirmed.add(f"{who} {n}")

    command = [sys.executable, "app.py"]
    with process(command, f"http://127.0.0.1:{port}/config", **environ) as app:
        voters = [threading.Thread(target=vote, args=(who,)) for who in range(20)]
        for voter in voters:
            voter.start()
        until = time.monotonic() + 300
        while len(confirmed) < 60 and time.monotonic() < until:
            time.sleep(0.02)
        app.send_signal(signal.SIGKILL)
        for voter in voters:
            voter.join(60)
    kept = [vote["comment"] for vote in read_votes(run / "feedback")]
    assert len(kept) == len(set(kept)) and len(confirmed) >= 60
    assert confirmed <= set(kept) and len(set(kept) - confirmed) <= 20


VOTERS = """
import os, sys, threading
from pathlib import Path
from utils.feedback import Feedback, Vote
votes = Feedback(Path(sys.argv[1]))
def vote(who):
    for n in range(10**6):
        votes.save(Vote("base", True, f"{who} {n}", "q" * 3000, "ä" * 3000))
        os.write(1, f"{who} {n}\\n".encode())  # this one must be there afterwards
for who in range(20):
    threading.Thread(target=vote, args=(who,)).start()
"""


def test_killed_while_twenty_vote_only_lines_in_flight_are_missing(tmp_path):
    log = tmp_path / "written.txt"
    with log.open("wb") as out:
        voters = subprocess.Popen(
            [sys.executable, "-c", VOTERS, str(tmp_path / "votes")],
            stdout=out,
            cwd=ROOT,
        )
        until = time.monotonic() + 60
        while log.stat().st_size < 6_000 and time.monotonic() < until:
            time.sleep(0.02)
        voters.send_signal(signal.SIGKILL)
        voters.wait()
    reported = {tuple(x.split()) for x in log.read_text().split("\n")[:-1]}
    assert len(reported) > 500
    kept = [tuple(v["comment"].split()) for v in read_votes(tmp_path / "votes")]
    assert len(kept) == len(set(kept))  # none twice
    assert reported <= set(kept)  # none that was confirmed is missing
    assert len(set(kept) - reported) <= 20  # at most one in flight per session
