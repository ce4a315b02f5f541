"""The folder of a run: what it starts from, what it leaves, and what must not be overwritten.

    adapter_model.safetensors, adapter_config.json    the adapter, as peft reads it
    recipe.yaml                                       every value that was used
    training.json                                     base, data, prompt, versions, measures; written last
    README.md                                         the model card
    loss.jsonl, loss.png                              the loss curve
    started.json, checkpoints/                        while the run goes on

A folder may be published, so none of its files names a folder of this machine.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from parrot_edge.errors import OutputError, UsageError
from parrot_edge.recipe import TrainRecipe, dump_recipe
from parrot_edge.store import parse_json, write_json
from parrot_edge.train.card import draw_curve, write_card


class RunFolder:
    """The output folder of one run; several processes may share it, and the first one writes."""

    def __init__(self, path: str | Path, *, resume: bool = False, force: bool = False) -> None:
        """Raises `OutputError` where the folder exists and neither option says what to do with it."""
        self.path = Path(path)
        self.resume, self.force = resume, force
        self.writes = os.environ.get("RANK", "0") == "0"  # set by `accelerate launch`
        if resume and force:
            raise UsageError("--resume goes on with a folder and --force replaces it; choose one")
        if not self.writes or force or not self.path.exists():
            return
        if not resume:
            raise OutputError(
                f"{self.path} exists; choose another, pass --force to replace it or --resume to go on"
            )
        if not self._started.is_file() and self.finished() is None:
            raise OutputError(f"{self.path} holds no run to go on with; choose another folder")

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def curve(self) -> Path:
        """The loss curve."""
        return self.path / "loss.jsonl"

    @property
    def _started(self) -> Path:
        return self.path / "started.json"

    def finished(self) -> dict[str, Any] | None:
        """What `training.json` holds if the run to be resumed came to its end, else None.

        Raises `OutputError` where it is damaged.
        """
        done = self.path / "training.json"
        if not (self.resume and done.is_file()):
            return None
        try:
            record: dict[str, Any] = parse_json(done)
        except (OSError, ValueError) as error:
            raise OutputError(f"{done} cannot be read: {_reason(error)}; start anew with --force") from None
        return record

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint; whatever has its name is whole."""
        found = list_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def start(self, recipe: TrainRecipe, record: dict[str, Any]) -> None:
        """Make the folder and note what the run starts from.

        Raises `OutputError` where a resumed run was started from something else.
        """
        if not self.writes:
            return
        try:
            if self.force:
                shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True, exist_ok=self.resume)
            if self._started.is_file():
                earlier = parse_json(self._started)
                now = json.loads(json.dumps(record))
                for part in ("recipe", "base", "data"):
                    if earlier[part] != now[part]:
                        raise OutputError(
                            f"{self.path} was started with another {part}"
                            f"{_difference(earlier[part], now[part])}; give --resume the same, or start anew "
                            "with --force"
                        )
            (self.path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
            write_json(self._started, record)
        except (OSError, ValueError) as error:
            raise OutputError(f"{self.path} cannot be written: {_reason(error)}") from None

    def finish(self, recipe: TrainRecipe, record: dict[str, Any], save: Callable[[Path], None]) -> None:
        """Write what a run leaves; `save` writes the adapter into the folder it is given.

        Raises `OutputError` where that fails; the checkpoints stay then.
        """
        from safetensors import SafetensorError

        if not self.writes:
            return
        aside = self.path / "unfinished"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            save(aside)
            write_card(aside / "README.md", recipe, record)
            draw_curve(self.curve, aside / "loss.png")
            for path in sorted(aside.iterdir()):
                os.replace(path, self.path / path.name)
            aside.rmdir()
            write_json(self.path / "training.json", record)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise OutputError(
                f"{self.path} cannot be written: {_reason(error)}; {self.kept()}, mend the cause and go on "
                "with --resume"
            ) from None
        self._started.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def kept(self) -> str:
        """Which checkpoint a failed run can go on from, as part of a sentence."""
        last = self.last_checkpoint()
        return f"{last.name} is whole" if last else "no checkpoint was saved yet"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder by their step, the newest last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """After which step a checkpoint was saved.

    >>> checkpoint_step(Path("run/checkpoints/checkpoint-50"))
    50
    """
    return int(path.name.partition("-")[2])


def hide_folders(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe as it is written beside the adapter: files without the folders they lie in."""
    sources = tuple(_short(name) for name in recipe.data.sources)
    base = replace(recipe.base, name=_short(recipe.base.name), adapter=_short(recipe.base.adapter))
    return replace(recipe, data=replace(recipe.data, sources=sources), base=base)


def _short(name: str) -> str:
    """A file without its folder; a hub name as it is."""
    return Path(name).name if os.path.exists(name) else name


def _difference(one: Any, other: Any) -> str:
    """The first key at which two records part, as a hint."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return ""
    for key, value in one.items():
        if value != other.get(key):
            inner = _difference(value, other.get(key))
            return f" ({key}.{inner[2:-1]})" if inner else f" ({key})"
    return ""


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]
