"""Flags of method spt."""

from __future__ import annotations

from flags import add_alias, non_negative, number, optional, positive, positive_int
from utils import USAGE, fail

SOFT_PROMPT = ("chosen", "all", "sampled", "fused")
_turns = number(int, lambda value: value == -1 or value >= 1,
                "keeps no turn; give a positive number, or -1 for all turns")


def add_train_args(parser) -> None:
    """Soft prompts, retriever and losses; and the published names of common flags."""
    # The published command line. The rates and batch sizes in the published YAML files differ,
    # but the code never reads them.
    parser.set_defaults(  # as published
        learning_rate=1e-4, per_device_train_batch_size=2, max_steps=-1, seed=3407)
    # what the published configs call them
    add_alias(parser, "train_file", "--train")
    add_alias(parser, "per_device_train_batch_size", "--batch_size")
    add_alias(parser, "num_train_epochs", "--num_epochs")
    add_alias(parser, "max_length", "--max_token_length")
    group = parser.add_argument_group("method spt")
    group.add_argument("--num_prompts", "--K", dest="num_prompts", type=positive_int, default=4,
                       help="soft prompts K (default: %(default)s)")
    group.add_argument("--prompt_length", "--num_virtual_tokens", dest="prompt_length",
                       type=positive_int, default=8,
                       help="rows V of a soft prompt (default: %(default)s)")
    group.add_argument("--prompt_init", choices=["normal", "vocab"], default="normal",
                       help="standard normal rows, as published (default), "
                            "or the rows of random words")
    group.add_argument("--retriever", choices=["linear", "transformer"], default="linear",
                       help="pooled embeddings (default), or encoded first")
    group.add_argument("--heads", choices=["shared", "separate"], default="shared",
                       help="one linear head for prompts and contexts, as published (default), "
                            "or one each")
    group.add_argument("--retriever_learning_rate", type=positive,
                       help="AdamW learning rate of the retriever "
                            "(default: --learning_rate, as published)")
    group.add_argument("--max_context_turns", type=_turns, default=-1, metavar="N",
                       help="keep the last 2N - 1 turns, -1 keeps all (default)")
    _add_loss_flags(group)


def _add_loss_flags(group) -> None:
    """The weights of the four losses, and what shapes them."""
    group.add_argument("--w_lm", type=non_negative, default=1.0,
                       help="weight of the language-model loss (default: %(default)s)")
    # 0.4 is the weight of this and of --w_ctr in the OPT recipes; in the Llama-2 one it is 1.0
    group.add_argument("--w_sel", "--selective_loss_weight", dest="w_sel", type=non_negative,
                       default=0.4, help="weight of the selection loss (default: %(default)s)")
    # the published loss has no weight here, which is a weight of 1
    group.add_argument("--w_fuse", type=non_negative, default=1.0,
                       help="weight of the fusion loss (default: %(default)s)")
    group.add_argument("--w_ctr", "--contrastive_weight", dest="w_ctr", type=non_negative,
                       default=0.4, help="weight of the contrastive loss (default: %(default)s)")
    # Published is logits_raw, whose weights need not sum to 1: larger scores make the mixture
    # sharper, whether or not the prompts fit.
    group.add_argument("--fusion", choices=["logits_raw", "logits_norm", "probs"], default="probs",
                       help="what the fusion loss mixes (default: %(default)s)")
    group.add_argument("--tau_gold", type=positive, default=1.0,
                       help="temperature of the selection target (default: %(default)s)")
    group.add_argument("--tau_sim", type=positive, default=1.0,
                       help="temperature of the retriever's scores (default: %(default)s)")
    group.add_argument("--ctr_threshold", "--contrastive_threshold", dest="ctr_threshold",
                       type=float, default=20.0,
                       help="BLEU above which two personas count as similar (default: %(default)s)")
    group.add_argument("--target_noise", "--adding_noise", dest="target_noise", type=non_negative,
                       default=0.0,
                       help="standard deviation of noise on the logits of the selection target "
                            "(default: 0)")


def check_train(args) -> None:
    """Exit over losses that are all off, and over flags of models that are not frozen."""
    if not args.w_lm + args.w_sel + args.w_fuse + args.w_ctr:
        fail(USAGE, "--w_lm, --w_sel, --w_fuse and --w_ctr are all 0", "there is nothing to learn")
    # None where not given: the defaults of LoRA are resolved with the model
    lora = {"--lora_r": args.lora_r, "--lora_alpha": args.lora_alpha,
            "--lora_dropout": args.lora_dropout, "--lora_target_modules": args.lora_target_modules}
    for flag, value in lora.items():
        if value is not None:
            fail(USAGE, f"{flag} does nothing with method spt", "the model stays frozen; drop it")
    if args.load_in_4bit:
        fail(USAGE, "--load_in_4bit does not work with method spt",
             "drop it: the frozen weights are loaded in bf16 on GPUs")


def add_infer_args(parser) -> None:
    """Which soft prompts answer, and the chat."""
    for name in ("test_file", "save_file"):  # --interactive needs no --save_file
        optional(parser, name)
    # the paper draws one reply of at most 32 tokens, and draws it greedily
    parser.set_defaults(num_response_per_input=1, max_new_tokens=32)
    group = parser.add_argument_group("method spt")
    group.add_argument("--soft_prompt", "--prompts", dest="soft_prompt", choices=SOFT_PROMPT,
                       default="chosen",
                       help="chosen: the retriever's best (default); all: "
                            "--num_response_per_input replies (1) under each; sampled: a prompt "
                            "drawn for every reply; fused: the mixture of all")
    group.add_argument("--prompt_id", type=positive_int, metavar="K",
                       help="reply under soft prompt K, from 1, whatever the retriever says")
    group.add_argument("--selection_noise", type=non_negative, default=0.0,
                       help="standard deviation of noise on the scores before choosing "
                            "(default: 0)")


def check_infer(args) -> None:
    """Exit over combinations that no checkpoint can answer."""
    if args.prompt_id is not None and args.soft_prompt != "chosen":
        fail(USAGE, f"--prompt_id {args.prompt_id} with --soft_prompt {args.soft_prompt}",
             "drop one of the two")
    if args.engine != "hf":
        fail(USAGE, f"--engine {args.engine} has no soft prompts", "--engine hf")
    # beams grow from a single prompt, so they cannot span several prompts or their mixture
    works = args.decoding in ("sampling", "greedy") or \
        (args.decoding == "beam" and args.soft_prompt == "chosen")
    if not works:
        fail(USAGE, f"--decoding {args.decoding} does not work with --soft_prompt "
                    f"{args.soft_prompt}", "--decoding sampling or greedy")
    if args.overgenerate:
        fail(USAGE, "--overgenerate does not work with method spt",
             "draw all of them with --num_response_per_input")
    if args.interactive:
        if not args.test_file:
            fail(USAGE, "--interactive takes its personas from --test_file",
                 "such as data/spt/test.jsonl")
        if args.soft_prompt == "all" or args.num_response_per_input > 1:
            fail(USAGE, "--interactive gives one reply at a time",
                 "--soft_prompt chosen, sampled or fused")
    elif not args.test_file or not args.save_file:
        fail(USAGE, "--test_file and --save_file are required", "or --interactive")
