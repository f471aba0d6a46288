"""Tokenizers trained and loaded: special tokens exactly once, whatever the tokenizer does by itself."""

import io
import json
import shutil
import sys
import time

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from hf_softpick.data.settings import SourceSettings, TokenizerSettings
from hf_softpick.data.sources import open_sources
from hf_softpick.data.tokenizer import encoder_of, load_tokenizer, sample_texts, save_tokenizer, train_tokenizer
from hf_softpick.errors import DataError
from hf_softpick.modeling.configuration_softpick import SoftpickConfig
from hf_softpick.modeling.modeling_softpick import SoftpickForCausalLM

TEXT = "def f(x):\n    return x + 1  # ä 你好 🙂\n" * 20


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    return open_sources([SourceSettings(path=str(tmp_path / "a.txt"))])


def make_tokenizer(folder, template=None, special=("<s>", "</s>"), truncate=None, **names):
    """A tokenizer folder as the Hub has them, with the post-processor `template`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    if template:
        ids = [(token, backend.token_to_id(token)) for token in special]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    if truncate:
        backend.enable_truncation(truncate)
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return str(folder)


def saved(settings, folder, tokenizer=None):
    save_tokenizer(tokenizer or load_tokenizer(settings), settings, folder)
    return AutoTokenizer.from_pretrained(folder)


def test_training_on_one_long_word_is_fast(tmp_path):
    """Training cuts words, as it takes the square of their length; saved is the pre-tokenizer that cuts nothing."""
    (tmp_path / "a.txt").write_text("a" * 2_000_000 + " b" * 100)
    begin = time.perf_counter()
    tokenizer = train_tokenizer(open_sources([SourceSettings(path=str(tmp_path / "a.txt"))]), 300)
    assert time.perf_counter() - begin < 30
    assert json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["type"] == "ByteLevel"


def test_trained_tokenizer(sources, tmp_path):
    settings = TokenizerSettings(train_bpe=280)
    tokenizer = saved(settings, tmp_path / "saved", train_tokenizer(sources, 280))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert len(tokenizer) == 280
    ids = tokenizer(TEXT).input_ids
    assert ids[0] == 0 and not {0, 1, 2} & set(ids[1:])
    assert len(ids) < len(TEXT.encode()) * 0.7
    assert tokenizer.decode(ids[1:]) == TEXT
    unseen = "\x00 Żółć\t\r\n"
    assert tokenizer.decode(tokenizer(unseen, add_special_tokens=False).input_ids) == unseen


def test_training_is_the_same_each_time(sources):
    first, second = (train_tokenizer(sources, 290).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_sample_is_bounded_and_spread(tmp_path):
    for name, count in (("a", 1000), ("b", 1000), ("c", 3)):
        lines = (json.dumps({"text": name * 100}) for _ in range(count))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sample = list(sample_texts(open_sources([SourceSettings(path=str(tmp_path))]), 50_000))
    counts = {name: sum(text[0] == name for text in sample) for name in "abc"}
    assert counts["c"] == 3, "a small file is taken whole"
    assert counts["a"] == counts["b"] > 200
    assert sum(map(len, sample)) < 51_000


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_prompt_has_bos_as_the_recipe_says_and_never_eos(tmp_path, template, add_bos):
    folder = make_tokenizer(tmp_path / "hub", template, bos_token="<s>", eos_token="</s>")
    settings = TokenizerSettings(from_=folder, add_bos=add_bos)
    tokenizer = saved(settings, tmp_path / "saved")
    bare = tokenizer("def f", add_special_tokens=False).input_ids
    assert tokenizer("def f").input_ids == [0] * add_bos + bare


def test_prompt_of_a_class_with_its_own_template(tmp_path):
    """LlamaTokenizer makes its template from add_bos_token and add_eos_token, not from tokenizer.json."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(["def f"], trainers.BpeTrainer(special_tokens=special, show_progress=False))
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=False, add_eos_token=True).save_pretrained(
        tmp_path / "hub"
    )
    tokenizer = saved(TokenizerSettings(from_=str(tmp_path / "hub")), tmp_path / "saved")
    assert isinstance(tokenizer, LlamaTokenizer)
    ids = tokenizer("def f").input_ids
    assert ids[0] == 1 and not {1, 2} & set(ids[1:])


