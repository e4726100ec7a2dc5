"""`wsd-hf serve`: base and pilot behind an HTTP API."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import WSDValueError
from ..remote.address import check_key, check_url
from ..strategies.wsd.config import WSDConfig
from .models import Loading, load_models, takes_loading
from .options import (
    Base,
    IgnoreRepeats,
    Pilot,
    SwitchCriteria,
    Threshold,
    TopP,
    WindowSize,
    one_line_errors,
    sampling,
    wsd_config,
)
from .terminal import say

if TYPE_CHECKING:
    from ..remote import Server
    from ..serving.requests import Answerer

KEY = "WSD_HF_API_KEY"
"""Environment variable with the key that clients must send."""

SERVER_KEYS = {"base": "WSD_HF_BASE_API_KEY", "pilot": "WSD_HF_PILOT_API_KEY"}
"""Environment variables with the keys of other servers."""


@takes_loading
def serve(
    base: Base = None,
    pilot: Pilot = None,
    base_url: Annotated[
        str | None,
        typer.Option(help="API of a server that holds the base, http://HOST:PORT/v1; then --base names its tokenizer alone."),
    ] = None,
    pilot_url: Annotated[str | None, typer.Option(help="API of a server that holds the pilot, likewise.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Name of the base at --base-url. Default: the only one there.")] = None,
    pilot_model: Annotated[str | None, typer.Option(help="Name of the pilot at --pilot-url, likewise.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in requests. Default: the base's.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 is any that is free.", min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"File with the key that clients must send. Default: the variable {KEY}, or no key.")
    ] = None,
    threshold: Threshold = None,
    window_size: WindowSize = None,
    switch_criteria: SwitchCriteria = None,
    ignore_repeats: IgnoreRepeats = None,
    temperature: Annotated[float, typer.Option(help="Temperature of requests that name none; 0 is greedy.")] = 0.0,
    top_p: TopP = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Most tokens in an answer, the draft included; a request may name fewer.", min=1)
    ] = 2048,
    batch_size: Annotated[int, typer.Option(help="Most answers that a local pair writes at a time.", min=1)] = 16,
    max_open: Annotated[int, typer.Option(help="Most requests that are open at a time; more get status 429.", min=1)] = 256,
    max_body: Annotated[int, typer.Option(help="Most bytes in a request; larger ones get status 413.", min=1)] = 2**20,
    grace: Annotated[int, typer.Option(help="Seconds that open requests have to end after SIGTERM.", min=0)] = 30,
    *,
    loading: Loading,
) -> None:
    """Serves a pair as an OpenAI-style API: chat completions, streamed or not. The pair is local, or on two servers (vLLM).

    Without --base and --base-url it is the shipped pair. docs/serving.md has the endpoints, the fields and the limits.
    """
    with one_line_errors():
        config = wsd_config(
            threshold=threshold, window_size=window_size, switch_criteria=switch_criteria, ignore_repeats=ignore_repeats
        )
        sampling(temperature or None, top_p)
        key = _key(api_key_file)
        servers = _servers({"base": base_url, "pilot": pilot_url}, {"base": base_model, "pilot": pilot_model}, loading)
        try:
            from ..serving.app import Limits, create_app
            from ..serving.body import Defaults, check_temperature
            from ..serving.connections import server_of
            from ..serving.hosts import own_names
        except ImportError as error:
            raise WSDValueError(f'wsd-hf serve: not installed ({error}); pip install "wsd_hf[serve]"') from None

        check_temperature("--temperature", temperature)
        with bound(host, port) as listener:
            if servers:
                answerer, model = _remote(servers, base, pilot, config)
            else:
                answerer, model = _local(base, pilot, batch_size, loading)
            defaults = Defaults(name or model, config, temperature, top_p, max_new_tokens)
            limits = Limits(body_bytes=max_body, open_requests=max_open)
            names = [] if key else own_names(host)
            app = create_app(answerer, defaults, limits, key, names)
            server = server_of(app, limits, grace)
            _log()
            listener.listen(server.config.backlog)
            _announce(listener, defaults.model, for_all=not key and not names)
            server.run(sockets=[listener])


def _key(file: Path | None) -> str:
    """The key that clients must send; "" for none."""
    if file is None:
        return check_key(KEY, os.environ.get(KEY, ""))
    key = check_key(f"--api-key-file {file}", file.read_text("ascii", "replace").strip())
    if not key:
        raise WSDValueError(f"--api-key-file {file}: is empty; write a key, or leave the option out")
    return key


def bound(host: str, port: int) -> socket.socket:
    """A socket on an address; bound before models are loaded, which takes long."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise WSDValueError(f"--host {host} --port {port}: {getattr(error, 'strerror', error)}") from None
    return listener


def _local(base: str | None, pilot: str | None, batch_size: int, loading: Loading) -> tuple[Answerer, str]:
    """A pair in this process, and its name."""
    from ..serving.local import LocalAnswerer

    pair = load_models(base, pilot, loading=loading)
    if base is None:
        return LocalAnswerer(pair, batch_size), "tiny"
    return LocalAnswerer(pair, batch_size), Path(base).resolve().name if Path(base).exists() else base


def _servers(urls: dict[str, str | None], models: dict[str, str | None], loading: Loading) -> list[Server]:
    """The servers of base and pilot; none for a local pair."""
    if not any(urls.values()):
        for role, model in models.items():
            if model is not None:
                raise WSDValueError(f"--{role}-model {model} has no effect without --{role}-url: leave it out")
        return []
    for option, value in loading.options().items():
        if value != Loading().options()[option]:
            raise WSDValueError(f"{option} {value} has no effect on models at --base-url: leave it out")
    from ..remote import Server

    servers = []
    for role, variable in SERVER_KEYS.items():
        if (url := urls[role]) is None:
            raise WSDValueError(f"--{role}-url is missing: give both servers, or neither for a local pair")
        key = check_key(variable, os.environ.get(variable, ""))
        servers.append(Server(check_url(f"--{role}-url", url), models[role] or "", key))
    return servers


def _remote(servers: list[Server], base: str | None, pilot: str | None, config: WSDConfig) -> tuple[Answerer, str]:
    """A pair on two servers, and its name."""
    from ..remote import RemotePair
    from ..serving.remote import RemoteAnswerer

    base_server, pilot_server = servers
    pair = RemotePair.connect(base_server, pilot_server, base, pilot)
    pair.generate("Hello.", config, max_new_tokens=1)  # refuses now what it would refuse at every request
    return RemoteAnswerer(pair), pair.base.server.model


def _log() -> None:
    """Logs a line for each request; of other packages, warnings alone."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("wsd_hf.serving").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", "window_size=")  # of requests from here on, whose settings no log holds


def _announce(listener: socket.socket, model: str, for_all: bool) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say(f"{model} is served at http://{shown}:{port}/v1", err=True)
    if for_all:
        say(f"anyone who reaches this address may use the models: set {KEY}, or give --api-key-file", err=True)
