"""Stage deal_rows: the held-out rows that the models of a comparison are scored on (data.heldout_reserve).

Which rows these are is decided by `loraflow/registry/deals.py`. The stage writes them in a file of their own, so that the
fingerprints of the scores depend on the content of these rows, and on no other row of the dataset.
"""

import json
from pathlib import Path

from loraflow.config.stage_configs import DealRowsConfig
from loraflow.data.chats import GATE_SET
from loraflow.data.checks.split import chat_key
from loraflow.failures import BadData
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary

HELDOUT = "heldout.jsonl"


def run(job: Job[DealRowsConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Write heldout.jsonl: the rows of the gate's set that were dealt, and all rows of the other sets.

    Raises:
        BadData: a row is not in the dataset, or no row was dealt.
    """
    wanted, rows, others = set(job.config.keys or ()), 0, 0
    found: set[str] = set()
    with (
        (inputs["rows"] / HELDOUT).open(encoding="utf-8", newline="\n") as lines,
        (out / HELDOUT).open("w", encoding="utf-8", newline="\n") as written,
    ):
        for line in lines:
            row = json.loads(line)
            if row["set"] != GATE_SET:
                others += 1
            elif (key := chat_key(row["messages"])) in wanted:
                found.add(key)
                rows += 1
            else:
                continue
            written.write(line)
    if not found or found < wanted:
        raise BadData(
            "Held-out rows that were dealt are not in the dataset.",
            where="deal_rows",
            expected=f"{len(wanted)} prompts of the set {GATE_SET}",
            got=str(len(found)),
            next_step="run the recipe again: rows are dealt from the dataset of the run",
        )
    return Summary(figures={"dealt": rows, "other_sets": others}, facets={"heldout": [HELDOUT]})
