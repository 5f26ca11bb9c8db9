"""Measures how audit and split scale, on generated rows shaped like FineTome's.

For 20,000 and 100,000 rows: seconds and peak memory of reading, splitting, auditing
and writing, each in a process of its own, and the share of planted near-duplicates
that came out in one group. From the first size to the last the cost grows like
rows^exponent; CPU seconds count, which other work on the machine disturbs least.
"""

import argparse
import json
import math
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from utils import results
from utils.config import POCKET, ROOT, SAMPLES
from utils.dataset import SPLITS, audit, split_rows, write_split
from utils.models import load_tokenizer
from utils.sources import load_source

SIZES = (20_000, 100_000)
PLANTED_SHARE = 0.02  # of the rows have a near-duplicate
VOCABULARY = 40_000
OPENINGS = (
    "Write a Python function that",
    "Explain in simple terms how",
    "Solve the following problem step by step:",
    "What is the difference between",
    "Given the following passage, answer the question:",
    "You are given a list of",
)


def vocabulary(rng: random.Random) -> tuple[list[str], list[float]]:
    """Words and their cumulative weights, which fall off by Zipf's law.

    The frequent ones are those of `data/samples/general.jsonl`; made-up ones follow.
    """
    text = (SAMPLES / "general.jsonl").read_text("utf-8").lower()
    words = [word for word, _ in Counter(re.findall(r"[a-z]{2,}", text)).most_common()]
    syllables = [a + b for a in "bcdfglmnprstv" for b in ("a", "en", "ir", "o", "us")]
    known = set(words)
    while len(words) < VOCABULARY:
        word = "".join(rng.choices(syllables, k=rng.randint(2, 4)))
        if word not in known:
            known.add(word)
            words.append(word)
    total, weights = 0.0, []
    for rank in range(len(words)):
        total += 1 / (rank + 3)
        weights.append(total)
    return words, weights


def conversations(size: int, seed: int = 1) -> Iterator[dict]:
    """`size` ShareGPT rows; the two rows of a planted pair share their `source`.

    Lengths are log-normal, as those of chats are: questions have 45 words in the
    median and 67 in the mean, answers 180 and 230; one row in seven has two turns.
    The second row of a pair has 2 to 20 % of the question's words replaced, dropped
    or swapped, and an answer of its own.
    """
    rng = random.Random(seed)
    words, weights = vocabulary(rng)

    def text(median: int, sigma: float) -> str:
        count = min(2000, max(6, round(rng.lognormvariate(math.log(median), sigma))))
        return " ".join(rng.choices(words, cum_weights=weights, k=count))

    def edited(question: str) -> str:
        parts = question.split()
        for _ in range(max(1, round(len(parts) * rng.uniform(0.02, 0.2)))):
            place = rng.randrange(len(parts) - 1)
            kind = rng.randrange(3)
            if kind == 0:
                parts[place] = rng.choice(words)
            elif kind == 1:
                parts[place], parts[place + 1] = parts[place + 1], parts[place]
            elif len(parts) > 5:
                del parts[place]
        return " ".join(parts)

    def row(question: str, source: str) -> dict:
        spoken = [question, text(180, 0.7)]
        if rng.random() < 1 / 7:
            spoken += [text(20, 0.6), text(180, 0.7)]
        turns = [
            {"from": ("human", "gpt")[n % 2], "value": t} for n, t in enumerate(spoken)
        ]
        return {"conversations": turns, "source": source}

    pairs = round(size * PLANTED_SHARE)
    for number in range(size - pairs):
        question = text(45, 0.9)
        if rng.random() < 0.3:
            question = f"{rng.choice(OPENINGS)} {question}"
        source = f"planted {number}" if number < pairs else "generated"
        yield row(question, source)
        if number < pairs:
            yield row(edited(question), source)


def measure(source: Path, out: Path) -> dict:
    """Read, split, audit and write `source` in this process, as the command does."""
    tokenizer = load_tokenizer(str(POCKET))
    began, busy = time.perf_counter(), time.process_time()
    loaded = load_source(str(source))
    split = split_rows(loaded)
    write_split(split, audit(loaded, split, tokenizer), out)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(busy, 1),
        "peak_memory_gb": round(peak, 2),
    }


def found_share(out: Path) -> dict:
    """How many planted pairs lie in `out`, and how many of them in one group."""
    groups = defaultdict(list)
    for name in SPLITS:
        for row in results.read_lines(out / f"{name}.jsonl"):
            if row["source"].startswith("planted"):
                groups[row["source"]].append(row["group"])
    found = sum(len(pair) == 2 and len(set(pair)) == 1 for pair in groups.values())
    return {"planted_pairs": len(groups), "found": round(found / len(groups), 4)}


def scaling(sizes: Sequence[int] = SIZES) -> dict:
    """Generate, measure and compare all `sizes`."""
    runs = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "rows.jsonl"
            with source.open("w", encoding="utf-8") as file:
                for row in tqdm(conversations(size), f"generate {size}", total=size):
                    file.write(json.dumps(row) + "\n")
            command = [sys.executable, "-m", "utils.benchmark_data", source]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
            measured = json.loads(done.stdout)
            runs.append({"rows": size} | measured | found_share(source.parent / "out"))
    first, last = runs[0], runs[-1]
    report = {"what": "read, split, audit and write generated conversations"}
    report["runs"] = runs
    if last["rows"] > first["rows"]:
        grown = math.log(last["cpu_seconds"] / first["cpu_seconds"])
        exponent = grown / math.log(last["rows"] / first["rows"])
        report["growth_exponent"] = round(exponent, 3)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """One size, in the process that `scaling` starts."""
    parser = argparse.ArgumentParser(prog="python -m utils.benchmark_data")
    parser.add_argument("source", type=Path, help="rows to measure")
    source = parser.parse_args(arguments).source
    print(json.dumps(measure(source, source.parent / "out")))


if __name__ == "__main__":
    main()
