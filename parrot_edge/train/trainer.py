"""Training an adapter: from a recipe to a folder with the adapter and all that tells how it came about.

`accelerate launch -m parrot_edge train ...` runs it on several devices. Torch is imported when a run
starts, not with this module; `loops` holds what needs it, `output` the folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import parrot_edge
from parrot_edge.errors import ModelError, UsageError
from parrot_edge.machine import installed_version
from parrot_edge.recipe import TrainRecipe
from parrot_edge.train.base import Base, load_config, load_model, load_tokenizer, one_sentence
from parrot_edge.train.data import LEARNED, Corpus, Row, batch_rows, build_corpus, build_pairs, sample_rows
from parrot_edge.train.output import RunFolder, checkpoint_step, hide_folders
from parrot_edge.train.plan import Plan, lora_config, make_plan, measure_shape, optimizer_name
from parrot_edge.train.template import Prompt, TurnTemplate

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")

Say = Callable[[str], None]
Packs = list[list[Row]]
Pair = Mapping[str, Sequence[int]]


@dataclass
class Job:
    """A run that is ready to start: everything but the weights, which are loaded last.

    packs       rows for training, as they are given to the trainer
    held_out    rows to measure on, by the name of their source
    pairs       preference pairs under "train" and "held_out", where the objective is "dpo"
    prompt      how turns are written
    invocation  tokens before the role's turns, where the adapter is activated by them
    """

    recipe: TrainRecipe
    base: Base
    tokenizer: Any
    config: Any
    device: Any
    dtype: Any
    corpus: Corpus
    packs: Packs
    held_out: dict[str, Packs]
    pairs: dict[str, list[Pair]]
    prompt: Prompt
    invocation: list[int]
    plan: Plan


def train(
    recipe: TrainRecipe,
    output: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Train the recipe's adapter into the folder `output`; returns what its `training.json` holds.

    With `resume`, goes on from the newest checkpoint of the same recipe and data, to the same end, or
    starts where there is none. Raises `OutputError` where the folder exists (`force` replaces it) or
    cannot be written, `InputError` for data, `ModelError` where base, adapter or memory do not do.
    """
    folder = RunFolder(output, resume=resume, force=force)
    say = say if folder.writes else lambda line: None
    done = folder.finished()
    if done is not None:
        say(f"{folder.path} is finished already")
        return done
    with quiet_libraries(), _memory_in_one_sentence(folder):
        job = _prepare(recipe, say)
        for line in job.plan.lines():
            say(line)
        return _run(job, folder, say)


def plan_run(recipe: TrainRecipe, *, say: Say = lambda line: None) -> Plan:
    """What a run would train, read and take, without loading the weights; raises as `train` does."""
    with quiet_libraries():
        return _prepare(recipe, say).plan


def _prepare(recipe: TrainRecipe, say: Say) -> Job:
    device, dtype, processes = choose_device(recipe)
    base = Base.locate(recipe.base)
    tokenizer = load_tokenizer(base, recipe.base)
    config = load_config(base, tokenizer)
    longest = getattr(config, "max_position_embeddings", recipe.data.max_length)
    if recipe.data.max_length > longest:
        raise ModelError(f"data.max_length is {recipe.data.max_length}, {base.name} takes {longest} tokens")
    packs: Packs = []
    held_out: dict[str, Packs] = {}
    pairs: dict[str, list[Pair]] = {}
    if recipe.objective == "dpo":
        corpus, pairs = build_pairs(recipe.data, tokenizer)
        sizes = [(_count_tokens(pair), _count_tokens(pair, learned=True)) for pair in pairs["train"]]
        measured = sum(_count_tokens(pair) for pair in pairs["held_out"])
    else:
        corpus = build_corpus(recipe.data, recipe.role, tokenizer)
        packs = batch_rows(corpus.train, recipe.data)
        sizes = [
            (sum(len(row.input_ids) for row in pack), sum(row.targets for row in pack)) for pack in packs
        ]
        rows = sample_rows(corpus.held_out, recipe.run.eval_tokens)
        measured = sum(len(row.input_ids) for row in rows)
        for source in dict.fromkeys(row.source for row in rows):
            held_out[Path(source).name] = batch_rows([r for r in rows if r.source == source], recipe.data)
    if corpus.skipped:
        say(f"skipped {corpus.skipped} rows, the first: {corpus.first_error}")
    invocation: list[int] = []
    template = TurnTemplate(tokenizer, system=recipe.data.system, system_text=recipe.data.system_text)
    if recipe.lora.activated:
        header = template.invocation(LEARNED[recipe.role])
        invocation = tokenizer(header, add_special_tokens=False)["input_ids"]
    shape = measure_shape(config, recipe.lora)
    plan = make_plan(
        recipe,
        shape,
        sizes,
        held_out=measured,
        config=config,
        device=device,
        dtype=dtype,
        processes=processes,
    )
    return Job(
        recipe,
        base,
        tokenizer,
        config,
        device,
        dtype,
        corpus,
        packs,
        held_out,
        pairs,
        template.prompt,
        invocation,
        plan,
    )


