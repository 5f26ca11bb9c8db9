"""The chat's third back end: OpenVINO GenAI, for a 1 B on a CPU. No Transformers here.

One exported base (`utils.export`) and two LoRA adapters, which each request switches on
or leaves off; PEFT's files are read as they are. `openvino-genai` is an optional
dependency: where it is missing, or anything does not fit, `EngineUnavailable` says so
in a sentence and whoever asked takes the Transformers back end.
"""

import json
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock

import psutil
from safetensors import SafetensorError, safe_open

from utils.adapters import ADAPTERS, find_adapter, read_adapter_info
from utils.config import Settings, display_path
from utils.exported import Export
from utils.prompts import DATE
from utils.protocol import LOOK_UP_S, Progress, Sampling, wait_for_turn

try:
    import openvino_genai as genai
except ImportError:  # said by `EngineUnavailable` when somebody asks for it
    genai = None

TOP_K = 50  # what Transformers draws from, where nobody says otherwise
SPARE = 2.5  # memory needed in all, as a factor of what lies on the disk
# What an engine on a recent CPU rounds to bfloat16 and to 8 bits, unless told not to.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
# Kinds of LoRA, as PEFT's configuration names them, that the engine would leave out.
UNKNOWN = (
    *("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias"),
    *("layer_replication", "trainable_token_indices", "target_parameters"),
)
CUT = "\ufffd"  # half of a character whose other tokens are still to come


class EngineUnavailable(RuntimeError):
    """Why OpenVINO cannot answer here, in a sentence."""


