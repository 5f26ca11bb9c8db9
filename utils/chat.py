"""The Gradio app with the three models, for notebook 06, `app.py` and `make chat`."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import gradio as gr

from utils.chat_compare import add_compare
from utils.chat_export import export
from utils.chat_limits import MAX_CHARACTERS, MAX_TURNS, RequestLimit, problem
from utils.chat_look import (
    DOWNLOAD,
    figures_html,
    launch_options,
    model_choices,
    notice,
    text_only,
)
from utils.chat_talk import Controls, Talk, earlier_turns, remember
from utils.chat_votes import Votes, add_votes
from utils.config import REPORT_QUESTIONS, Settings
from utils.feedback import Feedback
from utils.prompts import SYSTEM_PROMPTS
from utils.protocol import Backend

__all__ = ["build_chat", "launch_options"]


def build_chat(
    settings: Settings,
    backend: Backend | Mapping[str, Backend] | None = None,
    examples: Sequence[str] = REPORT_QUESTIONS,
    *,
    feedback: Feedback | None = None,
    limit: RequestLimit | None = None,
    at_once: int | None = None,
    login: bool = False,
    about: str = "",
) -> gr.Blocks:
    """The chat as a Gradio app that is ready for `launch(**launch_options())`.

    Args:
        settings: of the run whose adapters answer.
        backend: what answers, or several by name, the first one unless the visitor
            chooses; loads the three models here if None.
        examples: questions to click on; nothing is generated for them beforehand.
        feedback: where votes go; into the run's folder if None.
        limit: how often a visitor may ask.
        at_once: how many may be answered at a time; what the back ends can if None.
        login: show a button to log in, on a Space only.
        about: a sentence on what runs here.
    """
    if backend is None:
        from utils.backends import LocalBackend  # with Transformers, slow to import

        backend = LocalBackend(settings)
    sources = backend if isinstance(backend, Mapping) else {"local": backend}
    talk = Talk(settings, sources, limit or RequestLimit())
    votes = Votes(feedback or Feedback(settings.run_dir / "feedback"))
    at_once = at_once or max(source.at_once for source in sources.values())
    with gr.Blocks(
        title="Three small Llamas, one base",
        analytics_enabled=False,
    ) as app:
        notice()
        gr.Markdown("# Ask the base, the FineTome and the FirstAidQA model")
        gr.Markdown(" ".join(filter(None, (about, _what_runs(settings)))))
        if login:
            gr.LoginButton()
        with gr.Accordion("Settings of both tabs", open=False):
            controls = _controls(talk)
            gr.Markdown(
                f"A question may have {MAX_CHARACTERS:,} characters; of a conversation "
                f"the last {MAX_TURNS} turns are read."
            )
        with gr.Tab("Chat"):
            _add_chat(talk, votes, controls, examples, at_once)
        with gr.Tab("Compare"):
            add_compare(talk, votes, controls, examples, at_once)
        gr.Markdown(
            f"{votes.feedback.where} A vote holds the question, the answer, your "
            "comment and the settings, and neither your name nor your address."
        )
    return app


def _what_runs(settings: Settings) -> str:
    if settings.profile != "pocket":
        return ""
    return (
        "This is the **pocket** profile: a model of some 4 million parameters that "
        "shows how the project works. It is not Llama 3.2 1B, and it is often wrong."
    )


def _controls(talk: Talk) -> list:
    """What both tabs hand over with a question."""
    settings = talk.settings
    names = [(source.about, key) for key, source in talk.sources.items()]
    return [
        gr.Radio(
            names,
            value=names[0][1],
            label="Answered by",
            visible=len(names) > 1,
        ),
        gr.Textbox(
            SYSTEM_PROMPTS["first_aid"],
            label="System prompt",
            lines=2,
            max_length=MAX_CHARACTERS,
        ),
        gr.Slider(
            16,
            settings.max_new_tokens,
            settings.max_new_tokens,
            step=16,
            label="Longest answer (tokens)",
        ),
        gr.Slider(
            0,
            1.5,
            0,
            step=0.1,
            label="Temperature (0: always the same)",
        ),
        gr.Slider(0.1, 1, 0.95, step=0.05, label="Top-p"),
        gr.Number(settings.seed, label="Seed", precision=0),
    ]


def _add_chat(
    talk: Talk,
    votes: Votes,
    controls: list,
    examples: Sequence[str],
    at_once: int,
) -> None:
    """The tab with one model and a conversation."""
    answers = gr.State({})
    last = gr.HTML(elem_classes="figures", render=False)
    model = gr.Radio(model_choices(), value="first_aid", label="Model")

    def answer(
        message: str,
        history: list[dict],
        request: gr.Request,
        token: gr.OAuthToken | None,
        known: dict,
        key: str,
        source: str | None,
        system_prompt: str | None,
        max_new_tokens: float | None,
        temperature: float | None,
        top_p: float | None,
        seed: float | None,
    ) -> Iterator[tuple]:
        if refused := problem(message):  # the page asks before, a program may not
            raise gr.Error(refused, print_exception=False)
        if refused := talk.refuse(message, [key], request):
            # An error would leave the page's question box shut.
            yield _bubble("", f"⚠ {refused}", ""), "", known
            return
        chosen = Controls.read(
            talk.settings, system_prompt, max_new_tokens, temperature, top_p, seed
        )
        earlier = earlier_turns(history, known)
        secret = token.token if token else None
        for so_far in talk.answer(key, message, earlier, chosen, source, secret):
            bubble = _bubble(so_far.text, so_far.figures, so_far.id)
            yield bubble, figures_html(so_far), remember(known, so_far)

    chatbot = text_only(
        gr.Chatbot(
            label="Conversation",
            height=460,
            allow_tags=False,
            render_markdown=False,
            buttons=["copy", "copy_all"],
            feedback_options=("Like", "Dislike"),
        )
    )
    gr.ChatInterface(
        answer,
        chatbot=chatbot,
        textbox=gr.Textbox(
            label="Your question",
            placeholder="Ask about first aid …",
            submit_btn="Ask",
            stop_btn="Stop",
            autofocus=True,
        ),
        additional_inputs=[answers, model, *controls],
        additional_outputs=[last, answers],
        examples=[[question] for question in examples],
        cache_examples=False,
        editable=True,
        concurrency_limit=at_once,
        # Once `answer` has raised an error, the page lets nobody ask again.
        validator=_check,
        api_name="chat",
    )
    last.render()
    add_votes(votes, chatbot, answers)
    _add_export(chatbot, answers)


def _bubble(text: str, figures: str, answer_id: str) -> dict:
    """A message of two parts: what the model said, and the line under it."""
    parts = [{"type": "text", "text": part} for part in (text, figures) if part]
    return {"role": "assistant", "content": parts, "metadata": {"id": answer_id}}


def _add_export(chatbot: gr.Chatbot, answers: gr.State) -> None:
    """Buttons that save the conversation on the visitor's machine."""
    file = gr.Textbox(visible="hidden", label="Name of the export")
    text = gr.Textbox(visible="hidden", label="Text of the export")

    def write(kind: str, history: list[dict], known: dict) -> tuple[str, str]:
        try:
            return export(kind, history, known)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Row():
        for kind, label in (("markdown", "Markdown"), ("json", "JSON")):
            gr.Button(f"Export as {label}").click(
                partial(write, kind),
                [chatbot, answers],
                [file, text],
                api_name=f"export_{kind}",
            ).success(
                None, [file, text], [file, text], js=DOWNLOAD, api_visibility="private"
            )


def _check(message: str | None) -> dict:
    """The same, as Gradio's form validation wants it."""
    refused = problem(message)
    return gr.validate(not refused, refused)