def _run(job: Job, folder: RunFolder, say: Say) -> dict[str, Any]:
    from accelerate import PartialState

    from parrot_edge.train import loops

    recipe, record = hide_folders(job.recipe), _describe(job)
    folder.start(recipe, record)
    PartialState().wait_for_everyone()
    checkpoint = folder.last_checkpoint()
    step = checkpoint_step(checkpoint) if checkpoint else 0
    if job.device.type == "cpu":
        _keep_freed_memory()
    trainer = _make_trainer(job, folder)
    if folder.writes:
        trainer.add_callback(loops.Progress(folder.curve, say, step=step))
    before = _measure(job, trainer, adapter=False)
    if checkpoint:
        say(f"going on from step {step}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    after = _measure(job, trainer, adapter=True)
    steps, tokens = trainer.state.global_step, int(trainer.state.num_input_tokens_seen)
    record["measures"] = {"steps": steps, "tokens": tokens, "before": before, "after": after}
    trainer.model.peft_config["default"].base_model_name_or_path = job.base.name  # no path of this machine
    folder.finish(recipe, record, lambda path: loops.save_adapter(trainer.model, path, job.invocation))
    trainer.accelerator.wait_for_everyone()
    for name, value in after.items():
        say(f"{name}: {value:.4f}" + (f", before {before[name]:.4f}" if name in before else ""))
    return record


def _make_trainer(job: Job, folder: RunFolder) -> Any:
    """The base with its adapter, in the trainer of the objective."""
    import torch
    from datasets import Dataset
    from peft import PeftConfig, PeftModel
    from transformers import PrinterCallback

    from parrot_edge.train import loops

    recipe, pairs = job.recipe, job.recipe.objective == "dpo"
    if job.device.type == "cuda":  # the same seed, the same adapter
        torch.use_deterministic_algorithms(True, warn_only=True)
    model = load_model(job.base, recipe.base, dtype=job.dtype, device=job.device, padded=pairs)
    new = None
    if recipe.base.adapter:
        with one_sentence(f"the adapter {recipe.base.adapter}"):
            config = PeftConfig.from_pretrained(recipe.base.adapter)
            config.inference_mode = False
            config.alora_invocation_tokens = None  # see `loops.save_adapter`
            model = PeftModel.from_pretrained(
                model, recipe.base.adapter, config=config, is_trainable=True, use_safetensors=True
            )
    else:
        new = lora_config(model, recipe.lora)
    records = list(job.pairs["train"]) if pairs else [loops.to_record(p, job.invocation) for p in job.packs]
    trainer: Any = (loops.PairTrainer if pairs else loops.RoleTrainer)(
        model=model,
        args=_arguments(job, folder.checkpoints),
        data_collator=loops.pair_collator(job.tokenizer.pad_token_id) if pairs else loops.lay_out,
        train_dataset=Dataset.from_list(records),
        eval_dataset=Dataset.from_list(job.pairs["held_out"]) if pairs and job.pairs["held_out"] else None,
        processing_class=job.tokenizer,
        peft_config=new,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # over 4 bits trl makes them bfloat16, where small updates vanish
            parameter.data = parameter.data.float()
    sizes = [_count_tokens(record) if pairs else len(record["input_ids"]) for record in records]
    trainer.sampler = loops.RowSampler(
        len(records),
        recipe.run.seed,
        lambda: trainer.state.global_step // job.plan.updates,
        sizes=sizes if recipe.data.batching == "bucketed" else (),
        batch=recipe.optim.batch_size,
    )
    trainer.invocation = job.invocation
    trainer.remove_callback(PrinterCallback)  # prints to stdout
    return trainer


def _arguments(job: Job, folder: Path) -> Any:
    """The recipe in the words of transformers and trl."""
    from trl import DPOConfig, SFTConfig

    recipe, optim, run = job.recipe, job.recipe.optim, job.recipe.run
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": optim.micro_batch,
        "per_device_eval_batch_size": optim.micro_batch,
        "gradient_accumulation_steps": job.plan.accumulation,
        "max_steps": job.plan.steps,
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if optim.schedule == "constant" else optim.schedule,
        "warmup_steps": job.plan.warmup_steps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "optim": optimizer_name(recipe, job.device.type),
        "gradient_checkpointing": optim.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if optim.checkpointing else None,
        "bf16": str(job.dtype) == "torch.bfloat16",
        "use_cpu": job.device.type == "cpu",
        "dataloader_pin_memory": job.device.type == "cuda",
        "seed": run.seed,
        "logging_steps": run.log_steps,
        "save_steps": run.save_steps,
        "report_to": list(run.report_to) or "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "include_num_input_tokens_seen": "all",
        "max_length": None,
    }
    if recipe.objective == "dpo":
        return DPOConfig(**options, beta=recipe.dpo.beta)
    return SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True})


