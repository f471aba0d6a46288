"""eval/downstream.py against the lm_eval command, exactly; BOS, failures, tables, and figures of our own."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from copying_model import byte_tokenizer
from tiny_softpick import tiny_model
from training_runs import REPOSITORY, environment, train, write_recipe

from hf_softpick.analysis import downstream
from hf_softpick.analysis.downstream import evaluate_tasks, find_batch_size, find_tasks, harness
from hf_softpick.analysis.downstream_results import Report, failed, format_table
from hf_softpick.analysis.loading import LoadedModel, describe, load_model
from hf_softpick.errors import CheckpointError, RecipeError, StorageError

TASKS = REPOSITORY / "eval" / "tasks"
OFFLINE = ["offline_cloze", "offline_code", "offline_heldout", "offline_passkey", "offline_prose"]
TEXTS = ["def x return y", "import z", "class range value in self : print"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of five steps whose documents begin with BOS."""
    folder = tmp_path_factory.mktemp("run")
    done = train(write_recipe(folder, training={"save_steps": 5}))
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def loaded(run) -> LoadedModel:
    return load_model(run, device="cpu")


@pytest.fixture(scope="module")
def text_tasks(tmp_path_factory) -> tuple[list[str], object]:
    """offline_heldout on three short documents."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return find_tasks("offline_heldout", [TASKS], {"text": str(path)})


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, arguments)), env=environment(), capture_output=True, text=True, timeout=300)


def script(*arguments: object) -> subprocess.CompletedProcess:
    return command(sys.executable, REPOSITORY / "eval" / "downstream.py", *arguments)


@pytest.mark.slow
def test_same_figures_as_the_lm_eval_command(run, tmp_path):
    """All offline tasks, and one whose data set is on the Hub: it fails, the others are kept."""
    done = script(run, "--tasks", "sciq,offline", "--batch-size", 16, "--limit", 6)
    assert done.returncode == 3, done.stderr
    last = done.stderr.strip().splitlines()[-2:]
    assert (
        last[0].startswith("tiny: sciq: ConnectionError") and last[1] == "1 of 6 tasks failed; the others are saved."
    )
    assert "Traceback" not in done.stderr
    ours = json.loads((run / "report" / "downstream.json").read_text())
    assert list(ours["tasks"]) == ["sciq", *OFFLINE] and list(ours["tasks"]["sciq"]) == ["error"]

    options = ["--include_path", TASKS, "--tasks", "offline", "--batch_size", 16, "--limit", 6]
    model = ["--model", "hf", "--model_args", f"pretrained={run / 'final'},trust_remote_code=True"]
    theirs = command(sys.executable, "-m", "lm_eval", *model, *options, "--output_path", tmp_path / "out")
    assert theirs.returncode == 0, theirs.stderr[-3000:]
    expected = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert sorted(expected["results"]) == OFFLINE
    compared = 0
    for task, values in expected["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma:
                continue
            label = metric.replace("_stderr", "") + ("" if filter_name == "none" else f" ({filter_name})")
            entry = ours["tasks"][task]["metrics"][label]
            assert entry["stderr" if "_stderr" in metric else "value"] == (None if value == "N/A" else value), key
            compared += 1
    assert compared == 2 * (2 + 2 + 3 + 1 + 3)

    # lm-eval's own format, and the rest of the file.
    raw = json.loads((run / "report" / ours["lm_eval"]).read_text())
    for part in ("results", "versions", "n-shot", "higher_is_better", "n-samples"):
        assert raw[part] == expected[part], part
    assert ours["schema"] == 1 and ours["kind"] == "downstream" and ours["limit"] == 6 and ours["batch_size"] == 16
    assert ours["bos"]["add_bos_token"] is True and ours["bos"]["source"].endswith("final")
    assert ours["model"]["normalizer"] == "softpick" and ours["versions"]["lm_eval"]
    table = (run / "report" / "downstream.md").read_text()
    assert table.strip() in done.stdout and "only the first 6 documents" in table
    line = next(line for line in table.splitlines() if "offline_code" in line and "acc_norm" in line)
    value = ours["tasks"]["offline_code"]["metrics"]["acc_norm"]
    assert f"{value['value']:.4f} +- {value['stderr']:.4f}" in line


def test_an_unknown_task_is_an_error_before_anything_is_loaded(tmp_path):
    done = script(tmp_path / "no-model", "--tasks", "offline_prose,offline_clozze")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "unknown task 'offline_clozze'. Did you mean offline_cloze" in done.stderr


def test_names_of_tasks():
    found, manager = find_tasks("offline, paper,offline_cloze", [TASKS])
    assert found == [*OFFLINE, *downstream.PAPER] and set(found) <= set(manager.all_subtasks)
    assert downstream.PAPER == ("arc_easy", "lambada_openai", "piqa", "sciq", "wikitext")
    with pytest.raises(RecipeError, match="no task in ','"):
        find_tasks(",")
    with pytest.raises(RecipeError, match="no such folder"):
        find_tasks("piqa", ["nowhere"])


def test_perplexity_of_a_token(loaded, text_tasks):
    """From one forward a document: lm-eval reads BOS BOS text and counts the second BOS; here it is not counted."""
    result, _ = evaluate_tasks(loaded, *text_tasks)
    task = result["tasks"]["offline_heldout"]
    assert result["bos"]["rolling_doubles_bos"] and result["batch_size_from"] == "found"
    nlls, tokens, seconds = [], [], []
    bos = loaded.tokenizer.bos_token_id
    for text in TEXTS:
        ids = loaded.tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) < 60, "one window"
        with torch.no_grad():
            log_p = loaded.model(torch.tensor([[bos, bos, *ids]])).logits.double().log_softmax(-1)[0]
        seconds.append(-log_p[0, bos].item())
        nlls.append(-log_p[1:-1].gather(1, torch.tensor(ids)[:, None]).sum().item())
        tokens.append(len(ids))
    expected = math.exp(sum(nlls) / sum(tokens))
    size = sum(len(text.encode()) for text in TEXTS)
    text, metrics = task["text"], task["metrics"]
    assert (text["documents"], text["tokens"], text["bytes"]) == (3, sum(tokens), size)
    assert text["bos_after_bos"] == pytest.approx(-seconds[0], abs=1e-5) and seconds[0] > 0.5
    assert metrics["token_perplexity"]["value"] == pytest.approx(expected, rel=1e-5)
    assert text["bits_per_byte"] == pytest.approx(sum(nlls) / size / math.log(2), rel=1e-5)
    with_second = (sum(nlls) + sum(seconds)) / size
    assert metrics["byte_perplexity"]["value"] == pytest.approx(math.exp(with_second), rel=1e-5)
    # The delta method, by numbers: leave-one-out estimates have about the same spread.
    left = [(sum(nlls) - n) / (sum(tokens) - t) for n, t in zip(nlls, tokens, strict=True)]
    jackknife = expected * math.sqrt(2 / 3 * sum((one - sum(left) / 3) ** 2 for one in left))
    assert metrics["token_perplexity"]["stderr"] == pytest.approx(jackknife, rel=0.5)


def test_another_bos_gives_other_figures(run, loaded, text_tasks, tmp_path):
    """The tokenizer decides, and a value that contradicts it is refused."""
    from tokenizers.processors import ByteLevel

    without = load_model(run, device="cpu")
    without.tokenizer.backend_tokenizer.post_processor = ByteLevel()
    with pytest.raises(CheckpointError, match="tokens other than BOS|turns 'a' into"):
        harness(without)
    results = [evaluate_tasks(one, *text_tasks)[0] for one in (loaded, without._replace(add_bos=False))]
    first, second = (one["tasks"]["offline_heldout"]["text"] for one in results)
    assert first["tokens"] == second["tokens"] and second["bos_after_bos"] is None
    assert [one["bos"]["add_bos_token"] for one in results] == [True, False]
    assert not results[1]["bos"]["rolling_doubles_bos"]
    assert abs(first["token_perplexity"] / second["token_perplexity"] - 1) > 1e-4
    cloze = find_tasks("offline_cloze", [TASKS])
    scores = []
    for one in (loaded, without._replace(add_bos=False)):
        lm = harness(one, 4)
        raw = downstream._evaluate_one(lm, *cloze[0], cloze[1], 4, None)
        scores.append(
            [float(answer[0]) for sample in raw["samples"]["offline_cloze"] for answer in sample["resps"][0]]
        )
    assert max(abs(a - b) for a, b in zip(*scores, strict=True)) > 1e-3


def small(tokenizer) -> LoadedModel:
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=128)
    return LoadedModel(model, tokenizer, "small", "small", None, tokenizer("a").input_ids[0] == tokenizer.bos_token_id)


def test_tokenizers_are_not_changed(text_tasks):
    """No padding token: lm-eval gets a copy with one of its vocabulary."""
    one = small(byte_tokenizer())
    assert one.tokenizer.pad_token_id is None and one.add_bos
    size = len(one.tokenizer)
    lm = harness(one, 2)
    assert len(lm.tokenizer) == size and lm.tokenizer.pad_token == "</s>"
    assert one.tokenizer.pad_token_id is None and len(one.tokenizer) == size
    eos_alone = byte_tokenizer(bos=False)
    eos_alone.bos_token = None
    result, _ = evaluate_tasks(small(eos_alone), *text_tasks, batch_size=2)
    assert result["bos"]["prefix_token"] == "</s>" and not failed(result)


def test_tokenizers_that_cannot_be_used_are_refused():
    nothing = byte_tokenizer(bos=False)
    nothing.bos_token = nothing.eos_token = None
    with pytest.raises(CheckpointError, match="neither BOS nor EOS"):
        harness(small(nothing))
    from tokenizers.processors import TemplateProcessing

    ends = byte_tokenizer(bos=False)
    ends.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    with pytest.raises(CheckpointError, match=r"\['a', '</s>'\].*tokens other than BOS"):
        harness(small(ends))


def test_batch_size_is_found(loaded):
    class Huge:
        device = torch.device("cpu")

        class config:
            @staticmethod
            def get_text_config():
                return type("Config", (), {"vocab_size": 10**9})

    sizes = [find_batch_size(loaded.model, length) for length in (64, 256, 1000, 4096, 10**6)]
    assert sizes[0] == 64 and sizes == sorted(sizes, reverse=True) and sizes[-1] == 1
    assert all(size & (size - 1) == 0 for size in sizes)
    assert find_batch_size(Huge, 4096) == 1
    assert harness(loaded).batch_size == sizes[0]


def test_batch_size_changes_only_rounding(loaded, text_tasks):
    one, many = (evaluate_tasks(loaded, *text_tasks, batch_size=size)[0] for size in (1, 3))
    key = ("tasks", "offline_heldout", "metrics", "token_perplexity", "value")
    for part in key:
        one, many = one[part], many[part]
    assert one == pytest.approx(many, rel=1e-5)


def test_a_batch_that_does_not_fit_is_halved(loaded, text_tasks, monkeypatch):
    import lm_eval

    evaluate, tried = lm_eval.simple_evaluate, []

    def short_of_memory(lm, **options):
        tried.append(lm.batch_size)
        if lm.batch_size > 2:
            raise torch.OutOfMemoryError("no memory")
        return evaluate(lm, **options)

    monkeypatch.setattr(lm_eval, "simple_evaluate", short_of_memory)
    result, _ = evaluate_tasks(loaded, *text_tasks, batch_size=8)
    assert tried == [8, 4, 2] and result["batch_size"] == 2 and not failed(result)


@pytest.mark.parametrize(
    ("task", "shots", "metadata"),
    [("offline_cloze", 0, None), ("offline_cloze", 8, None), ("offline_passkey", 0, {"words": 100})],
    ids=["whole", "8-shot", "generation"],
)
def test_prompts_that_are_cut_are_counted(loaded, task, shots, metadata):
    """An 8-shot prompt of which a 64-token model reads the last 64 tokens is no 8-shot prompt."""
    tasks, manager = find_tasks(task, [TASKS], metadata)
    lm = harness(loaded, 4)
    raw = downstream._evaluate_one(lm, task, manager, 4, shots)
    lengths = []
    for sample in raw["samples"][task]:
        for argument in sample["arguments"]:
            generated = isinstance(argument[1], dict)
            text = argument[0] if generated else "".join(argument)
            lengths.append(len(loaded.tokenizer(text).input_ids) + (12 if generated else -1))
    cut = sum(length > 64 for length in lengths)
    assert (cut == len(lengths)) if shots or metadata else (cut == 0)
    entry = downstream.summarize(raw, lm)[task]
    assert (entry["prompts"], entry["truncated_prompts"]) == (len(lengths), cut)
    table = format_table({"m": {"tasks": {task: entry}, "limit": 4, "max_length": 64}})
    warning = f"m, {task}: {cut} of {len(lengths)} prompts ({shots}-shot) are longer than the 64 tokens"
    assert (warning in table) == (cut > 0)


def test_results_are_saved_after_every_task(loaded, tmp_path):
    """Also after one that fails by itself: a choice that does not exist."""
    (tmp_path / "broken.yaml").write_text(
        (TASKS / "offline_cloze.yaml").read_text().replace("task: offline_cloze", "task: broken")
        + 'doc_to_target: "{{1 / 0}}"\n'
    )
    for name in ("_choice.yaml", "offline.py", "cloze.jsonl"):
        (tmp_path / name).write_text((TASKS / name).read_text())
    tasks, manager = find_tasks("offline_cloze,broken,offline_code", [TASKS, tmp_path])
    saved = []

    def save(result, raw):
        saved.append((list(result["tasks"]), sorted(raw.get("results", {}))))

    result, raw = evaluate_tasks(loaded, tasks, manager, limit=2, after_task=save)
    assert [len(names) for names, _ in saved] == [1, 2, 3]
    assert saved[-1][1] == ["offline_cloze", "offline_code"] and failed(result) == ["broken"]
    assert "ZeroDivisionError" in result["tasks"]["broken"]["error"]
    assert raw["configs"]["offline_code"]["task"] == "offline_code" and "samples" not in raw
    json.dumps(raw)


def _tables_agree(folder: Path, name: str) -> dict:
    """downstream.json, after comparing it with the table beside it and with lm-eval's results."""
    saved = json.loads((folder / "downstream.json").read_text())
    assert (folder / "downstream.md").read_text() == format_table({name: saved}) + "\n"
    measured = {task for task, entry in saved["tasks"].items() if "metrics" in entry}
    assert set(json.loads((folder / "results_downstream.json").read_text())["results"]) == measured
    assert not list(folder.glob("*.tmp"))
    return saved


