"""Weak-to-Strong Decoding for Hugging Face transformers.

A small aligned model (the pilot) begins the answer, a large base model finishes it (Song et al., arXiv 2506.07434):

    model = wsd_hf.enable_wsd(model)
    model.generate(**inputs, assistant_model=pilot, strategy="wsd")
"""

from __future__ import annotations

from importlib.metadata import version

from .bundle import Packed, pack
from .diagnosis.diagnosis import Diagnosis, diagnose
from .engine.stats import Stats, Work
from .engine.strategy import StrategyConfig, StrategyOutput
from .errors import WSDError, WSDHubError, WSDLogitsError, WSDServerError, WSDValueError
from .generation import AutoModelForCausalLM, WSDGenerationMixin, disable_wsd, enable_wsd
from .hub.card import pilot_card
from .hub.loading import load_pilot
from .hub.publishing import push_pilot
from .integrations.pipelines import WSDTextGenerationPipeline
from .pair import Pair
from .strategies.blend import BlendConfig
from .strategies.emulated_fine_tuning import EmulatedFineTuningConfig
from .strategies.ensemble import EnsembleConfig
from .strategies.nudging.config import NudgingConfig
from .strategies.product import ProductConfig
from .strategies.reward_guided.config import RewardGuidedConfig
from .strategies.reward_guided.output import JudgedStep, RewardGuidedOutput
from .strategies.reward_guided.reward_model import RewardModel
from .strategies.search.config import SearchConfig
from .strategies.search.output import SearchOutput
from .strategies.search.value import ImplicitValue
from .strategies.wsd.config import WSDConfig
from .strategies.wsd.logits_process import WSDLogitsProcessor
from .strategies.wsd.output import WSDOutput
from .strategies.wsd.switch import confidence, switch_index
from .strategies.wsd.switch_rules import (
    AgreementCriteria,
    EntropyCriteria,
    RelativeConfidenceCriteria,
    SwitchCriteria,
    SwitchRule,
)
from .strategies.wsd.two_way import TwoWayConfig, TwoWayOutput, WriterChange
from .text.chat import BASE_CHAT_TEMPLATE, build_inputs
from .text.next_turn import BASE_STOP_STRINGS
from .text.streaming import AnswerStreamer, WriterStreamer
from .text.urial import URIAL_PROMPT, urial_messages
from .trace import Switch, Trace, TracedToken, explain

__version__ = version("wsd_hf")

__all__ = [
    "BASE_CHAT_TEMPLATE",
    "BASE_STOP_STRINGS",
    "URIAL_PROMPT",
    "AgreementCriteria",
    "AnswerStreamer",
    "AutoModelForCausalLM",
    "BlendConfig",
    "Diagnosis",
    "EmulatedFineTuningConfig",
    "EnsembleConfig",
    "EntropyCriteria",
    "ImplicitValue",
    "JudgedStep",
    "NudgingConfig",
    "Packed",
    "Pair",
    "ProductConfig",
    "RelativeConfidenceCriteria",
    "RewardGuidedConfig",
    "RewardGuidedOutput",
    "RewardModel",
    "SearchConfig",
    "SearchOutput",
    "Stats",
    "StrategyConfig",
    "StrategyOutput",
    "Switch",
    "SwitchCriteria",
    "SwitchRule",
    "Trace",
    "TracedToken",
    "TwoWayConfig",
    "TwoWayOutput",
    "WSDConfig",
    "WSDError",
    "WSDGenerationMixin",
    "WSDHubError",
    "WSDLogitsError",
    "WSDLogitsProcessor",
    "WSDOutput",
    "WSDServerError",
    "WSDTextGenerationPipeline",
    "WSDValueError",
    "Work",
    "WriterChange",
    "WriterStreamer",
    "build_inputs",
    "confidence",
    "diagnose",
    "disable_wsd",
    "enable_wsd",
    "explain",
    "load_pilot",
    "pack",
    "pilot_card",
    "push_pilot",
    "switch_index",
    "urial_messages",
]
