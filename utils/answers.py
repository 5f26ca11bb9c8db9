"""Collects the answers of a comparison row by row, so that a killed run goes on.

`answers.jsonl` gets a line as soon as there is an answer. A line says which base,
adapter, data and cap made it (`made_by`); a line that something else made is never
mixed in, it is set aside and counted.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from utils import prompts, results
from utils.arms import ARMS, GENERATED, SHORT_REQUEST, is_asked, messages_for
from utils.config import MODELS, POCKET, Settings, display_path
from utils.dataset import Split, rephrasings_of
from utils.generation import answer_batches
from utils.models import ADAPTERS, find_adapter, read_adapter_info, use_model
from utils.similarity import nearest_rows

KEY = ("dataset", "id", "phrasing", "model")
ASIDE = "answers_of_another_run.jsonl"
WANTED = (*KEY, "question", "asked", "reference", "answer", "tokens", "made_by")


def first_aid_questions(
    rows: Sequence[Mapping], *, rephrased: bool = True
) -> list[dict]:
    """Every row's question, and its rephrasings where there are any.

    Returns:
        Rows of `dataset`, `id`, `question`, `phrasing` ("original" or
        "rephrased_1" …), `asked`, `reference` and `messages`.
    """
    questions = []
    for row in rows:
        wordings = {"original": row["question"]}
        others = rephrasings_of(row) if rephrased else []
        wordings |= {f"rephrased_{n}": t for n, t in enumerate(others, start=1)}
        shared = {
            "dataset": "first_aid",
            "id": _digest(row["question"], row["answer"]),
            "question": row["question"],
            "reference": row["answer"],
        }
        questions += [
            {
                **shared,
                "phrasing": phrasing,
                "asked": text,
                "messages": prompts.first_aid_messages(text),
            }
            for phrasing, text in wordings.items()
        ]
    return questions


def general_questions(rows: Sequence[Mapping]) -> list[dict]:
    """Conversations up to their last answer, as `first_aid_questions` has them."""
    questions = []
    for row in rows:
        *messages, answer = prompts.row_messages(row)
        questions.append(
            {
                "dataset": "finetome",
                "id": _digest(messages, answer["content"]),
                "question": messages[-1]["content"],
                "phrasing": "original",
                "asked": messages[-1]["content"],
                "reference": answer["content"],
                "messages": messages,
            }
        )
    return questions


def check_adapters(settings: Settings, splits: Mapping[str, Split]) -> list[str]:
    """Refuse an adapter that was trained on another split than it is tested on.

    Args:
        settings: of the run.
        splits: the split of the test rows, by adapter.

    Returns:
        Notes to print: on the adapters shipped with the pocket Llama, which may be
        tried on data of one's own, as long as that is said.

    Raises:
        ValueError: an adapter of the run belongs to another split, so that it may
            have been trained on the rows that it is to be tested on.
    """
    notes = []
    for name in ADAPTERS:
        path = find_adapter(settings, name).path
        trained_on = read_adapter_info(path).get("data_fingerprint")
        if trained_on == splits[name].fingerprint:
            continue
        if path.is_relative_to(POCKET):
            notes.append(
                f"note: the {MODELS[name].label} adapter was trained on other data "
                f"({trained_on}, not {splits[name].fingerprint}); it came with the "
                "pocket Llama, and may know some of these rows"
            )
            continue
        raise ValueError(
            f"{display_path(path)} was trained on the split {trained_on}, and these "
            f"test rows are of the split {splits[name].fingerprint} of "
            f"{splits[name].source}: it may have been trained on the very rows. Train "
            "it again with notebooks 02 and 03, or give the run a RUN_DIR of its own."
        )
    return notes


def identity(
    settings: Settings, base_fingerprint: str, data_fingerprints: Mapping[str, str]
) -> dict[str, str]:
    """What makes the answers of each generated arm, as 12 hexadecimal digits.

    Another base, adapter, split, cap or wording of a prompt is another identity.
    """
    shared = [
        base_fingerprint,
        dict(sorted(data_fingerprints.items())),
        settings.max_new_tokens,
        settings.load_in_4bit,
        prompts.SYSTEM_PROMPTS,
        prompts.DATE,
    ]
    found = {}
    for key in GENERATED:
        parts = list(shared)
        if ARMS[key].short:
            parts.append(SHORT_REQUEST)
        if ARMS[key].model in ADAPTERS:
            folder = find_adapter(settings, ARMS[key].model).path
            weights = folder / "adapter_model.safetensors"
            parts.append(hashlib.sha256(weights.read_bytes()).hexdigest())
        found[key] = _digest(*parts)
    return found


def collect(
    model,
    tokenizer,
    questions: Sequence[Mapping],
    path: Path,
    *,
    made_by: Mapping[str, str],
    max_new_tokens: int,
    batch_size: int = 32,
    arms: Sequence[str] = GENERATED,
    progress: bool = True,
) -> list[dict]:
    """Let every arm answer what `path` does not hold yet, and append line by line.

    Args:
        model: the base with its adapters, as `utils.models.use_model` takes it.
        tokenizer: its tokenizer.
        questions: as `first_aid_questions` and `general_questions` make them.
        path: `answers.jsonl` of the run.
        made_by: the identity of each arm (`identity`).
        max_new_tokens: the cap on an answer's length.
        batch_size: questions at once.
        arms: keys of `utils.arms.ARMS`.
        progress: whether to show bars.

    Returns:
        The rows of all arms, arm by arm in the order of `questions`.

    Raises:
        ValueError: the file is broken before its last line, holds an answer twice,
            or two questions cannot be told apart.
    """
    wanted = [key_of({**q, "model": arm}) for arm, q in _asked(arms, questions)]
    if len(set(wanted)) < len(wanted):
        again = next(key for key in wanted if wanted.count(key) > 1)
        raise ValueError(f"the question {again} is there twice; drop one of the rows")
    kept = restore(path, made_by)
    for arm in arms:
        mine = [q for q in questions if is_asked(ARMS[arm], q)]
        done = {n for n, q in enumerate(mine) if key_of({**q, "model": arm}) in kept}
        if len(done) == len(mine):
            continue
        with use_model(model, ARMS[arm].model) as chosen:
            for batch in answer_batches(
                chosen,
                tokenizer,
                [messages_for(ARMS[arm], q["messages"]) for q in mine],
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                done=done,
                progress=ARMS[arm].label if progress else None,
            ):
                for place, answer in batch.items():
                    row = {k: v for k, v in mine[place].items() if k != "messages"}
                    row |= {"model": arm, **answer, "made_by": made_by[arm]}
                    results.append_line(path, row)
                    kept[key_of(row)] = row
    return [kept[key] for key in wanted]


def without_model(
    answers: Sequence[Mapping],
    train: Sequence[Mapping],
    test: Sequence[Mapping],
    seed: int,
) -> list[dict]:
    """The baselines' answers to the first-aid questions as they stand in the data.

    Args:
        answers: of the base, as `collect` gives them; the others are passed over.
        train: the training rows, whose answers are lent.
        test: the test rows that the answers belong to.
        seed: of the random training answer.

    Returns:
        Rows like those of `answers`, for the arms nearest, echo and random.
    """
    nearest, _ = nearest_rows(train, test)
    drawn = np.random.default_rng(seed).integers(0, len(train), len(test))
    lent = {
        row["question"]: {
            "nearest": train[i]["answer"],
            "echo": row["question"],
            "random": train[j]["answer"],
        }
        for row, i, j in zip(test, nearest, drawn)
    }
    plain = {"tokens": None, "hit_cap": False, "seconds": 0, "made_by": "no model"}
    return [
        {**row, **plain, "model": arm, "answer": text}
        for row in answers
        if (row["model"], row["dataset"], row["phrasing"])
        == ("base", "first_aid", "original")
        for arm, text in lent[row["question"]].items()
    ]


def _asked(arms: Sequence[str], questions: Sequence[Mapping]):
    """Each arm with each question that is put to it, in order."""
    return [(arm, q) for arm in arms for q in questions if is_asked(ARMS[arm], q)]


def key_of(row: Mapping) -> tuple[str, ...]:
    """What tells an answer from every other one."""
    return tuple(row[name] for name in KEY)


def restore(path: Path, made_by: Mapping[str, str]) -> dict[tuple[str, ...], dict]:
    """The answers that an earlier run of the same identity left, by their key.

    A last line that a kill cut short is dropped; answers that another base, adapter,
    split or cap made go to `answers_of_another_run.jsonl` beside it. Both are said.
    The answers of arms without a model are dropped: they cost nothing to make.

    Raises:
        ValueError: another line is broken, lacks something or repeats an answer; the
            message names file and line.
    """
    if not path.is_file():
        return {}
    # As bytes: a kill may cut a letter in two. Not `splitlines`, which would also cut
    # at characters that an answer may hold.
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        print(f"note: the last line of {display_path(path)} was cut short; dropped")
    kept: dict[tuple[str, ...], dict] = {}
    stale = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line, path, number)
        arm = ARMS.get(row.get("model"))
        if arm is not None and arm.model is None:
            continue
        if arm is None or row.get("made_by") != made_by.get(arm.key):
            stale.append(row)
            continue
        if missing := [name for name in WANTED if name not in row]:
            raise _broken(path, number, f"lacks {', '.join(missing)}")
        if key_of(row) in kept:
            raise _broken(path, number, f"repeats the answer {key_of(row)}")
        kept[key_of(row)] = row
    if stale:
        aside = path.with_name(ASIDE)
        results.write_lines(aside, stale)
        print(
            f"note: {len(stale):,} answers in {display_path(path)} were made by "
            f"another base, adapter, split or cap; moved to {aside.name}, not used"
        )
    results.write_lines(path, list(kept.values()))
    return kept


def _parse(line: bytes, path: Path, number: int) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:  # no JSON, or no UTF-8
        raise _broken(path, number, f"cannot be read ({error})") from error
    if not isinstance(row, dict):
        raise _broken(path, number, f"holds {line[:40]!r}, not an answer")
    return row


def _broken(path: Path, number: int, what: str) -> ValueError:
    return ValueError(
        f"{display_path(path)}, line {number}: {what}. Delete that line and run the "
        "cell again; it makes what is missing."
    )


def _digest(*parts) -> str:
    """Twelve hexadecimal digits of what JSON makes of `parts`."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
