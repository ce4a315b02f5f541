"""Recipes: what is shipped loads, what is wrong is named."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from parrot_edge.cli.dialect import train as dialect_train
from parrot_edge.cli.recipes import recipes as recipes_command
from parrot_edge.cli.train import train as train_command
from parrot_edge.errors import InputError, OutputError, ParrotError, UsageError
from parrot_edge.recipe import (
    KINDS,
    TrainRecipe,
    copy_recipe,
    dump_recipe,
    find_recipe,
    list_recipes,
    load_recipe,
)

FOLDER = Path(__file__).parent.parent / "recipes"
SHIPPED = sorted(FOLDER.glob("*.yaml"), key=lambda path: path.stem)
COMMANDS = {"train": (["train"], train_command), "dialect": (["dialect", "train"], dialect_train)}


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text("# command\n# summary\n" + text, encoding="utf-8")
    return path


def test_recipes_are_shipped() -> None:
    assert len(SHIPPED) >= 10
    assert [recipe.name for recipe in list_recipes()] == [path.stem for path in SHIPPED]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_starts_with_its_command(path: Path) -> None:
    file, recipe = find_recipe(path.stem), load_recipe(path.stem)
    assert recipe.kind in KINDS
    assert recipe.name == path.stem
    assert file.summary.endswith(".")
    words = file.command.split()
    verb, command = COMMANDS[recipe.kind]
    assert words[: 2 + len(verb)] == ["parrot", *verb, path.stem]
    with command.make_context("train", words[1 + len(verb) :]) as context:  # the options exist
        assert context.params["recipe"] == path.stem


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_dumped_recipe_loads_as_the_same(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path.stem)
    copy = tmp_path / "dumped.yaml"
    copy.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(copy) == recipe


def test_overrides_take_the_type_of_their_field() -> None:
    recipe = load_recipe(
        "ask-135m-cpu",
        [
            "lora.rank=8",
            "optim.learning_rate=3e-5",
            "optim.checkpointing=true",
            "lora.activated=false",
            "lora.targets=q_proj, v_proj",
            "data.sources=a.jsonl,hf:owner/name:train",
            "run.report_to=",
            "data.system=text",
            "data.system_text=You are 7",
        ],
    )
    assert recipe.lora.rank == 8
    assert recipe.optim.learning_rate == 3e-5
    assert recipe.optim.checkpointing is True
    assert recipe.lora.targets == ("q_proj", "v_proj")
    assert recipe.data.sources == ("a.jsonl", "hf:owner/name:train")
    assert recipe.run.report_to == ()
    assert recipe.data.system_text == "You are 7"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.rnk=8", "the nearest is 'lora.rank'"),
        ("rank=8", "the nearest is 'lora.rank'"),
        ("data.max_lenght=8", "the nearest is 'data.max_length'"),
        ("lora.rank=eight", "lora.rank is 'eight'; it takes a whole number"),
        ("lora.rank=0", "lora.rank is 0; it must be 1 to 1024"),
        ("lora=8", "lora is a section"),
        ("optim.checkpointing=maybe", "optim.checkpointing is 'maybe'; it takes true or false"),
        ("base.quantization=int8", "use one of nf4, none"),
        ("optim.micro_batch=3", "optim.batch_size 2 is no multiple"),
        ("data.system_text=hello", "belong together"),
        ("lora.rank", "write section.key=value"),
    ],
)
def test_wrong_override_is_named(override: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("ask-135m-cpu", [override])
    assert said in str(caught.value)
    assert override.partition("=")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: train\nrole: ask\nlora: {rnk: 8}\n", "the nearest is 'lora.rank'"),
        ("kind: train\nrole: ask\nlora: {rank: yes}\n", "lora.rank is True; it takes a whole number"),
        ("kind: train\nrole: ask\nlora: {rank: 8.5}\n", "lora.rank is 8.5"),
        ("kind: train\nrole: ask\nlora: 8\n", "lora is a section"),
        ("kind: train\nrole: ask\nlora: {rank: 8, rank: 9}\n", "'rank' stands twice"),
        ("kind: train\nrole: teacher\n", "role is 'teacher'; use one of ask, chat"),
        ("kind: train\n", "role is missing"),
        ("kind: trian\nrole: ask\n", "kind is 'trian'; use one of train, dialect"),
        ("kind: train\nrole: ask\nobjective: dpo\n", "its role is 'chat'"),
        ("kind: [\n", "is not YAML in line"),
        ("kind: dialect\nnetwork: {blocks: [3, x]}\n", "network.blocks is 'x'; it takes a whole number"),
        ("kind: dialect\nnetwork: {blocks: 3}\n", "it takes a list of whole numbers"),
        ("kind: dialect\nnetwork: {blocks: [3]}\n", "the same number of blocks"),
        ("kind: dialect\nnetwork: {local_scales: 5}\n", "must divide"),
        ("kind: dialect\naugment: {speed: [9]}\n", "factors of 0.5 to 2"),
        ("- a\n", "holds no keys"),
        ("", "holds no keys"),
        ("kind: [a]\n", "kind is ['a']; use one of"),
        ("a: &a {b: 1}\nc: *a\n", "by an alias; write it out"),
        ("a: &a {b: *a}\n", "by an alias; write it out"),
        (f"a: {'[' * 2000}", "nests too deep"),
        ('name: "\\ud800"\n', "half of a surrogate pair in line"),
        (f"kind: train\nrole: ask\noptim: {{learning_rate: 1{'0' * 400}}}\n", "it takes a number"),
        (f"kind: train\nrole: ask\nlora: {{rank: 0x{'f' * 5000}}}\n", "a number of thousands of digits"),
        ("kind: train\nrole: ask\noptim: {epochs: .inf}\n", "optim.epochs is inf; it takes a number"),
        (f"kind: {'x' * 5000}\n", "...x"),
        ("kind: !!bool maybe\n", "not of the type in its tag"),
        ("kind: !!int ''\n", "not of the type in its tag"),
        ("kind: !!timestamp x\n", "not of the type in its tag"),
        ("kind: \0\n", "is not YAML: special characters are not allowed"),
        ("kind: train\nrole: ask\noptim: {epochs: 0}\n", "nothing to do"),
    ],
)
def test_wrong_file_is_named_with_its_key(text: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_float_without_a_point_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "kind: train\nrole: ask\noptim: {learning_rate: 3e-5, epochs: 2}\n")
    assert load_recipe(path).optim.learning_rate == 3e-5
    assert load_recipe(path).optim.epochs == 2.0


def test_unknown_recipe_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the nearest is 'ask-135m-cpu'"):
        load_recipe("ask-135m")
    with pytest.raises(InputError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_copy_refuses_an_existing_file(tmp_path: Path) -> None:
    copied = copy_recipe("ask-135m-cpu", tmp_path)
    assert copied == tmp_path / "ask-135m-cpu.yaml"
    assert load_recipe(copied) == load_recipe("ask-135m-cpu")
    with pytest.raises(OutputError, match="--force"):
        copy_recipe("ask-135m-cpu", copied)
    assert copy_recipe("chat-135m-cpu", copied, force=True) == copied
    with pytest.raises(OutputError, match="cannot be written"):
        copy_recipe("ask-135m-cpu", tmp_path / "none" / "a.yaml")


def run(command: click.Command, *arguments: str) -> str:
    result = CliRunner().invoke(command, arguments)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_recipes_command_lists_shows_copies_and_validates(tmp_path: Path) -> None:
    assert "ask-135m-cpu" in run(recipes_command, "list")
    assert len(json.loads(run(recipes_command, "list", "--json"))["recipes"]) == len(SHIPPED)
    assert run(recipes_command, "show", "ask-135m-cpu") == (FOLDER / "ask-135m-cpu.yaml").read_text()
    shown = json.loads(run(recipes_command, "show", "ask-135m-cpu", "--json", "--set", "lora.rank=4"))
    assert shown["lora"]["rank"] == 4
    assert set(shown) == set(asdict(load_recipe("ask-135m-cpu")))
    run(recipes_command, "copy", "ask-135m-cpu", str(tmp_path / "a.yaml"))
    assert "valid" in run(recipes_command, "validate", str(tmp_path / "a.yaml"), "ask-135m-cpu")
    assert (
        json.loads(run(recipes_command, "validate", "ask-135m-cpu", "--json"))["valid"][0]["kind"] == "train"
    )


def test_train_command_asks_for_data() -> None:
    with pytest.raises(UsageError, match="--data"):
        run(train_command, "ask-135m-cpu", "--dry-run")


def test_every_role_and_objective_has_a_recipe() -> None:
    loaded = [load_recipe(path.stem) for path in SHIPPED]
    train = [recipe for recipe in loaded if isinstance(recipe, TrainRecipe)]
    assert {(recipe.role, recipe.objective) for recipe in train} == {
        ("ask", "sft"),
        ("chat", "sft"),
        ("chat", "dpo"),
    }
    assert issubclass(UsageError, ParrotError)


def test_file_too_long_to_be_a_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="longer than 1 MiB"):
        load_recipe(write(tmp_path, "#" * (2**20 + 1)))


def test_merge_keys_cannot_fill_the_memory(tmp_path: Path) -> None:
    """Each line would hold twice what the one before it does."""
    lines = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 60))]
    with pytest.raises(InputError, match="by an alias; write it out"):
        load_recipe(write(tmp_path, "\n".join(lines)))
