"""Training a network that tells dialects apart: from a recipe to a folder.

    model.onnx                 the network, its labels and its calibration: what `identify` runs
    network.pt                 the weights for torch: what `export` reads
    recipe.yaml                every value that was used
    training.json              data, measures, versions; written last
    README.md                  the model card
    curve.jsonl, curve.png     the loss and the held-out error, epoch by epoch
    confusion.png, det.png     of the held-out recordings
    checkpoint.pt              while the run goes on

A run is resumed at the epoch after its last checkpoint and ends in the same weights on the same machine.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import parrot_edge
from parrot_edge.dialect.audio import require_audio
from parrot_edge.dialect.calibration import fit_calibration
from parrot_edge.dialect.corpus import Split, Utterance, check_split, read_corpus, split_by_speaker
from parrot_edge.dialect.features import FeatureStore, normalize
from parrot_edge.dialect.runtime import Card
from parrot_edge.dialect.scoring import Scores, accuracy, eer, gather, measure, min_cavg
from parrot_edge.errors import ModelError, OutputError, UsageError
from parrot_edge.jsonl import encode, read_lines
from parrot_edge.machine import installed_version
from parrot_edge.recipe import DialectAugment, DialectRecipe, dump_recipe
from parrot_edge.store import read_json, write_json

LIBRARIES = ("torch", "onnx", "onnxruntime", "kaldi-native-fbank", "soundfile", "soxr", "matplotlib")

Say = Callable[[str], None]

_HELD_OUT_FRAMES = 1000  # of a longer recording the first ten seconds are measured
_WARM_UP = 0.1  # of all steps
_MARGIN_RISE = 0.5


@dataclass
class Job:
    """What a run is made of: its data as features, and what it is known by."""

    recipe: DialectRecipe
    labels: tuple[str, ...]
    train: FeatureStore
    train_labels: np.ndarray
    train_sources: list[str]
    held_out: FeatureStore
    held_out_rows: list[Utterance]
    identity: str
    skipped: int


def train(
    recipe: DialectRecipe,
    output: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Train the recipe's network into the folder `output`; returns what its `training.json` holds.

    With `resume`, goes on after the last checkpoint of the same recipe and data, or starts where there is
    none. Raises `OutputError` where the folder exists (`force` replaces it) or cannot be written,
    `InputError` for recordings, `UsageError` where the data cannot be split or a library is missing.
    """
    folder = Path(output)
    _check_folder(folder, resume=resume, force=force)
    if resume and (done := read_json(folder / "training.json")):
        say(f"{folder} is finished already")
        return done
    require_audio()
    missing = [name for name in LIBRARIES if not installed_version(name)]
    if missing:
        raise UsageError(f"training needs {', '.join(missing)}; run pip install 'parrot-edge[train,dialect]'")
    job = prepare(recipe, say=say)
    try:
        if force:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        return _run(job, folder, say)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from None


def split_data(recipe: DialectRecipe) -> Split:
    """The recordings of a recipe, those that are learned from and those that are held back."""
    data = recipe.data
    found = [each for place in data.sources for each in read_corpus(place, label_column=data.label_column)]
    if data.held_out_from:
        held = [each for at in data.held_out_from for each in read_corpus(at, label_column=data.label_column)]
        split = Split(tuple(found), tuple(held))
        check_split(split)
        return split
    return split_by_speaker(found, data.held_out, recipe.run.seed, sources=data.held_out_sources)


def prepare(recipe: DialectRecipe, *, say: Say = lambda line: None) -> Job:
    """Read, split and turn into features all that the recipe names; raises as `train` does."""
    split = split_data(recipe)
    common: dict[str, Any] = {
        "seed": recipe.run.seed,
        "cache": recipe.data.cache,
        "skip": recipe.data.bad_rows == "skip",
        "say": say,
    }
    store = FeatureStore.build(split.train, recipe.augment, **common)
    held_out = FeatureStore.build(split.held_out, DialectAugment(copies=0), **common)
    for line in [*store.skipped, *held_out.skipped][:3]:
        say(f"skipped: {line}")
    rows = [split.train[at] for at in store.kept]
    held_rows = [split.held_out[at] for at in held_out.kept]
    check_split(Split(tuple(rows), tuple(held_rows)))
    labels = tuple(sorted({each.label for each in rows}))
    say(
        f"{len(rows)} recordings of {len(labels)} labels and {len({each.who for each in rows})} speakers; "
        f"{len(held_rows)} of {len({each.who for each in held_rows})} others are held out"
    )
    for label in labels:
        if len({each.who for each in rows if each.label == label}) == 1:
            say(f"LABEL OF ONE SPEAKER: of {label!r} the model will learn a voice, not the dialect")
    return Job(
        recipe,
        labels,
        store,
        np.array([labels.index(each.label) for each in rows]),
        [each.source for each in rows],
        held_out,
        held_rows,
        json.dumps([asdict(replace(recipe, name="")), store.identity, held_out.identity], sort_keys=True),
        len(store.skipped) + len(held_out.skipped),
    )


