"""From a trained adapter to certified GGUF files, in stages that can be gone on from.

    NAME-lora.gguf               the adapter, over the base it is certified on
    NAME-base-f16.gguf           that base, where it is no GGUF that was there before
    NAME-f16.gguf                base and adapter merged; an activated adapter cannot be
    NAME-TYPE.gguf               the same in fewer bits (of an activated adapter, its base)
    NAME-imatrix.gguf            what the types in few bits were weighted by
    reference/                   what the trained model says
    certificate.json, .html      whether the files say the same
    README.md, Modelfile         how to run them
    convert.json                 stages, what each was made from, and what it found

A base that was trained over in 4 bits is tried both ways, dequantised and as it is, and the better
one is kept. Merging goes on between GGUF files, a matrix at a time, into that base and never
into 4 bits.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import parrot_edge
from parrot_edge.convert.auto import LOSS, choose_type
from parrot_edge.convert.base import count_weights, describe_model, gguf_of, write_base, write_lora
from parrot_edge.convert.certify import Thresholds, certify
from parrot_edge.convert.deliver import Release, write_delivery
from parrot_edge.convert.files import read_gguf
from parrot_edge.convert.imatrix import compute_imatrix, draw_dialogues, write_imatrix
from parrot_edge.convert.merge import merge_adapter
from parrot_edge.convert.quantize import NEEDS_IMATRIX, main_type, parse_type, quantize
from parrot_edge.convert.reference import Reference, read_reference
from parrot_edge.convert.trained import WEIGHTS, Trained, TrainedFiles, find_trained
from parrot_edge.engine import quantizer
from parrot_edge.engine.native import llama_version, tensor_kinds
from parrot_edge.errors import OutputError, UsageError
from parrot_edge.machine import choose_threads, format_bytes
from parrot_edge.models import LocalModel
from parrot_edge.recipe import DataOptions
from parrot_edge.store import read_json, sha256_of, write_json

RECORD = "convert.json"

_FROM_4_BITS, _AS_IT_IS = "dequantised from 4 bits", "as it is"
_AUTO = "auto"
_PLAIN = ("F32", "F16", "BF16")
_LOSSES = (("loss", "file"), ("trained_loss", "trained"))
_MARGIN = 1.2  # files of a type hold some matrices in more bits

_WHOLE = ("F32", "F16", "BF16", "Q8_0")
"""Types that an importance matrix does nothing for."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What is to be made.

    types       file types beside f16, as llama-quantize names them; "auto" measures which is the fastest here
    loss        what a file chosen by "auto" may lose: KL divergence from the trained model, nats a token
    base        where the base lies, where the adapter's own record does not do
    sources     dialogues, as `parrot train` reads them: to measure on, and to weight quantisation by
    license     SPDX identifier, in place of the recipe's
    thresholds  of the certificate
    threads     None for what suits this machine
    speed       measure tokens a second too
    """

    types: tuple[str, ...] = ()
    loss: float = LOSS
    base: str | None = None
    sources: tuple[str, ...] = ()
    license: str = ""
    thresholds: Thresholds | None = None
    threads: int | None = None
    speed: bool = True


def convert(
    adapter: Path,
    output: Path,
    job: Job,
    *,
    resume: bool = False,
    force: bool = False,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Merge, convert, quantise and certify the adapter in the folder `adapter`, into the folder `output`.

    Returns what convert.json holds; under "certificate" is whether it passed, and what failed. With
    `resume`, stages whose inputs are the same and whose files are whole are not done again. Raises
    `OutputError` where `output` exists with neither `resume` nor `force`, or has no room; `UsageError`
    for a type that there is not or that cannot be made; `ModelError` where adapter or base do not do.
    """
    types = tuple(dict.fromkeys(_AUTO if name == _AUTO else parse_type(name) for name in job.types))
    weighted = sorted(NEEDS_IMATRIX.intersection(types))
    if weighted and not job.sources:
        raise UsageError(f"{', '.join(weighted)} needs an importance matrix; give dialogues with --data")
    stages = Stages(output, resume=resume, force=force, say=say)
    say(f"reading {adapter}")
    trained = find_trained(adapter, job.base)
    if job.license:
        trained = replace(trained, recipe=replace(trained.recipe, license=job.license))
    _check_space(trained, types, output)
    stages.open()
    return _Conversion(trained, stages, replace(job, types=types), say).run()


