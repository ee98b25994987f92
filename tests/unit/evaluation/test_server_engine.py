"""The served path against a server that answers, fails, and stops in the middle."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_profit.evaluation.engines.engine import (
    Answer,
    EngineOptions,
    Request,
    description,
)
from megatron_profit.evaluation.engines.server import ServerEngine
from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.sampling import Sampling

REQUESTS = [
    Request(({"role": "user", "content": f"question {i}"},), ("sums", i, 0), 16) for i in range(6)
]


class Server(ThreadingHTTPServer):
    """A server on loopback; `reply(number, body)` gives status and content of the n-th request."""

    daemon_threads = True

    def __init__(self, reply):
        self.reply, self.bodies, self.lock = reply, [], threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append((self.path, body))
            number = len(self.server.bodies)
        status, content = self.server.reply(number, body)
        if status is None:  # the server ends the connection in the middle
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
            return
        if content is None:  # and here in the middle of a fault's text
            self.wfile.write(b"HTTP/1.1 %d X\r\nTransfer-Encoding: chunked\r\n\r\n99\r\n" % status)
            return
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def chat(text, reason="stop", tokens=5, **message):
    choice = {"message": {"content": text, **message}, "finish_reason": reason}
    return 200, {"choices": [choice], "usage": {"completion_tokens": tokens}}


def repeat(number, body):
    return chat(f"re: {body['messages'][0]['content']}")


@pytest.fixture
def serve():
    servers = []

    def serve(reply, **options):
        servers.append(Server(reply))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        options = {
            "server": servers[-1].url,
            "concurrency": 2,
            "retries": 2,
            "timeout": 10,
        } | options
        engine = ServerEngine("the-model", EngineOptions(**options))
        engine.sleep = lambda seconds: None
        return engine, servers[-1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_requests_carry_messages_and_settings(serve):
    engine, server = serve(repeat)
    sampling = Sampling(temperature=0.7, top_p=0.8, top_k=20, samples=8)
    answers = {request.place[1]: answer for request, answer in engine.answers(REQUESTS, sampling)}
    assert answers == {i: Answer(f"re: question {i}", 5, True) for i in range(6)}
    path, body = server.bodies[0]
    assert path == "/v1/chat/completions"
    seed = body.pop("seed")
    assert isinstance(seed, int)
    assert body.pop("messages")[0]["role"] == "user"
    settings = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_tokens": 16}
    neutral = {"repetition_penalty": 1.0, "min_p": 0.0}
    assert body == {"model": "the-model", **settings, **neutral}
    assert len({body["seed"] for _, body in server.bodies[1:]} | {seed}) == 6


def test_defaults_of_the_server_do_not_act(serve):
    engine, server = serve(repeat)
    list(engine.answers(REQUESTS[:2], Sampling(temperature=0.7, top_p=0.95)))
    list(engine.answers(REQUESTS[:2], Sampling()))
    neutral = {"top_k": -1, "repetition_penalty": 1.0, "min_p": 0.0}
    assert all(neutral.items() <= body.items() for _, body in server.bodies)


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_does_not_know_the_neutral_fields_is_asked_without_them(
    serve, capsys, status
):
    def strict(number, body):
        known = {"model", "messages", "max_tokens", "temperature", "seed", "top_p"}
        return repeat(number, body) if body.keys() <= known else (status, b"unexpected fields")

    engine, server = serve(strict, concurrency=1)
    assert len(list(engine.answers(REQUESTS, Sampling(temperature=1.0)))) == 6
    assert len(server.bodies) == 7
    assert capsys.readouterr().err.count("does not take top_k, repetition_penalty, min_p") == 1
    engine, server = serve(strict, concurrency=1)
    with pytest.raises(EvaluationError, match=r"unexpected fields.*and the sampling flags"):
        list(engine.answers(REQUESTS, Sampling(temperature=1.0, top_k=20)))
    assert len(server.bodies) == 2
    assert capsys.readouterr().err == "", "the fault was another one"


def test_cut_answers_and_thoughts_are_told(serve):
    engine, _ = serve(lambda *_: chat("4", "length", reasoning_content="is it 5?"))
    ((_, answer),) = engine.answers(REQUESTS[:1], Sampling())
    assert answer.text == "<think>is it 5?</think>4"
    assert not answer.stopped


@pytest.mark.parametrize(
    ("reason", "stopped"), [("stop", True), ("tool_calls", True), ("length", False)]
)
def test_an_answer_stopped_unless_its_length_ended_it(serve, reason, stopped):
    engine, _ = serve(lambda *_: chat("4", reason))
    ((_, answer),) = engine.answers(REQUESTS[:1], Sampling())
    assert answer.stopped == stopped


@pytest.mark.parametrize(
    "fault",
    [
        (500, b"busy"),
        (501, b""),
        (529, b"overloaded"),
        (429, b""),
        (None, b""),
        (200, b"{not json"),
        (500, None),
        (200, {"choices": []}),
        (200, {"choices": [{"message": "4"}]}),
        chat([{"type": "text", "text": "4"}]),
    ],
)
def test_a_fault_that_passes_is_tried_again(serve, fault):
    engine, _ = serve(lambda number, body: fault if number <= 2 else repeat(number, body))
    assert len(list(engine.answers(REQUESTS, Sampling()))) == 6


def test_a_longer_answer_may_take_longer(serve, monkeypatch):
    waits = []

    def urlopen(request, timeout):
        waits.append(timeout)
        raise OSError

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    engine, _ = serve(repeat, retries=0, timeout=600)
    for longest in (1024, 32768):
        with pytest.raises(EvaluationError, match="did not answer"):
            list(engine.answers([replace(REQUESTS[0], longest=longest)], Sampling()))
    assert waits == [600 + 1024 / 5, 600 + 32768 / 5]


def test_a_server_that_stops_in_the_middle_keeps_what_was_answered(serve):
    engine, _ = serve(lambda number, body: repeat(number, body) if number <= 3 else (503, b"gone"))
    found = engine.answers(REQUESTS, Sampling())
    kept = [next(found) for _ in range(3)]
    assert len({request.place for request, _ in kept}) == 3
    with pytest.raises(
        EvaluationError, match=r"in 3 tries \(HTTP status 503: gone\); the answers so"
    ):
        next(found)


def test_a_refusal_is_not_repeated(serve):
    engine, server = serve(lambda *_: (404, b"no such model"), concurrency=1)
    with pytest.raises(
        EvaluationError, match=r"no such model.*check --server, the model's name 'the-model'"
    ):
        list(engine.answers(REQUESTS, Sampling()))
    assert len(server.bodies) == 1


def test_an_address_may_have_the_path_of_the_api():
    for given in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        options = EngineOptions(server=given)
        assert ServerEngine("m", options).url == "http://h:1/v1/chat/completions"
        assert description(options) == "server http://h:1"


def test_no_server_and_no_address_are_clear_errors():
    engine = ServerEngine("m", EngineOptions(server="http://127.0.0.1:9", retries=1))
    engine.sleep = lambda seconds: None
    with pytest.raises(EvaluationError, match="did not answer question 0 of sums in 2 tries"):
        list(engine.answers(REQUESTS[:1], Sampling()))
    with pytest.raises(EvaluationError, match="must begin with http"):
        ServerEngine("m", EngineOptions(server="localhost:8000"))


def test_after_ctrl_c_no_request_is_tried_again(serve, monkeypatch):
    engine, server = serve(lambda *_: (503, b"busy"), retries=100)
    engine.sleep = engine.ended.wait

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_profit.evaluation.engines.server.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(engine.answers(REQUESTS, Sampling()))
    assert len(server.bodies) <= 4
