"""The base of an adapter, and the adapter, as GGUF files.

A base is written in 16 bits: as it is, or as the 4 bits say it that it was trained over. A GGUF is its
own file, unless it was trained over in 4 bits. Weights are read and written a tensor at a time. What
is told of a file in its metadata is gathered here too.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from parrot_edge.convert.adapter import describe_role, read_config, scaled_alpha, write_adapter
from parrot_edge.convert.files import BASE_SHA256_KEY, GgufFile, Metadata, import_gguf, read_gguf
from parrot_edge.convert.shards import rewrite_shard
from parrot_edge.convert.toolkit import convert_hf, convert_lora
from parrot_edge.convert.trained import WEIGHTS, TrainedFiles
from parrot_edge.errors import ModelError
from parrot_edge.store import sha256_of
from parrot_edge.train.base import expand_gguf, nf4_options, one_sentence
from parrot_edge.train.data import LEARNED
from parrot_edge.train.template import TurnTemplate
from parrot_edge.train.trainer import quiet_libraries

_UNWANTED = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx*", "*.gguf", "original/*", "onnx/*"]
"""What a repository on the hub may hold beside the safetensors and the small files."""


def gguf_of(trained: TrainedFiles) -> Path | None:
    """The GGUF that is the base, or None where that is a folder or on the hub."""
    return Path(trained.base.target) / trained.base.gguf if trained.base.gguf else None


def count_weights(trained: TrainedFiles) -> int:
    """Parameters of the base; no weights are read."""
    if path := gguf_of(trained):
        return sum(math.prod(tensor.shape) for tensor in read_gguf(path).tensors.values())
    return sum(parameter.numel() for parameter in _shape_of(trained).parameters())


def write_base(
    trained: TrainedFiles, target: Path, *, dequantized: bool = False, force: bool = False
) -> None:
    """Write the base below an adapter as the 16-bit GGUF `target`.

    With `dequantized`, its linear layers as NF4 held them while training. Raises `OutputError` where
    `target` exists without `force` or cannot be written, and `ModelError` where the base cannot be
    converted.
    """
    path = gguf_of(trained)
    source = read_gguf(path) if path else None
    name = Path(trained.base.name).stem + ("-nf4" if dequantized else "")
    metadata = {**(_describe_tokenizer(source) if source else {}), **describe_model(trained, name)}
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".base-") as aside:
        folder = _find_folder(trained, Path(aside) / "expanded")
        if dequantized:
            dequantize_base(trained, folder, Path(aside) / "dequantized")
            folder = Path(aside) / "dequantized"
        pre = source.get("tokenizer.ggml.pre") if source else _find_pre(trained.tokenizer)
        convert_hf(folder, target, metadata=metadata, pre=pre, force=force)


def write_lora(trained: TrainedFiles, base: Path, target: Path, *, force: bool = False) -> None:
    """Write the adapter as the GGUF `target`, which names the GGUF `base` as the file it belongs to.

    Over a GGUF of the Llama layout without torch and without llama.cpp's converter. Raises as
    `adapter.write_adapter` does.
    """
    name, license_id = trained.folder.resolve().name, trained.recipe.license
    if trained.base.gguf and read_gguf(base).get("general.architecture") == "llama":
        write_adapter(trained.folder, base, target, name=name, license_id=license_id, force=force)
        return
    config = read_config(trained.folder)
    metadata = {
        **_describe_origin(trained, name),
        **{key: ("STRING", text) for key, text in describe_role(trained.folder).items()},
        "adapter.lora.alpha": ("FLOAT32", scaled_alpha(config)),
        BASE_SHA256_KEY: ("STRING", sha256_of(base)),
    }
    with tempfile.TemporaryDirectory() as aside:
        trained.shape.save_pretrained(aside)
        folder = trained.folder
        if config.get("fan_in_fan_out"):
            folder = _turn_adapter(folder, Path(aside) / "adapter")
        convert_lora(folder, Path(aside), target, metadata=metadata, force=force)


def describe_model(trained: TrainedFiles, name: str) -> Metadata:
    """What is known of a model that is made of this base: name, origin, licence, tokens that end.

    The chat template is the one that the adapter was trained with, and none that a library put in its
    place.
    """
    tokenizer = trained.tokenizer
    metadata = dict(_describe_origin(trained, name))
    if isinstance(tokenizer.chat_template, str):
        metadata["tokenizer.chat_template"] = ("STRING", tokenizer.chat_template)
    if tokenizer.eos_token_id is not None and not trained.base.gguf:
        metadata["tokenizer.ggml.eos_token_id"] = ("UINT32", tokenizer.eos_token_id)
    end = _find_turn_end(trained)
    if end is not None:
        metadata["tokenizer.ggml.eot_token_id"] = ("UINT32", end)
    return metadata


def _describe_origin(trained: TrainedFiles, name: str) -> Metadata:
    metadata: dict[str, tuple[Any, Any]] = {"general.name": ("STRING", name)}
    if trained.recipe.license:
        metadata["general.license"] = ("STRING", trained.recipe.license)
    metadata["general.base_model.count"] = ("UINT32", 1)
    metadata["general.base_model.0.name"] = ("STRING", trained.base.name.rpartition("/")[2])
    is_on_hub = not trained.base.gguf and not Path(trained.base.target).is_dir()
    if is_on_hub:
        metadata["general.base_model.0.organization"] = ("STRING", trained.base.name.rpartition("/")[0])
        metadata["general.base_model.0.repo_url"] = ("STRING", f"https://huggingface.co/{trained.base.name}")
    return metadata


def _describe_tokenizer(source: GgufFile) -> Metadata:
    types = import_gguf().GGUFValueType
    metadata = {}
    for key, value in source.metadata.items():
        if key.startswith("tokenizer.") and value.raw != []:
            kind = types(value.type).name if value.item is None else [types(value.item).name]
            raw = [_text(item) for item in value.raw] if isinstance(value.raw, list) else _text(value.raw)
            metadata[key] = (kind, raw)
    return metadata


def _text(value: Any) -> Any:
    """Text as str, whatever its bytes, so that it can be handed over as JSON."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _find_turn_end(trained: TrainedFiles) -> int | None:
    """The control token that closes the role's turns; None where the template closes them otherwise."""
    options, tokenizer = trained.recipe.data, trained.tokenizer
    try:
        prompt = TurnTemplate(tokenizer, system=options.system, system_text=options.system_text).prompt
    except ModelError:
        return None
    is_user = LEARNED[trained.role or "chat"] == "user"
    ids = tokenizer(prompt.user_end if is_user else prompt.assistant_end, add_special_tokens=False).input_ids
    control = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    return ids[0] if ids and ids[0] in control else None


