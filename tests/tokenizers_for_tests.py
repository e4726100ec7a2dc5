"""Small tokenizers: one that is easy to read, one letter one token, and one of every kind that models come with."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
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
    """Byte-level BPE trained on a few lines, always to the same merges.

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
    return _trained(tokenizer, "<|eot|>", ["<|eot|>", *ALPHABET], size)


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
    pieces = {"<unk>": 0.0, "</s>": 0.0} | {f"▁{piece}": -6.0 for piece in _pieces()} | dict.fromkeys(_pieces(), -7.0)
    pieces |= {letter: -9.0 for letter in "▁\n" + ENGLISH + WORLD[:40] if letter != " "}
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def wordpiece_tokenizer():
    """BERT's: no case, no accents, no white space; a word with an unknown character is lost."""
    letters = sorted({letter for letter in (ENGLISH + WORLD[:40]).lower() if not letter.isspace()})
    pieces = [*letters, *sorted(_pieces())]
    vocabulary = dict.fromkeys(["[UNK]", "[SEP]", *pieces, *(f"##{piece}" for piece in pieces)])
    model = models.WordPiece({token: index for index, token in enumerate(vocabulary)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[SEP]"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")


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
    letters = sorted({"▁", *ENGLISH, *WORLD[:40]} - {" "})
    return _trained(tokenizer, "</s>", ["<unk>", "</s>", *BYTE_TOKENS, *letters], 700)


def _pieces() -> dict[str, None]:
    """Parts of the words of the corpus."""
    words = [word for word in ENGLISH.lower().split() if word.isalpha()]
    return dict.fromkeys(
        word[start:end] for word in words for start, end in ((0, 2), (0, 3), (0, 9), (1, 4), (2, 9)) if word[start:end]
    )


def _trained(tokenizer: Tokenizer, eos: str, tokens: list[str], size: int) -> PreTrainedTokenizerFast:
    """BPE whose merges join the most frequent pairs; the library's own trainer breaks ties by chance."""
    words = [list(word) for word in _words(tokenizer)]
    merges: list[tuple[str, str]] = []
    vocabulary = dict.fromkeys(tokens)
    while len(vocabulary) < size:
        pairs = Counter(pair for word in words for pair in pairwise(word) if vocabulary.keys() >= set(pair))
        if not pairs:
            break
        merge = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(merge)
        vocabulary["".join(merge)] = None
        words = [_merged(word, merge) for word in words]
    state = json.loads(tokenizer.to_str())
    state["model"] |= {"vocab": {token: index for index, token in enumerate(vocabulary)}, "merges": merges}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([token for token in tokens[:2] if token[0] == "<" and len(token) > 1])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def _words(tokenizer: Tokenizer) -> list[str]:
    words = []
    for line in [*(ENGLISH + WORLD).split(" "), ENGLISH, WORLD]:
        text = tokenizer.normalizer.normalize_str(line) if tokenizer.normalizer else line
        words += [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] if tokenizer.pre_tokenizer else [text]
    return words


def _merged(word: list[str], merge: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for token in word:
        if merged and (merged[-1], token) == merge:
            merged[-1] += token
        else:
            merged.append(token)
    return merged
