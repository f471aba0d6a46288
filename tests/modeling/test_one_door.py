"""Every query passes the entry that transformers' registry holds, once a layer, and whoever replaces it is obeyed."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_foreign import byte_tokenizer, foreign_model
from tiny_softpick import close, tiny_model, tokens, without_package
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_softpick.analysis.downstream import evaluate_tasks, find_tasks, harness
from hf_softpick.analysis.loading import LoadedModel
from hf_softpick.analysis.passkey import candidate_scores, generate_answers
from hf_softpick.analysis.passkey_prompts import answer_tokens, build_prompt
from hf_softpick.analysis.quantization import token_loss
from hf_softpick.analysis.statistics import measure

TASKS = Path(__file__).parents[2] / "eval" / "tasks"
MODELS = ("auto", "tiled", "eager", "llama")


def model_of(kind: str):
    sizes = {"vocab_size": len(byte_tokenizer()), "max_position_embeddings": 512}
    if kind == "llama":
        return foreign_model("llama", "softpick", initializer_range=0.2, **sizes).eval()
    return tiny_model("scaled_softpick", kind, **sizes)


@contextlib.contextmanager
def replaced(model, around):
    """Under the name in force of `model`, an entry that calls `around(entry, module, *arguments, **named)`."""
    name = model.config._attn_implementation
    # "eager" stands beside each model and not in the registry, where an entry of that name goes before it.
    held = ALL_ATTENTION_FUNCTIONS.get(name)

    def entry(module, *arguments, **named):
        function = held or sys.modules[type(module).__module__].eager_attention_forward
        return around(function, module, *arguments, **named)

    ALL_ATTENTION_FUNCTIONS[name] = entry
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def forward(one: LoadedModel, folder: Path):
    return one.model(tokens(2, 20)).logits


def statistics(one: LoadedModel, folder: Path):
    return measure(one.model, [{"input_ids": tokens(2, 40)}]).result()


def generation(one: LoadedModel, folder: Path):
    options = dict(max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True)
    return one.model.generate(tokens(2, 6), **options).scores


def quantization(one: LoadedModel, folder: Path):
    row = {"input_ids": tokens(2, 20), "position_ids": torch.arange(20).expand(2, -1)}
    return token_loss(one.model, [row])


def passkey(one: LoadedModel, folder: Path):
    room = answer_tokens(one.tokenizer, len(one.tokenizer))
    prompts = [build_prompt(one.tokenizer, one.add_bos, 200, 0.5, room, sample=n, distractors=2) for n in range(2)]
    return candidate_scores(one, prompts), generate_answers(one, prompts, 2)


def lm_eval(one: LoadedModel, folder: Path):
    """HFLM itself."""
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, ("abc", text), 0) for text in ("def", "x", "another")]
    return harness(one, batch_size=2).loglikelihood(requests, disable_tqdm=True)


def downstream(one: LoadedModel, folder: Path):
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in ("def x", "import y from z")))
    tasks, manager = find_tasks("offline_heldout", [TASKS], {"text": str(text)})
    result, _ = evaluate_tasks(one, tasks, manager, batch_size=2)
    assert "error" not in result["tasks"]["offline_heldout"], result
    return result["tasks"]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("use", [forward, statistics, generation, quantization, passkey, lm_eval, downstream])
def test_every_query_passes_the_entry_that_the_registry_holds(use, kind, tmp_path):
    model = model_of(kind)
    one = LoadedModel(model, byte_tokenizer(), "tiny", "tiny", None, False)
    counts = {"entry": 0, "model": 0}

    def count(entry, *arguments, **named):
        counts["entry"] += 1
        return entry(*arguments, **named)

    def double(entry, *arguments, **named):
        output, weights = entry(*arguments, **named)
        return output * 2, weights

    hook = model.base_model.register_forward_hook(lambda *_: counts.update(model=counts["model"] + 1))
    with torch.no_grad():
        expected = use(one, tmp_path)
        counts["model"] = 0
        with replaced(model, count):
            counted = use(one, tmp_path)
        hook.remove()
        assert counts["model"] > 0 and counts["entry"] == model.config.num_hidden_layers * counts["model"]
        with replaced(model, double):
            doubled = use(one, tmp_path)
        assert str(counted) == str(expected) == str(use(one, tmp_path))
        assert str(doubled) != str(expected), "the replaced entry was not obeyed"


@pytest.mark.parametrize("kind", MODELS)
def test_what_a_replaced_entry_returns_is_all_of_attention(kind):
    """Nothing is computed beside the entry: where it gives 0, no projection behind it matters."""
    model, ids = model_of(kind), tokens(1, 12)
    with torch.no_grad():
        with replaced(
            model, lambda entry, module, query, *_, **named: (torch.zeros_like(query.transpose(1, 2)), None)
        ):
            nothing = model(ids).logits
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        assert torch.equal(nothing, model(ids).logits)


STRANGER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
try:
    import hf_softpick
except ModuleNotFoundError:
    pass
else:
    sys.exit("the package is importable, so this shows nothing")
ids, out = torch.tensor(json.loads(sys.argv[2])), {}
for name in ("auto", "tiled"):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, attn_implementation=name)
    plain, entry, calls = model(ids).logits, ALL_ATTENTION_FUNCTIONS[name], []
    def doubled(module, *arguments, **named):
        calls.append(module.layer_idx)
        output, weights = entry(module, *arguments, **named)
        return output * 2, weights
    ALL_ATTENTION_FUNCTIONS[name] = doubled
    out[name] = [plain.tolist(), model(ids).logits.tolist(), calls]
print(json.dumps(out))
"""


def test_hub_code_without_the_package_passes_the_entry(tmp_path):
    model, ids = model_of("auto"), tokens(1, 12)
    model.save_pretrained(tmp_path / "saved")
    command = [sys.executable, "-P", "-c", STRANGER, str(tmp_path / "saved"), json.dumps(ids.tolist())]
    done = subprocess.run(
        command, cwd=tmp_path, env=without_package(tmp_path), capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for plain, doubled, calls in json.loads(done.stdout.splitlines()[-1]).values():
        assert calls == list(range(model.config.num_hidden_layers))
        torch.testing.assert_close(torch.tensor(plain), model(ids).logits.detach(), atol=1e-5, rtol=1e-5)
        assert (torch.tensor(doubled) - torch.tensor(plain)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["scaled_softpick", "tiled"])
def test_parameters_that_a_model_lacks_are_missed(name):
    """A configuration may name a normalizer whose parameters its model does not have: it would run without them."""
    model = foreign_model("llama", "softpick")
    model.config.normalizer, model.config._attn_implementation = "scaled_softpick", name
    with pytest.raises(ValueError, match="normalizer 'scaled_softpick'.* it has no head_scale"):
        model(tokens(1, 5))


def test_place_in_a_document_is_the_same_however_it_is_told():
    """Of a document whose beginning is not in the row, only what is there counts."""
    model, ids, late = tiny_model("scaled_softpick"), tokens(1, 12), torch.arange(5, 17)[None]
    told = [{}, {"attention_mask": torch.ones_like(ids)}, {"cu_seq_lens_q": torch.tensor([0, 12])}]
    first, *others = [model(ids, position_ids=late, **more).logits for more in told]
    for logits in (*others, model(ids).logits):
        close(logits, first)