def test_calls_keep_what_earlier_ones_measured(run, tmp_path):
    """By the command: other settings are told by task, failures take nothing away."""
    out = tmp_path / "out"
    assert script(run, "--tasks", "offline_code", "--batch-size", 8, "--out", out).returncode == 0
    first = _tables_agree(out, "tiny")
    failing = script(run, "--tasks", "sciq,offline_cloze", "--limit", 2, "--batch-size", 4, "--out", out)
    assert failing.returncode == 3 and "1 of 2 tasks failed" in failing.stderr and "left out" not in failing.stdout
    saved = _tables_agree(out, "tiny")
    assert list(saved["tasks"]) == ["offline_code", "sciq", "offline_cloze"] and list(saved["tasks"]["sciq"]) == [
        "error"
    ]
    assert saved["tasks"]["offline_code"] == first["tasks"]["offline_code"]
    kept, added = saved["tasks"]["offline_code"], saved["tasks"]["offline_cloze"]
    assert (kept["samples"], kept["limit"], kept["batch_size"]) == (40, None, 8)
    assert (added["samples"], added["limit"], added["batch_size"]) == (2, 2, 4)
    assert saved["limit"] == 2 and saved["batch_size"] is None and kept["versions"]["lm_eval"]
    assert "only the first 2 documents of each of offline_cloze," in (out / "downstream.md").read_text()


