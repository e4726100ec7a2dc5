"""Numbers of a server for Prometheus; none depends on a text."""

from __future__ import annotations

from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..speculation.rule import SwitchReason
from ..text.streaming import Writer
from .requests import End

Outcome = Literal["answered", "refused", "failed", "left"]

TOKENS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """The numbers of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "wsd_requests",
            "Requests for an answer: answered; refused; failed at a server or in a model; left by their client.",
            ["outcome"],
            registry=registry,
        )
        self.open = Gauge("wsd_open_requests", "Requests that are being answered.", registry=registry)
        self.first_token = Histogram(
            "wsd_first_token_seconds", "Time to the first piece of an answer.", buckets=SECONDS, registry=registry
        )
        self.answer = Histogram("wsd_answer_seconds", "Time to the end of an answer.", buckets=SECONDS, registry=registry)
        self.prompt_tokens = Counter("wsd_prompt_tokens", "Tokens in the base's prompts.", registry=registry)
        self.tokens = Counter("wsd_tokens", "Tokens of whole answers, by writer.", ["writer"], registry=registry)
        self.switches = Counter("wsd_switches", "Ends of the pilot's parts, by reason.", ["reason"], registry=registry)
        self.switch_index = Histogram(
            "wsd_switch_index",
            "Number of the drafted token at which the base became confident, of answers in which it did.",
            buckets=TOKENS,
            registry=registry,
        )
        for counter, labels in ((self.requests, Outcome), (self.tokens, Writer), (self.switches, SwitchReason)):
            for label in get_args(labels):
                counter.labels(label)  # shown from the beginning, with 0

    def ended(self, end: End, seconds: float) -> None:
        """Counts the time, the tokens and the switch of a whole answer."""
        self.answer.observe(seconds)
        self.prompt_tokens.inc(end.prompt_tokens)
        self.tokens.labels("pilot").inc(end.pilot_tokens)
        self.tokens.labels("base").inc(end.base_tokens)
        self.switches.labels(end.switch_reason).inc()
        if end.switch_index >= 0:
            self.switch_index.observe(end.switch_index)
