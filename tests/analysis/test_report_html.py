"""The HTML and Markdown views: complete, self-contained, and nothing that a run says becomes markup."""

import re
from html.parser import HTMLParser

import pytest
from comparison_cases import downstream, full, maps, quantization, statistics, write, write_pair, write_run

from hf_softpick.analysis.claims import judge
from hf_softpick.analysis.comparison import gather
from hf_softpick.analysis.report_blocks import increase, loss
from hf_softpick.analysis.report_figures import Series, brief, heat_map, line_chart, log_ticks, ticks
from hf_softpick.analysis.report_html import render_html
from hf_softpick.analysis.report_markdown import render_markdown

HOSTILE = "<img src=x onerror=alert(1)>&\"'`|*_[a](http:evil)"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags with attributes, and the text inside; fails on a tag that is not closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def named(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return full(tmp_path_factory.mktemp("runs"))


def marked(page_or_text):
    """Cells of the better side."""
    return re.findall(r'<td class="better">([^<]+)</td>', page_or_text)


def test_the_page_is_whole_and_needs_nothing_from_outside(comparison):
    text = render_html(comparison)
    page = Page(text)
    for tag in ("script", "link", "img", "iframe", "object", "use", "image", "base", "form"):
        assert page.named(tag) == [], tag
    addresses = [v for _, attributes in page.tags for k, v in attributes.items() if k in ("href", "src", "xlink:href")]
    assert addresses and all(address.startswith("#") for address in addresses)
    assert "url(" not in text and "@import" not in text and "http" not in re.sub(r"http-equiv", "", text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids) and {address[1:] for address in addresses} <= set(ids)


def test_every_part_of_the_story_is_there(comparison):
    page = Page(render_html(comparison))
    text = " ".join(page.texts)
    headings = re.findall(r"<h2[^>]*>([^<]+)", render_html(comparison))
    assert [h.split()[0] for h in headings] == [
        *("Training", "Attention", "Attention", "Hidden", "Sparsity", "Loss", "Downstream", "Passkey", "What", "How")
    ]
    assert len(page.named("caption")) == len(page.named("table"))
    assert all("scope" in attributes for attributes in page.named("th"))
    drawings = [a for a in page.named("svg") if a.get("aria-hidden") != "true"]
    assert len(drawings) > 15 and all(a["role"] == "img" and a["aria-label"] for a in drawings)
    for figure in (
        "8,192",
        "36 sequences",
        "33,510",
        "1,838",
        "gptqmodel is not installed",
        "no network",
        "1,234,567",
    ):
        assert figure in text, figure
    assert text.count("reproduced") >= 7
    assert "Not measured:" not in text


def test_the_better_side_is_marked_where_better_is_defined(comparison):
    text = render_html(comparison)
    rows = dict(re.findall(r'<tr><th scope="row"[^>]*>([^<]+)</th>(.*?)</tr>', text))
    assert marked(rows["Kurtosis, mean over layers"]) == ["340"]
    assert marked(rows["Training loss, mean of the last tenth"]) == ["3.0006"]
    assert marked(rows["int4: loss increase"]) == ["+0.1000"]
    assert marked(rows["piqa, acc"]) == ["0.65 \u00b1 0.01"]
    for name in (
        "Entropy, mean over heads, nats",
        "Distance attended, mean over heads, tokens",
        "Row mass",
        "Massive activations",
        "Steps",
    ):
        assert marked(rows[name]) == [], name  # a tie, or no better side


def test_columns_stand_in_the_order_of_the_command_line(tmp_path):
    runs = write_pair(tmp_path)[::-1]
    found = gather(runs)
    found["claims"] = judge(found)
    for text in (render_markdown(found), render_html(found)):
        for header in re.findall(r"(?m)^\| Claim .*$|<thead>.*?</thead>", text):
            assert "softmax" not in header or header.index("softpick") < header.index("softmax"), header
    assert "| Claim | Verdict | softpick\\-a | softmax\\-a |" in render_markdown(found)


def test_a_trivial_verdict_is_not_counted(tmp_path):
    runs = write_pair(tmp_path)
    write(runs[0] / "report/statistics.json", statistics("softmax-a", "softmax", 0.0, 33510.0, 240.0, 0.0))
    found = gather(runs)
    found["claims"] = judge(found)
    text = render_markdown(found).replace("\\", "")
    assert "5 of 7 claims of the paper are reproduced. One more holds trivially, as softmax has no sink either" in text
    assert "| Softpick has a sink rate of 0 | reproduced, trivially | sink rate 0% | sink rate 0% |" in text
    assert "reproduced, trivially" in render_html(found)


def test_nothing_is_marked_where_conditions_differ(tmp_path):
    runs = write_pair(tmp_path)
    record = statistics("softpick-a", "softpick", 0.0, 3.0, 9.0, 0.4)
    record["data"]["description"] = "other text"
    write(runs[1] / "report/statistics.json", record)
    record = downstream("softpick-a", "softpick", 0.62)  # within twice the joint standard error
    write(runs[1] / "report/downstream.json", record)
    found = gather(runs)
    found["claims"] = judge(found)
    text = render_html(found)
    rows = dict(re.findall(r'<tr><th scope="row"[^>]*>([^<]+)</th>(.*?)</tr>', text))
    assert marked(rows["Kurtosis, mean over layers"]) == [] and marked(rows["piqa, acc"]) == []
    assert text.count("other text") >= 2 and "results are not ranked: description differs" in text


def test_a_foreign_model_does_not_stop_the_others_from_being_ranked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = write_pair(tmp_path)
    foreign = write_run(tmp_path, "other", "softmax") / "final"
    foreign = foreign.rename(tmp_path / "foreign")
    results = {
        "statistics": statistics("foreign", "softmax", 0.0, 1.0, 1.0, 0.0),
        "quantization": quantization("foreign", "softmax", {"int8": -9.0, "int4": -9.0}),
        "downstream": downstream("foreign", "softmax", 0.99),
    }
    results["downstream"]["tasks"]["piqa"]["samples"] = 20
    for kind, record in results.items():
        record["data"] = {**record.get("data", {}), "description": "other text", "tokens": 77}
        record["model"]["path"] = str(foreign)
        write(tmp_path / f"report/foreign/{kind}.json", record)
    found = gather([foreign, *runs])
    found["claims"] = judge(found)
    assert [row["verdict"] for row in found["claims"]] == ["reproduced"] * 7
    text = render_html(found)
    rows = dict(re.findall(r'<tr><th scope="row"[^>]*>([^<]+)</th>(.*?)</tr>', text))
    assert marked(rows["Kurtosis, mean over layers"]) == ["340"] and marked(rows["int4: loss increase"]) == ["+0.1000"]
    assert marked(rows["piqa, acc"]) == ["0.65 \u00b1 0.01"]
    assert marked(rows["Training loss, mean of the last tenth"]) == ["3.0006"]
    assert len(marked(rows["Validation loss, last"])) == 1
    for part in (text, render_markdown(found).replace("\\", "")):
        assert "ranked only among softmax-a and softpick-a: description differs" in part


def test_runs_on_other_data_are_ranked_among_themselves(tmp_path):
    runs = write_pair(tmp_path) + [write_run(tmp_path, "far", "softmax", 2.0, data__seq_len=512)]
    found = gather(runs)
    found["claims"] = judge(found)
    text = render_html(found)
    rows = dict(re.findall(r'<tr><th scope="row"[^>]*>([^<]+)</th>(.*?)</tr>', text))
    assert marked(rows["Training loss, mean of the last tenth"]) == ["3.0006"]
    assert "losses are marked only among softmax-a and softpick-a" in text


def test_quantization_by_stored_bits(comparison):
    text = render_html(comparison)
    (chart,) = [svg for svg in text.split("<svg")[1:] if 'aria-label="Loss increase by bits stored' in svg]
    assert "<title>softpick-a, int2, bits stored per weight 2.25: 2.2</title>" in chart
    places = [float(x) for x in re.findall(r'<circle class="dot c1" cx="([^"]+)"', chart)]
    assert chart.split("</svg>")[0].count("<circle") == 6 and places == sorted(places) and places[0] > 57
    assert "| int2 | 2.25 bits, 75.3% | 2.25 bits, 75.3% |" in render_markdown(comparison).replace("\\", "")
    assert "differ from the validation loss of training" in text


def test_a_small_negative_number_is_zero():
    assert [loss(-0.00001), increase(-0.00001), brief(-0.0), loss(-0.00006)] == ["0.0000", "0.0000", "0", "-0.0001"]


def test_passkey_tables_state_prompts_and_chance(comparison):
    text = render_markdown(comparison).replace("\\", "")
    assert "Share of keys written out. Prompts per cell: softmax-a 5, softpick-a 5:" in text
    assert "among distractors. Prompts per cell: softmax-a 5, softpick-a 5. Chance is 10.00%:" in text


def test_trials_and_failed_tasks_are_named(tmp_path, comparison):
    runs = write_pair(tmp_path)
    record = {**downstream("softpick-a", "softpick", 0.65), "limit": 20}
    write(runs[1] / "report/downstream.json", record)
    found = gather(runs)
    found["claims"] = judge(found)
    for text in (render_html(found), render_markdown(found).replace("\\", "")):
        assert "A trial: only the first documents of each task (softpick-a 20)" in text
        assert "sciq not measured" in text and "sciq None" not in text and "acc None" not in text
    assert "A trial" not in render_html(comparison)


def test_losses_on_different_data_are_not_ranked(tmp_path):
    runs = [write_run(tmp_path, "m", "softmax"), write_run(tmp_path, "p", "softpick", 2.5, data__seq_len=512)]
    found = gather(runs)
    found["claims"] = judge(found)
    text = render_html(found)
    rows = dict(re.findall(r'<tr><th scope="row"[^>]*>([^<]+)</th>(.*?)</tr>', text))
    assert marked(rows["Training loss, mean of the last tenth"]) == [] and "differ in data.seq_len" in text
    assert "No contrast between them is judged" in text[: text.index("<table")]


def hostile_comparison(root):
    runs = [write_run(root, HOSTILE, "softmax"), write_run(root, "softpick", "softpick", data__seed=HOSTILE)]
    record = statistics("x", "softmax", 0.5, 9.0, 9.0, 0.0)
    record["data"]["description"] = record["versions"]["torch"] = HOSTILE
    for layer in record["layers"]:
        layer["hidden"]["largest"]["token"] = HOSTILE
    write(runs[0] / "report/statistics.json", record)
    record = downstream("x", "softmax", 0.5)
    record["tasks"] = {HOSTILE: {"error": HOSTILE}}
    write(runs[0] / "report/downstream.json", record)
    found = gather(runs)
    for run in found["runs"]:
        run["attention_maps"] = maps("m", False)
        run["attention_maps"]["tokens"] = [
            HOSTILE[:12],
            "</svg><script>",
            "\u202etoken",
            "\x00\x1b[31m\ud800",
            *"abcdefghij",
        ]
        run["attention_maps"]["text"] = "</code></pre><script>alert(1)</script>\n```\n" + HOSTILE
    found["warnings"].append(HOSTILE)
    found["claims"] = judge(found)
    return found


def test_hostile_names_tokens_and_recipes_stay_text(tmp_path):
    text = render_html(hostile_comparison(tmp_path))
    page = Page(text)
    assert page.named("img") == page.named("script") == []
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert HOSTILE in "".join(page.texts)
    assert {"\u202e", "\x00", "\x1b", "\ud800"}.isdisjoint(text)
    text.encode("utf-8")


def test_hostile_text_stays_text_in_markdown(tmp_path):
    text = render_markdown(hostile_comparison(tmp_path))
    assert "<img" not in re.sub(r"(?m)^    .*$", "", text) and "<script" not in re.sub(r"(?m)^    .*$", "", text)
    assert "](http" not in re.sub(r"(?m)^    .*$", "", text)
    text.encode("utf-8")
    for block in re.findall(r"(?m)(?:^\|.*\n)+", text):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


def test_markdown_has_the_same_tables(comparison):
    text = render_markdown(comparison)
    assert "| Kurtosis, mean over layers | 33,510 | **340** |" in text
    html_tables = render_html(comparison).count("<table")
    assert len(re.findall(r"(?m)^\|( --- \|)+$", text)) == html_tables
    assert "<svg" not in text and "comparison.html" in text


def test_parts_without_data_name_the_command(tmp_path):
    found = gather(write_pair(tmp_path, results=False))
    found["claims"] = judge(found)
    for text in (render_html(found), render_markdown(found).replace("\\", "")):
        for script in ("activations", "downstream", "passkey", "quantization"):
            assert re.search(rf"python eval/{script}\.py \S+softmax-a \S+softpick-a", text), script
        assert "Not measured: softmax-a (left out with --no-maps)" in text


def test_many_runs_and_values_that_are_not_finite(tmp_path):
    runs = [write_run(tmp_path, f"run{i}", "softpick" if i else "softmax", 3.0 + i / 10) for i in range(8)]
    record = statistics("run0", "softmax", 0.5, 9.0, 9.0, 0.0)
    record["layers"][1]["hidden"] |= {"kurtosis": "nan", "max": "inf"}
    record["layers"][2]["heads"]["row_mass"] = ["nan"] * 6
    record["summary"]["kurtosis"] = "nan"
    record["nonfinite"] = [{"layer": 1, "where": "hidden", "count": 2}]
    write(runs[0] / "report/statistics.json", record)
    found = gather(runs)
    found["claims"] = judge(found)
    page = Page(render_html(found))
    assert "nan" in " ".join(page.texts) and len(page.named("table")) > 3
    assert any(a.get("class") == "bad" for a in page.named("rect"))
    assert all("nan" not in a.get("d", "") for a in page.named("path"))
    assert any("2 values inside it are not finite" in warning for warning in found["warnings"])


def test_numbers_for_a_reader():
    assert [brief(x) for x in (None, 0.0, 7, 1234567, 33510.81, 340.06, 0.46971, 0.00001234, float("nan"))] == [
        *("\u2013", "0", "7", "1,234,567", "33,511", "340.1", "0.4697", "1.23e-05", "nan")
    ]


@pytest.mark.parametrize("low, high", [(0, 1), (0, 1000), (3.0, 3.004), (-2, 7), (1e-9, 2e-9), (5, 5)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 1 <= len(found) <= 8 and all(low - 1e-12 <= t <= high + 1e-12 for t in found)


@pytest.mark.parametrize("low, high", [(1, 10), (0.3, 40000), (3.0, 3.1), (2.936, 4.823), (1e-12, 1e12)])
def test_log_ticks_are_positive_and_few(low, high):
    found = log_ticks(low, high)
    assert 2 <= len(found) <= 8 and all(0 < t and low * 0.99 <= t <= high * 1.01 for t in found)
    assert all(len(f"{t:g}") <= 6 for t in found)  # round


def test_charts_leave_out_what_cannot_be_drawn():
    points = [(0, 1.0), (1, float("nan")), (2, 0.0), (3, 10.0)]
    assert line_chart("t", [Series("a", 0, points)], "x", "y", log_y=True).count("<circle") == 2
    assert line_chart("t", [Series("a", 0, [(0, float("inf"))])], "x", "y") == ""
    drawing = heat_map("t", [[0.0, 1e-9, 1.0]], "r", "c", root=True)
    shades = re.findall(r'fill-opacity="([^"]+)"', drawing)
    assert (
        shades[0] == "0" and 0.1 < float(shades[1]) < 0.2 and shades[2] == "1"
    )  # an exact 0 is told from a small one


def test_what_was_logged_while_training_is_drawn(comparison):
    page = render_html(comparison)
    for heading in (
        "Sink rate",
        "Mean weight of the first token",
        "Largest absolute value",
        "Share of weights exactly 0",
    ):
        assert f"{heading} while training" in page
    assert "Kurtosis while training" not in page  # not a number in every record of these runs
    charts = [svg for svg in page.split("<svg")[1:] if "Largest absolute value while training" in svg]
    assert "step 200: 9.5" in charts[0]  # the smallest value is the largest in size