@pytest.fixture
def report(loaded, tmp_path):
    def make(**changes) -> Report:
        versions = {"torch": changes.pop("torch", "1")}
        own = changes.pop("own", False)
        return Report(tmp_path, describe(loaded) | changes, versions, own)

    return make


def _result(value: float | None, task: str = "t", **settings) -> dict:
    score = {"value": value, "stderr": None, "higher_is_better": True}
    entry = {"error": "no network"} if value is None else {"samples": 5, "num_fewshot": 0, "metrics": {"acc": score}}
    given = {"limit": None, "num_fewshot": None, "batch_size": 4, "batch_size_from": "given", "max_length": 64}
    return given | settings | {"bos": {}, "tasks": {task: entry}}


def _raw(task: str, value: float) -> dict:
    return {"results": {task: {"acc,none": value}}, "config": {"limit": None}, "date": value}


def test_a_failure_does_not_replace_a_measured_task(report, tmp_path):
    report().save(_result(math.inf), _raw("t", 1.0), 1.0)
    report(torch="2").save(_result(None, batch_size=1), {}, 1.0)
    (entry,) = _saved(tmp_path)["tasks"].values()
    assert entry["metrics"]["acc"]["value"] == "inf" and entry["last_error"] == "no network" and "error" not in entry
    assert entry["batch_size"] == 4 and entry["versions"] == {"torch": "1"}
    assert "inf" in (tmp_path / "downstream.md").read_text()
    report(torch="2").save(_result(0.25), _raw("t", 2.0), 1.0)
    (entry,) = _saved(tmp_path)["tasks"].values()
    assert (
        entry["metrics"]["acc"]["value"] == 0.25 and "last_error" not in entry and entry["versions"] == {"torch": "2"}
    )
    report().save(_result(0.5, "u"), _raw("u", 3.0), 1.0)
    raw = json.loads((tmp_path / "results_downstream.json").read_text())
    assert raw["results"] == {"t": {"acc,none": 2.0}, "u": {"acc,none": 3.0}} and raw["date"] == 3.0


