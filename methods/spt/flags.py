"""Flags of method spt."""

from __future__ import annotations

from flags import add_alias

PROMPTS = ("chosen", "all", "sampled", "fused")


def add_args(group) -> None:
    group.set_defaults(learning_rate=1e-4, per_device_train_batch_size=2, max_steps=-1, seed=3407)  # as published
    add_alias(group, "train_file", "--train")
    add_alias(group, "per_device_train_batch_size", "--batch_size")
    add_alias(group, "num_train_epochs", "--num_epochs")
    add_alias(group, "max_length", "--max_token_length")
    group.add_argument("--num_prompts", "--K", dest="num_prompts", type=int, default=4, help="soft prompts K (default: %(default)s)")
    group.add_argument("--prompt_length", "--num_virtual_tokens", dest="prompt_length", type=int, default=8,
                       help="rows V of a soft prompt (default: %(default)s)")
    group.add_argument("--prompt_init", choices=["normal", "vocab"], default="normal",
                       help="standard normal rows, as published (default), or the rows of random words")
    group.add_argument("--retriever", choices=["linear", "transformer"], default="linear", help="pooled embeddings (default), or encoded first")
    group.add_argument("--heads", choices=["shared", "separate"], default="shared",
                       help="one linear head for prompts and contexts, as published (default), or one each")
    group.add_argument("--retriever_learning_rate", type=float, help="AdamW learning rate of the retriever (default: --learning_rate, as published)")
    group.add_argument("--w_lm", type=float, default=1.0, help="weight of the language-model loss (default: %(default)s)")
    group.add_argument("--w_sel", "--selective_loss_weight", dest="w_sel", type=float, default=0.4, help="weight of the selection loss (default: %(default)s)")
    group.add_argument("--w_fuse", type=float, default=1.0, help="weight of the fusion loss (default: %(default)s)")
    group.add_argument("--w_ctr", "--contrastive_weight", dest="w_ctr", type=float, default=0.4, help="weight of the contrastive loss (default: %(default)s)")
    group.add_argument("--fusion", choices=["logits_raw", "logits_norm", "probs"], default="probs", help="what the fusion loss mixes (default: %(default)s)")
    group.add_argument("--tau_gold", type=float, default=1.0, help="temperature of the selection target (default: %(default)s)")
    group.add_argument("--tau_sim", type=float, default=1.0, help="temperature of the retriever's scores (default: %(default)s)")
    group.add_argument("--ctr_threshold", "--contrastive_threshold", dest="ctr_threshold", type=float, default=20.0,
                       help="BLEU of two personas that count as alike (default: %(default)s)")
    group.add_argument("--target_noise", "--adding_noise", dest="target_noise", type=float, default=0.0,
                       help="noise on the logits of the selection target (default: 0)")
    group.add_argument("--max_context_turns", type=int, default=-1, help="keep the last 2n - 1 turns, -1 keeps all (default)")


def add_infer_args(parser) -> None:
    group = parser.add_argument_group("method spt")
    for name in ("test_file", "save_file"):
        next(a for a in parser._actions if a.dest == name).required = False
    group.set_defaults(num_response_per_input=1, max_new_tokens=32, prompts="chosen")
    group.add_argument("--prompts", choices=PROMPTS, help="chosen: the retriever's best (default); all: --num_response_per_input replies (1) under each; "
                       "sampled: a prompt drawn for every reply; fused: the mixture of all")
    group.add_argument("--prompt_id", type=int, metavar="K", help="reply under soft prompt K, from 1, whatever the retriever says")
    group.add_argument("--selection_noise", type=float, default=0.0, help="noise on the scores before choosing (default: 0)")
    group.add_argument("--interactive", action="store_true", help="talk to the model: exit, clear, r, save; --test_file gives personas")