class Stages:
    """The output folder of a conversion, and what of it is done."""

    def __init__(self, folder: Path, *, resume: bool, force: bool, say: Say) -> None:
        """Raises `OutputError` where the folder holds something and neither option says what to do."""
        self.folder, self._force, self._say = folder, force, say
        self._path = folder / RECORD
        self._sums: dict[Path, str] = {}
        if resume and force:
            raise UsageError("--resume goes on with a folder and --force replaces it; choose one")
        is_ours = self._path.is_file()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            if (resume or force) and not is_ours:
                raise OutputError(f"{folder} holds no conversion; choose another folder")
            if not (resume or force):
                raise OutputError(
                    f"{folder} exists; choose another, pass --force to replace it or --resume to go on"
                )
        self.record: dict[str, Any] = read_json(self._path) if resume else {}
        self.record.setdefault("stages", {})

    def open(self) -> None:
        """Make the folder, empty it if it is to be replaced."""
        try:
            if self._force:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(".*-*"):  # what a killed run was about to make
                shutil.rmtree(path, ignore_errors=True)
            self.note()
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be made: {error.strerror}; name another place") from None

    def note(self, **facts: Any) -> None:
        """Write down what is known by now."""
        self.record |= facts
        try:
            write_json(self._path, self.record)
        except OSError as error:
            raise OutputError(f"{self._path} cannot be written: {error.strerror}") from None

    def run(
        self, name: str, inputs: Mapping[str, Any], outputs: Sequence[Path], make: Callable[[], Any]
    ) -> Any:
        """What `make`, which writes `outputs`, returns, or did when it was given the same inputs."""
        known = self.record["stages"].get(name)
        if known and known["inputs"] == inputs and self._are_whole(known["outputs"]):
            self._say(f"{name}: done before")
            return known["result"]
        for path in outputs:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self._say(f"{name} ...")
        result = make()
        result = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
        sums = {path.name: self.sum_of(path, anew=True) for path in outputs if path.exists()}
        self.record["stages"][name] = {"inputs": dict(inputs), "outputs": sums, "result": result}
        self.note()
        return result

    def sum_of(self, path: Path, *, anew: bool = False) -> str:
        """SHA-256 of a file, or of all files of a folder, computed once."""
        if anew or path not in self._sums:
            if path.is_dir():
                parts = [f"{each.name} {sha256_of(each)}" for each in sorted(path.iterdir())]
                self._sums[path] = hashlib.sha256("\n".join(parts).encode()).hexdigest()
            else:
                self._sums[path] = sha256_of(path)
        return self._sums[path]

    def _are_whole(self, outputs: Mapping[str, str]) -> bool:
        paths = {self.folder / name: known for name, known in outputs.items()}
        return all(path.exists() and self.sum_of(path) == known for path, known in paths.items())