def _run(job: Job, folder: Path, say: Say) -> dict[str, Any]:
    import torch

    from parrot_edge.dialect.batches import Batches
    from parrot_edge.dialect.layers import am_softmax
    from parrot_edge.dialect.network import build_network, count_parameters

    recipe, optim = job.recipe, job.recipe.optim
    device = _choose_device(recipe)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    torch.manual_seed(recipe.run.seed)
    model = build_network(recipe.network, len(job.labels)).to(device)
    batches = Batches(job.train, job.train_labels, recipe, job.train_sources)
    optimizer = torch.optim.AdamW(model.parameters(), lr=optim.learning_rate, weight_decay=optim.weight_decay)
    weights = batches.class_weights()
    class_weights = None if weights is None else torch.from_numpy(weights).to(device)
    say(f"{count_parameters(model):,} parameters, {batches.steps} steps an epoch, on {device}")
    (folder / "recipe.yaml").write_text(dump_recipe(hide_folders(recipe)), encoding="utf-8")

    state = _load_checkpoint(folder, job.identity)
    best: tuple[float, float] = (math.inf, math.inf)
    best_epoch, first, best_weights = -1, 0, None
    curve: list[dict[str, Any]] = []
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        best, best_epoch, best_weights = tuple(state["best"]), state["best_epoch"], state["best_weights"]
        first, curve = state["epoch"] + 1, state["curve"]
        say(f"going on with epoch {first + 1}")
    total = optim.epochs * batches.steps
    started = time.monotonic()
    for epoch in range(first, optim.epochs):
        if epoch - best_epoch > optim.patience and best_epoch >= 0:
            say(f"no better for {optim.patience} epochs; ending")
            break
        model.train()
        losses = []
        for at, (features, labels) in enumerate(batches.epoch(epoch)):
            done = (epoch * batches.steps + at) / total
            for group in optimizer.param_groups:
                group["lr"] = optim.learning_rate * learning_rate_share(done)
            _, cosines = model(torch.from_numpy(features).to(device))
            loss = am_softmax(
                cosines,
                torch.from_numpy(labels).to(device),
                margin=optim.margin * min(1.0, done / _MARGIN_RISE),
                scale=optim.scale,
                weights=class_weights,
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
            optimizer.step()
            losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise ModelError(
                f"the loss is {losses[-1]} in epoch {epoch + 1}; try --set optim.learning_rate="
                f"{optim.learning_rate / 3:.2g}"
            )
        scores = measure_held_out(model, job, device)
        figures = {"eer": float(eer(scores)[0]), "min_cavg": float(min_cavg(scores)[0])}
        figures |= {
            "accuracy": float(accuracy(scores)[0]),
            "held_out_loss": _balanced_loss(scores, optim.scale),
        }
        curve.append({"epoch": epoch + 1, "loss": round(float(np.mean(losses)), 6), **figures})
        here = (figures["eer"], figures["held_out_loss"])
        if here < best:
            best, best_epoch = here, epoch
            best_weights = {name: value.cpu().clone() for name, value in model.state_dict().items()}
        _save_checkpoint(
            folder,
            {
                "identity": job.identity,
                "epoch": epoch,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "best": list(best),
                "best_epoch": best_epoch,
                "best_weights": best_weights,
                "curve": curve,
            },
        )
        left = (time.monotonic() - started) / (epoch + 1 - first) * (optim.epochs - epoch - 1)
        say(
            f"epoch {epoch + 1}/{optim.epochs}: loss {curve[-1]['loss']:.3f}, "
            f"held-out EER {figures['eer']:.1%}, accuracy {figures['accuracy']:.1%}, {left / 60:.0f} min left"
        )
    assert best_weights is not None
    model.load_state_dict(best_weights)
    return _finish(job, folder, model.cpu(), curve, best_epoch + 1)


def learning_rate_share(done: float) -> float:
    """Share of the peak at a share of the run, 0..1: a linear rise, then half a cosine to 0.

    >>> [round(learning_rate_share(done), 2) for done in (0.05, 0.1, 0.55, 1)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if done < _WARM_UP:
        return done / _WARM_UP
    return (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP))) / 2


def measure_held_out(model: Any, job: Job, device: Any = "cpu") -> Scores:
    """The cosines of the held-out recordings, each by itself and in full up to ten seconds."""
    import torch

    model.eval()
    rows = []
    with torch.no_grad():
        for at in range(len(job.held_out)):
            features = normalize(job.held_out[at, 0][:_HELD_OUT_FRAMES])
            rows.append(model(torch.from_numpy(features)[None].to(device))[1][0].cpu().numpy())
    truth = [each.label for each in job.held_out_rows]
    return gather(job.labels, rows, truth, [each.who for each in job.held_out_rows])


def _balanced_loss(scores: Scores, scale: float) -> float:
    """Cross-entropy in nats of scaled cosines, a mean over labels."""
    known = scores.known()
    logits = scale * known.matrix
    top = logits.max(axis=1)
    losses = top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - logits[range(len(logits)), known.truth]
    return float(np.mean([losses[known.truth == label].mean() for label in np.unique(known.truth)]))


def _finish(job: Job, folder: Path, model: Any, curve: list[dict[str, Any]], epoch: int) -> dict[str, Any]:
    from parrot_edge.dialect import pictures
    from parrot_edge.dialect.export import export_onnx
    from parrot_edge.dialect.network import count_parameters

    recipe = job.recipe
    scores = measure_held_out(model, job)
    calibration = fit_calibration(scores.matrix, scores.truth)
    data = recipe.data
    split: dict[str, Any] = {}
    if not data.held_out_from:
        split = {"held_out": data.held_out, "seed": recipe.run.seed, "sources": list(data.held_out_sources)}
    card = Card(recipe.name, job.labels, calibration, split)
    difference = export_onnx(model, card, folder / "model.onnx", force=True)
    saved = {"network": asdict(recipe.network), "card": card.to_json(), "weights": model.state_dict()}
    _save(folder / "network.pt", saved)
    record = {
        "name": recipe.name,
        "recipe": asdict(hide_folders(recipe)),
        "labels": list(job.labels),
        "parameters": count_parameters(model),
        "epochs": curve[-1]["epoch"],
        "best_epoch": epoch,
        "data": {
            "recordings": len(job.train_labels),
            "held_out": len(job.held_out_rows),
            "skipped": job.skipped,
            "speakers_held_out": len({each.who for each in job.held_out_rows}),
        },
        "measures": measure(scores, calibration.log_likelihoods(scores.matrix), seed=recipe.run.seed),
        "calibration": asdict(calibration),
        "onnx_difference": difference,
        "versions": {
            "parrot_edge": parrot_edge.__version__,
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: installed_version(name) for name in LIBRARIES},
        },
    }
    (folder / "curve.jsonl").write_bytes(b"".join(map(encode, curve)))
    pictures.draw_curve([line.row() for line in read_lines(folder / "curve.jsonl")], folder / "curve.png")
    calibrated = replace(scores, matrix=calibration.log_likelihoods(scores.matrix))
    pictures.draw_confusion(calibrated, folder / "confusion.png")
    pictures.draw_det(calibrated, folder / "det.png")
    write_card(folder / "README.md", recipe, record)
    write_json(folder / "training.json", record)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return record


def load_trained(folder: str | Path) -> tuple[Any, Card]:
    """The network of a finished run with its weights, and its card; raises `ModelError`."""
    import torch

    from parrot_edge.dialect.network import build_network
    from parrot_edge.recipe import DialectNetwork

    path = Path(folder) / "network.pt"
    if not path.is_file():
        raise ModelError(f"{folder} holds no finished run of `parrot dialect train`")
    try:
        saved = torch.load(path, weights_only=True)
        card = Card.from_json(saved["card"])
        model = build_network(DialectNetwork(**saved["network"]), len(card.labels))
        model.load_state_dict(saved["weights"])
    except Exception as error:  # torch raises whatever its readers do
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{path} cannot be used ({reason}); train it again") from None
    return model.eval(), card


def write_card(path: Path, recipe: DialectRecipe, record: dict[str, Any]) -> None:
    """The model card, from what `training.json` will hold."""
    measures, data = record["measures"], record["data"]
    names = {
        "accuracy": "accuracy",
        "eer": "equal error rate",
        "cavg": "Cavg at the calibrated threshold",
        "min_cavg": "Cavg at the best of 21 thresholds (the challenge's figure)",
        "min_dcf": "minDCF",
    }
    figures = [
        "| {} | {value:.4f} | {low:.4f} to {high:.4f} |".format(title, **measures[key])
        for key, title in names.items()
    ]
    network = f"{recipe.network.architecture}, {record['parameters']:,} parameters"
    held_out = f"{data['held_out']:,} of {data['speakers_held_out']} other speakers held out"
    alone = measures["labels_of_one_speaker"]
    warning = (
        f"\nHeld out is only one speaker of: {', '.join(alone)}. The intervals do not know how others\n"
        "of that dialect would fare.\n"
        if alone
        else ""
    )
    text = f"""# {recipe.name}

Tells {", ".join(record["labels"])} apart by their sound. Trained by `parrot dialect train` with the recipe in
`recipe.yaml`; `training.json` holds everything below for programs.

- network: {network}, best after epoch {record["best_epoch"]}
- data: {data["recordings"]:,} recordings; {held_out}
- ONNX differs from torch by at most {record["onnx_difference"]:.1e}
- licence: {recipe.license or "not said"}

## Measures

| on the recordings held out | | 95 % interval over speakers |
| --- | --- | --- |
{chr(10).join(figures)}

The epoch was chosen and the probabilities were calibrated on these very recordings, so the figures are better
than those on others will be; `parrot dialect evaluate` measures on others. Speech from other microphones,
rooms or synthesisers than those trained on may be told apart far worse.
{warning}
![loss and held-out error](curve.png)
"""
    path.write_text(text, encoding="utf-8")


def hide_folders(recipe: DialectRecipe) -> DialectRecipe:
    """The recipe without the folders of this machine."""

    def short(places: Sequence[str]) -> tuple[str, ...]:
        return tuple(Path(place).name for place in places)

    data = recipe.data
    return replace(
        recipe,
        data=replace(data, sources=short(data.sources), held_out_from=short(data.held_out_from), cache=""),
    )


def _check_folder(folder: Path, *, resume: bool, force: bool) -> None:
    if resume and force:
        raise UsageError("--resume goes on with a folder and --force replaces it; choose one")
    if folder.exists() and not resume and not force:
        raise OutputError(f"{folder} exists; choose another, pass --force to replace it or --resume to go on")
    if resume and folder.exists() and not (folder / "recipe.yaml").is_file():
        raise OutputError(f"{folder} holds no run to go on with; choose another folder")


def _choose_device(recipe: DialectRecipe) -> Any:
    import torch

    if recipe.run.device == "gpu" and not torch.cuda.is_available():
        raise ModelError("the recipe wants a GPU and there is none; try --set run.device=cpu")
    return torch.device("cpu" if recipe.run.device == "cpu" or not torch.cuda.is_available() else "cuda")


def _load_checkpoint(folder: Path, identity: str) -> dict[str, Any] | None:
    import torch

    path = folder / "checkpoint.pt"
    if not path.is_file():
        return None
    state = torch.load(path, weights_only=True)
    if state["identity"] != identity:
        raise OutputError(
            f"{folder} was started with another recipe or other data; give --resume the same, or start anew "
            "with --force"
        )
    return state


def _save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    _save(folder / "checkpoint.pt", state)


def _save(path: Path, value: dict[str, Any]) -> None:
    import torch

    partial = path.with_name(path.name + ".partial")
    torch.save(value, partial)
    os.replace(partial, path)
