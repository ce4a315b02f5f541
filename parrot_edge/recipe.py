"""Recipes: what a run is to do, as a YAML file over typed defaults.

The defaults live here, once, in frozen dataclasses; a recipe file holds what differs from them,
`--set section.key=value` what differs from the file. Shipped recipes lie in the top-level folder
`recipes/`, which an installation holds as the package `parrot_edge.recipes`; the first line of each
is a comment with the command that runs it, the second says what it is for.

It knows nothing of torch; `train` does what a recipe says. `KINDS` names the kinds of recipe there
are: a new one is one more dataclass.
"""

from __future__ import annotations

import difflib
import importlib.resources
import math
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from parrot_edge.errors import InputError, UsageError, shorten
from parrot_edge.jsonl import is_unicode
from parrot_edge.store import new_file

if TYPE_CHECKING:
    from importlib.abc import Traversable

_MOST_BYTES = 2**20


def _number(default: float, low: float, high: float = float("inf")) -> Any:
    """A field for a number within `low..high`."""
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class BaseOptions:
    """The model that is trained.

    name           `smollm2` (the embedded file), a GGUF file, a folder, or a hub name
    revision       branch, tag or commit of a hub name
    adapter        folder of an adapter to go on from, or ""
    quantization   "nf4": 4 bits, double quantised; "none": as it is (a GGUF is dequantised)
    dtype          of the computation; "auto" is bfloat16 where the hardware has it, else float32
    chat_template  Jinja text, or a file with it, in place of the tokenizer's own; "" keeps that
    attention      "segments": causal attention within each dialogue of a packed row, and nothing
                   computed across; "sdpa" or "eager": transformers' own, with a mask
    """

    name: str = "smollm2"
    revision: str = "main"
    adapter: str = ""
    quantization: Literal["nf4", "none"] = "none"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    chat_template: str = ""
    attention: Literal["segments", "sdpa", "eager"] = "segments"


@dataclass(frozen=True)
class DataOptions:
    """The dialogues and how they become rows of tokens.

    sources      JSON Lines files, or `hf:owner/name[:split]` of the hub
    system       system text: "row" (the dialogue's own, else the template's default), "template"
                 (always its default), "text" (`system_text`), or "none"
    system_text  the text for `system: text`
    learn_end    whether Ask learns to end: "auto" where a dialogue really ended, "always", "never"
    max_length   longest row in tokens; a longer dialogue goes on in further rows
    shorten      words that the other side's turns keep, two thirds of them from the start and the rest
                 from the end; 0 keeps all
    turn_tokens  tokens that a turn of the role itself keeps; of a longer one the rest is left out, and its
                 end is not learned; 0 keeps all
    batching     "packed": rows share a longer one; "bucketed": rows of like length together; "plain"
    min_targets  a row with fewer target tokens than this is left out
    held_out     share of the dialogues (of the trees) that is kept back for measuring, 0..0.9
    bad_rows     what a row that cannot be used does: "refuse" the run, or "skip" (and be counted)
    limit        use at most so many dialogues; 0 is all
    """

    sources: tuple[str, ...] = ()
    system: Literal["row", "template", "text", "none"] = "row"
    system_text: str = ""
    learn_end: Literal["auto", "always", "never"] = "auto"
    max_length: int = _number(2048, 64)
    shorten: int = _number(0, 0)
    turn_tokens: int = _number(0, 0)
    batching: Literal["packed", "bucketed", "plain"] = "packed"
    min_targets: int = _number(1, 1)
    held_out: float = _number(0.05, 0, 0.9)
    bad_rows: Literal["refuse", "skip"] = "refuse"
    limit: int = _number(0, 0)


@dataclass(frozen=True)
class LoraOptions:
    """The adapter: W + alpha/rank * B A, arXiv 2106.09685.

    targets    names of the layers that get one; "all-linear" is every linear layer but the head
    layers     only the last so many blocks get one (backpropagation stops below them); 0 is all
    activated  the base alone reads what was said before, the adapter only writes the role's turns
               (activated LoRA, arXiv 2504.12397): roles can share a cache, and training is faster
    """

    rank: int = _number(16, 1, 1024)
    alpha: int = _number(32, 1)
    dropout: float = _number(0.0, 0, 0.9)
    targets: tuple[str, ...] = ("all-linear",)
    layers: int = _number(0, 0)
    activated: bool = False


