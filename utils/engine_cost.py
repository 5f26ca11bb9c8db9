"""What 8 and 4 bits cost in answers: the exported base against the unexported one.

    python -m utils.engine_cost

Exports the profile's base to fp32, int8 and int4, lets all three models answer the
held-out first-aid questions on each, and writes perplexity and ROUGE-L beside those of
Transformers to `data/results/<profile>/engine.json`, which notebook 06 shows.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from safetensors.torch import load_file
from tqdm.auto import tqdm

from utils import dataset, export, exported, prompts, results, sources
from utils.adapters import ADAPTERS, find_adapter
from utils.config import MODELS, Settings, display_path, load_settings
from utils.generation import answer_nll, generate_answers
from utils.metrics import bootstrap_interval, perplexity, rouge_rows
from utils.models import load_three_models, use_model
from utils.openvino_engine import EXACT, OpenVinoBackend, check_adapter
from utils.protocol import Sampling

FORMATS = ("fp32", "int8", "int4")


def with_lora(model: ov.Model, adapter: Path, scale: float) -> ov.Model:
    """Add a LoRA to the linear layers of an exported base: W x + scale · B (A x).

    The engine does this inside and shows no logits of a prompt; here they can be seen.

    Args:
        model: as read from an export; it is changed.
        adapter: folder of PEFT's files.
        scale: alpha / r.

    Raises:
        ValueError: a layer of the adapter is not in the model.
    """
    weights = load_file(adapter / "adapter_model.safetensors")
    layers = {
        node.get_friendly_name().removeprefix("__module.").split("_proj/")[0]: node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "MatMul" and "_proj/" in node.get_friendly_name()
    }
    for name in weights:
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        node = layers.get(module.removesuffix("_proj"))
        if node is None:
            raise ValueError(f"the export has no layer {module}")
        down = weights[name].float().numpy()
        up = weights[name.replace(".lora_A.", ".lora_B.")].float().numpy() * scale
        thin = ops.matmul(node.input_value(0), ops.constant(down), False, True)
        more = ops.matmul(thin, ops.constant(up), False, True)
        readers = list(node.output(0).get_target_inputs())
        total = ops.add(node.output(0), more)
        for reader in readers:
            reader.replace_source_output(total.output(0))
    model.validate_nodes_and_infer_types()
    return model


def exported_nll(
    made: exported.Export, adapter: Path | None, rows: Sequence[Mapping]
) -> list[tuple[float, int]]:
    """As `utils.generation.answer_nll`, of an export with one adapter or none."""
    core = ov.Core()
    model = core.read_model(made.path / "openvino_model.xml")
    if adapter:
        model = with_lora(model, adapter, check_adapter(adapter, made))
    exact = EXACT if made.weight_format == "fp32" else {}
    request = core.compile_model(model, "CPU", exact).create_infer_request()
    losses = []
    for row in tqdm(rows, desc=f"perplexity in {made.weight_format}", leave=False):
        ids = np.array([row["input_ids"]], dtype=np.int64)
        request.reset_state()
        found = request.infer(
            {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "position_ids": np.arange(ids.shape[1], dtype=np.int64)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
        )
        logits = found["logits"][0, :-1].astype(np.float64)
        targets = np.array(row["labels"][1:])
        kept = targets != prompts.IGNORED
        logits, targets = logits[kept], targets[kept]
        top = logits.max(axis=1)
        total = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
        loss = total - logits[np.arange(len(targets)), targets]
        losses.append((float(loss.sum()), int(kept.sum())))
    return losses


def score(losses: list, answers: Sequence[str], references: Sequence[str]) -> dict:
    """Perplexity and ROUGE-L F1 with its 95 % bootstrap interval, of one model."""
    rouge = rouge_rows(answers, references)["rougeL_f1"]
    low, high = bootstrap_interval(rouge)
    return {
        "perplexity": perplexity(losses)["perplexity"],
        "rougeL_f1": float(np.mean(rouge)),
        "rougeL_f1_low": low,
        "rougeL_f1_high": high,
    }


def measure(settings: Settings) -> dict:
    """Measure the settings' three models, unexported and in every format.

    Returns:
        By format, "unexported" among them, the size of its weights in bytes and by
        model what `score` says and, of an export, `same_answers`: how many answers are
        the unexported model's to the letter.

    Raises:
        OSError, RuntimeError, ValueError: as `utils.export.export`.
    """
    model, tokenizer = load_three_models(settings, verbose=False)
    source = sources.load_source(settings.first_aid_dataset)
    test = dataset.split_rows(source, progress=False).test
    rows, _ = prompts.encode_rows(tokenizer, test, settings.context_length)
    references = [row["answer"] for row in test]
    asked = [prompts.first_aid_messages(row["question"]) for row in test]
    cap = settings.max_new_tokens
    size = sum(weights.numel() * weights.element_size() for weights in base_of(model))
    found: dict[str, dict] = {"unexported": {"bytes": size, "models": {}}}
    theirs = {}
    for key in MODELS:
        with use_model(model, key) as chosen:
            losses = answer_nll(chosen, rows)
            said = generate_answers(chosen, tokenizer, asked, max_new_tokens=cap)
        theirs[key] = [answer["answer"] for answer in said]
        scores = score(losses, theirs[key], references)
        found["unexported"]["models"][key] = {**scores, "same_answers": len(test)}
    folders = {key: find_adapter(settings, key).path for key in ADAPTERS}
    for made in exports(settings):
        backend = OpenVinoBackend(settings, made)
        cell = {"bytes": (made.path / "openvino_model.bin").stat().st_size}
        cell["models"] = {}
        for key in MODELS:
            losses = exported_nll(made, folders.get(key), rows)
            mine = [answer(backend, key, messages, cap) for messages in asked]
            same = sum(a == b for a, b in zip(mine, theirs[key]))
            scores = score(losses, mine, references)
            cell["models"][key] = {**scores, "same_answers": same}
        cell["export"] = results.read_json(made.path / exported.RECORD)["versions"]
        found[made.weight_format] = cell
    return {"n": len(test), "max_new_tokens": cap, "formats": found}


def base_of(model) -> Iterator:
    """The weights of the base below a model's adapters."""
    yield from (w for name, w in model.named_parameters() if "lora_" not in name)


def exports(settings: Settings) -> Iterator[exported.Export]:
    """The base in every format, exported where it is not there or is an older one."""
    _, fingerprint = exported.fetch_base(settings)
    for weight_format in FORMATS:
        try:
            made = exported.read_export(exported.export_dir(settings, weight_format))
        except ValueError:  # none yet, or half of one: made anew in plain sight
            made = None
        if made is None or made.base_fingerprint != fingerprint:
            made = export.export(settings, weight_format)
        yield made


def answer(backend: OpenVinoBackend, key: str, messages: list, cap: int) -> str:
    """The greedy answer of model `key`."""
    *_, last = backend.stream(key, messages, Sampling(cap))
    return last.text


def main() -> None:
    """Measure the environment's profile and write the record."""
    settings = load_settings()
    try:
        found = measure(settings)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"engine_cost: {error}")
    file = exported.cost_file(settings.profile)
    record = results.describe_run(settings)
    _, record["base_fingerprint"] = exported.fetch_base(settings)
    results.write_json(file, {**record, **found, "when": results.now()})
    for name, cell in found["formats"].items():
        for key, scores in cell["models"].items():
            print(
                f"{name:10} {key:9} perplexity {scores['perplexity']:.3f}, "
                f"ROUGE-L {scores['rougeL_f1']:.4f}"
            )
    print(f"written to {display_path(file)}")


if __name__ == "__main__":
    main()