class _Conversion:
    """The stages of one conversion, in order."""

    def __init__(self, trained: TrainedFiles, stages: Stages, job: Job, say: Say) -> None:
        self._trained, self._stages, self._job, self._say = trained, stages, job, say
        self._name = trained.folder.resolve().name
        self._threads = job.threads or choose_threads().count
        self._origin: dict[str, Any] = {
            "adapter": stages.sum_of(trained.folder / WEIGHTS),
            "base": trained.base.identity(trained.shape),
            "versions": {"parrot_edge": parrot_edge.__version__, "llama.cpp": llama_version()},
        }
        stages.note(
            name=self._name,
            role=trained.role,
            activated=bool(trained.invocation),
            base={**self._origin["base"], "verified": trained.verified},
            versions=self._origin["versions"],
        )

    def run(self) -> dict[str, Any]:
        """All stages; returns the record."""
        reference = self._listen()
        base = self._write_base(reference)
        lora = self._path("lora")
        self._run("adapter to GGUF", [base], [lora], lambda: write_lora(self._trained, base, lora))
        pair = LocalModel(f"{base.name}+{lora.name}", base, lora)
        if self._trained.invocation:
            self._say("an activated adapter cannot be merged: it goes out over its base")
            models = [pair, *self._write_bases_of(pair, reference)]
        else:
            models = [*self._write_merged(pair, reference), pair]
        report = self._certify(reference, models)
        self._deliver([model for model in models if model.path.parent == self._stages.folder], report)
        return self._stages.record

    def _path(self, part: str) -> Path:
        return self._stages.folder / f"{self._name}-{part}.gguf"

    def _run(
        self, name: str, sources: Iterable[Path], outputs: Sequence[Path], make: Callable[[], Any]
    ) -> Any:
        """A stage that depends on files, and on what all stages depend on."""
        sums = {path.name: self._stages.sum_of(path) for path in sources}
        return self._stages.run(name, {**self._origin, "files": sums}, outputs, make)

    def _listen(self) -> Reference:
        """What the trained model says, on the dialogues that training kept back."""
        folder = self._stages.folder / "reference"

        def listen() -> None:
            from parrot_edge.convert.listen import write_reference

            files = self._trained
            trained = Trained(**vars(files), model=files.add_adapter(files.load_base()))
            write_reference(trained, folder, self._job.sources, say=self._say)

        self._run("reference of the trained model", self._files_of_data(), [folder], listen)
        return read_reference(folder)

    def _files_of_data(self) -> list[Path]:
        return [Path(name) for name in self._job.sources if Path(name).is_file()]

    def _write_base(self, reference: Reference) -> Path:
        """The base as a GGUF: the one that there is, or one that is written here."""
        trained, there, target = self._trained, gguf_of(self._trained), self._path("base-f16")
        if trained.quantized:
            folder = self._stages.folder / "reference"
            found = self._run(
                "base, both ways",
                [folder],
                [target],
                lambda: self._compare_bases(reference, target),
            )
            self._stages.note(bases=found["ways"], base_kept=found["kept"])
            return target if there is None or found["kept"] == _FROM_4_BITS else there
        if there is None:
            self._run("base to GGUF", [], [target], lambda: write_base(trained, target))
        return there or target

    def _compare_bases(self, reference: Reference, target: Path) -> dict[str, Any]:
        """Try the adapter over the base dequantised from 4 bits, and as it is; keep the better one.

        The better one is where the KL divergence from the trained model is the smaller.
        """
        trained = self._trained
        with tempfile.TemporaryDirectory(dir=self._stages.folder, prefix=".bases-") as name:
            aside = Path(name)
            ways = {
                _FROM_4_BITS: aside / "4-bit.gguf",
                _AS_IT_IS: gguf_of(trained) or aside / "16-bit.gguf",
            }
            write_base(trained, ways[_FROM_4_BITS], dequantized=True)
            if not ways[_AS_IT_IS].exists():
                write_base(trained, ways[_AS_IT_IS])
            lora = aside / "lora.gguf"
            write_lora(trained, ways[_FROM_4_BITS], lora)
            models = [LocalModel(way, path, lora) for way, path in ways.items()]
            report = certify(
                reference, models, self._job.thresholds, threads=self._threads, speed=False, say=self._say
            ).report
            found = {file["name"]: _summarize(file) for file in report["files"]}
            kept = min(found, key=lambda way: math.inf if found[way]["kl"] is None else found[way]["kl"])
            for way, figures in found.items():
                self._say(
                    f"{way}: KL divergence from the trained model {figures['kl']}, loss {figures['loss']}"
                )
            if ways[kept].parent == aside:
                os.replace(ways[kept], target)
        return {"ways": found, "kept": kept}

    def _write_merged(self, pair: LocalModel, reference: Reference) -> list[LocalModel]:
        """Base and adapter as one model, in 16 bits and in every type."""
        assert pair.adapter is not None
        target, lora = self._path("f16"), pair.adapter
        metadata = describe_model(self._trained, self._name)
        self._run(
            "merge",
            [pair.path, lora],
            [target],
            lambda: merge_adapter(pair.path, lora, target, metadata=metadata),
        )
        paths = [target, *self._quantize(target, "", None, reference)]
        return [LocalModel(path.name, path) for path in paths]

    def _write_bases_of(self, pair: LocalModel, reference: Reference) -> list[LocalModel]:
        """The base of an activated adapter in every type, each to go with the adapter."""
        if not self._job.types:
            return []
        source = pair.path
        if not _is_in_16_bits(source):
            source = self._path("base-f16")
            self._run(
                "base in 16 bits",
                [pair.path],
                [source],
                lambda: quantizer.quantize(pair.path, source, "F16", self._threads),
            )
        paths = [
            *([source] if source != pair.path else []),
            *self._quantize(source, "base-", pair.adapter, reference),
        ]
        return [
            LocalModel(f"{path.name}+{pair.name.partition('+')[2]}", path, pair.adapter) for path in paths
        ]

    def _quantize(self, source: Path, prefix: str, adapter: Path | None, reference: Reference) -> list[Path]:
        """A 16-bit file in every type that is wanted; returns those files."""
        matrix, types = None, [name for name in self._job.types if name != "F16"]
        if self._job.sources and set(types).difference(_WHOLE):
            matrix = target = self._path(f"{prefix}imatrix")
            files = [source, *self._files_of_data()]
            self._run("importance matrix", files, [target], lambda: self._weigh(source, target))
        if _AUTO in types:
            chosen = self._choose_type(source, matrix, adapter, reference)
            types = [name for name in dict.fromkeys([*types, chosen]) if name not in (_AUTO, "F16")]
        paths = []
        for name in types:
            path, weights = self._path(prefix + name), None if name in _WHOLE else matrix
            make = partial(quantize, source, path, name, imatrix=weights, threads=self._threads)
            self._run(f"quantise to {name}", [source, *([weights] if weights else [])], [path], make)
            paths.append(path)
        return paths

    def _choose_type(
        self, source: Path, matrix: Path | None, adapter: Path | None, reference: Reference
    ) -> str:
        """The fastest type on this machine that loses no more than is allowed."""

        def diverge(path: Path) -> float:
            report = certify(
                reference, [LocalModel(path.name, path, adapter)], threads=self._threads, speed=False
            ).report
            kl = _summarize(report["files"][0])["kl"]
            return math.inf if kl is None else kl

        make = partial(
            choose_type,
            source,
            self._stages.folder,
            diverge,
            loss=self._job.loss,
            imatrix=matrix,
            threads=self._threads,
            say=self._say,
        )
        files = [source, self._stages.folder / "reference", *([matrix] if matrix else [])]
        choice = self._run(f"choosing a type that loses at most {self._job.loss:g}", files, [], make)
        self._stages.note(auto=choice)
        self._say(choice["reason"])
        return choice["type"]

    def _weigh(self, source: Path, target: Path) -> None:
        data = self._trained.recipe.data if self._trained.record else DataOptions()
        dialogues = draw_dialogues(self._job.sources, held_out=data.held_out)
        matrix = compute_imatrix(
            source,
            dialogues,
            self._trained.role or "chat",
            threads=self._threads,
            datasets=[Path(name).name for name in self._job.sources],
        )
        write_imatrix(matrix, target)

    def _certify(self, reference: Reference, models: Sequence[LocalModel]) -> dict[str, Any]:
        """The certificate of all files; returns what certificate.json holds."""
        folder, thresholds = self._stages.folder, self._job.thresholds or Thresholds()

        def make() -> dict[str, Any]:
            speed = self._job.speed
            done = certify(reference, models, thresholds, threads=self._threads, speed=speed, say=self._say)
            done.write(folder, force=True)
            return {"passed": not done.failed, "failed": done.failed, "thresholds": asdict(thresholds)}

        files = {path for model in models for path in (model.path, model.adapter) if path}
        inputs = {
            **self._origin,
            "files": {
                path.name: self._stages.sum_of(path) for path in sorted(files | {folder / "reference"})
            },
            "thresholds": asdict(thresholds),
        }
        outputs = [folder / "certificate.json", folder / "certificate.html"]
        result = self._stages.run("certificate", inputs, outputs, make)
        self._stages.note(certificate={"passed": result["passed"], "failed": result["failed"]})
        return read_json(folder / "certificate.json")

    def _deliver(self, models: Sequence[LocalModel], report: dict[str, Any]) -> None:
        """README.md and Modelfile, for the files that are in the folder."""
        if not models:
            return
        trained, folder = self._trained, self._stages.folder
        release = Release(
            name=self._name,
            models=models,
            role=trained.role,
            license=trained.recipe.license or None,
            base_model=trained.base.name if "/" in trained.base.name and not trained.base.gguf else None,
        )
        write_delivery(folder, release, certificate=report, force=True)


