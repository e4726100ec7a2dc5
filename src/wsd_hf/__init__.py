"""Weak-to-Strong Decoding for Hugging Face transformers.

A small aligned model (the pilot) begins the answer, a large base model finishes it (Song et al., arXiv 2506.07434):

    model = wsd_hf.enable_wsd(model)
    model.generate(**inputs, assistant_model=pilot, strategy="wsd")
"""

from .bundle import Packed, pack
from .card import pilot_card
from .config import WSDConfig
from .errors import WSDError, WSDHubError, WSDLogitsError, WSDValueError
from .generation import AutoModelForCausalLM, WSDGenerationMixin, disable_wsd, enable_wsd
from .hub import load_pilot, push_pilot
from .logits_process import WSDLogitsProcessor
from .outputs import (
    GuidedGenerateOutput,
    GuidedStats,
    NudgingGenerateOutput,
    SearchGenerateOutput,
    Trace,
    TracedToken,
    WSDGenerateOutput,
    WSDStats,
    explain,
)
from .pipelines import WSDTextGenerationPipeline
from .search.value import ImplicitValue
from .switch import SwitchCriteria, confidence, switch_index
from .text.chat import BASE_CHAT_TEMPLATE, BASE_STOP_STRINGS, build_inputs
from .text.streaming import AnswerStreamer
from .text.urial import URIAL_PROMPT, urial_messages
from .tiny import load_tiny_pair

__all__ = [
    "BASE_CHAT_TEMPLATE",
    "BASE_STOP_STRINGS",
    "URIAL_PROMPT",
    "AnswerStreamer",
    "AutoModelForCausalLM",
    "GuidedGenerateOutput",
    "GuidedStats",
    "ImplicitValue",
    "NudgingGenerateOutput",
    "Packed",
    "SearchGenerateOutput",
    "SwitchCriteria",
    "Trace",
    "TracedToken",
    "WSDConfig",
    "WSDError",
    "WSDGenerateOutput",
    "WSDGenerationMixin",
    "WSDHubError",
    "WSDLogitsError",
    "WSDLogitsProcessor",
    "WSDStats",
    "WSDTextGenerationPipeline",
    "WSDValueError",
    "build_inputs",
    "confidence",
    "disable_wsd",
    "enable_wsd",
    "explain",
    "load_pilot",
    "load_tiny_pair",
    "pack",
    "pilot_card",
    "push_pilot",
    "switch_index",
    "urial_messages",
]
