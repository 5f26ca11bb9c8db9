"""What `app.py` runs, on a Space and elsewhere: which models, from where, and says so.

Without anything named in the environment that is the run's own adapters or those that
the project ships. Adapters made elsewhere are fetched as safetensors only.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import gradio as gr

from utils.adapters import ADAPTERS, has_adapters, with_adapters
from utils.chat import build_chat
from utils.config import (
    ChatSettings,
    Settings,
    load_chat_settings,
    load_settings,
)
from utils.exported import find_export
from utils.feedback import Feedback
from utils.openvino_engine import EngineUnavailable, OpenVinoBackend
from utils.protocol import Backend
from utils.remote import RemoteBackend


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
        backend, note = local_backend(settings, chat)
        about = f"Here runs `{here}`, on {backend.about}.{note}"
        return Cast(settings, {"local": backend}, about)
    names = {"base": base, **{key: key for key in ADAPTERS}, **chat.model_names}
    remote = RemoteBackend(chat.endpoint, names, token=chat.token)
    sources: dict[str, Backend] = {"endpoint": remote}
    about = f"Answers come from {remote.about}."
    if away := remote.check():
        about = f"⚠ {away[0].upper()}{away[1:]}."
    if has_adapters(settings):
        sources["local"], note = local_backend(settings, chat, load=False)
        about += (
            " Under *Settings of both tabs* you can let this machine answer instead "
            f"(`{here}`).{note}"
        )
    else:
        about += " There is no model on this machine to answer instead."
    return Cast(settings, sources, about)


def local_backend(
    settings: Settings, chat: ChatSettings, *, load: bool = True
) -> tuple[Backend, str]:
    """What answers on this machine, and a sentence if it is not what was asked for.

    OpenVINO where `CHAT_ENGINE` asks for it, and for a 1 B on a machine without a GPU
    when there is an export of its base; Transformers everywhere else.

    Args:
        settings: of the run.
        chat: which engine, and an export by name.
        load: let Transformers load now; OpenVINO always does, to fail in time.

    Raises:
        OSError, ValueError: as `LocalBackend`, when neither can answer.
    """
    wanted, note = _wants_openvino(settings, chat), ""
    if wanted:
        try:
            if export := find_export(settings, chat.engine_model):
                return OpenVinoBackend(settings, export), ""
            why = f"There is no export of {settings.base_model}: `make export` makes it"
            if chat.engine:
                note = f" ⚠ {why}. Transformers answers instead."
            else:
                note = f" {why}, and OpenVINO would answer several times as fast."
        except (EngineUnavailable, OSError, ValueError) as error:
            note = f" ⚠ {error} Transformers answers instead."
        print(note.strip())
    from utils.backends import LocalBackend  # with Transformers, slow to import

    return LocalBackend(settings, load=load), note


def _wants_openvino(settings: Settings, chat: ChatSettings) -> bool:
    if chat.engine or settings.profile != "llama_1b":
        return chat.engine == "openvino"
    import torch  # slow to import, and only needed to look for a GPU

    return not torch.cuda.is_available()
