"""Paths, seed, the three models and the run profiles: the ground floor of the house.

Every knob is an environment variable that is read here and nowhere else. Relative
paths mean "relative to the project root", whichever folder a kernel started in.
"""

import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
RUNS = DATA / "runs"
IMAGES = ROOT / "imgs"
SAMPLES = DATA / "samples"
POCKET = DATA / "pocket_llama"

OLDEST_PYTHON = (3, 11)
ENGINES = ("transformers", "openvino")  # what a machine's own answers are made with
LOCAL_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")

REPORT_QUESTIONS = (
    "How can you ensure you're performing CPR with the correct compression depth?",
    "What actions should I avoid if the stroke victim begins to have a seizure?",
    "Should I try to push a dislocated finger back into place?",
)

SAFETY_NOTICE = (
    "Not medical advice. In an emergency, call your local emergency number first "
    "(112, 911, 999, 000 …). These models make mistakes."
)


@dataclass(frozen=True)
class ModelIdentity:
    """How one model is called and drawn, in every figure and in the chat."""

    key: str
    label: str
    about: str
    colour: str
    linestyle: str
    marker: str
    hatch: str


MODELS = {
    "base": ModelIdentity(
        "base",
        "Base",
        "the model before fine-tuning: both adapters off",
        "#666666",
        "--",
        "o",
        "//",
    ),
    "finetome": ModelIdentity(
        "finetome",
        "FineTome",
        "the base with the adapter tuned on general conversations",
        "#0072B2",
        "-.",
        "s",
        "..",
    ),
    "first_aid": ModelIdentity(
        "first_aid",
        "FirstAidQA",
        "the base with the adapter tuned on first-aid questions and answers",
        "#D55E00",
        "-",
        "^",
        "",
    ),
}


@dataclass(frozen=True)
class Profile:
    """What is trained; never on what hardware, which is recorded on its own."""

    name: str
    base_model: str
    first_aid: str
    finetome: str
    finetome_rows: int | None
    context_length: int
    max_new_tokens: int


PROFILES = {
    "pocket": Profile(
        name="pocket",
        base_model="data/pocket_llama",
        first_aid="data/samples/first_aid.jsonl",
        finetome="data/samples/general.jsonl",
        finetome_rows=None,
        context_length=512,
        max_new_tokens=160,
    ),
    "llama_1b": Profile(
        name="llama_1b",
        # The ungated mirror of meta-llama/Llama-3.2-1B-Instruct: needs no token.
        base_model="unsloth/Llama-3.2-1B-Instruct",
        first_aid="i-am-mushfiq/FirstAidQA",
        finetome="mlabonne/FineTome-100k",
        finetome_rows=10_000,
        context_length=2048,
        max_new_tokens=256,
    ),
}


@dataclass(frozen=True)
class Settings:
    """One run: its profile and every knob after the environment has spoken."""

    profile: str
    base_model: str
    first_aid_dataset: str
    finetome_dataset: str
    finetome_rows: int | None
    context_length: int
    max_new_tokens: int
    max_steps: int | None
    load_in_4bit: bool
    quick: bool
    seed: int
    run_dir: Path
    figures_dir: Path
    overrides: dict[str, str] = field(default_factory=dict)

    @property
    def is_default(self) -> bool:
        """True when data and base are the profile's own."""
        own = PROFILES[self.profile]
        return (self.base_model, self.first_aid_dataset, self.finetome_dataset) == (
            own.base_model,
            own.first_aid,
            own.finetome,
        )

    def unquantised(self) -> "Settings":
        """The same run with its base in full precision."""
        return replace(self, load_in_4bit=False)

    def show(self) -> None:
        """Print the run's profile and knobs, naming those that were overridden."""
        steps = self.max_steps or "as many as the epochs take"
        rows = self.finetome_rows or "all"
        for label, value in (
            ("profile", self.profile),
            ("base model", self.base_model),
            ("first-aid data", self.first_aid_dataset),
            ("FineTome data", f"{self.finetome_dataset} (rows: {rows})"),
            ("optimizer steps", steps),
            ("weights", "4-bit NF4" if self.load_in_4bit else "not quantised"),
            ("quick look", "yes: a part of the rows" if self.quick else "no"),
            ("run folder", display_path(self.run_dir)),
            ("figures", display_path(self.figures_dir)),
            ("overridden", ", ".join(self.overrides) or "nothing"),
        ):
            print(f"{label:16} {value}")


