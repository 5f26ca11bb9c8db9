"""Makes the embedded base model, the pocket Llama, from the text in `data/pocket_text`.

    python -m utils.pocket

Three stages: a byte-level BPE tokenizer, pre-training on prose and chats with the loss
on every token, and a short chat tuning with the loss on answers only. Two CPU cores
are enough; the same seed on the same hardware gives the same weights.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from utils import prompts, results
from utils.config import POCKET, PROFILES, display_path, load_settings
from utils.grammar import TEXT, Grammar, is_held_out, load_grammars, texts
from utils.models import ADAPTER_INFO, ADAPTERS, adapter_dir
from utils.pocket_card import MAKING, write_card
from utils.pocket_evaluation import (
    encode,
    habits,
    held_out_perplexity,
    ngram_perplexity,
)

SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
# Llama 3's way to cut text before BPE: words with their blank, digits by threes.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Every size and rate; the reasons stand in the card that is written."""

    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    feed_forward: int = 640
    tokens_per_step: int = 2048
    steps: int = 5000
    learning_rate: float = 3e-3
    matrix_rate: float = 0.005
    tuning_steps: int = 250
    tuning_share: float = 0.05
    seed: int = 42


# --- the tokenizer ---------------------------------------------------------------


def train_tokenizer(
    grammars: Sequence[Grammar], recipe: Recipe
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Llama 3's special tokens and chat format."""
    stream = texts(grammars, recipe.seed)
    sample = []
    for _ in range(30_000):
        text = next(stream)
        if isinstance(text, str):
            sample.append(text)
        else:
            sample += [message["content"] for message in text]
    # Hand-written pieces once more, so that rare words count besides frequent forms.
    for grammar in grammars:
        sample += [t for t in grammar.domain["plain_prose"] if not is_held_out(t)] * 5
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


# --- training ----------------------------------------------------------------------


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    """A Llama of the recipe's size with random weights."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.feed_forward,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.key_value_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=0,
            eos_token_id=[1, 4],
            pad_token_id=5,
        )
    )


def _batches(
    tokenizer, stream: Iterator, recipe: Recipe, *, answers_only: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of some `tokens_per_step` tokens, each text a row of its own.

    Rows of a batch are of about the same length, so that hardly anything is padding;
    batches come in random order. Texts that share a row would see each other, which
    costs a model this small most of what it has to learn from a question.
    """
    rng = random.Random(recipe.seed)
    while True:
        rows = []
        while len(rows) < 1024:
            text = next(stream)
            if not (answers_only and isinstance(text, str)):
                rows.append(encode(tokenizer, text))
        rows.sort(key=lambda row: len(row["input_ids"]))
        batches, batch = [], []
        for row in rows:
            if (len(batch) + 1) * len(
                row["input_ids"]
            ) > recipe.tokens_per_step and batch:
                batches.append(batch)
                batch = []
            batch.append(row)
        rng.shuffle(batches)
        for batch in batches:
            longest = len(batch[-1]["input_ids"])
            ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
            labels = torch.full_like(ids, prompts.IGNORED)
            for n, row in enumerate(batch):
                size = len(row["input_ids"])
                ids[n, :size] = torch.tensor(row["input_ids"])
                # A chat's question counts in pre-training and not in the tuning.
                wanted = row["labels"] if answers_only else row["input_ids"]
                labels[n, :size] = torch.tensor(wanted)
            # Padding stands at the right and has no label: causal attention alone
            # keeps it out, so no mask is needed.
            yield ids, labels


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for everything else."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inside = parameter.dim() == 2 and "embed_tokens" not in name
        (matrices if inside else rest).append(parameter)
    muon = torch.optim.Muon(
        matrices,
        lr=recipe.matrix_rate,
        weight_decay=0.1,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.AdamW(
        rest, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    return [muon, adam]


def train(
    model: LlamaForCausalLM,
    tokenizer,
    grammars: Sequence[Grammar],
    recipe: Recipe,
    *,
    answers_only: bool,
) -> list[dict]:
    """Train `model` in place; returns the log, one row every twenty steps.

    Args:
        answers_only: the chat tuning: loss on answers, at the tuning rate.
    """
    steps = recipe.tuning_steps if answers_only else recipe.steps
    share = recipe.tuning_share if answers_only else 1.0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    # Written out, attention is faster than the fused kernel at eighty tokens a row.
    model.set_attn_implementation("eager")
    optimizers = _optimizers(model, recipe)
    peaks = [group["lr"] * share for o in optimizers for group in o.param_groups]
    stream = texts(grammars, recipe.seed + (1 if answers_only else 0))
    batches = _batches(tokenizer, stream, recipe, answers_only=answers_only)
    # bfloat16 products with float32 weights: three times as fast where the CPU has
    # the instructions, and slower only in the last digits.
    log, seen, smooth = [], 0, None
    began = time.perf_counter()
    label = "chat tuning" if answers_only else "pre-training"
    with tqdm(total=steps, desc=label, unit="step", mininterval=2) as bar:
        for step in range(1, steps + 1):
            warm = min(1.0, step / max(1, steps * 0.03))
            part = warm * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
            groups = [group for o in optimizers for group in o.param_groups]
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * part
            ids, labels = (t.to(device) for t in next(batches))
            with torch.autocast(device, torch.bfloat16):
                loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            seen += ids.numel()
            value = loss.item()
            smooth = value if smooth is None else 0.95 * smooth + 0.05 * value
            bar.update()
            bar.set_postfix(loss=f"{smooth:.3f}")
            if step % 20 == 0 or step == steps:
                seconds = round(time.perf_counter() - began, 1)
                log.append(
                    {
                        "step": step,
                        "loss": round(smooth, 4),
                        "tokens": seen,
                        "s": seconds,
                    }
                )
    model.eval()
    return log


def make(
    recipe: Recipe, out: Path, text_dir: Path = TEXT, ngram_tokens: int = 2_000_000
) -> dict:
    """Make tokenizer and model, measure them, and write all of it to `out`.

    Args:
        recipe: sizes, rates and the seed.
        out: folder to write to.
        text_dir: folder of domain files.
        ngram_tokens: of the training text, counted by the 5-gram model that the
            pocket Llama is held against; 0 leaves it out.

    Returns:
        What `making.json` holds.
    """
    grammars = load_grammars(text_dir)
    tokenizer = train_tokenizer(grammars, recipe)
    model = new_model(recipe)
    log = train(model, tokenizer, grammars, recipe, answers_only=False)
    before = held_out_perplexity(model, tokenizer, grammars)
    tuning = train(model, tokenizer, grammars, recipe, answers_only=True)
    model.generation_config.eos_token_id = [1, 4]
    model.generation_config.pad_token_id = 5
    # bfloat16 on disk halves the file; it is loaded back into float32, and measured
    # as it will be used.
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    model = model.float()
    cap = PROFILES["pocket"].max_new_tokens
    record = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "pretraining": log,
        "chat_tuning": tuning,
        "held_out_before_chat_tuning": before,
        "held_out": held_out_perplexity(model, tokenizer, grammars),
        "habits": habits(model, tokenizer, grammars, cap=cap),
        "hardware": results.hardware(),
        "when": results.now(),
    }
    if ngram_tokens:
        record["ngram"] = ngram_perplexity(
            tokenizer, grammars, texts(grammars, recipe.seed), ngram_tokens
        )
    results.write_json(out / MAKING, record)
    write_card(out)
    return record


def ship_adapters() -> list[Path]:
    """Copy the adapters and logs of the finished pocket run beside the base.

    Stored in float16, half the size; they are loaded back into float32.

    Raises:
        FileNotFoundError: the run has not finished.
    """
    settings = load_settings({"PROFILE": "pocket"})
    shipped = []
    for name in ADAPTERS:
        own = adapter_dir(settings, name)
        weights = own / "adapter_model.safetensors"
        if not weights.is_file():
            raise FileNotFoundError(f"{display_path(own)}: `make run` makes it")
        folder = POCKET / "adapters" / name
        folder.mkdir(parents=True, exist_ok=True)
        half = {key: tensor.half() for key, tensor in load_file(weights).items()}
        save_file(half, folder / weights.name, metadata={"format": "pt"})
        for file in ("adapter_config.json", ADAPTER_INFO):
            (folder / file).write_bytes((own / file).read_bytes())
        log = results.training_log(settings, name)
        (folder / results.ADAPTER_LOG).write_bytes(log.read_bytes())
        shipped.append(folder)
    return shipped


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the pocket Llama from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.pocket",
        description="Make the embedded base: tokenizer, pre-training, chat tuning.",
    )
    parser.add_argument("--out", type=Path, default=POCKET, help="folder to write to")
    parser.add_argument(
        "--text", type=Path, default=TEXT, help="folder of domain files"
    )
    parser.add_argument(
        "--ship-adapters",
        action="store_true",
        help="only copy the adapters of the finished pocket run beside the base",
    )
    for name, default in asdict(Recipe()).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(
            flag, type=type(default), default=default, help=f"({default})"
        )
    parser.add_argument(
        "--card", action="store_true", help="only render the card in --out anew"
    )
    parser.add_argument(
        "--ngram-tokens",
        type=int,
        default=2_000_000,
        help="tokens that the 5-gram model counts; 0: no such model (2000000)",
    )
    options = vars(parser.parse_args(arguments))
    out, text_dir = options.pop("out"), options.pop("text")
    ngram_tokens = options.pop("ngram_tokens")
    if options.pop("ship_adapters"):
        print("\n".join(map(display_path, ship_adapters())))
        return
    if options.pop("card"):
        print(display_path(write_card(out)))
        return
    record = make(Recipe(**options), out, text_dir, ngram_tokens)
    print(
        f"{record['parameters'] / 1e6:.2f} M parameters, held-out perplexity "
        f"{record['held_out']['perplexity']:.2f}, written to {display_path(out)}"
    )


if __name__ == "__main__":
    main()
