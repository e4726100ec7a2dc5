"""A server of OpenAI-style completions on 127.0.0.1 over one model, in the forms of vLLM, and its faults.

It has the part of vLLM's protocol that a client of Weak-to-Strong Decoding needs: prompts of token ids, streams with token ids,
`prompt_logprobs`. Each answer is computed one token at a time, and ends with its client. A field of a request that it doesn't
have is refused, so a test sees a misspelt one.

python tests/completions_server.py FOLDER [TOKENS] serves a folder's model until it is killed, and prints its address; answers
that may be long are silent after so many tokens, and then it prints "silent".
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
import uvicorn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from time_limit import HANG

Body = dict[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]

DEFAULTS: Body = {
    "max_tokens": 16,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": None,
    "stop": [],
    "stop_token_ids": [],
    "ignore_eos": False,
    "skip_special_tokens": True,
    "add_special_tokens": True,
    "n": 1,
    "stream": False,
    "stream_options": None,
    "return_token_ids": False,
    "prompt_logprobs": None,
}
"""Fields of a request beside `model` and `prompt`, with vLLM's defaults."""

SMALLEST = -9999.0
"""Log-probability in place of -inf, which JSON can't hold."""


@dataclass
class Fault:
    """A thing that goes wrong in the next `times` requests that it concerns.

    Attributes:
        path: of those requests.
        where: selects among them by their bodies.
        status: HTTP status in place of an answer, with `headers` such as Retry-After and the bytes `content`.
        then: end of an answer, after `after` tokens of it were sent. "cut": the connection is closed. "end": the body ends as a
            whole one does, without [DONE]. "silence": nothing, until `release()`, then the rest. "error": an error object, then
            [DONE]. "content": the bytes `content`, then the rest; in place of an answer that is no stream. "repeat": the bytes
            `content` again and again.
        leave_out: fields that no choice of the answer has: "token_ids", "prompt_logprobs", ...
        byte_by_byte: each byte of the answer is sent alone.
        per_event: tokens of each event of a stream but the last, which may have fewer.
    """

    path: str = "/v1/completions"
    where: Callable[[Body], bool] = lambda body: True
    times: int = sys.maxsize
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b""
    after: int = 0
    then: Literal["", "cut", "end", "silence", "error", "content", "repeat"] = ""
    leave_out: tuple[str, ...] = ()
    byte_by_byte: bool = False
    per_event: int = 1


@dataclass
class Counts:
    """Work of a server so far.

    Attributes:
        open, silent: answers that are being computed, and those of them that a fault keeps silent.
        finished, aborted, failed: answers that are whole, that their client left, and that a fault cut.
        refused: requests that had another status than 200.
        prompt_tokens, forwards, tokens: read, made, and computed.
    """

    open: int = 0
    silent: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    refused: int = 0
    forwards: int = 0
    prompt_tokens: int = 0
    tokens: int = 0


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        kind = "NotFoundError" if status == 404 else "BadRequestError"
        self.status = status
        self.content: Body = {"error": {"message": message, "type": kind, "param": param, "code": status}}
        if status == 401:
            self.content = {"error": message}


class Cut(Exception):
    """The connection is to be closed."""