@dataclass(frozen=True)
class OptimOptions:
    """How the adapter is fitted.

    epochs         passes over the rows; may be a fraction
    max_steps      end after so many updates; 0 is after `epochs`
    batch_size     rows per update, over all devices (a packed row counts as one)
    micro_batch    rows on one device at once
    learning_rate  its peak
    warmup_epochs  part of an epoch over which it rises from 0
    name           "auto" is paged 8-bit AdamW on a GPU, AdamW elsewhere
    checkpointing  recompute activations in the backward pass: less memory, a third slower
    """

    epochs: float = _number(3.0, 0.0)
    max_steps: int = _number(0, 0)
    batch_size: int = _number(32, 1)
    micro_batch: int = _number(1, 1)
    learning_rate: float = _number(2e-4, 0, 1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_epochs: float = _number(0.1, 0)
    weight_decay: float = _number(0.0, 0)
    max_grad_norm: float = _number(1.0, 0)
    name: Literal["auto", "adamw", "paged_adamw_8bit", "paged_adamw_32bit"] = "auto"
    checkpointing: bool = True


@dataclass(frozen=True)
class DpoOptions:
    """Direct preference optimisation, arXiv 2305.18290; used where `objective` is "dpo"."""

    beta: float = _number(0.1, 0)


@dataclass(frozen=True)
class RunOptions:
    """The run around it.

    device       "gpu" refuses to start without one; "auto" takes one where there is one
    save_steps   updates between checkpoints; a killed run loses at most these
    log_steps    updates between two lines of the loss curve
    eval_tokens  measure on about so many held-out tokens; 0 is all of them
    report_to    experiment trackers as transformers names them
    """

    seed: int = _number(0, 0, 2**32 - 1)
    device: Literal["auto", "gpu", "cpu"] = "auto"
    save_steps: int = _number(50, 1)
    log_steps: int = _number(1, 1)
    eval_tokens: int = _number(0, 0)
    report_to: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainRecipe:
    """A LoRA adapter for one role: `kind: train`.

    role       whose turns are learned: "ask" (the user's) or "chat" (the assistant's)
    objective  "sft": the role's tokens; "dpo": preference pairs (the assistant's answers)
    license    licence of the adapter, as the card is to name it
    """

    role: Literal["ask", "chat"]
    kind: str = "train"
    name: str = ""
    objective: Literal["sft", "dpo"] = "sft"
    license: str = ""
    base: BaseOptions = field(default_factory=BaseOptions)
    data: DataOptions = field(default_factory=DataOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    dpo: DpoOptions = field(default_factory=DpoOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        if self.optim.batch_size % self.optim.micro_batch:
            raise ValueError(
                f"optim.batch_size {self.optim.batch_size} is no multiple of optim.micro_batch "
                f"{self.optim.micro_batch}"
            )
        if self.objective == "dpo" and self.role != "chat":
            raise ValueError("objective 'dpo' prefers answers, so its role is 'chat'")
        if self.lora.activated and (
            self.objective != "sft" or self.base.attention != "segments" or self.optim.checkpointing
        ):
            raise ValueError(
                "lora.activated goes with objective 'sft', base.attention 'segments' and "
                "optim.checkpointing false"
            )
        if (self.data.system == "text") != bool(self.data.system_text):
            raise ValueError("data.system_text and data.system 'text' belong together")
        if not self.optim.epochs and not self.optim.max_steps:
            raise ValueError("optim.epochs and optim.max_steps are both 0; there is nothing to do")


@dataclass(frozen=True)
class DialectNetwork:
    """The network that hears a dialect; see `parrot_edge.dialect.network` for its parts.

    architecture    "dms": dynamic multi-scale convolution; "xvector" and "ecapa": baselines
    channels        of the stem ("dms"), or of every layer
    stride          of the stem in frames of 10 ms; 2 halves the work of all that follows
    blocks          dense layers of each block
    dilations       of each block's layers
    growth          channels that a dense layer adds
    bottleneck      channels within a dense layer
    branches        dilations of the branches among which dynamic kernel convolution chooses, as factors of
                    the block's own
    dynamic_kernel  whether there are branches; else one convolution
    local_scales    parts into which a branch splits its channels (local multi-scale learning); 1 is off
    global_pooling  statistics of the stem and of every block; else of the last block alone
    embedding       size of the embedding
    """

    architecture: Literal["dms", "xvector", "ecapa"] = "dms"
    channels: int = _number(128, 8, 4096)
    stride: int = _number(1, 1, 4)
    blocks: tuple[int, ...] = (6, 12)
    dilations: tuple[int, ...] = (1, 3)
    growth: int = _number(64, 4, 1024)
    bottleneck: int = _number(128, 8, 4096)
    branches: tuple[int, ...] = (1, 2)
    dynamic_kernel: bool = True
    local_scales: int = _number(4, 1, 16)
    global_pooling: bool = True
    embedding: int = _number(256, 8, 4096)


@dataclass(frozen=True)
class DialectData:
    """The recordings; see `parrot_edge.dialect.corpus` for the forms they may have.

    sources           manifests, tables, folders
    held_out_from     the same for what is measured on, in place of a share
    held_out          share of each label that is kept back, by whole speakers
    held_out_sources  hold back these `source`s of the manifests, in place of a share
    label_column      the label of a Common Voice table
    seconds           longest stretch that is trained on at once; a shorter recording is taken whole
    min_seconds       the shortest stretch of a batch is drawn between this and `seconds`
    bad_rows          what a recording that cannot be used does: "refuse" the run, or "skip" (and be counted)
    cache             folder for features, or "" for the user's cache
    """

    sources: tuple[str, ...] = ()
    held_out_from: tuple[str, ...] = ()
    held_out: float = _number(0.2, 0.01, 0.9)
    held_out_sources: tuple[str, ...] = ()
    label_column: str = "accents"
    seconds: float = _number(3.0, 0.5, 60)
    min_seconds: float = _number(1.5, 0.3, 60)
    bad_rows: Literal["refuse", "skip"] = "refuse"
    cache: str = ""


@dataclass(frozen=True)
class DialectAugment:
    """What is done to the sound; of each recording there are `copies` altered ones beside the clean one.

    speed           factors, one of which is drawn for a copy
    volume          most decibels up or down
    noise           share of the copies with noise, at 5 to 25 dB
    reverberation   share of the copies in a room
    codec           share of the copies through a telephone or an mp3
    masks           stretches of frequency and of time that are blanked in the features
    """

    copies: int = _number(2, 0, 20)
    speed: tuple[float, ...] = (0.9, 1.0, 1.1)
    volume: float = _number(6.0, 0, 30)
    noise: float = _number(0.5, 0, 1)
    reverberation: float = _number(0.3, 0, 1)
    codec: float = _number(0.2, 0, 1)
    masks: int = _number(1, 0, 10)


@dataclass(frozen=True)
class DialectOptim:
    """How the network is fitted: AdamW, one cycle of the learning rate, AM-softmax (arXiv 1801.05599).

    balance    what levels labels of different size: "draw" their recordings as often as others', and those of
               each source as often within a label, "weigh" their losses, or "none"
    margin     of AM-softmax, reached after half of the run
    scale      of AM-softmax
    patience   end after so many epochs without a better held-out figure
    """

    epochs: int = _number(30, 1)
    batch_size: int = _number(32, 2)
    learning_rate: float = _number(2e-3, 0, 1)
    weight_decay: float = _number(0.05, 0)
    max_grad_norm: float = _number(5.0, 0)
    balance: Literal["draw", "weigh", "none"] = "draw"
    margin: float = _number(0.1, 0, 0.9)
    scale: float = _number(15.0, 1)
    patience: int = _number(8, 1)


@dataclass(frozen=True)
class DialectRun:
    """The run around it; `threads` 0 leaves the choice to torch."""

    seed: int = _number(0, 0, 2**32 - 1)
    device: Literal["auto", "gpu", "cpu"] = "auto"
    threads: int = _number(0, 0)


@dataclass(frozen=True)
class DialectRecipe:
    """A network that tells dialects apart: `kind: dialect`."""

    kind: str = "dialect"
    name: str = ""
    license: str = ""
    network: DialectNetwork = field(default_factory=DialectNetwork)
    data: DialectData = field(default_factory=DialectData)
    augment: DialectAugment = field(default_factory=DialectAugment)
    optim: DialectOptim = field(default_factory=DialectOptim)
    run: DialectRun = field(default_factory=DialectRun)

    def __post_init__(self) -> None:
        net, data = self.network, self.data
        if not net.blocks or len(net.blocks) != len(net.dilations):
            raise ValueError("network.blocks and network.dilations must name the same number of blocks")
        if min((*net.blocks, *net.dilations, *net.branches), default=0) < 1:
            raise ValueError("network.blocks, dilations and branches must be 1 or more")
        if net.growth % net.local_scales or net.bottleneck % net.local_scales:
            raise ValueError(f"network.local_scales {net.local_scales} must divide growth and bottleneck")
        if data.min_seconds > data.seconds:
            raise ValueError("data.min_seconds is more than data.seconds")
        if data.held_out_from and data.held_out_sources:
            raise ValueError("data.held_out_from and data.held_out_sources exclude each other")
        if not all(0.5 <= factor <= 2 for factor in self.augment.speed) or not self.augment.speed:
            raise ValueError("augment.speed takes factors of 0.5 to 2")


KINDS: dict[str, type] = {"train": TrainRecipe, "dialect": DialectRecipe}
"""The dataclass behind each value of `kind`."""


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as it is written: its name, its text, and what the comment on top says."""

    name: str
    text: str
    path: str

    @property
    def command(self) -> str:
        """The command that runs it, from the first line."""
        return self.text.partition("\n")[0].lstrip("# ").rstrip()

    @property
    def summary(self) -> str:
        """What it is for, from the second line."""
        return self.text.split("\n", 2)[1].lstrip("# ").rstrip() if "\n" in self.text else ""


def list_recipes() -> list[RecipeFile]:
    """The shipped recipes by name."""
    files = (item for item in _folder().iterdir() if item.name.endswith(".yaml"))
    return sorted((_read(item) for item in files), key=lambda recipe: recipe.name)


def find_recipe(name: str | Path) -> RecipeFile:
    """A shipped recipe by its name, or any recipe by its path.

    Raises `UsageError` where there is none, naming the nearest, and `InputError` for a file that
    cannot be read.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.parent != Path():
        return _read(path)
    shipped = {recipe.name: recipe for recipe in list_recipes()}
    if str(name) not in shipped:
        hint = _nearest(str(name), shipped)
        raise UsageError(f"no recipe is named {str(name)!r}{hint}; `parrot recipes list` shows all")
    return shipped[str(name)]


def load_recipe(name: str | Path, overrides: Iterable[str] = ()) -> Any:
    """The recipe's dataclass, with `overrides` of the form `section.key=value` laid over the file.

    Raises `InputError` for a file with an unknown key or a wrong value, `UsageError` for such an
    override; both name the key, and the nearest one that is known.
    """
    file = find_recipe(name)
    try:
        values = _parse_yaml(file.text)
        kind = values.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"kind is {shorten(kind)}; use one of {', '.join(KINDS)}")
        flat = dict(_flatten(values, _keys(KINDS[kind])))
        flat.setdefault("name", file.name)
        recipe = _build(KINDS[kind], flat)
    except ValueError as error:
        raise InputError(str(error), source=file.path) from None
    override = ""
    try:
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals or not is_unicode(override):
                raise ValueError("write section.key=value")
            flat |= _flatten({key.strip(): _from_text(text)}, _keys(KINDS[kind]))
        return _build(KINDS[kind], flat) if override else recipe
    except ValueError as error:
        raise UsageError(f"--set {override[:100]}: {error}") from None


def copy_recipe(name: str, target: str | Path, *, force: bool = False) -> Path:
    """Write a shipped recipe to a file of one's own (or into a folder); refuses an existing file."""
    recipe, path = find_recipe(name), Path(target)
    if path.is_dir():
        path = path / f"{recipe.name}.yaml"
    with new_file(path, force=force) as draft:
        draft.write_text(recipe.text, encoding="utf-8")
    return path


def dump_recipe(recipe: Any) -> str:
    """A recipe with all its values, defaults too, as YAML that `load_recipe` reads back."""
    import yaml

    plain = {
        key: {name: list(item) if isinstance(item, tuple) else item for name, item in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in asdict(recipe).items()
    }
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _folder() -> Traversable:
    """Where the shipped recipes lie: the installed package, else the checkout's folder."""
    try:
        return importlib.resources.files("parrot_edge.recipes")
    except ModuleNotFoundError:
        return Path(__file__).parent.parent / "recipes"


def _read(path: Traversable) -> RecipeFile:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise InputError(f"is longer than {_MOST_BYTES // 2**20} MiB, so no recipe", source=str(path))
        return RecipeFile(path.name.rpartition(".")[0], data.decode("utf-8"), str(path))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", source=str(path)) from None
    except UnicodeDecodeError:
        raise InputError("is not valid UTF-8", source=str(path)) from None


def _parse_yaml(text: str) -> dict[str, Any]:
    """A YAML mapping; raises `ValueError`, also for a key that stands twice and for aliases."""
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _check_nodes(node)
        values = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "damaged"
        raise ValueError(f"is not YAML{place}: {reason}") from None
    except RecursionError:
        raise ValueError("nests too deep; flatten it") from None
    except (LookupError, AttributeError, TypeError, ArithmeticError):  # a tag such as !!int before a text
        raise ValueError("has a value that is not of the type in its tag; leave the tag out") from None
    if not isinstance(values, dict):
        raise ValueError("holds no keys")
    return values


def _check_nodes(root: Any) -> None:
    """Refuse keys that stand twice, halves of surrogate pairs, and aliases: a few lines of those can stand
    for more than fits into memory."""
    nodes, seen = [root] if root is not None else [], set()
    while nodes:
        node = nodes.pop()
        line = node.start_mark.line + 1
        if id(node) in seen:
            raise ValueError(f"repeats the value of line {line} by an alias; write it out")
        seen.add(id(node))
        if node.id == "scalar":
            if not is_unicode(node.value):
                raise ValueError(f"holds half of a surrogate pair in line {line}; mend the escape")
        elif node.id == "sequence":
            nodes += node.value
        else:
            names = Counter(key.value for key, _ in node.value if key.id == "scalar")
            for name, number in names.items():
                if number > 1:
                    raise ValueError(f"{shorten(name)} stands twice")
            nodes += [part for pair in node.value for part in pair]


def _keys(kind: type, prefix: str = "") -> dict[str, Any]:
    """Every key of a recipe with its field, sections flattened: `{"lora.rank": Field, ...}`."""
    hints = typing.get_type_hints(kind)
    found: dict[str, Any] = {}
    for item in fields(kind):
        if is_dataclass(hints[item.name]):
            found |= _keys(hints[item.name], f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = (hints[item.name], item)
    return found


def _flatten(values: Mapping[Any, Any], keys: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of key and typed value; raises `ValueError` naming the key."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if any(known.startswith(f"{key}.") for known in keys):
            if not isinstance(value, Mapping):
                raise ValueError(f"{key} is a section and takes keys, not {shorten(value)}")
            yield from _flatten(value, keys, f"{key}.")
        elif key not in keys:
            raise ValueError(f"there is no key {shorten(key)}{_nearest(key, keys)}")
        else:
            yield key, _convert(key, value, *keys[key])


def _convert(key: str, value: Any, hint: Any, item: Any) -> Any:
    """A value in the field's type, or `ValueError`; whole numbers serve where floats are due."""
    if typing.get_origin(hint) is Literal:
        # YAML 1.1 reads a bare `none` as text, but `no` and `off` as false
        if value not in typing.get_args(hint):
            known = ", ".join(map(str, typing.get_args(hint)))
            raise ValueError(f"{key} is {shorten(value)}; use one of {known}")
        return value
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list) or (kind is str and not all(isinstance(part, str) for part in parts)):
            raise ValueError(f"{key} is {shorten(value)}; it takes a list of {_LIST_NAMES[kind]}")
        if kind is not str:
            return tuple(_number_of(key, part, kind) for part in parts)
        return tuple(part.strip() for part in parts if part.strip())
    if hint in (int, float):
        value = _number_of(key, value, hint)
        low, high = item.metadata.get("range", (-float("inf"), float("inf")))
        if not low <= value <= high:
            bounds = f"at least {low:g}" if high == float("inf") else f"{low:g} to {high:g}"
            raise ValueError(f"{key} is {shorten(value)}; it must be {bounds}")
        return value
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, hint):
        raise ValueError(f"{key} is {shorten(value)}; it takes {_TYPE_NAMES[hint]}")
    return value


_LIST_NAMES = {str: "texts", int: "whole numbers", float: "numbers"}
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _number_of(key: str, value: Any, hint: type) -> Any:
    try:
        if isinstance(value, bool) or (hint is int and isinstance(value, float) and value % 1):
            raise ValueError
        number = hint(value)  # YAML 1.1 reads 3e-5 as text: a float must have a point
        if not math.isfinite(number):
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{key} is {shorten(value)}; it takes {_TYPE_NAMES[hint]}") from None


def _from_text(text: str) -> Any:
    """The text behind `--set key=`: as it is, but true and false."""
    return {"true": True, "false": False}.get(text.strip().lower(), text.strip())


def _build(kind: type, flat: dict[str, Any], prefix: str = "") -> Any:
    """The dataclass from flat keys; raises `ValueError` for a key without a default that is missing."""
    hints, values = typing.get_type_hints(kind), {}
    for item in fields(kind):
        key = prefix + item.name
        if is_dataclass(hints[item.name]):
            values[item.name] = _build(typing.cast(type, hints[item.name]), flat, f"{key}.")
        elif key in flat:
            values[item.name] = flat[key]
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{key} is missing")
    return kind(**values)


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest known name, by the whole key or its last part."""
    known, name = list(known), name[:100]
    ends = {key.rpartition(".")[2]: key for key in known}
    last = name.rpartition(".")[2]
    close = difflib.get_close_matches(name, known, n=1) or [
        ends[end] for end in difflib.get_close_matches(last, ends, n=1)
    ]
    return f"; the nearest is {close[0]!r}" if close else ""
