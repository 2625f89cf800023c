"""For each stage, the modules whose code decides its result.

`loraflow.execution.code_digest` computes a digest of them, which is recorded with each artifact. A test fails if a module
that a stage's modules import is missing here.
"""

import ast
import hashlib
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_HARDWARE = ("loraflow.hardware.device", "loraflow.hardware.attention")
_TEMPLATE = (
    "loraflow.data.tokens.loss_mask",
    "loraflow.data.tokens.token_labels",
    "loraflow.data.templates.rendered_calls",
    "loraflow.data.chats",
    "loraflow.data.templates.answer_spans",
    "loraflow.data.templates.alignment",
    "loraflow.data.templates.template",
    "loraflow.data.templates.template_child",
    "loraflow.data.templates.template_process",
    "loraflow.data.templates.tokenizer_config",
)

VERSION_DATASET = (
    "loraflow.data.versions.version",
    "loraflow.data.files.dataset_files",
    "loraflow.data.files.table_readers",
    "loraflow.data.cell_values",
    "loraflow.data.chats",
    "loraflow.data.versions.dvc",
    "loraflow.data.versions.dvc_storage",
    "loraflow.data.versions.dvc_pin",
    "loraflow.data.versions.git",
)

CHECK_DATASET = (
    "loraflow.data.checks.check",
    "loraflow.data.checks.check_report",
    "loraflow.data.checks.chat_table",
    "loraflow.data.checks.row_drops",
    "loraflow.data.checks.near",
    "loraflow.data.chats",
    "loraflow.data.checks.rows_file",
    "loraflow.data.files.readers",
    "loraflow.data.formats.chat_formats",
    "loraflow.data.formats.message_checks",
    "loraflow.data.cell_values",
    "loraflow.data.checks.sources",
    "loraflow.data.files.dataset_files",
    "loraflow.data.files.table_readers",
    "loraflow.data.formats.content_parts",
    "loraflow.data.formats.row_fields",
    "loraflow.data.formats.published_formats",
    "loraflow.data.answers.unread_values",
    "loraflow.data.answers.marks",
    "loraflow.data.formats.transcripts",
    "loraflow.data.formats.tools",
    "loraflow.data.answers.labels",
    "loraflow.data.answers.mark_names",
    "loraflow.data.answers.judgements",
    "loraflow.data.answers.preference_pairs",
    "loraflow.data.formats.question_parts",
    "loraflow.data.files.json_reader",
    "loraflow.data.checks.split",
    "loraflow.data.checks.heldout_fields",
    "loraflow.data.checks.findings",
    "loraflow.data.checks.broken_text",
    "loraflow.data.checks.near_split",
    "loraflow.data.checks.placement",
    "loraflow.data.checks.row_segment",
    "loraflow.data.checks.segment_reader",
    "loraflow.data.checks.segment_process",
    "loraflow.store.chunk_cache",
)

RESOLVE_BASE = (
    "loraflow.base.resolve",
    "loraflow.base.weight_checks",
    "loraflow.base.stored_weights",
    "loraflow.base.load",
    "loraflow.base.architecture",
    *_HARDWARE,
    "loraflow.base.model_files",
    "loraflow.base.template_check",
    "loraflow.data.templates.served_template",
    "loraflow.base.hub",
    "loraflow.base.usable",
    *_TEMPLATE,
    "loraflow.data.tokens.positions",
)

TOKENIZE = (
    "loraflow.data.tokens.tokenization",
    "loraflow.data.tokens.chunk_encoder",
    "loraflow.data.tokens.positions",
    "loraflow.store.chunk_cache",
    "loraflow.data.tokens.token_files",
    "loraflow.data.tokens.token_report",
    "loraflow.data.tokens.mask_view",
    *_TEMPLATE,
    "loraflow.data.tokens.packing",
)

TRAIN = (
    "loraflow.training.train",
    "loraflow.training.setup",
    "loraflow.data.tokens.positions",
    "loraflow.training.choices",
    "loraflow.training.document_check",
    "loraflow.base.generation_settings",
    "loraflow.training.base_model",
    "loraflow.training.stock_engine",
    "loraflow.training.fast_engine",
    "loraflow.training.trainer",
    "loraflow.training.batches",
    "loraflow.training.collation",
    "loraflow.training.cuda_graphs",
    "loraflow.training.layers",
    "loraflow.training.attention",
    "loraflow.training.flash4",
    "loraflow.training.lora_kernels",
    "loraflow.training.frozen_linear",
    "loraflow.training.loss_head",
    "loraflow.training.triton_kernels",
    "loraflow.data.tokens.token_files",
    "loraflow.data.tokens.packing",
    "loraflow.hardware.process_group",
    *_TEMPLATE,
    "loraflow.base.architecture",
    "loraflow.base.load",
    "loraflow.base.longrope",
    *_HARDWARE,
    "loraflow.base.stored_weights",
    "loraflow.adapters.tokenizer_files",
    "loraflow.adapters.lora_config",
    "loraflow.adapters.targets",
    "loraflow.adapters.lora_updates",
    "loraflow.adapters.adapter_config",
    "loraflow.adapters.validation",
    "loraflow.adapters.completeness",
    "loraflow.adapters.peft_folder",
    "loraflow.adapters.variants",
    "loraflow.adapters.vocabulary",
    "loraflow.adapters.loralib",
    "loraflow.adapters.loralib.layers",
    "loraflow.adapters.loralib.swap",
    "loraflow.adapters.loralib.model",
)