def _saved(folder: Path) -> dict:
    return json.loads((folder / "downstream.json").read_text())


def test_results_of_other_weights_are_dropped_and_named(report, tmp_path):
    report().save(_result(0.5), _raw("t", 1.0), 1.0)
    path = report().head["model"]["path"]
    assert report(path=str(Path(path).relative_to("/"))).dropped is None, "named from another folder"
    assert report(dtype="bfloat16").dropped is None and report(dtype="bfloat16").earlier["t"]["dtype"] == "float32"
    moved = str(Path("elsewhere", "final"))
    assert report(path=moved, own=True).dropped is None
    assert "path was" in report(path=moved).dropped
    assert "path was" in report(path=str(Path(path).parent / "checkpoints" / "checkpoint-5"), own=True).dropped
    other = report(trained_steps=9)
    assert "results (t) are left out, trained_steps was 5 and is 9" in other.dropped
    other.save(_result(0.75, "u"), _raw("u", 1.0), 1.0)
    assert list(_tables_agree(tmp_path, "tiny")["tasks"]) == ["u"]


def test_results_of_before_are_read(report, tmp_path):
    """Settings once for all tasks; and what is no result is not written over."""
    old = {"model": report().head["model"], "versions": {"torch": "0", "numpy": "1"}} | _result(0.5, limit=7)
    (tmp_path / "downstream.json").write_text(json.dumps(old))
    task = report().joined(_result(0.5, "u"))["tasks"]["t"]
    assert (task["limit"], task["batch_size"], task["versions"]) == (7, 4, {"torch": "0"})
    (tmp_path / "downstream.json").write_text("{")
    with pytest.raises(StorageError, match="Move it away"):
        report()


