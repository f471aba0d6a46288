"""Text samples during and after training."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_softpick.training.recipe import Recipe
from hf_softpick.training.trainer import SoftpickTrainer


def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    add_bos: bool,
) -> list[dict[str, str]]:
    """One continuation for each prompt, drawn with temperature 0.8 out of the 50 likeliest tokens.

    It ends where the model has no more positions. The same for the same weights; the random state of training is left
    as it was.

    Returns:
        {"prompt": ..., "text": prompt and continuation}, in the order of the prompts.
    """
    training = model.training
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    model.eval()
    samples = []
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            for prompt in prompts:
                ids = tokenizer(prompt, add_special_tokens=False).input_ids
                if tokenizer.bos_token_id is not None and (add_bos or not ids):
                    ids = [tokenizer.bos_token_id, *ids]
                inputs = torch.tensor([ids], device=model.device)
                new_tokens = min(max_new_tokens, max(longest - len(ids), 1)) if longest else max_new_tokens
                output = model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=new_tokens,
                    do_sample=True,
                    temperature=0.8,
                    top_k=50,
                    use_cache=True,
                    pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
                )
                samples.append({"prompt": prompt, "text": tokenizer.decode(output[0], skip_special_tokens=True)})
    finally:
        model.train(training)
    return samples


def write_samples(
    trainer: SoftpickTrainer, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, step: int
) -> list[dict[str, str]]:
    """Generate one text for each prompt and append them to report/samples.jsonl. All ranks call this."""
    sharded = trainer.is_deepspeed_enabled
    samples: list[dict[str, str]] = []
    with trainer.clock.paused():
        if sharded or trainer.is_world_process_zero():
            model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
            add_bos = recipe.tokenizer.add_bos
            with trainer.autocast():
                samples = sample_texts(model, tokenizer, recipe.eval.prompts, recipe.eval.max_new_tokens, add_bos)
        if trainer.is_world_process_zero():
            for sample in samples:
                trainer.metrics.write({"step": step, **sample}, recipe.run.directory / "report" / "samples.jsonl")
    return samples
