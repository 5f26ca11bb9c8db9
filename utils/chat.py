"""The Gradio app with the three models, for notebook 06, `app.py` and `make chat`."""

from collections.abc import Iterator, Sequence

import gradio as gr

from utils.backends import LocalBackend, Sampling
from utils.config import MODELS, REPORT_QUESTIONS, SAFETY_NOTICE, Settings
from utils.prompts import SYSTEM_PROMPTS

MAX_CHARACTERS = 4000
MAX_TURNS = 12
CSS = (
    "".join(
        f".model-{key} {{ border-left: 6px solid {look.colour}; padding-left: .6em }}"
        for key, look in MODELS.items()
    )
    + ".notice { border: 2px solid #D55E00; border-radius: 6px; padding: .3em .8em }"
    + ".notice .notice { border: none; padding: 0 }"  # Gradio sets the class twice
)


def build_chat(
    settings: Settings,
    backend: LocalBackend | None = None,
    examples: Sequence[str] = REPORT_QUESTIONS,
) -> gr.Blocks:
    """The chat as a Gradio app that is ready to launch.

    Args:
        settings: of the run whose adapters answer.
        backend: what answers; loads the three models here if None.
        examples: questions to click on; nothing is generated for them beforehand.
    """
    backend = backend or LocalBackend(settings)

    def answer(
        message: str,
        history: list[dict],
        model: str,
        system_prompt: str,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
    ) -> Iterator[tuple[str, str]]:
        if problem := _problem(message):  # the page asks before, a program may not
            raise gr.Error(problem, print_exception=False)
        system_prompt = (system_prompt or "")[:MAX_CHARACTERS]
        messages = [{"role": "system", "content": system_prompt}]
        messages += [
            {"role": turn["role"], "content": _plain(turn["content"])}
            for turn in history[-2 * MAX_TURNS :]
        ]
        messages.append({"role": "user", "content": message})
        sampling = Sampling(
            max_new_tokens=min(int(max_new_tokens), settings.max_new_tokens),
            temperature=float(temperature),
            top_p=float(top_p),
            # An emptied field, a negative or a huge number: any of them is a seed.
            seed=settings.seed if seed is None else int(seed) % 2**32,
        )
        text = ""
        try:
            for so_far in backend.stream(model, messages, sampling):
                text = so_far.text
                rate = so_far.tokens / max(so_far.seconds, 1e-9)
                figures = (
                    f"<div class='model-{model}'>{MODELS[model].label} · "
                    f"{so_far.tokens} tokens · first after "
                    f"{so_far.first_token_s:.2f} s · {rate:.0f} tokens/s</div>"
                )
                yield text, figures
        except RuntimeError as error:
            yield f"{text}\n\n⚠ {error}. Please ask again.".strip(), ""

    with gr.Blocks(title="Three small Llamas, one base") as app:
        gr.Markdown("# Ask the base, the FineTome and the FirstAidQA model")
        gr.Markdown(f"**{SAFETY_NOTICE}**", elem_classes="notice")
        if settings.profile == "pocket":
            gr.Markdown(
                "This is the **pocket** profile: a model of 5 million parameters that "
                "shows how the project works. It is not Llama 3.2 1B, and it is "
                "often wrong."
            )
        figures = gr.HTML(label="Figures of the last answer", render=False)
        model = gr.Radio(
            [(f"{look.label}: {look.about}", key) for key, look in MODELS.items()],
            value="first_aid",
            label="Model",
            render=False,
        )
        controls = [
            gr.Textbox(
                SYSTEM_PROMPTS["first_aid"],
                label="System prompt",
                lines=2,
                render=False,
            ),
            gr.Slider(
                16,
                settings.max_new_tokens,
                settings.max_new_tokens,
                step=16,
                label="Longest answer (tokens)",
                render=False,
            ),
            gr.Slider(
                0,
                1.5,
                0,
                step=0.1,
                label="Temperature (0: always the same)",
                render=False,
            ),
            gr.Slider(0.1, 1, 0.95, step=0.05, label="Top-p", render=False),
            gr.Number(settings.seed, label="Seed", precision=0, render=False),
        ]
        model.render()
        gr.ChatInterface(
            answer,
            chatbot=gr.Chatbot(label="Conversation", height=420, allow_tags=False),
            textbox=gr.Textbox(
                label="Your question",
                placeholder="Ask about first aid …",
                submit_btn=True,
                stop_btn=True,
                autofocus=True,
            ),
            additional_inputs=[model, *controls],
            additional_outputs=[figures],
            examples=[[question] for question in examples],
            cache_examples=False,
            editable=True,
            # Once `answer` has raised an error, the page lets nobody ask again.
            validator=_check,
            api_name="chat",
        )
        figures.render()
    return app


def _problem(message: str | None) -> str:
    """Why `message` cannot be asked; empty if it can."""
    if not (message or "").strip():
        return "Please type a question first."
    if len(message) > MAX_CHARACTERS:
        return (
            f"The question has {len(message):,} characters; at most "
            f"{MAX_CHARACTERS:,} are read. Please shorten it."
        )
    return ""


def _check(message: str | None) -> dict:
    """The same, as Gradio's form validation wants it."""
    problem = _problem(message)
    return gr.validate(not problem, problem)


def _plain(content: str | list) -> str:
    """A message's text; Gradio 6 may hand it over as a list of typed parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))
