"""How the chat looks: colours and markers of the figures, the notice, the labels."""

import html
import re

import gradio as gr

from utils.chat_limits import JOINER
from utils.chat_talk import Answer, name
from utils.config import MODELS, SAFETY_NOTICE

OPENS_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=#|\w+;)")
CSS = (
    "".join(
        f".model-{key} {{ border-left: 6px {'dashed' if key == 'base' else 'solid'} "
        f"{look.colour}; padding-left: .6em }} "
        f"label:has(input[type=radio][value={key}]) {{ border-left: 6px "
        f"{'dashed' if key == 'base' else 'solid'} {look.colour} }} "
        for key, look in MODELS.items()
    )
    # The page scrolls, not this box, or nothing in it could stay in view.
    + ".gradio-container { overflow: clip !important } "
    # Gradio sets an element's class on its wrapper too.
    ".notice { border: 2px solid #D55E00; border-radius: 6px; padding: .3em .8em;"
    "  position: sticky; top: 0; z-index: 50; background: var(--body-background-fill) }"
    ".notice .notice { border: none; padding: 0; position: static }"
    # Gradio's messages come from below, where they do not cover it.
    ".toast-wrap { top: auto !important; bottom: 1em !important }"
    ".figures { min-height: 1.6em }"
    ".column-head { min-height: 4.8em } .column-head b { font-size: 1.1em }"
    ".message { overflow-wrap: anywhere }"
    "@media (max-width: 600px) { .notice { font-size: .85em; padding: .2em .5em }"
    " .column-head { min-height: 0 } }"
)
# Saves what the app wrote as a file of the visitor's, without a file on the server.
DOWNLOAD = """(name, text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "text/plain"}));
  link.download = name;
  document.body.appendChild(link);
  link.click();
  link.remove();
  URL.revokeObjectURL(link.href);
  return [name, text];
}"""


def launch_options() -> dict:
    """What every `launch()` of the chat is given: looks, no sharing, no uploads."""
    return {
        "css": CSS,
        "theme": gr.themes.Soft(),
        "share": False,
        "max_file_size": 0,
        "ssr_mode": False,
    }


def notice() -> gr.HTML:
    """Whom to call; it stays in view while the page is scrolled."""
    return gr.HTML(f"<b>{html.escape(SAFETY_NOTICE)}</b>", elem_classes="notice")


def model_choices() -> list[tuple[str, str]]:
    """Each model with a line on what it is, for a `gr.Radio`."""
    return [(f"{name(key)}: {look.about}", key) for key, look in MODELS.items()]


def figures_html(answer: Answer, more: str = "") -> str:
    """An answer's figures, and a line that is `more`, with its model's colour."""
    lines = "<br>".join(html.escape(line) for line in (answer.figures, more) if line)
    return f"<div class='model-{answer.model}'>{lines}</div>"


def column_head(key: str) -> str:
    """A model's name and what it is, in its colour, over a column."""
    about = html.escape(MODELS[key].about)
    return (
        f"<div class='column-head'><div class='model-{key}'>"
        f"<b>{html.escape(name(key))}</b><br>{about}</div></div>"
    )


def text_only(chatbot: gr.Chatbot) -> gr.Chatbot:
    """Make `chatbot` show its messages as they were written, tags and all.

    With Markdown off Gradio still renders HTML in a message. An invisible word joiner
    after each `<` makes it text; it is taken out again of what comes back. (A subclass
    would do it too, but Gradio writes a .pyi file beside every subclass.)
    """
    show, read = chatbot.postprocess, chatbot.preprocess

    def postprocess(value):
        data = show(value)
        for part in (part for message in data.root for part in message.content):
            if getattr(part, "type", "") == "text":
                part.text = OPENS_MARKUP.sub(rf"\g<0>{JOINER}", part.text)
        return data

    def preprocess(payload):
        messages = read(payload)
        for part in (part for message in messages for part in message["content"]):
            if part.get("type") == "text":
                part["text"] = part["text"].replace(JOINER, "")
        return messages

    chatbot.postprocess, chatbot.preprocess = postprocess, preprocess
    return chatbot
