"""trl's trainers, made to fit: rows laid end to end, whole checkpoints, a curve and an ETA.

This module imports torch, transformers and trl; `trainer` imports it when a run really starts.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Sampler
from trl import DPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from parrot_edge.errors import OutputError
from parrot_edge.jsonl import Appender, read_lines
from parrot_edge.train.data import CONTEXT, Row, find_active
from parrot_edge.train.output import list_checkpoints
from parrot_edge.train.plan import format_seconds

KEPT_CHECKPOINTS = 2
"""Checkpoints that stay while a run goes on."""


def to_record(pack: Sequence[Row], invocation: Sequence[int] = ()) -> dict[str, Any]:
    """A pack of rows as the dataset holds it: rows end to end, and their lengths.

    With the `invocation` of an activated adapter, `turns` tells where the adapter is at work: the
    start of its row, its own start and its end, all three as places in the line.
    """
    lengths = [len(row.input_ids) for row in pack]
    record: dict[str, Any] = {
        "input_ids": np.concatenate([row.input_ids for row in pack]),
        "labels": np.concatenate([row.labels for row in pack]),
        "segments": lengths,
    }
    if invocation:
        record["turns"] = [
            [opening, opening + start, opening + stop]
            for opening, row in zip(np.cumsum([0, *lengths[:-1]]).tolist(), pack, strict=True)
            for start, stop in find_active(row, invocation)
        ]
    return record


def lay_out(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch without padding: all rows of all packs in one line, each counting its positions from 0.

    input_ids, labels, position_ids: int64 (1, T); segments: the rows' lengths. transformers' own
    masks tell the rows apart by `position_ids`, `attend_segments` by `segments`.
    """
    segments = [length for record in records for length in record["segments"]]
    turns, start = [], 0
    for record in records:
        turns += [tuple(place + start for place in turn) for turn in record.get("turns", ())]
        start += len(record["input_ids"])
    line = {key: np.concatenate([record[key] for record in records]) for key in ("input_ids", "labels")}
    return {
        **{key: torch.from_numpy(tokens).long()[None] for key, tokens in line.items()},
        "position_ids": torch.cat([torch.arange(length) for length in segments])[None],
        "segments": segments,
        **({"turns": turns} if turns else {}),
    }


