"""Measures what one base with two adapters costs in memory.

The bytes are counted in the shape of Llama 3.2 1B, on PyTorch's meta device, where a
tensor has a size and no content. Beside it stands what loading the pocket models and
answering once adds to this process, interpreter and libraries left out.
"""

import ctypes
import gc
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from utils.backends import LocalBackend, Sampling
from utils.benchmark_training import LAYERS, LLAMA_1B
from utils.config import load_settings
from utils.models import ADAPTERS
from utils.prompts import first_aid_messages

RANK = 16


def weight_bytes(model) -> tuple[int, int]:
    """Bytes of the base's weights, and of all adapters on it."""
    base = adapters = 0
    for name, tensor in model.named_parameters():
        size = tensor.numel() * tensor.element_size()
        if "lora_" in name:
            adapters += size
        else:
            base += size
    return base, adapters


def one_b_shape() -> dict:
    """The bytes of three models in the 1 B's shape, in half precision."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_1B)).half()
        lora = LoraConfig(r=RANK, target_modules=list(LAYERS), task_type="CAUSAL_LM")
        first, *others = ADAPTERS
        model = get_peft_model(model, lora, adapter_name=first)
        for name in others:
            model.add_adapter(name, lora)
    base, adapters = weight_bytes(model)
    return {
        "base_bytes": base,
        "adapter_bytes": adapters,
        "three_models_over_base": round((base + adapters) / base, 4),
    }


def resident_bytes() -> int:
    """The memory this process holds now.

    Raises:
        OSError: this system has no /proc.
    """
    gc.collect()
    if sys.platform == "linux":  # give back what was freed, or it counts as held
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
        line = next(line for line in status if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def pocket_models() -> dict:
    """What the three pocket models take of this process's memory."""
    settings = load_settings({"PROFILE": "pocket"})
    before = resident_bytes()
    backend = LocalBackend(settings)
    loaded = resident_bytes()
    messages = first_aid_messages("What should I do about a burn?")
    for key in ("base", *ADAPTERS):
        list(backend.stream(key, messages, Sampling(max_new_tokens=16)))
    base, adapters = weight_bytes(backend.model)
    return {
        "pocket_weights_mb": round((base + adapters) / 1e6, 1),
        "pocket_weights_over_base": round((base + adapters) / base, 2),
        "process_mb_before": round(before / 1e6, 1),
        "process_mb_loaded": round(loaded / 1e6, 1),
        "process_mb_after_answers": round(resident_bytes() / 1e6, 1),
    }


def memory() -> dict:
    """The section `chat` of `utils.benchmark`."""
    return {**one_b_shape(), **pocket_models()}