def _find_pre(tokenizer: Any) -> str | None:
    """How llama.cpp names the rule that splits text before it is tokenised; None for what it knows itself.

    It knows published tokenizers by their tokens; here are the rules of which one's own are often made.
    """
    rule = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    steps = rule.get("pretokenizers", [rule])
    is_plain = steps[-1].get("type") == "ByteLevel" and not steps[-1]["add_prefix_space"]
    if is_plain and len(steps) == 1 and steps[0]["use_regex"]:
        return "gpt-2"
    if is_plain and steps[:-1] == [{"type": "Digits", "individual_digits": True}] and steps[-1]["use_regex"]:
        return "smollm"
    return None


def _find_folder(trained: TrainedFiles, expanded: Path) -> Path:
    """The base as a folder of safetensors; of a GGUF a copy is made at `expanded`."""
    base = trained.base
    if base.gguf:
        with one_sentence(f"the base {base.name}"), quiet_libraries():
            expand_gguf(base, expanded)
            trained.tokenizer.save_pretrained(expanded)
        return expanded
    if Path(base.target).is_dir():
        return Path(base.target)
    from huggingface_hub import snapshot_download

    with one_sentence(f"the base {base.name}"):
        return Path(snapshot_download(base.target, revision=base.revision, ignore_patterns=_UNWANTED))


def dequantize_base(trained: TrainedFiles, source: Path, target: Path) -> None:
    """Write the folder `source` as `target`, its linear layers rounded to NF4 and back, a tensor at a time.

    Each number is the one that the freshly loaded 4-bit model computes with: the very tensors are
    quantised that transformers would quantise, by the same calls. No model is run, so no layer can
    have been repacked for evaluation. Raises `ModelError` where a file is missing or damaged.
    """
    quantized = _find_quantized(trained)
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copy(path, target / path.name)
    shards = sorted(source.glob("model*.safetensors"))
    if not shards:
        raise ModelError(f"{source} holds no model*.safetensors; save the base again")
    with one_sentence(f"the base {trained.base.name}"):
        for shard in shards:
            rewrite_shard(
                shard,
                target / shard.name,
                lambda name, tensor: _round(tensor, quantized.get(name), trained),
                trained.dtype,
            )


def _round(tensor: Any, parameter: Any, trained: TrainedFiles) -> Any:
    """A tensor as the trained model had it: in its dtype, and through 4 bits where `parameter` is given."""
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.to(trained.dtype)
    if parameter is None:
        return tensor
    from bitsandbytes.functional import dequantize_4bit

    packed, is_turned = parameter
    value = (tensor.T if is_turned else tensor).contiguous()
    four_bit = type(packed)(value, requires_grad=False, **packed.__dict__).to(trained.device)
    rounded = dequantize_4bit(four_bit.data, four_bit.quant_state).to(trained.dtype).cpu()
    return (rounded.T if is_turned else rounded).contiguous()


def _find_quantized(trained: TrainedFiles) -> dict[str, tuple[Any, bool]]:
    """By a tensor's name in the base's files: how its layer is quantised, and whether it is turned before."""
    from transformers import Conv1D
    from transformers.quantizers import AutoHfQuantizer

    model = _shape_of(trained)
    quantizer = AutoHfQuantizer.from_config(nf4_options(trained.dtype), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": trained.device})
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            entry = (module.weight, issubclass(module.source_cls, Conv1D))
            found[f"{name}.weight"] = found[f"{name.removeprefix(prefix)}.weight"] = entry
    return found


def _shape_of(trained: TrainedFiles) -> Any:
    """The base without weights, on torch's meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet_libraries():
        return AutoModelForCausalLM.from_config(trained.shape)


def _turn_adapter(folder: Path, target: Path) -> Path:
    """The adapter of layers that hold their weights the other way round (Conv1D), turned as these are.

    llama.cpp's converter turns the layers' own weights and, in the same way, what an adapter adds.
    """
    from safetensors.torch import load_file, save_file

    target.mkdir()
    shutil.copy(folder / "adapter_config.json", target)
    turned = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        if "lm_head" not in name:
            other = {".lora_A.": ".lora_B.", ".lora_B.": ".lora_A."}
            part = next(part for part in other if part in name)
            name, tensor = name.replace(part, other[part]), tensor.T.contiguous()
        turned[name] = tensor
    save_file(turned, target / WEIGHTS)
    return target
