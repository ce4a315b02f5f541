"""Certificates: a right file passes, and each file that was broken on purpose is caught by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_gguf import add_lora, cut, write_llama
from tiny_models import CHATML, make_llama, make_tokenizer

pytest.importorskip("gguf")
pytest.importorskip("trl")

from parrot_edge.convert.adapter import write_adapter
from parrot_edge.convert.certify import Certificate, Thresholds, certify, parse_thresholds
from parrot_edge.convert.listen import Extent, write_reference
from parrot_edge.convert.merge import merge_adapter
from parrot_edge.convert.quantize import quantize
from parrot_edge.convert.reference import Reference, read_reference
from parrot_edge.convert.trained import Trained, load_trained
from parrot_edge.errors import ModelError, OutputError, UsageError
from parrot_edge.models import LocalModel

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

EXTENT = Extent(tokens=1200, places=160, anchored=48, prompts=2, made=8)


def make_sure_llama() -> Any:
    """A random llama whose vocabulary is the tiny tokenizer's, and which is sure of what it says."""
    return make_llama(vocab_size=len(make_tokenizer()), initializer_range=0.3)


class Tiny:
    """A trained adapter over a tiny base, what it says, and files that are made of it, right or wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = make_tokenizer()
        make_sure_llama().save_pretrained(folder / "base")
        self.tokenizer.save_pretrained(folder / "base")
        add_lora(make_sure_llama(), folder / "adapter", lora_alpha=1)
        self.trained: Trained = replace(load_trained(folder / "adapter", str(folder / "base")), role="ask")
        self.dialogues = folder / "dialogues.jsonl"
        rows = [
            [f"How do I boil {n} eggs?", "Put them into water.", "and if it is cold? 1 2 3", "Wait."]
            for n in range(12)
        ]
        self.dialogues.write_text("".join(json.dumps({"data": row}) + "\n" for row in rows))
        self.reference = self.listen("reference", str(self.dialogues))

    def listen(self, name: str, *sources: str) -> Reference:
        return write_reference(self.trained, self.folder / name, sources, extent=EXTENT)

    def merge(self, *, strength: float = 1.0, change: Callable[[Any], None] | None = None) -> Any:
        """The adapter, so much of it, merged into the base."""
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer

        base = make_sure_llama()
        if change:
            change(base)
        adapted = PeftModel.from_pretrained(base, self.folder / "adapter")
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] *= strength
        return adapted.merge_and_unload()

    def write(self, name: str, model: Any = None, tokenizer: Any = None, **metadata: str) -> Path:
        metadata = {"general.license": "mit", "parrot.role": "ask", **metadata}
        path = self.folder / f"{name}.gguf"
        return write_llama(model or self.merge(), path, tokenizer or self.tokenizer, **metadata)

    def certify(self, path: Path, reference: Reference | None = None) -> Certificate:
        model = LocalModel(path.name, path)
        return certify(reference or self.reference, [model], threads=1, speed=False)

    def only_failure(self, path: Path, reference: Reference | None = None) -> str:
        """What is wrong with a file, where that is one thing."""
        [sentence] = self.certify(path, reference).failed
        return sentence


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def good(tiny: Tiny) -> Certificate:
    return tiny.certify(tiny.write("good"))


def test_right_file_passes_with_figures(tiny: Tiny, good: Certificate) -> None:
    assert good.failed == []
    assert good.report["passed"]
    [file] = good.report["files"]
    assert file["type"] == "F32"
    assert file["kl"]["mean"]["value"] < 1e-4
    assert file["agreement"]["value"] > 0.98
    assert file["perplexity"]["own"]["ratio"]["value"] == pytest.approx(1, abs=0.01)
    assert file["perplexity"]["other"]["ratio"]["value"] == pytest.approx(1, abs=0.01)
    assert file["ends"]["turn"]["places"] > 10
    assert file["ends"]["dialogue"]["places"] > 5
    assert file["template"]["checked"] > 20
    assert file["tokens"]["checked"] > 10
    assert sum(file["kl"]["histogram"]["counts"]) == len(tiny.reference.log_probs)
    for said in file["continuations"]:
        assert said["file"] == said["trained"]


def test_reference_is_what_training_sees(tiny: Tiny) -> None:
    import torch

    from parrot_edge.recipe import DataOptions
    from parrot_edge.train.data import CONTEXT, build_corpus

    options = DataOptions(sources=(str(tiny.dialogues),), held_out=0.0)
    rows = {row.input_ids.tobytes(): row for row in build_corpus(options, "ask", tiny.tokenizer).train}
    for passage in tiny.reference.passages:
        row = rows[np.int32(passage.tokens).tobytes()]
        assert passage.places[passage.own].tolist() == np.flatnonzero(row.labels != CONTEXT).tolist()
        with torch.no_grad():
            logits = tiny.trained.model(torch.tensor([passage.tokens])).logits[0]
        said = torch.log_softmax(logits, -1)[passage.places - 1, np.asarray(passage.tokens)[passage.places]]
        assert passage.log_probs == pytest.approx(said.numpy(), abs=1e-4)


def test_reference_refuses_existing_folder(tiny: Tiny) -> None:
    with pytest.raises(OutputError, match="exists"):
        tiny.listen("reference")


def test_damaged_reference_is_told(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="write one"):
        read_reference(tmp_path)
    shutil.copytree(tiny.folder / "reference", tmp_path / "cut")
    cut(tmp_path / "cut" / "log_probs.f16")
    with pytest.raises(ModelError, match="write the reference anew"):
        read_reference(tmp_path / "cut")


def test_without_dialogues_the_models_own_words_serve(tiny: Tiny) -> None:
    own = tiny.listen("own")
    assert own.made_up
    assert "--data" in own.missing[0]
    assert len(own.log_probs)
    certificate = tiny.certify(tiny.write("again"), own)
    assert certificate.failed == []
    assert certificate.report["reference"]["missing"] == own.missing


def test_activated_adapter_over_its_base_passes_and_is_caught_as_a_plain_one(
    tiny: Tiny, tmp_path: Path
) -> None:
    folder, path = tmp_path / "activated", tmp_path / "activated" / "adapter_config.json"
    shutil.copytree(tiny.folder / "adapter", folder)
    config = json.loads(path.read_text())
    invocation = tiny.tokenizer("<|im_start|>user\n").input_ids
    path.write_text(json.dumps({**config, "task_type": "CAUSAL_LM", "alora_invocation_tokens": invocation}))
    trained = replace(load_trained(folder, str(tiny.folder / "base")), role="ask")
    reference = write_reference(trained, tmp_path / "reference", [str(tiny.dialogues)], extent=EXTENT)
    base = tiny.write("base", make_sure_llama())
    failed = []
    for name in ("activated", "plain"):
        write_adapter(folder, base, tmp_path / f"{name}.gguf", name="ask", license_id="mit")
        path.write_text(json.dumps(config))
        pair = LocalModel(name, base, tmp_path / f"{name}.gguf")
        failed.append(certify(reference, [pair], threads=1, speed=False).failed)
    assert failed[0] == []
    assert "was trained to start at" in failed[1][0]
    assert any("KL divergence" in sentence for sentence in failed[1])


def test_wrong_chat_template_is_caught(tiny: Tiny) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML.replace("You are a helpful AI assistant", "You are Tiny")
    sentence = tiny.only_failure(tiny.write("template", tokenizer=tokenizer))
    assert "template" in sentence
    assert "You are Tiny" in sentence


def test_missing_end_token_is_caught(tiny: Tiny) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|user|>"
    sentence = tiny.only_failure(tiny.write("eos", tokenizer=tokenizer))
    assert "end of text" in sentence
    assert "eos_token_id" in sentence


def test_end_token_that_stops_no_program_is_caught(tiny: Tiny, tmp_path: Path) -> None:
    """llama.cpp knows <|im_end|> by its name; what closes a turn in other templates it must be told."""
    template = CHATML.replace("<|im_end|>", "<|User|>")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    trained = replace(tiny.trained, tokenizer=tokenizer)
    reference = write_reference(trained, tmp_path / "reference", [str(tiny.dialogues)], extent=EXTENT)
    sentence = tiny.only_failure(tiny.write("babbles", tokenizer=tokenizer), reference)
    assert "does not stop at '<|User|>'" in sentence
    assert "eot_token_id" in sentence


def test_swapped_vocabulary_entry_is_caught(tiny: Tiny) -> None:
    class Swapped:
        def __getattr__(self, name: str) -> Any:
            return getattr(tiny.tokenizer, name)

        def convert_ids_to_tokens(self, ids: Any) -> list[str]:
            tokens = tiny.tokenizer.convert_ids_to_tokens(ids)
            one, other = tokens.index("w"), tokens.index("z")
            tokens[one], tokens[other] = tokens[other], tokens[one]
            return tokens

    failed = tiny.certify(tiny.write("swapped", tokenizer=Swapped())).failed
    assert len(failed) == 2
    assert "2 of" in failed[0]
    assert "tokens differ" in failed[0]
    assert "other tokens" in failed[1]


def noisy(model: Any) -> None:
    """Another version of the same base."""
    import torch

    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter += 0.02 * torch.randn_like(parameter)


def repacked(model: Any) -> None:
    """What is read of 4-bit weights after they were laid out anew for evaluation: their rows mixed up."""
    import torch

    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))


@pytest.mark.parametrize(
    ("name", "options", "words", "strength"),
    [
        ("wrong-base", {"change": noisy}, "not those that were trained over", None),
        ("twice", {"strength": 2.0}, "in it twice", 2.0),
        ("unmerged", {"strength": 0.0}, "what the base alone says", 0.0),
        ("half", {"strength": 0.5}, "times the adapter", 0.5),
        ("unscaled", {"strength": 1.5}, "times the adapter", 1.5),
    ],
)
def test_wrong_merge_is_caught_and_named(
    tiny: Tiny, name: str, options: dict[str, Any], words: str, strength: float | None
) -> None:
    certificate = tiny.certify(tiny.write(name, tiny.merge(**options)))
    [file] = certificate.report["files"]
    [sentence] = [sentence for sentence in certificate.failed if "KL divergence" in sentence]
    assert words in sentence
    if strength is not None:
        assert file["diagnosis"]["strength"] == pytest.approx(strength, abs=0.1)


def test_garbage_of_a_repacked_4_bit_base_is_caught_and_named(tiny: Tiny) -> None:
    certificate = tiny.certify(tiny.write("garbage", tiny.merge(change=repacked)))
    assert any("4-bit base that was evaluated" in sentence for sentence in certificate.failed)


def test_truncated_file_is_caught(tiny: Tiny) -> None:
    path = tiny.write("cut")
    cut(path)
    assert "cut short" in tiny.only_failure(path)


def test_local_path_missing_licence_and_wrong_role_are_caught(tiny: Tiny) -> None:
    reference = replace(tiny.reference, facts={**tiny.reference.facts, "license": "apache-2.0"})
    path = tiny.write("told", **{"general.source.url": "/home/me/models/tiny", "parrot.role": "chat"})
    folder, role = tiny.certify(path, reference).failed
    assert "plays chat" in role
    assert "/home/me" in folder


def test_matrices_of_another_type_are_noted(tiny: Tiny, good: Certificate) -> None:
    quantize(tiny.folder / "good.gguf", tiny.folder / "small.gguf", "Q4_K_M", threads=1)
    [file] = tiny.certify(tiny.folder / "small.gguf").report["files"]
    assert any(
        note.startswith("In small.gguf, ") and "do not divide by the 256" in note for note in file["notes"]
    )


def test_one_bad_file_does_not_hide_the_others(tiny: Tiny, good: Certificate) -> None:
    missing = LocalModel("missing.gguf", tiny.folder / "missing.gguf")
    right = LocalModel("good.gguf", tiny.folder / "good.gguf")
    report = certify(tiny.reference, [missing, right], threads=1).report
    assert [bool(file["failed"]) for file in report["files"]] == [True, False]
    assert report["files"][1]["speed"]["decode"] > 0


def test_thresholds_can_be_set(tiny: Tiny, good: Certificate) -> None:
    strict = certify(
        tiny.reference,
        [LocalModel("good.gguf", tiny.folder / "good.gguf")],
        parse_thresholds(["kl=0"]),
        threads=1,
        speed=False,
    )
    assert "and 0 is allowed for F32" in strict.failed[0]
    limits = parse_thresholds(["kl.q4_k_m=0.2", "perplexity=1.5"])
    assert limits.kl_limit("Q4_K_M") == 0.2
    assert limits.perplexity == 1.5
    assert limits.kl_limit("Q4_0") == Thresholds().kl_limit("IQ4_NL")


@pytest.mark.parametrize("setting", ["kl", "kl=x", "kl=-1", "perplexity=nan", "speed=3", "kl.=1"])
def test_threshold_that_is_none_is_refused(setting: str) -> None:
    with pytest.raises(UsageError):
        parse_thresholds([setting])


def test_certificate_is_written_once(tmp_path: Path, good: Certificate) -> None:
    good.write(tmp_path)
    assert json.loads((tmp_path / "certificate.json").read_text()) == good.report
    page = (tmp_path / "certificate.html").read_text()
    assert "This file says what was trained." in page
    with pytest.raises(OutputError, match="exists"):
        good.write(tmp_path)
    good.write(tmp_path, force=True)


class Real:
    """A random adapter over the real 135M model, merged into it without torch, in 16 and 8 bits."""

    def __init__(self, folder: Path, embedded_model: Path) -> None:
        from safetensors.numpy import save_file

        adapter = folder / "adapter"
        adapter.mkdir()
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
        config["target_modules"] = ["q_proj", "v_proj"]
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        random, weights = np.random.default_rng(0), {}
        for block in range(30):
            for part, rows in (("q", 576), ("v", 192)):
                name = f"base_model.model.model.layers.{block}.self_attn.{part}_proj.lora_"
                weights[name + "A.weight"] = random.normal(0, 0.04, (4, 576)).astype(np.float32)
                weights[name + "B.weight"] = random.normal(0, 0.04, (rows, 4)).astype(np.float32)
        save_file(weights, adapter / "adapter_model.safetensors")
        extent = Extent(tokens=300, longest=300, places=80, anchored=16, prompts=1, made=8)
        rows = [
            {"role": "user", "content": "my sourdough is flat again, what am i doing wrong?"},
            {"role": "assistant", "content": "Most flat loaves are underproofed. How warm is the dough?"},
            {"role": "user", "content": "about 18 degrees, is that too cold?"},
            {"role": "assistant", "content": "Yes. Give it twice as long, or a warmer place."},
        ]
        data = folder / "data.jsonl"
        data.write_text(json.dumps({"messages": rows}) + "\n")
        trained = load_trained(adapter, "smollm2")
        self.reference = write_reference(trained, folder / "reference", [str(data)], extent=extent)
        lora, self.f16, self.q8 = (folder / name for name in ("lora.gguf", "f16.gguf", "q8_0.gguf"))
        write_adapter(adapter, embedded_model, lora, name="random", license_id="mit")
        merge_adapter(embedded_model, lora, self.f16)
        quantize(self.f16, self.q8, "Q8_0", threads=1)
        self.base = LocalModel("base", embedded_model)
        self.models = [LocalModel(path.name, path) for path in (self.f16, self.q8)]
        self.pair = LocalModel("twice", self.f16, lora)


@pytest.mark.slow
def test_real_model_says_the_same_in_16_and_8_bits(embedded_model: Path, tmp_path: Path) -> None:
    real = Real(tmp_path, embedded_model)
    models = [*real.models, real.base, real.pair]
    strict = parse_thresholds(["kl.Q4_1=0.01"])
    report = certify(real.reference, models, strict, threads=1, speed=False).report
    f16, q8, base, twice = report["files"]
    assert f16["failed"] == q8["failed"] == []
    assert f16["kl"]["mean"]["value"] <= 0.002
    assert q8["kl"]["mean"]["value"] <= 0.01
    assert base["diagnosis"]["name"] == "none"
    assert twice["diagnosis"]["name"] == "twice"