def display_path(path: Path) -> str:
    """`path` relative to the project root where it lies inside, for outputs."""
    path = Path(path)
    if path.is_relative_to(ROOT):
        return path.relative_to(ROOT).as_posix()
    return f"…/{path.name}"


def is_local(source: str) -> bool:
    """Whether `source` means a file or folder here rather than a Hub id."""
    return (
        source.startswith((".", "/", "~"))
        or source.endswith(LOCAL_SUFFIXES)
        or resolve(source).exists()
    )


def resolve(path: str) -> Path:
    """`path` made absolute against the project root, `~` expanded."""
    return (ROOT / Path(path).expanduser()).resolve()


def choose_profile(environ: Mapping[str, str] = os.environ) -> str:
    """The profile that `PROFILE` names, or the one the hardware asks for.

    Raises:
        ValueError: `PROFILE` names no profile.
    """
    name = environ.get("PROFILE", "").strip()
    if not name:
        import torch  # slow to import, and only needed to look for a GPU

        return "llama_1b" if torch.cuda.is_available() else "pocket"
    if name not in PROFILES:
        known = " or ".join(f"PROFILE={key}" for key in PROFILES)
        raise ValueError(f"PROFILE={name!r} is no profile. Set {known}.")
    return name


def load_settings(
    environ: Mapping[str, str] = os.environ, runs: Path = RUNS
) -> Settings:
    """Read the run's settings from the environment; the only place that does.

    Variables, all optional: `PROFILE`, `BASE_MODEL`, `FIRST_AID_DATASET`,
    `FINETOME_DATASET`, `MAX_STEPS`, `SEED`, `LOAD_IN_4BIT`, `QUICK`, `RUN_DIR`.

    Args:
        environ: where the variables are looked up.
        runs: folder in which each run gets its own, unless `RUN_DIR` names one.

    Raises:
        ValueError: a variable holds something it cannot hold.
        FileNotFoundError: a local model or dataset is not there.
        RuntimeError: Python is older than 3.11.
    """
    if sys.version_info[:2] < OLDEST_PYTHON:
        version = ".".join(map(str, sys.version_info[:3]))
        raise RuntimeError(
            f"Python {version} is too old: this project needs 3.11 or newer. "
            "Try: make PYTHON=python3.12 run"
        )
    profile = PROFILES[choose_profile(environ)]
    names = {
        "BASE_MODEL": profile.base_model,
        "FIRST_AID_DATASET": profile.first_aid,
        "FINETOME_DATASET": profile.finetome,
    }
    overrides = {}
    chosen = {}
    for name, default in names.items():
        value = environ.get(name, "").strip() or default
        chosen[name] = value
        if value != default:
            overrides[name] = value
        if is_local(value) and not resolve(value).exists():
            raise FileNotFoundError(
                f"{name}={value}: there is no such file or folder. Paths are relative "
                f"to the project root; check the spelling, or unset {name} to use "
                f"{default}."
            )
    max_steps = _positive_int(environ, "MAX_STEPS")
    seed = _positive_int(environ, "SEED")
    four_bit, quick = (_switch(environ, name) for name in ("LOAD_IN_4BIT", "QUICK"))
    for name in ("MAX_STEPS", "SEED", "LOAD_IN_4BIT", "QUICK", "RUN_DIR"):
        if environ.get(name, "").strip():
            overrides[name] = environ[name].strip()

    own = [chosen[name] for name in names] == list(names.values())
    folder = profile.name
    if not own:
        folder += "-" + _fingerprint([_identity(chosen[name]) for name in names])
    if quick:
        folder += "-quick"
    run_dir = Path(runs) / folder
    if environ.get("RUN_DIR", "").strip():
        run_dir = resolve(environ["RUN_DIR"].strip())
    # Only the profile's own data in its own place may change the committed figures.
    at_home = own and run_dir == RUNS / profile.name
    return Settings(
        profile=profile.name,
        base_model=chosen["BASE_MODEL"],
        first_aid_dataset=chosen["FIRST_AID_DATASET"],
        finetome_dataset=chosen["FINETOME_DATASET"],
        finetome_rows=profile.finetome_rows,
        context_length=profile.context_length,
        max_new_tokens=profile.max_new_tokens,
        max_steps=max_steps,
        load_in_4bit=four_bit,
        quick=quick,
        seed=seed if seed is not None else 42,
        run_dir=run_dir,
        figures_dir=IMAGES if at_home else run_dir / "imgs",
        overrides=overrides,
    )


