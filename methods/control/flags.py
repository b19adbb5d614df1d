"""Flags of method control."""

from __future__ import annotations

DEFAULTS = dict(learning_rate=5e-4, num_train_epochs=1, max_steps=-1, max_length=64, per_device_train_batch_size=16,
                weight_decay=0.0, lora_r=16, lora_alpha=32.0, lora_dropout=0.0, lora_target_modules=["all-linear"])


def add_args(group) -> None:
    group.set_defaults(**DEFAULTS)
    group.add_argument("--attributes", nargs="+", metavar="NAME",
                       help="whose tokens stand before the texts; none for no tokens (default: all of the manifest)")
    group.add_argument("--manifest", metavar="FILE", help="scorers and thresholds (default: manifest.json beside --train_file)")
    group.add_argument("--from_scratch", action="store_true", help="random weights of the model's architecture, all trained, no adapter")


def add_infer_args(parser) -> None:
    """The flags that infer.py has for this method."""
    group = parser.add_argument_group("method control")
    next(a for a in parser._actions if a.dest == "test_file").required = False
    group.set_defaults(num_response_per_input=1, max_new_tokens=24, model_name_or_path=None)
    group.add_argument("--want", nargs="+", metavar="NAME=VALUE", default=[], help="what is asked for, such as toxicity=nontoxic sentiment=pos")
    group.add_argument("--sweep", nargs="*", metavar="NAME[=VALUE,VALUE]",
                       help="every combination of values, and of none, of these attributes (default: all that were trained), "
                            "with --num_response_per_input replies to each (default: 1)")
    group.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance, 1 is off (default), 0 is unconditioned")
    group.add_argument("--untrained", choices=["skip", "token"],
                       help="allow attributes that the checkpoint was not trained on, for baselines. skip: without their tokens, so "
                            "what changes is chance; token: with them, as published, though they mean nothing to it")
