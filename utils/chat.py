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
        seed: int,
    ) -> Iterator[tuple[str, str]]:
        if not message.strip():
            raise gr.Error("Please type a question first.", print_exception=False)
        if len(message) > MAX_CHARACTERS:
            raise gr.Error(
                f"The question has {len(message):,} characters; at most "
                f"{MAX_CHARACTERS:,} are read. Please shorten it.",
                print_exception=False,
            )
        messages = [{"role": "system", "content": system_prompt[:MAX_CHARACTERS]}]
        messages += [
            {"role": turn["role"], "content": _plain(turn["content"])}
            for turn in history[-2 * MAX_TURNS :]
        ]
        messages.append({"role": "user", "content": message})
        sampling = Sampling(
            max_new_tokens=min(int(max_new_tokens), settings.max_new_tokens),
            temperature=float(temperature),
            top_p=float(top_p),
            seed=int(seed),
        )
        for so_far in backend.stream(model, messages, sampling):
            rate = so_far.tokens / max(so_far.seconds, 1e-9)
            figures = (
                f"<div class='model-{model}'>{MODELS[model].label} · {so_far.tokens} "
                f"tokens · first after {so_far.first_token_s:.2f} s · {rate:.0f} "
                "tokens/s</div>"
            )
            yield so_far.text, figures

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
                max_length=MAX_CHARACTERS,
            ),
            additional_inputs=[model, *controls],
            additional_outputs=[figures],
            examples=[[question] for question in examples],
            cache_examples=False,
            editable=True,
            api_name="chat",
        )
        figures.render()
    return app


def _plain(content: str | list) -> str:
    """A message's text; Gradio 6 may hand it over as a list of typed parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))