def test_the_hub_is_asked_once(loaded, monkeypatch):
    """Three data sets of the Hub, no network: one request, no waiting, and the tasks with text of their own go on."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append((url, timeout))
            raise OSError("no such host")

    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    tasks, manager = find_tasks("sciq,piqa,offline_cloze,lambada_openai", [TASKS])
    begin = time.perf_counter()
    result, _ = evaluate_tasks(loaded, tasks, manager, batch_size=4, limit=2)
    assert time.perf_counter() - begin < 15 and asked == [(constants.ENDPOINT, 10.0)]
    assert failed(result) == ["sciq", "piqa", "lambada_openai"]
    for name in failed(result):
        assert result["tasks"][name]["error"].endswith(
            f"in the cache, and {constants.ENDPOINT} cannot be reached: no such host"
        )
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
    evaluate_tasks(loaded, ["offline_cloze"], manager, batch_size=4, limit=2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    result, _ = evaluate_tasks(loaded, ["sciq"], manager, batch_size=4, limit=2)
    assert failed(result) == ["sciq"] and len(asked) == 1, "who works offline asks nothing"


def test_the_table():
    score = {"value": 0.5, "stderr": 0.0123, "higher_is_better": True}
    perplexity = {"value": 12345.678, "stderr": None, "higher_is_better": False}
    a = {
        "limit": None,
        "tasks": {"t": {"samples": 40, "metrics": {"acc": score, "ppl": perplexity}}, "u": {"error": "x"}},
    }
    b = {"limit": None, "tasks": {"t": {"error": "x"}, "u": {"error": "x"}}}
    lines = format_table({"a": a, "long name": b}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["task", "documents", "metric", "better", "a", "long name"]
    assert cells[2:] == [
        ["t", "40", "acc", "higher", "0.5000 +- 0.0123", "failed"],
        ["t", "40", "ppl", "lower", "12345.7", "failed"],
        ["u", "", "", "", "failed", "failed"],
    ]
    other = a | {"tasks": {"t": a["tasks"]["t"] | {"samples": 7, "limit": 7}}}
    table = format_table({"a": a, "b": other})
    assert "| 40 / 7 " in table and "the first 7 documents of each of t," in table
    assert len({len(line) for line in lines}) == 1
    assert "only the first 7 documents" in format_table({"a": a | {"limit": 7}})
