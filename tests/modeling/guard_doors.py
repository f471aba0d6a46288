"""Every door through which a folder can be loaded. Also a script, for a process without hf_softpick."""

import json
import sys

import torch
import transformers
from torch import Tensor

CHOICES = {"unset": {}, "None": {"attn_implementation": None}, "sdpa": {"attn_implementation": "sdpa"}}


def knock(folder: str, architecture: str, ids: Tensor, **trust: bool) -> dict[str, Tensor | str]:
    """Logits, or what was raised, by class and attn_implementation."""
    found = {}
    for name in ("AutoModelForCausalLM", architecture):
        for choice, attention in CHOICES.items():
            try:
                model = getattr(transformers, name).from_pretrained(folder, **attention, **trust)
                found[f"{name} {choice}"] = model(ids, use_cache=False).logits.detach()
            except Exception as error:  # transformers raises many kinds
                found[f"{name} {choice}"] = str(error)
    try:
        found["config"] = getattr(transformers, architecture).config_class.from_pretrained(folder).normalizer
    except Exception as error:
        found["config"] = str(error)
    return found


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    out = {}
    for folder, architecture in json.loads(sys.argv[1]).items():
        ids = torch.load(f"{folder}/ids.pt")
        # Without trust first: a trusted folder's code guards the whole process.
        out[folder] = [knock(folder, architecture, ids, trust_remote_code=False)]
        assert transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)("a").input_ids == [7]
    for folder, architecture in json.loads(sys.argv[1]).items():
        out[folder].append(knock(folder, architecture, torch.load(f"{folder}/ids.pt"), trust_remote_code=True))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        model.save_pretrained(f"{folder}-again")
    if "hf_softpick" in sys.modules:
        sys.exit("the package was imported, so this shows nothing")
    torch.save(out, sys.argv[2])