class CompletionsServer:
    """A server's state: its model, its faults, and its work; an ASGI application.

    Attributes:
        defaults: of requests, as a server has them from a model's generation_config.json.
        logprobs_mode: vLLM's; with "processed_logprobs", `prompt_logprobs` are of logits divided by the temperature.
        requests: method, path and headers of every request.
        bodies: of every request for a completion.
        when_silent: called when a fault begins to keep an answer silent.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "tiny",
        *,
        key: str = "",
        max_model_len: int | None = None,
        defaults: Body | None = None,
        logprobs_mode: Literal["raw_logprobs", "processed_logprobs", "raw_logits"] = "raw_logprobs",
    ) -> None:
        self.model, self.tokenizer, self.name, self.key = model, tokenizer, name, key
        self.max_model_len = max_model_len or model.config.max_position_embeddings
        self.defaults = {**DEFAULTS, **(defaults or {})}
        self.logprobs_mode = logprobs_mode
        self.faults: list[Fault] = []
        self.counts = Counts()
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.bodies: list[Body] = []
        self.when_silent: Callable[[], object] = lambda: None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        self._ends = _end_tokens(model, tokenizer)
        self._changed = threading.Condition()
        self._released = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._uvicorn = uvicorn.Server(uvicorn.Config(self, log_config=None, log_level="critical", lifespan="off"))

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return len(self._uvicorn.server_state.connections)

    def wait_for(self, condition: Callable[[CompletionsServer], bool]) -> None:
        """Returns as soon as the condition holds; fails if it doesn't come to that."""
        deadline = time.monotonic() + HANG
        with self._changed:
            while not condition(self):
                assert time.monotonic() < deadline, (self.counts, self.connections)
                self._changed.wait(0.01)

    def wait_until_idle(self) -> None:
        """Returns as soon as all requests that were sent before are over, and no connection is open."""
        last = HTTPConnection(urlsplit(self.url).netloc, timeout=HANG)
        last.request("GET", "/health")
        last.getresponse().read()  # connections are accepted in their order: all that were made before are known now
        last.close()
        self.wait_for(lambda server: server.connections == 0 and not server._uvicorn.server_state.tasks)

    def release(self) -> None:
        """Ends the silence of all answers that are silent now."""
        self._call(self._release)

    def reset(self) -> None:
        """Leaves the server idle, without faults, and without bodies of requests."""
        self.faults.clear()
        self.release()
        self.wait_until_idle()
        self.bodies.clear()

    def die(self) -> None:
        """Closes everything at once, as a process does that is killed."""
        self._uvicorn.should_exit = True
        self._call(self._die)

    async def run(self) -> None:
        """Serves until `die`, or until the process ends."""
        self._loop = asyncio.get_running_loop()
        with self._listener:
            await self._uvicorn.serve(sockets=[self._listener])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.requests.append((scope["method"], scope["path"], headers))
        try:
            if self.key and scope["path"].startswith("/v1") and headers.get("authorization") != f"Bearer {self.key}":
                raise Refused(401, "Unauthorized")
            body = await _read_json(receive) if scope["method"] == "POST" else {}
            if scope["path"] == "/v1/completions":
                self.bodies.append(body)
            fault = self._fault(scope["path"], body)
            if fault.status:
                self._count(refused=1)
                await _respond(send, fault.status, fault.content or b'{"error": {"message": "a fault"}}', fault.headers)
            elif scope["path"] == "/v1/completions":
                request = self._request(body)
                await self._while_connected(receive, self._complete(request, fault, _pieces(send, fault.byte_by_byte)))
            elif scope["path"] == "/v1/models":
                await _respond(send, 200, json.dumps(self._models()).encode())
            elif scope["path"] == "/health":
                await _respond(send, 200, b"")
            else:
                raise Refused(404, "Not Found")
        except Refused as refused:
            self._count(refused=1)
            await _respond(send, refused.status, json.dumps(refused.content).encode())
        except Cut:
            self._connection(scope).close()

    def _models(self) -> Body:
        card = {"id": self.name, "object": "model", "created": 0, "owned_by": "vllm", "root": self.name, "parent": None}
        return {"object": "list", "data": [{**card, "max_model_len": self.max_model_len, "permission": []}]}

    def _fault(self, path: str, body: Body) -> Fault:
        for fault in self.faults:
            if fault.times and fault.path == path and fault.where(body):
                fault.times -= 1
                return fault
        return Fault()

    def _request(self, body: Body) -> Body:
        """A checked request with all its fields."""
        unknown = sorted(body.keys() - DEFAULTS.keys() - {"model", "prompt"})
        if unknown:
            raise Refused(400, f"this server has no field {unknown[0]}", unknown[0])
        request = {**self.defaults, **{name: value for name, value in body.items() if value is not None}}
        prompt, budget = request.get("prompt"), request["max_tokens"]
        if request.get("model", self.name) != self.name:
            raise Refused(404, f"The model `{request['model']}` does not exist.", "model")
        if not (isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)):
            raise Refused(400, "this server takes a prompt of token ids only", "prompt")
        if outside := [token for token in prompt if not 0 <= token < self.model.config.vocab_size]:
            raise Refused(400, f"Token id {outside[0]} is out of vocabulary", "prompt")
        if budget > self.max_model_len or len(prompt) > self.max_model_len:
            raise Refused(400, f"This model's maximum context length is {self.max_model_len} tokens.", "max_tokens")
        request["max_tokens"] = budget = min(budget, self.max_model_len - len(prompt))  # as vLLM does, without a word
        if request["n"] != 1 or budget < 1:
            raise Refused(400, f"n={request['n']}, max_tokens={budget}: n must be 1, max_tokens at least 1", "max_tokens")
        if request["stream"] and request["prompt_logprobs"]:
            raise Refused(400, "`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
        if request["stream_options"] and not request["stream"]:
            raise Refused(400, "Stream options can only be defined when `stream=True`.", "stream_options")
        request["stop"] = [request["stop"]] if isinstance(request["stop"], str) else request["stop"]
        return request

    async def _while_connected(self, receive: Receive, answer: Awaitable[None]) -> None:
        """Waits for an answer; ends it when its client is gone."""
        self._count(open=1)
        work = asyncio.ensure_future(answer)
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            done = work.done()
            for task in (work, gone):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
            self._count(open=-1, **({"finished": 1} if done else {"aborted": 1}))
        except BaseException:
            work.cancel()
            self._count(open=-1, failed=1)
            raise

    async def _complete(self, request: Body, fault: Fault, send: Send) -> None:
        """Sends one answer."""
        if request["stream"]:
            await self._stream(request, fault, send)
            return
        choice = _joined([piece async for piece in self._choices(request)])
        usage = _usage(request, len(choice["token_ids"]))
        whole = {**self._frame(), "choices": [_shown(choice, request, fault)], "usage": usage}
        content = json.dumps(whole).encode()
        if fault.then == "silence":
            await self._silence()
        if fault.then == "cut":
            if fault.after:
                await _respond(send, 200, content[: len(content) // 2], {"content-length": str(len(content))})
            raise Cut
        await _respond(send, 200, fault.content if fault.then == "content" else content)

    async def _stream(self, request: Body, fault: Fault, send: Send) -> None:
        """Sends the events of one answer; the first comes with the head of the response."""
        started, sent = False, 0

        async def data(content: bytes) -> None:
            nonlocal started
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
            await send({"type": "http.response.body", "body": content, "more_body": True})

        choices = _several(self._choices(request), fault.per_event)
        over = await self._goes_wrong(fault, 0, data)
        while not over and (choice := await anext(choices, None)):
            sent += len(choice["token_ids"])
            del choice["prompt_logprobs"]
            await data(_event({**self._frame(), "choices": [_shown(choice, request, fault)]}))
            over = await self._goes_wrong(fault, sent, data)
        if not over:
            if (request["stream_options"] or {}).get("include_usage"):
                await data(_event({**self._frame(), "choices": [], "usage": _usage(request, sent)}))
            await data(b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _goes_wrong(self, fault: Fault, sent: int, data: Callable[[bytes], Awaitable[None]]) -> bool:
        """Lets a fault happen in a stream if it is time; true if the stream is over."""
        if sent != fault.after or not fault.then:
            return False
        if fault.then == "cut":
            raise Cut
        if fault.then == "silence":
            await self._silence()
        elif fault.then == "content":
            await data(fault.content)
        elif fault.then == "error":
            message = {"message": "EngineCore died", "type": "InternalServerError", "param": None, "code": 500}
            await data(_event({"error": message}) + b"data: [DONE]\n\n")
        while fault.then == "repeat":
            await data(fault.content)
            await asyncio.sleep(0.01)
        return fault.then in ("end", "error")

    async def _choices(self, request: Body) -> AsyncIterator[Body]:
        """One choice for each token, with the text that it adds."""
        tokens: list[int] = []
        sent = ""
        for token, logprobs in self._tokens(request):
            tokens.append(token)
            self._count(tokens=1)
            at_end = token in request["stop_token_ids"] or (token in self._ends and not request["ignore_eos"])
            shown = tokens[:-1] if at_end else tokens
            text = self.tokenizer.decode(shown, skip_special_tokens=request["skip_special_tokens"])
            stops = [(text.find(stop), stop) for stop in request["stop"] if stop in text]
            reason, stop_reason = None, None
            if at_end:
                reason, stop_reason = "stop", token if token in request["stop_token_ids"] else None
            elif stops:
                text = text[: min(stops)[0]]
                reason, stop_reason = "stop", min(stops)[1]
            elif len(tokens) == request["max_tokens"]:
                reason = "length"
            else:
                held = max((len(stop) - 1 for stop in request["stop"]), default=0)
                text = sent if text.endswith("\ufffd") else text[: max(len(text) - held, len(sent))]
            yield {
                "index": 0,
                "text": text[len(sent) :],
                "prompt_token_ids": request["prompt"] if len(tokens) == 1 else None,
                "logprobs": None,
                "finish_reason": reason,
                "stop_reason": stop_reason,
                "token_ids": [token],
                "prompt_logprobs": logprobs,
            }
            sent = text
            if reason:
                return
            await asyncio.sleep(0)  # the other answers' turn

    def _tokens(self, request: Body) -> Iterator[tuple[int, list[Any] | None]]:
        """The tokens that follow a prompt; the first comes with the log-probabilities of the prompt's."""
        prompt: list[int] = request["prompt"]
        generator = torch.Generator()
        generator.seed() if request["seed"] is None else generator.manual_seed(request["seed"])
        new, cache, seen = prompt, None, list(prompt)
        self._count(prompt_tokens=len(prompt))
        while True:
            with torch.inference_mode():
                output = self.model(torch.tensor([new]), past_key_values=cache, use_cache=True)
            self._count(forwards=1)
            logits, cache = output.logits[0].float(), output.past_key_values
            first = len(seen) == len(prompt)
            logprobs = (
                self._prompt_logprobs(prompt, logits, request) if first and request["prompt_logprobs"] is not None else None
            )
            token = _next_token(logits[-1], seen, request, generator)
            yield token, logprobs
            new = [token]
            seen.append(token)

    def _prompt_logprobs(self, prompt: list[int], logits: torch.Tensor, request: Body) -> list[Body | None]:
        """For each token of a prompt but the first: the log-probabilities of it and of the likeliest, by token id."""
        if self.logprobs_mode == "processed_logprobs" and request["temperature"]:
            logits = logits / request["temperature"]
        scores = logits if self.logprobs_mode == "raw_logits" else logits.log_softmax(-1)
        listed: list[Body | None] = [None]
        for token, row in zip(prompt[1:], scores[:-1], strict=True):
            shown = dict.fromkeys([token, *row.topk(request["prompt_logprobs"]).indices.tolist()])
            listed.append({str(token): self._logprob(token, row) for token in shown})
        return listed

    def _logprob(self, token: int, row: torch.Tensor) -> Body:
        rank = int((row > row[token]).sum()) + 1
        return {"logprob": max(row[token].item(), SMALLEST), "rank": rank, "decoded_token": self.tokenizer.decode([token])}

    def _frame(self) -> Body:
        return {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": self.name}

    def _count(self, **changes: int) -> None:
        with self._changed:
            for name, change in changes.items():
                setattr(self.counts, name, getattr(self.counts, name) + change)
            self._changed.notify_all()

    async def _silence(self) -> None:
        self._count(silent=1)
        self.when_silent()
        try:
            await self._released.wait()
        finally:
            self._count(silent=-1)

    def _release(self) -> None:
        self._released.set()
        self._released = asyncio.Event()

    def _die(self) -> None:
        for listener in self._uvicorn.servers:
            listener.close()
        for connection in list(self._uvicorn.server_state.connections):
            connection.transport.abort()

    def _connection(self, scope: Scope) -> asyncio.Transport:
        found = [known for known in self._uvicorn.server_state.connections if known.client == tuple(scope["client"])]
        transport: asyncio.Transport = found[0].transport
        return transport

    def _call(self, function: Callable[[], None]) -> None:
        """Runs a function in the server's own thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)


@contextlib.contextmanager
def serving(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "tiny", **options: Any
) -> Iterator[CompletionsServer]:
    """A server of a model in a thread, which ends with the block; options as `CompletionsServer` takes them."""
    server = CompletionsServer(model, tokenizer, name, **options)
    thread = threading.Thread(target=lambda: asyncio.run(server.run()), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.die()
        thread.join(HANG)
        assert not thread.is_alive()


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    listed = model.generation_config.eos_token_id
    ends = set(listed) if isinstance(listed, list) else {listed}
    return (ends | {tokenizer.eos_token_id}) - {None}


def _next_token(logits: torch.Tensor, seen: list[int], request: Body, generator: torch.Generator) -> int:
    """The greedy or a sampled token, in vLLM's order: penalty, temperature, min-p, top-k, top-p."""
    if (penalty := request["repetition_penalty"]) != 1:
        known = torch.tensor(sorted(set(seen)))
        logits = logits.index_copy(0, known, torch.where(logits[known] > 0, logits[known] / penalty, logits[known] * penalty))
    if request["temperature"] < 1e-5:
        return int(logits.argmax())
    probabilities = (logits / request["temperature"]).softmax(-1)
    if request["min_p"]:
        probabilities = probabilities * (probabilities >= request["min_p"] * probabilities.max())
    if 0 < request["top_k"] < len(probabilities):
        probabilities = probabilities * (probabilities >= probabilities.topk(request["top_k"]).values[-1])
    if request["top_p"] < 1:
        ordered, indices = (probabilities / probabilities.sum()).sort(descending=True)
        ordered = ordered * (ordered.cumsum(0) - ordered < request["top_p"])
        probabilities = torch.zeros_like(ordered).index_copy(0, indices, ordered)
    return int(torch.multinomial(probabilities, 1, generator=generator))


async def _several(choices: AsyncIterator[Body], number: int) -> AsyncIterator[Body]:
    """Choices with so many tokens each, but for the last."""
    pieces: list[Body] = []
    async for piece in choices:
        pieces.append(piece)
        if len(pieces) == number or piece["finish_reason"]:
            yield _joined(pieces)
            pieces = []


def _joined(pieces: list[Body]) -> Body:
    """One choice of several that follow each other."""
    ends = {name: pieces[-1][name] for name in ("finish_reason", "stop_reason")}
    token_ids = [token for piece in pieces for token in piece["token_ids"]]
    return {**pieces[0], **ends, "text": "".join(piece["text"] for piece in pieces), "token_ids": token_ids}


def _shown(choice: Body, request: Body, fault: Fault) -> Body:
    hidden = fault.leave_out if request["return_token_ids"] else (*fault.leave_out, "token_ids", "prompt_token_ids")
    return {name: value for name, value in choice.items() if name not in hidden}


def _usage(request: Body, tokens: int) -> Body:
    prompt = len(request["prompt"])
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def _event(content: Body) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def _pieces(send: Send, byte_by_byte: bool) -> Send:
    """Sends bodies as they are, or each byte alone."""

    async def send_bytes(message: Scope) -> None:
        content = message.get("body", b"")
        for place in range(len(content) - 1):
            await send({"type": "http.response.body", "body": content[place : place + 1], "more_body": True})
            await asyncio.sleep(0)
        await send({**message, "body": content[-1:]} if content else message)

    return send_bytes if byte_by_byte else send


async def _respond(send: Send, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
    shown = {"content-type": "application/json", "content-length": str(len(content)), **(headers or {})}
    encoded = [(name.lower().encode(), value.encode()) for name, value in shown.items()]
    cut = len(content) < int(shown["content-length"])
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": content, "more_body": cut})


async def _read_json(receive: Receive) -> Body:
    content, more = b"", True
    while more:
        message = await receive()
        content, more = content + message.get("body", b""), message.get("more_body", False)
    try:
        body: Body = json.loads(content)
    except ValueError:
        raise Refused(400, "the body is no JSON") from None
    return body


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = sys.argv[1]
    torch.set_num_threads(1)
    alone = CompletionsServer(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    if sys.argv[2:]:
        alone.faults.append(Fault(where=lambda body: body["max_tokens"] > 64, then="silence", after=int(sys.argv[2])))
    alone.when_silent = lambda: print("silent", flush=True)
    print(alone.url, flush=True)
    asyncio.run(alone.run())
