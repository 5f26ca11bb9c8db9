"""TRL's trainer, made exact, hard to lose and easy to watch.

`fine_tune` builds it from the decisions of a notebook, resumes what was interrupted,
makes the micro-batch smaller when memory is short, and returns the tuned model.
"""

import math
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.data import Sampler
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from transformers.utils.notebook import NotebookProgressCallback
from trl import SFTConfig, SFTTrainer

from utils import checkpoints, step_log
from utils.answer_loss import add_answer_loss
from utils.config import Settings, display_path
from utils.generation import token_nll
from utils.metrics import perplexity
from utils.models import base_fingerprint
from utils.prompts import IGNORED
from utils.results import training_log

CPU_LIMIT = 300_000_000  # parameters; beyond, fine-tuning on a CPU takes days


@dataclass(frozen=True)
class Job:
    """What a notebook decides about one fine-tuning run.

    Attributes:
        name: of the adapter, `first_aid` or `finetome`.
        lora: the adapter's shape.
        sft: the schedule. Its batch size times its accumulation is the effective
            batch, whatever number of processes shares it.
        train: encoded rows (`utils.prompts.encode_rows`).
        validation: encoded rows to evaluate on.
        data_fingerprint: of the split that both are from.
    """

    name: str
    lora: LoraConfig
    sft: SFTConfig
    train: Sequence[Mapping]
    validation: Sequence[Mapping]
    data_fingerprint: str

    @property
    def effective_batch(self) -> int:
        """Rows that one optimizer step learns from."""
        return self.sft.per_device_train_batch_size * (
            self.sft.gradient_accumulation_steps
        )


def padding_share(lengths: Sequence[int], order: Sequence[int], batch: int) -> float:
    """How much of the batches is padding, when rows come in `order`."""
    padded = 0
    for start in range(0, len(order), batch):
        rows = [lengths[i] for i in order[start : start + batch]]
        padded += max(rows) * len(rows)
    return 1 - sum(lengths[i] for i in order) / padded


def to_dataset(encoded: Sequence[Mapping]) -> Dataset:
    """Encoded rows as the pre-tokenised data set that TRL takes as it is."""
    return Dataset.from_list(list(encoded))


