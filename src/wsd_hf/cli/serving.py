"""`wsd-hf serve`: base and pilot behind an HTTP API."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import WSDValueError
from ..remote.address import check_key
from .models import Loading, load_models, takes_loading
from .options import (
    MODEL,
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
        str | None, typer.Option(help="API of a server that holds the base, such as vLLM's http://HOST:8000/v1, instead of --base.")
    ] = None,
    pilot_url: Annotated[str | None, typer.Option(help="API of the server that holds the pilot.")] = None,
    base_tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer of the base at --base-url, a path or Hub id. Default: its name at the server.")
    ] = None,
    pilot_tokenizer: Annotated[str | None, typer.Option(help="Tokenizer of the pilot at --pilot-url, likewise.")] = None,
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
        try:
            import uvicorn

            from ..serving.app import Limits, create_app
            from ..serving.body import Defaults
        except ImportError as error:
            raise WSDValueError(f'wsd-hf serve: not installed ({error}); pip install "wsd_hf[serve]"') from None

        with _bound(host, port) as listener:
            if base_url is None and pilot_url is None:
                answerer, model = _local(base, pilot, batch_size, loading), _model_name(base)
            else:
                ...
            defaults = Defaults(name or model, config, temperature, top_p, max_new_tokens)
            app = create_app(answerer, defaults, Limits(body_bytes=max_body, open_requests=max_open), key)
            settings = uvicorn.Config(
                app, log_config=None, access_log=False, server_header=False, lifespan="off", timeout_graceful_shutdown=grace
            )
            listener.listen(settings.backlog)
            _announce(listener, defaults.model, secured=bool(key))
            uvicorn.Server(settings).run(sockets=[listener])
