"""What a run gives away: the adapter with its card, a merged model, a Modelfile."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import HfApi
from peft import PeftModel

from utils import prompts, results
from utils.config import MODELS, POCKET, SAFETY_NOTICE, Settings, display_path, resolve
from utils.models import (
    ADAPTER_INFO,
    adapter_dir,
    load_base,
    load_tokenizer,
    read_adapter_info,
)

DATASETS = {
    "first_aid": "i-am-mushfiq/FirstAidQA",
    "finetome": "mlabonne/FineTome-100k",
}


def adapter_name(settings: Settings, name: str) -> str:
    """The adapter's name on the Hub: Llama's licence wants it to begin with Llama."""
    pocket = resolve(settings.base_model) == POCKET
    base = "Llama-pocket" if pocket else resolve_name(settings.base_model)
    return f"{base}-{MODELS[name].label}-LoRA"


def resolve_name(base_model: str) -> str:
    """The last part of a base's name, made to begin with Llama."""
    last = Path(base_model).name
    return last if last.startswith("Llama") else f"Llama-{last}"


def save_adapter(
    model: PeftModel,
    folder: Path,
    settings: Settings,
    info: Mapping,
    evaluations: Sequence[Mapping] = (),
) -> None:
    """Save the tuned adapter as safetensors, with its card and what made it.

    The base's name is written as the run knows it: PEFT would write the absolute
    path of a local base, which means nothing on another machine.

    Args:
        model: as `fine_tune` returns it.
        folder: to write to; an older adapter there is replaced.
        settings: of the run.
        info: data fingerprint, hyperparameters, scores; kept in `adapter_info.json`.
        evaluations: of the run's log, for the card's curve.
    """
    run = results.describe_run(settings)
    for config in model.peft_config.values():
        config.base_model_name_or_path = run["base_model"]
    # "auto" would ask the Hub for the base's config to see whether embeddings changed.
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    written = {**run, **info, "when": results.now()}
    results.write_json(folder / ADAPTER_INFO, written)
    card = adapter_card(settings, written, evaluations)
    (folder / "README.md").write_text(card, encoding="utf-8")
    log = results.training_log(settings, info["adapter"])
    if log.is_file():  # whoever fetches the adapter can plot its curve
        (folder / results.ADAPTER_LOG).write_bytes(log.read_bytes())


def adapter_card(
    settings: Settings, info: Mapping, evaluations: Sequence[Mapping]
) -> str:
    """The adapter's card, every number out of the run."""
    name = info["adapter"]
    title = adapter_name(settings, name)
    pocket = "pocket" in title
    knobs = "\n".join(f"| {k} | {v} |" for k, v in info["hyperparameters"].items())
    curve = "\n".join(
        f"| {row['step']:,} | {row['eval_nll']:.4f} | {row['eval_perplexity']:,.2f} |"
        for row in evaluations
    )
    scores = _scores(settings, name)
    front = [
        f"base_model: {info['base_model']}",
        "library_name: peft",
        f"license: {'mit' if pocket else 'llama3.2'}",
        "language: en",
        "tags: [lora, first-aid]" if name == "first_aid" else "tags: [lora]",
    ]
    if info[f"{name}_dataset"] == DATASETS[name]:  # not with data of one's own
        front.append(f"datasets: [{DATASETS[name]}]")
    licence = (
        "The base is this project's pocket Llama, not Llama 3.2 1B."
        if pocket
        else "Built with Llama. Llama 3.2 is licensed under the Llama 3.2 Community "
        "License, Copyright © Meta Platforms, Inc. All Rights Reserved."
    )
    return f"""---
{chr(10).join(front)}
---

# {title}

> {SAFETY_NOTICE}

A LoRA adapter for `{info["base_model"]}`, tuned on `{info[f"{name}_dataset"]}`
({info["rows"].get("train", "?"):,} training rows; data fingerprint
`{info["data_fingerprint"]}`, base fingerprint `{info["base_fingerprint"]}`).
{licence}

| setting | value |
|---|---|
{knobs}
| steps | {info.get("steps", "?")} |
| seed | {info["seed"]} |
| hardware | {info["hardware"]} |
| tokens per second | {info.get("tokens_per_second", "not measured")} |
| peak memory | {info.get("peak_memory_gb", "not measured")} GB |
| made | {info["when"]} |

## Curve

Token-weighted negative log-likelihood (nats) and perplexity of the answers in the
validation rows:

| step | NLL | perplexity |
|---|---|---|
{curve}

## Scores on held-out questions

{scores}

## Limits

It repeats the style of its training answers, also where their facts do not fit. ROUGE
and perplexity do not see a wrong instruction. No clinician has examined the answers.
"""


