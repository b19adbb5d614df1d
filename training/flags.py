"""Flags that every method's training has."""

from __future__ import annotations


def add_lora_args(group) -> None:
    group.add_argument("--lora_r", type=int, help="rank (default: 64 for Llama models, else 16)")
    group.add_argument("--lora_alpha", type=float, help="scale is alpha / r (default: 16 for Llama, else 32)")
    group.add_argument("--lora_dropout", type=float, help="probability (default: 0.1 for Llama, else 0.05)")
    group.add_argument("--lora_target_modules", nargs="+", metavar="NAME",
                       help="module names, or all-linear (default: q v for Llama, else q k v lm_head)")