@dataclass(frozen=True)
class ChatSettings:
    """Where the chat's answers come from and where its votes go; no token is shown.

    `endpoint` serves the models called `model_names`; `adapters` are Hub ids or folders
    of adapters made elsewhere, `engine_model` is one of an exported base. Each is empty
    unless the environment names it.
    """

    endpoint: str = ""
    model_names: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    engine: str = ""
    engine_model: str = ""
    feedback_repo: str = ""
    on_space: bool = False
    login: bool = False
    token: str | None = field(default=None, repr=False)


def load_chat_settings(environ: Mapping[str, str] = os.environ) -> ChatSettings:
    """Read what only the chat needs from the environment.

    Variables, all optional: `MODEL_ENDPOINT`, `MODEL_NAMES`, `FIRST_AID_ADAPTER`,
    `FINETOME_ADAPTER`, `CHAT_ENGINE`, `ENGINE_MODEL`, `FEEDBACK_REPO`, `HF_TOKEN`; a
    Space sets `SPACE_ID` and, with `hf_oauth` in its front matter, `OAUTH_CLIENT_ID`.

    Raises:
        ValueError: a variable holds something it cannot hold.
    """

    def value(name: str) -> str:
        return environ.get(name, "").strip()

    endpoint = value("MODEL_ENDPOINT").rstrip("/").removesuffix("/v1")
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise ValueError(
            f"MODEL_ENDPOINT={endpoint!r} is no address. Name one like "
            "http://localhost:8000/v1."
        )
    names = {}
    for pair in value("MODEL_NAMES").split(",") if value("MODEL_NAMES") else ():
        key, _, name = (part.strip() for part in pair.partition("="))
        if key not in MODELS or not name:
            raise ValueError(
                f"MODEL_NAMES: {pair!r} is no model with its name there. Write "
                + ",".join(f"{key}=NAME" for key in MODELS)
            )
        names[key] = name
    adapters = {
        key: value(f"{key.upper()}_ADAPTER")
        for key in ("first_aid", "finetome")
        if value(f"{key.upper()}_ADAPTER")
    }
    if len(adapters) == 1:
        (there,) = adapters
        raise ValueError(
            f"{there.upper()}_ADAPTER is set alone. Set both FIRST_AID_ADAPTER and "
            "FINETOME_ADAPTER, or neither."
        )
    engine = value("CHAT_ENGINE").lower()
    if engine not in ("", *ENGINES):
        raise ValueError(f"CHAT_ENGINE={engine!r} must be {' or '.join(ENGINES)}.")
    repo = value("FEEDBACK_REPO")
    if repo and repo.count("/") != 1:
        raise ValueError(f"FEEDBACK_REPO={repo!r} must read owner/name.")
    on_space = bool(value("SPACE_ID"))
    return ChatSettings(
        endpoint=endpoint,
        model_names=names,
        adapters=adapters,
        engine=engine,
        engine_model=value("ENGINE_MODEL"),
        feedback_repo=repo,
        on_space=on_space,
        login=on_space and bool(value("OAUTH_CLIENT_ID")),
        token=value("HF_TOKEN") or None,
    )


def _switch(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").strip() or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{name}={value!r} must be 0 or 1.")
    return value == "1"


def _positive_int(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name, "").strip()
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    return int(value)


def _identity(source: str) -> str:
    """What `source` is by content, so that an edited file gets another run folder."""
    if not is_local(source):
        return source
    path = resolve(source)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*"))
    parts = []
    for file in files:
        if file.is_file() and (path.is_file() or file.stat().st_size < 1_000_000):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            parts.append(f"{file.name}:{digest}")
        elif file.is_file():  # gigabytes of weights: the size has to do
            parts.append(f"{file.name}:{file.stat().st_size}")
    return _fingerprint(parts)


def _fingerprint(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]
