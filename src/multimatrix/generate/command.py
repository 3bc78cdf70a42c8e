"""`multimatrix generate`, from settings to pieces of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from multimatrix.errors import InputError
from multimatrix.evaluate import loading
from multimatrix.generate.decoder import Decoder, Speed
from multimatrix.model.modeling import MultimatrixForCausalLM


def generate_text(
    folder: str,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    attn_implementation: str = "sdpa",
    graph: bool = True,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[str]:
    """The continuation of `prompt` in pieces, as they come. report: gets the line with the speed at the end.

    Raises:
        InputError: the folder holds no model of ours, or prompt and answer do not fit into its positions.
    """
    model, tokenizer = loading.load(folder, dtype, device)
    if not isinstance(model, MultimatrixForCausalLM):
        raise InputError(f"{folder} holds a {model.config.model_type} model; generate runs those of multimatrix")
    model.set_attn_implementation(attn_implementation)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device, torch.long)
    if ids.shape[1] == 0:
        raise InputError("the prompt has no tokens; give --prompt some text")
    positions = model.config.max_position_embeddings
    if ids.shape[1] + max_new_tokens > positions:
        raise InputError(
            f"{ids.shape[1]} tokens of the prompt and {max_new_tokens} new ones do not fit into the "
            f"{positions} positions of the model; set --max-new-tokens to at most {positions - ids.shape[1]} or "
            "shorten the prompt"
        )
    torch.manual_seed(seed)
    decoder = Decoder(model, temperature=temperature, top_p=top_p, graph=graph)
    end = model.generation_config.eos_token_id if model.generation_config else tokenizer.eos_token_id
    stop = frozenset(end) if isinstance(end, list) else frozenset() if end is None else frozenset([end])
    answer: list[int] = []
    shown = ""
    for token in decoder.stream(ids, max_new_tokens, stop):
        answer.append(token)
        whole = tokenizer.decode(answer, skip_special_tokens=True)
        # A character of several tokens is shown when its last one is there.
        if whole.startswith(shown) and not whole.endswith("�"):
            yield whole[len(shown) :]
            shown = whole
    rest = tokenizer.decode(answer, skip_special_tokens=True)
    yield rest[len(shown) :]
    report(speed_line(decoder.speed, len(answer)))


def speed_line(speed: Speed, answer: int) -> str:
    """One line for the person who waited."""
    prefill = f"prompt of {speed.prompt:,} tokens in {speed.prefill_seconds:.3f} s"
    if speed.tokens == 0:
        return f"{answer} token; {prefill}"
    how = "CUDA graph" if speed.graph else "no graph"
    return (
        f"{answer:,} tokens, {speed.tokens_per_second:,.1f} tokens/s, {speed.gigabytes_per_second:,.2f} GB/s read of "
        f"weights and cache ({how}); {prefill}"
    )
