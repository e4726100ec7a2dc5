import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from wsd_hf import WSDValueError
from wsd_hf.text.vocabulary import check_vocabularies


def tokenizer(*tokens: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0])))


def test_equal_tokenizers_with_padded_embeddings_are_one_vocabulary():
    check_vocabularies(64, 128, tokenizer("u", "a", "b"), tokenizer("u", "a", "b"))


def test_a_sibling_with_added_tokens_is_one_vocabulary():
    check_vocabularies(3, 5, tokenizer("u", "a", "b"), tokenizer("u", "a", "b", "<|im_start|>", "<|im_end|>"))


def test_equal_sizes_with_another_order_are_told_apart():
    with pytest.raises(WSDValueError, match="'b' is 2 for the base and 1 for the pilot"):
        check_vocabularies(3, 3, tokenizer("u", "a", "b"), tokenizer("u", "b", "a"))


def test_equal_sizes_with_other_tokens_are_told_apart():
    with pytest.raises(WSDValueError, match="id 2 is 'b' for the base and 'c' for the pilot"):
        check_vocabularies(3, 3, tokenizer("u", "a", "b"), tokenizer("u", "a", "c"))


def test_without_tokenizers_equal_widths_pass():
    check_vocabularies(64, 64)


@pytest.mark.parametrize("given", [{}, {"assistant_tokenizer": tokenizer("u")}, {"tokenizer": tokenizer("u")}])
def test_a_missing_tokenizer_is_named_only_where_it_is_needed(given):
    check_vocabularies(64, 64, **given)
    missing = "assistant_tokenizer" if "tokenizer" in given else "tokenizer"
    with pytest.raises(WSDValueError, match=f"64 entries and the pilot's 128: pass {missing}="):
        check_vocabularies(64, 128, **given)
