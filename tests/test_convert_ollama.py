"""Chat templates taken apart, and said again in Go."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import TEMPLATES

from parrot_edge.convert.ollama import Pieces, find_pieces, to_go_template, write_modelfile
from parrot_edge.dialogue import Message
from parrot_edge.engine.template import ChatTemplate

DIALOGUE = [Message("user", "Hi"), Message("assistant", "Ho"), Message("user", 'Say "a\\nb" {{ .X }}')]


def parse(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos="<s>", eos="</s>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_pieces_say_what_the_template_says(name: str) -> None:
    template = parse(TEMPLATES[name])
    pieces = find_pieces(template)
    assert pieces is not None
    assert pieces.render(DIALOGUE) == template.render(DIALOGUE)
    if pieces.system is not None:
        told = [Message("system", "Be brief."), *DIALOGUE]
        assert pieces.render(told) == template.render(told)


def test_template_that_does_more_than_enclose_texts_is_not_taken_apart() -> None:
    shouting = "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}<assistant>"
    counting = "{% for m in messages %}{{ loop.index }} {{ m.content }}\n{% endfor %}{{ messages | length }}>"
    last_only = "<user>{{ messages[-1].content }}<assistant>"
    for source in (shouting, counting, last_only):
        assert find_pieces(parse(source)) is None


def test_go_template_holds_each_piece_as_a_literal() -> None:
    pieces = Pieces('<s>say "x"\n', ("<s>[", "]\n"), "{{a}}", "", "\\b")
    assert to_go_template(pieces, bos="<s>").split("\n") == [
        '{{- if not .System }}{{ "say \\"x\\"\\n" }}{{ end }}',
        "{{- range $i, $_ := .Messages }}",
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
        '{{- if eq .Role "system" }}{{ "[" }}{{ .Content }}{{ "]\\n" }}{{ end }}',
        '{{- if eq .Role "user" }}{{ .Content }}{{ "{{a}}" }}{{ end }}',
        '{{- if eq .Role "assistant" }}{{ .Content }}{{ if not $last }}{{ "\\\\b" }}{{ end }}{{ end }}',
        "{{- end }}",
    ]


def test_modelfile_of_the_real_model(embedded_model: Path) -> None:
    lines = write_modelfile(embedded_model, Path("lora.gguf")).split("\n")
    assert lines[:2] == [f"FROM ./{embedded_model.name}", "ADAPTER ./lora.gguf"]
    assert lines[2].startswith('TEMPLATE """{{- if not .System }}{{ "<|im_start|>system\\nYou are a helpful')
    assert lines[-3:] == ['{{- end }}"""', 'PARAMETER stop "<|im_end|>"', ""]


def test_modelfile_of_a_model_that_plays_the_user_takes_the_prompt_as_it_is(embedded_model: Path) -> None:
    lines = write_modelfile(embedded_model, role="ask").split("\n")
    assert lines[2:4] == ['TEMPLATE """{{ .Prompt }}"""', 'PARAMETER stop "<|im_end|>"']
