"""Prompts of an exact length for any tokenizer, real generation, the choice between numbers, and the command."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from copying_model import byte_tokenizer, copy_model, joining_tokenizer, word_tokenizer
from tiny_softpick import tiny_model
from training_runs import REPOSITORY, environment

from hf_softpick.analysis.loading import LoadedModel
from hf_softpick.analysis.passkey import (
    candidate_scores,
    choose,
    choose_lengths,
    generate_answers,
    passkey_grid,
    plot_grid,
)
from hf_softpick.analysis.passkey_prompts import TooShort, answer_tokens, build_prompt, only_digits
from hf_softpick.errors import CheckpointError, NumericsError, RecipeError

TOKENIZERS = {"bytes": byte_tokenizer, "words": word_tokenizer, "joining": joining_tokenizer}
EVERY_TOKENIZER = pytest.mark.parametrize("kind", TOKENIZERS)


def loaded(model, tokenizer, add_bos=True) -> LoadedModel:
    return LoadedModel(model, tokenizer, "tiny", "tiny", None, add_bos)


@pytest.fixture(scope="module")
def softpick():
    """A random model and a tokenizer that fit; its choices and answers are arbitrary, but fixed."""
    tokenizer = byte_tokenizer()
    return loaded(tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512), tokenizer)


def prompts_of(one: LoadedModel, length: int, count: int, depth: float = 0.5, distractors: int = 3):
    room = answer_tokens(one.tokenizer, len(one.tokenizer))
    return [
        build_prompt(one.tokenizer, one.add_bos, length, depth, room, sample=sample, distractors=distractors)
        for sample in range(count)
    ]


@EVERY_TOKENIZER
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompts_fill_their_length(kind, depth):
    tokenizer = TOKENIZERS[kind]()
    before = copy.deepcopy(tokenizer)
    room = answer_tokens(tokenizer, len(tokenizer))
    a_word = max(len(tokenizer(f" {word}", add_special_tokens=False).input_ids) for word in ("irrelevant", "yellow."))
    for length in (200, 317, 1024):
        prompt = build_prompt(tokenizer, True, length, depth, room, sample=0, distractors=9)
        assert length - room - a_word <= len(prompt.ids) <= length - room
        assert prompt.ids[0] == tokenizer.bos_token_id and prompt.ids.count(tokenizer.bos_token_id) == 1
        assert prompt.text.count(f"The pass key is {prompt.key}. Remember it.") == 1
        found = prompt.text.index(prompt.key) / len(prompt.text)
        assert found == pytest.approx(depth, abs=60 / length + 0.1), found
        assert len({prompt.key, *prompt.distractors}) == 10
        assert not any(other in prompt.text for other in prompt.distractors)
        assert prompt == build_prompt(tokenizer, True, length, depth, room, sample=0, distractors=9)
        others = [
            build_prompt(tokenizer, True, length, depth, room, sample=1, distractors=9),
            build_prompt(tokenizer, True, length, depth, room, sample=0, distractors=9, seed=1),
        ]
        assert len({prompt.key, *(other.key for other in others)}) == 3
    assert tokenizer.get_vocab() == before.get_vocab()
    assert tokenizer.special_tokens_map == before.special_tokens_map


def test_the_tokenizers_of_these_tests_are_hard():
    """Keys of different numbers of tokens; spaces between decoded digits; tokens across the end of the prompt."""
    ids = [byte_tokenizer()(f" {key}", add_special_tokens=False).input_ids for key in (12034, 99999)]
    assert len(ids[0]) != len(ids[1])
    words = word_tokenizer()
    assert "1 2" in words.decode(words("12345", add_special_tokens=False).input_ids)
    joins = joining_tokenizer()
    prompt, whole = (joins(text).input_ids for text in ("The pass key is", "The pass key is 12345"))
    assert whole[: len(prompt)] != prompt


@EVERY_TOKENIZER
def test_a_model_that_copies_finds_every_key(kind):
    """Real generation and real scores: an induction head does the task exactly."""
    tokenizer = TOKENIZERS[kind]()
    model = copy_model(len(tokenizer))
    result = passkey_grid(loaded(model, tokenizer), [160, 230], (0.0, 0.5, 1.0), samples=3, distractors=3)
    # Where a key joins with what is before it, the prompt's last token never comes before a key: nothing to copy from.
    if kind != "joining":
        assert result["accuracy"] == [[1.0] * 3] * 2
    assert result["choice_accuracy"] == [[1.0] * 3] * 2
    assert result["lengths"] == [160, 230] and result["choice_chance"] == 0.25
    assert [example["answer"] != "" for example in result["examples"]] == [True] * 6


def test_what_is_out_of_sight_is_not_found():
    """A model that sees half of the context: rows of the grid are lengths, columns depths, and 0 is the beginning."""
    tokenizer = word_tokenizer()
    one = loaded(copy_model(len(tokenizer), window=100), tokenizer)
    result = passkey_grid(one, [90, 200], (0.0, 1.0), samples=3, distractors=3)
    assert result["accuracy"] == [[1.0, 1.0], [0.0, 1.0]]
    assert result["choice_accuracy"][0] == [1.0, 1.0] and result["choice_accuracy"][1][1] == 1.0
    assert result["choice_accuracy"][1][0] < 1.0


def foreign(name: str) -> LoadedModel:
    """A random model of transformers; Mistral's window is shorter than the prompts."""
    import transformers

    tokenizer = byte_tokenizer()
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    if name == "Mistral":
        sizes |= dict(intermediate_size=32, num_key_value_heads=1, sliding_window=32, max_position_embeddings=512)
    elif name == "GPT2":
        sizes |= dict(max_position_embeddings=512)
    torch.manual_seed(0)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**sizes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return loaded(model, tokenizer)


