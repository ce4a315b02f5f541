"""Chat templates: headers for any role, and templates that misbehave."""

import time

import pytest

from parrot_edge.dialogue import Message
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
    ],
)
def test_a_template_that_misbehaves_is_a_model_error(source, word):
    with pytest.raises(ModelError, match=word):
        ChatTemplate(source).render([Message("assistant", "out of turn")])


def test_a_template_that_does_not_compile_is_a_model_error():
    with pytest.raises(ModelError, match="does not compile"):
        ChatTemplate("{% for %}")


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
