"""A trained adapter together with the very base it was trained on: what every later file must say.

The folder is one that `parrot train` has left, or any that peft has saved; of the latter the role and
the data are unknown. Torch is imported where weights are loaded.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parrot_edge.convert.adapter import WEIGHTS, read_object
from parrot_edge.errors import ModelError
from parrot_edge.recipe import TrainRecipe, load_recipe
from parrot_edge.train.base import Base, load_config, load_model, load_tokenizer, one_sentence
from parrot_edge.train.trainer import choose_device, quiet_libraries


@dataclass(frozen=True)
class TrainedFiles:
    """What is known of a trained adapter before any weights are loaded.

    folder      the adapter, as peft saved it
    role        "ask", "chat", or None where the folder does not tell
    record      what `training.json` holds; {} where there is none
    recipe      every value it was trained with; defaults where they are unknown
    config      peft's configuration of the adapter
    invocation  tokens that an activated adapter starts with; empty for a plain one
    base        the model below it
    shape       transformers' configuration of the base
    verified    whether the base was shown, by its hash or commit, to be the one that was trained on
    tokenizer   the base's, with the recipe's chat template where it names one
    device      where it is computed
    dtype       what the base was held in while training; float32 where that is unknown
    """

    folder: Path
    role: str | None
    record: dict[str, Any]
    recipe: TrainRecipe
    config: dict[str, Any]
    invocation: list[int]
    base: Base
    shape: Any
    verified: bool
    tokenizer: Any
    device: Any
    dtype: Any

    @property
    def quantized(self) -> bool:
        """Whether the base was held in 4 bits while training."""
        return self.recipe.base.quantization == "nf4"

    def load_base(self) -> Any:
        """The base anew, ready to be evaluated: the weights that were trained over, computing in float32.

        What bfloat16 rounds away between the layers is no part of what was learned, and is more than
        what separates a good 16-bit file from its weights.
        """
        from parrot_edge.train import loops

        with quiet_libraries():
            model = load_model(self.base, self.recipe.base, dtype=self.dtype, device=self.device)
        _compute_in_float32(model)
        loops.set_evaluating(model)
        return model

    def add_adapter(self, model: Any) -> Any:
        """The adapter over a base, as a peft model in evaluation; raises `ModelError` where it does not fit.

        An activated adapter is at work wherever the model is called: `loops.sum_loss` knows the turns.
        """
        from peft import PeftConfig, PeftModel
        from peft.utils import get_peft_model_state_dict
        from safetensors import safe_open

        from parrot_edge.train import loops

        with one_sentence(f"the adapter {self.folder}"), quiet_libraries():
            config = PeftConfig.from_pretrained(str(self.folder))
            config.alora_invocation_tokens = None  # see `loops.save_adapter`
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # they are refused below
            adapted = PeftModel.from_pretrained(model, str(self.folder), config=config, use_safetensors=True)
            with safe_open(self.folder / WEIGHTS, "np") as weights:
                saved = set(weights.keys())
        fitted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if saved != fitted:
            odd = min(saved ^ fitted)
            raise ModelError(
                f"{self.folder}: {odd} has no place in {self.base.name}, or is missing from the adapter; "
                "name the base that it was trained on"
            )
        loops.set_evaluating(adapted)
        return adapted


@dataclass(frozen=True)
class Trained(TrainedFiles):
    """A trained adapter over its base as trained: 4-bit where it was; `model` is peft's, in evaluation."""

    model: Any


def load_trained(folder: Path, base: str | None = None) -> Trained:
    """The adapter in `folder` over the base it was trained on; raises as `find_trained` does."""
    files = find_trained(folder, base)
    return Trained(**vars(files), model=files.add_adapter(files.load_base()))


def find_trained(folder: Path, base: str | None = None) -> TrainedFiles:
    """Find and check the files of an adapter and of its base, without loading weights.

    `base` says where the base lies, as `BaseOptions.name` takes it; `training.json` names it without
    folders. Raises `ModelError` where adapter or base are missing, damaged, or do not belong together.
    """
    folder = Path(folder)
    config = read_object(
        folder / "adapter_config.json", "name a folder that parrot train, or peft, has saved"
    )
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder} holds no {WEIGHTS}; save the adapter again, as safetensors")
    record, recipe = _read_run(folder)
    options = recipe.base
    if base:
        options = replace(options, name=base, revision="main")
    elif record:
        options = _find_base(folder, record["base"], options)
    else:
        name = config.get("base_model_name_or_path")
        if not name:
            raise ModelError(f"{folder} does not tell its base; name it with --base")
        options = replace(options, name=name, revision=config.get("revision") or "main")
    options = replace(options, dtype=record.get("dtype", "float32"))
    recipe = replace(recipe, base=options, run=replace(recipe.run, device="auto"))
    with quiet_libraries():
        device, dtype, _ = choose_device(recipe)
        located = Base.locate(options)
        tokenizer = load_tokenizer(located, options)
        shape = load_config(located, tokenizer)
    return TrainedFiles(
        folder=folder,
        role=record.get("role"),
        record=record,
        recipe=recipe,
        config=config,
        invocation=config.get("alora_invocation_tokens") or [],
        base=located,
        shape=shape,
        verified=_verify_base(folder, record, located, shape),
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
    )


def _compute_in_float32(model: Any) -> None:
    """Have a model compute in float32 with the very weights that it has, 4-bit ones too."""
    import torch

    torch.nn.Module.float(model)  # transformers' own refuses a 4-bit model, whose packed weights this leaves
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = torch.float32


def _read_run(folder: Path) -> tuple[dict[str, Any], TrainRecipe]:
    """`training.json` and the recipe beside it; {} and defaults where peft alone has saved the folder."""
    if not (folder / "training.json").is_file():
        return {}, TrainRecipe(role="chat")  # the role is not used: nothing is known of the data
    advice = "copy the folder again, or remove the file to convert it as a plain peft adapter"
    record = read_object(folder / "training.json", advice)
    base = record.get("base")
    if record.get("role") not in ("ask", "chat") or not isinstance(base, dict) or not base.get("name"):
        raise ModelError(f"{folder / 'training.json'} tells no role or no base; {advice}")
    return record, load_recipe(folder / "recipe.yaml")


def _find_base(folder: Path, base: dict[str, Any], options: Any) -> Any:
    """Where the base of a record lies: on the hub at its commit, or here under its own name."""
    name = base["name"]
    if "revision" in base:
        return replace(options, name=name, revision=base["revision"])
    if "file" not in base and not Path(name).is_dir():
        raise ModelError(f"{folder} was trained on the folder {name}; say where it lies with --base")
    if "file" in base and "/" not in name and name.endswith(".gguf") and not Path(name).is_file():
        raise ModelError(f"{folder} was trained on the file {name}; say where it lies with --base")
    return replace(options, name=name)


def _verify_base(folder: Path, record: dict[str, Any], base: Base, shape: Any) -> bool:
    """Whether the base is the record's; False where that cannot be told, `ModelError` where it is another."""
    if not record:
        return False
    known, given = record["base"], base.identity(shape)
    for key in ("sha256", "revision"):
        if key in known and key in given:
            if known[key] == given[key]:
                return True
            raise ModelError(
                f"{folder} was trained on {known['name']} ({key} {known[key][:12]}) and {base.name} is "
                f"another ({given[key][:12]}); name the one it was trained on with --base"
            )
    return False
