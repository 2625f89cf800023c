"""The names of keys by which datasets mark answers, in lower case with underscores."""

import re
from collections.abc import Mapping
from functools import lru_cache

# Of these, 0 and false exclude an answer; other numbers multiply its loss.
WEIGHTS = frozenset({
    "weight", "weights", "loss", "loss_weight", "sample_weight", "loss_mask", "compute_loss", "train", "training",
    "trainable", "is_trainable", "train_on", "train_on_turn", "learn", "learned", "learnable", "supervised", "loss_scale",
    "loss_multiplier", "example_weight", "message_weight", "turn_weight", "calculate_loss", "use_loss", "with_loss",
    "has_loss", "requires_loss", "is_train", "to_train", "to_learn", "for_training", "use_for_training",
    "include_in_training", "include_in_loss", "output_with_loss",
})  # fmt: skip
# A row's `loss` or `train` with other values than true and false may be a measurement, or a split.
ROW_WEIGHTS = frozenset({
    "weight", "weights", "loss_weight", "sample_weight", "loss_scale", "loss_multiplier", "example_weight",
})  # fmt: skip
# Of these, 1 and true exclude an answer.
EXCLUSIONS = frozenset({
    "masked", "is_masked", "ignore", "ignored", "ignore_loss", "no_loss", "exclude", "excluded", "skip", "without_loss",
    "skip_loss", "mask_loss", "skip_training", "no_train", "do_not_train", "dont_train", "do_not_learn", "dont_learn",
    "do_not_train_on", "exclude_from_training", "exclude_from_loss", "ignore_in_training", "ignore_in_loss",
})  # fmt: skip
# KTO's: true is a desirable answer. Many datasets have a class by the name `label`, so other values may be no mark.
LABELS = frozenset({"label", "kto_tag", "kto_label", "desirable", "is_desirable"})
# The meaning of these depends on the tool: `mask: 1` is learned in some, and left out in others.
UNCLEAR = frozenset({"mask", "training_detail", "train_detail", "loss_masks", "train_mask", "message_weights"})


def _with_is(names: str) -> frozenset[str]:
    return frozenset(found for name in names.split() for found in (name, f"is_{name}"))


# Judgements count only as true or false: other values, such as the correct answer's text, are named as not read.
_VERDICTS = _with_is(
    "correct accepted approved good valid acceptable usable keep include included enabled ok okay use accept approve"
) | {"correctness", "review_result"}
BAD_VERDICTS = _with_is(
    "incorrect rejected wrong bad invalid unusable deleted removed discard discarded drop dropped hidden disabled delete "
    "to_delete do_not_use dont_use quarantined reject remove to_remove corrupted low_quality filtered_out"
)
# Of these, a number may be a count of votes, or the number of an answer.
_WORD_VERDICTS = _with_is(
    "chosen preferred passed thumbs_up upvoted liked selected best helpful accurate factual faithful winner tests_passed "
    "all_tests_passed passes_tests"
)
_WORD_BAD_VERDICTS = _with_is("failed thumbs_down downvoted disliked hallucination hallucinated unhelpful inaccurate")
WITHOUT_NUMBERS = _WORD_VERDICTS | _WORD_BAD_VERDICTS
GOOD = _VERDICTS | _WORD_VERDICTS
JUDGEMENTS = GOOD | BAD_VERDICTS | _WORD_BAD_VERDICTS
KEYS = WEIGHTS | EXCLUSIONS | LABELS | JUDGEMENTS | UNCLEAR

# Opinions (loraflow/data/answers/judgements.py). Of REACTIONS, a thumb down is always about the answer.
REACTIONS = frozenset({"feedback", "human_feedback", "user_feedback", "thumbs", "thumb", "vote", "reaction"})
OPINIONS = REACTIONS | {
    "quality", "verdict", "judgement", "judgment", "evaluation", "assessment", "human_label", "human_evaluation",
    "human_rating", "annotation", "quality_label", "test_status", "execution_status", "test_result", "verification_result",
    "validation_result", "review_result",
}  # fmt: skip
# These are opinions about the answer only if they say so: answer_rating. Others may be about a film or an order.
_DIRECT = OPINIONS | {"rating", "grade", "review", "quality_check", "status", "result"}
# Of these verdicts, 0 may be the lowest grade, and the answer may be the grade itself, as a grader's is.
GRADES = frozenset({"correctness", "review_result"})
# Of these, `timeout` and `error` are results of running the answer.
RUNS = frozenset({
    "verdict", "test_status", "execution_status", "test_result", "verification_result", "validation_result",
})  # fmt: skip
# Of these, only words that are about an answer count: wrong, runtime error.
STATES = frozenset({"status", "state", "result", "outcome", "rating", "grade", "review"})
SUCCESS = _with_is("success successful")  # false: the trajectory failed
SOLVED = _with_is("solved resolved")  # also of tickets
# Of these, true means what false means for the others.
TRUE_IS_BAD = frozenset({"unsafe", "is_unsafe", "harmful", "is_harmful"})
HARM_LABEL = "response_harm_label"  # Its values are words: harmful, unsafe.
# They may also be the class that a moderator's answer names, even in `response_is_safe`.
SAFETY = TRUE_IS_BAD | {"safe", "is_safe", HARM_LABEL}
# Argilla's, which may be `discarded`.
RECORD_STATES = frozenset({"annotation_status", "record_status", "response_status"})