def _scores(settings: Settings, name: str) -> str:
    """A line on ROUGE-L if notebook 05 has left scores."""
    file = settings.run_dir / "scores.json"
    if not file.is_file():
        return (
            "Not measured yet: notebook 05 measures them and renders this card again."
        )
    arms = results.read_json(file).get("first_aid", {})
    cell = arms.get(name, {}).get("original")
    if not cell:
        return "Not measured for this adapter."
    mean, low, high = (cell[f"rougeL_f1{part}"] for part in ("", "_low", "_high"))
    return (
        f"ROUGE-L F1 {mean:.3f} (95 % interval {low:.3f} to {high:.3f}) on "
        f"{cell['n']} held-out first-aid questions."
    )


def merge(settings: Settings, name: str, folder: Path) -> Path:
    """Write base and adapter as one model, with a Modelfile for Ollama.

    The base is loaded unquantised: merging into 4-bit weights would stay 4-bit.

    Returns:
        The folder with safetensors, tokenizer and Modelfile.

    Raises:
        FileNotFoundError: the run has no such adapter.
    """
    source = adapter_dir(settings, name)
    if not (source / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(
            f"{display_path(source)} holds no adapter; the cells above make it"
        )
    base = load_base(settings.unquantised())
    tokenizer = load_tokenizer(settings.base_model)
    merged = PeftModel.from_pretrained(base, source).merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "Modelfile").write_text(modelfile(tokenizer, name), encoding="utf-8")
    return folder


def modelfile(tokenizer, name: str) -> str:
    """An Ollama Modelfile that asks the merged model exactly as it was trained.

    `ollama create NAME -f Modelfile` in the merged model's folder reads it.
    """
    marks = {"{{ .System }}": "\u0001", "{{ .Prompt }}": "\u0002"}
    system, user = marks.values()
    template = prompts.prompt_text(
        tokenizer,
        [{"role": "system", "content": system}, {"role": "user", "content": user}],
    )
    template = template.removeprefix(tokenizer.bos_token or "")  # Ollama adds it
    for field, mark in marks.items():
        template = template.replace(mark, field)
    end = tokenizer.eos_token
    return (
        f"# {SAFETY_NOTICE}\n"
        "FROM .\n"
        f'TEMPLATE """{template}{{{{ .Response }}}}{end}"""\n'
        f'SYSTEM """{prompts.SYSTEM_PROMPTS[name]}"""\n'
        "PARAMETER temperature 0\n"
        f"PARAMETER stop {end}\n"
    )


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload an adapter's or a merged model's folder to the Hub.

    Args:
        folder: to upload.
        repository: `owner/name`; the name begins with Llama.
        private: as a new repository; an existing one stays as it is.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the name does not begin with Llama, or has no owner.
        RuntimeError: no network, no token, or the Hub refused; the message says why.
    """
    owner, _, name = repository.partition("/")
    if not owner or not name.startswith("Llama"):
        raise ValueError(
            f"{repository!r}: write owner/name, with a name that begins with Llama, as "
            "the licence of Llama 3.2 asks"
        )
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repository))
    except Exception as error:  # the Hub's own, and those of httpx or httpx2 as well
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"{repository} was not uploaded: {reason}. It takes a network, and a token "
            "with write access in HF_TOKEN; the folder "
            f"{display_path(folder)} is complete and can be uploaded later"
        ) from error


def refresh_card(settings: Settings, name: str) -> None:
    """Render an adapter's card again, once there are scores."""
    folder = adapter_dir(settings, name)
    info = read_adapter_info(folder)
    _, evaluations = results.split_log(
        results.read_lines(results.training_log(settings, name))
    )
    card = adapter_card(settings, info, evaluations)
    (folder / "README.md").write_text(card, encoding="utf-8")
