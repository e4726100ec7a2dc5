"""Small tokenizers: one that is easy to read, one letter one token, and one of every kind that models come with."""

from __future__ import annotations

import json
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LETTERS = "<abcdefghijklmnopqrstuvwxyz" + "".join(chr(code) for code in range(0x100, 0x140))


def letter_tokenizer(size: int = 16, start: str = "") -> PreTrainedTokenizerFast:
    """Token 0 is `<` (padding), 1 `a`, 2 `b`, ...

    Args:
        size: of the vocabulary.
        start: letters that come first instead, for a vocabulary of another order.
    """
    letters = (start + "".join(letter for letter in LETTERS if letter not in start))[:size]
    tokenizer = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token="<"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<", clean_up_tokenization_spaces=False)


LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA_3_SPLIT.replace("{1,3}", "")
CASED_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT_4O_SPLIT = "|".join(
    [CASED_WORD % ("*", "+"), CASED_WORD % ("+", "*"), r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"]
)

ENGLISH = (
    "The quick brown fox doesn't jump over 1234567 lazy dogs.\n\nIt's 2024, isn't it?\n  - We'll see... \"perhaps\" (or not);\n"
    "    def f(x):\n        return x + 1  # they've __init__ ====\n\n\nHello hello world, "
    "word words wordy there then them other."
)
WORLD = (
    "こんにちは、世界。日本語のにはにがとに。これはテストです。 你好,世界! 我们在这里。 Привет, мир! café naïve "
    "e\u0301a\u0308 한국어 각 가\u11a8 👩‍👩‍👧 🏳️‍🌈 का ไทย <|eot|> </s>\r\n\t\t x  y   z    w"
)
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level_tokenizer(split: str | None = None, normalizer: object = None, size: int = 600, **kwargs: bool):
    """Byte-level BPE trained on a few lines.

    Args:
        split: pattern of the words; None: GPT-2's, "": none.
        normalizer: of the text.
        size: of the vocabulary, at most.
        kwargs: `add_prefix_space`, `ignore_merges`.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=kwargs.get("ignore_merges", False)))
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = _byte_level_split(split, kwargs.get("add_prefix_space", False))
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, trainers.BpeTrainer, "<|eot|>", size, initial_alphabet=ALPHABET, special_tokens=["<|eot|>"])


def random_merges_tokenizer(seed: int, split: str | None, ignore_merges: bool):
    """Byte-level BPE whose merges are drawn at random, across characters and words; `split` as for `byte_level_tokenizer`.

    With `ignore_merges`, some tokens cannot be reached by merges.
    """
    random = Random(seed)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(ENGLISH + WORLD)[0][0]
    merges: dict[tuple[str, str], None] = {}
    tokens = dict.fromkeys(ALPHABET)
    while len(merges) < 400:
        start = random.randrange(len(letters) - 12)
        middle, end = (start + size for size in sorted(random.sample(range(1, 13), 2)))
        left, right = letters[start:middle], letters[middle:end]
        if left in tokens and right in tokens:
            merges[left, right] = tokens[left + right] = None
    if ignore_merges:
        starts = [random.randrange(len(letters) - 8) for _ in range(100)]
        tokens.update(dict.fromkeys(letters[start : start + random.randint(2, 8)] for start in starts))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = _byte_level_split(split)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|eot|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eot|>")


def llama_2_tokenizer():
    """BPE with `▁` for spaces, one put in front of any text, and bytes for unknown characters."""
    return _byte_fallback_tokenizer(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None)


def mistral_tokenizer():
    """The same, as it is saved today."""
    return _byte_fallback_tokenizer(None, pre_tokenizers.Metaspace("▁", "first", split=False))


def gemma_tokenizer():
    """BPE with `▁` for spaces, none put in front, and bytes for unknown characters."""
    return _byte_fallback_tokenizer(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"))


def unigram_tokenizer():
    """SentencePiece's other model, with compatibility forms written out; unknown characters are lost."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "</s>"]
    return _trained(tokenizer, trainers.UnigramTrainer, "</s>", 250, special_tokens=special, unk_token="<unk>")


def wordpiece_tokenizer():
    """BERT's: no case, no accents, no white space; a word with an unknown character is lost."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[UNK]", "[SEP]"]
    return _trained(tokenizer, trainers.WordPieceTrainer, "[SEP]", 300, special_tokens=special, limit_alphabet=60)


def without_added_space(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy that puts no space in front of a text."""
    state = tokenizer.backend_tokenizer.to_str()
    for setting, off in (
        ('"add_prefix_space":true', '"add_prefix_space":false'),
        ('"prepend_scheme":"first"', '"prepend_scheme":"never"'),
        ('"prepend_scheme":"always"', '"prepend_scheme":"never"'),
        ('{"type":"Prepend","prepend":"▁"},', ""),
    ):
        state = state.replace(setting, off)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(state), eos_token=tokenizer.eos_token)


def _byte_level_split(split: str | None, add_prefix_space: bool = False):
    level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=split is None)
    if not split:
        return level
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level])


def _byte_fallback_tokenizer(normalizer: object, pre_tokenizer: object):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    if not isinstance(normalizer, normalizers.Replace):
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "</s>", *BYTE_TOKENS]
    trained = _trained(tokenizer, trainers.BpeTrainer, "</s>", 700, special_tokens=special, limit_alphabet=60)
    state = json.loads(trained.backend_tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:2]  # the bytes are tokens like others
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>", unk_token="<unk>")


def _trained(tokenizer: Tokenizer, trainer: type, eos: str, size: int, **kwargs: object) -> PreTrainedTokenizerFast:
    lines = [*(ENGLISH + WORLD).split(" "), ENGLISH, WORLD] * 3
    tokenizer.train_from_iterator(lines, trainer(vocab_size=size, show_progress=False, **kwargs))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)
