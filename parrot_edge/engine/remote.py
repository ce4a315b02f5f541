"""A model behind an OpenAI-compatible endpoint: vLLM, llama-server, Ollama, or a hosted one.

The `openai` client speaks the protocol; this module decides what is asked again, when, and what the
user hears in the end. It keeps nothing between replies: the endpoint is sent the whole conversation
each time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from parrot_edge.engine.base import Reply, Request, Session
from parrot_edge.errors import EndpointError, ModelError, UsageError

LONGEST_BACKOFF = 60.0
"""Seconds; the wait before a retry doubles up to this."""

LONGEST_RETRY_AFTER = 3600.0
"""Seconds; an endpoint that asks for a longer wait has failed for good."""

_CONTEXT_FULL = re.compile(
    r"context_length_exceeded|exceed_context_size|context (length|window|size)|maximum model length"
    r"|prompt is too long",
    re.IGNORECASE,
)
_UNKNOWN_ARGUMENT = re.compile(
    r"unknown|unrecogni[sz]ed|unexpected|unsupported|not supported|not permitted|extra_forbidden"
    r"|(invalid|additional|extra) (argument|parameter|field|input|propert)",
    re.IGNORECASE,
)

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class _Failure(Exception):
    """One request failed.

    cause   what happened, fit for the user's eyes
    status  the HTTP status, or None where there was no whole answer
    body    what the endpoint said, to look for patterns in
    wait    seconds that the endpoint asks to wait, 0 where it does not
    """

    def __init__(self, cause: str, status: int | None = None, body: str = "", wait: float = 0.0) -> None:
        super().__init__(cause)
        self.cause, self.status, self.body, self.wait = cause, status, body, wait

    @property
    def passes(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status is None or self.status in (408, 409, 429) or self.status >= 500


class RemoteEngine:
    """An `Engine` over an OpenAI-compatible endpoint; it is its own session, as there is no state to keep.

    url           where the API begins, http or https, mostly ending in "/v1"; without user or password
    model         the model's name there; None takes the one that the endpoint serves
    parallel      most requests under way at once, >= 1; one that waits for its retry counts
    timeout       seconds to wait for a reply, for each piece of it where it is streamed, > 0
    retries       how often a request that failed is sent again, >= 0
    key_variable  environment variable that holds the key; OPENAI_API_KEY is read where it is not set
    first_wait    seconds before the first retry, >= 0; doubled each time, up to `LONGEST_BACKOFF`

    Connection errors, time-outs, statuses 408, 409, 429 and 5xx and answers that make no sense are
    retried, after the endpoint's `Retry-After` where it sends one. Raises `UsageError` where the
    arguments or the key cannot be used.
    """

    writes_any_role = False
    metadata: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        parallel: int = 16,
        timeout: float = 120.0,
        retries: int = 6,
        key_variable: str = "PARROT_API_KEY",
        first_wait: float = 0.5,
    ) -> None:
        import openai  # takes most of a second, and only remote engines need it

        self._url = _check_url(url, key_variable)
        if parallel < 1 or not timeout > 0 or retries < 0 or not first_wait >= 0:
            raise UsageError("an endpoint needs parallel >= 1, timeout > 0, retries >= 0 and first_wait >= 0")
        self._model = model
        self._timeout = timeout
        self._retries = retries
        self._first_wait = first_wait
        self._key_variable = key_variable
        self._key, self._key_source = _read_key(key_variable)
        self._takes_extras = True
        self._closed = False
        self._slots = asyncio.Semaphore(parallel)
        self._choosing = asyncio.Lock()
        self._random = random.Random()
        try:
            self._client = openai.AsyncOpenAI(
                base_url=self._url, api_key=self._key or "none", max_retries=0, timeout=timeout
            )
        except Exception as error:  # a bad URL, proxy or certificate setting, each with a type of its own
            reason = self._clean(str(error))
        else:
            return
        raise UsageError(f"{self._url} cannot be used: {reason}")

    @property
    def name(self) -> str:
        """`URL#MODEL`; the URL alone as long as the endpoint has not been asked what it serves."""
        return f"{self._url}#{self._model}" if self._model else self._url

    @asynccontextmanager
    async def session(self, *, beside: Session | None = None) -> AsyncIterator[RemoteEngine]:
        """A new conversation; raises as `reply` does where the endpoint has to be asked for its model."""
        await self._choose_model()
        yield self

    async def aclose(self) -> None:
        """Close all connections; replies under way and later ones raise `EndpointError`."""
        self._closed = True
        await self._client.close()

    async def reply(self, request: Request) -> Reply:
        """The next message of the assistant.

        Sampling options that OpenAI does not define (top_k, min_p, repeat_penalty, grammar) are sent
        until the endpoint refuses them. Where a streamed reply breaks off and is made anew,
        `on_text` gets only what comes after the text it has; should the new reply read differently,
        a line break and all of it. Raises `ModelError` for another role than the assistant's,
        `EndpointError` where the endpoint refuses the request or the retries are spent.
        """
        if request.next_role != "assistant":
            raise ModelError(f"{self.name} only writes the assistant's messages; use a local model here")
        arguments: dict[str, Any] = {
            "model": await self._choose_model(),
            "messages": [message.as_dict() for message in request.messages],
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            "max_tokens": request.max_tokens,
            "seed": request.seed,
        }
        if request.stop:
            arguments["stop"] = list(request.stop)
        extras = _extras(request)
        show = _Echo(request.on_text) if request.on_text else None
        return await self._persist(lambda: self._complete(arguments, extras, show))

    async def _complete(self, arguments: dict[str, Any], extras: dict[str, Any], show: _Echo | None) -> Reply:
        """One reply, asked for once, or twice where the endpoint does not take the extras."""
        sent = extras if self._takes_extras else {}
        try:
            return await self._send({**arguments, **sent}, show)
        except _Failure as error:
            failure = error
        if failure.status in (None, 400, 413, 422) and _CONTEXT_FULL.search(failure.body):
            return Reply("", "context")
        if not (sent and failure.status in (400, 422) and _UNKNOWN_ARGUMENT.search(failure.body)):
            raise failure
        reply = await self._send(arguments, show)
        if self._takes_extras:
            self._takes_extras = False
            names = ", ".join(extras["extra_body"])
            _log.warning("%s does not take all of %s; they are left out from now on", self.name, names)
        return reply

    async def _send(self, arguments: dict[str, Any], show: _Echo | None) -> Reply:
        """One request and its reply, streamed where somebody looks on."""
        if show and show.streams:
            return await self._send_streamed(arguments, show)
        completion = await self._call(self._client.chat.completions.create(**arguments))
        try:
            choice = completion.choices[0]
            text, finish, usage = choice.message.content, choice.finish_reason, completion.usage
        except (AttributeError, IndexError, TypeError):
            raise _Failure("an answer that is not a chat completion") from None
        if not isinstance(text, str):
            raise _Failure(f"an answer without text (finish_reason {self._clean(str(finish))})")
        reply = _make_reply(_mend(text), finish, usage)
        if show:
            show(reply.text)
        return reply

    async def _send_streamed(self, arguments: dict[str, Any], show: _Echo) -> Reply:
        text, finish, usage = "", None, None
        async with await self._call(self._client.chat.completions.create(**arguments, stream=True)) as stream:
            show.streams = False
            while (chunk := await self._call(anext(stream, None))) is not None:
                try:
                    usage = chunk.usage or usage
                    if chunk.choices:
                        text += chunk.choices[0].delta.content or ""
                        finish = chunk.choices[0].finish_reason or finish
                except (AttributeError, IndexError, KeyError, TypeError):
                    raise _Failure("a stream that is not a chat completion") from None
                show(_mend(text))
                show.streams = bool(text)
        if finish is None:
            raise _Failure("a stream that breaks off")
        return _make_reply(_mend(text), finish, usage)

    async def _choose_model(self) -> str:
        """The model's name; the endpoint is asked for it once."""
        async with self._choosing:
            if not self._model:
                served = await self._persist(self._list_models)
                if not served:
                    raise ModelError(f"{self._url} serves no model; load one there")
                if len(served) > 1:
                    names = self._clean(", ".join(served))
                    raise ModelError(f"{self._url} serves {len(served)} models; name one of them: {names}")
                self._model = served[0]
            return self._model

    async def _list_models(self) -> list[str]:
        page = await self._call(self._client.models.list())
        try:
            return sorted({self._clean(model.id) for model in page.data})
        except (AttributeError, TypeError):
            raise _Failure("a list of models that is none") from None

    async def _persist(self, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """What `attempt` returns, tried again while its failures may pass; raises `EndpointError`."""
        async with self._slots:
            for number in range(self._retries + 1):
                try:
                    return await attempt()
                except _Failure as error:
                    failure = error
                if not failure.passes:
                    raise EndpointError(self._refusal(failure))
                if failure.wait > LONGEST_RETRY_AFTER:
                    raise EndpointError(
                        f"{self._url} asks to wait {failure.wait:.0f} s ({failure.cause}); try again then"
                    )
                if number < self._retries:
                    wait = self._wait(number, failure.wait)
                    _log.info(
                        "%s: %s; attempt %d follows in %.1f s", self._url, failure.cause, number + 2, wait
                    )
                    await asyncio.sleep(wait)
            attempts = f"{self._retries + 1} attempts" if self._retries else "1 attempt"
        raise EndpointError(
            f"{self._url} gave no reply in {attempts} (the last: {failure.cause}); "
            "see that it is up and not overloaded"
        )

    def _wait(self, number: int, asked: float) -> float:
        """Seconds before retry `number`, from 0; jitter keeps many requests from coming back at once."""
        if asked:
            return asked + self._random.uniform(0, self._first_wait)
        return min(LONGEST_BACKOFF, self._first_wait * 2.0 ** min(number, 30)) * self._random.uniform(0.5, 1)

    async def _call(self, awaitable: Awaitable[_T]) -> _T:
        """What the client returns; whatever it raises becomes a `_Failure`.

        That one is raised outside of the handlers, as the client's errors carry the request, and
        with it the key.
        """
        import openai

        try:
            # the client's own time-out starts anew with each byte, so that a trickle could last for ever
            async with asyncio.timeout(self._timeout):
                return await awaitable
        except (TimeoutError, openai.APITimeoutError):
            failure = _Failure(f"no answer within {self._timeout:g} s")
        except openai.APIConnectionError as error:
            failure = _Failure(f"a broken connection ({self._clean(_root_cause(error))})")
        except openai.APIError as error:  # a status, or an error in the middle of a stream
            failure = self._read_error(error)
        except Exception as error:  # reading rubbish, the client can raise nearly anything
            failure = _Failure(f"an answer that cannot be read ({type(error).__name__})")
        if self._closed:
            raise EndpointError(f"{self._url} is no longer asked: its engine has been closed")
        raise failure

    def _read_error(self, error: Any) -> _Failure:
        """The failure that an `openai.APIError` stands for."""
        detail = error.body
        if isinstance(detail, dict):
            detail = detail.get("message") or detail.get("detail") or detail
        detail = str(detail or error.message)
        detail = "an HTML page" if detail.lstrip().startswith("<") else self._clean(detail)
        status = getattr(error, "status_code", None)
        if status is None:
            # in the middle of a stream the status has been sent; some tell a new one as the error's code
            code = str(error.code)
            return _Failure(
                f"error {detail!r}",
                int(code) if re.fullmatch("[45][0-9]{2}", code) else None,
                f"{code} {error.body}",
            )
        headers = error.response.headers
        now = _read_date(headers.get("date", ""))  # by the endpoint's clock: ours may be far off
        wait = parse_retry_after(headers.get("retry-after"), time.time() if now is None else now)
        return _Failure(f"status {status}: {detail}", status, f"{error.code} {error.body}", wait)

    def _refusal(self, failure: _Failure) -> str:
        """The sentence for a failure that will not pass."""
        if failure.status == 401:
            # what the endpoint says is left out: it may repeat a part of the key
            if self._key_source:
                return f"{self._url} refuses the key in {self._key_source}; set it to a valid one"
            return f"{self._url} wants a key; set the environment variable {self._key_variable} to it"
        if failure.status == 403:
            hint = f"set {self._key_variable} to a key that is allowed this"
        elif failure.status == 404:
            name = f"check the model's name {self._model!r}" if self._model else "name the model"
            hint = f"{name}, and check the URL, which mostly ends in /v1"
        else:
            hint = "change what it complains of"
        return f"{self._url} refuses the request ({failure.cause}); {hint}"

    def _clean(self, text: str) -> str:
        """Text of the endpoint's on one short line, without the key, should it be repeated there."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= 300 else text[:299] + "…"


class _Echo:
    """Passes the growing text of a reply on in pieces, also when it has to be made again.

    `streams` says whether to ask for a stream next: not after one that ended without a word, as some
    endpoints only tell what is wrong, say a full context, where nothing is streamed.
    """

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text = on_text
        self._shown = ""
        self.streams = True

    def __call__(self, text: str) -> None:
        if self._shown.startswith(text):
            return  # nothing new, or the new attempt has not yet come to where the last one broke off
        if not text.startswith(self._shown):
            self._on_text("\n")
            self._shown = ""
        self._on_text(text[len(self._shown) :])
        self._shown = text


def parse_retry_after(value: str | None, now: float) -> float:
    """Seconds to wait by a `Retry-After` header: a number, or an HTTP date against `now` (Unix time).

    0 where there is no header, it cannot be read, or its time has passed.

    >>> parse_retry_after("7", 0)
    7.0
    >>> parse_retry_after("Thu, 01 Jan 1970 00:01:30 GMT", 60)
    30.0
    >>> parse_retry_after("soon", 0)
    0.0
    """
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        date = _read_date(value)
        seconds = 0.0 if date is None else date - now
    return seconds if seconds > 0 and math.isfinite(seconds) else 0.0


def _read_date(value: str) -> float | None:
    """Unix time of an HTTP date, or None where it is none."""
    try:
        date = parsedate_to_datetime(value)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def _extras(request: Request) -> dict[str, Any]:
    """Arguments that make a reply better and that not every endpoint takes."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repeat_penalty,
    }
    if sampling.grammar is not None:
        body["grammar"] = sampling.grammar
    extras: dict[str, Any] = {"extra_body": body}
    if request.on_text:
        extras["stream_options"] = {"include_usage": True}
    return extras


