"""The same fine-tuning on several GPUs, or several processes of a CPU.

    torchrun --nproc_per_node 2 -m utils.launch data/runs/llama_1b/jobs/first_aid

A notebook cannot spread itself over two GPUs. It writes its job down, has torchrun
start this module once per GPU, and reads the finished adapter from the checkpoint. With
`accelerate launch --config_file …` in place of torchrun, FSDP or DeepSpeed take over.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from trl import SFTConfig

from utils import models, results, training
from utils.config import ROOT, Settings, display_path, load_settings

# Of one process and not of the job, or secret; the new processes find their own.
NOT_WRITTEN = ("hub_token", "push_to_hub_token", "local_rank", "deepspeed")


def write_job(settings: Settings, job: training.Job) -> Path:
    """Write `job` to a folder from which another process can read it."""
    folder = settings.run_dir / "jobs" / job.name
    sft = {
        key: value
        for key, value in training.arguments_of(job.sft).items()
        if key not in NOT_WRITTEN
    }
    lora = {k: v for k, v in job.lora.to_dict().items() if v is not None}
    for key, value in lora.items():
        if isinstance(value, set):
            lora[key] = sorted(value)
    results.write_lines(folder / "train.jsonl", job.train)
    results.write_lines(folder / "validation.jsonl", job.validation)
    results.write_json(
        folder / "job.json",
        {
            "name": job.name,
            "data_fingerprint": job.data_fingerprint,
            "lora": lora,
            # Accelerate's part of it is an object, which a string could not stand for.
            "sft": json.loads(json.dumps(sft, default=lambda value: value.to_dict())),
        },
    )
    return folder


def read_job(folder: Path) -> training.Job:
    """Read what `write_job` wrote.

    Raises:
        FileNotFoundError: there is no job in `folder`.
    """
    file = folder / "job.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{display_path(file)} is not there; notebook 02 or 03 writes it"
        )
    written = results.read_json(file)
    return training.Job(
        name=written["name"],
        lora=LoraConfig.from_peft_type(**written["lora"]),
        sft=SFTConfig(**written["sft"]),
        train=results.read_lines(folder / "train.jsonl"),
        validation=results.read_lines(folder / "validation.jsonl"),
        data_fingerprint=written["data_fingerprint"],
    )


def on_every_gpu(
    settings: Settings, job: training.Job, processes: int | None = None
) -> None:
    """Run `job` in as many processes as there are GPUs, and wait for them.

    Args:
        settings: of the run; the processes read the same environment.
        job: the notebook's decisions.
        processes: how many; None for one per GPU.

    Raises:
        subprocess.CalledProcessError: a process failed; its message stands above.
    """
    processes = processes or torch.cuda.device_count()
    folder = write_job(settings, job)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), "-m", "utils.launch", str(folder)]
    print(f"{processes} processes share each step's {job.effective_batch} rows.")
    environment = {**os.environ, "RUN_DIR": str(settings.run_dir)}
    environment |= {"PROFILE": settings.profile, "LAUNCHED": str(processes)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """One of the processes."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc_per_node N -m utils.launch",
        description="Fine-tune a job that a notebook wrote, in several processes.",
    )
    parser.add_argument("job", type=Path, help="the job's folder")
    folder = parser.parse_args(arguments).job
    world = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = int(os.environ.get("LAUNCHED", world))
    if world != wanted:  # `accelerate launch --cpu` is known to start only one
        raise RuntimeError(f"{wanted} processes were asked for and {world} started")
    settings = load_settings()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    job = read_job(folder)
    base = models.load_base(settings)
    training.fine_tune(settings, job, base, models.load_tokenizer(settings.base_model))
    if torch.distributed.is_initialized():
        assert torch.distributed.get_world_size() == wanted
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
