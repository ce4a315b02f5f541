"""Chat templates: messages to the text that a model was trained on.

A template comes out of a model file and is untrusted: it runs in Jinja's immutable sandbox and
under a deadline. It knows nothing of tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from parrot_edge.dialogue import Message
from parrot_edge.errors import ModelError

SECONDS_TO_RENDER = 2.0
_MAX_TEXT = 2**24  # characters that one multiplication may make
_MARK = "PARROT-NEXT-MESSAGE"


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without arithmetic that fills the memory."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or any(isinstance(x, str | list | tuple) for x in (left, right)):
            size = len(left) if hasattr(left, "__len__") else abs(left)
            other = len(right) if hasattr(right, "__len__") else abs(right)
            if (operator == "**" and other > 64) or size * other > _MAX_TEXT:
                raise jinja2.TemplateRuntimeError("it multiplies beyond all bounds")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A compiled chat template with its model's special texts.

    `name` is the model's, for errors. Raises `ModelError` where the template does not compile.
    """

    def __init__(self, source: str, *, bos: str = "", eos: str = "", name: str = "the model") -> None:
        self._name = name
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = time.strftime
        environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template of {name} does not compile: {error}") from None
        self._texts = {"bos_token": bos, "eos_token": eos}

    def render(self, messages: Sequence[Message], next_role: str = "assistant") -> str:
        """The prompt that ends just where the next message of `next_role` begins.

        Templates write that header for the assistant only; for another role a marked message is
        rendered and the text cut before the mark. Raises `ModelError` where the template refuses.

        >>> source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        >>> ChatTemplate(source).render([Message("user", "Hi"), Message("assistant", "Ho")], "user")
        '<user>Hi</><assistant>Ho</><user>'
        """
        rows = [message.as_dict() for message in messages]
        if next_role == "assistant":
            return self._run(rows, add_generation_prompt=True)
        text = self._run([*rows, {"role": next_role, "content": _MARK}], add_generation_prompt=False)
        head, mark, _ = text.rpartition(_MARK)
        if not mark:
            raise ModelError(f"the chat template of {self._name} does not show a {next_role} message")
        return head

    def _run(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        def render() -> str:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._texts
            )

        try:
            return _within(SECONDS_TO_RENDER, render)
        except (
            jinja2.TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:
            raise ModelError(f"the chat template of {self._name} failed: {error}") from None
        except (TimeoutError, RecursionError, MemoryError):
            raise ModelError(f"the chat template of {self._name} does not end; use another file") from None


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _within(seconds: float, call: Callable[[], str]) -> str:
    """Run `call`, raising `TimeoutError` from inside it at the first Python line past the deadline.

    A template compiles to Python lines, so a trace sees every pass of its loops; a thread could not
    be stopped, and a process per prompt would cost more than the prompt.
    """
    deadline = time.monotonic() + seconds

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if time.monotonic() > deadline:
            raise TimeoutError
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        return call()
    finally:
        sys.settrace(previous)
