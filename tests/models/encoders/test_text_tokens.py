"""Prompts: cleaned as Wan's, tokens as the tokenizer's, padding as Wan's transformer sees it."""

import numpy as np
import pytest

from vdx.files import warn_once
from vdx.interop.family_defaults import NEGATIVE
from vdx.models.encoders.text_tokens import PromptTokenizer, clean_prompt

WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "walks", "&", "the", "street"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of words that ends a prompt with </s>, as T5's does."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    path = tmp_path_factory.mktemp("model") / "tokenizer"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    return path


def test_tokens_are_the_tokenizers(folder):
    from transformers import AutoTokenizer

    tokenize, theirs = PromptTokenizer(folder, (8, 4)), AutoTokenizer.from_pretrained(folder)
    for prompts, length in (
        (["a cat", ""], 4),
        (["a  cat &amp;\tthe street", "cat"], 8),
        (["a cat walks the street and the street walks the cat"], 8),
    ):
        ids, mask = tokenize(prompts)
        want = theirs(
            [clean_prompt(p) for p in prompts],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="np",
        )
        assert ids.shape == (len(prompts), length) and ids.dtype == np.int32
        np.testing.assert_array_equal(ids, want["input_ids"])
        np.testing.assert_array_equal(mask, want["attention_mask"] == 1)
        assert (ids[np.arange(len(ids)), mask.sum(1) - 1] == 1).all()  # each ends with </s>
    assert tokenize(["a"])[0].tolist() == [[3, 1, 0, 0]]
    assert PromptTokenizer(folder, (4,), clean=False)(["&amp;"])[0].tolist() == [[2, 1, 0, 0]]


def test_cut_prompts_are_reported(folder, caplog):
    warn_once.cache_clear()
    tokenize = PromptTokenizer(folder, (4, 8))
    tokenize(["a cat walks the street and a"])  # seven words and </s>
    assert not caplog.records
    tokenize(["a " * 500, "a cat", "a " * 8])
    assert [record.message for record in caplog.records] == [
        "2 of 3 prompts are longer than the 8 tokens, special ones included, that the text "
        "encoder reads, and are cut; the longest has 501."
    ]


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"No tokenizer can be read from .*nowhere"):
        PromptTokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "prompt",
    [
        "  A cat\n\twalks  ",
        "rock &amp;amp; roll &lt;3",
        "&amp;nbsp;x&nbsp;y",
        "",
        "a\u3000b\x1cc\x85",
        "&amp;amp;amp;",
        "\x1f猫 が 歩く\u2028\u200b",
        "\u201ca cat\u201d \u2018walks\u2019",
        "a \ufb01ne cat\u2026",
        "色调艳丽，过曝，ＪＰＥＧ！",
        "cafÃ© and the catâ€™s",
        "&ldquo;quoted&rdquo;",
    ],
)
def test_cleaning_is_wans(prompt):
    pytest.importorskip("diffusers")
    from diffusers.pipelines.wan import pipeline_wan

    assert hasattr(pipeline_wan, "ftfy")  # which diffusers leaves out where it is missing
    assert clean_prompt(prompt) == pipeline_wan.prompt_clean(prompt)


def test_the_makers_negative_prompt_reaches_the_tokenizer_with_plain_commas():
    cleaned = clean_prompt(NEGATIVE)
    assert "，" in NEGATIVE and cleaned == NEGATIVE.replace("，", ",")