# Objects beside an answer, whose marks count only if they exclude it: a weight in there may be that of a product.
CONTAINERS = frozenset({
    "metadata", "meta", "extra", "info", "annotation", "annotations", "attributes", "properties", "flags", "options",
    "additional_info", "extra_info", "custom", "meta_data", "metainfo", "meta_info", "feedback", "review", "reviews",
    "quality", "moderation", "evaluation", "judgement", "judgment", "verdict",
})  # fmt: skip
# Of these, a list has what may be chosen, such as the wrong answers of a quiz, and no judgements of the answer.
WITHOUT_LISTS = frozenset({"options", "attributes", "properties"})
# Which part of its dataset a row belongs to.
SPLITS = frozenset({
    "split", "data_split", "dataset_split", "partition", "set", "subset", "fold", "train_test", "train_test_split",
    "ml_use", "usage",
})  # fmt: skip
HELD_OUT_FLAGS = _with_is("heldout held_out holdout") | {"is_test", "is_validation", "is_val", "is_dev", "is_eval"}

_SEPARATORS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[-\s.]+")  # isCorrect, is-correct, "is correct"
# is_answer_correct and response_is_valid judge an answer; correct_answer may be its text
_OF_ANSWER = re.compile(
    r"(?:is_|was_)?(?:the_)?(?:answer|response|completion|output|reply|solution|label|human|annotator|row|sample|example)_(?:is_|was_)?(\w+)"
    r"|(?:question|problem|prompt|instruction|conversation|chat|dialogue)_(?:is|was)_(\w+)"
    r"|(?:is|was)_(\w+)_(?:answer|response|completion|output|reply|question|problem|prompt|instruction|conversation)"
)
# Not output_quality: that of a printer
_OPINION_OF_ANSWER = re.compile(r"(?:is_)?(?:answer|response|completion|reply)_(\w+)")


@lru_cache(4096)
def normal_name(key: str) -> str:
    """Return a key's name: `is_correct` for isCorrect and "Is correct?", `correct` for is_answer_correct."""
    name = _SEPARATORS.sub("_", key.strip().rstrip("?")).lower()
    if name not in KEYS and (found := _OF_ANSWER.fullmatch(name)):
        inner = found[1] or found[2] or found[3]
        return inner if inner in JUDGEMENTS else name
    return name


@lru_cache(4096)
def opinion_name(name: str) -> tuple[str, bool]:
    """Return the name of an opinion, and whether it names the answer: ("quality", True) for answer_quality.

    Names such as response_label and response_safety are HARM_LABEL. A name that is no opinion is returned unchanged.
    """
    found = _OPINION_OF_ANSWER.fullmatch(name)
    inner = found[1] if found is not None else ""
    if inner in ("label", "harm_label", "safety", "safety_label"):
        return HARM_LABEL, False
    if inner in SAFETY:
        return inner, False
    return (inner, True) if inner in _DIRECT else (name, False)


MAX_SHOWN = 5


def named_marks(marks: Mapping[str, int]) -> str:
    """Return how many rows each mark left out, the most frequent first; empty without marks.

    Args:
        marks: key and value of a mark, such as `is_correct: False` → rows.
    """
    most = sorted(marks.items(), key=lambda item: -item[1])
    names = [f"{count} by {mark}" for mark, count in most[:MAX_SHOWN]]
    return ", ".join(names) + (f" and {len(most) - MAX_SHOWN} more marks" if len(most) > MAX_SHOWN else "")


def split_hint(marks: Mapping[str, int]) -> str:
    """Return how rows are scored that a column such as `split` keeps for tests; empty if marks name none."""
    keys = {normal_name(mark.partition(": ")[0].rpartition(".")[2]) for mark in marks}
    if not keys & (SPLITS | HELD_OUT_FLAGS):
        return ""
    return "; to score the rows that a split keeps for tests, put them into a file of data.heldout"


def without_marks(unread: Mapping[str, int], marks: Mapping[str, int]) -> dict[str, int]:
    """Return the keys that were not read, without those that left rows out: they were read as marks."""
    keys = {mark.partition(": ")[0] for mark in marks}
    columns = keys | {key.partition(".")[0] for key in keys}
    return {key: count for key, count in unread.items() if key not in columns}
