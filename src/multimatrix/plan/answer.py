"""Everything that is said about one model at one context, as one object of plain numbers. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from multimatrix.plan.forms import FORMS, crossing, form_cost
from multimatrix.plan.hardware import Hardware
from multimatrix.plan.model import DecoderSizes, decode_cost, plan_row
from multimatrix.plan.numbers import kv_bytes_per_token
from multimatrix.plan.parallel import Layout, cuts, key_head_copies, kinds, runs
from multimatrix.plan.search import search
from multimatrix.plan.serving import LONGEST, Serving, least_layout, prompt_flops

SHOWN = 10  # of what a search finds
QUERIES = (1, 2, 4, 16, 64, 256, 1024)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked beside model and context.

    layout: None for the fewest devices that hold the largest of `batches` and as much cache as weights.
    target_kv: the share of its cache that a replacement may have, None where it is not asked for. searched: whether
    replacements are searched that fit on the first of `chips`. fixed: sizes of replacements that are given, by variant.
    """

    chips: tuple[Hardware, ...]
    kv_bits: int = 16
    weight_bits: int = 16
    page_size: int = 1
    workspace: float = 0.1
    efficiency: float = 1.0
    layout: Layout | None = None
    batches: tuple[int, ...] = (1,)
    target_kv: float | None = None
    searched: bool = False
    fixed: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def searches(self) -> bool:
        return self.searched or self.target_kv is not None

    def serving(self, sizes: DecoderSizes, chip: Hardware, layout: Layout) -> Serving:
        return Serving(sizes, chip, layout, **self._settings)

    def least(self, sizes: DecoderSizes, chip: Hardware, batch: int, context: int) -> Serving | None:
        """On the fewest devices that hold so many sequences."""
        return least_layout(sizes, chip, batch, context, **self._settings)

    def roomy(self, sizes: DecoderSizes, chip: Hardware, batch: int, context: int, at_least: int = 1) -> Serving:
        """On the fewest that also have room for as much cache as weights; on one device where none does."""
        found = least_layout(sizes, chip, batch, context, at_least=at_least, roomy=True, **self._settings)
        return found or self.serving(sizes, chip, Layout())

    def served(self, sizes: DecoderSizes, chip: Hardware, context: int) -> Serving:
        """On the devices that are given, or on a fitting number of them; a replacement has no fewer than its model."""
        if self.layout is not None:
            return self.serving(sizes, chip, self.layout)
        least = self.served(sizes.instead_of, chip, context).layout.devices if sizes.instead_of else 1
        return self.roomy(sizes, chip, max(self.batches), context, least)

    @property
    def _settings(self) -> dict[str, Any]:
        names = ("kv_bits", "weight_bits", "page_size", "workspace", "efficiency")
        return {name: getattr(self, name) for name in names}


def answer(sizes: DecoderSizes, context: int, question: Question) -> dict[str, Any]:
    """One object: sizes and costs, the forms of attention, and every accelerator of the question.

    Raises:
        InputError: the context, a number of bits or the layout cannot be.
    """
    row = plan_row(sizes, context, question.kv_bits, question.page_size)
    cost = decode_cost(sizes, context, question.kv_bits)
    hardware = []
    for chip in question.chips:
        serving = question.served(sizes, chip, context)
        hardware.append(chip.storing(question.kv_bits).row(cost) | _hardware_row(serving, context, question))
    row |= {
        "total_effective_rank": max(spec.capacity.total_effective_rank for spec in sizes.specs),
        "shared_latent_dim": max(spec.capacity.shared_latent_dim for spec in sizes.specs),
        "weight_bits": question.weight_bits,
        "prefill_flops": prompt_flops(sizes, context),
        "forms": forms_row(sizes, context, question.kv_bits),
        "hardware": hardware,
    }
    if question.chips:
        row["per_device"] = per_device_rows(sizes, context, question, hardware[0]["devices"])
    if question.searches and sizes.instead_of is None:
        row["search"] = search_row(sizes, context, question)
    return row