class OpenVinoBackend:
    """One pipeline with two adapters in this process; a lock decides whose turn it is.

    It has one set of adapters switched on at a time, as `LocalBackend` has.
    """

    at_once = 1

    def __init__(self, settings: Settings, export: Export):
        """Load the export with both adapters.

        Args:
            settings: of the run, for its adapters.
            export: of the adapters' base.

        Raises:
            EngineUnavailable: a package, memory or an adapter is missing or does not
                fit; the message says what to do.
            FileNotFoundError: the run has no adapter.
        """
        if genai is None:
            raise EngineUnavailable(
                "CHAT_ENGINE=openvino needs one more package: pip install -r "
                "requirements-openvino.txt."
            )
        free, wanted = psutil.virtual_memory().available, export.size * SPARE
        if wanted > free:
            raise EngineUnavailable(
                f"{display_path(export.path)} needs {wanted / 1e9:.1f} GB of memory, "
                f"and {free / 1e9:.1f} GB are free: close something, or export to int4."
            )
        self.export = export
        self.about = f"this machine (OpenVINO, {export.about()})"
        self.lock = Lock()
        self.adapters = {}
        for name in ADAPTERS:
            folder = find_adapter(settings, name).path
            scale = check_adapter(folder, export)
            file = folder / "adapter_model.safetensors"
            self.adapters[name] = (genai.Adapter(str(file)), scale)
        exact = EXACT if export.weight_format == "fp32" else {}
        try:
            self.pipeline = genai.LLMPipeline(
                str(export.path),
                "CPU",
                adapters=genai.AdapterConfig(list(self.adapters.values())),
                # The other one keeps the keys and values of prompts it has seen,
                # whichever adapter made them: the next model would read its rival's.
                ATTENTION_BACKEND="SDPA",
                **exact,
            )
        except RuntimeError as error:
            reason = _last_line(error)
            raise EngineUnavailable(
                f"OpenVINO cannot load {display_path(export.path)} ({reason}): `make "
                "export` makes it anew."
            ) from error
        self.tokenizer = self.pipeline.get_tokenizer()
        self.computed = 0  # tokens, by all answers so far

    def prompt(self, messages: Sequence[Mapping]) -> str:
        """`messages` in the model's chat format, as `utils.prompts` writes them."""
        return self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            extra_context={"date_string": DATE},
        )

    def stream(
        self,
        key: str,
        messages: Sequence[Mapping],
        sampling: Sampling,
        token: str | None = None,
    ) -> Iterator[Progress]:
        """As `utils.protocol.Backend.stream`; no token is needed here.

        Raises:
            KeyError: no such model.
            RuntimeError: the engine failed; its reason is in the message.
        """
        if key != "base" and key not in self.adapters:
            known = ", ".join(["base", *self.adapters])
            raise KeyError(f"no model {key!r}; there are: {known}")
        yield from wait_for_turn(self.lock)
        try:
            yield from self._generate(key, messages, sampling)
        finally:
            self.lock.release()

    def _generate(
        self, key: str, messages: Sequence[Mapping], sampling: Sampling
    ) -> Iterator[Progress]:
        began = time.perf_counter()
        prompt = self.tokenizer.encode(self.prompt(messages), add_special_tokens=False)
        config = self._config(key, sampling)
        ends = set(config.stop_token_ids)
        arrived: SimpleQueue = SimpleQueue()  # token ids, then None or an error
        stopped = threading.Event()
        engine = self

        class Tokens(genai.StreamerBase):
            def write(self, ids):
                new = [ids] if isinstance(ids, int) else list(ids)
                engine.computed += len(new)
                arrived.put(new)
                going = genai.StreamingStatus.RUNNING
                return genai.StreamingStatus.CANCEL if stopped.is_set() else going

            def end(self):
                pass

        def run() -> None:
            try:
                self.pipeline.generate(prompt, config, Tokens())
                arrived.put(None)
            except Exception as error:  # noqa: BLE001 - handed on to the reader below
                arrived.put(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        ids: list[int] = []
        first = 0.0
        try:
            while True:
                try:
                    new = arrived.get(timeout=LOOK_UP_S)
                except Empty:  # where it yields, a closed chat can leave
                    if not ids:
                        waited = time.perf_counter() - began
                        yield Progress("", 0, 0.0, waited, "reads the question")
                    continue
                if not isinstance(new, list):
                    break
                ids += new
                now = time.perf_counter() - began
                first = first or now
                said = ids[:-1] if ids[-1] in ends else ids
                text = self.tokenizer.decode(said, skip_special_tokens=True)
                yield Progress(text.rstrip(CUT).strip(), len(ids), first, now)
        finally:
            stopped.set()
            thread.join()
        if new is not None:
            raise RuntimeError(f"the answer broke off: {_last_line(new)}") from new

    def _config(self, key: str, sampling: Sampling):
        config = self.pipeline.get_generation_config()
        config.max_new_tokens = sampling.max_new_tokens
        config.do_sample = sampling.temperature > 0
        if config.do_sample:
            config.temperature, config.top_p = sampling.temperature, sampling.top_p
            config.top_k, config.rng_seed = TOP_K, sampling.seed
        config.adapters = (
            genai.AdapterConfig()
            if key == "base"
            else genai.AdapterConfig(*self.adapters[key])
        )
        return config


def check_adapter(folder: Path, export: Export) -> float:
    """Whether the adapter in `folder` fits the export; returns the scale of its output.

    The scale is alpha / r (Hu et al. 2021), which the engine has to be told.

    Raises:
        EngineUnavailable: another base, another shape, or a kind of LoRA that the
            engine does not know.
    """
    where = display_path(folder)
    info = read_adapter_info(folder)
    made_on = info.get("base_fingerprint", export.base_fingerprint)
    if made_on != export.base_fingerprint:
        raise EngineUnavailable(
            f"{display_path(export.path)} is an export of {export.base_model} "
            f"({export.base_fingerprint}) and {where} was trained on another base "
            f"({info.get('base_model')}, {made_on}): `make export` with that base."
        )
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    kind = config.get("peft_type", "LORA"), config.get("bias", "none")
    own = [key for key in UNKNOWN if config.get(key)]
    if own or kind != ("LORA", "none"):
        what = ", ".join(own) or "{}, bias {}".format(*kind)
        raise EngineUnavailable(
            f"{where} is not a plain LoRA ({what}), which is all that OpenVINO can "
            "switch: let Transformers answer (unset CHAT_ENGINE)."
        )
    file, rank = folder / "adapter_model.safetensors", config.get("r", 0)
    try:
        with safe_open(file, framework="np") as weights:
            shapes = {
                name: weights.get_slice(name).get_shape()
                for name in weights.keys()  # noqa: SIM118 - no mapping
            }
    except SafetensorError as error:
        raise EngineUnavailable(
            f"{display_path(file)} cannot be read ({error}): train or fetch it again."
        ) from error
    model = json.loads((export.path / "config.json").read_text("utf-8"))
    fitting = _shapes(model, rank)
    for name, shape in shapes.items():
        if fitting.get(name) != shape:
            wanted = fitting.get(name, "no such layer")
            raise EngineUnavailable(
                f"{where} (rank {rank}) does not fit {display_path(export.path)}: "
                f"{name} is {shape}, and the base has {wanted}. Name the adapters of "
                "this base, or export theirs."
            )
    root = math.sqrt(rank) if config.get("use_rslora") else rank
    return config["lora_alpha"] / root


def _shapes(model: Mapping, rank: int) -> dict[str, list[int]]:
    """By name, the shape of every tensor that a LoRA on this Llama may have."""
    hidden, inner = model["hidden_size"], model["intermediate_size"]
    heads = model["num_attention_heads"]
    head = model.get("head_dim") or hidden // heads
    queries, values = heads * head, model["num_key_value_heads"] * head
    sizes = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, values),
        "self_attn.v_proj": (hidden, values),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    shapes = {}
    for layer in range(model["num_hidden_layers"]):
        for module, (inputs, outputs) in sizes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            shapes[f"{name}.lora_A.weight"] = [rank, inputs]
            shapes[f"{name}.lora_B.weight"] = [outputs, rank]
    return shapes


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()
