"""Training: every shipped recipe takes a step, runs repeat and resume exactly, failures leave no ruins."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import make_base, make_tokenizer

from parrot_edge.errors import InputError, ModelError, OutputError, ParrotError, UsageError
from parrot_edge.recipe import load_recipe

pytest.importorskip("trl")

from parrot_edge.train import loops, plan, trainer
from parrot_edge.train.data import CONTEXT, Row, find_active
from parrot_edge.train.trainer import plan_run, train

SHIPPED = [
    path
    for path in sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
    if load_recipe(path.stem).kind == "train"
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "dialogues.jsonl"
    rows = [{"data": [f"How about {n}?", "Boil it.", "why" * (1 + n % 3), "Because."]} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"Is {n} cold?", "chosen": "It is.", "rejected": "What is cold?"} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def recipe(base: Path, dialogues: Path) -> Any:
    def make(*overrides: str) -> Any:
        return load_recipe(
            "ask-135m-cpu",
            [
                f"base.name={base}",
                f"data.sources={dialogues}",
                "data.max_length=128",
                "data.held_out=0.2",
                "lora.rank=4",
                "lora.dropout=0.1",
                "optim.batch_size=2",
                "optim.epochs=2",
                "optim.learning_rate=1e-2",
                "run.save_steps=2",
                *overrides,
            ],
        )

    return make


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_one_step_of_every_shipped_recipe(
    path: Path, base: Path, dialogues: Path, pairs: Path, tmp_path: Path
) -> None:
    shipped = load_recipe(path.stem)
    small = load_recipe(
        path.stem,
        [
            f"base.name={base}",
            f"data.sources={pairs if shipped.objective == 'dpo' else dialogues}",
            "data.max_length=128",
            "base.dtype=float32",
            "optim.batch_size=4",
            "optim.max_steps=1",
            "run.device=cpu",
            "data.held_out=0.2",
        ],
    )
    record = train(small, tmp_path / "out")
    assert record["measures"]["steps"] == 1
    assert record["measures"]["after"]
    assert record["recipe"]["base"]["quantization"] == shipped.base.quantization
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "loss.jsonl", "loss.png"),
        *("recipe.yaml", "training.json"),
    ]


def test_there_are_recipes_to_run() -> None:
    assert len(SHIPPED) >= 10


def test_training_lowers_the_held_out_loss_and_writes_what_it_did(recipe: Any, tmp_path: Path) -> None:
    said: list[str] = []
    record = train(recipe("optim.epochs=6", "license=apache-2.0"), tmp_path / "out", say=said.append)
    measures = record["measures"]
    assert measures["after"]["held-out loss"] < 0.9 * measures["before"]["held-out loss"]
    assert json.loads((tmp_path / "out" / "training.json").read_text()) == json.loads(json.dumps(record))
    assert record["prompt"]["user_header"] == "\n<|im_start|>user\n"
    assert record["prompt"]["end_marker"] == ""
    assert record["base"]["name"] == "tiny-llama"
    assert record["versions"]["trl"]
    assert record["data"]["sources"][0]["rows"] == 24
    rows = curve(tmp_path / "out")
    assert [row["step"] for row in rows] == list(range(1, measures["steps"] + 1))
    assert rows[-1]["tokens"] == measures["tokens"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert said[0].startswith("plan: ")
    assert any("tokens/s" in line and "left" in line for line in said)
    assert load_recipe(tmp_path / "out" / "recipe.yaml").lora.rank == 4
    for item in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in item.read_bytes(), f"{item.name} names a folder"
        assert str(recipe().base.name).encode() not in item.read_bytes()


def test_same_seed_makes_the_same_adapter(recipe: Any, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        train(recipe(f"run.seed={seed}", "optim.max_steps=3"), tmp_path / name)
    assert weights(tmp_path / "one") == weights(tmp_path / "same")
    assert weights(tmp_path / "one") != weights(tmp_path / "other")


@pytest.mark.parametrize(
    ("killed", "more"), [(3, ()), (9, ("data.batching=bucketed",)), (9, ("base.quantization=nf4",))]
)
def test_killed_run_resumes_to_the_same_end(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int, more: tuple[str, ...]
) -> None:
    small = recipe("data.batching=plain", "optim.epochs=1.5", *more)
    train(small, tmp_path / "whole")
    report = loops.Progress.on_log

    def die(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        report(self, args, state, control, **rest)
        if state.global_step == killed:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loops.Progress, "on_log", die)
        with pytest.raises(KeyboardInterrupt):
            train(small, tmp_path / "killed")
    # what a kill in the middle of a checkpoint leaves is not gone on from
    (tmp_path / "killed" / "checkpoints" / "unfinished" / "checkpoint-99").mkdir(parents=True)
    said: list[str] = []
    train(small, tmp_path / "killed", resume=True, say=said.append)
    assert f"going on from step {killed - 1}" in said
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    keys = ("step", "tokens", "loss", "learning_rate")
    assert [[row[key] for key in keys] for row in curve(tmp_path / "killed")] == [
        [row[key] for key in keys] for row in curve(tmp_path / "whole")
    ]
    again = train(small, tmp_path / "killed", resume=True)
    assert again == json.loads((tmp_path / "killed" / "training.json").read_text())


def test_preference_run_resumes_to_the_same_end(
    base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = load_recipe(
        "dpo-135m-cpu",
        [f"base.name={base}", f"data.sources={pairs}", "data.max_length=128", "optim.batch_size=4",
         "run.save_steps=2", "optim.learning_rate=1e-2", "optim.epochs=2"],
    )  # fmt: skip
    record = train(small, tmp_path / "whole")
    assert record["measures"]["after"]["held-out rewards/accuracies"] == 1.0
    assert record["measures"]["after"]["held-out rewards/margins"] > 0
    with monkeypatch.context() as patch:
        patch.setattr(loops.Progress, "on_log", _raise_at(5, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            train(small, tmp_path / "killed")
    train(small, tmp_path / "killed", resume=True)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def _raise_at(step: int, error: BaseException) -> Any:
    def on_log(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == step:
            raise error

    return on_log


def test_adapter_goes_on_from_an_adapter(recipe: Any, tmp_path: Path) -> None:
    train(recipe(), tmp_path / "first")
    before = train(recipe(), tmp_path / "fresh")["measures"]["after"]["held-out loss"]
    more = recipe(f"base.adapter={tmp_path / 'first'}", "optim.max_steps=1", "optim.learning_rate=0")
    after = train(more, tmp_path / "more")["measures"]["after"]["held-out loss"]
    assert after == pytest.approx(before, rel=1e-5)
    with pytest.raises(ModelError, match=r"the adapter .* cannot be loaded"):
        train(recipe(f"base.adapter={tmp_path}"), tmp_path / "none")


def test_layers_and_targets_are_the_ones_asked_for(recipe: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    train(recipe("lora.layers=1", "lora.targets=q_proj,v_proj", "optim.max_steps=1"), tmp_path / "out")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "np") as tensors:
        names = set(tensors.keys())
    assert len(names) == 4
    assert all(".layers.1.self_attn." in name for name in names)
    with pytest.raises(ModelError, match=r"no layer 'c_attn'; lora\.targets can be down_proj"):
        plan_run(recipe("lora.targets=c_attn"))
    with pytest.raises(ModelError, match="the base has 2 blocks"):
        plan_run(recipe("lora.layers=3"))


# The loss


def test_loss_is_the_mean_over_all_learned_tokens(base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from parrot_edge.train.base import SEGMENTS, register_segments

    register_segments()
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=SEGMENTS)
    rows = []
    for size in (9, 5, 14):
        ids = torch.randint(0, 300, (size,)).numpy().astype("int32")
        labels = ids.copy()
        labels[: size // 2] = -100
        rows.append(Row(ids, labels, ""))
    batch = loops.lay_out([loops.to_record(rows[:2]), loops.to_record(rows[2:])])
    packed, count = loops.sum_loss(model, batch)
    alone = 0.0
    for row in rows:
        ids = torch.tensor(row.input_ids[None].astype("int64"))
        labels = torch.tensor(row.labels[None].astype("int64"))
        alone += model(ids, labels=labels).loss.item() * row.targets
    assert int(count) == sum(row.targets for row in rows)
    assert packed.item() == pytest.approx(alone, rel=1e-5)
    # the way that is taken on a GPU
    add_fused_lm_head(model)
    fused = model(**batch, use_cache=False, fused_lm_head=True).log_probs
    assert -fused.sum().item() == pytest.approx(alone, rel=1e-5)


def test_sampler_orders_rows_by_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int, **options: Any) -> list[int]:
        return list(loops.RowSampler(100, seed, lambda: epoch, **options))

    assert order(0, 0) == order(0, 0)
    assert sorted(order(0, 1)) == list(range(100))
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    sizes = [n % 10 for n in range(100)]
    bucketed = order(0, 0, sizes=sizes, batch=5)
    assert sorted(bucketed) == list(range(100))
    assert all(len({sizes[n] for n in bucketed[start : start + 5]}) == 1 for start in range(0, 100, 5))


# The plan


def test_plan_counts_what_the_run_then_does(recipe: Any, tmp_path: Path) -> None:
    planned = plan_run(recipe())
    record = train(recipe(), tmp_path / "out")
    assert planned.steps == record["measures"]["steps"]
    assert planned.shape.trained == record["trained_parameters"]
    assert planned.tokens * 2 == record["measures"]["tokens"]
    assert planned.memory > 0.5e9
    assert planned.seconds > 0
    assert len(planned.lines()) == 3


def test_plan_draws_no_random_numbers_of_the_run(recipe: Any) -> None:
    """The adapter starts from them, and how often a block is timed depends on the machine."""
    import torch

    before = torch.get_rng_state()
    plan_run(recipe("lora.dropout=0.5"))
    assert torch.equal(torch.get_rng_state(), before)


def test_run_that_cannot_fit_is_refused_before_it_starts(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MEMORY_SHARE", 1e-6)
    with pytest.raises(ModelError, match=r"this needs about .* free; set a smaller data\.max_length"):
        train(recipe(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_of_a_13b_fits_its_card() -> None:
    # Llama 2 13B: 12.7e9 parameters in linear layers, 0.33e9 in embeddings and head
    shape = plan.Shape(12_687_769_600, 328_094_720, 62_586_880, 5120, 13824, 40, 32000)
    small = load_recipe("ask-13b-24gb")
    needed = plan.estimate_memory(small, shape, tokens=2048, targets=2048, device="cuda", width=2)
    assert 8e9 < needed < 24e9
    whole = load_recipe("ask-13b-24gb", ["base.quantization=none"])
    assert plan.estimate_memory(whole, shape, tokens=2048, targets=2048, device="cuda", width=2) > 24e9


# What goes wrong


def test_existing_folder_is_refused(recipe: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputError, match="--force"):
        train(recipe(), out)
    with pytest.raises(OutputError, match="holds no run"):
        train(recipe(), out, resume=True)
    with pytest.raises(UsageError, match="choose one"):
        train(recipe(), out, resume=True, force=True)
    train(recipe("optim.max_steps=1"), out, force=True)
    assert weights(out)


def test_resume_of_a_damaged_run_is_refused(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training.json").write_text("[" * 100_000)
    with pytest.raises(OutputError, match=r"training.json cannot be read: .*--force"):
        train(recipe(), tmp_path / "out", resume=True)


def test_resume_with_another_recipe_is_refused(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loops.Progress, "on_log", _raise_at(3, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            train(recipe(), tmp_path / "out")
    with pytest.raises(OutputError, match=r"another recipe \(lora\.rank\)"):
        train(recipe("lora.rank=2"), tmp_path / "out", resume=True)


def test_running_out_of_memory_leaves_the_last_checkpoint(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    train(recipe(), tmp_path / "whole")
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        with monkeypatch.context() as patch:
            patch.setattr(loops.Progress, "on_log", _raise_at(3, error))
            with pytest.raises(ModelError, match="memory ran out while training; checkpoint-2 is whole"):
                train(recipe(), tmp_path / "out", force=True)
    train(recipe(), tmp_path / "out", resume=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize("call", [2, "last"])
def test_full_disk_leaves_the_last_checkpoint(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    train(recipe(), tmp_path / "whole")
    save, calls = loops.save_adapter, 0

    def fill(model: Any, folder: Path, invocation: list[int]) -> None:
        nonlocal calls
        calls += 1
        save(model, folder, invocation)
        if calls == call or (call == "last" and folder.name == "unfinished"):
            (folder / "adapter_model.safetensors").write_bytes(b"torn")
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loops, "save_adapter", fill)
        with pytest.raises(OutputError, match=r"No space left on device; checkpoint-\d+ is whole.*--resume"):
            train(recipe(), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("unfinished"))
    train(recipe(), tmp_path / "out", resume=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_folder_that_cannot_be_written_is_named(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written: Not a directory"):
        train(recipe(), tmp_path / "file" / "out")


def test_gpu_recipe_without_a_gpu_is_refused(recipe: Any) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ModelError, match="wants a GPU and there is none"):
        plan_run(recipe("run.device=gpu"))


def test_base_that_cannot_be_used_is_named(recipe: Any, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        plan_run(recipe(f"base.name={tmp_path}"))
    with pytest.raises(ModelError, match="does not exist"):
        plan_run(recipe("base.name=none.gguf"))
    with pytest.raises(ModelError, match="takes 4096 tokens"):
        plan_run(recipe("data.max_length=5000"))
    with pytest.raises(ModelError, match=r"none\.jinja cannot be read"):
        plan_run(recipe("base.chat_template=none.jinja"))
    with pytest.raises(ModelError, match="leaves out what was said"):
        plan_run(recipe("base.chat_template={{ messages[0]['content'] }}{{ messages[-1]['content'] }}"))

    folder = tmp_path / "plain"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    make_base(folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="no chat template"):
        plan_run(recipe(f"base.name={folder}"))

    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra{n}>" for n in range(50)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="do not belong together"):
        plan_run(recipe(f"base.name={folder}"))


def test_base_without_safetensors_is_refused(recipe: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = make_base(tmp_path / "pickled")
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        train(recipe(f"base.name={folder}"), tmp_path / "out")


def test_bad_data_is_named_before_anything_is_made(recipe: Any, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl:1: has no assistant turn"):
        train(recipe(f"data.sources={data}", "data.bad_rows=refuse"), tmp_path / "out")
    with pytest.raises(InputError, match="nothing that the ask role could learn"):
        train(recipe(f"data.sources={data}"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_libraries_are_named(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "LIBRARIES", ("torch", "no-such-library"))
    with pytest.raises(
        UsageError, match=r"training needs no-such-library; run pip install 'parrot-edge\[train\]'"
    ):
        plan_run(recipe())


# The embedded model


@pytest.fixture(scope="module")
def real_tokenizer() -> Iterator[Any]:
    from parrot_edge.recipe import BaseOptions
    from parrot_edge.train.base import Base, load_tokenizer

    options = BaseOptions()
    with trainer.quiet_libraries():
        yield load_tokenizer(Base.locate(options), options)


def test_tokens_of_the_embedded_model_are_those_of_llama_cpp(real_tokenizer: Any) -> None:
    from parrot_edge.engine import native
    from parrot_edge.models import embedded_path

    texts = ["1. one\n\n2. two", "x = 3.14159\t# π\r\n", "  two  spaces  ", "你好 🦜 naïve", "DON'T 100%"]
    with native.Model(embedded_path(), vocab_only=True) as vocabulary:
        for text in texts:
            ids = real_tokenizer(text, add_special_tokens=False).input_ids
            assert ids == vocabulary.tokenize(text.encode())
            assert real_tokenizer.decode(ids) == text


def test_tokenizer_that_splits_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from parrot_edge.engine import native
    from parrot_edge.recipe import BaseOptions
    from parrot_edge.train.base import Base, load_tokenizer

    monkeypatch.setattr(native.Model, "tokenize", lambda self, text, **_: [1, 2, 3])
    with trainer.quiet_libraries(), pytest.raises(ModelError, match="split text differently"):
        load_tokenizer(Base.locate(BaseOptions()), BaseOptions())


def test_every_failure_is_one_sentence(recipe: Any, tmp_path: Path) -> None:
    for overrides in (["run.device=gpu"], ["base.name=none.gguf"], ["data.sources=none.jsonl"]):
        with pytest.raises(ParrotError) as caught:
            plan_run(recipe(*overrides))
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # peft's call
def test_activated_loss_is_that_of_pefts_activated_lora(base: Path) -> None:
    """Two dialogues packed, three turns at once, against peft reading each turn in a row of its own."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from parrot_edge.train.base import SEGMENTS, register_segments

    register_segments()
    rng = np.random.default_rng(0)
    header = [7, 8]
    rows = []
    for shape in ((6, 5, 9, 4), (3, 7)):  # context, turn, context, turn; context, turn
        ids, labels = [], []
        for index, size in enumerate(shape):
            tokens = rng.integers(20, 300, size).tolist()
            ids += [*header, *tokens] if index % 2 else tokens
            labels += [CONTEXT, CONTEXT, *tokens] if index % 2 else [CONTEXT] * size
        rows.append(Row(np.array(ids, np.int32), np.array(labels, np.int32), "s"))

    def adapted(attention: str, invocation: list[int] | None) -> Any:
        model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=attention, dtype=torch.float32)
        config = LoraConfig(
            r=4, target_modules="all-linear", task_type="CAUSAL_LM", alora_invocation_tokens=invocation
        )
        model = get_peft_model(model, config)
        torch.manual_seed(1)
        for name, values in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(values, std=0.3)
        return model

    ours, theirs = adapted(SEGMENTS, None), adapted("eager", header)
    batch = loops.lay_out([loops.to_record(rows[:1], header), loops.to_record(rows[1:], header)])
    total, count = loops.sum_loss(ours, batch)
    expected = plain = 0.0
    for row in rows:
        for start, stop in find_active(row, header):
            ids = torch.tensor(row.input_ids[:stop].tolist())[None]
            labels = torch.full_like(ids, CONTEXT)
            labels[0, start + 2 :] = ids[0, start + 2 :]
            scores = theirs(input_ids=ids).logits[0, :-1].log_softmax(-1)
            kept = (labels[0, 1:] != CONTEXT).nonzero()[:, 0]
            expected -= scores[kept, ids[0, 1:][kept]].sum().item()
            whole = ours(input_ids=ids).logits[0, :-1].log_softmax(-1)
            plain -= whole[kept, ids[0, 1:][kept]].sum().item()
    assert int(count) == 16
    assert total.item() == pytest.approx(expected, rel=1e-4)
    assert abs(plain - expected) > 1e-3 * expected  # an adapter that reads the history too says otherwise


def test_activated_adapter_names_its_invocation(recipe: Any, tmp_path: Path) -> None:
    record = train(recipe("optim.max_steps=1"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    header = make_tokenizer()("<|im_start|>user\n", add_special_tokens=False)["input_ids"]
    assert config["alora_invocation_tokens"] == record["invocation"] == header
