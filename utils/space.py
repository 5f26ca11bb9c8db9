"""What `app.py` runs, on a Space and elsewhere: which models, from where, and says so.

Without anything named in the environment that is the run's own adapters or those that
the project ships. Adapters made elsewhere are fetched as safetensors only.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import gradio as gr
from huggingface_hub import snapshot_download

from utils.backends import Backend, LocalBackend
from utils.chat import build_chat
from utils.config import (
    RUNS,
    ChatSettings,
    Settings,
    is_local,
    load_chat_settings,
    load_settings,
    resolve,
)
from utils.feedback import Feedback
from utils.adapters import ADAPTER_INFO, ADAPTERS, adapter_dir, find_adapter
from utils.remote import HTTP_ERRORS, RemoteBackend

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", ADAPTER_INFO)


@dataclass(frozen=True)
class Cast:
    """Who answers: settings, back ends by name, and a sentence on both."""

    settings: Settings
    sources: dict[str, Backend]
    about: str


def open_chat(environ: Mapping[str, str] = os.environ) -> gr.Blocks:
    """The chat as the environment wants it, ready to launch.

    Raises:
        ValueError: a variable holds something it cannot hold.
        OSError: a model or an adapter is not there.
        RuntimeError: Python is too old.
    """
    chat = load_chat_settings(environ)
    cast = choose_cast(chat, environ)
    folder = cast.settings.run_dir / "feedback"
    feedback = Feedback(folder, repo=chat.feedback_repo, token=chat.token)
    return build_chat(
        cast.settings,
        cast.sources,
        feedback=feedback,
        login=chat.login,
        about=cast.about,
    )


def choose_cast(chat: ChatSettings, environ: Mapping[str, str]) -> Cast:
    """Load what answers; raises as `open_chat`."""
    environ = dict(environ)
    if chat.adapters and not environ.get("PROFILE", "").strip():
        environ["PROFILE"] = "llama_1b"  # adapters made elsewhere are for the 1 B
    settings = load_settings(environ)
    if chat.adapters:
        settings = with_adapters(settings, chat.adapters)
    base = settings.base_model
    here = f"{base} with {'the adapters named' if chat.adapters else 'our adapters'}"
    if not chat.endpoint:
        return Cast(settings, {"local": LocalBackend(settings)}, f"Here runs `{here}`.")
    names = {"base": base, **{key: key for key in ADAPTERS}, **chat.model_names}
    remote = RemoteBackend(chat.endpoint, names, token=chat.token)
    sources: dict[str, Backend] = {"endpoint": remote}
    about = f"Answers come from {remote.about}."
    if away := remote.check():
        about = f"⚠ {away[0].upper()}{away[1:]}."
    if has_adapters(settings):
        sources["local"] = LocalBackend(settings, load=False)
        about += (
            " Under *Settings of both tabs* you can let this machine answer instead "
            f"(`{here}`)."
        )
    else:
        about += " There is no model on this machine to answer instead."
    return Cast(settings, sources, about)


def has_adapters(settings: Settings) -> bool:
    """Whether both adapters are here, the run's own or shipped ones."""
    try:
        for name in ADAPTERS:
            find_adapter(settings, name)
    except FileNotFoundError:
        return False
    return True


def with_adapters(
    settings: Settings, named: Mapping[str, str], runs: Path = RUNS
) -> Settings:
    """`settings` of a run folder of its own that holds the adapters `named`.

    Only the configuration and safetensors are taken; a `.bin` is never read.

    Raises:
        OSError: one is not there, or the Hub is out of reach.
        ValueError: one holds no safetensors.
    """
    mark = hashlib.sha256(repr(sorted(named.items())).encode()).hexdigest()[:10]
    settings = replace(settings, run_dir=runs / f"{settings.profile}-chat-{mark}")
    for name, source in named.items():
        target = adapter_dir(settings, name)
        target.mkdir(parents=True, exist_ok=True)
        folder = resolve(source) if is_local(source) else _fetch(name, source)
        for file in ADAPTER_FILES:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, target / file)
            elif file != ADAPTER_INFO:
                raise ValueError(
                    f"{name.upper()}_ADAPTER={source}: there is no {file} in it. "
                    "Name a folder or Hub repository with a LoRA adapter that PEFT "
                    "saved as safetensors; pickles (.bin) are refused."
                )
    return settings


def _fetch(name: str, source: str) -> Path:
    try:
        return Path(snapshot_download(source, allow_patterns=list(ADAPTER_FILES)))
    except (*HTTP_ERRORS, OSError, ValueError) as error:
        raise OSError(
            f"{name.upper()}_ADAPTER={source} cannot be fetched from the Hub "
            f"({type(error).__name__}). Check its spelling and the network; a private "
            "repository needs HF_TOKEN."
        ) from error