@pytest.mark.parametrize("name", ["softpick", "GPT2", "Mistral"])
def test_scores_are_those_of_a_plain_forward(softpick, name):
    """No cache, no padding, one candidate at a time, float64."""
    one = softpick if name == "softpick" else foreign(name)
    prompts = prompts_of(one, 200, 3)
    scores = candidate_scores(one, prompts)
    model, tokenizer = copy.deepcopy(one.model).double(), one.tokenizer
    for row, prompt in zip(scores, prompts, strict=True):
        for score, key in zip(row, [prompt.key, *prompt.distractors], strict=True):
            ids = torch.tensor([tokenizer(f"{prompt.text} {key}").input_ids])
            begin = len(prompt.ids)
            assert ids[0, :begin].tolist() == prompt.ids
            log_p = model(ids).logits.log_softmax(-1)[0, begin - 1 : -1]
            expected = log_p.gather(1, ids[0, begin:, None]).sum()
            assert score.item() == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.parametrize("normalizer", ["softpick", "scaled_softmax"])
def test_the_batch_size_changes_nothing(normalizer):
    """Softpick alone would not see a mask that is missing: the embedding of padding is 0, and so is its score."""
    tokenizer = byte_tokenizer()
    one = loaded(tiny_model(normalizer, vocab_size=len(tokenizer), max_position_embeddings=512), tokenizer)
    prompts = [prompt for length in (150, 161, 200) for prompt in prompts_of(one, length, 2)]
    assert len({len(prompt.ids) for prompt in prompts}) > 2, "rows are padded"
    alone = torch.cat([candidate_scores(one, [prompt]) for prompt in prompts])
    torch.testing.assert_close(candidate_scores(one, prompts), alone, atol=1e-3, rtol=1e-4)
    answers = [generate_answers(one, [prompt], 6)[0] for prompt in prompts]
    assert generate_answers(one, prompts, 6) == answers and len(set(answers)) > 2
    grids = [passkey_grid(one, [150], (0.0, 1.0), samples=4, batch_size=size) for size in (1, 4)]
    assert grids[0] == grids[1]


def test_without_bos_the_figures_differ(softpick):
    with_bos, without = (
        candidate_scores(one, prompts_of(one, 200, 2)) for one in (softpick, softpick._replace(add_bos=False))
    )
    assert (with_bos - without).abs().max() > 0.05


def test_generation_is_greedy_whatever_the_model_prefers(softpick):
    prompts = prompts_of(softpick, 150, 2)
    expected = generate_answers(softpick, prompts, 8)
    own = softpick.model.generation_config
    try:
        softpick.model.generation_config = copy.deepcopy(own)
        softpick.model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=9.0)
        changed = softpick.model.generation_config
        assert generate_answers(softpick, prompts, 8) == expected
        assert softpick.model.generation_config is changed
    finally:
        softpick.model.generation_config = own


def test_numbers_are_compared_as_text():
    assert only_digits(" 1 2 3 4 5 .") == "12345"
    assert only_digits("\n12345. Remember 6") == "12345"
    assert only_digits(" 123456") == "123456"
    assert only_digits("none") == ""