def sum_loss(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed negative log-likelihood of the batch's targets, in nats, and how many there are.

    Only where there is something to learn is a prediction made. trl does so on a GPU alone; elsewhere
    it would spend a third of the step of a small model on tokens that are context.
    """
    labels = batch["labels"]
    if labels.device.type == "cuda" and "turns" not in batch:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        scores = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs
        return -scores.sum(), (labels[:, 1:] != CONTEXT).sum()
    logits, targets = target_logits(model, batch)
    loss = nn.functional.cross_entropy(logits.float(), labels[0, targets], reduction="sum")
    return loss, torch.tensor(len(targets), device=labels.device)


def target_logits(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model says before each target: logits (N, V), and the targets' places in the line, (N,)."""
    if "turns" in batch:
        return _activated_logits(model, batch)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    places = (batch["labels"][0, 1:] != CONTEXT).nonzero()[:, 0]  # (N,): the token after each is a target
    return model(**inputs, use_cache=False, logits_to_keep=places).logits[0], places + 1


def _activated_logits(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """`target_logits` of an activated adapter: the base reads the line, then the turns are read with the
    adapter.

    No turn sees what the adapter made of another one, so all stand side by side in one pass; nothing is
    learned from the base's pass, which therefore keeps no activations.
    """
    turns, labels = batch["turns"], batch["labels"][0]
    line = {key: batch[key] for key in ("input_ids", "position_ids")}
    whole: Any = getattr(model, "module", model)
    with torch.no_grad(), whole.disable_adapter():
        read = whole(**line, segments=batch["segments"], use_cache=True, logits_to_keep=1)
    places = torch.cat([torch.arange(start, stop) for _, start, stop in turns]).to(labels.device)  # (S,)
    ends = torch.cumsum(torch.tensor([stop - start for _, start, stop in turns]), 0) - 1
    predicts = labels[(places + 1).clamp(max=len(labels) - 1)] != CONTEXT  # (S,): the next one is a target
    predicts[ends.to(labels.device)] = False  # what follows a turn's last token is not part of it
    kept = predicts.nonzero()[:, 0]  # (N,)
    logits = model(
        **{key: tokens[:, places] for key, tokens in line.items()},
        cache=read.cache,
        turns=turns,
        logits_to_keep=kept,
    ).logits[0]
    return logits, places[kept] + 1


class RowSampler(Sampler[int]):
    """Rows in an order that follows from seed and epoch alone, so a resumed run finds its place.

    With `sizes` in tokens, a batch holds rows of like length: the shuffled rows are cut into
    stretches of fifty batches, each is sorted, and all batches are shuffled.
    """

    def __init__(
        self, count: int, seed: int, epoch: Callable[[], int], *, sizes: Sequence[int] = (), batch: int = 1
    ) -> None:
        self._count, self._seed, self._epoch = count, seed, epoch
        self._sizes, self._batch = sizes, batch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        dice = random.Random(f"{self._seed}-{self._epoch()}")
        order = list(range(self._count))
        dice.shuffle(order)
        if self._sizes:
            stretch = 50 * self._batch
            cuts = [order[start : start + stretch] for start in range(0, self._count, stretch)]
            order = [index for cut in cuts for index in sorted(cut, key=lambda index: self._sizes[index])]
            batches = [order[start : start + self._batch] for start in range(0, self._count, self._batch)]
            dice.shuffle(batches)
            order = [index for batch in batches for index in batch]
        return iter(order)


class _Run:
    """What both trainers share; goes before trl's class, hence `self: Any`."""

    sampler: RowSampler | None = None
    invocation: Sequence[int] = ()

    def _send_telemetry(self) -> None:
        """trl reports each run to its makers; an offline tool does not."""

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """The card is ours."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.sampler

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter alone; peft would ask the hub whether the base's embeddings were changed."""
        if self.args.should_save:
            save_adapter(self.model, Path(output_dir or self.args.output_dir), self.invocation)

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        """Write a checkpoint aside, give it its name when it is whole, then remove older ones.

        Raises `OutputError` where it cannot be written; those before it stay.
        """
        folder = Path(self.args.output_dir)
        aside = folder / "unfinished"
        try:
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
            self.args.output_dir = str(aside)
            transformers.Trainer._save_checkpoint(self, model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                for new in aside.glob("checkpoint-*"):
                    shutil.rmtree(folder / new.name, ignore_errors=True)
                    os.replace(new, folder / new.name)
                shutil.rmtree(aside)
                for old in list_checkpoints(folder)[:-KEPT_CHECKPOINTS]:
                    shutil.rmtree(old, ignore_errors=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise OutputError(_cannot_save(folder, error)) from None
        finally:
            self.args.output_dir = str(folder)


def _cannot_save(folder: Path, error: Exception) -> str:
    last = list_checkpoints(folder)
    kept = f"{last[-1].name} is whole" if last else "there is no checkpoint yet"
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return (
        f"a checkpoint cannot be saved in {folder}: {reason}; {kept}, mend the cause and go on with --resume"
    )


def save_adapter(model: Any, folder: Path, invocation: Sequence[int] = ()) -> None:
    """The adapter as safetensors, with its configuration; an activated one names its `invocation`.

    peft is told of it in the file alone: with it in memory, peft would look for one invocation a row.
    """
    config = model.peft_config["default"]
    config.alora_invocation_tokens = list(invocation) or None
    try:
        model.save_pretrained(
            folder, safe_serialization=True, save_embedding_layers=False, selected_adapters=["default"]
        )
    finally:
        config.alora_invocation_tokens = None
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty card


class RoleTrainer(_Run, SFTTrainer):
    """Learns a role's tokens; the loss is their mean over the whole update, on all devices."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        total, count = sum_loss(model, inputs)
        if num_items_in_batch is None:
            return total / count.clamp(min=1)
        return (
            total / num_items_in_batch * self.accelerator.num_processes
        )  # gradients are averaged over devices

    def measure(self, packs: Sequence[Sequence[Row]], *, adapter: bool = True) -> tuple[float, int]:
        """Summed loss of the targets in nats, and their number, with the adapter as it is now or without."""
        total, count, model = 0.0, 0, cast(nn.Module, self.model)
        base_alone = nullcontext() if adapter else cast(Any, model).disable_adapter()
        with evaluating(model), torch.no_grad(), base_alone:
            for pack in packs:
                record = to_record(pack, self.invocation if adapter else ())
                batch = self._prepare_inputs(lay_out([record]))
                with self.compute_loss_context_manager():
                    loss, targets = sum_loss(model, batch)
                total, count = total + loss.item(), count + int(targets)
        return total, count


class PairTrainer(_Run, DPOTrainer):
    """Learns to prefer; pairs come in as tokens, so trl's own tokenising is left out."""

    def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
        return dataset

    def prefer(self: Any, pairs: Sequence[Any]) -> float:
        """The share of pairs of which the model, as it is now, finds the chosen answer the likelier one.

        By the mean log-probability of a token, as in sum the longer answer is nearly always the less likely
        one. trl's own accuracy compares with the model before training, so it says nothing of that.
        """
        size, won, model = self.args.per_device_eval_batch_size, 0, cast(nn.Module, self.model)
        with evaluating(model), torch.no_grad():
            for start in range(0, len(pairs), size):
                batch = self._prepare_inputs(self.data_collator(pairs[start : start + size]))
                answers = batch.pop("completion_mask")  # (2 B, T), chosen before rejected
                labels = batch["input_ids"].masked_fill(answers == 0, CONTEXT)
                with self.compute_loss_context_manager():
                    scores = model(**batch, labels=labels, use_cache=False, fused_lm_head=True).log_probs
                means = scores.float().sum(1) / (labels[:, 1:] != CONTEXT).sum(1)  # (2 B,)
                chosen, rejected = means.chunk(2)
                won += int((chosen > rejected).sum())
        return won / len(pairs)


def pair_collator(pad_token: int) -> Any:
    """Pairs side by side, padded on the right."""
    return DataCollatorForPreference(pad_token_id=pad_token)


def set_evaluating(model: nn.Module) -> None:
    """Dropout off. 4-bit layers stay as they are in training: on some CPUs bitsandbytes repacks their
    weights for evaluation, and what is trained or merged afterwards is garbage."""
    model.eval()
    for module in model.modules():
        if hasattr(module, "quant_state") or type(module).__name__ == "Linear4bit":
            module.training = True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`set_evaluating` for a while; every layer is then as it was."""
    modes = [(module, module.training) for module in model.modules()]
    set_evaluating(model)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Progress(transformers.TrainerCallback):
    """Writes the loss curve, a line per log, and tells speed and time left."""

    def __init__(self, path: Path, say: Callable[[str], None], *, step: int) -> None:
        self._path, self._say = path, say
        self._first = self._last = (0.0, 0, 0)  # seconds, step, tokens
        _cut_curve(path, step)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first = self._last = (time.monotonic(), state.global_step, int(state.num_input_tokens_seen))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        now, tokens = time.monotonic(), int(state.num_input_tokens_seen)
        speed = (tokens - self._last[2]) / max(now - self._last[0], 1e-9)
        pace = (now - self._first[0]) / max(state.global_step - self._first[1], 1)
        self._last = (now, state.global_step, tokens)
        row = {
            "step": state.global_step,
            "tokens": tokens,
            "loss": round(float(logs["loss"]), 5),
            "learning_rate": float(logs.get("learning_rate", 0)),
            "grad_norm": round(float(logs.get("grad_norm", 0)), 5),
            "tokens_per_second": round(speed, 1),
        }
        accuracy = logs.get("rewards/accuracies")
        if accuracy is not None:
            row["accuracy"] = round(float(accuracy), 4)
        with Appender(self._path) as curve:
            curve.append(row)
        left = format_seconds(pace * (state.max_steps - state.global_step))
        self._say(
            f"step {row['step']}/{state.max_steps}  loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  "
            f"{speed:.0f} tokens/s  {left} left"
        )


def _cut_curve(path: Path, step: int) -> None:
    """Drop what a killed run wrote after the checkpoint that is gone on from."""
    lines = list(read_lines(path)) if path.exists() else []
    rows = [row for row in (line.row() for line in lines) if row["step"] <= step]
    with Appender(path, truncate=True) as curve:
        for row in rows:
            curve.append(row)
