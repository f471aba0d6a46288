"""A comparison as sections of text, tables and figures, in the order of the story; HTML and Markdown show these."""

from collections.abc import Iterator
from typing import Any

from hf_softpick.analysis.claims import NOT_MEASURED, NOT_REPRODUCED, REPRODUCED
from hf_softpick.analysis.report_blocks import (
    Cell,
    Section,
    Table,
    Text,
    increase,
    loss,
    percent,
    plain_number,
    value_rows,
    value_text,
    words,
)
from hf_softpick.analysis.report_inside import activations, maps, sinks, sparsity
from hf_softpick.analysis.report_results import downstream, passkey, quantization, training
from hf_softpick.analysis.run_records import COMMANDS


def headline(comparison: dict[str, Any]) -> str:
    """What was held against what, and the verdicts, in two or three sentences."""
    claims, pair = comparison["claims"], comparison["pair"]
    verdicts: dict[str, list[str]] = {REPRODUCED: [], NOT_REPRODUCED: [], NOT_MEASURED: []}
    trivial = []
    for row in claims:
        found = trivial if row["trivial"] else verdicts[row["verdict"]]
        found.append(row["claim"][0].lower() + row["claim"][1:])
    sides = "No softpick run with a softmax run beside it:"
    if pair["softpick"] and pair["softmax"]:
        sides = f"{pair['softpick']} (softpick) against {pair['softmax']} (softmax):"
    if len(verdicts[NOT_MEASURED]) == len(claims):
        return f"{sides} none of the {len(claims)} claims of the paper can be judged."
    count = f"{len(verdicts[REPRODUCED])} of {len(claims)} claims of the paper are reproduced."
    rest = [f"{verdict}: {'; '.join(found)}" for verdict, found in verdicts.items() if found and verdict != REPRODUCED]
    if trivial:
        count += f" One more holds trivially, as softmax has no sink either: {'; '.join(trivial)}."
    return " ".join([sides, count, *(f"{text[0].upper()}{text[1:]}." for text in rest)])


def sections(comparison: dict[str, Any]) -> list[Section]:
    """All sections but the head of the page."""
    runs = comparison["runs"]
    return [
        Section("loss", "Training loss and throughput", list(training(runs))),
        Section("sinks", "Attention sinks and row mass", list(sinks(runs))),
        Section("maps", "Attention maps", list(maps(comparison))),
        Section("activations", "Hidden states", list(activations(runs))),
        Section("sparsity", "Sparsity of the attention", list(sparsity(runs))),
        Section("quantization", "Loss under quantization", list(quantization(runs))),
        Section("downstream", "Downstream tasks", list(downstream(runs))),
        Section("passkey", "Passkey retrieval", list(passkey(runs))),
        Section("recipes", "What differs between the recipes", list(_recipes(comparison))),
        Section("method", "How it was measured", list(_method(comparison))),
    ]


def claims_table(comparison: dict[str, Any]) -> Table:
    """The paper's claims with the figures of these runs."""
    pair = comparison["pair"].values()
    labels = [run["label"] for run in comparison["runs"] if run["label"] in pair]
    rows = []
    for row in comparison["claims"]:
        # A loss increase is named after its format alone.
        signed = "quantization" in row["claim"]
        cells = [
            ", ".join(
                f"{name} {increase(value) if signed else _claim_figure(name, value)}"
                for name, value in row["figures"].get(label, {}).items()
            )
            for label in labels
        ]
        sample = f" Sample: {row['sample']}." if row["sample"] else ""
        verdict = Cell(verdict_text(row), kind="verdict " + row["verdict"].replace(" ", "-"))
        rule = f"{row['rule']} Paper: {row['paper']}."
        rows.append([row["claim"], verdict, *(c or "\u2013" for c in cells), row["detail"] + sample, rule])
    return Table(
        "Claims of the paper (arXiv 2504.20966) tried on these runs",
        ["Claim", "Verdict", *labels, "Finding", "Rule of the verdict, figure of the paper"],
        rows,
    )


def verdict_text(row: dict[str, Any]) -> str:
    """The verdict of a claim as it is shown."""
    return f"{row['verdict']}, trivially" if row["trivial"] else row["verdict"]


def _claim_figure(name: str, value: Any) -> str:
    if name in ("sink rate", "exact zeros", "up to 1e-5"):
        return percent(value)
    return loss(value) if name.endswith("loss") else plain_number(value)


def _recipes(comparison: dict[str, Any]) -> Iterator[Table | Text]:
    runs, differences = comparison["runs"], comparison["recipe_differences"]
    without = [run["label"] for run in runs if run["recipe"] is None]
    if without:
        yield Text(f"No recipe is known of {', '.join(without)}.")
    if differences:
        rows = [
            [item["key"], *map(value_text, item["values"]), "yes" if item["training"] else "no"]
            for item in differences
        ]
        header = ["Value", *(run["label"] for run in runs), "Can change what is learnt"]
        yield Table("Recipe values that differ", header, rows)
    elif len(without) < len(runs) - 1:
        yield Text("The recipes do not differ.")
    fields = ("normalizer", "architecture", "layers", "heads", "key_heads", "hidden_size", "vocab_size", "parameters")
    launches = [run["environment"] for run in runs]
    rows = value_rows(fields, [run["model"] for run in runs])
    rows += value_rows(("commit", "strategy", "platform"), launches)
    rows += value_rows(("torch", "transformers", "hf_softpick"), launches, "versions.{}", "{} (training)".format)
    yield Table("Models and where they were trained", ["", *(run["label"] for run in runs)], rows)


def _method(comparison: dict[str, Any]) -> Iterator[Table | Text]:
    runs = comparison["runs"]
    for kind in COMMANDS:
        measured = [run for run in runs if run[kind]]
        if not measured:
            continue
        records = [run[kind] for run in measured]
        data = [(record.get("data") or {}).items() for record in records]
        names = dict.fromkeys(name for items in data for name, v in items if not isinstance(v, (dict, list)))
        rows = value_rows(names, records, "data.{}")
        if kind == "downstream":
            tasks = [record.get("tasks", {}).items() for record in records]
            counts = [{name: task.get("samples") or "not measured" for name, task in items} for items in tasks]
            rows.append(["samples", *map(words, counts)])
            cut = [{name: n for name, task in items if (n := task.get("truncated_prompts"))} for items in tasks]
            rows.append(["prompts that lost their beginning", *(words(c) if c else "none" for c in cut)])
            rows += value_rows(["limit"], records)
        if kind == "passkey":
            rows.append(["samples per cell", *(value_text(record.get("samples")) for record in records)])
        rows += value_rows(("dtype", "attn_implementation", "trained_steps", "add_bos"), records, "model.{}")
        rows.append(["seconds", *(plain_number(record.get("seconds")) for record in records)])
        rows += value_rows(("hf_softpick", "torch", "transformers"), records, "versions.{}", str)
        yield Table(f"{kind.capitalize()}: sample and conditions", ["", *(run["label"] for run in measured)], rows)
    texts = {run["attention_maps"]["text"] for run in runs if run.get("attention_maps")}
    for text in texts:
        yield Text("Text of the attention maps:", code=text)
    used = ", ".join(f"{name} {version}" for name, version in comparison["versions"].items())
    yield Text(f"Report of {comparison['time']}, with {used}.")