TRAIN_GROUP = (
    "loraflow.training.train_group",
    "loraflow.training.group_trainer",
    "loraflow.training.group_batches",
    "loraflow.training.group_lora",
    "loraflow.training.validation_loss",
    *TRAIN,
)

MERGE = (
    "loraflow.adapters.merge",
    "loraflow.adapters.merge_folders",
    "loraflow.base.model_files",
    "loraflow.adapters.adapter_config",
    "loraflow.adapters.validation",
    "loraflow.adapters.completeness",
    "loraflow.adapters.vocabulary",
    "loraflow.adapters.tokenizer_files",
    "loraflow.base.stored_weights",
    "loraflow.base.architecture",
    "loraflow.base.weight_checks",
    "loraflow.adapters.merge_plan",
    "loraflow.adapters.streaming_merge",
    "loraflow.adapters.lora_updates",
    "loraflow.adapters.merge_with_peft",
    "loraflow.adapters.nf4",
    "loraflow.adapters.logits",
    "loraflow.base.load",
    *_HARDWARE,
    "loraflow.data.tokens.token_files",
    "loraflow.data.tokens.packing",
    *_TEMPLATE,
)

VERIFY = (
    "loraflow.adapters.verify",
    "loraflow.data.checks.split",
    "loraflow.adapters.logits",
    "loraflow.adapters.nf4",
    "loraflow.base.architecture",
    "loraflow.base.load",
    *_HARDWARE,
    *_TEMPLATE,
)

DEAL_ROWS = ("loraflow.data.checks.deal_rows", "loraflow.data.checks.split", "loraflow.data.chats")

EVALUATE = (
    "loraflow.evaluation.score",
    "loraflow.config.evaluation",
    "loraflow.data.formats.call_parser",
    "loraflow.data.checks.split",
    "loraflow.evaluation.answers_file",
    "loraflow.evaluation.generation",
    "loraflow.base.generation_settings",
    "loraflow.data.tokens.positions",
    "loraflow.evaluation.likelihood",
    "loraflow.evaluation.prefix_cache",
    "loraflow.data.tokens.packing",
    "loraflow.evaluation.greedy_decoding",
    "loraflow.evaluation.intervals",
    "loraflow.evaluation.evidence",
    "loraflow.evaluation.label_scores",
    "loraflow.evaluation.metric_modules",
    "loraflow.evaluation.values",
    "loraflow.hardware.process_group",
    "loraflow.base.architecture",
    "loraflow.base.load",
    "loraflow.base.longrope",
    *_HARDWARE,
    *_TEMPLATE,
)

CHECK_GENERAL = (
    "loraflow.data.checks.general",
    "loraflow.data.chats",
    *VERSION_DATASET,
    "loraflow.data.files.readers",
    "loraflow.data.files.json_reader",
    "loraflow.data.cell_values",
    "loraflow.data.formats.chat_formats",
    "loraflow.data.formats.message_checks",
    "loraflow.data.formats.content_parts",
    "loraflow.data.formats.row_fields",
    "loraflow.data.formats.published_formats",
    "loraflow.data.answers.unread_values",
    "loraflow.data.answers.marks",
    "loraflow.data.formats.transcripts",
    "loraflow.data.formats.tools",
    "loraflow.data.answers.labels",
    "loraflow.data.answers.preference_pairs",
    "loraflow.data.formats.question_parts",
    "loraflow.data.answers.mark_names",
    "loraflow.data.answers.judgements",
    "loraflow.data.checks.split",
)

SCORE_GENERAL = (
    "loraflow.evaluation.general",
    "loraflow.evaluation.generation",
    "loraflow.evaluation.answers_file",
    "loraflow.evaluation.greedy_decoding",
    "loraflow.evaluation.values",
    "loraflow.data.chats",
    "loraflow.evaluation.likelihood",
    "loraflow.evaluation.prefix_cache",
    "loraflow.data.tokens.packing",
    "loraflow.evaluation.intervals",
    "loraflow.evaluation.evidence",
    "loraflow.data.tokens.positions",
    "loraflow.hardware.process_group",
    "loraflow.base.architecture",
    "loraflow.base.load",
    "loraflow.base.generation_settings",
    "loraflow.base.longrope",
    *_HARDWARE,
    *_TEMPLATE,
)


def source_hash(modules: tuple[str, ...]) -> str:
    """Return the sha256 of modules' names and source files."""
    total = hashlib.sha256()
    for name in modules:
        total.update(name.encode())
        total.update(module_source(name))
    return total.hexdigest()


@cache
def module_source(module: str) -> bytes:
    """Return a module's source. Only its parent package is imported."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return Path(spec.origin).read_bytes()


def parse(source: str | bytes) -> ast.Module:
    """Parse Python code.

    CPython before 3.11.8 raises SystemError if two threads parse at once (bug 106905), and libraries have threads that
    know no lock of ours. So this tries again.
    """
    for _ in range(19):
        with suppress(SystemError):
            return ast.parse(source)
    return ast.parse(source)
