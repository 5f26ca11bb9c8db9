"""Votes are data: one JSON line each, kept in the run's folder or synced to the Hub.

Every process writes a file of its own and only ever appends to it, a line at a time:
that is what `huggingface_hub.CommitScheduler` expects, and a Space that starts anew
does not write over what it had sent before.
"""

import json
import os
import re
import tomllib
import uuid
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock

from huggingface_hub import CommitScheduler

from utils import results
from utils.config import ROOT, display_path
from utils.remote import HTTP_ERRORS

EVERY_MINUTES = 5
SECRET = re.compile(r"\b(?:hf|sk|gh[pousr])[_-][A-Za-z0-9_-]{8,}")


def app_version() -> str:
    """The project's version, as pyproject.toml says."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    return tomllib.loads(text)["project"]["version"]


@dataclass(frozen=True)
class Vote:
    """What a visitor thinks of an answer; `kind` is `answer` or `best_of_three`.

    In a comparison where none is good, `liked` is false and `model` empty.
    """

    model: str
    liked: bool
    comment: str
    question: str
    answer: str
    settings: Mapping = field(default_factory=dict)
    kind: str = "answer"


class Feedback:
    """Appends votes; `where` says in a sentence where they go."""

    def __init__(self, folder: Path, *, repo: str = "", token: str | None = None):
        """Nothing is written before the first vote.

        Args:
            folder: where the lines are kept.
            repo: a Hub data set to sync them to; made private if it is not there.
            token: one that may write there.
        """
        self.folder = Path(folder)
        self.path = self.folder / f"votes_{uuid.uuid4().hex[:12]}.jsonl"
        self.scheduler: CommitScheduler | None = None
        self._lock = Lock()
        here = f"Votes are kept in {display_path(self.folder)}"
        self.where = f"{here}, on the machine that runs this app."
        if repo and not token:
            self.where = f"{here} only: FEEDBACK_REPO is set, but HF_TOKEN is not."
        elif repo:
            try:
                self.scheduler = CommitScheduler(
                    repo_id=repo,
                    repo_type="dataset",
                    folder_path=self.folder,
                    every=EVERY_MINUTES,
                    private=True,
                    token=token,
                    allow_patterns="votes_*.jsonl",
                )
                self.where = (
                    f"{here} and synced to the Hub data set {repo} every "
                    f"{EVERY_MINUTES} minutes."
                )
            except (*HTTP_ERRORS, OSError) as error:
                self.where = (
                    f"{here} only: the Hub data set {repo} cannot be written to "
                    f"({type(error).__name__})."
                )

    def save(self, vote: Vote) -> None:
        """Append one line.

        Raises:
            OSError: it could not be written.
        """
        row = {"time": results.now(), **asdict(vote), "app_version": app_version()}
        line = json.dumps(_without_secrets(row), ensure_ascii=False) + "\n"
        data = line.encode("utf-8", "replace")
        with self._lock, self.scheduler.lock if self.scheduler else nullcontext():
            self.folder.mkdir(parents=True, exist_ok=True)
            # One write of the whole line: who is killed before it leaves no half one.
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                if os.write(file, data) != len(data):
                    raise OSError(f"{display_path(self.path)}: is the disk full?")
            finally:
                os.close(file)


def read_votes(folder: Path) -> list[dict]:
    """All votes in `folder`, oldest first; a line without an end is left out.

    Raises:
        ValueError: a whole line is no JSON; the message names file and line.
    """
    votes = []
    for path in sorted(Path(folder).glob("votes_*.jsonl")):
        # What follows the last line break was not finished when the process was killed.
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                votes.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from error
    return sorted(votes, key=lambda vote: vote["time"])


def _without_secrets(value):
    """`value` with everything that looks like an access token taken out."""
    if isinstance(value, str):
        return SECRET.sub("[token removed]", value)
    if isinstance(value, Mapping):
        return {key: _without_secrets(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(part) for part in value]
    return value