def _make_reply(text: str, finish: object, usage: object) -> Reply:
    """A reply from what the endpoint told; a filter's or a tool's end is an end like any other."""
    prompt = _count(usage, "prompt_tokens")
    cached = _count(getattr(usage, "prompt_tokens_details", None), "cached_tokens")
    return Reply(
        text,
        "length" if finish == "length" else "stop",
        prompt_tokens=prompt,
        new_tokens=max(0, prompt - cached),
        completion_tokens=_count(usage, "completion_tokens"),
    )


def _mend(text: str) -> str:
    """The text without what no row may hold: NUL, and halves of surrogate pairs, which JSON can spell."""
    return text.replace("\0", "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _count(usage: object, key: str) -> int:
    # what a client's version has no field for yet, it leaves as a dict
    value = usage.get(key) if isinstance(usage, dict) else getattr(usage, key, None)
    return value if isinstance(value, int) and value > 0 else 0


def _check_url(url: str, key_variable: str) -> str:
    """The URL without a closing slash; raises `UsageError`, never repeating what may be a password."""
    shown = url.rpartition("@")[2]
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        valid = False
    if not valid or not url.isprintable() or " " in url:
        raise UsageError(f"{shown!r} is not an endpoint; give it as http://host:port/v1")
    if "@" in parts.netloc:
        raise UsageError(
            f"the URL of {shown} holds a user or a password; put the key into {key_variable} instead"
        )
    if parts.query or parts.fragment:
        raise UsageError(f"the URL of {parts.netloc} holds a query or a fragment; end it before the ? or #")
    return url.rstrip("/")


def _read_key(variable: str) -> tuple[str, str | None]:
    """The key and the environment variable that holds it; ("", None) where none is set."""
    for source in (variable, "OPENAI_API_KEY"):
        key = os.environ.get(source, "").strip()
        if key:
            if not (key.isascii() and key.isprintable()) or " " in key:
                raise UsageError(f"{source} holds characters that no key has; set it to the key alone")
            return key, source
    return "", None


def _root_cause(error: BaseException) -> str:
    """The innermost error that says something: the client's own text is only "Connection error."."""
    text = type(error.__cause__ or error).__name__
    inner: BaseException | None = error.__cause__
    while inner is not None:
        text = str(inner) or text
        inner = inner.__cause__
    return text
