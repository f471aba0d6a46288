"""The documents of eval/tasks: what training holds out, choices that are choices, passkeys that can be found."""

import importlib.util
from collections import Counter

import numpy as np
import pytest
from copying_model import copy_model, word_tokenizer
from training_runs import REPOSITORY, write_text

from hf_softpick.analysis.downstream import evaluate_tasks, find_tasks
from hf_softpick.analysis.loading import LoadedModel
from hf_softpick.data.packing import hold_out
from hf_softpick.data.preparing import prepare_data
from hf_softpick.data.settings import DataSettings, SourceSettings, TokenizerSettings
from hf_softpick.data.sources import open_sources

TASKS = REPOSITORY / "eval" / "tasks"


@pytest.fixture(scope="module")
def offline():
    spec = importlib.util.spec_from_file_location("offline_tasks", TASKS / "offline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documents_of(source: SourceSettings) -> list[str]:
    return [record.text for shard in open_sources([source])[0].shards for record in shard.read() if record.text]


def test_held_out_documents_are_those_of_training(offline, tmp_path):
    """By what training makes: every chosen document is among its validation rows, and none among its training rows."""
    source = SourceSettings(path=str(write_text(tmp_path / "text.jsonl")))
    data = DataSettings(seq_len=256, sources=[source], validation=0.1, cache_dir=str(tmp_path / "cache"))
    assert data.seed == offline.DATA_SEED and DataSettings.model_fields["validation"].default > offline.HELDOUT_SHARE
    prepared = prepare_data(data, TokenizerSettings(train_bpe=300), progress=False)

    def texts(rows) -> set[str]:
        decoded = "".join(prepared.tokenizer.decode(row["input_ids"]) for row in rows)
        return set(decoded.replace(prepared.tokenizer.bos_token, "\0").replace("<eos>", "\0").split("\0"))

    validation, training = (texts(rows) for rows in (prepared.validation, prepared.train))
    chosen = offline.first_by_hash(documents_of(source), 0.06)
    assert len(chosen) > 5 and set(chosen) <= validation and not set(chosen) & training
    assert len(validation) > len(chosen)
    assert len(offline.first_by_hash(documents_of(source), 1e-9)) == 1


def test_held_out_documents_of_the_standard_library(offline):
    """Whatever a tokenizer makes of them: tokens for bytes, for characters, for words, for lines."""
    (heldout,) = offline.heldout().values()
    chosen = set(heldout["text"])
    documents = [text for text in documents_of(SourceSettings(path="stdlib")) if not text.isspace()]
    assert 3 <= len(chosen) < len(documents) / 50
    places = {text: place for place, text in enumerate(documents)}
    ranks = np.full(len(documents), 2**63, np.uint64)
    for place, text in enumerate(offline.first_by_hash(documents, 0.02)):
        ranks[places[text]] = place
    for lengths in (
        [len(text.encode()) for text in documents],
        [len(text) for text in documents],
        [len(text.split()) for text in documents],
        [text.count("\n") + 1 for text in documents],
    ):
        is_held_out = hold_out(ranks, np.array(lengths), DataSettings(seq_len=64).validation)
        assert all(is_held_out[places[text]] for text in chosen)


def test_other_text(offline, tmp_path):
    (tmp_path / "a.txt").write_text("one text")
    assert offline.heldout(text=str(tmp_path / "a.txt"), version=1)["test"]["text"] == ["one text"]
    assert len(offline.heldout(share=0.02)["test"]) > len(offline.heldout()["test"])


@pytest.mark.parametrize("name", ["cloze", "code"])
def test_choices(offline, name):
    documents = list(getattr(offline, name)()["test"])
    assert len(documents) >= 40 and len({document["context"] for document in documents}) == len(documents)
    assert Counter(document["gold"] for document in documents) == Counter(dict.fromkeys(range(4), len(documents) // 4))
    lines = offline._lines(f"{name}.jsonl")
    for document, line in zip(documents, lines, strict=True):
        assert len(set(document["choices"])) == 4 and all(choice.strip() for choice in document["choices"])
        assert document["choices"][document["gold"]] == line["right"]
        # lm-eval moves white space from the end of a context to the choice; two spaces would be read as one text less.
        ends = {document["context"][-1].isspace() and choice[0] == " " for choice in document["choices"]}
        assert ends == {False}


def test_prose_is_text(offline):
    texts = offline.prose()["test"]["text"]
    assert len(texts) >= 8 and all(200 < len(text) < 2000 and text.endswith(".") for text in texts)


def test_passkeys(offline):
    documents = list(offline.passkey()["test"])
    assert documents == list(offline.passkey(version=1)["test"]), "always the same"
    assert Counter(document["depth"] for document in documents) == dict.fromkeys(offline.PASSKEY_DEPTHS, 4)
    for document in documents:
        assert document["prompt"].count(f"The pass key is {document['key']}.") == 1
        place = document["prompt"].index(document["key"]) / len(document["prompt"])
        assert place == pytest.approx(document["depth"], abs=0.3)
    longer = offline.passkey(words=400)["test"]["prompt"]
    assert all(400 < len(prompt.split()) < 430 for prompt in longer)
    answers = [[" 1 2 3 4 5 .", "12345 is"], ["no"], [""]]
    assert offline.first_number(answers, None) == [["12345", "12345"], [""], [""]]


def test_a_model_that_copies_solves_the_passkey_task():
    """Through lm-eval, which truncates and decodes: exact match 1 for an induction head, 0 for one with no memory."""
    tokenizer = word_tokenizer()
    tasks = find_tasks("offline_passkey", [TASKS])
    found = []
    for window in (10**6, 5):
        model = copy_model(len(tokenizer), window=window)
        one = LoadedModel(model, tokenizer, "copy", "copy", None, True)
        result, _ = evaluate_tasks(one, *tasks, batch_size=7)
        found.append(result["tasks"]["offline_passkey"]["metrics"]["exact_match (digits)"]["value"])
    assert found == [1.0, 0.0]
