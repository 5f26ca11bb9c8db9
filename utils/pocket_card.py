"""The pocket Llama's card, rendered from what its making, its trials and a reader said.

Beside the weights stand `making.json` (what made them), `trials.json` (what else was
tried) and `judged.jsonl` (answers before and after tuning, each judged by a reader).
The last two are there for the committed model only.
"""

import html
from pathlib import Path

from utils.config import SAFETY_NOTICE
from utils.results import read_json, read_lines

MAKING = "making.json"
TRIALS = "trials.json"
JUDGED = "judged.jsonl"


def write_card(folder: Path) -> Path:
    """Render `README.md` in the model's `folder` from the records beside it.

    Raises:
        FileNotFoundError: there is no record of the making.
    """
    if not (folder / MAKING).is_file():
        raise FileNotFoundError(f"{folder.name} holds no {MAKING}: nothing to render")
    parts = [_head(read_json(folder / MAKING))]
    if (folder / TRIALS).is_file():
        parts.append(_trials(read_json(folder / TRIALS)))
    if (folder / JUDGED).is_file():
        parts.append(_judged(read_lines(folder / JUDGED)))
    path = folder / "README.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _head(record: dict) -> str:
    recipe, log = record["recipe"], record["pretraining"]
    curve = "\n".join(
        f"| {row['step']:,} | {row['tokens'] / 1e6:.2f} M | {row['loss']:.3f} | "
        f"{row['s'] / 60:.1f} min |"
        for row in (log[round(i * (len(log) - 1) / 7)] for i in range(8))
    )
    tuning = record["chat_tuning"][-1]
    before, after = record["held_out_before_chat_tuning"], record["held_out"]
    habits = record["habits"]
    against = ""
    if ngram := record.get("ngram"):
        against = (
            f" A {ngram['order']}-gram model with Witten-Bell smoothing, which has "
            f"counted {ngram['training_tokens']:,} tokens of the same text, reaches "
            f"{ngram['perplexity']:.1f} on the same answers."
        )
    return f"""---
license: mit
language: en
library_name: transformers
---

# Pocket Llama

A Llama of {record["parameters"] / 1e6:.2f} M parameters that stands in for Llama 3.2 1B
wherever there is no GPU: on laptops, in CI, in a first look. It knows some everyday
things and plain English. It is no source of facts, and no medical advice.

`python -m utils.pocket` made it from `data/pocket_text`, text written for this project
(CC0) that names injuries, illnesses and the people who treat them but gives no first-aid
instructions, and from nothing else.

| choice | value | why |
|---|---|---|
| architecture | Llama: RMSNorm, SwiGLU, rotary positions, tied embeddings | the code path of the 1 B, unchanged |
| size | {recipe["layers"]} layers of {recipe["hidden"]}, feed-forward {recipe["feed_forward"]} | multiples of 64, as 4-bit layers need; bfloat16 on disk stays under 12 MB; see the trials |
| attention | {recipe["heads"]} heads, {recipe["key_value_heads"]} key-value heads | grouped queries, as in Llama 3.2 |
| vocabulary | {recipe["vocabulary"]:,}, byte-level BPE | common words whole, and tied embeddings of {recipe["vocabulary"] * recipe["hidden"] / 1e6:.1f} M |
| rows | one text a row, {recipe["tokens_per_step"]:,} tokens a step | texts that share a row see each other, which slowed learning |
| optimizer | Muon at {recipe["matrix_rate"]:g} for the layers' matrices, AdamW at {recipe["learning_rate"]:g} for the rest; cosine | learns more per token than AdamW alone; see the trials |
| chat tuning | {recipe["tuning_steps"]} steps at {recipe["tuning_share"]:g} of the rates | loss on answers only |

Pre-training, loss on every token (smoothed):

| step | tokens seen | loss | time |
|---|---|---|---|
{curve}

Chat tuning ends at a loss of {tuning["loss"]:.3f} on answers.

## How it speaks

Perplexity of the answers in {after["rows"]} held-out chats of the same domains
({after["tokens"]:,} tokens): {before["perplexity"]:.2f} before the chat tuning,
{after["perplexity"]:.2f} after it ({after["bits_per_byte"]:.3f} bits per byte).{against}

Asked {habits["prompts"]} held-out questions (greedy, at most {habits["cap"]} tokens), it
ends {habits["ended"]:.1%} of its answers by itself; {habits["repeats"]:.1%} repeat some
four words three times; {habits["different"]:.1%} differ from all others; they have
{habits["words"]:.0f} words on average.

Seed {recipe["seed"]}, {record["hardware"]}, made {record["when"][:10]}. All figures are in
`{MAKING}`. `adapters/` holds the two LoRA adapters of a finished walk of the pocket
profile; each says in `adapter_info.json` what made it.
"""


def _trials(trials: list[dict]) -> str:
    parts = ["## What was tried"]
    for trial in trials:
        columns = trial["columns"]
        lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(map(str, row))} |" for row in trial["rows"]]
        parts += [trial["about"], "\n".join(lines), trial["conclusion"]]
    return "\n\n".join(parts) + "\n"


def _judged(rows: list[dict]) -> str:
    def quoted(text: str) -> str:
        return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")

    table = "\n".join(
        f"| {number} | {quoted(row['question'])} | {quoted(row['base'])} | "
        f"{quoted(row['tuned'])} | {quoted(row['judgement'])} |"
        for number, row in enumerate(rows, start=1)
    )
    return f"""## {len(rows)} answers, before and after tuning

The first {len(rows)} test questions of `data/samples/first_aid.jsonl`, none left out:
greedy answers of the base and of the shipped first-aid adapter, and a reader's sentence
on the latter. {SAFETY_NOTICE}

| | question | base | tuned | judgement of the tuned answer |
|---|---|---|---|---|
{table}
"""
