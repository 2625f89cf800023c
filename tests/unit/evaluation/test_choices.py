"""The tokens of a choice after its question are those that are scored, whatever the tokenizer writes around a text."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from loraflow.data.tokens.token_labels import IGNORED
from loraflow.evaluation.general import encode_choice

SPECIAL = ["<unk>", "<s>", "</s>", "<mask>"]
AROUND = {None: [], "<s> $A": ["<s>"], "$A </s>": [], "<s> $A </s>": ["<s>"], "<mask> <s> $A </s>": ["<mask>", "<s>"]}


def tokenizer_with(template):
    """Return a tokenizer of bytes that writes special tokens around a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if template is not None:
        special = [(token, vocabulary[token]) for token in SPECIAL]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>"
    )


def parts_of(template, context, choice):
    """Return the special tokens in front, the question, and the text that is scored."""
    tokenizer = tokenizer_with(template)
    encoded = encode_choice(tokenizer, context, choice)
    ids, learned = encoded.ids.tolist(), encoded.labels != IGNORED
    assert encoded.prompt == len(ids) - learned.sum() and encoded.labels[learned].tolist() == ids[encoded.prompt :]
    number = next((at for at, token in enumerate(ids) if token >= len(SPECIAL)), len(ids))
    before = tokenizer.convert_ids_to_tokens(ids[:number])
    return before, tokenizer.decode(ids[number : encoded.prompt]), tokenizer.decode(ids[encoded.prompt :])


@pytest.mark.parametrize("template", AROUND)
def test_the_choice_is_scored_after_the_tokenizers_bos_and_the_question_without_an_eos(template):
    assert parts_of(template, "Answer:", "leaves") == (AROUND[template], "Answer:", " leaves")


@pytest.mark.parametrize("template", AROUND)
@pytest.mark.parametrize(
    ("context", "scored"), [("A: ", " leaves"), ("A:\n", "\nleaves"), ("A: \n ", " \n leaves"), ("A:\t", "\tleaves")]
)
def test_white_space_at_the_end_of_a_prompt_is_scored_with_the_choice_in_place_of_the_space(template, context, scored):
    assert parts_of(template, context, "leaves") == (AROUND[template], "A:", scored)


def test_a_prompt_that_begins_with_the_bos_has_one():
    assert parts_of("<s> $A </s>", "<s>Answer:", "leaves") == (["<s>"], "Answer:", " leaves")


def test_a_question_without_a_token_is_refused_although_an_eos_would_be_one():
    with pytest.raises(ValueError, match="no token"):
        encode_choice(tokenizer_with("$A </s>"), " ", "leaves")
