"""Chat templates: messages to the text that a model was trained on.

A template comes out of a model file and is untrusted: it runs in Jinja's immutable sandbox, under a
deadline, and what it may make is bounded. It knows nothing of tokens.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2.compiler import CodeGenerator, Frame
from jinja2.nodes import Concat, EvalContext, Getitem, Slice
from jinja2.sandbox import ImmutableSandboxedEnvironment

from parrot_edge.dialogue import Message
from parrot_edge.errors import ModelError

SECONDS_TO_RENDER = 2.0  # of the thread's own time
_MAX_TEXT = 2**24  # characters of one text
_MAX_MADE = 4 * _MAX_TEXT  # characters of all texts that one rendering makes on the way
_ITEM = 64  # characters that weigh as much as an item of a list
_MAX_WIDTH = 100  # of an indentation
_MARK = "PARROT-NEXT-MESSAGE"

# fmt: off
_WRITING = (
    "capitalize", "e", "escape", "forceescape", "indent", "join", "lower", "replace", "safe", "string",
    "striptags", "title", "tojson", "trim", "upper", "urlencode",
)
"""Filters that turn whatever they are given into text."""

_PADDING = frozenset((
    "batch", "center", "encode", "expandtabs", "format", "format_map", "ljust", "pprint", "rjust", "sum",
    "to_bytes", "translate", "urlize", "wordwrap", "xmlattr", "zfill",
))
"""Filters and methods that are left out: any size can come of them, and no chat template needs them."""
# fmt: on


class _Code(CodeGenerator):
    """Jinja's compiler, where `~` and slices call the sandbox."""

    def visit_Concat(self, node: Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: Getitem, frame: Frame) -> None:
        self.write("environment.count(" if isinstance(node.arg, Slice) else "(")
        super().visit_Getitem(node, frame)
        self.write(")")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, where the memory cannot be filled.

    Every operation that makes a text or a list passes by `count`; where much can come of little, the
    operands are measured before. `made` is what the rendering under way has made so far.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    code_generator_class = _Code
    made = 0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, finalize=_check_size)
        self.filters = {
            name: self._guard(function, _check_growth if name in _WRITING else None)
            for name, function in self.filters.items()
            if name not in _PADDING
        }
        del self.globals["lipsum"]

    def count(self, value: Any) -> Any:
        """The value, which has just been made; raises where it is too much."""
        size = 0
        if isinstance(value, str | list | tuple):
            size = len(value) * (1 if isinstance(value, str) else _ITEM)
        elif isinstance(value, int):
            size = value.bit_length()
        self.made += size
        _check(size <= _MAX_TEXT and self.made <= _MAX_MADE)
        return value

    def concat(self, parts: Iterable[Any]) -> Any:
        return self.count("".join(map(str, _check_size(list(parts)))))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise jinja2.TemplateRuntimeError("it formats a text with %; use another file")
        sized = any(isinstance(x, str | list | tuple) for x in (left, right))
        if operator == "**" or (operator == "*" and sized):
            size = len(left) if hasattr(left, "__len__") else abs(left)
            other = len(right) if hasattr(right, "__len__") else abs(right)
            _check(size * other <= _MAX_TEXT and not (operator == "**" and other > 64))
        return self.count(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        text = getattr(function, "__self__", None)
        if isinstance(text, str) and function.__name__ in ("join", "replace"):
            args = _keep(args)
            _check_growth(text, *args, **kwargs)
        return self.count(super().call(context, function, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        pads = isinstance(obj, str | int) and attr in _PADDING
        return not pads and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Nothing: `format` is no safe attribute here."""

    def _guard(self, function: Callable[..., Any], check: Callable[..., None] | None = None) -> Any:
        """A filter whose result is counted, after a check of what it is given."""

        @functools.wraps(function)  # with the marks by which Jinja knows that it wants a context
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if check:
                args = _keep(args)
                check(*args, **kwargs)
            return self.count(function(*args, **kwargs))

        return guarded


def _check(bounded: bool) -> None:
    if not bounded:
        raise jinja2.TemplateRuntimeError("its text grows beyond all bounds; use another file")


def _keep(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values, those that can be read but once as lists."""
    return tuple(list(value) if isinstance(value, Iterator) else value for value in values)


def _check_size(value: Any) -> Any:
    """The value, where its text is not too long."""
    _check(_size(value) <= _MAX_TEXT)
    return value


def _check_growth(*given: Any, **options: Any) -> None:
    """Raise where too much could come of a text, or of all in a list, and what is put into it."""
    text, *others = [x for x in (*given, *options.values()) if not isinstance(x, EvalContext)]
    _check(all(abs(x) <= _MAX_WIDTH for x in others if isinstance(x, int)))
    sizes = [abs(x) if isinstance(x, int) else _size(x) for x in others]
    _check(_size(_check_size(text)) * max(sizes, default=1) <= _MAX_MADE)


def _size(value: Any) -> int:
    """The most characters that a value takes as text.

    >>> _size(["ab", {"c": 1}]) >= len(str(["ab", {"c": 1}]))
    True
    """
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return 8 + value.bit_length()
    if isinstance(value, Mapping):
        value = value.items()
    if isinstance(value, list | tuple | set | KeysView | ValuesView | ItemsView):
        return 16 + sum(4 + _size(item) for item in value)
    if value is None or isinstance(value, float | range | jinja2.Undefined):
        return 64
    raise jinja2.TemplateRuntimeError(f"it writes out a {type(value).__name__}; use another file")


class ChatTemplate:
    """A compiled chat template with its model's special texts.

    `name` is the model's, for errors. Raises `ModelError` where the template does not compile.
    """

    def __init__(self, source: str, *, bos: str = "", eos: str = "", name: str = "the model") -> None:
        self._name = name
        self._environment = environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
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
        self._environment.made = 0

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

    What counts is the thread's own time: a template is not to blame where the machine stands still. It
    compiles to Python lines, so a trace sees every pass of its loops; a thread could not be stopped, and a
    process per prompt would cost more than the prompt.
    """
    deadline = time.thread_time() + seconds

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if time.thread_time() > deadline:
            raise TimeoutError
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        return call()
    finally:
        sys.settrace(previous)
