"""The Space's entry, and `make chat`: build the chat, launch it."""

import sys

import gradio as gr

from utils.chat import CSS, build_chat
from utils.config import load_settings

if __name__ == "__main__":
    try:
        demo = build_chat(load_settings())
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"chat: {error}")
    demo.launch(share=False, css=CSS, theme=gr.themes.Soft())
