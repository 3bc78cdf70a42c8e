"""What each of several processes runs for `test_distributed.py`, started by torchrun: every decoder, one after another.

Each decoder's findings are one line of JSON in the folder given; the reference is made by one process beforehand.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import DynamicCache
from transformers.distributed import DistributedConfig

from cases import logits_in_chunks
from multimatrix import MultimatrixForCausalLM

CHUNKS = [5, 1, 1, 2]


def tensor_parallel(folder: Path) -> dict:
    """Largest difference of the logits, whole and decoded, and how much of the cache this process holds."""
    model = MultimatrixForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=dist.get_world_size()), dtype=torch.float64
    ).eval()
    saved = torch.load(folder / "reference.pt")
    ids, expected = saved["ids"], saved["logits"]
    differences = {}
    with torch.no_grad():
        differences["whole"] = (model(ids, use_cache=False).logits - expected).abs().max().item()
        caches = {"dynamic": DynamicCache(config=model.config), "static": model.static_cache(*ids.shape)}
        for name, cache in caches.items():
            logits = logits_in_chunks(model, ids, CHUNKS, cache)
            differences[name] = (logits - expected).abs().max().item()
    heads = [layer.keys.shape[1] for layer in caches["dynamic"].layers]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    tokens = model.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    return {
        "differences": differences,
        "key_heads": heads,
        "tokens": tokens.tolist(),
        "parameters": sum(p.numel() for p in local),
    }


def fsdp(folder: Path) -> dict:
    """Largest difference of the weights after a training step, each process with its share of the batch."""
    model = MultimatrixForCausalLM.from_pretrained(folder, dtype=torch.float64).train()
    saved = torch.load(folder / "reference.pt")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = saved["ids"].chunk(dist.get_world_size())[dist.get_rank()]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    trained = {name: p.full_tensor() for name, p in model.named_parameters()}
    differences = {name: (trained[name] - p).abs().max().item() for name, p in saved["trained"].items()}
    sharded = sum(p.to_local().numel() for p in model.parameters())
    return {"difference": max(differences.values()), "parameters": sharded}


def main(kind: str, root: str) -> None:
    dist.init_process_group("gloo")
    run = {"tensor_parallel": tensor_parallel, "fsdp": fsdp}[kind]
    for folder in sorted(path for path in Path(root).iterdir() if path.is_dir()):
        try:
            found = run(folder)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        (folder / f"{kind}-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
