"""What libraries do with a model besides calling it: softmax through our door against transformers' sdpa.

Masks of sdpa share no code with ours. Our own models are held against a Llama, or a Mistral for its window.
"""

import copy

import peft
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from tiny_foreign import byte_tokenizer, foreign_model
from tiny_softpick import SIZES, close, tiny_model, tokens
from transformers import DynamicCache, StaticCache, pipeline

KINDS = ("ours", "ours with a window", "llama", "mistral", "gemma3_text")
OPTIONS = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
IDS, MASK = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
MASK[0, :4] = 0
PLACES = (MASK.cumsum(-1) - 1).clamp_min(0)  # as generate() counts
PACKED = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((5, 7), (3, 9))])


def pair(kind: str):
    """The same softmax model, by our attention and by transformers'."""
    sizes = {"sliding_window": 5} if kind in ("ours with a window", "mistral", "gemma3_text") else {}
    if not kind.startswith("ours"):
        return [foreign_model(kind, name, initializer_range=0.2, **sizes).eval() for name in ("softmax", "sdpa")]
    ours = tiny_model("softmax", "tiled", **sizes)
    theirs = foreign_model("mistral" if sizes else "llama", "sdpa", **SIZES, **sizes).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def same(ours, theirs, mask=MASK) -> None:
    close(ours[mask[:, -ours.shape[1] :] == 1], theirs[mask[:, -ours.shape[1] :] == 1])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing")
@pytest.mark.parametrize("kind", KINDS)
def test_training_with_and_without_checkpointing(kind):
    def gradients(model, **arguments):
        model.zero_grad()
        labels = IDS.masked_fill((MASK == 0) | (PACKED == 0), -100)
        model(IDS, labels=labels, use_cache=False, **arguments).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    ours, theirs = (model.train() for model in pair(kind))
    for arguments in ({}, {"attention_mask": MASK}, {"position_ids": PACKED}):
        expected = gradients(ours, **arguments)
        for one, other in zip(expected, gradients(theirs, **arguments), strict=True):
            close(one, other)
        for reentrant in (True, False):
            ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            assert all(map(torch.equal, gradients(ours, **arguments), expected))
        ours.gradient_checkpointing_disable()


@pytest.mark.parametrize("kind", KINDS)
def test_caches_in_chunks_and_cut_short(kind):
    def chunked(model, past, sizes, padded):
        logits, start = [], 0
        for size in sizes:
            if size < 0:  # what assisted generation does with tokens that were not accepted
                past.crop(size)
            else:
                end = start + size
                given = dict(attention_mask=MASK[:, :end], position_ids=PLACES[:, start:end]) if padded else {}
                logits.append(model(IDS[:, start:end], past_key_values=past, use_cache=True, **given).logits)
            start += size
        return torch.cat(logits, 1) if min(sizes) > 0 else logits[-1]

    models = pair(kind)  # a cache with a window cannot be cut by itself; assisted generation below sees to that
    for padded in (False, True):
        for sizes in ([4, 4, 4], [6, 1, 5], [1] * 12, [8, -3, 4, -1, 4])[: 4 if kind in ("ours", "llama") else 3]:
            for kept in ("dynamic", "static")[: 2 if min(sizes) > 0 else 1]:
                caches = [
                    DynamicCache(config=m.config) if kept == "dynamic" else StaticCache(m.config, max_cache_len=16)
                    for m in models
                ]
                results = [chunked(*both, sizes, padded) for both in zip(models, caches, strict=True)]
                same(*results, MASK if padded else torch.ones_like(MASK))


@pytest.mark.parametrize("kind", KINDS)
def test_ways_to_generate(kind):
    ours, theirs = pair(kind)
    for options in (
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 5},
        {"num_beams": 3},
        {"num_beams": 3, "cache_implementation": "static"},
    ):
        results = [model.generate(IDS, attention_mask=MASK, **OPTIONS, **options) for model in (ours, theirs)]
        assert torch.equal(*results), options
    row = IDS[1:].repeat(1, 2)
    expected = theirs.generate(row, **OPTIONS)
    stranger = foreign_model("llama", "softpick").eval()
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": stranger}, {"assistant_model": theirs}):
        assert torch.equal(ours.generate(row, **OPTIONS, **options), expected), options


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_tokens_before_a_padded_batch(kind):
    """PEFT puts keys, or embeddings, before the padding of a row."""
    for tuning in (peft.PrefixTuningConfig, peft.PromptTuningConfig):
        results = []
        for model in pair(kind):
            torch.manual_seed(0)
            model = peft.get_peft_model(model, tuning(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in trained:
                torch.nn.init.normal_(parameter)
            output = model(IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100))
            output.loss.backward()
            written = model.generate(input_ids=IDS, attention_mask=MASK, **OPTIONS)
            results.append((output.logits[:, -12:][MASK == 1], trained[0].grad, written))
        for one, other in zip(*results, strict=True):
            close(one, other)


@pytest.mark.parametrize("kind", ["ours", "gemma3_text"])
def test_offloaded_layers(kind, tmp_path):
    """Hooks of accelerate move what a layer is called with, tensors inside tuples too."""
    model, _ = pair(kind)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    options = dict(main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    for moved in (
        cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu")),
        dispatch_model(copy.deepcopy(model), places, **options),
    ):
        for arguments in ({}, {"attention_mask": MASK}, {"position_ids": PACKED}):
            close(moved(IDS, **arguments).logits, model(IDS, **arguments).logits)
        same(*(m.generate(IDS, attention_mask=MASK, **OPTIONS)[..., None] for m in (moved, model)), torch.ones(2, 17))


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_pipeline_pads_a_batch(kind):
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"
    sizes = {"vocab_size": len(tokenizer), "initializer_range": 0.2}
    model = tiny_model("scaled_softpick", **sizes) if kind == "ours" else foreign_model(kind, "softpick", **sizes)
    write = pipeline("text-generation", model=model.eval(), tokenizer=tokenizer)
    options, texts = OPTIONS, ["ab", "the quick brown", "x y z"]
    assert write(texts, batch_size=3, **options) == [write([text], **options)[0] for text in texts]