def test_lengths(softpick):
    assert choose_lengths(softpick, None) == [64, 128, 256, 512]
    odd = loaded(copy_model(10, longest=200), None)
    assert choose_lengths(odd, None) == [64, 128, 200]
    assert choose_lengths(softpick, [512, 128]) == [128, 512]
    with pytest.raises(RecipeError, match=r"tiny was trained on at most 512.*1024, 2048.*--beyond"):
        choose_lengths(softpick, [128, 1024, 2048])
    assert choose_lengths(softpick, [1024], beyond=True) == [1024]
    model = copy_model(10)
    del model.config.max_position_embeddings
    with pytest.raises(RecipeError, match="no max_position_embeddings"):
        choose_lengths(loaded(model, None), None)


def test_lengths_without_room_are_named(softpick):
    result = passkey_grid(softpick, [20, 150], (0.0,), samples=1)
    assert result["lengths"] == [150] and len(result["accuracy"]) == 1
    assert result["refused"][0]["length"] == 20 and "without filler" in result["refused"][0]["reason"]
    with pytest.raises(RecipeError, match=r"no length of \[10, 20\] has room"):
        passkey_grid(softpick, [10, 20])
    with pytest.raises(TooShort):
        prompts_of(softpick, 20, 1)


def test_tokenizers_that_cannot_do_it_are_refused(softpick):
    words = word_tokenizer()
    with pytest.raises(CheckpointError, match="the model has 5"):
        answer_tokens(words, 5)
    letters = loaded(copy_model(100), word_tokenizer())
    letters.tokenizer.backend_tokenizer.model = _without(letters.tokenizer, "7")
    with pytest.raises(CheckpointError, match="cannot write numbers"):
        passkey_grid(letters, [200])


def _without(tokenizer, token):
    from tokenizers import models

    vocabulary = {name: index for name, index in tokenizer.get_vocab().items() if name != token}
    return models.WordLevel(vocabulary, unk_token="<unk>")


def test_a_model_without_kv_cache_is_refused():
    with pytest.raises(CheckpointError, match="MambaForCausalLM keeps NoneType instead of a KV cache"):
        passkey_grid(foreign("Mamba"), [150], (0.0,), samples=1)


def test_the_picture(tmp_path, softpick):
    from matplotlib.image import imread

    result = passkey_grid(softpick, [150, 200], (0.0, 1.0), samples=1)
    result["accuracy"] = [[0.0, 1.0], [1.0, 0.0]]
    plot_grid(result, tmp_path / "deep" / "passkey.png", "title")
    pixels = imread(tmp_path / "deep" / "passkey.png")
    assert pixels.shape[0] > 200 and pixels[..., :3].std() > 0.1


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, REPOSITORY / "eval" / "passkey.py", *arguments]
    return subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path, softpick):
    softpick.model.save_pretrained(tmp_path / "model")
    softpick.tokenizer.save_pretrained(tmp_path / "model")
    options = ["--lengths", "150,160", "--depths", "0,1", "--samples", "2", "--out", tmp_path / "out"]
    done = run(tmp_path / "model", *options)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "out" / "passkey.json").read_text())
    assert saved["schema"] == 1 and saved["kind"] == "passkey" and saved["model"]["normalizer"] == "softpick"
    in_process = passkey_grid(softpick, [150, 160], (0.0, 1.0), samples=2)
    assert {key: saved[key] for key in in_process} == json.loads(json.dumps(in_process))
    assert (tmp_path / "out" / "passkey.png").stat().st_size > 5000
    assert "depth 0" in done.stdout and "150" in done.stdout
    assert "chosen among 10 numbers, of 2 prompts a cell; chance 0.00 / 0.10" in done.stdout

    refused = run(tmp_path / "model", "--lengths", "1024")
    assert refused.returncode == 2 and "--beyond" in refused.stderr and "Traceback" not in refused.stderr
    assert run(tmp_path / "model", "--depths", "2").returncode == 2


def test_nan_is_no_wrong_answer(softpick):
    """NaN > NaN is false, which would read as "not found"."""
    broken = copy.deepcopy(softpick.model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    one = loaded(broken, softpick.tokenizer)
    with pytest.raises(NumericsError, match="gives NaN"):
        choose(one, prompts_of(one, 64, 2))


def test_more_keys_than_there_are_end_at_once():
    found = run("nowhere", "--distractors", "99999")
    assert found.returncode == 2 and "at most 99" in found.stderr