def _hardware_row(serving: Serving, context: int, question: Question) -> dict[str, Any]:
    largest, layout = serving.largest_batch(context), serving.layout
    prefill = serving.prefill(context)
    return {
        "flops_per_second": {str(bits): serving.chip.peak(bits) for bits in serving.bits},
        "devices": layout.devices,
        "layout": dataclasses.asdict(layout),
        "weight_bytes_per_device": serving.weight_bytes,
        "workspace_bytes_per_device": serving.chip.memory_bytes * serving.workspace,
        "cache_bytes_per_device": max(0, serving.cache_memory),
        "kv_bytes_per_sequence_per_device": serving.kv_bytes_per_sequence(context),
        "largest_batch": largest,
        "prefill_seconds": prefill.seconds,
        "prefill_bound": prefill.bound,
        "forms": forms_on(serving.sizes, context, question.kv_bits, serving.chip),
        "predictions": [
            serving.prediction(batch, context)
            | {
                "longest_context": _bounded(serving.longest_context(batch)),
                "devices_needed": least.layout.devices
                if (least := question.least(serving.sizes, serving.chip, batch, context))
                else None,
            }
            for batch in dict.fromkeys((*question.batches, *([largest] if largest else [])))
        ],
    }


def _bounded(context: int) -> int | None:
    """None for a context that nothing bounds."""
    return context if context < LONGEST else None


def forms_row(sizes: DecoderSizes, context: int, kv_bits: int) -> dict[str, Any]:
    """Absorbed, recomputed and kept: FLOPs of the whole model's attention by number of query tokens.

    recompute_from_queries: the fewest at which recomputing takes fewer FLOPs than the absorbed form, None for never.
    """

    def flops(form: str, queries: int) -> int:
        return sum(form_cost(spec, form, queries, context, window).flops * n for spec, window, n in runs(sizes))

    kept = sum(spec.expanded_elements for spec in sizes.specs)
    return {
        "recompute_from_queries": crossing(
            lambda queries: flops("recomputed", queries) < flops("absorbed", queries), 1, context
        ),
        "expands": any(spec.expansion_products for spec in sizes.specs),
        "kept_kv_bytes_per_token": (kept * kv_bits + 7) // 8,
        "by_queries": [
            {"queries": queries} | {f"{form}_flops": flops(form, queries) for form in FORMS}
            for queries in sorted({*(number for number in QUERIES if number < context), context})
        ],
    }


def forms_on(sizes: DecoderSizes, context: int, kv_bits: int, chip: Hardware) -> dict[str, int | None]:
    """Query tokens of one sequence from which a form takes less time on one device than the absorbed one, or None."""

    def seconds(form: str, queries: int) -> float:
        costs = [(form_cost(spec, form, queries, context, window), count) for spec, window, count in runs(sizes)]
        flops = sum(cost.flops * count for cost, count in costs)
        kv_bytes = sum(cost.elements * count for cost, count in costs) * kv_bits / 8
        return max(flops / chip.peak(kv_bits), kv_bytes / chip.bytes_per_second)

    def faster_from(form: str) -> int | None:
        return crossing(lambda queries: seconds(form, queries) < seconds("absorbed", queries), 1, context)

    return {f"{form}_faster_from": faster_from(form) for form in ("recomputed", "kept")}


