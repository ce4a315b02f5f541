"""Chat templates: headers for any role, and templates that misbehave."""

import time
import tracemalloc

import pytest

from parrot_edge.dialogue import Message
from parrot_edge.engine import template
from parrot_edge.engine.template import ChatTemplate
from parrot_edge.errors import ModelError

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }}: {{ m.content }};{% endfor %}"
)


def test_assistant_header_is_the_templates_own():
    assert (
        ChatTemplate(CHATML).render([Message("user", "hi")]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    )


def test_user_header_is_found_though_no_template_writes_it():
    text = ChatTemplate(CHATML).render([Message("user", "a"), Message("assistant", "b")], "user")
    assert text.endswith("<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\n")


def test_user_header_of_a_template_without_role_names():
    template = ChatTemplate(LLAMA2, bos="<s>", eos="</s>")
    text = template.render([Message("user", "a"), Message("assistant", "b")], "user")
    assert text == "<s>[INST] a [/INST] b </s><s>[INST] "


def test_a_prompt_grows_only_at_its_end():
    template = ChatTemplate(CHATML)
    messages = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    prompts = [template.render(messages[:n], "user" if n % 2 == 0 else "assistant") for n in (1, 2, 3)]
    assert prompts[1].startswith(prompts[0])
    assert prompts[2].startswith(prompts[1])


@pytest.mark.parametrize(
    ("source", "word"),
    [
        (STRICT, "roles must alternate"),
        ("{{ messages[0].content.missing() }}", "failed"),
        ("{{ 1 // 0 }}", "failed"),
        ("{{ ''.__class__.__mro__ }}", "failed"),
        ("{{ 'x' * 10 ** 9 }}", "beyond all bounds"),
        ("{{ 9 ** 9 ** 9 }}", "beyond all bounds"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "does not end"),
        ("{{ '%999999999d' % 1 }}", "formats a text"),
        ("{{ '{:999999999}'.format(1) }}", "'format' .* unsafe"),
        ("{{ ''['ljust'](10 ** 9) }}", "'ljust' .* unsafe"),
        ("{{ 'x'.center(10 ** 9) }}", "'center' .* unsafe"),
        ("{{ namespace(x=1) }}", "writes out a Namespace"),
    ],
)
def test_a_template_that_misbehaves_is_a_model_error(source, word):
    with pytest.raises(ModelError, match=word):
        ChatTemplate(source).render([Message("assistant", "out of turn")])


GROWING = [
    "{% set ns.x = ns.x + ns.x %}",
    "{% set ns.x = ns.x ~ ns.x %}",
    "{% set ns.x = ns.x * 2 %}",
    "{% set ns.x = [ns.x, ns.x]|join %}",
    "{% set ns.x = ns.x.join('abc') %}",
    "{% set ns.x = 'abc'|join(ns.x) %}",
    "{% set ns.x = ns.x.replace('a', 'aa') %}",
    "{% set ns.x = ns.x|replace('a', ns.x) %}",
    "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}",
    "{% set ns.x = twice(ns.x) %}",
    "{% set ns.list = ns.list + ns.list %}",
    "{% set ns.list = ns.list + [ns.x[i:] + ns.x] %}{% set ns.x = ns.x + 'aaaaa' * 9999 %}",
    "{% set ns.list = ns.list + [ns.x[1:]] %}{% if i < 12 %}{% set ns.x = ns.x + ns.x %}{% endif %}",
    "{% set ns.list = [ns.list, ns.list] %}{% if i > 30 %}{{ ns.list }}{% endif %}",
    "{% set ns.list = [ns.list, ns.list] %}{% if i > 30 %}{{ ns.list|tojson }}{% endif %}",
    "{% set ns.list = [ns.list, ns.list] %}{% if i > 30 %}{{ ns.list|string|length }}{% endif %}",
    "{% set ns.x = ns.x|indent(10 ** 6) + '\\n' * 1000 %}",
    "{% set ns.x = ns.x|tojson|tojson %}",
    "{% set ns.list = range(99999)|list %}{% set ns.x = ns.x ~ ns.list %}",
]


@pytest.mark.parametrize("step", GROWING)
def test_a_template_cannot_fill_the_memory(step):
    source = (
        "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}"
        "{% set ns = namespace(x='a' * 1000, list=['a']) %}"
        "{% for i in range(4000) %}" + step + "{% endfor %}"
    )
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=r"beyond all bounds|does not end"):
            ChatTemplate(source).render([Message("user", "hi")])
        assert tracemalloc.get_traced_memory()[1] < 300_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("filter_name", ["center(10 ** 9)", "format(1)", "wordwrap(1, wrapstring='x')"])
def test_filters_that_pad_are_not_there(filter_name):
    with pytest.raises(ModelError, match="No filter named"):
        ChatTemplate("{{ 'x'|" + filter_name + " }}")


def test_what_templates_do_with_texts_is_still_there():
    source = (
        "{% for m in messages[1:] %}{{ m.role|upper ~ ': ' ~ m.content.split('|')|join(', ') }};{% endfor %}"
        "{{ {'a': [1, none]}|tojson(indent=1) }}{{ messages|map(attribute='role')|join('+') }}"
        "{{ '-'.join(['a', 'b'])|replace('-', '+') }}{{ 7 % 4 }}{{ missing }}{{ 'é'|tojson }}"
    )
    text = ChatTemplate(source).render([Message("system", "s"), Message("user", "a|b")])
    assert text == 'USER: a, b;{\n "a": [\n  1,\n  null\n ]\n}system+usera+b3"é"'


def test_a_long_conversation_is_no_misuse():
    messages = [Message("user", "x" * 1_000_000), Message("assistant", "y" * 1_000_000)] * 2
    text = ChatTemplate(CHATML).render(messages)
    assert len(text) > 4_000_000
    assert ChatTemplate(CHATML).render(messages) == text


def test_a_template_that_does_not_compile_is_a_model_error():
    with pytest.raises(ModelError, match="does not compile"):
        ChatTemplate("{% for %}")


def test_time_in_which_the_machine_stands_still_does_not_count(monkeypatch):
    monkeypatch.setattr(template, "SECONDS_TO_RENDER", 0.2)

    class Slow(str):
        def __str__(self):
            time.sleep(0.3)
            return "hi"

    text = ChatTemplate("{% for m in messages %}{{ m.content }}{{ m.role }}{% endfor %}").render(
        [Message("user", Slow("hi"))]
    )
    assert text == "hiuser"


def test_a_template_that_loops_is_stopped():
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}"
    began = time.monotonic()
    with pytest.raises(ModelError, match="does not end"):
        ChatTemplate(loops).render([Message("user", "hi")])
    assert time.monotonic() - began < 10


def test_a_template_cannot_change_what_it_is_given():
    messages = [Message("user", "hi")]
    with pytest.raises(ModelError):
        ChatTemplate("{{ messages.append(1) }}").render(messages)
    assert messages == [Message("user", "hi")]