class LengthGroups(Sampler):
    """The order of an epoch: rows of like length meet in one effective batch.

    What a step learns from depends on seed and epoch alone: not on the micro-batch,
    nor on the number of processes, nor on where an interrupted run is resumed. The
    longest batch comes first, so that memory runs out at once or never. The rows left
    over by the division into batches, others in each epoch, sit that epoch out.

    Args:
        lengths: tokens of each row.
        batch: the effective batch.
        seed: of the run.
    """

    POOL = 50  # batches sorted together: enough for length, still random

    def __init__(self, lengths: Sequence[int], batch: int, seed: int):
        self.lengths = lengths
        self.batch = min(batch, len(lengths))
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths) // self.batch * self.batch

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}-{self.epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        order = order[: len(self)]
        batches = []
        size = self.batch * self.POOL
        for start in range(0, len(order), size):
            pool = sorted(order[start : start + size], key=lambda i: -self.lengths[i])
            batches += [
                pool[at : at + self.batch] for at in range(0, len(pool), self.batch)
            ]
        rng.shuffle(batches)
        longest = max(batches, key=lambda b: self.lengths[b[0]])
        batches.remove(longest)
        yield from (i for batch in [longest, *batches] for i in batch)


class LoggedTrainer(SFTTrainer):
    """`SFTTrainer` that logs every step, weighs tokens, and saves all or nothing.

    Evaluation is token-weighted over the labelled tokens: the Trainer's own
    `eval_loss` is a mean of batch means, whose exponential is not the perplexity.

    Args:
        log_path: JSON-lines file; lines are appended.
        evaluation_rows: encoded rows (`utils.prompts.encode_rows`).
        identity: what makes this run this run; it is kept in every checkpoint.
        **kwargs: as `SFTTrainer` takes them.
    """

    def __init__(
        self,
        *,
        log_path: Path,
        evaluation_rows: Sequence[Mapping],
        identity: Mapping | None = None,
        **kwargs,
    ):
        # The trainer wants a data set to agree to evaluate; `evaluate` uses the rows.
        super().__init__(eval_dataset=to_dataset(evaluation_rows), **kwargs)
        self.args.logging_nan_inf_filter = False  # a NaN would be logged as 0.0
        for parameter in self.model.parameters():
            if parameter.requires_grad:  # TRL makes them bfloat16 on a 4-bit base,
                parameter.data = parameter.data.float()  # which fp16 cannot scale
        add_answer_loss(self.model.get_base_model())
        self.evaluation_rows = evaluation_rows
        self.identity = dict(identity or {})
        self.folder = Path(self.args.output_dir)
        self._staging = False
        self._scores: dict[str, float] = {}
        self._scored_at = -1
        for callback in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
            self.remove_callback(callback)
        self.log_lines = step_log.StepLog(log_path)
        self.add_callback(self.log_lines)
        self.add_callback(_EpochOfSampler(self))

    # --- what a step learns from ---------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        world = self.args.world_size
        self.sampler = LengthGroups(
            [len(ids) for ids in rows["input_ids"]],
            self.args.train_batch_size * self.args.gradient_accumulation_steps * world,
            self.args.seed,
        )
        return self.sampler

    def compute_loss(
        self, model, inputs, return_outputs=False, num_items_in_batch=None
    ) -> torch.Tensor:
        """Summed loss of the answer tokens, over the number in the whole step."""
        total = model(**inputs, use_cache=False, answer_loss=True)
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["labels"][:, 1:] != IGNORED).sum()
        # The number counts every process's tokens, and their gradients are averaged.
        loss = total / num_items_in_batch * self.accelerator.num_processes
        tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum())
        self._total_train_tokens += tokens.sum().item()
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    # --- evaluation ----------------------------------------------------------------

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Token-weighted NLL (nats) and perplexity of answers on the evaluation rows.

        `eval_whole_text` is the measure that the original project published: the NLL
        of the whole chat text, prompt included, as the mean of the rows' means. Both
        come from one pass; several processes share the rows.
        """
        mine = self.evaluation_rows[self.args.process_index :: self.args.world_size]
        whole = [{**row, "labels": row["input_ids"]} for row in mine]
        sums = torch.zeros(4, dtype=torch.float64)
        losses = token_nll(
            self.model, whole, batch_size=self.args.per_device_eval_batch_size
        )
        for row, loss in zip(mine, losses):
            answer = torch.tensor(row["labels"][1:]) != IGNORED
            sums += torch.tensor(
                [loss[answer].sum(), answer.sum(), loss.mean(), 1], dtype=torch.float64
            )
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        nll, tokens, means, rows = sums.tolist()
        found = perplexity([(nll, int(tokens))])
        self._scores = {
            "eval_nll": found["nll"],
            "eval_perplexity": found["perplexity"],
            "eval_whole_text": means / rows,
        }
        self._scored_at = self.state.global_step
        self.log(dict(self._scores))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, self._scores
        )
        return self._scores

    # --- checkpoints ---------------------------------------------------------------

    def _get_output_dir(self, trial) -> str:
        if self._staging:  # while a checkpoint is written
            return str(checkpoints.staging_folder(self.folder))
        return super()._get_output_dir(trial)

    def create_model_card(self, *args, **kwargs) -> None:
        """Not with every checkpoint; the finished adapter gets a card of its own."""

    def _save_checkpoint(self, model, trial) -> None:
        step = self.state.global_step
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                scores = self._scores if self._scored_at == step else {}
                marker = {"identity": self.identity, **scores}
                checkpoints.publish(self.folder, step, marker)
                checkpoints.prune(self.folder)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # A full disk is an OSError to Python, a SafetensorError to safetensors, a
            # RuntimeError to torch.save and a bare Exception to the tokenizer.
            free = shutil.disk_usage(self.folder).free / 1e6
            shutil.rmtree(checkpoints.staging_folder(self.folder), ignore_errors=True)
            done = list(checkpoints.complete(self.folder))
            kept = f"that of step {done[-1]} stays" if done else "there is none yet"
            reason = getattr(error, "strerror", None) or error
            raise OSError(
                f"the checkpoint of step {step} could not be written to "
                f"{display_path(self.folder)} ({reason}; {free:,.1f} MB free); {kept}. "
                "Make room, or set RUN_DIR to another place, and run the cell again: "
                "it goes on from there"
            ) from error
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()


class _EpochOfSampler(TrainerCallback):
    """Tells the sampler its epoch, which a resumed run would not know."""

    def __init__(self, trainer: LoggedTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        sampler = self.trainer.sampler
        sampler.epoch = state.global_step // (len(sampler) // sampler.batch)


# --- one run from its decisions to the tuned model -----------------------------------


def identity_of(settings: Settings, job: Job, base: str) -> dict:
    """What a checkpoint must share with a run that resumes it, as JSON can hold it."""
    sft = job.sft
    return {
        "adapter": job.name,
        "base": base,
        "data": job.data_fingerprint,
        "rows": len(job.train),
        "seed": sft.seed,
        "rank": job.lora.r,
        "alpha": job.lora.lora_alpha,
        "dropout": job.lora.lora_dropout,
        "layers": sorted(job.lora.target_modules),
        "learning_rate": sft.learning_rate,
        "effective_batch": job.effective_batch,
        "epochs": sft.num_train_epochs,
        "max_steps": sft.max_steps,
        "warmup_steps": sft.warmup_steps,
        "scheduler": str(sft.lr_scheduler_type),
        "weight_decay": sft.weight_decay,
        "precision": "fp16" if sft.fp16 else "bf16" if sft.bf16 else "float32",
        "load_in_4bit": settings.load_in_4bit,
    }


def fine_tune(
    settings: Settings,
    job: Job,
    base,
    tokenizer,
    *,
    callbacks: Sequence[TrainerCallback] = (),
) -> PeftModel:
    """Train the adapter, or go on with one that was interrupted.

    Steps and evaluations land in the run's log as they happen. A run that is already
    finished is not trained again: its adapter is read from its last checkpoint.

    Args:
        settings: of the run.
        job: the notebook's decisions.
        base: the loaded base model; the adapter is put onto it.
        tokenizer: its tokenizer.
        callbacks: more of them, for a live curve.

    Returns:
        The base with the tuned adapter, in evaluation mode.

    Raises:
        ValueError: `RUN_DIR` holds a checkpoint of another run, or the effective
            batch cannot be shared by the processes.
        RuntimeError: a large model without a GPU.
        OSError: the run's folder cannot be written to.
        FloatingPointError: the loss is no number.
        torch.OutOfMemoryError: not even a micro-batch of one row fits.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    _check(job, base, world)
    folder = Path(job.sft.output_dir)
    log_path = training_log(settings, job.name)
    _check_writable(folder)
    identity = identity_of(settings, job, base_fingerprint(settings, base))
    share = job.effective_batch // world  # rows of a step that this process takes
    micro = micro_batch(share, job.sft.per_device_train_batch_size)
    recompute = job.sft.gradient_checkpointing
    while True:
        found = checkpoints.latest(folder, identity)
        _take_adapters_off(base)
        if found and found[0] == total_steps(job):
            print(f"This run is finished: step {found[0]}, {display_path(found[1])}.")
            return PeftModel.from_pretrained(base, found[1], is_trainable=True).eval()
        if not _is_first_process():
            pass
        elif found:
            step_log.cut_back(log_path, found[0])
        else:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            log_path.write_text("", encoding="utf-8")
        args = replace_arguments(
            job.sft,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=share // micro,
            **dict.fromkeys(_recompute_names(job.sft), recompute),
            eval_on_start=job.sft.eval_on_start and not found,
            # The sampler gives whole steps. Told so, Accelerate takes none of the last
            # one's rows for padding, whose tokens several processes would not count.
            dataloader_drop_last=len(job.train) >= job.effective_batch,
        )
        set_seed(job.sft.seed)  # the adapter's first weights are drawn here
        trainer = LoggedTrainer(
            model=base,
            args=args,
            peft_config=replace(job.lora),
            train_dataset=to_dataset(job.train),
            evaluation_rows=job.validation,
            processing_class=tokenizer,
            log_path=log_path,
            identity=identity,
            callbacks=list(callbacks),
        )
        if found:
            print(f"Going on after step {found[0]}, from {display_path(found[1])}.")
        try:
            trainer.train(resume_from_checkpoint=str(found[1]) if found else None)
            return trainer.model.eval()
        except torch.OutOfMemoryError as error:
            trainer.log_lines.close()
            if micro == 1 and recompute:
                raise
            if world > 1:  # within the step the others wait for this process for ever
                half = micro_batch(share, max(1, micro // 2))
                print(
                    f"Out of memory in one of {world} processes. Set per_device_train_"
                    f"batch_size={half} and gradient_accumulation_steps="
                    f"{job.effective_batch // half}, or gradient_checkpointing=True; "
                    "then run the cell again."
                )
                raise
            if micro > 1:
                micro = micro_batch(share, micro // 2)
                print(
                    f"Out of memory ({str(error).splitlines()[0][:80]}). Micro-batch "
                    f"{micro} now, {share // micro} of them a step; the effective "
                    f"batch stays {job.effective_batch}."
                )
            else:
                recompute = True
                print("Out of memory with one row. Activations are recomputed now.")
        except KeyboardInterrupt:
            trainer.log_lines.close()
            done = list(checkpoints.complete(folder))
            where = f"after step {done[-1]}" if done else "at step 0"
            print(f"Stopped. Run the cell again, and it goes on {where}.")
            raise
        del trainer
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def micro_batch(share: int, limit: int) -> int:
    """The largest divisor of a process's `share` of a step that is `limit` at most."""
    return next(size for size in range(limit, 0, -1) if share % size == 0)


def total_steps(job: Job) -> int:
    """Optimizer steps of the whole run."""
    if job.sft.max_steps > 0:
        return job.sft.max_steps
    per_epoch = max(1, len(job.train) // job.effective_batch)
    return math.ceil(per_epoch * job.sft.num_train_epochs)


def replace_arguments(sft: SFTConfig, **changes) -> SFTConfig:
    """`sft` with some fields changed, all checks run again."""
    return SFTConfig(**(arguments_of(sft) | changes))


def arguments_of(sft: SFTConfig) -> dict:
    """The arguments that `sft` was made of."""
    return {
        name: getattr(sft, name)
        for name, field in sft.__dataclass_fields__.items()
        if field.init
    }


def _recompute_names(sft: SFTConfig) -> list[str]:
    """The switch has one name in older Transformers and two in newer ones."""
    known = ("gradient_checkpointing", "activation_checkpointing")
    return [name for name in known if name in sft.__dataclass_fields__]


def _take_adapters_off(base) -> None:
    """Undo what an earlier call in this kernel did to `base`, an interrupted one too.

    PEFT puts its layers into the base itself; those of other modules than the new
    adapter's would stay there, trained and active.
    """
    for name, layer in list(base.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            base.set_submodule(name, layer.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config
    vars(base).pop("forward", None)  # a trainer's own


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _check(job: Job, base, world: int) -> None:
    if job.effective_batch % world:
        raise ValueError(
            f"an effective batch of {job.effective_batch} rows cannot be shared by "
            f"{world} processes; make it a multiple."
        )
    size = sum(p.numel() for p in base.parameters())
    if size > CPU_LIMIT and not torch.cuda.is_available() and job.sft.max_steps < 0:
        raise RuntimeError(
            f"{size / 1e9:.2f} billion parameters and no GPU: this would take days. On "
            "Colab: Runtime → Change runtime type → T4 GPU. Without one: "
            "PROFILE=pocket, or MAX_STEPS=2 to see that it runs."
        )


def _check_writable(folder: Path) -> None:
    """Fail before the training, not at its first checkpoint."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"  # several processes look at once
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OSError(
            error.errno,
            f"the run cannot write to {display_path(folder)} ({error.strerror}); set "
            "RUN_DIR to a folder that it may write to",
        ) from error
