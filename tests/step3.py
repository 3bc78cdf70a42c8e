"""Step-3's model once more, in plain torch from its own config fields and tensor names; nothing of ours is used.

From the Step-3 report (arXiv 2507.19427, sections 3 and 4) and the published configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def step3_fields(**changes: Any) -> dict[str, Any]:
    """config.json of a small model, dense unless `changes` says otherwise."""
    return {
        "architectures": ["Step3TextForCausalLM"],
        "model_type": "step3_text",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "num_attention_groups": 1,
        "head_dim": 16,
        "share_q_dim": 24,
        "max_seq_len": 128,
        "max_position_embedding": 128,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "moe_num_experts": 0,
        "moe_top_k": 0,
        "moe_intermediate_size": 0,
        "share_expert_dim": 0,
        "norm_expert_weight": False,
        "moe_layers_enum": "-1",
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": "float32",
    } | changes


EXPERTS = {"moe_num_experts": 6, "moe_top_k": 2, "moe_intermediate_size": 12, "share_expert_dim": 20}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {**EXPERTS, "moe_layers_enum": "1,2"},
    "experts-normalized": {**EXPERTS, "moe_layers_enum": "0,2", "norm_expert_weight": True},
    "experts-everywhere": {**EXPERTS, "moe_layers_enum": "0,1,2", "moe_top_k": 6},
}


def expert_layers(fields: dict[str, Any]) -> list[int]:
    return [int(part) for part in fields["moe_layers_enum"].strip().split(",")]


def step3_tensors(fields: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tensors:
    """Random weights under Step-3's names; no norm is near one."""
    hidden, rank = fields["hidden_size"], fields["share_q_dim"]
    dim, heads = fields["head_dim"], fields["num_attention_heads"]
    wide, experts = fields["intermediate_size"], fields["moe_num_experts"]
    narrow, shared = fields["moe_intermediate_size"], fields["share_expert_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (fields["vocab_size"], hidden)}
    for layer in range(fields["num_hidden_layers"]):
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (rank, hidden),
            "self_attn.inter_norm": (rank,),
            "self_attn.wq": (heads * dim, rank),
            "self_attn.k_proj": (dim, hidden),
            "self_attn.v_proj": (dim, hidden),
            "self_attn.o_proj": (hidden, heads * dim),
        }
        if layer in expert_layers(fields):
            block |= {
                "moe.gate": (experts, hidden),
                "moe.gate_proj": (experts, narrow, hidden),
                "moe.up_proj": (experts, narrow, hidden),
                "moe.down_proj": (experts, hidden, narrow),
                "share_expert.gate_proj": (shared, hidden),
                "share_expert.up_proj": (shared, hidden),
                "share_expert.down_proj": (hidden, shared),
            }
        else:
            block |= {
                "mlp.gate_proj": (wide, hidden),
                "mlp.up_proj": (wide, hidden),
                "mlp.down_proj": (hidden, wide),
            }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (fields["vocab_size"], hidden)}
    return {name: torch.randn(shape).mul(0.4).to(dtype) for name, shape in shapes.items()}


def write_step3(folder: Path, fields: dict[str, Any], tensors: Tensors, shards: int = 1) -> Path:
    """A checkpoint folder in one file, or in several with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read_tensors(folder: Path) -> Tensors:
    """All tensors of a folder, whatever the files are called."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def read_fields(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def step3_logits(fields: dict[str, Any], tensors: Tensors, ids: Tensor) -> Tensor:
    """ids [T] -> logits [T, vocab_size], in float64, one token and one expert at a time."""
    w = {name: t.double() for name, t in tensors.items()}
    x = w["model.embed_tokens.weight"][ids]  # [T, H]
    for layer in range(fields["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        block = {name.removeprefix(at).removesuffix(".weight"): t for name, t in w.items() if name.startswith(at)}
        x = x + _attention(fields, block, _norm(fields, x, block["input_layernorm"]))
        x = x + _feed_forward(fields, block, _norm(fields, x, block["post_attention_layernorm"]), layer)
    return _norm(fields, x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def _norm(fields: dict[str, Any], x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + fields["rms_norm_eps"]).sqrt() * scale


def _rotate(fields: dict[str, Any], x: Tensor, position: int) -> Tensor:
    """Element f and element f + dim/2 turn together by position * theta^(-2f/dim); x [..., dim]."""
    half = fields["head_dim"] // 2
    angle = position * fields["rope_theta"] ** -(torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def _attention(fields: dict[str, Any], w: Tensors, x: Tensor) -> Tensor:
    dim = fields["head_dim"]
    latent = _norm(fields, x @ w["self_attn.q_proj"].T, w["self_attn.inter_norm"])  # [T, share_q_dim]
    queries = (latent @ w["self_attn.wq"].T).unflatten(-1, (fields["num_attention_heads"], dim))  # [T, heads, dim]
    keys, values = x @ w["self_attn.k_proj"].T, x @ w["self_attn.v_proj"].T  # [T, dim]
    keys = torch.stack([_rotate(fields, key, j) for j, key in enumerate(keys)])
    rows = []
    for i, query in enumerate(queries):
        scores = _rotate(fields, query, i) @ keys[: i + 1].T / dim**0.5  # [heads, i + 1]
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        rows.append((weights @ values[: i + 1]).flatten())  # [heads * dim]
    return torch.stack(rows) @ w["self_attn.o_proj"].T


def _glu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    g = gate @ x
    return down @ (g / (1 + (-g).exp()) * (up @ x))


def _feed_forward(fields: dict[str, Any], w: Tensors, x: Tensor, layer: int) -> Tensor:
    def glu(token: Tensor, name: str) -> Tensor:
        return _glu(token, w[f"{name}.gate_proj"], w[f"{name}.up_proj"], w[f"{name}.down_proj"])

    if layer not in expert_layers(fields):
        return torch.stack([glu(token, "mlp") for token in x])
    rows = []
    for token in x:
        logits = w["moe.gate"] @ token
        p = logits.exp() / logits.exp().sum()
        chosen = sorted(range(len(p)), key=lambda e: -p[e].item())[: fields["moe_top_k"]]
        total = sum(p[e] for e in chosen) if fields["norm_expert_weight"] else 1.0
        y = glu(token, "share_expert")
        for e in chosen:
            y = y + p[e] / total * _glu(token, w["moe.gate_proj"][e], w["moe.up_proj"][e], w["moe.down_proj"][e])
        rows.append(y)
    return torch.stack(rows)
