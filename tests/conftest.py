"""Stand-ins for the real things: a tiny Llama, a toy tokenizer, settings in a tmp dir.

Two fixtures point at real data where the environment names it: `REAL_FIRST_AID` (a
.json file) and `REAL_TOKENIZER` (a folder with Llama 3's tokenizer.json or .json.gz).
"""

import gzip
import os
from pathlib import Path

# A test that reaches for the Hub fails at once instead of waiting for a network; the
# libraries read this when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# OpenMP's threads spin while they wait for one another, so on cores that are shared
# with somebody else two are up to ten times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from utils.config import POCKET, load_settings
from utils.pocket import CHAT_TEMPLATE, SPECIAL

SENTENCES = (
    "You are a certified first aid assistant.",
    "You are a helpful assistant.",
    "Cool the burn under running water for twenty minutes and call 112.",
    "Press firmly on the wound with a clean cloth and do not lift it to look.",
    "What should I do when a child has a nosebleed? Lean forward and pinch the nose.",
    "Write a short poem about the sea. The waves come in, the waves go out again.",
)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A folder like a real model's: a random 2-layer Llama and a toy tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=384,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=SPECIAL.index("<|begin_of_text|>"),
            eos_token_id=[
                SPECIAL.index("<|end_of_text|>"),
                SPECIAL.index("<|eot_id|>"),
            ],
            pad_token_id=SPECIAL.index("<|finetune_right_pad_id|>"),
        )
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_folder):
    """The toy tokenizer, with the pocket Llama's chat template."""
    return PreTrainedTokenizerFast.from_pretrained(tiny_folder)


@pytest.fixture
def tiny_model(tiny_folder):
    """A fresh copy of the random Llama, in evaluation mode."""
    return LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture
def settings(tmp_path):
    """Makes settings out of environment variables; the run lands in `tmp_path`."""

    def make(**environ):
        defaults = {"PROFILE": "pocket", "RUN_DIR": str(tmp_path / "run")}
        return load_settings(defaults | {k: str(v) for k, v in environ.items()})

    return make


@pytest.fixture(scope="session")
def traced_pocket(tmp_path_factory):
    """The pocket Llama as OpenVINO reads it, in float32, traced once."""
    pytest.importorskip("openvino_genai", reason="requirements-openvino.txt")
    from traced import write

    folder = tmp_path_factory.mktemp("traced") / "pocket_llama-fp32"
    return write(POCKET, "data/pocket_llama", folder)


@pytest.fixture(scope="session")
def real_first_aid() -> Path:
    """The file of all FirstAidQA rows."""
    return _named("REAL_FIRST_AID", "FirstAidQA as a .json file")


@pytest.fixture(scope="session")
def real_tokenizer(tmp_path_factory):
    """Llama 3's tokenizer with the chat template of Llama 3.2."""
    source = _named("REAL_TOKENIZER", "a folder with Llama 3's tokenizer")
    folder = tmp_path_factory.mktemp("llama3_tokenizer")
    for file in source.glob("tokenizer*"):
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
        (folder / file.name.removesuffix(".gz")).write_bytes(content)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    template = Path(trl.__file__).parent / "chat_templates" / "llama3_2.jinja"
    tokenizer.chat_template = template.read_text("utf-8")
    tokenizer.padding_side = "left"
    return tokenizer


def _named(variable: str, what: str) -> Path:
    value = os.environ.get(variable, "").strip()
    if not value:
        pytest.skip(f"{variable} is not set: name {what} to run this test")
    path = Path(value).expanduser().resolve()
    if not path.exists():
        pytest.fail(f"{variable}={value}: there is no such path")
    return path