def _summarize(file: Mapping[str, Any]) -> dict[str, Any]:
    """Of a certified file: KL from the trained model, held-out loss of the role, and that model's own."""
    own = (file.get("perplexity") or {}).get("own") or {}
    kl = (file.get("kl") or {}).get("mean") or {}
    losses = {name: round(math.log(own[key]["value"]), 5) if own.get(key) else None for name, key in _LOSSES}
    return {"kl": kl.get("value"), **losses}


def _is_in_16_bits(path: Path) -> bool:
    tensors = read_gguf(path).tensors.values()
    return all(tensor.type.name in _PLAIN for tensor in tensors if len(tensor.shape) > 1)


def _check_space(trained: TrainedFiles, types: Sequence[str], folder: Path) -> None:
    """Raise `OutputError` where the disk has no room for all that will be written."""
    weights, there = count_weights(trained), trained.base.gguf is not None
    kinds = {kind.name: kind for kind in tensor_kinds()}
    written = ["Q8_0" if name == _AUTO else name for name in types if name != "F16"]
    chosen = [kinds[main_type(name)] for name in written]
    bits = sum(_MARGIN * 8 * kind.bytes / kind.block for kind in chosen)
    bits += 16 if not trained.invocation or types else 0  # the merged model, or the base in 16 bits
    if trained.quantized:
        width = 8 * trained.dtype.itemsize
        bits += 32 + width + (32 if there else 0)  # both bases, and what they are made from
    elif not there:
        bits += 16
    needed = int(weights * bits / 8)
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    known = sum(path.stat().st_size for path in folder.glob("*.gguf")) if folder.is_dir() else 0
    free = shutil.disk_usage(place).free + known
    if free < needed:
        raise OutputError(
            f"{folder} needs about {format_bytes(needed)}, and the disk has {format_bytes(free)} left; "
            "free some space or name another place"
        )
