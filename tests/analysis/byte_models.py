"""A tokenizer of bytes, and models that learn in a second what follows what in `TEXT`, for tests that need both."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_softpick import SoftpickConfig, SoftpickForCausalLM

BOS = 256
LETTERS = "abcdefgh"


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a byte, id = place in the alphabet; 256 is BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", **special)


def write_texts(path: Path, documents: int = 40) -> str:
    """A jsonl file of documents of 20 to 60 letters; after two letters the third is mostly certain."""
    draw = random.Random(0)
    follows = {(a, b): draw.choice(LETTERS) for a in LETTERS for b in LETTERS}
    lines = []
    for _ in range(documents):
        text = [draw.choice(LETTERS), draw.choice(LETTERS)]
        while len(text) < draw.randint(20, 60):
            text.append(draw.choice(LETTERS) if draw.random() < 0.1 else follows[text[-2], text[-1]])
        lines.append('{"text": "' + "".join(text) + '"}\n')
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def train_model(folder: Path, text: str, normalizer: str, steps: int = 200, **sizes: int) -> Path:
    """Train on the file and save with the tokenizer; layers have sizes that groups of 64 fit."""
    from hf_softpick.analysis.samples import batches, load_samples

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, **sizes}
    config = SoftpickConfig(
        normalizer=normalizer, vocab_size=257, max_position_embeddings=128, bos_token_id=BOS, **sizes
    )
    model = SoftpickForCausalLM._from_config(config, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    rows = [*batches(load_samples(text, tokenizer, add_bos=False, seq_len=64, count=10**3), 16)]
    for step in range(steps):
        batch = rows[step % len(rows)]
        loss = model(**batch, labels=batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
