"""Training throughput of every variant beside transformers' Llama of the same size.

    PYTHONPATH=src python benchmarks/training.py                         all at 350M, 1B and 124M, context 2048
    PYTHONPATH=src python benchmarks/training.py --budget 480 --markdown training.md
    PYTHONPATH=src python benchmarks/training.py --size 1b --variants mfa,mha,llama --context 2048,8192
    PYTHONPATH=src python benchmarks/training.py --smoke                  tiny, on a CPU, times mean nothing

Every model has the parameters of the size's MHA, the feed-forward width takes up the difference. All are trained alike:
bfloat16 autocast over float32 weights, layers compiled one by one, fused AdamW, gradients clipped, passes of as many
sequences as the size allows accumulated to one step of --tokens-per-step. Tokens are random, with frequencies by Zipf's
law. Ours is trained with `skip_logits`, Llama as it comes, with torch's attention.

Tokens/s is the median over steps, optimizer included. MFU is model FLOPs (`plan.training`: matrix products by the
specs, causal attention counted as half, three times the forward pass, nothing twice) over the card's dense bfloat16
peak in recipes/hardware.toml. Llama's are counted in the same way.

No time without its result: loss and gradient of the first compiled pass are compared with the plain model's, taken a
sequence at a time with plain logits, and the losses of the timed steps must be finite and fall. A model that fails has
no time and ends the program with status 1. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from decode import list_of, positive, where_from
from decode_measure import Budget, rounded
from multimatrix.files import write_text
from multimatrix.plan.hardware import bf16_peak
from training_measure import Settings, device_name, measure
from training_models import MODELS, SIZES, Case, make_cases
from training_report import markdown, print_tables


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    budget = Budget(options.budget)
    device = torch.device("cpu" if options.smoke else "cuda")
    settings = Settings(
        device=device,
        weights=getattr(torch, options.weights),
        compile=options.compile,
        backend="aot_eager" if options.smoke else "inductor",
        steps=options.steps,
        tokens_per_step=options.tokens_per_step,
        seed=options.seed,
        profile=not options.no_profile,
    )
    warnings.filterwarnings("ignore", message=".*TensorFloat32.*")
    cases = make_cases(options.size, options.variants, options.context, options.head_dim)
    rows: dict[Case, dict[str, Any]] = {}
    for case in cases:
        if not budget.allows("model"):
            break
        with budget.step("model"):
            rows[case] = measure(case, settings)
        say(case, rows[case])
    report = rounded(
        {
            **where_from(device, options.commit),
            "transformers": transformers.__version__,
            "command": shlex.join(["python", "benchmarks/training.py", *given]),
            "seed": options.seed,
            "weights": options.weights,
            "compile": options.compile,
            "steps": options.steps,
            "tokens_per_step": options.tokens_per_step,
            "dense_bf16_peak": bf16_peak(device_name(device)),
            "stopped_by_budget": budget.is_spent,
            "not_measured": [case.label for case in cases if case not in rows],
            "rows": [facts(case) | row for case, row in rows.items()],
        }
    )
    print_tables(report)
    failed = {case: row["reason"] for case, row in rows.items() if row["reason"] is not None}
    for case, reason in failed.items():
        print(f"training.py: no time for {case.label}: {reason}", file=sys.stderr, flush=True)
    print(json.dumps(report, allow_nan=False))
    if options.markdown is not None:
        write_text(options.markdown, markdown(report))
    return 1 if failed else 0


def facts(case: Case) -> dict[str, Any]:
    """What is known before anything runs."""
    sizes, cost = case.sizes, case.cost
    return {
        "size": case.size_name,
        "model": case.model,
        "context": case.context,
        "heads": case.spec.num_heads,
        "head_dims": list(case.spec.head_dims),
        "intermediate_size": sizes.intermediate_size,
        "parameters": sizes.parameters,
        "flops_per_token": cost.flops,
        "flops_by_part": cost.by_part(),
    }


def say(case: Case, row: dict[str, Any]) -> None:
    """Progress, a line a model."""
    if row["reason"] is not None:
        told = row["reason"]
    else:
        mfu = "" if row["mfu"] is None else f", MFU {100 * row['mfu']:.1f} %"
        told = f"{row['tokens_per_second']:,.0f} tokens/s{mfu}, compiled in {row['compile_seconds']:.0f} s"
    print(f"{case.label}: {told}", file=sys.stderr, flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", type=list_of(one_of(SIZES)), help="of 350m, 1b, 124m; by default all")
    add("--variants", type=list_of(one_of(MODELS)), help=f"of {', '.join(MODELS)}; by default all")
    add("--context", type=list_of(positive), help="tokens of a sequence, by default 2048")
    add("--head-dim", type=positive, help="of MHA, by default the size's: 128, and 64 at 124m; MFA's are twice as wide")
    add("--steps", type=positive, default=8, help="timed steps, 8 by default")
    add("--tokens-per-step", type=positive, help="of one optimizer step, by default 65536")
    add("--weights", choices=["float32", "bfloat16"], default="float32", help="bfloat16: no autocast")
    add("--compile", choices=["layers", "model", "none"], default="layers", help="what is compiled, by default layers")
    add("--no-profile", action="store_true", help="do not add up the kernels of a step")
    add("--budget", type=float, default=math.inf, help="seconds after which no further model is started")
    add("--seed", type=int, default=0, help="of weights and tokens")
    add("--commit", help="what is measured, where this is no git checkout")
    add("--markdown", type=Path, help="write the tables to this file too")
    add("--smoke", action="store_true", help="the size tiny on a CPU")
    options = parser.parse_args(arguments)
    options.size = options.size or (["tiny"] if options.smoke else ["350m", "1b", "124m"])
    options.variants = options.variants or list(MODELS)
    options.context = options.context or [32 if options.smoke else 2048]
    options.tokens_per_step = options.tokens_per_step or (128 if options.smoke else 65_536)
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --smoke runs on a CPU")
    return options


def one_of(known: Any) -> Any:
    def check(text: str) -> str:
        if text not in known:
            raise ValueError(f"there is no {text!r}; there are {', '.join(known)}")
        return text

    return check


if __name__ == "__main__":
    sys.exit(main())
