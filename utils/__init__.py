"""What the notebooks share: rows in, figures and a chat out. Nothing runs at import."""
