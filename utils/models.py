"""Tokenizer, base and adapters, and in which precision, with the reason.

One base is held in memory and two LoRA adapters on it: `base` is both adapters off,
`first_aid` and `finetome` is one of them on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from utils.adapters import (
    ADAPTER_INFO,
    ADAPTERS,
    AdapterSource,
    adapter_dir,
    find_adapter,
    read_adapter_info,
    weights_fingerprint,
)
from utils.config import MODELS, Settings, display_path, is_local, resolve

__all__ = [  # with what `utils.adapters` knows, for whoever loads models anyway
    "ADAPTERS",
    "ADAPTER_INFO",
    "AdapterSource",
    "Precision",
    "adapter_dir",
    "base_fingerprint",
    "choose_precision",
    "find_adapter",
    "load_base",
    "load_three_models",
    "load_tokenizer",
    "read_adapter_info",
    "use_model",
]


@dataclass(frozen=True)
class Precision:
    """A floating-point type and why it was chosen."""

    dtype: torch.dtype
    reason: str

    @property
    def trainer_flags(self) -> dict[str, bool]:
        """The arguments that make `SFTConfig` train in this precision."""
        return {
            "fp16": self.dtype == torch.float16,
            "bf16": self.dtype == torch.bfloat16,
            "use_cpu": self.dtype == torch.float32,
        }


def choose_precision(capability: tuple[int, int] | None = None) -> Precision:
    """float16 below compute capability 8.0, bfloat16 from 8.0, float32 on a CPU.

    `torch.cuda.is_bf16_supported()` is not asked: it says yes on a T4, where
    bfloat16 is emulated and slow.

    Args:
        capability: of the GPU; looked up if None. (0, 0) means there is none.
    """
    if capability is None:
        gpu = torch.cuda.is_available()
        capability = torch.cuda.get_device_capability() if gpu else (0, 0)
    if capability == (0, 0):
        return Precision(torch.float32, "no GPU: float32 is exact and quick enough")
    number = "{}.{}".format(*capability)
    if capability >= (8, 0):
        return Precision(
            torch.bfloat16, f"compute capability {number} ≥ 8.0 has bfloat16 units"
        )
    return Precision(
        torch.float16,
        f"compute capability {number} < 8.0 would only emulate bfloat16",
    )


def load_tokenizer(name: str):
    """The tokenizer of a Hub id or folder, padded on the left, with a pad token.

    Raises:
        ValueError: it has no chat template.
        OSError: it is not there, or the Hub is out of reach.
    """
    place = str(resolve(name)) if is_local(name) else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, HFValidationError, ValueError) as error:
        raise _not_there(name, error) from error
    if not tokenizer.chat_template:
        raise ValueError(
            f"{name}: this tokenizer has no chat template; use an Instruct one."
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        spare = "<|finetune_right_pad_id|>"
        known = spare in tokenizer.get_vocab()
        tokenizer.pad_token = spare if known else tokenizer.eos_token
    return tokenizer


def load_base(settings: Settings, precision: Precision | None = None):
    """The run's base model, on the GPU if there is one, in evaluation mode.

    With `load_in_4bit` its linear layers are quantised to NF4 by bitsandbytes
    (Dettmers et al. 2023, QLoRA).

    Raises:
        OSError: it is not there, or the Hub is out of reach.
    """
    name = settings.base_model
    place = str(resolve(name)) if is_local(name) else name
    precision = precision or choose_precision()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantised = {}
    if settings.load_in_4bit:
        quantised["device_map"] = {"": device}
        quantised["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=precision.dtype,
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            place, dtype=precision.dtype, use_safetensors=True, **quantised
        )
    except (OSError, HFValidationError, ValueError) as error:
        raise _not_there(name, error) from error
    if settings.load_in_4bit:
        for module in model.modules():
            # On CPUs with AVX512-BF16 a first evaluation repacks these weights, after
            # which gradients vanish without an error (bitsandbytes 0.50).
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model.eval()
    return model.to(device).eval()


def _not_there(name: str, error: Exception) -> OSError:
    first = str(error).strip().splitlines()[0][:160].rstrip(".")
    if is_local(name):
        advice = "Check that the folder holds config.json, tokenizer and safetensors"
    else:
        advice = (
            "Check the spelling and the network; a gated model needs HF_TOKEN and its "
            "licence accepted; or name a local folder in BASE_MODEL, or use "
            "PROFILE=pocket"
        )
    return OSError(f"model {name!r} cannot be loaded: {first}. {advice}.")


def base_fingerprint(settings: Settings, model) -> str:
    """What the base is by content: the Hub revision, or a hash of the weights' file.

    Args:
        settings: of the run.
        model: the loaded base; it knows the revision that the Hub gave.
    """
    if not is_local(settings.base_model):
        return str(getattr(model.config, "_commit_hash", None) or "unknown")
    return weights_fingerprint(resolve(settings.base_model))


def load_three_models(settings: Settings, *, verbose: bool = True):
    """One base and both adapters, as a `PeftModel`, and its tokenizer.

    Raises:
        FileNotFoundError: an adapter is missing.
        ValueError: an adapter belongs to another base, or is no safetensors file.
    """
    tokenizer = load_tokenizer(settings.base_model)
    base = load_base(settings)
    fingerprint = base_fingerprint(settings, base)
    model = None
    for name in ADAPTERS:
        found = find_adapter(settings, name)
        _check_fits(found.path, settings, fingerprint)
        if verbose:
            print(f"{MODELS[name].label} adapter: {found.origin}")
        if model is None:
            model = PeftModel.from_pretrained(base, found.path, adapter_name=name)
        else:
            model.load_adapter(found.path, adapter_name=name)
    return model.eval(), tokenizer


def _check_fits(path: Path, settings: Settings, fingerprint: str) -> None:
    if not (path / "adapter_model.safetensors").is_file():
        raise ValueError(f"{display_path(path)} holds no adapter_model.safetensors")
    info = read_adapter_info(path)
    made_on = info.get("base_fingerprint", fingerprint)
    if made_on != fingerprint:
        raise ValueError(
            f"{display_path(path)} was trained on another base "
            f"({info.get('base_model')}, fingerprint {made_on}; this one has "
            f"{fingerprint}). Train it again with notebooks 02 and 03."
        )


@contextmanager
def use_model(model: PeftModel, key: str) -> Iterator[PeftModel]:
    """Within the block `model` answers as `base`, `first_aid` or `finetome`.

    Not for two threads at once: adapters are switched on the one model.

    Raises:
        KeyError: no such model.
    """
    if key == "base":
        with model.disable_adapter():
            yield model
    elif key in model.peft_config:
        model.set_adapter(key, inference_mode=True)
        yield model
    else:
        known = ", ".join(["base", *model.peft_config])
        raise KeyError(f"no model {key!r}; there are: {known}")