def test_encoder_adds_nothing_cuts_nothing_and_reads_special_tokens_as_text(tmp_path):
    folder = make_tokenizer(tmp_path, "<s> $A </s>", truncate=4, bos_token="<s>", eos_token="</s>")
    tokenizer = load_tokenizer(TokenizerSettings(from_=folder))
    [encoding] = encoder_of(tokenizer).encode_batch_fast([TEXT + "</s><s>"], add_special_tokens=False)
    assert len(encoding.ids) > 100
    assert not {0, 1} & set(encoding.ids)
    assert tokenizer.decode(encoding.ids) == TEXT + "</s><s>"


@pytest.mark.parametrize(("has", "lacks"), [("eos", "bos"), ("bos", "eos")])
def test_missing_special_token_is_refused_where_it_is_needed(tmp_path, has, lacks):
    folder = make_tokenizer(tmp_path, **{f"{has}_token": "<s>"})
    with pytest.raises(DataError, match=f"no {lacks.upper()} token.*tokenizer.add_{lacks}=false"):
        load_tokenizer(TokenizerSettings(from_=folder))
    load_tokenizer(TokenizerSettings(from_=folder, **{f"add_{lacks}": False}))


@pytest.mark.parametrize("with_json", [False, True])
def test_sentencepiece_model_alone_must_give_its_own_ids(tmp_path, with_json, monkeypatch):
    """Loaded by transformers alone, "Hello world" has no space in front, and other ids."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, "Hello world It's"] * 20), model_writer=model, vocab_size=60, model_type="bpe",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    settings = TokenizerSettings(from_=str(tmp_path))
    if with_json:
        make_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>")
        load_tokenizer(settings)
        return
    with pytest.raises(DataError, match="tokenizer.model and no tokenizer.json: 'Hello world' would be .*own ids are"):
        load_tokenizer(settings)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DataError, match="tokenizer.model and no tokenizer.json: without the package|cannot be loaded"):
        load_tokenizer(settings)


def test_hole_is_refused(tmp_path):
    folder = make_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] += 5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"has (\d+) tokens, but ids up to \d+: there are holes"):
        load_tokenizer(TokenizerSettings(from_=folder))


def test_prompts_in_a_batch_are_generated_as_alone(sources, tmp_path):
    """A decoder-only model goes on behind its padding if that is on the right."""
    tokenizer = saved(TokenizerSettings(train_bpe=280), tmp_path, train_tokenizer(sources, 280))
    config = SoftpickConfig(
        vocab_size=280, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = SoftpickForCausalLM(config).eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": None}
    prompts = ["def f", "return x + 1  # "]
    together = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), **settings)[:, -6:]
    alone = [model.generate(**tokenizer(prompt, return_tensors="pt"), **settings)[0, -6:] for prompt in prompts]
    assert together.tolist() == torch.stack(alone).tolist()


def test_wrong_tokenizer_is_one_message(tmp_path):
    with pytest.raises(DataError, match="tokenizer 'someone/nothing' cannot be loaded"):
        load_tokenizer(TokenizerSettings(from_="someone/nothing"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(TokenizerSettings(from_=str(tmp_path)))


def test_code_of_a_repository_is_never_run(tmp_path):
    folder = make_tokenizer(tmp_path / "hub", bos_token="<s>", eos_token="</s>")
    shutil.rmtree(tmp_path / "ran", ignore_errors=True)
    (tmp_path / "hub" / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    path = tmp_path / "hub" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps(config | {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}})
    )
    with pytest.raises(DataError, match="never run"):
        load_tokenizer(TokenizerSettings(from_=folder))
    assert not (tmp_path / "ran").exists()
