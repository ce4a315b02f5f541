"""The plan: what a run will train, read and take, before anything is loaded.

Memory is estimated from the base's shape alone, time from one of its blocks, which is run on the
device (both checked against what runs took, see docs/benchmarks.md).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from parrot_edge.errors import ModelError
from parrot_edge.machine import MEMORY_SHARE, format_bytes, inspect_machine
from parrot_edge.recipe import LoraOptions, TrainRecipe

RUNTIME_BYTES = {"cpu": 1.5e9, "cuda": 1.2e9}
"""What Python, the libraries and the allocator's gaps take in memory; on a GPU the CUDA context."""

NF4_BYTES = 0.5 + 0.127 / 8
"""A weight in NF4 with double quantisation, arXiv 2305.14314."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a base, in parameters and elements.

    linear    parameters in linear layers that an adapter can be put on; these are quantised
    other     all other parameters
    trained   parameters of the adapter
    """

    linear: int
    other: int
    trained: int
    hidden: int
    intermediate: int
    layers: int
    vocab: int


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    tokens, targets  read and learned in an epoch
    updates          optimiser steps of an epoch; `steps` are those of the run
    accumulation     passes of each device in a step
    memory           bytes at the peak, of `available` now
    seconds          of the whole run
    """

    shape: Shape
    rows: int
    tokens: int
    targets: int
    steps: int
    updates: int
    accumulation: int
    warmup_steps: int
    memory: int
    available: int
    seconds: float
    device: str

    def lines(self) -> list[str]:
        """The plan for a reader."""
        total = self.shape.linear + self.shape.other
        share = f"{self.shape.trained / total:.2%} of the base's {_millions(total)}"
        memory = f"{format_bytes(self.memory)} of {format_bytes(self.available)} free"
        return [
            f"plan: {_millions(self.shape.trained)} parameters are trained, {share}",
            f"plan: {self.rows:,} rows, {self.tokens:,} tokens an epoch, {self.targets:,} of them learned",
            f"plan: {self.steps:,} steps, about {format_seconds(self.seconds)} and {memory} ({self.device})",
        ]


def find_targets(model: Any, options: LoraOptions) -> list[str]:
    """Names of the layers that get an adapter; raises `ModelError` for one the base does not have."""
    from torch import nn

    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if options.targets == ("all-linear",):
        return sorted(linear)
    missing = [name for name in options.targets if name not in linear]
    if missing:
        raise ModelError(
            f"the base has no layer {missing[0]!r}; lora.targets can be {', '.join(sorted(linear))}"
        )
    return sorted(options.targets)


def lora_config(model: Any, options: LoraOptions) -> Any:
    """peft's configuration of the adapter; raises `ModelError` where it does not fit the base."""
    from peft import LoraConfig

    count = model.config.get_text_config().num_hidden_layers
    if options.layers > count:
        raise ModelError(f"lora.layers is {options.layers}, but the base has {count} blocks")
    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=find_targets(model, options),
        layers_to_transform=list(range(count - options.layers, count)) if options.layers else None,
        task_type="CAUSAL_LM",
    )


def measure_shape(config: Any, options: LoraOptions) -> Shape:
    """The shape of a base with its adapter, on torch's meta device: no weights are read or made."""
    import torch
    from peft import get_peft_model
    from torch import nn
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        total = sum(parameter.numel() for parameter in model.parameters())
        head = model.get_output_embeddings()
        linear = sum(
            module.weight.numel()
            for module in model.modules()
            if isinstance(module, nn.Linear) and module is not head
        )
        adapted = get_peft_model(model, lora_config(model, options))
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    text = config.get_text_config()
    return Shape(
        linear=linear,
        other=total - linear,
        trained=trained,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", 4 * text.hidden_size),
        layers=text.num_hidden_layers,
        vocab=text.vocab_size,
    )


def estimate_memory(
    recipe: TrainRecipe, shape: Shape, *, tokens: int, targets: int, device: str, width: int
) -> int:
    """Peak bytes of a step over `tokens` tokens at once, `targets` of them learned.

    width: bytes of a number in the computation. Counted are weights, adapter (float32) with
    gradients and optimiser states, activations kept for the backward pass, and the logits.
    """
    nf4 = recipe.base.quantization == "nf4"
    weights = shape.linear * (NF4_BYTES if nf4 else width) + shape.other * width
    states = 2 if "8bit" in optimizer_name(recipe, device) else 8
    adapter = shape.trained * (4 + 4 + states)
    # Kept per token and block: inputs of the norms, projections and the attention (about 15 times
    # the hidden size), and around the gate (about 4.5 times the inner size). With checkpointing only
    # a block's input stays, and one block at a time is whole.
    # An activated adapter keeps them for its turns alone, and the keys and values of the line.
    read = 0
    if recipe.lora.activated:
        read, tokens = 2 * tokens * shape.hidden * shape.layers * width, targets
    block = tokens * (15 * shape.hidden + 4.5 * shape.intermediate) * width
    kept = tokens * shape.hidden * width * shape.layers + 2 * block
    activations = kept if recipe.optim.checkpointing else shape.layers * block
    # On a GPU trl makes the logits piece by piece; elsewhere logits, softmax and gradients stand at once
    logits = min(targets, 4096) * shape.vocab * (4 if device == "cuda" else 16)
    # A 4-bit matrix is expanded while it is used
    expanded = shape.hidden * shape.intermediate * width * 2 if nf4 else 0
    twice = 2 if recipe.objective == "dpo" else 1  # chosen and rejected side by side
    return int(weights + adapter + twice * (activations + read + logits) + expanded + RUNTIME_BYTES[device])


