import itertools
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tokenizers_for_tests import (
    GPT_4O_SPLIT,
    LLAMA_3_SPLIT,
    QWEN_SPLIT,
    byte_level_tokenizer,
    llama_2_tokenizer,
    mistral_tokenizer,
    without_added_space,
)
from wsd_hf import WSDValueError
from wsd_hf.text.vocabulary import same_vocabulary

DATA = Path(__file__).parent / "data"


def tokenizer(*tokens: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0])))


def test_equal_tokenizers_with_padded_embeddings_are_one_vocabulary():
    assert same_vocabulary(64, 128, tokenizer("u", "a", "b"), tokenizer("u", "a", "b"))


def test_a_sibling_with_added_tokens_is_one_vocabulary():
    assert same_vocabulary(3, 5, tokenizer("u", "a", "b"), tokenizer("u", "a", "b", "<|im_start|>", "<|im_end|>"))


@pytest.mark.parametrize("tokens", ["uba", "uac"])
def test_equal_sizes_with_another_order_or_other_tokens_are_told_apart(tokens):
    assert not same_vocabulary(3, 3, tokenizer("u", "a", "b"), tokenizer(*tokens))


def test_without_tokenizers_equal_widths_pass():
    assert same_vocabulary(64, 64)


@pytest.mark.parametrize("given", [{}, {"assistant_tokenizer": tokenizer("u")}, {"tokenizer": tokenizer("u")}])
def test_a_missing_tokenizer_is_named_only_where_it_is_needed(given):
    assert same_vocabulary(64, 64, **given)
    missing = "assistant_tokenizer" if "tokenizer" in given else "tokenizer"
    with pytest.raises(WSDValueError, match=f"64 entries and the pilot's 128: pass {missing}="):
        same_vocabulary(64, 128, **given)


def test_a_tokenizer_that_has_grown_is_compared_again():
    base, pilot = tokenizer("u", "a", "b"), tokenizer("u", "a", "b")
    assert same_vocabulary(3, 3, base, pilot)
    base.add_tokens(["c"])
    pilot.add_tokens(["d"])
    assert not same_vocabulary(4, 4, base, pilot)


@pytest.mark.parametrize("sizes", [(700, 700), (700, 768)])
def test_a_tokenizer_saved_again_is_the_same(sizes, tmp_path):
    base = byte_level_tokenizer(LLAMA_3_SPLIT)
    base.save_pretrained(tmp_path)
    assert same_vocabulary(*sizes, base, PreTrainedTokenizerFast.from_pretrained(tmp_path))


def test_an_instruct_siblings_tokens_mean_the_same():
    base, pilot = byte_level_tokenizer(LLAMA_3_SPLIT), byte_level_tokenizer(LLAMA_3_SPLIT)
    pilot.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|pad|>"})
    pilot.add_tokens(["<think>"])
    pilot.chat_template = "{{ messages }}"
    assert same_vocabulary(700, 700, base, pilot)
    assert same_vocabulary(700, 700, pilot, base)


def test_a_space_in_front_of_a_text_makes_no_other_vocabulary():
    for base in (byte_level_tokenizer(add_prefix_space=True), llama_2_tokenizer(), mistral_tokenizer()):
        assert same_vocabulary(700, 700, base, without_added_space(base))


def test_a_llama_2_tokenizer_saved_in_todays_form_is_the_same():
    base = llama_2_tokenizer()
    state = json.loads(mistral_tokenizer().backend_tokenizer.to_str())
    state |= {"model": json.loads(base.backend_tokenizer.to_str())["model"]}
    pilot = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    assert same_vocabulary(700, 700, base, pilot)


@pytest.mark.parametrize(
    ("split", "normalizer"),
    [
        (LLAMA_3_SPLIT, normalizers.NFC()),
        (LLAMA_3_SPLIT, normalizers.NFKC()),
        (LLAMA_3_SPLIT, normalizers.Lowercase()),
        (QWEN_SPLIT, None),
        (GPT_4O_SPLIT, None),
        (None, None),
        ("", None),
    ],
)
def test_the_same_tokens_behind_another_normalizer_or_split_are_told_apart(split, normalizer):
    base = byte_level_tokenizer(LLAMA_3_SPLIT)
    other = byte_level_tokenizer(split, normalizer)
    state = json.loads(other.backend_tokenizer.to_str()) | {"model": json.loads(base.backend_tokenizer.to_str())["model"]}
    pilot = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    assert pilot.get_vocab() == base.get_vocab()
    assert not same_vocabulary(700, 700, base, pilot)


def test_a_vocabulary_that_another_one_begins_with_is_told_apart():
    base, pilot = byte_level_tokenizer(size=500), byte_level_tokenizer(size=400)
    assert pilot.get_vocab().items() <= base.get_vocab().items()
    assert not same_vocabulary(500, 500, base, pilot)


def test_the_golden_tokenizers_are_told_apart():
    tokenizers = {path.name: AutoTokenizer.from_pretrained(path) for path in (DATA / "tokenizers").iterdir()}
    for base, pilot in itertools.product(tokenizers, repeat=2):
        one = base == pilot or base[0] == pilot[0] == "A"
        assert same_vocabulary(512, 512, tokenizers[base], tokenizers[pilot]) == one
