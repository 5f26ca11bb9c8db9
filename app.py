"""The Space's entry, and `make chat`: build the chat, launch it."""

import sys

from utils.chat import launch_options
from utils.space import open_chat

if __name__ == "__main__":
    try:
        demo = open_chat()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"chat: {error}")
    demo.queue(max_size=64).launch(**launch_options())