def make_plan(
    recipe: TrainRecipe,
    shape: Shape,
    sizes: Sequence[tuple[int, int]],
    *,
    held_out: int,
    config: Any,
    device: Any,
    dtype: Any,
    processes: int,
) -> Plan:
    """Count, estimate and time; raises `ModelError` where the run cannot fit.

    sizes: tokens, and tokens to be learned, of each row as it is given to the trainer;
    held_out: tokens that are measured on, before and after.
    """
    import torch

    per_step = recipe.optim.micro_batch * processes
    if recipe.optim.batch_size % per_step:
        raise ModelError(
            f"optim.batch_size {recipe.optim.batch_size} cannot be shared by {processes} devices with "
            f"{recipe.optim.micro_batch} rows each; set one that is a multiple of {per_step}"
        )
    accumulation = recipe.optim.batch_size // per_step
    batches = math.ceil(math.ceil(len(sizes) / processes) / recipe.optim.micro_batch)
    updates = max(1, math.ceil(batches / accumulation))
    steps = recipe.optim.max_steps or math.ceil(recipe.optim.epochs * updates)
    lengths, learned = (sorted(column) for column in zip(*sizes, strict=True))
    kind, width = device.type, torch.finfo(dtype).bits // 8
    memory = estimate_memory(
        recipe,
        shape,
        tokens=sum(lengths[-recipe.optim.micro_batch :]),
        targets=sum(learned[-recipe.optim.micro_batch :]),
        device=kind,
        width=width,
    )
    if kind == "cuda":
        available, _ = torch.cuda.mem_get_info(device)
    else:
        available = int(inspect_machine().memory_available * MEMORY_SHARE)
    name = "GPU" if kind == "cuda" else "CPU"
    if memory > available:
        raise ModelError(
            f"this needs about {format_bytes(memory)} and the {name} has {format_bytes(available)} "
            "free; set a smaller data.max_length or optim.micro_batch, optim.checkpointing=true, or a "
            "smaller base"
        )
    tokens = sum(lengths)
    passes = 3 if recipe.optim.checkpointing else 2
    targets = sum(learned)
    head = 2 * shape.hidden * shape.vocab  # operations for a token's logits; learned ones alone need them
    layers = _block_operations(shape)
    if recipe.lora.activated:
        epoch = tokens * 2 * shape.linear + targets * passes * (layers + head)
    else:
        epoch = passes * (tokens * layers + targets * head)
    measured = 2 * held_out * (layers + head * targets / max(tokens, 1))
    operations = epoch * steps / updates / processes + measured
    return Plan(
        shape=shape,
        rows=len(sizes),
        tokens=tokens,
        targets=targets,
        steps=steps,
        updates=updates,
        accumulation=accumulation,
        warmup_steps=round(recipe.optim.warmup_epochs * updates),
        memory=memory,
        available=available,
        seconds=operations / measure_speed(config, recipe.lora, shape, device=device, dtype=dtype),
        device=name,
    )


def optimizer_name(recipe: TrainRecipe, device: str) -> str:
    """The optimiser as transformers names it."""
    name = recipe.optim.name
    if name == "auto":
        name = "paged_adamw_8bit" if device == "cuda" else "adamw"
    return {"adamw": "adamw_torch"}.get(name, name)


def measure_speed(config: Any, options: LoraOptions, shape: Shape, *, device: Any, dtype: Any) -> float:
    """Operations a second, of those that `make_plan` counts, with one block of the base and its adapter.

    The block reads 512 tokens, forward and backward, for 0.3 s or twice; its attention and its norms
    take part in the time.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    block = copy.deepcopy(config)
    text = block.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, 8, None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    with torch.random.fork_rng(), torch.device(device):
        model = AutoModelForCausalLM.from_config(block, dtype=dtype)
        model = get_peft_model(model, lora_config(model, replace(options, layers=0)))
        tokens = torch.zeros(1, 512, dtype=torch.long)
        count, started = -1, time.perf_counter()
        while count < 1 or time.perf_counter() - started < 0.3:
            with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
                model(tokens, use_cache=False).logits.sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            count += 1
            if count == 0:  # the first call loads the kernels
                started = time.perf_counter()
    passes = 2 * count * tokens.numel()
    return passes * _block_operations(shape) / shape.layers / (time.perf_counter() - started)


def _block_operations(shape: Shape) -> int:
    """Operations for a token to pass all blocks with their adapter, one way."""
    return 2 * (shape.linear + 3 * shape.trained)


def format_seconds(seconds: float) -> str:
    """A duration for a reader.

    >>> format_seconds(42), format_seconds(700), format_seconds(9000)
    ('42 s', '12 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"