def _measure(job: Job, trainer: Any, *, adapter: bool) -> dict[str, float]:
    """Held-out figures: the role's loss in nats a token, by source; for pairs how often the chosen answer
    is the likelier one, and those of trl, which tell of the change alone."""
    if job.recipe.objective == "dpo":
        pairs = job.pairs["held_out"]
        if not pairs:
            return {}
        preferred = {"held-out preference accuracy": trainer.prefer(pairs)}
        if not adapter:
            return preferred
        figures = trainer.evaluate()
        names = ("loss", "rewards/accuracies", "rewards/margins")
        return preferred | {f"held-out {name}": float(figures[f"eval_{name}"]) for name in names}
    losses = {name: trainer.measure(packs, adapter=adapter) for name, packs in job.held_out.items()}
    if not losses:
        return {}
    total, count = (sum(column) for column in zip(*losses.values(), strict=True))
    means = {f"held-out loss, {name}": loss / targets for name, (loss, targets) in losses.items()}
    return {"held-out loss": total / count, **(means if len(means) > 1 else {})}


def _describe(job: Job) -> dict[str, Any]:
    """What the adapter comes from: recipe, base, data, prompt and versions."""
    return {
        "role": job.recipe.role,
        "recipe": asdict(hide_folders(job.recipe)),
        "base": job.base.identity(job.config),
        "data": {
            "sources": [asdict(source) for source in job.corpus.sources],
            "dialogues": job.corpus.dialogues,
            **({"held_out_pairs": len(job.pairs["held_out"])} if job.pairs else {}),
            "skipped": job.corpus.skipped,
            "rows": job.plan.rows,
            "tokens": job.plan.tokens,
            "targets": job.plan.targets,
            "sha256": job.corpus.sha256(),
        },
        "prompt": asdict(job.prompt),
        "invocation": job.invocation,
        "dtype": str(job.dtype).removeprefix("torch."),
        "trained_parameters": job.plan.shape.trained,
        "versions": {
            "parrot_edge": parrot_edge.__version__,
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: installed_version(name) for name in LIBRARIES},
        },
    }


def choose_device(recipe: TrainRecipe) -> tuple[Any, Any, int]:
    """Device, dtype and number of processes; raises `ModelError` where the recipe's GPU is missing."""
    missing = [name for name in LIBRARIES if not installed_version(name)]
    if missing:
        raise UsageError(f"training needs {', '.join(missing)}; run pip install 'parrot-edge[train]'")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first product on a GPU
    import torch
    from accelerate import PartialState

    has_gpu = torch.cuda.is_available()
    if recipe.run.device == "gpu" and not has_gpu:
        raise ModelError(
            f"the recipe {recipe.name} wants a GPU and there is none; take one that ends in -cpu, or try "
            "--set run.device=cpu"
        )
    use_cpu = recipe.run.device == "cpu" or not has_gpu
    state = PartialState(cpu=use_cpu)
    fast = _cpu_has_bfloat16() if use_cpu else torch.cuda.is_bf16_supported()
    name = ("bfloat16" if fast else "float32") if recipe.base.dtype == "auto" else recipe.base.dtype
    return state.device, getattr(torch, name), state.num_processes


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; emulated it has a fifth of float32's speed."""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step; another C library does as it likes.

    Otherwise each large tensor is given back to the system and faulted in anew, which takes up to
    half of the time of a small model's step.
    """
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, most)
        libc.mallopt(mmap_threshold, 2**30)


def _count_tokens(pair: Any, *, learned: bool = False) -> int:
    answers = len(pair["chosen_ids"]) + len(pair["rejected_ids"])
    return answers if learned else answers + 2 * len(pair["prompt_ids"])


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars and no chatter; peft and trl still call some functions by their old names."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    # at import, where the CPU multiplies bfloat16, it warns of a lack of kernels that nobody here calls
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import datasets
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is deprecated and will be removed in v6.*", FutureWarning)
        yield
    transformers.logging.set_verbosity(level)


@contextlib.contextmanager
def _memory_in_one_sentence(folder: RunFolder) -> Iterator[None]:
    """Turn what torch and Python raise when memory runs out into one `ModelError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is a RuntimeError
        if isinstance(error, MemoryError) or "memory" in str(error).lower():
            raise ModelError(
                f"memory ran out while training; {folder.kept()}. Start again with a smaller "
                "data.max_length or optim.micro_batch, or with optim.checkpointing=true"
            ) from None
        raise