def per_device_rows(
    sizes: DecoderSizes, context: int, question: Question, serving_devices: int
) -> list[dict[str, Any]]:
    """What a device holds under each kind of parallelism alone; kinds that cannot cut this model are left out.

    There are as many devices as the question has, or else those that serve the model, 8 at the least, and half of them
    or less where tensor parallelism cannot have so many. copies: devices that hold the same cached element.
    kv_bytes_per_token: of a sequence, on a device that keeps it. largest_batch: of all devices together, where they are
    the first of the question's.
    """
    devices = question.layout.devices if question.layout else 1
    if devices == 1:
        most = max(8, serving_devices)
        halves = (most >> place for place in range(most.bit_length() - 1))
        devices = next((ways for ways in halves if cuts(sizes, Layout(tensor=ways))), most)
    rows = []
    for kind in ("tensor", "attention_data", "data"):
        layout = Layout(**{kind: devices})
        if not cuts(sizes, layout):
            continue
        serving = question.serving(sizes, question.chips[0], layout)
        share = sum(
            alike.count * alike.share * kv_bytes_per_token(alike.layer.specs, question.kv_bits)
            for alike in kinds(sizes, layout)
        )
        rows.append(
            {
                "parallelism": kind,
                "devices": devices,
                "weight_bytes": serving.weight_bytes,
                "kv_bytes_per_token": int(share),
                "largest_batch": serving.largest_batch(context),
                "copies": max(key_head_copies(spec, layout) for spec in sizes.specs),
                "sequences": "all" if layout.attention_groups == 1 else f"1/{layout.attention_groups}",
            }
        )
    return rows


def search_row(sizes: DecoderSizes, context: int, question: Question) -> dict[str, Any]:
    """Replacements of the attention that fit, best total effective rank first; see `search.search`."""
    own = decode_cost(sizes, context, question.kv_bits).kv_bytes
    chip = question.chips[0] if question.searched else None
    batch = max(question.batches)
    serving = _holder(sizes, context, question) if chip else None

    def allowed(candidate: DecoderSizes) -> bool:
        kv_bytes = decode_cost(candidate, context, question.kv_bits).kv_bytes
        if kv_bytes > own * (1 if question.target_kv is None else question.target_kv):
            return False
        return serving is None or dataclasses.replace(serving, sizes=candidate).fits(batch, context)

    multiple = serving.layout.tensor if serving else question.layout.tensor if question.layout else 1
    found = search(sizes, allowed, fixed=question.fixed, multiple=multiple)
    return {
        "target_kv": question.target_kv,
        "hardware": chip and chip.name,
        "devices": serving and serving.layout.devices,
        "batch": batch if chip else None,
        "found": [_found_row(candidate, sizes, context, question, serving) for candidate in found[:SHOWN]],
        "found_in_all": len(found),
    }


def _holder(sizes: DecoderSizes, context: int, question: Question) -> Serving:
    """The devices that a search must fit on: those given, or the fewest with as much room for cache as weights."""
    chip = question.chips[0]
    if question.layout is not None:
        return question.serving(sizes, chip, question.layout)
    return question.roomy(sizes, chip, 1, 1)


def _found_row(
    candidate: DecoderSizes, sizes: DecoderSizes, context: int, question: Question, serving: Serving | None
) -> dict[str, Any]:
    spec = candidate.specs[0]
    cost, own = (decode_cost(one, context, question.kv_bits) for one in (candidate, sizes))
    row = {
        "variant": spec.variant,
        "num_heads": spec.num_heads,
        "head_dim": spec.capacity.rank_per_head,
        "query_rank": spec.to_dict()["query_rank"],
        "total_effective_rank": spec.capacity.total_effective_rank,
        "shared_latent_dim": spec.capacity.shared_latent_dim,
        "attention_parameters": candidate.parts()["attention"],
        "kv_bytes_per_token": kv_bytes_per_token(candidate.specs, question.kv_bits),
        "of_own_kv": cost.kv_bytes / own.kv_bytes,
        "attention_core_flops": cost.attention_core_flops,
        "linear_flops": cost.linear_flops,
    }
    if serving is not None:
        found = dataclasses.replace(serving, sizes=candidate)
        prediction = found.prediction(max(question.batches), context)
        row |= {
            "largest_batch": found.largest_batch(context),
            "seconds_per_token": prediction["seconds_per_token"],
            "tokens_per_second": prediction["tokens_per_second"],
        }
    return row
